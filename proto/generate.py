"""Make the Python code beside the protos, or check that it is fresh.

    python proto/generate.py            write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py
    python proto/generate.py --check    exit 1 and print the differences if anything would change

Generated code refuses runtimes older than its generator, and training images pin old protobuf versions; so the code is
made by the oldest tools that still matter. Those need protobuf < 5, which contradicts what the rest of the project is
tested with: they live in a virtual environment of their own under ``.cache/``. Standard library only.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = (
    "grpcio-tools==1.62.3",
    "grpcio==1.62.3",
    "protobuf==4.25.9",
    "setuptools==75.8.0",  # grpc_tools 1.62 imports pkg_resources, which later setuptools no longer have
)
NEWEST_PYTHON = (3, 12)  # the last that grpcio-tools 1.62 has wheels for
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")

PROTO_ROOT = Path(__file__).resolve().parent
CACHE = PROTO_ROOT.parent / ".cache"


def compiler(cache: Path) -> Path:
    """The Python that has the pinned tools; installed on first use and again whenever REQUIREMENTS change."""
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        raise SystemExit(f"{REQUIREMENTS[0]} has no wheels for this Python: use 3.11 to {newest}")
    home = cache / "protoc-venv"
    python = home / "bin" / "python"
    installed = home / "installed.txt"
    wanted = "\n".join((sys.version, *REQUIREMENTS))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "protoc-venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # make and the tests may both be first
        if not installed.is_file() or installed.read_text() != wanted:
            venv.create(home, clear=True, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
            installed.write_text(wanted)
    return python


def generate(proto_root: Path, out: Path, *, cache: Path = CACHE) -> None:
    """Compile every proto below ``proto_root`` into ``out``.

    The path of a proto is the path of its Python package, so the generated imports are right as they come.
    """
    protos = sorted(str(path.relative_to(proto_root)) for path in proto_root.rglob("*.proto"))
    if not protos:
        raise SystemExit(f"no .proto files below {proto_root}")
    flags = [f"--{kind}_out={out.resolve()}" for kind in ("python", "pyi", "grpc_python")]
    command = [str(compiler(cache).absolute()), "-m", "grpc_tools.protoc", "-I.", *flags, *protos]
    subprocess.run(command, cwd=proto_root, check=True)


def differences(proto_root: Path, fresh: Path) -> list[str]:
    """Lines of a unified diff from what lies beside the protos to what they compile to; empty when fresh."""
    lines: list[str] = []
    for name in sorted(generated_files(proto_root) | generated_files(fresh)):
        old, new = ((root / name).read_text() if (root / name).is_file() else "" for root in (proto_root, fresh))
        lines += difflib.unified_diff(old.splitlines(), new.splitlines(), f"a/{name}", f"b/{name}", n=1, lineterm="")
    return lines


def generated_files(root: Path) -> set[Path]:
    """Paths, relative to ``root``, of everything there that looks generated."""
    return {path.relative_to(root) for pattern in GENERATED for path in root.rglob(pattern)}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--root", type=Path, default=PROTO_ROOT, help="folder of the protos (default: this one)")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    with tempfile.TemporaryDirectory(prefix="cairn-proto-") as folder:
        fresh = Path(folder)
        generate(root, fresh)
        changes = differences(root, fresh)
        if options.check:
            if changes:
                print("\n".join(changes[:200]))
                print("The generated code is stale. Next step: make proto")
            return 1 if changes else 0
        for stale in generated_files(root) - generated_files(fresh):
            (root / stale).unlink()
        for name in generated_files(fresh):
            shutil.copyfile(fresh / name, root / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
