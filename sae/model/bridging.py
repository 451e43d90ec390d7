"""Wraps a loaded model in transformer-lens's bridge, and checks that it is still the same model."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from sae.config.sources import ModelConfig
from sae.errors import ModelError
from sae.model.bridge_proof import BridgeProof, Difference
from sae.model.guard import NEEDS_CODE, CodeRefusedError, guarded, quiet, replaced

_UNPROCESSED = "set model.weight_processing=none"


def has_bridge() -> bool:
    """Whether transformer-lens is installed."""
    return importlib.util.find_spec("transformer_lens") is not None


def boot(model: Any, tokenizer: Any, label: str, config: ModelConfig) -> Any:
    """Bridge a model with transformer-lens, with its weights processed as `config` asks.

    The bridge's logits are compared with the model's on some tokens, because transformer-lens computes attention in its
    own way and changes the model in place.

    Raises:
        ModelError: transformer-lens is not installed, has no adapter for the model, or turns it into another model.
    """
    if not has_bridge():
        raise ModelError(
            f"model {config.name!r}: without transformer-lens, a {type(model).__name__} with model.weight_processing="
            f"{config.weight_processing} cannot be read: pip install 'sae[lm]'"
        )
    with quiet():  # the import changes the messages of transformers
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers import source

    kind, processing = type(model).__name__, config.weight_processing
    another = "use another model" if config.dtype == "float32" else "try model.dtype=float32, or use another model"
    rows = int(model.get_input_embeddings().weight.shape[0])
    with _bridging(config, f"transformers cannot run {kind}", another):
        proof = BridgeProof(model, min(rows, len(tokenizer)))
    # The processor for images or sound is looked up on the hub by the label, and torchvision is installed for it.
    with (
        _bridging(config, f"transformer-lens cannot bridge {kind}", "use a model of another architecture"),
        replaced(source, "load_modality_processor", lambda *_: None),
    ):
        bridge = TransformerBridge.boot_transformers(
            label,
            hf_model=model,
            tokenizer=tokenizer,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
        )
    if processing != "none":
        centre = processing == "center_and_fold"
        with _bridging(config, f"transformer-lens cannot process the weights of {kind}", _UNPROCESSED):
            bridge.process_weights(fold_ln=True, center_writing_weights=centre, center_unembed=centre)
    way_out = another if processing == "none" else _UNPROCESSED
    with _bridging(config, f"transformer-lens cannot run {kind}", way_out):
        difference = proof.difference(bridge)
    if difference.share > 1:
        raise ModelError(_another_model(config, kind, difference, another))
    return bridge.requires_grad_(False)


@contextlib.contextmanager
def _bridging(config: ModelConfig, what: str, way_out: str) -> Iterator[None]:
    """Run a library on the guarded model; turn anything that it raises into a ModelError, except lack of memory."""
    try:
        with quiet(), guarded(config):
            yield
    except CodeRefusedError as error:
        raise ModelError(f"model {config.name!r}: {NEEDS_CODE}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"model {config.name!r}: {what} ({reason}); {way_out}") from error


def _another_model(config: ModelConfig, kind: str, difference: Difference, another: str) -> str:
    difference_text = f"log-probabilities are off by up to {difference.largest:.2g}"
    if config.weight_processing != "none":
        return (
            f"model {config.name!r}: transformer-lens makes another model of {kind} when it processes its weights "
            f"(model.weight_processing={config.weight_processing}): its {difference_text}; {_UNPROCESSED}"
        )
    return (
        f"model {config.name!r}: transformer-lens makes another model of {kind}: its {difference_text} from those of "
        f"transformers, so its activations would not be the model's; {another}, or a version of "
        "transformer-lens that supports every setting of its config.json"
    )
