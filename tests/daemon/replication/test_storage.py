"""Which locations a job may use, and what is said of those that do not answer."""

from __future__ import annotations

import asyncio

import pytest

from cairn_api.errors import ConfigurationError, UnavailableError
from cairnd import layout
from cairnd.metrics import Metrics
from cairnd.replication.bucket import BucketRepository
from cairnd.replication.storage import Storage
from cairnd.restore import inventory
from cairnd.tiers.object_store import Capabilities, ObjectStore
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank
from tests.daemon.replication.stores import LosesReplies


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("s3://own/prefix", True), ("s3://own/prefix/", True), ("s3://own/prefix/below/it", True),
        ("s3://team", True), ("s3://team/x", True), ("file:///srv/cairn/a", True),
        ("s3://own", False), ("s3://own/prefixed", False), ("s3://own/prefix/../other", False), ("s3://teams/x", False),
        ("S3://team/x", False), ("gs://team/x", False), ("file:///srv", False), ("file:///srv/cairn/../x", False),
        ("", False), ("s3://", False), ("/srv/cairn", False),
    ],
)  # fmt: skip
async def test_allowed_locations(lab: Lab, url: str, allowed: bool) -> None:
    storage = Storage(
        lab.app.node, "s3://own/prefix", ("s3://team/", "file:///srv/cairn"), lab.app._open_store, lab.app._workers,
        lab.app.events, Metrics(),
    )  # fmt: skip
    if allowed:
        storage.check_allowed(url)
    else:
        with pytest.raises(ConfigurationError, match="does not allow"):
            storage.check_allowed(url)


async def test_many_who_ask_at_once_probe_once(lab: Lab) -> None:
    storage, url = lab.app.storage, lab.settings.persistent_storage_path
    storage._buckets.clear()
    storage.health.clear()
    buckets = await asyncio.gather(*[storage.bucket(url) for _ in range(8)])
    assert len({id(bucket) for bucket in buckets}) == 1
    assert storage.health[url].conditional_put


async def test_what_a_killed_probe_left_does_not_condemn_the_store(make_lab: MakeLab) -> None:
    lab = await make_lab(run=False)
    left = lab.bucket_path / layout.Bucket.probe(lab.app.node, "killed")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"1")
    await lab.bucket()
    assert lab.app.storage.health[lab.settings.persistent_storage_path].conditional_put


async def test_a_caller_that_gives_up_does_not_disturb_the_probe(lab: Lab) -> None:
    storage, url = lab.app.storage, lab.settings.persistent_storage_path
    for _ in range(20):
        storage._buckets.clear()
        storage.health.clear()
        asking = asyncio.ensure_future(storage.bucket(url))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await storage.bucket(url)
        assert storage.health[url].conditional_put


async def test_a_location_that_does_not_answer_is_told_with_the_next_step(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Rank.launch(lab)
    answers = asyncio.Event()

    async def silent(url: str) -> BucketRepository:
        await answers.wait()
        raise UnavailableError(f"{url} is away")

    monkeypatch.setattr(inventory, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(lab.app.storage, "bucket", silent)
    told = [await lab.app.inventory.refresh(JOB), await lab.app.inventory.refresh_all()]
    answers.set()
    for error in told:
        assert "has not answered" in error
        assert "Next step: " in error


@pytest.mark.parametrize("climbing", ["/%2e%2e/%2e%2e/etc", "/../etc", "/./../x", "\\..\\etc"])
async def test_a_location_is_compared_as_the_store_will_read_it(lab: Lab, climbing: str) -> None:
    with pytest.raises(ConfigurationError, match="does not allow"):
        lab.app.storage.check_allowed(lab.settings.persistent_storage_path + climbing)


async def test_who_waits_for_an_answer_that_fails_does_not_ask_again(make_lab: MakeLab) -> None:
    stores: list[LosesReplies] = []

    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(LosesReplies(store))
        stores[-1].away = True
        return stores[-1]

    lab = await make_lab(run=False, wrap_store=wrap)
    answers = await asyncio.gather(*[lab.bucket() for _ in range(8)], return_exceptions=True)
    assert all(isinstance(answer, UnavailableError) for answer in answers)
    assert len(stores[0].calls) == 1
    stores[0].away = False
    await lab.bucket()


class IgnoresConditions(LosesReplies):
    """As three servers in common use do."""

    def probe(self, key: str) -> Capabilities:
        return super().probe(key)._replace(conditional_put=False)


async def test_a_store_without_conditional_put_is_refused_with_the_way_out(make_lab: MakeLab) -> None:
    lab = await make_lab(wrap_store=IgnoresConditions)
    with pytest.raises(ConfigurationError, match="ignores conditional writes") as caught:
        await lab.bucket()
    assert "If-None-Match" in caught.value.hint
    status = await lab.app.reporter.status()
    assert not status.tier2_reachable
    assert "conditional" in status.tier2_error


async def test_an_unreachable_bucket_is_told_once_and_forgotten_when_it_answers(make_lab: MakeLab) -> None:
    stores: list[LosesReplies] = []

    def wrap(store: ObjectStore) -> ObjectStore:
        stores.append(LosesReplies(store))
        stores[-1].away = True
        return stores[-1]

    lab = await make_lab(run=False, wrap_store=wrap)
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await lab.bucket()
    assert len(lab.events("tier2_unreachable")) == 1
    assert lab.app.metrics.tier2_reachable._value.get() == 0
    stores[0].away = False
    await lab.bucket()
    assert lab.events("tier2_reachable")
    assert lab.app.metrics.tier2_reachable._value.get() == 1
    with pytest.raises(ConfigurationError, match="no tier 2"):
        await lab.app.storage.bucket("")
