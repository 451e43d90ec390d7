"""Whether steering with a feature makes the tokens that it promotes more probable than a random direction as long does.

    python benchmarks/steering.py RUN... [--tokens 100000] [--add]

For each run, twenty features are chosen by a rule that was written before any result was seen: of the features that
fire on 0.1 % to 2 % of the tokens of the feature store, in the order of their numbers, every n-th, with n as large as
twenty allow. Each is added to the residual stream at every token of four prompts, as strongly as it usually fires (the
mean of its non-zero activations) and as strongly as it ever fires (its largest one). Measured at the next token after
each prompt, and averaged over prompts: the probability of the ten tokens whose logits the feature's direction raises
most (through final norm and unembedding), and KL(model ‖ steered). The same is done with twenty random directions, in
which the activation moves as far. The test is paired over features: the feature's own probability minus the mean of its
random directions. Continuations are those of the first features of the rule, not the best ones.

A run without a feature store gets one in a temporary folder, collected from `--tokens` of its training tokens. With
`--add`, the report keeps the runs on other language models that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import report
import torch
from torch import Tensor

from sae.config.settings import FeaturesConfig
from sae.dictionary.base import Dictionary
from sae.features import Features, collect
from sae.features.logits import logit_effects
from sae.model.language_model import LanguageModel
from sae.model.steering import Steering, steer
from sae.model.steering_effect import kl_divergence, next_tokens
from sae.runs.in_model import open_in_model
from sae.runs.run import Run

FEATURES, DIRECTIONS, PROMOTED, SHOWN, NEW_TOKENS = 20, 20, 10, 5, 24
BAND = (0.001, 0.02)
PROMPTS = {
    "demo": ["import os\nimport ", "def main(", "class Parser:\n    ", '"""Return the '],
    "": ["The weather in London today is", "She opened the door and", "import os\n", "The most important thing about"],
}
"""By the language model's name; those under no name are for all others."""


