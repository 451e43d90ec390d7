"""Logits and neighbours, against dense products."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae.dictionary import neighbours
from sae.dictionary.neighbours import nearest_neighbours
from sae.features import logits
from sae.features.logits import logit_effects
from tests.support.feature_case import D_SAE, DEAD, SETTINGS, Case


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_PRODUCTS_AT_ONCE", 100)
    monkeypatch.setattr(neighbours, "_PRODUCTS_AT_ONCE", 100)


def test_logit_effects_are_the_extremes_of_the_product() -> None:
    W_dec, W_U = torch.randn(17, 5, generator=torch.Generator().manual_seed(0)), torch.randn(5, 30)
    effects = logit_effects(W_dec, W_U, 4)
    ordered = (W_dec @ W_U).sort(dim=1, descending=True)
    assert torch.equal(effects.promoted, ordered.indices[:, :4])
    assert torch.equal(effects.suppressed, ordered.indices.flip(1)[:, :4])
    torch.testing.assert_close(effects.promoted_logits, ordered.values[:, :4])
    torch.testing.assert_close(effects.suppressed_logits, ordered.values.flip(1)[:, :4])


def test_more_logits_than_tokens() -> None:
    assert logit_effects(torch.ones(3, 2), torch.ones(2, 4), 10).promoted.shape == (3, 4)


def test_neighbours_are_the_largest_cosines_to_others() -> None:
    W_dec = torch.randn(23, 6, generator=torch.Generator().manual_seed(0)) * torch.rand(23, 1)
    near = nearest_neighbours(W_dec, 5)
    for index in range(23):
        cosines = torch.nn.functional.cosine_similarity(W_dec[index], W_dec, dim=1)
        cosines[index] = -2
        expected = cosines.sort(descending=True)
        assert near.index[index].tolist() == expected.indices[:5].tolist()
        torch.testing.assert_close(near.cosine[index], expected.values[:5])


def test_a_repeated_direction_is_a_neighbour_and_a_feature_is_not_its_own() -> None:
    near = nearest_neighbours(torch.tensor([[1.0, 0], [2.0, 0], [0, 1.0]]), 8)
    assert near.index.shape == (3, 2)
    assert (near.index[0, 0], near.index[1, 0]) == (1, 0)
    assert near.cosine[0].tolist() == [1, 0]
    assert nearest_neighbours(torch.ones(1, 4), 8).index.shape == (1, 0)


def test_a_store_has_logits_only_in_the_residual_stream(case: Case, tmp_path: Path) -> None:
    W_U = torch.zeros(D_SAE, 300)
    W_U[3, 1 + ord("x")], W_U[3, 1 + ord("y")] = 2.0, -1.0
    model = SimpleNamespace(is_residual=lambda hook: True, unembedding=lambda: W_U)
    store = case.collect(tmp_path / "with", language_model=model)
    assert store.has_logits
    assert store[3].promoted is not None
    assert store[3].suppressed is not None
    assert store[3].promoted[0] == ("x", 2.0)
    assert store[3].suppressed[0] == ("y", -1.0)
    inner = SimpleNamespace(is_residual=lambda hook: False)
    for number, argument in enumerate((None, inner)):
        store = case.collect(tmp_path / f"without-{number}", language_model=argument)
        assert not store.has_logits
        assert store[3].promoted is None
        assert store[3].suppressed is None


def test_dead_neighbours_are_labelled(case: Case, tmp_path: Path) -> None:
    with torch.no_grad():
        case.dictionary.W_dec[0, DEAD] = 0.5
    neighbour = case.collect(tmp_path / "store", SETTINGS)[0].neighbours[0]
    assert neighbour.feature == DEAD
    assert neighbour.dead
    assert neighbour.cosine == pytest.approx(0.5 / 1.25**0.5)
