"""Settings of a run's inputs: the language model, its text, and the activations to cache."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sae.config.base import Settings
from sae.config.mixture import check_mixture, source_labels, token_shares
from sae.errors import ConfigError

StorageDtype = Literal["float32", "float16", "bfloat16", "int8"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]
LIVE_SAMPLE_TOKENS = 500_000
BALANCES = {"auto": True, "balanced": True, "balanced_low_0": True, "sequential": False}
"""Ways to spread a model over devices, and whether each device gets about as much."""


class ModelConfig(Settings):
    """The language model that the activations come from."""

    name: str = Field(
        default="demo",
        description="`demo` (built in), a local folder, a .gguf file, or a name on the Hugging Face hub such as `gpt2`",
    )
    revision: str | None = Field(default=None, description="git revision of a hub model; null: the newest")
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that comes with the model or its tokenizer; takes effect only on the command "
        "line, in the file named there, or in Python: the config.yaml of a run folder only records it",
    )
    dtype: ComputeDtype = Field(default="float32", description="data type in which the model computes")
    device: str | None = Field(
        default=None, description="device of the model, such as `cuda:1`, if it needs one of its own; null: `device`"
    )
    device_map: str | dict[str, str | int] | None = Field(
        default=None,
        description="spreads a model over several devices: `auto`, `balanced`, `balanced_low_0`, `sequential`, or a "
        "device for each module, such as {transformer: 0, lm_head: 1}; null: all of it is on one",
    )
    weight_processing: Literal["none", "fold_ln", "center_and_fold"] = Field(
        default="none",
        description="`none`: weights as published; `fold_ln`: layer-norm gains folded into the next weights; "
        "`center_and_fold`: also centre the unembedding and the weights that write to the residual stream, the default "
        "of transformer-lens before 4",
    )

    @model_validator(mode="after")
    def _placed(self) -> ModelConfig:
        if self.device_map is None:
            return self
        if self.device is not None:
            raise ConfigError("model.device and model.device_map both say where the model is: take one out")
        if isinstance(self.device_map, str) and self.device_map not in BALANCES:
            raise ConfigError(
                f"model.device_map={self.device_map!r}: expected {', '.join(BALANCES)}, or a map of modules"
            )
        if isinstance(self.device_map, dict) and {"disk", "meta"} & set(map(str, self.device_map.values())):
            raise ConfigError("model.device_map: modules have to be on devices that compute, not on disk or meta")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a map of devices has no hash of its own


class DataConfig(Settings):
    """The text to read, and how it is cut into contexts."""

    source: str | tuple[str, ...] = Field(
        default="stdlib",
        description="`stdlib` (Python's standard library), a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file "
        "(all but the last also as .gz, .bz2, .xz or .zst), a folder of them, a folder saved by `datasets`, or a hub "
        "data set; or a list of these to mix, such as [stdlib, path/to/books]: subset, split, column and streaming "
        "then apply to each of them",
    )
    weights: tuple[float, ...] | None = Field(
        default=None,
        description="for a list of sources: a positive number for each, its relative share of the tokens (of both "
        "splits); the sum may be anything; null: equal shares",
    )
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    revision: str | None = Field(
        default=None,
        description="git revision of a hub data set, such as a commit; null: the newest; for a single source only",
    )
    split: str = Field(default="train", description="split of a hub or saved data set")
    column: str = Field(
        default="text",
        description="field to read, in all but .txt and .md files: it holds text, a list of token ids, or a chat (a "
        "list of messages with role and content, rendered with the model's chat template)",
    )
    chat_roles: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="roles whose messages count in chats, such as [assistant]: the rest is context, left out of "
        "training, statistics and evaluation; null: all text of a chat counts",
    )
    tokenizer: str | None = Field(
        default=None,
        description="for a column of token ids: the name of the tokenizer that the data set records, if it is the "
        "model's own under another name",
    )
    streaming: bool = Field(default=True, description="read a hub data set while it downloads")
    section_characters: PositiveInt | None = Field(
        default=None,
        description="cut longer documents at line ends into sections of about this many characters, which are shuffled "
        "individually; null: documents stay whole, or have sections of 10,000 characters if holdout_by needs them",
    )
    holdout_by: Literal["document", "section"] | None = Field(
        default=None,
        description="unit of the held-out split and of standard errors: whole documents, or single sections of them; "
        "null: documents, or sections if a source is one document",
    )
    shuffle_documents: PositiveInt | None = Field(
        default=None,
        description="draw documents (or sections) at random from a buffer of this many, with a buffer for each source; "
        "null: keep the order of the source",
    )
    tokens: PositiveInt = Field(default=1_000_000, description="exact number of training tokens to cache")
    held_out_tokens: PositiveInt = Field(default=100_000, description="exact number of evaluation tokens to cache")
    holdout_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of the documents held out for evaluation, by a hash of their names"
    )
    holdout_seed: int = Field(default=0, description="seed of that hash; independent of `seed`")
    context_length: int = Field(default=128, ge=2, description="tokens the model sees at once, including the BOS token")
    prepend_bos: bool = Field(default=True, description="begin every context with the tokenizer's BOS token")

    @field_validator("source", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """Return one text as it is, several as a tuple, and a list of one as that one."""
        entries = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(entry, str) for entry in entries):
            raise ConfigError(
                f"setting data.source={value!r}: expected text, or a list of texts; put dates, numbers and the like in "
                "quotes"
            )
        return entries[0] if len(entries) == 1 else entries

    @model_validator(mode="after")
    def _mixes(self) -> DataConfig:
        check_mixture(self.sources, self.weights)
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources, as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def labels(self) -> tuple[str, ...]:
        """The prefix of each source's document names if there are several sources."""
        return source_labels(self.sources)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each source's share of the tokens; they sum to 1."""
        return token_shares(self.weights or [1.0] * len(self.sources))


