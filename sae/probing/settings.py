"""Settings of probes: frozen, typed, each with a default and a description, and read from KEY=VALUE words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sae.config.base import Settings, described, read_words, validated
from sae.config.file import READ_BY_RUN
from sae.errors import ConfigError

_OF_EXAMPLES = ("examples", "max_tokens", "pool", "text", "label", "outside", "seed")
"""Settings of a search that decide which tokens are examples."""


class _Common(Settings):
    """Settings common to all probes."""

    PREFIX: ClassVar[str] = ""
    """Prefix of the keys on the command line."""

    seed: int = Field(default=0, ge=0, description="seed of every random choice: examples, splits, shuffled labels")
    test_fraction: float = Field(default=0.25, gt=0, lt=1, description="share of the examples used to score probes")
    validation_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the examples used to choose the regularisation"
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
    """Which probes are fitted, and the data they are fitted to."""

    k: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 5, 16), description="numbers of latents, neurons and principal components to probe"
    )
    ranking: Literal["difference", "standardised"] = Field(
        default="difference",
        description="how latents and neurons are chosen on the training examples: by |difference of the class means|, "
        "or by that difference in units of each one's standard deviation",
    )
    pca: bool = Field(default=True, description="also fit probes on leading principal components")
    splits: PositiveInt = Field(
        default=3, description="number of random splits into training, validation and test examples"
    )
    examples: PositiveInt = Field(
        default=400, description="examples per data set, balanced over classes if possible; drawn by seed"
    )
    max_tokens: int = Field(default=128, ge=2, description="tokens per text, including BOS; longer texts keep the last")
    pool: Literal["last", "mean"] = Field(
        default="last",
        description="how a text is represented: its last token, or the mean of activations and latents over its tokens",
    )
    text: str | None = Field(default=None, description="column of the text; null: `text` or `prompt`")
    label: str | None = Field(default=None, description="column of the label; null: `label`, `target` or `spans`")
    outside: str | None = Field(
        default=None, description="with `spans`: label of tokens outside all spans; null: they are left out"
    )
    sample: PositiveInt | None = Field(
        default=None, description="number of data sets, drawn by seed; null: all, in an order drawn by seed"
    )

    @field_validator("k", mode="after")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


class LetterConfig(_Common):
    """How splitting and absorption of first letters are measured."""

    PREFIX = "letters."

    words: PositiveInt = Field(default=300, description="maximum number of vocabulary words per first letter")
    prompt: str = Field(
        default="tartan has the first letter: T\nmirth has the first letter: M\n",
        description="text before each word; the activation is read at the word's token",
    )
    able_f1: float = Field(
        default=0.6, ge=0, le=1, description="letters whose dense probe has a lower F1 are not measured"
    )
    split_gain: float = Field(
        default=0.03, ge=0, description="another latent counts as a split of the feature if F1 rises by more than this"
    )
    max_splits: PositiveInt = Field(
        default=10, description="maximum number of latents that a letter's feature is split into"
    )
    cosine: float = Field(
        default=0.025, description="minimum cosine of an absorbing latent's direction with the dense probe's"
    )
    share: float = Field(
        default=0.4, gt=0, description="minimum share of the projection on the probe that an absorbing latent carries"
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "" if value is None else value  # YAML reads `letters.prompt=` as null


class _Words(ProbeConfig):
    """All settings of a command line."""

    letters: LetterConfig = LetterConfig()


@dataclass(frozen=True)
class ProbeSettings:
    """Settings read from the KEY=VALUE words of a command line.

    Attributes:
        probes: settings of the probes.
        letters: settings of first letters.
        of_run: overrides that are read by the run itself.
    """

    probes: ProbeConfig
    letters: LetterConfig
    of_run: tuple[str, ...]


def read_overrides(overrides: Sequence[str]) -> ProbeSettings:
    """Settings from `key=value` words; those of first letters begin with `letters.`.

    Raises:
        ConfigError: a key does not exist (the nearest key is named), or a value is invalid.
    """
    run_overrides = tuple(override for override in overrides if override.startswith(READ_BY_RUN))
    own = [override for override in overrides if override not in run_overrides]
    words = validated(_Words, read_words(_Words, own, {}, "examples=200"), "'sae probe --help'")
    probes = {name: getattr(words, name) for name in ProbeConfig.model_fields}
    return ProbeSettings(ProbeConfig(**probes), words.letters, run_overrides)


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Each key with its default and its description."""
    return described(_Words)


class ConceptConfig(Settings):
    """How features are searched for a concept."""

    examples: PositiveInt = Field(
        default=400, description="number of examples, balanced over classes if possible; drawn by seed"
    )
    max_tokens: int = Field(default=128, ge=2, description="tokens per text, including BOS; longer texts keep the last")
    pool: Literal["last", "mean"] = Field(
        default="mean",
        description="how a text is represented: the mean of activations and latents over its tokens, or its last token",
    )
    permutations: int = Field(
        default=1000, ge=19, description="number of shuffles of the labels, each with the same search, for the null"
    )
    listed: PositiveInt = Field(default=10, description="number of features in the result, best first")
    positive: str | None = Field(
        default=None, description="with DATA: the label that is the concept; null: the later of two in order"
    )
    text: str | None = Field(default=None, description="with DATA: column of the text; null: `text` or `prompt`")
    label: str | None = Field(
        default=None, description="with DATA: column of the label; null: `label`, `target` or `spans`"
    )
    outside: str | None = Field(
        default=None, description="with `spans`: label of tokens outside all spans; null: they are left out"
    )
    seed: int = Field(default=0, ge=0, description="seed of every random choice: examples, halves, shuffled labels")

    def of_examples(self) -> ProbeConfig:
        """The part that decides which tokens are examples."""
        return ProbeConfig(**{name: getattr(self, name) for name in _OF_EXAMPLES})


def read_concept_overrides(overrides: Sequence[str]) -> tuple[ConceptConfig, tuple[str, ...]]:
    """Settings of a search from `key=value` words, and the words that are settings of the run.

    Raises:
        ConfigError: a key does not exist (the nearest key is named), or a value is invalid.
    """
    of_run = tuple(override for override in overrides if override.startswith(READ_BY_RUN))
    own = [override for override in overrides if override not in of_run]
    values = read_words(ConceptConfig, own, {}, "examples=200")
    return validated(ConceptConfig, values, "'sae find --help'"), of_run


def describe_concept_keys() -> Iterator[tuple[str, str, str]]:
    """Each key of a search with its default and its description."""
    return described(ConceptConfig)
