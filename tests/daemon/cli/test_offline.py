"""``--store``: tier 1's folder and a bucket, read by the same verbs while no daemon runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cairnd import layout
from cairnd.digests import digest_of
from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn
from tests.daemon.cli.seeding import Seed, damage, seed_bucket, seed_tier1, some_bytes, three_versions

NEWEST, MIDDLE, OLDEST = "e00002-s000001-global_step1", "e00001-s000002-global_step2", "e00001-s000001-global_step1"


def files_below(folder: Path) -> dict[str, bytes | int]:
    """Everything below a folder: contents and times, so that a change of any kind shows."""
    found: dict[str, bytes | int] = {}
    for path in folder.rglob("*"):
        found[str(path)] = path.read_bytes() if path.is_file() else path.stat().st_mtime_ns
    return found


def test_versions_are_listed_newest_first(cairn: Cairn, store: str) -> None:
    versions = cairn("list", "--json", "--store", store).json(schemas.LIST)["versions"]
    assert [item["version"] for item in versions] == [NEWEST, MIDDLE, OLDEST]
    assert [item["size_bytes"] for item in versions] == [seed.size_bytes for seed in reversed_versions()]
    assert [item["pinned"] for item in versions] == [False, False, True]
    assert {item["state"] for item in versions} == {"committed"}
    tier = "tier2" if store.startswith("file://") else "tier1"
    assert all(item["copies"] == {tier: {"state": "verified", "error": "", "damaged": False}} for item in versions)
    assert versions[1]["ranks"] == [0, 1]


def reversed_versions() -> list[Seed]:
    return sorted(three_versions(), key=lambda seed: seed.id, reverse=True)


def test_people_get_a_table(cairn: Cairn, store: str) -> None:
    outcome = cairn("list", "--store", store)
    assert outcome.status == 0
    assert outcome.lines[0] == "job run-7"
    assert outcome.lines[1].split() == ["VERSION", "STATE", "SIZE", "TIERS", "AGE", "FLAGS"]
    assert outcome.lines[2].split()[:4] == [NEWEST, "committed", "5.9", "KiB"]
    assert outcome.lines[4].endswith("pinned")
    assert not outcome.err


@pytest.mark.parametrize("name", ["global_step1", NEWEST, "e00002-s000001"])
def test_a_version_is_found_by_name_by_numbers_and_by_tag(cairn: Cairn, store: str, name: str) -> None:
    shown = cairn("show", name, "--json", "--store", store).json(schemas.SHOW)["version"]
    assert shown["version"] == NEWEST
    assert shown["attributes"] == {"torch": "2.13.0"}
    assert shown["unusual_globals"] == ["argparse.Namespace"]
    (partition,) = shown["partitions"]
    crc = digest_of([memoryview(some_bytes(6000, 5))]).crc64nvme
    assert (partition["path"], partition["size_bytes"], partition["crc64nvme"]) == ("model.pt", 6000, f"{crc:016x}")


def test_people_see_partitions_and_unusual_globals(cairn: Cairn, store: str) -> None:
    text = cairn("show", MIDDLE, "--store", store).out
    for expected in (
        "by-rank/1/model.pt",
        "optim/states.pt",
        "16.0 MiB in 4 partitions",
        "2 of 2",
        "argparse.Namespace",
    ):
        assert expected in text
    assert "_rebuild_tensor_v2" not in text


@pytest.mark.parametrize("name", ["global_step3", "e00009-s000001-x", "e00009-s000001", "../x", ""])
def test_what_does_not_exist_is_reported_missing(cairn: Cairn, store: str, name: str) -> None:
    outcome = cairn("show", name, "--json", "--store", store)
    error = outcome.error()
    assert (outcome.status, error["class"]) == (13, "VersionError")
    assert "cairn list --job run-7" in error["hint"]


@pytest.mark.parametrize("flags", [[], ["--deep"]])
def test_sound_stores_have_no_findings(cairn: Cairn, store: str, flags: list[str]) -> None:
    verdict = cairn("verify", "--json", "--store", store, *flags).json(schemas.VERIFY)
    assert (verdict["versions_checked"], verdict["copies_checked"], verdict["findings"]) == (3, 3, [])
    assert verdict["read_bytes"] == (sum(seed.size_bytes for seed in three_versions()) if flags else 0)
    assert cairn("verify", "--store", store, *flags).out.endswith("no problems\n")


def data_folder(store: str, version: str) -> Path:
    """Where a version's partitions lie."""
    root = Path(store.removeprefix("file://"))
    return root / "run-7" / version if store.startswith("file://") else root / "jobs" / "run-7" / version


def test_a_flipped_bit_is_found_by_digest_only(cairn: Cairn, store: str) -> None:
    damage(data_folder(store, MIDDLE) / "model.pt", 16 * 1024 * 1024 + 5)
    assert cairn("verify", "--store", store).status == 0
    outcome = cairn("verify", "--deep", "--json", "--store", store)
    assert outcome.status == 1
    (finding,) = outcome.json(schemas.VERIFY)["findings"]
    assert (finding["version"], finding["path"]) == (MIDDLE, "model.pt")
    assert "block 1" in finding["problem"]
    assert f"cairn verify {MIDDLE} --deep --job run-7" in finding["next_step"]
    assert ("tier 1 has the version" if store.startswith("file://") else "tier 2") in finding["next_step"]
    assert cairn("verify", "--deep", NEWEST, "--store", store).status == 0
    text = cairn("verify", "--deep", "--store", store)
    assert text.status == 1
    assert text.lines[-1].endswith("1 problem")


