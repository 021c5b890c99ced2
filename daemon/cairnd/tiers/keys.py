"""What may be a key: a relative name, joined by ``/``, that cannot leave its root."""

from __future__ import annotations

import os

from cairn_api.errors import ConfigurationError


def check_key(key: str) -> str:
    """Return *key* unchanged if it is a relative name that stays below its root.

    Raises :class:`ConfigurationError` for an empty key, an absolute one, and one with an empty part, ``.``, ``..``, a
    NUL or what no file name can hold.
    """
    if not key or "\0" in key or not _is_file_name(key) or any(part in ("", ".", "..") for part in key.split("/")):
        raise ConfigurationError(
            f"the key {key!r} is not allowed: it consists of parts joined by '/', none of them empty, '.' or '..'",
            hint="report this with the daemon's log",
        )
    return key


def _is_file_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """Return *prefix* unchanged if it is empty or a key with ``/`` after it; else raise."""
    if prefix:
        if not prefix.endswith("/"):
            raise ConfigurationError(
                f"the prefix {prefix!r} is not allowed: it names a folder, so it ends with '/'",
                hint="report this with the daemon's log",
            )
        check_key(prefix[:-1])
    return prefix
