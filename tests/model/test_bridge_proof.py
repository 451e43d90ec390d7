"""A bridged model is the model that transformers reads, or it is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import write_model
from torch import Tensor

from sae.config.sources import ModelConfig
from sae.effects.direct import DirectPath
from sae.errors import ModelError
from sae.model.bridge_proof import BridgeProof
from sae.model.language_model import LanguageModel

DTYPES = ["float32", "float16", "bfloat16"]
OTHER_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("none", {"scale_attn_weights": False}),
    "falcon": ("none", {"alibi": True}),
    "gpt_oss": ("fold_ln", {}),
    "bloom": ("fold_ln", {"apply_residual_connection_post_layernorm": True}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", OTHER_MODELS)
def test_a_bridge_that_computes_another_model_is_refused(family: str, dtype: str, tmp_path: Path) -> None:
    processing, settings = OTHER_MODELS[family]
    folder = write_model(family, tmp_path / family, **settings)
    message = r"transformer-lens makes another model of \w+: its log-probabilities are off by up to 0\.\d+ from"
    if processing != "none":
        message = (
            r"makes another model of \w+ .*model.weight_processing=fold_ln\): .*; set model.weight_processing=none$"
        )
    with pytest.raises(ModelError, match=message) as caught:
        LanguageModel(ModelConfig(name=str(folder), weight_processing=processing, dtype=dtype))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    if processing != "none":
        LanguageModel(ModelConfig(name=str(folder), dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "processing"),
    [
        ("gemma4_text", "none"),  # whose numbers in float16 and bfloat16 differ most
        ("minimax_m2", "none"),
        ("gpt2", "center_and_fold"),
        ("llama", "center_and_fold"),
        ("mamba", "none"),
    ],
)
def test_rounding_makes_no_other_model(family: str, processing: str, dtype: str, tmp_path: Path) -> None:
    folder = write_model(family, tmp_path / family)
    LanguageModel(ModelConfig(name=str(folder), weight_processing=processing, dtype=dtype))  # type: ignore[arg-type]


def test_weights_that_cannot_be_processed_can_be_left_alone(tmp_path: Path) -> None:
    folder = write_model("gptj", tmp_path / "gptj")
    with pytest.raises(
        ModelError, match=r"cannot process the weights of GPTJForCausalLM \(.*\); set model.weight_processing=none$"
    ):
        LanguageModel(ModelConfig(name=str(folder), weight_processing="fold_ln"))
    LanguageModel(str(folder))


def test_an_error_without_words_has_its_name(tmp_path: Path) -> None:
    folder = write_model("gpt_neox", tmp_path / "neox", attention_bias=False)
    with pytest.raises(
        ModelError, match=r"cannot bridge GPTNeoXForCausalLM \(AssertionError\); use a model of another"
    ):
        LanguageModel(str(folder))


def test_a_bridge_that_cannot_run_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    settings = {"alibi": True, "multi_query": False, "parallel_attn": False}
    folder = write_model("falcon", tmp_path / "falcon", **settings)
    with pytest.raises(ModelError, match=r"transformer-lens cannot run FalconForCausalLM \(.*; use another model$"):
        LanguageModel(str(folder))


def _share(logits: Tensor | None, other: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Of a model and a bridge that give these logits for whatever tokens."""

    class Fixed:
        config, cfg = SimpleNamespace(max_position_embeddings=None), SimpleNamespace(n_layers=3)
        device = torch.device("cpu")

        def __init__(self, output: Any) -> None:
            self.output, self.dtype = output, dtype

        def __call__(self, tokens: Tensor) -> Any:
            assert tokens.shape == (1, 32)
            return self.output

    return BridgeProof(Fixed(SimpleNamespace(logits=logits)), 50).difference(Fixed(other)).share


def test_what_counts_as_a_difference() -> None:
    logits = torch.randn(1, 32, 50, generator=torch.Generator().manual_seed(0))
    assert _share(logits, logits) == 0
    assert _share(logits, logits + 3) < 0.01  # a constant is no difference
    assert _share(None, logits) == 0  # nothing to compare with
    assert _share(logits, logits[..., :-1]) == float("inf")
    assert _share(logits, logits + 0.01 * logits.flip(-1)) > 1
    few = logits.clone()
    few[:, :3] += logits[:, :3].flip(-1)  # a near tie of a mixture's router
    assert _share(logits, few) < 1
    empty = logits.clone()
    empty[..., 40:] = -torch.inf
    assert _share(empty, empty) == 0
    assert _share(empty, logits) > 1
    nothing = torch.full_like(logits, torch.nan)
    assert _share(nothing, nothing) == 0
    assert _share(logits, nothing) > 1
    half = logits.bfloat16()
    assert 0 < _share(half, (logits * 1.004).bfloat16(), torch.bfloat16) < 1
    assert _share(half, (logits * 1.06).bfloat16(), torch.bfloat16) > 1


def test_a_type_of_numbers_that_cannot_be_computed_in_is_named(tmp_path: Path) -> None:
    folder = write_model("codegen", tmp_path / "codegen")
    with pytest.raises(
        ModelError, match=r"cannot run CodeGenForCausalLM \(expected .*; try model.dtype=float32, or use"
    ):
        LanguageModel(ModelConfig(name=str(folder), dtype="bfloat16"))


def test_a_model_without_a_final_norm_has_its_unembedding_alone(tmp_path: Path) -> None:
    """As OPT-350M: norms after attention and MLP, and embeddings that are narrower than the residual stream."""
    settings = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
    model = LanguageModel(str(write_model("opt", tmp_path / "opt", **settings)))
    effects, hook = model.unembedding(), "blocks.3.hook_resid_post"
    assert effects.shape == (32, 96)
    assert DirectPath.of(model, hook) is None
    tokens = model.probe_tokens(2, 8)
    torch.testing.assert_close(model.activations(tokens, [hook])[hook] @ effects, model.logits(tokens))
