"""Progress bars: on standard error, one a stage, and nothing where there was nothing to show."""

from __future__ import annotations

import pytest

from sae.progress import progress_bars


def test_without_a_stage_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars():
        pass
    assert capsys.readouterr() == ("", "")


def test_a_stage_ends_full_where_the_next_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(units={"second": "inputs"}) as progress:
        progress("first", 3, 10)
        progress("second", 1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err and "2/2" in err and "inputs/s" in err


def test_bars_end_where_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress_bars() as progress:
        progress("first", 3, 10)
        raise RuntimeError
    assert "3/10" in capsys.readouterr().err


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(quiet=True) as progress:
        progress("first", 3, 10)
    assert capsys.readouterr() == ("", "")
