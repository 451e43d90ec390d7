"""sae-probes, by itself and inside SAEBench, on this package's dictionaries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

DATA_SETS = ["118_us_state_CA", "119_us_state_TX", "125_world_country_Italy"]
ACTIVATIONS = "results/model-activations"


def check_probes(name: str, dictionary: Any) -> str:
    """sae-probes on its own data sets, and the codes it works with beside their definition in NumPy."""
    from sae_probes import run_sae_evals  # pyright: ignore[reportMissingImports]

    model, hook, results = dictionary.cfg.model_name, dictionary.cfg.hook_name, f"results/probes/{name}"
    shutil.rmtree(results, ignore_errors=True)
    run_sae_evals(
        sae=dictionary, model_name=model, hook_name=hook, reg_type="l2", setting="normal", ks=[1, 16],
        results_path=results, model_cache_path=ACTIVATIONS, datasets=DATA_SETS, device="cpu",
    )  # fmt: skip
    scores: dict[int, list[float]] = {1: [], 16: []}
    for file in Path(results).rglob("*.json"):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            scores[entry["k"]].append(entry["test_auc"])
    assert all(len(of_k) == len(DATA_SETS) for of_k in scores.values()), scores
    one, sixteen = (f"{np.mean(scores[k]):.3f}" for k in (1, 16))
    return f"mean AUC of 1 latent {one}, of 16 {sixteen}; {compare_codes(dictionary)}"


def compare_codes(dictionary: Any) -> str:
    """What sae-probes encoded beside the definition: a value may differ only where a feature is at its edge."""
    from sae_probes.generate_sae_activations import (  # pyright: ignore[reportMissingImports]
        generate_sae_activations_normal,
    )
    from sae_probes.utils_data import get_xy_traintest  # pyright: ignore[reportMissingImports]

    model, hook = dictionary.cfg.model_name, dictionary.cfg.hook_name
    split = generate_sae_activations_normal(dictionary, DATA_SETS[0], hook, model, "cpu", ACTIVATIONS)
    raw, _, _, _ = get_xy_traintest(len(split.X_train), DATA_SETS[0], hook, model, ACTIVATIONS)
    difference = np.abs(split.X_train.numpy() - codes_by_definition(dictionary, raw.numpy()))
    other = int(np.sum(difference > 1e-3))
    assert other < 1e-5 * difference.size, f"{other} of {difference.size} codes differ, by up to {difference.max():.1e}"
    return f"{other} of {difference.size:,} codes differ"


def codes_by_definition(dictionary: Any, x: Any) -> Any:
    """f = act((x − b_dec) W_enc + b_enc) in float64, from the saved parameters alone."""
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
        model_name=dictionary.cfg.model_name, dataset_names=DATA_SETS[:2], reg_type="l2", ks=[1, 2, 5],
        include_llm_baseline=True, model_cache_path=ACTIVATIONS, results_path="results/probing-artifacts",
    )  # fmt: skip
    result = run_eval(config, [("ours", dictionary)], "cpu", "results/probing", force_rerun=True)["ours_custom_sae"]
    assert set(result["sae_metrics_by_k"]) == {1, 2, 5}
    assert {detail["dataset_name"] for detail in result["eval_result_details"]} == set(DATA_SETS[:2])
    found, baseline = result["eval_result_metrics"]["sae"], result["eval_result_metrics"]["llm"]
    assert 0 < found["sae_top_5_test_auc"] <= 1 and 0 < baseline["llm_test_auc"] <= 1
    return f"AUC of 5 latents {found['sae_top_5_test_auc']:.3f}, of the dense baseline {baseline['llm_test_auc']:.3f}"
