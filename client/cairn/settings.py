"""Every value a training job tunes, its unit, its default and why; one loader; one validation.

A setting has one name everywhere: the key in the ``"cairn"`` block of the DeepSpeed JSON, ``CAIRN_<NAME>`` in the
environment, and the keyword of :func:`cairn.connect`. **An argument beats the environment, which beats the block,
which beats the default.** What an operator does not allow is refused by the daemon when the client connects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from cairn_api.errors import ConfigurationError
from cairn_api.names import check_job
from cairn_api.wire import DEFAULT_RUNTIME_DIR

ENVIRONMENT_PREFIX = "CAIRN_"


class Durability(StrEnum):
    """What "it is saved" promises."""

    CAPTURED = "captured"
    """Every rank agreed and the daemons hold all bytes in memory: survives the death of the training processes."""
    TIER1 = "tier1"
    """On the nodes' disks: survives a crash of the nodes."""
    TIER2 = "tier2"
    """In the object store: survives the loss of the nodes."""


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """What one training job may set, within the operator's limits."""

    enabled: bool = _setting(True, "false: integrations leave the training script as it is without Cairn")
    job: str = _setting("", "namespace of this run's checkpoints; integrations derive it from the save directory")
    runtime_dir: str = _setting(DEFAULT_RUNTIME_DIR, "folder of the daemon's two sockets")

    persistent_storage_path: str = _setting("", "tier 2 as a URL; empty: the daemon's own. The operator must allow it")
    persistent_time_interval: float = _setting(100.0, "seconds between saves that go to tier 2; 0: every save does")
    num_of_version_in_retention: int = _setting(0, "newest versions kept per tier; 0: the daemon's own number")

    enable_load: bool = _setting(True, "false: loading reads plain paths only, as if Cairn were not installed")
    load_path: str = _setting("", "tier 2 (its root, as a URL) to load this job's versions from; empty: its own tiers")
    weights_only: bool = _setting(True, "torch.load's safe mode plus Cairn's allow-list; DeepSpeed's engine sets false")

    commit_durability: str = _setting("captured", "what commit() waits for: captured, tier1 or tier2")
    commit_timeout_s: float = _setting(600.0, "seconds commit() may take, waiting for slower ranks included")
    buffers: int = _setting(2, "saves in flight per rank; each costs shared memory of the size of the rank's state")
    buffer_wait_s: float = _setting(600.0, "seconds create() waits for a free buffer before it fails")
    when_no_buffer: str = _setting("wait", "wait: create() waits for a buffer; skip: all ranks leave this save out")

    capture: str = _setting("blocking", "blocking: save() copies; overlapped: large tensors are copied behind training")
    transport: str = _setting("auto", "auto: shared memory where it works; shm: only that; stream: bytes over gRPC")
    oversize: str = _setting("stream", "a state larger than the memory granted: stream it (slower), or fail")
    save_dir_files: str = _setting("auto", "what save_dir shows: auto, link (into tier 1), copy or placeholder")

    connect_timeout_s: float = _setting(5.0, "seconds connect() waits for a daemon that is just starting")
    reconnect_timeout_s: float = _setting(60.0, "seconds a call waits for a daemon that is restarting")
    collective_timeout_s: float = _setting(600.0, "seconds a rank waits for the others outside commit()")

    def validate(self) -> ClientSettings:
        """Return self, or raise :class:`ConfigurationError` naming the setting, its value and what is accepted."""
        if self.job:
            check_job(self.job)
        for item in fields(self):
            _check_sayable(item.name, getattr(self, item.name))
        for name in ("persistent_time_interval", "num_of_version_in_retention", "buffer_wait_s"):
            if getattr(self, name) < 0:
                raise _invalid(name, getattr(self, name), "0 or more")
        for name in ("commit_timeout_s", "connect_timeout_s", "reconnect_timeout_s", "collective_timeout_s"):
            if getattr(self, name) <= 0:
                raise _invalid(name, getattr(self, name), "more than 0 seconds")
        if self.buffers < 1:
            raise _invalid("buffers", self.buffers, "1 or more")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise _invalid(name, getattr(self, name), " or ".join(accepted))
        if not Path(self.runtime_dir).is_absolute():
            raise _invalid("runtime_dir", self.runtime_dir, "an absolute path")
        for name in ("persistent_storage_path", "load_path"):
            if getattr(self, name) and "://" not in getattr(self, name):
                raise _invalid(name, getattr(self, name), "a URL such as s3://bucket/prefix or file:///folder")
        return self


