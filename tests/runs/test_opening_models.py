"""Dictionaries in other toolkits' files on tiny models of several families, texts and hook points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae
from sae.errors import ConfigError, ModelError
from sae.evaluation.published_formulas import SAELENS
from sae.runs.opening import open_run
from tests.support import foreign_files as files
from tests.support.quick import quick_for
from tests.support.tokenizer_kinds import make

FEW = (
    "data.tokens=960", "data.held_out_tokens=240", "data.context_length=24", "harvest.dtype=float32",
    "evaluation.frozen_decoder_tokens=0", "device=cpu",
)  # fmt: skip
UNUSUAL = (
    "Größe, naïve café, señor: Москва 東京タワー 한국어 العربية ∑ᵢ xᵢ² ≤ π/2 "
    "😀👍🏽 a\tb\r\n\u200b\u202eabc  \x07 e\u0301 <|endoftext|> <s> [UNK] `code` | pipe |\n"
)
"""Signs of many scripts, combining, invisible and control characters, and the names of special tokens."""


def family(name: str, folder: Path, vocabulary: int) -> Any:
    """A random model with 12 blocks and activations of 6 numbers, as the dictionaries of `foreign_files` take them."""
    import transformers

    shape: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=6, n_layer=12, n_head=3, n_positions=64, **shape)
        return transformers.GPT2LMHeadModel(config)
    shape |= {
        "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 12, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**shape, query_pre_attn_scalar=2, sliding_window=32)
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Callable[[str], Path]:
    """The folder of a tiny random model with a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("families")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())) + UNUSUAL
    kinds = {"gpt2": "gpt2", "llama": "llama3", "gemma": "qwen"}

    def made(name: str) -> Path:
        place = folder / name
        if not place.exists():
            tokenizer = make(kinds[name], text)
            tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|begin|>"})
            tokenizer.save_pretrained(place)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = family(name, place, len(tokenizer))
            model.config.bos_token_id = model.config.eos_token_id = tokenizer.bos_token_id
            model.save_pretrained(place)
        return place

    return made


QUICK = {"gpt2, SAELens", "llama, sparsify transcoder", "gemma, dictionary_learning"}
CASES: dict[str, tuple[str, files.Case]] = {
    "gpt2, SAELens": ("gpt2", files.saelens("jumprelu")),
    "gpt2, dictionary_learning": ("gpt2", files.dictionary_learning("GatedAutoEncoder")),
    "llama, sparsify": ("llama", files.sparsify()),
    "llama, sparsify transcoder": ("llama", files.sparsify("layers.3.mlp", transcode=True)),
    "gemma, dictionary_learning": ("gemma", files.dictionary_learning("BatchTopKSAE")),
    "gemma, sparsify": ("gemma", files.sparsify()),
    "gpt2, circuit-tracer": ("gpt2", files.circuit_tracer(jumprelu=True)),
    "gpt2, OpenAI": ("gpt2", files.openai()),
}


@pytest.mark.parametrize("name", quick_for(QUICK, CASES))
def test_reconstructions_are_those_of_the_toolkit(
    name: str, models: Callable[[str], Path], text_folder: Path, tmp_path: Path
) -> None:
    """FVU and L0 from the toolkit's own formula, written down in `foreign_files`, on the cached activations."""
    kind, case = CASES[name]
    place = case.write(tmp_path / "files")
    run = open_run(place, FEW, model=models(kind), data=text_folder, out=tmp_path / "run")
    known = case.metadata
    assert run.config.hook == known["hook"] and run.config.gives == (known.get("target") or known["hook"])
    if "processing" in known:
        assert run.config.model.weight_processing == (known["processing"] or "none")  # None: it does not matter
    report = run.evaluate()
    inputs, targets = (eligible(run.cache(), hook) for hook in (run.config.hook, run.config.gives))
    features, x_hat = case.forward(inputs)
    fvu = (targets - x_hat).square().sum() / (targets - targets.mean(0)).square().sum()
    l0 = (features != 0).sum(-1).double().mean()
    assert report.scores.reconstruction.fvu.value == pytest.approx(float(fvu), rel=1e-4)
    assert report.scores.sparsity is not None and report.scores.sparsity.l0.value == pytest.approx(float(l0), abs=0.01)
    assert report.scores.downstream is not None and report.scores.downstream.kl.value is not None
    store = run.features()
    assert store.summary().density.shape == (len(features[0]),)


def eligible(cache: sae.ActivationCache, hook: str) -> Tensor:
    rows = []
    for batch in cache.contexts("held_out", hook):
        assert batch.activations is not None
        rows.append(batch.activations[batch.eligible])
    return torch.cat(rows).double()


