"""Our dictionaries in the formats of other toolkits: what is read back is the same dictionary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.architectures import ARCHITECTURES, LOADED
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import ConfigError, FormatError
from sae.formats import WRITERS
from tests.support.foreign_files import CASES
from tests.support.foreign_weights import D_IN, D_SAE, K, weights

HELD = {
    "saelens": set(LOADED), "sparsify": {"topk"}, "dictionary_learning": set(ARCHITECTURES), "openai": {"relu"},
}  # fmt: skip
"""The architectures that a format can hold."""
METADATA: dict[str, Any] = {
    "hook": "blocks.8.hook_resid_post", "model": {"name": "gpt2", "weight_processing": "none"}, "context_length": 128,
    "tokens": {"prepend_bos": True, "masked_positions": 1, "masked_ids": [50256]},
}  # fmt: skip


def ours(architecture: str, metadata: dict[str, Any] | None = None) -> Dictionary:
    cls = LOADED[architecture]
    given = {"k": K, "prefixes": (0.25, 1.0)}
    settings = {name: given[name] for name in cls.setting_names if name in given}
    dictionary = cls(D_IN, D_SAE, metadata=METADATA if metadata is None else metadata, **settings).double()
    w = weights()
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.copy_(w[name].mean() if name == "threshold" and parameter.ndim == 0 else w[name])
        if architecture == "matching_pursuit":
            dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary.eval().requires_grad_(False)


@pytest.mark.parametrize("architecture", LOADED)
@pytest.mark.parametrize("to", WRITERS)
def test_what_is_written_is_read_back(to: str, architecture: str, tmp_path: Path) -> None:
    dictionary = ours(architecture)
    if architecture not in HELD[to]:
        with pytest.raises(FormatError, match="has only"):
            WRITERS[to](dictionary, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    lost = WRITERS[to](dictionary, tmp_path)
    again = sae.load(tmp_path)
    x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(again(x), dictionary(x), rtol=1e-6, atol=1e-6)  # a threshold may be stored in float32
    assert torch.equal(again.encode(x) > 0, dictionary.encode(x) > 0)
    assert lost == list(dict.fromkeys(lost)) and (lost or to == "saelens")
    if to == "saelens":
        assert again.origin.tokens == METADATA["tokens"]
        assert again.origin.models == {"": METADATA["model"]}
    if to not in ("openai", "sparsify"):
        assert again.origin.reads.hook == "blocks.8.hook_resid_post"
        assert again.origin.context_length == 128


@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] in WRITERS])
def test_a_file_written_back_has_equal_tensors(name: str, tmp_path: Path) -> None:
    """What is read a second time is, to the last bit, what was read the first time."""
    to = name.split(maxsplit=1)[0]
    first = sae.load(CASES[name].write(tmp_path / "theirs"))
    try:
        WRITERS[to](first, tmp_path / "back")
    except FormatError as error:
        assert "transcoder" in str(error) and to == "dictionary_learning"
        return
    again = sae.load(tmp_path / "back")
    for (key, tensor), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        rounding = 0.0 if not first.origin.of_transcoder and "uncentred" not in name else 1e-12
        torch.testing.assert_close(other, tensor, rtol=1e-6 if key == "threshold" else rounding, atol=1e-12)


TRANSCODERS = {"saelens": ("relu", "jumprelu"), "sparsify": ("topk",)}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [None, 4])
@pytest.mark.parametrize(("to", "architecture"), [(to, name) for to in TRANSCODERS for name in TRANSCODERS[to]])
@pytest.mark.parametrize("known", [True, False])
def test_a_transcoder_that_was_trained_here_is_read_back(
    to: str, architecture: str, d_out: int | None, skip: bool, known: bool, tmp_path: Path
) -> None:
    """Whether or not it knows its hook points; of equal widths, nothing is subtracted from the input there either."""
    between = {**METADATA, "hook": "blocks.8.mlp.hook_in", "target_hook": "blocks.8.hook_mlp_out"}
    dictionary = ours(architecture, between if known else {}).requires_grad_(True)
    dictionary.set_frame(Frame(skip=skip, d_out=d_out or D_IN))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("W_dec", "b_dec", *(["W_skip"] if skip else [])):
            part = dictionary.get_parameter(name)
            part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
        dictionary.W_dec /= dictionary.W_dec.norm(dim=1, keepdim=True)
    if to == "sparsify" and d_out is not None:
        with pytest.raises(FormatError, match=r"format has no place for .*d_out=4"):
            WRITERS[to](dictionary, tmp_path)
        return
    WRITERS[to](dictionary.eval().requires_grad_(False), tmp_path)
    again = sae.load(tmp_path)
    x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(again(x), dictionary(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(again.encode(x) > 0, dictionary.encode(x) > 0)
    assert (again.W_skip is not None) == skip and again.d_out == (d_out or D_IN)
    again.save(tmp_path / "ours")
    torch.testing.assert_close(sae.load(tmp_path / "ours")(x), again(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("to", ["dictionary_learning", "openai"])
def test_a_transcoder_is_refused_by_formats_without(to: str, tmp_path: Path) -> None:
    dictionary = ours("relu", {})
    dictionary.set_frame(Frame(d_out=D_IN))
    with pytest.raises(FormatError, match=f"format has no place for d_out={D_IN}"):
        WRITERS[to](dictionary, tmp_path)


def test_convert_says_what_is_lost(tmp_path: Path) -> None:
    ours("matryoshka").save(tmp_path / "ours")
    conversion = sae.convert(tmp_path / "ours", tmp_path / "theirs", "saelens")
    assert (conversion.source, conversion.target, conversion.folded) == ("sae", "saelens", ())
    text = "; ".join(conversion.lost)
    assert "Matryoshka of k 3" in text and "nested" in text
    back = sae.convert(tmp_path / "theirs", tmp_path / "back", "sae")
    assert back.source.startswith("SAELens 6") and back.lost == ()


@pytest.mark.parametrize("to", WRITERS)
def test_an_architecture_that_the_toolkit_lacks_is_refused(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary = ours("relu")
    monkeypatch.setattr(type(dictionary), "architecture", "leaky")
    with pytest.raises(FormatError, match="has only"):
        WRITERS[to](dictionary, tmp_path)


@pytest.mark.parametrize("to", WRITERS)
def test_a_caller_s_default_device_changes_no_file(to: str, tmp_path: Path) -> None:
    ours(min(HELD[to] & {"matryoshka", "topk", "relu"})).save(tmp_path / "ours")
    sae.convert(tmp_path / "ours", tmp_path / "plain", to)
    with torch.device("meta"):
        sae.convert(tmp_path / "ours", tmp_path / "meta", to)
    x = torch.randn(20, D_IN, dtype=torch.float64)
    assert torch.equal(sae.load(tmp_path / "meta")(x), sae.load(tmp_path / "plain")(x))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    ours("topk").save(tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    with pytest.raises(ConfigError, match="already there; give a new folder"):
        sae.convert(tmp_path / "ours", tmp_path / "ours", "saelens")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_a_format_that_is_not_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gemma_scope': written are sae, saelens, sparsify"):
        sae.convert(tmp_path, tmp_path / "new", "gemma_scope")


def test_what_is_unknown_stays_unknown(tmp_path: Path) -> None:
    WRITERS["saelens"](ours("relu", {"model": {"name": "gpt2"}}), tmp_path)
    origin = sae.load(tmp_path).origin
    assert origin.models == {"": {"name": "gpt2"}}
    assert origin.tokens is None and origin.context_length is None and origin.reads.hook is None


KEYS = {
    "saelens": {
        "relu": {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)},
        "batch_topk": {
            "W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "threshold": (D_SAE,),
        },
        "gated": {
            "W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "b_gate": (D_SAE,), "b_mag": (D_SAE,),
            "r_mag": (D_SAE,),
        },
    },
    "sparsify": {
        "topk": {
            "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,),
        },
    },
    "dictionary_learning": {
        "relu": {
            "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE), "bias": (D_IN,),
        },
        "topk": {
            "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE),
            "b_dec": (D_IN,), "k": (), "threshold": (),
        },
        "jumprelu": {
            "W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "threshold": (D_SAE,),
        },
    },
    "openai": {
        "relu": {
            "pre_bias": (D_IN,), "encoder.weight": (D_SAE, D_IN), "latent_bias": (D_SAE,),
            "decoder.weight": (D_IN, D_SAE), "stats_last_nonzero": (D_SAE,), "latents_activation_frequency": (D_SAE,),
            "latents_mean_square": (D_SAE,),
        },
    },
}  # fmt: skip
"""Names and shapes that each toolkit's own loader takes, and no others."""


