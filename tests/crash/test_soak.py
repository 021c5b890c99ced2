"""Half an hour of saves, loads and faults: nothing lost, nothing torn, and the daemon holds no more than at first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cairn
from cairn.client import Client
from tests.crash import oracle, ranks
from tests.crash.disks import need_mounts
from tests.crash.soak import BOUNDS, Soak
from tests.crash.test_power_cut import SEED
from tests.crash.trainer import JOB, Trainers
from tests.daemon_process import DaemonProcess
from tests.promises import Evidence, proof_size

SECONDS = proof_size(45, 1800)
SAMPLE_EVERY_S = proof_size(1, 5)


@pytest.mark.promise("soak")
@pytest.mark.root
@pytest.mark.timeout(SECONDS + 400)
def test_saves_loads_and_faults_for_a_long_time(
    tmp_path: Path, trainers: Trainers, figures: Callable[[str], None], evidence: Evidence
) -> None:
    need_mounts()
    soak = Soak(tmp_path, trainers, SECONDS, SEED, SAMPLE_EVERY_S)
    report = soak.run()
    grown = {name: growth for name, growth in report.growth().items() if growth.beyond(BOUNDS[name])}
    evidence(tried=round(report.seconds), broken=len(report.problems) + len(grown), detail=report.text())
    figures(f"soak: {report.seconds:.0f} s, {report.text()}, {len(report.failed)} saves failed, "
            f"{report.log_lines:,} log lines, seed {SEED}")  # fmt: skip
    assert not report.problems, "\n".join(report.problems[:20])
    assert not grown, f"{grown}, of at most {BOUNDS}"
    assert report.promised > SECONDS, "so few saves prove nothing"
    assert not report.failed, "neither a bucket nor a daemon that comes back fails a save"


def test_a_rank_comes_back_to_a_daemon_that_has_let_go_of_what_it_resumed_from(tmp_path: Path) -> None:
    """Found by the soak: no save worked any more, because every reconnection named a version that was pruned."""
    with DaemonProcess(tmp_path, persistent_storage_path="", num_of_version_in_retention=1, lease_s=300.0) as daemon:
        for launch in range(2):
            with cairn.connect(job=JOB, runtime_dir=str(daemon.runtime_dir), reconnect_timeout_s=20) as client:
                restored = client.restore()
                assert (restored is None) is (launch == 0)
                if restored is not None:
                    restored.close()
                for step in range(3):
                    _save(client, f"launch{launch}-step{step}")
                ranks.wait_until(
                    lambda: len(oracle.examine(daemon.tier1_path, JOB).listed) == 1, "retention lets go of the others"
                )
                daemon.restart()
                _save(client, f"launch{launch}-after")


def _save(client: Client, tag: str) -> None:
    with client.create(tag) as checkpoint:
        checkpoint.save("model.pt", {"step": torch.ones(1000)})
    client.wait(tag, durability="tier1", timeout=60)
