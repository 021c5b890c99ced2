"""What every verb is given: its arguments, its output, and where it reads from, opened when first needed."""

from __future__ import annotations

import re
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from cairn_api.errors import ConfigurationError, VersionError
from cairnd.cli.daemon_client import Daemon
from cairnd.cli.offline import open_offline
from cairnd.cli.output import Output
from cairnd.cli.source import Source

_SHORT_VERSION = re.compile(r"e\d{5,9}-s\d{6,9}")


class Invocation:
    """One run of the command."""

    def __init__(self, arguments: Namespace, output: Output, runtime_dir: Path) -> None:
        self.arguments = arguments
        self.output = output
        self.now_s = time.time()
        self._runtime_dir = runtime_dir
        self._source: Source | None = None
        self._daemon: Daemon | None = None

    def source(self) -> Source:
        """The store that ``--store`` names, else the daemon."""
        if self.arguments.store is None:
            return self.daemon()
        if self._source is None:
            self._source = open_offline(self.arguments.store, _options(self.arguments.storage_option))
        return self._source

    def daemon(self) -> Daemon:
        """The daemon; with ``--store`` :class:`ConfigurationError`, because a store alone is only read."""
        if self.arguments.store is not None:
            raise ConfigurationError(
                f"`cairn {self.arguments.verb}` needs the daemon: --store only reads",
                hint="run it without --store while cairnd is running",
            )
        if self._daemon is None:
            self._daemon = Daemon(self._runtime_dir)
        return self._daemon

    def job(self) -> str:
        """``--job``, or the only job there is; raises when there is none, or more than one to choose from."""
        if self.arguments.job is not None:
            return str(self.arguments.job)
        jobs = self.source().jobs()
        if not jobs:
            raise VersionError("there is no version of any job here", hint="save one first, or name the --job")
        if len(jobs) > 1:
            raise ConfigurationError(
                f"there are {len(jobs)} jobs here: {', '.join(jobs)}",
                hint="choose one of them with --job",
                context={"jobs": ",".join(jobs)},
            )
        return jobs[0]

    def version(self, job: str, text: str) -> str:
        """*text* as a source understands it: ``e00007-s000042`` (all that a narrow table shows) gets its tag."""
        if not _SHORT_VERSION.fullmatch(text):
            return text
        names = [str(item.version.id) for item in self.source().versions(job).versions]
        matching = [name for name in names if name.startswith(f"{text}-")]
        return matching[0] if len(matching) == 1 else text

    def close(self) -> None:
        """Let go of the source, if one was opened."""
        for source in (self._source, self._daemon):
            if source is not None:
                source.close()


def _options(pairs: list[str]) -> Mapping[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ConfigurationError(
                f"the storage option {pair!r} is not valid", hint="write it as --storage-option key=value"
            )
    return dict(pair.split("=", 1) for pair in pairs)
