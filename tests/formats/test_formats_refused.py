"""What cannot be used is refused in one line that names it; damaged files never become another dictionary."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.errors import FormatError
from tests.support.foreign_files import CASES
from tests.support.foreign_weights import D_IN, D_SAE, K

Change = Callable[[dict[str, Any]], Any]


def changed(path: Path, change: Change) -> None:
    """Change the settings in a JSON file."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as error:
        sae.load(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


LLAMA = "Llama3_1-8B-Base-L5R-8x/hyperparams.json"
REFUSED: dict[str, tuple[str, str, Change, str]] = {
    "temporal": ("saelens standard", "cfg.json", lambda s: s.update(architecture="temporal"), "temporal cannot be"),
    "no steps": (
        "saelens matching_pursuit", "cfg.json", lambda s: s.update(max_iterations=0), "max_iterations=0: expected a",
    ),
    "in training": ("saelens topk", "cfg.json", lambda s: s.update(architecture="batchtopk"), "a batchtopk in"),
    "unheard of": ("saelens topk", "cfg.json", lambda s: s.update(architecture="new"), "'new' is not one of standard"),
    "whitening": (
        "saelens topk", "cfg.json", lambda s: s.update(normalize_activations="covariance_whitening"),
        "'covariance_whitening' cannot be used",
    ),
    "normalised transcoder": (
        "saelens transcoder", "cfg.json", lambda s: s.update(normalize_activations="layer_norm"), "does not scale back",
    ),
    "single head": ("saelens topk", "cfg.json", lambda s: s["metadata"].update(hook_head_index=3), "of a single head"),
    "no k": ("saelens topk", "cfg.json", lambda s: s.update(k=None), "k=None: expected a whole number"),
    "k of millions": ("saelens topk", "cfg.json", lambda s: s.update(k=10**6), "k=1000000"),
    "GroupMax": ("sparsify", "layers.10/cfg.json", lambda s: s.update(activation="groupmax"), "groupmax"),
    "signed features": ("sparsify", "layers.10/cfg.json", lambda s: s.update(signed=True), "signed features"),
    "class": (
        "dictionary_learning AutoEncoder", "config.json", lambda s: s["trainer"].update(dict_class="Crosscoder"),
        "'Crosscoder' is not one of AutoEncoder",
    ),
    "no trainer": ("dictionary_learning AutoEncoder", "config.json", lambda s: s.pop("trainer"), "no settings of"),
    "tanh-relu": (
        "saelens before 6", "cfg.json", lambda s: s.update(activation_fn_str="tanh-relu"), "tanh-relu cannot be used",
    ),
    "norm per token": (
        "llama scope", LLAMA, lambda s: s.update(norm_activation="token-wise"), "=token-wise",
    ),
    "NaN": (
        "llama scope", LLAMA, lambda s: s.update(jump_relu_threshold=float("nan")), "threshold nan",
    ),
    "norms": (
        "llama scope", LLAMA, lambda s: s.pop("dataset_average_activation_norm"), "no dataset_average",
    ),
    "crosscoder": ("llamascopium relu", "config.json", lambda s: s.update(sae_type="crosscoder"), "sae_type='crossc"),
    "BatchTopK": ("llamascopium topk", "config.json", lambda s: s.update(act_fn="batchtopk"), "convert it to jumprelu"),
    "GLU": ("llamascopium relu", "config.json", lambda s: s.update(use_glu_encoder=True), "use_glu_encoder=True"),
    "norm per batch": (
        "llamascopium relu", "config.json", lambda s: s.update(norm_activation="batch-wise"), "'batch-wise' cannot",
    ),
    "normalised transcoder, token-wise": (
        "llamascopium relu", "config.json", lambda s: s.update(norm_activation="token-wise"), "scaled back by the norm",
    ),
    "norms of another point": (
        "llamascopium relu", "config.json", lambda s: s.update(hook_point_in="blocks.1.hook_resid_pre"), "no average",
    ),
    "norms, two of one point": (
        "llama scope transcoder", LLAMA, lambda s: s.update(hook_point_out=s["hook_point_in"]), "two average norms",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_dictionary_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case, file, change, message = REFUSED[name]
    path = CASES[case].write(tmp_path)
    changed(tmp_path / file, change)
    assert message in refusal(path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    path = CASES["saelens standard"].write(tmp_path)
    weights = path / "sae_weights.safetensors"
    save_file({**load_file(weights), "W_new": torch.ones(3)}, weights)
    assert "holds W_new, whose meaning is unknown" in refusal(path)


@pytest.mark.parametrize(
    ("activation", "state", "message"),
    [
        ("TopK", {"k": K, "postact_fn": "Identity"}, "TopK with Identity cannot be used"),
        ("JumpReLU", {}, "JumpReLU cannot be used"),
        ("TopK", {}, "k=None: expected a whole number"),
    ],
)
def test_openai_s_other_activations_are_named(
    activation: str, state: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = CASES["openai"].write(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "activation": activation, "activation_state_dict": state}, path)
    assert message in refusal(path)


def test_the_state_of_an_interrupted_training_is_named(tmp_path: Path) -> None:
    path = CASES["dictionary_learning AutoEncoder"].write(tmp_path)
    torch.save({"step": 3, "ae": {}, "optimizer": {}}, path / "ae.pt")
    assert "interrupted training" in refusal(path)


def test_qwen_scope_needs_the_repository_s_name(tmp_path: Path) -> None:
    path = CASES["qwen scope"].write(tmp_path)
    moved = tmp_path / path.name
    path.rename(moved)
    assert "only in the repository's name" in refusal(moved)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").touch, ())


@pytest.mark.parametrize("name", ["openai", "qwen scope", "dictionary_learning AutoEncoder"])
def test_code_in_a_pickle_is_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = CASES[name].write(tmp_path)
    file = path / "ae.pt" if path.is_dir() else path
    torch.save({"W_enc": Bomb()}, file)
    assert "could run code" in refusal(path)
    file.write_bytes(pickle.dumps({"W_enc": Bomb()}))
    refusal(path)
    assert not (tmp_path / "ran").exists()


def test_objects_in_an_array_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = CASES["gemma scope"].write(tmp_path)
    np.savez(path / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    assert "params.npz" in refusal(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["encoder.bias", "encoder.weight", "bias"])
def test_tensors_that_do_not_fit_each_other_are_refused(name: str, tmp_path: Path) -> None:
    """One number would fit any shape if it were repeated."""
    path = CASES["dictionary_learning AutoEncoder"].write(tmp_path)
    content = torch.load(path / "ae.pt", weights_only=True)
    for tensor in (content[name][:1], content[name][:-1]):
        torch.save({**content, name: tensor.clone()}, path / "ae.pt")
        assert "do not fit each other" in refusal(path)


HOSTILE: dict[str, Callable[[], Any]] = {
    "repeated": lambda: torch.ones(1, 1).expand(D_SAE, D_IN),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3)]),
    "sparse": torch.eye(D_SAE)[:, :D_IN].to_sparse,
    "meta": lambda: torch.ones(D_SAE, D_IN, device="meta"),
    "complex": lambda: torch.ones(D_SAE, D_IN, dtype=torch.complex64),
    "bool": lambda: torch.ones(D_SAE, D_IN, dtype=torch.bool),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_tensors_that_are_not_plain_are_refused(kind: str, tmp_path: Path) -> None:
    path = CASES["openai"].write(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "encoder.weight": HOSTILE[kind]()}, path)
    refusal(path)


@pytest.mark.parametrize("k", [True, 3.0, torch.tensor(3 + 1j), torch.ones(2, dtype=torch.int64), "3"])
def test_k_is_a_whole_number(k: Any, tmp_path: Path) -> None:
    path = CASES["dictionary_learning AutoEncoderTopK"].write(tmp_path)
    torch.save({**torch.load(path / "ae.pt", weights_only=True), "k": k}, path / "ae.pt")
    assert "no whole number 'k'" in refusal(path)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = CASES["gemma scope"].write(tmp_path)
    np.savez_compressed(path / "params.npz", W_enc=np.zeros((3000, 3000)))
    assert "would become" in refusal(path)


def test_an_eight_bit_float_is_refused(tmp_path: Path) -> None:
    path = CASES["sparsify"].write(tmp_path)
    tensors = load_file(path / "sae.safetensors")
    save_file({**tensors, "W_dec": tensors["W_dec"].to(torch.float8_e4m3fn)}, path / "sae.safetensors")
    assert "float8_e4m3fn numbers" in refusal(path)


def test_circuit_tracer_s_topk_is_named(tmp_path: Path) -> None:
    path = CASES["circuit-tracer"].write(tmp_path)
    settings = tmp_path / "config.yaml"
    settings.write_text(settings.read_text(encoding="utf-8") + "activation: topk\nk: 3\n", encoding="utf-8")
    assert "activation 'topk', which keeps negative features, cannot be used here" in refusal(path)
    settings.write_text(settings.read_text(encoding="utf-8") + "relu_before_topk: true\n", encoding="utf-8")
    assert sae.load(path).settings() == {"k": 3}
    settings.write_text("activation: topk\nrelu_before_topk: true\n", encoding="utf-8")
    assert "k=None: expected a whole number" in refusal(path)
    settings.write_text("activation: tanh\n", encoding="utf-8")
    assert "activation 'tanh' cannot be used here, only relu and jumprelu" in refusal(path)
    settings.write_text("made: 2026-01-01\n", encoding="utf-8")
    assert "more than numbers and text" in refusal(path)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    refusal(tmp_path / ("x" * 300))


def test_a_run_of_several_dictionaries_names_them(tmp_path: Path) -> None:
    CASES["sparsify"].write(tmp_path)
    assert "holds 1 dictionaries, give one of them: layers.10" in refusal(tmp_path)


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    assert "no config.json there" in refusal(tmp_path)


def damaged(content: bytes, seed: int) -> bytes:
    """The content cut, with bytes changed, repeated, or exchanged; most damage is at the beginning, where heads are."""
    draw = random.Random(seed)
    data, kind = bytearray(content), seed % 5
    end = min(len(data), draw.choice([16, 200, 1000, len(data)]))
    place = draw.randrange(end)
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 1:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[place : place + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
    elif kind == 3:
        data += data[place:]
    else:
        other = draw.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    return bytes(data)


FILES = {
    "saelens jumprelu": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("layers.10/cfg.json", "layers.10/sae.safetensors", "config.json"),
    "dictionary_learning BatchTopKSAE": ("ae.pt", "config.json"),
    "openai": ("resid_delta_mlp_v4/autoencoders/8.pt",),
    "gemma scope": ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz",),
    "gemma scope 2": ("resid_post/layer_9_width_16k_l0_medium/params.safetensors",),
    "llama scope": tuple(
        f"Llama3_1-8B-Base-L5R-8x/{name}" for name in ("hyperparams.json", "checkpoints/final.safetensors")
    ),
    "llamascopium jumprelu": ("config.json", "sae_weights.safetensors"),
    "qwen scope": ("SAE-Res-Qwen3-1.7B-Base-W1K-L0_3/layer7.sae.pt",),
    "circuit-tracer jumprelu": ("layer_2.safetensors", "config.yaml"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cases", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_structural_damage_is_refused_in_one_line(name: str, cases: int, tmp_path: Path) -> None:
    """Or the dictionary has whole tensors of the right shape: without a hash, changed numbers cannot be told."""
    path = CASES[name].write(tmp_path)
    whole = {file: (tmp_path / file).read_bytes() for file in FILES[name]}
    refused = 0
    for seed in range(cases):
        file = FILES[name][seed % len(FILES[name])]
        (tmp_path / file).write_bytes(damaged(whole[file], seed))
        try:
            dictionary = sae.load(path)
        except FormatError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 700
        else:
            assert dictionary.W_dec.shape in ((D_SAE, D_IN), (2 * D_SAE, D_IN))
            assert all(bool(parameter.isfinite().all()) for parameter in dictionary.parameters())
        (tmp_path / file).write_bytes(whole[file])
    assert refused >= cases / 4
