"""What users get wrong first: each ends in a clear error with the next step, where the user looks; nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cairn
from cairn_api.errors import ErrorKind
from tests.daemon_process import DaemonProcess


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("bad-input")) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[cairn.Client]:
    client = cairn.connect(job="run-7", runtime_dir=str(daemon.runtime_dir))
    with client.create("step1") as checkpoint:
        checkpoint.save("model.pt", {"weight": torch.ones(100)})
    client.wait("step1", durability="tier1", timeout=30)
    yield client
    client.close()


def cli(daemon: DaemonProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CAIRN_RUNTIME_DIR": str(daemon.runtime_dir)}
    command = [sys.executable, "-m", "cairnd.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_an_unknown_tag_is_reported_missing_and_never_replaced(client: cairn.Client, daemon: DaemonProcess) -> None:
    with pytest.raises(cairn.VersionError, match="step2") as caught:
        client.load("step2", "model.pt")
    assert "step1" in str(caught.value) or "cairn list" in str(caught.value)
    shown = cli(daemon, "show", "step2", "--job", "run-7")
    assert shown.returncode == 13
    assert "step1" in shown.stderr and "Next step" in shown.stderr


def test_an_unknown_partition_names_those_that_exist(client: cairn.Client) -> None:
    with pytest.raises(cairn.VersionError, match=r"modle\.pt") as caught:
        client.load("step1", "modle.pt")
    assert "model.pt" in str(caught.value) or "cairn show" in str(caught.value)


@pytest.mark.parametrize("tag", ["../x", "", "a/b", ".hidden", "x" * 129, "step\n1", "..", "-x"])
def test_a_tag_that_could_become_a_path_is_refused(client: cairn.Client, daemon: DaemonProcess, tag: str) -> None:
    with pytest.raises(cairn.ConfigurationError, match="tag"):
        client.create(tag)
    assert str(client.latest()).endswith("-step1")
    assert not (daemon.tier1_path.parent / "x").exists()


@pytest.mark.parametrize("name", ["../model.pt", "/etc/passwd", "a/../b", "", ".cairn/manifest.json", "by-rank/0/x"])
def test_a_partition_name_that_leaves_its_version_is_refused(client: cairn.Client, name: str) -> None:
    with pytest.raises(cairn.CairnError), client.create("bad-name") as checkpoint:
        checkpoint.save(name, {"weight": torch.ones(1)})
    assert str(client.latest()).endswith("-step1")


def test_without_a_daemon_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(cairn.UnavailableError) as caught:
        cairn.connect(job="run-7", runtime_dir=str(tmp_path), connect_timeout_s=0.2)
    assert "cairnd" in caught.value.hint
    assert caught.value.kind is ErrorKind.RETRY
    command = [sys.executable, "-m", "cairnd.cli.main", "list", "--runtime-dir", str(tmp_path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert listed.returncode == 10
    assert "cairnd" in listed.stderr and "Next step" in listed.stderr


def test_a_daemon_of_another_protocol_version_names_both(tmp_path: Path) -> None:
    (tmp_path / "t1").mkdir()
    newer = (
        "import sys, cairn_api.wire; cairn_api.wire.PROTOCOL_VERSION = 2\n"
        "from cairnd.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", newer, "--runtime-dir", str(tmp_path), "--tier1-path", str(tmp_path / "t1")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "side.sock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(cairn.ConfigurationError, match=r"protocol 2.*1") as caught:
            cairn.connect(job="run-7", runtime_dir=str(tmp_path))
        assert "same version" in caught.value.hint
    finally:
        process.kill()
        process.wait()


def test_a_location_that_the_operator_does_not_allow_is_refused_at_connect(daemon: DaemonProcess) -> None:
    with pytest.raises(cairn.ConfigurationError, match="not allow") as caught:
        cairn.connect(job="run-8", runtime_dir=str(daemon.runtime_dir), persistent_storage_path="s3://elsewhere/x")
    assert "allowed_storage_locations" in caught.value.hint
    climbing = f"file://{daemon.bucket_path}/../elsewhere"
    with pytest.raises(cairn.ConfigurationError, match="not allow"):
        cairn.connect(job="run-8", runtime_dir=str(daemon.runtime_dir), persistent_storage_path=climbing)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("buffers", 0), ("transport", "carrier-pigeon"), ("commit_durability", "tier3"), ("job", "../x"), ("bufers", 2)],
)
def test_a_wrong_setting_is_named(daemon: DaemonProcess, setting: str, value: object) -> None:
    with pytest.raises(cairn.ConfigurationError, match=setting) as caught:
        cairn.connect(**{"job": "run-7", "runtime_dir": str(daemon.runtime_dir), setting: value})  # type: ignore[arg-type]
    assert caught.value.hint


def test_what_cannot_be_pickled_fails_the_save_and_nothing_else(client: cairn.Client) -> None:
    with pytest.raises(cairn.CairnError, match=r"(?i)pickl"), client.create("unpicklable") as checkpoint:
        checkpoint.save("model.pt", {"fine": torch.ones(1), "callback": lambda: None})
    with client.create("after") as checkpoint:
        checkpoint.save("model.pt", {"weight": torch.zeros(3)})
    assert torch.equal(client.load("after", "model.pt")["weight"], torch.zeros(3))


def test_machine_readable_errors_stay_machine_readable(daemon: DaemonProcess) -> None:
    shown = cli(daemon, "show", "nothing", "--job", "no-such-job", "--json")
    assert shown.returncode == 13
    assert json.loads(shown.stderr)["error"]["kind"] == "choose_another_version"


def test_the_daemon_refuses_a_configuration_that_cannot_work(tmp_path: Path) -> None:
    config = tmp_path / "cairnd.toml"
    config.write_text("teir1_path = '/tmp/x'\n")
    command = [sys.executable, "-m", "cairnd", "--config", str(config)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "tier1_path" in refused.stderr
