"""Who owns what, and whether the daemon's user may do what it has to. Modes are read; nobody's identity is taken on."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from cairn_api.wire import GRPC_SOCKET_NAME, SIDE_SOCKET_NAME
from cairnd import layout
from cairnd.cli.doctor import system
from cairnd.cli.doctor.findings import Finding, ok, problem, warning
from cairnd.cli.doctor.subject import Subject

CHECK = "permissions"
_SOCKET_PATH_BYTES = 107
_CAP_CHOWN, _CAP_IMMUTABLE = 1 << 0, 1 << 9
_WRITE = 2
_PASS = 1


def check(subject: Subject) -> Iterator[Finding]:
    """See the module."""
    uid, gid = subject.daemon_user()
    yield from _unit_user(subject)
    who = f"{'the daemon runs' if subject.daemon is not None else 'the daemon would run'} as {user_name(uid)}"
    if uid == 0:
        yield warning(
            CHECK,
            f"{who}: a defect in it could change anything on this machine",
            "run it as a user of its own, as deploy/cairnd.service does (User=cairn)",
        )
    else:
        yield ok(CHECK, who)
    yield from _runtime_folder(subject, uid, gid)
    yield from _tier1_folder(subject, uid, gid)
    yield from _users(subject, uid)
    if subject.settings.protect_files and not _has_capability(subject, uid, _CAP_IMMUTABLE):
        yield warning(
            CHECK,
            "protect_files is set and the daemon may not set the immutable flag",
            "give its unit AmbientCapabilities=CAP_LINUX_IMMUTABLE, or set protect_files = false",
        )


def _unit_user(subject: Subject) -> Iterator[Finding]:
    name = system.unit_setting(subject.machine, "User") if subject.for_unit else ""
    try:
        pwd.getpwnam(name or "root")
    except KeyError:
        yield problem(
            CHECK,
            f"the unit's user {name!r} does not exist",
            f"useradd --system --home-dir {subject.tier1} --shell /usr/sbin/nologin {name}",
        )


def user_name(uid: int) -> str:
    """``cairn (998)``, or the number alone where it has no name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


def _runtime_folder(subject: Subject, uid: int, gid: int) -> Iterator[Finding]:
    folder = subject.runtime_dir
    longest = os.fsencode(folder / GRPC_SOCKET_NAME)
    if len(longest) > _SOCKET_PATH_BYTES:
        yield problem(
            CHECK,
            f"the socket path {os.fsdecode(longest)} is longer than {_SOCKET_PATH_BYTES} bytes",
            "give runtime_dir a shorter path",
        )
    found = _stat(folder)
    if found is None:
        yield from _to_be_made(CHECK, "runtime_dir", folder, uid, gid)
        return
    if not stat.S_ISDIR(found.st_mode):
        yield problem(CHECK, f"runtime_dir {folder} is no folder", f"rm {folder}, or set runtime_dir")
        return
    yield from _folder(subject, "runtime_dir", folder, found, uid, gid, "its sockets")
    if not found.st_mode & 0o001:
        yield problem(
            CHECK,
            f"other users cannot pass through runtime_dir {folder} (mode {found.st_mode & 0o7777:o}): their trainers "
            "do not reach the sockets, which ask the kernel who calls and refuse by themselves",
            f"chmod 0755 {folder} (RuntimeDirectoryMode=0755 in the unit)",
        )
    for name in (GRPC_SOCKET_NAME, SIDE_SOCKET_NAME) if subject.daemon is not None else ():
        path = folder / name
        seen = _stat(path)
        if seen is None or not stat.S_ISSOCK(seen.st_mode):
            yield problem(
                CHECK, f"the daemon runs and its socket {path} is gone", "restart it: systemctl restart cairnd"
            )
        elif seen.st_uid != uid or ~seen.st_mode & 0o666:
            yield problem(
                CHECK,
                f"the socket {path} belongs to {user_name(seen.st_uid)} with mode {seen.st_mode & 0o777:o}, not to the "
                "daemon's user with 666: clients are refused before the daemon can ask who they are",
                "restart the daemon, and let nothing else touch runtime_dir",
            )


def _tier1_folder(subject: Subject, uid: int, gid: int) -> Iterator[Finding]:
    root, found = subject.tier1, _stat(subject.tier1)
    if found is None:
        yield from _to_be_made(CHECK, "tier1_path", root, uid, gid, parents=False)
        return
    if not stat.S_ISDIR(found.st_mode):
        yield problem(CHECK, f"tier1_path {root} is no folder", "set tier1_path to a folder on local NVMe")
        return
    yield from _folder(subject, "tier1_path", root, found, uid, gid, "versions")
    if found.st_uid != uid:
        yield problem(
            CHECK,
            f"tier1_path {root} belongs to {user_name(found.st_uid)}, not to the daemon's user {user_name(uid)}",
            f"stop the daemon, then chown -R {uid}:{gid} {root}",
        )
    below = [seen for seen in map(_stat, (root / layout.VERSIONS, root / layout.LAYOUT_KEY)) if seen is not None]
    if any(seen.st_uid != found.st_uid for seen in below):
        yield problem(
            CHECK,
            f"what is in {root} belongs to {user_name(below[0].st_uid)} and the folder to {user_name(found.st_uid)}: a "
            "daemon ran here as another user",
            f"stop the daemon, then chown -R {found.st_uid}:{found.st_gid} {root}",
        )
    if not found.st_mode & 0o001:
        yield warning(
            CHECK,
            f"other users cannot pass through tier1_path {root} (mode {found.st_mode & 0o7777:o}): links in a save "
            "folder lead nowhere for them",
            f"chmod o+x {root} (StateDirectoryMode=0755 in the unit)",
        )


