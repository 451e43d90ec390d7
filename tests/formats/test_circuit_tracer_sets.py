"""Transcoders of all layers as circuit-tracer's sets: its formulas on what is written, and what is read back.

`scripts/conformance_formats.py --python PATH` does the same with circuit-tracer's own code, and makes graphs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sae
from sae.architectures import LOADED
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import ConfigError, FormatError
from sae.formats import SET_WRITERS, WRITERS
from sae.formats.circuit_tracer import WRITES
from tests.conftest import Command, assert_refused
from tests.formats.test_formats_writing import ours
from tests.support.foreign_files import CASES
from tests.support.foreign_weights import D_IN, D_SAE, K, largest, weights

LAYERS = range(3)
MODEL: dict[str, Any] = {"name": "gpt2", "weight_processing": "none", "n_layers": len(LAYERS)}


def transcoder(
    layer: int, architecture: str = "relu", *, skip: bool = False, reads: str = "mlp.hook_in", **model: Any
) -> Dictionary:
    """Of an MLP, with random weights that differ between layers, in float64."""
    metadata = {"hook": f"blocks.{layer}.{reads}", "target_hook": f"blocks.{layer}.hook_mlp_out"}
    dictionary = ours(architecture, {**metadata, "model": {**MODEL, **model}})
    dictionary.set_frame(Frame(skip=skip, d_out=D_IN))
    w = weights(layer)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.copy_(w[name].mean().abs() if name == "threshold" and parameter.ndim == 0 else w[name])
    return dictionary.requires_grad_(False)


def inputs() -> Tensor:
    return 2 * torch.randn(100, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def write(folder: Path, *transcoders: Dictionary) -> list[str]:
    named = {f"b{number}": one for number, one in enumerate(transcoders)}
    return SET_WRITERS["circuit_tracer"](named, named.__getitem__, folder)


def theirs(path: Path, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Features and outputs by circuit-tracer's formula: single_layer_transcoder.py and activation_functions.py."""
    w = {name: tensor.double() for name, tensor in load_file(path).items()}
    pre = x @ w["W_enc"].T + w["b_enc"]
    threshold = w.get("activation_function.threshold", torch.zeros(()))
    f = largest(pre, k) if k is not None else pre * (pre > threshold)
    return f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", WRITES)
def test_written_transcoders_are_the_same_there_and_when_read_back(
    architecture: str, skip: bool, tmp_path: Path
) -> None:
    transcoders = [transcoder(layer, architecture, skip=skip) for layer in LAYERS]
    write(tmp_path, *transcoders)
    back, x = sae.load_all(tmp_path), inputs()
    assert list(back) == [f"layer_{layer}.safetensors" for layer in LAYERS]
    for layer, (dictionary, again) in enumerate(zip(transcoders, back.values(), strict=True)):
        f, y = theirs(tmp_path / f"layer_{layer}.safetensors", x, K if architecture == "topk" else None)
        assert (f > 0).any() and (f == 0).any()
        torch.testing.assert_close(dictionary.encode(x), f, rtol=1e-12, atol=1e-12)
        for outputs in (dictionary(x), again(x)):
            torch.testing.assert_close(outputs, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again.encode(x), f, rtol=1e-12, atol=1e-12)
        assert (again.origin.reads.hook, again.origin.gives.hook) == (
            f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out",
        )  # fmt: skip
        assert again.origin.models[""] == {"name": "gpt2", "weight_processing": "none"}
        assert again.frame.skip == skip and again.is_transcoder


def test_float32_weights_give_equal_outputs_in_float64(tmp_path: Path) -> None:
    transcoders = [transcoder(layer, "jumprelu", skip=True).float() for layer in LAYERS]
    write(tmp_path, *transcoders)
    assert {x.dtype for x in load_file(tmp_path / "layer_1.safetensors").values()} == {torch.float32}
    for dictionary, again in zip(transcoders, sae.load_all(tmp_path, dtype=torch.float64).values(), strict=True):
        torch.testing.assert_close(again(inputs()), dictionary.double()(inputs()), rtol=1e-12, atol=1e-12)


TENSORS = {"W_enc": [D_SAE, D_IN], "b_enc": [D_SAE], "W_dec": [D_SAE, D_IN], "b_dec": [D_IN]}
THRESHOLD, SKIP = {"activation_function.threshold": [D_SAE]}, {"W_skip": [D_IN, D_IN]}


