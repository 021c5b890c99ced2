"""``--store s3://...`` against a real server, in processes of their own: nothing may linger or complain at exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from cairnd.tiers.stores import open_store
from tests.daemon.cli import schemas
from tests.daemon.cli.seeding import fill_bucket, three_versions
from tests.servers.seaweed import ACCESS_KEY, SECRET_KEY, SeaweedServer, seaweed_server

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with seaweed_server() as running:
        store = open_store(f"s3://{running.bucket}/checkpoints", running.options)
        fill_bucket(store, tmp_path_factory.mktemp("staging"), three_versions())
        yield running


def cairn(server: SeaweedServer, *arguments: str | Path, secret: str = SECRET_KEY) -> subprocess.CompletedProcess[str]:
    options = [f"endpoint_url={server.endpoint_url}", "region=us-east-1", "addressing_style=path"]
    command = [sys.executable, "-m", "cairnd.cli.main", *map(str, arguments), "--json"]
    command += ["--store", f"s3://{server.bucket}/checkpoints"]
    for option in options:
        command += ["--storage-option", option]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": secret}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)


def test_a_bucket_is_read_without_a_daemon(server: SeaweedServer, tmp_path: Path) -> None:
    listed = cairn(server, "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    document = json.loads(listed.stdout)
    jsonschema.validate(document, schemas.LIST)
    assert len(document["versions"]) == 3
    verified = cairn(server, "verify", "--deep")
    assert (verified.returncode, verified.stderr) == (0, "")
    exported = cairn(server, "export", "global_step2", tmp_path / "out")
    assert (exported.returncode, exported.stderr) == (0, "")
    files = three_versions()[1].files
    assert {path: (tmp_path / "out" / path).read_bytes() for path in files} == files


def test_wrong_credentials_are_named_and_not_shown(server: SeaweedServer) -> None:
    outcome = cairn(server, "list", secret="wrong-secret-8c1")
    assert (outcome.returncode, outcome.stdout) == (12, "")
    jsonschema.validate(json.loads(outcome.stderr), schemas.ERROR)
    assert "wrong-secret-8c1" not in outcome.stderr


@pytest.mark.parametrize(
    ("bucket", "secret", "status", "said"),
    [("", SECRET_KEY, 0, "honours put-if-absent"), ("missing", SECRET_KEY, 12, "missing"), ("", "wrong-8c1", 12, "")],
)
def test_a_doctor_tries_a_real_bucket(
    server: SeaweedServer, tmp_path: Path, bucket: str, secret: str, status: int, said: str
) -> None:
    (tmp_path / "tier1").mkdir()
    before = sorted(server.file_system().find(server.bucket))
    flags = [
        f"--tier1-path={tmp_path}/tier1", f"--runtime-dir={tmp_path}/run", "--capture-memory-bytes=10000000",
        f"--persistent-storage-path=s3://{bucket or server.bucket}/checkpoints",
        f"--storage-options=endpoint_url={server.endpoint_url},region=us-east-1,addressing_style=path",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "cairnd.cli.main", "doctor", "--json", "--", *flags],
        capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": secret},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, "")
    document = json.loads(done.stdout)
    jsonschema.validate(document, schemas.DOCTOR)
    (found,) = [f for f in document["findings"] if f["check"] == "tier2" and (f["level"] == "problem") is (status > 0)]
    assert said in found["message"]
    assert bool(found["fix"]) is (status > 0)
    assert secret not in done.stdout
    assert sorted(server.file_system().find(server.bucket)) == before


def test_an_endpoint_that_does_not_answer_is_unavailable(server: SeaweedServer) -> None:
    command = [sys.executable, "-m", "cairnd.cli.main", "list", "--store", f"s3://{server.bucket}/checkpoints"]
    command += ["--storage-option", "endpoint_url=http://127.0.0.1:1"]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert outcome.returncode == 10, outcome.stderr
    assert "Next step: " in outcome.stderr
    assert "Traceback" not in outcome.stderr
