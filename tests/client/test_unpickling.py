"""Plain states are unpickled as torch does it; everything else is refused, whatever the pickle tries."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cairn.unpickling
from cairn.image import Image
from cairn.unpickling import NotPlainError, load_plain

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def bytes_of(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def pickle_of(value: Any) -> bytes:
    with zipfile.ZipFile(io.BytesIO(bytes_of(value))) as archive:
        return archive.read("archive/data.pkl")


def by_image(path: Path, value: Any, *, map_location: Any = None) -> Any:
    path.write_bytes(bytes_of(value))
    fd = os.open(path, os.O_RDONLY)
    try:
        return Image.mapped(fd, path.stat().st_size).load(map_location=map_location, weights_only=True)
    finally:
        os.close(fd)


def no_storage(_key: str, size_bytes: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(size_bytes)  # type: ignore[no-untyped-call]


def plain_state() -> dict[str, Any]:
    base = torch.arange(6000.0)
    return {
        "dtypes": [(torch.rand(300) * 9).to(dtype) for dtype in _DTYPES],
        "views": (base[:100], base[5:4000:3], base.view(60, 100).t(), base[0]),
        "empty": torch.empty(0, 3),
        "wanted": torch.rand(5).requires_grad_(),
        "parameter": torch.nn.Parameter(torch.rand(9), requires_grad=False),
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0]}]},
        "values": [None, True, -1, 1 << 70, "text \ud800", 1.5],
    }


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride(), ours.requires_grad) == (theirs.dtype, theirs.stride(), theirs.requires_grad)
        assert (ours.storage_offset(), ours.untyped_storage().nbytes()) == (
            theirs.storage_offset(),
            theirs.untyped_storage().nbytes(),
        )
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        assert vars(ours) == vars(theirs) if isinstance(theirs, OrderedDict) else True
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("map_location", [None, "cpu", torch.device("cpu")])
def test_a_plain_state_is_the_one_that_torch_loads_and_torch_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, map_location: Any
) -> None:
    state = plain_state()
    expected = torch.load(io.BytesIO(bytes_of(state)), map_location=map_location, weights_only=True)
    monkeypatch.setattr("cairn.image._load", None)
    loaded = by_image(tmp_path / "state.pt", state, map_location=map_location)
    assert_same(loaded, expected)
    assert loaded["module"]._metadata == state["module"]._metadata
    views = loaded["views"]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.rand(8).to(torch.float8_e4m3fn),
        torch.rand(8, dtype=torch.complex64).conj(),
        torch.float16,
        torch.Size([1, 2]),
        torch.device("cpu"),
    ],
    ids=str,
)
def test_what_is_not_plain_is_left_to_torch(tmp_path: Path, value: Any) -> None:
    state = {"plain": torch.rand(3), "value": value}
    with pytest.raises(NotPlainError):
        load_plain(pickle_of(state), no_storage, location="cpu")
    loaded = by_image(tmp_path / "state.pt", state)
    expected = torch.load(io.BytesIO(bytes_of(state)), weights_only=True)
    assert str(loaded) == str(expected)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_by_itself_is_left_to_torch(tmp_path: Path) -> None:
    state = {"plain": torch.rand(3), "storage": torch.rand(4).storage()}  # type: ignore[no-untyped-call]
    assert isinstance(by_image(tmp_path / "state.pt", state)["storage"], torch.storage.TypedStorage)


def test_a_state_in_another_byte_order_is_left_to_torch(tmp_path: Path) -> None:
    data = bytes_of({"x": torch.tensor([1, 256])}).replace(b"little", b"middle")
    path = tmp_path / "state.pt"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(Exception, match="endianness"):
            Image.mapped(fd, len(data)).load(map_location=None, weights_only=True)
    finally:
        os.close(fd)


def test_a_tensor_from_elsewhere_needs_a_location() -> None:
    pickled = pickle_of({"x": torch.rand(3)}).replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
    with pytest.raises(NotPlainError):
        load_plain(pickled, no_storage, location="cpu")
    assert load_plain(pickled, no_storage, location=None)["x"].device.type == "cpu"


def call(name: str, arguments: bytes = b")") -> bytes:
    module, _, attribute = name.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode() + arguments + pickle.REDUCE


def setting(name: str, attribute: str) -> bytes:
    """What sets *attribute* of the object *name* to 1, as slots and as entry of its dict."""
    module, _, last = name.rpartition(".")
    entry = b"}X" + len(attribute).to_bytes(4, "little") + attribute.encode() + b"K\x01s"
    return pickle.GLOBAL + f"{module}\n{last}\n".encode() + entry + entry + pickle.TUPLE2 + pickle.BUILD


_REBUILD = "torch._utils._rebuild_tensor_v2"
_HOSTILE = {
    "a function": call("os.getcwd"),
    "a builtin": call("builtins.eval", b"X\x01\0\0\x001\x85"),
    "an instruction of protocol 0": b"(S'1'\nios\nsystem\n",
    "a name with dots": call("torch.serialization.os.getcwd"),
    "a name of protocol 4": b"X\x02\0\0\0osX\x06\0\0\0getcwd\x93)R",
    "another class of torch": call("torch.storage.UntypedStorage"),
    "no storage": call(_REBUILD, b"(NK\x00))\x89NtR"[:-1]),
    "an object of no class": pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n)" + pickle.NEWOBJ,
    "an attribute of what rebuilds": setting(_REBUILD, "__call__"),
    "an attribute of a class": setting("collections.OrderedDict", "update"),
    "another identifier": b"X\x07\0\0\0storage\x85Q",
    "an identifier as text": b"Pstorage\n",
    "an extension": b"\x82\x01)R",
}


@pytest.mark.parametrize("hostile", _HOSTILE.values(), ids=_HOSTILE)
def test_nothing_of_a_hostile_pickle_runs(hostile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(os, "getcwd", lambda: ran.append(1))
    monkeypatch.setattr(os, "system", ran.append)
    before = {name: getattr(OrderedDict, name) for name in dir(OrderedDict)}
    with pytest.raises(NotPlainError):
        load_plain(b"\x80\x02" + hostile + b".", no_storage, location=None)
    assert not ran
    assert before == {name: getattr(OrderedDict, name) for name in dir(OrderedDict)}
    assert load_plain(pickle_of({"x": torch.ones(3)}), no_storage, location="cpu")["x"].shape == (3,)


def test_an_extension_that_this_process_knows_is_no_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setitem(copyreg._extension_cache, 1, lambda: ran.append(1))  # type: ignore[attr-defined]
    with pytest.raises(NotPlainError):
        load_plain(b"\x80\x02" + _HOSTILE["an extension"] + b".", no_storage, location=None)
    assert not ran


@pytest.mark.parametrize("change", [lambda data: data[:-3], lambda data: b"\x80\x04" + data[2:], lambda _: b""])
def test_a_damaged_pickle_is_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(NotPlainError):
        load_plain(change(pickle_of({"x": torch.rand(3)})), no_storage, location="cpu")


def test_a_tensor_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    data = bytes_of({"x": torch.zeros(5000), "y": torch.ones(5000)}).replace(b"M\x88\x13\x85", b"M\x89\x13\x85")
    (tmp_path / "state.pt").write_bytes(data)
    fd = os.open(tmp_path / "state.pt", os.O_RDONLY)
    try:
        with pytest.raises(RuntimeError, match="resize storage"):
            Image.mapped(fd, len(data)).load(map_location=None, weights_only=True)
    finally:
        os.close(fd)


def test_the_table_has_no_entry_that_a_pickle_could_use_otherwise() -> None:
    known = set(cairn.unpickling._KNOWN)
    assert {f"{module}.{name}" for module, name in known} == {
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
    }
    for entry in cairn.unpickling._KNOWN.values():
        assert entry is OrderedDict or not hasattr(entry, "__dict__")
