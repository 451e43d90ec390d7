"""A cache with a dictionary that copies its numbers, and the slow reference made from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sae.activations.cache import ActivationCache
from sae.architectures import ReLU
from sae.config.settings import FeaturesConfig
from sae.dictionary.base import Dictionary
from sae.features import Features, collect
from tests.support.fake_cache import HOOK
from tests.support.feature_cache import FakeTokenizer, eligible_rows, make_cache
from tests.support.feature_reference import Reference

SETTINGS = FeaturesConfig(top=5, quantiles=3, per_quantile=2, before=4, after=3, neighbours=3)
CONTEXT, D_SAE, DEAD = 12, 8, 6


@dataclass(frozen=True)
class Case:
    """A cache, a dictionary that copies its numbers, and the reference made from the same numbers."""

    cache: ActivationCache
    dictionary: Dictionary
    reference: Reference
    tokens: list[int]

    def collect(self, folder: Path, settings: FeaturesConfig = SETTINGS, **arguments) -> Features:
        return collect(self.dictionary, self.cache, folder, settings, hook=HOOK, tokenizer=FakeTokenizer(), **arguments)


def build_case(folder: Path, rows: int = 403, document_length: int = 17, seed: int = 0) -> Case:
    """Multiples of 1/4, many equal. Feature 0 fires mostly, 5 on three tokens, 6 never, 7 on masked ones too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-30, 20, (rows, D_SAE), generator=generator) / 4
    x[:, 0] += 4
    x[:, 5] = -1.0
    x[[14, 15, 200], 5] = torch.tensor([2.0, 3.0, 1.0])
    x[:, DEAD] = -1.0
    tokens = torch.randint(0, 40, (rows,), generator=generator)
    x[tokens == 0, 7] = 50.0
    x[::CONTEXT, 7] = 50.0
    documents = torch.arange(rows) // document_length
    dictionary = ReLU(D_SAE, D_SAE)
    with torch.no_grad():
        dictionary.W_enc.copy_(torch.eye(D_SAE))
        dictionary.W_dec.copy_(torch.eye(D_SAE))
    cache = make_cache(folder, x, tokens, documents, CONTEXT)
    reference = Reference(x.tolist(), documents.tolist(), eligible_rows(tokens, CONTEXT).tolist(), CONTEXT)
    return Case(cache, dictionary, reference, tokens.tolist())