def test_unusual_texts(models: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("".join(f"{number} {UNUSUAL}" for number in range(400)), encoding="utf-8")
    place = files.saelens("topk").write(tmp_path / "files")
    run = open_run(place, (*FEW, "data.section_characters=200"), model=models("gpt2"), data=text, out=tmp_path / "run")
    report = run.evaluate()
    assert report.tokens > 150 and report.documents > 1
    assert "gpt2-small" in json.dumps(run.dictionary().metadata), "what its files say is kept"
    assert run.features().summary().density.max() > 0


@pytest.mark.parametrize("hook", ["blocks.2.attn.hook_z", "blocks.2.mlp.hook_post"])
def test_hook_points_inside_a_block(hook: str, tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    width = 32 if hook.endswith("z") else 128
    dictionary = random_dictionary(width, {"hook": hook})
    dictionary.save(tmp_path / "own")
    sae.convert(tmp_path / "own", tmp_path / "files", "saelens")
    run = open_run(tmp_path / "files", FEW, model=tiny_model, data=text_folder, out=tmp_path / "run")
    assert run.config.harvest.hooks == (hook,)
    report = run.evaluate()
    expected = sae.evaluate(dictionary, run.cache(), language_model=run.language_model, settings=run.config.evaluation)
    assert report.scores.reconstruction.fvu == expected.scores.reconstruction.fvu
    assert report.scores.downstream == expected.scores.downstream


def random_dictionary(width: int, metadata: dict[str, Any]) -> sae.Dictionary:
    generator = torch.Generator().manual_seed(3)
    dictionary = sae.ReLU(width, 48, metadata)
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.nn.functional.normalize(torch.randn(48, width, generator=generator), dim=-1))
        dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary.requires_grad_(False)


def test_a_transcoder_with_an_unknown_target(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    hooks = {"hook": "blocks.1.mlp.hook_in", "target_hook": "blocks.1.hook_mlp_out"}
    random_dictionary(32, hooks).save(tmp_path / "own")
    sae.convert(tmp_path / "own", tmp_path / "files", "saelens")
    path = tmp_path / "files" / "cfg.json"
    (path.parent / "SHA256SUMS").unlink()
    settings = json.loads(path.read_text())
    del settings["metadata"]["hook_name_out"]
    path.write_text(json.dumps(settings))
    options: dict[str, Any] = {"model": tiny_model, "data": text_folder, "out": tmp_path / "run"}
    with pytest.raises(ConfigError, match="give the hook point with --target"):
        open_run(tmp_path / "files", FEW, **options)
    with pytest.raises(ConfigError, match=r"comes before 'blocks.1.mlp.hook_in', which the transcoder reads"):
        open_run(tmp_path / "files", FEW, target="blocks.0.hook_mlp_out", **options)
    run = open_run(tmp_path / "files", FEW, target="blocks.1.hook_mlp_out", **options)
    assert run.config.harvest.hooks == tuple(hooks.values())
    report = run.evaluate()
    expected = sae.evaluate(sae.load(tmp_path / "own"), run.cache(), settings=run.config.evaluation)
    assert report.scores.reconstruction == expected.scores.reconstruction
    assert report.scores.downstream is not None and report.legacy is None


def test_another_model_is_refused_before_the_harvest(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    place = files.sparsify().write(tmp_path / "files")
    with pytest.raises(ModelError, match=r"hook 'blocks.10.hook_resid_post': tiny has blocks 0 to 2"):
        open_run(place, FEW, model=tiny_model, data=text_folder, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_numbers_stand_next_to_ours(
    models: Callable[[str], Path], text_folder: Path, tmp_path: Path, command: Any
) -> None:
    place = files.sparsify().write(tmp_path / "files")
    published = {"l0": 71, "variance_explained": 0.83, "source": "the release table"}
    dictionary = sae.load(place)
    dictionary.metadata["published"] = published
    dictionary.save(tmp_path / "released")
    folder = tmp_path / "run"
    status, out, err = command(
        "eval", tmp_path / "released", "--model", models("llama"), "--data", text_folder, "--out", folder, *FEW
    )  # fmt: skip
    assert status == 0, err
    record = json.loads((folder / "eval.json").read_bytes())
    assert record["published"] == {"l0": 71.0, "variance_explained": 0.83, "source": "the release table"}
    formulas = record["legacy"]["formulas"][SAELENS]
    assert formulas["l0"] == files.K, "TopK fires k features on every token"
    here = f"l0 71, here 3 by {SAELENS}'s l0; variance_explained 0.83, here {formulas['explained_variance']:.5g} by"
    shown = " ".join(out.split())
    assert f"published, not ours (the release table): {here}" in shown
    page = (folder / "eval.md").read_text(encoding="utf-8")
    row = f"| `l0` | 71 | 3 (`l0`) | {record['l0']['value']:.0f} ± 0 (`l0`) |"
    assert row in page and "The first column is not ours: the release table" in page
    compared = command("compare", folder, place, "evaluation.legacy_tokens=24")
    assert compared.status == 0, compared.err
    assert "published, not ours: run: l0 71, variance_explained 0.83 (the release table)" in " ".join(
        compared.out.split()
    )
