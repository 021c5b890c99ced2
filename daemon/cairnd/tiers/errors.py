"""What can go wrong below a tier, and the one table from ``errno`` to Cairn's errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cairn_api.errors import (
    CairnError,
    ConfigurationError,
    InternalError,
    OverloadedError,
    UnavailableError,
    VersionError,
)


class NotFoundError(VersionError):
    """There is nothing under this key."""


class UploadCancelledError(UnavailableError):
    """The caller cancelled this upload; nothing was published. Never retried by the wrappers."""


_FREE_SPACE = "free space on this file system, or lower num_of_version_in_retention"
_DESCRIPTORS = "raise LimitNOFILE of the daemon's unit"
_DISK = "look at the kernel's log (dmesg) and replace the disk if it reports errors"
_CHECK = "look at the kernel's log (dmesg); stop the daemon, unmount the file system and check it (fsck, xfs_repair)"
_PERMISSION = "let the daemon's user own this path, on a file system mounted for writing"
_IMMUTABLE = f"{_PERMISSION}; `lsattr -d` shows whether it is immutable, `chattr -i` takes that back"
_LINK = "remove the symbolic link or the file that stands where a folder belongs"

_TABLE: Mapping[int, tuple[type[CairnError], str]] = {
    errno.ENOSPC: (OverloadedError, _FREE_SPACE),
    errno.EDQUOT: (OverloadedError, "raise the daemon's disk quota, or lower num_of_version_in_retention"),
    errno.EMFILE: (OverloadedError, _DESCRIPTORS),
    errno.ENFILE: (OverloadedError, _DESCRIPTORS),
    errno.ENOMEM: (OverloadedError, "give the daemon more memory"),
    errno.EIO: (UnavailableError, _DISK),
    errno.ENXIO: (UnavailableError, _DISK),
    errno.ENODATA: (UnavailableError, _DISK),
    errno.EUCLEAN: (UnavailableError, _CHECK),
    errno.EBADMSG: (UnavailableError, _CHECK),
    errno.ESTALE: (UnavailableError, "mount this file system again"),
    errno.ETIMEDOUT: (UnavailableError, "mount this file system again"),
    errno.EROFS: (ConfigurationError, _PERMISSION),
    errno.EACCES: (ConfigurationError, _PERMISSION),
    errno.EPERM: (ConfigurationError, _IMMUTABLE),
    errno.ELOOP: (ConfigurationError, _LINK),
    errno.ENOTDIR: (ConfigurationError, _LINK),
    errno.EISDIR: (ConfigurationError, _LINK),
    errno.ENAMETOOLONG: (ConfigurationError, "choose shorter names"),
    errno.EFBIG: (ConfigurationError, "use a file system that holds files of this size"),
    errno.ENOENT: (NotFoundError, ""),
}


_ROT = (
    errno.EIO, errno.ENXIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
)  # fmt: skip
"""What a file system says of one file, and not of itself.

EUCLEAN, EBADMSG: ext4's and xfs's own checksums differ. ENODATA: a medium error, where reads go around the page cache.
"""


def is_damage(error: CairnError) -> bool:
    """Whether *error* says that what lies under a key is missing, rotten or no file, and not that nobody could look.

    A lack of descriptors, memory or rights, a server that is away or a call that was cut short condemns no copy.
    """
    cause = error.__cause__
    return isinstance(error, VersionError) or (isinstance(cause, OSError) and cause.errno in _ROT)


def from_os_error(error: OSError, action: str, path: str | os.PathLike[str]) -> CairnError:
    """*error*, which came from doing *action* to *path*, as one of Cairn's errors (to be raised ``from`` it)."""
    kind, hint = _TABLE.get(error.errno or 0, (InternalError, "report this with the daemon's log"))
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno == errno.ENOSPC:
        reason += _what_is_free(path)
    return kind(f"cannot {action} {os.fspath(path)}: {reason}", hint=hint, context={"path": os.fspath(path)})


def _what_is_free(path: str | os.PathLike[str]) -> str:
    """The sizes that tell whether bytes ran out or inodes; empty where the file system does not say."""
    folder = Path(path).parent
    try:
        found = os.statvfs(folder if folder.is_absolute() else path)
    except OSError:
        return ""
    return f" ({found.f_bavail * found.f_frsize} bytes and {found.f_favail} inodes are free)"


@contextmanager
def explained(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an ``OSError`` inside into Cairn's error, saying that *action* on *path* failed."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, action, path) from error
