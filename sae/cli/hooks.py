"""`sae hooks`: list a model's hook points, and which of them can be replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import click

from sae.cli.arguments import Options, beginning_again
from sae.config.file import describe_keys, load_config
from sae.console.terminal import say
from sae.errors import ConfigError

if TYPE_CHECKING:
    from sae.model.hook_probe import Hook

_READ = ("model.", "device")


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.pass_obj
def hooks(options: Options, model: str, overrides: tuple[str, ...]) -> None:
    """List the hook points of a model.

    MODEL is the name of a model on the hub, a folder, a .gguf file, or 'demo'. KEY=VALUE sets 'device' or a 'model.'
    setting of 'sae run'. The model is loaded and run on a few tokens; no text is read.
    """
    from sae.runs.run import Run

    for override in overrides:
        if not override.startswith(_READ):
            keys = (key for key, _, _ in describe_keys() if key.startswith(_READ) and key != "model.name")
            raise ConfigError(f"override {override!r}: 'sae hooks' reads {', '.join(keys)}")
    config = load_config(None, [f"model.name={model}", *overrides])
    with beginning_again("it"), options.progress() as progress:
        language_model = Run(config, progress).language_model
        progress("read hook points", 0, 1)
        hook_points = language_model.hooks()
        progress("read hook points", 1, 1)
    info = language_model.info
    say(f"{info.name}: {info.n_layers} blocks, residual stream of width {info.d_model:,}; names are blocks.N. plus")
    for line in hook_lines(hook_points):
        say(line)


def hook_lines(hooks: Iterable[Hook]) -> Iterator[str]:
    """One line for each kind of hook point, width and answer, with the blocks that share it."""

    def key(hook: Hook) -> tuple[int, int, str]:
        return hook.rank, hook.width, hook.refusal or ""

    rows = [("hook point", "width", "blocks", "replaceable", "meaning")]
    for _, hooks_alike in groupby(sorted(hooks, key=lambda hook: (*key(hook), hook.block)), key=key):
        group = list(hooks_alike)
        kind, refusal, meaning = group[0].kind, group[0].refusal, group[0].meaning
        answer, meaning = ("yes", meaning) if refusal is None else ("no", f"{meaning}; {refusal}")
        rows.append((kind, f"{group[0].width:,}", block_ranges([hook.block for hook in group]), answer, meaning))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for kind, width, blocks, answer, meaning in rows:
        yield (
            f"{kind:<{widths[0]}}  {width:>{widths[1]}}  {blocks:<{widths[2]}}  {answer:<{widths[3]}}  {meaning}"
        ).rstrip()


def block_ranges(blocks: list[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3 and 5; `0, 2, …, 10` for every second block."""
    steps = {after - before for before, after in pairwise(blocks)}
    if len(blocks) > 3 and len(steps) == 1 and steps != {1}:
        return f"{blocks[0]}, {blocks[1]}, …, {blocks[-1]}"
    numbered = enumerate(blocks)  # in a run of consecutive blocks, block − place is constant
    runs = [[block for _, block in run] for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
