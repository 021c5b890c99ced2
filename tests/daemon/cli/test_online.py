"""The command against a real daemon that has recovered a seeded tier 1."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from cairn_api.wire import SIDE_SOCKET_NAME
from cairnd import layout
from cairnd.cli import daemon_client
from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn, runner
from tests.daemon.cli.seeding import Seed, damage, seed_tier1, some_bytes
from tests.daemon_process import DaemonProcess

SEEDS = [
    Seed("global_step1", sequence=1, files={"model.pt": some_bytes(5000, 1)}),
    Seed("global_step2", sequence=2, files={"model.pt": some_bytes(300_000, 2), "by-rank/1/model.pt": some_bytes(7, 3)},
         world_size=2, ranks=(0, 1)),
    Seed("global_step3", sequence=3, files={"model.pt": some_bytes(70_000, 4), "empty.pt": b""}),
    Seed("global_step4", sequence=4, files={"model.pt": some_bytes(1_000_000, 5)}),
]  # fmt: skip
NAMES = [str(seed.id) for seed in SEEDS]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon with four versions in tier 1, none of them flagged; keeps two by policy."""
    seed_tier1(tmp_path / "tier1", SEEDS)
    with DaemonProcess(tmp_path, capture_memory_bytes=64 * 1024 * 1024) as process:
        yield process


@pytest.fixture
def online(capsys: pytest.CaptureFixture[str], daemon: DaemonProcess) -> Cairn:
    """The command, talking to that daemon."""
    return runner(capsys, "--runtime-dir", str(daemon.runtime_dir))


def test_a_daemon_and_its_store_say_the_same(online: Cairn, cairn: Cairn, daemon: DaemonProcess) -> None:
    assert online("list", "--json").json(schemas.LIST) == cairn("list", "--json", "--store", daemon.tier1_path).json(
        schemas.LIST
    )
    for name in (NAMES[1], "e00001-s000002", "global_step2"):
        asked = online("show", name, "--json").json(schemas.SHOW)
        assert asked == cairn("show", name, "--json", "--store", daemon.tier1_path).json(schemas.SHOW)
    assert online("list").lines[2].startswith(NAMES[3])


def test_what_does_not_exist(online: Cairn) -> None:
    outcome = online("show", "global_step9", "--json")
    assert (outcome.status, outcome.error()["class"]) == (13, "VersionError")
    assert "global_step" in outcome.error()["hint"]
    assert online("show", "x", "--job", "../x").status == 12
    assert online("list", "--job", "other").lines == ["There are no versions."]


def test_pin_and_unpin(online: Cairn) -> None:
    pinned = online("pin", "global_step1", "--reason", "best so far", "--json").json(schemas.PIN)
    assert (pinned["version"], pinned["pinned"], pinned["changed"]) == (NAMES[0], True, True)
    assert online("pin", "global_step1").out == f"{NAMES[0]} was already pinned.\n"
    assert "pinned" in online("list").lines[5]
    assert online("unpin", "e00001-s000001").out == f"{NAMES[0]} is no longer pinned.\n"
    assert online("unpin", NAMES[0], "--json").json(schemas.PIN)["changed"] is False


def test_a_version_that_resume_passes_over(online: Cairn) -> None:
    marked = online("mark", "global_step2", "--pass-over", "its loss exploded", "--json").json(schemas.MARK)
    assert (marked["version"], marked["passed_over"], marked["changed"]) == (NAMES[1], "its loss exploded", True)
    assert online("mark", NAMES[1], "--pass-over", "its loss exploded", "--json").json(schemas.MARK)["changed"] is False
    assert "passed-over" in online("list").out
    assert "its loss exploded" in online("show", "global_step2").out
    others = [name for name in NAMES if name != NAMES[1]]
    warned = [online("mark", name, "--pass-over", "it diverged").err for name in others]
    assert ["last resort" in text for text in warned] == [False] * (len(others) - 1) + [True]
    for name in others:
        assert online("mark", name, "--sound").status == 0
    assert online("mark", "global_step2", "--sound").status == 0
    assert "passed-over" not in online("list").out
    assert online("mark", "global_step2").status == 2
    assert online("mark", "global_step2", "--pass-over", " ").status == 2


