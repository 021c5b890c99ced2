"""The plan's promises: exact size, every byte written, nothing shared with the tensors afterwards, bounded windows."""

from __future__ import annotations

import gc
import pickletools
import sys
import threading
import weakref
import zipfile
from io import BytesIO
from typing import Any

import pytest
import torch

from cairn.capture import pickling
from cairn.capture.pickling import name_when_read
from cairn.capture.plan import Planner, plan
from cairn_api.errors import ConfigurationError, InternalError
from tests.client.capture.images import assert_same, filled, image_of, loaded, through_torch
from tests.client.capture.test_round_trip import NEEDS_TRUST, SAFE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*prototype stage"),
    pytest.mark.filterwarnings("ignore:.*[Qq]uantiz"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:.*invariant checks"),
]

ALL = SAFE | NEEDS_TRUST


def mixed_state() -> dict[str, Any]:
    torch.manual_seed(1)
    flat = torch.randn(5000)
    return {
        "large": torch.randn(300, 400),
        "half": torch.randn(77).bfloat16(),
        "views": [flat[1:9], flat[4000:4100]],
        "empty": torch.empty(0),
        "many": [torch.full((i,), i, dtype=torch.int16) for i in range(100)],
        "step": 12,
    }


@pytest.mark.parametrize("name", ALL)
def test_globals_are_those_in_the_pickle(name: str) -> None:
    planned = plan(ALL[name]())
    with zipfile.ZipFile(BytesIO(filled(planned))) as archive:
        content = archive.read("archive/data.pkl")
    named = [str(argument) for opcode, argument, _ in pickletools.genops(content) if opcode.name == "GLOBAL"]
    assert planned.globals == tuple(sorted({name_when_read(*pair.split(" ")) for pair in named}))


def test_archive_verifies_and_lists_torch_s_records() -> None:
    with zipfile.ZipFile(BytesIO(image_of(mixed_state()))) as archive:
        assert archive.testzip() is None
        names = {info.filename.removeprefix("archive/") for info in archive.infolist()}
    expected = {".format_version", ".storage_alignment", "byteorder", "data.pkl", "version", ".data/serialization_id"}
    assert {name for name in names if not name.startswith("data/")} == expected


def test_tensor_positions_do_not_depend_on_python_values() -> None:
    state = mixed_state()
    before = plan(state)
    state["step"] = "a much longer value than before" * 1000
    after = plan(state)
    assert after.size_bytes > before.size_bytes
    tensors = len(pickling.pickle_state(state).regions) + 3  # behind the three leading records
    assert after.records.offsets[:tensors] == before.records.offsets[:tensors]


def test_changing_the_tensors_afterwards_changes_nothing() -> None:
    state = mixed_state()
    expected = through_torch(state)
    planned = plan(state)
    image = torch.full((planned.size_bytes,), 0xA5, dtype=torch.uint8)
    planned.write_into(image)
    before = image.numpy().tobytes()
    for tensor in [state["large"], state["half"], *state["views"], *state["many"]]:
        tensor.fill_(-7)
    assert image.numpy().tobytes() == before
    assert_same(loaded(bytearray(before), weights_only=True), expected)


@pytest.mark.parametrize("window_bytes", [1, 63, 4096, 100_000, 1 << 30])
def test_windows_join_to_the_same_image(window_bytes: int) -> None:
    state = mixed_state() if window_bytes > 1 else {"t": torch.arange(100)}
    planned = plan(state)
    whole = bytearray(planned.size_bytes)
    planned.write_into(memoryview(whole))
    chunks = [bytes(window) for window in plan(state).windows(window_bytes)]
    assert b"".join(chunks) == whole
    assert all(len(chunk) == window_bytes for chunk in chunks[:-1])
    assert 0 < len(chunks[-1]) <= window_bytes


def test_tensors_are_let_go_once_written() -> None:
    gc.disable()  # references must be gone by themselves, not at some later collection
    try:
        tensor = torch.randn(1000)
        storage = weakref.ref(tensor.untyped_storage())
        alive = weakref.ref(tensor)
        planner = Planner()  # which remembers what it planned, and none of the memory
        planned = planner.plan({"t": tensor})
        del tensor
        assert storage() is not None
        planned.write_into(torch.empty(planned.size_bytes, dtype=torch.uint8))
        assert storage() is None
        assert alive() is None
        with pytest.raises(InternalError, match="written already"):
            planned.write_into(torch.empty(planned.size_bytes, dtype=torch.uint8))
    finally:
        gc.enable()


def test_planning_leaves_the_collector_as_it_was() -> None:
    plan({"t": torch.ones(1)})
    assert gc.isenabled()
    gc.disable()
    try:
        plan({"t": torch.ones(1)})
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_larger_buffer_is_touched_only_where_the_image_is() -> None:
    planned = plan({"t": torch.ones(10)})
    buffer = torch.full((planned.size_bytes + 100,), 0xA5, dtype=torch.uint8)
    planned.write_into(buffer)
    assert buffer[planned.size_bytes :].eq(0xA5).all()
    assert loaded(bytearray(buffer[: planned.size_bytes].numpy()), weights_only=True)["t"].sum() == 10