def test_the_files_are_those_of_its_loader(tmp_path: Path) -> None:
    """Other tensors than these are refused there; `k` among them. What decides about skips there is layer 0."""
    write(tmp_path / "mixed", transcoder(2, "batch_topk"), transcoder(0), transcoder(1, "gated", skip=True))
    expected = [{**TENSORS, **SKIP}, {**TENSORS, **SKIP, **THRESHOLD}, {**TENSORS, **SKIP, **THRESHOLD}]
    for layer, shapes in enumerate(expected):
        tensors = load_file(tmp_path / "mixed" / f"layer_{layer}.safetensors")
        assert {name: list(x.shape) for name, x in tensors.items()} == shapes
        assert bool(tensors["W_skip"].any()) == (layer == 1)
    assert (tmp_path / "mixed" / "config.yaml").read_text(encoding="utf-8") == (
        "model_kind: transcoder_set\nmodel_name: gpt2\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: hook_mlp_out\n"
    )
    write(tmp_path / "topk", *(transcoder(layer, "topk", reads="ln2.hook_normalized") for layer in LAYERS))
    assert sorted(load_file(tmp_path / "topk" / "layer_0.safetensors")) == sorted(TENSORS)
    assert (tmp_path / "topk" / "config.yaml").read_text(encoding="utf-8").splitlines() == [
        "model_kind: transcoder_set", "model_name: gpt2", "feature_input_hook: ln2.hook_normalized",
        "feature_output_hook: hook_mlp_out", "activation: topk", f"k: {K}", "relu_before_topk: true",
    ]  # fmt: skip


def test_a_single_layer_by_hand(tmp_path: Path) -> None:
    """x W_enc − 1 of two features; b_dec belongs to the output; a threshold for all is one for each."""
    cls = LOADED["batch_topk"]
    of = {"hook": "blocks.0.hook_mlp_in", "target_hook": "blocks.0.hook_mlp_out"}
    dictionary = cls(2, 3, k=1, metadata=of)
    dictionary.set_frame(Frame(skip=True, d_out=2))
    values = {
        "W_enc": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "b_enc": [-1.0, -2.0, -3.0], "W_dec": [[1.0, 0.0], [0.0, 1.0],
        [0.75, 1.25]], "b_dec": [7.0, 8.0], "W_skip": [[10.0, 20.0], [30.0, 40.0]], "threshold": 0.5,
    }  # fmt: skip
    dictionary.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    write(tmp_path, dictionary)
    written = {name: x.tolist() for name, x in load_file(tmp_path / "layer_0.safetensors").items()}
    assert written == {
        "W_enc": [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]], "b_enc": [-1.0, -2.0, -3.0], "W_dec": values["W_dec"],
        "b_dec": [7.0, 8.0], "W_skip": [[10.0, 30.0], [20.0, 40.0]], "activation_function.threshold": [0.5, 0.5, 0.5],
    }  # fmt: skip
    config = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "feature_input_hook: hook_resid_mid\n" in config and "model_name" not in config


