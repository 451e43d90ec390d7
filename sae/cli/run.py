"""`sae run`: the whole pipeline, from text to features."""

from __future__ import annotations

import click

from sae.cli.arguments import OfConfiguration, Options, beginning_again, configured, show_report
from sae.config.settings import RunConfig
from sae.console.terminal import output, say


@click.command(cls=OfConfiguration)
@configured
@click.pass_obj
def run(options: Options, settings: RunConfig) -> None:
    """Harvest, train, evaluate, collect features.

    CONFIG, which is optional, is a YAML file or the name of a configuration that comes with sae: gpt2-small,
    local-model or quickstart. KEY=VALUE sets or overrides a setting. Completed steps are skipped. An interrupted run
    resumes where it stopped.
    """
    from rich.text import Text

    from sae.evaluation.report import JSON_FILE
    from sae.files.reading import read_object
    from sae.runs import pipeline

    with options.progress() as progress:
        pipeline_run = pipeline.run(settings, progress, features=False)
        if pipeline_run.config.is_crosscoder:
            say(f"{pipeline_run.dictionary('cpu')} in {pipeline_run.folder / 'dictionary'}")
            return
        with beginning_again("the collection of features"):
            features = pipeline_run.features()
    show_report(read_object(pipeline_run.folder / JSON_FILE))
    folder = str(pipeline_run.folder)
    hint = f": 'sae features {folder}' lists them, 'sae features {folder} --page page.html' makes a page"
    output().print(Text.assemble(f"\n{len(features):,} features in ", (folder, "bold"), hint), soft_wrap=True)
