"""Dictionaries: shapes, sparse against dense, folding, saving, and what is refused on loading."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.architectures import ARCHITECTURES, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import FormatError, ShapeError
from sae.files.writing import write_bytes, write_json, write_tensors


def filled(cls: type[Dictionary], **settings: int) -> Dictionary:
    dictionary = cls(8, 30, metadata={"hook": "blocks.1.hook_resid_pre"}, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_()
    return dictionary.eval().requires_grad_(False)


def filled_batch_topk() -> Dictionary:
    dictionary = filled(BatchTopK, k=5)
    dictionary.get_parameter("threshold").fill_(1.7)
    return dictionary


ALL = [
    pytest.param(filled(TopK, k=5), id="topk"),
    pytest.param(filled(ReLU), id="relu"),
    pytest.param(filled_batch_topk(), id="batch_topk"),
    pytest.param(filled(Matryoshka, k=5), id="matryoshka"),
    pytest.param(filled(Gated), id="gated"),
    pytest.param(filled(JumpReLU), id="jumprelu"),
]


@pytest.mark.parametrize("dictionary", ALL)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (7, 8), (2, 3, 8), (0, 8)])
def test_shapes(dictionary: Dictionary, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    features = dictionary.encode(x)
    assert features.shape == (*shape[:-1], 30)
    assert dictionary.decode(features).shape == shape
    assert dictionary(x).shape == shape
    values, indices = dictionary.encode_sparse(x)
    assert values.shape == indices.shape
    assert values.shape[:-1] == shape[:-1]


@pytest.mark.parametrize("dictionary", ALL)
def test_sparse_and_dense_agree(dictionary: Dictionary) -> None:
    x = torch.randn(50, 8)
    codes, features = dictionary.encode_sparse(x), dictionary.encode(x)
    torch.testing.assert_close(dictionary.decode_sparse(codes), dictionary.decode(features))
    torch.testing.assert_close(dictionary(x), dictionary.decode(features))
    rebuilt = torch.zeros_like(features).scatter_add_(1, codes.indices, codes.values)
    assert torch.equal(rebuilt, features)
    assert (codes.values[:, :-1] >= codes.values[:, 1:]).all(), "strongest first"
    row, feature, value = dictionary.encode_pairs(x)
    assert torch.equal(torch.zeros_like(features).index_put_((row, feature), value), features)
    assert (row[1:] >= row[:-1]).all()
    assert len(set(zip(row.tolist(), feature.tolist(), strict=True))) == len(row), "a pair comes twice"


def test_topk_is_the_k_largest_positive_pre_activations() -> None:
    dictionary, x = filled(TopK, k=5), torch.randn(100, 8)
    for row, features in zip(x, dictionary.encode(x), strict=True):
        pre = [float((row - dictionary.b_dec) @ dictionary.W_enc[:, j] + dictionary.b_enc[j]) for j in range(30)]
        kept = sorted(range(30), key=lambda j: -pre[j])[:5]
        expected = torch.tensor([max(pre[j], 0.0) if j in kept else 0.0 for j in range(30)])
        torch.testing.assert_close(features, expected)


def test_batch_topk_lets_through_what_is_above_its_threshold() -> None:
    dictionary, x = filled_batch_topk(), torch.randn(200, 8)
    pre = dictionary.pre_activations(x)
    torch.testing.assert_close(dictionary.encode(x), pre * (pre > 1.7))
    counts = (dictionary.encode(x) > 0).sum(1)
    assert counts.min() < counts.max()


@pytest.mark.parametrize("cls", [TopK, BatchTopK])
@pytest.mark.parametrize("k", [0, 31])
def test_k_beyond_the_features_is_refused(cls: type[Dictionary], k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}: expected 1 ≤ k ≤ d_sae=30"):
        cls(8, 30, k=k)  # pyright: ignore[reportCallIssue]


def test_a_relu_dictionary_is_computed_sparsely_where_its_codes_are_sparse() -> None:
    """Both ways give the same; which one is taken follows from the codes."""
    dictionary, x = filled(ReLU), torch.randn(50, 8)
    sparse = copy.deepcopy(dictionary)
    sparse.b_enc -= 9.0
    assert (dictionary._is_dense(x), sparse._is_dense(x)) == (True, False)
    for either in (dictionary, sparse):
        features = either.pre_activations(x).relu()
        torch.testing.assert_close(either(x), features @ either.W_dec + either.b_dec)
        values, indices = either.encode_sparse(x)
        torch.testing.assert_close(torch.zeros(50, 30).scatter_add(1, indices, values), features)


def test_topk_with_fewer_positive_pre_activations_than_k() -> None:
    dictionary = filled(TopK, k=30)
    x = torch.randn(40, 8)
    torch.testing.assert_close(dictionary.encode(x), dictionary.pre_activations(x).relu())


def test_an_all_zero_row_survives() -> None:
    for dictionary in (filled(TopK, k=5), filled(ReLU), filled_batch_topk()):
        assert torch.isfinite(dictionary(torch.zeros(3, 8))).all()


@pytest.mark.parametrize("dictionary", ALL)
def test_folding_the_normalisation_is_exact(dictionary: Dictionary) -> None:
    trained, folded = copy.deepcopy(dictionary).double(), copy.deepcopy(dictionary).double()
    mean, scale = torch.randn(8, dtype=torch.float64), 0.37
    folded.fold_normalisation_(mean, scale)
    x = torch.randn(20, 8, dtype=torch.float64) * 5
    torch.testing.assert_close(folded(x), trained((x - mean) * scale) / scale + mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.encode(x), trained.encode((x - mean) * scale) / scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_two_normalisations_is_exact(architecture: str) -> None:
    """Of a transcoder: one for what it reads, one for what it gives."""
    cls = ARCHITECTURES[architecture]
    trained = filled(cls, **({"k": 5} if "k" in cls.setting_names else {})).double()
    folded = copy.deepcopy(trained)
    mean, target_mean = torch.randn(2, 8, dtype=torch.float64)
    scale, target_scale = 0.37, 2.1
    folded.fold_normalisation_(mean, scale, target_mean, target_scale)
    x = torch.randn(20, 8, dtype=torch.float64) * 5
    expected = trained((x - mean) * scale) / target_scale + target_mean
    torch.testing.assert_close(folded(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [5, 8, 13])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_two_normalisations_of_a_transcoder_is_exact(architecture: str, d_out: int, skip: bool) -> None:
    """Also with a skip connection, whose input loses the mean; and the inverse folding gives back every weight."""
    cls = ARCHITECTURES[architecture]
    trained = cls(8, 30, **({"k": 5} if "k" in cls.setting_names else {})).double()
    trained.set_frame(Frame(skip=skip, d_out=d_out))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn)
    folded = copy.deepcopy(trained)
    mean, target_mean = (torch.randn(width, generator=generator, dtype=torch.float64) for width in (8, d_out))
    scale, target_scale = 0.37, 2.1
    folded.fold_normalisation_(mean, scale, target_mean, target_scale)
    x = torch.randn(20, 8, generator=generator, dtype=torch.float64) * 5
    expected = trained((x - mean) * scale) / target_scale + target_mean
    torch.testing.assert_close(folded(x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        folded.encode(x), trained.encode((x - mean) * scale) / target_scale, rtol=1e-11, atol=1e-11
    )
    folded.fold_normalisation_(-mean * scale, 1 / scale, -target_mean * target_scale, 1 / target_scale)
    for (name, ours), theirs in zip(folded.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "dictionary", [filled(ReLU), filled(Gated), filled(JumpReLU)], ids=["relu", "gated", "jumprelu"]
)
def test_giving_the_decoder_norm_1_changes_no_reconstruction(dictionary: Dictionary) -> None:
    x, changed = torch.randn(30, 8).double(), copy.deepcopy(dictionary).double()
    with torch.no_grad():
        changed.W_dec[3] = 0
    before = changed(x)
    changed.normalise_decoder_()
    torch.testing.assert_close(changed(x), before, rtol=1e-12, atol=1e-12)
    norms = changed.W_dec.norm(dim=1)
    torch.testing.assert_close(norms[torch.arange(30) != 3], torch.ones(29, dtype=torch.float64))


@pytest.mark.parametrize("dictionary", ALL)
def test_activations_take_over_the_decoders_norms(dictionary: Dictionary) -> None:
    """Whatever fires: pre-activations are as many times larger, and only a threshold for all stays."""
    changed, x, norms = copy.deepcopy(dictionary), torch.randn(9, 8), dictionary.W_dec.norm(dim=1)
    changed.normalise_decoder_()
    torch.testing.assert_close(changed.pre_activations(x), dictionary.pre_activations(x) * norms)
    torch.testing.assert_close(changed.W_dec * norms[:, None], dictionary.W_dec)
    if isinstance(dictionary, (BatchTopK, Matryoshka)):
        assert torch.equal(changed.get_parameter("threshold"), dictionary.get_parameter("threshold"))


@pytest.mark.parametrize("dictionary", ALL)
def test_saved_and_loaded_is_the_same(dictionary: Dictionary, tmp_path: Path) -> None:
    dictionary.save(tmp_path / "d")
    loaded = sae.load(tmp_path / "d")
    x = torch.randn(9, 8)
    assert torch.equal(loaded(x), dictionary(x))
    assert type(loaded) is type(dictionary)
    assert loaded.metadata == dictionary.metadata
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "SHA256SUMS", "config.json", "weights.safetensors",
    ]  # fmt: skip


def test_loads_from_the_run_folder_too(tmp_path: Path) -> None:
    filled(TopK, k=5).save(tmp_path / "run" / "dictionary")
    assert sae.load(tmp_path / "run").settings() == {"k": 5}


def test_weights_are_plain_safetensors_with_the_documented_names(tmp_path: Path) -> None:
    filled(TopK, k=5).save(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 30), "b_enc": (30,), "W_dec": (30, 8), "b_dec": (8,)}


def test_half_precision_weights_stay_half_precision(tmp_path: Path) -> None:
    filled(TopK, k=5).bfloat16().save(tmp_path)
    loaded = sae.load(tmp_path)
    assert loaded.W_dec.dtype is torch.bfloat16
    assert loaded(torch.randn(4, 8)).dtype is torch.bfloat16


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})


def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path: Path) -> None:
    def fresh() -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        filled(TopK, k=5).save(folder)
        return folder

    def refusal(path: Path) -> str:
        with pytest.raises(FormatError) as caught:
            sae.load(path)
        return str(caught.value)

    assert "no config.json there; give a dictionary folder or a run folder" in refusal(tmp_path / "nothing")
    folder = fresh()
    (folder / "weights.safetensors").write_bytes(pickle.dumps({"W_enc": [1.0]}))
    assert "a pickle, not a safetensors file" in refusal(folder)
    torch.save({"W_enc": torch.ones(2)}, folder / "weights.safetensors")
    assert "a pickle, not a safetensors file" in refusal(folder)
    torch.save({}, folder / "sae.pt")
    assert "has no tensor" in refusal(folder / "sae.pt")
    torch.save(torch.ones(2), folder / "sae.ckpt")
    assert "pickled files are not read" in refusal(folder / "sae.ckpt")
    folder = fresh()
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(folder)
    (folder / "weights.safetensors").unlink()
    assert "weights.safetensors': missing" in refusal(folder)
    folder = fresh()
    write_tensors(folder / "weights.safetensors", {"W_enc": torch.ones(3, 3)})
    assert "weights do not fit config.json" in refusal(folder)
    folder = fresh()
    edit_config(folder, architecture="transcendental")
    assert "architecture 'transcendental' is not one of relu, gated, topk" in refusal(folder)
    folder = fresh()
    edit_config(folder, format_version=99)
    assert "format version 99 is newer than this package reads" in refusal(folder)
    folder = fresh()
    edit_config(folder, k=0)
    assert "k=0: expected 1 ≤ k ≤ d_sae=30" in refusal(folder)
    folder = fresh()
    (folder / "config.json").write_text("{")
    assert "config.json': damaged or changed" in refusal(folder)
    write_bytes(folder / "config.json", b"{")
    assert "config.json': damaged (Expecting property name" in refusal(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 12), (6, 1)])
def test_activations_of_another_width_are_refused(architecture: str, shape: tuple[int, ...]) -> None:
    """Among them 2 · 3 · 12 numbers, which would make rows of 6."""
    settings = {"k": 2} if "k" in ARCHITECTURES[architecture].setting_names else {}
    dictionary = ARCHITECTURES[architecture](6, 64, metadata={"hook": "blocks.7.hook_resid_pre"}, **settings)
    for use in (dictionary, dictionary.encode, dictionary.encode_sparse, dictionary.pre_activations):
        with pytest.raises(ShapeError, match=r"takes \[\.\.\., 6\].*blocks\.7\.hook_resid_pre"):
            use(torch.zeros(shape))


def test_codes_are_indexed_and_made_dense() -> None:
    dictionary = filled(TopK, k=3)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    codes = dictionary.encode_sparse(x)
    assert torch.equal(codes.dense(dictionary.d_sae), dictionary.encode(x))
    assert torch.equal(codes[1, 2:].dense(dictionary.d_sae), dictionary.encode(x)[1, 2:])
    values = codes.values.clone().requires_grad_()
    sae.Codes(values, codes.indices).dense(dictionary.d_sae).square().sum().backward()
    assert torch.equal(values.grad, 2 * codes.values)


def test_the_name_that_papers_use() -> None:
    assert sae.SparseAutoencoder is sae.Dictionary
