"""Arguments, exit statuses, errors, streams: what scripts rely on."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest

from cairn_api.errors import (
    CairnError,
    ConfigurationError,
    InternalError,
    OverloadedError,
    SaveFailedError,
    UnavailableError,
    VersionError,
)
from cairnd.cli.exits import EXIT_STATUS
from cairnd.cli.main import VERBS
from cairnd.cli.verbs import list as list_
from tests.daemon.cli import schemas
from tests.daemon.cli.running import Cairn, assert_fits
from tests.daemon.cli.seeding import Seed, seed_tier1

VERB_NAMES = [
    "list",
    "show",
    "verify",
    "pin",
    "unpin",
    "mark",
    "prune",
    "persist",
    "export",
    "status",
    "doctor",
    "drain",
    "watch",
]


def run(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: object
) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", "cairnd.cli.main", *map(str, arguments)],
        text=True,
        env={**os.environ, **(environment or {})},
        **options,  # type: ignore[call-overload]  # passed on as they are
    )
    return process


def test_all_verbs_are_there() -> None:
    assert [verb.NAME for verb in VERBS] == VERB_NAMES


@pytest.mark.parametrize("arguments", [[], ["lst"], ["show"], ["list", "--jso"], ["drain", "--timeout", "soon"]])
def test_wrong_usage_leaves_with_2(cairn: Cairn, arguments: list[str]) -> None:
    outcome = cairn(*arguments)
    assert outcome.status == 2
    assert "usage: cairn" in outcome.err


@pytest.mark.parametrize("verb", ["", *VERB_NAMES])
def test_help_fits_and_is_complete(cairn: Cairn, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = cairn(*([verb] if verb else []), "--help")
    assert outcome.status == 0
    if not verb:
        assert all(str(status) in outcome.out for status in EXIT_STATUS.values())
    else:
        assert "JSON: " in outcome.out
        assert "--json" in outcome.out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnavailableError, 10),
        (OverloadedError, 11),
        (ConfigurationError, 12),
        (VersionError, 13),
        (SaveFailedError, 14),
        (InternalError, 14),
    ],
)
def test_each_kind_of_error_has_its_status(
    cairn: Cairn, monkeypatch: pytest.MonkeyPatch, error: type[CairnError], status: int
) -> None:
    def fail(_: object) -> int:
        raise error("it\x1b[2J failed", hint="do this", context={"rank": 3})

    monkeypatch.setattr(list_, "run", fail)
    plain = cairn("list")
    assert plain.status == status
    assert plain.err == "error: it\\x1b[2J failed\nNext step: do this\n"
    outcome = cairn("list", "--json")
    assert outcome.status == status
    assert outcome.error() == {
        "class": error.__name__, "kind": error.kind, "message": "it\x1b[2J failed", "hint": "do this",
        "context": {"rank": "3"}, "exit_status": status,
    }  # fmt: skip


def test_a_defect_does_not_look_like_damage(cairn: Cairn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(list_, "run", fail)
    outcome = cairn("list")
    assert outcome.status == 14
    assert "Traceback" in outcome.err
    assert "Next step: report this" in outcome.err


def test_an_interrupted_command_says_nothing(cairn: Cairn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(list_, "run", fail)
    outcome = cairn("list")
    assert (outcome.status, outcome.out, outcome.err) == (130, "", "")


@pytest.mark.parametrize("before", [True, False])
def test_common_options_go_before_or_after_the_verb(cairn: Cairn, tier1: Path, *, before: bool) -> None:
    options = ["--store", str(tier1), "--job", "run-7", "--json"]
    arguments = [*options, "list"] if before else ["list", *options]
    assert len(cairn(*arguments).json(schemas.LIST)["versions"]) == 3
    assert cairn("--job", "other", "list", "--job", "run-7", "--store", tier1).status == 0


@pytest.mark.parametrize("verb", [["list"], ["status"], ["show", "x"], ["drain"], ["export", "x", "y"]])
def test_without_a_daemon_the_next_step_is_to_start_it(cairn: Cairn, tmp_path: Path, verb: list[str]) -> None:
    outcome = cairn(*verb, "--runtime-dir", tmp_path)
    assert outcome.status == 10
    assert "Next step: start cairnd" in outcome.err
    error = cairn(*verb, "--json", "--runtime-dir", tmp_path).error()
    assert (error["class"], error["kind"]) == ("UnavailableError", "retry")
    assert error["context"] == {"runtime_dir": str(tmp_path)}


def test_the_runtime_folder_comes_from_the_environment_or_the_flag(
    cairn: Cairn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAIRN_RUNTIME_DIR", str(tmp_path / "environment"))
    assert cairn("list", "--json").error()["context"]["runtime_dir"] == str(tmp_path / "environment")
    flagged = cairn("list", "--json", "--runtime-dir", tmp_path / "flag").error()
    assert flagged["context"]["runtime_dir"] == str(tmp_path / "flag")


def test_a_path_too_long_for_a_socket_is_named(cairn: Cairn, tmp_path: Path) -> None:
    outcome = cairn("list", "--runtime-dir", tmp_path / ("x" * 120))
    assert outcome.status == 12
    assert "shorter runtime_dir" in outcome.err


def test_a_reader_that_leaves_early_is_no_error(tier1: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = run("list", "--store", tier1, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_a_poor_locale_does_not_break_the_answer(tmp_path: Path) -> None:
    store = seed_tier1(tmp_path / "tier1", [Seed("a", files={"m.pt": b"1"}, save_dir="/data/模型")])
    environment = {"PYTHONIOENCODING": "ascii"}
    process = run("show", "a", "--store", store, environment=environment, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "/data/\\u6a21\\u578b" in out


def test_only_a_terminal_sees_progress(tier1: Path) -> None:
    main_end, terminal = pty.openpty()
    process = run(
        "verify", "--deep", "--store", tier1, stdout=subprocess.PIPE, stderr=terminal, environment={"TERM": "xterm"}
    )
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    seen = b""
    try:
        while chunk := os.read(main_end, 65536):
            seen += chunk
    except OSError:  # how a terminal says that nobody holds its other end
        os.close(main_end)
    assert process.returncode == 0
    assert b"verifying" in seen
    assert_fits(out.splitlines())
    process = run("verify", "--deep", "--store", tier1, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "no problems" in out


def test_a_file_that_cannot_grow_is_explained_and_leaves_nothing(tier1: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * 1024, 1024 * 1024))

    process = run(
        "export", "global_step2", tmp_path / "out" / "folder", "--json", "--store", tier1, preexec_fn=limit,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (12, "")
    jsonschema.validate(json.loads(err), schemas.ERROR)
    assert list((tmp_path / "out").iterdir()) == []
