"""Neuronpedia's files for bulk import: a folder per model and dictionary, with a line of JSON per row of its tables.

The layout is that of hijohnnylin/neuronpedia (commit ebb8426f): `apps/webapp/lib/db/import.ts` reads it, and
`apps/webapp/prisma/schema.prisma` defines the tables.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sae.features.feature import Feature
from sae.files.writing import write_bytes
from sae.viewer.dashboard import Dashboard, Shown, short
from sae.viewer.names import Names

TITLE = "Neuronpedia"
CREATOR = "clkht01d40000jv08hvalcvly"
"""Id of the user that owns imported rows: the one that Neuronpedia's own tools use, and that a fresh database has."""
_AT_ONCE = 256
"""Features in a file."""
_MOST_FILES = 1000
"""Files of a folder that the import lists."""
_PUBLIC = {"creatorId": CREATOR, "visibility": "PUBLIC"}


def write(folder: Path, dashboard: Dashboard, indices: Sequence[int], names: Names) -> list[str]:
    """Write `MODEL/LAYER-SET/` with features and activations, and the rows that they refer to.

    Args:
        folder: it stands for the root of the bucket that the import reads.
        dashboard: columns of the features, and where they are from.
        indices: which features.
        names: of model, set and creator.

    Returns:
        What the tables have a place for and the export does not know.
    """
    place = folder / names.model / names.source
    for name, row in _referred_to(dashboard, names).items():
        write_bytes(place / f"{name}.jsonl", database_json(row), hashed=False)
    at_once = max(_AT_ONCE, -(-len(indices) // _MOST_FILES))
    queue = iter(indices)
    for number, chosen in enumerate(iter(lambda: list(islice(queue, at_once)), [])):
        features, activations = [], []
        for feature in (dashboard.features[index] for index in chosen):
            features.append(database_json(_neuron(dashboard, feature, names)))
            activations += map(database_json, _activations(dashboard, feature, names))
        for table, lines in (("features", features), ("activations", activations)):
            if lines:  # without a first line, the import cannot find the columns
                content = gzip.compress(b"".join(lines), 6, mtime=0)
                write_bytes(place / table / f"batch-{number}.jsonl.gz", content, hashed=False)
    unknown = ["neuronsPerLayer and owner of the model"] + ["layers of the model"] * (
        "n_layers" not in dashboard.model_facts
    )
    return [f"{what}: not recorded" for what in unknown + ["dataset"] * (not dashboard.dataset)]


def database_json(row: Mapping[str, Any]) -> bytes:
    r"""A line of JSON that the import and PostgreSQL read.

    The import replaces the characters `\u0000` anywhere in a line by a space. In a token that has them as text they
    follow an escaped backslash, half of which it would take; so this backslash is written as `\u005c`.
    """
    text = json.dumps(row, separators=(",", ":"), allow_nan=False)
    return (re.sub(r"\\\\(?=(u0000)?)", lambda match: r"\u005c" if match[1] else match[0], text) + "\n").encode()


def _referred_to(dashboard: Dashboard, names: Names) -> dict[str, dict[str, Any]]:
    """Rows of the other tables, by the names of their files. What is left out has the database's default."""
    made_by = {"creatorName": names.creator, "urls": [], **_PUBLIC}
    model: dict[str, Any] = {"id": names.model, "displayNameShort": names.model, "displayName": names.model, **_PUBLIC}
    model |= {"layers": dashboard.model_facts.get("n_layers", 0), "neuronsPerLayer": 0, "owner": ""}
    if "d_model" in dashboard.model_facts:
        model["dimension"] = dashboard.model_facts["d_model"]
    source: dict[str, Any] = {"id": names.source, "modelId": names.model, "setName": names.set_name, **_PUBLIC}
    source |= {"hasDashboards": True, "num_prompts": dashboard.contexts}
    source["num_tokens_in_prompt"] = dashboard.features.info["context_length"]
    if dashboard.dataset:
        source["dataset"] = dashboard.dataset
    of_set = {"modelId": names.model, "name": names.set_name, "description": names.description, "hasDashboards": True}
    return {
        "release": {"name": names.set_name, "description": names.description, **made_by},
        "model": model,
        "sourceset": {**of_set, "releaseName": names.set_name, **made_by},
        "source": source,
    }


def _neuron(dashboard: Dashboard, feature: Feature, names: Names) -> dict[str, Any]:
    """A row of the table Neuron. Every row has the same columns: the import takes them from the first."""
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(feature.index),
        "sourceSetName": names.set_name,
        "creatorId": CREATOR,
        "maxActApprox": short(feature.max),
        "hasVector": False,
        "vector": [],
        "hookName": dashboard.output_hook,
        # the page shows value j + 1 next to neighbour j: the feature itself is expected first
        "topkCosSimIndices": [feature.index, *(near.feature for near in feature.neighbours)],
        "topkCosSimValues": [1.0, *(short(near.cosine) for near in feature.neighbours)],
        **dashboard.columns(feature),
    }


def _activations(dashboard: Dashboard, feature: Feature, names: Names) -> Iterator[dict[str, Any]]:
    """Rows of the table Activation."""
    for shown in dashboard.activations(feature):
        values = shown.values
        yield {
            "id": _identity(dashboard, feature, names, shown),
            "modelId": names.model,
            "layer": names.source,
            "index": str(feature.index),
            "tokens": shown.example.tokens,
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": shown.interval.low,
            "binMax": shown.interval.high,
            "binContains": shown.interval.contains,
            "qualifyingTokenIndex": shown.example.position,
            "creatorId": CREATOR,
        }


def _identity(dashboard: Dashboard, feature: Feature, names: Names, shown: Shown) -> str:
    """A key in the form of the others: the import drops a row whose key exists, so it depends on all that it is of."""
    info = dashboard.features.info
    of = (names.model, names.source, feature.index, shown.group, shown.example.row)
    facts = (*of, info["dictionary_sha256"], info["activations"])
    number = int.from_bytes(hashlib.sha256("\n".join(map(str, facts)).encode()).digest(), "big")
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "c" + "".join(digits[number // 36**place % 36] for place in range(24))
