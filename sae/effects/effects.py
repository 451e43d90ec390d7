"""What features do to the model, as a result: effects of each, correlations, settings; JSON of all of it and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae.config.base import LARGEST
from sae.errors import ConfigError, FormatError, UnknownFeatureError
from sae.files.formats import Format
from sae.files.reading import conforming
from sae.results.estimate import Estimate

FORMAT = Format("sae-effects", 1)
SORT_COLUMNS = ("kl", "loss", "kl_after", "loss_after", "direct", "density", "positions", "feature")

_LARGEST_SCALE = (2 - 2**-23) * 2.0**127
_LEAST = {"positions": 1, "null_positions": 0, "window": 0, "tokens": 1, "top": 0, "seed": 0}


@dataclass(frozen=True)
class EffectSettings:
    """How effects are measured. All of it decides the numbers.

    Attributes:
        scale: α: a feature's activation f becomes α·f; 0 ablates it, 2 doubles it.
        positions: most places at which a feature is changed.
        null_positions: most places for each of its two nulls.
        window: following positions that are summed.
        tokens: held-out tokens read, in whole contexts; None: all.
        top: tokens named that a change makes more likely, and less.
        seed: of what is drawn.

    Raises:
        ConfigError: a number is out of its range.
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
        object.__setattr__(self, "scale", float(self.scale))  # 0 and 0.0 are one setting
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: expected at least {least}")
            if value is not None and value > LARGEST:
                raise ConfigError(f"{name}={value}: expected at most {LARGEST:,}")


class TokenChange(NamedTuple):
    """A next token, and how much its log-probability changes along the direct path, in nats."""

    token: str
    change: float


@dataclass(frozen=True)
class FeatureEffect:
    """What changing one feature does, in nats. Means over the places changed, with standard errors over documents.

    A feature that is not seen to fire changes nothing: its effects are 0, of no position, and it has no nulls.

    Attributes:
        feature: its index.
        density: share of the held-out tokens that it fires on.
        positions: places that it was changed at, each by itself.
        documents: documents that these are from.
        activation: mean activation at these places.
        loss: change of the loss of the next token, there.
        loss_after: the same, summed over the following positions.
        kl: KL(clean ‖ changed) of the next-token distributions, there.
        kl_after: the same, summed over the following positions.
        direct: first-order change of the loss along the direct path (`DirectPath`); None where that is not known.
        random_loss, random_kl: of changes as long in random directions, at the first of these places.
        kl_above_random: KL less that of the random direction at the same place.
        elsewhere_loss, elsewhere_kl: of adding |α − 1| times its mean activation where it does not fire.
        raised: the tokens that the change makes more likely along the direct path, most at the front.
        lowered: those that it makes less likely.
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
        """Estimates as value and standard error."""
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
    """Pearson's correlation of direct and measured change of the loss.

    Attributes:
        value: None where there are fewer than two entries, or one side does not vary.
        low, high: the middle 95 % of it with features shuffled: the direct effect of each beside the measured one of
            another.
        count: entries.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Effects:
    """Effects of many features.

    Attributes:
        features: effects by index, in ascending order.
        settings: how they were measured.
        dictionary: its architecture, shape and a hash of its weights.
        hook: hook point.
        model: identity of the language model.
        activations: hash of all that decides the cache's activations.
        token_policy: which tokens count.
        tokens: held-out tokens that firings were looked for in.
        over_features: direct against measured, one entry a feature, its means; None where the direct path is not known.
        over_positions: the same, one entry a place.
        key: hash of weights, data, model and settings, by which a stale result is known.
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

    def __getitem__(self, feature: int) -> FeatureEffect:
        """Effect of a feature.

        Raises:
            UnknownFeatureError: (an IndexError) it was not measured.
        """
        try:
            return self.features[feature]
        except KeyError:
            raise UnknownFeatureError(
                f"feature {feature}: its effect was not measured; 'sae effects RUN {feature}' does"
            ) from None

    def sorted_by(self, column: str = "kl", *, descending: bool | None = None) -> list[FeatureEffect]:
        """Features in the order of a column; losses by their size, whatever the sign; ties by index.

        Args:
            column: one of `SORT_COLUMNS`.
            descending: by default, everything but `feature` is.

        Raises:
            ConfigError: there is no such column.
        """
        check_column(column)
        sign = -1 if (column != "feature" if descending is None else descending) else 1
        return sorted(self.features.values(), key=lambda effect: (sign * _size(effect, column), effect.feature))

    def only(self, features: Iterable[int]) -> Effects:
        """Those of some features; correlations stay those of all."""
        chosen = sorted(set(features))
        return dataclasses.replace(self, features={feature: self[feature] for feature in chosen})

    def to_json(self) -> dict[str, Any]:
        """What `effects.json` holds."""
        record = {name: getattr(self, name) for name in _names(Effects) if name != "features"}
        for name in ("settings", "over_features", "over_positions"):
            record[name] = None if record[name] is None else dataclasses.asdict(record[name])
        return {**FORMAT.result_head(), **record, "features": [effect.to_json() for effect in self.features.values()]}

    @staticmethod
    def from_json(record: Any) -> Effects:
        """Inverse of `to_json`.

        Raises:
            FormatError: the record is not one, or of a newer version.
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


def check_column(column: str) -> None:
    """Raise ConfigError unless effects can be sorted by it."""
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
