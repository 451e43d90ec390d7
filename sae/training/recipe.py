"""The recipe of a dictionary: settings, sources, start, folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.architectures import ARCHITECTURES
from sae.config.base import RENAMED
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError
from sae.training.joined import site_widths_of
from sae.training.source import BatchSource
from sae.training.traits import READERS


@dataclass(frozen=True)
class Recipe:
    """How one dictionary is trained, and on which sources.

    Attributes:
        dictionary: architecture, d_sae, k.
        settings: how to train.
        seed: seed of the initialisation.
        source: name of the source of its input.
        target: name of the source of its reconstruction target; None: the input.
        folder: run folder, for `metrics.jsonl`, `checkpoints/` and `snapshots/`; None: nothing is kept.
        metadata: saved with the dictionary; wins over the metadata of its sources. The entry `activations` names the
            data: resuming on other data is refused.
        start: a dictionary for raw activations whose weights training starts from; None: random directions.
        purpose: what it is trained for; dictionaries for different purposes start differently, whatever their seeds.
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

    @property
    def sources(self) -> dict[str, str]:
        """Names of its sources by role: `input`, and `target` if it has one."""
        names = {"input": self.source, "target": self.target}
        return {role: name for role, name in names.items() if name is not None}


def build(
    config: DictionaryConfig, d_in: int, d_out: int | None = None, site_widths: tuple[int, ...] = ()
) -> Dictionary:
    """An untrained dictionary: a transcoder if `d_out`, the width of its target, is given; a crosscoder if the widths
    of its sites are."""
    cls = ARCHITECTURES[config.architecture]
    dictionary = cls(d_in, config.d_sae, **{name: getattr(config, name) for name in cls.setting_names})
    if d_out is not None:
        dictionary.set_frame(Frame(skip=config.skip, d_out=d_out))
    elif site_widths:
        dictionary.set_frame(Frame(site_widths=site_widths))
    return dictionary


def chosen_settings(config: DictionaryConfig, settings: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights. The initial weights are not among them; their hash identifies them."""
    others = {
        "reads", "gives", "log_every", "checkpoint_every", "keep_checkpoints", "snapshots", "start_from", "cuda_graph",
    }  # fmt: skip
    unread = {key.partition(".")[2] for key, readers in READERS.items() if config.architecture not in readers}
    chosen = {**config.model_dump(mode="json"), **settings.model_dump(mode="json")}
    return {key: value for key, value in chosen.items() if key not in others | unread}


def setting_of(settings: Mapping[str, Any], key: str) -> Any:
    """A recorded setting of a training. One that did not exist then behaved like its default."""
    defaults = {**DictionaryConfig.model_fields, **TrainConfig.model_fields}
    old_names = {new: old for _, old, new in RENAMED}
    for name in (key, old_names.get(key, key)):
        if name in settings:
            return settings[name]
    default = defaults[key].default if key in defaults else None
    return list(default) if isinstance(default, tuple) else default


LATER = ("max_activation_norm_multiple",)
"""Settings that older trainings did not have and do not record. Their value is unknown then, not the default."""


def is_same_setting(settings: Mapping[str, Any], key: str, value: object) -> bool:
    """Whether a training with these recorded settings was made with this value, as far as it is recorded."""
    return (key in LATER and key not in settings) or setting_of(settings, key) == value


def identity_of(recipe: Recipe, source: BatchSource, target: BatchSource | None) -> dict[str, Any]:
    """Settings and data that must not change between a checkpoint and its resumption."""
    target_identity = None if target is None else {"d_in": target.d_in, "square": target.statistics.mean_squared_norm}
    widths = site_widths_of(source)
    return {
        "d_in": source.d_in,
        **({"site_widths": list(widths)} if widths else {}),
        **chosen_settings(recipe.dictionary, recipe.settings),
        "batch_size": source.batch_size,
        "seed": recipe.seed,
        "target": target_identity,
        "start": None if recipe.start is None else weights_sha256(recipe.start),
        "activations": recipe.metadata.get("activations"),
    }


def freeze_(dictionary: Dictionary, names: Sequence[str]) -> None:
    """Exclude the named parameters from training.

    Raises:
        ConfigError: a name is not that of a trained parameter, or no parameter is left.
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
    """Check that training can start from the weights that the recipe names.

    Raises:
        ConfigError: they have another shape, are not loaded, or depend on each input in a way that is not trained; or a
            setting for a random start is given too.
    """
    start, chosen = recipe.start, recipe.settings.initial_b_dec
    if start is not None and chosen != TrainConfig.model_fields["initial_b_dec"].default:
        raise ConfigError(
            f"train.initial_b_dec={chosen!r} has no effect if training starts from a dictionary: take it out"
        )
    if start is None and recipe.settings.start_from is not None:
        raise ConfigError("train.start_from is read by run folders only: give start=sae.load(folder) instead")
    if start is not None and not isinstance(start, Dictionary):
        raise ConfigError(f"start is a {type(start).__name__}: give a dictionary, such as sae.load(folder)")
    if start is None:
        if "W_skip" in recipe.settings.freeze:
            raise ConfigError(
                "train.freeze=[W_skip]: without a dictionary to start from it stays 0: leave out dictionary.skip, or "
                "give train.start_from"
            )
        return
    if start.frame.input_norm != "none":
        raise ConfigError(
            f"the dictionary to start from has input_norm={start.frame.input_norm}, which cannot be trained here: "
            "choose another train.start_from"
        )
    if start.frame.skip and not dictionary.frame.skip:
        way_out = "choose another train.start_from"
        if dictionary.frame.d_out is not None:
            way_out = "set dictionary.skip=true, or " + way_out
        raise ConfigError(f"the dictionary to start from has skip=True, the new one has no W_skip: {way_out}")
    if (start.d_sae, start.d_in, start.d_out) != (dictionary.d_sae, dictionary.d_in, dictionary.d_out):
        old, new = (_sizes(each, with_d_out=start.d_out != dictionary.d_out) for each in (start, dictionary))
        has_other_sites = (start.d_in, start.d_out) != (dictionary.d_in, dictionary.d_out)
        other = "hook points of these widths" if has_other_sites else f"dictionary.d_sae={start.d_sae}"
        raise ConfigError(
            f"the dictionary to start from has {old}, the new one {new}: choose another train.start_from, or set "
            f"{other}"
        )
    if start.site_widths and start.site_widths != dictionary.site_widths:
        raise ConfigError(
            f"the dictionary to start from is a crosscoder of sites with {list(start.site_widths)} numbers, the new "
            f"one has {list(dictionary.site_widths) or 'one site'}: choose another train.start_from"
        )


def _sizes(dictionary: Dictionary, *, with_d_out: bool) -> str:
    d_out = f", d_out={dictionary.d_out}" if with_d_out else ""
    return f"d_sae={dictionary.d_sae} and d_in={dictionary.d_in}{d_out}"
