from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sae.activations import ActivationCache
from sae.config.splits import HELD_OUT
from sae.effects import firings as module
from sae.effects.firings import scan_firings, spread
from sae.errors import ConfigError
from sae.features.keys import random_keys
from tests.support.effect_case import DEAD, RESID, contexts, make_dictionary


def random_firings(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, rows without repetition within a feature, documents of very unequal lengths in text order."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(list(itertools.product(range(4), range(n))))[: 2 * n]
    document = np.minimum(np.arange(n) // 3, 5)
    return pairs[:, 0], pairs[:, 1], document[pairs[:, 1]]


def slow_spread(feature: np.ndarray, row: np.ndarray, document: np.ndarray, seed: int, most: int) -> list[list[int]]:
    """Rows drawn for each feature, one turn after another: the next by key from each document, these in key order."""
    key = random_keys(torch.from_numpy(feature), torch.from_numpy(row), "effects: places", seed).tolist()
    drawn = []
    for one in range(4):
        waiting: dict[int, list[tuple[int, int]]] = {}
        for number in np.flatnonzero(feature == one).tolist():
            waiting.setdefault(int(document[number]), []).append((key[number], int(row[number])))
        rows: list[int] = []
        while any(waiting.values()):
            turn = []
            for entries in waiting.values():
                if entries:
                    entries.sort()
                    turn.append(entries.pop(0))
            rows += [row for _, row in sorted(turn)]
        drawn.append(rows[:most])
    return drawn


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_documents_take_turns(most: int) -> None:
    feature, row, document = random_firings(60, 0)
    kept = spread(feature, row, document, 3, most)
    expected = slow_spread(feature, row, document, 3, most)
    assert [row[kept][feature[kept] == one].tolist() for one in range(4)] == expected
    assert feature[kept].tolist() == sorted(feature[kept].tolist())
    other = spread(feature, row, document, 4, most)
    assert most == 1000 or row[other].tolist() != row[kept].tolist(), "the seed does nothing"


def test_what_is_kept_of_parts_is_what_is_kept_at_once() -> None:
    feature, row, document = random_firings(90, 1)
    order = np.argsort(row, kind="stable")
    feature, row, document = feature[order], row[order], document[order]
    kept = np.zeros(0, dtype=np.int64)
    for part in np.array_split(np.arange(len(row)), 7):
        so_far = np.concatenate([kept, part])
        kept = so_far[spread(feature[so_far], row[so_far], document[so_far], 0, 5)]
    assert kept.tolist() == spread(feature, row, document, 0, 5).tolist()


def test_counts_and_places_are_those_of_dense_codes(held_out: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.features.scan._ENCODED_AT_ONCE", 48 * 16 * 3)  # three contexts at a time
    monkeypatch.setattr(module, "_KEPT_AT_ONCE", 50)
    dictionary = make_dictionary(held_out, RESID)
    found = scan_firings(dictionary, held_out, RESID, positions=1000, seed=0)
    fires: dict[int, list[int]] = {}
    total, tokens, count, row = np.zeros(48), 0, np.zeros(48, dtype=int), 0
    rows, documents = [], []
    for context, batch in zip(contexts(held_out), held_out.contexts(HELD_OUT, RESID, batch_contexts=1), strict=True):
        assert batch.activations is not None
        codes = dictionary.encode(batch.activations[0])
        for position, code in enumerate(codes):
            documents.append(context.documents[position])
            if batch.eligible[0, position]:
                tokens += 1
                count += (code > 0).numpy()
                total += code.double().numpy()
            if context.counts[position]:
                rows.append(row)
                for feature in code.nonzero().flatten().tolist():
                    fires.setdefault(feature, []).append(row)
            row += 1
    assert found.tokens == tokens
    assert found.count.tolist() == count.tolist()
    np.testing.assert_allclose(found.mean, total / np.maximum(count, 1), rtol=1e-5)
    np.testing.assert_allclose(found.density, count / tokens)
    assert found.rows.tolist() == rows
    assert found.documents.tolist() == documents
    assert found.count[DEAD] == 0 and len(found.places.rows_of(DEAD)) == 0
    for feature in range(48):
        assert sorted(found.places.rows_of(feature).tolist()) == fires.get(feature, []), feature
    few = scan_firings(dictionary, held_out, RESID, positions=3, seed=0)
    for feature in range(48):
        assert few.places.rows_of(feature).tolist() == found.places.rows_of(feature)[:3].tolist()
    two = scan_firings(dictionary, held_out, RESID, positions=3, seed=0, features=[7, 9])
    assert set(two.places.feature) == {7, 9} and two.count.tolist() == found.count.tolist()
    assert all(two.places.rows_of(feature).tolist() == few.places.rows_of(feature).tolist() for feature in (7, 9))
    assert any(len(set(found.documents[few.places.rows_of(feature)])) == 3 for feature in range(48))


def test_too_little_text(held_out: ActivationCache) -> None:
    dictionary = make_dictionary(held_out, RESID)
    with pytest.raises(
        ConfigError, match=r"in the first 3 held-out tokens the token .* at least one context \(16 tokens"
    ):
        scan_firings(dictionary, held_out, RESID, positions=3, seed=0, tokens=3)
    assert scan_firings(dictionary, held_out, RESID, positions=3, seed=0, tokens=40).tokens <= 32