@pytest.mark.parametrize(("to", "architecture"), [(to, name) for to, of in KEYS.items() for name in of])
def test_the_files_have_the_toolkit_s_names_and_shapes(to: str, architecture: str, tmp_path: Path) -> None:
    WRITERS[to](ours(architecture), tmp_path)
    [weights] = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".pt")]
    content = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    shapes = {name: tuple(x.shape) for name, x in content.items() if isinstance(x, torch.Tensor)}
    assert shapes == KEYS[to][architecture]


def test_settings_for_saelens_have_what_its_loader_asks_for(tmp_path: Path) -> None:
    WRITERS["saelens"](ours("topk"), tmp_path)
    settings = json.loads((tmp_path / "cfg.json").read_text(encoding="utf-8"))
    metadata = settings.pop("metadata")
    assert settings == {
        "architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "device": "cpu", "k": K,
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }  # fmt: skip
    assert int(metadata["sae_lens_version"].partition(".")[0]) >= 6
    assert metadata["hook_name"] == "blocks.8.hook_resid_post"


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning"])
def test_a_model_with_processed_weights_is_lost(to: str, tmp_path: Path) -> None:
    """Those toolkits give a dictionary the activations of the model as it was published."""
    metadata = {**METADATA, "model": {"name": "gpt2", "weight_processing": "center_and_fold"}}
    assert any("weight_processing=center_and_fold" in part for part in WRITERS[to](ours("topk", metadata), tmp_path))


