"""``s3://``: one bucket of any S3 service, through the client that s3fs configures.

s3fs finds credentials, regions and endpoints; requests go straight to its client, because s3fs's own upload leaves
orphans when it is cancelled, publishes truncated objects, and holds whole files in memory. Retries are in one place,
:meth:`S3Store._persistently`, under one deadline. Payloads carry CRC-64/NVME, which the service checks where it knows
it, instead of a SHA-256 signature, which costs 0.5 CPU-seconds per GB.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import s3fs
from awscrt.checksums import crc64nvme

from cairn_api.errors import ConfigurationError, UnavailableError, VersionError
from cairnd.tiers.errors import UploadCancelledError
from cairnd.tiers.keys import check_key, check_prefix
from cairnd.tiers.object_store import BinarySource, Capabilities, ObjectInfo
from cairnd.tiers.stores.remote_errors import service_code, translate
from cairnd.tiers.stores.s3_multipart import Multipart, checksum_text

OPTIONS = frozenset({"endpoint_url", "region", "key", "secret", "token", "addressing_style", "anonymous", "ca_bundle"})
"""Storage options. ``key``, ``secret`` and ``token`` are credentials; leave them out to use the environment's."""

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
CALL_DEADLINE_S = 60.0
"""For one small call, all its attempts included."""

_ATTEMPTS = 4
_SLOWEST_BYTES_PER_S = 1e6
_FIRST_PAUSE_S = 0.2
_POLL_S = 0.1
_CLEAN_UP_S = 15.0
_SINGLE_PUT_BYTES = 16 * 1024 * 1024
_EXISTS = ("PreconditionFailed", "412", "EntityAlreadyExists")
_NO_CONDITIONS = ("NotImplemented", "501")
_MISSING = ("NoSuchKey", "NotFound", "404")
_Answer = TypeVar("_Answer")


