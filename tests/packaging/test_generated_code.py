"""The committed gRPC code is what the committed protos compile to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROTO / "generate.py"), "--check", "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)  # the first use installs the pinned tools
def test_generated_code_is_fresh() -> None:
    outcome = check(PROTO)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("change", ["new field", "edited by hand", "proto removed"])
def test_stale_code_is_found(tmp_path: Path, change: str) -> None:
    shutil.copytree(PROTO / "cairn_api", tmp_path / "cairn_api")
    folder = tmp_path / "cairn_api" / "v1"
    (folder / "extra.proto").write_text('syntax = "proto3";\npackage cairn.v1;\nmessage Extra { string name = 1; }\n')
    regenerate = [sys.executable, str(PROTO / "generate.py"), "--root", str(tmp_path)]
    subprocess.run(regenerate, check=True)
    assert check(tmp_path).returncode == 0
    match change:
        case "new field":
            proto = folder / "extra.proto"
            proto.write_text(proto.read_text().replace("}", "bytes more = 2; }"))
        case "edited by hand":
            with (folder / "extra_pb2.py").open("a") as code:
                code.write("EDITED = True\n")
        case "proto removed":
            (folder / "extra.proto").unlink()
    outcome = check(tmp_path)
    assert outcome.returncode == 1
    assert "extra_pb2.py" in outcome.stdout
    assert "make proto" in outcome.stdout
