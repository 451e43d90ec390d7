"""How well attributions predict what is measured when a feature is ablated.

    python benchmarks/attribution.py RUN... [--texts FOLDER] [--contexts 24] [--seeds 0 1]

Each RUN is a run folder with a dictionary. The rule, by which everything is chosen before anything is measured:

- Passages come from documents that the run held out, in turns, in an order shuffled with the seed. A passage begins at
  a line that is drawn with the seed, and has `--length` tokens, BOS included. What follows in the text is the token
  whose log-probability, after the last position, is the function.
- Of the pairs of a feature and a position at which it fires, `--pairs` of each passage are drawn with the seed, all
  with the same probability; and `--last` more among those at the last position.
- The activation of one feature at one position becomes 0, the rest of the activation stays, and the model runs again:
  measured is by how much log p falls. Attributions of the same pairs are compared with this by Spearman's rank
  correlation over all pairs of all passages. Standard errors are those of a bootstrap over passages.

Beside it stand two nulls: measured changes shuffled among the pairs of a passage; and the change measured when a random
direction of the same length is removed at the same place, beside the attribution to the feature. As a check of the
measurement, the gradient times that direction is compared with the change measured for it. To see what the path is for,
a random half of everything that fires in a passage is removed at once, `--halves` times, and the sum of the
attributions is compared with the change. Integrated gradients are measured on one path, and on a path for each of
`--groups` random groups of what fires. With `--by-position`, they are also measured along the path on which only the
features of that one position begin at 0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from correlation import shuffled, spearman, with_error
from torch import Tensor

import sae
from sae import Attribution, NextToken
from sae.dictionary.base import Dictionary
from sae.model.language_model import LanguageModel
from sae.numerics.seeding import numpy_generator, python_random
from sae.runs.run import Run
from sae.text.corpus import STANDARD_LIBRARY, is_held_out, read_documents

COPIES = 8
INTEGRATED_GRADIENTS, GRADIENT_ACTIVATION, BY_POSITION = "integrated_gradients", "gradient_activation", "by_position"
IN_GROUPS = "in_groups"
METHODS = {
    INTEGRATED_GRADIENTS: "integrated gradients", IN_GROUPS: "integrated gradients, in groups",
    GRADIENT_ACTIVATION: "gradient × activation",
}  # fmt: skip
NAMES = {**METHODS, BY_POSITION: "integrated gradients, position alone"}


@dataclass(frozen=True)
class Passage:
    """Token ids `[seq]` of the beginning of a passage, and the token that follows."""

    document: str
    tokens: Tensor
    following: int


@dataclass(frozen=True)
class Pairs:
    """Pairs of all passages: columns of one length.

    Attributes:
        passage: number of the passage.
        last: whether the pair was drawn at the last position.
        attributions: by method.
        measured: by how much log p falls when the feature becomes 0.
        random: the same when a random direction of the same length is removed.
        random_gradient: gradient times that direction.
        halves: for random halves of what fires, the sums of attributions by method, and `measured`.
    """

    passage: np.ndarray
    last: np.ndarray
    attributions: dict[str, np.ndarray]
    measured: np.ndarray
    random: np.ndarray
    random_gradient: np.ndarray
    halves: dict[str, np.ndarray]


def passages(run: Run, source: str, number: int, length: int, seed: int) -> list[Passage]:
    """Passages of held-out documents, which take turns."""
    data, model = run.config.data, run.language_model
    draw = python_random("benchmark: passages", seed)
    documents = [
        (document.name, document.text if isinstance(document.text, str) else "".join(document.text.pieces()))  # type: ignore[union-attr]
        for document in read_documents(source)
        if is_held_out(document.name, data.holdout_seed, data.holdout_fraction)
    ]
    long = [(name, text) for name, text in documents if len(text) > 16 * length]
    draw.shuffle(long)
    found: list[Passage] = []
    while len(found) < number:
        name, text = long[len(found) % len(long)]
        begin = text.find("\n", draw.randrange(len(text) - 12 * length)) + 1
        ids = model.to_tokens(text[begin : begin + 12 * length])[0]
        if len(ids) > length:
            found.append(Passage(name, ids[:length], int(ids[length])))
    return found


def drawn(attribution: Attribution, pairs: int, last: int, draw: random.Random) -> tuple[list[int], list[bool]]:
    """Entries of an attribution: some of all, and some of the last position, none twice."""
    chosen = draw.sample(range(len(attribution)), pairs)
    end = attribution.tokens.shape[1] - 1
    at_end = [entry for entry in np.flatnonzero(attribution.position == end).tolist() if entry not in chosen]
    return chosen + draw.sample(at_end, last), [False] * pairs + [True] * last


def measure(run: Run, dictionary: Dictionary, source: str, seed: int, arguments: argparse.Namespace) -> Pairs:
    """Draw pairs, attribute to them, and measure what ablation does."""
    model, columns, halves = run.language_model, [], []
    tail, begun = model.tail(run.config.gives), time.perf_counter()
    for number, passage in enumerate(passages(run, source, arguments.contexts, arguments.length, seed)):
        if time.perf_counter() - begun > 60 * arguments.minutes:
            break
        of = NextToken(passage.following, log_probability=True)
        settings: dict[str, dict[str, Any]] = {
            INTEGRATED_GRADIENTS: {"steps": arguments.steps}, GRADIENT_ACTIVATION: {},
            IN_GROUPS: {"steps": arguments.group_steps, "groups": arguments.groups},
        }  # fmt: skip
        found = {
            method: sae.attribute(dictionary, model, passage.tokens, of=of, **settings[method]) for method in METHODS
        }
        first = found[INTEGRATED_GRADIENTS]
        draw = python_random("benchmark: pairs", seed, number)
        entries, last = drawn(first, arguments.pairs, arguments.last, draw)
        assert all((one.feature == first.feature).all() for one in found.values())
        position, feature = first.position[entries], first.feature[entries]
        activation = torch.from_numpy(first.activation[entries]).float()
        vector = activation[:, None] * dictionary.W_dec.detach().float()[torch.from_numpy(feature)]
        noise = numpy_generator("benchmark: random directions", seed, number).standard_normal(vector.shape)
        direction = torch.from_numpy(noise).float()
        direction *= vector.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
        start = tail.start(passage.tokens[None])
        y = tail.activations(start)
        half = np.stack(
            [
                np.isin(np.arange(len(first)), draw.sample(range(len(first)), len(first) // 2))
                for _ in range(arguments.halves)
            ]
        )
        changes = torch.zeros(1 + 2 * len(entries) + arguments.halves, *y.shape[1:])
        changes[torch.arange(1, 1 + 2 * len(entries)), np.concatenate([position, position])] = torch.cat(
            [vector, direction]
        )
        for removed, change in zip(half, changes[1 + 2 * len(entries) :], strict=True):
            codes = torch.zeros(len(change), dictionary.d_sae)
            codes[first.position[removed], first.feature[removed]] = torch.from_numpy(first.activation[removed]).float()
            change.add_(codes @ dictionary.W_dec)
        log_p = []
        for some in changes.split(COPIES):
            copies = start.at(torch.zeros(len(some), dtype=torch.int64), y.shape[1])
            end = torch.full((len(some), 1), y.shape[1] - 1)
            logits = tail.read_out(copies, y - some, end).logits[:, 0]
            log_p.append(logits.double().log_softmax(-1)[:, passage.following])
        sizes = [1, len(entries), len(entries), arguments.halves]
        clean, ablated, randomised, halved = torch.cat(log_p).split(sizes)
        halves.append({
            **{method: half @ one.attribution for method, one in found.items()},
            "measured": (clean - halved).numpy(), "passage": np.full(arguments.halves, number),
        })  # fmt: skip
        slope = gradient_at(model, run.config.gives, passage)
        alone = {}
        if arguments.by_position:
            alone[BY_POSITION] = by_position(run, dictionary, passage, first, entries, arguments.steps)
        columns.append({
            "passage": np.full(len(entries), number), "last": np.array(last),
            **{method: one.attribution[entries] for method, one in found.items()}, **alone,
            "measured": (clean - ablated).numpy(), "random": (clean - randomised).numpy(),
            "random_gradient": (slope[position] * direction).sum(-1).double().numpy(),
        })  # fmt: skip
        print(f"{run.language_model.info.name}, seed {seed}: passage {number + 1}", file=sys.stderr, flush=True)
    joined = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    attributions = {method: joined.pop(method) for method in NAMES if method in joined}
    halved = {name: np.concatenate([part[name] for part in halves]) for name in halves[0]}
    return Pairs(**joined, attributions=attributions, halves=halved)


def by_position(
    run: Run, dictionary: Dictionary, passage: Passage, found: Attribution, entries: list[int], steps: int
) -> np.ndarray:
    """Integrated gradients of some entries, along the path on which only their own position begins at 0."""
    tail = run.language_model.tail(run.config.gives)
    start = tail.start(passage.tokens[None])
    y = tail.activations(start)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    attributions = np.zeros(len(entries))
    for position in np.unique(found.position[entries]):
        here = found.position == position
        codes = torch.zeros(dictionary.d_sae)
        codes[found.feature[here]] = torch.from_numpy(found.activation[here]).float()
        leaf = y.repeat(steps, 1, 1)
        leaf[:, position] -= torch.from_numpy((1 - nodes) / 2).float()[:, None] * (codes @ dictionary.W_dec)
        leaf.requires_grad_()
        copies = start.at(torch.zeros(steps, dtype=torch.int64), y.shape[1])
        with torch.enable_grad(), tail.replacing(copies, lambda _, leaf=leaf: leaf):
            log_p = run.language_model.logits(copies.tokens)[:, -1].log_softmax(-1)[:, passage.following]
            value = (log_p * torch.from_numpy(weights / 2)).sum()
        gradient = torch.autograd.grad(value, leaf)[0][:, position].sum(0)
        for number, entry in enumerate(entries):
            if here[entry]:
                attributions[number] = found.activation[entry] * float(
                    dictionary.W_dec[found.feature[entry]] @ gradient
                )
    return attributions


def gradient_at(model: LanguageModel, hook: str, passage: Passage) -> Tensor:
    """The gradient of the function at the hook point, `[seq, d_in]`."""
    leaves: list[Tensor] = []

    def watch(y: Tensor) -> Tensor:
        leaves[:] = [y.detach().requires_grad_()]
        return leaves[0]

    with torch.enable_grad(), model.replacing(hook, watch):
        value = model.logits(passage.tokens[None])[0, -1].log_softmax(-1)[passage.following]
        return torch.autograd.grad(value, leaves[0])[0][0]


def scores(pairs: Pairs) -> list[dict[str, Any]]:
    """For each method, over all drawn pairs and over those at the last position."""
    rows = []
    for sample, chosen in (("all positions", ~pairs.last), ("last position", pairs.last)):
        passage, measured = pairs.passage[chosen], pairs.measured[chosen]
        for method, attributions in pairs.attributions.items():
            own = attributions[chosen]
            rows.append({
                "pairs": sample, "count": int(chosen.sum()), "method": method,
                "spearman": with_error(spearman, own, measured, passage),
                "pearson": float(np.corrcoef(own, measured)[0, 1]),
                "same_sign": float((np.sign(own) == np.sign(measured)).mean()),
                "shuffled": shuffled(own, measured, passage),
                "random_direction": with_error(spearman, own, pairs.random[chosen], passage),
                "gradient_of_random": with_error(
                    spearman, pairs.random_gradient[chosen], pairs.random[chosen], passage
                ),
                "median_measured": float(np.median(abs(measured))),
                "median_attribution": float(np.median(abs(own))),
            })  # fmt: skip
    return rows


def of_halves(pairs: Pairs) -> dict[str, Any]:
    """Sums of attributions beside the change when a random half of everything is removed."""
    measured, passage = pairs.halves["measured"], pairs.halves["passage"]
    return {
        method: {
            "spearman": with_error(spearman, pairs.halves[method], measured, passage),
            "error": float(abs(pairs.halves[method] - measured).sum() / abs(measured).sum()),
        }
        for method in METHODS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="none, with --add: only write the tables anew"
    )
    parser.add_argument("--texts", help="a folder of texts, for runs that were not trained on the standard library")
    parser.add_argument("--contexts", type=int, default=24, help="passages for each seed")
    parser.add_argument("--length", type=int, default=64, help="tokens of a passage")
    parser.add_argument("--pairs", type=int, default=12, help="of a passage")
    parser.add_argument("--last", type=int, default=6, help="more pairs of a passage, at its last position")
    parser.add_argument("--halves", type=int, default=4, help="of a passage")
    parser.add_argument("--by-position", action="store_true", help="measure paths of single positions too")
    parser.add_argument("--steps", type=int, default=10, help="of integrated gradients")
    parser.add_argument("--groups", type=int, default=32, help="of integrated gradients in groups")
    parser.add_argument("--group-steps", type=int, default=4, help="of each group")
    parser.add_argument("--minutes", type=float, default=60, help="after which no passage of a seed is begun")
    parser.add_argument("--add", action="store_true", help="keep other cases of the existing report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--name", default="attribution", help="of the files in docs/results/")
    arguments = parser.parse_args()
    described, cases = report.machine(), []
    names = ("contexts", "length", "pairs", "last", "halves", "steps", "groups", "group_steps")
    settings = {name: getattr(arguments, name) for name in names}
    for path in arguments.runs:
        run = Run.open(path)
        dictionary = run.dictionary().requires_grad_(False)
        source = run.config.data.source
        assert isinstance(source, str)
        if source != STANDARD_LIBRARY and arguments.texts is not None:
            source = arguments.texts
        for seed in arguments.seeds:
            begun = time.perf_counter()
            pairs = measure(run, dictionary, source, seed, arguments)
            case = {
                "model": run.language_model.info.name, "hook": run.config.gives, "texts": Path(source).name,
                "d_sae": dictionary.d_sae, "architecture": dictionary.architecture, "seed": seed, "machine": described,
                **settings, "passages": len(np.unique(pairs.passage)),
                "seconds": time.perf_counter() - begun, "scores": scores(pairs), "halves": of_halves(pairs),
            }  # fmt: skip
            cases.append(case)
            print(case, file=sys.stderr, flush=True)
    path = report.RESULTS / f"{arguments.name}.json"
    if arguments.add and path.is_file():
        measured = {(case["model"], case["seed"]) for case in cases}
        earlier = json.loads(path.read_text(encoding="utf-8"))["cases"]
        cases = [*(case for case in earlier if (case["model"], case["seed"]) not in measured), *cases]
    text = "\n".join([RULE, cases_table(cases), table(cases), NOTES, halves_table(cases), HALVES])
    report.write(arguments.name, "Attribution beside measured ablation", text, {"cases": cases}, described)


RULE = """\
Passages come from documents that the dictionary has not seen; the function is the log-probability of the token that
follows in the text. Pairs of a feature and a position at which it fires are drawn from each passage, all equally
probable, and some more among those at its last position, with the seed, before anything is measured. Measured is by
how much the log-probability falls when that feature at that position becomes 0 and the rest stays.
"""
NOTES = """
Spearman's correlation of attribution and measured change, ± standard error of a bootstrap over passages. in groups:
everything that fires is divided at random, and each group has a path of its own. position alone: the path on which
only the features of that position begin at 0. shuffled: the middle 95 % if measured changes
are shuffled among the pairs of a passage. random direction: the change measured when a random direction of the same
length is removed at the same place, beside the attribution to the feature. gradient of random: the gradient times that
direction, beside the same change.
"""
HALVES = """
A random half of everything that fires in a passage is removed at once: the sums of its attributions beside the change.
error: the mean size of the difference, as a share of the mean size of the change.
"""


def cases_table(cases: list[dict[str, Any]]) -> str:
    names = ("hook", "texts", "seed", "passages", "length", "steps", "groups", "group_steps")
    rows = [
        [case["model"], f"{case['architecture']}, {case['d_sae']:,}", *(str(case.get(name, "–")) for name in names),
         case["machine"]["date"], case["machine"]["commit"], f"{case['seconds']:,.0f}"]
        for case in cases
    ]  # fmt: skip
    head = ["model", "dictionary", *(name.replace("_", " ") for name in names), "date", "commit", "seconds"]
    return report.table(head, rows, left=4)


def table(cases: list[dict[str, Any]]) -> str:
    head = [
        "model", "pairs", "method", "seed", "pairs", "Spearman", "same sign", "shuffled", "random direction",
        "gradient of random",
    ]  # fmt: skip
    rows = [
        [
            case["model"], row["pairs"], NAMES[row["method"]], str(case["seed"]), str(row["count"]),
            plus_minus(row["spearman"]), f"{row['same_sign']:.0%}",
            f"{row['shuffled']['low']:+.2f} to {row['shuffled']['high']:+.2f}", plus_minus(row["random_direction"]),
            plus_minus(row["gradient_of_random"]),
        ]
        for case in cases
        for row in case["scores"]
    ]  # fmt: skip
    return report.table(head, rows, left=3)


def halves_table(cases: list[dict[str, Any]]) -> str:
    rows = [
        [case["model"], METHODS[method], str(case["seed"]), plus_minus(row["spearman"]), f"{row['error']:.2f}"]
        for case in cases
        for method, row in case["halves"].items()
    ]
    return report.table(["model", "method", "seed", "Spearman", "error"], rows, left=2)


def plus_minus(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} ± {score['standard_error']:.3f}"


if __name__ == "__main__":
    main()
