"""A store made from a real harvest with a real tokenizer and a real unembedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.settings import FeaturesConfig
from sae.errors import ConfigError
from sae.features import Features, collect
from sae.model.language_model import LanguageModel

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


def test_features_of_a_transcoder_are_read_at_one_hook_point_and_raise_logits_at_another(
    tiny_cache: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    def store(reads: str, gives: str) -> Features:
        transcoder = TopK(32, 48, k=4, metadata={"hook": reads, "target_hook": gives})
        settings, tokenizer = FeaturesConfig(top=1, logits=5, neighbours=2), language_model.tokenizer
        return collect(
            transcoder, tiny_cache, tmp_path / gives, settings,
            hook=HOOK, tokenizer=tokenizer, language_model=language_model,
        )  # fmt: skip

    residual, heads = store(HOOK, "blocks.1.hook_mlp_out"), store(HOOK, "blocks.1.attn.hook_z")
    assert residual.info["hook"] == HOOK
    assert residual[0].promoted is not None
    assert heads[0].promoted is None, "the unembedding does not read the heads"
    with pytest.raises(ConfigError, match=r"resid_pre': the dictionary reads activations of 'blocks\.0\."):
        store("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
