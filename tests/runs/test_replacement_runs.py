"""`sae replace` on sweeps, runs and converted sets: what is read, written, kept, resumed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sae
from sae.dictionary.frame import Frame
from sae.errors import ConfigError
from sae.evaluation.replacement import MARKDOWN_FILE, REPLACEMENT
from sae.runs import replacement
from sae.runs.folder import configured
from sae.runs.replacement import replace
from sae.runs.run import Run
from sae.runs.sweeping import SWEEP, sweep
from tests.conftest import Command, assert_refused, make_tiny_config

BLOCKS = range(3)
WORDS = (
    "data.tokens=1000", "data.held_out_tokens=200", "data.context_length=16", "harvest.dtype=float32", "device=cpu",
)  # fmt: skip
FEW = ("evaluation.downstream_tokens=64",)


def reads_of(block: int) -> str:
    return f"blocks.{block}.mlp.hook_in"


def gives_of(block: int) -> str:
    return f"blocks.{block}.hook_mlp_out"


@pytest.fixture(scope="module")
def made(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a sweep's, with a transcoder of every block, which is trained and given a skip. Read only."""
    folder = tmp_path_factory.mktemp("replaced") / "sweep"
    hooks = [hook for block in BLOCKS for hook in (reads_of(block), gives_of(block))]
    common = {"harvest.hooks": hooks, "train.tokens": 640, "evaluation.downstream_tokens": 96}
    cache = str(folder / "activations")
    Run(make_tiny_config(tiny_model, text_folder, folder, {**common, "dictionary.reads": hooks[0]})).harvest()
    for block in BLOCKS:
        sides = {"dictionary.reads": reads_of(block), "dictionary.gives": gives_of(block), "harvest.cache": cache}
        run = Run(make_tiny_config(tiny_model, text_folder, folder / f"b{block}", {**common, **sides}))
        dictionary = run.train()
        weights = {name: weight.clone() for name, weight in dictionary.named_parameters()}
        dictionary.set_frame(Frame(skip=True, d_out=32))
        generator = torch.Generator().manual_seed(block)
        weights["W_skip"] = 0.1 * torch.randn(32, 32, generator=generator)
        dictionary.load_state_dict(weights)
        dictionary.save(run.folder / "dictionary")
    record = {"points": {f"b{block}": {} for block in BLOCKS}, "failures": {}}
    SWEEP.write(folder, record)
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def circuit_tracer(dictionaries: Mapping[int, sae.Dictionary], folder: Path) -> Path:
    """The transcoders as circuit-tracer keeps a set."""
    folder.mkdir()
    points = "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (folder / "config.yaml").write_text(f"model_kind: transcoder_set\nmodel_name: tiny\n{points}", encoding="utf-8")
    for block, dictionary in dictionaries.items():
        assert dictionary.W_skip is not None and not dictionary.centre.any()
        tensors = {
            "W_enc": dictionary.W_enc.T, "b_enc": dictionary.b_enc, "W_dec": dictionary.W_dec,
            "b_dec": dictionary.b_dec, "W_skip": dictionary.W_skip.T,
        }  # fmt: skip
        contents = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contents, folder / f"layer_{block}.safetensors")
    return folder


