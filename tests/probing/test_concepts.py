"""Planted features are found, nulls hold their rate, groups stay whole, and numbers are those of slow references."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import sae
from sae.errors import DataError, ShapeError
from sae.probing import ConceptConfig, find_concept
from sae.probing.activations import LabelledActivations, RowTexts
from sae.probing.concepts import find_in_examples
from sae.probing.scores import auc, auc_difference
from sae.probing.splits import split_in_halves

QUICK = ConceptConfig(permutations=99)


class Positive:
    """Each latent is the positive part of one number."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0)


def planted(count: int = 160, columns: int = 40, seed: int = 0, shift: float = 3.0) -> tuple[torch.Tensor, list[str]]:
    """Noise of which few numbers are positive; number 7 is higher by `shift` with the label `yes`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator) - 1.5
    labels = ["yes" if number % 2 else "no" for number in range(count)]
    x[1::2, 7] += shift
    return x, labels


def test_a_planted_feature_is_found_and_scored_on_the_other_half() -> None:
    x, labels = planted()
    result = find_concept(Positive(), x, labels, QUICK)
    best = result.best
    assert (best.index, result.neuron.index, result.neuron.sign) == (7, 7, 1)
    assert best.p == 0.01, "none of 99 shuffles does as well, and the given labels count as one draw"
    assert result.examples == result.held_out == (40, 40)
    assert result.groups == (80, 80)
    exact = 1 - 0.5 * math.erfc(3 / math.sqrt(2) / math.sqrt(2))
    assert best.auc.value == pytest.approx(exact, abs=4 * best.auc.standard_error + 0.02)
    assert best.fires_with == pytest.approx(0.933, abs=0.12), "P(N(1.5, 1) > 0)"
    assert best.fires_without == pytest.approx(0.067, abs=0.12)
    assert [feature.search_auc for feature in result.features] == sorted(
        (feature.search_auc for feature in result.features), reverse=True
    )
    assert len(result.features) == 10 and result.d_sae == 40
    assert result.features[1].p > 0.05


def test_the_scores_are_scikit_learn_s_on_rows_split_by_hand() -> None:
    x, labels = planted(shift=1.0)
    settings = QUICK.model_copy(update={"seed": 3, "listed": 40})
    result = find_concept(Positive(), x, labels, settings)
    truth = np.array(labels) == "yes"
    halves = split_in_halves(
        truth, np.arange(160), sae.numerics.seeding.numpy_generator("concepts: halves", 3), "labels"
    )
    latents = x.clamp(min=0).numpy()
    for feature in result.features:
        searched, scored = (
            roc_auc_score(truth[rows], latents[rows, feature.index]) for rows in (halves.search, halves.held_out)
        )
        assert feature.search_auc == pytest.approx(searched, abs=1e-12)
        assert feature.auc.value == pytest.approx(scored, abs=1e-12)
    rows = halves.held_out
    difference = auc_difference(
        truth[rows], latents[rows, result.best.index], result.neuron.sign * x.numpy()[rows, result.neuron.index], rows
    )
    assert result.gain == difference


def test_a_neuron_may_be_lower_with_the_concept_and_a_feature_may_not() -> None:
    x, labels = planted()
    x[:, 7] *= -1
    result = find_concept(Positive(), x, labels, QUICK)
    assert (result.neuron.index, result.neuron.sign) == (7, -1)
    assert result.neuron.auc.value > 0.9
    assert result.best.index != 7
    assert result.to_json()["neuron"]["sign"] == -1


def test_without_an_effect_p_is_uniform_and_held_out_areas_are_a_half() -> None:
    """A hundred searches among 30 columns of noise: each p is at most q in about a share q of them."""
    ps, values, errors = [], [], []
    for seed in range(100):
        x, labels = planted(count=48, columns=30, seed=seed, shift=0.0)
        result = find_concept(Positive(), x + 2, labels, QUICK.model_copy(update={"seed": seed}))  # with few ties
        ps.append(result.best.p)
        values.append(result.best.auc.value)
        errors.append(result.best.auc.standard_error)
        assert result.best.search_auc > 0.5
    ps = np.array(ps)
    for level in (0.1, 0.3, 0.5, 0.8):
        assert abs((ps <= level).mean() - level) < 3.5 * math.sqrt(level * (1 - level) / 100), level
    assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / 10
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.35)


def test_the_null_is_what_searches_with_shuffled_labels_find() -> None:
    x, labels = planted(count=48, columns=30, shift=0.0)
    result = find_concept(Positive(), x, labels, ConceptConfig(permutations=400))
    best = []
    for seed in range(60):
        noise, _ = planted(count=48, columns=30, seed=1000 + seed, shift=0.0)
        best.append(find_concept(Positive(), noise, labels, ConceptConfig(permutations=19, seed=seed)).best.search_auc)
    assert result.null.search_auc == pytest.approx(np.mean(best), abs=4 * np.std(best) / math.sqrt(60) + 0.01)
    assert result.null.search_auc < result.null.search_high < 1
    assert abs(result.null.auc - 0.5) < 0.02
    assert 0.02 < result.null.deviation < 0.2


def test_what_the_examples_of_a_group_share_does_not_stand_out() -> None:
    """Number 7 marks groups, not the label: groups have the label in different shares, as books have a concept."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 20)
    labels = rng.random(240) < np.where(groups % 2, 0.8, 0.2)
    x = torch.from_numpy(rng.normal(size=(240, 20)).astype(np.float32)) - 1.5
    x[groups % 2 == 1, 7] += 4
    grouped = find_concept(Positive(), x, labels.tolist(), QUICK, groups=groups.tolist())
    free = find_concept(Positive(), x, labels.tolist(), QUICK)
    assert grouped.best.index == free.best.index == 7
    assert free.best.p == 0.01
    assert grouped.best.p > 0.05, "shuffled within groups, labels are as far from chance"


