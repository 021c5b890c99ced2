"""One upload to S3: the parts, their checksums, and the promise that no part stays behind.

Parts are 16 MiB, the unit of a partition's digest, so the checksum that goes with a part is the one taken when the
partition was captured: the service compares what arrived with that. Bodies are read while they are sent; memory does
not grow with the size of a part.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
from collections.abc import Awaitable, Callable
from typing import Any, Self

from awscrt.checksums import combine_crc64nvme, crc64nvme

from cairn_api.errors import VersionError
from cairnd.digests import BLOCK_BYTES
from cairnd.tiers.errors import from_os_error
from cairnd.tiers.object_store import BinarySource
from cairnd.tiers.stores.remote_errors import service_code

_IN_FLIGHT = 4
_MAX_PARTS = 10_000
_CHUNK_BYTES = 256 * 1024
_ABORT_S = 5.0

Retrying = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]
"""Sends a request, again if need be."""


class Multipart:
    """The upload of one *source*, which stays open while the ``with`` block lasts."""

    def __init__(self, source: BinarySource) -> None:
        self.sent_bytes = 0
        """Bytes of complete parts, for progress; read from any thread."""
        self._source = source
        blocks = -(-source.size_bytes // BLOCK_BYTES)
        self._part_bytes = BLOCK_BYTES * max(1, -(-blocks // _MAX_PARTS))
        self._fd = -1

    def __enter__(self) -> Self:
        source = self._source
        if isinstance(source.file, int):
            self._fd = source.file
        else:
            try:
                self._fd = os.open(source.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise from_os_error(error, "read", source.file) from error
        size_bytes = os.fstat(self._fd).st_size
        if size_bytes != source.size_bytes:
            self.__exit__()
            raise VersionError(f"a file to upload has {size_bytes} bytes instead of {source.size_bytes}")
        return self

    def __exit__(self, *_: object) -> None:
        if not isinstance(self._source.file, int):
            os.close(self._fd)

    def put(self, client: Any, target: dict[str, str]) -> Callable[[], Awaitable[None]]:
        """The request that sends the whole source at once, for small ones."""

        async def request() -> None:
            size_bytes = self._source.size_bytes
            checksum = await self._checksum(0, size_bytes)
            await self._send_body(client.put_object, target, 0, size_bytes, checksum)
            self.sent_bytes = size_bytes

        return request

    async def send(self, client: Any, target: dict[str, str], retrying: Retrying) -> None:
        """Send the source in parts, and complete the upload; whatever goes wrong, including cancellation, abort it."""
        creating = asyncio.ensure_future(
            retrying(lambda: client.create_multipart_upload(**target, ChecksumAlgorithm="CRC64NVME"))
        )
        try:
            upload = {**target, "UploadId": (await asyncio.shield(creating))["UploadId"]}
        except asyncio.CancelledError as error:
            await _abort_created(client, target, creating, error)
            raise
        try:
            parts, checksum = await self._send_parts(client, upload, retrying)
            await retrying(
                lambda: client.complete_multipart_upload(
                    **upload,
                    MultipartUpload={"Parts": parts},
                    ChecksumCRC64NVME=checksum_text(checksum),
                    ChecksumType="FULL_OBJECT",
                )
            )
        except BaseException as error:
            await _abort(client, upload, error)
            raise

    async def _send_parts(
        self, client: Any, upload: dict[str, str], retrying: Retrying
    ) -> tuple[list[dict[str, Any]], int]:
        """Send all parts, a few at a time; returns their list and the checksum of the whole."""
        room = asyncio.Semaphore(_IN_FLIGHT)

        async def send(offset: int) -> tuple[dict[str, Any], int, int]:
            async with room:
                size_bytes = min(self._part_bytes, self._source.size_bytes - offset)
                checksum = await self._checksum(offset, size_bytes)
                number = offset // self._part_bytes + 1
                answer = await retrying(
                    lambda: self._send_body(
                        client.upload_part, {**upload, "PartNumber": number}, offset, size_bytes, checksum
                    )
                )
            self.sent_bytes += size_bytes
            part = {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC64NVME": checksum_text(checksum)}
            return part, checksum, size_bytes

        # A group, not gather: when one part fails the others have ended before the upload is aborted.
        failure: BaseException | None = None
        tasks: list[asyncio.Task[tuple[dict[str, Any], int, int]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(send(offset)) for offset in range(0, self._source.size_bytes, self._part_bytes)
                ]
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        whole = 0
        for _, checksum, size_bytes in (task.result() for task in tasks):
            whole = combine_crc64nvme(whole, checksum, size_bytes)
        return [task.result()[0] for task in tasks], whole

    async def _checksum(self, offset: int, size_bytes: int) -> int:
        if self._source.digest is None:
            return await asyncio.to_thread(self._read_checksum, offset, size_bytes)
        first = offset // BLOCK_BYTES
        checksum = 0
        for at, block in enumerate(self._source.digest.blocks[first : first + self._part_bytes // BLOCK_BYTES]):
            checksum = combine_crc64nvme(checksum, block, min(BLOCK_BYTES, size_bytes - at * BLOCK_BYTES))
        return checksum

    def _read_checksum(self, offset: int, size_bytes: int) -> int:
        body = _Part(self._fd, offset, size_bytes)
        checksum = 0
        while chunk := body.read(_CHUNK_BYTES):
            checksum = crc64nvme(chunk, checksum)
        return checksum

    async def _send_body(
        self, call: Callable[..., Awaitable[Any]], target: dict[str, Any], offset: int, size_bytes: int, checksum: int
    ) -> Any:
        body = _Part(self._fd, offset, size_bytes)
        try:
            return await call(**target, Body=body, ChecksumCRC64NVME=checksum_text(checksum))
        except Exception as error:
            # The HTTP client hides what its reading of the body raised.
            if body.failure is not None:
                raise body.failure from error
            raise


class _Part(io.RawIOBase):
    """Bytes of a file as a stream of its own, read with pread: parts share one descriptor."""

    def __init__(self, fd: int, start: int, size_bytes: int) -> None:
        self.failure: VersionError | None = None
        self._descriptor = fd
        self._start = start
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most 256 KiB at a time, however much is asked for: the HTTP client asks for all and sends what it gets."""
        left = max(0, self._size_bytes - self._position)
        wanted = min(left, _CHUNK_BYTES, size if size >= 0 else left)
        if not wanted:
            return b""
        chunk = os.pread(self._descriptor, wanted, self._start + self._position)
        if not chunk:
            self.failure = VersionError(f"a file that is being uploaded ended early, at {self._start + self._position}")
            raise self.failure
        self._position += len(chunk)
        return chunk


async def _abort_created(
    client: Any, target: dict[str, str], creating: asyncio.Future[Any], error: BaseException
) -> None:
    """Abort an upload whose creation is still under way: only the answer says what to abort."""
    try:
        async with asyncio.timeout(_ABORT_S):
            created = await creating
    except Exception as failure:  # noqa: BLE001  (the first error must reach the caller)
        error.add_note(f"whether this upload was begun is not known: {type(failure).__name__}")
    else:
        await _abort(client, {**target, "UploadId": created["UploadId"]}, error)


async def _abort(client: Any, upload: dict[str, str], error: BaseException) -> None:
    """Drop the parts of a failed upload. A failure to do so is noted on *error*: the sweep of stale uploads is next."""
    try:
        async with asyncio.timeout(_ABORT_S):
            await client.abort_multipart_upload(**upload)
    except Exception as failure:  # noqa: BLE001  (the first error must reach the caller)
        if service_code(failure) not in ("NoSuchUpload", "404"):
            error.add_note(f"the parts of this upload could not be dropped yet: {type(failure).__name__}")


def checksum_text(crc: int) -> str:
    """A CRC-64 as S3 writes it: big-endian, base64."""
    return base64.b64encode(crc.to_bytes(8, "big")).decode()
