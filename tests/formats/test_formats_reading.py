"""Dictionaries of other toolkits give what their toolkits' formulas give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import sae
from sae.dictionary.frame import Frame
from sae.errors import FormatError
from sae.formats.foreign import CONVERTED
from tests.support.foreign_files import CASES
from tests.support.foreign_weights import D_IN, D_SAE, Case


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_reconstructions_are_those_of_the_toolkit(case: Case, tmp_path: Path) -> None:
    x = inputs()
    features, expected = case.forward(x)
    dictionary = sae.load(case.write(tmp_path))
    assert dictionary.dtype == torch.float64
    torch.testing.assert_close(dictionary(x), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.5, "a case in which nothing fires shows nothing"
    encoded = dictionary.encode(x)
    if case.exact_features:
        torch.testing.assert_close(encoded, features, rtol=1e-9, atol=1e-9)
    signs = torch.cat([features > 0, features < 0], dim=-1) if dictionary.d_sae > D_SAE else features > 0
    assert torch.equal(encoded > 0, signs)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_same_in_float32(case: Case, tmp_path: Path) -> None:
    x = inputs()
    dictionary = sae.load(case.write(tmp_path), dtype=torch.float32)
    assert dictionary.dtype == torch.float32
    expected = case.forward(x)[1]
    distance = (dictionary(x.float()).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(distance.median()) < 1e-6
    assert int((distance > 1e-5).sum()) <= 2  # a feature that is within rounding of its threshold


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_where_it_belongs_is_known(case: Case, tmp_path: Path) -> None:
    dictionary = sae.load(case.write(tmp_path))
    origin = dictionary.origin
    model = origin.models.get("", {})
    known = {
        "hook": origin.reads.hook,
        "target": origin.gives.hook if origin.of_transcoder else None,
        "context_length": origin.context_length,
        "model": model.get("name"),
        "processing": model.get("weight_processing"),
        "tokens": origin.tokens,
    }
    assert {key: known[key] for key in case.metadata} == case.metadata
    assert dictionary.metadata[CONVERTED]["format"]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_converted_dictionary_is_saved_and_loaded_like_any_other(case: Case, tmp_path: Path) -> None:
    dictionary = sae.load(case.write(tmp_path / "theirs"))
    dictionary.save(tmp_path / "ours")
    again = sae.load(tmp_path / "ours")
    x = inputs()
    torch.testing.assert_close(again(x), dictionary(x), rtol=1e-12, atol=1e-12)
    for name, parameter in dictionary.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    assert again.metadata == dictionary.metadata
    norms = again.W_dec.norm(dim=-1)
    kept = any("kept" in part for part in again.metadata[CONVERTED]["folded"])
    assert kept or torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["saelens gated", "sparsify", "dictionary_learning AutoEncoder", "gemma scope", "openai"]
)
def test_a_file_in_the_folder_will_do(name: str, tmp_path: Path) -> None:
    path = CASES[name].write(tmp_path / "there")
    whole = sae.load(path)
    weights = next(file for file in sorted(path.iterdir()) if file.suffix != ".json") if path.is_dir() else path
    if name == "openai":
        weights = path.rename(tmp_path / "8.pt")
    assert torch.equal(sae.load(weights).W_dec, whole.W_dec)


@pytest.mark.parametrize("version", [None, "5.9.1"])
def test_settings_of_saelens_before_6_have_other_names(version: str | None, tmp_path: Path) -> None:
    case = CASES["saelens topk"]
    file = case.write(tmp_path) / "cfg.json"
    new = json.loads(file.read_text())
    old = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": "blocks.8.hook_resid_pre", "normalize_activations": False}
    old["model_from_pretrained_kwargs"] = new["metadata"]["model_from_pretrained_kwargs"]
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": new["k"]}, "sae_lens_version": version}
    file.write_text(json.dumps({key: value for key, value in old.items() if value is not None}))
    dictionary = sae.load(tmp_path)
    torch.testing.assert_close(dictionary(inputs()), case.forward(inputs())[1], rtol=1e-9, atol=1e-9)
    assert dictionary.metadata[CONVERTED]["format"] == "SAELens before 6"
    assert dictionary.origin.reads.hook == "blocks.8.hook_resid_pre"


def test_what_the_files_do_not_say_is_unknown(tmp_path: Path) -> None:
    """SAELens's registry adds to the settings of some releases, and special tokens may be named by no number."""
    case = CASES["saelens standard"]
    file = case.write(tmp_path) / "cfg.json"
    settings = json.loads(file.read_text())
    del settings["metadata"]["model_from_pretrained_kwargs"]
    settings["metadata"]["exclude_special_tokens"] = True
    file.write_text(json.dumps(settings))
    origin = sae.load(tmp_path).origin
    assert origin.models == {"": {"name": "gpt2-small"}}
    assert origin.tokens is None


