"""Settings of what a run reads: the language model, its text, and the activations that are cached."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from sae.config.base import Settings
from sae.config.mixture import check_mixture, source_labels, token_shares
from sae.errors import ConfigError

StorageDtype = Literal["float32", "float16", "bfloat16", "int8"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Settings):
    """Which language model the activations come from."""

    name: str = Field(
        default="demo",
        description="`demo` (embedded), a local folder, a .gguf file, or a name on the Hugging Face hub such as `gpt2`",
    )
    revision: str | None = Field(default=None, description="git revision of a hub model; null: the newest")
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that comes with the model or its tokenizer; counts only on the command line, in "
        "the file named there, or in Python: the config.yaml of a run folder only records it",
    )
    dtype: ComputeDtype = Field(default="float32", description="number type the model computes in")
    weight_processing: Literal["none", "fold_ln", "center_and_fold"] = Field(
        default="none",
        description="`none`: weights as published; `fold_ln`: layer norms' gains folded into the next weights; "
        "`center_and_fold`: also centred writing weights and unembedding, the default of transformer-lens before 4",
    )


class DataConfig(Settings):
    """Which text is read, and how it is cut into contexts."""

    source: str | tuple[str, ...] = Field(
        default="stdlib",
        description="`stdlib` (Python's standard library), a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file "
        "(all but the last also as .gz, .bz2, .xz or .zst), a folder of them, a folder saved by `datasets`, or a hub "
        "data set; or a list of these, such as [stdlib, path/to/books]: they are mixed, and subset, split, column "
        "and streaming hold for each of them",
    )
    weights: tuple[float, ...] | None = Field(
        default=None,
        description="for a list of sources: a positive number for each, their shares of the tokens (of both splits), "
        "whatever they sum to; null: equal shares",
    )
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    revision: str | None = Field(
        default=None,
        description="git revision of a hub data set, such as a commit; null: the newest. For one hub data set only",
    )
    split: str = Field(default="train", description="split of a hub or saved data set")
    column: str = Field(
        default="text",
        description="field that holds the text, in all but .txt and .md: text, a list of token ids, or a chat (a list "
        "of messages with role and content, written out by the model's chat template)",
    )
    chat_roles: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="of chats, the roles whose messages count, such as [assistant]: the rest is context and left out "
        "of training, statistics and evaluation; null: all text of a chat counts",
    )
    tokenizer: str | None = Field(
        default=None,
        description="for a column of token ids whose data set records a tokenizer: that name, if it is the model's own "
        "tokenizer under another name",
    )
    streaming: bool = Field(default=True, description="read a hub data set while it downloads")
    section_characters: PositiveInt | None = Field(
        default=None,
        description="cut longer documents at line ends into sections of about that many characters, which are shuffled "
        "one by one; null: documents stay whole, and sections of 10,000 characters where holdout_by needs some",
    )
    holdout_by: Literal["document", "section"] | None = Field(
        default=None,
        description="what is held out, and counts as one in standard errors: whole documents, or single sections of "
        "them; null: documents, or sections if a source is one document",
    )
    shuffle_documents: PositiveInt | None = Field(
        default=None,
        description="draw documents (or sections) at random from a buffer of so many, a buffer for each source; null: "
        "in the order of the source",
    )
    tokens: PositiveInt = Field(default=1_000_000, description="training tokens to cache, exactly")
    held_out_tokens: PositiveInt = Field(default=100_000, description="evaluation tokens to cache, exactly")
    holdout_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of the documents set aside for evaluation, by a hash of their names"
    )
    holdout_seed: int = Field(default=0, description="seed of that hash; independent of `seed`")
    context_length: int = Field(default=128, ge=2, description="tokens the model sees at once, the BOS token included")
    prepend_bos: bool = Field(default=True, description="begin every context with the tokenizer's BOS token")

    @field_validator("source", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """Text, or several in a tuple; a list of one is that one."""
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
        """All sources, be it one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def labels(self) -> tuple[str, ...]:
        """What the documents' names of each source begin with, where there are several."""
        return source_labels(self.sources)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each source's share of the tokens; they sum to 1."""
        return token_shares(self.weights or [1.0] * len(self.sources))


class HarvestConfig(Settings):
    """What is cached, and in which form."""

    hooks: tuple[str, ...] = Field(
        default=("blocks.2.hook_resid_pre",),
        min_length=1,
        description="hook points to cache, by the names that `sae hooks MODEL` lists; one needs no list",
    )
    dtype: StorageDtype = Field(default="float16", description="number type on disk; `int8` keeps one scale per token")
    batch_contexts: PositiveInt = Field(default=32, description="contexts per forward pass")
    shard_contexts: PositiveInt = Field(
        default=1024, description="contexts per shard file; a kill loses at most one shard"
    )
    masked_positions: int = Field(
        default=1,
        ge=0,
        description="keep so many positions at the start of every context out of training, statistics and evaluation: "
        "many models put norms a hundred times the rest there",
    )
    mask_special_tokens: bool = Field(
        default=True,
        description="keep BOS, EOS, padding and other special tokens out of training, statistics and evaluation",
    )
    cache: str | None = Field(
        default=None, description="folder of the activation cache; null: `activations` in the run folder"
    )
