"""`sae harvest`: cache a language model's activations."""

from __future__ import annotations

import click

from sae.cli.arguments import OfConfiguration, Options, configured
from sae.config.settings import RunConfig
from sae.console.terminal import say


@click.command(cls=OfConfiguration)
@configured
@click.pass_obj
def harvest(options: Options, settings: RunConfig) -> None:
    """Cache a language model's activations.

    CONFIG is an optional YAML file; KEY=VALUE sets or overrides a setting. An interrupted harvest resumes where it
    stopped.
    """
    from sae.runs import pipeline

    with options.progress() as progress:
        cache = pipeline.Run(settings, progress).harvest()
    say(cache)
