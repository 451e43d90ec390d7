"""`sae convert`: dictionaries of any toolkit, in the format of another."""

from __future__ import annotations

from pathlib import Path

import click

from sae.console.terminal import output


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=click.Path(path_type=Path))
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--to", default="sae", show_default=True, metavar="FORMAT", help="format to write: see above")
def convert(sources: tuple[Path, ...], target: Path, to: str) -> None:
    """Write a dictionary in another format, or transcoders of all layers as one set.

    SOURCE is a dictionary of this toolkit or a run folder that holds one; or a folder or file of SAELens, sparsify,
    dictionary_learning, OpenAI, Gemma Scope, Llama Scope, Qwen-Scope or circuit-tracer; or a name on the hub (see
    'sae list'). FOLDER is new or empty. FORMAT is sae, saelens, sparsify, dictionary_learning, openai or
    circuit-tracer.

    circuit-tracer's format holds a transcoder for each layer of a model: give a sweep, several sources, or a folder of
    several. The other formats hold one dictionary.

    What had to be folded into the weights is reported, and so is what the format cannot hold. No code in files is run.
    """
    from sae.formats import convert as convert_files

    conversion = convert_files(sources, target, to)
    console = output()
    number = f"{conversion.dictionaries} transcoders of " if conversion.dictionaries > 1 else ""
    console.print(f"{number}{conversion.source} → {to}, in {str(target)!r}")
    for part in conversion.folded:
        console.print(f"  folded into the weights: {part}")
    for part in conversion.lost:
        console.print(f"  not in {to}'s files: {part}")
