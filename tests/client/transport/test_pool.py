"""Which buffer a partition gets, on real segments and a budget that refuses."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from cairn.transport.pool import Pool
from cairn.transport.shared_memory import Segment
from cairn_api.errors import ConfigurationError, OverloadedError, SaveFailedError
from cairn_api.names import VersionId

MIB = 1 << 20
ONE, TWO, THREE = (VersionId(1, number, "t") for number in (1, 2, 3))


@dataclass
class Budget:
    """The daemon's side: counts granted bytes, refuses beyond the limit."""

    limit_bytes: int = 64 * MIB
    granted: dict[str, int] = field(default_factory=dict)

    def share(self, size_bytes: int, make: Callable[[], Segment]) -> None:
        if sum(self.granted.values()) + size_bytes > self.limit_bytes:
            raise OverloadedError("the budget is spent")
        self.granted[make().name] = size_bytes

    def release(self, segment: Segment) -> None:
        del self.granted[segment.name]


@pytest.fixture
def budget() -> Budget:
    return Budget()


@pytest.fixture
def pool(budget: Budget) -> Iterator[Pool]:
    made = Pool(share=budget.share, release=budget.release)
    yield made
    made.close()


def test_the_buffer_of_the_same_partition_is_preferred(pool: Pool) -> None:
    model = pool.acquire(ONE, "model", 3 * MIB)
    optim = pool.acquire(ONE, "optim", 3 * MIB)
    assert pool.free([model, optim]) == {ONE}
    assert pool.acquire(TWO, "optim", 3 * MIB) == optim
    assert pool.acquire(TWO, "model", 4 * MIB) == model


def test_an_owned_buffer_is_never_given_out(pool: Pool) -> None:
    first = pool.acquire(ONE, "model", MIB)
    second = pool.acquire(TWO, "model", MIB)
    assert first != second
    assert pool.free([first]) == {ONE}
    assert pool.free([first, "unknown"]) == set(), "freed once"
    assert pool.acquire(THREE, "model", MIB) == first


def test_a_version_is_over_when_its_last_buffer_is_free(pool: Pool) -> None:
    first = pool.acquire(ONE, "a", MIB)
    second = pool.acquire(ONE, "b", MIB)
    assert pool.free([first]) == set()
    assert pool.free([second]) == {ONE}


def test_a_small_partition_does_not_take_the_large_buffer(pool: Pool) -> None:
    large = pool.acquire(ONE, "model", 16 * MIB)
    pool.free([large])
    small = pool.acquire(TWO, "scalars", 1000)
    assert small != large
    assert pool.acquire(TWO, "model", 16 * MIB) == large


def test_a_state_that_has_grown_replaces_its_buffer_within_the_budget(pool: Pool, budget: Budget) -> None:
    budget.limit_bytes = 10 * MIB
    old = pool.acquire(ONE, "model", 6 * MIB)
    pool.free([old])
    new = pool.acquire(TWO, "model", 8 * MIB)
    assert budget.granted == {new: 8 * MIB}


def test_with_the_budget_spent_a_buffer_too_large_is_better_than_none(pool: Pool, budget: Budget) -> None:
    budget.limit_bytes = 16 * MIB
    large = pool.acquire(ONE, "model", 16 * MIB)
    pool.free([large])
    assert pool.acquire(TWO, "scalars", 1000) == large


def test_a_spent_budget_is_an_error_and_loses_no_buffer(pool: Pool, budget: Budget) -> None:
    budget.limit_bytes = 4 * MIB
    held = pool.acquire(ONE, "model", 4 * MIB)
    with pytest.raises(OverloadedError):
        pool.acquire(TWO, "model", 4 * MIB)
    assert pool.segment(held).size_bytes == 4 * MIB


def test_a_new_daemon_leaves_only_what_holds_something(pool: Pool) -> None:
    kept = pool.acquire(ONE, "model", MIB)
    free = pool.acquire(TWO, "model", MIB)
    gone = pool.acquire(THREE, "model", MIB)
    pool.free([free])
    pool.keep_only([ONE])
    assert [segment.name for segment in pool.owned_by(ONE)] == [kept]
    for name in (free, gone):
        with pytest.raises(SaveFailedError):
            pool.segment(name)
    assert pool.acquire(TWO, "model", MIB) not in (free, gone)


