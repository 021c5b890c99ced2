"""What pip would install: the wheel is built once and put into an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"cairn": "client", "cairnd": "daemon", "cairn_api": "proto"}


COPY_LIBRARY = "cairn/capture/libcairncopy.so"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist's content. Wheels are built from it, as pip does: a build leaves a library beside its source."""
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """The wheel that this machine builds."""
    return built(unpacked)[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A folder with nothing in it but the installed wheel."""
    target = tmp_path_factory.mktemp("wheel") / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def run(*arguments: str, at: Path = REPOSITORY, compiler: str = "cc") -> str:
    """Run Python with these arguments; what it printed."""
    command, environment = [sys.executable, *arguments], os.environ | {"CC": compiler}
    outcome = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


def built(source: Path, compiler: str = "cc") -> tuple[Path, str]:
    """A new wheel of *source*, and what building it said."""
    folder = source / f"dist-{len(list(source.glob('dist-*')))}"
    said = run(
        "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder), at=source, compiler=compiler
    )
    (made,) = folder.glob("*.whl")
    return made, said


@needs_compiler
def test_the_wheel_carries_the_copy_library_for_this_platform_and_any_python(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.stem.endswith(f"-py3-none-{platform}")
    with zipfile.ZipFile(wheel) as archive:
        assert COPY_LIBRARY in archive.namelist()
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert HeaderParser().parsestr(archive.read(metadata).decode())["Root-Is-Purelib"] == "false"


@needs_compiler
def test_the_installed_library_loads_and_needs_neither_python_nor_torch(installed: Path) -> None:
    body = f"import sys; sys.path.insert(0, {str(installed)!r}); from cairn.capture import native; "
    body += "assert native.available(); print(native.LIBRARY)"
    assert run("-c", body).strip().endswith(str(installed / COPY_LIBRARY))
    needed = subprocess.run(["ldd", str(installed / COPY_LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not [name for name in ("libpython", "libtorch", "libstdc++") if name in needed]


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "cc -no-such-option"])
def test_without_a_working_compiler_the_wheel_is_pure_and_a_notice_says_so(unpacked: Path, compiler: str) -> None:
    stale = unpacked / "client" / COPY_LIBRARY
    stale.touch()
    made, said = built(unpacked, compiler)
    assert made.stem.endswith("-py3-none-any")
    assert "copy library was not built" in said
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".c"))]
    assert not stale.exists(), "nothing of an older source may be loaded"


@needs_compiler
def test_an_editable_install_compiles_beside_the_source(unpacked: Path) -> None:
    library = unpacked / "client" / COPY_LIBRARY
    library.unlink(missing_ok=True)
    body = "import hatchling.build; print(hatchling.build.build_editable('.'))"
    run("-c", body, at=unpacked)
    assert library.is_file()


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
    assert not list(installed.rglob("*.c"))


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
