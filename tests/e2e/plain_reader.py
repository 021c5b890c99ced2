"""Reads checkpoint folders as somebody would who does not have Cairn: it cannot even be imported here."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.abc import MetaPathFinder
from pathlib import Path


class Absent(MetaPathFinder):
    """Makes every import of Cairn fail."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("cairn", "cairn_api", "cairn_autoload", "cairnd"):
            raise ModuleNotFoundError(f"No module named {name!r} (not installed here)")


def main() -> None:
    import torch  # noqa: PLC0415 - after Cairn was made absent

    for folder in sys.argv[1:]:
        files = sorted(Path(folder).glob("*.pt"))
        assert files, f"{folder} holds no checkpoint file"
        for file in files:
            torch.load(file, map_location="cpu", weights_only=False, mmap=True)
            damaged = zipfile.ZipFile(file).testzip()
            assert damaged is None, f"{damaged} of {file} does not match its CRC"
        subprocess.run([sys.executable, "-m", "zipfile", "-t", str(files[0])], check=True)
        print(len(files), folder)


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    main()
