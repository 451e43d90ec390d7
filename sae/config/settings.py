"""The settings of a run: frozen, typed, each with a default and a description; the names of architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sae.config.base import Settings
from sae.config.sources import DataConfig, HarvestConfig, ModelConfig
from sae.errors import ConfigError
from sae.files.paths import expanded

AUTO = "auto"
"""Stands for a number of tokens that depends on the size of the cache."""

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Sizes of nested dictionaries as shares of d_sae: each adds twice as many features as the one before."""


Architecture = Literal["relu", "gated", "topk", "batch_topk", "jumprelu", "matryoshka"]
"""Names of the architectures; each is that of a file in `sae/architectures/`, which declares everything else."""


def is_pattern(hook: Any) -> bool:
    """Whether an entry that names hook points is a pattern, such as `blocks.*.hook_mlp_out`."""
    return isinstance(hook, str) and any(character in hook for character in "*?[")


class DictionaryConfig(Settings):
    """The architecture and size of the dictionary."""

    architecture: Architecture = Field(
        default="topk",
        description="`topk` (k per token), `batch_topk` (k per token on average), `matryoshka` (the same, nested), "
        "`jumprelu` (learned thresholds), `gated` and `relu` (with an L1 penalty)",
    )
    reads: str | tuple[str, ...] | None = Field(
        default=None,
        description="hook point that it encodes; null: the first of harvest.hooks; sweep.dictionary.reads takes a list "
        "or a pattern, such as blocks.*.hook_mlp_out, and trains a dictionary for each",
    )
    gives: str | tuple[str, ...] | None = Field(
        default=None,
        description="hook point that it reconstructs, later in the model and as wide (a transcoder); null: the one it "
        "encodes",
    )
    d_sae: PositiveInt = Field(default=4096, description="number of features")
    k: PositiveInt = Field(
        default=32,
        description="features active per token; for relu, gated and jumprelu the target of the sparsity penalty, "
        "unless train.l1_coefficient or train.l0_coefficient fixes its weight",
    )
    prefixes: tuple[float, ...] = Field(
        default=PREFIXES,
        description="sizes of the nested dictionaries, as ascending shares of d_sae; matryoshka only",
    )

    @property
    def is_nested(self) -> bool:
        """Whether the architecture reads `prefixes`."""
        return self.architecture == "matryoshka"

    @field_validator("reads", "gives", mode="before")
    @classmethod
    def _hook_points(cls, value: Any) -> Any:
        """Return one text as it is, several as a tuple, and a list of one as that one."""
        entries = tuple(value) if isinstance(value, list | tuple) else (value,)
        if value is not None and not (entries and all(isinstance(entry, str) for entry in entries)):
            raise ConfigError(
                f"dictionary.reads or dictionary.gives is {value!r}: expected a hook point, such as "
                "blocks.2.hook_resid_pre"
            )
        return entries[0] if len(entries) == 1 else entries


