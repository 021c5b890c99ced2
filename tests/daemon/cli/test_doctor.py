"""``cairn doctor``: each condition is broken for real, and the finding and its fix are looked for."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cairn_api.errors import ErrorKind
from cairn_api.wire import SIDE_SOCKET_NAME
from cairnd import __version__, layout
from cairnd.cli.doctor import bucket, configuration, findings, health, leftovers, permissions, shared_memory
from cairnd.cli.doctor.findings import Check, Finding, Level, ok, run_checks
from cairnd.cli.doctor.stored import Stored
from cairnd.cli.doctor.subject import Subject, choose_settings
from cairnd.cli.verbs import doctor
from cairnd.manifest import NOTE_FORMAT, encode
from cairnd.tiers.filesystem import AnyPath, OsFileSystem
from tests.crash.disks import Tmpfs, need_mounts
from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn, Outcome
from tests.daemon.cli.seeding import Seed, damage, seed_bucket, seed_tier1, some_bytes, three_versions
from tests.daemon_process import DaemonProcess
from tests.servers.lax_s3 import LaxS3, lax_s3

NOBODY = 65534
OPERATOR = 12345


def as_root(test: Callable[..., None]) -> Callable[..., None]:
    """Several users are needed."""
    skipped = pytest.mark.skipif(os.geteuid() != 0, reason="several users need root")
    return pytest.mark.root(skipped(test))  # type: ignore[no-any-return]  # pytest's marks are not typed


class Report:
    """What one run found."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.document = document
        self.findings = [Finding(**{**item, "level": Level(item["level"])}) for item in document["findings"]]
        assert document["exit_status"] == status
        assert document["healthy"] is (status == 0) is (not self.problems)
        for finding in self.findings:
            assert bool(finding.fix) is (finding.level is not Level.OK), finding
            assert (finding.kind is not None) is (finding.level is Level.PROBLEM), finding

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level is Level.PROBLEM]

    def one(self, check: str, level: Level, text: str) -> Finding:
        """The only finding of that check and level with *text* in it."""
        (found,) = [f for f in self.findings if (f.check, f.level) == (check, level) and text in f.message]
        return found


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("CAIRN_", "AWS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A short folder for tier 1, runtime folder and bucket: a socket's path is bounded."""
    for name in ("run", "tier1", "bucket"):
        (tmp_path / name).mkdir()
    return tmp_path


class Examine:
    """Runs the command on flags as cairnd gets them."""

    def __init__(self, cairn: Cairn) -> None:
        self._cairn = cairn

    def __call__(self, *words: str | Path, **settings: object) -> Report:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        outcome = self._cairn("doctor", *words, "--json", *(["--", *flags] if flags else []))
        return Report(outcome.status, outcome.json(schemas.DOCTOR, (0, 10, 11, 12, 13, 14)))

    def at(self, place: Path, **settings: object) -> Report:
        usual = {
            "runtime_dir": place / "run",
            "tier1_path": place / "tier1",
            "persistent_storage_path": f"file://{place / 'bucket'}",
            "capture_memory_bytes": 64 * 1024 * 1024,
        }
        return self(**{**usual, **settings})


@pytest.fixture
def examine(cairn: Cairn) -> Examine:
    return Examine(cairn)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Names, modes and contents of everything below *folder*."""
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


# A healthy machine


def test_before_the_first_start_nothing_is_wrong_and_nothing_is_made(examine: Examine, tmp_path: Path) -> None:
    report = examine.at(tmp_path)
    assert report.status == 0
    assert not list(tmp_path.iterdir())
    report.one("permissions", Level.OK, "/tier1 will be made")
    report.one("daemon", Level.WARNING, "no daemon listens")


def test_a_stopped_daemons_machine_is_healthy_and_left_as_it_was(examine: Examine, place: Path) -> None:
    seed_tier1(place / "tier1", three_versions())
    seed_bucket(place / "bucket", three_versions())
    before = tree(place)
    report = examine.at(place)
    assert report.status == 0, report.problems
    assert report.document["problems"] == 0
    assert report.document["daemon"] is None
    assert tree(place) == before
    report.one("tier2", Level.OK, "honours put-if-absent")
    report.one("tier1.file_system", Level.OK, "fsync work")
    report.one("tier1.space", Level.OK, "run-7")
    report.one("shared_memory", Level.OK, "seals work")
    report.one("clock", Level.OK, "agree")
    report.one("leftovers", Level.OK, "nothing")


def test_a_running_daemon_is_examined_with_its_own_settings(examine: Examine, cairn: Cairn, place: Path) -> None:
    with DaemonProcess(place, capture_memory_bytes=1 << 26, environment={"CAIRN_UPLOAD_CONCURRENCY": "3"}) as daemon:
        before = tree(daemon.tier1_path)
        report = examine("--runtime-dir", daemon.runtime_dir)
        assert report.status == 0, report.problems
        assert report.document["daemon"] == {"pid": daemon.pid, "uid": os.geteuid(), "version": __version__}
        assert report.document["tier1_path"] == str(daemon.tier1_path)
        assert "running daemon's own" in report.document["settings_from"]
        report.one("tier2", Level.OK, "the running daemon")
        report.one("limits", Level.OK, "the daemon may open")
        assert tree(daemon.tier1_path) == before
        subject = choose_settings(None, [], daemon.runtime_dir, {}, explicit_runtime_dir=True)
        assert subject.settings.upload_concurrency == 3
        text = cairn("doctor", "--runtime-dir", daemon.runtime_dir)
        assert text.status == 0
        assert text.lines[-1].startswith("0 problems, ")
        levels = [line.split()[0] for line in text.lines if not line.startswith(" ")]
        assert levels.index("warning") > levels.index("ok")


def test_a_configuration_file_is_compared_with_the_running_daemon(examine: Examine, place: Path) -> None:
    config = place / "cairnd.toml"
    config.write_text(f'runtime_dir = "{place}/run"\ntier1_path = "{place}/other"\n')
    misspelt = place / "misspelt.toml"
    misspelt.write_text(f'runtime_dir = "{place}/run"\ntier_path = "{place}/other"\n')
    with DaemonProcess(place, capture_memory_bytes=1 << 26):
        report = examine("--config", config)
        unread = examine("--config", misspelt)
    unread.one("configuration", Level.PROBLEM, "unknown setting")
    assert not any("other settings" in finding.message for finding in unread.findings), "it is corrected first"
    found = report.one("configuration", Level.WARNING, "started with other settings")
    assert "tier1_path" in found.message
    assert "capture_memory_bytes" in found.message
    report.one("configuration", Level.WARNING, "other verbs look for it in")


# Configuration


def test_everything_that_is_wrong_in_a_file_is_said_at_once(examine: Examine, tmp_path: Path) -> None:
    config = tmp_path / "cairnd.toml"
    config.write_text('teir1_path = "/x"\nlease_s = -1\nlog_level = "LOUD"\nruntime_dir = "/none"\n')
    report = examine("--config", config)
    assert report.status == 12
    assert "'tier1_path'" in report.one("configuration", Level.PROBLEM, "teir1_path").fix
    assert "lease_s" in report.one("configuration", Level.PROBLEM, "lease_s = -1").fix
    assert "debug" in report.one("configuration", Level.PROBLEM, "LOUD").fix
    assert examine("--config", tmp_path / "missing.toml").status == 12


def test_values_that_contradict_each_other_or_the_machine(examine: Examine, place: Path) -> None:
    report = examine.at(
        place,
        capture_memory_bytes=1 << 50,
        persistent_storage_path=f"file://{place}/tier1/bucket",
        num_of_version_in_retention=1,
        tier2_delete_grace_s=0,
        allowed_uids=NOBODY,
        metrics_address="here",
    )
    assert report.status == 12
    assert "capture_memory_bytes" in report.one("configuration", Level.PROBLEM, "more than there is").fix
    assert "folders of their own" in report.one("configuration", Level.PROBLEM, "lie in each other").fix
    assert "num_of_version" in report.one("configuration", Level.WARNING, "one version is kept").fix
    assert "tier2_delete_grace_s" in report.one("configuration", Level.WARNING, "tier2_delete_grace_s is 0").fix
    report.one("configuration", Level.PROBLEM, "allowed_uids")
    report.one("configuration", Level.PROBLEM, "metrics_address")
    assert (
        "persistent_storage_path"
        in examine.at(place, persistent_storage_path="").one("configuration", Level.WARNING, "no tier 2").fix
    )


def machine(folder: Path, files: dict[str, str]) -> Path:
    """A root of a machine with some files; what is true of processes stays true."""
    root = folder / "machine"
    root.mkdir()
    (root / "proc").symlink_to("/proc")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def subject_at(root: Path, place: Path, **options: Any) -> Subject:
    return choose_settings(
        None, [], place / "run", {"CAIRN_RUNTIME_DIR": str(place / "run")}, explicit_runtime_dir=False, machine=root,
        **options,
    )  # fmt: skip


def test_the_unit_kills_the_daemon_before_it_has_drained(place: Path) -> None:
    root = machine(
        place,
        {
            "etc/cairn/cairnd.toml": f'drain_timeout_s=100\ncapture_memory_bytes = 9000000\ntier1_path = "{place}/t"\n',
            "lib/systemd/system/cairnd.service": "[Service]\nUser=nobody\nTimeoutStopSec=300\nMemoryMax=64M\n",
            "etc/systemd/system/cairnd.service.d/a.conf": "[Service]\nTimeoutStopSec=1min 30s\n",
        },
    )
    subject = subject_at(root, place)
    assert subject.for_unit
    assert subject.daemon_user()[0] == NOBODY
    found = list(configuration.check(subject))
    (kill,) = [finding for finding in found if "TimeoutStopSec" in finding.message]
    assert "90 s" in kill.message
    assert "TimeoutStopSec=130" in kill.fix
    (memory,) = [finding for finding in found if "MemoryMax" in finding.message]
    assert memory.level is Level.PROBLEM
    (root / "etc/systemd/system/cairnd.service.d/a.conf").write_text(
        "[Service]\nTimeoutStopSec=infinity\nMemoryMax=8G\n"
    )
    assert not [f for f in configuration.check(subject) if "TimeoutStopSec" in f.message or "MemoryMax" in f.message]


# Permissions


@as_root
def test_owners_and_modes(examine: Examine, place: Path) -> None:
    seed_tier1(place / "tier1", three_versions())
    os.chown(place / "tier1", NOBODY, NOBODY)
    (place / "run").chmod(0o770)
    report = examine.at(place)
    assert report.status == 12
    blocked = report.one("permissions", Level.PROBLEM, "may not write to runtime_dir")
    assert f"chown {NOBODY}:" in blocked.fix
    assert "chmod 0755" in report.one("permissions", Level.PROBLEM, "cannot pass through runtime_dir").fix
    assert "chown -R" in report.one("permissions", Level.PROBLEM, "a daemon ran here as another user").fix
    os.chown(place / "tier1", 0, 0)
    (place / "run").chmod(0o777)
    assert "chmod go-w" in examine.at(place).one("permissions", Level.PROBLEM, "others may write to runtime_dir").fix


@as_root
def test_a_running_daemon_whose_folder_was_given_away(examine: Examine, place: Path) -> None:
    with DaemonProcess(place, capture_memory_bytes=1 << 26) as daemon:
        os.chown(daemon.tier1_path, NOBODY, NOBODY)
        (daemon.runtime_dir / SIDE_SOCKET_NAME).chmod(0o600)
        report = examine("--runtime-dir", daemon.runtime_dir)
    assert report.status == 12
    assert "chown -R 0:0" in report.one("permissions", Level.PROBLEM, f"tier1_path {daemon.tier1_path} belongs to").fix
    assert "restart" in report.one("permissions", Level.PROBLEM, "clients are refused").fix


@as_root
def test_the_user_of_a_unit_may_not_write_and_may_not_exist(place: Path) -> None:
    unit = "[Service]\nUser={}\n"
    root = machine(
        place,
        {
            "etc/cairn/cairnd.toml": f'tier1_path = "{place}/tier1"\nallowed_uids = [1]\n',
            "lib/systemd/system/cairnd.service": unit.format("nobody"),
        },
    )
    found = list(permissions.check(subject_at(root, place)))
    (blocked,) = [f for f in found if f.level is Level.PROBLEM and "may not write to tier1_path" in f.message]
    assert f"chown {NOBODY}:" in blocked.fix
    assert any("may not hand files to the group" in finding.message for finding in found)
    (root / "lib/systemd/system/cairnd.service").write_text(unit.format("cairn-nobody-has-this"))
    (missing,) = [f for f in permissions.check(subject_at(root, place)) if "does not exist" in f.message]
    assert missing.fix.startswith("useradd --system")


@as_root
def test_a_user_who_may_connect_and_may_not_look_everywhere() -> None:
    program = (
        "import os, sys; from cairnd.cli.main import main; import cairnd.tiers.stores.file; "
        f"os.setgroups([]); os.setgid({OPERATOR}); os.setuid({OPERATOR}); sys.exit(main())"
    )
    with tempfile.TemporaryDirectory(prefix="cairn-doctor-") as folder:  # pytest's own are closed to other users
        place = Path(folder)
        place.chmod(0o755)
        seed_tier1(place / "tier1", three_versions())
        with DaemonProcess(place, capture_memory_bytes=1 << 26, allowed_uids=OPERATOR) as daemon:
            command = [sys.executable, "-c", program, "doctor", "--json", "--runtime-dir", str(daemon.runtime_dir)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            report = Report(done.returncode, Outcome(done.returncode, done.stdout, done.stderr).json(schemas.DOCTOR))
            assert report.status == 0
            assert report.document["tier1_path"] == str(daemon.tier1_path)
    assert "as root" in report.one("configuration", Level.WARNING, "not looked at").fix
    report.one("tier1.file_system", Level.WARNING, "not looked at")
    report.one("leftovers", Level.WARNING, "not looked at")
    report.one("versions", Level.WARNING, "not looked at")
    report.one("tier2", Level.WARNING, "not looked at")


def test_a_socket_path_that_is_too_long(examine: Examine, place: Path) -> None:
    report = examine.at(place, runtime_dir=place / ("x" * 120))
    assert "shorter" in report.one("permissions", Level.PROBLEM, "longer than").fix


# Space and file systems


def test_a_small_file_system_in_memory(examine: Examine, place: Path) -> None:
    need_mounts()
    with Tmpfs(place, 32 << 20, 60) as disk:
        report = examine.at(place, tier1_path=disk.path / "tier1", tier1_limit_bytes=1 << 40)
        assert report.status == 12
        assert "larger file system" in report.one("tier1.space", Level.PROBLEM, "no save can succeed").fix
        assert "inodes" in report.one("tier1.space", Level.PROBLEM, "inodes are free").fix
        assert "ext4 or xfs" in report.one("tier1.file_system", Level.WARNING, "survives a restart").fix
        report.one("tier1.space", Level.WARNING, "never takes effect")


def test_a_full_and_then_read_only_file_system(examine: Examine, place: Path) -> None:
    need_mounts()
    with Tmpfs(place, 100 << 20, 1000) as disk:
        seed_tier1(disk.path / "tier1", [Seed("step1", files={"model.pt": some_bytes(15 << 20)})])
        full = disk.path / "full"
        full.write_bytes(bytes(70 << 20))
        report = examine.at(place, tier1_path=disk.path / "tier1")
        assert report.status == 11
        report.one("tier1.space", Level.PROBLEM, "the next save deletes versions, or fails")
        assert "retention" in report.one("tier1.space", Level.PROBLEM, "run-7 (15.0 MiB)").fix
        full.unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)
        report = examine.at(place, tier1_path=disk.path / "tier1")
        assert report.status == 12
        assert "dmesg" in report.one("tier1.file_system", Level.PROBLEM, "mounted read-only").fix


def test_retention_that_does_not_fit(examine: Examine, place: Path) -> None:
    seed_tier1(place / "tier1", [Seed("step1", files={"model.pt": some_bytes(5 << 20)})])
    report = examine.at(place, num_of_version_in_retention=5, tier1_limit_bytes=20 << 20)
    assert report.status == 0
    report.one("tier1.space", Level.WARNING, "less than 5 of each")
    report = examine.at(place, tier1_limit_bytes=8 << 20)
    assert report.status == 11
    report.one("tier1.space", Level.PROBLEM, "less than the version that is kept")


# Tier 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LaxS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with lax_s3(conditional=True) as running:
        yield running


def in_server(server: LaxS3) -> dict[str, str]:
    options = f"endpoint_url={server.endpoint_url},region=us-east-1,addressing_style=path"
    return {"persistent_storage_path": "s3://bucket/checkpoints", "storage_options": options}


def test_a_store_that_keeps_its_word(examine: Examine, place: Path, server: LaxS3) -> None:
    report = examine.at(place, **in_server(server))
    assert report.status == 0, report.problems
    report.one("tier2", Level.OK, "honours put-if-absent")
    assert server.objects == {}


def test_a_store_that_ignores_put_if_absent(examine: Examine, place: Path, server: LaxS3) -> None:
    server.conditional = False
    report = examine.at(place, **in_server(server))
    assert report.status == 12
    assert "use a store that honours them" in report.one("tier2", Level.PROBLEM, "ignores conditional writes").fix
    assert server.objects == {}


@pytest.mark.parametrize(("ahead_s", "level"), [(60.0, Level.WARNING), (-3600.0, Level.PROBLEM)])
def test_a_clock_that_is_off(examine: Examine, place: Path, server: LaxS3, ahead_s: float, level: Level) -> None:
    server.clock_ahead_s = ahead_s
    found = examine.at(place, **in_server(server)).one("clock", level, "behind" if ahead_s > 0 else "ahead of")
    assert "chronyc" in found.fix


def test_what_was_left_in_the_bucket_is_named_and_left(examine: Examine, place: Path, server: LaxS3) -> None:
    old_s = time.time() - 3 * 86400
    server.objects["/bucket/checkpoints/.cairn/probe-x-y"] = b"1", old_s
    server.uploads["checkpoints/run-7/e00001-s000001-a/model.pt"] = old_s
    report = examine.at(place, **in_server(server))
    assert report.status == 0
    assert "lifecycle" in report.one("tier2.leftovers", Level.WARNING, "model.pt").fix
    assert "delete s3://bucket/" in report.one("tier2.leftovers", Level.WARNING, "probe-x-y").fix
    assert len(server.objects) == 1
    upload = place / "bucket" / "run-7" / ".upload-1"
    upload.parent.mkdir()
    upload.write_bytes(b"half")
    os.utime(upload, (old_s, old_s))
    examine.at(place).one("tier2.leftovers", Level.WARNING, ".upload-1")
    assert upload.exists()


def test_a_bucket_that_refuses_connections_and_one_that_never_answers(
    examine: Examine, place: Path, server: LaxS3
) -> None:
    closed = {**in_server(server), "storage_options": "endpoint_url=http://127.0.0.1:1,region=us-east-1"}
    report = examine.at(place, **closed)
    assert report.status == 10
    assert report.one("tier2", Level.PROBLEM, "s3://bucket/checkpoints cannot be used").fix
    server.silent = True
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in in_server(server).items()]
    subject = choose_settings(None, flags, place / "run", {}, explicit_runtime_dir=False)
    check = Check("tier2", lambda: bucket.check(subject), "look at its endpoint")
    (found,) = run_checks([check], 0.5)
    assert (found.level, found.kind, found.fix) == (Level.PROBLEM, ErrorKind.RETRY, "look at its endpoint")


def test_a_bucket_that_hangs_does_not_keep_the_process(place: Path, server: LaxS3) -> None:
    server.silent = True
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in in_server(server).items()]
    program = (
        "import sys; from cairnd.cli.doctor import findings; from cairnd.cli.verbs import doctor; "
        "doctor.DEADLINE_S = 1.0; from cairnd.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "doctor", "--", f"--tier1-path={place}/tier1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (10, 12), done.stderr
    assert "not answered within 1 s" in done.stdout
    assert done.stderr == ""


def test_a_bucket_folder_that_is_not_mounted(examine: Examine, place: Path) -> None:
    report = examine.at(place, persistent_storage_path=f"file://{place}/nfs/bucket")
    assert "mount that first" in report.one("tier2", Level.WARNING, "is not there").fix
    assert not (place / "nfs").exists()


def test_a_file_in_the_way_and_a_location_with_a_host(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"")
    report = examine.at(
        tmp_path, tier1_path=tmp_path / "disk/tier1", persistent_storage_path=f"file://{tmp_path}/disk/bucket"
    )
    assert report.status == 12
    assert f"move {tmp_path}/disk away" in report.one("permissions", Level.PROBLEM, "cannot be made").fix
    assert f"move {tmp_path}/disk away" in report.one("tier2", Level.PROBLEM, "is no folder").fix
    (tmp_path / "disk").unlink()
    report = examine.at(tmp_path, tier1_path=tmp_path / "disk/tier1", persistent_storage_path="file://shared/bucket")
    assert "mount that; else install -d" in report.one("permissions", Level.PROBLEM, "nor does the folder above").fix
    assert "file:///folder" in report.one("tier2", Level.PROBLEM, "cannot be used").fix


@as_root
def test_a_folder_that_is_immutable(examine: Examine, place: Path) -> None:
    changed = subprocess.run(["chattr", "+i", place / "tier1"], capture_output=True, text=True, check=False)
    if changed.returncode:
        pytest.skip(f"NO IMMUTABLE FLAG HERE: {changed.stderr.strip()}")
    try:
        report = examine.at(place)
    finally:
        subprocess.run(["chattr", "-i", place / "tier1"], check=True)
    assert "chattr -ia" in report.one("tier1.file_system", Level.PROBLEM, "no file can be made").fix


# The daemon


def test_a_daemon_that_hangs(examine: Examine, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STATUS_TIMEOUT_S", 0.5)
    with DaemonProcess(place, capture_memory_bytes=1 << 26) as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        report = examine("--runtime-dir", daemon.runtime_dir)
        assert report.status == 10
        assert "journalctl" in report.one("daemon", Level.PROBLEM, "gives no report").fix


def test_problems_of_the_daemon_and_a_copy_that_it_found_damaged(examine: Examine, cairn: Cairn, place: Path) -> None:
    (seed,) = [Seed("step1", files={"model.pt": some_bytes(5000)})]
    seed_tier1(place / "tier1", [seed])
    damage(place / "tier1" / layout.partition(seed.job, seed.id, "model.pt"), 77)
    with DaemonProcess(place, capture_memory_bytes=1 << 26) as daemon:
        assert cairn("verify", "--deep", "--runtime-dir", daemon.runtime_dir).status == 1
        report = examine("--runtime-dir", daemon.runtime_dir)
    assert report.status != 0
    report.one("daemon", Level.PROBLEM, str(seed.id))


def test_a_killed_daemons_sockets_and_another_that_owns_the_tree(examine: Examine, place: Path) -> None:
    with DaemonProcess(place, capture_memory_bytes=1 << 26) as daemon:
        other = examine.at(place, runtime_dir=place / "elsewhere")
        found = other.one("leftovers", Level.PROBLEM, f"process {daemon.pid} owns")
        assert "--runtime-dir" in found.fix
    report = examine.at(place)
    assert report.status == 0
    assert "start cairnd" in report.one("leftovers", Level.WARNING, "nobody listens").fix
    (place / "run" / SIDE_SOCKET_NAME).unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as impostor:
        impostor.bind(str(place / "run" / SIDE_SOCKET_NAME))
        impostor.listen()
        impostor.close()
        assert examine.at(place).status == 0


def test_a_lock_on_another_file_system_is_not_the_trees(tmp_path: Path) -> None:
    """Inodes are numbered anew on each file system."""
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert leftovers.lock_owner(path, Path("/")) == os.getpid()
        table = Path("/proc/locks").read_text()
        (line,) = [line for line in table.splitlines() if line.split()[5].endswith(f":{path.stat().st_ino}")]
        major, minor, inode = line.split()[5].split(":")
        (tmp_path / "proc").mkdir()
        own = f"{major}:{minor}"
        for device, owner in ((own, os.getpid()), (f"{major}:f{minor}", None), (f"f{major}:{minor}", None)):
            (tmp_path / "proc/locks").write_text(line.replace(f"{own}:{inode}", f"{device}:{inode}"))
            assert leftovers.lock_owner(path, tmp_path) == owner


def test_layouts_of_other_releases(examine: Examine, place: Path) -> None:
    seed_tier1(place / "tier1", three_versions())
    record = place / "tier1" / layout.LAYOUT_KEY
    record.chmod(0o600)
    record.write_bytes(encode({"format": NOTE_FORMAT, "layout": 99, "node": "a" * 32}))
    report = examine.at(place)
    assert report.status == 12
    assert "release of Cairn that wrote it" in report.one("versions", Level.PROBLEM, "layout 99").fix
    record.write_bytes(b"{}")
    examine.at(place).one("versions", Level.PROBLEM, "cannot be read")
    record.unlink()
    examine.at(place).one("versions", Level.WARNING, "takes it for a new node's")


# Leftovers


def test_everything_that_was_left_behind_is_named_and_left(examine: Examine, place: Path) -> None:
    seeds = three_versions()
    root = seed_tier1(place / "tier1", seeds)
    left = {
        "jobs/run-7/e00003-s000001-never/model.pt": b"x" * 3000,
        ".cairn/quarantine/1/jobs/run-7/old/model.pt": b"x" * 2048,
        "jobs/not a job/file": b"1",
        "photos/cat.jpg": b"1",
        f"{layout.incoming_folder(seeds[0].job, seeds[0].id)}/abc": b"half",
        ".cairn/jobs/.0123.tmp": b"half",
    }
    for name, data in left.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    os.utime(root / ".cairn/jobs/.0123.tmp", (0, 0))
    before = tree(root)
    report = examine.at(place)
    assert report.status == 0
    assert "next start" in report.one("leftovers", Level.WARNING, "e00003-s000001-never").fix
    assert "2.9 KiB" in report.one("leftovers", Level.WARNING, "e00003-s000001-never").message
    assert "rm -r" in report.one("leftovers", Level.WARNING, "1 file of damaged copies").fix
    foreign = report.one("leftovers", Level.WARNING, "Cairn did not make")
    assert "photos" in foreign.message
    assert "not a job" in foreign.message
    report.one("leftovers", Level.WARNING, "partial download")
    assert "-delete" in report.one("leftovers", Level.WARNING, "temporary file").fix
    assert tree(root) == before
    manifest = root / layout.manifest(seeds[1].job, seeds[1].id)
    damage(manifest, 40)
    report = examine.at(place)
    assert report.status == 12
    assert "quarantine" in report.one("leftovers", Level.PROBLEM, "manifest").fix


def test_a_version_that_cannot_be_looked_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = three_versions()
    root = seed_tier1(place / "tier1", seeds)
    manifest = str(root / layout.manifest(seeds[0].job, seeds[0].id))
    really = OsFileSystem.open

    def stale(self: OsFileSystem, path: AnyPath, flags: int, mode: int = 0o600) -> int:
        if os.fspath(path) == manifest:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really(self, path, flags, mode)

    monkeypatch.setattr(OsFileSystem, "open", stale)
    environment = {"CAIRN_RUNTIME_DIR": str(place / "run"), "CAIRN_TIER1_PATH": str(root)}
    subject = choose_settings(None, [], place / "run", environment, explicit_runtime_dir=False, machine=Path("/"))
    found = list(leftovers.check(subject, Stored(root)))
    (problem,) = [finding for finding in found if finding.level is Level.PROBLEM]
    assert str(seeds[0].id) in problem.message
    assert "mount" in problem.fix


def test_what_a_running_daemon_writes_at_the_moment_is_not_left_behind(examine: Examine, place: Path) -> None:
    with DaemonProcess(place, capture_memory_bytes=1 << 26) as daemon:
        half = daemon.tier1_path / "jobs/run-7/e00003-s000001-now/.cairn/incoming/000000"
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half")
        examine("--runtime-dir", daemon.runtime_dir).one("leftovers", Level.OK, "nothing")
        for path in (half, *list(half.parents)[:3]):
            os.utime(path, (0, 0))
        examine("--runtime-dir", daemon.runtime_dir).one("leftovers", Level.WARNING, "e00003-s000001-now")


# Memory, limits, clocks


def test_limits_of_control_groups(place: Path) -> None:
    config = {"etc/cairn/cairnd.toml": f'capture_memory_bytes = 8000000000\ntier1_path = "{place}/t"\n'}
    root = machine(place, config)
    (root / "proc").unlink()
    for pid, group in (("7", "0::/a/b"), ("8", "4:memory:/c\n0::/"), ("9", "0::/gone")):
        folder = root / "proc" / pid
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(f"{group}\n")
        (folder / "limits").write_text("Max open files            100                  4096                 files\n")
    (root / "proc/self").symlink_to("7")
    groups = {
        "a": ("memory.max", 4_000_000_000, "memory.current", 799_000_000, "inactive_file 500000000\nactive_file 0\n"),
        "a/b": ("memory.max", "max", "memory.current", 0, ""),
        "memory/c": (
            "memory.limit_in_bytes",
            300_000_000,
            "memory.usage_in_bytes",
            299_000_000,
            "total_inactive_file 0\n",
        ),
    }
    for name, (limit, value, used, used_bytes, stat) in groups.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{value}\n")
        (folder / used).write_text(f"{used_bytes}\n")
        (folder / "memory.stat").write_text(stat)
    found = list(shared_memory.check_limits(subject_at(root, place, pids=[7, 8, 9, 10])))
    levels = {
        (finding.message.split(" may use")[0], finding.level) for finding in found if "may use" in finding.message
    }
    assert levels == {("process 7", Level.WARNING), ("process 8", Level.PROBLEM)}
    assert any("3.7 GiB" in finding.message and "3.4 GiB are free" in finding.message for finding in found)
    assert any("no control group limits the memory of process 9" in finding.message for finding in found)
    assert any("no process 10" in finding.message and finding.level is Level.PROBLEM for finding in found)
    assert [finding.level for finding in found if "may open 100 files" in finding.message] == [Level.PROBLEM] * 3


def test_a_trainer_with_few_descriptors(examine: Examine, place: Path) -> None:
    trainer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        resource.prlimit(trainer.pid, resource.RLIMIT_NOFILE, (100, 100))
        report = examine("--pid", str(trainer.pid), tier1_path=place / "tier1", runtime_dir=place / "run")
    finally:
        assert trainer.stdin is not None
        trainer.stdin.close()
        trainer.wait()
    assert report.status == 12
    assert "ulimit -n" in report.one("limits", Level.PROBLEM, f"process {trainer.pid} may open 100 files").fix


def test_huge_pages(place: Path) -> None:
    name = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    root = machine(place, {name: "always within_size advise [never] deny force\n"})
    (found,) = shared_memory.check_huge_pages(subject_at(root, place))
    assert found.level is Level.WARNING
    assert "echo advise" in found.fix
    (root / name).write_text("always within_size [advise] never deny force\n")
    (found,) = shared_memory.check_huge_pages(subject_at(root, place))
    assert found.level is Level.OK


def test_a_version_from_the_future(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_tier1(place / "tier1", three_versions())
    stored = Stored(place / "tier1")
    now_s, began_s = time.time(), time.monotonic()
    assert not list(health.check_clock(stored, now_s, began_s))
    (jumped,) = health.check_clock(stored, now_s - 40, began_s)
    assert "jumped by +40.0 s" in jumped.message
    monkeypatch.setattr("tests.daemon.cli.seeding.CREATED_S", now_s + 3600)
    seed_tier1(place / "later", [Seed("step1", files={"model.pt": b"1"})])
    (ahead,) = health.check_clock(Stored(place / "later"), now_s, began_s)
    assert "still to come" in ahead.message


# The command itself


def test_a_check_that_hangs_or_fails_does_not_keep_the_others() -> None:
    forever = threading.Event()

    def hangs() -> Iterator[Finding]:
        yield ok("a", "begun")
        forever.wait()

    def fails() -> Iterator[Finding]:
        raise ZeroDivisionError("planted")

    checks = [Check("a", hangs, "mend a"), Check("b", fails, ""), Check("c", lambda: [ok("c", "fine")], "")]
    found = list(run_checks(checks, 0.2))
    forever.set()
    assert [(finding.check, finding.level) for finding in found] == [
        ("a", Level.OK), ("a", Level.PROBLEM), ("b", Level.PROBLEM), ("c", Level.OK),
    ]  # fmt: skip
    assert found[1].fix == "mend a"
    assert "ZeroDivisionError: planted" in found[2].message


def test_the_gravest_problem_decides_the_exit_status() -> None:
    def status(*kinds: ErrorKind) -> int:
        return doctor.exit_status([findings.problem("x", "y", "z", kind) for kind in kinds])

    assert status() == 0
    assert status(ErrorKind.RETRY) == 10
    assert status(ErrorKind.RETRY, ErrorKind.WAIT) == 11
    assert status(ErrorKind.WAIT, ErrorKind.FIX_CONFIGURATION, ErrorKind.GIVE_UP) == 12


def test_a_store_alone_is_refused(cairn: Cairn, place: Path) -> None:
    outcome = cairn("doctor", "--store", place, "--json")
    assert outcome.error()["exit_status"] == 12


def test_what_a_running_daemon_moves_away_meanwhile_is_no_problem(tmp_path: Path) -> None:
    gone = tmp_path / "e00001-s000001-a"
    assert leftovers._age_s(gone) <= 0.0
    assert leftovers._sizes(tmp_path, [gone.name]) == "0 B"
