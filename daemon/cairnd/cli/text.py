"""Text for people: plain tables of at most 80 columns, sizes, ages, and names made safe to print.

Names, folders and error texts come from users and other machines. Whatever is not printable is escaped before it
reaches a terminal, and widths are counted in terminal cells, so a wide character cannot break a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.cells import cell_len, chop_cells, set_cell_size

WIDTH = 80
"""Columns that every table and text for people fits into."""

_GAP = "  "
_CUT = "…"
_STEP = 1024
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_AGES = ((365 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "m"))


def clean(text: str) -> str:
    """*text* with everything that is not printable escaped: it stays on its line and cannot steer a terminal."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shorten(text: str, width: int, keep: int = 0) -> str:
    """*text* in at most *width* cells; of a longer one the middle is left out, so that both ends can be recognised.

    The first *keep* cells stay before anything of the end does.
    """
    text = clean(text)
    if cell_len(text) <= width:
        return text
    if width < 1:
        return ""
    tail_width = max(min((width - 1) // 3, width - 1 - keep), 0)
    tail = ""
    for sign in reversed(text):
        if cell_len(sign + tail) > tail_width:
            break
        tail = sign + tail
    head = chop_cells(text, max(width - 1 - cell_len(tail), 1))[0] if width > 1 else ""
    return f"{head}{_CUT}{tail}"


def wrapped(text: str, *, first: str = "", indent: str = "", width: int = WIDTH) -> list[str]:
    """*text* as lines of at most *width* cells, the first after *first*, the others after *indent*."""
    lines, line, begun = [], first, False
    for word in clean(text).split(" "):
        gap = " " if begun else ""
        if begun and cell_len(line + gap + word) > width:
            lines.append(line)
            line, gap = indent, ""
        line, begun = line + gap + word, True
        while cell_len(line) > width:
            piece = chop_cells(line, width)[0]
            lines.append(piece)
            line = indent + line[len(piece) :]
    return [*lines, line.rstrip()]


def size_text(size_bytes: float) -> str:
    """``512 B``, ``1.5 GiB``: binary units, at most ten columns."""
    if size_bytes < _STEP:
        return f"{int(size_bytes)} B"
    power = 1
    while power < len(_UNITS) and round(size_bytes / _STEP**power, 1) >= _STEP:
        power += 1
    return f"{size_bytes / _STEP**power:.1f} {_UNITS[power - 1]}"


def age_text(seconds: float) -> str:
    """``42s``, ``5m``, ``3h``, ``12d``, ``2y``; a clock that was set back gives ``0s``."""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(int(seconds), 0)}s"


def time_text(time_s: float) -> str:
    """Wall-clock time in UTC, to the second; ``unknown`` for zero and for what no calendar has."""
    try:
        return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if time_s else "unknown"
    except (ValueError, OverflowError, OSError):
        return "unknown"


def count_text(count: int, noun: str) -> str:
    """``1 copy``, ``2 copies``, ``0 versions``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: right-aligned for numbers; ``shrinks`` if its values may be shortened, down to ``minimum`` cells.

    Of a shortened value the first ``keep`` cells stay.
    """

    title: str
    right: bool = False
    shrinks: bool = False
    minimum: int = 8
    keep: int = 0


VERSION_COLUMN = Column("VERSION", shrinks=True, minimum=18, keep=14)
"""``e00007-s000042`` stays whatever happens to the tag: it names the version."""


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None = WIDTH) -> list[str]:
    """A heading and one line per row, none wider than *width* cells (None: nothing is shortened).

    Columns are as wide as their contents need; when that is too much, the widest ones that may shrink do.
    """
    cells = [[clean(value) for value in row] for row in rows]
    widths = [
        max([len(column.title), *(cell_len(row[number]) for row in cells)]) for number, column in enumerate(columns)
    ]
    _shrink(columns, widths, width)
    lines = []
    for row in [[column.title for column in columns], *cells]:
        fields = []
        for column, value, room in zip(columns, row, widths, strict=True):
            shown = shorten(value, room, column.keep)
            padding = " " * (room - cell_len(shown))
            fields.append(padding + shown if column.right else shown + padding)
        line = _GAP.join(fields).rstrip()
        lines.append(line if width is None or cell_len(line) <= width else set_cell_size(line, width).rstrip())
    return lines


def _shrink(columns: Sequence[Column], widths: list[int], width: int | None) -> None:
    """Make *widths* fit: the widest column that still may shrink gives way down to the next widest, and so on."""
    excess = 0 if width is None else sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while excess > 0:
        able = [n for n, column in enumerate(columns) if column.shrinks and widths[n] > column.minimum]
        if not able:
            return
        widest = max(able, key=lambda n: widths[n])
        floors = [widths[n] for n in able if widths[n] < widths[widest]]
        step = max(1, widths[widest] - max([*floors, columns[widest].minimum]))
        taken = min(step, excess, widths[widest] - columns[widest].minimum)
        widths[widest] -= taken
        excess -= taken
