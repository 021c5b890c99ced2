"""Every message of every service, every packet of the side socket: no input crashes, hangs or grows a real daemon."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairnd.rpc.brief import NAMES
from tests.daemon_process import DaemonProcess
from tests.hostile.seeds import SEED
from tests.hostile.talker import Talker
from tests.hostile.watched import watched
from tests.hostile.wire_inputs import METHODS
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

INPUTS = proof_size(2_000, 60_000)
BATCHES = 4
TALKERS = 4

_USER = 1001


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    folder = Path(tempfile.mkdtemp(prefix="cairn-"))
    folder.chmod(0o755)  # pytest's are closed to other users
    try:
        with DaemonProcess(folder, allowed_uids=_USER, capture_memory_bytes=64 * 1024 * 1024) as running:
            yield running
    finally:
        shutil.rmtree(folder)


def talk(daemon: DaemonProcess, batch: int, inputs: int, *, drains: bool) -> list[Talker]:
    """Several talkers at once, every other one as an ordinary user."""
    user = _USER if os.geteuid() == 0 else None
    talkers = [
        Talker(daemon.runtime_dir, f"{batch}/{number}", uid=user if number % 2 else None, drains=drains)
        for number in range(TALKERS)
    ]
    threads = [threading.Thread(target=talker.send_inputs, args=(inputs // TALKERS,)) for talker in talkers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return talkers


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(180 + INPUTS // 20)
def test_no_message_crashes_hangs_or_grows_the_daemon(daemon: DaemonProcess, evidence: Evidence) -> None:
    wrong: list[str] = []
    answered: Counter[str] = Counter()
    fields: Counter[str] = Counter()
    inputs = 0
    with watched(daemon) as watcher:
        wrong += [f"warming up: {each}" for talker in talk(daemon, -1, 400, drains=False) for each in talker.wrong]
        wrong += watcher.check()
        assert daemon.running, "\n".join(wrong)
        watcher.settle()
        for batch in range(BATCHES):
            talkers = talk(daemon, batch, INPUTS // BATCHES, drains=batch == BATCHES - 1)
            for talker in talkers:
                inputs += talker.inputs
                wrong += talker.wrong
                answered += talker.answered
                fields += talker.requests.fields
            wrong += watcher.check()
            assert daemon.running, "\n".join(wrong)
        grown = watcher.growth_bytes
    missed = [method.full_name for method in METHODS if not answered[method.full_name]]
    missed += [f"brief {name}" for name in NAMES if not answered[f"brief {name}"]]
    missed += [
        field.full_name for method in METHODS for field in method.input_type.fields if not fields[field.full_name]
    ]
    evidence(
        tried=inputs,
        broken=len(wrong),
        detail=f"{len(METHODS)} calls, memory {grown / 2**20:+.0f} MiB",
    )
    assert not wrong, f"{len(wrong)} times (CAIRN_CRASH_SEED={SEED}):\n" + "\n".join(wrong[:20])
    assert not missed, f"never reached: {missed}"
