"""Settings that cannot be read, contradict each other, or do not fit the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cairnd.cli.doctor import system
from cairnd.cli.doctor.findings import Finding, not_permitted, ok, problem, warning
from cairnd.cli.doctor.subject import Subject
from cairnd.cli.text import size_text

CHECK = "configuration"
_DAEMON_BYTES = 256 * 1024 * 1024
"""What cairnd needs beside the capture buffers."""
_DEFAULT_STOP_S = 90.0
"""systemd's, where a unit names none."""
_STOP_MARGIN_S = 5.0
_MUCH_OF_MEMORY = 0.8
_SHORT_GRACE_S = 10.0
_OVERFLOW_UID = 65534


def check(subject: Subject) -> Iterator[Finding]:
    """See the module."""
    for fault in subject.faults:
        yield problem(CHECK, fault.message, fault.hint)
    if subject.guessed:
        yield not_permitted(CHECK, "most of the running daemon's settings, which only root and its own user may read")
    elif not subject.faults:
        yield ok(CHECK, f"read from {subject.origin}")
    if subject.daemon is not None and subject.asked_runtime_dir != subject.runtime_dir:
        yield warning(
            CHECK,
            f"the daemon listens in {subject.runtime_dir}, and other verbs look for it in {subject.asked_runtime_dir}",
            f"export CAIRN_RUNTIME_DIR={subject.runtime_dir}, also for trainers",
        )
    yield from _compared_with_daemon(subject)
    yield from _memory(subject)
    yield from _stopping(subject)
    yield from _retention(subject)
    yield from _places(subject)
    yield from _others(subject)


def _compared_with_daemon(subject: Subject) -> Iterator[Finding]:
    status, settings = subject.status, subject.settings
    if status is None or subject.faults:  # what could not be read is at its default here
        return
    different = [
        f"{name} = {running!r} instead of {read!r}"
        for name, running, read in (
            ("tier1_path", status.tier1_path, settings.tier1_path),
            ("persistent_storage_path", status.persistent_storage_path, settings.persistent_storage_path),
            ("capture_memory_bytes", status.memory_limit_bytes, settings.capture_limit_bytes()),
        )
        if running != read
    ]
    if different:
        yield warning(
            CHECK,
            f"the running daemon was started with other settings than these: {'; '.join(different)}",
            "restart it (systemctl restart cairnd), or give its own file with --config",
        )


def _memory(subject: Subject) -> Iterator[Finding]:
    budget, total = subject.settings.capture_limit_bytes(), system.memory_bytes()
    facts = f"capture buffers may take {size_text(budget)} of {size_text(total)} of memory"
    lower = "lower capture_memory_bytes"
    unit_limit = system.bytes_of(system.unit_setting(subject.machine, "MemoryMax"))
    if budget > total:
        yield problem(CHECK, f"{facts}, which is more than there is", lower)
    elif budget > total * _MUCH_OF_MEMORY:
        yield warning(CHECK, f"{facts}: little is left for the trainers themselves", lower)
    else:
        yield ok(CHECK, facts)
    if unit_limit is not None and unit_limit < budget + _DAEMON_BYTES:
        yield problem(
            CHECK,
            f"MemoryMax of the unit is {size_text(unit_limit)}: less than capture_memory_bytes ({size_text(budget)}) "
            f"and the {size_text(_DAEMON_BYTES)} that cairnd needs itself, so it can be killed in the middle of a save",
            "remove MemoryMax with `systemctl edit cairnd`, or lower capture_memory_bytes",
        )


def _stopping(subject: Subject) -> Iterator[Finding]:
    if not system.unit_installed(subject.machine):
        return
    text = system.unit_setting(subject.machine, "TimeoutStopSec")
    stop_s = system.seconds_of(text) if text else _DEFAULT_STOP_S
    drain_s = subject.settings.drain_timeout_s
    if stop_s is not None and drain_s + _STOP_MARGIN_S > stop_s:
        yield warning(
            CHECK,
            f"drain_timeout_s is {drain_s:g} s and the unit's TimeoutStopSec {stop_s:g} s: systemd kills the daemon "
            "before it has brought what is waiting to tier 2 and said what did not make it",
            f"set TimeoutStopSec={drain_s + 30:g} with `systemctl edit cairnd`, or lower drain_timeout_s",
        )


