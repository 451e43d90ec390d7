"""Effects as tables, lines, Markdown and a figure."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from sae.effects.effects import EffectSettings
from sae.effects.figure import draw_effects
from sae.effects.interventions import NO_CHANGES, Changes
from sae.effects.view import (
    effect_lines,
    effects_table,
    independent_difference,
    markdown,
    quantiles,
    summary_lines,
    table_note,
    what_is_done,
)
from sae.results.estimate import Estimate
from tests.support.effect_example import make_effects

EVIL = "[bold]</code>\x1b[31m\n|"


def printed(content: object, width: int = 180) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(content)
    return stream.getvalue()


def test_the_table_is_sorted_and_token_text_stays_text() -> None:
    text = printed(effects_table(make_effects(EVIL), "loss", 2))
    lines = [line for line in text.splitlines() if "%" in line and "±" in line]
    assert [line.split()[0] for line in lines] == ["2", "0"]
    assert lines[0].split()[:11] == "2 2.00% 0.500 ± 0.012 -0.12 – 0.250 ± 0.012 0.002".split()[:11]
    assert "[bold]</code>�[31m↵|" in lines[1] and "\x1b" not in text
    assert table_note(make_effects(), "loss", 2).startswith("2 of 3 measured features by loss; the dictionary has 4.")
    assert table_note(make_effects(), "loss", None).startswith("3 of 3")
    assert "features ablated" in text
    assert [line.split()[0] for line in printed(effects_table(make_effects())).splitlines() if "±" in line][:2] == [
        "2",
        "0",
    ]


def test_a_narrow_table_has_its_numbers_whole_in_80_columns() -> None:
    effects = make_effects("a token that is longer than what is left of the line" + 200 * " ")
    wide = dataclasses.replace(effects[0], loss=Estimate(-0.01634, 0.0062), kl=Estimate(0.001638, 0.00049))
    effects = dataclasses.replace(effects, features={**effects.features, 0: wide})
    lines = printed(effects_table(effects, width=80), 80).splitlines()
    row = next(line for line in lines if line.split()[:1] == ["0"])
    assert "-0.0163 ± 0.0062" in row and "0.00164 ± 0.00049" in row and row.rstrip().endswith("…")
    assert all(f" {number} " in row for number in ("0.062", "0.002")), "direct, random"
    assert "density" not in "".join(lines) and "next 16" not in "".join(lines)


def test_lines_beside_a_feature() -> None:
    effects = make_effects()
    assert effect_lines(effects[0], effects.settings) == (
        "ablated at 64 places in 31 documents, nats:\n"
        "loss +0.250 ± 0.012 (direct +0.062 ± 0.012), next 16 -0.125 ± 0.012\n"
        "KL 0.125 ± 0.012 (random direction 0.002 ± 0.012)"
    )
    assert "direct" not in effect_lines(effects[2], effects.settings).replace("random direction", "")
    assert effect_lines(effects[3], effects.settings) == "ablated: it was changed nowhere in the held-out text read"
    assert [what_is_done(EffectSettings(scale=scale)) for scale in (0.0, 2.0, -1.0, 0.5)] == [
        "ablated", "doubled", "times -1", "times 0.5",
    ]  # fmt: skip


def test_what_came_of_all() -> None:
    features, places = (f"Direct against measured change of the loss over {name}: " for name in ("features", "places"))
    assert summary_lines(make_effects()) == [
        "1 of 2 features change the next-token distribution more than a random direction of the same length does at "
        "the same places (KL, the difference's 95 % interval is above 0).",
        "2 of 2 features change the next-token distribution more than their own directions do where they do not fire "
        "(KL, the difference's 95 % interval is above 0).",
        f"{features}r = 0.500 over 2; shuffled features -0.250 to +0.125 (middle 95 %).",
        f"{places}r = 0.750 over 128; shuffled features -0.062 to +0.031 (middle 95 %).",
    ]


def test_standard_errors_of_independent_differences() -> None:
    """3² + 4² = 5²."""
    assert independent_difference(Estimate(2.0, 0.3), Estimate(0.5, 0.4)) == Estimate(1.5, 0.5)
    assert independent_difference(Estimate(2.0, 0.3), Estimate(0.5, None)) == Estimate(1.5, None)
    assert independent_difference(Estimate(2.0, 0.3), Estimate(None, None)) == Estimate(None, None)


def test_markdown() -> None:
    text = markdown(make_effects(EVIL), "figures/effects.png")
    assert text.startswith("# Effects of features at `blocks.1.hook_resid_pre`")
    assert "3 features, ablated (f becomes 0·f) at up to 64 places each" in text
    assert "| 0 | 2.00% | 64 / 31 |" in text
    assert "`[bold]</code>�[31m↵\\|` / `b\\|ˋc`" in text, "neither cells nor code end early"
    assert "![measured against direct effect](figures/effects.png)" in text
    assert "| KL | 0.131 | 0.156 | 0.188 | 0.219 | 0.244 |" in text
    assert "![" not in markdown(make_effects(), None)


def test_quantiles_by_hand() -> None:
    values = [Estimate(float(value), None) for value in range(101)]
    assert quantiles([*values, Estimate(None, None)]) == ["5", "25", "50", "75", "95"]
    assert quantiles([Estimate(None, None)]) == ["–"] * 5


def test_the_figure() -> None:
    pytest.importorskip("matplotlib")
    assert draw_effects(make_effects(), NO_CHANGES) is None
    rng = np.random.default_rng(0)
    whole, numbers = np.repeat([0, 1], 50), rng.standard_normal((6, 100))
    names = ("activation", "loss", "loss_after", "kl", "kl_after", "direct")
    columns = dict(zip(names, numbers, strict=True))
    changes = Changes(whole, whole, np.tile([0, 1], 50), whole, **columns)
    png = draw_effects(make_effects(), changes)
    assert png is not None and png.startswith(b"\x89PNG") and len(png) > 20_000
    assert draw_effects(make_effects(), changes) == png
    unknown = Changes(whole, whole, whole, whole, **{**columns, "direct": np.full(100, np.nan)})
    assert draw_effects(make_effects(), unknown) is None