def test_a_transcoder_that_subtracts_b_dec_is_written_without(tmp_path: Path) -> None:
    """As earlier versions trained them."""
    old = transcoder(0)
    w = weights(3)
    old.set_frame(Frame())
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            parameter.copy_(w[name])
    assert bool(old.centre.any()) and old.is_transcoder
    write(tmp_path, old.requires_grad_(False), transcoder(1), transcoder(2))
    f, y = theirs(tmp_path / "layer_0.safetensors", inputs())
    torch.testing.assert_close(((inputs() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(old(inputs()), y, rtol=1e-12, atol=1e-12)


def test_a_set_that_was_read_is_written_again(tmp_path: Path) -> None:
    one = CASES["circuit-tracer jumprelu"].write(tmp_path / "set")
    for layer in (0, 1):
        shutil.copy(one, one.with_name(f"layer_{layer}.safetensors"))
    conversion = sae.convert(tmp_path / "set", tmp_path / "again", "circuit-tracer")
    assert (conversion.source, conversion.target, conversion.dictionaries) == ("circuit-tracer", "circuit_tracer", 3)
    assert conversion.folded == ("an input that is not centred",)
    for name, tensor in load_file(one).items():
        again = load_file(tmp_path / "again" / one.name)[name]
        torch.testing.assert_close(again, tensor, rtol=1e-12, atol=1e-12)


def test_several_sources_of_several_toolkits(tmp_path: Path, command: Command) -> None:
    """Folders of several and single ones, in any order."""
    for layer in (2, 0):
        transcoder(layer, skip=True).save(tmp_path / "own" / f"b{layer}" / "dictionary")
    saelens = tmp_path / "saelens"
    WRITERS["saelens"](transcoder(1, "jumprelu"), saelens)
    sources = tmp_path / "own", saelens
    assert_refused(
        command("convert", sources[0], tmp_path / "new", "--to", "circuit-tracer"),
        "no transcoder of layer 1: circuit-tracer needs one for each of layers 0 to 2",
    )
    done = command("convert", *sources, tmp_path / "new", "--to", "circuit-tracer")
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert said.startswith("3 transcoders of sae, SAELens 6.")
    assert f" → circuit-tracer, in '{tmp_path / 'new'}' folded" in said
    assert f"folded into the weights: an input that is not centred ('{saelens}')" in said
    for layer, expected in enumerate((transcoder(0, skip=True), transcoder(1, "jumprelu"), transcoder(2, skip=True))):
        again = sae.load(tmp_path / "new" / f"layer_{layer}.safetensors")
        torch.testing.assert_close(again(inputs()), expected(inputs()), rtol=1e-12, atol=1e-12)


LOST = {
    "gated": "that its transcoders are gated: they are jumprelu there",
    "batch_topk": "that its transcoders are batch_topk: they are jumprelu there",
    "matryoshka": "the sizes of nested dictionaries",
    "topk": "its TopK keeps the k largest, even if they are negative",
}


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    for architecture, part in LOST.items():
        said = write(tmp_path / architecture, *(transcoder(layer, architecture) for layer in LAYERS))
        assert any(part in line for line in said)
    processed = {"weight_processing": "fold_norms", "weights_sha256": "a" * 64}
    kinds = [transcoder(layer, reads="hook_mlp_in", **processed) for layer in LAYERS]
    said = "; ".join(write(tmp_path / "processed", *kinds))
    for part in ("weight_processing=fold_norms", "hash of the language model", "it is hook_resid_mid there", "tokens"):
        assert part in said
    mixed = write(tmp_path / "mixed", transcoder(0), transcoder(1, "gated"), transcoder(2, "gated"))
    assert any("that b1, b2 are gated" in line for line in mixed)
    normalized = write(tmp_path / "ln2", *(transcoder(layer, reads="ln2.hook_normalized") for layer in LAYERS))
    assert any("includes the norm's gain and bias" in line for line in normalized)


def wide(layer: int) -> Dictionary:
    dictionary = transcoder(layer)
    dictionary.set_frame(Frame(d_out=4))
    return dictionary


def of_size(d_sae: int, layer: int) -> Dictionary:
    dictionary = LOADED["relu"](D_IN, d_sae, metadata=transcoder(layer).metadata)
    dictionary.set_frame(Frame(d_out=D_IN))
    return dictionary


def at(reads: str | None, gives: str | None) -> Dictionary:
    dictionary = transcoder(0)
    dictionary.metadata = {key: value for key, value in (("hook", reads), ("target_hook", gives)) if value}
    return dictionary


def other_k() -> Dictionary:
    dictionary = transcoder(1, "topk")
    dictionary.k = K + 1  # pyright: ignore[reportAttributeAccessIssue]
    return dictionary


REFUSED: dict[str, tuple[Any, str]] = {
    "an SAE": (
        lambda: [transcoder(0), ours("relu")], "b1: reads and gives 'blocks.8.hook_resid_post', so it is an autoencoder"
    ),
    "doubled": (
        lambda: [transcoder(0), transcoder(1), transcoder(1, "gated")], "b1 and b2 are both of layer 1: name one"
    ),
    "other processing": (
        lambda: [transcoder(0), transcoder(1, weight_processing="center_and_fold")], "weight_processing of the model"
    ),
    "missing below": (lambda: [transcoder(2), transcoder(0)], "no transcoder of layer 1"),
    "missing above": (
        lambda: [transcoder(0), transcoder(1)], "no transcoder of layer 2: circuit-tracer needs one for each"
    ),
    "other model": (
        lambda: [transcoder(0), transcoder(1, name="gpt2-xl")], "b0 and b1: a set of circuit-tracer has one model; "
        "theirs are 'gpt2' and 'gpt2-xl'"
    ),
    "other weights": (
        lambda: [transcoder(0, weights_sha256="a"), transcoder(1, weights_sha256="b")], "weights_sha256 of the model"
    ),
    "other width": (lambda: [transcoder(0), of_size(7, 1)], f"one d_sae; theirs are {D_SAE} and 7"),
    "other input": (
        lambda: [transcoder(0), transcoder(1, reads="hook_mlp_in")], "theirs are 'mlp.hook_in' and 'hook_resid_mid'"
    ),
    "other k": (lambda: [transcoder(0, "topk"), other_k()], f"one k of topk; theirs are {K} and {K + 1}"),
    "topk and others": (lambda: [transcoder(0), transcoder(1, "topk")], "theirs are 'without topk' and 'topk'"),
    "other output width": (lambda: [wide(0)], "b0: circuit-tracer's format has no place for d_out=4"),
    "unknown hook points": (lambda: [at(None, None)], "b0: its files do not say which hook points it reads and gives"),
    "attention": (
        lambda: [at("blocks.0.attn.hook_in", "blocks.0.hook_attn_out")], "reads 'blocks.0.attn.hook_in' and gives "
        "'blocks.0.hook_attn_out'; a transcoder of circuit-tracer reads mlp.hook_in, hook_mlp_in, hook_resid_mid, "
        "ln2.hook_normalized and gives hook_mlp_out, both of one block"
    ),
    "two blocks": (lambda: [at("blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out")], "both of one block"),
    "matching pursuit": (lambda: [transcoder(0, "matching_pursuit")], "this is a MatchingPursuit"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_its_loader_would_not_take_is_refused_by_name(name: str, tmp_path: Path) -> None:
    build, message = REFUSED[name]
    with pytest.raises(FormatError) as error:
        write(tmp_path, *build())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_formats_hold_one_dictionary(tmp_path: Path, command: Command) -> None:
    for layer in LAYERS:
        transcoder(layer).save(tmp_path / "runs" / f"b{layer}" / "dictionary")
    two = [tmp_path / "runs" / "b0", tmp_path / "runs" / "b1"]
    assert_refused(
        command("convert", *two, tmp_path / "new", "--to", "saelens"),
        "2 dictionaries: only circuit_tracer holds several; convert each into a folder of its own",
    )
    assert_refused(
        command("convert", tmp_path / "runs", tmp_path / "new", "--to", "saelens"),
        "holds 3 dictionaries, give one of them: b0, b1, b2",
    )
    assert not (tmp_path / "new").exists()
    assert command("convert", tmp_path / "new").status == 2


def test_a_damaged_source_leaves_no_folder(tmp_path: Path) -> None:
    for layer in LAYERS:
        transcoder(layer).save(tmp_path / "runs" / f"b{layer}" / "dictionary")
    path = tmp_path / "runs" / "b2" / "dictionary" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match="b2"):
        sae.convert(tmp_path / "runs", tmp_path / "new", "circuit_tracer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
    with pytest.raises(ConfigError, match="already there; give a new folder"):
        sae.convert(tmp_path / "runs", tmp_path / "runs", "circuit_tracer")


def test_what_was_written_is_verified(tmp_path: Path, command: Command) -> None:
    for layer in LAYERS:
        transcoder(layer).save(tmp_path / "runs" / f"b{layer}" / "dictionary")
    sae.convert(tmp_path / "runs", tmp_path / "set", "circuit-tracer")
    assert "4 files are intact" in command("verify", tmp_path / "set").out
    assert_refused(command("eval", tmp_path / "set"), "not a run, but a set of 3 transcoders", "layer_0.safetensors")
    for name in ("config.yaml", "layer_1.safetensors"):
        content = (tmp_path / "set" / name).read_bytes()
        (tmp_path / "set" / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(FormatError, match=f"{name}.*damaged or changed: its SHA-256 is"):
            sae.load(tmp_path / "set" / "layer_1.safetensors")
        assert command("verify", tmp_path / "set").status == 1
        (tmp_path / "set" / name).write_bytes(content)
    assert "4 files are intact" in command("verify", tmp_path / "set").out