def test_of_equal_areas_the_larger_difference_is_first() -> None:
    x, labels = planted(shift=0.0)
    positive = torch.tensor([label == "yes" for label in labels])
    x[:, 3] = torch.where(positive, 1.0 + torch.arange(160) / 8, -1.0)  # spread out
    x[:, 20] = torch.where(positive, 1.0, -1.0)
    result = find_concept(Positive(), x, labels, QUICK)
    assert [(one.index, one.search_auc) for one in result.features[:2]] == [(20, 1.0), (3, 1.0)]


def test_no_group_is_in_both_halves() -> None:
    rng = np.random.default_rng(5)
    groups = rng.integers(0, 30, size=200)
    labels = rng.random(200) < 0.4
    halves = split_in_halves(labels, groups, np.random.default_rng(0), "data")
    assert not set(groups[halves.search]) & set(groups[halves.held_out])
    assert sorted([*halves.search, *halves.held_out]) == list(range(200))
    assert abs(len(set(groups[halves.search])) - 15) <= 1


def test_the_error_of_a_difference_is_that_of_paired_resampling() -> None:
    differences, errors = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        labels = rng.random(80) < 0.5
        shared = rng.normal(size=80)
        first = labels + shared + 0.5 * rng.normal(size=80)
        second = 0.6 * labels + shared + 0.5 * rng.normal(size=80)
        found = auc_difference(labels, first, second, np.arange(80))
        alone = [auc(labels, one, np.arange(80)) for one in (first, second)]
        assert found.value == pytest.approx(alone[0].value - alone[1].value, abs=1e-12)
        differences.append(found.value)
        errors.append(found.standard_error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(differences), rel=0.1)
    labels = np.array([True, False])
    assert auc_difference(labels, np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.arange(2)).standard_error is None


def with_texts(x: torch.Tensor, labels: list[str]) -> LabelledActivations:
    """Two rows per example: the numbers, and nothing; the tokens of a text are its number and `end`."""
    count = len(labels)
    rows = torch.stack([x, torch.full_like(x, -1.0)], 1).flatten(0, 1)
    context = tuple(number for number in range(count) for _ in range(2))
    return LabelledActivations(
        rows, torch.tensor(context), tuple(labels), torch.arange(count),
        texts=RowTexts(tuple(("<s>", str(number), " end") for number in range(count)), context, (1, 2) * count),
    )  # fmt: skip


