"""Attributions to features as a result: a number per feature and position, how they add up, to JSON and back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae.files.formats import Format
from sae.files.hashes import UnhashedWarning
from sae.files.kept import KeptResult
from sae.files.paths import expanded
from sae.files.reading import taken_apart
from sae.files.writing import json_content, write_bytes

FORMAT = Format("sae-attribution", 1)
INTEGRATED_GRADIENTS, GRADIENT_ACTIVATION = "integrated_gradients", "gradient_activation"
METHODS = (GRADIENT_ACTIVATION, INTEGRATED_GRADIENTS)
ERROR = -1
"""Stands for the error term among the features."""
_COLUMNS = {
    "dictionary": np.int64, "context": np.int64, "position": np.int64, "feature": np.int64,
    "activation": np.float64, "attribution": np.float64,
}  # fmt: skip


class Contribution(NamedTuple):
    """What one feature contributes at one position.

    Attributes:
        hook: hook point at which its dictionary is spliced in.
        context: number of the context.
        position: number of the token, BOS included.
        token: the token's text.
        feature: its index; None for the error term.
        activation: its activation there; for the error term, its length.
        attribution: its share of the function.
    """

    hook: str
    context: int
    position: int
    token: str
    feature: int | None
    activation: float
    attribution: float


class FeatureTotal(NamedTuple):
    """What one feature contributes at all positions together.

    Attributes:
        hook: hook point at which its dictionary is spliced in.
        feature: its index; None for the error term.
        positions: number of positions at which it fires.
        attribution: the sum of its attributions.
    """

    hook: str
    feature: int | None
    positions: int
    attribution: float


@dataclass(frozen=True)
class AttributedDictionary:
    """A dictionary that was attributed to, and how its attributions add up.

    Attributes:
        reads: hook point that it reads.
        gives: hook point at which it is spliced in; another one for a transcoder.
        d_sae: number of its features.
        weights_sha256: hash of its weights.
        value: the function on the model's own activations, one number per context, or one for all of them.
        baseline: the function at the other end of the path: all features at 0, and the error too if it was attributed.
        total: the sum of the attributions.
    """

    reads: str
    gives: str
    d_sae: int
    weights_sha256: str
    value: tuple[float, ...]
    baseline: tuple[float, ...]
    total: tuple[float, ...]

    @property
    def change(self) -> tuple[float, ...]:
        """value − baseline, which integrated gradients add up to."""
        return tuple(value - baseline for value, baseline in zip(self.value, self.baseline, strict=True))

    @property
    def gap(self) -> float:
        """The completeness gap: total − change, where it is largest in size."""
        return max((total - change for total, change in zip(self.total, self.change, strict=True)), key=abs)

    @property
    def relative_gap(self) -> float | None:
        """Σ|total − change| / Σ|change|; None if nothing changes."""
        gaps = sum(abs(total - change) for total, change in zip(self.total, self.change, strict=True))
        size = sum(map(abs, self.change))
        return gaps / size if size else None


@dataclass(frozen=True)
class Attribution:
    """Attributions of a function of the logits, one entry for each feature that fires at each position.

    `position`, `feature`, `activation` and `attribution` are columns of one length, in the order of dictionaries,
    contexts, positions and features. Each dictionary is attributed to on its own, in the model as it is otherwise: what
    a feature does through later layers is part of its attribution. Attributions to different dictionaries therefore do
    not add up to one number.

    Attributes:
        of: name of the function.
        method: one of `METHODS`.
        steps: number of gradients along each path.
        error_term: whether errors were attributed.
        model: identity of the language model.
        tokens: ids of the text.
        texts: text of each token.
        dictionaries: the dictionaries, and how attributions to each add up.
        dictionary: index into `dictionaries`.
        context: number of the context.
        position: number of the token, BOS included.
        feature: index of the feature; `ERROR` (−1) for the error term.
        activation: the feature's activation; for the error term, its length.
        attribution: the share of the function, in its unit.
        groups: number of groups of entries of a dictionary, each on a path of its own.
    """

    of: str
    method: str
    steps: int
    error_term: bool
    model: Mapping[str, Any]
    tokens: Int[np.ndarray, "context seq"]
    texts: tuple[tuple[str, ...], ...]
    dictionaries: tuple[AttributedDictionary, ...]
    dictionary: Int[np.ndarray, " n"]
    context: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    feature: Int[np.ndarray, " n"]
    activation: Float[np.ndarray, " n"]
    attribution: Float[np.ndarray, " n"]
    groups: int = 1

    def __len__(self) -> int:
        return len(self.attribution)

    @property
    def value(self) -> tuple[float, ...]:
        """The function on the model's own activations: one number per context, or one for all of them."""
        return self.dictionaries[0].value

    def top(self, n: int | None = None) -> list[Contribution]:
        """The n entries with the largest attributions in size, largest first; None: all."""
        order = np.argsort(-abs(self.attribution), kind="stable")[:n]
        return [self._contribution(int(entry)) for entry in order]

    def by_feature(self, n: int | None = None) -> list[FeatureTotal]:
        """Sums over positions and contexts, the n largest in size first; None: all."""
        keys = np.stack([self.dictionary, self.feature])
        unique, entry, positions = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
        sums = np.bincount(entry.reshape(-1), weights=self.attribution, minlength=unique.shape[1])
        order = np.argsort(-abs(sums), kind="stable")[:n]
        return [
            FeatureTotal(
                self.dictionaries[unique[0, number]].gives, _index(int(unique[1, number])), int(positions[number]),
                float(sums[number]),
            )
            for number in order
        ]  # fmt: skip

    def of_dictionary(self, number: int) -> Attribution:
        """The entries of one dictionary, as an attribution of its own.

        Args:
            number: index into `dictionaries`.
        """
        columns = {name: getattr(self, name)[self.dictionary == number] for name in _COLUMNS}
        columns["dictionary"] = np.zeros_like(columns["dictionary"])
        return dataclasses.replace(self, dictionaries=(self.dictionaries[number],), **columns)

    def _contribution(self, entry: int) -> Contribution:
        context, position = int(self.context[entry]), int(self.position[entry])
        return Contribution(
            self.dictionaries[self.dictionary[entry]].gives, context, position, self.texts[context][position],
            _index(int(self.feature[entry])), float(self.activation[entry]), float(self.attribution[entry]),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """JSON values: columns as lists, and of each dictionary the gap beside what it is computed from."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record |= {name: record[name].tolist() for name in ("tokens", *_COLUMNS)}
        record["dictionaries"] = [
            {**dataclasses.asdict(part), "gap": part.gap, "relative_gap": part.relative_gap}
            for part in self.dictionaries
        ]
        return {**record, "model": dict(self.model), "texts": [list(row) for row in self.texts]}

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, and return the file's path.

        Raises:
            CacheError: the file cannot be written.
        """
        path = expanded(path)
        content = KeptResult(FORMAT, path.name).headed(self.to_json())
        write_bytes(path, json_content(content), hashed=False)  # the path can be anywhere
        return path

    @staticmethod
    def load(path: str | Path) -> Attribution:
        """Read a file that `save` wrote.

        Raises:
            FormatError: it is not such a file, is damaged or has a newer version.
        """
        path = expanded(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnhashedWarning)  # `save` records no hash
            record = KeptResult(FORMAT, path.name).read(path.parent, f"attribution {str(path)!r}")
        with taken_apart(path):
            names = [field.name for field in dataclasses.fields(Attribution)]
            values = {name: record[name] for name in names if name != "groups" or name in record}
            values |= {name: np.array(values[name], dtype=kind) for name, kind in _COLUMNS.items()}
            values["tokens"] = np.array(values["tokens"], dtype=np.int64)
            values["texts"] = tuple(map(tuple, values["texts"]))
            values["dictionaries"] = tuple(map(_read_dictionary, values["dictionaries"]))
            return Attribution(**values)


def _read_dictionary(record: Mapping[str, Any]) -> AttributedDictionary:
    values: dict[str, Any] = {field.name: record[field.name] for field in dataclasses.fields(AttributedDictionary)}
    values |= {name: tuple(map(float, values[name])) for name in ("value", "baseline", "total")}
    return AttributedDictionary(**values)


def _index(feature: int) -> int | None:
    return None if feature == ERROR else feature
