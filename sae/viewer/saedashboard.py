"""SAEDashboard's JSON: `batch-N.json` with the features, and the files with the settings and what was left out.

The layout is that of jbloomAus/SAEDashboard (commit db4839a): `sae_dashboard/neuronpedia/neuronpedia_dashboard.py`
defines the classes, `neuronpedia_runner.py` writes the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sae.features.feature import Feature
from sae.files.printable import json_text
from sae.files.writing import json_content, write_bytes
from sae.viewer.dashboard import Dashboard
from sae.viewer.names import Names

TITLE = "SAEDashboard"
_AT_ONCE = 128
"""Features in a file, as SAEDashboard's runner has them by default."""


def write(folder: Path, dashboard: Dashboard, indices: Sequence[int], names: Names) -> list[str]:
    """Write the files of one dictionary.

    Args:
        folder: where to write them.
        dashboard: columns of the features, and where they are from.
        indices: which features; the others are listed as skipped.
        names: of model, set and creator; the files have no place for the last.

    Returns:
        What the files have a place for and the export does not know.
    """
    of = {"model_id": names.model, "layer": names.layer, "sae_set": names.set_name}
    queue = iter(indices)
    for number, chosen in enumerate(iter(lambda: list(islice(queue, _AT_ONCE)), [])):
        features = [_feature(dashboard, dashboard.features[index]) for index in chosen]
        batch = {**of, "sae_id_suffix": None, "features": features}
        content = json_text(batch, separators=(",", ":"), allow_nan=False).encode()
        write_bytes(folder / f"batch-{number}.json", content, hashed=False)
    skipped = sorted(set(range(len(dashboard.features))) - set(indices))
    others = {"layer": str(names.layer), "log_sparsity": None, "skipped_indexes": skipped}
    write_bytes(folder / "skipped_indexes.json", json_content({**of, **others}), hashed=False)
    write_bytes(folder / "run_settings.json", json_content({**_settings(dashboard, names), **of}), hashed=False)
    return ["log_sparsity: features are not skipped by a threshold"] + ["dataset: not recorded"] * (
        not dashboard.dataset
    )


def _settings(dashboard: Dashboard, names: Names) -> dict[str, Any]:
    """The fields of SAEDashboard's `NeuronpediaRunnerConfig` that describe this store."""
    settings = dashboard.features.info["settings"]
    return {
        "sae_path": names.source,
        "outputs_dir": names.source,
        "np_set_name": names.set_name,
        "n_prompts_total": dashboard.contexts,
        "n_tokens_in_prompt": dashboard.features.info["context_length"],
        "n_features_at_a_time": _AT_ONCE,
        "n_quantiles": settings["quantiles"],
        "top_acts_group_size": settings.get("top"),
        "quantile_group_size": settings.get("per_quantile"),
    }


def _feature(dashboard: Dashboard, feature: Feature) -> dict[str, Any]:
    return {
        "feature_index": feature.index,
        **dashboard.columns(feature),
        "n_prompts_total": dashboard.contexts,
        "n_tokens_in_prompt": dashboard.features.info["context_length"],
        "dataset": dashboard.dataset,
        "activations": list(_activations(dashboard, feature)),
        "vector": [],
    }


def _activations(dashboard: Dashboard, feature: Feature) -> Iterator[dict[str, Any]]:
    for shown in dashboard.activations(feature):
        yield {
            "bin_min": shown.interval.low,
            "bin_max": shown.interval.high,
            "bin_contains": shown.interval.contains,
            "tokens": shown.example.tokens,
            "values": shown.values,
            "qualifying_token_index": shown.example.position,
        }
