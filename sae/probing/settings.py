"""The settings of probes: frozen, typed, each with its default and what it means; KEY=VALUE in, settings out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sae.config.base import Settings, described, read_words, validated
from sae.errors import ConfigError

READ_BY_RUN = ("model.", "harvest.cache", "device")


class _Common(Settings):
    """Of all probes."""

    PREFIX: ClassVar[str] = ""
    """What the keys begin with in a command."""

    seed: int = Field(default=0, ge=0, description="seed of every random choice: examples, splits, shuffled labels")
    test_fraction: float = Field(
        default=0.25, gt=0, lt=1, description="share of the examples that probes are scored on"
    )
    validation_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the examples that choose the regularisation"
    )

    @model_validator(mode="after")
    def _leaves_training(self) -> _Common:
        if self.test_fraction + self.validation_fraction >= 1:
            raise ConfigError(
                f"{self.PREFIX}test_fraction={self.test_fraction} and {self.PREFIX}validation_fraction="
                f"{self.validation_fraction} leave nothing to train on: lower one of them"
            )
        return self


class ProbeConfig(_Common):
    """Which probes are fitted, and to what."""

    k: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 5, 16), description="numbers of latents, of neurons and of principal components"
    )
    ranking: Literal["difference", "standardised"] = Field(
        default="difference",
        description="how latents and neurons are chosen on the training examples: by |difference of the class means|, "
        "or by the same in units of each one's standard deviation",
    )
    pca: bool = Field(default=True, description="probes on leading principal components beside the others")
    splits: PositiveInt = Field(default=3, description="random splits into training, validation and test examples")
    examples: PositiveInt = Field(
        default=400, description="examples of a data set, as many of each class as possible; drawn by seed"
    )
    max_tokens: int = Field(default=128, ge=2, description="tokens of a text, BOS included; of longer ones the last")
    pool: Literal["last", "mean"] = Field(
        default="last",
        description="what stands for a text: its last token, or the mean over its tokens of activations and of latents",
    )
    text: str | None = Field(default=None, description="column of the text; null: `text`, or `prompt`")
    label: str | None = Field(default=None, description="column of the label; null: `label`, `target`, or `spans`")
    outside: str | None = Field(
        default=None, description="with `spans`: label of the tokens that no span covers; null: these are left out"
    )
    sample: PositiveInt | None = Field(
        default=None, description="of all the data sets so many, drawn by seed; null: all, in an order drawn by seed"
    )

    @field_validator("k", mode="after")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


class LetterConfig(_Common):
    """How splitting and absorption of first letters are measured."""

    PREFIX = "letters."

    words: PositiveInt = Field(default=300, description="words of the vocabulary for each first letter, at most")
    prompt: str = Field(
        default="tartan has the first letter: T\nmirth has the first letter: M\n",
        description="text in front of each word; the activation is that of the word's token",
    )
    able_f1: float = Field(
        default=0.6, ge=0, le=1, description="a letter whose dense probe has a lower F1 is not measured"
    )
    split_gain: float = Field(
        default=0.03, ge=0, description="one more latent is a split of the feature where F1 rises by more than this"
    )
    max_splits: PositiveInt = Field(default=10, description="latents that a letter's feature is split into, at most")
    cosine: float = Field(
        default=0.025, description="least cosine of an absorbing latent's direction with the dense probe's"
    )
    share: float = Field(
        default=0.4, gt=0, description="least share of the projection on the probe that an absorbing latent carries"
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "" if value is None else value  # `letters.prompt=`, as YAML reads it


class _Words(ProbeConfig):
    """What a command line sets."""

    letters: LetterConfig = LetterConfig()


@dataclass(frozen=True)
class ProbeSettings:
    """What the words KEY=VALUE of a command line amount to.

    Attributes:
        probes: settings of the probes.
        letters: settings of the first letters.
        of_run: overrides that the run itself reads.
    """

    probes: ProbeConfig
    letters: LetterConfig
    of_run: tuple[str, ...]


def read_overrides(overrides: Sequence[str]) -> ProbeSettings:
    """Settings from `key=value` words; those of first letters begin with `letters.`.

    Raises:
        ConfigError: a key does not exist (the nearest one is named), or a value does not fit.
    """
    of_run = tuple(override for override in overrides if override.startswith(READ_BY_RUN))
    own = [override for override in overrides if override not in of_run]
    words = validated(_Words, read_words(_Words, own, {}, "examples=200"), "'sae probe --help'")
    probes = {name: getattr(words, name) for name in ProbeConfig.model_fields}
    return ProbeSettings(ProbeConfig(**probes), words.letters, of_run)


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Every key with its default and its meaning."""
    return described(_Words)
