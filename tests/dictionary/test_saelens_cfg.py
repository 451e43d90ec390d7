"""What SAELens, SAEBench and sae-probes ask of a dictionary object: cfg, device, dtype, and how it encodes."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.architectures import ARCHITECTURES
from sae.architectures.topk import TopK
from sae.dictionary.base import Dictionary
from sae.dictionary.saved import weights_sha256

D_IN, D_SAE, K = 24, 384, 4
METADATA: dict[str, Any] = {
    "model": {"name": "gpt2", "weight_processing": "none"},
    "hook": "blocks.7.hook_resid_pre",
    "tokens": {"prepend_bos": False, "masked_positions": 1, "masked_ids": [50256]},
    "context_length": 64,
    "data": {"source": "stdlib"},
    "trained": {"tokens": 12_345},
}


def sparse_dictionary(architecture: str, metadata: dict[str, Any] | None = None) -> Dictionary:
    """Random weights of which some 4 of 384 features fire on a standard normal input."""
    cls = ARCHITECTURES[architecture]
    dictionary = cls(D_IN, D_SAE, metadata=metadata, **({"k": K} if "k" in cls.setting_names else {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        directions = torch.randn(D_SAE, D_IN, generator=generator)
        dictionary.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        dictionary.W_enc.copy_(dictionary.W_dec.T)
        dictionary.b_dec.copy_(torch.randn(D_IN, generator=generator))
        for name, parameter in dictionary.named_parameters():
            if name in ("b_enc", "b_gate", "b_mag"):
                noise = torch.randn(D_SAE, generator=generator) * 0.1
                parameter.copy_(noise - 2.3 if architecture in ("relu", "gated") else noise)
            elif name == "threshold":
                parameter.fill_(2.3)
    return dictionary.eval().requires_grad_(False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cfg_has_what_saebench_and_saelens_read(architecture: str) -> None:
    """The names that SAEBench 0.6.0's core evaluation and SAELens's ActivationsStore.from_sae read."""
    cfg = sparse_dictionary(architecture, METADATA).cfg
    theirs = {"relu": "standard_april_update", "matryoshka": "matryoshka_batch_topk"}
    assert is_dataclass(cfg), "SAEBench's sae-probes evaluation calls dataclasses.asdict on it"
    assert asdict(cfg) == cfg.to_dict() == {
        "model_name": "gpt2",
        "hook_name": "blocks.7.hook_resid_pre",
        "hook_layer": 7,
        "hook_head_index": None,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": theirs.get(architecture, architecture),
        "dtype": "float32",
        "device": "cpu",
        "context_size": 64,
        "prepend_bos": False,
        "normalize_activations": "none",
        "apply_b_dec_to_input": True,
        "seqpos_slice": (None,),
        "training_tokens": 12_345,
        "dataset_path": "stdlib",
        "dataset_trust_remote_code": False,
        "model_from_pretrained_kwargs": {},
    }  # fmt: skip
    json.dumps(cfg.to_dict())


def test_what_the_metadata_does_not_say_is_none() -> None:
    cfg = sparse_dictionary("topk").cfg
    unknown = (cfg.model_name, cfg.hook_name, cfg.hook_layer, cfg.context_size, cfg.training_tokens, cfg.dataset_path)
    assert unknown == (None,) * 6
    assert cfg.prepend_bos is True
    assert sparse_dictionary("topk", {"tokens": None, "model": None}).cfg.prepend_bos is True


@pytest.mark.parametrize(
    ("processing", "arguments"),
    [
        ("none", {}),
        ("fold_ln", {"fold_ln": True}),
        ("center_and_fold", {"fold_ln": True, "center_writing_weights": True, "center_unembed": True}),
    ],
)
def test_weight_processing_is_said_in_transformer_lenss_words(processing: str, arguments: dict[str, Any]) -> None:
    metadata = METADATA | {"model": {"name": "gpt2", "weight_processing": processing}}
    assert sparse_dictionary("topk", metadata).cfg.model_from_pretrained_kwargs == arguments


def test_several_sources_of_text_are_one_path() -> None:
    assert sparse_dictionary("topk", METADATA | {"data": {"source": ["a", "b"]}}).cfg.dataset_path == "a, b"


def test_cfg_can_be_changed_and_keeps_what_a_tool_adds() -> None:
    dictionary = sparse_dictionary("topk", METADATA)
    dictionary.cfg.model_name = "pythia"
    dictionary.cfg.metadata = object()  # as SAEBench does
    assert dictionary.cfg.model_name == "pythia"
    assert "metadata" not in dictionary.cfg.to_dict()
    assert dictionary.metadata["model"]["name"] == "gpt2", "the record of the training is another thing"
    assert sparse_dictionary("topk", METADATA).cfg.model_name == "gpt2", "each dictionary has its own"


def test_device_and_dtype_are_those_of_the_weights_and_cfg_follows() -> None:
    dictionary = sparse_dictionary("batch_topk", METADATA)
    assert (dictionary.device, dictionary.dtype) == (torch.device("cpu"), torch.float32)
    dictionary.cfg.hook_name = "elsewhere"
    moved = dictionary.to(device="cpu", dtype=torch.bfloat16)
    assert moved is dictionary, "SAEBench goes on with what .to() returns"
    assert dictionary.dtype is torch.bfloat16
    assert (dictionary.cfg.dtype, dictionary.cfg.hook_name) == ("bfloat16", "elsewhere")
    assert dictionary.double().cfg.dtype == "float64"
    meta = copy.deepcopy(dictionary).to("meta")
    assert (meta.device.type, meta.cfg.device, dictionary.cfg.device) == ("meta", "meta", "cpu")


def test_saelens_finds_the_same_in_cfg_metadata() -> None:
    """Its ActivationsStore.from_sae reads the hook point and the context there."""
    cfg = copy.deepcopy(sparse_dictionary("topk", METADATA).cfg)
    assert (cfg.metadata.hook_name, cfg.metadata.context_size) == ("blocks.7.hook_resid_pre", 64)
    cfg.hook_name = "elsewhere"
    assert cfg.metadata.hook_name == "elsewhere"


def test_a_copy_has_a_cfg_of_its_own() -> None:
    dictionary = sparse_dictionary("topk", METADATA)
    dictionary.cfg.model_name = "pythia"
    copied = copy.deepcopy(dictionary)
    copied.cfg.model_name = "mistral"
    assert (dictionary.cfg.model_name, copied.cfg.model_name) == ("pythia", "mistral")


def test_cfg_leaks_into_nothing_that_is_saved(tmp_path: Path) -> None:
    asked, other = sparse_dictionary("topk", METADATA), sparse_dictionary("topk", METADATA)
    asked.cfg.model_name = "pythia"
    assert asked.state_dict().keys() == other.state_dict().keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert asked.config() == other.config()
    assert weights_sha256(asked) == weights_sha256(other)
    asked.save(tmp_path / "asked")
    other.save(tmp_path / "other")
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "asked" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert sae.load(tmp_path / "asked").cfg == other.cfg


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_what_was_encoded_is_the_forward_pass(architecture: str) -> None:
    """To the last bit, on [B, d] and [B, L, d]: SAEBench compares them elementwise, at 1e-5 of each element."""
    dictionary = sparse_dictionary(architecture)
    x = torch.randn(3, 50, D_IN, generator=torch.Generator().manual_seed(1)) + dictionary.b_dec
    features = dictionary.encode(x)
    l0 = float((features > 0).sum(-1).float().mean())
    assert 1 < l0 < D_SAE / 12, f"{l0} features fire: the sparse products are what is to be compared"
    assert torch.equal(dictionary(x), dictionary.decode(features))
    assert torch.equal(dictionary(x.flatten(0, 1)), dictionary.decode(features).flatten(0, 1))
    expected = features.double() @ dictionary.W_dec.double() + dictionary.b_dec.double()
    torch.testing.assert_close(dictionary.decode(features).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -2.0, -9.0])
def test_decoding_is_the_forward_pass_where_many_are_selected(shift: float) -> None:
    """TopK selects half of all, of which most, few or none fire: dense and sparse products round differently."""
    dictionary = TopK(D_IN, D_SAE, k=D_SAE // 2)
    dictionary.load_state_dict(sparse_dictionary("topk").state_dict())
    with torch.no_grad():
        dictionary.b_enc.fill_(shift)
    dictionary.eval().requires_grad_(False)
    x = torch.randn(3, 50, D_IN, generator=torch.Generator().manual_seed(4)) + dictionary.b_dec
    features = dictionary.encode(x)
    assert ((features > 0).float().mean() < 0.1) == (shift < 0)
    assert torch.equal(dictionary(x), dictionary.decode(features))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoding_is_elementwise_what_the_definition_says(architecture: str) -> None:
    """In float64, from pre-activations alone, whichever way it is computed."""
    dictionary = sparse_dictionary(architecture).double()
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + dictionary.b_dec
    pre = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    if architecture == "topk":
        expected = pre.relu() * (pre >= pre.topk(K, dim=1).values[:, -1:])
    elif architecture == "gated":
        magnitude = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.get_parameter("b_mag")
        expected = magnitude.relu() * (pre > 0)
    else:
        bound = dict(dictionary.named_parameters()).get("threshold", torch.zeros((), dtype=torch.float64))
        expected = pre.relu() * (pre > bound)
    torch.testing.assert_close(dictionary.encode(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_zero_rows_survive(architecture: str) -> None:
    dictionary = sparse_dictionary(architecture)
    for shape in ((3, D_IN), (2, 3, D_IN)):
        features = dictionary.encode(torch.zeros(shape))
        assert torch.isfinite(features).all()
        assert torch.isfinite(dictionary.decode(features)).all()
    assert torch.equal(dictionary.decode(torch.zeros(2, 3, D_SAE)), dictionary.b_dec.expand(2, 3, D_IN))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_mode_and_half_precision_change_no_shape(architecture: str) -> None:
    """sae-probes encodes [B, d] in inference mode; SAEBench may move dictionary and inputs to bfloat16."""
    dictionary = sparse_dictionary(architecture)
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3)) + dictionary.b_dec
    with torch.inference_mode():
        features = dictionary.encode(x)
        assert torch.equal(dictionary.decode(features), dictionary(x))
    assert torch.equal(features, dictionary.encode(x))
    assert dictionary.encode(x.bfloat16()).dtype is torch.float32, "the weights' number type"
    half = copy.deepcopy(dictionary).bfloat16()
    for batch in (x.bfloat16(), x.view(1, 5, D_IN).bfloat16()):
        encoded = half.encode(batch)
        assert (encoded.dtype, encoded.shape) == (torch.bfloat16, (*batch.shape[:-1], D_SAE))
        decoded = half.decode(encoded)
        assert (decoded.dtype, decoded.shape) == (torch.bfloat16, batch.shape)
        assert float((decoded.float().view(5, D_IN) - dictionary(x)).abs().mean()) < 0.1


def test_decoding_gives_every_feature_its_gradient() -> None:
    """Features that are zero have one too, so nothing may be passed over where it is wanted."""
    dictionary = sparse_dictionary("topk")
    features = torch.zeros(2, D_SAE, requires_grad=True)
    dictionary.decode(features).sum().backward()
    torch.testing.assert_close(features.grad, dictionary.W_dec.sum(1).expand(2, D_SAE))


def test_decoding_features_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        sparse_dictionary("topk").decode(torch.zeros(2, 3 * D_SAE))