def test_examples_show_where_the_feature_fires_in_held_out_texts() -> None:
    x, labels = planted(shift=2.0)
    result = find_in_examples(Positive(), with_texts(x, labels), QUICK, "texts")
    best = result.best
    assert best.index == 7
    held_out = split_in_halves(
        np.array(labels) == "yes", np.arange(160), sae.numerics.seeding.numpy_generator("concepts: halves", 0), "texts"
    ).held_out
    values = x[held_out, 7].clamp(min=0) / 2
    strongest = held_out[values.argsort(descending=True, stable=True)[:6].numpy()]
    for example, number in zip(best.examples[:6], strongest, strict=True):
        assert example.tokens == ["<s>", str(number), " end"]
        assert example.activations == [0.0, pytest.approx(float(x[number, 7])), 0.0]
        assert (example.position, example.positive) == (1, labels[number] == "yes")
        assert example.value == pytest.approx(float(x[number, 7]) / 2)
    missed = best.examples[6:]
    assert len(missed) == 2 and all(example.positive for example in missed)
    assert max(example.value for example in missed) <= float(np.median(values))


def test_the_result_is_json_with_its_format() -> None:
    x, labels = planted()
    record = json.loads(json.dumps(find_in_examples(Positive(), with_texts(x, labels), QUICK, "texts").to_json()))
    assert (record["format"], record["format_version"], record["positive"]) == ("sae-concept", 1, "yes")
    assert record["features"][0]["index"] == 7 and "sign" not in record["features"][0]
    assert record["features"][0]["auc"]["standard_error"] > 0
    assert record["settings"]["permutations"] == 99
    assert record["null"].keys() == {"search_auc", "search_high", "auc", "deviation"}


def test_the_label_of_the_concept_can_be_named() -> None:
    x, _ = planted()
    labels = ["abc"[number % 3] for number in range(160)]
    with pytest.raises(DataError, match=r"data 'labels': several labels; set positive=LABEL to one of: 'a', 'b', 'c'"):
        find_concept(Positive(), x, labels, QUICK)
    with pytest.raises(DataError, match=r"data 'labels': no label 'd'; set positive=LABEL to one of"):
        find_concept(Positive(), x, labels, ConceptConfig(positive="d"))
    result = find_concept(Positive(), x, labels, QUICK.model_copy(update={"positive": "a"}))
    assert result.positive == "a"
    assert sum(result.examples) + sum(result.held_out) == 160


def test_bad_input_is_refused_in_one_line() -> None:
    x, labels = planted()
    with pytest.raises(DataError, match=r"data 'labels': all labels are 'yes'; at least two classes are needed"):
        find_concept(Positive(), x, ["yes"] * 160, QUICK)
    with pytest.raises(DataError, match=r"data 'labels': 1 example of 'no', at least 12 are needed; add some"):
        find_concept(Positive(), x, ["no"] + ["yes"] * 159, QUICK)
    with pytest.raises(DataError, match=r"data 'labels': 0 examples on one side of a half, expected at least 2: give"):
        find_concept(Positive(), x, labels, QUICK, groups=[0] * 160)
    with pytest.raises(ShapeError, match="160 activations, 159 labels"):
        find_concept(Positive(), x, labels[:-1], QUICK)
    with pytest.raises(DataError, match="infinite or not a number"):
        find_concept(Positive(), x.index_fill(0, torch.tensor([3]), math.nan), labels, QUICK)


def test_a_search_repeats_exactly_and_follows_its_seed() -> None:
    x, labels = planted(shift=0.5)
    first, again = (find_concept(Positive(), x, labels, QUICK) for _ in range(2))
    assert first.to_json() == again.to_json()
    other = find_concept(Positive(), x, labels, QUICK.model_copy(update={"seed": 1}))
    assert first.null != other.null
