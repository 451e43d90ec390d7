"""Dictionaries of another package, saved and used by that package's own code, for scripts/conformance_formats.py.

    python conformance_formats_peer.py PACKAGE make FOLDER    # random dictionaries, each saved in a folder of its own
    python conformance_formats_peer.py PACKAGE use FOLDER     # what the package computes with those in FOLDER

Runs in the package's environment, which does not have this toolkit. FOLDER/DTYPE/NAME holds one dictionary:

    case.json     `path`: the package's files; `refused`: what our refusal must name, if any; `of`: facts of its origin
    inputs.pt     activations [rows, d_in]
    outputs.pt    strengths [rows, d_sae] (features × norms of their decoder rows), reconstruction, and its tensors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

D_IN, D_SAE, K, ROWS = 12, 48, 5, 100
DTYPES = (torch.float64, torch.float32)
NORMS = {"": True, ", rows of other norms": False}
ORIGIN: dict[str, Any] = {"hook": "blocks.3.hook_resid_post", "context_length": 128}
HEADS = "blocks.3.attn.hook_z"
TRAINERS = {
    "StandardTrainer": "standard", "StandardTrainerAprilUpdate": "standard", "PAnnealTrainer": "p_anneal",
    "GatedSAETrainer": "gdm", "GatedAnnealTrainer": "gated_anneal", "TopKTrainer": "top_k",
    "BatchTopKTrainer": "batch_top_k", "BatchTopKTrainer, threshold never set": "batch_top_k",
    "MatryoshkaBatchTopKTrainer": "matryoshka_batch_top_k", "JumpReluTrainer": "jumprelu",
}  # fmt: skip
"""Those of dictionary_learning, and their modules."""
UNCENTRED, RANKED = {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}
SAELENS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("standard", "StandardSAE", {}),
    ("standard, not centred", "StandardSAE", UNCENTRED),
    ("standard, heads", "StandardSAE", {"reshape_activations": "hook_z"}),
    ("standard, scaled on average", "StandardSAE", {"normalize_activations": "expected_average_only_in"}),
    ("standard, before version 6", "StandardSAE", {}),
    ("gated", "GatedSAE", {}),
    ("gated, not centred", "GatedSAE", UNCENTRED),
    ("jumprelu", "JumpReLUSAE", {}),
    ("jumprelu, not centred", "JumpReLUSAE", UNCENTRED),
    ("topk", "TopKSAE", {}),
    ("topk, not centred", "TopKSAE", UNCENTRED),
    ("topk, ranked by norm", "TopKSAE", RANKED),
    ("topk, before version 6", "TopKSAE", {}),
    ("abstopk", "AbsTopKSAE", {}),
    ("abstopk, ranked by norm", "AbsTopKSAE", RANKED),
    ("transcoder", "Transcoder", {}),
    ("jumprelu_transcoder", "JumpReLUTranscoder", {}),
    ("transcoder, from 12 to 8 numbers", "Transcoder", {"d_out": 8}),
    ("skip_transcoder", "SkipTranscoder", {}),
    ("skip_transcoder, from 12 to 8 numbers", "SkipTranscoder", {"d_out": 8}),
    ("jumprelu_skip_transcoder", "JumpReLUSkipTranscoder", {}),
    ("matching_pursuit", "MatchingPursuitSAE", {}),
    ("matching_pursuit, 4 steps", "MatchingPursuitSAE", {"max_iterations": 4, "stop_on_duplicate_support": False}),
    ("matching_pursuit, not centred", "MatchingPursuitSAE", UNCENTRED),
    *(
        (f"{name}, {norm}", kind, {"normalize_activations": norm})
        for norm in ("layer_norm", "constant_norm_rescale")
        for name, kind in (
            ("standard", "StandardSAE"),
            ("gated", "GatedSAE"),
            ("jumprelu", "JumpReLUSAE"),
            ("topk", "TopKSAE"),
            ("abstopk", "AbsTopKSAE"),
            ("matching_pursuit", "MatchingPursuitSAE"),
        )
    ),
    ("trained standard", "StandardTrainingSAE", {}),
    ("trained gated", "GatedTrainingSAE", {}),
    ("trained jumprelu", "JumpReLUTrainingSAE", {}),
    ("trained topk", "TopKTrainingSAE", {}),
    ("trained abstopk", "AbsTopKTrainingSAE", {}),
    ("trained batchtopk", "BatchTopKTrainingSAE", {}),
    ("trained matryoshka_batchtopk", "MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [D_SAE // 4, D_SAE]}),
    ("checkpoint of standard", "StandardTrainingSAE", {}),
    ("checkpoint of topk", "TopKTrainingSAE", {}),
)
"""Dictionaries of SAELens: what they are, their class and its options."""
SAELENS_REFUSED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("temporal", "TemporalSAE", {"n_heads": 1, "bottleneck_factor": 4, "kval_topk": K}),
    ("batchtopk in training", "BatchTopKTrainingSAE", {}),
    ("matryoshka_batchtopk in training", "MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [D_SAE // 4, D_SAE]}),
)
SPARSIFY: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("layers.3", {}),
    "topk, number of features given": ("h.3", {"num_latents": D_SAE - 1}),
    "topk trained with multi_topk": ("h.3.mlp", {"multi_topk": True}),
    "transcoder": ("layers.3.mlp", {"transcode": True}),
    "topk, skip": ("layers.3", {"skip_connection": True}),
    "transcoder, skip": ("layers.3.mlp", {"transcode": True, "skip_connection": True}),
}
"""Dictionaries of sparsify: the module that the folder is named after, and options."""
SPARSIFY_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "groupmax": ("layers.3", {"activation": "groupmax", "k": 6}),
}


@dataclass
class Case:
    """A dictionary that the package saved in `folder / path`; see the file's head."""

    folder: Path
    path: str = "dictionary"
    refused: str = ""
    of: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> Path:
        return self.folder / self.path


