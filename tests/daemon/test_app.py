"""The daemon as a process and as a whole: it starts whatever the bucket does, and it leaves honestly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn_api.errors import ConfigurationError
from cairn_api.names import VersionId
from cairn_api.v1 import admin_pb2, save_pb2
from cairnd.__main__ import EXIT_CONFIGURATION, EXIT_LEFT_BEHIND, EXIT_OK, main
from cairnd.model import Tier, VersionState
from cairnd.rpc import convert
from tests.daemon.conftest import MakeLab
from tests.daemon.lab import JOB, Lab, Rank, eventually, memfd, state
from tests.daemon.rpc.peer import Peer
from tests.daemon.rpc.test_wire import create, seal
from tests.daemon_process import DaemonProcess

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"}


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections for as long as the test runs."""
    with socket.socket() as holder:  # bound, so that nobody else takes it, and not listening
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


async def commit_one(runtime_dir: Path, *, persist: bool = True) -> tuple[Peer, VersionId]:
    """A rank that commits a version and stays connected."""
    peer = Peer(runtime_dir)
    try:
        return peer, await _commit_one(peer, persist=persist)
    except BaseException:
        await peer.close()
        raise


async def _commit_one(peer: Peer, *, persist: bool) -> VersionId:
    await peer.hello()
    await peer.join(JOB)
    claim = save_pb2.ClaimEpochRequest(job=JOB, epoch=1, nonce="n" * 32, world_size=1, claim=True)
    await peer.call(peer.saving.ClaimEpoch, claim)
    version = VersionId(1, 1, "step1")
    wire = convert.id_to(version)
    if persist:
        await create(peer, version, "n" * 32)
    else:
        await peer.call(peer.saving.Create, save_pb2.CreateRequest(job=JOB, id=wire, world_size=1, nonce="n" * 32))
    fd, segment = memfd(b"bytes"), "a" * 32
    grant = (await peer.call(peer.saving.Grant, save_pb2.GrantRequest(job=JOB, size_bytes=4096))).grant
    assert await peer.ask({"op": "offer", "segment": segment, "size": 4096, "grant": grant}, [fd]) == {}
    os.close(fd)
    await peer.call(peer.saving.Seal, seal(version, "model.pt", segment, 5))
    await peer.call(peer.saving.Prepare, save_pb2.PrepareRequest(job=JOB, id=wire, names=["model.pt"]))
    await peer.call(peer.saving.Commit, save_pb2.CommitRequest(job=JOB, id=wire))
    wait = save_pb2.WaitRequest(job=JOB, id=wire, durability="DURABILITY_TIER1", timeout_s=60)
    assert (await peer.call(peer.saving.Wait, wait)).reached
    return version