class HarvestConfig(Settings):
    """The activations to cache, and their form."""

    hooks: tuple[str, ...] = Field(
        default=("blocks.2.hook_resid_pre",),
        min_length=1,
        description="hook points to cache, by the names that `sae hooks MODEL` lists; a single one needs no list, and "
        "a pattern such as blocks.*.hook_mlp_out stands for all that match it",
    )
    dtype: StorageDtype = Field(default="float16", description="data type on disk; `int8` keeps one scale per token")
    live: bool = Field(
        default=False,
        description="compute training activations while training, and store only the tokens: no disk space for them, "
        "but every training runs the model; those of the held-out tokens and of a sample are stored",
    )
    sample_tokens: PositiveInt | None = Field(
        default=None,
        description="with `live`: training tokens, spread over the text in whole shards, whose activations are stored, "
        "for statistics, baselines and features; null: 500,000",
    )
    batch_contexts: PositiveInt = Field(default=32, description="contexts per forward pass")
    shard_contexts: PositiveInt = Field(
        default=1024, description="contexts per shard file; a killed run loses at most one shard"
    )
    masked_positions: int = Field(
        default=1,
        ge=0,
        description="number of positions at the start of every context to keep out of training, statistics and "
        "evaluation: in many models their norms are a hundred times the rest",
    )
    mask_special_tokens: bool = Field(
        default=True,
        description="keep BOS, EOS, padding and other special tokens out of training, statistics and evaluation",
    )
    cache: str | None = Field(
        default=None, description="folder of the activation cache; null: `activations` in the run folder"
    )

    @model_validator(mode="after")
    def _sampled(self) -> HarvestConfig:
        if self.sample_tokens is not None and not self.live:
            raise ConfigError("harvest.sample_tokens has no effect without harvest.live=true: take it out")
        return self

    @property
    def stored_training_tokens(self) -> int:
        """Training tokens whose activations a live harvest stores, before rounding up to whole shards."""
        return self.sample_tokens or LIVE_SAMPLE_TOKENS
