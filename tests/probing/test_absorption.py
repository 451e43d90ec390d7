"""Absorption of known rate: dictionaries in which one latent takes another's place, on data that were made for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sae.errors import DataError, ShapeError
from sae.probing.absorption import measure_absorption
from sae.probing.activations import LabelledActivations
from sae.probing.settings import LetterConfig

WORDS, KINDS, D_IN = 240, 10, 48
LETTERS = "abcd"
LETTER, CHILD = slice(0, 4), slice(4, 4 + 4 * KINDS)
SETTINGS = LetterConfig(words=WORDS)


def words(child_share: float, kinds: int = KINDS) -> tuple[LabelledActivations, Tensor]:
    """One direction for each letter, and one for each kind of words that begin with it (its children); noise.

    Returns:
        The activations, and which of them are children: `child_share` of each letter's, as many of each kind.
    """
    generator = torch.Generator().manual_seed(0)
    letter = torch.arange(4).repeat_interleave(WORDS)
    order = torch.cat([torch.randperm(WORDS, generator=generator) for _ in range(4)])
    child = order < child_share * WORDS
    x = 0.05 * torch.randn(4 * WORDS, D_IN, generator=generator)
    x[torch.arange(len(x)), letter] += 1
    x[torch.arange(len(x))[child], (4 + KINDS * letter + order % kinds)[child]] += 1
    labels = tuple(LETTERS[number] for number in letter)
    return LabelledActivations(x, torch.arange(len(x)), labels, torch.arange(len(x))), child


class Planted:
    """A latent for each letter, and one for each of its children.

    Where `absorbing`, a child's latent has the letter's direction in it, and the letter's latent is silent with it.
    """

    def __init__(self, absorbing: bool, offset: float = 0.0) -> None:
        self.absorbing = absorbing
        self.b_dec = torch.full((D_IN,), offset)
        self.W_dec = torch.eye(D_IN)[: 4 + 4 * KINDS].clone()
        if absorbing:
            letters = self.W_dec[LETTER].repeat_interleave(KINDS, 0)
            self.W_dec[CHILD] = (letters + self.W_dec[CHILD]) / math.sqrt(2)

    def encode(self, x: Tensor) -> Tensor:
        x = x - self.b_dec
        letter, child = x[:, LETTER] * (x[:, LETTER] > 0.5), x[:, CHILD] * (x[:, CHILD] > 0.5)
        if self.absorbing:
            letter = letter * (child == 0).all(1, keepdim=True)
            child = child * math.sqrt(2)
        return torch.cat([letter, child], 1)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_constructed_rate_is_measured(offset: float) -> None:
    data, child = words(0.25)
    moved = LabelledActivations(data.rows + offset, data.example, data.labels, data.groups)
    result = measure_absorption(Planted(True, offset), moved, SETTINGS)
    assert len(result.able) == 4
    for number, concept in enumerate(result.concepts):
        assert concept.main == (number,)
        assert len(concept.positives) == WORDS // 4
        assert set(concept.absorbed) == {row for row in concept.positives if child[row]}
        assert concept.silent == concept.absorbed
        own = range(4 + KINDS * number, 4 + KINDS * (number + 1))
        assert {latent for latent, _ in concept.absorbing} <= set(own)
        assert sum(count for _, count in concept.absorbing) == len(concept.absorbed)
        rate, error = concept.rate.value, concept.rate.standard_error
        assert rate is not None and error is not None
        assert rate == len(concept.absorbed) / 60
        assert error == pytest.approx(math.sqrt(rate * (1 - rate) / 59))
        assert abs(rate - 0.25) < 3 * error
    mean = result.mean("rate")
    assert mean is not None and mean[1] is not None
    assert abs(mean[0] - 0.25) < 3 * mean[1] + 0.03


def test_a_dictionary_that_does_not_absorb_scores_0() -> None:
    data, _ = words(0.25)
    result = measure_absorption(Planted(False), data, SETTINGS)
    for number, concept in enumerate(result.concepts):
        assert concept.able
        assert concept.main == (number,)
        assert concept.rate.value == 0
        assert concept.silent_rate.value == 0
    assert result.mean("rate") == (0, 0)
    assert result.mean("splits") == (1, 0)


def test_silence_without_a_carrier_is_no_absorption() -> None:
    """The letter's latent is missing on children, and theirs point away from the letter."""
    data, child = words(0.25)
    dictionary = Planted(True)
    dictionary.W_dec[CHILD] = -dictionary.W_dec[LETTER].repeat_interleave(KINDS, 0)
    result = measure_absorption(dictionary, data, SETTINGS)
    for concept in result.concepts:
        assert concept.rate.value == 0
        assert set(concept.silent) == {row for row in concept.positives if child[row]}