def test_a_sweeps_folder_gets_the_result(own: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("replace", own)
    assert done.status == 0, done.err
    assert f"replacement.md and replacement.json in {own}" in " ".join(done.out.split())
    for text in ("All modules replaced together", "One module replaced at a time", "best affine map", gives_of(1)):
        assert text in done.out
    record = json.loads((own / REPLACEMENT.index).read_bytes())
    assert [module["transcoder"] for module in record["modules"]] == ["b0", "b1", "b2"]
    assert (own / MARKDOWN_FILE).read_text(encoding="utf-8").startswith("# 3 modules replaced of")
    assert not (own / "replacement-unfinished").exists()

    run = Run.open(own / "b0")
    dictionaries = {f"b{block}": Run.open(own / f"b{block}").dictionary() for block in BLOCKS}
    direct = sae.measure_replacement(
        dictionaries, run.cache(), run.language_model, settings=run.config.evaluation
    )  # fmt: skip
    assert json.loads(json.dumps(direct.to_json()["together"])) == record["together"]

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it is measured again")

    monkeypatch.setattr(replacement, "measure_replacement", measured)
    again = command("replace", own)
    assert again.status == 0 and again.out == done.out
    assert "it is measured again" in command("replace", own, "evaluation.downstream_tokens=48").err


def test_several_runs_and_a_folder_for_the_result(made: Path, tmp_path: Path, command: Command) -> None:
    two = command("replace", made / "b2", made / "b0", *FEW)
    assert two.status == 0, two.err
    assert "replacement.json" not in two.out
    written = command("replace", made / "b2", made / "b0", "--out", tmp_path / "out", *FEW)
    assert written.out.startswith(two.out.rstrip("\n"))
    record = json.loads((tmp_path / "out" / REPLACEMENT.index).read_bytes())
    assert [module["gives"] for module in record["modules"]] == [gives_of(0), gives_of(2)]
    assert not list(made.glob("**/replacement*"))
    report = replace([made / "b2", made / "b0"], overrides=FEW)
    assert json.loads(json.dumps(report.to_json()["modules"])) == record["modules"]


def test_a_converted_set(made: Path, tiny_model: Path, text_folder: Path, tmp_path: Path, command: Command) -> None:
    dictionaries = {block: sae.load(made / f"b{block}") for block in BLOCKS}
    folder = circuit_tracer(dictionaries, tmp_path / "set")
    done = command("replace", folder, "--on", made / "b0", "--out", tmp_path / "out", *FEW)
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / REPLACEMENT.index).read_bytes())
    assert [(module["reads"], module["gives"]) for module in record["modules"]] == [
        (reads_of(block), gives_of(block)) for block in BLOCKS
    ]
    relus: dict[str, sae.Dictionary] = {}
    for block, dictionary in dictionaries.items():  # circuit-tracer has no k
        relus[f"b{block}"] = sae.ReLU(32, dictionary.d_sae, metadata=dictionary.metadata)
        relus[f"b{block}"].set_frame(dictionary.frame)
        relus[f"b{block}"].load_state_dict(dictionary.state_dict())
    run = Run.open(made / "b0", FEW)
    runs = sae.measure_replacement(
        relus, run.cache(), run.language_model, settings=run.config.evaluation
    ).to_json()  # fmt: skip
    for converted, own in ((record, runs), *zip(record["modules"], runs["modules"], strict=True)):
        for kind, losses in own["together" if own is runs else "losses"].items():
            for name, estimate in losses.items():
                found = converted["together" if own is runs else "losses"][kind][name]["value"]
                assert found == pytest.approx(estimate["value"], rel=1e-5, abs=1e-6), (kind, name)
    own_texts = command(
        "replace", folder, "--model", tiny_model, "--data", text_folder, *WORDS, *FEW, f"out={tmp_path / 'run'}"
    )
    assert own_texts.status == 0, own_texts.err
    assert not list(folder.glob("replacement*")), "nothing is written into a set of another toolkit"
    assert_refused(command("replace", folder), "none is a run folder", "name a run with --on RUN")


