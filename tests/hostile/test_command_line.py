"""``cairn`` with arguments that nobody means: an exit status for what to do next, never a traceback, never a hang."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import cairn
from cairnd.cli.exits import EXIT_STATUS
from cairnd.cli.main import VERBS, _parser, main
from tests.crash.trainer import state_of
from tests.daemon_process import DaemonProcess
from tests.hostile.seeds import SEED, choices
from tests.hostile.watched import watched
from tests.hostile.wire_inputs import HOSTILE_TEXTS
from tests.promises import Evidence, proof_size

pytestmark = pytest.mark.fault

COMMANDS = proof_size(150, 3_000)

_STATUSES = frozenset({0, 1, 2, *EXIT_STATUS.values()})
_DEFECTS = ("Traceback", "report this", "InternalError")
_NEVER = frozenset({"--follow", "--force"})
"""With the one a command rightly never ends; with the other `export` moves any folder of this machine aside."""


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


class Commands:
    """Makes command lines from the parsers, so that a new verb or option is covered without a change here."""

    def __init__(self, chance: random.Random, folder: Path, known: tuple[str, ...]) -> None:
        self._chance = chance
        self._folder = folder
        self._known = known
        self._verbs = verbs()

    def command(self) -> list[str]:
        """The arguments of one run."""
        chance = self._chance
        if chance.random() < 0.03:
            return [self._text() for _ in range(chance.randrange(4))]
        name = chance.choice(sorted(self._verbs))
        words = [name]
        for action in self._verbs[name]._actions:
            options = [option for option in action.option_strings if option not in _NEVER]
            if action.option_strings and (not options or chance.random() < 0.75):
                continue
            if isinstance(action, argparse._HelpAction):
                continue
            words += [chance.choice(options)] if options else []
            if action.nargs != 0 and (options or action.required or chance.random() < 0.9):
                words.append(self._text())
        if chance.random() < 0.1:
            chance.shuffle(words)
        return words

    def _text(self) -> str:
        chance = self._chance
        if chance.random() < 0.5:
            return chance.choice(self._known)
        if chance.random() < 0.2:
            return str(
                chance.choice((self._folder, self._folder / "new" / "x", self._folder / "file", "/proc", "/dev/null"))
            )
        return chance.choice(HOSTILE_TEXTS).replace("\0", "")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "daemon") as running:
        with cairn.connect(job="run-7", runtime_dir=str(running.runtime_dir)) as client:
            for step in range(3):
                with client.create(f"step{step}") as checkpoint:
                    checkpoint.save("model.pt", state_of(f"step{step}", "model.pt"))
            client.wait("step2", durability="tier2", timeout=60)
        yield running


@pytest.mark.promise("bad_input")
@pytest.mark.timeout(120 + COMMANDS)
def test_no_arguments_end_in_a_traceback(
    daemon: DaemonProcess, tmp_path: Path, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some of it are relative paths, and some of them can be written to
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "file").write_bytes(b"not a store")
    known = ("run-7", "step1", "e00001-s000001-step0", "e00001-s000002", "1", "--json", str(daemon.tier1_path),
             f"file://{daemon.bucket_path}", "key=value", str(daemon.runtime_dir))  # fmt: skip
    commands = Commands(choices(), folder, known)
    ended: Counter[int] = Counter()
    wrong: list[str] = []
    used: set[str] = set()
    with watched(daemon) as watcher:
        for _ in range(COMMANDS):
            words = [*commands.command(), "--runtime-dir", str(daemon.runtime_dir)]
            used.update(words[:1])
            out, error = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                try:
                    status = main(words)
                except SystemExit as leaving:
                    status = int(leaving.code or 0)
                except Exception as uncaught:  # noqa: BLE001 - the finding itself
                    status = -1
                    error.write(f"Traceback: {uncaught!r}")
            ended[status] += 1
            said = error.getvalue()
            if status not in _STATUSES or any(defect in said for defect in _DEFECTS):
                wrong.append(f"{words}: status {status}: {said[-600:]}")
            elif status > 2 and "--json" in words and "--" not in words and said.lstrip().startswith("{"):
                assert json.loads(said)["error"]["hint"], words
        wrong += watcher.check()
    evidence(tried=COMMANDS, broken=len(wrong))
    assert not wrong, f"{len(wrong)} times (CAIRN_CRASH_SEED={SEED}):\n" + "\n".join(wrong[:15])
    assert {verb.NAME for verb in VERBS} <= used, ended