def test_a_dry_run_prints_exactly_what_prune_does(online: Cairn, daemon: DaemonProcess) -> None:
    assert online("pin", "global_step1").status == 0
    planned = online("prune", "--dry-run", "--json").json(schemas.PRUNE)
    assert [(item["version"], item["tier"]) for item in planned["deletions"]] == [(NAMES[1], "tier1")]
    dry = online("prune", "--dry-run")
    folder = daemon.tier1_path / layout.version_folder("run-7", SEEDS[1].id)
    assert folder.exists()
    real = online("prune")
    assert dry.lines[0] != real.lines[0]
    assert dry.lines[1:] == real.lines[1:]
    assert not folder.exists()
    assert online("prune", "--json").json(schemas.PRUNE)["deletions"] == []
    assert online("prune").lines == ["Deleted:", "nothing"]


def test_json_of_a_dry_run_equals_that_of_the_real_one(online: Cairn) -> None:
    dry = online("prune", "--dry-run", "--json").json(schemas.PRUNE)
    real = online("prune", "--json").json(schemas.PRUNE)
    assert len(dry["deletions"]) == 2
    assert (dry.pop("dry_run"), real.pop("dry_run")) == (True, False)
    assert dry == real


def test_one_version_can_be_deleted_and_a_pinned_one_cannot(online: Cairn) -> None:
    deleted = online("prune", "global_step4", "--json").json(schemas.PRUNE)["deletions"]
    assert [item["version"] for item in deleted] == [NAMES[3]]
    assert [item["version"] for item in online("list", "--json").json(schemas.LIST)["versions"]] == NAMES[2::-1]
    assert online("pin", "global_step1").status == 0
    refused = online("prune", "global_step1")
    assert refused.status == 12
    assert "it is pinned" in refused.err


def test_persist_brings_a_version_to_tier_2_and_drain_waits(
    online: Cairn, cairn: Cairn, daemon: DaemonProcess, tmp_path: Path
) -> None:
    asked = online("persist", "--json").json(schemas.PERSIST)
    assert (asked["version"], asked["already"]) == (NAMES[3], False)
    assert online("persist", "global_step3").out == f"{NAMES[2]} will be copied to tier 2.\n"
    drained = online("drain", "--timeout", "60", "--json").json(schemas.DRAIN)
    assert drained == {"done": True, "versions_left": 0, "bytes_left": 0, "abandoned": [], "without_tier2": []}
    assert "already" in online("persist", "global_step4").out
    versions = online("list", "--json").json(schemas.LIST)["versions"]
    assert [item["copies"].get("tier2", {}).get("state") for item in versions[:2]] == ["verified", "verified"]
    # The bucket alone, read without the daemon, tells the same of these versions.
    url = f"file://{daemon.bucket_path}"
    stored = cairn("list", "--json", "--store", url).json(schemas.LIST)["versions"]
    assert [item["version"] for item in stored] == [NAMES[3], NAMES[2]]
    assert cairn("verify", "--deep", "--store", url).status == 0
    assert cairn("export", "global_step3", tmp_path / "out", "--store", url).status == 0
    assert (tmp_path / "out" / "model.pt").read_bytes() == SEEDS[2].files["model.pt"]
    status = online("status", "--json").json(schemas.STATUS)
    assert (status["draining"], status["backlog_versions"], status["last_persisted"]) == (True, 0, f"run-7/{NAMES[3]}")