FRAMES = {
    "saelens": {"layer_norm": ("topk", False), "constant_norm": ("gated", False), "centre": ("relu", False),
                "skip": ("relu", True), "width": ("jumprelu", True)},
    "sparsify": {"skip": ("topk", False)},
    "dictionary_learning": {},
    "openai": {"layer_norm": ("topk", False)},
}  # fmt: skip
"""What a format can hold beyond weights, with an architecture, and whether it is of a transcoder."""
KINDS = {
    "layer_norm": Frame("layer_norm"), "constant_norm": Frame("constant_norm"), "centre": Frame("centre"),
    "skip": Frame(skip=True), "width": Frame(d_out=D_IN - 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", WRITERS)
def test_what_is_carried_is_written_or_refused_by_name(to: str, kind: str, tmp_path: Path) -> None:
    architecture, is_transcoder = FRAMES[to].get(kind, (min(HELD[to]), False))
    hooks = {"hook": "blocks.8.mlp.hook_in", "target_hook": "blocks.8.hook_mlp_out"} if is_transcoder else {}
    dictionary = ours(architecture, {**METADATA, **hooks})
    dictionary.set_frame(KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for parameter in dictionary.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    dictionary.normalise_decoder_()
    if kind not in FRAMES[to]:
        [(name, value)] = KINDS[kind].to_json().items()
        with pytest.raises(FormatError, match=f"{name}={value}"):
            WRITERS[to](dictionary, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    WRITERS[to](dictionary, tmp_path)
    again = sae.load(tmp_path)
    assert again.frame == dictionary.frame
    x = torch.randn(100, D_IN, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(again(x), dictionary(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("to", WRITERS)
def test_a_changed_byte_is_refused_in_what_we_wrote(to: str, tmp_path: Path) -> None:
    ours(min(HELD[to])).save(tmp_path / "own")
    sae.convert(tmp_path / "own", tmp_path / "files", to)
    files = sorted(path for path in (tmp_path / "files").rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    expected = sae.load(tmp_path / "files")
    for path in files:
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 5)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(FormatError):
                sae.load(tmp_path / "files")
        path.write_bytes(content[:-9] + b"0" + content[-8:])
        with pytest.raises(FormatError, match=r"damaged or changed: its SHA-256 is .* or delete SHA256SUMS"):
            sae.load(tmp_path / "files")
        path.write_bytes(content)
    assert torch.equal(sae.load(tmp_path / "files").W_dec, expected.W_dec)
