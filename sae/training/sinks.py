"""Where logged numbers go: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import contextlib
import json
import secrets
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sae.config import WandbConfig
from sae.errors import ConfigError, DamagedError, TrainingError
from sae.files import stands, write_bytes
from sae.hashes import damaged, read_checked, record
from sae.reading import MOST_JSON_BYTES, as_object, parse_json

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-id.txt"


@runtime_checkable
class Sink(Protocol):
    """Takes a line of numbers every `train.log_every` steps."""

    def log(self, metrics: dict[str, float | int]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class FeatureSink(Sink, Protocol):
    """A sink that also takes numbers of many features, by what they are."""

    def log_features(self, step: int, values: dict[str, Float[Tensor, " some"]]) -> None: ...


class JsonLines:
    """One JSON object a line. Lines after `resume_step` belong to steps that will be repeated, and are dropped."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.path = folder / METRICS_FILE
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step] if resume_step else []
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode(), hashed=False)  # it grows
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainingError(self._explain(error)) from error

    def log(self, metrics: dict[str, float | int]) -> None:
        try:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(self._explain(error)) from error

    def close(self) -> None:
        """What could not be written is lost; the hash is that of what was."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            record(self.path)

    def _explain(self, error: OSError) -> str:
        return (
            f"cannot write {str(self.path)!r}: {error.strerror}; training stops at the last checkpoint: "
            "free some space and run the same command again"
        )


class Wandb:
    """A Weights & Biases run; the configuration is logged with it.

    Args:
        settings: project, name, mode.
        folder: run folder; the wandb run's id is kept there.
        config: what is logged as the run's configuration.
        resume: go on with the wandb run whose id the folder has, because training goes on from a checkpoint.
    """

    def __init__(self, settings: WandbConfig, folder: Path, config: dict[str, Any], *, resume: bool = False) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb.project is set, and wandb is not installed: pip install 'sae[wandb]'") from error
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=settings.project,
            name=settings.name or folder.name,
            id=_wandb_id(folder, resume),
            resume="allow",
            reinit="create_new",  # a sweep has one for each dictionary
            dir=folder,
            mode=settings.mode,
            config=config,
            settings=wandb.Settings(silent=True),
        )

    def log(self, metrics: dict[str, float | int]) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def log_features(self, step: int, values: dict[str, Float[Tensor, " some"]]) -> None:
        """A histogram of each; none of what is empty."""
        histograms = {name: self._histogram(one.tolist()) for name, one in values.items() if len(one)}
        self._run.log(histograms, step=step)

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(folder: Path, resume: bool) -> str:
    path = folder / WANDB_ID_FILE
    if resume and stands(path):
        return read_checked(path, most=1000).decode("utf-8", "replace").strip()
    new = secrets.token_hex(8)
    write_bytes(path, f"{new}\n".encode())
    return new


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        DamagedError: another line is no JSON with a step, or the file of a finished training differs from its hash.
    """
    if not stands(path):
        return []
    *lines, last = read_checked(path, most=MOST_JSON_BYTES, announce=False).split(b"\n")
    records = [_metrics(path, line) for line in lines if line.strip()]
    with contextlib.suppress(DamagedError):
        records += [_metrics(path, last)] if last.strip() else []
    return records


def _metrics(path: Path, line: bytes) -> dict[str, Any]:
    record = as_object(path, parse_json(path, line))
    if type(record.get("step")) is not int or any(type(value) not in (int, float) for value in record.values()):
        raise damaged(path, "damaged (a line without a step, or with something that is no number)")
    return record
