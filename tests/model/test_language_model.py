from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.config.sources import ModelConfig
from sae.dictionary.hook_points import KINDS, READ_ONLY
from sae.dictionary.model_identity import model_label
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ModelError
from sae.model.language_model import LanguageModel
from sae.model.passes import Pass

LAYERS = range(3)
OF_OTHERS = ("mamba.", "mixer.", "linear_attn.", "conv.", "mlp.hook_pre_linear")
HAS = [kind for kind in KINDS if not kind.startswith(OF_OTHERS)]
ALL_HOOKS = [f"blocks.{layer}.{kind}" for layer in LAYERS for kind in HAS]
REPLACEABLE = [hook for hook in ALL_HOOKS if hook.split(".", 2)[2] not in READ_ONLY]


@pytest.fixture(scope="module")
def hf_model(tiny_model: Path) -> Any:
    """The same weights, without transformer-lens."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def at_hf(model: Any, hook: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show `change` the activation that Hugging Face's GPT-2 has at `hook`; what it returns takes its place."""
    _, layer, kind = hook.split(".", 2)
    block = model.transformer.h[int(layer)]
    module, is_input = {
        "hook_resid_pre": (block, True),
        "ln1.hook_in": (block.ln_1, True),
        "ln1.hook_normalized": (block.ln_1, True),
        "attn.hook_in": (block.attn, True),
        "attn.hook_q": (block.attn.c_attn, False),
        "attn.hook_k": (block.attn.c_attn, False),
        "attn.hook_v": (block.attn.c_attn, False),
        "hook_resid_mid": (block.ln_2, True),
        "hook_mlp_in": (block.ln_2, True),
        "ln2.hook_normalized": (block.ln_2, True),
        "mlp.hook_in": (block.mlp, True),
        "mlp.hook_pre": (block.mlp.act, True),
        "hook_resid_post": (block, False),
        "hook_attn_out": (block.attn, False),
        "hook_mlp_out": (block.mlp, False),
        "attn.hook_z": (block.attn.c_proj, True),
        "mlp.hook_post": (block.mlp.act, False),
    }[kind]
    third = "qkv".find(kind[-1]) if kind in ("attn.hook_q", "attn.hook_k", "attn.hook_v") else None

    def changed(x: Tensor) -> Tensor | None:
        if kind.endswith("hook_normalized"):
            return change((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
        if third is None:
            return change(x)
        parts = list(x.chunk(3, -1))
        new = change(parts[third])
        return None if new is None else torch.cat([*parts[:third], new, *parts[third + 1 :]], -1)

    def on_input(_: Any, inputs: tuple[Any, ...]) -> Any:
        new = changed(inputs[0])
        return None if new is None else (new, *inputs[1:])

    def on_output(_: Any, __: Any, output: Any) -> Any:
        new = changed(output[0] if isinstance(output, tuple) else output)
        return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_pre_hook(on_input) if is_input else module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def hf_activation(model: Any, tokens: Tensor, hook: str) -> Tensor:
    found: list[Tensor] = []
    with at_hf(model, hook, lambda x: found.append(x.clone())):
        model(tokens)
    return found[0]


def close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_residual_stream_equals_hugging_face_hidden_states(
    language_model: LanguageModel, hf_model: Any, tokens: Tensor, layer: int
) -> None:
    states = hf_model(tokens, output_hidden_states=True).hidden_states
    pre, post = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_post"
    close(language_model.activations(tokens, [pre])[pre], states[layer])
    ours = language_model.activations(tokens, [post])[post]
    if layer == LAYERS[-1]:  # the last of hidden_states has gone through the final norm
        close(hf_model.transformer.ln_f(ours), states[-1])
    else:
        close(ours, states[layer + 1])


@pytest.mark.parametrize("hook", ALL_HOOKS)
def test_every_hook_equals_hugging_face(
    language_model: LanguageModel, hf_model: Any, tokens: Tensor, hook: str
) -> None:
    ours = language_model.activations(tokens, [hook])
    assert list(ours) == [hook]
    close(ours[hook], hf_activation(hf_model, tokens, hook))


def test_one_pass_for_many_hooks_equals_one_for_each(language_model: LanguageModel, tokens: Tensor) -> None:
    together = language_model.activations(tokens, ALL_HOOKS)
    assert set(together) == set(ALL_HOOKS)
    for hook in ALL_HOOKS:
        close(together[hook], language_model.activations(tokens, [hook])[hook])
    close(language_model.logits(tokens), language_model.bridge(tokens))


@pytest.mark.parametrize("road", ["activations", "bridge_activations"])
def test_a_pass_stops_at_the_last_hook_asked_for(language_model: LanguageModel, tokens: Tensor, road: str) -> None:
    ran: list[int] = []
    native = language_model._native
    assert native is not None
    blocks = native.blocks if road == "activations" else language_model.bridge.original_model.transformer.h
    language_model.reader(ALL_HOOKS)  # the proof runs whole blocks
    handles = [
        block.ln_1.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(blocks)
    ]
    for hooks, expected in (
        (["blocks.1.hook_resid_pre"], [0]),
        (["blocks.1.hook_resid_post"], [0, 1]),
        (["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out"], [0, 1]),
    ):
        ran.clear()
        getattr(language_model, road)(tokens, hooks)
        assert ran == expected
    for handle in handles:
        handle.remove()


def test_logits_equal_hugging_face(language_model: LanguageModel, hf_model: Any, tokens: Tensor) -> None:
    close(language_model.logits(tokens), hf_model(tokens).logits)


@pytest.mark.parametrize("hook", REPLACEABLE)
def test_replaced_logits_equal_hugging_face_with_the_same_replacement(
    language_model: LanguageModel, hf_model: Any, tokens: Tensor, hook: str
) -> None:
    replacements = [lambda x: x, torch.zeros_like, lambda x: 0.5 * x.flip(-1) + 0.1]
    for ours, change in zip(language_model.replaced_logits(tokens, hook, replacements), replacements, strict=True):
        with at_hf(hf_model, hook, change):
            close(ours, hf_model(tokens).logits)
    clean = language_model.logits(tokens)
    close(next(language_model.replaced_logits(tokens, hook, [lambda x: x])), clean)
    zeroed = next(language_model.replaced_logits(tokens, hook, [torch.zeros_like]))
    assert (zeroed - clean).abs().max() > 0.001


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_between_replacements_the_model_is_as_it_was(language_model: LanguageModel, tokens: Tensor, hook: str) -> None:
    clean = language_model.logits(tokens)
    for _ in language_model.replaced_logits(tokens, hook, [torch.zeros_like, torch.ones_like]):
        torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_replacing_shows_the_tokens_of_that_pass_only(language_model: LanguageModel, tokens: Tensor, hook: str) -> None:
    seen: list[Tensor | None] = []

    def look(x: Tensor, now: Pass | None) -> Tensor:
        assert now is not None
        seen.append(now.tokens)
        return x

    resid = language_model.activations(tokens, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    with language_model.replacing(hook, look, with_pass=True):
        language_model.logits(tokens)
        language_model.bridge(resid, start_at_layer=1)
        language_model.logits(tokens + 1)
    assert [None if ids is None else ids.tolist() for ids in seen] == [tokens.tolist(), None, (tokens + 1).tolist()]
    language_model.logits(tokens)
    assert len(seen) == 3


def test_resid_mid_is_read_but_not_replaced(language_model: LanguageModel, tokens: Tensor) -> None:
    hook = "blocks.1.hook_resid_mid"
    message = r"'blocks.1.hook_resid_mid': transformer-lens can read hook_resid_mid but not replace it"
    with pytest.raises(ModelError, match=message):
        next(language_model.replaced_logits(tokens, hook, [torch.zeros_like]))
    with pytest.raises(ModelError, match=message), language_model.replacing(hook, torch.zeros_like):
        pass


@pytest.mark.parametrize("processing", ["none", "fold_ln", "center_and_fold"])
def test_weight_processing_keeps_probabilities_and_unembedding(
    processing: Any, tiny_model: Path, hf_model: Any, tokens: Tensor
) -> None:
    model = LanguageModel(ModelConfig(name=str(tiny_model), weight_processing=processing))
    close(model.logits(tokens).log_softmax(-1), hf_model(tokens).logits.log_softmax(-1))
    assert model.info.weight_processing == processing
    resid = model.activations(tokens, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    if processing == "center_and_fold":
        close(resid.mean(-1), torch.zeros(3, 20))
    centred = resid - resid.mean(-1, keepdim=True)
    sigma = (centred.square().mean(-1, keepdim=True) + hf_model.config.layer_norm_epsilon).sqrt()
    bias = hf_model.transformer.ln_f.bias @ hf_model.lm_head.weight.T
    by_hand = resid @ model.unembedding() / sigma + bias
    close(by_hand.log_softmax(-1), hf_model(tokens).logits.log_softmax(-1))


@pytest.mark.parametrize("processing", ["none", "fold_ln", "center_and_fold"])
def test_unembedding_of_a_norm_whose_gain_is_one_plus_its_weight(
    processing: Any, tiny_model: Path, tokens: Tensor, tmp_path: Path
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path / "gemma")  # for the tokenizer
    config = Gemma2Config(
        vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, final_logit_softcapping=None,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gemma = Gemma2ForCausalLM(config).eval().requires_grad_(False)
        gemma.model.norm.weight += torch.randn(16)
    gemma.save_pretrained(folder)
    model = LanguageModel(ModelConfig(name=str(folder), weight_processing=processing))
    hook = "blocks.1.hook_resid_post"
    resid = model.activations(tokens, [hook])[hook]
    by_hand = resid @ model.unembedding() / (resid.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    logits = gemma(tokens).logits
    assert logits.std() > 0.01
    close(by_hand.log_softmax(-1), logits.log_softmax(-1))


def test_reading_activations_leaves_others_hooks_and_takes_its_own_away(
    language_model: LanguageModel, tokens: Tensor
) -> None:
    clean = language_model.logits(tokens)
    with language_model.replacing("blocks.1.hook_mlp_out", torch.zeros_like):
        zeroed = language_model.logits(tokens)
        for hooks in (["blocks.0.hook_mlp_out", "blocks.2.hook_attn_out"], ["blocks.2.hook_resid_post"]):
            assert set(language_model.activations(tokens, hooks)) == set(hooks)
            torch.testing.assert_close(language_model.logits(tokens), zeroed, rtol=0, atol=0)
    assert (zeroed - clean).abs().max() > 0.01
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)
    assert not any(point.fwd_hooks for point in language_model.bridge.hook_dict.values())


def test_compute_dtype_is_used_and_logits_are_float32(tiny_model: Path, tokens: Tensor) -> None:
    model = LanguageModel(ModelConfig(name=str(tiny_model), dtype="bfloat16"))
    hook = "blocks.1.hook_resid_pre"
    assert model.activations(tokens, [hook])[hook].dtype == torch.bfloat16
    assert model.logits(tokens).dtype == torch.float32
    doubled = next(model.replaced_logits(tokens, hook, [lambda x: x.float()]))  # a float32 dictionary's output
    torch.testing.assert_close(doubled, model.logits(tokens))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.3.hook_resid_pre", r"hook 'blocks.3.hook_resid_pre': tiny has blocks 0 to 2"),
        (
            "blocks.1.hook_resid_pst",
            r"expected blocks.N. and one of hook_resid_pre, .* did you mean blocks.1.hook_resid_p",
        ),
        ("resid_pre", r"did you mean blocks.0.hook_resid_pre\?"),
        ("blocks.-1.hook_mlp_out", r"expected blocks.N."),
        ("", r"hook '': expected blocks.N."),
    ],
)
def test_wrong_hooks_are_explained(language_model: LanguageModel, hook: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        language_model.check_hook(hook)


def test_contexts_longer_than_the_model_reads(language_model: LanguageModel) -> None:
    language_model.check_context_length(64)
    with pytest.raises(ModelError, match=r"data.context_length=65: tiny reads at most 64 tokens"):
        language_model.check_context_length(65)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", r"model '/no/such/folder': no such folder or file"),
        ("model.gguf", r"model 'model.gguf': no such folder or file"),
        (
            "nobody/no-such-model",
            r"model 'nobody/no-such-model': neither a folder nor a file here, and not in the hub's cache",
        ),
    ],
)
def test_missing_models_are_explained_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        LanguageModel(ModelConfig(name=name))
    assert "\n" not in str(caught.value)


def test_folder_without_a_model(text_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"corpus': cannot be loaded \(.*\); the folder has no config") as caught:
        LanguageModel(ModelConfig(name=str(text_folder)))
    assert "\n" not in str(caught.value)


def test_identity_changes_with_one_weight_and_not_with_the_folder(
    tiny_model: Path, language_model: LanguageModel, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "moved" / "tiny")
    assert LanguageModel(ModelConfig(name=str(copy))).info == language_model.info
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.2.mlp.c_fc.bias"][5] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    info = LanguageModel(ModelConfig(name=str(copy))).info
    assert info.weights_sha256 != language_model.info.weights_sha256
    assert info.tokenizer_sha256 == language_model.info.tokenizer_sha256


def test_labels_are_the_last_part_of_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "models" / "mine")
    for name, label in {
        "demo": "demo",
        "gpt2": "gpt2",
        "openai-community/gpt2": "openai-community/gpt2",
        "~/models/mine": "mine",
        "~/models/mine/": "mine",
        ".": "mine",
        "/gone/other": "other",
        "gone/model.gguf": "model.gguf",
    }.items():
        assert model_label(name) == label


def test_token_policy_has_the_tokenizers_special_tokens(language_model: LanguageModel) -> None:
    special = language_model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    policy = language_model.token_policy(prepend_bos=True, masked_positions=0, mask_special_tokens=True)
    assert policy.masked_ids == (special,)
    assert language_model.bos == language_model.separator == special
    policy = language_model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=False)
    assert policy.masked_ids == ()


