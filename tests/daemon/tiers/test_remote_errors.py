"""The one table from what remote stores raise to Cairn's errors."""

from __future__ import annotations

import aiohttp
import botocore.exceptions as boto  # type: ignore[import-untyped]
import pytest

from cairn_api.errors import (
    CairnError,
    ConfigurationError,
    InternalError,
    OverloadedError,
    UnavailableError,
    VersionError,
)
from cairnd.tiers.errors import NotFoundError
from cairnd.tiers.stores.remote_errors import service_code, translate

CANARY = "canary-secret-91af"


def answer(code: str, status: int) -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code, "Message": CANARY}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answer("NoSuchKey", 404), NotFoundError),
        (answer("404", 404), NotFoundError),
        (answer("NoSuchBucket", 404), ConfigurationError),
        (answer("AccessDenied", 403), ConfigurationError),
        (answer("403", 403), ConfigurationError),
        (answer("SomethingNew", 403), ConfigurationError),
        (answer("SignatureDoesNotMatch", 403), ConfigurationError),
        (answer("RequestTimeTooSkewed", 403), ConfigurationError),
        (answer("PermanentRedirect", 301), ConfigurationError),
        (answer("SlowDown", 503), UnavailableError),
        (answer("SomethingNew", 503), UnavailableError),
        (answer("InternalError", 500), UnavailableError),
        (answer("BadDigest", 400), UnavailableError),
        (answer("InvalidRange", 416), VersionError),
        (answer("QuotaExceeded", 403), OverloadedError),
        (answer("SomethingNew", 400), InternalError),
        (boto.NoCredentialsError(), ConfigurationError),
        (boto.EndpointConnectionError(endpoint_url=CANARY), UnavailableError),
        (boto.ConnectTimeoutError(endpoint_url=CANARY), UnavailableError),
        (boto.ReadTimeoutError(endpoint_url=CANARY), UnavailableError),
        (boto.SSLError(endpoint_url=CANARY, error=CANARY), ConfigurationError),
        (aiohttp.ClientPayloadError(CANARY), UnavailableError),
        (aiohttp.ServerDisconnectedError(CANARY), UnavailableError),
        (TimeoutError(CANARY), UnavailableError),
        (ConnectionResetError(CANARY), UnavailableError),
        (PermissionError(CANARY), ConfigurationError),
        (FileNotFoundError(CANARY), NotFoundError),
        (OSError(28, CANARY), OverloadedError),
        (OSError(121, CANARY), UnavailableError),
        (ValueError(CANARY), InternalError),
    ],
)
def test_each_failure_says_what_to_do_and_no_text_of_the_service(error: Exception, kind: type[CairnError]) -> None:
    translated = translate(error, "put", "a/b", "s3://bucket")
    assert type(translated) is kind
    assert "cannot put a/b in s3://bucket" in translated.message
    assert CANARY not in str(translated)
    assert translated.hint or kind is NotFoundError
    assert translated.context == {"key": "a/b", "store": "s3://bucket"}


def test_cairns_own_errors_pass_unchanged() -> None:
    error = VersionError("damaged")
    assert translate(error, "put", "a", "s3://bucket") is error


def test_service_codes_are_read_from_replies_with_and_without_a_body() -> None:
    assert service_code(answer("PreconditionFailed", 412)) == "PreconditionFailed"
    assert service_code(answer("412", 412)) == "412"
    assert service_code(ValueError()) == ""
