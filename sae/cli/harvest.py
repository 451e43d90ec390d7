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

    CONFIG, which is optional, is a YAML file or the name of a configuration that comes with sae: gpt2-small,
    local-model, quickstart or sweep. KEY=VALUE sets or overrides a setting. An interrupted harvest resumes where it
    stopped.
    """
    from sae.runs.run import Run

    with options.progress() as progress:
        cache = Run(settings, progress).harvest()
    say(cache)