def test_a_short_file_is_found_without_reading(cairn: Cairn, store: str) -> None:
    path = data_folder(store, NEWEST) / "model.pt"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    outcome = cairn("verify", "--json", "--store", store)
    assert outcome.status == 1
    (finding,) = outcome.json(schemas.VERIFY)["findings"]
    assert (finding["version"], finding["path"]) == (NEWEST, "model.pt")


def test_a_damaged_manifest_is_a_finding_and_a_warning(cairn: Cairn, store: str) -> None:
    (manifest,) = (data_folder(store, MIDDLE) / ".cairn").rglob("*.json")
    damage(manifest, 30)
    outcome = cairn("list", "--json", "--store", store)
    listed = outcome.json(schemas.LIST)
    assert [item["version"] for item in listed["versions"]] == [NEWEST, OLDEST]
    assert MIDDLE in listed["warnings"][0]
    assert MIDDLE in cairn("list", "--store", store).err.replace("\n  ", " ")
    verdict = cairn("verify", "--json", "--store", store)
    assert verdict.status == 1
    (finding,) = verdict.json(schemas.VERIFY)["findings"]
    assert (finding["version"], finding["path"]) == (MIDDLE, "")
    assert cairn("verify", MIDDLE, "--store", store).status == 1
    assert cairn("show", MIDDLE, "--store", store).status == 13


def test_nothing_in_a_store_is_changed(cairn: Cairn, store: str, tmp_path: Path) -> None:
    root = Path(store.removeprefix("file://"))
    before = files_below(root)
    for arguments in (["list"], ["show", NEWEST], ["verify", "--deep"], ["export", MIDDLE, str(tmp_path / "out")]):
        assert cairn(*arguments, "--store", store).status == 0
    assert files_below(root) == before


@pytest.mark.parametrize(
    "arguments",
    [["pin", "x"], ["unpin", "x"], ["prune"], ["persist"], ["drain"], ["status"], ["watch"]],
    ids=lambda arguments: str(arguments[0]),
)
def test_verbs_that_need_the_daemon_say_so(cairn: Cairn, tier1: Path, arguments: list[str]) -> None:
    outcome = cairn(*arguments, "--store", tier1)
    assert outcome.status == 12
    assert f"`cairn {arguments[0]}` needs the daemon" in outcome.err
    assert "Next step: run it without --store" in outcome.err


def test_of_several_jobs_one_must_be_chosen(cairn: Cairn, tmp_path: Path) -> None:
    seeds = [Seed("a", job="one", files={"m.pt": b"1"}), Seed("b", job="two", files={"m.pt": b"2"})]
    for store in (str(seed_tier1(tmp_path / "t1", seeds)), seed_bucket(tmp_path / "t2", seeds)):
        outcome = cairn("show", "a", "--store", store)
        assert outcome.status == 12
        assert "one, two" in outcome.err
        assert "--job" in outcome.err
        assert cairn("show", "a", "--job", "one", "--store", store).status == 0
        assert cairn("show", "a", "--job", "two", "--store", store).status == 13
        assert [line for line in cairn("list", "--store", store).lines if line.startswith("job")] == [
            "job one",
            "job two",
        ]
        only = cairn("list", "--job", "two", "--json", "--store", store).json(schemas.LIST)["versions"]
        assert [item["job"] for item in only] == ["two"]


def test_what_is_not_committed_in_a_bucket_is_invisible(cairn: Cairn, tmp_path: Path) -> None:
    seeds = three_versions()
    url = seed_bucket(tmp_path / "bucket", seeds)
    (tmp_path / "bucket" / layout.Bucket.decision("run-7", seeds[2].id)).unlink()
    listed = cairn("list", "--json", "--store", url).json(schemas.LIST)["versions"]
    assert [item["version"] for item in listed] == [MIDDLE, OLDEST]


def test_half_of_a_version_is_prepared_and_not_committed(cairn: Cairn, tmp_path: Path) -> None:
    seed = Seed("a", files={"m.pt": b"1"}, world_size=2, ranks=(1,), persist=True)
    listed = cairn("list", "--json", "--store", seed_tier1(tmp_path / "tier1", [seed])).json(schemas.LIST)["versions"]
    assert [(item["state"], item["ranks"], item["persist"]) for item in listed] == [("prepared", [1], True)]


@pytest.mark.parametrize(
    ("store", "flags", "expected"),
    [
        ("{tmp}/nothing", [], "is not a tier 1 folder"),
        ("{tmp}", [], "is not a tier 1 folder"),
        ("file://{tmp}/nothing", [], "nothing of Cairn's"),
        ("ftp://host/x", [], "unknown kind of storage"),
        ("s3://user:word@bucket/x", [], "holds credentials"),
        ("{tmp}", ["--storage-option", "a=b"], "belongs to a bucket"),
        ("{tmp}", ["--storage-option", "novalue"], "is not valid"),
    ],
)
def test_a_store_that_is_none_is_refused(
    cairn: Cairn, tmp_path: Path, store: str, flags: list[str], expected: str
) -> None:
    outcome = cairn("list", "--json", "--store", store.format(tmp=tmp_path), *flags)
    assert outcome.status == 12
    assert expected in outcome.error()["message"]
    assert outcome.error()["hint"]
