"""`sae train`: train a dictionary on cached activations."""

from __future__ import annotations

import click

from sae.cli.arguments import OfConfiguration, configured, say_hook
from sae.config.settings import RunConfig
from sae.console.terminal import say


@click.command(cls=OfConfiguration)
@configured
@click.pass_obj
def train(options: dict[str, bool], settings: RunConfig) -> None:
    """Train a dictionary on cached activations.

    CONFIG, which is optional, is a YAML file or the name of a configuration that comes with sae: gpt2-small,
    local-model or quickstart. KEY=VALUE sets or overrides a setting. The activations come from 'sae harvest'.
    Interrupted training resumes from the newest checkpoint.
    """
    from sae.console.progress import progress_bars
    from sae.runs.run import Run

    say_hook(settings, quiet=options["quiet"])
    with progress_bars(quiet=options["quiet"]) as progress:
        dictionary = Run(settings, progress).train()
    say(f"{dictionary} in {settings.folder / 'dictionary'}")
