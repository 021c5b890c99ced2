"""Tier 2: does it answer, take these credentials, honour put-if-absent; what time is it there; what was left behind.

Objects that are put are removed again. The daemon may have credentials that this process lacks, so what the running
daemon says of the same location counts for more.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from cairn_api.errors import CairnError, ErrorKind
from cairn_api.names import RESERVED_NAME
from cairnd import layout
from cairnd.cli.doctor.findings import Finding, Level, from_error, listed, not_permitted, ok, problem, warning
from cairnd.cli.doctor.permissions import blocked, groups_of, user_name
from cairnd.cli.doctor.subject import Subject
from cairnd.cli.text import count_text
from cairnd.tiers.object_store import ObjectStore
from cairnd.tiers.stores import open_store

CHECK, CLOCK, LEFTOVERS = "tier2", "clock", "tier2.leftovers"
_NOTICEABLE_S = 5.0
_REFUSED_S = 600.0
"""S3 refuses requests that are signed a quarter of an hour off."""
_STALE_UPLOAD_S = 24 * 3600.0
_STALE_PROBE_S = 3600.0


@runtime_checkable
class TellsOfUploads(Protocol):
    """A store that can say what unfinished uploads left, without removing it."""

    def unfinished_uploads(self, older_than_s: float) -> Sequence[str]:
        """Keys, as the store writes them."""


def check(subject: Subject) -> Iterator[Finding]:
    """See the module. Nothing is asked where no tier 2 is configured."""
    url = subject.settings.persistent_storage_path
    if not url:
        yield ok(CHECK, "none is configured")
        return
    daemons_view = _daemons_view(subject, url)
    if daemons_view is not None:
        yield daemons_view
    trusted = daemons_view is not None and daemons_view.level is Level.OK
    try:
        store = open_store(url, {} if url.startswith("file:") else subject.settings.store_options())
        missing = _missing_folder(subject, url)
        if missing is not None:
            yield missing
            return
        next(iter(store.list(f"{RESERVED_NAME}/")), None)  # some servers would make a missing bucket when written to
        yield _probe(store, url)
        yield from _clock(store)
        yield from _leftovers(store, url)
    except CairnError as error:
        if isinstance(error.__cause__, PermissionError) and os.geteuid() != subject.daemon_user()[0]:
            yield not_permitted(CHECK, f"whether {url} takes writes")
        elif trusted:
            yield ok(
                CHECK, f"not tried from here ({error.message}): this command needs the daemon's credentials for that"
            )
        else:
            yield from_error(CHECK, f"{url} cannot be used", error)


def _daemons_view(subject: Subject, url: str) -> Finding | None:
    status = subject.status
    if status is None or status.persistent_storage_path != url:
        return None
    if status.tier2_reachable:
        return ok(CHECK, f"the running daemon reaches {url}")
    if not status.tier2_error:
        return ok(CHECK, f"the running daemon has not asked {url} yet")
    return problem(
        CHECK,
        f"the running daemon does not reach {url}: {status.tier2_error}",
        "`cairn status` shows it again; versions wait in tier 1 meanwhile",
        ErrorKind.RETRY,
    )


def _missing_folder(subject: Subject, url: str) -> Finding | None:
    """A folder that is not there is made by the daemon, not by this command."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    folder = Path(unquote(parts.path))
    uid, gid = subject.daemon_user()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return problem(CHECK, f"{there} is no folder", f"move {there} away, or set persistent_storage_path")
    reason = blocked(there, uid, groups_of(subject, uid, gid))
    if reason:
        return problem(
            CHECK,
            f"{user_name(uid)}, as whom the daemon runs, may not write to {folder}: {reason}",
            f"{'' if there == folder else 'if it belongs on a file system that is not mounted, mount that; else '}"
            f"install -d -m 0755 -o {uid} -g {gid} {folder}",
        )
    if there == folder:
        return None
    return warning(
        CHECK,
        f"{folder} is not there: the daemon makes it at its first upload, on whatever file system {there} is",
        f"if it belongs on a shared file system, mount that first; else mkdir -p {folder}",
    )


def _probe(store: ObjectStore, url: str) -> Finding:
    capabilities = store.probe(_key())
    if capabilities.conditional_put:
        return ok(CHECK, f"{url} answers, takes writes and honours put-if-absent")
    return problem(
        CHECK,
        f"{url} ignores conditional writes (If-None-Match: *), so two writers could both win; cairnd refuses it",
        "use a store that honours them: Amazon S3, SeaweedFS, Ceph 16+, GCS, Azure, or a folder on one that has links",
    )


def _clock(store: ObjectStore) -> Iterator[Finding]:
    key = _key()
    try:
        before_s = time.time()
        store.put(key, b"1")
        after_s = time.time()
        info = store.info(key)
    finally:
        store.delete(key)
    if info is not None:
        yield clock_finding(info.modified_s, before_s, after_s)


def clock_finding(theirs_s: float, before_s: float, after_s: float) -> Finding:
    """What to say of a store that dates an object *theirs_s* which was put between *before_s* and *after_s* here."""
    ahead_s = max(before_s - 1.0 - theirs_s, 0.0)  # stores give whole seconds
    behind_s = max(theirs_s - after_s - 1.0, 0.0)
    off_s = max(ahead_s, behind_s)
    facts = f"this machine's clock is {off_s:.0f} s {'ahead of' if ahead_s else 'behind'} that of tier 2"
    fix = "synchronise it: chronyc tracking, or timedatectl set-ntp true"
    if off_s > _REFUSED_S:
        return problem(CLOCK, f"{facts}: object stores refuse requests that are signed at another time", fix)
    if off_s > _NOTICEABLE_S:
        return warning(
            CLOCK, f"{facts}: ages that are shown are wrong by that; no decision of Cairn's depends on it", fix
        )
    return ok(CLOCK, "this machine's clock and that of tier 2 agree")


def _leftovers(store: ObjectStore, url: str) -> Iterator[Finding]:
    now_s = time.time()
    probes = [
        info.key
        for info in store.list(f"{RESERVED_NAME}/")
        if info.key.startswith(f"{RESERVED_NAME}/probe-") and now_s - info.modified_s > _STALE_PROBE_S
    ]
    if probes:
        yield warning(
            LEFTOVERS,
            f"{count_text(len(probes), 'object')} of probes that were killed: {listed(probes)}",
            f"delete {url.rstrip('/')}/{RESERVED_NAME}/probe-*",
        )
    uploads = list(store.unfinished_uploads(_STALE_UPLOAD_S)) if isinstance(store, TellsOfUploads) else []
    if uploads:
        yield warning(
            LEFTOVERS,
            f"{count_text(len(uploads), 'upload')} that ended unfinished more than a day ago: {listed(uploads)}",
            "cairnd removes them at its next start; on S3 a lifecycle rule (AbortIncompleteMultipartUpload) does too",
        )
    if not probes and not uploads:
        yield ok(LEFTOVERS, "nothing was left behind in tier 2")


def _key() -> str:
    return layout.Bucket.probe(secrets.token_hex(16), secrets.token_hex(8))
