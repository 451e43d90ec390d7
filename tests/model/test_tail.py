"""From a hook point to logits: one road, proved on the model, against plain hooks on the Hugging Face model."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from sae.config.sources import ModelConfig
from sae.errors import ModelError
from sae.model.language_model import LanguageModel
from sae.model.tail import NO_ROAD, SHORT, WHOLE

RESID, POST, MLP, HEADS = (
    "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z"
)  # fmt: skip
POSITIONS = torch.tensor([[0, 3, 9], [1, 1, 11], [10, 4, 2]])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny BLOOM: its embeddings go through a norm of their own, and its blocks give attention weights too."""
    from families import write_model

    return LanguageModel(ModelConfig(name=str(write_model("bloom", tmp_path_factory.mktemp("bloom") / "bloom"))))


def picked(logits: Tensor) -> Tensor:
    return torch.stack([row[places] for row, places in zip(logits, POSITIONS, strict=True)])


def by_hook(model: LanguageModel, tokens: Tensor, hook: str, change: Any) -> Tensor:
    """The whole model with transformer-lens's own hook."""
    with torch.no_grad():
        return model.bridge.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: change(x))])


HOOKS = [RESID, "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", POST, MLP, HEADS, "blocks.1.attn.hook_k"]


@pytest.mark.parametrize("hook", HOOKS)
def test_the_short_road_gives_the_bits_of_the_whole_one(
    language_model: LanguageModel, bloom: LanguageModel, tokens: Tensor, hook: str
) -> None:
    for model in (language_model, bloom):
        assert model.tail(hook).road.name == SHORT
        changes = (torch.clone, torch.zeros_like, lambda x: 0.5 * x.flip(-1) + 0.1)
        logits = list(model.replaced_logits(tokens, hook, changes))
        torch.testing.assert_close(logits[0], model.logits(tokens), rtol=0, atol=0)
        if hook != HEADS:  # there a flip of each head by itself is another change
            for ours, change in zip(logits, changes, strict=True):
                if not hook.endswith("hook_k") or change is torch.zeros_like:
                    torch.testing.assert_close(ours, by_hook(model, tokens, hook, change), rtol=0, atol=0)
        assert (logits[1] - logits[0]).abs().max() > 1e-4


