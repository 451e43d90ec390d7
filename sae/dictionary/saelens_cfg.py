"""The `cfg` attribute that SAELens and SAEBench read from a dictionary, under their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sae.dictionary.frame import Frame, InputNorm
from sae.dictionary.hook_points import block_of
from sae.dictionary.origin import Origin

WEIGHT_PROCESSING: dict[str, dict[str, bool]] = {
    "none": {},
    "fold_ln": {"fold_ln": True},
    "center_and_fold": {"fold_ln": True, "center_writing_weights": True, "center_unembed": True},
}
"""Arguments of transformer-lens that process a model's weights, by `model.weight_processing`."""
NORMALISATION: dict[InputNorm, str] = {"layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
"""SAELens's `normalize_activations` by ours; `none` for the others."""


@dataclass
class ToolConfig:
    """A dictionary's facts under the names that SAEBench 0.6 and SAELens 6 use.

    Not frozen, because those tools set its fields and add others; nothing in this package reads it. Facts missing from
    the metadata are None, and the tool that needs them says so.

    Attributes:
        model_name: name of the language model in training; set another if the tool uses a different name.
        hook_name, hook_layer: hook point, and its block.
        d_in, d_sae: shape.
        architecture: SAEBench's name of it.
        dtype, device: dtype and device of the weights, as text; updated when the dictionary is moved.
        context_size: tokens the language model saw at once.
        prepend_bos: whether contexts began with BOS; True if not recorded.
        training_tokens: tokens the dictionary was trained on.
        dataset_path: source of its text.
        model_from_pretrained_kwargs: processing of the language model's weights, as arguments of transformer-lens's
            `from_pretrained_no_processing`.
        hook_head_index: None: all heads together.
        apply_b_dec_to_input: whether b_dec is subtracted before encoding: not of a transcoder.
        normalize_activations: what the dictionary does to each token by itself; `none`: nothing.
        seqpos_slice: `(None,)`: all positions.
        dataset_trust_remote_code: False: no data set's code is run.
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
        self.metadata: Any = self  # SAELens 6 reads most of these from it

    def to_dict(self) -> dict[str, Any]:
        """The fields above as JSON-able values; fields that a tool added are left out."""
        return asdict(self)


def tool_config(config: Mapping[str, Any], architecture: str, device: str) -> ToolConfig:
    """Build the `cfg` from the contents of `config.json`.

    Args:
        config: result of `Dictionary.config()`.
        architecture: SAEBench's name of it.
        device: device of the weights.
    """
    metadata: Mapping[str, Any] = config["metadata"]
    model, tokens, data, trained = (_part(metadata, name) for name in ("model", "tokens", "data", "trained"))
    reads, frame = Origin.of(metadata).reads, Frame.from_json(config)
    hook = reads.hook if len(reads) == 1 else None
    source = data.get("source")
    return ToolConfig(
        model_name=model.get("name"),
        hook_name=hook,
        hook_layer=block_of(hook) if hook else None,
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        architecture=architecture,
        dtype=config["dtype"],
        device=device,
        context_size=metadata.get("context_length"),
        prepend_bos=bool(tokens.get("prepend_bos", True)),
        training_tokens=trained.get("tokens"),
        dataset_path=source if source is None or isinstance(source, str) else ", ".join(source),
        model_from_pretrained_kwargs=dict(WEIGHT_PROCESSING.get(model.get("weight_processing", "none"), {})),
        apply_b_dec_to_input=frame.d_out is None,
        normalize_activations=NORMALISATION.get(frame.input_norm, "none"),
    )


def _part(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the metadata; empty if missing."""
    part = metadata.get(name)
    return part if isinstance(part, Mapping) else {}
