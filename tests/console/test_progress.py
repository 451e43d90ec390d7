"""Progress on standard error: bars on a terminal, plain lines elsewhere, nothing where there was nothing to show."""

from __future__ import annotations

import re
import time

import pytest

from sae.config.progress import announce
from sae.console import progress as module
from sae.console.progress import progress_bars
from sae.console.terminal import Terminal

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error passes for a terminal of 120 columns."""
    monkeypatch.setattr(module, "errors", lambda: Terminal(stderr=True, force_terminal=True, width=120))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `time.monotonic` gives, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_without_a_stage_nothing_is_printed(capsys: Captured) -> None:
    with progress_bars():
        pass
    assert capsys.readouterr() == ("", "")


def test_quiet_is_quiet(capsys: Captured) -> None:
    with progress_bars(quiet=True) as progress:
        progress("first", 3, 10)
        announce(progress, "two epochs")
    assert capsys.readouterr() == ("", "")


def test_lines_are_announced_where_progress_is_shown(capsys: Captured) -> None:
    with progress_bars() as progress:
        announce(progress, "two epochs", "three tokens")
    assert capsys.readouterr() == ("", "two epochs\nthree tokens\n")


def test_a_log_has_a_line_where_a_stage_begins_and_one_where_it_ends(capsys: Captured, clock: list[float]) -> None:
    with progress_bars(units={"second": "inputs"}) as progress:
        progress("first", 0, 10_000)
        clock[0] += 5
        progress("first", 9_000, 10_000)
        progress("second", 0, 1)
        clock[0] += 0.5
        progress("second", 1, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "first: 10,000 tokens",
        "first: done in 5.0 s (2,000 tokens/s)",
        "second: 1 inputs",
        "second: done in 0.5 s (2 inputs/s)",
    ]


def test_a_stage_of_one_batch_has_the_rate_of_its_whole_time(capsys: Captured, clock: list[float]) -> None:
    with progress_bars() as progress:
        progress("legacy formulas", 0, 8192)
        clock[0] += 4
        progress("legacy formulas", 8192, 8192)
    assert "(2,048 tokens/s)" in capsys.readouterr().err


def test_what_an_earlier_process_did_counts_for_no_rate(capsys: Captured, clock: list[float]) -> None:
    with progress_bars() as progress:
        progress("harvest", 900_000, 1_000_000)
        clock[0] += 10
        progress("harvest", 950_000, 1_000_000)
        clock[0] += 10
        progress("harvest", 1_000_000, 1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "harvest: 1,000,000 tokens, 900,000 of 1,000,000 already done",
        "harvest: done in 20 s (5,000 tokens/s)",
    ]


def test_a_log_gets_a_line_now_and_then_though_nothing_is_reported(capsys: Captured) -> None:
    seen = ""

    def waited_for(pattern: str) -> bool:
        """Whether such a line comes within ten seconds."""
        nonlocal seen
        end = time.monotonic() + 10
        while time.monotonic() < end:
            seen += capsys.readouterr().err
            if re.search(rf"^{pattern}$", seen, re.MULTILINE):
                return True
            time.sleep(0.02)
        return False

    with progress_bars(every=0.05) as progress:
        progress("load gpt2", 0, 1)
        assert waited_for("load gpt2") and waited_for(r"load gpt2: \d\.\d s"), seen
        progress("load gpt2", 1, 1)
        assert waited_for(r"load gpt2: done in \d\.\d s"), seen
        progress("train", 0, 1000)
        time.sleep(0.02)
        progress("train", 250, 1000)
        progress.beside("train", "FVU 0.200")
        assert waited_for(r"train: 250 of 1,000 tokens, [\d,]+ tokens/s, \d\.\d s left, FVU 0\.200"), seen


def test_half_a_minute_is_the_default() -> None:
    assert module.EVERY == 30.0


def test_a_log_says_where_the_work_stopped(capsys: Captured) -> None:
    with pytest.raises(RuntimeError), progress_bars() as progress:
        progress("first", 0, 10)
        progress("first", 3, 10)
        raise RuntimeError
    assert capsys.readouterr().err.splitlines()[-1] == "first: stopped at 3 of 10"


def test_bars_end_full_where_the_next_stage_begins(capsys: Captured, terminal: None) -> None:
    with progress_bars(units={"second": "inputs"}) as progress:
        progress("first", 0, 10)
        progress("first", 3, 10)
        progress("second", 0, 2)
        progress("second", 1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err and "2/2" in err and "inputs/s" in err


def test_bars_end_where_the_work_fails(capsys: Captured, terminal: None) -> None:
    with pytest.raises(RuntimeError), progress_bars() as progress:
        progress("first", 0, 10)
        progress("first", 3, 10)
        raise RuntimeError
    assert "3/10" in capsys.readouterr().err


def test_loading_a_model_moves_a_bar_without_numbers(capsys: Captured, terminal: None) -> None:
    with progress_bars() as progress:
        progress("load gpt2", 0, 1)
        progress("load gpt2", 1, 1)
    err = capsys.readouterr().err
    assert "load gpt2" in err and "/1" not in err and "/s" not in err


def test_names_of_stages_are_shown_and_not_obeyed(capsys: Captured) -> None:
    with progress_bars() as progress:
        progress("load [/]\x1b[2J", 0, 1)
    assert capsys.readouterr().err.splitlines()[0] == r"load [/]\x1b[2J"