def test_the_share_that_must_be_carried_decides() -> None:
    """A child's latent that carries half of the letter's projection absorbs at a share of 0.4, not at 0.8."""
    data, child = words(0.25)

    class Half(Planted):
        def encode(self, x: Tensor) -> Tensor:
            latents = super().encode(x)
            latents[:, CHILD] *= 0.5
            return latents

    for share, absorbs in ((0.4, True), (0.8, False)):
        result = measure_absorption(Half(True), data, LetterConfig(share=share))
        for concept in result.concepts:
            expected = {row for row in concept.positives if child[row]} if absorbs else set()
            assert set(concept.absorbed) == expected
    aligned = measure_absorption(Half(True), data, LetterConfig(cosine=0.8))
    assert aligned.mean("rate") == (0, 0)  # their cosine with the letter is 0.71


def test_a_split_feature_is_found_and_is_no_absorption() -> None:
    """A letter with one latent for half of its words and another for the rest: both are main ones."""
    data, child = words(0.5, kinds=1)

    class Split(Planted):
        def encode(self, x: Tensor) -> Tensor:
            letter, is_child = x[:, LETTER] * (x[:, LETTER] > 0.5), (x[:, CHILD] > 0.5).any(1, keepdim=True)
            return torch.cat([letter * ~is_child, letter * is_child], 1)

    dictionary = Split(False)
    dictionary.W_dec = dictionary.W_dec[LETTER].repeat(2, 1)
    result = measure_absorption(dictionary, data, SETTINGS)
    for number, concept in enumerate(result.concepts):
        assert set(concept.main) == {number, 4 + number}
        assert concept.f1_by_k[1] > concept.f1_by_k[0] + 0.2
        assert concept.rate.value == 0
    assert result.mean("splits") == (2, 0)
    coarse = measure_absorption(dictionary, data, LetterConfig(max_splits=1))
    assert coarse.mean("splits") == (1, 0)
    assert child.float().mean() == 0.5


def test_letters_that_the_model_does_not_show_are_not_measured() -> None:
    data, _ = words(0.25)
    hidden = data.rows.clone()
    hidden[:, 0] = 0.0
    hidden[:, 4 : 4 + 2 * KINDS] = 0.0
    hidden[:, 1] *= (torch.arange(len(hidden)) % 2 == 0) * 1.0
    blind = LabelledActivations(hidden, data.example, data.labels, data.groups)
    result = measure_absorption(Planted(True), blind, LetterConfig(able_f1=0.9))
    assert {concept.name: concept.able for concept in result.concepts} == {"a": False, "b": False, "c": True, "d": True}
    first = result.concepts[0]
    assert first.rate.value is None
    assert set(first.to_json()["absorption_rate"].values()) == {None}
    assert len(result.able) == 2
    noise = torch.randn(data.rows.shape, generator=torch.Generator().manual_seed(0))
    nobody = measure_absorption(Planted(True), LabelledActivations(noise, data.example, data.labels, data.groups))
    assert not nobody.able
    assert nobody.mean("rate") is None


def test_bad_input() -> None:
    data, _ = words(0.25)
    dictionary = Planted(True)
    narrow = LabelledActivations(data.rows[:, :5], data.example, data.labels, data.groups)
    with pytest.raises(ShapeError, match=r"W_dec of shape \[44, 48\]: the activations have 5 numbers"):
        measure_absorption(dictionary, narrow)
    few = LabelledActivations(data.rows, data.example, ("z", *data.labels[1:]), data.groups)
    with pytest.raises(DataError, match="labels 'z': 1 training example on one side"):
        measure_absorption(dictionary, few)
