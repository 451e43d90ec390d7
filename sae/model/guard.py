"""Keeps libraries that load a model from running its code, reading pickles or writing to the terminal."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

import torch

from sae.config.sources import ModelConfig

# Functions that fetch or run a model's code even if it is not trusted: transformer-lens imports the modules of some
# architectures by the name in config.json.
_RUNS_CODE = (
    ("transformers.dynamic_module_utils", "get_cached_module_file"),
    ("transformers.dynamic_module_utils", "get_class_in_module"),
    ("transformers.integrations.hub_kernels", "get_kernel"),
)
NEEDS_CODE = (
    "it needs Python code that comes with it, which was not run; if you have read and trust that code, add "
    "model.trust_remote_code=true (in Python ModelConfig(trust_remote_code=True))"
)


class CodeRefusedError(Exception):
    """A library was about to fetch or run a model's code."""


class PickleRefusedError(Exception):
    """A library was about to read a pickle."""


@contextlib.contextmanager
def guarded(config: ModelConfig) -> Iterator[None]:
    """While open, no pickle is read, and no code of a model is fetched or run unless `config` allows that."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch, "load", functools.partial(_refuse, PickleRefusedError)))
        for module, name in () if config.trust_remote_code else _RUNS_CODE:
            stack.enter_context(replaced(import_module(module), name, functools.partial(_refuse, CodeRefusedError)))
        yield


def _refuse(error: type[Exception], *_: Any, **__: Any) -> NoReturn:
    raise error


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    previous = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, previous)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, keep the libraries' warnings and progress bars off the terminal; restore them at the end."""
    import logging
    import warnings

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # also enables those of the hub
        restore_hub_bars = enable_progress_bars if hub_bars else disable_progress_bars
        restore_hub_bars()
