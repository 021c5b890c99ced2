"""The one table from what remote stores raise to Cairn's errors.

Rows are found by the service's error code, then by the HTTP status, then by the exception's class (by name, along its
bases, so that no library has to be imported), then by ``errno``. Messages name the code or the class and nothing that
the service or the library wrote, for such texts may hold what was signed, or a URL.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from cairn_api.errors import (
    CairnError,
    ConfigurationError,
    InternalError,
    OverloadedError,
    UnavailableError,
    VersionError,
)
from cairnd.tiers.errors import NotFoundError

_Row = tuple[type[CairnError], str]

_ENDPOINT = "check the network to the endpoint of persistent_storage_path, then retry"
_CREDENTIALS = (
    "check the daemon's credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the instance's role) and the "
    "bucket in CAIRN_PERSISTENT_STORAGE_PATH, then restart cairnd"
)
_BUCKET = "create the bucket, or correct CAIRN_PERSISTENT_STORAGE_PATH, then restart cairnd"
_REGION = "set the bucket's region in the storage options, then restart cairnd"
_CLOCK = "set the clock of this machine"
_CERTIFICATE = "install the certificate authority of the endpoint, or correct the endpoint's address"
_SLOW = "the store asks for fewer requests; Cairn goes on by itself"
_FULL = "free space in the bucket, or raise its quota"
_REPORT = "report this with the daemon's log"

_AUTHENTICATION: _Row = (ConfigurationError, _CREDENTIALS)
_UNREACHABLE: _Row = (UnavailableError, _ENDPOINT)
_THROTTLED: _Row = (UnavailableError, _SLOW)
_DAMAGED: _Row = (UnavailableError, "the bytes were damaged on their way; retry")

_BY_CODE: Mapping[str, _Row] = {
    "NoSuchKey": (NotFoundError, ""),
    "NoSuchBucket": (ConfigurationError, _BUCKET),
    "InvalidBucketName": (ConfigurationError, _BUCKET),
    "AccessDenied": _AUTHENTICATION,
    "AllAccessDisabled": _AUTHENTICATION,
    "ExpiredToken": _AUTHENTICATION,
    "InvalidAccessKeyId": _AUTHENTICATION,
    "InvalidToken": _AUTHENTICATION,
    "SignatureDoesNotMatch": _AUTHENTICATION,
    "AuthorizationHeaderMalformed": (ConfigurationError, _REGION),
    "PermanentRedirect": (ConfigurationError, _REGION),
    "IllegalLocationConstraintException": (ConfigurationError, _REGION),
    "RequestTimeTooSkewed": (ConfigurationError, _CLOCK),
    "InvalidRange": (VersionError, "run `cairn verify` on the version"),
    "EntityTooLarge": (ConfigurationError, "use a store that takes objects of this size"),
    "KeyTooLongError": (ConfigurationError, "choose shorter names"),
    "QuotaExceeded": (OverloadedError, _FULL),
    "XMinioStorageFull": (OverloadedError, _FULL),
    "BadDigest": _DAMAGED,
    "InvalidDigest": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "NoSuchUpload": (UnavailableError, "the store dropped this upload; retry"),
    "RequestTimeout": _UNREACHABLE,
    "InternalError": _UNREACHABLE,
    "ServiceUnavailable": _THROTTLED,
    "SlowDown": _THROTTLED,
    "Throttling": _THROTTLED,
    "TooManyRequests": _THROTTLED,
    "ConditionalRequestConflict": (UnavailableError, "another node writes the same object; retry"),
    "OperationAborted": (UnavailableError, "another node writes the same object; retry"),
}

_BY_STATUS: Mapping[int, _Row] = {
    301: (ConfigurationError, _REGION),
    307: (ConfigurationError, _REGION),
    401: _AUTHENTICATION,
    403: _AUTHENTICATION,
    404: (NotFoundError, ""),
    408: _UNREACHABLE,
    409: (UnavailableError, "another node writes the same object; retry"),
    416: (VersionError, "run `cairn verify` on the version"),
    429: _THROTTLED,
    500: _UNREACHABLE,
    502: _UNREACHABLE,
    503: _THROTTLED,
    504: _UNREACHABLE,
    507: (OverloadedError, _FULL),
}

_BY_CLASS: Mapping[str, _Row] = {
    "botocore.exceptions.NoCredentialsError": _AUTHENTICATION,
    "botocore.exceptions.PartialCredentialsError": _AUTHENTICATION,
    "botocore.exceptions.CredentialRetrievalError": _AUTHENTICATION,
    "botocore.exceptions.NoRegionError": (ConfigurationError, _REGION),
    "botocore.exceptions.SSLError": (ConfigurationError, _CERTIFICATE),
    "botocore.exceptions.HTTPClientError": _UNREACHABLE,
    "botocore.exceptions.ConnectionError": _UNREACHABLE,
    "botocore.exceptions.IncompleteReadError": _UNREACHABLE,
    "botocore.parsers.ResponseParserError": _UNREACHABLE,
    "aiohttp.client_exceptions.ClientSSLError": (ConfigurationError, _CERTIFICATE),
    "aiohttp.client_exceptions.ClientError": _UNREACHABLE,
    "fsspec.exceptions.FSTimeoutError": _UNREACHABLE,
    "builtins.TimeoutError": _UNREACHABLE,
    "builtins.ConnectionError": _UNREACHABLE,
    "socket.gaierror": _UNREACHABLE,
    "builtins.PermissionError": _AUTHENTICATION,
    "builtins.FileNotFoundError": (NotFoundError, ""),
}

_BY_ERRNO: Mapping[int, _Row] = {
    errno.EBUSY: _THROTTLED,
    errno.EREMOTEIO: _UNREACHABLE,
    errno.EHOSTUNREACH: _UNREACHABLE,
    errno.ENETUNREACH: _UNREACHABLE,
    errno.ENOSPC: (OverloadedError, _FULL),
}


def translate(error: BaseException, action: str, key: str, where: str) -> CairnError:
    """*error*, raised by doing *action* to *key* in the store at *where*, as one of Cairn's (raise it ``from`` it)."""
    if isinstance(error, CairnError):
        return error
    code, status = _service_answer(error)
    kind, hint = _row(error, code, status)
    reason = code or (f"HTTP status {status}" if status else type(error).__name__)
    return kind(f"cannot {action} {key} in {where}: {reason}", hint=hint, context={"key": key, "store": where})


def service_code(error: BaseException) -> str:
    """The service's error code (``NoSuchKey``), the HTTP status as text if that is all there is, or nothing."""
    code, status = _service_answer(error)
    return code or (str(status) if status else "")


def _service_answer(error: BaseException) -> tuple[str, int]:
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return "", 0
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # A reply without a body (to HEAD) leaves the status where the code belongs.
    return ("", int(code)) if code.isdigit() else (code, status)


def _row(error: BaseException, code: str, status: int) -> _Row:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    for base in type(error).__mro__:
        row = _BY_CLASS.get(f"{base.__module__}.{base.__qualname__}")
        if row is not None:
            return row
    return _BY_ERRNO.get(getattr(error, "errno", None) or 0, (InternalError, _REPORT))