def _folder(
    subject: Subject, name: str, folder: Path, found: os.stat_result, uid: int, gid: int, what: str
) -> Iterator[Finding]:
    """What holds of both folders: the daemon may write there, and nobody else may."""
    reason = blocked(folder, uid, groups_of(subject, uid, gid))
    if reason:
        yield problem(
            CHECK,
            f"{user_name(uid)}, as whom the daemon runs, may not write to {name} {folder}: {reason}",
            f"chown {uid}:{gid} {folder}, and let the user pass through the folders above it",
        )
    elif found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        yield problem(
            CHECK,
            f"others may write to {name} {folder} (mode {found.st_mode & 0o7777:o}), and so replace {what}",
            f"chmod go-w {folder}",
        )
    else:
        yield ok(CHECK, f"{name} {folder} belongs to {user_name(found.st_uid)}, mode {found.st_mode & 0o7777:o}")


def _to_be_made(
    check_name: str, name: str, folder: Path, uid: int, gid: int, *, parents: bool = True
) -> Iterator[Finding]:
    """A folder that is not there: cairnd makes it at its start, if it may (tier 1 only directly below a folder)."""
    above = next(parent for parent in folder.parents if parent.exists())
    fix = f"install -d -m 0755 -o {uid} -g {gid} {folder}, or set {name}"
    if above != folder.parent:
        fix = f"if it belongs on a disk that is not mounted, mount that; else {fix}"
    if not above.is_dir():
        yield problem(
            check_name,
            f"{name} {folder} cannot be made: {above} is no folder",
            f"move {above} away, or set {name}",
        )
    elif not parents and above != folder.parent:
        yield problem(check_name, f"{name} {folder} does not exist, nor does the folder above it", fix)
    elif blocked(above, uid, {gid}):
        yield problem(check_name, f"{name} {folder} does not exist and {user_name(uid)} may not make it", fix)
    else:
        yield ok(check_name, f"{name} {folder} will be made at the daemon's first start")


def _users(subject: Subject, uid: int) -> Iterator[Finding]:
    admitted = [user_name(other) for other in sorted({0, uid, *subject.settings.allowed_uids})]
    yield ok(CHECK, f"these users may connect: {', '.join(admitted)} (allowed_uids adds others)")
    if _has_capability(subject, uid, _CAP_CHOWN):
        return
    groups = groups_of(subject, uid, subject.daemon_user()[1])
    for other in subject.settings.allowed_uids:
        try:
            gid = pwd.getpwuid(other).pw_gid
        except KeyError:
            continue
        if gid not in groups and other != uid:
            yield warning(
                CHECK,
                f"the daemon may not hand files to the group of {user_name(other)}: that user's links into tier 1 "
                "cannot be opened by name, only loads through the daemon work",
                "give its unit AmbientCapabilities=CAP_CHOWN, or add its user to that group",
            )


def groups_of(subject: Subject, uid: int, gid: int) -> set[int]:
    """All groups of the daemon: those of the process, else those that the user would get."""
    if subject.daemon is not None:
        try:
            text = (subject.machine / "proc" / str(subject.daemon.pid) / "status").read_text()
        except OSError:
            return {gid}
        line = next(line for line in text.splitlines() if line.startswith("Groups:"))
        return {gid, *(int(word) for word in line.split()[1:])}
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return {gid}
    return {gid, *(group.gr_gid for group in grp.getgrall() if name in group.gr_mem)}


def _has_capability(subject: Subject, uid: int, bit: int) -> bool:
    """Whether the running daemon has a capability; of one that does not run, whether it would be root."""
    if subject.daemon is not None:
        try:
            text = (subject.machine / "proc" / str(subject.daemon.pid) / "status").read_text()
        except OSError:
            return uid == 0
        line = next(line for line in text.splitlines() if line.startswith("CapEff:"))
        return bool(int(line.split()[1], 16) & bit)
    return uid == 0


def blocked(folder: Path, uid: int, groups: set[int]) -> str:
    """What keeps a user from writing to a folder, by the modes of it and of those above; empty if nothing."""
    if uid == 0:
        return ""
    for place in (*reversed(folder.parents), folder):
        found = _stat(place)
        if found is None:
            return f"{place} is not there"
        wanted = _PASS | (_WRITE if place == folder else 0)
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
        if (found.st_mode >> shift) & wanted != wanted:
            return f"{place} belongs to {user_name(found.st_uid)} and has mode {found.st_mode & 0o7777:o}"
    return ""


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
