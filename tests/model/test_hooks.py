"""Which hook points a model has: names, widths, and what is refused; a Llama's against plain transformers hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import write_model
from torch import Tensor

from sae.cli.hooks import block_ranges
from sae.cli.main import cli
from sae.config.file import load_config
from sae.config.sources import ModelConfig
from sae.dictionary import hook_points
from sae.errors import ModelError
from sae.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of width 32, four heads of width 8 for queries and two for keys, an MLP of 48."""
    return write_model("llama", tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(llama_folder)))


@pytest.fixture(scope="module")
def gptj(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model whose attention and MLP read the same input."""
    return LanguageModel(ModelConfig(name=str(write_model("gptj", tmp_path_factory.mktemp("gptj") / "gptj"))))


LLAMA = {
    "hook_resid_pre": ("", True, 32),
    "ln1.hook_in": ("input_layernorm", True, 32),
    "attn.hook_in": ("input_layernorm", False, 32),
    "attn.hook_q": ("self_attn.q_proj", False, 32),
    "attn.hook_k": ("self_attn.k_proj", False, 16),
    "attn.hook_v": ("self_attn.v_proj", False, 16),
    "attn.hook_z": ("self_attn.o_proj", True, 32),
    "hook_attn_out": ("self_attn.o_proj", False, 32),
    "hook_resid_mid": ("post_attention_layernorm", True, 32),
    "hook_mlp_in": ("post_attention_layernorm", True, 32),
    "mlp.hook_in": ("mlp.gate_proj", True, 32),
    "mlp.hook_pre": ("mlp.gate_proj", False, 48),
    "mlp.hook_pre_linear": ("mlp.up_proj", False, 48),
    "mlp.hook_post": ("mlp.down_proj", True, 48),
    "hook_mlp_out": ("mlp.down_proj", False, 32),
    "hook_resid_post": ("", False, 32),
}
"""By kind: the module of a block of Hugging Face's Llama, whether it is its input, and the width."""


def test_a_llamas_activations_are_those_of_transformers(llama: LanguageModel, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    tokens, found = llama.probe_tokens(2, 16), dict[str, Tensor]()

    def keep(kind: str, of_input: bool) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            found[kind] = inputs[0] if of_input else output

        return hook

    block = plain.model.layers[2]
    for kind, (module, of_input, _) in LLAMA.items():
        (block.get_submodule(module) if module else block).register_forward_hook(keep(kind, of_input))
    plain(tokens)
    ours = llama.activations(tokens, [f"blocks.2.{kind}" for kind in LLAMA])
    for kind, (_, _, width) in LLAMA.items():
        assert ours[f"blocks.2.{kind}"].shape == (2, 16, width)
        torch.testing.assert_close(ours[f"blocks.2.{kind}"], found[kind], rtol=1e-4, atol=1e-4)
    for name in ("ln1", "ln2"):
        source = found["hook_resid_pre" if name == "ln1" else "hook_resid_mid"]
        normalised = source / (source.square().mean(-1, keepdim=True) + plain.config.rms_norm_eps).sqrt()
        hook = f"blocks.2.{name}.hook_normalized"
        torch.testing.assert_close(llama.activations(tokens, [hook])[hook], normalised, rtol=1e-4, atol=1e-4)


def test_hooks_are_listed_with_their_widths(llama: LanguageModel) -> None:
    hooks = llama.hooks()
    widths = {hook.kind: hook.width for hook in hooks if hook.block == 3}
    assert widths == {kind: width for kind, (_, _, width) in LLAMA.items()} | dict.fromkeys(
        ("ln1.hook_normalized", "ln2.hook_normalized"), 32
    )
    assert list(widths) == [kind for kind in hook_points.KINDS if kind in widths]
    assert len(hooks) == 4 * len(widths)
    read_only = {hook.kind for hook in hooks if hook.refusal}
    assert read_only == {"hook_resid_mid", "ln1.hook_normalized", "ln2.hook_normalized"}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "mamba"])
def test_names_that_mean_something_else_in_a_family_are_not_there(family: str, tmp_path: Path) -> None:
    """transformer-lens calls a mixture's input `mlp.hook_pre`; DeepSeek's keys have heads before positions."""
    model = LanguageModel(ModelConfig(name=str(write_model(family, tmp_path / family))))
    kinds = {hook.kind: hook for hook in model.hooks() if hook.block == 2}
    assert not {"mlp.hook_pre", "mlp.hook_post"} & kinds.keys()
    if family == "deepseek_v2":
        assert (kinds["attn.hook_k"].width, kinds["attn.hook_v"].width) == (4 * 16, 4 * 8)
    if family == "mamba":
        assert list(kinds) == ["hook_resid_pre", "mixer.hook_in", "mixer.hook_out", "hook_resid_post"]
    tokens = model.probe_tokens(2, 9)
    for name, x in model.activations(tokens, [hook.name for hook in kinds.values()]).items():
        assert x.shape == (2, 9, kinds[name.split(".", 2)[2]].width)


