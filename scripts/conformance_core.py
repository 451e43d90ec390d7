"""SAEBench's core evaluation of this package's dictionaries, beside what `sae.evaluate` said of them.

It runs twice on the same held-out contexts: by its defaults, where `eval.json` holds what its formulas give under
`legacy`; and with special tokens left as they are, in one batch, where eight of its numbers have our definitions.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TOKENS, LENGTH = "tokens", 128
TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.05
Numbers = dict[str, float]
"""A dictionary's numbers by SAEBench's names."""


@dataclass(frozen=True)
class Setting:
    """How SAEBench goes over the contexts: in what batches, and whether x̂ stands at special tokens too."""

    folder: str
    batches: int
    contexts: int
    leave_special: bool
    dtype: str = "float32"


DEFAULTS = Setting("results/core", 4, 16, leave_special=False)
OURS = Setting("results/core-special-left", 1, 64, leave_special=True)
CONVERTED = replace(DEFAULTS, folder="results/core-converted")
FEW = [Setting(f"results/few-{dtype}", 1, 4, True, dtype) for dtype in ("bfloat16", "float32")]

# The numbers of the tables.
PRINTED = (
    "explained_variance", "mse", "explained_variance_legacy", "cossim", "l2_norm_in", "l2_norm_out", "l2_ratio",
    "relative_reconstruction_bias", "l0", "l1", "ce_loss_with_sae", "ce_loss_without_sae", "ce_loss_with_ablation",
    "ce_loss_score", "kl_div_with_sae", "kl_div_with_ablation", "kl_div_score",
)  # fmt: skip
# Numbers that are ours too, by SAEBench's name and by ours. Its mse is divided by the number of tokens once more.
SAME_DEFINITION = {
    "mse": "mse", "cossim": "cosine", "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias", "l0": "l0", "l1": "l1",
    "ce_loss_without_sae": "ce_clean", "ce_loss_with_sae": "ce_spliced",
}  # fmt: skip
# Numbers that stand for the same thing and are defined otherwise.
OTHER_DEFINITION = {
    "explained_variance": "explained_variance", "explained_variance_legacy": "explained_variance",
    "ce_loss_with_sae": "ce_spliced", "ce_loss_with_ablation": "ce_zero", "ce_loss_score": "ce_recovered_zero",
    "kl_div_with_sae": "kl",
}  # fmt: skip


def run_core(dictionaries: dict[str, Any], setting: Setting) -> dict[str, Numbers]:
    """SAEBench's core evaluation of the first held-out contexts; its numbers by dictionary."""
    from sae_bench.evals.core.main import multiple_evals  # pyright: ignore[reportMissingImports]

    results = multiple_evals(
        selected_saes=list(dictionaries.items()),
        n_eval_reconstruction_batches=setting.batches,
        n_eval_sparsity_variance_batches=setting.batches,
        eval_batch_size_prompts=setting.contexts,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=setting.leave_special,
        dataset=TOKENS,
        context_size=LENGTH,
        output_folder=setting.folder,
        dtype=setting.dtype,
        device="cpu",
        force_rerun=True,
    )
    return {
        result["sae_set"]: {name: value for group in result["metrics"].values() for name, value in group.items()}
        for result in results
    }


