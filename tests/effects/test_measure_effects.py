"""Effects from changes, on disk and back, gone on with, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.activations import ActivationCache
from sae.effects import Effects, EffectSettings, measure_effects, read_effects
from sae.effects import known as known_effects
from sae.effects import measure as module
from sae.effects.effects import SORT_COLUMNS
from sae.effects.interventions import FIRING, RANDOM, Plan
from sae.effects.meter import ChangeMeter, Measured
from sae.effects.store import resume
from sae.effects.summarise import pearson
from sae.errors import ConfigError, DamagedError, FormatError, UnknownFeatureError
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel
from sae.model.vocabulary import Vocabulary
from sae.results.estimate import Estimate
from tests.support import evaluation_reference as reference
from tests.support.effect_case import DEAD, FEW, HEADS, POST, RESID, make_dictionary, measure


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a test of its own, and takes a second each time."""
    monkeypatch.setattr("sae.effects.store.draw_effects", lambda effects, changes: None)


def assert_same(one: Effects, other: Effects) -> None:
    """The same but for the rounding of products in batches of other sizes."""
    assert list(one.features) == list(other.features)
    for feature, effect in one.features.items():
        for name, value in effect.to_json().items():
            same = other[feature].to_json()[name]
            if name in ("raised", "lowered"):
                assert [token for token, _ in value] == [token for token, _ in same]
            elif isinstance(value, dict):
                for key in value:
                    expected = None if value[key] is None else pytest.approx(value[key], rel=1e-3, abs=1e-5)
                    assert same[key] == expected, (feature, name)
            else:
                assert same == pytest.approx(value, rel=1e-4), (feature, name)