class Package(Protocol):
    """A package: how it saves dictionaries, loads one, computes its strengths and reconstruction, names its tensors."""

    def make(self, folder: Path, dtype: torch.dtype) -> Iterator[Case]: ...

    def load(self, path: Path, dtype: torch.dtype) -> Any: ...

    def use(self, dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def tensors(self, dictionary: Any) -> dict[str, Tensor]: ...


@torch.no_grad()
def randomise(dictionary: Any, unit_rows: bool, zero_row: bool = True) -> None:
    """Give a dictionary random weights, in place: decoder rows of norm 1, or of other norms, one of which is 0."""
    for name, tensor in dictionary.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, dtype=torch.float64)
        if name in ("W_dec", "decoder.weight"):
            rows = values if name == "W_dec" else values.T
            rows /= rows.norm(dim=-1, keepdim=True)
            if not unit_rows:
                rows *= 0.5 + 2 * torch.rand(len(rows), 1, dtype=torch.float64)
                rows[0] *= 0 if zero_row else 1
        elif name.endswith("threshold") and tensor.ndim == 0:
            values.fill_(0.625)
        elif tensor.ndim == 2:
            values /= D_IN**0.5
        tensor.copy_(values * (0.3 if name == "r_mag" else 1))


class SAELens:
    """SAELens: files as `save_model` writes them, and `save_inference_model` at the end of a training."""

    def make(self, folder: Path, dtype: torch.dtype) -> Iterator[Case]:
        for norms, unit_rows in NORMS.items():
            for name, kind, options in SAELENS:
                hook = HEADS if name.endswith("heads") else ORIGIN["hook"]
                case = Case(folder / f"{name}{norms}", of={**ORIGIN, "hook": hook})
                dictionary = self._untrained(kind, dtype, hook, options)
                ranked = getattr(dictionary.cfg, "rescale_acts_by_decoder_norm", False)  # then it divides by the norms
                randomise(dictionary, unit_rows, zero_row=not ranked)
                save = dictionary.save_inference_model if name.startswith("trained") else dictionary.save_model
                save(case.files)
                if "before" in name:
                    self._make_old(case.files)
                yield case
        for refused, kind, options in SAELENS_REFUSED if dtype == torch.float32 else ():
            case = Case(folder / refused, refused=refused)
            self._untrained(kind, dtype, ORIGIN["hook"], options).save_model(case.files)
            yield case

    @staticmethod
    def _untrained(kind: str, dtype: torch.dtype, hook: str, options: dict[str, Any]) -> Any:
        """A new dictionary of the class of this name."""
        from sae_lens import saes  # pyright: ignore[reportMissingImports]
        from sae_lens.saes.sae import SAEMetadata  # pyright: ignore[reportMissingImports]

        shape: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": str(dtype).removeprefix("torch.")}
        facts = {"model_name": "gpt2", "hook_name": hook, "context_size": ORIGIN["context_length"]}
        if "TopK" in kind:
            shape["k"] = K
        if "Transcoder" in kind:
            shape |= {"d_out": D_IN, **UNCENTRED}
            facts["hook_name_out"] = "blocks.4.hook_mlp_out"
        config = getattr(saes, f"{kind}Config")(**{**shape, **options})
        config.metadata = SAEMetadata(**facts)
        return getattr(saes, kind)(config)

    @staticmethod
    def _make_old(folder: Path) -> None:
        """Give the files the form that they had before version 6."""
        from safetensors.torch import load_file, save_file

        settings, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
        new = json.loads(settings.read_text())
        save_file({**load_file(weights), "scaling_factor": torch.ones(D_SAE)}, weights)
        old = {
            "d_in": D_IN, "d_sae": D_SAE, "dtype": f"torch.{new['dtype']}", "model_name": "gpt2", "hook_layer": 3,
            "hook_name": ORIGIN["hook"], "hook_head_index": None, "context_size": ORIGIN["context_length"],
            "normalize_activations": False, "activation_fn_str": "relu",
        }  # fmt: skip
        topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "sae_lens_version": "5.9.1"}
        settings.write_text(json.dumps({**old, **(topk if "k" in new else {})}))

    def load(self, path: Path, dtype: torch.dtype) -> Any:
        from sae_lens import SAE  # pyright: ignore[reportMissingImports]

        return SAE.load_from_disk(path)

    def use(self, dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if dictionary.cfg.reshape_activations == "hook_z":
            x = x.unflatten(-1, (3, -1))  # heads
        features, reconstruction = dictionary.encode(x), dictionary(x)
        multiplied = getattr(dictionary.cfg, "rescale_acts_by_decoder_norm", False)
        return features if multiplied else features * dictionary.W_dec.norm(dim=-1), reconstruction.flatten(1)

    def tensors(self, dictionary: Any) -> dict[str, Tensor]:
        return dictionary.state_dict()


class Sparsify:
    """sparsify: files as `save_to_disk` writes them."""

    def make(self, folder: Path, dtype: torch.dtype) -> Iterator[Case]:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

        shape: dict[str, Any] = {"expansion_factor": D_SAE // D_IN, "k": K}
        for norms, unit_rows in NORMS.items():
            for name, (module, options) in SPARSIFY.items():
                case = Case(folder / f"{name}{norms}", f"dictionary/{module}")
                dictionary = SparseCoder(D_IN, SparseCoderConfig(**{**shape, **options}), dtype=dtype)
                randomise(dictionary, unit_rows)
                dictionary.save_to_disk(case.files)
                yield case
        for name, (module, options) in SPARSIFY_REFUSED.items() if dtype == torch.float32 else ():
            case = Case(folder / name, f"dictionary/{module}", refused=name)
            SparseCoder(D_IN, SparseCoderConfig(**{**shape, **options})).save_to_disk(case.files)
            yield case

    def load(self, path: Path, dtype: torch.dtype) -> Any:
        from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

        return SparseCoder.load_from_disk(path)

    def use(self, dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = dictionary.encode(x)
        features = torch.zeros(len(x), dictionary.num_latents, dtype=values.dtype).scatter(-1, indices, values)
        # not `forward`, which gives the reconstruction of another loss if it was trained with multi_topk
        reconstruction = dictionary.decode(values, indices)
        if dictionary.W_skip is not None:
            reconstruction += x @ dictionary.W_skip.mT
        return features * dictionary.W_dec.norm(dim=-1), reconstruction

    def tensors(self, dictionary: Any) -> dict[str, Tensor]:
        return in_common_names(dictionary)


class DictionaryLearning:
    """dictionary_learning: files as `trainSAE` writes them for each trainer, and of the one class that has none."""

    def make(self, folder: Path, dtype: torch.dtype) -> Iterator[Case]:
        from dictionary_learning.dictionary import AutoEncoderNew  # pyright: ignore[reportMissingImports]
        from dictionary_learning.training import trainSAE  # pyright: ignore[reportMissingImports]

        for norms, unit_rows in NORMS.items():
            for name in TRAINERS:
                case = Case(folder / f"{name}{norms}", "trainer_0", of=ORIGIN)
                settings = {"trainer": partial(self._trained, name, unit_rows), "device": "cpu"}
                trainSAE(_NoData(), [settings], steps=0, save_dir=str(case.folder), device="cpu")
                yield case
            case = Case(folder / f"AutoEncoderNew{norms}")
            case.files.mkdir(parents=True)
            dictionary = AutoEncoderNew(D_IN, D_SAE)
            randomise(dictionary, unit_rows, zero_row=False)
            torch.save(dictionary.state_dict(), case.files / "ae.pt")
            (case.files / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderNew"}}')
            yield case

    @staticmethod
    def _trained(name: str, unit_rows: bool, device: str) -> Any:
        """A trainer that has ended with random weights."""
        kind, _, never_set = name.partition(", ")
        shape: dict[str, Any] = {"activation_dim": D_IN, "dict_size": D_SAE, "steps": 20_000}
        place: dict[str, Any] = {"layer": 3, "lm_name": "gpt2"}
        if "Anneal" not in kind:  # whose files do not have it
            place["submodule_name"] = "resid_post_layer_3"
        if "TopK" in kind:
            shape["k"] = K
        if "Matryoshka" in kind:
            shape["group_fractions"] = [0.25, 0.75]
        trainer = getattr(import_module(f"dictionary_learning.trainers.{TRAINERS[name]}"), kind)
        trained = trainer(**shape, **place, device=device)
        randomise(trained.ae, unit_rows, zero_row=False)  # load_dictionary divides by the norms
        if never_set:
            trained.ae.threshold.fill_(-1)
        return trained

    def load(self, path: Path, dtype: torch.dtype) -> Any:
        from dictionary_learning.dictionary import JumpReluAutoEncoder  # pyright: ignore[reportMissingImports]
        from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

        kind = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
        if kind == "JumpReluAutoEncoder" and dtype != torch.float32:  # load_dictionary gives it in float32
            return JumpReluAutoEncoder.from_pretrained(path / "ae.pt", dtype=dtype)
        return load_dictionary(str(path), device=None)[0]

    def use(self, dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = dictionary.W_dec if hasattr(dictionary, "W_dec") else dictionary.decoder.weight.T
        return dictionary.encode(x) * rows.norm(dim=-1), dictionary(x)

    def tensors(self, dictionary: Any) -> dict[str, Tensor]:
        tensors = in_common_names(dictionary)
        if type(dictionary).__name__ == "AutoEncoderTopK":
            del tensors["threshold"]  # which it uses only on request
        return tensors


class _NoData(list[Tensor]):
    """No batches, with the settings of a buffer."""

    @property
    def config(self) -> dict[str, Any]:
        return {"ctx_len": ORIGIN["context_length"], "io": "out"}


def in_common_names(dictionary: Any) -> dict[str, Tensor]:
    """Its tensors by the names and in the orientation that SAELens and this toolkit use."""
    names = {
        "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec",
        "decoder_bias": "b_dec", "decoder.bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
    }  # fmt: skip
    state: dict[str, Tensor] = dictionary.state_dict()
    return {names.get(name, name): x.T if name.endswith(".weight") else x for name, x in state.items()}


PACKAGES: dict[str, type[Package]] = {
    "saelens": SAELens, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning,
}  # fmt: skip


def make(package: Package, folder: Path) -> None:
    """Have the package save random dictionaries, and use them on random activations."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        torch.set_default_dtype(dtype)
        for case in package.make(folder / str(dtype).removeprefix("torch."), dtype):
            facts = {"path": case.path, "refused": case.refused, "of": case.of}
            (case.folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")
            torch.save(2 * torch.randn(ROWS, D_IN), case.folder / "inputs.pt")
    use(package, folder)


@torch.no_grad()
def use(package: Package, folder: Path) -> None:
    """Have the package load each dictionary, encode and reconstruct."""
    for file in sorted(folder.glob("*/*/case.json")):
        case = json.loads(file.read_text(encoding="utf-8"))
        if case["refused"]:
            continue
        x = torch.load(file.with_name("inputs.pt"), weights_only=True)
        torch.set_default_dtype(x.dtype)
        dictionary = package.load(file.parent / case["path"], x.dtype)
        strengths, reconstruction = package.use(dictionary, x)
        tensors = {name: tensor.clone() for name, tensor in package.tensors(dictionary).items()}
        outputs = {"strengths": strengths, "reconstruction": reconstruction, "tensors": tensors}
        torch.save(outputs, file.with_name("outputs.pt"))


def main() -> None:
    package, verb, folder = sys.argv[1:]
    {"make": make, "use": use}[verb](PACKAGES[package](), Path(folder))


if __name__ == "__main__":
    main()
