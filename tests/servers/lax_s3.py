"""An S3 server that gets wrong what doctors look for: it ignores put-if-absent, its clock is off, or it never answers.

In this process, on loopback only, without authentication. Just enough of S3 for small objects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape


@dataclass
class LaxS3:
    """What the server holds, by path, with the time at which it says each was written (seconds since 1970)."""

    conditional: bool = False
    clock_ahead_s: float = 0.0
    silent: bool = False
    uploads: dict[str, float] = field(default_factory=dict)
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    endpoint_url: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)

    def now_s(self) -> float:
        return time.time() + self.clock_ahead_s


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, state: LaxS3) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state


@contextmanager
def lax_s3(*, conditional: bool = False) -> Iterator[LaxS3]:
    """A running server; every bucket exists. Its behaviour may be changed while it runs."""
    state = LaxS3(conditional)
    server = _Server(state)
    state.endpoint_url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> LaxS3:
        assert isinstance(self.server, _Server)
        return self.server.state

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        data = self._body()
        if self.state.conditional and self.headers.get("If-None-Match") and path in self.state.objects:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        self.state.objects[path] = data, self.state.now_s()
        self._answer(200)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        if "uploads" in query:
            self._answer(200, self._uploads())
        elif "list-type" in query:
            self._answer(200, self._listing(parts.path, query.get("prefix", [""])[0]))
        else:
            self._object(parts.path, body=True)

    def do_HEAD(self) -> None:
        self._object(urlsplit(self.path).path, body=False)

    def do_DELETE(self) -> None:
        self.state.objects.pop(urlsplit(self.path).path, None)
        self._answer(204)

    def _object(self, path: str, *, body: bool) -> None:
        if path not in self.state.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>" if body else b"")
            return
        data, written_s = self.state.objects[path]
        self._answer(200, data, {"Last-Modified": formatdate(written_s, usegmt=True)}, body=body)

    def _listing(self, bucket: str, prefix: str) -> bytes:
        start = f"{bucket.rstrip('/')}/"
        entries = "".join(
            f"<Contents><Key>{escape(path.removeprefix(start))}</Key><Size>{len(data)}</Size>"
            f"<LastModified>{_stamp(written_s)}</LastModified></Contents>"
            for path, (data, written_s) in sorted(self.state.objects.items())
            if path.startswith(start + prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def _uploads(self) -> bytes:
        entries = "".join(
            f"<Upload><Key>{escape(key)}</Key><UploadId>1</UploadId><Initiated>{_stamp(begun_s)}</Initiated></Upload>"
            for key, begun_s in self.state.uploads.items()
        )
        return f"<ListMultipartUploadsResult>{entries}</ListMultipartUploadsResult>".encode()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, *, body: bool = True
    ) -> None:
        if self.state.silent:
            self.state.stopped.wait()
        self.send_response_only(status)
        self.send_header("Date", formatdate(self.state.now_s(), usegmt=True))
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _stamp(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time_s))
