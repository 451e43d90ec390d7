"""Estimates what a dictionary costs, by model, card and road, and writes them to docs/cost.md.

    python benchmarks/cost.py

The estimates are arithmetic: operations and bytes of a token over the rates of a card's datasheet, times the shares of
them that are assumed to be reached. Rates that were measured stand beside them for cards that have a report
docs/results/gpu-CARD.json of `benchmarks/gpu.py`.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import report

PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
TOKENS = (100e6, 300e6, 1e9)
BATCH = 8192
CONTEXT = 128
K = 32
SELECTION_SHARE = 0.15
MODEL_SHARE = 0.4
FLOAT32_SHARE = 0.5
BANDWIDTH_SHARE = 0.8
DISK = 1e9
FITS = 0.85


@dataclass(frozen=True)
class Card:
    """Datasheet numbers: dense products, without sparsity.

    Attributes:
        tensor: operations per second of 16-bit products with float32 sums.
        float32: operations per second of float32 products outside tensor cores.
        bandwidth: bytes per second.
        memory: bytes.
        bfloat16: whether its tensor cores multiply bfloat16.
    """

    name: str
    tensor: float
    float32: float
    bandwidth: float
    memory: float
    bfloat16: bool = True


CARDS = (
    Card("T4", 65e12, 8.1e12, 320e9, 16e9, bfloat16=False),
    Card("RTX 4090", 165e12, 82.6e12, 1008e9, 24e9),
    Card("A100 80GB", 312e12, 19.5e12, 2039e9, 80e9),
    Card("H100", 989e12, 67e12, 3350e9, 80e9),
    Card("H200", 989e12, 67e12, 4800e9, 141e9),
)


@dataclass(frozen=True)
class Case:
    """A model up to a block, and a dictionary of the residual stream there.

    Attributes:
        name: of the model.
        block: weights of one block's matrices.
        blocks: blocks before the hook point.
        weights: weights of the whole model, all of which are loaded.
    """

    name: str
    d_in: int
    d_sae: int
    block: int
    blocks: int
    weights: float

    @property
    def model_operations(self) -> float:
        """Of a token: two per weight, and attention's scores and sums over the context."""
        return 2 * self.block * self.blocks + 4 * CONTEXT * self.d_in * self.blocks

    @property
    def product_operations(self) -> float:
        """Of a token, in the encoder's product."""
        return 2 * self.d_in * self.d_sae

    @property
    def step_bytes(self) -> float:
        """Of a token: Adam on both matrices, shared by a batch, and four products with codes."""
        return 24 * 2 * self.d_in * self.d_sae / BATCH + 4 * 4 * K * self.d_in

    @property
    def dictionary_bytes(self) -> float:
        """Weights, two moments, and the encoder in bfloat16."""
        return (2 * 12 + 2) * self.d_in * self.d_sae

    @property
    def model_bytes(self) -> float:
        """In 16 bits."""
        return 2 * self.weights


def gpt2_block(d: int) -> int:
    return 12 * d * d


def gated_block(d: int, inner: int, queries: int, keys: int) -> int:
    """Attention with fewer keys than queries, and an MLP of three matrices."""
    return 2 * d * queries + 2 * d * keys + 3 * d * inner


CASES = (
    Case("GPT-2 small", 768, 24_576, gpt2_block(768), 8, 124e6),
    Case("Gemma-2-2B", 2304, 65_536, gated_block(2304, 9216, 2048, 1024), 13, 2.6e9),
    Case("Llama-3.1-8B", 4096, 131_072, gated_block(4096, 14_336, 4096, 1024), 16, 8.0e9),
)


@dataclass(frozen=True)
class Estimate:
    """Tokens per second."""

    harvest: float
    cached: float
    live: float

    def hours(self, tokens: float, *, live: bool) -> float:
        """The harvest counts once."""
        return tokens / 3600 * (1 / self.live if live else 1 / self.harvest + 1 / self.cached)


def estimate(case: Case, card: Card) -> Estimate:
    """From the assumptions above; what happens to a token happens one after the other."""
    model = case.model_operations / (MODEL_SHARE * card.tensor)
    product_rate = SELECTION_SHARE * card.tensor if card.bfloat16 else FLOAT32_SHARE * card.float32
    step = case.product_operations / product_rate + case.step_bytes / (BANDWIDTH_SHARE * card.bandwidth)
    disk = 2 * case.d_in / DISK
    return Estimate(1 / max(model, disk), 1 / max(step, disk), 1 / (model + step))


