"""Attributions as a result: order, sums by feature, tables, JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sae.effects import AttributedDictionary, Attribution, Contribution, FeatureTotal
from sae.effects.attribution_view import attribution_table, completeness_lines, totals_table
from sae.errors import FormatError
from sae.features import Features
from sae.files.formats import Format
from sae.files.kept import KeptResult

EVIL = "[bold]\x1b[31m\n"


def make_attribution(**changes: Any) -> Attribution:
    """Two dictionaries on one text of four tokens; entry 3 is of the error."""
    first = AttributedDictionary("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre", 9, "ab", (5.0,), (2.0,), (2.5,))
    second = AttributedDictionary("blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out", 9, "cd", (5.0,), (4.0,), (0.75,))
    values: dict[str, Any] = {
        "of": "logit of ' Paris' after position 3", "method": "integrated_gradients", "steps": 8, "error_term": True,
        "model": {"name": "tiny"}, "tokens": np.array([[0, 7, 8, 9]]), "texts": (("<s>", " a", EVIL, " c"),),
        "dictionaries": (first, second), "dictionary": np.array([0, 0, 0, 0, 1]), "context": np.zeros(5, int),
        "position": np.array([1, 2, 2, 3, 3]), "feature": np.array([4, 4, 6, -1, 4]),
        "activation": np.array([1.0, 2.0, 0.5, 10.0, 3.0]), "attribution": np.array([1.0, 2.0, -1.25, 0.75, 0.75]),
    }  # fmt: skip
    return Attribution(**{**values, **changes})


class FiresOn(Features):
    """A feature store that knows what its features fire on; those without tokens are dead."""

    def __init__(self, tokens: dict[int, list[str]]) -> None:
        self._peeks = tokens

    def __getitem__(self, index: int) -> Any:
        return SimpleNamespace(dead=not self._peeks[index], peek=self._peeks[index])


def printed(content: object, width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(content)
    return stream.getvalue()


def test_the_largest_come_first() -> None:
    attribution = make_attribution()
    assert [entry.attribution for entry in attribution.top()] == [2.0, -1.25, 1.0, 0.75, 0.75]
    assert attribution.top(2) == [
        Contribution("blocks.1.hook_resid_pre", 0, 2, EVIL, 4, 2.0, 2.0),
        Contribution("blocks.1.hook_resid_pre", 0, 2, EVIL, 6, 0.5, -1.25),
    ]
    assert attribution.top()[3].feature is None and attribution.top()[4].hook == "blocks.2.hook_mlp_out"
    assert len(attribution) == 5 and attribution.value == (5.0,)


def test_sums_by_feature_keep_dictionaries_apart() -> None:
    attribution = make_attribution()
    assert attribution.by_feature() == [
        FeatureTotal("blocks.1.hook_resid_pre", 4, 2, 3.0),
        FeatureTotal("blocks.1.hook_resid_pre", 6, 1, -1.25),
        FeatureTotal("blocks.1.hook_resid_pre", None, 1, 0.75),
        FeatureTotal("blocks.2.hook_mlp_out", 4, 1, 0.75),
    ]
    assert attribution.by_feature(1) == attribution.by_feature()[:1]
    assert attribution.of_dictionary(1).by_feature() == attribution.by_feature()[3:]


def test_completeness() -> None:
    first, second = make_attribution().dictionaries
    assert (first.change, first.gap, first.relative_gap) == ((3.0,), -0.5, pytest.approx(1 / 6))
    assert (second.gap, second.relative_gap) == (-0.25, 0.25)
    several = AttributedDictionary("a", "a", 9, "", (5.0, 1.0), (4.0, 1.5), (1.5, -0.25))
    assert (several.gap, several.relative_gap) == (0.5, pytest.approx(0.75 / 1.5)), "gaps do not cancel"
    assert AttributedDictionary("a", "a", 9, "", (5.0,), (5.0,), (0.0,)).relative_gap is None
    assert completeness_lines(make_attribution()) == [
        "blocks.1.hook_resid_pre, integrated gradients, 8 steps: all attributions add up to +2.5; with all features "
        "and errors at 0 the value is 2, from which it rises by +3; completeness gap -0.5 (16.67% of it).",
        "blocks.2.hook_mlp_out, integrated gradients, 8 steps: all attributions add up to +0.75; with all features and "
        "errors at 0 the value is 4, from which it rises by +1; completeness gap -0.25 (25.00% of it).",
    ]
    lines = completeness_lines(make_attribution(method="gradient_activation", error_term=False).of_dictionary(1))
    assert len(lines) == 1 and "hook_mlp_out, gradient × activation: all attributions" in lines[0]
    assert "with all features at 0" in lines[0]


def test_tables_name_tokens_features_and_what_they_fire_on() -> None:
    stores = {"blocks.1.hook_resid_pre": FiresOn({4: [" Paris", EVIL], 6: []})}
    text = printed(attribution_table(make_attribution(), 4, stores).in_terminal(200))
    assert text.startswith("logit of ' Paris' after position 3: 5\n") and "\x1b" not in text
    rows = [line.split() for line in text.splitlines()[3:]]
    assert rows[0] == [
        "blocks.1.hook_resid_pre", "2", "«[bold]�[31m↵»", "4", "2", "+2", "«", "Paris»", "«[bold]�[31m↵»",
    ]  # fmt: skip
    assert rows[1][-2:] == ["-1.25", "–"] and rows[3][-4:] == ["error", "10", "+0.75", "–"] and len(rows) == 4
    one = printed(attribution_table(make_attribution().of_dictionary(0)).in_terminal(80), 80)
    assert "hook point" not in one and "fires on" not in one and "«[bold]�[31m↵»" in one
    totals = printed(totals_table(make_attribution(), 2, stores).in_terminal(200)).splitlines()
    assert totals[3].split()[:4] == ["blocks.1.hook_resid_pre", "4", "2", "+3"] and len(totals) == 5
    two = make_attribution(tokens=np.zeros((2, 4), int), texts=(("a",) * 4,) * 2)
    assert printed(attribution_table(two, 1).in_terminal(200)).splitlines()[1].split()[2] == "context"


def test_json_and_back(tmp_path: Path) -> None:
    attribution = make_attribution()
    path = attribution.save(tmp_path / "new" / "paris.json")
    assert [file.name for file in path.parent.iterdir()] == ["paris.json"]
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["format"] == "sae-attribution" and record["attribution"] == [1.0, 2.0, -1.25, 0.75, 0.75]
    assert record["dictionaries"][0]["gap"] == -0.5
    read = Attribution.load(path)
    assert read.to_json() == attribution.to_json() and read.dictionaries == attribution.dictionaries
    assert read.top() == attribution.top() and read.texts == attribution.texts
    for kept, reason in (("attribution", "no format"), ("sae-attribution", "damaged")):
        KeptResult(Format(kept, 1), "paris.json").write(path.parent, {"of": "logit"})
        with pytest.raises(FormatError, match=rf"paris\.json.*{reason}"):
            Attribution.load(path)
