"""Numbers that files of other toolkits state about their dictionaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.dictionary.published import Published
from tests.support import foreign_files as files


def published(place: Path) -> Published | None:
    return Published.of(sae.load(place).metadata)


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def test_names_of_folders(tmp_path: Path) -> None:
    assert published(files.gemma_scope().write(tmp_path)) == Published(71.0, None, "average_l0_71, the folder's name")
    qwen = published(files.qwen_scope().write(tmp_path))
    assert qwen == Published(float(files.K), None, "L0_3 in the repository's name")


def test_settings(tmp_path: Path) -> None:
    second = files.gemma_scope_2().write(tmp_path)
    assert published(second) is None
    change(second / "config.json", l0=40)
    assert published(second) == Published(40.0, None, "l0 in config.json")
    llama = files.llama_scope().write(tmp_path)
    assert published(llama) is None
    change(llama / "hyperparams.json", top_k=50)
    assert published(llama) == Published(50.0, None, "top_k of its training, in hyperparams.json")


def test_saelens_settings_and_frequencies(tmp_path: Path) -> None:
    place = files.saelens("standard").write(tmp_path)
    assert published(place) is None
    frequencies = torch.linspace(0, 0.5, files.D_SAE)
    files.save_tensors(place / "sparsity.safetensors", {"sparsity": (frequencies + 1e-10).log10()})
    found = published(place)
    assert found is not None and found.source == "frequencies in sparsity.safetensors"
    assert found.l0 == pytest.approx(0.25 * files.D_SAE, rel=1e-5)
    files.save_tensors(place / "sparsity.safetensors", {"sparsity": frequencies.log10()})  # one is −∞
    again = published(place)
    assert again is not None and again.l0 == pytest.approx(0.25 * files.D_SAE, rel=1e-5)
    files.save_tensors(place / "sparsity.safetensors", {"sparsity": frequencies[:3]})
    assert published(place) is None, "of another dictionary"
    settings = json.loads((place / "cfg.json").read_text(encoding="utf-8"))
    change(place / "cfg.json", metadata={**settings["metadata"], "l0": 62.5})
    assert published(place) == Published(62.5, None, "l0 in cfg.json")


@pytest.mark.parametrize(
    "record",
    [None, 3, [], {}, {"l0": "71"}, {"l0": True}, {"l0": float("nan")}, {"l0": 10**400}, {"source": "x"}],
)
def test_what_is_no_number_is_left_out(record: Any) -> None:
    assert Published.of({"published": record}) is None


def test_both_numbers_without_a_source() -> None:
    found = Published.of({"published": {"l0": 12, "variance_explained": 0.5, "source": 7}})
    assert found == Published(12.0, 0.5, "its metadata")
    assert found is not None and Published.of({"published": found.to_json()}) == found
