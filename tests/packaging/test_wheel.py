"""What pip would install: the wheel is built once and put into an empty folder."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"cairn": "client", "cairnd": "daemon", "cairn_api": "proto"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "dist"))
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def run(*arguments: str) -> None:
    outcome = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def sources(root: Path) -> set[str]:
    """What belongs into the wheel of one source root, relative to it."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.suffix in {".py", ".pyi", ".proto", ".typed"} and "__pycache__" not in path.parts
    }


def test_every_source_file_is_in_the_wheel_and_nothing_else(installed: Path) -> None:
    expected = {"cairn_autoload.py"}
    for package, root in PACKAGES.items():
        expected |= {f"{package}/{name}" for name in sources(REPOSITORY / root / package)}
    present = {name for name in sources(installed) if ".dist-info" not in name}
    assert present == expected


@pytest.mark.parametrize("package", PACKAGES)
def test_type_information_is_shipped(installed: Path, package: str) -> None:
    assert (installed / package / "py.typed").is_file()


def test_protos_are_shipped(installed: Path) -> None:
    assert (installed / "cairn_api" / "v1" / "save.proto").is_file()


def test_nothing_but_the_packages_is_at_the_top(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if path.suffix != ".dist-info" and path.name != "__pycache__"}
    assert top == {*PACKAGES, "cairn_autoload.py", "bin"}
    assert not [path for path in installed.rglob("*") if path.name.startswith(("test_", "conftest"))]


def test_commands_and_the_torch_hook_are_declared(installed: Path) -> None:
    (metadata,) = installed.glob("cairn_checkpoint-*.dist-info")
    entry_points = ConfigParser()
    entry_points.read(metadata / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"cairn": "cairnd.cli.main:main", "cairnd": "cairnd.__main__:main"}
    assert dict(entry_points["torch.backends"]) == {"cairn": "cairn_autoload:register"}


def test_a_training_image_needs_two_packages(installed: Path) -> None:
    (metadata,) = installed.glob("cairn_checkpoint-*.dist-info")
    headers = HeaderParser().parsestr((metadata / "METADATA").read_text())
    base = [line for line in headers.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert base == ["grpcio>=1.62", "protobuf>=4.25"]
    assert headers["License-Expression"] == "Apache-2.0"
    assert (metadata / "licenses" / "LICENSE").is_file()


@pytest.mark.parametrize("target", ["cairn_autoload:register", "cairnd.cli.main:main", "cairnd.__main__:main"])
def test_entry_points_lead_somewhere(installed: Path, target: str) -> None:
    module, _, name = target.partition(":")
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import {module} as module; "
        f"assert module.__file__.startswith({str(installed)!r}); assert callable(module.{name})"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
