from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae.architectures import TopK
from sae.config.settings import FeaturesConfig
from sae.features import Features, collect
from tests.support.fake_cache import HOOK
from tests.support.feature_cache import FakeTokenizer, make_cache

EVIL = "</script><img src=x onerror=document.body.remove()><!--&amp;[bold]\x1b[31m\u2028"
MakeFeatures = Callable[..., Features]


@pytest.fixture
def make_features(tmp_path: Path) -> MakeFeatures:
    """Makes a store whose features fire on one token each: 0 on `token`, 1 on a line end, 2 on half of é, 3 never."""

    def make(token: str = EVIL) -> Features:
        tokenizer = FakeTokenizer(token)
        ids = [
            0,
            1 + ord("a"),
            257,
            1 + 10,
            1 + ord("b"),
            1 + ord(" "),
            1 + 0xC3,
            1 + 0xA9,
            1 + ord("\t"),
            1 + ord("z"),
        ]
        tokens = torch.tensor(ids * 12)
        x = torch.zeros(len(tokens), 4)
        for feature, fires in enumerate((257, 1 + 10, 1 + 0xC3)):
            where = (tokens == fires).nonzero().flatten()
            x[where, feature] = 1 + torch.arange(len(where)) / 8
        x[tokens == 1 + ord("b"), 0] = 0.25
        dictionary = TopK(4, 4, k=2)
        with torch.no_grad():
            dictionary.W_enc.copy_(torch.eye(4))
            dictionary.W_dec.copy_(torch.eye(4))
        cache = make_cache(tmp_path / "activations", x, tokens, torch.arange(len(tokens)) // 10, 20)
        W_U = torch.zeros(4, 300)
        W_U[0, 257], W_U[1, 1 + 0xE2] = 1.0, 2.0
        model = SimpleNamespace(is_residual=lambda hook: True, unembedding=lambda: W_U)
        settings = FeaturesConfig(top=6, quantiles=2, per_quantile=3, before=5, after=5, logits=2, neighbours=3)
        return collect(
            dictionary, cache, tmp_path / "features", settings, hook=HOOK, tokenizer=tokenizer, language_model=model
        )

    return make
