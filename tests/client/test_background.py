"""The thread that ends saves: everything is done once, in order, and nobody waits for what nobody does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cairn.background import Background


def unexpected(error: BaseException) -> None:
    raise AssertionError("work failed") from error


def test_work_is_done_in_order_on_one_thread_that_stays() -> None:
    background = Background(unexpected)
    done: list[tuple[int, int]] = []
    for number in range(50):
        background.submit(lambda number=number: done.append((number, threading.get_ident())))  # type: ignore[misc]
        if number % 10 == 0:
            assert background.settle(30)
    assert background.settle(30)
    background.close()
    assert [number for number, _ in done] == list(range(50))
    assert len({thread for _, thread in done}) == 1


def test_without_a_thread_work_is_done_here_behind_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    background = Background(unexpected)
    done: list[str] = []
    free = threading.Event()

    def slow() -> None:
        assert free.wait(30)
        done.append("first")

    def refused(*_: object) -> None:
        free.set()
        raise RuntimeError("can't start new thread")

    background.submit(slow)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    background.submit(lambda: done.append("second"))
    assert done == ["first", "second"]
    assert background.settle(0)
    background.close()


def test_what_control_c_kept_from_being_submitted_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    background = Background(unexpected)
    done: list[str] = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ThreadPoolExecutor, "submit", interrupted)
        background.submit(lambda: done.append("never"))
    assert background.settle(0)
    background.submit(lambda: done.append("next"))
    assert background.settle(30)
    assert done == ["next"]
    background.close()


def test_work_does_not_wait_for_itself() -> None:
    background = Background(unexpected)
    seen: list[bool] = []
    background.submit(lambda: seen.append(background.inside and background.settle()))
    assert background.settle(30)
    assert seen == [True]
    assert not background.inside
    background.close()
