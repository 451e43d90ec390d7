"""Firing record, initialisation, decoder norm and schedules against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae.architectures import TopK
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.training import IterableSource
from sae.training.firing import FiringRecord, default_dead_after
from sae.training.initialise import geometric_median, initialise_
from sae.training.objectives import StepInputs
from sae.training.recipe import Recipe
from sae.training.schedules import default_learning_rate, learning_rate, warmed_up
from sae.training.trainer import Trainer


def test_dead_features_are_counted_in_tokens() -> None:
    record = FiringRecord(3, dead_after=100, device=torch.device("cpu"), refresh_every=1)
    for step, fired in enumerate([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]], 1):
        record.record(10.0 * torch.tensor(fired), torch.tensor(1.5), 40, step)
    assert record.silent_tokens.tolist() == [0, 120, 0]
    assert record.dead.tolist() == [False, True, False]
    assert record.candidates.tolist() == [1]
    assert record.density == 0.5
    assert record.take_densities().tolist() == [0.25, 0.0625, 0.0625]
    record.record(torch.tensor([0.0, 8.0, 0.0]), torch.tensor(1.5), 40, 5)
    assert record.take_densities().tolist() == pytest.approx([0, 0.2, 0])


def test_a_feature_is_dead_after_the_average_one_would_have_fired_64_times() -> None:
    """32 of 4,608 features per token: the average feature fires once in 144 tokens, 64 times in 9,216."""
    assert default_dead_after(4608, 32, 819_200) == default_dead_after(2304, 16, 8_000_000) == 9_216
    assert default_dead_after(4608, 32, 60_000_000) == 60_000, "a thousandth of a long training"
    assert default_dead_after(131_072, 8, 1_000_000) == 200_000, "not most of a short one"
    assert default_dead_after(4608, 32, 10**12) == 10_000_000


def test_how_dead_features_are_revived_unless_it_is_chosen() -> None:
    def trainer(settings: TrainConfig) -> tuple[Trainer, StepInputs]:
        shape = DictionaryConfig(architecture="topk", d_sae=32, k=4)
        source = IterableSource([torch.randn(8, 10)])
        made = Trainer(Recipe(shape, settings), source, None, 1, torch.device("cpu"))
        return made, made._context()

    made, context = trainer(TrainConfig(aux_coefficient=0.0, k_aux=3, dead_after_tokens=50))
    assert (context.aux_coefficient, context.k_aux, made.firing.dead_after) == (0.0, 3, 50)
    made, context = trainer(TrainConfig())
    assert (context.aux_coefficient, context.k_aux, made.firing.dead_after) == (1.0, 4, 512)
    assert made.folded().metadata["trained"]["dead_after_tokens"] == 512


def test_firing_record_survives_a_checkpoint() -> None:
    record = FiringRecord(4, dead_after=10, device=torch.device("cpu"), refresh_every=1)
    record.record(torch.tensor([3.0, 0.0, 0.0, 1.0]), torch.tensor(2.0), 12, 1)
    other = FiringRecord(4, dead_after=10, device=torch.device("cpu"), refresh_every=1)
    other.load_state_dict(record.state_dict())
    assert other.dead.tolist() == [False, True, True, False]
    assert other.candidates.tolist() == [1, 2]
    assert other.density == 0.5


def test_geometric_median_of_known_configurations() -> None:
    line = torch.tensor([[0.0], [1.0], [10.0]])
    assert float(geometric_median(line, 200)) == pytest.approx(1.0, abs=1e-3)
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(geometric_median(square), torch.tensor([0.5, 0.5]))
    triangle = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.3, 0.3 + 2 * math.pi / 3, 0.3 + 4 * math.pi / 3)])
    torch.testing.assert_close(geometric_median(triangle), torch.zeros(2), atol=1e-6, rtol=0)


def test_geometric_median_when_the_estimate_is_one_of_the_points() -> None:
    points = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert torch.equal(geometric_median(points), torch.zeros(2))
    same = torch.full((5, 3), 2.0)
    assert torch.equal(geometric_median(same), torch.full((3,), 2.0))


def test_geometric_median_has_a_smaller_sum_of_distances_than_the_mean() -> None:
    points = torch.from_numpy(np.random.default_rng(0).standard_cauchy((200, 5))).float()

    def cost(centre: torch.Tensor) -> float:
        return float((points - centre).norm(dim=1).sum())

    best = geometric_median(points, 200)
    assert cost(best) < cost(points.mean(0))
    for direction in torch.eye(5):
        assert cost(best) <= cost(best + 0.05 * direction) + 1e-3


def test_initialisation_has_unit_rows_and_a_transposed_encoder() -> None:
    dictionary = TopK(8, 32, k=4)
    sample = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) + 3
    initialise_(dictionary, sample, torch.Generator().manual_seed(1))
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(dictionary.W_enc, dictionary.W_dec.T)
    assert torch.equal(dictionary.b_enc, torch.zeros(32))
    torch.testing.assert_close(dictionary.b_dec.data, geometric_median(sample))


def test_learning_rate_schedule_at_its_corners() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, 100, 2.0, 0.1, 0.2)

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == pytest.approx(2.0)
    assert rate(50) == 2.0
    assert rate(80) == pytest.approx(2.0)
    assert rate(90) == pytest.approx(1.0)
    assert rate(99) == pytest.approx(0.1)
    assert learning_rate(0, 100, 2.0, 0.0, 0.0) == 2.0


def test_a_weight_warms_up_from_nothing() -> None:
    assert [warmed_up(step, 100, 0.1) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert warmed_up(0, 100, 0.0) == 1.0


def test_default_learning_rate_falls_with_the_root_of_width_and_length() -> None:
    assert default_learning_rate(4096, 2000) == default_learning_rate(4096, 10) == pytest.approx(2.4e-3)
    assert default_learning_rate(4 * 4096, 2000) == pytest.approx(1.2e-3)
    assert default_learning_rate(4096, 8000) == pytest.approx(1.2e-3)
    assert default_learning_rate(4 * 4096, 200_000) == pytest.approx(1.2e-4)
