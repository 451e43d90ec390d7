"""Tables of the terminal: numbers are never cut, text gives way first, columns go below each other."""

from __future__ import annotations

import io
from typing import Any

import pytest

from sae.console.terminal import Terminal
from sae.results.table import BEST, SAME, WIDE, Column, Table

NAMES = ["fvu", "relative_reconstruction_bias", "a name in several words that is longer than half a terminal"]
FULL = ["0.2307 ± 0.0044", "0.99921 ± 0.00099", "12,345 ± 67"]
SHORT = ["0.2307", "0.9992", "12,345"]
TOKENS = ["one two three " * 9, "日本語 " * 20, "short"]


def printed(columns: list[Column], width: int | None, **texts: Any) -> str:
    stream = io.StringIO()
    Terminal(file=stream, width=width or 400).print(Table(columns, **texts).in_terminal(width))
    return stream.getvalue()


def table(others: int, **changes: bool) -> list[Column]:
    """Names, a column that stays whole, others that can be shortened, and text that can be cut."""
    numbers = [Column(f"other {number}", FULL, SHORT) for number in range(others)]
    return [
        Column("metric", NAMES, is_text=True), Column("own", FULL), *numbers,
        Column("fires on", TOKENS, is_text=True, is_cut=True, **changes),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200, None])
@pytest.mark.parametrize("others", [0, 2, 7])
def test_every_number_is_whole_at_every_width(width: int | None, others: int) -> None:
    text = printed(table(others), width)
    lines = text.splitlines()
    assert all(len(line) <= (width or 400) for line in lines)
    for full, short in zip(FULL, SHORT, strict=True):
        whole = text.count(full)
        assert whole >= 1, "what has no short form is there as it is"
        assert whole + text.replace(full, "").count(short) == 1 + others
    for number in range(others):
        assert f"other {number}" in text
    assert "fires on" in text


def test_text_gives_way_before_numbers_do() -> None:
    wide, middle, narrow = (printed(table(1), width) for width in (250, 100, 66))
    assert TOKENS[0].strip() in wide and NAMES[2] in wide
    assert TOKENS[0].strip() not in middle and "…" in middle
    assert all(middle.count(full) == 2 for full in FULL)
    assert all(narrow.count(full) == 1 and narrow.count(short) == 2 for full, short in zip(FULL, SHORT, strict=True))


def test_names_are_folded_and_not_cut() -> None:
    text = printed([Column("metric", NAMES, is_text=True), Column("own", FULL)], 40)
    first = [line[:22] for line in text.splitlines()[2:]]
    assert "".join(part.strip() for part in first).replace(" ", "").endswith(NAMES[2].replace(" ", ""))
    assert "…" not in text


@pytest.mark.parametrize(
    ("width", "lines"),
    [(47, ["relative_reconstruction_bias"]), (43, ["relative_reconstruction_", "bias"]),
     (31, ["relative_", "reconstructio", "n_bias"])],
)  # fmt: skip
def test_long_names_break_at_underscores(width: int, lines: list[str]) -> None:
    text = printed([Column("metric", NAMES[1:2], is_text=True), Column("own", FULL[1:2])], width)
    assert [line.split()[0] for line in text.splitlines()[2:]] == lines


def test_notes_stand_below_and_one_of_them_only_if_cells_are_short() -> None:
    texts: dict[str, Any] = {"title": "a title", "notes": ["a note", ""], "short_note": "errors are elsewhere"}
    assert "errors are elsewhere" not in printed(table(2), 200, **texts)
    narrow = printed(table(2), 40, **texts)
    assert narrow.splitlines()[0].strip() == "a title"
    assert narrow.index("a note") < narrow.index("errors are elsewhere")


def test_cells_are_neither_markup_nor_control_sequences() -> None:
    text = printed([Column("[bold]name", ["[/] \x1b[31m"], is_text=True), Column("own", ["1"])], 80, title="[red]")
    assert "[bold]name" in text and r"[/] \x1b[31m" in text and "[red]" in text


def test_the_same_table_as_markdown_has_its_marks_and_notes() -> None:
    own = Column("own", FULL, marks=[BEST, SAME, ""])
    extra = Column("seconds", ["1", "2", "3"], is_extra=True)
    made = Table(
        [Column("metric", ["a", "b", "c"], is_text=True), own, extra], notes=["{best}: best"], extra_notes=["s"]
    )
    assert made.in_markdown().splitlines() == [
        "| metric | own | seconds |",
        "| :-- | --: | --: |",
        f"| a | **{FULL[0]}** | 1 |",
        f"| b | {FULL[1]} ≈ | 2 |",
        f"| c | {FULL[2]} | 3 |",
    ]
    assert made.markdown_notes() == ["**bold**: best", "s"]
    for width, wide in ((WIDE, True), (WIDE - 1, False)):
        stream = io.StringIO()
        Terminal(file=stream, width=width).print(made.in_terminal(width))
        assert ("seconds" in stream.getvalue()) == wide
        assert "*: best" in stream.getvalue() and f"{FULL[0]} *" in stream.getvalue()


def test_rows_become_columns() -> None:
    made = Table.of_rows(["", "n"], iter([("one", "1"), ("two", "2")]), title="counts")
    assert [(column.heading, list(column.cells), column.is_text) for column in made.columns] == [
        ("", ["one", "two"], True),
        ("n", ["1", "2"], False),
    ]