def test_means_and_errors_are_those_of_the_changes(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    effects = measure(held_out, language_model, folder=tmp_path)
    known = resume(tmp_path, effects.key, 0.0)
    assert known is not None
    for feature, effect in effects.features.items():
        own = known[1].at(known[1].feature == feature)
        fires, random = own.at(own.kind == FIRING), own.at(own.kind == RANDOM)
        one = np.ones(len(fires))
        assert effect.positions == len(fires) == 6 and len(random) == 3
        assert effect.documents == len(set(fires.document.tolist())) > 2
        assert effect.activation == pytest.approx(fires.activation.mean())
        for name in ("loss", "loss_after", "kl", "kl_after", "direct"):
            value, error = reference.ratio(getattr(fires, name), one, fires.document)
            estimate = getattr(effect, name)
            assert (estimate.value, estimate.standard_error) == (pytest.approx(value), pytest.approx(error)), name
        above = [fires.kl[fires.row == row][0] - kl for row, kl in zip(random.row, random.kl, strict=True)]
        assert effect.kl_above_random.value == pytest.approx(np.mean(above))
        assert effect.random_kl.value == pytest.approx(random.kl.mean())
    assert effects[0].density == pytest.approx(density(held_out, 0))


def density(cache: ActivationCache, feature: int) -> float:
    dictionary, rows = make_dictionary(cache, RESID), []
    for batch in cache.contexts("held_out", RESID):
        assert batch.activations is not None
        rows.append(dictionary.encode(batch.activations[batch.eligible])[:, feature] > 0)
    return float(torch.cat(rows).double().mean())


def test_a_feature_that_never_fires_has_no_effect_and_no_pass(
    held_out: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the two tokens that the direct path is tried on. transformers reads the context that tells the model."""
    forward, shapes = type(language_model.bridge).forward, []

    def counted(self: Any, given: torch.Tensor, *rest: Any, **options: Any) -> Any:
        shapes.append(tuple(given.shape[:2]))
        return forward(self, given, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(language_model.bridge), "forward", counted)
        effect = measure(held_out, language_model, features=[DEAD])[DEAD]
    assert set(shapes) == {(1, 2)}
    assert effect.positions == effect.documents == effect.density == 0
    assert effect.loss == effect.kl == effect.loss_after == effect.direct == Estimate(0.0, None)
    assert effect.random_kl == Estimate(None, None)
    assert effect.raised == ()


def test_nothing_changes_by_a_factor_of_one(held_out: ActivationCache, language_model: LanguageModel) -> None:
    effect = measure(held_out, language_model, settings=EffectSettings(scale=1.0, positions=6, window=2))[1]
    assert effect.positions == 6
    for name in ("loss", "loss_after", "kl", "kl_after", "direct"):
        assert getattr(effect, name) == Estimate(0.0, 0.0), name


def test_tokens_named_are_those_of_the_gradient(held_out: ActivationCache, language_model: LanguageModel) -> None:
    """At the last residual: mean over places of d log p, by autograd through Hugging Face's modules, token by token."""
    hf, dictionary = language_model.bridge.original_model, make_dictionary(held_out, POST)
    settings = EffectSettings(positions=1000, null_positions=0, window=0, top=4)
    effect = measure(held_out, language_model, POST, settings=settings, features=[3])[3]
    total, places = torch.zeros(len(language_model.tokenizer)).double(), 0
    for batch in held_out.contexts("held_out", batch_contexts=1):
        x = language_model.activations(batch.tokens, [POST])[POST][0]
        for position in batch.eligible[0, :-1].nonzero().flatten().tolist():
            f = dictionary.encode(x[position])[3]
            if f > 0:
                _, change = torch.autograd.functional.jvp(  # by two backward passes
                    lambda v: hf.lm_head(hf.transformer.ln_f(v)).log_softmax(-1),
                    (x[position],),
                    (-f * dictionary.W_dec[3],),
                )
                assert isinstance(change, torch.Tensor)
                total, places = total + change.double(), places + 1
    assert effect.positions == places
    mean, vocabulary = total / places, Vocabulary.of(language_model.tokenizer)
    for found, order in ((effect.raised, mean.argsort(descending=True)), (effect.lowered, mean.argsort())):
        assert [token for token, _ in found] == [vocabulary.text(token) for token in order[:4].tolist()]
        assert [change for _, change in found] == pytest.approx(mean[order[:4]].tolist(), rel=1e-3)


def test_correlations_and_their_null(held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path) -> None:
    """At the last residual the direct effect is the first order of the measured one; blocks before it blur that."""
    settings = EffectSettings(scale=0.5, positions=8, null_positions=0, window=0)
    last, middle = (
        measure(held_out, language_model, hook, settings=settings, features=None, folder=tmp_path / hook)
        for hook in (POST, RESID)
    )
    for effects in (last, middle):
        for correlation in (effects.over_features, effects.over_positions):
            assert correlation is not None and correlation.value is not None
            assert correlation.low is not None and correlation.high is not None
            assert -0.6 < correlation.low < 0 < correlation.high < 0.6
    assert last.over_features is not None and middle.over_features is not None and last.over_positions is not None
    assert (last.over_features.value or 0) > 0.9 > (middle.over_features.value or 0)
    assert (last.over_positions.value or 0) > 0.9
    known = resume(tmp_path / POST, last.key, 0.5)
    assert known is not None
    pairs = [(effect.direct.value, effect.loss.value) for effect in last.features.values() if effect.direct]
    assert last.over_features.value == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])
    assert last.over_positions.count == len(known[1]) > last.over_features.count == len(pairs)
    assert last.over_positions.value == pytest.approx(np.corrcoef(known[1].direct, known[1].loss)[0, 1])
    assert pearson(np.ones(3), np.arange(3.0)) is None and pearson(np.ones(1), np.ones(1)) is None


def test_where_the_direct_path_is_not_known(held_out: ActivationCache, language_model: LanguageModel) -> None:
    effects = measure(held_out, language_model, HEADS)
    assert effects.over_features is None and effects.over_positions is None
    assert effects[0].direct is None and effects[0].raised == ()
    assert effects[0].kl.value and effects[0].kl.value > 0
    assert effects.sorted_by("direct")