class S3Store:
    """Objects below *prefix* of *bucket*."""

    def __init__(
        self, bucket: str, prefix: str, options: Mapping[str, str], *, call_deadline_s: float = CALL_DEADLINE_S
    ) -> None:
        unknown = sorted(set(options) - OPTIONS)
        if unknown:
            raise ConfigurationError(
                f"unknown storage options for s3: {', '.join(unknown)}", hint=f"known are {', '.join(sorted(OPTIONS))}"
            )
        if "@" in options.get("endpoint_url", ""):
            raise ConfigurationError("endpoint_url holds credentials", hint="give them as key and secret")
        self._bucket = bucket
        self._call_deadline_s = call_deadline_s
        self._prefix = f"{prefix}/" if prefix else ""
        self._where = f"s3://{bucket}/{prefix}".rstrip("/")
        self._capabilities = Capabilities("s3", conditional_put=True, ranged_reads=True)
        self._s3 = s3fs.S3FileSystem(
            key=options.get("key"),
            secret=options.get("secret"),
            token=options.get("token"),
            anon=options.get("anonymous", "false").lower() == "true",
            endpoint_url=options.get("endpoint_url"),
            client_kwargs={
                **({"region_name": options["region"]} if "region" in options else {}),
                **({"verify": options["ca_bundle"]} if "ca_bundle" in options else {}),
            },
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": 32,
                "retries": {"total_max_attempts": 1},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "s3": {
                    "payload_signing_enabled": False,
                    "addressing_style": options.get("addressing_style", "auto"),
                },
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def probe(self, key: str) -> Capabilities:
        self._capabilities = self._capabilities._replace(conditional_put=True)
        try:
            created = self.put_if_absent(key, b"1")
            excluded = not self.put_if_absent(key, b"2") and self.get(key, 1) == b"1"
        finally:
            self.delete(key)
        self._capabilities = self._capabilities._replace(
            conditional_put=self._capabilities.conditional_put and created and excluded
        )
        return self._capabilities

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, lambda client: client.put_object(**self._object(key), **_payload(data)))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self._capabilities.conditional_put:
            try:
                self._call(
                    "put",
                    key,
                    lambda client: client.put_object(**self._object(key), **_payload(data), IfNoneMatch="*"),
                    expected=(*_EXISTS, *_NO_CONDITIONS),
                )
            except _ExpectedError as answer:
                if answer.code in _EXISTS:
                    return False
                self._capabilities = self._capabilities._replace(conditional_put=False)
            else:
                return True
        if self.info(key) is not None:
            return False
        self.put(key, data)
        return True

    def upload(
        self,
        key: str,
        source: BinarySource,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        until_s = time.monotonic() + deadline_s
        with Multipart(source) as multipart:
            reported_bytes = 0

            def look() -> None:
                nonlocal reported_bytes
                if multipart.sent_bytes > reported_bytes:
                    reported_bytes = multipart.sent_bytes
                    progress(reported_bytes)
                if cancelled():
                    raise UploadCancelledError(f"the upload of {key} to {self._where} was cancelled")

            async def send() -> None:
                client = await self._client()
                try:
                    async with asyncio.timeout(deadline_s):
                        if source.size_bytes <= _SINGLE_PUT_BYTES:
                            await self._persist(multipart.put(client, self._object(key)), key, until_s)
                        else:
                            await multipart.send(
                                client, self._object(key), lambda request: self._persist(request, key, until_s)
                            )
                except TimeoutError as error:
                    raise UnavailableError(
                        f"the upload of {key} to {self._where} was not done after {deadline_s:g} s",
                        hint="check the bandwidth to the endpoint of persistent_storage_path",
                    ) from error

            look()
            self._wait(send(), look)
            look()

    def get(self, key: str, max_bytes: int) -> bytes:
        async def read(client: Any) -> bytes:
            answer = await client.get_object(**self._object(key))
            async with answer["Body"] as body:
                size_bytes = int(answer["ContentLength"])
                if size_bytes > max_bytes:
                    body.close()
                    raise VersionError(f"{key} has {size_bytes} bytes where at most {max_bytes} are expected")
                return bytes(await body.read())

        return self._call("get", key, read)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        buffer = buffer.cast("B")
        if not len(buffer):
            return
        last = offset + len(buffer) - 1

        async def read(client: Any) -> None:
            answer = await client.get_object(**self._object(key), Range=f"bytes={offset}-{last}")
            async with answer["Body"] as body:
                self._check_range(key, answer, offset, len(buffer))
                filled = 0
                async for chunk in body.iter_chunks(256 * 1024):
                    buffer[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
            if filled != len(buffer):
                raise UnavailableError(f"a reply from {self._where} ended early", hint="retry")

        self._call("read", key, read, extra_s=len(buffer) / _SLOWEST_BYTES_PER_S)

    def info(self, key: str) -> ObjectInfo | None:
        try:
            answer = self._call(
                "look at", key, lambda client: client.head_object(**self._object(key)), expected=_MISSING
            )
        except _ExpectedError:
            return None
        return ObjectInfo(key, int(answer["ContentLength"]), answer["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in self._pages(check_prefix(prefix), {}):
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self._prefix) :]
                yield ObjectInfo(key, int(entry["Size"]), entry["LastModified"].timestamp())

    def list_folders(self, prefix: str) -> Sequence[str]:
        start = len(self._prefix + check_prefix(prefix))
        pages = self._pages(prefix, {"Delimiter": "/"})
        return sorted(entry["Prefix"][start:-1] for page in pages for entry in page.get("CommonPrefixes", ()))

    def delete(self, key: str) -> None:
        try:
            self._call("delete", key, lambda client: client.delete_object(**self._object(key)), expected=_MISSING)
        except _ExpectedError:
            return

    def unfinished_uploads(self, older_than_s: float) -> Sequence[str]:
        """What :meth:`abort_stale_uploads` would remove: keys of the bucket."""
        return [upload["Key"] for upload in self._stale_uploads("", older_than_s)]

    def abort_stale_uploads(self, prefix: str, older_than_s: float) -> int:
        stale = self._stale_uploads(prefix, older_than_s)
        for upload in stale:
            self._abort_stale(upload)
        return len(stale)

    def _stale_uploads(self, prefix: str, older_than_s: float) -> Sequence[Mapping[str, str]]:
        full = self._prefix + check_prefix(prefix)
        markers: dict[str, str] = {}
        stale = []
        while True:
            page = self._call(
                "list the uploads of",
                prefix,
                lambda client: client.list_multipart_uploads(Bucket=self._bucket, Prefix=full, **markers),  # noqa: B023
            )
            # The service's clock wrote the times of the uploads, so it is asked for the present too.
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            stale += [
                {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                for upload in page.get("Uploads", ())
                if upload["Key"].startswith(full) and (now - upload["Initiated"]).total_seconds() >= older_than_s
            ]
            if not page.get("IsTruncated"):
                return stale
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort_stale(self, upload: Mapping[str, str]) -> None:
        try:
            self._call(
                "abort an upload of",
                upload["Key"],
                lambda client: client.abort_multipart_upload(Bucket=self._bucket, **upload),
                expected=("NoSuchUpload", "404"),
            )
        except _ExpectedError:
            return  # it ended by itself meanwhile

    def _pages(self, prefix: str, arguments: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._call(
                "list",
                prefix,
                lambda client: client.list_objects_v2(
                    Bucket=self._bucket,
                    Prefix=self._prefix + prefix,
                    **arguments,
                    **token,  # noqa: B023  (called before the next turn)
                ),
            )
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _check_range(self, key: str, answer: Mapping[str, Any], offset: int, size_bytes: int) -> None:
        found_bytes = int(answer["ContentLength"])
        if "ContentRange" not in answer and (offset or found_bytes != size_bytes):
            self._capabilities = self._capabilities._replace(ranged_reads=False)
            raise ConfigurationError(
                f"{self._where} answers a read of a part with the whole object", hint="use another S3 service"
            )
        if found_bytes != size_bytes:
            raise VersionError(
                f"{key} in {self._where} has {found_bytes} bytes from {offset} instead of {size_bytes}",
                hint="run `cairn verify` on the version",
            )

    async def _client(self) -> Any:
        await self._s3.set_session()
        return await self._s3.get_s3(self._bucket)

    def _call(
        self,
        action: str,
        key: str,
        request: Callable[[Any], Awaitable[_Answer]],
        *,
        expected: tuple[str, ...] = (),
        extra_s: float = 0.0,
    ) -> _Answer:
        """The answer to one small request; error codes in *expected* raise :class:`_ExpectedError`."""
        deadline_s = self._call_deadline_s + extra_s
        until_s = time.monotonic() + deadline_s

        async def call() -> _Answer:
            try:
                async with asyncio.timeout(deadline_s):
                    client = await self._client()
                    return await self._persistently(lambda: request(client), action, key, until_s, expected)
            except (_ExpectedError, asyncio.CancelledError):
                raise
            except Exception as error:
                raise translate(error, action, key, self._where) from error

        return self._wait(call(), lambda: None)

    def _persist(self, request: Callable[[], Awaitable[_Answer]], key: str, until_s: float) -> Awaitable[_Answer]:
        return self._persistently(request, "upload", key, until_s, ())

    async def _persistently(
        self,
        request: Callable[[], Awaitable[_Answer]],
        action: str,
        key: str,
        until_s: float,
        expected: tuple[str, ...],
    ) -> _Answer:
        """Send *request*, again after a growing pause as long as the service is unavailable and time is left."""
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await request()
            except Exception as error:
                if service_code(error) in expected:
                    raise _ExpectedError(service_code(error)) from error
                failure = translate(error, action, key, self._where)
                last = attempt == _ATTEMPTS or time.monotonic() + pause_s > until_s
                if last or not isinstance(failure, UnavailableError):
                    raise failure from error
            await asyncio.sleep(pause_s)
            pause_s *= 3
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, work: Coroutine[Any, Any, _Answer], look: Callable[[], None]) -> _Answer:
        """Run *work* on s3fs's event loop and wait, calling *look* meanwhile in the calling thread.

        When *look* raises, or the thread is interrupted, the work is cancelled and has cleaned up before this raises.
        """
        ended = threading.Event()

        async def tracked() -> _Answer:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(tracked(), self._s3.loop)
        try:
            while not ended.wait(_POLL_S):
                look()
        except BaseException:
            future.cancel()
            ended.wait(_CLEAN_UP_S)
            raise
        return future.result()


class _ExpectedError(Exception):
    """An answer that the caller of :meth:`S3Store._call` knows what to do with."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def _payload(data: bytes) -> dict[str, Any]:
    return {"Body": io.BytesIO(data), "ChecksumCRC64NVME": checksum_text(crc64nvme(data))}
