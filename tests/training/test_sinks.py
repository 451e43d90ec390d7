"""metrics.jsonl and wandb as places for the logged numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae.config.settings import DictionaryConfig, WandbConfig
from sae.errors import ConfigError
from sae.files.hashes import MissingWarning
from sae.files.writing import delete
from sae.training import IterableSource, train
from sae.training.sinks import JsonLines, Wandb, read_metrics
from tests.training.test_loop import D_SAE, K, planted, settings


def test_json_lines_drop_what_will_be_repeated(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path)
    for step in (10, 20, 30):
        sink.log({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    resumed = JsonLines(tmp_path, resume_step=20)
    resumed.log({"step": 30, "loss": 0.5})
    resumed.close()
    sink.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": 0.5},
    ]  # fmt: skip


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    JsonLines(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_log_that_is_gone_is_said(tmp_path: Path) -> None:
    """One that was never written, or that was deleted with its line in the list, is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metrics(tmp_path / "metrics.jsonl") == []
    sink = JsonLines(tmp_path)
    sink.log({"step": 10, "loss": 0.1})
    sink.close()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(MissingWarning, match=r"metrics.jsonl': missing, though SHA256SUMS lists it; the earlier"):
        assert read_metrics(tmp_path / "metrics.jsonl") == []
    delete(tmp_path / "metrics.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metrics(tmp_path / "metrics.jsonl") == []


def written_by_wandb(folder: Path) -> bytes:
    """The run's file, once wandb's own process, which writes it, has got to its end."""
    [log] = folder.rglob("*.wandb")
    size, until = -1, time.monotonic() + 60
    while time.monotonic() < until and (log.stat().st_size != size or size < 1000):
        size = log.stat().st_size
        time.sleep(0.5)
    return log.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_takes_the_numbers_offline(tmp_path: Path) -> None:
    """A real offline run; its file is read back with wandb's own reader."""
    sink = Wandb(
        WandbConfig(project="sae-tests", mode="offline"), tmp_path / "run", {"seed": 0, "dictionary": {"k": 4}}
    )
    sink.log({"step": 50, "fvu": 0.25})
    sink.log({"step": 100, "fvu": 0.125})
    sink.close()
    content = written_by_wandb(tmp_path / "run")
    assert b"fvu" in content
    assert b"0.125" in content
    assert b"sae-tests" in content


@pytest.fixture(autouse=True)
def in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wandb, "out_of_reach", False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A wandb that notes how its runs were opened and closed."""
    runs: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        runs.append(options)
        return SimpleNamespace(finish=options.update)

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=init, login=lambda **_: True, Settings=dict, Histogram=list)
    )
    return runs


def test_wandb_runs_are_one_only_where_training_goes_on(tmp_path: Path, wandb_runs: list[dict[str, Any]]) -> None:
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder, resume in ((a, False), (b, False), (a, True), (a, False), (a, True), (b, True), (b / "new", True)):
        Wandb(WandbConfig(project="p"), folder, {"seed": 0}, resume=resume).close()
    a1, b1, a2, a3, a4, b2, new = (run["id"] for run in wandb_runs)
    assert a1 == a2
    assert a3 == a4
    assert b1 == b2
    assert len({a1, a3, b1, new}) == 4
    assert all(run["resume"] == "allow" for run in wandb_runs)


@pytest.mark.parametrize(("failed", "code"), [(False, 0), (True, 1)])
def test_wandb_is_told_of_a_failure(tmp_path: Path, wandb_runs: list[dict[str, Any]], failed: bool, code: int) -> None:
    Wandb(WandbConfig(project="p"), tmp_path, {}).close(failed)
    assert wandb_runs[0]["exit_code"] == code


class FakeWandb:
    """A wandb whose `init`, `log` and `finish` can fail, and that notes what it was asked."""

    Histogram, Settings = list, dict

    def __init__(self, logged_in: bool = True, init: Exception | None = None, log: Exception | None = None) -> None:
        self.logged_in, self.failure, self.log_failure = logged_in, init, log
        self.modes: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, *, mode: str, **_: Any) -> FakeWandb:
        self.modes.append(mode)
        if self.failure is not None and mode == "online":
            raise self.failure
        return self

    def log(self, line: dict[str, Any], step: int) -> None:
        if self.log_failure is not None:
            raise self.log_failure
        self.lines.append(line)

    def finish(self, exit_code: int) -> None: ...


def wandb_errors() -> list[Exception]:
    """What the real one raises where there is no server, no account, no time."""
    from wandb import errors

    return [
        errors.CommError("Run initialization has timed out after 90.0 sec."),
        errors.AuthenticationError("The API key you provided is invalid"),
        errors.UsageError("No API key configured. Use `wandb login` to log in."),
        errors.Error("unexpected\nlines"),
        ConnectionRefusedError("refused"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_wandb_out_of_reach_is_logged_offline(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = wandb_errors()[number]
    fake = FakeWandb(init=error)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.warns(UserWarning, match="training continues and is logged offline in") as caught:
        sink = Wandb(WandbConfig(project="p"), tmp_path / "run", {})
    [message] = [str(one.message) for one in caught]
    assert " ".join(str(error).split()) in message
    assert "wandb.mode=offline" in message
    assert "'wandb sync'" in message
    assert "\n" not in message
    sink.log({"step": 1, "loss": 2.0})
    sink.close()
    assert (fake.modes, fake.lines) == (["online", "offline"], [{"step": 1, "loss": 2.0}])
    Wandb(WandbConfig(project="p"), tmp_path / "next", {})  # of a sweep: neither waits nor warns again
    assert fake.modes == ["online", "offline", "offline"]


def test_nobody_logged_in_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(logged_in=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.warns(
        UserWarning, match=r"nobody is logged in: run 'wandb login', or set WANDB_API_KEY; training cont"
    ):
        Wandb(WandbConfig(project="p"), tmp_path / "run", {})
    assert fake.modes == ["offline"]


def test_the_environment_can_choose_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(logged_in=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Wandb(WandbConfig(project="p"), tmp_path / "run", {})
    assert fake.modes == ["offline"]


def test_a_wandb_that_fails_during_training_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(log=wandb_errors()[0])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = Wandb(WandbConfig(project="p"), tmp_path / "run", {})
    with pytest.warns(
        UserWarning, match=r"wandb: stopped \(Run init.*\); training continues, and metrics.jsonl has every"
    ):
        made = train(
            IterableSource(planted(20)), DictionaryConfig(d_sae=D_SAE, k=K), settings(20, log_every=10), sinks=[sink],
            folder=tmp_path / "run",
        )  # fmt: skip
    assert made.d_sae == D_SAE
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [10, 20]
    sink.close()


OUT_OF_REACH = """
import os, sys
from pathlib import Path
from sae.config.settings import WandbConfig
from sae.training import sinks
sinks._SECONDS_TO_CONNECT = 3
for name in ("a", "b"):
    sink = sinks.Wandb(WandbConfig(project="p"), Path(sys.argv[1]) / name, {"seed": 0})
    sink.log({"step": 50, "fvu": 0.25})
    sink.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("key", ["a" * 40, ""])
def test_the_real_wandb_without_a_server_or_an_account(key: str, tmp_path: Path) -> None:
    """Its server is a closed port of this machine, and nobody is logged in or somebody is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
        **({"WANDB_API_KEY": key} if key else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_REACH, str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training continues and is logged offline") == 1
    assert ("http://127.0.0.1:9" if key else "nobody is logged in") in done.stderr
    for name in ("a", "b"):
        assert b"fvu" in written_by_wandb(tmp_path / name)


def test_wandb_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'sae\[wandb\]'"):
        Wandb(WandbConfig(project="p"), tmp_path, {"seed": 0})


def test_a_sink_that_asks_for_it_gets_numbers_of_features() -> None:
    """Densities are of the steps since the line before; cosines of the decoder as it stands."""

    class Taker:
        def __init__(self) -> None:
            self.taken: list[tuple[int, dict[str, torch.Tensor]]] = []

        def log(self, metrics: dict[str, float | int]) -> None: ...

        def log_features(self, step: int, values: dict[str, torch.Tensor]) -> None:
            self.taken.append((step, values))

        def close(self) -> None: ...

    taker, data = Taker(), planted(20)
    chosen = settings(20, lr=1e-12, log_every=10)
    made = train(IterableSource(data), DictionaryConfig(d_sae=D_SAE, k=K), chosen, sinks=[taker])
    assert [step for step, _ in taker.taken] == [10, 20]
    for (_, values), seen in zip(taker.taken, (data[:10], data[10:]), strict=True):
        density = (made.encode(torch.cat(seen)) > 0).double().mean(0)
        torch.testing.assert_close(values["log10_density"].double(), density[density > 0].log10(), atol=0.02, rtol=0)
        directions = torch.nn.functional.normalize(made.W_dec, dim=1)
        largest = (directions @ directions.T).fill_diagonal_(-1).amax(1)
        torch.testing.assert_close(values["decoder_cosine"], largest)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_takes_histograms_offline(tmp_path: Path) -> None:
    sink = Wandb(WandbConfig(project="sae-tests", mode="offline"), tmp_path / "run", {})
    sink.log({"step": 5, "loss": 1.0})
    sink.log_features(5, {"decoder_cosine": torch.linspace(-1, 1, 100), "log10_density": torch.zeros(0)})
    sink.close()
    content = written_by_wandb(tmp_path / "run")
    assert b"decoder_cosine" in content
    assert b"histogram" in content
    assert b"log10_density" not in content
