"""What the command says when something is in the way: the cause, and the next step."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cairnd import layout
from tests.crash.disks import Tmpfs, need_mounts
from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn
from tests.daemon.cli.seeding import Seed, damage, seed_bucket, seed_tier1, some_bytes
from tests.daemon_process import DaemonProcess

RESTORE = Path(__file__).parents[3] / "deploy" / "restore_without_cairn.py"
PATIENCE_S = 60.0
SEED = Seed("step1", files={"model.pt": some_bytes(5000)}, persist=True)


def eventually(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never held"
        time.sleep(0.05)


def test_a_tier_1_smaller_than_its_reserve_is_told_at_start_and_in_status(cairn: Cairn, tmp_path: Path) -> None:
    need_mounts()
    with (
        Tmpfs(tmp_path, 32 << 20, 1000) as disk,
        DaemonProcess(tmp_path, tier1_path=disk.path / "tier1", capture_memory_bytes=1 << 26) as daemon,
    ):
        assert "tier1_has_no_room" in daemon.log
        (problem,) = cairn("status", "--json", "--runtime-dir", daemon.runtime_dir).json(schemas.STATUS)["problems"]
    assert "no save can succeed; put tier1_path on a larger one" in problem


def test_a_full_tier_1_has_a_next_step(cairn: Cairn, tmp_path: Path) -> None:
    need_mounts()
    with (
        Tmpfs(tmp_path, 100 << 20, 1000) as disk,
        DaemonProcess(tmp_path, tier1_path=disk.path / "tier1", capture_memory_bytes=1 << 26) as daemon,
    ):
        assert "tier1_has_no_room" not in daemon.log
        where = ("--runtime-dir", daemon.runtime_dir)
        assert cairn("status", "--json", *where).json(schemas.STATUS)["problems"] == []
        (disk.path / "full").write_bytes(bytes(50 << 20))
        (problem,) = cairn("status", "--json", *where).json(schemas.STATUS)["problems"]
    assert "is full" in problem
    assert "free space there" in problem


def test_persisting_to_a_bucket_that_takes_nothing(cairn: Cairn, tmp_path: Path) -> None:
    need_mounts()
    seed_tier1(tmp_path / "tier1", [Seed("step1", files={"model.pt": some_bytes(5000)})])
    with Tmpfs(tmp_path, 1 << 20, 100) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)
        url = f"file://{disk.path}/bucket"
        with DaemonProcess(tmp_path, persistent_storage_path=url, capture_memory_bytes=1 << 26) as daemon:
            where = ("--runtime-dir", daemon.runtime_dir)
            eventually(lambda: cairn("status", "--json", *where).json(schemas.STATUS)["tier2_error"])
            asked = cairn("persist", "--json", *where).json(schemas.PERSIST)
            assert "Read-only file system" in asked["hindrance"]
            outcome = cairn("persist", *where)
            assert "on its way" not in outcome.out
            assert "does not get to tier 2 at present" in outcome.err


def test_a_tier_1_folder_alone_does_not_tell_what_waits(cairn: Cairn, tmp_path: Path) -> None:
    root = seed_tier1(tmp_path / "tier1", [SEED])
    outcome = cairn("list", "--store", root)
    assert SEED.tag in outcome.out
    assert "waiting" not in outcome.out
    assert cairn("list", "--json", "--store", root).json(schemas.LIST)["versions"][0]["persist"] is True


def test_a_damaged_copy_is_made_again_and_verify_says_from_where(cairn: Cairn, tmp_path: Path) -> None:
    root = seed_tier1(tmp_path / "tier1", [SEED])
    seed_bucket(tmp_path / "bucket", [SEED])
    with DaemonProcess(tmp_path, capture_memory_bytes=1 << 26) as daemon:
        where = ("--runtime-dir", daemon.runtime_dir)

        def copies() -> dict[str, str]:
            (version,) = cairn("list", "--json", *where).json(schemas.LIST)["versions"]
            return {tier: copy["state"] for tier, copy in version["copies"].items()}

        eventually(lambda: copies().get("tier2") == "verified")
        damage(root / layout.partition(SEED.job, SEED.id, "model.pt"), 100)
        outcome = cairn("verify", "--deep", "--json", *where)
        assert outcome.status == 1
        (finding,) = outcome.json(schemas.VERIFY)["findings"]
        assert "made again from tier2" in finding["next_step"]
        eventually(lambda: copies()["tier1"] == "verified")
        assert cairn("verify", "--deep", *where).status == 0
        # Tier 2's turn.
        damage(tmp_path / "bucket" / layout.Bucket.partition(SEED.job, SEED.id, "model.pt"), 100)
        text = cairn("verify", "--deep", *where)
        assert text.status == 1
        assert "loads read tier1" in text.out.replace("\n  ", " ") or "made again from tier1" in text.out


@pytest.mark.parametrize("rest", [b"", b"more than nothing"])
def test_the_script_names_what_is_damaged_at_its_source(tmp_path: Path, rest: bytes) -> None:
    root = seed_tier1(tmp_path / "tier1", [SEED])
    folder = root / layout.version_folder(SEED.job, SEED.id)
    (folder / "model.pt").chmod(0o600)
    (folder / "model.pt").write_bytes(rest)
    done = subprocess.run(
        [sys.executable, RESTORE, folder, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{folder}/model.pt is damaged" in done.stderr
