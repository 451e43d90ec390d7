"""Runs SAEBench's and sae-probes' own code on this package's dictionaries and prints what passed.

    python conformance_check.py FOLDER [--tests SAEBENCH/tests/unit]

Runs in the environment that scripts/conformance makes, on what scripts/conformance_prepare.py wrote to FOLDER. The
dictionaries are as `sae.load` gives them; of their `cfg` only `model_name` is set, to a name transformer-lens 3 knows.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

MODEL, TOKENS = "gpt2", "tokens"
CONTEXTS, FEW_CONTEXTS, LENGTH = 64, 4, 128
CORE = "results/core"
DATA_SETS = ["118_us_state_CA", "119_us_state_TX", "125_world_country_Italy"]
LIBRARIES = ("sae-bench", "sae-probes", "sae-lens", "transformer-lens", "transformers", "datasets", "torch", "numpy")
TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.05

# Numbers whose formulas agree: theirs, ours, and what theirs is multiplied by to be ours.
SAME_FORMULA: dict[tuple[str, str], tuple[str, str | None]] = {
    ("reconstruction_quality", "mse"): ("mse", "tokens"),  # divided once more by the batch's tokens there
    ("reconstruction_quality", "cossim"): ("cosine", None),
    ("shrinkage", "l2_ratio"): ("l2_ratio", None),
    ("shrinkage", "relative_reconstruction_bias"): ("relative_reconstruction_bias", None),
    ("sparsity", "l0"): ("l0", None),
    ("sparsity", "l1"): ("l1", None),
    ("model_performance_preservation", "ce_loss_without_sae"): ("ce_clean", None),
    ("model_performance_preservation", "ce_loss_with_sae"): ("ce_spliced", None),
}
# Numbers of the same name and another formula, printed beside each other and not compared.
OTHER_FORMULA: dict[tuple[str, str], str] = {
    ("reconstruction_quality", "explained_variance"): "explained_variance",
    ("reconstruction_quality", "explained_variance_legacy"): "explained_variance",
    ("model_performance_preservation", "ce_loss_with_ablation"): "ce_zero",
    ("model_performance_preservation", "ce_loss_score"): "ce_recovered_zero",
    ("model_behavior_preservation", "kl_div_with_sae"): "kl",
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    of: str
    outcome: str
    passed: bool

    def __str__(self) -> str:
        return f"| {'passed' if self.passed else 'FAILED'} | {self.check} | {self.of} | {self.outcome} |"


def attempt(check: str, of: str, run: Callable[[], str]) -> Row:
    """Run one check; whatever it raises is its outcome."""
    try:
        return Row(check, of, run(), True)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Row(check, of, reason, False)


def check_custom_sae(dictionary: Any) -> str:
    """What SAEBench tells authors of custom SAEs to run: decoder norms, and encode, decode and forward on a model."""
    import torch
    from sae_bench.custom_saes.base_sae import BaseSAE  # pyright: ignore[reportMissingImports]

    for dtype in (torch.float32, torch.bfloat16):
        moved = copy.deepcopy(dictionary).to(dtype=dtype)
        assert BaseSAE.check_decoder_norms(moved), f"{dtype}: decoder rows are not of norm 1"
        BaseSAE.test_sae(moved, MODEL)
    return "float32, bfloat16"


def run_core(dictionaries: dict[str, Any], dtype: str, contexts: int, folder: str) -> dict[str, dict[str, Any]]:
    """SAEBench's core evaluation of the first held-out contexts in one batch; its metrics by dictionary."""
    from sae_bench.evals.core.main import multiple_evals  # pyright: ignore[reportMissingImports]

    results = multiple_evals(
        selected_saes=list(dictionaries.items()),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        eval_batch_size_prompts=contexts,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=TOKENS,
        context_size=LENGTH,
        output_folder=folder,
        dtype=dtype,
        device="cpu",
        force_rerun=True,
    )
    return {result["sae_set"]: result["metrics"] for result in results}


def check_core(name: str, theirs: dict[str, Any], ours: dict[str, Any], dictionary: Any) -> str:
    """The saved result has SAEBench's format, and where the formulas agree so do the numbers."""
    from sae_bench.evals.core.eval_output import CoreEvalOutput  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils.testing_utils import (  # pyright: ignore[reportMissingImports]
        validate_eval_output_format_file,
    )

    path = Path(CORE) / f"{name}_custom_sae_eval_results.json"
    validate_eval_output_format_file(str(path), CoreEvalOutput)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert len(saved["eval_result_details"]) == dictionary.d_sae
    assert saved["sae_cfg_dict"]["architecture"] == dictionary.cfg.architecture
    worst = max(abs(a - b) / abs(b) for a, b in compared(theirs, ours).values())
    assert worst < TOLERANCE, f"numbers of one formula differ by {worst:.1e}"
    alive = theirs["misc_metrics"]["frac_alive"]
    assert abs(alive - (1 - ours["dead"]["share"])) < 1.5 / dictionary.d_sae
    return f"{len(SAME_FORMULA)} numbers agree within {worst:.0e}"


