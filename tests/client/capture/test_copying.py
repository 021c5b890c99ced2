"""Which threads copy: all of them for large storages, the caller alone for the many small ones."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator

import pytest
import torch

from cairn.capture import copying, native


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_helper_threads_are_left_out_in_this_thread_only() -> None:
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("this torch was built without OpenMP")
    elsewhere: list[int] = []
    with copying._helper_threads(shared=False):
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert elsewhere == [2]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("library", [True, False], ids=["native", "torch"])
def test_small_and_large_storages_arrive_side_by_side(monkeypatch: pytest.MonkeyPatch, *, library: bool) -> None:
    monkeypatch.setattr(copying, "_SHARED_WORK_BYTES", 1000)
    if not library:
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the copy library was not built here")
    sources = [torch.randint(0, 255, (length,), dtype=torch.uint8) for length in (1, 999, 1000, 5, 70_000, 64)]
    image = torch.zeros(sum(source.numel() for source in sources), dtype=torch.uint8)
    copying.copy_all(image.split_with_sizes([source.numel() for source in sources]), sources)
    assert torch.equal(image, torch.cat(sources))


def test_views_show_the_storage_itself() -> None:
    tensor = torch.arange(10, dtype=torch.uint8)
    storage, address = tensor.untyped_storage(), tensor.data_ptr()
    spans = copying.Spans(
        array("Q", [0, 0]),
        array("Q", [address, address + 3]),
        array("Q", [10, 4]),
        [storage, tensor],
        [address] * 2,
        on_cpu=True,
    )
    whole, part = spans.views()
    assert part.tolist() == [3, 4, 5, 6]
    part[0] = 99
    assert whole[3] == 99
