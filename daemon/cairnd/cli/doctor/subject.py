"""What is examined: the settings as the daemon reads them, and the daemon itself, running or not."""

from __future__ import annotations

import os
import pwd
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cairn_api.errors import ConfigurationError
from cairn_api.v1.admin_pb2 import StatusReply
from cairn_api.wire import SIDE_SOCKET_NAME
from cairnd.cli.daemon_client import Daemon
from cairnd.cli.doctor import system
from cairnd.cli.doctor.findings import Finding
from cairnd.settings import Settings, examine_settings

DEFAULT_CONFIG = Path("etc/cairn/cairnd.toml")
"""What the systemd unit names, below the machine's root."""

_CONNECT_TIMEOUT_S = 2.0
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class RunningDaemon:
    """A process that listens in the runtime folder. ``pid`` is 0 if it is in another pid namespace."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Subject:
    """Everything that the checks are given. ``machine`` is the root below which /proc, /sys and /etc lie."""

    settings: Settings
    faults: Sequence[ConfigurationError]
    origin: str
    """Where the settings come from, for people."""
    for_unit: bool
    """Whether the daemon is, or would be, that of the systemd unit, and not one that somebody starts by hand."""
    guessed: bool
    """Whether a daemon runs whose own settings this user may not read: its report then tells the most important."""
    asked_runtime_dir: Path
    """Where other verbs of the command look for the daemon."""
    daemon: RunningDaemon | None
    status: StatusReply | None = None
    unanswered: Finding | None = None
    """Why there is no status although a daemon runs."""
    pids: Sequence[int] = ()
    machine: Path = Path("/")

    @property
    def tier1(self) -> Path:
        return Path(self.settings.tier1_path)

    @property
    def runtime_dir(self) -> Path:
        return Path(self.settings.runtime_dir)

    def daemon_user(self) -> tuple[int, int]:
        """User and group that the daemon has or would have: its own, the unit's, tier 1's, or those of this process."""
        if self.daemon is not None:
            return self.daemon.uid, self.daemon.gid
        if self.for_unit:
            with suppress(KeyError):
                user = pwd.getpwnam(system.unit_setting(self.machine, "User"))
                return user.pw_uid, user.pw_gid
        try:
            found = self.tier1.stat()
        except OSError:
            return os.geteuid(), os.getegid()
        return found.st_uid, found.st_gid

    def with_status(self, status: StatusReply) -> Subject:
        """With the daemon's report, from which settings are taken that could only be guessed."""
        settings = self.settings
        if self.guessed:
            settings = replace(
                settings,
                tier1_path=status.tier1_path,
                persistent_storage_path=status.persistent_storage_path,
                capture_memory_bytes=status.memory_limit_bytes,
            )
        return replace(self, settings=settings, status=status)


def find_daemon(runtime_dir: Path) -> RunningDaemon | None:
    """Who listens on the side socket, as the kernel says; None if nobody does. The daemon itself need not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as side:
        side.settimeout(_CONNECT_TIMEOUT_S)
        try:
            side.connect(os.fspath(runtime_dir / SIDE_SOCKET_NAME))
        except OSError:
            return None
        return RunningDaemon(
            *_CREDENTIALS.unpack(side.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        )


def ask_status(runtime_dir: Path) -> StatusReply:
    """The daemon's own report. Raises Cairn's errors."""
    daemon = Daemon(runtime_dir)
    try:
        return daemon.status()
    finally:
        daemon.close()


def choose_settings(
    config: str | None,
    flags: Sequence[str],
    runtime_dir: Path,
    environment: Mapping[str, str],
    *,
    explicit_runtime_dir: bool,
    machine: Path = Path("/"),
    pids: Sequence[int] = (),
) -> Subject:
    """With the settings that were asked for, else the running daemon's, else those that one would start with."""
    given = [*(["--config", config] if config else []), *flags]
    if explicit_runtime_dir:
        given += ["--runtime-dir", str(runtime_dir)]
    asked = bool(config or flags)
    daemon = None if asked else find_daemon(runtime_dir)
    started_with = _started_with(daemon, machine) if daemon is not None else None
    if started_with is not None:
        arguments, its_environment = started_with
        settings, faults = examine_settings(arguments, its_environment)
        named = _option(arguments, "--config") or its_environment.get("CAIRN_CONFIG", "")
        origin = f"the running daemon's own: its command line{f', {named}' if named else ''} and its environment"
        return Subject(settings, faults, origin, False, False, runtime_dir, daemon, pids=pids, machine=machine)
    named = config or environment.get("CAIRN_CONFIG", "")
    default = machine / DEFAULT_CONFIG
    for_unit = not asked and not named and default.is_file()
    if for_unit:
        given, named = ["--config", str(default), *given], str(default)
    settings, faults = examine_settings(given, environment)
    origin = f"{named or 'no configuration file'}, CAIRN_ variables{' and flags' if flags else ''}, else defaults"
    guessed = daemon is not None
    daemon = daemon or find_daemon(Path(settings.runtime_dir))
    if guessed:
        settings = replace(settings, runtime_dir=str(runtime_dir))
    return Subject(settings, faults, origin, for_unit, guessed, runtime_dir, daemon, pids=pids, machine=machine)


def _started_with(daemon: RunningDaemon, machine: Path) -> tuple[list[str], Mapping[str, str]] | None:
    """The daemon's flags and ``CAIRN_`` variables; None if this user may not know them."""
    process = machine / "proc" / str(daemon.pid)
    try:
        words = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = [os.fsdecode(pair).partition("=") for pair in (process / "environ").read_bytes().split(b"\0")]
        folder = (process / "cwd").readlink()
    except OSError:
        return None
    first = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    arguments = words[first:]
    environment = {name: value for name, _, value in pairs if name.startswith("CAIRN_")}
    for number, word in enumerate(arguments[:-1]):
        if word == "--config":  # as the daemon saw it, from its own folder
            arguments[number + 1] = str(folder / arguments[number + 1])
    if "CAIRN_CONFIG" in environment:
        environment["CAIRN_CONFIG"] = str(folder / environment["CAIRN_CONFIG"])
    return arguments, environment


def _option(arguments: Sequence[str], name: str) -> str:
    for number, word in enumerate(arguments):
        if word == name and number + 1 < len(arguments):
            return arguments[number + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""
