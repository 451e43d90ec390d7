"""Dictionaries spliced through the bridge and through transformers' own modules give the same model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_model
from torch import Tensor

from sae.architectures import ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, ModelError
from sae.model.hook_probe import perturbed
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice
from tests.conftest import CHECKED_CALLS, CheckedCalls

FAMILIES = ["gpt2", "llama", "gemma2", "qwen3"]
TEXT = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(7))
HOOKS = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.3.hook_attn_out", "blocks.2.hook_resid_post"]
TOLERANCE = 1e-5
"""Of the largest logit, in float32."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp(request.param) / request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel(str(folder))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The model as a user loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dictionaries(model: LanguageModel, hooks: list[str] = HOOKS, kind: type[Dictionary] = ReLU) -> list[Dictionary]:
    """One for each hook point, of weights that matter."""
    policy = model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)
    made = []
    for number, hook in enumerate(hooks):
        metadata = {"hook": hook, "model": model.info.to_json(), "tokens": policy.to_json()}
        dictionary = kind(32, 48, metadata=metadata, **({"k": 6} if kind is TopK else {}))
        generator = torch.Generator().manual_seed(number)
        for parameter in dictionary.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        made.append(dictionary.requires_grad_(False))
    return made


def largest(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def by_hand(hf: Any, made: list[Dictionary], tokens: Tensor, *, error_term: bool) -> Tensor:
    """Logits with forward hooks on the blocks of a copy, written for the residual stream alone."""
    twin = copy.deepcopy(hf)
    blocks = twin.transformer.h if hasattr(twin, "transformer") else twin.model.layers
    keep = (tokens == 0) | (torch.arange(tokens.shape[1]) == 0)

    def hook(dictionary: Dictionary) -> Any:
        def replace(_: Any, __: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            f = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc).relu()
            x_hat = f @ dictionary.W_dec + dictionary.b_dec
            new = torch.where(keep[..., None], x, x_hat + (x - x_hat) if error_term else x_hat)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return replace

    for dictionary in made:
        block = int(str(dictionary.origin.gives.hook).split(".")[1])
        blocks[block].register_forward_hook(hook(dictionary))
    return twin(tokens).logits


@pytest.mark.parametrize("error_term", [False, True])
def test_both_routes_give_the_logits_of_hooks_by_hand(model: LanguageModel, plain: Any, error_term: bool) -> None:
    made = dictionaries(model, ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"])
    expected = by_hand(plain, made, TEXT, error_term=error_term)
    with torch.no_grad(), splice(model, made, error_term=error_term):
        bridged, native = model.logits(TEXT), model.hf_model(TEXT).logits
    assert largest(bridged, expected) < TOLERANCE
    assert largest(native, expected) < TOLERANCE


@pytest.mark.parametrize("kind", [ReLU, TopK])
def test_both_routes_agree_on_several_dictionaries(model: LanguageModel, kind: type[Dictionary]) -> None:
    """At four kinds of hook points at once; and later ones read what earlier ones have changed."""
    made = dictionaries(model, kind=kind)
    clean = model.logits(TEXT)
    with torch.no_grad(), splice(model, made):
        bridged, native = model.logits(TEXT), model.hf_model(TEXT).logits
    assert model.hf_model is not model.bridge.original_model
    assert largest(native, bridged) < TOLERANCE
    assert largest(bridged, clean) > 0.01
    with torch.no_grad(), splice(model, made, error_term=True):
        assert largest(model.logits(TEXT), clean) < TOLERANCE
        assert largest(model.hf_model(TEXT).logits, clean) < TOLERANCE
    with torch.no_grad():
        assert torch.equal(model.logits(TEXT), clean)
        assert largest(model.hf_model(TEXT).logits, clean) < TOLERANCE


def test_other_hook_points_are_proved_on_the_model(model: LanguageModel) -> None:
    """The MLP's input has a site; what has none is spliced through the bridge alone, and so is what runs with it."""
    hooks = [hook.name for hook in model.hooks() if hook.block == 1 and hook.width == 32 and hook.refusal is None]
    assert "blocks.1.mlp.hook_in" in hooks
    native = 0
    for hook in hooks:
        [dictionary] = dictionaries(model, [hook])
        with torch.no_grad(), splice(model, dictionary):
            native += model.hf_model is not model.bridge.original_model
            assert largest(model.hf_model(TEXT).logits, model.logits(TEXT)) < TOLERANCE, hook
    assert native >= 5


def test_a_transcoder_reads_and_writes_through_both_routes(model: LanguageModel) -> None:
    [dictionary] = dictionaries(model, ["blocks.1.mlp.hook_in"])
    with torch.no_grad(), splice(model, dictionary, target_hook="blocks.1.hook_mlp_out"):
        bridged = model.logits(TEXT)
        assert model.hf_model is not model.bridge.original_model
        assert largest(model.hf_model(TEXT).logits, bridged) < TOLERANCE
    assert largest(bridged, model.logits(TEXT)) > 0.01


@pytest.fixture(scope="module")
def handed_over(folder: Path, plain: Any) -> LanguageModel:
    from transformers import AutoTokenizer

    return LanguageModel.of(plain, AutoTokenizer.from_pretrained(folder))


def test_a_model_that_is_held_already_is_spliced_itself(
    model: LanguageModel, plain: Any, handed_over: LanguageModel
) -> None:
    made = dictionaries(model)
    with torch.no_grad():
        clean = plain(TEXT).logits
        with splice(model, made):
            expected = model.logits(TEXT)
        with splice(handed_over, made) as spliced:
            assert spliced.hf_model is plain
            assert largest(plain(TEXT).logits, expected) < TOLERANCE
            assert largest(handed_over.logits(TEXT), expected) < TOLERANCE
        with splice(handed_over, made, error_term=True):
            assert largest(plain(TEXT).logits, clean) < TOLERANCE
        assert torch.equal(plain(TEXT).logits, clean)


def test_a_model_that_is_held_already_is_the_same_model(
    folder: Path, model: LanguageModel, plain: Any, handed_over: LanguageModel
) -> None:
    """Dictionaries belong to it; its weights are shared and stay trainable."""
    same = ("weights_sha256", "config_sha256", "tokenizer_sha256", "tokenizer_ids_sha256", "max_context", "dtype")
    assert [getattr(handed_over.info, key) for key in same] == [getattr(model.info, key) for key in same]
    assert handed_over.info.name == folder.name
    assert all(parameter.requires_grad for parameter in plain.parameters())
    weights = {parameter.data_ptr() for parameter in plain.parameters()}
    assert weights & {parameter.data_ptr() for parameter in handed_over.bridge.parameters()}
    assert handed_over.hooks() == model.hooks()
    hook = "blocks.2.hook_resid_pre"
    here, there = (one.activations(TEXT, hook)[hook] for one in (handed_over, model))
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    logits = next(handed_over.replaced_logits(TEXT, hook, [perturbed]))
    assert largest(logits, next(model.replaced_logits(TEXT, hook, [perturbed]))) < TOLERANCE


def test_gradients_reach_the_weights_of_a_model_that_is_held(
    model: LanguageModel, plain: Any, handed_over: LanguageModel
) -> None:
    with splice(handed_over, dictionaries(model), error_term=True):
        plain(TEXT).logits[:, -1, 5].sum().backward()
    assert plain.get_input_embeddings().weight.grad.abs().max() > 0
    plain.zero_grad()


def test_what_is_no_language_model_is_refused(model: LanguageModel, plain: Any) -> None:
    CHECKED_CALLS.count = CheckedCalls.LIMIT  # types are not checked in users' runs
    with pytest.raises(ConfigError, match=r"expected a sae\.LanguageModel; .*sae\.LanguageModel\.of\(model, tokenizer"):
        splice(plain, dictionaries(model)[0]).__enter__()
    with pytest.raises(ConfigError, match=r"language model of type str: expected a Hugging Face model"):
        LanguageModel.of("gpt2", None)
    with pytest.raises(ConfigError, match=r"in training mode, in which dropout acts: call model\.eval\(\) first"):
        LanguageModel.of(plain.train(), model.tokenizer)
    plain.eval()


def test_a_hook_point_without_a_module_is_refused_where_a_splice_would_miss_the_model(
    model: LanguageModel, handed_over: LanguageModel
) -> None:
    for hook in [one.name for one in model.hooks() if one.block == 1 and one.width == 32 and one.refusal is None]:
        [dictionary] = dictionaries(model, [hook])
        with splice(model, dictionary):
            bridged = model.hf_model is model.bridge.original_model
        if bridged:
            with pytest.raises(ModelError, match=f"hook '{hook}': not the input or output of a module"):
                splice(handed_over, dictionary).__enter__()
