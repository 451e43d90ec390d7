"""`sae steer`: generate text while features are changed."""

from __future__ import annotations

import re
from pathlib import Path

import click

from sae.cli.arguments import Options, beginning_again
from sae.cli.text import settings_and_texts
from sae.console.terminal import output, say
from sae.errors import ConfigError
from sae.files.printable import one_line

_FEATURE = re.compile(r"(\d{1,18})(?:=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?")
_PLACES = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_MOST_POSITIONS = 100_000
_AS_PROMPT = "put a space before the ="


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, required=True, metavar="FEATURE=VALUE... PROMPT... [KEY=VALUE]...")
@click.option(
    "--mode",
    default="add",
    show_default=True,
    type=click.Choice(["add", "clamp", "scale", "ablate"]),
    help="Add VALUE to the activation, set the activation to it, multiply by it, or set the activation to 0.",
)
@click.option(
    "--positions",
    default="all",
    show_default=True,
    help="Tokens to steer at: all, prompt, generated, or positions from 0, such as 1,4-7.",
)
@click.option("--token", "tokens", multiple=True, help="Steer only at this token, such as ' the'; may be repeated.")
@click.option(
    "--max-new-tokens", default=40, show_default=True, type=click.IntRange(1), help="Number of tokens to generate."
)
@click.option(
    "--seed", type=click.IntRange(0), help="Sample with this seed; by default the most probable token follows."
)
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Temperature of sampling, with --seed.",
)
@click.option(
    "--random",
    "random_directions",
    default=10,
    show_default=True,
    type=click.IntRange(1),
    help="Number of random directions to compare with.",
)
@click.option("--model", help="The language model, if RUN is not a run folder, or has moved.")
@click.option("--device", help="The device of model and dictionary.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_obj
def steer(
    options: Options,
    path: Path,
    arguments: tuple[str, ...],
    mode: str,
    positions: str,
    tokens: tuple[str, ...],
    max_new_tokens: int,
    seed: int | None,
    temperature: float,
    random_directions: int,
    model: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Generate text while features are changed.

    Each prompt is continued by the model as it is, by the model with the features changed, and by the model with an
    equally long change in a random direction; KL divergences of the next-token distribution are given for each. RUN is
    a run folder, or any folder with a dictionary, with --model. VALUE is in units of the feature's activation; what is
    usual is shown if the run has a feature store. With --mode ablate, FEATURE alone is enough.
    KEY=VALUE overrides settings of the run: model.*, harvest.cache, device.
    """
    overrides, given = settings_and_texts(arguments, _AS_PROMPT)
    features, prompts = _split(given, mode)
    places = _positions(positions)
    from sae.model.steering import Steering
    from sae.model.steering_effect import measure_steering
    from sae.runs.in_model import open_in_model
    from sae.runs.steering_view import steering_tables

    steering = Steering(features, mode, places, tokens or None)  # type: ignore[arg-type]
    with beginning_again("it"), options.progress() as progress:
        opened = open_in_model(path, model, device, progress, overrides=overrides)
        progress("generate", 0, 1)
        effect = measure_steering(
            opened.language_model,
            opened.dictionary,
            prompts,
            steering,
            max_new_tokens=max_new_tokens,
            seed=seed,
            temperature=temperature,
            random_directions=random_directions,
        )
        progress("generate", 1, 1)
    if as_json:
        from sae.files.printable import json_text

        say(json_text(effect.to_json(), indent=2))
        return
    console = output()
    for number, table in enumerate(steering_tables(effect, opened.store)):
        console.print(*([""] if number else []), table.in_terminal(console.width), sep="\n")


def _split(arguments: tuple[str, ...], mode: str) -> tuple[dict[int, float], list[str]]:
    """Features with their values, and prompts."""
    features: dict[int, float] = {}
    prompts: list[str] = []
    for argument in arguments:
        match = _FEATURE.fullmatch(argument)
        if match is None and (feature := re.match(r"\d+=", argument)):
            raise ConfigError(
                f"{one_line(argument, 80)!r}: not a feature and a number, such as {feature[0][:20]}8.5; if it is a "
                f"prompt, {_AS_PROMPT}"
            )
        if match is None or (match[2] is None and mode != "ablate"):
            prompts.append(argument)
        elif match[2] is not None and mode == "ablate":
            raise ConfigError(f"{argument!r}: --mode ablate takes no value; give {match[1]}, or --mode clamp to set it")
        elif int(match[1]) in features:
            raise ConfigError(f"{argument!r}: feature {match[1]} has a value already; give one for each")
        else:
            features[int(match[1])] = float(match[2] or 0)
    if not features:
        wanted = "FEATURE, such as 123" if mode == "ablate" else "FEATURE=VALUE, such as 123=8"
        shown = f"{arguments[0]!r}: " if arguments else ""
        raise ConfigError(f"{shown}no feature among the arguments; give {wanted}")
    if not prompts:
        raise ConfigError("there is no prompt: give one or several texts after the features")
    return features, prompts


def _positions(text: str) -> str | tuple[int, ...]:
    """`all`, `prompt` or `generated`, or the numbers of `1,4-7`."""
    if text in ("all", "prompt", "generated"):
        return text
    places: list[int] = []
    for part in text.split(","):
        match = _PLACES.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST_POSITIONS:
            raise ConfigError(f"--positions={text!r}: expected all, prompt, generated, or numbers such as 1,4-7")
        places += range(first, last + 1)
    return tuple(dict.fromkeys(places))