@pytest.mark.parametrize("hook", [*HOOKS[:4], MLP, HEADS])
def test_read_outs_are_those_logits_at_the_positions_asked_for(
    language_model: LanguageModel, bloom: LanguageModel, tokens: Tensor, hook: str
) -> None:
    for model in (language_model, bloom):
        tail = model.tail(hook)
        start = tail.start(tokens)
        x = tail.activations(start)
        torch.testing.assert_close(x, model.bridge_activations(tokens, [hook])[hook], rtol=0, atol=0)
        for new in (x, 0.5 * x.flip(-1) + 0.1):
            readout = tail.read_out(start, new, POSITIONS)
            expected = next(model.replaced_logits(tokens, hook, [lambda _, new=new: new]))
            torch.testing.assert_close(readout.logits, picked(expected), rtol=1e-4, atol=1e-4)
        last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
        final = tail.read_out(start, x, POSITIONS).final
        torch.testing.assert_close(final, picked(model.activations(tokens, [last])[last]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_contexts_can_be_repeated_and_cut_short(
    language_model: LanguageModel, bloom: LanguageModel, tokens: Tensor, hook: str
) -> None:
    for model in (language_model, bloom):
        tail, which = model.tail(hook), torch.tensor([2, 0, 0, 1])
        start = tail.start(tokens)
        x = tail.activations(start)
        readout = tail.read_out(start.at(which, 8), x[which, :8], torch.full((4, 1), 7))
        torch.testing.assert_close(readout.logits[:, 0], model.logits(tokens)[which, 7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_the_model_is_left_as_it_was(language_model: LanguageModel, tokens: Tensor, hook: str) -> None:
    before, blocks = language_model.logits(tokens), list(language_model.bridge.blocks)
    tail = language_model.tail(hook)
    start = tail.start(tokens)
    x = tail.activations(start)
    tail.read_out(start, torch.zeros_like(x), POSITIONS)
    with pytest.raises(RuntimeError):
        tail.read_out(start, torch.zeros_like(x), POSITIONS + 12)  # no such position
    assert all(now is then for now, then in zip(language_model.bridge.blocks, blocks, strict=True))
    assert not any(point.fwd_hooks for point in language_model.bridge.hook_dict.values())
    torch.testing.assert_close(language_model.logits(tokens), before, rtol=0, atol=0)


@pytest.fixture(scope="module")
def twelve(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A GPT-2 of twelve blocks."""
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("twelve") / "twelve"
    shutil.copytree(tiny_model, folder)  # for the tokenizer
    config = GPT2Config(n_embd=64, n_layer=12, n_head=4, n_positions=64, vocab_size=400, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return LanguageModel(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("hook", "once"),
    [("blocks.8.hook_resid_pre", 8), ("blocks.8.hook_mlp_out", 8), ("blocks.8.hook_resid_post", 9)],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_blocks_before_the_hook_point_run_once_and_the_others_once_a_replacement(
    twelve: LanguageModel, tokens: Tensor, hook: str, once: int, wrapped: bool
) -> None:
    twelve.tail(hook)  # proved when first asked for
    calls: Counter[int] = Counter()
    blocks = list(twelve.bridge.blocks)
    modules = blocks if wrapped else [block.ln1 for block in blocks]
    handles = [
        module.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
        for number, module in enumerate(modules)
    ]
    try:
        list(twelve.replaced_logits(tokens, hook, [torch.clone, torch.zeros_like, torch.ones_like]))
    finally:
        for handle in handles:
            handle.remove()
    assert [calls[number] for number in range(12)] == [1] * once + [3] * (12 - once)


def test_three_replacements_at_block_8_of_12_take_half_the_time_of_three_whole_passes(twelve: LanguageModel) -> None:
    """Counted in blocks it is (8 + 3 · 4) / 36 = 0.56."""
    tokens = torch.randint(1, 300, (16, 64), generator=torch.Generator().manual_seed(0))
    hook, changes = "blocks.8.hook_resid_pre", [torch.clone, torch.zeros_like, torch.ones_like]
    ours, whole = [], []
    list(twelve.replaced_logits(tokens, hook, changes))
    for _ in range(5):
        started = time.process_time()
        list(twelve.replaced_logits(tokens, hook, changes))
        ours.append(time.process_time() - started)
        started = time.process_time()
        for change in changes:
            by_hook(twelve, tokens, hook, change)
        whole.append(time.process_time() - started)
    assert min(ours) < 0.85 * min(whole), (min(ours), min(whole))


def test_a_short_road_that_is_wrong_is_not_taken(tiny_model: Path, tokens: Tensor) -> None:
    """A block that also writes where a later one reads: without it the later one reads what is old."""
    model = LanguageModel(ModelConfig(name=str(tiny_model)))
    seen: dict[str, Tensor] = {}
    blocks = list(model.bridge.blocks)
    blocks[0].original_component.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0]))
    ln = blocks[2].original_component.ln_1
    ln.register_forward_hook(lambda _, __, output: output + seen.pop("x"))
    road = model.tail("blocks.1.hook_resid_pre").road
    assert road.name == WHOLE and road.reason == "KeyError on the short one"
    clean = model.logits(tokens)
    torch.testing.assert_close(next(model.replaced_logits(tokens, RESID, [torch.clone])), clean, rtol=0, atol=0)
    ln._forward_hooks.clear()
    ln.register_forward_hook(lambda _, __, output: output + seen["x"])
    road = model.tail("blocks.1.hook_mlp_out").road  # what it reads is there, and of the pass before
    assert road.name == WHOLE and road.reason is not None and road.reason.startswith("the short one is off by ")


def test_what_is_not_exact_on_the_whole_model_is_refused(tiny_model: Path, tokens: Tensor) -> None:
    model = LanguageModel(ModelConfig(name=str(tiny_model)))
    point = model.bridge.hook_dict[RESID]
    forward = point.forward
    point.forward = lambda x: 1.01 * forward(x) if point.fwd_hooks else forward(x)
    with pytest.raises(ModelError) as caught:
        list(model.replaced_logits(tokens, RESID, [torch.clone]))
    assert str(caught.value).startswith(
        f"hook {RESID!r}: putting back its own activations changes the logits of tiny by up to "
    )
    assert str(caught.value).endswith("use another hook point ('sae hooks tiny' lists them)")
    refused = {hook.name: hook.refusal for hook in model.hooks() if hook.refusal}
    assert refused[RESID].startswith("putting back its own activations changes the logits by ")
    assert [name for name in refused if not name.endswith(("resid_mid", "normalized"))] == [RESID]


def test_what_replacing_does_not_change_is_refused(tiny_model: Path) -> None:
    model = LanguageModel(ModelConfig(name=str(tiny_model)))
    with torch.no_grad():
        for block in model.bridge.blocks:
            block.original_component.mlp.c_proj.weight.zero_()
    with pytest.raises(ModelError, match=r"'blocks.1.mlp.hook_pre': replacing its activations leaves the logits of"):
        model.tail("blocks.1.mlp.hook_pre")


def test_gradients_reach_what_is_put_at_a_hook_point(language_model: LanguageModel, tokens: Tensor) -> None:
    """∂ logit / ∂ scale of the activations, against a finite difference."""
    scale = torch.ones((), requires_grad=True)
    with language_model.replacing(RESID, lambda x: scale * x):
        logit = language_model.logits(tokens)[0, -1, 7]
    (slope,) = torch.autograd.grad(logit, scale)
    bigger, smaller = (
        next(language_model.replaced_logits(tokens, RESID, [lambda x, factor=factor: factor * x]))[0, -1, 7]
        for factor in (1.01, 0.99)
    )
    torch.testing.assert_close(slope, (bigger - smaller) / 0.02, rtol=1e-2, atol=1e-4)
    assert not language_model.logits(tokens).requires_grad  # weights have none
    with torch.no_grad(), language_model.replacing(RESID, lambda x: scale * x):
        assert not language_model.logits(tokens).requires_grad


def test_a_hook_point_that_cannot_be_replaced(language_model: LanguageModel) -> None:
    with pytest.raises(ModelError, match="can read hook_resid_mid but not replace it"):
        language_model.tail("blocks.1.hook_resid_mid")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_masked_language_model_has_activations_and_no_losses(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "masked")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "masked")
    model = LanguageModel(str(tmp_path / "masked"))
    hook = "blocks.1.hook_resid_pre"
    assert model.activations(torch.arange(6)[None], [hook])[hook].shape == (1, 6, 32)
    with pytest.raises(ModelError, match=r"masked is not a causal language model: its logits .* no next-token loss"):
        model.tail(hook)
    road = model.road(hook)
    assert (road.name, "not a causal language model" in str(road.reason)) == (NO_ROAD, True)
    assert "losses of the language model are left out (masked is not a causal" in str(road)
