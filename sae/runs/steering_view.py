"""What steering does to text, as tables: continuations before and after, next to a random direction."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev

from sae.features.store import Features
from sae.model.steering import Steering
from sae.model.steering_effect import SteeredPrompt, SteeringEffect
from sae.results.table import Column, Table

_PEEK = 6
_DONE = {"add": "+ {:.4g}", "clamp": "set to {:.4g}", "scale": "× {:.4g}", "ablate": "ablated"}


def steering_tables(effect: SteeringEffect, store: Features | None) -> Iterator[Table]:
    """A table of the steered features, and one for each prompt.

    Args:
        effect: the effect.
        store: the dictionary's feature store, which knows what a usual activation is.
    """
    yield _features(effect, store)
    for prompt in effect.prompts:
        yield _prompt(prompt)


def _features(effect: SteeringEffect, store: Features | None) -> Table:
    steering, numbers = effect.steering, list(effect.steering.values)
    columns = [
        Column("feature", [str(number) for number in numbers]),
        Column("change", [_DONE[steering.mode].format(value) for value in steering.values.values()]),
    ]
    here = Column("here", [f"{effect.in_prompts[number]:.3g}" for number in numbers])
    if store is None:
        columns.append(here)
    else:
        known = [store[number] for number in numbers]
        tokens = [" ".join(f"«{_shown(token)}»" for token in feature.peek[:_PEEK]) for feature in known]
        columns += [
            Column("usual", [f"{feature.mean:.3g}" for feature in known]),
            Column("largest", [f"{feature.max:.3g}" for feature in known]),
            Column("density", [f"{feature.density:.2%}" for feature in known]),
            here,
            Column("fires on", tokens, is_text=True, is_cut=True),
        ]
    usual = (
        "usual: the mean of its non-zero activations in the feature store"
        if store is not None
        else "what a usual activation is, a feature store would know: 'sae features RUN' collects one"
    )
    note = f"{effect.hook}, {_where(steering)}; in units of the activation; {usual}; here: its largest in the prompts"
    return Table(columns, title="Steered features", notes=[note])


def _prompt(prompt: SteeredPrompt) -> Table:
    rows = (("as it is", prompt.before), ("steered", prompt.after), ("random direction", prompt.random))
    nulls = f"{mean(prompt.random_kl):.3g}"
    if len(prompt.random_kl) > 1:
        nulls += f" ± {stdev(prompt.random_kl) / len(prompt.random_kl) ** 0.5:.2g}"
    columns = [
        Column("model", [name for name, _ in rows], is_text=True),
        Column("KL", ["0", f"{prompt.kl:.3g}", nulls]),
        Column("continuation", [_shown(text) for _, text in rows], is_text=True),
    ]
    note = (
        "KL of the next-token distribution after the prompt from that of the model as it is, in nats; random: mean "
        f"± standard error over {len(prompt.random_kl)} directions in which the activation moves as far; text of the "
        "first"
    )
    return Table(columns, title=f"Prompt: {_shown(prompt.prompt)}", notes=[note])


def _where(steering: Steering) -> str:
    places = {"all": "at every token", "prompt": "at tokens of the prompt", "generated": "at generated tokens"}
    if isinstance(steering.positions, str):
        where = places[steering.positions]
    else:
        where = f"at positions {', '.join(map(str, sorted(steering.positions)))}"
    if steering.tokens is None:
        return where
    return f"{where} that is {' or '.join(repr(token) for token in steering.tokens)}"


def _shown(text: str) -> str:
    """A text on one line, with signs for line ends and tabs."""
    return text.replace("\n", "↵").replace("\t", "→")
