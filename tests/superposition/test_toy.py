"""The toy model: gradients, inputs, exact losses, and the geometry that training is known to find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.superposition import (
    ToyModels,
    ToyTraining,
    best_of_restarts,
    expected_loss,
    feature_dimensionality,
    is_pentagon,
    train_toy_models,
)
from sae.superposition.toy import loss_gradients, sample_inputs


def plain_loss(W: torch.Tensor, b: torch.Tensor, x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """One model's mean loss on a batch [batch, features], by its definition."""
    output = torch.relu(x @ W @ W.T + b)
    return (importance * (x - output) ** 2).sum(1).mean()


@pytest.mark.parametrize("case", ["random", "zero", "repeated", "silent"])
def test_gradients_are_those_of_autograd(case: str) -> None:
    generator = torch.Generator().manual_seed(1)
    W, b, x, importance = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 5, 2), (3, 5), (3, 5, 64), (3, 5))
    )
    x, importance = x.relu(), importance.abs()
    if case == "zero":
        W.zero_()
    elif case == "repeated":
        W[:, 1] = W[:, 0]
    elif case == "silent":
        b -= 100
    ours = loss_gradients(W, b, x, importance)
    W.requires_grad_()
    b.requires_grad_()
    for number in range(3):
        plain_loss(W[number], b[number], x[number].T, importance[number]).backward()
    assert W.grad is not None and b.grad is not None
    torch.testing.assert_close(ours[0], W.grad)
    torch.testing.assert_close(ours[1], b.grad)


def test_inputs_have_the_moments_of_a_uniform_number_that_is_there_with_probability_p() -> None:
    density = torch.tensor([1.0, 0.3, 0.02])
    x = sample_inputs(density, 4, 50_000, torch.Generator().manual_seed(0))
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    flat = x.double().flatten(1)
    for p, values in zip(density.tolist(), flat, strict=True):
        n = len(values)
        for moment, expected in ((values > 0, p), (values, p / 2), (values**2, p / 3)):
            error = float(moment.double().std()) / n**0.5 + 1e-4
            assert abs(float(moment.double().mean()) - expected) < 4 * error, (p, expected)
    present = (x[1] > 0).double()
    assert abs(float(torch.corrcoef(present)[0, 1])) < 4 / 50_000**0.5, "features are not independent"


def test_expected_loss_is_the_mean_over_many_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    models = ToyModels(
        torch.randn(3, 4, 2, generator=generator),
        0.1 * torch.randn(3, 4, generator=generator),
        torch.tensor([0.9, 0.3, 0.05]),
        torch.rand(3, 4, generator=generator),
    )
    exact = expected_loss(models)
    x = sample_inputs(models.density, 4, 200_000, torch.Generator().manual_seed(4)).mT
    errors = (models.importance[:, None] * (x - models.reconstruct(x)).square()).sum(2).double()
    deviations = (errors.mean(1) - exact) / (errors.std(1) / errors.shape[1] ** 0.5)
    assert deviations.abs().max() < 4, deviations


def test_expected_loss_of_known_configurations() -> None:
    """Ignored with its mean as bias: p/3 − p²/4. Antipodal without bias: p²/6 for each. Orthogonal: 0."""
    p = 0.37
    W = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    b = torch.tensor([[0.0, p / 2], [0.0, 0.0], [0.0, 0.0]])
    models = ToyModels(W, b, torch.full((3,), p), torch.tensor([[1.0, 2.0]]).expand(3, 2))
    expected = [2 * (p / 3 - p * p / 4), 3 * p * p / 6, 0]
    assert expected_loss(models, points=4096).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    large = ToyModels(torch.ones(1, 11, 2), torch.zeros(1, 11), torch.ones(1), torch.ones(1, 11))
    with pytest.raises(ConfigError, match="11 features: their 2,048 patterns are too many"):
        expected_loss(large)


