"""Exit statuses: one for each answer to "what do I do next?"."""

from __future__ import annotations

from collections.abc import Mapping

from cairn_api.errors import ErrorKind

EXIT_STATUS: Mapping[ErrorKind, int] = {
    ErrorKind.RETRY: 10,
    ErrorKind.WAIT: 11,
    ErrorKind.FIX_CONFIGURATION: 12,
    ErrorKind.CHOOSE_ANOTHER_VERSION: 13,
    ErrorKind.GIVE_UP: 14,
}