def test_a_drain_that_leaves_something_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed_tier1(tmp_path / "tier1", [Seed("a", files={"m.pt": b"1"}, persist=True)])
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the bucket's folder belongs")
    with DaemonProcess(tmp_path, persistent_storage_path=f"file://{blocked}/bucket") as process:
        cairn = runner(capsys, "--runtime-dir", str(process.runtime_dir))
        outcome = cairn("drain", "--timeout", "1", "--json")
        assert outcome.status == 1
        left = outcome.json(schemas.DRAIN)
        assert (left["done"], left["versions_left"], left["abandoned"]) == (False, 1, ["run-7/e00001-s000001-a"])
        text = cairn("drain", "--timeout", "1")
        assert text.status == 1
        assert "did not reach tier 2" in text.out
        listing = cairn("list")
        assert "waiting" in listing.out
        assert "warning: tier 2 could not be read" in listing.err
        status = cairn("status")
        assert "does not answer" in status.out.replace("\n           ", " ")
        assert cairn("status", "--json").json(schemas.STATUS)["problems"]


def test_a_drain_without_a_tier_2_says_what_only_this_node_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed_tier1(tmp_path / "tier1", [Seed("a", files={"m.pt": b"1"}), Seed("b", sequence=2, files={"m.pt": b"2"})])
    with DaemonProcess(tmp_path, persistent_storage_path="") as process:
        cairn = runner(capsys, "--runtime-dir", str(process.runtime_dir))
        outcome = cairn("drain", "--json")
        assert outcome.status == 1
        left = outcome.json(schemas.DRAIN)
        assert (left["done"], left["versions_left"], left["without_tier2"]) == (False, 0, ["run-7/e00001-s000002-b"])
        text = cairn("drain")
        assert text.status == 1
        assert "No tier 2 is configured" in text.out
        assert "cairn export" in text.out


@pytest.mark.parametrize("flags", [[], ["--sums", "--tag-folder"]])
def test_export_through_the_daemon(online: Cairn, tmp_path: Path, flags: list[str]) -> None:
    document = online("export", "global_step2", tmp_path / "out", "--json", *flags).json(schemas.EXPORT)
    folder = Path(document["directory"])
    assert folder == (tmp_path / "out" / "global_step2" if flags else tmp_path / "out")
    assert {path: (folder / path).read_bytes() for path in SEEDS[1].files} == SEEDS[1].files
    if flags:
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    # The lease ended with the command: the version may be deleted.
    assert online("prune", "global_step2").status == 0


