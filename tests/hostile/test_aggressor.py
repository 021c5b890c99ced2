"""A hostile client beside an honest one, on the same real daemon: the honest one notices nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn_api.v1 import restore_pb2, save_pb2
from cairn_api.wire import PROTOCOL_VERSION
from tests.crash.ranks import wait_until
from tests.crash.trainer import Trainers
from tests.daemon_process import DaemonProcess
from tests.hostile import honest
from tests.hostile.attacker import PAGE, Attack, Attacker, Victim
from tests.hostile.attacks_on_calls import CALL_ATTACKS
from tests.hostile.attacks_on_memory import MEMORY_ATTACKS
from tests.hostile.peer import Peer
from tests.hostile.seeds import SEED, choices
from tests.hostile.watched import STATUS_DEADLINE_S, watched
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

ATTACKS = proof_size(100, 600)
ATTACKERS = 3

_USER = 1001
_MEMORY_BYTES = 256 * 1024 * 1024
_WARMING_BYTES = 512 * 1024 * 1024
"""gRPC and the allocator keep a part of what the first large messages took, times those on their way at once."""
_ALL: tuple[Attack, ...] = (*MEMORY_ATTACKS, *CALL_ATTACKS)


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    if os.geteuid() != 0:
        pytest.skip("NOT PROVED HERE: attackers are other users; run as root")
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    folder.chmod(0o755)  # pytest's are closed to other users
    try:
        with DaemonProcess(folder, allowed_uids=_USER, capture_memory_bytes=_MEMORY_BYTES) as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Trainers]:
    with Trainers(tmp_path) as started:
        yield started


class Attackers:
    """Several threads that attack at once, each attack on a connection of its own."""

    def __init__(self, runtime_dir: Path, victim: Victim) -> None:
        self._runtime_dir = runtime_dir
        self._victim = victim
        self._guard = threading.Lock()
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def attack(self, attacks: int) -> None:
        """Make so many attacks: all kinds in turn, in an order that the seed decides."""
        planned = [_ALL[number % len(_ALL)] for number in range(attacks)]
        choices().shuffle(planned)
        threads = [
            threading.Thread(target=self._run, args=(list(enumerate(planned))[first::ATTACKERS],))
            for first in range(ATTACKERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, planned: list[tuple[int, Attack]]) -> None:
        for number, attack in planned:
            try:
                with Attacker(self._runtime_dir, choices(number), uid=_USER, victim=self._victim) as attacker:
                    attack(attacker)
            except Exception:  # noqa: BLE001 - told at the end, with all others
                with self._guard:
                    self.wrong.append(f"{SEED}/{number}, {attack.__name__}: {traceback.format_exc()[-1500:]}")
            with self._guard:
                self.done[attack.__name__] += 1


def victim_of(peer: Peer) -> Victim:
    """The honest trainer's newest version, with a lease on it."""
    past = Peer(peer.runtime_dir)
    past.hello()
    token = past.token
    past.close()
    found = restore_pb2.ResolveReply.FromString(
        peer.unary("/cairn_api.v1.Restore/Resolve", restore_pb2.ResolveRequest(job=honest.JOB).SerializeToString())
    )
    version = found.versions[0].id
    fetch = restore_pb2.FetchRequest(job=honest.JOB, id=version)
    fetched = peer.download("/cairn_api.v1.Restore/Fetch", fetch.SerializeToString())
    return Victim(honest.JOB, version, restore_pb2.FetchProgress.FromString(fetched[-1]).lease, token)


def can_have_all_but(peer: Peer, used_bytes: int) -> bool:
    """Whether a new client is granted all capture memory that the honest trainer does not hold."""
    join = save_pb2.JoinRequest(protocol=PROTOCOL_VERSION, job="afterwards", world_size=1)
    peer.unary("/cairn_api.v1.Save/Join", join.SerializeToString())
    request = save_pb2.GrantRequest(job="afterwards", size_bytes=(_MEMORY_BYTES - used_bytes) // PAGE * PAGE)
    granted = Attacker.judged(lambda: peer.unary("/cairn_api.v1.Save/Grant", request.SerializeToString()))
    if granted is None:
        return False
    release = save_pb2.ReleaseRequest(grant=save_pb2.GrantReply.FromString(granted).grant)
    peer.unary("/cairn_api.v1.Save/Release", release.SerializeToString())
    return True


@pytest.mark.root
@pytest.mark.promise("aggressor")
@pytest.mark.timeout(120 + 2 * ATTACKS)
def test_a_hostile_client_harms_nobody_but_itself(
    daemon: DaemonProcess, trainers: Trainers, tmp_path: Path, evidence: Evidence
) -> None:
    diary, stop = tmp_path / "diary", tmp_path / "stop"
    trainer = trainers.start(honest.save_until, str(daemon.runtime_dir), str(diary), str(stop))

    def words() -> Counter[str]:
        return Counter(line.split()[0] for line in diary.read_text().splitlines()) if diary.exists() else Counter()

    wait_until(lambda: words().total() >= 3, "the honest trainer saves", trainer=trainer)
    with watched(daemon) as watcher:
        used_bytes = watcher.status().memory_granted_bytes
        victim = victim_of(watcher.peer)
        attackers = Attackers(daemon.runtime_dir, victim)
        attackers.attack(len(_ALL))  # gRPC's own memory for large messages is made once
        wrong = watcher.check(clients=2, growth_bytes=_WARMING_BYTES)
        assert daemon.running, "\n".join(wrong)
        warm, before = watcher.growth_bytes, words()
        watcher.settle()
        attackers.attack(ATTACKS)
        wrong += watcher.check(clients=2)
        grown = watcher.growth_bytes
        wrong += attackers.wrong
        try:
            wait_until(
                lambda: can_have_all_but(watcher.peer, used_bytes), "memory returns to the pool", STATUS_DEADLINE_S
            )
            wait_until(lambda: words()["saved"] > before["saved"], "the honest trainer saves on", trainer=trainer)
        except AssertionError as error:
            wrong.append(str(error))
        stop.touch()
        trainer.end()
    saved = words()
    wrong += [line for line in diary.read_text().splitlines() if not line.startswith("saved ")]
    evidence(
        tried=attackers.done.total(),
        broken=len(wrong),
        detail=f"{saved['saved']} saves of an honest trainer beside them, memory {grown / 2**20:+.0f} MiB",
    )
    assert not wrong, f"{len(wrong)} times (CAIRN_CRASH_SEED={SEED}, {warm=}):\n" + "\n".join(wrong[:20])