def test_unfit_buffers_are_refused() -> None:
    planned = plan({"t": torch.ones(10)})
    with pytest.raises(InternalError, match="the buffer has"):
        planned.write_into(torch.empty(planned.size_bytes - 1, dtype=torch.uint8))
    with pytest.raises(InternalError, match="read-only"):
        planned.write_into(memoryview(bytes(planned.size_bytes)))
    with pytest.raises(InternalError, match="uint8"):
        planned.write_into(torch.empty(planned.size_bytes))
    planned.write_into(torch.empty(planned.size_bytes, dtype=torch.uint8))  # refusals cost nothing


def test_a_storage_released_after_planning_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairn.capture.plan.FRESH_S", -1.0)
    tensor = torch.ones(1000)
    planned = plan({"t": tensor})
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ConfigurationError, match="released or moved"):
        planned.write_into(torch.empty(planned.size_bytes, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("state", "place"),
    [
        pytest.param({"a": [1, {"lock": threading.Lock()}]}, r"the state\['a'\]\[1\]\['lock'\]", id="nested"),
        pytest.param(threading.Lock(), "the state ", id="itself"),
        pytest.param({"f": lambda: None}, r"the state\['f'\] \(of type builtins.function\)", id="lambda"),
    ],
)
def test_what_cannot_be_pickled_is_named(state: object, place: str) -> None:
    with pytest.raises(ConfigurationError, match=place) as raised:
        plan(state)
    assert raised.value.hint


def test_exotic_devices_fall_back_to_torch_save(monkeypatch: pytest.MonkeyPatch) -> None:
    # No device is at hand that torch.save handles and the fast layout does not, so the CPU plays one.
    state = mixed_state() | {"f8": torch.zeros(3).to(torch.float8_e5m2), "none": type(None)}
    fast = plan(state)
    monkeypatch.setattr(pickling, "_COPYABLE_DEVICES", frozenset())
    planned = plan(state)
    assert planned.fallback_reason == "a storage on device type 'cpu'"
    assert fast.fallback_reason is None
    assert planned.globals == fast.globals
    assert len(planned.records) == 0
    image = bytearray(planned.size_bytes)
    planned.write_into(memoryview(image))
    with zipfile.ZipFile(BytesIO(image)) as archive:
        assert archive.testzip() is None
    assert b"".join(bytes(window) for window in plan(state).windows(1000)) == image
    assert_same(loaded(image, weights_only=False), through_torch(state))


def test_what_not_even_torch_can_save_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"device type 'meta'.*torch\.save cannot"):
        plan({"s": torch.empty(3, device="meta").untyped_storage()})


@pytest.mark.timeout(60)
def test_a_busy_python_thread_does_not_make_the_copy_wait_once_per_tensor() -> None:
    # Whoever gives the interpreter lock up long enough beside a busy thread waits a whole switch interval for it, half
    # a second here. A loop of copies would give it up 200 times: more time than this test has.
    state = [torch.zeros(1 << 17) for _ in range(200)]
    image = torch.zeros(plan(state).size_bytes, dtype=torch.uint8)
    stop = threading.Event()
    busy = threading.Thread(target=_spin_until, args=(stop,))
    usual_s = sys.getswitchinterval() + 0.5e-6  # Python cuts it down to whole microseconds
    busy.start()
    try:
        for _ in range(2):
            planned = plan(state)
            sys.setswitchinterval(0.5)
            slow_s = sys.getswitchinterval()
            planned.write_into(image)
            assert sys.getswitchinterval() == slow_s, "the interval was not put back"
            sys.setswitchinterval(usual_s)
    finally:
        sys.setswitchinterval(usual_s)
        stop.set()
        busy.join()


def _spin_until(stop: threading.Event) -> None:
    while not stop.is_set():
        pass


@pytest.mark.gpu
def test_gpu_tensors_arrive_before_write_into_returns() -> None:
    if not torch.cuda.is_available():
        pytest.skip("NO GPU HERE: copies from a GPU are not tested on this machine")
    tensor = torch.randn(1 << 24, device="cuda")
    expected = tensor.cpu()
    for _ in range(20):
        tensor.add_(1)  # queued on the current stream; the capture must wait for it
        expected.add_(1)
    planned = plan({"gpu": tensor, "view": tensor[5:9], "cpu": torch.ones(3)})
    image = bytearray(planned.size_bytes)
    planned.write_into(memoryview(image))
    tensor.zero_()
    restored = torch.load(BytesIO(image), weights_only=True, map_location="cpu")
    assert torch.equal(restored["gpu"], expected)
    assert torch.equal(restored["view"], expected[5:9])
    assert torch.load(BytesIO(image), weights_only=True)["gpu"].device == tensor.device
