"""`sae train`: train a dictionary on cached activations."""

from __future__ import annotations

import click

from sae.cli.arguments import OfConfiguration, Options, configured
from sae.config.settings import RunConfig
from sae.console.terminal import say


@click.command(cls=OfConfiguration)
@configured
@click.pass_obj
def train(options: Options, settings: RunConfig) -> None:
    """Train a dictionary on cached activations.

    CONFIG, which is optional, is a YAML file or the name of a configuration that comes with sae: gpt2-small,
    local-model or quickstart. KEY=VALUE sets or overrides a setting. The activations come from 'sae harvest'.
    Interrupted training resumes from the newest checkpoint.
    """
    from sae.runs.run import Run

    with options.progress() as progress:
        run = Run(settings, progress)
        run.say_hook()
        dictionary = run.train()
    say(f"{dictionary} in {settings.folder / 'dictionary'}")
