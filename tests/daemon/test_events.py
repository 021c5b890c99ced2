"""Events as lines: whatever somebody gave as a reason, it is one line and nothing that a terminal obeys."""

from __future__ import annotations

from cairnd.events import Event


def test_a_reason_cannot_pass_for_lines_of_the_log() -> None:
    forged = "x\n2026-01-01 ERROR all is lost\x1b[2J\u2028\u202e"
    line = Event(1, 0.0, "version_aborted", "job", "e00001-s000001-t", {"reason": forged, "näme": "é 5"}).text()
    assert line.isprintable()
    assert line.startswith("version_aborted job/e00001-s000001-t reason=x\\n2026-01-01 ERROR")
    assert line.endswith("näme=é 5")
