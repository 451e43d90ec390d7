"""`sae harvest`: a language model's activations, cached."""

from __future__ import annotations

import click

from sae.cli.arguments import OfConfiguration, configured
from sae.config.settings import RunConfig
from sae.console.terminal import say


@click.command(cls=OfConfiguration)
@configured
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
