"""Trainer and daemon under different users: the trainer reads its versions and cannot overwrite them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess

TRAINER, COLLEAGUE, STRANGER = 12345, 12346, 23456

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="PROMISE NOT CHECKED: several users need root"),
]


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    folder = Path(tempfile.mkdtemp(prefix="cairn-users-"))  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    try:
        with DaemonProcess(folder, allowed_uids=f"{TRAINER},{COLLEAGUE}") as running:
            yield running
    finally:
        shutil.rmtree(folder)


def run_as(user: int, daemon: DaemonProcess) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.e2e.as_user", str(user), str(daemon.runtime_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert told["uid"] == user
    return told


def test_a_trainer_reads_its_versions_and_cannot_overwrite_them(daemon: DaemonProcess) -> None:
    told = run_as(TRAINER, daemon)
    assert told == {"uid": TRAINER, "loaded": True, "read_by_name": True, "overwrite": "refused", "save_dir": "link"}
    (published,) = daemon.tier1_path.glob("jobs/shared-node/*/model.pt")
    assert published.stat().st_uid == 0
    assert published.stat().st_gid == TRAINER
    assert published.stat().st_mode & 0o777 == 0o440


def test_a_user_who_is_not_admitted_is_told_how_to_be(daemon: DaemonProcess) -> None:
    told = run_as(STRANGER, daemon)
    assert f"user {STRANGER}" in str(told["error"])
    assert "allowed_uids" in str(told["hint"])


def test_an_admitted_user_cannot_touch_another_users_job(daemon: DaemonProcess) -> None:
    run_as(TRAINER, daemon)
    told = run_as(COLLEAGUE, daemon)
    assert f"user {TRAINER}" in str(told["error"])
    assert "another job name" in str(told["hint"])
