"""What ``save_dir`` shows, on real files: swaps, links, placeholders, and what belongs to somebody else."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.integrations.deepspeed import filesystems, swap
from cairn.integrations.deepspeed.folders import Wanted, place
from cairn.integrations.deepspeed.marks import (
    MARKER,
    Kind,
    is_placeholder,
    is_plain_checkpoint,
    overwritten,
    read_marks,
)
from cairn.integrations.deepspeed.save_dir import SaveDir, Tier1
from cairn_api.names import VersionId

JOB = "run-7"
OLD = VersionId(1, 1, "best")
NEW = VersionId(1, 2, "best")
NAMES = ["model.pt", "optimizer_0.pt"]


class Node:
    """Tier 1 as a daemon leaves it, and a ``save_dir`` beside it."""

    def __init__(self, folder: Path) -> None:
        self.tier1 = folder / "tier1"
        self.tier1.mkdir()
        self.path = folder / "save"
        self.path.mkdir()

    def publish(self, version: VersionId, *names: str, text: str = "") -> None:
        folder = self.tier1 / "jobs" / JOB / str(version)
        for name in names or NAMES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"is": text or str(version)}, folder / name)
        (folder / ".cairn").mkdir(exist_ok=True)
        (folder / ".cairn" / "manifest.json").write_text("{}")

    def save_dir(self, mode: str = "link", rank: int = 0, nodes: tuple[str, ...] = ("a", "a")) -> SaveDir:
        return SaveDir(str(self.path), JOB, Tier1(str(self.tier1), JOB), mode, rank, nodes)

    def shown(self, tag: str = "best") -> dict[str, str]:
        """What ``torch.load`` finds in each file of a tag, or ``placeholder``."""
        files = sorted((self.path / tag).glob("*.pt"))
        return {file.name: "placeholder" if is_placeholder(file) else torch.load(file)["is"] for file in files}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_placeholders_at_once_and_links_when_the_version_is_in_tier1(node: Node) -> None:
    save_dir = node.save_dir()
    save_dir.show_saved(OLD, [NAMES, []])
    assert node.shown() == dict.fromkeys(NAMES, "placeholder")
    assert not save_dir.settle("best", OLD)
    node.publish(OLD)
    assert save_dir.settle("best", OLD)
    assert node.shown() == dict.fromkeys(NAMES, str(OLD))
    assert all((node.path / "best" / name).is_symlink() for name in NAMES)


def test_a_placeholder_stops_torch_load_and_tells_a_person_what_to_do(node: Node) -> None:
    node.save_dir().show_saved(OLD, [NAMES])
    with pytest.raises(Exception, match="invalid load key"):
        torch.load(node.path / "best" / "model.pt", weights_only=False)
    text = (node.path / "best" / "model.pt").read_text()
    assert f"cairn export --job {JOB} {OLD} " in text
    assert max(map(len, text.splitlines()[:-1])) <= 100


def test_a_tag_saved_again_never_mixes_versions_nor_writes_through_links(node: Node) -> None:
    save_dir = node.save_dir()
    node.publish(OLD, *NAMES, "optimizer_1.pt")
    save_dir.show_saved(OLD, [[*NAMES, "optimizer_1.pt"]])
    assert save_dir.settle("best", OLD)
    before = (node.tier1 / "jobs" / JOB / str(OLD) / "model.pt").read_bytes()
    save_dir.show_saved(NEW, [NAMES])
    assert node.shown() == dict.fromkeys(NAMES, "placeholder"), "nothing of the old version is left"
    assert save_dir.settle("best", OLD), "the older one has nothing to settle any more"
    assert node.shown() == dict.fromkeys(NAMES, "placeholder")
    assert (node.tier1 / "jobs" / JOB / str(OLD) / "model.pt").read_bytes() == before


def test_what_others_put_into_the_folder_moves_along(node: Node) -> None:
    (node.path / "best" / "offloaded_tensors").mkdir(parents=True)
    (node.path / "best" / "offloaded_tensors" / "rank0").write_text("of DeepSpeed's NVMe offload")
    node.publish(OLD)
    save_dir = node.save_dir()
    save_dir.show_saved(OLD, [NAMES])
    save_dir.settle("best", OLD)
    assert (node.path / "best" / "offloaded_tensors" / "rank0").read_text() == "of DeepSpeed's NVMe offload"
    assert node.shown() == dict.fromkeys(NAMES, str(OLD))
    assert sorted(entry.name for entry in node.path.iterdir()) == ["best"]


@pytest.mark.parametrize("marked", [False, True], ids=["plain folder", "overwritten placeholders"])
def test_files_that_somebody_else_saved_are_kept(
    node: Node,
    caplog: pytest.LogCaptureFixture,
    marked: bool,
) -> None:
    save_dir = node.save_dir()
    if marked:
        save_dir.show_saved(OLD, [NAMES])
    (node.path / "best").mkdir(exist_ok=True)
    for name in NAMES:
        torch.save({"is": "mine"}, node.path / "best" / name)
    assert is_plain_checkpoint(node.path / "best")
    assert save_dir.settle("best", OLD), "not ours to change any more"
    assert node.shown() == dict.fromkeys(NAMES, "mine")
    save_dir.show(NEW, {name: Wanted(name) for name in NAMES})
    assert node.shown() == dict.fromkeys(NAMES, "placeholder")
    assert node.shown("best.replaced-1") == dict.fromkeys(NAMES, "mine")
    assert "best.replaced-1" in caplog.text


def test_a_folder_half_overwritten_is_neither_plain_nor_lost(node: Node) -> None:
    save_dir = node.save_dir()
    save_dir.show_saved(OLD, [NAMES])
    torch.save({"is": "mine"}, node.path / "best" / "model.pt")
    marks = read_marks(node.path / "best")
    assert marks is not None
    assert overwritten(node.path / "best", marks) == ["model.pt"]
    assert not is_plain_checkpoint(node.path / "best")
    save_dir.show_saved(NEW, [NAMES])
    assert torch.load(node.path / "best.replaced-1" / "model.pt") == {"is": "mine"}


def test_a_second_show_of_the_same_changes_nothing(node: Node) -> None:
    save_dir = node.save_dir()
    node.publish(OLD)
    save_dir.show(OLD, {name: Wanted(name) for name in NAMES})
    before = (node.path / "best").stat().st_ino
    save_dir.show(OLD, {name: Wanted(name) for name in NAMES})
    save_dir.repair()
    assert (node.path / "best").stat().st_ino == before
    assert node.shown() == dict.fromkeys(NAMES, str(OLD))


def test_repair_replaces_links_of_evicted_versions_and_finishes_what_a_killed_training_left(node: Node) -> None:
    save_dir = node.save_dir()
    kept, evicted = VersionId(1, 1, "kept"), VersionId(1, 2, "evicted")
    for version in (kept, evicted):
        node.publish(version)
        save_dir.show_saved(version, [NAMES])
    assert save_dir.settle("evicted", evicted)
    for name in NAMES:
        (node.tier1 / "jobs" / JOB / str(evicted) / name).unlink()
    save_dir.repair()
    assert node.shown("kept") == dict.fromkeys(NAMES, str(kept))
    assert node.shown("evicted") == dict.fromkeys(NAMES, "placeholder")


def test_copies_outlive_tier1(node: Node) -> None:
    save_dir = node.save_dir("copy")
    node.publish(OLD)
    save_dir.show_saved(OLD, [NAMES])
    assert save_dir.settle("best", OLD)
    for name in NAMES:
        (node.tier1 / "jobs" / JOB / str(OLD) / name).unlink()
    save_dir.repair()
    assert node.shown() == dict.fromkeys(NAMES, str(OLD))
    assert not (node.path / "best" / "model.pt").is_symlink()
    torch.save({"is": "mine, and longer than what was here before"}, node.path / "best" / "model.pt")
    marks = read_marks(node.path / "best")
    assert marks is not None
    assert overwritten(node.path / "best", marks) == ["model.pt"]


def test_auto_copies_what_this_process_could_overwrite_through_a_link(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    save_dir = node.save_dir("auto")
    node.publish(OLD)  # with an ordinary mode, so this user could overwrite it
    save_dir.show_saved(OLD, [NAMES])
    assert save_dir.settle("best", OLD)
    assert node.shown() == dict.fromkeys(NAMES, str(OLD))
    assert not (node.path / "best" / "model.pt").is_symlink()
    assert "protect_files" in caplog.text


def test_copies_that_auto_made_go_when_retention_takes_their_version_and_not_when_tier1_is_lost(node: Node) -> None:
    save_dir = node.save_dir("auto")
    first, second = VersionId(1, 1, "first"), VersionId(1, 2, "second")
    for version in (first, second):
        node.publish(version)
        save_dir.show_saved(version, [NAMES])
        assert save_dir.settle(version.tag, version)
    shutil.rmtree(node.tier1 / "jobs" / JOB / str(first))
    save_dir.repair()
    assert node.shown("first") == dict.fromkeys(NAMES, "placeholder")
    assert node.shown("second") == dict.fromkeys(NAMES, str(second))
    shutil.rmtree(node.tier1 / "jobs")
    save_dir.repair()
    assert node.shown("second") == dict.fromkeys(NAMES, str(second)), "these may be the last ones"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write whatever the mode says")
def test_auto_links_read_only_files(node: Node) -> None:
    save_dir = node.save_dir("auto")
    node.publish(OLD)
    for name in NAMES:
        (node.tier1 / "jobs" / JOB / str(OLD) / name).chmod(0o440)
    save_dir.show_saved(OLD, [NAMES])
    assert save_dir.settle("best", OLD)
    assert node.shown() == dict.fromkeys(NAMES, str(OLD))


def test_tier1_out_of_sight_means_placeholders_and_one_warning(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    hidden = [
        SaveDir(str(node.path), JOB, Tier1(str(node.tier1 / "elsewhere"), JOB), "auto", 0, ("a",)) for _ in range(2)
    ]
    assert [save_dir.kind for save_dir in hidden] == [Kind.PLACEHOLDER] * 2
    assert caplog.text.count("cannot be seen from this process") == 1


def test_on_a_shared_folder_rank_0_places_for_all_nodes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "LOCAL_TYPES", frozenset())  # no shared file system can be mounted here
    ranks = [node.save_dir("auto", rank, ("a", "a", "b", "b")) for rank in range(4)]
    assert [save_dir.in_charge for save_dir in ranks] == [True, False, False, False]
    assert {save_dir.kind for save_dir in ranks} == {Kind.PLACEHOLDER}
    ranks[0].show_saved(OLD, [["model.pt"], [], ["optimizer_0.pt"], []])
    assert node.shown() == dict.fromkeys(NAMES, "placeholder")


def test_on_a_local_folder_the_first_rank_of_each_node_places_its_own(node: Node) -> None:
    nodes = ("a", "a", "b", "b")
    ranks = [node.save_dir("link", rank, nodes) for rank in range(4)]
    assert [save_dir.in_charge for save_dir in ranks] == [True, False, True, False]
    ranks[2].show_saved(OLD, [["model.pt"], [], ["model.pt"], ["optimizer_3.pt"]])
    marks = read_marks(node.path / "best")
    assert marks is not None
    assert {name: shown.path for name, shown in marks.files.items()} == {
        "model.pt": "by-rank/2/model.pt",
        "optimizer_3.pt": "optimizer_3.pt",
    }


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"cairn": 2}', '{"cairn": 1}', "\udcff"],
    ids=["empty", "cut", "list", "null", "newer", "bare", "binary"],
)
def test_a_marker_that_cannot_be_understood_marks_nothing(node: Node, text: str) -> None:
    (node.path / "best").mkdir()
    (node.path / "best" / MARKER).write_bytes(text.encode(errors="surrogateescape"))
    assert read_marks(node.path / "best") is None


@pytest.mark.parametrize("field", ["job", "version", "path", "name"])
def test_a_marker_with_a_name_that_climbs_marks_nothing(node: Node, field: str) -> None:
    place(node.path / "best", JOB, OLD, {"model.pt": Wanted("model.pt")})
    record: dict[str, Any] = json.loads((node.path / "best" / MARKER).read_text())
    if field == "path":
        record["files"]["model.pt"]["path"] = "../../secret"
    elif field == "name":
        record["files"]["../model.pt"] = record["files"].pop("model.pt")
    else:
        record[field] = "../x"
    (node.path / "best" / MARKER).write_text(json.dumps(record))
    assert read_marks(node.path / "best") is None


@pytest.mark.parametrize("kernel", [True, False], ids=["renameat2", "two renames"])
def test_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> None:
    if not kernel:  # as on NFS, which answers EINVAL

        class NoLibrary:
            def __init__(self, *_: object, **__: object) -> None: ...

        monkeypatch.setattr(ctypes, "CDLL", NoLibrary)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    swap.exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "is").read_text() == "new"
    assert (tmp_path / "new" / "is").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_exchange_reports_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "new", tmp_path / "missing")


def test_write_whole_leaves_the_old_text_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    swap.write_whole(path, "global_step1")
    with pytest.raises(UnicodeEncodeError):
        swap.write_whole(path, "\ud800")
    assert path.read_text() == "global_step1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]


def test_leftovers_of_a_killed_swap_are_cleared(node: Node) -> None:
    leftover = swap.hidden_beside(node.path / "best")
    place(leftover, JOB, OLD, {"model.pt": Wanted("model.pt")})
    (leftover / "notes.txt").write_text("mine")
    node.save_dir().show_saved(NEW, [NAMES])
    assert sorted(entry.name for entry in node.path.iterdir()) == ["best"]
    assert (node.path / "best" / "notes.txt").read_text() == "mine"


MOUNTS = """\
22 1 253:0 / / rw - ext4 /dev/vda rw
30 22 0:40 / /data rw - nfs4 server:/export rw
31 30 0:41 / /data/scratch rw shared:5 - xfs /dev/nvme0n1 rw
32 22 0:42 / /with\\040space rw - fuse.s3fs bucket rw
33 31 0:43 / /data/scratch rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/user", "ext4"),
        ("/data", "nfs4"),
        ("/data/run", "nfs4"),
        ("/data/scratch/run", "tmpfs"),
        ("/database", "ext4"),
        ("/with space/run", "fuse.s3fs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert filesystems.type_of(Path(path), MOUNTS) == kind


def test_the_file_system_of_this_machine_is_found(tmp_path: Path) -> None:
    assert filesystems.type_of(tmp_path.resolve())
