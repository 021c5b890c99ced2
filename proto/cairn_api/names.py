"""The grammar of every name that crosses the wire or becomes part of a path.

Names come from users and from other nodes, so they are checked on the way in and again on the way out (a listing of
a bucket may hold anything). A name that passes here is safe to join to a root folder: it cannot be absolute, cannot
climb, cannot collide with Cairn's reserved folder and cannot differ from another only by normalisation.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cairn_api.errors import ConfigurationError

RESERVED_NAME = ".cairn"
"""The one name inside a version's folder that belongs to Cairn: metadata lives below it, never a partition."""

BY_RANK_FOLDER = "by-rank"
"""Partitions whose name another rank also used are stored at ``by-rank/<rank>/<name>``."""

MAX_EPOCH = 999_999_999
"""What a version's name has digits for. A job whose newest epoch were higher could never be launched again."""
MAX_COMPONENT_LENGTH = 128
MAX_PARTITION_LENGTH = 1024

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"e(\d{5,9})-s(\d{6,9})-(.+)")
_PARTITION_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,254}")
_NODE = re.compile(r"[0-9a-f]{32}")


class VersionId(NamedTuple):
    """One attempt at a tag, ordered by ``(epoch, sequence)``: commit order, never wall-clock time.

    ``epoch`` counts launches of the job and ``sequence`` counts ``create`` calls within a launch; both start at 1.
    """

    epoch: int
    sequence: int
    tag: str

    def __str__(self) -> str:
        return f"e{self.epoch:05d}-s{self.sequence:06d}-{self.tag}"


def _refuse(what: str, value: str, rule: str) -> ConfigurationError:
    if len(value) > MAX_PARTITION_LENGTH:  # an error has to fit into the metadata of an answer
        value = f"{value[:MAX_COMPONENT_LENGTH]}..."
    return ConfigurationError(f"{what} {value!r} is not allowed: {rule}", hint=f"choose another {what}")


def check_job(job: str) -> str:
    """Return *job* unchanged, or raise :class:`ConfigurationError`."""
    if not _COMPONENT.fullmatch(job):
        raise _refuse("job", job, "1-128 of A-Z a-z 0-9 . _ - and the first a letter or digit")
    return job


def check_tag(tag: str) -> str:
    """Return *tag* unchanged, or raise :class:`ConfigurationError`."""
    if not _COMPONENT.fullmatch(tag):
        raise _refuse("tag", tag, "1-128 of A-Z a-z 0-9 . _ - and the first a letter or digit")
    return tag


def check_partition(name: str) -> str:
    """Return the relative partition *name* (``/`` allowed, no ``..``) unchanged, or raise."""
    parts = name.split("/")
    if len(name) > MAX_PARTITION_LENGTH or not all(_PARTITION_COMPONENT.fullmatch(part) for part in parts):
        raise _refuse(
            "partition name",
            name,
            "a relative path of at most 1024 characters whose parts are A-Z a-z 0-9 . _ + = @ - and start with a "
            "letter, a digit or an underscore",
        )
    return name


def check_node(node: str) -> str:
    """Return the node id (32 hex digits) unchanged, or raise."""
    if not _NODE.fullmatch(node):
        raise _refuse("node id", node, "32 hexadecimal digits")
    return node


def parse_version(text: str) -> VersionId:
    """Parse ``e00007-s000042-global_step1000``; raise :class:`ConfigurationError` when *text* is anything else."""
    match = _VERSION.fullmatch(text)
    if match is None:
        raise _refuse("version", text, "it has the form e00007-s000042-<tag>")
    version = VersionId(int(match[1]), int(match[2]), check_tag(match[3]))
    if str(version) != text or version.epoch < 1 or version.sequence < 1:
        raise _refuse("version", text, "epoch and sequence count from 1 and are padded to 5 and 6 digits")
    return version


def stored_path(name: str, rank: int, *, shared_name: bool) -> str:
    """Where a partition lies below its version: its own name, or ``by-rank/<rank>/<name>`` if another rank has it."""
    return f"{BY_RANK_FOLDER}/{rank}/{name}" if shared_name else name
