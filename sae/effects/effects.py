"""Effects of features as a result: the effects of each feature, correlations and settings, to JSON and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae.config.base import LARGEST
from sae.errors import ConfigError, FormatError, UnknownFeatureError
from sae.files.formats import Format
from sae.files.kept import KeptResult
from sae.files.reading import conforming
from sae.results.estimate import Estimate

FORMAT = Format("sae-effects", 1)
SORT_COLUMNS = ("kl", "loss", "kl_after", "loss_after", "direct", "density", "positions", "feature")

_LARGEST_SCALE = (2 - 2**-23) * 2.0**127
_LEAST = {"positions": 1, "null_positions": 0, "window": 0, "tokens": 1, "top": 0, "seed": 0}


@dataclass(frozen=True)
class EffectSettings:
    """How effects are measured. Every setting affects the numbers.

    Attributes:
        scale: the factor α: a feature's activation f becomes α·f; 0 ablates it, 2 doubles it.
        positions: maximum number of places at which a feature is changed.
        null_positions: maximum number of places for each of its two nulls.
        window: number of following positions to sum over.
        tokens: held-out tokens to read, in whole contexts; None: all.
        top: number of tokens to list that a change makes more likely, and less likely.
        seed: seed of all random draws.

    Raises:
        ConfigError: a value is out of range.
    """

    scale: float = 0.0
    positions: int = 64
    null_positions: int = 16
    window: int = 16
    tokens: int | None = None
    top: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale={self.scale}: expected a finite number; 0 ablates a feature, 2 doubles it")
        if abs(self.scale) > _LARGEST_SCALE:
            raise ConfigError(
                f"scale={self.scale}: expected at most {_LARGEST_SCALE:.4g}, float32's largest number; 0 ablates a "
                "feature, 2 doubles it"
            )
        object.__setattr__(self, "scale", float(self.scale))  # 0 and 0.0 are the same setting
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: expected at least {least}")
            if value is not None and value > LARGEST:
                raise ConfigError(f"{name}={value}: expected at most {LARGEST:,}")


class TokenChange(NamedTuple):
    """A next token and the change of its log-probability along the direct path, in nats."""

    token: str
    change: float


@dataclass(frozen=True)
class FeatureEffect:
    """The effect of changing one feature, in nats: means over the places changed, with standard errors over documents.

    A feature that never fires in the text has effects of 0 at 0 positions, and no nulls.

    Attributes:
        feature: its index.
        density: share of the held-out tokens on which it fires.
        positions: number of places at which it was changed, one at a time.
        documents: number of documents these places are in.
        activation: mean activation at these places.
        loss: change of the next-token loss at these places.
        loss_after: the same, summed over the following positions.
        kl: KL(clean ‖ changed) of the next-token distributions at these places.
        kl_after: the same, summed over the following positions.
        direct: first-order change of the loss along the direct path (`DirectPath`); None if that is unknown.
        random_loss, random_kl: effects of changes of the same length in random directions, at the first of these
            places.
        kl_above_random: KL minus that of the random direction at the same place.
        elsewhere_loss, elsewhere_kl: effects of adding `|α − 1|` times its mean activation where it does not fire.
        raised: the tokens that the change makes more likely along the direct path, largest change first.
        lowered: the tokens that it makes less likely.
    """

    feature: int
    density: float
    positions: int
    documents: int
    activation: float
    loss: Estimate
    loss_after: Estimate
    kl: Estimate
    kl_after: Estimate
    direct: Estimate | None
    random_loss: Estimate
    random_kl: Estimate
    kl_above_random: Estimate
    elsewhere_loss: Estimate
    elsewhere_kl: Estimate
    raised: tuple[TokenChange, ...] = ()
    lowered: tuple[TokenChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values; estimates as value and standard error."""
        return {name: _plain(getattr(self, name)) for name in _names(FeatureEffect)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> FeatureEffect:
        """Inverse of `to_json`."""
        values: dict[str, Any] = {name: record[name] for name in _names(FeatureEffect)}
        for name, value in values.items():
            if isinstance(value, dict):
                values[name] = Estimate.from_json(value)
            elif name in ("raised", "lowered"):
                values[name] = tuple(TokenChange(str(token), float(change)) for token, change in value)
        return FeatureEffect(**values)


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation between the direct and the measured change of the loss.

    Attributes:
        value: None if there are fewer than two entries, or one side is constant.
        low, high: the middle 95 % of correlations with features shuffled: each feature's direct effect paired with
            the measured effect of another.
        count: number of entries.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Effects:
    """Effects of many features.

    Attributes:
        features: effects by feature index, in ascending order.
        settings: how they were measured.
        dictionary: its architecture, shape and a hash of its weights.
        hook: hook point at which features were changed; for a transcoder, the one that it gives.
        model: identity of the language model.
        activations: hash of everything that determines the cache's activations.
        token_policy: which tokens count.
        tokens: number of held-out tokens searched for firings.
        over_features: direct against measured means, one entry per feature; None if the direct path is unknown.
        over_positions: the same, one entry per place.
        key: hash of weights, data, model and settings; identifies stale results.
        road: how changes at the hook point became logits, in words; None in older results.
    """

    features: dict[int, FeatureEffect]
    settings: EffectSettings
    dictionary: dict[str, Any]
    hook: str
    model: dict[str, Any]
    activations: str
    token_policy: dict[str, Any]
    tokens: int
    over_features: Correlation | None
    over_positions: Correlation | None
    key: str
    road: str | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def place(self) -> str:
        """The hook point, after the one that a transcoder reads."""
        reads = self.dictionary.get("reads")
        return f"{reads} → {self.hook}" if reads else self.hook

    def __getitem__(self, feature: int) -> FeatureEffect:
        """Effect of a feature.

        Raises:
            UnknownFeatureError: (an IndexError) the feature was not measured.
        """
        try:
            return self.features[feature]
        except KeyError:
            raise UnknownFeatureError(
                f"feature {feature}: its effect was not measured; measure it with 'sae effects RUN {feature}'"
            ) from None

    def sorted_by(self, column: str = "kl", *, descending: bool | None = None) -> list[FeatureEffect]:
        """Features sorted by a column; losses by absolute value; ties by index.

        Args:
            column: one of `SORT_COLUMNS`.
            descending: by default, True for every column except `feature`.

        Raises:
            ConfigError: there is no such column.
        """
        check_column(column)
        sign = -1 if (column != "feature" if descending is None else descending) else 1
        return sorted(self.features.values(), key=lambda effect: (sign * _size(effect, column), effect.feature))

    def only(self, features: Iterable[int]) -> Effects:
        """Effects of some features; correlations remain those of all."""
        chosen = sorted(set(features))
        return dataclasses.replace(self, features={feature: self[feature] for feature in chosen})

    def to_json(self) -> dict[str, Any]:
        """The content of `effects.json`."""
        record = {name: getattr(self, name) for name in _names(Effects) if name != "features"}
        for name in ("settings", "over_features", "over_positions"):
            record[name] = None if record[name] is None else dataclasses.asdict(record[name])
        record["features"] = [effect.to_json() for effect in self.features.values()]
        return kept_effects(self.settings.scale).headed(record)

    @staticmethod
    def from_json(record: Any) -> Effects:
        """Inverse of `to_json`.

        Raises:
            FormatError: the record is not a record of effects, or has a newer version.
        """
        FORMAT.check(record, "effects")
        try:
            values = {name: record[name] for name in _names(Effects) if name != "road" or name in record}
            effects = [FeatureEffect.from_json(entry) for entry in values["features"]]
            values["features"] = {effect.feature: effect for effect in effects}
            values["settings"] = EffectSettings(**values["settings"])
            for name in ("over_features", "over_positions"):
                values[name] = None if values[name] is None else Correlation(**values[name])
            return conforming(Effects(**values))
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise FormatError(f"effects: damaged ({' '.join(str(error).split())})") from error


def stem(scale: float) -> str:
    """Name of the files of a factor without suffix: `effects` for ablation, `effects-2` for doubling."""
    return "effects" if scale == 0 else f"effects-{scale:g}"


def kept_effects(scale: float) -> KeptResult:
    """The files of a factor: effects in JSON, and every single change next to it."""
    return KeptResult(FORMAT, f"{stem(scale)}.json", (f"{stem(scale)}.safetensors",), grows=True)


def check_column(column: str) -> None:
    """Raise ConfigError unless effects can be sorted by the column."""
    if column not in SORT_COLUMNS:
        raise ConfigError(f"column {column!r}: effects are sorted by {', '.join(SORT_COLUMNS)}")


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_json()
    return [list(entry) for entry in value] if isinstance(value, tuple) else value


def _size(effect: FeatureEffect, column: str) -> float:
    value = getattr(effect, column)
    value = value.value if isinstance(value, Estimate) else value
    return 0.0 if value is None else float(abs(value))