async def test_sigterm_brings_what_waits_to_tier2(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        peer, version = await commit_one(daemon.runtime_dir, persist=False)
        assert await asyncio.to_thread(daemon.stop) == EXIT_OK
        await peer.close()
        assert (tmp_path / "bucket" / JOB / str(version) / "model.pt").read_bytes() == b"bytes"
        assert "drain_done" in daemon.log
        assert list(daemon.runtime_dir.iterdir()) == []


async def test_sigterm_with_the_bucket_away_says_what_did_not_make_it_in_time(tmp_path: Path, closed_port: int) -> None:
    with DaemonProcess(
        tmp_path, persistent_storage_path="s3://bucket/prefix", drain_timeout_s=2, environment=CREDENTIALS,
        storage_options=f"endpoint_url=http://127.0.0.1:{closed_port}",
    ) as daemon:  # fmt: skip
        peer, version = await commit_one(daemon.runtime_dir)
        status = await peer.call(peer.admin.Status, admin_pb2.StatusRequest())
        while not status.tier2_error:  # the first look at the bucket may still be under way
            status = await peer.call(peer.admin.Status, admin_pb2.StatusRequest())
        assert not status.tier2_reachable
        assert str(closed_port) in status.tier2_error or "s3://bucket" in " ".join(status.problems)
        assert status.backlog_versions == 1
        assert await asyncio.to_thread(daemon.stop) == EXIT_LEFT_BEHIND
        await peer.close()
        assert f"drain_incomplete versions={JOB}/{version}" in daemon.log
        assert "secret-of-the-test" not in daemon.log
        daemon.start()  # and it is still there
        again = Peer(daemon.runtime_dir)
        await again.hello()
        (found,) = (await again.call(again.admin.List, admin_pb2.ListRequest(job=JOB))).versions
        assert convert.id_from(found.id) == version
        await again.close()


class FakeSystemd:
    """Receives what a daemon tells the service manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self._socket.recv(4096).decode().splitlines()
        return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    fake = FakeSystemd(tmp_path / "notify")
    yield fake
    fake.close()


async def test_systemd_hears_of_readiness_life_and_the_end(make_lab: MakeLab, systemd: FakeSystemd) -> None:
    lab = await make_lab(
        environment={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid())}
    )
    assert systemd.listen()[0] == "READY=1"
    await eventually(lambda: systemd.listen().count("WATCHDOG=1") == 1)
    for beats in (2, 3):
        passed_s = await lab.passes(lambda: systemd.listen().count("WATCHDOG=1") == beats)  # noqa: B023
        assert passed_s <= 11  # half of what systemd waits for
    assert await lab.app.drain_and_stop() == []
    assert "STOPPING=1" in systemd.listen()


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "20", "WATCHDOG_PID": "1"}])
async def test_without_systemd_nobody_is_told(make_lab: MakeLab, environment: dict[str, str]) -> None:
    lab = await make_lab(environment=environment)
    assert lab.app.notifier.watchdog_interval_s == 0
    lab.app.notifier.status("nobody hears")


def test_a_process_tells_systemd_when_its_sockets_answer(tmp_path: Path, systemd: FakeSystemd) -> None:
    with DaemonProcess(tmp_path, environment={"NOTIFY_SOCKET": str(systemd.path)}) as daemon:
        deadline_s = time.monotonic() + 60
        while "READY=1" not in systemd.listen():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert daemon.stop() == EXIT_OK
        assert "STOPPING=1" in systemd.listen()


async def test_metrics_are_served_when_configured(make_lab: MakeLab) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = await make_lab(metrics_address=f"127.0.0.1:{port}")
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    await lab.reaches(version, Tier.TIER2)
    await lab.app.reporter.refresh()

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            return str(reply.read(), "utf-8")

    text = await asyncio.to_thread(scrape)
    for line in (
        'cairn_saves_total{outcome="committed"} 1.0',
        f'cairn_last_persisted_sequence{{job="{JOB}"}} 1.0',
        "cairn_backlog_versions 0.0",
        "cairn_tier2_reachable 1.0",
        "cairn_clients 1.0",
        f"cairn_tier1_used_bytes {float(lab.version(version).size_bytes)}",
    ):
        assert line in text.splitlines(), line
    for stage in ("tier1_write", "tier2_upload"):
        assert f'cairn_stage_seconds_count{{stage="{stage}"}} 1.0' in text


@pytest.mark.parametrize("address", ["127.0.0.1:none", "127.0.0.1", "256.1.1.1:99999"])
async def test_a_metrics_address_that_cannot_be_is_told_and_leaves_nothing(tmp_path: Path, address: str) -> None:
    lab = Lab(tmp_path, metrics_address=address)
    with pytest.raises(ConfigurationError, match="cannot serve metrics") as caught:
        await lab.start()
    assert "metrics_address" in caught.value.hint
    await lab.close()
    assert list((tmp_path / "run").iterdir()) == []


async def test_an_unreachable_bucket_does_not_keep_it_from_starting(make_lab: MakeLab, closed_port: int) -> None:
    lab = await make_lab(
        bucket="s3://bucket/prefix",
        storage_options=(f"endpoint_url=http://127.0.0.1:{closed_port}", "key=a", "secret=b"),
    )  # fmt: skip
    (rank,) = await Rank.launch(lab)
    version = await rank.save(persist=True)
    assert state(lab, version) is VersionState.COMMITTED
    await eventually(lambda: lab.events("tier2_unreachable"))
    status = await lab.app.reporter.status()
    assert not status.tier2_reachable
    assert any("s3://bucket/prefix" in problem and "Next step" in problem for problem in status.problems)
    assert [version.id for version in lab.app.replicator.backlog()] == [version]


async def test_a_finished_jobs_newest_version_is_persisted(lab: Lab) -> None:
    ranks = await Rank.launch(lab, world_size=2)
    versions = []
    for _ in range(2):
        version = ranks[0].next()
        for rank in ranks:
            rank.create(version)
            rank.seal(version, f"{rank.rank}.pt", b"x")
            await rank.prepare(version, [f"{rank.rank}.pt"])
        ranks[0].commit(version)
        await lab.reaches(version, Tier.TIER1)
        versions.append(version)
    ranks[0].leave()
    await lab.settle()
    assert not lab.version(versions[1]).has(Tier.TIER2)  # the job still runs
    ranks[1].leave()
    await lab.reaches(versions[1], Tier.TIER2)
    assert lab.events("job_idle")
    assert lab.app.catalog.get(JOB, versions[0]) is None or not lab.version(versions[0]).has(Tier.TIER2)


async def test_a_reader_that_leaves_persists_nothing(lab: Lab) -> None:
    (rank,) = await Rank.launch(lab)
    version = await rank.save()
    reader = await Rank.join(lab, job="another")
    reader.leave()
    await lab.settle()
    assert not lab.events("job_idle")
    assert not lab.version(version).has(Tier.TIER2)


async def test_a_drain_that_ends_in_time_and_one_that_does_not(make_lab: MakeLab) -> None:
    lab = await make_lab(drain_timeout_s=30)
    (rank,) = await Rank.launch(lab)
    version = await rank.save()
    assert await lab.app.drain_and_stop() == []
    assert lab.version(version).has(Tier.TIER2)
    await lab.restart(run=False)
    (rank,) = await Rank.launch(lab)
    open_save = rank.next()
    rank.create(open_save)
    rank.seal(open_save, "a", b"x")
    await rank.prepare(open_save, ["a"])
    rank.commit(open_save)
    draining = asyncio.ensure_future(lab.app.drain_and_stop())  # nothing runs that could write it
    await lab.passes(draining.done, limit_s=60)
    assert [item.id for item in await draining] == [open_save]
    (event,) = lab.events("drain_incomplete")
    assert str(open_save) in event.fields["versions"]


async def test_jumps_of_the_clock_change_nothing(make_lab: MakeLab) -> None:
    lab = await make_lab(num_of_version_in_retention=2)
    (rank,) = await Rank.launch(lab)
    open_save = rank.next()
    rank.create(open_save)
    for jump_s in (10 * 365 * 86400.0, -20 * 365 * 86400.0):
        lab.clock.jump(jump_s)
        lab.clock.advance(2)
        await lab.settle()
        assert state(lab, open_save) is VersionState.OPEN
    status = await lab.app.reporter.status()
    assert status.uptime_s < 10
    version = await rank.save(persist=True)
    await lab.reaches(version, Tier.TIER2)
    assert (await lab.app.reporter.status()).oldest_unpersisted_age_s == 0


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--tier1-path", "/proc/nowhere"], "tier 1 at /proc/nowhere"),
        (["--runtime-dir", "/proc/nowhere"], "runtime folder"),
        (["--lease-s", "never"], "lease_s"),
    ],
)
def test_what_cannot_work_is_said_at_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], match: str
) -> None:
    base = ["--tier1-path", str(tmp_path / "t"), "--runtime-dir", str(tmp_path / "r")]
    assert main([*base, *flags]) == EXIT_CONFIGURATION
    said = capfd.readouterr().err
    assert match in said
    assert "Next step" in said
