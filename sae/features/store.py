"""Open a feature store and read its features, without the language model or the activations."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from sae.config.settings import MOST_EXAMPLES, FeaturesConfig
from sae.config.splits import TRAIN
from sae.errors import ConfigError, FormatError, UnknownFeatureError
from sae.features import layout
from sae.features.feature import Example, Feature, Histogram, Neighbour, TokenLogit
from sae.features.labels import find_labels, read_labels
from sae.features.search import Hit, Searched
from sae.files.damage import damaged
from sae.files.paths import resolve
from sae.files.reading import load_tensors, open_tensors, read_json, read_object, taken_apart, tensor_of, validated
from sae.files.writing import stands
from sae.model.vocabulary import CONTEXT_BEFORE, Vocabulary

SORT_COLUMNS = ("density", "max", "count", "index", "mean")


@dataclass(frozen=True)
class Summary:
    """One number per feature and column, for sorting and plotting; `density` is per eligible token."""

    index: Int[Tensor, " d_sae"]
    count: Int[Tensor, " d_sae"]
    density: Float[Tensor, " d_sae"]
    max: Float[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    dead: Bool[Tensor, " d_sae"]


class Features:
    """A feature store, opened for reading: `features[123]` is a `Feature`.

    Args:
        path: the store's folder, or the run folder that holds it as `features/`.

    Raises:
        FormatError: there is no store, it has a newer version, or it is damaged.

    Attributes:
        path: the store's folder.
        info: the content of `features.json`: hook point, model, dictionary, settings, tokens scanned.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _find_store(path)
        self.info = _read_index(self.path)
        self._columns = load_tensors(self.path / layout.COLUMNS)
        self._text = open_tensors(self.path / layout.TOKENS)
        self._runs, self._document, self._tokens = (
            tensor_of(self._text, name, self.path / layout.TOKENS) for name in ("document_start", "document", "tokens")
        )
        self._check()
        counts = self._columns["window_count"].long()
        self._window_end = counts.cumsum(0)

    def __len__(self) -> int:
        return self.info["d_sae"]

    def __iter__(self) -> Iterator[Feature]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Feature:
        """Feature `index`, starting at 0.

        Raises:
            UnknownFeatureError: (an IndexError) there is no such feature.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise UnknownFeatureError(f"feature {index}: the store has features 0 to {len(self) - 1}")
        count = int(self._columns["count"][index])
        with taken_apart(self.path / layout.COLUMNS):
            groups = self._examples(index)
            return Feature(
                index=index,
                density=count / max(1, self.info["tokens"]),
                count=count,
                dead=count == 0,
                max=float(self._columns["max"][index]),
                mean=float(self._columns["mean"][index]),
                histogram=self._histogram(index),
                top=groups[0],
                quantiles=groups[1:],
                promoted=self._tokens_and_logits("promoted", index),
                suppressed=self._tokens_and_logits("suppressed", index),
                neighbours=self._neighbours(index),
            )

    @property
    def has_logits(self) -> bool:
        """Whether the store has the logits features raise and lower: only for the residual stream, with a model."""
        return "promoted" in self._columns

    def summary(self) -> Summary:
        """Summary columns over all features."""
        count = self._columns["count"]
        density = count.double() / max(1, self.info["tokens"])
        number, columns = torch.arange(len(count), device=count.device), self._columns
        return Summary(number, count, density, columns["max"], columns["mean"], count == 0)

    def sorted_by(self, column: str, *, descending: bool | None = None, max_density: float = 1.0) -> list[int]:
        """Indices of features sorted by a column, dead ones last; ties by index.

        Args:
            column: density, max, count, index or mean.
            descending: by default, True for every column except `index`.
            max_density: features that fire on a larger share of tokens are left out.

        Raises:
            ConfigError: there is no such column.
        """
        if column not in SORT_COLUMNS:
            raise ConfigError(f"column {column!r}: features are sorted by {', '.join(SORT_COLUMNS)}")
        summary = self.summary()
        down = column != "index" if descending is None else descending
        order = getattr(summary, column).argsort(stable=True, descending=down)
        order = order[summary.density[order] <= max_density]
        return order[summary.dead[order].int().argsort(stable=True)].tolist()

    @functools.cached_property
    def documents(self) -> list[str]:
        """Names of the documents scanned."""
        path = self.path / layout.DOCUMENTS
        return validated(path, list[str], read_json(path))

    @functools.cached_property
    def labels(self) -> dict[int, str]:
        """Labels that the user gave features, from `labels.json` or `labels.csv` in the run or store folder.

        Raises:
            FormatError: the file cannot be read, or has a number that is no feature.
        """
        path = find_labels(self.path)
        return {} if path is None else read_labels(path, len(self))

    def search(self, query: str) -> list[Hit]:
        """Features by a token or a part of one, by words of their labels, or by their number; best first.

        A feature is found if it fires on a matching token in a stored example, if the token is among those that it
        promotes or suppresses most, or if its label has the query in it; each `Hit` says why. Case does not matter, and
        spaces around tokens only if the query has them.
        """
        labels, before = self.labels, self.info["settings"]["before"]
        with taken_apart(self.path / layout.COLUMNS):
            return Searched(self._columns, self._tokens, before, self.vocabulary, labels).search(query)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The texts of the tokens."""
        return Vocabulary.from_json(read_object(self.path / layout.VOCABULARY))

    def __repr__(self) -> str:
        dead = int((self._columns["count"] == 0).sum())
        return (
            f"Features({str(self.path)!r}: {len(self):,} features of {self.info['hook']}, {dead:,} dead in "
            f"{self.info['tokens']:,} tokens)"
        )

    def _examples(self, index: int) -> list[list[Example]]:
        """The strongest examples, then those of each quantile."""
        groups: list[list[Example]] = [[] for _ in range(1 + self.info["settings"]["quantiles"])]
        start, end = self._columns["example_start"][index : index + 2].tolist()
        for number, group in enumerate(self._columns["example_group"][start:end].tolist(), start):
            groups[group].append(self._example(number))
        return groups

    def _example(self, number: int) -> Example:
        settings, length = self.info["settings"], self.info["context_length"]
        row = int(self._columns["example_row"][number])
        value = float(self._columns["example_value"][number])
        context = row // length * length
        first = max(context, row - settings["before"])
        last = min(context + length, row + settings["after"] + 1, self.info["rows"])
        activations = [0.0] * (last - first)
        end = int(self._window_end[number])
        begin = end - int(self._columns["window_count"][number])
        shift = row - settings["before"] - first
        for offset, activation in zip(
            self._columns["window_offset"][begin:end].tolist(),
            self._columns["window_value"][begin:end].tolist(),
            strict=True,
        ):
            activations[offset + shift] = activation
        activations[row - first] = value
        early = max(context, first - CONTEXT_BEFORE)
        tokens = self._tokens[early:last].tolist()
        run = int(torch.searchsorted(self._runs, row, right=True)) - 1
        return Example(
            value=value,
            document=self.documents[int(self._document[run])],
            row=row,
            tokens=self.vocabulary.pieces(tokens, skip=first - early),
            activations=activations,
            position=row - first,
        )

    def _histogram(self, index: int) -> Histogram:
        counts = self._columns["histogram"][index]
        filled = counts.nonzero().flatten().tolist()
        if not filled:
            return Histogram([], [])
        first, last = filled[0], filled[-1] + 1
        return Histogram(self.info["histogram_edges"][first : last + 1], counts[first:last].tolist())

    def _tokens_and_logits(self, name: str, index: int) -> list[TokenLogit] | None:
        if not self.has_logits:
            return None
        tokens, logits = self._columns[name][index].tolist(), self._columns[f"{name}_logits"][index].tolist()
        return [TokenLogit(self.vocabulary.text(token), logit) for token, logit in zip(tokens, logits, strict=True)]

    def _neighbours(self, index: int) -> list[Neighbour]:
        near = self._columns["neighbour"][index]
        dead = (self._columns["count"][near.long()] == 0).tolist()
        cosines = self._columns["neighbour_cosine"][index].tolist()
        return [Neighbour(*entry) for entry in zip(near.tolist(), cosines, dead, strict=True)]

    def _check(self) -> None:
        """Raise DamagedError if the columns do not match `features.json`, as with files from two collections."""
        d_sae, rows = self.info["d_sae"], self.info["rows"]
        for name in layout.MEANINGS[layout.COLUMNS]:
            if name not in self._columns and not name.startswith(("promoted", "suppressed")):
                raise damaged(self.path / layout.COLUMNS, f"column {name!r} is missing")
        for name, column in self._columns.items():
            per_example = name.startswith(layout.OF_EXAMPLES)
            if column.ndim == 0 or (not per_example and len(column) != d_sae):
                raise damaged(
                    self.path / layout.COLUMNS, f"column {name!r} is {list(column.shape)} of {d_sae:,} features"
                )
        if self._tokens.shape != (rows,) or self._runs.ndim != 1 or self._runs.shape != self._document.shape:
            raise damaged(self.path / layout.TOKENS, f"tokens are {list(self._tokens.shape)}, not [{rows}]")


