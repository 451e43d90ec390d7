"""circuit-tracer's and OpenAI's dictionaries, saved and used by their own code, for scripts/conformance_formats.py.

As scripts/conformance_formats_peer.py, for packages that are on no package index: they are used in the environment of
somebody who has them (`--python`). circuit-tracer is that of decoderesearch/circuit-tracer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from conformance_formats_peer import D_IN, D_SAE, NORMS, PACKAGES, Case, K, main, randomise
from torch import Tensor

LAYER, WRITTEN = 3, "autoencoder.pt"


class CircuitTracer:
    """circuit-tracer: one layer of a set, as `to_safetensors` writes it, and the set's `config.yaml`."""

    def make(self, folder: Path, dtype: torch.dtype) -> Iterator[Case]:
        from circuit_tracer.transcoder import SingleLayerTranscoder  # pyright: ignore[reportMissingImports]
        from circuit_tracer.transcoder.activation_functions import JumpReLU  # pyright: ignore[reportMissingImports]

        for norms, unit_rows in NORMS.items():
            for name in ("relu", "jumprelu", "relu, skip", "jumprelu, skip"):
                hooks = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
                case = Case(
                    folder / f"{name}{norms}", f"dictionary/layer_{LAYER}.safetensors",
                    of={"hook": f"blocks.{LAYER}.ln2.hook_normalized"},
                )  # fmt: skip
                case.files.parent.mkdir(parents=True)
                activation: Any = torch.nn.functional.relu
                if "jump" in name:
                    activation = JumpReLU(torch.zeros(D_SAE, dtype=dtype))
                transcoder = SingleLayerTranscoder(
                    D_IN, D_SAE, activation, LAYER, "skip" in name, device=torch.device("cpu"), dtype=dtype
                )
                randomise(transcoder, unit_rows)
                if "jump" in name:
                    activation.threshold.data.abs_()  # a feature that fires is positive
                transcoder.to_safetensors(str(case.files))
                settings = {"model_kind": "transcoder_set", "model_name": "gpt2", **hooks}
                case.files.with_name("config.yaml").write_text(yaml.safe_dump(settings))
                yield case

    def load(self, path: Path, dtype: torch.dtype) -> Any:
        from circuit_tracer.transcoder.single_layer_transcoder import (  # pyright: ignore[reportMissingImports]
            load_transcoder,
        )

        return load_transcoder(str(path), LAYER, dtype=dtype, lazy_encoder=False, lazy_decoder=False)

    def use(self, dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return dictionary.encode(x) * dictionary.W_dec.norm(dim=-1), dictionary(x)

    def tensors(self, dictionary: Any) -> dict[str, Tensor]:
        return dictionary.state_dict()


class OpenAI:
    """OpenAI's sparse_autoencoder: one file, of ReLU, or of TopK with layer norm."""

    def make(self, folder: Path, dtype: torch.dtype) -> Iterator[Case]:
        from sparse_autoencoder.model import Autoencoder, TopK  # pyright: ignore[reportMissingImports]

        for norms, unit_rows in NORMS.items():
            for name, activation in (("relu", torch.nn.ReLU()), ("topk, layer norm", TopK(K))):
                case = Case(folder / f"{name}{norms}")
                case.files.mkdir(parents=True)
                dictionary = Autoencoder(D_SAE, D_IN, activation, normalize="norm" in name).to(dtype)
                parameters = dict(dictionary.named_parameters())
                randomise(SimpleNamespace(state_dict=lambda parameters=parameters: parameters), unit_rows)
                state = dictionary.state_dict()
                for key in ("activation.k", "activation.postact_fn"):  # newer PyTorch adds them, and its loader refuses
                    state.pop(key, None)
                torch.save(state, case.files / WRITTEN)
                yield case

    def load(self, path: Path, dtype: torch.dtype) -> Any:
        from sparse_autoencoder.model import Autoencoder  # pyright: ignore[reportMissingImports]

        return Autoencoder.from_state_dict(torch.load(path / WRITTEN, weights_only=True)).to(dtype)

    def use(self, dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        features, normalisation = dictionary.encode(x)
        return features * dictionary.decoder.weight.norm(dim=0), dictionary.decode(features, normalisation)

    def tensors(self, dictionary: Any) -> dict[str, Tensor]:
        return {
            "W_enc": dictionary.encoder.weight.T, "b_enc": dictionary.latent_bias,
            "W_dec": dictionary.decoder.weight.T, "b_dec": dictionary.pre_bias,
        }  # fmt: skip


if __name__ == "__main__":
    PACKAGES |= {"circuit_tracer": CircuitTracer, "openai": OpenAI}
    main()
