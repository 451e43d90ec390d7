"""Resamples a run's held-out documents and counts how often the 95 % interval covers the value of them all.

    python scripts/interval_coverage.py RUN [RESAMPLES]

Draws as many documents as there are, with replacement, from `eval-documents.safetensors`; the metric and its standard
error are computed of each draw as evaluation computes them. A right standard error covers about 95 % of the time.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from sae.evaluation.metrics import METRICS, estimate

run, resamples = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
totals = load_file(run / "eval-documents.safetensors")
totals = {name: column[totals["tokens"] > 0] for name, column in totals.items()}
documents = len(totals["tokens"])
generator = torch.Generator().manual_seed(0)
draws = torch.randint(documents, (resamples, documents), generator=generator)
print(f"{documents} documents, {int(totals['tokens'].sum()):,} tokens, {resamples} resamples")
for metric in METRICS:
    whole = estimate(metric, totals)
    if whole.value is None or not whole.standard_error:
        continue
    made = [estimate(metric, {name: column[draw] for name, column in totals.items()}) for draw in draws]
    covered = sum(one.interval is not None and one.interval[0] <= whole.value <= one.interval[1] for one in made)
    print(f"{metric:<30} {whole!s:<24} covered {covered / resamples:.1%}")
