"""Published dictionaries by their short names, from a hub on this machine: each is what its authors' formula says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from conformance_scopes_files import Case, cases, inputs, weights
from support.loopback_hub import loopback_hub
from torch import Tensor

ROWS = 40
CASES = {case.ours: case for case in cases()}
SEEDS = {name: seed for seed, name in enumerate(CASES)}

LOAD = """
import json, sys, torch, sae
given = torch.load(sys.argv[1], weights_only=True)
for number, (name, x) in enumerate(given.items()):
    d = sae.load(name)
    torch.save({"strengths": d.encode(x) * d.W_dec.norm(dim=-1), "x_hat": d(x)}, f"{number}.pt")
    origin = d.origin
    print(json.dumps([origin.reads.hook, origin.gives.hook, origin.models[""]["name"], d.metadata["hub"]]))
"""


def example(name: str) -> tuple[Case, dict[str, Tensor], Tensor]:
    """A dictionary, its weights in float64, and activations in the units of its files."""
    case, seed = CASES[name], SEEDS[name]
    w = weights(case, torch.float64, real=False, seed=seed)
    return case, w, inputs(case, w, ROWS, seed) / case.scale(w["W_enc"].shape[0])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[list[str | None], dict[str, Tensor]]]]:
    """Facts of each dictionary's origin, and what it makes of the activations, from a process with the hub."""
    folder = tmp_path_factory.mktemp("scopes")
    torch.save({name: example(name)[2] for name in CASES}, folder / "given.pt")
    files: dict[str, dict[str, bytes]] = {}
    for name in CASES:
        case, w, _ = example(name)
        files.setdefault(case.repository, {}).update(case.write(case, w))
    with loopback_hub() as hub:
        for repository, content in files.items():
            hub.add("models", repository, content)
        environment = {**os.environ, **hub.environment(folder / "hf"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, "given.pt"], capture_output=True, text=True, timeout=300, check=False,
            cwd=folder, env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(len(CASES))]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    yield dict(zip(CASES, zip(facts, outputs, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_published_dictionary_is_its_authors_formula(
    name: str, loaded: dict[str, tuple[list[str | None], dict[str, Tensor]]]
) -> None:
    case, w, x = example(name)
    (reads, gives, model, source), outputs = loaded[name]
    strengths, x_hat = case.formula(case, w, x)
    torch.testing.assert_close(outputs["strengths"], strengths, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs["x_hat"], x_hat, rtol=1e-9, atol=1e-12)
    assert torch.equal(outputs["strengths"] > 0, strengths > 0)
    assert 5 < float((strengths > 0).sum(-1).double().mean()) < w["W_enc"].shape[1] - 5, "too little or too much fires"
    assert (reads, gives) == ((*case.hooks, *case.hooks)[:2] if case.hooks else (None, None))
    assert (model, source["repository"]) == (case.model, case.repository)


def test_norms_of_decoder_rows_decide_what_fires_in_llama_scope() -> None:
    """Without them, which is SAELens's formula, other features fire: these weights tell the two apart."""
    [name] = [name for name, case in CASES.items() if "norms" in case.differs]
    case, w, x = example(name)
    strengths, _ = case.formula(case, w, x)
    plain = (x @ w["W_enc"] * case.average + w["b_enc"]) > 0.4
    assert 100 < int((plain != (strengths > 0)).sum()) < 1000
