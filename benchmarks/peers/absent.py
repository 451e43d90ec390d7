"""Stands in for packages that a toolkit imports but that no training step calls, if they are not installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

LEFT_OUT = {
    "sae": ("wandb",),
    "saelens": ("wandb", "datasets", "zstandard", "plotly", "plotly_express", "nltk", "babe", "dotenv", "tenacity"),
    "sparsify": ("datasets", "zstandard"),
    "dictionary_learning": ("nnsight",),
    "llamascopium": ("wandb", "datasets", "zstandard", "dotenv", "pymongo", "bson", "gridfs", "openai", "tomlkit",
                     "json_repair"),
}  # fmt: skip
"""By toolkit: packages for data sets, logging, figures and databases, some of them large, which are not carried."""


class _Absent(types.ModuleType):
    """A module whose every name is an empty class, which is enough for annotations and `isinstance`."""

    __path__ = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        known = fullname.partition(".")[0] in self.names
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute."""


def stand_in_for(toolkit: str) -> None:
    """From now on, an import of a left-out package that is not installed gives an empty one."""
    sys.meta_path.append(_Finder(LEFT_OUT.get(toolkit, ())))
