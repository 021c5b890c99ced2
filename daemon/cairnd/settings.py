"""Every value an operator tunes, its unit, its default and why; one loader; one validation.

Settings are values. Components (clock, file system, stores) are objects and are made in ``app.py``; the two never
share a class. A setting has one name everywhere: ``tier1_path`` in the TOML file, ``CAIRN_TIER1_PATH`` in the
environment and ``--tier1-path`` on the command line; a flag beats the environment, which beats the file.
"""

from __future__ import annotations

import argparse
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from cairn_api.errors import ConfigurationError
from cairn_api.wire import DEFAULT_RUNTIME_DIR

MIB = 1024 * 1024
GIB = 1024 * MIB

MOST_RESUMES = 64
"""So many resumes that died on a version are remembered, hence counted."""

TIER1_RESERVED_BYTES = 64 * MIB
"""Kept free in tier 1 for manifests and records, so that a full disk can still be tidied up."""


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may set. Field order is the order of ``deploy/cairnd.example.toml``."""

    runtime_dir: str = _setting(DEFAULT_RUNTIME_DIR, "folder of the two sockets that clients connect to")
    tier1_path: str = _setting("/var/lib/cairn", "folder on local NVMe where versions are written; owned by cairnd")
    persistent_storage_path: str = _setting(
        "", "fsspec URL of tier 2 (file://, s3://bucket/prefix, gs://, az://); empty: nothing outlives this node"
    )
    storage_options: tuple[str, ...] = _setting(
        (),
        "key=value options of the object store, e.g. endpoint_url=http://127.0.0.1:8333; credentials come from "
        "the environment or the instance, never from here",
    )
    allowed_storage_locations: tuple[str, ...] = _setting(
        (), "URL prefixes that a job may name besides persistent_storage_path; a job that names another is refused"
    )
    allowed_uids: tuple[int, ...] = _setting((), "numeric users who may connect besides root and the daemon's own user")
    capture_memory_bytes: int = _setting(
        0, "shared memory that all ranks of this node may hold together, in bytes; 0: half of the machine's memory"
    )
    num_of_version_in_retention: int = _setting(
        2, "newest versions kept per job in each tier; a job's own block may set its number; at least 1"
    )
    tier2_num_of_version_in_retention: int = _setting(0, "the same for tier 2 alone; 0: as num_of_version_in_retention")
    tier2_keep_every: int = _setting(0, "besides the newest, keep each version whose sequence is a multiple; 0: none")
    tier2_keep_period_s: float = _setting(0.0, "besides the newest, keep one version per this many seconds; 0: none")
    tier1_limit_bytes: int = _setting(
        0,
        "bytes that versions may take in tier 1; 0: as much as its file system has. Above it the oldest version "
        "that waits for tier 2 loses its place in the queue (counted, reported)",
    )
    tier1_write_bytes_per_s: int = _setting(
        0, "bytes per second at which captured saves are written to tier 1; 0: as fast as the disk is"
    )
    drain_threads: int = _setting(
        2,
        "threads that bring captured saves to tier 1; 1: digests and writes by turns, 2: at the same time; each two "
        "more bring another partition along; at most 32",
    )
    recheck_one_in: int = _setting(
        64,
        "of the pieces of up to 4 MiB that clients digested while they copied, one in so many is digested again before "
        "it is written; 1: all, which takes as much from training as writing them",
    )
    tier2_delete_grace_s: float = _setting(
        60.0, "seconds between a tier 2 version's tombstone and the deletion of its data; longer than a restore takes"
    )
    lease_s: float = _setting(60.0, "seconds without a sign of life after which a client's unfinished save is aborted")
    commit_timeout_s: float = _setting(
        600.0, "seconds an unfinished save may stay open after its last byte arrived; then it is aborted"
    )
    drain_timeout_s: float = _setting(
        90.0, "seconds that SIGTERM may take to bring what is waiting to tier 2; keep below the unit's TimeoutStopSec"
    )
    upload_concurrency: int = _setting(4, "partitions uploaded or downloaded at the same time")
    verify_on_load: str = _setting(
        "cached", "cached: a tier 1 file is hashed once per daemon start or change of the file; always: at every load"
    )
    scrub_bytes_per_s: int = _setting(
        16 * MIB,
        "bytes per second at which tier 1 is read again in the background to find damage early; 0: not at all",
    )
    scrub_tier2_bytes_per_s: int = _setting(
        0, "the same for tier 2, where reading may cost money; 0: not at all (`cairn verify --deep` reads it too)"
    )
    scrub_interval_s: float = _setting(86400.0, "seconds after which a copy is read again in the background")
    pass_over_after_resumes: int = _setting(
        3,
        "launches in a row that went on from a version and died before they saved anything, after which automatic "
        "resume passes that version over; 0: never; at most 64",
    )
    protect_files: bool = _setting(
        False,
        "make published files immutable (needs root): not even root can then overwrite one through a link; "
        "removing the tree by hand needs `chattr -R -i` first",
    )
    metrics_address: str = _setting("", "host:port of the Prometheus endpoint; empty: none")
    log_format: str = _setting("text", "text or json; one event per line on standard error either way")
    log_level: str = _setting("info", "debug, info, warning or error")

    def validate(self) -> Settings:
        """Return self, or raise :class:`ConfigurationError` naming the field, its value and what would be accepted."""
        for fault in self.faults():
            raise fault
        return self

    def faults(self) -> Iterator[ConfigurationError]:
        """What :meth:`validate` would raise, one for each field that is not valid."""
        for item in fields(self):
            fault = self._fault(item.name, getattr(self, item.name))
            if fault is not None:
                yield fault

    def _fault(self, name: str, value: Any) -> ConfigurationError | None:
        if isinstance(value, float) and not math.isfinite(value):
            return _invalid(name, value, "a finite number")
        least, most = _LEAST.get(name), _MOST.get(name, math.inf)
        if least is not None and not least <= value <= most:
            return _invalid(name, value, f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}")
        if name in _CHOICES and value not in _CHOICES[name]:
            return _invalid(name, value, " or ".join(_CHOICES[name]))
        if name in ("runtime_dir", "tier1_path") and (not Path(value).is_absolute() or "\0" in value):
            return _invalid(name, value, "an absolute path")
        if name == "persistent_storage_path" and value and "://" not in value:
            return _invalid(name, value, "a URL such as s3://bucket/prefix")
        if name == "storage_options":
            unpaired = next((option for option in value if "=" not in option), None)
            return _invalid(name, unpaired, "key=value") if unpaired is not None else None
        return None

    def capture_limit_bytes(self) -> int:
        """The capture budget with the default resolved."""
        if self.capture_memory_bytes:
            return self.capture_memory_bytes
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2

    def store_options(self) -> dict[str, str]:
        """``storage_options`` as a mapping."""
        return dict(option.split("=", 1) for option in self.storage_options)


_LEAST: Mapping[str, float] = {
    "num_of_version_in_retention": 1,
    "capture_memory_bytes": 0,
    "tier2_num_of_version_in_retention": 0,
    "tier2_keep_every": 0,
    "tier2_keep_period_s": 0,
    "tier1_limit_bytes": 0,
    "tier1_write_bytes_per_s": 0,
    "scrub_bytes_per_s": 0,
    "scrub_tier2_bytes_per_s": 0,
    "scrub_interval_s": 1,
    "pass_over_after_resumes": 0,
    "drain_threads": 1,
    "recheck_one_in": 1,
    "tier2_delete_grace_s": 0,
    "lease_s": 0.1,
    "commit_timeout_s": 0.1,
    "drain_timeout_s": 0.1,
    "upload_concurrency": 1,
}

_MOST: Mapping[str, float] = {
    "drain_threads": 32,  # two saturate a disk; many only take cores from training
    "pass_over_after_resumes": MOST_RESUMES,
}

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "verify_on_load": ("cached", "always"),
    "log_format": ("text", "json"),
    "log_level": ("debug", "info", "warning", "error"),
}


def _invalid(name: str, value: object, accepted: str) -> ConfigurationError:
    return ConfigurationError(
        f"setting {name} = {value!r} is not valid", hint=f"set {name} to {accepted}", context={"setting": name}
    )


def _convert(name: str, value: object, kind: Any) -> object:
    """Turn a TOML value, or a string from the environment or a flag, into the field's type."""
    try:
        if kind in (tuple[str, ...], tuple[int, ...]):
            items = value.split(",") if isinstance(value, str) else value
            if not isinstance(items, Sequence):
                raise ValueError
            return tuple(_convert_one(item, str if kind == tuple[str, ...] else int) for item in items if item != "")
        return _convert_one(value, kind)
    except (ValueError, KeyError, OverflowError):
        kind_name = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, "a list")
        if kind == tuple[int, ...]:
            kind_name = "a list of whole numbers"
        raise _invalid(name, value, kind_name) from None


