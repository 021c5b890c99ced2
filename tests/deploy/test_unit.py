"""The systemd unit parses, and its sandbox stays as tight as it was reviewed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from cairnd.settings import Settings

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "cairnd.service"
EXECUTABLE = "/usr/local/bin/cairnd"
EXPOSURE_LIMIT = 20
"""Of 100; systemd-analyze prints it divided by ten. An unhardened unit has 96."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: the unit file is NOT checked"
)


def directives(text: str) -> dict[str, list[str]]:
    """The values of each directive of [Service], in order."""
    values: dict[str, list[str]] = defaultdict(list)
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            values[name].append(value)
    return values


def analyze(folder: Path, verb: list[str], text: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze on the unit; its command is replaced by one that exists here."""
    stand_in = folder / "cairnd"
    stand_in.write_text("#!/bin/sh\n")
    stand_in.chmod(0o755)
    assert EXECUTABLE in text
    unit = folder / UNIT.name
    unit.write_text(text.replace(EXECUTABLE, str(stand_in)))
    environment = os.environ | {"SYSTEMD_COLORS": "0", "LC_ALL": "C"}
    command = ["systemd-analyze", "--no-pager", *verb, str(unit)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@needs_systemd
def test_the_unit_is_valid(tmp_path: Path) -> None:
    outcome = analyze(tmp_path, ["verify", "--man=no"], UNIT.read_text())
    assert outcome.returncode == 0
    assert not outcome.stderr, "a directive that systemd does not know is only a warning to it"


@needs_systemd
@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("ProtectSytem=strict", "Unknown key"),
        ("WatchdogSec=soon", "Failed to parse"),
        ("Type=notifi", "Failed to parse"),
    ],
)
def test_a_mistake_in_the_unit_is_found(tmp_path: Path, planted: str, complaint: str) -> None:
    text = UNIT.read_text().replace("[Service]\n", f"[Service]\n{planted}\n")
    outcome = analyze(tmp_path, ["verify", "--man=no"], text)
    assert complaint in outcome.stderr


def exposed(folder: Path, text: str) -> bool:
    """Whether systemd-analyze finds the unit more exposed than the limit."""
    outcome = analyze(folder, ["security", "--offline=true", f"--threshold={EXPOSURE_LIMIT}"], text)
    assert "Overall exposure level" in outcome.stdout, outcome.stderr
    return outcome.returncode != 0


@needs_systemd
def test_the_sandbox_is_tight(tmp_path: Path) -> None:
    assert not exposed(tmp_path, UNIT.read_text())


@needs_systemd
def test_a_loosened_sandbox_is_found(tmp_path: Path) -> None:
    loosened = UNIT.read_text().replace("ProtectSystem=strict\n", "").replace("NoNewPrivileges=yes\n", "")
    assert exposed(tmp_path, loosened.replace("SystemCallFilter=@system-service\n", ""))


def test_the_kernel_shows_the_daemon_who_connects() -> None:
    service = directives(UNIT.read_text())
    assert "PrivateUsers" not in service, "SO_PEERCRED would give uid 65534 for every trainer"
    assert service["RuntimeDirectoryMode"] == ["0755"], "trainers of other users must reach the sockets"
    assert "AF_UNIX" in service["RestrictAddressFamilies"][0].split()


def test_the_unit_and_the_defaults_agree() -> None:
    service, settings = directives(UNIT.read_text()), Settings()
    assert f"/run/{service['RuntimeDirectory'][0]}" == settings.runtime_dir
    assert f"/var/lib/{service['StateDirectory'][0]}" == settings.tier1_path
    assert int(service["TimeoutStopSec"][0]) > settings.drain_timeout_s, "systemd would kill a daemon that still drains"
    assert service["Type"] == ["notify"]
    assert service["KillMode"] == ["mixed"]


def test_the_unit_keeps_two_capabilities_at_most() -> None:
    service = directives(UNIT.read_text())
    for name in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert set(" ".join(service[name]).split()) <= {"CAP_CHOWN", "CAP_LINUX_IMMUTABLE"}
