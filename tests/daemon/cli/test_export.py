"""``cairn export``: plain folders, whole or not at all, every byte checked."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn
from tests.daemon.cli.seeding import Seed, damage, seed_tier1, three_versions
from tests.daemon.cli.test_offline import MIDDLE, NEWEST, data_folder

FILES = three_versions()[1].files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_the_partitions_and_nothing_else(cairn: Cairn, store: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    outcome = cairn("export", MIDDLE, target, "--store", store)
    assert outcome.status == 0
    assert "4 files, 16.0 MiB, digests checked" in outcome.out.replace("\n", " ")
    assert contents(target) == FILES
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_sums_can_be_checked_with_coreutils(cairn: Cairn, store: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    document = cairn("export", MIDDLE, target, "--sums", "--json", "--store", store).json(schemas.EXPORT)
    assert document["directory"] == str(target)
    assert document["size_bytes"] == sum(len(data) for data in FILES.values())
    assert {item["path"]: item["sha256"] for item in document["files"]} == {
        path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()
    }
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=target, check=True)


def test_deepspeed_finds_tag_and_latest(cairn: Cairn, store: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert cairn("export", MIDDLE, target, "--tag-folder", "--store", store).status == 0
    assert (target / "latest").read_text() == "global_step2"
    assert contents(target / "global_step2") == FILES
    # A second tag goes beside the first, and latest follows.
    assert cairn("export", NEWEST, target, "--tag-folder", "--store", store).status == 0
    assert (target / "latest").read_text() == "global_step1"
    assert sorted(path.name for path in target.iterdir()) == ["global_step1", "global_step2", "latest"]


def test_what_is_there_is_neither_overwritten_nor_lost(cairn: Cairn, store: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")
    refused = cairn("export", NEWEST, target, "--json", "--store", store)
    assert refused.status == 12
    assert "--force" in refused.error()["hint"]
    assert contents(target) == {"mine": b"precious"}
    document = cairn("export", NEWEST, target, "--force", "--json", "--store", store).json(schemas.EXPORT)
    assert list(contents(target)) == ["model.pt"]
    assert contents(Path(document["moved_aside"])) == {"mine": b"precious"}


def test_an_empty_folder_may_be_used(cairn: Cairn, tier1: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    document = cairn("export", NEWEST, tmp_path / "out", "--json", "--store", tier1).json(schemas.EXPORT)
    assert document["moved_aside"] is None


@pytest.mark.parametrize("at", [0, 16 * 1024 * 1024 + 12344])
def test_damage_is_never_exported(cairn: Cairn, store: str, tmp_path: Path, at: int) -> None:
    damage(data_folder(store, MIDDLE) / "model.pt", at)
    parent = tmp_path / "out"
    outcome = cairn("export", MIDDLE, parent / "folder", "--json", "--store", store)
    assert outcome.status == 13
    assert f"block {at // (16 * 1024 * 1024)} does not match" in outcome.error()["message"]
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("change", ["missing", "short"])
def test_missing_bytes_are_never_exported(cairn: Cairn, store: str, tmp_path: Path, change: str) -> None:
    path = data_folder(store, MIDDLE) / "optim" / "states.pt"
    path.chmod(0o600)
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(b"short")
    parent = tmp_path / "out"
    assert cairn("export", MIDDLE, parent / "folder", "--store", store).status == 13
    assert list(parent.iterdir()) == []


def test_names_that_collide_are_refused(cairn: Cairn, tmp_path: Path) -> None:
    seeds = [Seed("latest", files={"m.pt": b"1"}), Seed("sums", sequence=2, files={"SHA256SUMS": b"1"})]
    store = seed_tier1(tmp_path / "tier1", seeds)
    assert cairn("export", "latest", tmp_path / "a", "--tag-folder", "--store", store).status == 12
    assert cairn("export", "sums", tmp_path / "b", "--sums", "--store", store).status == 12
    assert cairn("export", "latest", tmp_path / "a", "--store", store).status == 0
    assert cairn("export", "sums", tmp_path / "b", "--store", store).status == 0


def test_a_place_where_no_folder_can_be_is_explained(cairn: Cairn, tier1: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder belongs")
    outcome = cairn("export", NEWEST, blocked / "out", "--json", "--store", tier1)
    assert outcome.status == 12
    assert outcome.error()["hint"]
    assert blocked.read_text() == "a file where a folder belongs"
