"""Several sources as one: rows of the same tokens, one after the other, for crosscoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.origin import Origin
from sae.dictionary.sites import Site, Sites
from sae.errors import ConfigError
from sae.numerics.statistics import Statistics
from sae.training.source import BatchSource, KnownSource, OrderedSource


class JoinedSource:
    """What a crosscoder reads: a row is that of each part in turn, so that d_in is the sum of their widths.

    Parts yield rows of the same tokens in the same order; that they do is checked as far as they know their order. In
    training, each part is read once a step, also if other dictionaries of the pass read it too.

    Args:
        parts: a source for each site, in the order of the sites; the same source may stand for several of them.

    Raises:
        ConfigError: there is none, one is not a source of a single site, or they differ in batch size, text or order.
    """

    def __init__(self, parts: Sequence[BatchSource]) -> None:
        if not parts:
            raise ConfigError("a joined source needs at least one source")
        for part in parts:
            if isinstance(part, JoinedSource) or not hasattr(part, "load_state_dict"):
                raise ConfigError(
                    f"a {type(part).__name__} cannot be part of a joined source: give an ActivationLoader, or "
                    "sae.IterableSource(batches) with a list of tensors [batch, d_in], for each site"
                )
        self.parts = tuple(parts)
        _check_same_tokens(self.parts)
        self.site_widths = tuple(part.d_in for part in parts)
        self.d_in, self.batch_size = sum(self.site_widths), parts[0].batch_size

    @property
    def statistics(self) -> Statistics:
        """Those of the joined rows: means one after the other, and sums of squares."""
        each = [part.statistics for part in self.parts]
        return Statistics(
            min(statistics.tokens for statistics in each),
            torch.cat([statistics.mean.double() for statistics in each]),
            sum(statistics.mean_squared_norm for statistics in each),
            sum(statistics.variance for statistics in each),
        )

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens in one pass of the shortest part; None if there is no end."""
        return min((n for part in self.parts if (n := part.tokens_per_epoch) is not None), default=None)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of a crosscoder: the origins of all parts, or, if one is unknown, the widths of its sites alone."""
        if not all(isinstance(part, KnownSource) for part in self.parts):
            sites = Sites(tuple(Site(None, width) for width in self.site_widths))
            return Origin(sites, sites).to_json()
        known = [dict(part.metadata) for part in self.parts if isinstance(part, KnownSource)]
        return {**known[0], **Origin.joined([Origin.of(each) for each in known]).to_json()}

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        sources = unique(self.parts)
        places = [next(i for i, source in enumerate(sources) if source is part) for part in self.parts]
        for batches in zip(*sources, strict=False):
            yield torch.cat([batches[place] for place in places], dim=1)

    def state_dict(self) -> dict[str, Any]:
        """The places of all parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, place in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(place)

    def restart(self) -> None:
        for part in self.parts:
            part.restart()


def unique(sources: Sequence[BatchSource]) -> list[BatchSource]:
    """The sources in their order, each object once."""
    return list({id(source): source for source in sources}.values())


def single_sources(sources: Mapping[str, BatchSource]) -> dict[str, BatchSource]:
    """What is read for these sources: those of a single site, and the parts of joined ones, each object once.

    Parts that are not among the sources are named after the joined source and their number in it.
    """
    singles = {name: source for name, source in sources.items() if not isinstance(source, JoinedSource)}
    for name, source in sources.items():
        if isinstance(source, JoinedSource):
            for number, part in enumerate(source.parts):
                if not any(part is single for single in singles.values()):
                    singles[f"{name}[{number}]"] = part
    return singles


def site_widths_of(source: BatchSource) -> tuple[int, ...]:
    """Widths of the sites of a joined source; empty for a source of a single site."""
    return source.site_widths if isinstance(source, JoinedSource) else ()


def sites_of(source: BatchSource) -> tuple[BatchSource, ...]:
    """A source for each site: the parts of a joined source, otherwise the source itself."""
    return source.parts if isinstance(source, JoinedSource) else (source,)


def _check_same_tokens(parts: Sequence[BatchSource]) -> None:
    sizes = {part.batch_size for part in parts}
    if len(sizes) > 1:
        raise ConfigError(f"the parts have batches of {sorted(sizes)} rows: make them equal")
    ordered = [part for part in parts if isinstance(part, OrderedSource)]
    for part in ordered[1:]:
        (text, cache), (other_text, other_cache) = ordered[0].token_text, part.token_text
        if text != other_text:
            raise ConfigError(
                f"caches {cache!r} and {other_cache!r} have other text, so a crosscoder cannot read them together: "
                "harvest all hook points with the same data settings, preferably in one cache"
            )
        if part.token_order != ordered[0].token_order:
            raise ConfigError(
                "the parts give tokens in different orders: load them with the same split, seed, pool_tokens and "
                "block_tokens, from caches of the same text"
            )
