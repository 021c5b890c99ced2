"""One stream of events: what the log prints, what ``Watch`` sends and what tests wait for.

An event is a name from a small vocabulary with job, version and a few fields. The last thousand are remembered; they
are numbered without gaps, so a watcher that fell behind can tell that it missed some.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cairn_api.names import VersionId
from cairnd.clock import Clock

log = logging.getLogger("cairnd")

REMEMBERED_EVENTS = 1000
_WARNINGS = frozenset(
    {
        "version_aborted", "copy_failed", "persist_failed", "copy_quarantined", "claim_lost", "save_skipped",
        "tier2_unreachable", "tier2_refused", "epoch_provisional", "drain_incomplete", "manifest_quarantined",
        "recovery_swept", "repair_failed", "scrub_failed", "health_not_written", "version_passed_over", "version_lost",
        "daemon_stood_still", "tier1_has_no_room", "damaged_copy_given_up", "recovery_failed",
        "quarantine_failed", "place_unusable", "copy_not_listed",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: ``number`` grows by one, ``time_s`` is wall-clock time for people."""

    number: int
    time_s: float
    name: str
    job: str
    version: str
    fields: dict[str, str]

    def text(self) -> str:
        """One line for a person."""
        subject = f" {self.job}/{self.version}" if self.version else (f" {self.job}" if self.job else "")
        return self.name + subject + "".join(f" {key}={_on_one_line(value)}" for key, value in self.fields.items())

    def json(self) -> str:
        """One line for a machine."""
        return json.dumps(
            {"number": self.number, "time_s": round(self.time_s, 3), "event": self.name, "job": self.job,
             "version": self.version, **self.fields}
        )  # fmt: skip


def _on_one_line(text: str) -> str:
    """*text*, which may be anybody's, with escapes for line ends and for what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class EventLog:
    """Publishes events to the log, to watchers and to memory."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._remembered: deque[Event] = deque(maxlen=REMEMBERED_EVENTS)
        self._number = 0
        self._watchers: set[asyncio.Queue[Event]] = set()

    def publish(self, name: str, job: str = "", version: VersionId | str = "", **fields: object) -> None:
        """Record that *name* happened; never blocks and never fails."""
        self._number += 1
        event = Event(
            self._number,
            self._clock.now_s(),
            name,
            job,
            str(version),
            {key: str(value) for key, value in fields.items()},
        )
        self._remembered.append(event)
        log.log(logging.WARNING if name in _WARNINGS else logging.INFO, event.text(), extra={"event": event})
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    def remembered(self) -> Iterator[Event]:
        """The most recent events, oldest first."""
        return iter(tuple(self._remembered))

    @contextmanager
    def _subscription(self) -> Iterator[asyncio.Queue[Event]]:
        queue: asyncio.Queue[Event] = asyncio.Queue(maxsize=REMEMBERED_EVENTS)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    async def watch(self) -> AsyncIterator[Event]:
        """Remembered events, then each new one as it happens; slow watchers lose the oldest."""
        with self._subscription() as queue:
            last = 0
            for event in self.remembered():
                last = event.number
                yield event
            while True:
                event = await queue.get()
                if event.number > last:
                    yield event


class EventFormatter(logging.Formatter):
    """Formats events as text or as JSON; other records as text or as ``{"event": "log", ...}``."""

    def __init__(self, style: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        if not self._json:
            return super().format(record)
        event = getattr(record, "event", None)
        if isinstance(event, Event):
            return event.json()
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return json.dumps({"event": "log", "level": record.levelname, "message": text})
