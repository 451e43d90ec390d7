"""The command line: its commands, and how it exits after errors and interruptions."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import sys
import traceback
import warnings
from typing import NoReturn

import click

import sae.cli
from sae.cli.arguments import Options
from sae.console.terminal import close, complain, complain_at_length, prepare, show_warning, unwritable
from sae.errors import SaeError, TrainingInterrupted
from sae.files import version

_INTERRUPTED = "interrupted; run the same command again to continue"
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Turns off the messages and progress bars of libraries; this process shows its own."""
_NO_MEMORY = "can't allocate memory"
"""PyTorch's message on a CPU, in a RuntimeError."""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.version_option(version.__version__, prog_name="sae")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the stack trace if an error occurs.")
@click.option("--quiet", is_flag=True, help="Hide progress bars and notes on hook point, amounts and cost.")
@click.pass_context
def cli(context: click.Context, quiet: bool) -> None:
    """Sparse autoencoders on language-model activations: cache, train, evaluate, inspect features, reuse."""
    context.obj = Options(quiet)


for module in pkgutil.iter_modules(sae.cli.__path__):
    if module.name not in ("main", "arguments"):  # every other file is a command
        cli.add_command(getattr(importlib.import_module(f"sae.cli.{module.name}"), module.name))


def main() -> None:
    """Run the command line. An error becomes one line and exit status 1; Ctrl-C gives status 130."""
    prepare()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        _main()


def _main() -> None:
    try:
        cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt, TrainingInterrupted) as stopped:
        _fail(str(stopped) or _INTERRUPTED, 130)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        complain_at_length(usage.getvalue())
        sys.exit(error.exit_code)
    except BrokenPipeError:
        close()
    except Exception as error:
        text = str(error) if isinstance(error, SaeError) else _unforeseen(error)
        if isinstance(error, OSError) and (reason := unwritable()):
            close()
            text = f"standard output cannot be written ({reason}); redirect it elsewhere"
        if "--debug" in sys.argv:
            complain_at_length(traceback.format_exc())
            sys.exit(1)
        _fail(f"Error: {text}", 1)


def _unforeseen(error: Exception) -> str:
    """One line about an error that this package did not raise."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in text:
        reason = f" ({text[:200]})" if text else ""
        return (
            f"not enough memory{reason}; close other programs, raise the memory limit (ulimit -v, a container's), "
            "lower harvest.batch_contexts, train.batch_size or evaluation.batch_contexts, or use a smaller model; the "
            "same command resumes where it stopped ('sae --debug ...' shows more)"
        )
    return f"unexpected {type(error).__name__}: {text} ('sae --debug ...' shows more)"


def _fail(message: str, status: int) -> NoReturn:
    complain(message)
    sys.exit(status)


if __name__ == "__main__":
    main()