def _convert_one(value: object, kind: Any) -> object:
    """One value, which is already of its kind or a string that spells it; never rounded, never guessed."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}[value] if kind is bool else kind(value)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError
    return kind(value)


def load_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from command-line *arguments*, the *environment* and the file named by ``--config``.

    Raises :class:`ConfigurationError` for an unknown name (with the nearest known one), a value of the wrong type or
    out of range, or a file that cannot be read.
    """
    settings, faults = examine_settings(arguments, environment)
    for fault in faults:
        raise fault
    return settings


def examine_settings(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[Settings, list[ConfigurationError]]:
    """The settings with what is wrong left at its default, and all that is wrong with them. Raises nothing."""
    parser = argparse.ArgumentParser(prog="cairnd", description="The Cairn checkpoint daemon.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings (also CAIRN_CONFIG)")
    for item in fields(Settings):
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            dest=item.name,
            metavar="VALUE",
            help=item.metadata["help"].replace("%", "%%"),
        )
    parsed, unknown = parser.parse_known_args(arguments)
    types = get_type_hints(Settings)
    faults: list[ConfigurationError] = []
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1)  # noqa: SLF001
        faults.append(
            ConfigurationError(
                f"unknown argument {unknown[0]!r}", hint=f"did you mean {near[0]!r}?" if near else "see `cairnd --help`"
            )
        )
    given: list[tuple[str, object]] = []
    config = parsed.config or environment.get("CAIRN_CONFIG")
    for name, value in (_read_file(config, faults) if config else {}).items():
        if name in types:
            given.append((name, value))
            continue
        near = get_close_matches(name, types, n=1)
        faults.append(
            ConfigurationError(
                f"{config}: unknown setting {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else "see deploy/cairnd.example.toml for all settings",
            )
        )
    for name in types:
        from_flag, from_environment = getattr(parsed, name), environment.get("CAIRN_" + name.upper())
        if from_flag is not None or from_environment is not None:
            given.append((name, from_flag if from_flag is not None else from_environment))
    values: dict[str, Any] = {}
    for name, value in given:
        try:
            values[name] = _convert(name, value, types[name])
        except ConfigurationError as error:
            faults.append(error)
    invalid = list(Settings(**values).faults())
    for fault in invalid:
        del values[fault.context["setting"]]  # defaults are valid
    return Settings(**values), faults + invalid


def _read_file(path: str, faults: list[ConfigurationError]) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:  # not TOML, or not text, or a trap for its parser
        faults.append(
            ConfigurationError(
                f"cannot read the configuration file {path}: {error}", hint="correct --config or CAIRN_CONFIG"
            )
        )
        return {}
