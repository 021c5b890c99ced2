"""The thread that turns placeholders into links once their version has reached tier 1."""

from __future__ import annotations

import atexit
import logging
import threading
import time

from cairn.integrations.deepspeed.save_dir import SaveDir
from cairn_api.names import VersionId

log = logging.getLogger("cairn")

_LOOK_S = 0.5
"""How often a version's manifest is looked for while one is waited for: one stat(2) each time."""
_AT_EXIT_S = 10.0
"""How long a program that ends waits for its last links. What is not there by then is made by the next load."""


class Linker:
    """See the module. The thread exists while there is something to wait for."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[SaveDir, str], VersionId] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        atexit.register(self.finish)

    def expect(self, save_dir: SaveDir, version: VersionId) -> None:
        """Settle the folder of *version* in *save_dir* as soon as that is possible."""
        with self._lock:
            self._waiting[save_dir, version.tag] = version
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cairn-links", daemon=True)
                self._thread.start()

    def finish(self, timeout_s: float = _AT_EXIT_S) -> None:
        """Wait until nothing is expected any more, at most *timeout_s*."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._lock:
                waiting = dict(self._waiting)
                if not waiting:
                    self._thread = None
                    return
            for (save_dir, tag), version in waiting.items():
                if _settled(save_dir, tag, version):
                    self._done(save_dir, tag, version)
            with self._lock:
                idle = bool(self._waiting)
            if idle:
                time.sleep(_LOOK_S)

    def _done(self, save_dir: SaveDir, tag: str, version: VersionId) -> None:
        with self._lock:
            if self._waiting.get((save_dir, tag)) == version:
                del self._waiting[save_dir, tag]


def _settled(save_dir: SaveDir, tag: str, version: VersionId) -> bool:
    try:
        if not save_dir.settle(tag, version):
            return False
        save_dir.repair()
    except OSError as error:
        log.warning("%s could not be brought up to date, the next load will: %s", save_dir.folder(tag), error)
    return True
