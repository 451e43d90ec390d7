"""Parts of a run folder that are each whole and do not belong together; who may train in it; whose word counts."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
import torch

import sae
from sae.architectures import TopK
from sae.config.file import load_config
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import CacheError, ConfigError, FormatError
from sae.files.writing import locked, write_bytes
from sae.runs.run import Run
from sae.runs.sweeping import sweep
from sae.runs.verification import verify
from sae.training import train
from sae.training.source import IterableSource
from tests.conftest import Command, TinyConfig, make_tiny_config

EVALUATION = ("eval.json", "eval.md", "eval-documents.safetensors")


@pytest.fixture(scope="module")
def runs(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two evaluated runs that differ in k. Read only."""
    folders = []
    for k in (4, 8):
        place = tmp_path_factory.mktemp(f"k{k}") / "run"
        run = Run(make_tiny_config(tiny_model, text_folder, place, {"dictionary.k": k}))
        run.harvest()
        run.train()
        run.evaluate()
        folders.append(run.folder)
    return folders[0], folders[1]


@pytest.fixture
def run(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


def replace(run: Path, other: Path, *names: str) -> None:
    """Parts of another run in place of this one's, with their hashes."""
    for name in names:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
            shutil.copytree(other / name, run / name)
        else:
            shutil.copy(other / name, run / name)


def test_a_dictionary_of_another_run_is_refused(run: Path, runs: tuple[Path, Path], command: Command) -> None:
    assert verify(run)[1] == []
    replace(run, runs[1], "dictionary")
    [problem] = verify(run)[1]
    assert "made with k=8, and its config.yaml has 4" in problem and "put back" in problem
    for verb in ("eval", "features", "effects"):
        outcome = command(verb, run)
        assert outcome.status == 1 and "made with k=8" in outcome.err
    with pytest.raises(FormatError, match="made with k=8"):
        Run.open(run)
    assert sae.load(run / "dictionary").config()["k"] == 8


def test_everything_but_the_dictionary_of_another_run(run: Path, runs: tuple[Path, Path]) -> None:
    replace(run, runs[1], *EVALUATION, "metrics.jsonl", "config.yaml", "SHA256SUMS")
    [problem] = verify(run)[1]
    assert "made with k=4, and its config.yaml has 8" in problem


def test_an_evaluation_of_another_dictionary_is_named(run: Path, runs: tuple[Path, Path]) -> None:
    for name in EVALUATION:
        write_bytes(run / name, (runs[1] / name).read_bytes())
    [problem] = verify(run)[1]
    assert "eval.json" in problem and "of a dictionary other than" in problem and "'sae eval' again" in problem


@pytest.mark.filterwarnings("always::sae.files.hashes.UnhashedWarning")
def test_files_without_a_hash_are_named(run: Path, command: Command) -> None:
    sums = (run / "SHA256SUMS").read_text().splitlines(keepends=True)
    (run / "SHA256SUMS").write_text("".join(line for line in sums if not line.endswith("  eval.md\n")))
    outcome = command("verify", run)
    assert outcome.status == 0
    assert "1 file has no hash in SHA256SUMS" in outcome.err and "eval.md" in outcome.err
    assert command("verify", run, "--record").status == 0
    assert "no hash" not in command("verify", run).err


def test_weights_and_configuration_of_two_dictionaries_are_no_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves them between the two files."""
    other = TopK(6, 12, k=4)
    torch.nn.init.normal_(other.W_dec)
    TopK(6, 12, k=2).save(tmp_path)

    def killed(path: Path, content: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sae.dictionary.base.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path)
    with pytest.raises(FormatError, match=r"weights.safetensors': its SHA-256 is not the one in config.json"):
        sae.load(tmp_path)
    assert len(verify(tmp_path)[1]) == 1
    other.save(tmp_path)
    assert sae.load(tmp_path).config()["k"] == 4 and verify(tmp_path)[1] == []


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
def test_a_dictionary_saved_by_an_older_version_is_loaded(tmp_path: Path) -> None:
    saved = TopK(6, 12, k=2)
    saved.save(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["weights_file_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(sae.load(tmp_path).W_dec, saved.W_dec)


def _train_in(folder: Path) -> None:
    source = IterableSource(list(torch.randn(40, 16, 6)))
    train(source, DictionaryConfig(d_sae=12, k=2), TrainConfig(tokens=160, batch_size=16), folder=folder)


def _hold(folder: Path, is_held: object, may_go: object) -> None:
    with locked(folder, "training"):
        is_held.set()  # pyright: ignore[reportAttributeAccessIssue]
        may_go.wait(60)  # pyright: ignore[reportAttributeAccessIssue]


def test_one_trains_in_a_folder(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """Another process holds it: Python's `train`, a run and a member of a sweep are refused, and nothing is written."""
    config = tiny_config(sweep={"dictionary": {"k": [2, 3]}})
    Run(config).harvest()
    alone = tiny_config(harvest__cache=str(config.cache_folder), out=str(tmp_path / "alone"))
    context = multiprocessing.get_context("fork")
    for folder, act in (
        (tmp_path / "python", lambda: _train_in(tmp_path / "python")),
        (alone.folder, lambda: Run(alone).train()),
        (config.folder / "k3", lambda: sweep(config)),
    ):
        is_held, may_go = context.Event(), context.Event()
        holder = context.Process(target=_hold, args=(folder, is_held, may_go))
        holder.start()
        try:
            assert is_held.wait(60)
            with pytest.raises(CacheError, match="another training is writing it"):
                act()
        finally:
            may_go.set()
            holder.join()
        assert not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists()
        act()


def test_a_thread_locks_a_folder_twice_and_another_does_not(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path, "training"):
                pass
        except CacheError as error:
            refused.append(str(error))

    with locked(tmp_path, "training"):
        with locked(tmp_path, "training"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert len(refused) == 1 and "another training is writing it" in refused[0]


def test_the_record_of_a_run_folder_is_no_permission_where_it_is_named(run: Path, command: Command) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    sums = (run / "SHA256SUMS").read_text().splitlines(keepends=True)
    (run / "SHA256SUMS").write_text("".join(line for line in sums if not line.endswith("  config.yaml\n")))
    for verb in ("run", "harvest", "train"):
        outcome = command(verb, path, f"out={run.parent / 'elsewhere'}")
        assert outcome.status == 1 and "only a record" in outcome.err
    with pytest.raises(ConfigError, match="only a record"):
        load_config(path)
    assert load_config(path, ("model.trust_remote_code=true",)).model.trust_remote_code
    copied = run.parent / "mine.yaml"
    shutil.copy(path, copied)
    assert load_config(copied).model.trust_remote_code, "a file that somebody names is their word"


@pytest.mark.parametrize("d_sae", [10**12, 4 * 10**18])
def test_a_dictionary_beyond_all_memory_is_refused(d_sae: int, tiny_config: TinyConfig) -> None:
    config = tiny_config(dictionary__d_sae=d_sae)
    with pytest.raises(ConfigError, match=rf"dictionary.d_sae={d_sae}: with d_in=1 or more .* GB of memory: lower it"):
        Run(config).check()
    source = IterableSource(list(torch.randn(40, 16, 6)))
    with pytest.raises(ConfigError, match=rf"dictionary.d_sae={d_sae}: with d_in=6 its weights"):
        train(source, DictionaryConfig(d_sae=d_sae, k=2), TrainConfig(tokens=160, batch_size=16))


def test_a_number_that_no_feature_has(run: Path, command: Command) -> None:
    outcome = command("features", run, "9" * 5000)
    assert outcome.status == 2 and "neither a feature number" in outcome.err and len(outcome.err) < 1000
