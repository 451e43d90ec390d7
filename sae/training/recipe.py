"""What a dictionary in training is made of: settings, sources, a start, a place to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.architectures import ARCHITECTURES
from sae.config.base import RENAMED
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError
from sae.training.traits import READERS


@dataclass(frozen=True)
class Recipe:
    """What one dictionary is made of.

    Attributes:
        dictionary: architecture, d_sae, k.
        settings: how to train.
        seed: of the initialisation.
        source: name of the source of its input.
        target: name of the source of what it reconstructs; None: the input.
        folder: run folder, for `metrics.jsonl`, `checkpoints/` and `snapshots/`; None: nothing is kept.
        metadata: saved with the dictionary, and wins over what its sources say of themselves; `activations` in it names
            the data: resuming on others is refused.
        start: a dictionary, for raw activations, whose weights training begins with; None: random directions.
        purpose: what it is trained for; dictionaries for two purposes begin apart, whatever their seeds.
    """

    dictionary: DictionaryConfig
    settings: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    source: str = "activations"
    target: str | None = None
    folder: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    start: Dictionary | None = None
    purpose: str = "training"


def build(shape: DictionaryConfig, d_in: int) -> Dictionary:
    """An untrained dictionary."""
    cls = ARCHITECTURES[shape.architecture]
    return cls(d_in, shape.d_sae, **{name: getattr(shape, name) for name in cls.setting_names})


def chosen_settings(shape: DictionaryConfig, settings: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights, but for those that training begins with, which go by their hash."""
    others = {"hook", "log_every", "checkpoint_every", "keep_checkpoints", "snapshots", "start_from"}
    unread = {key.partition(".")[2] for key, readers in READERS.items() if shape.architecture not in readers}
    chosen = {**shape.model_dump(mode="json"), **settings.model_dump(mode="json")}
    return {key: value for key, value in chosen.items() if key not in others | unread}


def setting_of(held: Mapping[str, Any], key: str) -> Any:
    """A setting that weights were made with; one that did not exist then had no other effect than its default."""
    defaults = {**DictionaryConfig.model_fields, **TrainConfig.model_fields}
    once = {new.rpartition(".")[2]: old.rpartition(".")[2] for old, new in RENAMED.items()}
    for name in (key, once.get(key, key)):
        if name in held:
            return held[name]
    default = defaults[key].default if key in defaults else None
    return list(default) if isinstance(default, tuple) else default


def freeze_(dictionary: Dictionary, names: Sequence[str]) -> None:
    """Take the gradient from the parameters of these names.

    Raises:
        ConfigError: there is none of such a name, or none is left.
    """
    trained = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
    for name in names:
        if name not in trained:
            raise ConfigError(
                f"train.freeze: {dictionary.architecture} trains no {name!r}; it trains {', '.join(trained)}"
            )
        trained[name].requires_grad_(False)
    if not any(p.requires_grad for p in trained.values()):
        raise ConfigError("train.freeze names all parameters: leave at least one to be trained")


def check_start(recipe: Recipe, dictionary: Dictionary) -> None:
    """Whether training can begin with the weights that the recipe names.

    Raises:
        ConfigError: they are of another shape, nobody has loaded them, or a setting says how to begin without them.
    """
    start, chosen = recipe.start, recipe.settings.initial_b_dec
    if start is not None and chosen != TrainConfig.model_fields["initial_b_dec"].default:
        raise ConfigError(
            f"train.initial_b_dec={chosen!r} has no effect where training starts from a dictionary: take it out"
        )
    if start is None and recipe.settings.start_from is not None:
        raise ConfigError("train.start_from is read by run folders only: give start=sae.load(folder) instead")
    if start is not None and not isinstance(start, Dictionary):
        raise ConfigError(f"start is a {type(start).__name__}: give a dictionary, such as sae.load(folder)")
    if start is not None and start.W_dec.shape != dictionary.W_dec.shape:
        raise ConfigError(
            f"the dictionary to start from has d_sae={start.d_sae} and d_in={start.d_in}, and d_sae={dictionary.d_sae} "
            f"and d_in={dictionary.d_in} are asked for: choose another train.start_from, or set dictionary.d_sae to its"
        )
