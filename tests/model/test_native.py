"""Activations read from transformers' own modules, compared with the bridge's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_model
from family_configs import FAMILIES
from torch import Tensor

from sae.config.sources import ModelConfig
from sae.model.hooked import BRIDGE, NATIVE
from sae.model.language_model import LanguageModel
from sae.model.native_sites import difference, residual_sites

RESID, MLP_OUT = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"
FEW = ["gpt2", "llama", "gpt_neox", "falcon", "gemma2", "opt", "bloom", "mixtral", "openai-gpt"]
ADDED = {"hook_attn_out", "hook_mlp_out"}
BRIDGED = {"ln1.hook_normalized", "ln2.hook_normalized"}
JOINT = {"attn.hook_q", "attn.hook_k", "attn.hook_v"}
"""Of families whose queries, keys and values come from one module."""


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Of other numbers and lengths than the proof's."""
    return torch.randint(0, 90, (3, 33), generator=torch.Generator().manual_seed(0))


def family_model(family: str, folder: Path, **settings: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(write_model(family, folder / family)), **settings))


def check_family(model: LanguageModel, tokens: Tensor) -> set[str]:
    """Compare every hook point that is read natively with the bridge; returns the kinds that all are."""
    hooks = {hook.name: hook.kind for hook in model._hooks.values()}
    model.reader(list(hooks))  # all are looked for together
    native = [name for name in hooks if model.reader(name) == NATIVE]
    expected = model.bridge_activations(tokens, native)
    together = model.activations(tokens, native)
    assert list(together) == native
    for name in native:
        bound = 1e-6 * (1 + len(model.bridge.blocks)) ** 0.5
        assert difference(together[name], expected[name]) <= bound, name
        if name.startswith("blocks.2."):
            assert torch.equal(together[name], model.activations(tokens, name)[name]), name
    return set(hooks.values()) - {hooks[name] for name in hooks.keys() - set(native)}


def check_parts(model: LanguageModel, tokens: Tensor) -> dict[str, int]:
    """Compare what is found from the blocks alone with the bridge; returns the number of each kind."""
    assert model._native is not None
    sites = residual_sites(model._native, model.probe_tokens(2, 24))
    names = [name for name in sites if name in model._hooks]
    expected, found = model.bridge_activations(tokens, names), model._native.read(tokens, sites)
    for name in names:
        assert difference(found[name], expected[name]) <= 1e-6 * (1 + len(model.bridge.blocks)) ** 0.5, name
    kinds = [name.split(".", 2)[2] for name in sites]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("family", FEW)
def test_families_are_read_as_the_bridge_reads_them(family: str, tmp_path: Path, tokens: Tensor) -> None:
    """Parallel and sequential blocks, norms behind the parts, MLPs without a module, outputs changed in place."""
    model = family_model(family, tmp_path)
    kinds = {hook.kind for hook in model._hooks.values()}
    bridged = kinds - check_family(model, tokens)
    joint = {"gpt2", "gpt_neox", "falcon", "bloom", "openai-gpt"}
    shared = {"mlp.hook_post"} if family == "openai-gpt" else set()  # its blocks share one module
    assert bridged == (BRIDGED & kinds) | (JOINT if family in joint else set()) | shared
    counts = check_parts(model, tokens)
    parts = set() if family == "openai-gpt" else ADDED  # it normalises sums
    assert counts == dict.fromkeys(("hook_resid_pre", "hook_resid_post", *parts), 4)


@pytest.mark.slow
def test_all_families_are_read_as_the_bridge_reads_them(tmp_path: Path, tokens: Tensor) -> None:
    residual, added = 0, 0
    for family in FAMILIES:
        try:
            model = family_model(family, tmp_path)
        except Exception as error:
            print(family, error)
            continue
        kinds = check_family(model, tokens)
        assert "hook_resid_pre" in kinds, family
        counts = check_parts(model, tokens)
        residual += counts["hook_resid_pre"] == counts["hook_resid_post"] == 4
        added += all(counts.get(kind) == 4 for kind in ADDED)
    assert residual >= 60
    assert added >= 45


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_the_same_sites(dtype: str, tmp_path: Path) -> None:
    model = family_model("gpt_neox", tmp_path)
    half = family_model("gpt_neox", tmp_path, dtype=dtype)
    for each in (model, half):
        each.reader(list(each._hooks))
    assert len(model._hooks) > 40
    for name in model._hooks:
        assert half._sites([name]) == model._sites([name]), name


