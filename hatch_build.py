"""Compiles the client's copy library for wheels and editable installs; run as a script, only that.

It is optional: without a compiler (``CC``, else ``cc``), or where compiling fails, the wheel is pure, a notice says so,
and the client copies with torch. ``CC=false`` asks for a pure wheel.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "client/cairn/capture/libcairncopy.so"
SOURCES = ("client/cairn/capture/native.c", "client/cairn/capture/digesting.c")
_FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC", "-pthread")


class CopyLibraryHook(BuildHookInterface):  # type: ignore[type-arg]  # it takes any builder's configuration
    """Puts the library into the wheel, and its platform into the wheel's name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Called by hatchling before it collects files."""
        problem = compile_library(Path(self.root))
        if problem is not None:
            self.app.display_warning(_notice(problem))
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"  # no symbol of CPython is used: one wheel for all its versions


def compile_library(root: Path) -> str | None:
    """Compile it below *root*, the repository or an unpacked sdist; what went wrong, or None.

    A library that is there already may be in use, so it is replaced in one step; one of an older source is not left.
    """
    library = root / LIBRARY
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    problem = _compile([root / source for source in SOURCES], unfinished)
    if problem is None:
        unfinished.replace(library)
    else:
        unfinished.unlink(missing_ok=True)
        library.unlink(missing_ok=True)
    return problem


def _compile(sources: list[Path], library: Path) -> str | None:
    if not sys.platform.startswith("linux"):
        return f"the client runs on Linux, and this is {sys.platform}"
    command = [*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS, "-o", str(library), *map(str, sources)]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    if outcome.returncode == 0 and library.exists():
        return None
    return f"{shlex.join(command)} failed: {outcome.stderr.strip()}"


def _notice(problem: str) -> str:
    return f"The copy library was not built, so saves stall training longer: {problem}"


if __name__ == "__main__":
    if (failure := compile_library(Path(__file__).parent)) is not None:
        print(_notice(failure), file=sys.stderr)
