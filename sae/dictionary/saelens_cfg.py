"""What other tools read of a dictionary, in their names: the `cfg` that SAELens and SAEBench ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sae.dictionary.hook_points import block_of

_ARCHITECTURES = {"relu": "standard_april_update", "matryoshka": "matryoshka_batch_topk"}
_WEIGHT_PROCESSING: dict[str, dict[str, bool]] = {
    "fold_ln": {"fold_ln": True},
    "center_and_fold": {"fold_ln": True, "center_writing_weights": True, "center_unembed": True},
}


@dataclass
class ToolConfig:
    """A dictionary's facts under the names that SAEBench 0.6 and SAELens 6 use.

    Not frozen, since those tools set fields of it and add others; nothing in this package reads it. What the metadata
    does not say is None, and the tool that needs it says so.

    Attributes:
        model_name: the language model, by the name it was trained under; set another where the tool knows it by one.
        hook_name, hook_layer: hook point, and the block it is in.
        d_in, d_sae: shape.
        architecture: as SAEBench calls it.
        dtype, device: of the weights, as text; they follow when the dictionary is moved.
        context_size: tokens the language model saw at once.
        prepend_bos: whether contexts began with BOS; True where nothing is recorded.
        training_tokens: tokens the dictionary was trained on.
        dataset_path: where its text came from.
        model_from_pretrained_kwargs: what was done to the language model's weights, as arguments of transformer-lens's
            `from_pretrained_no_processing`.
        hook_head_index: None: all heads together.
        apply_b_dec_to_input: b_dec is subtracted before encoding.
        normalize_activations: `none`: it takes raw activations.
        seqpos_slice: of every position.
        dataset_trust_remote_code: no data set's code is run.
    """

    model_name: str | None
    hook_name: str | None
    hook_layer: int | None
    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    device: str
    context_size: int | None
    prepend_bos: bool
    training_tokens: int | None
    dataset_path: str | None
    model_from_pretrained_kwargs: dict[str, bool]
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    seqpos_slice: tuple[int | None, ...] = (None,)
    dataset_trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.metadata: Any = self  # SAELens 6 looks for most of these there

    def to_dict(self) -> dict[str, Any]:
        """The fields above as JSON-able values; what a tool added is left out."""
        return asdict(self)


def tool_config(config: Mapping[str, Any], device: str) -> ToolConfig:
    """Made of what `config.json` holds.

    Args:
        config: of `Dictionary.config()`.
        device: where the weights are.
    """
    metadata: Mapping[str, Any] = config["metadata"]
    model, tokens, data, trained = (_part(metadata, name) for name in ("model", "tokens", "data", "trained"))
    hook, architecture = metadata.get("hook"), str(config["architecture"])
    source = data.get("source")
    return ToolConfig(
        model_name=model.get("name"),
        hook_name=hook,
        hook_layer=block_of(hook) if hook else None,
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        architecture=_ARCHITECTURES.get(architecture, architecture),
        dtype=config["dtype"],
        device=device,
        context_size=metadata.get("context_length"),
        prepend_bos=bool(tokens.get("prepend_bos", True)),
        training_tokens=trained.get("tokens"),
        dataset_path=source if source is None or isinstance(source, str) else ", ".join(source),
        model_from_pretrained_kwargs=dict(_WEIGHT_PROCESSING.get(model.get("weight_processing", "none"), {})),
    )


def _part(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the metadata; empty where there is none."""
    part = metadata.get(name)
    return part if isinstance(part, Mapping) else {}