def test_recurrent_models_are_read_without_transformer_lens_in_between(tmp_path: Path, tokens: Tensor) -> None:
    model = family_model("mamba", tmp_path)
    assert check_family(model, tokens) == {"hook_resid_pre", "mixer.hook_in", "mixer.hook_out", "hook_resid_post"}
    assert check_parts(model, tokens) == {"hook_resid_pre": 4, "hook_resid_post": 4}


def test_attention_is_fused(language_model: LanguageModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments: Any, **named: Any) -> Tensor:
        calls[0] += 1
        return fused(*arguments, **named)

    assert language_model.reader(MLP_OUT) == NATIVE
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    language_model.activations(tokens, MLP_OUT)
    assert calls == [2]  # of blocks 0 and 1; block 2 does not run


def test_weights_are_shared(language_model: LanguageModel, tokens: Tensor) -> None:
    """A change in place shows in both; the copy of the modules has no weights of its own."""
    assert language_model._native is not None
    bias = language_model._native.blocks[0].mlp.c_proj.bias
    before = language_model.activations(tokens, RESID)[RESID]
    kept = bias.detach().clone()
    try:
        bias.data[3] += 1
        after, bridged = (
            language_model.activations(tokens, RESID)[RESID],
            language_model.bridge_activations(tokens, RESID),
        )
        torch.testing.assert_close((after - before)[..., 3], torch.ones(3, 33), rtol=0, atol=1e-4)
        assert difference(after, bridged[RESID]) <= 1e-6
    finally:
        bias.data.copy_(kept)
    own = {parameter.data_ptr() for parameter in language_model.bridge.original_model.parameters()}
    assert {parameter.data_ptr() for parameter in language_model._native.blocks.parameters()} <= own


def test_changes_at_the_bridge_show(language_model: LanguageModel, tokens: Tensor) -> None:
    """While activations are replaced, those behind are the changed model's, as they would be in the bridge's pass."""
    later = "blocks.2.hook_resid_pre"
    clean = language_model.activations(tokens, later)[later]
    with language_model.replacing(RESID, torch.zeros_like):
        assert language_model.reader(later) == BRIDGE
        changed = language_model.activations(tokens, later)[later]
    assert difference(changed, clean) > 0.1
    assert language_model.reader(later) == NATIVE
    assert torch.equal(language_model.activations(tokens, later)[later], clean)


def test_a_site_with_other_activations_is_not_used(tiny_model: Path, tokens: Tensor) -> None:
    """As if transformer-lens scaled what attention adds: not found; what comes after it differs, so it is refused."""
    model = LanguageModel(str(tiny_model))
    point = model.bridge.hook_dict["blocks.0.hook_attn_out"]
    point.add_hook(lambda x, hook: 1.001 * x, is_permanent=True)
    assert model.reader("blocks.0.attn.hook_z") == NATIVE
    for hook in ("blocks.0.hook_attn_out", "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"):
        assert model.reader(hook) == BRIDGE, hook
    assert model.reader(["blocks.0.attn.hook_z", "blocks.0.hook_attn_out"]) == BRIDGE
    together = model.activations(tokens, ["blocks.0.attn.hook_z", "blocks.0.hook_attn_out"])
    torch.testing.assert_close(together, model.bridge_activations(tokens, list(together)), rtol=0, atol=0)


def test_processed_weights_are_read_from_the_bridge(tiny_model: Path) -> None:
    model = LanguageModel(ModelConfig(name=str(tiny_model), weight_processing="fold_ln"))
    assert {model.reader(hook.name) for hook in model.hooks()} == {BRIDGE}
