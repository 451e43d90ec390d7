"""Matching pursuit: its steps by hand, gradients with the choice of features held fixed, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae
from sae.architectures import MatchingPursuit
from sae.dictionary.frame import Frame
from tests.support.foreign_weights import pursuit

D_IN, D_SAE = 6, 15


def dictionary_with(**settings: Any) -> MatchingPursuit:
    dictionary = MatchingPursuit(D_IN, D_SAE, **settings).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=generator, dtype=torch.float64))
        dictionary.normalise_decoder_()
        dictionary.W_enc.copy_(dictionary.W_dec.T)
        dictionary.b_dec.copy_(torch.randn(D_IN, generator=generator, dtype=torch.float64))
    return dictionary.eval()


def inputs(rows: int = 40) -> Tensor:
    return 2 * torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def test_orthogonal_directions_are_found_exactly() -> None:
    """With W_dec = ±identity, the pursuit is the decomposition into positive and negative parts."""
    dictionary = MatchingPursuit(D_IN, 2 * D_IN).double()
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.cat([torch.eye(D_IN), -torch.eye(D_IN)]))
    x = inputs()
    torch.testing.assert_close(dictionary.encode(x), torch.cat([x.relu(), (-x).relu()], -1), rtol=1e-12, atol=0.01)
    assert ((dictionary(x) - x).norm(dim=-1) < 0.01).all()


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"residual_threshold": 0.0}, {"residual_threshold": 1.0}, {"max_iterations": 2},
        {"stop_on_duplicate_support": False}, {"stop_on_duplicate_support": False, "residual_threshold": 0.0},
    ],
)  # fmt: skip
def test_features_are_those_found_one_by_one(settings: dict[str, Any]) -> None:
    dictionary = dictionary_with(**settings)
    steps, stops = settings.get("max_iterations") or D_IN, settings.get("stop_on_duplicate_support", True)
    threshold = settings.get("residual_threshold", 0.01)
    x = inputs()
    rows = x - dictionary.b_dec.detach()
    expected = torch.stack([pursuit(row, dictionary.W_dec.detach(), threshold, steps, stops) for row in rows])
    found = dictionary.encode(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert 1 < float((found > 0).sum(-1).double().mean()) <= steps
    torch.testing.assert_close(torch.func.vmap(dictionary.encode)(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dictionary.encode_sparse(x).dense(D_SAE), expected, rtol=1e-10, atol=1e-12)


def test_gradients_hold_the_choice_of_features_fixed() -> None:
    """As finite differences do, whose steps are too small to change it."""
    dictionary = dictionary_with(max_iterations=3)
    assert torch.autograd.gradcheck(dictionary, inputs(4).requires_grad_(), eps=1e-7, atol=1e-5)


def test_select_names_the_features_that_fire() -> None:
    dictionary, x = dictionary_with(), inputs(9)
    selection = dictionary.select(x)
    fires = dictionary.encode(x) > 0
    rows, features = fires.nonzero(as_tuple=True)
    assert torch.equal(selection.pattern.rows, rows) and torch.equal(selection.pattern.features, features)
    torch.testing.assert_close(selection.values, dictionary.pre_activations(x)[fires])
    assert dictionary.lets_through(dictionary.pre_activations(x)).all()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    dictionary = dictionary_with(max_iterations=3, residual_threshold=0.5)
    dictionary.save(tmp_path)
    again = sae.load(tmp_path)
    assert isinstance(again, MatchingPursuit) and again.settings() == dictionary.settings()
    torch.testing.assert_close(again(inputs()), dictionary(inputs()), rtol=1e-12, atol=1e-12)
    dictionary.set_frame(Frame("layer_norm"))
    assert dictionary.frame.needs_input


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_iterations": 0}, "from 1, or null"), ({"residual_threshold": -1.0}, "a number from 0")],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingPursuit(D_IN, D_SAE, **settings)