def chosen(store: Features) -> list[int]:
    """Twenty features of the band, by the rule."""
    summary = store.summary()
    band = ((summary.density >= BAND[0]) & (summary.density <= BAND[1])).nonzero()[:, 0].tolist()
    return band[:: max(1, len(band) // FEATURES)][:FEATURES]


class Subject:
    """A dictionary in its model, with prompts.

    Args:
        model: the model.
        dictionary: the dictionary, at a hook point of the residual stream.
        prompts: texts.
    """

    def __init__(self, model: LanguageModel, dictionary: Dictionary, prompts: list[str]) -> None:
        self.model, self.dictionary = model, dictionary
        self.rows = model.token_rows(prompts)
        self.own = next_tokens(model, self.rows)
        self.W_U = model.unembedding()

    def measured(self, log_p: Tensor, promoted: Tensor) -> tuple[float, float]:
        """Probability of the promoted tokens, and KL, as means over prompts."""
        return float(log_p[:, promoted].exp().sum(-1).mean()), float(kl_divergence(self.own, log_p).mean())

    def row(self, feature: int, value: float) -> dict[str, Any]:
        """What a feature does, added with this value, and what random directions do."""
        promoted = logit_effects(self.dictionary.W_dec[[feature]], self.W_U, PROMOTED).promoted[0]
        results = []
        for direction in (None, *range(DIRECTIONS)):
            with steer(self.model, self.dictionary, {feature: value}, random=direction):
                results.append(self.measured(next_tokens(self.model, self.rows), promoted))
        (p, kl), randoms = results[0], results[1:]
        return {
            "feature": feature, "value": value, "before": self.measured(self.own, promoted)[0], "p": p, "kl": kl,
            "random_p": [one for one, _ in randoms], "random_kl": [one for _, one in randoms],
            "promoted": [self.model._vocabulary_texts.text(token) for token in promoted.tolist()],
        }  # fmt: skip

    def texts(self, feature: int, value: float, prompt: str) -> dict[str, Any]:
        """A prompt's continuations."""

        def continued() -> str:
            return self.model.generate(prompt, max_new_tokens=NEW_TOKENS)[0].text

        before = continued()
        with steer(self.model, self.dictionary, Steering({feature: value})):
            after = continued()
        with steer(self.model, self.dictionary, Steering({feature: value}), random=0):
            return {
                "feature": feature,
                "value": value,
                "prompt": prompt,
                "before": before,
                "after": after,
                "random": continued(),
            }


def paired(rows: list[dict[str, Any]], score: Callable[[float], float]) -> dict[str, float]:
    """Mean, standard error and t of the feature's score minus the mean of its random directions'."""
    differences = [score(row["p"]) - mean(map(score, row["random_p"])) for row in rows]
    error = stdev(differences) / len(differences) ** 0.5
    return {"mean": mean(differences), "standard_error": error, "t": mean(differences) / error}


def log10(p: float) -> float:
    return float(torch.tensor(p, dtype=torch.float64).clamp_min(1e-30).log10())


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over features."""
    return {
        "probability": paired(rows, lambda p: p),
        "log10_probability": paired(rows, log10),
        "above_every_random": sum(row["p"] > max(row["random_p"]) for row in rows),
        "before": mean(row["before"] for row in rows),
        "p": mean(row["p"] for row in rows),
        "random_p": mean(mean(row["random_p"]) for row in rows),
        "kl": mean(row["kl"] for row in rows),
        "random_kl": mean(mean(row["random_kl"]) for row in rows),
        "kl_above_random": mean(row["kl"] > mean(row["random_kl"]) for row in rows),
    }


@torch.no_grad()
def measure(folder: Path, tokens: int) -> dict[str, Any]:
    """Everything about one run."""
    opened = open_in_model(folder)
    model, dictionary, store = opened.language_model, opened.dictionary, opened.store
    with tempfile.TemporaryDirectory() as place:
        if store is None:
            run = Run.open(folder)
            store = collect(
                dictionary, run.cache(), Path(place), FeaturesConfig(tokens=tokens, top=5, per_quantile=1),
                hook=run.config.hook, tokenizer=model.tokenizer,
            )  # fmt: skip
        prompts = PROMPTS.get(model.info.name, PROMPTS[""])
        subject, features, known = (
            Subject(model, dictionary, prompts),
            chosen(store),
            {j: store[j] for j in chosen(store)},
        )
        rows: dict[str, list[dict[str, Any]]] = {"usual": [], "largest": []}
        for number, feature in enumerate(features):
            for strength, value in (("usual", known[feature].mean), ("largest", known[feature].max)):
                rows[strength].append({**subject.row(feature, value), "density": known[feature].density})
            print(f"{model.info.name}: {number + 1} of {len(features)} features", file=sys.stderr, flush=True)
        texts = [subject.texts(feature, known[feature].max, prompts[0]) for feature in features[:SHOWN]]
        return {
            "measured": report.machine(),
            "model": model.info.name, "hook": dictionary.origin.gives.hook, "architecture": dictionary.architecture,
            "d_sae": dictionary.d_sae, "store_tokens": store.info["tokens"], "prompts": prompts,
            "features": rows,
            "summary": {strength: summary_of(some) for strength, some in rows.items()}, "texts": texts,
        }  # fmt: skip


def number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}"


def sections(result: dict[str, Any]) -> Iterator[str]:
    """The report on one run."""
    yield (
        f"## {result['model']}, {result['hook']}, {result['architecture']} of {result['d_sae']:,} features\n\n"
        f"{len(result['features']['usual'])} features; feature store of {result['store_tokens']:,} tokens; "
        f"{len(result['prompts'])} prompts; commit {result['measured']['commit']}, {result['measured']['date']}.\n"
    )
    head = [
        "strength", "P(promoted) before", "steered", "random", "difference", "t", "log₁₀ ratio", "t",
        f"above all {DIRECTIONS} random", "KL steered", "KL random", "KL above random",
    ]  # fmt: skip
    cells = []
    for strength, one in result["summary"].items():
        p, ratio, count = one["probability"], one["log10_probability"], len(result["features"][strength])
        cells.append([
            f"{strength} activation", number(one["before"]), number(one["p"]), number(one["random_p"]),
            f"{number(p['mean'])} ± {number(p['standard_error'], 2)}", number(p["t"]),
            f"{number(ratio['mean'])} ± {number(ratio['standard_error'], 2)}", number(ratio["t"]),
            f"{one['above_every_random']} of {count}", number(one["kl"]), number(one["random_kl"]),
            f"{one['kl_above_random']:.0%}",
        ])  # fmt: skip
    yield report.table(head, cells)
    yield "Each feature, as strong as its largest activation:\n"
    head = ["feature", "density", "added", "P before", "steered", "random", "KL", "KL random", "promoted"]
    yield report.table(head, [
        [
            str(row["feature"]), f"{row['density']:.2%}", number(row["value"]), number(row["before"]), number(row["p"]),
            number(mean(row["random_p"])), number(row["kl"]), number(mean(row["random_kl"])),
            " ".join(shown(token) for token in row["promoted"][:5]),
        ]
        for row in result["features"]["largest"]
    ])  # fmt: skip
    yield f"Continuations of {shown(result['prompts'][0])} with the first {SHOWN} of these features:\n"
    head = ["feature", "added", "model", "continuation"]
    yield report.table(head, [
        [str(one["feature"]), number(one["value"]), name, shown(one[key])]
        for one in result["texts"]
        for name, key in (("as it is", "before"), ("steered", "after"), ("random direction", "random"))
    ])  # fmt: skip


def shown(text: str) -> str:
    """A text as a code span on one line."""
    return "`" + text.replace("`", "ˋ").replace("\n", "↵").replace("\t", "→").replace("|", "¦") + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders with dictionaries")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the feature store of a run without one")
    parser.add_argument("--name", default="steering", help="of the files in docs/results/")
    parser.add_argument("--add", action="store_true", help="keep the report's runs on other language models")
    arguments = parser.parse_args()
    results = [measure(folder, arguments.tokens) for folder in arguments.runs]
    if arguments.add:
        before = json.loads((report.RESULTS / f"{arguments.name}.json").read_bytes())["runs"]
        results = [one for one in before if one["model"] not in {new["model"] for new in results}] + results
    rule = (
        f"Features: of those with a density of {BAND[0]:.1%} to {BAND[1]:.0%} in the feature store, by number, every "
        f"n-th, with n as large as {FEATURES} allow. Added at every token; P is that of the {PROMOTED} tokens that the "
        f"direction promotes, at the next token after each prompt; random: {DIRECTIONS} directions as long (seeds 0 to "
        f"{DIRECTIONS - 1}). Differences and t are paired over features, ± standard error; KL in nats.\n"
    )
    text = "\n".join([rule, *(part for result in results for part in sections(result))])
    report.write(
        arguments.name, "Steering: promoted tokens next to random directions", text, {"runs": results}, report.machine()
    )


if __name__ == "__main__":
    main()