def test_a_hook_point_that_a_model_lacks(gptj: LanguageModel) -> None:
    with pytest.raises(ModelError) as caught:
        gptj.check_hook("blocks.1.hook_resid_mid")
    message = str(caught.value)
    assert message.startswith(
        "hook 'blocks.1.hook_resid_mid': block 1 of gptj has no hook_resid_mid; it has hook_resid_"
    )
    assert message.endswith("hook_mlp_out, hook_resid_post; did you mean blocks.1.hook_resid_pre?")


def test_a_lacking_hook_point_is_refused_before_any_text_is_read(gptj: LanguageModel, tiny_config: Any) -> None:
    from sae.activations.harvest import harvest

    config = tiny_config(harvest__hooks=["blocks.1.hook_resid_mid"], data__source="/no/such/text")
    with pytest.raises(ModelError, match="block 1 of gptj has no hook_resid_mid"):
        harvest(config, gptj)


def test_what_feeds_the_mlp_alone_leaves_the_residual_stream(llama: LanguageModel) -> None:
    """`hook_mlp_in` at 0: the MLP sees 0, and the skip connection does not."""
    tokens = llama.probe_tokens(2, 9)
    kinds = ("hook_mlp_in", "mlp.hook_in", "hook_mlp_out")
    zeroed = [next(llama.replaced_logits(tokens, f"blocks.3.{kind}", [torch.zeros_like])) for kind in kinds]
    torch.testing.assert_close(zeroed[0], zeroed[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zeroed[1], zeroed[2], rtol=1e-4, atol=1e-5)
    assert (zeroed[0] - llama.logits(tokens)).abs().max() > 1e-3


def test_the_command_lists_them(llama_folder: Path) -> None:
    result = CliRunner().invoke(cli, ["hooks", str(llama_folder), "device=cpu"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "llama: 4 blocks, residual stream of width 32; names are blocks.N. plus"
    rows = {line.split()[0]: line.split()[1:4] for line in lines[2:]}
    assert rows["attn.hook_k"] == ["16", "0-3", "yes"]
    assert rows["hook_resid_mid"] == ["32", "0-3", "no"]
    assert rows.keys() == LLAMA.keys() | {"ln1.hook_normalized", "ln2.hook_normalized"}
    refused = CliRunner().invoke(cli, ["hooks", str(llama_folder), "train.lr=1"])
    assert str(refused.exception).startswith("override 'train.lr=1': 'sae hooks' reads device, model.revision, ")


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [([0, 1, 2, 3], "0-3"), ([0, 1, 3], "0-1, 3"), ([1, 3, 5, 7], "1, 3, …, 7"), ([2], "2"), ([0, 3], "0, 3")],
)
def test_blocks_are_written_as_ranges(blocks: list[int], expected: str) -> None:
    assert block_ranges(blocks) == expected


def test_hook_points_have_one_grammar() -> None:
    assert hook_points.split("blocks.12.attn.hook_k") == (12, "attn.hook_k")
    for wrong in ("blocks.01.hook_resid_pre", "blocks.1.hook_pattern", "blocks.-1.hook_resid_pre", "x.blocks.1.hook_q"):
        assert hook_points.split(wrong) is None
    assert hook_points.block_of("blocks.7.attn.hook_pattern") == 7
    places = [hook_points.place_in_model(f"blocks.1.{kind}") for kind in hook_points.KINDS]
    assert places == [(1, number) for number in range(len(hook_points.KINDS))]


def test_the_first_of_several_hook_points_is_named(tmp_path: Path) -> None:
    """On standard error, before anything else; nothing where the choice is made or there is none."""
    several = ["harvest.hooks=[blocks.1.hook_resid_pre, blocks.2.hook_mlp_out]", f"out={tmp_path}"]
    note = (
        "training on blocks.1.hook_resid_pre, the first of 2 hook points in harvest.hooks; set dictionary.reads "
        "for another, or sweep.dictionary.reads for several"
    )
    assert load_config(None, several).hook_note == note
    chosen = [*several, "dictionary.reads=blocks.2.hook_mlp_out"]
    swept = [*several, "sweep.dictionary.reads=[blocks.1.hook_resid_pre, blocks.2.hook_mlp_out]"]
    for silent in (chosen, swept, [f"out={tmp_path}"]):
        assert load_config(None, silent).hook_note is None
    (tmp_path / "config.yaml").write_text("{}")
    result = CliRunner().invoke(cli, ["train", str(tmp_path / "config.yaml"), *several])
    assert note in " ".join(result.stderr.split())