def test_tokenizer_without_bos_refuses_to_prepend_it(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_special = SimpleNamespace(bos_token_id=None, eos_token_id=None, all_special_ids=[])
    monkeypatch.setattr(language_model, "tokenizer", nothing_special)
    assert language_model.token_policy(prepend_bos=False, masked_positions=1, mask_special_tokens=True) == TokenPolicy(
        False, True, ()
    )
    with pytest.raises(ModelError, match=r"model 'tiny': its tokenizer has no BOS or EOS token; set data.prepend_bos="):
        language_model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)


def test_undecodable_bytes_of_a_text_become_question_marks(language_model: LanguageModel) -> None:
    expected = language_model.to_tokens("the river? a").tolist()
    assert language_model.to_tokens("the river\udcff a").tolist() == expected
    assert language_model.token_rows(["the river\ud83d a"]) == expected
    assert language_model.to_texts(language_model.text_ids("the river\udcff"))[-1] == "?"
    assert language_model.text_ids("") == []


def test_texts_become_tokens(language_model: LanguageModel) -> None:
    ids = language_model.tokenizer("the river", add_special_tokens=False)["input_ids"]
    assert language_model.to_tokens("the river").tolist() == [[language_model.bos, *ids]]
    assert language_model.to_tokens(["the river"] * 2, prepend_bos=False).tolist() == [ids, ids]
    for nothing in ([], ["the", ""], ""):
        with pytest.raises(ModelError, match="there is no text, or a text has no tokens"):
            language_model.to_tokens(nothing, prepend_bos=False)
    with pytest.raises(ModelError, match=r"the texts have \d+ to \d+ tokens: pass texts of equal length together"):
        language_model.to_tokens(["the", "the river keeps stone houses"])