def _retention(subject: Subject) -> Iterator[Finding]:
    settings = subject.settings
    if settings.num_of_version_in_retention == 1:
        yield warning(
            CHECK,
            "one version is kept per job: if its copies are damaged, nothing is left",
            "set num_of_version_in_retention to 2 or more",
        )
    if not settings.persistent_storage_path:
        unused = [
            name
            for name in ("tier2_num_of_version_in_retention", "tier2_keep_every", "tier2_keep_period_s")
            if getattr(settings, name)
        ]
        if unused:
            yield warning(
                CHECK,
                f"{', '.join(unused)} have no effect without a tier 2",
                "set persistent_storage_path, or remove them",
            )
    elif settings.tier2_delete_grace_s < _SHORT_GRACE_S:
        yield warning(
            CHECK,
            f"tier2_delete_grace_s is {settings.tier2_delete_grace_s:g} s: data of a version that another node is "
            "reading from the bucket may be deleted under it",
            "set tier2_delete_grace_s longer than a restore takes (default 60)",
        )


def _places(subject: Subject) -> Iterator[Finding]:
    if subject.guessed and subject.status is None:
        return
    settings, tier1 = subject.settings, subject.tier1
    for name, other in (("runtime_dir", subject.runtime_dir), ("persistent_storage_path", _local_bucket(subject))):
        if other is not None and (other == tier1 or tier1 in other.parents or other in tier1.parents):
            yield problem(
                CHECK,
                f"{name} ({other}) and tier1_path ({tier1}) lie in each other",
                f"give {name} and tier1_path folders of their own",
            )
    bucket = _local_bucket(subject)
    if not settings.persistent_storage_path:
        yield warning(
            CHECK,
            "no tier 2 is configured: nothing outlives this node",
            "set persistent_storage_path to s3://bucket/prefix or to file:///a/shared/folder",
        )
    elif bucket is not None and _device(bucket) == _device(tier1):
        yield warning(
            CHECK,
            f"tier 2 ({bucket}) is on the same file system as tier 1: it is lost with the same disk",
            "set persistent_storage_path to a bucket or to a file system of another machine",
        )


def _others(subject: Subject) -> Iterator[Finding]:
    settings, cores = subject.settings, os.cpu_count() or 1
    if settings.drain_threads > max(2, cores):
        yield warning(
            CHECK,
            f"drain_threads is {settings.drain_threads} on {cores} cores: they take time from training and write no "
            "faster",
            "set drain_threads to 2",
        )
    if _OVERFLOW_UID in settings.allowed_uids:
        yield problem(
            CHECK,
            f"allowed_uids has {_OVERFLOW_UID}, which is how the kernel shows every user of another user namespace: "
            "all of them would be let in as one",
            f"remove {_OVERFLOW_UID}, and run trainers in the daemon's user namespace",
        )
    port = settings.metrics_address.rpartition(":")[2]
    if settings.metrics_address and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        yield problem(
            CHECK,
            f"metrics_address is {settings.metrics_address!r}, which names no port",
            "set metrics_address to host:port, e.g. 127.0.0.1:9464",
        )


def _local_bucket(subject: Subject) -> Path | None:
    parts = urlsplit(subject.settings.persistent_storage_path)
    return Path(unquote(parts.path)) if parts.scheme == "file" and parts.path.startswith("/") else None


def _device(path: Path) -> int | None:
    """The file system of *path*, or of the folder that it will be made in."""
    for folder in (path, *path.parents):
        try:
            return folder.stat().st_dev
        except OSError:
            continue
    return None
