"""Feature dimensionality and angles: regular polytopes, and the bound that holds for every W."""

from __future__ import annotations

import math

import pytest
import torch

from sae.errors import ShapeError
from sae.superposition import dimensions_per_feature, feature_dimensionality, is_pentagon, neighbour_angles


def polygon(corners: int, turn: float = 0.3) -> torch.Tensor:
    angles = torch.arange(corners) * (2 * math.pi / corners) + turn
    return torch.stack([angles.cos(), angles.sin()], 1)


TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@pytest.mark.parametrize(
    ("W", "each"),
    [
        (torch.eye(4), 1.0),
        (torch.tensor([[2.0], [-2.0]]), 1 / 2),
        (polygon(3), 2 / 3),
        (polygon(4), 1 / 2),
        (polygon(5), 2 / 5),
        (3 * TETRAHEDRON, 3 / 4),
    ],
)
def test_regular_figures_share_their_dimensions_evenly(W: torch.Tensor, each: float) -> None:
    torch.testing.assert_close(feature_dimensionality(W), torch.full((len(W),), each, dtype=torch.float64))


def test_a_feature_without_a_direction_has_no_dimension() -> None:
    """And takes none from others, a larger one on the same line takes more."""
    W = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    assert feature_dimensionality(W).tolist() == pytest.approx([0, 1, 4 / 5, 1 / 5])
    assert not feature_dimensionality(torch.zeros(3, 2)).any()


def test_dimensionalities_never_sum_to_more_than_the_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for features in (1, 2, 3, 7, 40):
        for hidden in (1, 2, 5, 16):
            scales = torch.rand(50, features, 1, generator=generator) ** 4
            W = scales * torch.randn(50, features, hidden, generator=generator)
            W[:10, 0] = 0
            W[10:20, -1] = W[10:20, 0]
            W[20:30, :, 1:] = 0
            sums = feature_dimensionality(W).sum(1)
            ranks = torch.linalg.matrix_rank(W.double())
            assert (sums <= ranks + 1e-6).all(), (features, hidden, float((sums - ranks).max()))
            checked += len(W)
    assert checked == 1000
    assert float(feature_dimensionality(torch.randn(40, 5, generator=generator)).sum()) > 4, "the bound is nearly met"


def test_angles_between_neighbours_go_all_the_way_round() -> None:
    W = torch.cat([polygon(5)[[3, 0, 4, 1, 2]], torch.tensor([[0.1, 0.1]])])
    assert neighbour_angles(W).tolist() == pytest.approx([72] * 5, abs=1e-4)
    quarter = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert neighbour_angles(quarter).tolist() == pytest.approx([90, 270])
    assert len(neighbour_angles(quarter[:1])) == 0
    with pytest.raises(ShapeError, match=r"directions of shape \[4, 3\]: neighbours have an order only in two"):
        neighbour_angles(TETRAHEDRON)


def test_what_is_a_pentagon() -> None:
    assert is_pentagon(polygon(5))
    assert not is_pentagon(polygon(4)) and not is_pentagon(polygon(6))
    bent = polygon(5)
    bent[0] = torch.tensor([math.cos(0.3 + math.radians(2.5)), math.sin(0.3 + math.radians(2.5))])
    assert not is_pentagon(bent)
    uneven = polygon(5)
    uneven[0] *= 1.2
    assert neighbour_angles(uneven).tolist() == pytest.approx([72] * 5, abs=1e-4) and not is_pentagon(uneven)
    assert not is_pentagon(torch.cat([polygon(5), torch.zeros(1, 2)]))


def test_dimensions_per_feature() -> None:
    assert float(dimensions_per_feature(polygon(5))) == pytest.approx(2 / 5)
    assert dimensions_per_feature(torch.stack([torch.eye(3), 2 * torch.eye(3)])).tolist() == [1, 1 / 4]
