"""Commands on the run of a transcoder: features fire at the hook point that it reads, and act at the one it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae
from sae.config.splits import TRAIN
from sae.probing.activations import LabelledActivations
from sae.probing.settings import ProbeConfig
from sae.runs import probes
from sae.runs.run import Run
from tests.conftest import Command, make_tiny_config

READS, GIVES = "blocks.1.mlp.hook_in", "blocks.2.hook_mlp_out"
TEXT = "the river and the stone"


@pytest.fixture(scope="module")
def folder(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trained transcoder and a feature store."""
    overrides = {
        "harvest.hooks": [READS, GIVES], "dictionary.reads": READS, "dictionary.gives": GIVES, "train.tokens": 1280,
        "features.tokens": 500, "device": "cpu", "evaluation.tokens": 64,
    }  # fmt: skip
    run = Run(make_tiny_config(tiny_model, text_folder, tmp_path_factory.mktemp("transcoder") / "run", overrides))
    run.harvest()
    run.train()
    run.features()
    return run.folder


def codes(dictionary: sae.Dictionary, x: Tensor) -> Tensor:
    """TopK's formula in plain PyTorch."""
    f = (x @ dictionary.W_enc + dictionary.b_enc).relu()
    return torch.where(f >= f.sort(-1).values[..., -4, None], f, 0)


def test_features_are_those_of_what_is_read(folder: Path, command: Command) -> None:
    dictionary, cache, store = sae.load(folder), sae.ActivationCache(folder), sae.Features(folder)
    rows, tokens = [], 0
    for batch in cache.contexts(TRAIN, READS, batch_contexts=1):
        if tokens + batch.tokens.numel() > 500:
            break
        tokens += batch.tokens.numel()
        assert batch.activations is not None
        rows.append(batch.activations[batch.eligible])
    expected = (codes(dictionary, torch.cat(rows)) > 0).double().mean(0)
    torch.testing.assert_close(store.summary().density.double(), expected, atol=1e-4, rtol=1e-3)
    assert store.info["hook"] == READS
    listed = command("features", folder, "--limit", 3)
    assert listed.status == 0, listed.err
    number = int(expected.argmax())
    assert command("features", folder, number).status == 0
    feature = store[number]
    assert feature.promoted is not None, "it writes into the residual stream"
    W_U = sae.LanguageModel(Run.open(folder).config.model).unembedding()
    assert feature.promoted[0].logit == pytest.approx(float((dictionary.W_dec[number] @ W_U).max()), rel=1e-4)


def test_features_of_a_text(folder: Path, tiny_model: Path, command: Command) -> None:
    model, dictionary = sae.LanguageModel(tiny_model), sae.load(folder)
    result = sae.text_features(dictionary, model, TEXT)
    x = model.activations(model.to_tokens(TEXT), READS)[READS][0]
    for token, fire in zip(result.tokens[1:], codes(dictionary, x)[1:], strict=True):
        assert {firing.feature for firing in token.firing} == set(fire.nonzero().flatten().tolist())
        for firing in token.firing:
            assert firing.activation == pytest.approx(float(fire[firing.feature]), rel=1e-4, abs=1e-5)
    assert result.hook == READS
    done = command("text", folder, TEXT)
    assert done.status == 0, done.err
    assert READS in " ".join(done.out.split())


def test_probes_are_on_what_is_read(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[LabelledActivations] = []
    original = probes.probe_examples

    def keep(dictionary: object, data: LabelledActivations, *others: object) -> object:
        seen.append(data)
        return original(dictionary, data, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(probes, "probe_examples", keep)
    texts = [f"the {word} number {number}" for number in range(40) for word in ("river", "stone")]
    rows = [f"{text},{number % 2}" for number, text in enumerate(texts)]
    (tmp_path / "set.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    sae.probe_run(folder, [tmp_path / "set.csv"], ProbeConfig(k=(1,), splits=1, pca=False))
    assert json.loads((folder / "probe.json").read_bytes())["subject"]["hook"] == READS
    model = sae.LanguageModel(tiny_model)
    known = torch.cat([model.activations(model.to_tokens(text), READS)[READS][0] for text in texts])
    [data] = seen
    nearest = (data.rows.float()[:, None] - known[None]).abs().amax(-1).amin(1)
    assert len(nearest) == 80 and float(nearest.max()) < 1e-5


def test_effects_are_on_what_is_given(folder: Path, command: Command) -> None:
    done = command("effects", folder, "--features", 4, "--positions", 2, "--null-positions", 1)
    assert done.status == 0, done.err
    assert f"{READS} → {GIVES}: features" in " ".join(done.out.split())
    record = json.loads((folder / "effects.json").read_bytes())
    assert (record["hook"], record["dictionary"]["reads"]) == (GIVES, READS)


def test_the_report_names_both(folder: Path, command: Command) -> None:
    done = command("eval", folder)
    assert done.status == 0, done.err
    assert f"{READS} → {GIVES}: " in " ".join(done.out.split())
    assert list(json.loads((folder / "eval.json").read_bytes())["baselines"]) == ["pca", "linear", "identity"]
    assert f"# Evaluation at `{READS} → {GIVES}`" in (folder / "eval.md").read_text(encoding="utf-8")