class TrainConfig(Settings):
    """How the dictionary is trained."""

    tokens: PositiveInt | None = Field(
        default=None, description="training tokens; more than are cached means several epochs; null: one epoch"
    )
    batch_size: PositiveInt = Field(default=2048, description="tokens per step")
    lr: float | None = Field(
        default=None,
        gt=0,
        description="Adam's peak learning rate; null: 2.4e-3 · √(4096 / d_sae) · min(1, √(2000 / steps))",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay rate of Adam's first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay rate of Adam's second moment")
    warmup_fraction: float = Field(
        default=0.02, ge=0, le=1, description="share of the steps, at the start, over which the learning rate rises"
    )
    decay_fraction: float = Field(
        default=0.2, ge=0, le=1, description="share of the steps, at the end, over which the learning rate falls"
    )
    l1_coefficient: float | None = Field(
        default=None,
        ge=0,
        description="weight of Σ|f| relative to ‖x − x̂‖², for relu and gated, with inputs scaled so that "
        "E‖x − E x‖² = d_in; null: adjusted during training so that dictionary.k features fire per token",
    )
    l0_coefficient: float | None = Field(
        default=None,
        ge=0,
        description="weight of L0 relative to ‖x − x̂‖², for jumprelu; null: the penalty is "
        "d_in · (L0 / dictionary.k − 1)²",
    )
    sparsity_warmup_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the steps over which the sparsity penalty is phased in: its weight rises; if relu's "
        "weight is adjusted during training, from random directions and with trained biases, the target L0 falls to k "
        "instead; null: 0.1 in that case, 0.05 otherwise",
    )
    bandwidth: float = Field(
        default=1.0,
        gt=0,
        description="width of the window around a threshold in which jumprelu estimates the threshold's gradient, with "
        "inputs scaled so that E‖x − E x‖² = d_in",
    )
    max_gradient_norm: float | None = Field(
        default=None,
        gt=0,
        description="scale down gradients whose norm over all parameters is larger; null: never",
    )
    max_activation_norm_multiple: float | None = Field(
        default=10.0,
        gt=1,
        description="leave out a token whose activation is this many times as far from the mean as usual, and "
        "count it in `left_out`; null: never",
    )
    initial_b_dec: Literal["geometric_median", "mean", "zeros"] = Field(
        default="geometric_median",
        description="initial b_dec: a statistic of the first batch, or zeros; not used with train.start_from",
    )
    start_from: str | None = Field(
        default=None,
        description="folder of a dictionary (or of a run) whose weights are the initial ones; d_in and d_sae must be "
        "the same, k and architecture may differ; null: random directions",
    )
    freeze: tuple[str, ...] = Field(
        default=(), description="parameters not to train, such as [W_dec, b_dec], by their names in the saved weights"
    )
    snapshots: tuple[PositiveInt, ...] = Field(
        default=(),
        description="numbers of training tokens after which the dictionary is saved permanently, in `snapshots/`",
    )
    aux_coefficient: float = Field(
        default=1.0,
        ge=0,
        description="weight of the losses that revive dead features: AuxK, and for relu and gated a term that raises "
        "their biases",
    )
    k_aux: PositiveInt | None = Field(
        default=None,
        description="dead features that AuxK uses per token; null: k; not for relu",
    )
    dead_after_tokens: PositiveInt | None = Field(
        default=None,
        description="tokens without firing after which a feature counts as dead, and is revived; null: 64 · d_sae / k "
        "or a thousandth of the training tokens, whichever is more, but at most a thirtieth of them (or 200,000, if "
        "that is more), and at most ten million",
    )
    center: bool = Field(
        default=False,
        description="subtract the mean activation before training (folded into the saved biases); the scale is the "
        "same either way",
    )
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="precision of the encoder's large product, for topk, batch_topk and matryoshka; weights stay "
        "float32; `auto`: bfloat16 on a GPU, and on a CPU that has bfloat16 instructions",
    )
    cuda_graph: bool = Field(
        default=True,
        description="record steps on a GPU and replay them, which saves the time of their launches; false: to debug",
    )
    shuffle_seed: int | None = Field(
        default=None, ge=0, description="seed for the order of the activations; null: `seed`"
    )
    pool_tokens: PositiveInt = Field(default=262_144, description="tokens shuffled together in memory")
    log_every: PositiveInt = Field(default=50, description="steps between lines in metrics.jsonl")
    checkpoint_every: PositiveInt | None = Field(
        default=None,
        description="steps between checkpoints, with another at the end; null: at least a minute apart, and rarely "
        "enough that writing them takes at most a twentieth of the time",
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="number of newest checkpoints to keep")

    @field_validator("freeze", "snapshots", mode="after")
    @classmethod
    def _in_order(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(sorted(set(value)))


class EvaluationConfig(Settings):
    """How much text the evaluation uses."""

    tokens: PositiveInt | None = Field(
        default=None, description="held-out tokens for reconstruction and sparsity; null: all"
    )
    downstream_tokens: int | str | None = Field(
        default=AUTO,
        description="held-out tokens for the language-model loss, in contexts spread over `tokens`; `auto`: one in 768 "
        "cached tokens, at least 1,024; null: as many as `tokens`",
    )
    baseline_tokens: int | str | None = Field(
        default=AUTO,
        description="number of those used for baselines, in whole contexts; `auto`: one in 1,152 cached tokens, from "
        "512 to 16,384; null: all",
    )
    baseline_reconstruction_tokens: int | str | None = Field(
        default=AUTO,
        description="held-out tokens for the reconstruction of baselines, every n-th of `tokens`; `auto`: one in 256 "
        "cached tokens, at least 4,096; null: all",
    )
    frozen_decoder_tokens: int | str = Field(
        default=AUTO,
        description="training tokens for the baseline with a frozen random decoder, at most one epoch; `auto`: one in "
        "96 cached tokens, from 16,384 to 200,000; 0: leave it out",
    )
    legacy_tokens: int | str = Field(
        default=AUTO,
        description="held-out tokens for SAELens's and SAEBench's formulas, for comparison only; `auto`: one in 1,536 "
        "cached tokens, from 512 to 8,192; 0: leave them out",
    )
    batch_contexts: PositiveInt = Field(default=16, description="contexts per forward pass")

    @field_validator(
        "downstream_tokens", "baseline_tokens", "baseline_reconstruction_tokens", "frozen_decoder_tokens",
        "legacy_tokens", mode="before",
    )  # fmt: skip
    @classmethod
    def _tokens(cls, value: Any, info: Any) -> Any:
        can_be_zero = info.field_name in ("frozen_decoder_tokens", "legacy_tokens")
        integral = (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
        if value == AUTO or (integral and value >= (0 if can_be_zero else 1)) or (value is None and not can_be_zero):
            return value
        other = "0 or more" if can_be_zero else "above 0, null"
        raise ConfigError(f"setting evaluation.{info.field_name}={value!r}: expected a number {other}, or auto")


MOST_EXAMPLES = 10_000
"""Maximum number of examples per feature; more would fit neither into memory nor into anyone's time."""


class FeaturesConfig(Settings):
    """Contents of the feature store."""

    tokens: PositiveInt | None = Field(default=None, description="training tokens to scan; null: all that are cached")
    top: PositiveInt = Field(
        default=16,
        description="strongest activations kept per feature: at most one per document, or one per section of about "
        "2,000 tokens (or data.section_characters) if there are fewer documents than twice this number",
    )
    quantiles: PositiveInt = Field(
        default=4, description="equal shares into which a feature's non-zero activations are divided"
    )
    per_quantile: PositiveInt = Field(default=4, description="random activations kept from each share")
    before: int = Field(default=16, ge=0, le=1000, description="tokens of context kept before the activating one")
    after: int = Field(default=8, ge=0, le=1000, description="tokens of context kept after it")
    logits: int = Field(
        default=10, ge=1, le=1000, description="tokens kept whose logits the feature raises most, and lowers most"
    )
    neighbours: int = Field(default=8, ge=1, le=1000, description="most similar features kept, by decoder direction")

    @model_validator(mode="after")
    def _fit_into_memory(self) -> FeaturesConfig:
        examples = self.top + self.quantiles * self.per_quantile
        if examples > MOST_EXAMPLES:
            raise ValueError(
                f"top + quantiles · per_quantile = {examples:,} examples per feature; at most {MOST_EXAMPLES:,}"
            )
        return self


class WandbConfig(Settings):
    """Logging to Weights & Biases, in addition to metrics.jsonl."""

    project: str | None = Field(default=None, description="project to log to; null: wandb is not used")
    name: str | None = Field(default=None, description="name of the run; null: the name of the run folder")
    mode: Literal["online", "offline"] = Field(
        default="online", description="`offline` writes locally, for `wandb sync`"
    )


class RunConfig(Settings):
    """Everything that determines a run."""

    out: str = Field(default="runs/default", description="run folder, which receives all output")
    seed: int = Field(default=0, ge=0, description="seed of initialisation and shuffling")
    device: str = Field(default="auto", description="`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    harvest: HarvestConfig = HarvestConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    features: FeaturesConfig = FeaturesConfig()
    wandb: WandbConfig = WandbConfig()
    sweep: dict[str, Any] = Field(
        default={},
        description="for `sae sweep`: lists of values for seed and for keys of dictionary and train, such as "
        "sweep.dictionary.k=[16,32]; one dictionary is trained for every combination",
    )
    sweep_at_once: PositiveInt | None = Field(
        default=None,
        description="for `sae sweep`, if memory is short: number of dictionaries trained, and evaluated, in one pass "
        "over the activations; the others follow in further passes; null: all in one",
    )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return expanded(self.out)

    @property
    def cache_folder(self) -> Path:
        """The activation cache, in the run folder unless `harvest.cache` says otherwise."""
        return expanded(self.harvest.cache) if self.harvest.cache else self.folder / "activations"

    @property
    def hook(self) -> str:
        """The hook point that the dictionary reads.

        Raises:
            ConfigError: `dictionary.reads` names several.
        """
        return _single("reads", self.dictionary.reads) or self.harvest.hooks[0]

    @property
    def gives(self) -> str:
        """The hook point that the dictionary reconstructs: the one that it reads, except for a transcoder.

        Raises:
            ConfigError: `dictionary.gives` names several.
        """
        return _single("gives", self.dictionary.gives) or self.hook

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points whose activations the dictionary is trained on, each once."""
        return tuple(dict.fromkeys((self.hook, self.gives)))

    @property
    def hook_note(self) -> str | None:
        """A note on which of several hook points is trained on, if no setting says so."""
        others = len(self.harvest.hooks) - 1
        if self.dictionary.reads is not None or not others or "reads" in (self.sweep.get("dictionary") or {}):
            return None
        return (
            f"training on {self.hook}, the first of {others + 1} hook points in harvest.hooks; set dictionary.reads "
            "for another, or sweep.dictionary.reads for several"
        )


def _single(key: str, hooks: str | tuple[str, ...] | None) -> str | None:
    if isinstance(hooks, tuple):
        raise ConfigError(
            f"dictionary.{key} names {len(hooks)} hook points, {', '.join(hooks)}: one dictionary of several (a "
            f"crosscoder) cannot be trained by this version; sweep.dictionary.{key} trains one dictionary for each"
        )
    return hooks