_MOST = 1_000_000_000
"""Of any number: timers of Python and fields of the wire have bounds, 30 years and 4 thousand million."""


def _check_sayable(name: str, value: bool | float | str) -> None:
    """Raise for what timers, paths and the wire cannot express."""
    if isinstance(value, (int, float)):
        if not -_MOST <= value <= _MOST:  # or is not a number
            raise _invalid(name, value, f"{_MOST} or less")
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _invalid(name, value, "a text that has a UTF-8 form") from None
    if "\0" in value:
        raise _invalid(name, value, "a text without NUL")


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "commit_durability": tuple(Durability),
    "when_no_buffer": ("wait", "skip"),
    "capture": ("blocking", "overlapped"),
    "transport": ("auto", "shm", "stream"),
    "oversize": ("stream", "fail"),
    "save_dir_files": ("auto", "link", "copy", "placeholder"),
}


def load_settings(
    arguments: Mapping[str, object], environment: Mapping[str, str], block: Mapping[str, object] | None = None
) -> ClientSettings:
    """Settings from explicit *arguments*, the *environment* and a *block* of JSON, in this order of precedence.

    None means "not set" in *arguments* and *block*. Variables of the environment that start with ``CAIRN_`` and name
    no client setting are the daemon's and are left alone. Raises :class:`ConfigurationError` for an unknown key
    (naming the nearest one), a value of the wrong type or a value out of bounds.
    """
    block = block or {}
    kinds = get_type_hints(ClientSettings)
    values: dict[str, object] = {}
    for source, given in (("argument", arguments), ("key", block)):
        for name in given:
            if name not in kinds:
                raise _unknown(source, name)
    for item in fields(ClientSettings):
        variable = environment.get(ENVIRONMENT_PREFIX + item.name.upper())
        for value in (arguments.get(item.name), variable, block.get(item.name)):
            if value is not None:
                values[item.name] = _convert(item.name, value, kinds[item.name])
                break
    return ClientSettings(**values).validate()  # type: ignore[arg-type]  # _convert checked each against its field


def _unknown(source: str, name: str) -> ConfigurationError:
    known = [item.name for item in fields(ClientSettings)]
    near = get_close_matches(name, known, n=1)
    return ConfigurationError(
        f"unknown {source} {name!r} in the settings of Cairn",
        hint=f"did you mean {near[0]!r}?" if near else f"the settings are: {', '.join(known)}",
        context={"setting": name},
    )


def _invalid(name: str, value: object, accepted: str) -> ConfigurationError:
    return ConfigurationError(
        f"setting {name} = {value!r} is not valid", hint=f"set {name} to {accepted}", context={"setting": name}
    )


_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _convert(name: str, value: object, kind: type) -> object:
    """Turn a JSON value, an argument or a text of the environment into the field's type."""
    if kind is bool:
        truth = value if isinstance(value, bool) else _TRUTH.get(str(value).lower())
        if truth is None:
            raise _invalid(name, value, "true or false")
        return truth
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        raise _invalid(name, value, _KIND_NAMES[kind])
    if kind is str:
        return str(value)
    if isinstance(value, Path) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise _invalid(name, value, _KIND_NAMES[kind])
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise _invalid(name, value, _KIND_NAMES[kind]) from None


_KIND_NAMES: Mapping[type, str] = {int: "a whole number", float: "a number", str: "a text"}