def compared(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """SAEBench's number, in our units, and ours, by our name."""
    tokens = ours["evaluated"]["tokens"]
    return {
        our_name: (theirs[group][name] * (tokens if factor else 1), ours[our_name]["value"])
        for (group, name), (our_name, factor) in SAME_FORMULA.items()
    }


def check_core_bfloat16(dictionary: Any) -> str:
    """The same on few contexts, with model and dictionary in bfloat16, which SAEBench moves there itself."""
    halves, whole = (
        run_core({"topk": copy.deepcopy(dictionary)}, dtype, FEW_CONTEXTS, f"results/few-{dtype}")["topk"]
        for dtype in ("bfloat16", "float32")
    )
    pairs = [(halves[group][name], whole[group][name]) for group, name in SAME_FORMULA]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    assert worst < BFLOAT16_TOLERANCE, f"numbers differ by {worst:.2f}"
    return f"numbers within {worst:.3f} of float32's"


def check_probes(name: str, dictionary: Any) -> str:
    """sae-probes on its own data sets, and the codes it works with beside their definition in NumPy."""
    import numpy as np
    from sae_probes import run_sae_evals  # pyright: ignore[reportMissingImports]
    from sae_probes.generate_sae_activations import (  # pyright: ignore[reportMissingImports]
        generate_sae_activations_normal,
    )
    from sae_probes.utils_data import get_xy_traintest  # pyright: ignore[reportMissingImports]

    hook, cache, results = dictionary.cfg.hook_name, "results/model-activations", f"results/probes/{name}"
    shutil.rmtree(results, ignore_errors=True)
    run_sae_evals(
        sae=dictionary, model_name=MODEL, hook_name=hook, reg_type="l2", setting="normal", ks=[1, 16],
        results_path=results, model_cache_path=cache, datasets=DATA_SETS, device="cpu",
    )  # fmt: skip
    scores: dict[int, list[float]] = {1: [], 16: []}
    for file in Path(results).rglob("*.json"):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            scores[entry["k"]].append(entry["test_auc"])
    assert all(len(of_k) == len(DATA_SETS) for of_k in scores.values()), scores
    split = generate_sae_activations_normal(dictionary, DATA_SETS[0], hook, MODEL, "cpu", cache)
    raw, _, _, _ = get_xy_traintest(len(split.X_train), DATA_SETS[0], hook, MODEL, cache)
    expected = codes_by_definition(dictionary, raw.numpy())
    difference = np.abs(split.X_train.numpy() - expected)
    assert np.mean(difference > 1e-3) < 1e-5, (
        f"codes differ by up to {difference.max():.1e}"
    )  # a tie may fall otherwise
    return ", ".join(f"mean AUC of {k} latents {np.mean(of_k):.3f}" for k, of_k in scores.items())


def codes_by_definition(dictionary: Any, x: Any) -> Any:
    """f = act((x − b_dec) W_enc + b_enc) in float64, from the saved parameters alone."""
    import numpy as np

    weights = {name: parameter.detach().double().numpy() for name, parameter in dictionary.named_parameters()}
    product = (x.astype(np.float64) - weights["b_dec"]) @ weights["W_enc"]
    if dictionary.architecture == "gated":
        magnitude = product * np.exp(weights["r_mag"]) + weights["b_mag"]
        return np.maximum(magnitude, 0) * (product + weights["b_gate"] > 0)
    pre = product + weights["b_enc"]
    bound = weights.get("threshold", 0.0)
    if dictionary.architecture == "topk":
        bound = np.sort(pre, axis=1)[:, -dictionary.k - 1 : -dictionary.k]
    return np.maximum(pre, 0) * (pre > bound)


def check_probing_evaluation(dictionary: Any) -> str:
    """SAEBench's evaluation around sae-probes, with its baseline on the model's own activations."""
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import (  # pyright: ignore[reportMissingImports]
        SparseProbingSaeProbesEvalConfig,
    )
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval  # pyright: ignore[reportMissingImports]

    config = SparseProbingSaeProbesEvalConfig(
        model_name=MODEL, dataset_names=DATA_SETS[:2], reg_type="l2", ks=[1, 2, 5], include_llm_baseline=True,
        model_cache_path="results/model-activations", results_path="results/probing-artifacts",
    )  # fmt: skip
    result = run_eval(config, [("ours", dictionary)], "cpu", "results/probing", force_rerun=True)["ours_custom_sae"]
    assert set(result["sae_metrics_by_k"]) == {1, 2, 5}
    assert {detail["dataset_name"] for detail in result["eval_result_details"]} == set(DATA_SETS[:2])
    found, baseline = result["eval_result_metrics"]["sae"], result["eval_result_metrics"]["llm"]
    assert 0 < found["sae_top_5_test_auc"] <= 1 and 0 < baseline["llm_test_auc"] <= 1
    return f"AUC of 5 latents {found['sae_top_5_test_auc']:.3f}, of the dense baseline {baseline['llm_test_auc']:.3f}"


# Fixtures of SAEBench's tests, with a dictionary of ours in the place of a SAELens SAE from the hub.
CONFTEST = """
import pytest, sae
from transformer_lens import HookedTransformer

@pytest.fixture
def gpt2_model():
    return HookedTransformer.from_pretrained("gpt2", device="cpu")

@pytest.fixture
def gpt2_l4_sae():
    dictionary = sae.load("sweep/topk")
    dictionary.cfg.model_name = "gpt2"
    return dictionary
"""


def saebench_tests(folder: Path) -> list[Row]:
    """SAEBench's own unit tests, each a row."""
    own = Path("results/saebench-tests")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("conftest.py", "__pycache__"))
    (own / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (own / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # or it would find this project's
    command = [
        "-m",
        "pytest",
        "-q",
        "--continue-on-collection-errors",
        "--import-mode=importlib",
        f"-c={own}/pytest.ini",
        f"--junitxml={own}/junit.xml",
    ]
    run = subprocess.run([sys.executable, *command, str(own)], check=False, capture_output=True, text=True)
    report = own / "junit.xml"
    if not report.is_file():
        return [Row("SAEBench's unit tests", str(folder), run.stdout[-200:] + run.stderr[-200:], False)]
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((case.find(tag) for tag in ("failure", "error", "skipped") if case.find(tag) is not None), None)
        message = "" if bad is None else " ".join((bad.get("message") or "").split())[:200]
        name = f"{(case.get('classname') or '').lstrip('.')}.{case.get('name')}"
        rows.append(Row("SAEBench's unit test", name, message, bad is None))
    return rows


def numbers(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> list[str]:
    """Both sides' numbers, as a table in Markdown."""
    lines = ["| | SAEBench | here | |", "|---|--:|--:|---|"]
    for name, metrics in theirs.items():
        pairs = compared(metrics, ours[name])
        lines += [f"| {name}: {key} | {a:.5f} | {b:.5f} | same formula |" for key, (a, b) in pairs.items()]
        for (group, their_name), our_name in OTHER_FORMULA.items():
            a, b = metrics[group][their_name], ours[name][our_name]["value"]
            lines.append(f"| {name}: {their_name}, {our_name} | {a:.5f} | {b:.5f} | other formula |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/conformance_prepare.py filled")
    parser.add_argument("--tests", type=Path, help="tests/unit of a checkout of SAEBench, to run as well")
    arguments = parser.parse_args()
    tests = arguments.tests.resolve() if arguments.tests else None
    os.chdir(arguments.folder)
    os.environ |= {"HF_HOME": str(Path("hub").resolve()), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    import sae

    dictionaries = {
        path.parent.parent.name: sae.load(path.parent)
        for path in sorted(Path("sweep").glob("*/dictionary/config.json"))
    }
    ours = {name: json.loads(Path("sweep", name, "eval.json").read_text(encoding="utf-8")) for name in dictionaries}
    for dictionary in dictionaries.values():
        dictionary.cfg.model_name = MODEL
    rows = [attempt("custom-SAE checks", name, lambda d=d: check_custom_sae(d)) for name, d in dictionaries.items()]
    theirs = run_core(dictionaries, "float32", CONTEXTS, CORE)
    rows += [
        attempt("core evaluation", name, lambda name=name, d=d: check_core(name, theirs[name], ours[name], d))
        for name, d in dictionaries.items()
    ]
    rows.append(attempt("core, bfloat16", "topk", lambda: check_core_bfloat16(dictionaries["topk"])))
    rows += [
        attempt("sae-probes", name, lambda name=name, d=d: check_probes(name, d)) for name, d in dictionaries.items()
    ]
    rows.append(attempt("sae-probes in SAEBench", "topk", lambda: check_probing_evaluation(dictionaries["topk"])))
    rows += saebench_tests(tests) if tests else []

    table = [
        ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "",
        "| | check | of | outcome |",
        "|---|---|---|---|",
    ]
    text = "\n".join([*table, *map(str, rows), "", *numbers(theirs, ours), ""])
    Path("conformance.md").write_text(text, encoding="utf-8")
    print(text)
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} checks passed; the table is in {Path('conformance.md').resolve()}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