def measured(folder: Path = report.RESULTS) -> dict[tuple[str, str, str], float]:
    """Tokens per second by card, model and road, from reports of `benchmarks/gpu.py`."""
    found = {}
    for path in sorted(folder.glob("gpu-*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        card = card_of(str(held["machine"].get("device", "")))
        for road, part in (("cached", "cached"), ("live", "live")):
            for row in held["parts"].get(part, {}).get("rows", {}).values():
                if card and "to step" in row["what"] and f"→ {CASES[0].d_sae:,}, batch {BATCH:,}" in row["what"]:
                    found[card, CASES[0].name, road] = row["tokens_per_second"]
    return found


def card_of(device: str) -> str | None:
    """The card of the table that PyTorch's name of a device means."""
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    return next((card.name for card in CARDS if set(card.name.split()) <= words | {"80GB"}), None)


def table(held: dict[tuple[str, str, str], float], *, live: bool) -> str:
    """All cases on all cards, by one road."""
    road, cells = "live" if live else "cached", []
    for case, card in itertools.product(CASES, CARDS):
        found = estimate(case, card)
        beginning = [f"{case.name}, {case.d_in:,} → {case.d_sae:,}", card.name]
        memory = case.dictionary_bytes + case.model_bytes if live else max(case.dictionary_bytes, case.model_bytes)
        if memory > FITS * card.memory:
            cells.append([*beginning, f"{memory / 1e9:.1f}, does not fit", *["–"] * (5 + (not live))])
            continue
        seen = held.get((card.name, case.name, road))
        rates = [rounded(found.live if live else found.cached), "–" if seen is None else f"{seen:,.0f}"]
        times = [duration(found.hours(tokens, live=live)) for tokens in TOKENS]
        harvest = [] if live else [rounded(found.harvest)]
        cells.append([*beginning, f"{memory / 1e9:.1f}", *harvest, *rates, *times])
    head = ["model and dictionary", "card", "GB", *([] if live else ["harvest, tokens/s"]), "training, tokens/s"]
    return report.table([*head, "measured", *(f"{tokens / 1e6:,.0f}M" for tokens in TOKENS)], cells, left=2)


def duration(hours: float) -> str:
    """Minutes, hours or days, to two digits."""
    if hours < 1:
        return f"{max(1.0, float(f'{60 * hours:.2g}')):.0f} min"
    return f"{float(f'{hours:.2g}'):g} h" if hours < 48 else f"{float(f'{hours / 24:.2g}'):g} d"


def rounded(value: float) -> str:
    """To two digits, since no more are known."""
    return f"{float(f'{value:.2g}'):,.0f}"


def page(held: dict[tuple[str, str, str], float]) -> str:
    """The whole page."""
    cards = report.table(
        ["card", "16-bit products, TFLOP/s", "float32, TFLOP/s", "memory, GB/s", "memory, GB"],
        [
            [
                card.name, f"{card.tensor / 1e12:,.0f}" + ("" if card.bfloat16 else " (float16 only)"),
                f"{card.float32 / 1e12:,.1f}", f"{card.bandwidth / 1e9:,.0f}", f"{card.memory / 1e9:.0f}",
            ]
            for card in CARDS
        ],
    )  # fmt: skip
    cases = report.table(
        ["model", "blocks run", "GFLOP a token", "dictionary", "GFLOP a token", "GB with moments", "GB on disk, 100M"],
        [
            [
                case.name, str(case.blocks), f"{case.model_operations / 1e9:.2f}", f"{case.d_in:,} → {case.d_sae:,}",
                f"{case.product_operations / 1e9:.2f}", f"{case.dictionary_bytes / 1e9:.1f}",
                f"{2 * case.d_in * 100e6 / 1e9:,.0f}",
            ]
            for case in CASES
        ],
    )  # fmt: skip
    return f"""# What will it cost me?

Time for one TopK dictionary of the residual stream on one GPU, for 100 million, 300 million and a billion tokens. **All
numbers are estimates**, computed from datasheets and the assumptions below, except in the columns *measured* (tokens/s
of training), which are filled for cards that have a report of `benchmarks/gpu.py` in
[the measured tables](results/index.md). They tell an hour from a day, not one hour from two.
`python benchmarks/cost.py` writes this page.

## From a cache

Activations are harvested to disk once and then read. The times are those of the harvest and one training; each further
dictionary on the same cache costs its training alone. *GB* is the GPU memory that the larger of the two needs: the
model in 16 bits, or both matrices with Adam's moments and the encoder in bfloat16. A card counts as too small if that
is more than {FITS:.0%} of its memory.

{table(held, live=False)}
## From a running model

The model runs next to the training and nothing is stored, so that every dictionary costs the model's passes again; both
are in memory.

{table(held, live=True)}
## Assumptions

{cases}
Blocks run are those before the hook point, in the middle of the model; the rest of the model is loaded but not run. A
token costs two operations per weight of their matrices and {CONTEXT}-token attention. A training step has one dense
product, 2 · d_in · d_sae operations a token, reads and writes 24 bytes of Adam per weight once per batch of
{BATCH:,} tokens, and reads 4 · k rows of d_in float32 numbers a token with k = {K} (see
[the arithmetic](performance.md#the-arithmetic)).

{cards}
The cards' numbers are their vendors' (dense, for SXM modules if there are several). Of these are reached:

- {MODEL_SHARE:.0%} of the 16-bit rate by the language model's blocks, an assumption;
- {SELECTION_SHARE:.0%} of it by the encoder's product with its selection: on an H100 the two took 2.38 ms at 768 →
  24,576 and batch 8,192 ([single operations](results/operations-cuda.md)), which is 13%, and PyTorch's own product and
  topk 15%. Cards with less arithmetic for the same traffic may reach more;
- {FLOAT32_SHARE:.0%} of the float32 rate where a card has no bfloat16, an assumption. Such is the T4: the
  encoder's product is in float32 there; set `model.dtype=float16` for the model;
- {BANDWIDTH_SHARE:.0%} of the memory bandwidth.

The disk writes and reads {DISK / 1e9:.0f} GB/s, which bounds harvest and cached training: float16 takes 2 · d_in bytes
a token, so no more than {DISK / 2 / CASES[0].d_in:,.0f} tokens/s of {CASES[0].name} and
{DISK / 2 / CASES[-1].d_in:,.0f} of {CASES[-1].name}. Tokenising text, starting, evaluating and collecting features are
not counted.
"""


def main() -> None:
    PAGE.write_text(page(measured()), encoding="utf-8")


if __name__ == "__main__":
    main()
