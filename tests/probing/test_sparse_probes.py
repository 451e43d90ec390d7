"""Probes on planted data: what they must find, what they must not, and scikit-learn beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

import sae
from sae.errors import DataError, ShapeError
from sae.numerics.seeding import numpy_generator
from sae.probing.activations import LabelledActivations
from sae.probing.settings import ProbeConfig
from sae.probing.sparse_probes import ProbeResult, probe_examples
from sae.probing.splits import split_examples


class Columns:
    """A dictionary whose latents are some columns of what it is given, or any function of it."""

    def __init__(self, function) -> None:
        self.encode = function


def noise(count: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def balanced(count: int, seed: int = 0) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order % 2 == 0


QUICK = ProbeConfig(k=(1, 3), splits=2)


def test_a_latent_that_is_the_label_is_found() -> None:
    labels = balanced(200)
    x = noise(200, 6)

    def encode(rows: Tensor) -> Tensor:
        place = (rows[:, None] == x[None]).all(-1).int().argmax(1)
        return torch.cat([noise(200, 30, seed=1)[place].relu(), 3.0 * labels[place, None]], 1)

    result = sae.probe(Columns(encode), x, labels.tolist(), QUICK)
    one = result.methods["latents-1"]
    assert one.columns == {"True": [[30], [30]]}
    assert one.scores.auc.value == one.scores.accuracy.value == one.scores.f1.value == 1
    assert result.methods["latents-3"].scores.auc.value == 1
    null = one.shuffled
    assert null is not None
    assert null.auc.value < 0.75
    assert result.methods["neurons-all"].scores.auc.value < 0.75
    majority = result.methods["majority"].scores
    assert majority.accuracy.value == pytest.approx(0.5)
    assert majority.f1.value == pytest.approx(2 / 3)
    assert result.parts == (120, 30, 50)
    assert result.examples == {"False": 100, "True": 100}


def test_the_null_of_a_label_that_all_columns_tell_is_chance() -> None:
    """Scored on true test labels, it would be near 0 or 1: whatever it hits on is the label or its opposite."""
    labels = balanced(400)
    x = 0.1 * noise(400, 8) + torch.where(labels, 1.0, -1.0)[:, None]
    for seed in range(3):
        settings = ProbeConfig(k=(1,), splits=1, pca=False, seed=seed)
        result = sae.probe(Columns(torch.relu), x, labels.tolist(), settings)
        for name, method in result.methods.items():
            if name != "majority":
                null = method.shuffled
                assert method.scores.auc.value > 0.99
                assert null is not None
                assert null.auc.standard_error is not None
                assert 0.04 < null.auc.standard_error < 0.07, name
                assert abs(null.auc.value - 0.5) < 3.3 * null.auc.standard_error, name


def test_noise_scores_what_the_null_scores() -> None:
    labels = balanced(600, seed=2)
    settings = ProbeConfig(k=(1, 5), splits=1)
    result = sae.probe(Columns(torch.relu), noise(600, 40, seed=3), labels.tolist(), settings)
    assert len(result.methods) == 9
    for name, method in result.methods.items():
        if name != "majority":
            for scores in (method.scores, method.shuffled):
                assert scores is not None
                error = scores.auc.standard_error
                assert error is not None
                assert 0.02 < error < 0.07, name
                assert abs(scores.auc.value - 0.5) < 3.3 * error, name


def test_a_latent_that_tells_only_test_labels_is_not_chosen() -> None:
    labels = balanced(200)
    settings = ProbeConfig(k=(1,), splits=1, pca=False)
    split = split_examples(
        [str(bool(one)) for one in labels], np.arange(200), rng=numpy_generator("probes: splits", 0, 0),
        test_fraction=settings.test_fraction, validation_fraction=settings.validation_fraction,
    )  # fmt: skip
    honest = (labels ^ (torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.3)).float()
    leak = torch.rand(200, generator=torch.Generator().manual_seed(2)) * 5
    leak[split.test] = 100.0 * labels[split.test]
    result = sae.probe(Columns(lambda rows: rows), torch.stack([honest, leak / 5], 1), labels.tolist(), settings)
    assert result.methods["latents-1"].columns == {"True": [[0]]}
    accuracy = float((honest[split.test].bool() == labels[split.test]).float().mean())
    assert result.methods["latents-1"].scores.accuracy.value == pytest.approx(accuracy)
    assert 0.55 < accuracy < 0.85


def test_one_against_the_rest_is_scikit_learn_class_by_class() -> None:
    count = 240
    classes = np.array(["ant", "bee", "cow"])[np.arange(count) % 3]
    x = noise(count, 4, seed=5)
    x[:, 0] += torch.tensor((classes == "bee") * 2.0)
    x[:, 1] += torch.tensor((classes == "cow") * 1.0)
    settings = ProbeConfig(k=(2,), splits=1, pca=False)
    result = sae.probe(Columns(torch.relu), x, classes.tolist(), settings)
    assert result.classes == ("ant", "bee", "cow")
    split = split_examples(
        classes.tolist(), np.arange(count), rng=numpy_generator("probes: splits", 0, 0),
        test_fraction=0.25, validation_fraction=0.15,
    )  # fmt: skip
    data = x.double().numpy()
    z = (data - data[split.train].mean(0)) / data[split.train].std(0)
    aucs = []
    for name in result.classes:
        strength = result.methods["neurons-all"].strengths[name][0]
        direct = LogisticRegression(C=strength, tol=1e-9).fit(z[split.fitted], classes[split.fitted] == name)
        aucs.append(roc_auc_score(classes[split.test] == name, direct.decision_function(z[split.test])))
    assert result.methods["neurons-all"].scores.auc.value == pytest.approx(float(np.mean(aucs)), abs=2e-3)
    assert result.methods["majority"].scores.accuracy.value == pytest.approx(2 / 3)
    assert result.methods["neurons-2"].columns["bee"][0][0] == 0


def test_the_ranking_decides_which_neuron_is_best() -> None:
    labels = balanced(300)
    loud = 50 * noise(300, 1, seed=1) + 10 * labels[:, None]
    small = 0.1 * noise(300, 1, seed=2) + 0.5 * labels[:, None]
    x = torch.cat([loud, small], 1)
    by_difference = ProbeConfig(k=(1,), splits=1, pca=False, ranking="difference")
    standardised = ProbeConfig(k=(1,), splits=1, pca=False, ranking="standardised")
    for settings, best in ((by_difference, 0), (standardised, 1)):
        result = sae.probe(Columns(torch.relu), x, labels.tolist(), settings)
        assert result.methods["neurons-1"].columns == {"True": [[best]]}


def test_groups_widen_errors_and_keep_copies_together() -> None:
    """Every example four times: as if independent, copies of test examples are among the training ones."""
    labels = balanced(120)
    x = noise(120, 300, seed=1)
    four = [x.repeat_interleave(4, 0), labels.repeat_interleave(4).tolist()]
    settings = ProbeConfig(k=(1,), splits=1, pca=False)
    leaking = sae.probe(Columns(torch.relu), *four, settings)
    grouped = sae.probe(Columns(torch.relu), *four, settings, groups=torch.arange(120).repeat_interleave(4).tolist())
    assert leaking.methods["neurons-all"].scores.auc.value > 0.95
    error = grouped.methods["neurons-all"].scores.auc.standard_error
    assert error is not None
    assert abs(grouped.methods["neurons-all"].scores.auc.value - 0.5) < 3.3 * error
    assert grouped.groups == 120


def test_results_depend_on_the_seed_alone_and_survive_json() -> None:
    x, labels = noise(150, 12), balanced(150).tolist()
    settings = ProbeConfig(k=(2,), splits=2, pca=False)
    first, again = (sae.probe(Columns(torch.relu), x, labels, settings) for _ in range(2))
    other = sae.probe(Columns(torch.relu), x, labels, settings.model_copy(update={"seed": 9}))
    assert first == again
    assert first != other
    assert ProbeResult.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_data_sets_of_the_same_labels_have_nulls_of_their_own() -> None:
    """Else chance goes the same way in all, and the standard error over data sets does not tell of it."""
    labels, count = tuple(map(str, balanced(150).tolist())), torch.arange(150)
    data = LabelledActivations(noise(150, 12), count, labels, count)
    settings = ProbeConfig(k=(1,), splits=1, pca=False)
    first, second = (probe_examples(Columns(torch.relu), data, settings, name) for name in ("a", "b"))
    for method in ("latents-1", "neurons-all"):
        assert first.methods[method].scores == second.methods[method].scores
        assert first.methods[method].shuffled != second.methods[method].shuffled


def test_numbers_of_columns_that_there_are_not_are_left_out() -> None:
    result = sae.probe(Columns(torch.relu), noise(100, 4), balanced(100).tolist(), ProbeConfig(splits=1))
    assert [name for name in result.methods if name.startswith("neurons")] == ["neurons-1", "neurons-2", "neurons-all"]


def test_a_dictionary_of_the_package_is_probed() -> None:
    dictionary = sae.TopK(6, 20, k=3)
    torch.nn.init.normal_(dictionary.W_enc, generator=torch.Generator().manual_seed(0))
    result = sae.probe(dictionary, noise(100, 6), balanced(100).tolist(), ProbeConfig(k=(1,), splits=1))
    assert 0 <= result.methods["latents-1"].columns["True"][0][0] < 20


def test_bad_input() -> None:
    x = noise(60, 3)
    dictionary = Columns(torch.relu)
    with pytest.raises(ShapeError, match=r"60 activations, 3 labels: expected one for each"):
        sae.probe(dictionary, x, [1, 2, 3])
    with pytest.raises(DataError, match=r"all labels are 'yes'; at least two classes are needed"):
        sae.probe(dictionary, x, ["yes"] * 60)
    with pytest.raises(DataError, match=r"5 examples of 'yes', at least 12 are needed"):
        sae.probe(dictionary, x, ["yes"] * 5 + ["no"] * 55)
    with pytest.raises(DataError, match=r"70 different labels, such as .0.: probes tell at most 64 classes apart"):
        sae.probe(dictionary, noise(70, 3), list(range(70)))
    with pytest.raises(DataError, match="infinite or not a number"):
        sae.probe(dictionary, x.log(), balanced(60).tolist())
    with pytest.raises(ShapeError, match=r"expected finite ones of \[60, d_sae\] from encode"):
        sae.probe(Columns(lambda rows: rows[0]), x, balanced(60).tolist())
    with pytest.raises(ShapeError, match=r"this dictionary takes \[..., 4\]"):
        sae.probe(sae.TopK(4, 8, k=2), x, balanced(60).tolist())


def test_labels_of_numbers_are_equal_as_numbers_are() -> None:
    labels, x = balanced(200), noise(200, 4)
    mixed = [[int(one), float(one), bool(one)][place % 3] for place, one in enumerate(labels.tolist())]
    found = sae.probe(Columns(torch.relu), x, mixed, QUICK)
    assert found.examples == {"0": 100, "1": 100}
    assert sae.probe(Columns(torch.relu), x, list(labels.int().numpy()), QUICK).to_json() == found.to_json()
    with pytest.raises(DataError, match=r"labels\[3\] is nan: leave out the examples that have no label"):
        sae.probe(Columns(torch.relu), x, [*mixed[:3], np.float32("nan"), *mixed[4:]], QUICK)
    with pytest.raises(
        DataError, match=r"labels\[199\] is 'x', and labels\[0\] is .*: expected text alone, or numbers"
    ):
        sae.probe(Columns(torch.relu), x, [*mixed[:199], "x"], QUICK)
