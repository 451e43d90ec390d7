"""What the tests of effects share: a dictionary, another family of models, and effects the slow way, by splicing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.sources import ModelConfig
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN, Frame
from sae.effects import Effects, EffectSettings, measure_effects
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice

RESID, POST, MLP, HEADS = (
    "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z"
)  # fmt: skip
DEAD = 5


def make_dictionary(cache: ActivationCache, hook: str, seed: int = 2, frame: Frame = PLAIN) -> Dictionary:
    """A random TopK dictionary with unit rows, whose feature `DEAD` never fires."""
    metadata = {"hook": hook, "model": cache.manifest.model, "tokens": cache.policy.to_json()}
    dictionary = TopK(cache.d_in(hook), 48, k=4, metadata=metadata).requires_grad_(False)
    dictionary.set_frame(frame)
    dictionary.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    dictionary.W_dec.copy_(torch.randn(dictionary.W_dec.shape, generator=generator))
    dictionary.normalise_decoder_()
    dictionary.W_enc.copy_(12 * dictionary.W_dec.T + 0.1 * torch.randn(dictionary.W_enc.shape, generator=generator))
    dictionary.b_dec.copy_(cache.statistics(hook).mean)
    dictionary.b_enc[DEAD] = -1e6
    return dictionary


def make_gemma(folder: Path, tiny_model: Path, cap: float | None = None) -> LanguageModel:
    """A tiny Gemma 2: rotary positions, an RMS norm whose gain is 1 + weight, norms after attention and MLP."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shutil.copytree(tiny_model, folder)  # for the tokenizer
    config = Gemma2Config(
        vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, final_logit_softcapping=cap,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return _saved(lambda: Gemma2ForCausalLM(config), folder)


def make_granite(folder: Path, tiny_model: Path, logits_scaling: float = 1.0) -> LanguageModel:
    """A tiny Granite: Llama's blocks (rotary positions, fewer keys than queries), its logits divided by a number."""
    from transformers import GraniteConfig, GraniteForCausalLM

    shutil.copytree(tiny_model, folder)  # for the tokenizer
    config = GraniteConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, logits_scaling=logits_scaling,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return _saved(lambda: GraniteForCausalLM(config), folder)


def make_llama(folder: Path, tiny_model: Path) -> LanguageModel:
    """A tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_model, folder)  # for the tokenizer
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return _saved(lambda: LlamaForCausalLM(config), folder)


def _saved(make: Callable[[], Any], folder: Path) -> LanguageModel:
    """A model with weights far from where they begin, through its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.add_((0.3 if "norm" in name else 0.2) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return LanguageModel(ModelConfig(name=str(folder)))


@dataclass(frozen=True)
class Context:
    """A held-out context, and which of its positions count."""

    tokens: Tensor
    documents: list[int]
    counts: list[bool]


def contexts(cache: ActivationCache) -> list[Context]:
    """All held-out contexts, one at a time."""
    found = []
    for batch in cache.contexts(HELD_OUT, batch_contexts=1):
        counts = batch.eligible[0].tolist()
        counts[-1] = False
        found.append(Context(batch.tokens, batch.documents[0].tolist(), counts))
    return found


def log_probabilities(model: LanguageModel, tokens: Tensor) -> np.ndarray:
    return model.logits(tokens)[0].double().log_softmax(-1).numpy()


def by_splicing(
    model: LanguageModel,
    dictionary: Dictionary,
    context: Context,
    feature: int,
    position: int,
    scale: float,
    window: int,
) -> dict[str, float]:
    """One change the slow way: the dictionary spliced in with its error, and one number of its code edited."""

    def edit(codes: Tensor) -> Tensor:
        codes = codes.clone()
        codes[0, position, feature] *= scale
        return codes

    clean = log_probabilities(model, context.tokens)
    with splice(model, dictionary, error_term=True, edit=edit):
        changed = log_probabilities(model, context.tokens)
    return differences(clean, changed, context, position, window)


def differences(
    clean: np.ndarray, changed: np.ndarray, context: Context, position: int, window: int
) -> dict[str, float]:
    """Losses and divergences at a position and after it, one position at a time."""
    result = {"loss": 0.0, "loss_after": 0.0, "kl": 0.0, "kl_after": 0.0}
    for place in range(position, min(position + window + 1, len(context.counts))):
        if not context.counts[place] or context.documents[place] != context.documents[position]:
            continue
        token = int(context.tokens[0, place + 1])
        ending = "" if place == position else "_after"
        result[f"loss{ending}"] += clean[place, token] - changed[place, token]
        result[f"kl{ending}"] += float((np.exp(clean[place]) * (clean[place] - changed[place])).sum())
    return result


FEW = EffectSettings(positions=6, null_positions=3, window=2, top=4)


def measure(cache: ActivationCache, model: LanguageModel, hook: str = RESID, **options: Any) -> Effects:
    return measure_effects(
        make_dictionary(cache, hook), cache, model, hook=hook, **{"settings": FEW, "features": [0, 1, 2], **options}
    )
