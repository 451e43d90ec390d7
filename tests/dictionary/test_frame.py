"""What dictionaries of other toolkits do to each token by itself: normalisation and its inverse, a skip connection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae
from sae.architectures import ARCHITECTURES
from sae.dictionary.base import FORMAT, Dictionary
from sae.dictionary.frame import PLAIN, Frame
from sae.errors import ConfigError, FormatError, ShapeError
from sae.files.formats import Format

D_IN, D_SAE, K = 7, 24, 4
FRAMES = {
    "centre": Frame("centre"), "layer_norm": Frame("layer_norm"), "constant_norm": Frame("constant_norm"),
    "skip": Frame(skip=True), "width": Frame(d_out=5), "all": Frame("constant_norm", skip=True, d_out=5),
    "equal width": Frame(d_out=D_IN), "equal width, skip": Frame(skip=True, d_out=D_IN),
}  # fmt: skip


def dictionary_with(frame: Frame, architecture: str = "relu") -> Dictionary:
    """Random weights, in float64."""
    cls = ARCHITECTURES[architecture]
    given = {"k": K, "prefixes": (0.5, 1.0)}
    dictionary = cls(D_IN, D_SAE, **{name: given[name] for name in cls.setting_names}).double()
    dictionary.set_frame(frame)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name == "threshold":
                parameter.abs_()
    return dictionary.eval()


def inputs(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 1


def by_numbers(row: list[float], norm: str) -> tuple[list[float], float, float]:
    """y, scale and shift of one row, in plain Python."""
    mean = sum(row) / len(row)
    if norm == "layer_norm":
        scale = (sum((number - mean) ** 2 for number in row) / (len(row) - 1)) ** 0.5
        return [(number - mean) / (scale + 1e-5) for number in row], scale, mean
    if norm == "centre":
        return [number - mean for number in row], 1.0, mean
    if norm == "constant_norm":
        scale = (sum(number**2 for number in row) / len(row)) ** 0.5
        return [number / scale for number in row], scale, 0.0
    return row, 1.0, 0.0


def formula(dictionary: Dictionary, x: Tensor) -> Tensor:
    """x̂ of a ReLU or a TopK, densely, in operators whose gradients PyTorch knows."""
    frame = dictionary.frame
    mean, std = x.mean(-1, keepdim=True), x.var(-1, keepdim=True).sqrt()
    y, scale, shift = {
        "none": (x, 1, 0), "centre": (x - mean, 1, mean), "layer_norm": ((x - mean) / (std + 1e-5), std, mean),
        "constant_norm": (
            x * D_IN**0.5 / (x * x).sum(-1, keepdim=True).sqrt(), (x * x).mean(-1, keepdim=True).sqrt(), 0
        ),
    }[frame.input_norm]  # fmt: skip
    pre = (y - dictionary.b_dec if frame.d_out is None else y) @ dictionary.W_enc + dictionary.b_enc
    if dictionary.architecture == "topk":
        pre = torch.where(pre >= pre.topk(K, dim=-1).values[..., -1:], pre, 0)
    x_hat = (pre.relu() @ dictionary.W_dec + dictionary.b_dec) * scale + shift
    return x_hat if dictionary.W_skip is None else x_hat + x @ dictionary.W_skip


@pytest.mark.parametrize("norm", ["none", "centre", "layer_norm", "constant_norm"])
def test_normalisation_is_that_of_the_numbers(norm: Any) -> None:
    x = inputs(6)
    frame = Frame(norm)
    for row, y, scale in zip(x.tolist(), frame.normalised(x), frame.scale(x), strict=True):
        expected_y, expected_scale, shift = by_numbers(row, norm)
        assert y.tolist() == pytest.approx(expected_y, rel=1e-12)
        assert float(scale) == pytest.approx(expected_scale, rel=1e-12)
        back = frame.restored(torch.ones(1, D_IN).double(), torch.tensor([row], dtype=torch.float64), None)
        assert back.tolist() == [pytest.approx([expected_scale + shift] * D_IN, rel=1e-12)]


def test_a_row_of_zeros_has_a_finite_reconstruction() -> None:
    for frame in FRAMES.values():
        dictionary = dictionary_with(frame)
        assert bool(dictionary(torch.zeros(2, D_IN, dtype=torch.float64)).isfinite().all())


@pytest.mark.parametrize("frame", FRAMES.values(), ids=list(FRAMES))
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_reconstructions_and_gradients_are_the_formula_s(frame: Frame, architecture: str) -> None:
    dictionary = dictionary_with(frame, architecture)
    x = inputs(3, 4).requires_grad_()
    expected, found = formula(dictionary, x), dictionary(x)
    assert found.shape == (3, 4, frame.d_out or D_IN)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [x, *dictionary.parameters()]
    wanted = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True, create_graph=True)
    gradients = torch.autograd.grad((found * direction).sum(), leaves, allow_unused=True, create_graph=True)
    for gradient, one in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (one is None)
        if gradient is not None and one is not None:
            torch.testing.assert_close(gradient, one, rtol=1e-9, atol=1e-9)
    second, second_wanted = (
        torch.autograd.grad((first[0] ** 2).sum(), x)[0] for first in (gradients, wanted) if first[0] is not None
    )
    torch.testing.assert_close(second, second_wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("frame", FRAMES.values(), ids=list(FRAMES))
def test_every_way_to_reconstruct_gives_the_same(frame: Frame, architecture: str) -> None:
    dictionary = dictionary_with(frame, architecture)
    x = inputs(5, 3)
    whole = dictionary(x)
    features = dictionary.encode(x)
    assert bool((features > 0).any())
    for found in (
        dictionary.decode(features, like=x),
        dictionary.decode_sparse(dictionary.encode_sparse(x), like=x),
        torch.func.vmap(dictionary)(x),
    ):
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
    plain = dictionary_with(Frame(d_out=frame.d_out), architecture)
    plain.load_state_dict({name: part for name, part in dictionary.state_dict().items() if name != "W_skip"})
    torch.testing.assert_close(plain.encode(frame.normalised(x)), features, rtol=1e-11, atol=1e-11)


def test_features_alone_are_not_decoded_if_the_input_matters() -> None:
    x = inputs(2)
    for name, message in (("layer_norm", "normalises each token"), ("skip", "adds a linear map")):
        dictionary = dictionary_with(FRAMES[name])
        for decode in (dictionary.decode, dictionary.decode_sparse):
            codes: Any = dictionary.encode(x) if decode == dictionary.decode else dictionary.encode_sparse(x)
            with pytest.raises(ShapeError, match=message + r".*like=x"):
                decode(codes)
            with pytest.raises(ShapeError, match=rf"takes \[\.\.\., {D_IN}\]"):
                decode(codes, like=x[:, 1:])
    dictionary_with(FRAMES["width"]).decode(torch.zeros(2, D_SAE))


@pytest.mark.parametrize("frame", [PLAIN, *FRAMES.values()], ids=["plain", *FRAMES])
def test_a_saved_frame_is_loaded_again(frame: Frame, tmp_path: Path) -> None:
    dictionary = dictionary_with(frame, "jumprelu")
    dictionary.save(tmp_path)
    again = sae.load(tmp_path)
    assert again.frame == frame and again.d_out == (frame.d_out or D_IN)
    torch.testing.assert_close(again(inputs(9)), dictionary(inputs(9)), rtol=1e-12, atol=1e-12)
    config = json.loads((tmp_path / "config.json").read_text())
    version = 1 if frame == PLAIN else 3 if frame.d_out == D_IN else 2
    assert config["format_version"] == version
    if version > 1:
        with pytest.raises(FormatError, match=f"version {version} is newer"):
            Format(FORMAT.name, version - 1).check(config, "dictionary")  # what packages before do
    assert {"input_norm", "skip", "d_out"} & config.keys() == frame.to_json().keys()
    for key, value in frame.to_json().items():
        assert f"{key}={value}" in repr(again)


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input_norm": "batch"}, "input_norm='batch' is not one of none, centre"),
        ({"skip": 1}, "skip=1: expected true or false"),
        ({"d_out": 6}, r"W_dec \[24, 5\], expected \[24, 6\]"),
        ({"d_out": "5"}, "d_out='5': expected a whole number"),
        ({"skip": False}, "W_skip"),
    ],
)
def test_a_frame_that_contradicts_the_weights_is_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    dictionary_with(FRAMES["all"]).save(tmp_path)
    path = tmp_path / "config.json"
    (tmp_path / "SHA256SUMS").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(FormatError, match=message):
        sae.load(tmp_path)


def test_training_does_not_start_from_it() -> None:
    source = sae.IterableSource([torch.randn(64, D_IN) for _ in range(4)])
    start = dictionary_with(FRAMES["layer_norm"]).float()
    with pytest.raises(ConfigError, match="input_norm=layer_norm, which cannot be trained here"):
        sae.train(
            source, sae.DictionaryConfig(architecture="relu", d_sae=D_SAE, k=K), sae.TrainConfig(tokens=64), start=start
        )


def test_nothing_is_subtracted_from_what_a_transcoder_reads() -> None:
    """Its b_dec moves reconstructions and nothing else, also if the widths are equal; an SAE's moves features."""
    x = inputs(5)
    for name in ("width", "equal width", "equal width, skip", "skip"):
        dictionary = dictionary_with(FRAMES[name])
        features, reconstruction = dictionary.encode(x), dictionary(x)
        with torch.no_grad():
            dictionary.b_dec += 10
        is_transcoder = name != "skip"
        assert torch.equal(dictionary.encode(x), features) == is_transcoder == dictionary.is_transcoder
        if is_transcoder:
            torch.testing.assert_close(dictionary(x), reconstruction + 10, rtol=1e-12, atol=1e-12)
    assert dictionary_with(FRAMES["equal width"]).cfg.apply_b_dec_to_input is False


def test_tools_that_read_saelens_s_names_see_it() -> None:
    assert dictionary_with(FRAMES["constant_norm"]).cfg.normalize_activations == "constant_norm_rescale"
    assert not dictionary_with(FRAMES["width"]).cfg.apply_b_dec_to_input
    assert dictionary_with(PLAIN).cfg.normalize_activations == "none"
