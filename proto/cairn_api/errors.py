"""The closed set of errors, named by what the caller should do next.

Client and daemon raise the same classes: the daemon's travel over gRPC (``cairnd.rpc.status`` holds the one table of
status codes) and are raised again, unchanged, in the client. A new kind needs a new answer to "what do I do now?";
a new *cause* only needs a new message.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class ErrorKind(StrEnum):
    """What the caller does next. The values appear in JSON output and decide the CLI's exit status."""

    RETRY = "retry"
    WAIT = "wait"
    FIX_CONFIGURATION = "fix_configuration"
    CHOOSE_ANOTHER_VERSION = "choose_another_version"
    GIVE_UP = "give_up"


class CairnError(Exception):
    """Base of all errors that Cairn raises on purpose.

    ``hint`` names the operator's next step (usually a command); ``context`` carries job, version, rank, partition,
    tier: whatever an operator would otherwise have to search for.
    """

    kind = ErrorKind.GIVE_UP

    def __init__(self, message: str, *, hint: str = "", context: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = {key: str(value) for key, value in (context or {}).items()}

    def __str__(self) -> str:
        return f"{self.message}. Next step: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Ranks exchange failures through their own collective, so errors must survive pickling whole.
        return _rebuild, (type(self), self.message, self.hint, self.context)


class UnavailableError(CairnError):
    """Something that is normally there is not answering (a daemon, a bucket). Retry the same call later."""

    kind = ErrorKind.RETRY


class OverloadedError(CairnError):
    """A budget is spent: capture memory, disk space, buffers. Wait until it is freed, or enlarge it."""

    kind = ErrorKind.WAIT


class ConfigurationError(CairnError):
    """The request can never succeed as it stands: a setting, a name, a permission or a protocol is wrong. Fix it."""

    kind = ErrorKind.FIX_CONFIGURATION


class VersionError(CairnError):
    """This version (or tag) does not exist, is damaged or cannot be reached here. Choose another version."""

    kind = ErrorKind.CHOOSE_ANOTHER_VERSION


class SaveFailedError(CairnError):
    """This save is lost for good: it was aborted, on this rank or on another. Earlier versions are intact."""

    kind = ErrorKind.GIVE_UP


class InternalError(CairnError):
    """A defect in Cairn itself, or a failure nobody foresaw. Report it with the daemon's log."""

    kind = ErrorKind.GIVE_UP


ERRORS: Mapping[str, type[CairnError]] = {
    cls.__name__: cls
    for cls in (
        UnavailableError,
        OverloadedError,
        ConfigurationError,
        VersionError,
        SaveFailedError,
        InternalError,
    )
}
"""Every concrete class by the name it has on the wire."""


def _rebuild(cls: type[CairnError], message: str, hint: str, context: Mapping[str, str]) -> CairnError:
    return cls(message, hint=hint, context=context)
