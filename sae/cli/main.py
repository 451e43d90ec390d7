"""The command line: verbs only; each calls one function of the package."""

from __future__ import annotations

import functools
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from sae.cli.compare import compare
from sae.cli.effects import effects
from sae.cli.hooks import hooks
from sae.cli.interrupted import beginning_again
from sae.cli.keys import with_keys
from sae.cli.overrides import evaluation_overrides, features_and_overrides
from sae.cli.probe import probe
from sae.cli.superposition import superposition
from sae.config.file import CONFIG_YAML, describe_keys, load_config, named_config
from sae.config.settings import RunConfig
from sae.console.terminal import close, complain, complain_at_length, output, prepare, say, show_warning, unwritable
from sae.errors import SaeError, TrainingInterrupted
from sae.files import version
from sae.files.paths import expanded
from sae.files.writing import stands

_INTERRUPTED = "interrupted; run the same command again to go on"
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Libraries' own messages and bars in this process, which shows its own."""
_NO_MEMORY = "can't allocate memory"
"""What PyTorch says on a CPU, in a RuntimeError."""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_OfConfiguration = with_keys("Keys, for the file and as KEY=VALUE", describe_keys)


@click.group(context_settings=_CONTEXT)
@click.version_option(version.__version__, prog_name="sae")
@click.option("--debug", is_flag=True, help="Show the stack trace of an error.")
@click.option("--quiet", is_flag=True, help="No progress bars, and no notes on hook point, amounts and cost.")
@click.pass_context
def cli(context: click.Context, debug: bool, quiet: bool) -> None:
    """Sparse autoencoders on language-model activations: cache, train, evaluate, look at features, reuse."""
    context.obj = {"debug": debug, "quiet": quiet}