def test_the_best_restart_is_kept() -> None:
    scales = torch.tensor([0.2, 1.0, 0.5, 0.9, 0.1, 0.3])
    W = scales[:, None, None] * torch.eye(2)
    models = ToyModels(W, torch.zeros(6, 2), torch.full((6,), 0.5), torch.ones(6, 2))
    best, losses = best_of_restarts(models, 3)
    assert best.W[:, 0, 0].tolist() == pytest.approx([1.0, 0.9])
    assert losses.tolist() == pytest.approx([0, float(expected_loss(models)[3])], abs=1e-12)


def test_training_follows_from_the_seed() -> None:
    density, importance = torch.tensor([0.5, 0.1]), torch.ones(2, 3)
    training = ToyTraining(steps=20, batch_size=16)
    first, again = (train_toy_models(density, importance, 2, training, seed=5) for _ in range(2))
    other = train_toy_models(density, importance, 2, training, seed=6)
    assert torch.equal(first.W, again.W) and torch.equal(first.b, again.b)
    assert not torch.allclose(first.W, other.W)


def test_without_superposition_the_largest_importances_are_kept() -> None:
    """Dense inputs: as many features as dimensions, exactly, and the mean of the others (Elhage et al. 2022)."""
    importance = torch.tensor([[0.3, 1.0, 0.1, 0.6, 0.2]]).repeat(4, 1)
    models = train_toy_models(torch.ones(4), importance, 2, ToyTraining(steps=3000, batch_size=256), seed=0)
    norms = models.W.norm(dim=2)
    assert norms[:, [1, 3]].flatten().tolist() == pytest.approx([1] * 8, abs=0.1)
    assert float(norms[:, [0, 2, 4]].max()) < 0.25
    floor = (0.3 + 0.1 + 0.2) / 12
    assert expected_loss(models).tolist() == pytest.approx([floor] * 4, rel=0.03)


@pytest.mark.parametrize("seed", [0, 1])
def test_sparse_features_make_a_pentagon(seed: int) -> None:
    """Five features in two dimensions, one run for each of ten initialisations; none is picked."""
    models = train_toy_models(torch.full((10,), 0.05), torch.ones(10, 5), 2, seed=seed)
    made = [is_pentagon(W) for W in models.W]
    assert sum(made) >= 8, [sorted(feature_dimensionality(W).tolist()) for W in models.W]
    assert (feature_dimensionality(models.W).sum(1) <= 2 + 1e-9).all()


def test_wrong_numbers_are_refused() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ConfigError, match=r"density 1\.5: expected a probability above 0 and up to 1"):
        train_toy_models(torch.tensor([0.5, 1.5]), ones, 2)
    with pytest.raises(ConfigError, match="density 0: expected"):
        train_toy_models(torch.tensor([0.5, 0.0]), ones, 2)
    with pytest.raises(ConfigError, match="importance -1: expected numbers of 0 or more"):
        train_toy_models(torch.ones(2), -ones, 2)
    with pytest.raises(ConfigError, match="hidden=0: expected at least one dimension"):
        train_toy_models(torch.ones(2), ones, 0)


def test_expected_loss_against_plain_python() -> None:
    """Patterns and a midpoint grid, written out for two features in one dimension."""
    w, b, p, importance = (0.9, -0.7), (0.05, 0.1), 0.4, (1.0, 2.0)
    grid = (np.arange(200) + 0.5) / 200
    total = 0.0
    for pattern in itertools.product((0, 1), repeat=2):
        weight = np.prod([p if here else 1 - p for here in pattern])
        x = [grid[:, None] * pattern[0] + 0 * grid[None], 0 * grid[:, None] + grid[None] * pattern[1]]
        h = w[0] * x[0] + w[1] * x[1]
        for i in range(2):
            total += weight * importance[i] * np.mean((x[i] - np.maximum(w[i] * h + b[i], 0)) ** 2)
    models = ToyModels(torch.tensor([w])[:, :, None], torch.tensor([b]), torch.tensor([p]), torch.tensor([importance]))
    assert float(expected_loss(models)) == pytest.approx(total, rel=1e-3)
