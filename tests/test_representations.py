"""docs/representations.md runs from top to bottom, and prints what it says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "representations.md"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def unit_of(number: str) -> float:
    """What the last printed digit stands for."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def difference(said: str, printed: str) -> str | None:
    """Where two texts differ in more than what another machine's rounding or random numbers may change, or None.

    Numbers may differ by a tenth, or by one and a half units of the last digit (three behind ±: a spread over five
    seeds is not better known); everything else must be the same.
    """
    for said_line, line in zip(said.splitlines(), printed.splitlines(), strict=False):
        if NUMBER.sub("#", said_line).split() != NUMBER.sub("#", line).split():
            return f"{said_line!r} is {line!r}"
        for place, actual in zip(NUMBER.finditer(said_line), NUMBER.findall(line), strict=True):
            expected = place[0]
            units = 3.0 if said_line[: place.start()].endswith("± ") else 1.5
            if abs(float(actual) - float(expected)) > max(0.1 * abs(float(expected)), units * unit_of(expected)):
                return f"{said_line!r}: {expected} is {actual}"
    lines = len(said.splitlines()), len(printed.splitlines())
    return None if lines[0] == lines[1] else f"{lines[0]} lines are said, {lines[1]} are printed"


@pytest.mark.slow
def test_the_page_prints_what_it_says() -> None:
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text"] * (len(blocks) // 2), "each block says what it prints"
    assert len(blocks) >= 20
    names: dict[str, object] = {}
    for number in range(0, len(blocks), 2):
        (_, code), (_, said) = blocks[number : number + 2]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, f"{PAGE.name}, block {number // 2 + 1}", "exec"), names)
        assert said.strip(), f"block {number // 2 + 1} says nothing of what it prints"
        wrong = difference(said, output.getvalue())
        assert wrong is None, f"{PAGE.name}, block {number // 2 + 1}: {wrong}"


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("bound 0.0013, at 12 of 20", "bound 0.0014, at 12 of 20", True),
        ("bound 0.0013", "bound 0.0016", False),
        ("error 6e-08", "error 7e-08", True),
        ("error 6e-08", "error 6e-07", False),
        ("mean 0.93", "mean 0.80", False),
        ("found 0.90 ± 0.02", "found 0.88 ± 0.04", True),
        ("found 0.90 ± 0.02", "found 0.90 ± 0.06", False),
        ("mean 0.93", "median 0.93", False),
        ("one line", "one line\nand another", False),
        ("a -0.50", "a 0.50", False),
    ],
)
def test_a_wrong_number_on_the_page_would_be_seen(said: str, printed: str, same: bool) -> None:
    assert (difference(said, printed) is None) is same