def watch(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Features in the order in which they are measured; a Ctrl-C after so many groups."""
    measured: list[int] = []
    groups = 0
    original = ChangeMeter.measure

    def count(self: ChangeMeter, plan: Plan, progress: Any = None) -> Measured:
        nonlocal groups
        if groups == stop_after:
            raise KeyboardInterrupt
        groups += 1
        measured.extend(np.unique(plan.feature).tolist())
        return original(self, plan, progress)

    monkeypatch.setattr(ChangeMeter, "measure", count)
    return measured


def test_what_was_measured_is_not_measured_again(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = watch(monkeypatch)
    measure(held_out, language_model, folder=tmp_path, features=[4, 1])
    assert measured == [1, 4]
    more = measure(held_out, language_model, folder=tmp_path, features=[1, 4, 9, DEAD])
    assert measured == [1, 4, 9]
    assert list(more.features) == [1, 4, DEAD, 9]
    whole = read_effects(tmp_path)
    assert list(whole.features) == [1, 4, 5, 9]
    assert_same(whole, measure(held_out, language_model, features=[9, 1, 5, 4]))
    del measured[:]
    again = measure(held_out, language_model, folder=tmp_path, features=[9])
    assert measured == [] and list(again.features) == [9] and again[9] == whole[9]


def test_killed_before_the_markdown_the_same_call_writes_it(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(held_out, language_model, folder=tmp_path, features=[4])
    with monkeypatch.context() as patch:
        patch.setattr("sae.effects.store.markdown", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            measure(held_out, language_model, folder=tmp_path, features=[4, 1])
    assert not (tmp_path / "effects.md").exists(), "that of one feature"
    measured = watch(monkeypatch)
    measure(held_out, language_model, folder=tmp_path, features=[4, 1])
    assert measured == [] and (tmp_path / "effects.md").is_file()


def test_an_interrupted_measurement_goes_on(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEATURES_AT_ONCE", 2)
    with monkeypatch.context() as patch:
        watch(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            measure(held_out, language_model, folder=tmp_path, features=range(7))
    assert list(read_effects(tmp_path).features) == [0, 1, 2, 3]
    measured = watch(monkeypatch)
    effects = measure(held_out, language_model, folder=tmp_path, features=range(7))
    assert measured == [4, 6], "5 never fires"
    assert_same(effects, measure(held_out, language_model, features=range(7)))


def test_saved_between_groups(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses what came after the last save: changes of features that the JSON does not know are dropped."""
    monkeypatch.setattr(module, "_FEATURES_AT_ONCE", 1)
    monkeypatch.setattr(known_effects, "_SECONDS_BETWEEN_SAVES", 0)
    monkeypatch.setattr(known_effects, "_SAVES_SHARE", math.inf)
    kept, save = [], known_effects.save_effects
    monkeypatch.setattr(
        known_effects, "save_effects", lambda *saved: kept.append(list(saved[0].features)) or save(*saved)
    )
    effects = measure(held_out, language_model, folder=tmp_path)
    assert kept == [[0], [0, 1], [0, 1, 2]]
    record = json.loads((tmp_path / "effects.json").read_text())
    record["features"] = record["features"][:2]
    write_json(tmp_path / "effects.json", record)
    known = resume(tmp_path, effects.key, 0.0)
    assert known is not None and sorted(set(known[1].feature.tolist())) == [0, 1]


def test_stale_results_are_not_reused_and_damaged_ones_named(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    first = measure(held_out, language_model, folder=tmp_path, features=[0])
    keys = {first.key}
    for settings in (
        EffectSettings(positions=5, null_positions=3, window=2, top=4),
        EffectSettings(positions=6, null_positions=3, window=2, top=4, seed=1),
        EffectSettings(positions=6, null_positions=3, window=2, top=4, tokens=64),
    ):
        other = measure(held_out, language_model, folder=tmp_path, features=[1], settings=settings)
        assert list(read_effects(tmp_path).features) == [1], "the other one's features are gone"
        keys.add(other.key)
    dictionary = make_dictionary(held_out, RESID, seed=7)
    other = measure_effects(
        dictionary, held_out, language_model, hook=RESID, features=[2], settings=FEW, folder=tmp_path
    )
    keys.add(other.key)
    assert len(keys) == 5
    assert list(read_effects(tmp_path).features) == [2]
    doubled = EffectSettings(scale=2.0, positions=6, null_positions=3, window=2)
    measure(held_out, language_model, folder=tmp_path, features=[3], settings=doubled)
    assert list(read_effects(tmp_path).features) == [2], "doubling has files of its own"
    assert list(read_effects(tmp_path / "effects-2.json").features) == [3]

    content = (tmp_path / "effects.safetensors").read_bytes()
    (tmp_path / "effects.safetensors").write_bytes(content[:50])
    with pytest.raises(DamagedError, match=r"effects.safetensors': damaged or changed"):
        resume(tmp_path, other.key, 0.0)
    (tmp_path / "effects.safetensors").write_bytes(content)
    assert resume(tmp_path, other.key, 0.0) is not None
    assert resume(tmp_path, first.key, 0.0) is None
    (tmp_path / "effects.json").write_text("{")
    with pytest.raises(DamagedError, match=r"effects.json': damaged or changed"):
        resume(tmp_path, other.key, 0.0)


def test_json_and_back(held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path) -> None:
    effects = measure(held_out, language_model, folder=tmp_path, features=[0, DEAD])
    assert read_effects(tmp_path) == effects
    record = effects.to_json()
    with pytest.raises(FormatError, match="not of this toolkit"):
        Effects.from_json({"format": "other"})
    with pytest.raises(FormatError, match="format version 9 is newer than this package reads"):
        Effects.from_json({**record, "format_version": 9})
    for damaged in ({**record, "features": [{}]}, {**record, "settings": {"size": 3}}, {**record, "features": None}):
        with pytest.raises(FormatError, match="effects: damaged"):
            Effects.from_json(damaged)
    with pytest.raises(FormatError, match=r"no effects.json there; make it with 'sae effects RUN'"):
        read_effects(tmp_path / "none")
    write_json(tmp_path / "effects.json", [])
    with pytest.raises(FormatError, match=r"not of this toolkit.*; delete it and run the same 'sae effects' again"):
        read_effects(tmp_path)


def test_order(held_out: ActivationCache, language_model: LanguageModel) -> None:
    effects = measure(held_out, language_model, features=[0, 1, 2, 3, DEAD])
    losses = [abs(effect.loss.value or 0) for effect in effects.sorted_by("loss")]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0
    assert [effect.feature for effect in effects.sorted_by("feature")] == [0, 1, 2, 3, 5]
    assert effects.sorted_by("kl", descending=False)[0].feature == DEAD
    for column in SORT_COLUMNS:
        assert len(effects.sorted_by(column)) == 5
    with pytest.raises(ConfigError, match="column 'size': effects are sorted by kl, loss, kl_after"):
        effects.sorted_by("size")
    with pytest.raises(
        UnknownFeatureError, match=r"feature 7: its effect was not measured; measure it with 'sae effects RUN 7'"
    ):
        effects[7]


def test_features_are_drawn_from_those_that_fire(held_out: ActivationCache, language_model: LanguageModel) -> None:
    settings = EffectSettings(positions=1, null_positions=0, window=0)
    every = measure(held_out, language_model, features=None, settings=settings)
    assert DEAD not in every.features and 30 < len(every) < 48
    few = measure(held_out, language_model, features=None, sample=7, settings=settings)
    assert len(few) == 7 and set(few.features) < set(every.features)
    other = EffectSettings(positions=1, null_positions=0, window=0, seed=1)
    assert set(measure(held_out, language_model, features=None, sample=7, settings=other).features) != set(few.features)
    dictionary = make_dictionary(held_out, RESID)
    dictionary.b_enc.fill_(-1e6)
    with pytest.raises(ConfigError, match=r"none of the 48 features fires in the [0-9]+ held-out tokens read"):
        measure_effects(dictionary, held_out, language_model, hook=RESID, settings=settings)


def test_a_window_longer_than_a_context_is_the_rest_of_it(held_out: ActivationCache, language_model) -> None:
    rest, more = (
        measure(held_out, language_model, settings=EffectSettings(positions=6, null_positions=0, window=window))
        for window in (held_out.context_length - 1, 10**12)
    )
    assert_same(rest, more)