def test_an_interruption_and_the_same_command_again(
    own: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = replace(own, out=own.parent / "whole").to_json()
    monkeypatch.setattr("sae.evaluation.partial.EVERY", 0.0)
    original, passes = replacement.measure_replacement, []

    def interrupted(*given: Any, **options: Any) -> Any:
        def stopping(stage: str, done: int, total: int) -> None:
            passes.append((stage, done))
            if stage.endswith("language model") and done > total // 2:
                raise KeyboardInterrupt

        return original(*given, **{**options, "progress": stopping})

    monkeypatch.setattr(replacement, "measure_replacement", interrupted)
    stopped = command("replace", own)
    assert (stopped.status, stopped.err.strip()) == (130, "interrupted; run the same command again to continue")
    assert not (own / REPLACEMENT.index).exists()
    assert list((own / "replacement-unfinished").rglob("*.safetensors"))
    monkeypatch.setattr(replacement, "measure_replacement", original)
    continued: list[int] = []
    report = replace(own, progress=lambda stage, done, _: continued.append(done) if "language" in stage else None)
    assert continued[0] == passes[-1][1]
    for part in ("ce_clean", "together", "modules"):
        assert report.to_json()[part] == expected[part]
    assert not (own / "replacement-unfinished").exists()


def test_damaged_and_stale_results(own: Path, command: Command) -> None:
    assert command("replace", own, *FEW).status == 0
    path = own / REPLACEMENT.index
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_refused(command("replace", own, *FEW), REPLACEMENT.index)
    path.unlink()
    dictionary = sae.load(own / "b1")
    dictionary.W_dec.mul_(1.5)
    dictionary.save(own / "b1" / "dictionary")
    assert command("replace", own, *FEW).status == 0
    assert json.loads(path.read_bytes())["modules"][1] != json.loads(content)["modules"][1]
    assert json.loads(path.read_bytes())["modules"][0] == json.loads(content)["modules"][0]


def test_refusals(made: Path, tiny_model: Path, text_folder: Path, tmp_path: Path, command: Command) -> None:
    assert_refused(command("replace", made / "b0", made / "b0"), "is named twice")
    assert_refused(command("replace", tmp_path / "nowhere"), "nowhere")
    missing = command("replace", made / "b0", "dictionary.k=3")
    assert_refused(missing, "evaluation does not read dictionary.k")
    assert command("replace", "evaluation.tokens=3").status == 2
    both = command("replace", made / "b0", "--on", made / "b1", "--data", text_folder, *WORDS)
    assert_refused(both, "--on names the run that supplies texts and model")
    run = Run(make_tiny_config(tiny_model, text_folder, tmp_path / "plain", {"train.tokens": 640}))
    run.harvest()
    run.train()
    autoencoder = command("replace", made / "b0", run.folder)
    assert_refused(autoencoder, "plain: reads and gives 'blocks.1.hook_resid_pre', so it is an autoencoder", "leave it")
    with pytest.raises(ConfigError, match="there is no transcoder to replace a module with"):
        replace([])
    with pytest.raises(ConfigError, match=r"downstream_tokens=8: none of the chosen contexts has a token"):
        replace(made, out=tmp_path / "out", overrides=["evaluation.downstream_tokens=8"])


class Shown:
    """Progress that keeps what is announced."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def beside(self, stage: str, text: str) -> None: ...

    def announce(self, text: str) -> None:
        self.lines.append(text)


def test_a_sweeps_own_record_says_which_runs_are_its(
    own: Path, tiny_model: Path, text_folder: Path, command: Command
) -> None:
    """Not those that an older sweep left; one that failed is named, and one that is missing is refused."""
    record = {"points": {"b0": {}, "b2": {}}, "failures": {"b1": "step 3: the loss is not a number"}}
    SWEEP.write(own, record)
    shown = Shown()
    report = replace(own, overrides=FEW, progress=shown)
    assert [module.transcoder for module in report.modules] == ["b0", "b2"]
    assert any("1 failed and replace nothing (b1: step 3: the loss is not a number)" in line for line in shown.lines)
    SWEEP.write(own, {"points": {"b0": {}, "b9": {}}, "failures": {}})
    assert_refused(command("replace", own, *FEW), "b9 of its sweep.json have no dictionary", "sae sweep")
    SWEEP.write(own, {})
    assert_refused(command("replace", own, *FEW), "sweep.json", "damaged")
    (own / "sweep.json").unlink()
    with configured(make_tiny_config(tiny_model, text_folder, own, {"sweep": {"seed": [0, 1]}})):
        pass
    assert_refused(command("replace", own, *FEW), "not finished", "run the same 'sae sweep' again")


def test_a_sweep_with_two_transcoders_for_a_module(
    tiny_model: Path, text_folder: Path, tmp_path: Path, command: Command
) -> None:
    config = make_tiny_config(
        tiny_model, text_folder, tmp_path / "swept",
        {
            "harvest.hooks": [reads_of(1), gives_of(1)], "dictionary.reads": reads_of(1),
            "dictionary.gives": gives_of(1), "train.tokens": 640, "sweep": {"dictionary": {"k": [2, 4]}},
            "evaluation.tokens": 64,
        },
    )  # fmt: skip
    folder = sweep(config).folder
    refused = command("replace", folder)
    assert_refused(refused, f"k2 and k4 both give '{gives_of(1)}': only one can take its place; name one transcoder")
    one = command("replace", folder / "k2", *FEW)
    assert one.status == 0, one.err
    assert f"{reads_of(1)} → {gives_of(1)} replaced" in " ".join(one.out.split())
    assert f"replacement.json in {folder / 'k2'}" in " ".join(one.out.split())