def _configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give the command its `settings`, from a YAML file, KEY=VALUE arguments, or both."""

    @functools.wraps(command)
    def with_settings(*given: Any, arguments: tuple[str, ...], **options: Any) -> Any:
        return command(*given, settings=_settings(arguments), **options)

    return click.argument("arguments", nargs=-1, required=True, metavar="[CONFIG] [KEY=VALUE]...")(with_settings)


def _settings(arguments: Sequence[str]) -> RunConfig:
    """The first argument is a file unless it reads KEY=VALUE and no file is called that."""
    first, *overrides = arguments
    if "=" in first and not stands(expanded(first)):
        return load_config(None, arguments)
    return named_config(Path(first), overrides)


@cli.command(cls=_OfConfiguration)
@_configured
@click.pass_obj
def run(options: dict[str, bool], settings: RunConfig) -> None:
    """Harvest, train, evaluate, collect features.

    CONFIG is a YAML file; KEY=VALUE settings are enough without it. What is done already is skipped. A run that was
    interrupted goes on where it stopped.
    """
    from rich.text import Text

    from sae.console.progress import progress_bars
    from sae.evaluation.report import JSON_FILE
    from sae.files.reading import read_object
    from sae.runs import pipeline

    _say_hook(settings, quiet=options["quiet"])
    with progress_bars(quiet=options["quiet"]) as progress:
        whole = pipeline.Run(settings, progress)
        whole.check()
        whole.check_space()
        whole.harvest()
        whole.train()
        report = None if whole.is_evaluated() else whole.evaluate()
        with beginning_again("the collection of features"):
            features = whole.features()
    _show_report(read_object(whole.folder / JSON_FILE) if report is None else report)
    folder = str(whole.folder)
    line = Text(f"\n{len(features):,} features in ").append(folder, "bold")
    line.append(f": 'sae features {folder}' lists them, 'sae features {folder} --page page.html' makes a page")
    output().print(line, soft_wrap=True)


@cli.command(cls=_OfConfiguration)
@_configured
@click.pass_obj
def harvest(options: dict[str, bool], settings: RunConfig) -> None:
    """Cache a language model's activations.

    CONFIG is a YAML file; KEY=VALUE settings are enough without it. A harvest that was interrupted goes on where it
    stopped.
    """
    from sae.console.progress import progress_bars
    from sae.runs import pipeline

    with progress_bars(quiet=options["quiet"]) as progress:
        cache = pipeline.Run(settings, progress).harvest()
    say(cache)


@cli.command(cls=_OfConfiguration)
@_configured
@click.pass_obj
def train(options: dict[str, bool], settings: RunConfig) -> None:
    """Train a dictionary on cached activations.

    CONFIG is a YAML file; KEY=VALUE settings are enough without it. The cache is one that 'sae harvest' made. Resumes
    from the newest checkpoint.
    """
    from sae.console.progress import progress_bars
    from sae.runs import pipeline

    _say_hook(settings, quiet=options["quiet"])
    with progress_bars(quiet=options["quiet"]) as progress:
        dictionary = pipeline.Run(settings, progress).train()
    say(f"{dictionary} in {settings.folder / 'dictionary'}")


@cli.command(cls=_OfConfiguration)
@_configured
@click.pass_obj
def sweep(options: dict[str, bool], settings: RunConfig) -> None:
    """Train and compare many dictionaries in one pass.

    CONFIG is a YAML file with lists of values under 'sweep': one dictionary is trained for every combination, all from
    one pass over the activations. sweep.md, sweep.json and pareto.png compare them; each has a run folder of its own.
    A sweep that was interrupted goes on where it stopped.
    """
    from sae.console.progress import progress_bars
    from sae.evaluation.sweep_view import sweep_tables
    from sae.runs.sweeping import MARKDOWN_FILE
    from sae.runs.sweeping import sweep as run_sweep

    _say_hook(settings, quiet=options["quiet"])
    with progress_bars(quiet=options["quiet"]) as progress:
        made = run_sweep(settings, progress)
    console = output()
    say(made.of.replace("`", "") + "\n")
    for table in sweep_tables(made.points, made.behind, console.width):
        console.print(table, "")
    say(f"{len(made.points)} dictionaries in {made.folder}, compared in {MARKDOWN_FILE} there")
    for name, reason in made.failures.items():
        say(f"not trained: {name}: {reason}")
    if made.failures:
        raise SaeError(f"{len(made.failures)} of the sweep's dictionaries were not trained; {MARKDOWN_FILE} says why")


@cli.command("eval")
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
@click.pass_obj
def evaluate(options: dict[str, bool], arguments: tuple[str, ...]) -> None:
    """Measure dictionaries on held-out text.

    RUN is a run folder; eval.json, eval.md and figures are written into it. Runs on the same activations share the
    language model's passes, so that together they cost less than one by one.
    """
    from sae.console.progress import progress_bars
    from sae.runs import pipeline

    overrides, paths = evaluation_overrides(arguments)
    if not paths:
        raise click.UsageError("name at least one run folder before the overrides")
    with progress_bars(quiet=options["quiet"]) as progress:
        runs = {Path(path).resolve(): pipeline.Run.open(path, overrides, progress) for path in paths}
        reports = pipeline.evaluate_runs(list(runs.values()))
    for run, report in zip(runs.values(), reports, strict=True):
        if len(runs) > 1:
            say(run.folder)
        _show_report(report)


@cli.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[FEATURE]... [KEY=VALUE]...")
@click.option("--sort", default="density", show_default=True, help="Order of the list.")
@click.option("--limit", default=40, show_default=True, type=click.IntRange(1), help="Features in the list or page.")
@click.option(
    "--max-density",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Leave out features that fire on a larger share of tokens.",
)
@click.option("--page", type=click.Path(path_type=Path), help="Write a self-contained HTML page of the features here.")
@click.pass_obj
def features(
    options: dict[str, bool],
    path: Path,
    arguments: tuple[str, ...],
    sort: str,
    limit: int,
    max_density: float,
    page: Path | None,
) -> None:
    """Show what features fire on.

    Without numbers a list; with them, the contexts in which those features fire; with --page, a page.

    RUN is a run folder (its features are collected if they are not there yet) or a feature store. KEY=VALUE overrides
    settings of the run: model.*, harvest.cache, device.
    """
    from sae.console.progress import progress_bars
    from sae.effects import effects_beside
    from sae.features import Features
    from sae.runs import pipeline
    from sae.viewer import print_feature, print_features, write_page

    indices, overrides = features_and_overrides(arguments, path)
    if page is not None and (not page.name or page.is_dir()):
        raise click.BadParameter(f"{str(page)!r} is no file; name one, such as page.html.", param_hint="'--page'")
    if stands(path / CONFIG_YAML):
        with beginning_again("it"), progress_bars(quiet=options["quiet"]) as progress:
            store = pipeline.Run.open(path, overrides, progress).features()
    else:
        if overrides:
            raise click.UsageError(f"{overrides[0]}: {str(path)!r} is no run folder, which alone has settings")
        store = Features(path)
    console = output()
    if page is not None:
        chosen = list(indices) or store.sorted_by(sort, max_density=max_density)[:limit]
        write_page(store, chosen, page, f"Features of {path.name}", effects_beside(store))
        say(f"{len(chosen):,} features in {page}")
    elif indices:
        known = effects_beside(store)
        for index in indices:
            print_feature(store[index], console, known)
    else:
        print_features(store, console, sort=sort, limit=limit, max_density=max_density)


@cli.command()
@click.argument("paths", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--record", is_flag=True, help="Add hashes of files that an older sae wrote without any.")
@click.pass_obj
def verify(options: dict[str, bool], paths: tuple[Path, ...], record: bool) -> None:
    """Check every file of a run, a cache or a dictionary.

    FOLDER is a run folder, a cache, a dictionary's folder or a feature store. All that sae wrote there is compared with
    its hash, and read. Files that are missing, damaged, or contradict each other are named. Linked folders are
    followed, and the cache that a run's harvest.cache names is checked too.
    """
    from sae.console.progress import progress_bars
    from sae.runs.verification import record_hashes
    from sae.runs.verification import verify as verify_folder

    files, problems = 0, []
    for path in paths:
        with (
            beginning_again("it"),
            progress_bars(quiet=options["quiet"], units={"verify": "files"}) as progress,
        ):
            count, found = verify_folder(path, progress)
        files, problems = files + count, [*problems, *found]
        if record and not found:
            say(f"{len(record_hashes(path))} hashes added in {path}")
    for problem in problems:
        complain(problem)
    if problems:
        raise SaeError(f"{len(problems)} problems in {files} files; each line above names a file and the way out")
    say(f"{files} files are as they were written")


cli.add_command(compare)
cli.add_command(effects)
cli.add_command(hooks)
cli.add_command(superposition)
cli.add_command(probe)


def _say_hook(settings: Any, *, quiet: bool) -> None:
    """Which hook point is trained on, where several are harvested and none is named."""
    if settings.hook_note and not quiet:
        complain(settings.hook_note)


def _show_report(report: Any) -> None:
    from sae.evaluation import report_table

    console = output()
    console.print(report_table(report, console.width))


def main() -> None:
    """Run the command line: errors of this package become one line and exit status 1; Ctrl-C gives 130."""
    prepare()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        _main()


def _main() -> None:
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as stopped:
        _fail(str(stopped) or _INTERRUPTED, 130)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        complain_at_length(usage.getvalue())
        sys.exit(error.exit_code)
    except TrainingInterrupted as error:
        _fail(str(error), 130)
    except BrokenPipeError:
        close()
    except Exception as error:
        unwritten = unwritable() if isinstance(error, OSError) else None
        if unwritten:
            close()
        if debug:
            complain_at_length(traceback.format_exc())
            sys.exit(1)
        if unwritten:
            _fail(f"Error: standard output cannot be written ({unwritten}); send it where there is space", 1)
        _fail(f"Error: {error if isinstance(error, SaeError) else _unforeseen(error)}", 1)


def _unforeseen(error: Exception) -> str:
    """One line on an error that is none of the package's."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in text:
        reason = f" ({text[:200]})" if text else ""
        return (
            f"not enough memory{reason}; end other programs, lift a limit on it (ulimit -v, a container's), or lower "
            "what is held at once: harvest.batch_contexts, train.batch_size, evaluation.batch_contexts, or take a "
            "smaller model; the same command goes on where it stopped ('sae --debug ...' shows more)"
        )
    return f"unexpected {type(error).__name__}: {text} ('sae --debug ...' shows more)"


def _fail(message: str, status: int) -> NoReturn:
    complain(message)
    sys.exit(status)


if __name__ == "__main__":
    main()
