"""The README's program, as it stands there: it saves, and started again it goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.daemon_process import DaemonProcess

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_program_goes_on_where_it_ended(tmp_path: Path) -> None:
    program = re.search(r"```python\n(# train\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert program is not None
    path = tmp_path / "train.py"
    path.write_text(program.group(1))
    said = []
    with DaemonProcess(tmp_path / "node") as daemon:
        for _ in range(2):
            environment = {**os.environ, "CAIRN_RUNTIME_DIR": str(daemon.runtime_dir)}
            ended = subprocess.run(
                [sys.executable, path], capture_output=True, text=True, env=environment, timeout=100, check=False
            )
            assert ended.returncode == 0, ended.stderr
            said += re.findall(r"^step (\d+), loss", ended.stdout, re.MULTILINE)
    assert said == ["1", "2", "3", "4", "5", "6"]
