from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cairnd.cli.text import (
    WIDTH,
    Column,
    age_text,
    clean,
    count_text,
    shorten,
    size_text,
    table,
    time_text,
    wrapped,
)
from tests.daemon.cli.running import assert_fits

HOSTILE = st.text(max_size=300) | st.text("ab漢\N{ESCAPE}[31m\n\u202e\t ", max_size=300)


@given(HOSTILE)
def test_cleaned_text_stays_on_its_line(text: str) -> None:
    assert clean(text).isprintable()
    if text.isprintable():
        assert clean(text) == text


def test_a_terminal_is_not_steered() -> None:
    assert clean("\x1b[2Jmodel\n\u202e") == "\\x1b[2Jmodel\\n\\u202e"


@given(HOSTILE, st.integers(min_value=0, max_value=90))
def test_shortened_text_fits(text: str, width: int) -> None:
    short = shorten(text, width)
    assert cell_len(short) <= width
    if cell_len(clean(text)) <= width:
        assert short == clean(text)


def test_both_ends_of_a_shortened_name_stay() -> None:
    name = "e00007-s000042-" + "x" * 100 + "step1000"
    assert shorten(name, 30) == "e00007-s000042-xxxxx…xstep1000"


@given(HOSTILE, st.text("ab ", max_size=20), st.text(" ", max_size=8))
def test_wrapped_text_fits_and_loses_nothing(text: str, first: str, indent: str) -> None:
    lines = wrapped(text, first=first, indent=indent)
    assert_fits(lines)
    assert "".join("".join(lines).split()) == "".join((first + clean(text)).split())


def test_text_is_wrapped_between_words() -> None:
    assert wrapped("one two three", first="- ", indent="  ", width=9) == ["- one two", "  three"]


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1024 * 1024 - 1, "1.0 MiB"), (3 * 1024**3 // 2, "1.5 GiB"),
        (2**64 - 1, "16.0 EiB"),
    ],
)  # fmt: skip
def test_sizes_are_in_binary_units(size_bytes: int, expected: str) -> None:
    assert size_text(size_bytes) == expected


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_sizes_are_narrow(size_bytes: int) -> None:
    assert len(size_text(size_bytes)) <= 10


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-5, "0s"), (0.4, "0s"), (59.9, "59s"), (60, "1m"), (7199, "1h"), (86400 * 12, "12d"), (86400 * 800, "2y")],
)
def test_ages_are_short(seconds: float, expected: str) -> None:
    assert age_text(seconds) == expected


def test_times_outside_every_calendar_are_unknown() -> None:
    assert time_text(1_700_000_000) == "2023-11-14 22:13:20 UTC"
    assert {time_text(value) for value in (0.0, 1e30, float("nan"), float("inf"))} == {"unknown"}


def test_counts_have_plurals() -> None:
    assert [count_text(n, noun) for n, noun in ((1, "copy"), (2, "copy"), (0, "file"))] == [
        "1 copy",
        "2 copies",
        "0 files",
    ]


COLUMNS = (Column("NAME", shrinks=True), Column("SIZE", right=True), Column("WHY", shrinks=True, minimum=10))


@given(st.lists(st.tuples(HOSTILE, st.sampled_from(["1 B", "1023.9 MiB"]), HOSTILE), max_size=5))
def test_tables_fit_whatever_is_in_them(rows: list[tuple[str, str, str]]) -> None:
    lines = table(COLUMNS, rows)
    assert_fits(lines)
    assert len(lines) == len(rows) + 1
    assert all(size in line for (_, size, _), line in zip(rows, lines[1:], strict=True))


def test_a_narrow_table_is_not_padded_and_aligns() -> None:
    assert table(COLUMNS, [("a", "1.0 KiB", "x"), ("bbbbb", "2 B", "")]) == [
        "NAME      SIZE  WHY",
        "a      1.0 KiB  x",
        "bbbbb      2 B",
    ]


def test_the_widest_column_gives_way_first() -> None:
    line = table(COLUMNS, [("n" * 200, "2 B", "because it is old")])[1]
    assert line.endswith("  because it is old")
    assert cell_len(line) == WIDTH


def test_a_wide_table_shortens_nothing() -> None:
    assert "n" * 200 in table(COLUMNS, [("n" * 200, "2 B", "")], width=None)[1]
