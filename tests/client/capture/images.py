"""What the capture tests share: making images, filling their CRC fields as the daemon does, and comparing tensors."""

from __future__ import annotations

import io
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from awscrt.checksums import crc64nvme

from cairn.capture import native
from cairn.capture.plan import CapturePlan, plan
from cairn.capture.zip_layout import RecordTable


def image_of(state: object) -> bytearray:
    """The finished image of *state*, CRC-32 fields filled."""
    planned = plan(state)
    return filled(planned)


def filled(planned: CapturePlan) -> bytearray:
    """Write a plan into a buffer that holds old bytes everywhere, and make its CRC-32 fields true."""
    image = bytearray(b"\xa5" * planned.size_bytes)
    check_digests(planned.write_into(memoryview(image)).digests, image, planned)
    fill_crcs(image, planned.records)
    return image


def check_digests(digests: array[int], image: bytearray | torch.Tensor, planned: CapturePlan) -> None:
    """The checksums taken while copying are those of *image*, each within a record, and cover all long records."""
    content = memoryview(image if isinstance(image, bytearray) else bytearray(image.numpy()))
    ends = dict(zip(planned.records.offsets, planned.records.lengths, strict=True))
    covered: Counter[int] = Counter()
    for offset, length, crc64, crc32 in zip(*(digests[column::4] for column in range(4)), strict=True):
        assert (crc64, crc32) == (crc64nvme(content[offset : offset + length]), zlib.crc32(content[offset:][:length]))
        assert offset // native.UNIT_BYTES == (offset + length - 1) // native.UNIT_BYTES
        record = max(start for start in ends if start <= offset)
        assert offset + length <= record + ends[record]
        covered[record] += length
    assert all(ends[record] == length for record, length in covered.items())
    if native.can_digest() and planned.fallback_reason is None:
        long = {start for start, length in ends.items() if length >= native.DIGESTED_FROM_BYTES}
        assert len(long - set(covered)) <= 1, "the pickle is no tensor, and may be long"


def fill_crcs(image: bytearray, records: RecordTable) -> None:
    """Do the daemon's part of the work."""
    rows = zip(
        records.offsets,
        records.lengths,
        records.descriptor_crc_offsets,
        records.directory_crc_offsets,
        strict=True,
    )
    for offset, length, in_descriptor, in_directory in rows:
        crc = zlib.crc32(image[offset : offset + length]).to_bytes(4, "little")
        for position in (in_descriptor, in_directory):
            if position:
                assert image[position : position + 4] == bytes(4), "a CRC field was not left zero"
                image[position : position + 4] = crc


def loaded(image: bytearray, *, weights_only: bool) -> Any:
    """What plain torch makes of an image."""
    return torch.load(io.BytesIO(image), weights_only=weights_only)


def through_torch(state: object) -> Any:
    """What ``torch.save`` and ``torch.load`` make of a state: the standard that images are held to."""
    sink = io.BytesIO()
    torch.save(state, sink)
    return torch.load(io.BytesIO(sink.getvalue()), weights_only=False)


def assert_same(ours: Any, theirs: Any) -> None:
    """Deep equality: types, and for tensors every property that saving keeps."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        _assert_same_tensor(ours, theirs)
    elif isinstance(theirs, Mapping):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, torch.storage.TypedStorage):
        assert ours.dtype is theirs.dtype
        assert bytes(ours._untyped_storage) == bytes(theirs._untyped_storage)
    elif isinstance(theirs, (type, FunctionType)) or not hasattr(theirs, "__dict__"):
        assert ours == theirs
    elif vars(theirs):
        assert_same(vars(ours), vars(theirs))
    else:
        assert ours == theirs


def _assert_same_tensor(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    for name in ("dtype", "device", "layout", "requires_grad", "is_quantized", "is_nested", "is_sparse"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.is_conj() == theirs.is_conj()
    assert ours.is_neg() == theirs.is_neg()
    assert_same(vars(ours), vars(theirs))
    if not theirs.is_nested:
        assert ours.shape == theirs.shape
        if theirs.layout is torch.strided:
            assert ours.stride() == theirs.stride()
    if theirs.device.type == "meta":
        return
    if theirs.is_nested:
        for one, other in zip(ours.unbind(), theirs.unbind(), strict=True):
            _assert_same_tensor(one, other)
    elif theirs.is_quantized:
        assert ours.qscheme() == theirs.qscheme()
        assert bits(ours.int_repr()) == bits(theirs.int_repr())
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    elif theirs.layout is not torch.strided:
        assert torch.equal(ours.to_dense(), theirs.to_dense())
    else:
        assert bits(ours) == bits(theirs)


def typed_storage(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    """The tensor's storage as an object that knows its dtype."""
    return tensor.storage()  # type: ignore[no-untyped-call, no-any-return]


def bits(tensor: torch.Tensor) -> bytes:
    """The content, bit by bit, so that NaNs and dtypes without arithmetic compare too."""
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
    row = torch.empty(plain.numel(), dtype=plain.dtype).copy_(plain.flatten())
    return bytes(row.view(torch.uint8).tolist())
