"""The object stores, one file each, opened by URL. Their libraries are imported when the first such URL is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from cairn_api.errors import ConfigurationError
from cairnd.tiers.filesystem import OsFileSystem
from cairnd.tiers.object_store import ObjectStore

_LOCATION = "set persistent_storage_path (CAIRN_PERSISTENT_STORAGE_PATH) to file:///folder or s3://bucket/prefix"
_LIBRARIES: Mapping[str, str] = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def open_store(url: str, options: Mapping[str, str]) -> ObjectStore:
    """The store at *url*: ``file:``, ``s3:``, ``memory:`` (tests), ``gs:`` or ``az:`` with their library installed.

    *options* are the settings of that kind of store (for S3: :data:`cairnd.tiers.stores.s3.OPTIONS`); credentials come
    from the environment unless given there. Nothing is contacted yet. Raises :class:`ConfigurationError` for a URL or
    an option that cannot work.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigurationError(
            f"a {parts.scheme}:// location holds credentials, which end up in logs and manifests",
            hint="give credentials through the environment or the storage options instead",
        )
    if parts.query or parts.fragment:
        raise ConfigurationError(f"the location {url!r} has a part after '?' or '#'", hint=_LOCATION)
    if parts.scheme == "file":
        return _open_file(parts, options)
    if parts.scheme in ("memory", "s3", *_LIBRARIES):
        return _open_remote(parts, options)
    raise ConfigurationError(f"the location {url!r} has an unknown kind of storage", hint=_LOCATION)


def _open_file(parts: SplitResult, options: Mapping[str, str]) -> ObjectStore:
    from cairnd.tiers.stores.file import FileStore  # noqa: PLC0415  (see above)

    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigurationError("a file location names an absolute folder: file:///folder", hint=_LOCATION)
    if options:
        raise ConfigurationError("a file location takes no storage options", hint="remove the storage options")
    return FileStore(OsFileSystem(), Path(unquote(parts.path)))


def _open_remote(parts: SplitResult, options: Mapping[str, str]) -> ObjectStore:
    library = "s3fs" if parts.scheme == "s3" else _LIBRARIES.get(parts.scheme, "fsspec")
    if importlib.util.find_spec(library) is None:
        raise ConfigurationError(
            f"{parts.scheme}:// needs the Python package {library}, which is not installed",
            hint=f"install {library} beside the daemon",
        )
    if not parts.netloc:
        raise ConfigurationError(f"a {parts.scheme}:// location names a bucket", hint=_LOCATION)
    prefix = parts.path.strip("/")
    if parts.scheme == "s3":
        from cairnd.tiers.stores.s3 import S3Store  # noqa: PLC0415

        return S3Store(parts.netloc, prefix, options)
    from cairnd.tiers.stores.fsspec_generic import FsspecStore  # noqa: PLC0415

    return FsspecStore(parts.scheme, f"{parts.netloc}/{prefix}".rstrip("/"), options)
