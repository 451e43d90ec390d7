"""Sites: the hook points that a dictionary reads or gives, in order, each with its model and its width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import hook_points
from sae.errors import ConfigError


@dataclass(frozen=True)
class Site:
    """A hook point of a model.

    Attributes:
        hook: its name; None if it is unknown.
        width: numbers per token; None if it is unknown. Sites that differ only in it are equal.
        model: which of several models it belongs to; empty if there is only one.
    """

    hook: str | None
    width: int | None = field(default=None, compare=False)
    model: str = ""

    def to_json(self) -> dict[str, Any]:
        """Its JSON, without what is unknown or empty."""
        facts = {"hook": self.hook, "width": self.width, "model": self.model or None}
        return {key: value for key, value in facts.items() if value is not None}


@dataclass(frozen=True)
class Sites:
    """Sites in order. A row of activations consists of those of every site, one after the other.

    An SAE reads one site and gives the same one. A transcoder reads one and gives another, a crosscoder reads and gives
    several.
    """

    sites: tuple[Site, ...]

    @staticmethod
    def one(hook: str | None, width: int | None = None, model: str = "") -> Sites:
        """A single site."""
        return Sites((Site(hook, width, model),))

    @staticmethod
    def from_json(record: Any) -> Sites:
        """The inverse of `to_json`.

        Raises:
            ValueError: there is no site, or an entry is of another type.
        """
        if not isinstance(record, list) or not all(isinstance(site, dict) for site in record):
            raise ValueError(f"{record!r}: expected a list such as [{{'hook': 'blocks.0.hook_resid_pre'}}]")
        for site in record:
            width, kinds = site.get("width"), (str | None, int | None, str)
            facts = (site.get("hook"), width, site.get("model", ""))
            if isinstance(width, bool) or not all(map(isinstance, facts, kinds)):
                raise ValueError(f"{site!r} is not a hook point with a width")
        sites = tuple(Site(site.get("hook"), site.get("width"), site.get("model", "")) for site in record)
        if not sites:
            raise ValueError("there is no hook point")
        return Sites(sites)

    def to_json(self) -> list[dict[str, Any]]:
        """A list with the JSON of each site."""
        return [site.to_json() for site in self.sites]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def width(self) -> int | None:
        """Numbers per row: the sum of all widths; None if one is unknown."""
        widths = [site.width for site in self.sites if site.width is not None]
        return sum(widths) if len(widths) == len(self.sites) else None

    @property
    def hooks(self) -> tuple[str | None, ...]:
        """The hook point of each site."""
        return tuple(site.hook for site in self.sites)

    @property
    def hook(self) -> str | None:
        """The hook point, if there is only one site.

        Raises:
            ConfigError: there are several.
        """
        first, *others = self.sites
        if others:
            raise ConfigError(f"hook points {self}: only dictionaries of a single hook point can be used here")
        return first.hook

    def of_width(self, width: int | None) -> Sites:
        """The same sites; if there is only one, of this width."""
        if width is None or len(self.sites) > 1:
            return self
        return Sites(tuple(replace(site, width=width) for site in self.sites))

    def split(self, rows: Float[Tensor, "*batch width"]) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The part of each site in rows of activations.

        Raises:
            ConfigError: the width of a site is unknown.
        """
        widths = [site.width for site in self.sites if site.width is not None]
        if len(widths) < len(self.sites):
            raise ConfigError(f"hook points {self}: their widths are unknown, so rows cannot be divided among them")
        return rows.split(widths, dim=-1)

    def __str__(self) -> str:
        return ", ".join(f"{site.model}:{site.hook}" if site.model else repr(site.hook) for site in self.sites)


def site_norms(
    rows: Float[Tensor, "*batch width"], widths: Sequence[int]
) -> Float[Tensor, "*batch sites"]:  # fmt: skip
    """The norm of the part of each site in rows whose sites have these widths."""
    return torch.stack([part.norm(dim=-1) for part in rows.split(list(widths), dim=-1)], dim=-1)


def geometric_mean(scale: Float[Tensor, " width"]) -> float:
    """The geometric mean of positive numbers: that of 1 / scale is its inverse."""
    return math.exp(float(scale.double().log().mean()))


def check_order(reads: Sites, gives: Sites) -> None:
    """Check that a model computes what a dictionary reads before what it gives.

    Raises:
        ConfigError: a given site comes before one that is read, or the dictionary does not say what it reads.
    """
    if reads == gives:
        return
    for given in gives:
        for read in reads:
            if read.hook is None:
                raise ConfigError(
                    f"target hook {given.hook!r}: the transcoder does not say which hook point it reads: give "
                    "hook='blocks.N.…'"
                )
            if given.hook is None or given.model != read.model:
                continue
            if _place(given.hook) < _place(read.hook):
                raise ConfigError(
                    f"target hook {given.hook!r} comes before {read.hook!r}, which the transcoder reads: a later "
                    "activation cannot give an earlier one; swap them"
                )


def _place(hook: str) -> tuple[int, int]:
    """Block and position in it; they order hook points as the model computes them.

    Raises:
        ConfigError: not a hook point.
    """
    place = hook_points.place_in_model(hook)
    if place is None:
        raise ConfigError(hook_points.no_hook_point(hook))
    return place
