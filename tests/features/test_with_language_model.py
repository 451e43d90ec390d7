"""A store made from a real harvest with a real tokenizer and a real unembedding."""

from __future__ import annotations

from pathlib import Path

import torch

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config import FeaturesConfig
from sae.features import Features, collect
from sae.language_model import LanguageModel

HOOK = "blocks.1.hook_resid_pre"


def test_text_and_logits_are_the_models(
    tiny_cache: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dictionary = TopK(32, 48, k=4)
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.nn.functional.normalize(torch.randn(48, 32), dim=1))
        dictionary.W_enc.copy_(dictionary.W_dec.T)
    tokenizer = language_model.tokenizer
    collect(
        dictionary,
        tiny_cache,
        tmp_path / "features",
        FeaturesConfig(top=4, before=3, after=3, logits=5, neighbours=2),
        hook=HOOK,
        tokenizer=tokenizer,
        language_model=language_model,
    )
    features = Features(tmp_path)
    tokens = torch.cat([batch.tokens.flatten() for batch in tiny_cache.contexts("train")]).tolist()
    names = tiny_cache.documents("train")
    assert sum(len(feature.top) for feature in features) > 40
    for feature in features:
        for example in feature.top:
            first = example.row - example.position
            ids = tokens[first : first + len(example.tokens)]
            assert "".join(example.tokens) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert example.document in names
        effects = dictionary.W_dec.detach()[feature.index] @ language_model.unembedding()
        assert feature.promoted is not None
        assert feature.suppressed is not None
        raised = tokenizer.decode([int(effects.argmax())])
        assert feature.promoted[0].token == raised or (raised == "�" and feature.promoted[0].token.startswith("\\x"))
        assert abs(feature.suppressed[0].logit - float(effects.min())) < 1e-4
    assert features.info["model"] == language_model.info.name
