"""A model on one device, or spread over several: the same activations and logits, and errors that say the way out.

The hooks by which modules move their inputs are accelerate's, and are there on a CPU too; a second device is not.
"""

from __future__ import annotations

import functools
import importlib.util

import accelerate
import pytest
import torch

import sae
from sae.config.settings import ModelConfig
from sae.errors import ConfigError, ModelError
from sae.model.placement import check_shared
from sae.model.tail import SHORT

HOOKS = ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.attn.hook_z")
MAP: dict[str, str | int] = {"transformer": "cpu", "lm_head": "cpu"}


def spread(monkeypatch: pytest.MonkeyPatch, device_map: dict[str, str | int] | str) -> sae.LanguageModel:
    """The demo model with the hooks that it would have on several devices."""
    with_hooks = functools.partial(accelerate.dispatch_model, force_hooks=True)
    monkeypatch.setattr(accelerate, "dispatch_model", with_hooks)
    return sae.LanguageModel(ModelConfig(name="demo", device_map=device_map))


@pytest.mark.parametrize("device_map", [MAP, "auto", "balanced_low_0", "sequential"], ids=str)
def test_modules_that_move_their_inputs_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, device_map: dict[str, str | int] | str
) -> None:
    whole, model = sae.LanguageModel("demo"), spread(monkeypatch, device_map)
    hooked = [module for module in model.bridge.original_model.modules() if hasattr(module, "_hf_hook")]
    assert len(hooked) > 10, "accelerate has put its hooks"
    assert model.info == whole.info
    assert model.device == torch.device("cpu")
    tokens = model.to_tokens("import os\nimport sys, re")
    assert torch.equal(model.logits(tokens), whole.logits(tokens))
    assert model.reader(HOOKS) == whole.reader(HOOKS)
    for read in ("activations", "bridge_activations"):
        expected = getattr(whole, read)(tokens, HOOKS)
        for hook, x in getattr(model, read)(tokens, HOOKS).items():
            assert torch.equal(x, expected[hook])
    assert torch.equal(model.unembedding(), whole.unembedding())
    for hook in HOOKS[:2]:
        assert model.road(hook) == whole.road(hook)
        one, other = ([next(m.replaced_logits(tokens, hook, [torch.zeros_like]))] for m in (model, whole))
        assert torch.equal(one[0], other[0])
    assert model.road(HOOKS[0]).name == SHORT


def test_a_map_can_be_told_from_another() -> None:
    """Runs with the same model are evaluated together, so its configuration is a key."""
    one, same, other = (ModelConfig(device_map={"": name}) for name in ("cpu", "cpu", "cuda:0"))
    assert len({one, same, other}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "take one out"),
        ({"device_map": "evenly"}, "expected auto, balanced, balanced_low_0, sequential, or a map"),
        ({"device_map": {"transformer": "cpu", "lm_head": "disk"}}, "not on disk or meta"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(name="demo", **settings)  # type: ignore[arg-type]


def test_a_map_that_leaves_modules_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.device_map of 'demo' .*name modules such as .*transformer\.h"):
        sae.LanguageModel(ModelConfig(name="demo", device_map={"transformer.h": "cpu"}))


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there is such a device")
@pytest.mark.parametrize("device", [7, "cuda:7"])
def test_a_device_that_is_missing_is_named(device: str | int) -> None:
    with pytest.raises(ConfigError, match="device 'cuda:7': not available here"):
        sae.LanguageModel(ModelConfig(name="demo", device_map={"": device}))


def test_a_cpu_next_to_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="some modules are on cpu and others are not"):
        sae.LanguageModel(ModelConfig(name="demo", device_map={"transformer": "cuda:0", "lm_head": "cpu"}))


def test_shared_weights_on_another_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate leaves them: the demo model's embedding and last layer are one tensor."""
    model = spread(monkeypatch, MAP).bridge.original_model
    check_shared(model, "demo")
    head = next(module for module in model.modules() if type(module) is torch.nn.Linear and hasattr(module, "_hf_hook"))
    vars(head)["_hf_hook"].execution_device = 1
    with pytest.raises(ConfigError, match=r"is to run on cuda:1, and shares its weights .* put both on one"):
        check_shared(model, "demo")


def test_without_accelerate_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    really = importlib.util.find_spec
    without = lambda name, *rest: None if name == "accelerate" else really(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModelError, match="needs the package accelerate: pip install accelerate"):
        sae.LanguageModel(ModelConfig(name="demo", device_map="auto"))