def test_a_buffer_made_while_the_daemon_was_replaced_is_made_again(budget: Budget) -> None:
    shared: list[str] = []

    def share(size_bytes: int, make: Callable[[], Segment]) -> None:
        shared.append(make().name)
        if len(shared) == 1:
            replaced.keep_only([])  # what a reconnect on the other thread does
        budget.share(size_bytes, make)

    replaced = Pool(share=share, release=budget.release)
    try:
        name = replaced.acquire(ONE, "model", MIB)
        assert len(shared) == 2
        assert name == shared[1]
    finally:
        replaced.close()


def test_a_buffer_made_while_the_client_closes_is_let_go(budget: Budget) -> None:
    made: list[Segment] = []

    def share(size_bytes: int, make: Callable[[], Segment]) -> None:
        made.append(make())
        budget.share(size_bytes, make)
        closing.close()

    closing = Pool(share=share, release=budget.release)
    with pytest.raises(ConfigurationError, match="closed"):
        closing.prepare_spare("model", MIB, 1)
    assert [segment.fd for segment in made] == [-1]


def test_a_spare_that_became_too_small_does_not_count(pool: Pool, budget: Budget) -> None:
    assert pool.prepare_spare("model", MIB, 1)
    assert not pool.prepare_spare("model", 2 * MIB, 1)
    assert pool.prepare_spare("model", 5 * MIB, 1)
    assert not pool.prepare_spare("model", 5 * MIB, 1)
    assert len(budget.granted) == 2


def test_a_save_waits_for_the_spare_that_is_being_made_and_for_no_other(budget: Budget) -> None:
    begun, go_on = threading.Event(), threading.Event()
    shared: list[int] = []

    def share(size_bytes: int, make: Callable[[], Segment]) -> None:
        shared.append(size_bytes)
        budget.share(size_bytes, make)
        if len(shared) == 1:
            begun.set()
            assert go_on.wait(30)

    busy = Pool(share=share, release=budget.release)

    def make_spares() -> None:
        for partition in ("a", "b", "c"):
            busy.prepare_spare(partition, MIB, 1)

    names: list[str] = []
    background = threading.Thread(target=make_spares)
    save = threading.Thread(target=lambda: names.append(busy.acquire(ONE, "large", 20 * MIB)))
    try:
        background.start()
        assert begun.wait(30)
        save.start()
        while not busy._saves_waiting:
            pass
        go_on.set()
        save.join()
        background.join()
        assert shared == [2 * MIB, 20 * MIB, 2 * MIB, 2 * MIB]
    finally:
        go_on.set()
        busy.close()


def test_a_save_that_comes_early_takes_the_spare_that_was_being_made(budget: Budget) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def share(size_bytes: int, make: Callable[[], Segment]) -> None:
        budget.share(size_bytes, make)
        begun.set()
        assert go_on.wait(30)

    busy = Pool(share=share, release=budget.release)
    background = threading.Thread(target=busy.prepare_spare, args=("model", 3 * MIB, 1))
    save = threading.Thread(target=busy.acquire, args=(ONE, "model", 3 * MIB))
    try:
        background.start()
        assert begun.wait(30)
        save.start()
        while not busy._saves_waiting:
            pass
        go_on.set()
        save.join()
        background.join()
        assert len(budget.granted) == 1
        assert [segment.name for segment in busy.owned_by(ONE)] == list(budget.granted)
    finally:
        go_on.set()
        busy.close()


def filled(segment: Segment, value: int) -> None:
    segment.unprotect()
    segment.image[:3] = value
    segment.protect()


def test_a_descriptor_leads_to_the_mapping_of_its_buffer(pool: Pool) -> None:
    for value, name in enumerate(("model", "optim")):
        filled(pool.segment(pool.acquire(ONE, name, MIB)), value + 1)
    other = os.memfd_create("other")
    for segment in pool.owned_by(ONE):
        reopened = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY)
        with pool.mapping_of(reopened) as memory:
            assert memory is not None
            assert bytes(memory)[:3] == bytes(segment.image[:3])
        with ExitStack() as unfinished:
            pool.writers.begin(unfinished)
            with pool.mapping_of(reopened) as none:
                assert none is None, "it may be the one that is being filled"
        os.close(reopened)
    with pool.mapping_of(other) as none:
        assert none is None
    os.close(other)


def test_a_mapping_lasts_as_long_as_it_is_used(pool: Pool) -> None:
    filled(pool.segment(pool.acquire(ONE, "model", MIB)), 7)
    (segment,) = pool.owned_by(ONE)
    with pool.mapping_of(segment.fd) as memory:
        pool.discard(ONE)
        assert memory is not None
        assert bytes(memory)[:3] == bytes([7, 7, 7])