def by_its_formulas(name: str, numbers: Numbers, report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """SAEBench's numbers by its defaults, each beside that of its formula in `sae.evaluation.published_formulas`."""
    legacy = report["legacy"]
    assert legacy["contexts"] == DEFAULTS.batches * DEFAULTS.contexts, f"{name}: {legacy['contexts']} contexts"
    assert legacy["contexts_per_batch"] == DEFAULTS.contexts
    return {key: (numbers[key], ours) for key, ours in legacy["formulas"]["sae-bench 0.6.0"].items()}


def by_our_definitions(numbers: Numbers, report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """SAEBench's numbers with special tokens left, in our units, and ours."""
    tokens = report["evaluated"]["tokens"]
    return {
        theirs: (numbers[theirs] * (tokens if theirs == "mse" else 1), report[ours]["value"])
        for theirs, ours in SAME_DEFINITION.items()
    }


def worst(pairs: dict[str, tuple[float, float]]) -> float:
    """The largest relative difference, which must be small."""
    difference, name = max((abs(theirs - ours) / abs(ours), name) for name, (theirs, ours) in pairs.items())
    assert difference < TOLERANCE, f"{name}: {pairs[name][0]:.6g} there, {pairs[name][1]:.6g} here"
    return difference


def check_core(name: str, numbers: dict[str, dict[str, Numbers]], report: dict[str, Any], dictionary: Any) -> str:
    """The saved result has SAEBench's format, and the numbers are those of this package."""
    from sae_bench.evals.core.eval_output import CoreEvalOutput  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils.testing_utils import (  # pyright: ignore[reportMissingImports]
        validate_eval_output_format_file,
    )

    path = Path(DEFAULTS.folder) / f"{name}_custom_sae_eval_results.json"
    validate_eval_output_format_file(str(path), CoreEvalOutput)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert len(saved["eval_result_details"]) == dictionary.d_sae
    assert saved["sae_cfg_dict"]["architecture"] == dictionary.cfg.architecture
    defaults, special_left = numbers["defaults"][name], numbers["special tokens left"][name]
    alive = special_left["frac_alive"]
    assert abs(alive - (1 - report["dead"]["share"])) < 0.5 / dictionary.d_sae, f"alive: {alive:.4f}"
    formulas, definitions = by_its_formulas(name, defaults, report), by_our_definitions(special_left, report)
    return (
        f"{len(formulas)} numbers by its formulas within {worst(formulas):.0e}, "
        f"{len(definitions)} by ours within {worst(definitions):.0e}"
    )


def check_bfloat16(dictionary: Any) -> str:
    """The same on few contexts, with model and dictionary in bfloat16, which SAEBench moves there itself."""
    halves, whole = (run_core({"topk": copy.deepcopy(dictionary)}, setting)["topk"] for setting in FEW)
    largest = max(abs(halves[name] - whole[name]) / abs(whole[name]) for name in SAME_DEFINITION)
    assert largest < BFLOAT16_TOLERANCE, f"numbers differ by {largest:.2f}"
    return f"numbers within {largest:.3f} of float32's"


def tables(numbers: dict[str, dict[str, Numbers]], reports: dict[str, dict[str, Any]]) -> list[str]:
    """Both sides' numbers in Markdown: a line a number, a column a dictionary."""
    defaults, special_left = numbers["defaults"], numbers["special tokens left"]
    formulas = {name: by_its_formulas(name, of, reports[name]) for name, of in defaults.items()}
    definitions = {name: by_our_definitions(of, reports[name]) for name, of in special_left.items()}
    others = {
        name: {key: (of[key], reports[name][ours]["value"]) for key, ours in OTHER_DEFINITION.items()}
        for name, of in defaults.items()
    }
    return [
        "SAEBench's core evaluation by its defaults, and how far its formulas are from it here", "",
        *_table(formulas, "difference"), "",
        "The same with special tokens left as they are, and how far this package's numbers are from it", "",
        *_table(definitions, "difference"), "",
        "Defined otherwise: SAEBench by its defaults, this package", "",
        *_table(others, None),
    ]  # fmt: skip


def _table(pairs: dict[str, dict[str, tuple[float, float]]], difference: str | None) -> list[str]:
    """With the largest relative difference of a line at its end, or both numbers in each cell."""
    columns = [*pairs, *([difference] if difference else [])]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for key in next(iter(pairs.values())):
        of_key = [of[key] for of in pairs.values()]
        cells = [f"{theirs:.5g}" if difference else f"{theirs:.4f}, {ours:.4f}" for theirs, ours in of_key]
        if difference:
            cells.append(f"{max(abs(theirs - ours) / abs(ours) for theirs, ours in of_key):.0e}")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return lines