class _Settings(BaseModel):
    """The fields read from a collection's settings."""

    model_config = ConfigDict(extra="allow", strict=True)
    quantiles: Annotated[int, Field(ge=1, le=MOST_EXAMPLES)]
    before: NonNegativeInt
    after: NonNegativeInt


class _Index(BaseModel):
    """The fields read from `features.json`."""

    model_config = ConfigDict(extra="allow", strict=True)
    d_sae: PositiveInt
    hook: str
    rows: NonNegativeInt
    tokens: NonNegativeInt
    context_length: PositiveInt
    settings: _Settings
    histogram_edges: list[FiniteFloat]


def is_store_of(folder: Path, dictionary: str, activations: str | None, settings: FeaturesConfig) -> bool:
    """Whether the store in a folder was collected from this dictionary, these training activations and settings.

    Args:
        folder: the store's folder, with `features.json`.
        dictionary: hash of the weights.
        activations: the cache's identity at the hook point; None: the activations have been deleted, and only the
            dictionary has to match.
        settings: settings of the collection.

    Raises:
        DamagedError: `features.json` cannot be read.
    """
    record = read_object(folder / layout.INDEX)
    same_weights = record.get("dictionary_sha256") == dictionary
    return (
        same_weights
        and record.get("split", TRAIN) == TRAIN
        and (
            activations is None
            or (record.get("activations") == activations and record.get("settings") == settings.model_dump())
        )
    )


def store_of(folder: Path, dictionary: str) -> Features | None:
    """The store in a folder; None if there is none, or if it was collected from another dictionary.

    Args:
        folder: the store's folder.
        dictionary: hash of the weights.

    Raises:
        FormatError: it is damaged, or has a newer version.
    """
    if not stands(folder / layout.INDEX):
        return None
    store = Features(folder)
    return store if store.info.get("dictionary_sha256") == dictionary else None


def _find_store(path: str | Path) -> Path:
    folder = resolve(path, "features", layout.INDEX)
    if folder is None:
        raise FormatError(f"features {str(path)!r}: no {layout.INDEX} there; make them with 'sae run CONFIG out=...'")
    return folder


def _read_index(folder: Path) -> dict[str, Any]:
    info = layout.STORE.read(folder, f"features {str(folder)!r}")
    validated(folder / layout.INDEX, _Index, info)
    return info