def test_a_command_that_outlives_its_token_introduces_itself_anew(
    online: Cairn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[daemon_client.SideSocket] = []

    class Counted(daemon_client.SideSocket):
        def __init__(self, runtime_dir: Path) -> None:
            super().__init__(runtime_dir)
            made.append(self)

    monkeypatch.setattr(daemon_client, "SideSocket", Counted)
    assert online("export", "global_step2", tmp_path / "fresh").status == 0
    fresh = len(made)
    monkeypatch.setattr(daemon_client, "TOKEN_USE", 0.0)  # every call finds its token spent
    assert online("export", "global_step2", tmp_path / "spent").status == 0
    assert len(made) - fresh > fresh
    assert (tmp_path / "spent" / "model.pt").read_bytes() == SEEDS[1].files["model.pt"]


def test_damage_is_found_and_never_exported(online: Cairn, daemon: DaemonProcess, tmp_path: Path) -> None:
    damage(daemon.tier1_path / layout.partition("run-7", SEEDS[3].id, "model.pt"), 500_000)
    outcome = online("verify", "--deep", "--json")
    assert outcome.status == 1
    verdict = outcome.json(schemas.VERIFY)
    assert [(item["version"], item["path"], item["tier"]) for item in verdict["findings"]] == [
        (NAMES[3], "model.pt", "tier1")
    ]
    assert (verdict["versions_checked"], verdict["copies_checked"]) == (4, 4)
    assert "no tier is known to have an intact copy" in verdict["findings"][0]["next_step"]
    assert "t1!" in online("list").lines[2]
    for _ in range(2):  # the first time sets the copy aside, so that the second finds no file
        refused = online("export", "global_step4", tmp_path / "out", "--json")
        assert refused.status == 13
        assert "does not match its digest" in refused.error()["message"]
        assert str(daemon.tier1_path / layout.QUARANTINE) in refused.error()["hint"]
    assert not (tmp_path / "out").exists()
    assert online("verify", "--deep", "global_step3").out.splitlines()[-1].endswith("no problems")


def test_status_for_people(online: Cairn) -> None:
    text = online("status").out
    assert "problems   none" in text
    assert "nothing yet" in text


def test_watch_prints_what_happened(online: Cairn) -> None:
    assert online("pin", "global_step1", "--reason", "best so far").status == 0
    events = [json.loads(line) for line in online("watch", "--json").lines]
    for event in events:
        jsonschema.validate(event, schemas.EVENT)
    assert [event["number"] for event in events] == sorted(event["number"] for event in events)
    (pinned,) = [event for event in events if event["event"] == "version_pinned"]
    assert (pinned["version"], pinned["fields"]) == (NAMES[0], {"reason": "best so far"})
    assert "version_pinned" in online("watch").out
    only = [json.loads(line)["job"] for line in online("watch", "--json", "--job", "run-7").lines]
    assert set(only) == {"run-7"}


def test_a_follower_sees_events_as_they_happen_and_can_be_interrupted(online: Cairn, daemon: DaemonProcess) -> None:
    command = [sys.executable, "-m", "cairnd.cli.main", "watch", "--follow", "--json"]
    environment = {**os.environ, "CAIRN_RUNTIME_DIR": str(daemon.runtime_dir)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind it ignores it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as watcher:
        signal.signal(signal.SIGINT, before)
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        assert json.loads(watcher.stdout.readline())["number"] == 1  # it is connected
        online("pin", "global_step2")
        while json.loads(watcher.stdout.readline())["event"] != "version_pinned":
            pass  # a daemon that never says it runs into the test's time limit
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(30) == 130
        assert watcher.stderr.read() == ""


def test_a_daemon_that_dies_in_mid_stream_is_reported(online: Cairn, daemon: DaemonProcess) -> None:
    killer = threading.Timer(1.0, os.kill, (daemon.pid, signal.SIGKILL))
    killer.start()
    outcome = online("watch", "--follow")
    killer.join()
    assert outcome.status == 10
    assert "Next step: start cairnd" in outcome.err
    assert online("list").status == 10


def test_another_protocol_is_refused_by_name(online: Cairn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_client, "PROTOCOL_VERSION", 99)
    outcome = online("list")
    assert outcome.status == 12
    assert "protocol 1" in outcome.err
    assert "99" in outcome.err


def test_a_daemon_that_hangs_up_is_unavailable(cairn: Cairn, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / SIDE_SOCKET_NAME))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        hanging_up = threading.Thread(target=hang_up)
        hanging_up.start()
        outcome = cairn("list", "--runtime-dir", tmp_path)
        hanging_up.join()
    assert outcome.status == 10
    assert "start cairnd" in outcome.err


@pytest.mark.root
def test_another_user_is_told_what_to_do(daemon: DaemonProcess) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    for path in (daemon.runtime_dir, *daemon.runtime_dir.parents[:-1]):
        if path.stat().st_uid == 0:
            path.chmod(path.stat().st_mode | 0o011)
    # Becomes the other user only after importing: the interpreter may lie where that user cannot read.
    body = (
        "import os, sys; from cairnd.cli.main import main; os.setgroups([]); os.setgid(65533); os.setuid(65533); "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", body, "list", "--json", "--runtime-dir", str(daemon.runtime_dir)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 12, outcome.stderr
    error = json.loads(outcome.stderr)["error"]
    assert error["class"] == "ConfigurationError"
    assert "allowed_uids" in error["hint"]