def test_what_is_folded_is_said(tmp_path: Path) -> None:
    said = {
        name: sae.load(CASES[name].write(tmp_path / name)).metadata[CONVERTED]["folded"]
        for name in (
            "saelens standard",
            "saelens standard, norms",
            "saelens topk, norms",
            "saelens abstopk",
            "llama scope",
        )
    }
    assert said["saelens standard"] == []
    [norms] = said["saelens standard, norms"]
    assert norms.startswith("decoder rows of norm")
    assert "are kept" in said["saelens topk, norms"][0]
    assert "both signs" in said["saelens abstopk"][0]
    assert [part.split()[1] for part in said["llama scope"]] == ["input", "input", "rows"]


def test_dictionaries_next_to_each_other_are_loaded_together(tmp_path: Path) -> None:
    """In the order of their layers."""
    one = CASES["circuit-tracer skip"].write(tmp_path / "set")
    for layer in (10, 0):
        shutil.copy(one, one.with_name(f"layer_{layer}.safetensors"))
    loaded = sae.load_all(tmp_path / "set", dtype=torch.float32)
    assert list(loaded) == ["layer_0.safetensors", "layer_2.safetensors", "layer_10.safetensors"]
    assert [one.origin.gives.hook for one in loaded.values()] == [f"blocks.{n}.hook_mlp_out" for n in (0, 2, 10)]
    assert all(one.dtype == torch.float32 for one in loaded.values())
    for name in ("b", "a"):
        sae.load(one).save(tmp_path / "ours" / name / "dictionary")
    (tmp_path / "ours" / "notes").mkdir()
    assert list(sae.load_all(tmp_path / "ours")) == ["a", "b"]
    with pytest.raises(FormatError, match="no dictionaries next to each other there; for a single one"):
        sae.load_all(tmp_path / "ours" / "notes")


def test_a_stream_with_its_mean_taken_off_needs_no_processed_model(tmp_path: Path) -> None:
    dictionary = sae.load(CASES["saelens standard"].write(tmp_path))
    assert dictionary.frame == Frame("centre")
    x = inputs()
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(dictionary.encode(x), dictionary.encode(centred), rtol=1e-12, atol=1e-12)
    difference = dictionary(x) - dictionary(centred)
    torch.testing.assert_close(difference, x.mean(-1, keepdim=True).expand_as(x), rtol=1e-12, atol=1e-12)


def test_what_is_carried_is_said(tmp_path: Path) -> None:
    carried = {
        name: sae.load(CASES[name].write(tmp_path / name)).metadata[CONVERTED]["carried"]
        for name in (
            "openai topk",
            "saelens jumprelu_skip_transcoder, other width",
            "sparsify",
            "llama scope transcoder",
        )
    }
    assert carried["openai topk"] == ["input_norm=layer_norm"]
    assert carried["saelens jumprelu_skip_transcoder, other width"] == ["skip=True", "d_out=4"]
    assert carried["sparsify"] == carried["llama scope transcoder"] == []
