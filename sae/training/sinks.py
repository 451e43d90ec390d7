"""Where logged numbers go: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sae.config.settings import WandbConfig
from sae.errors import ConfigError, DamagedError, TrainingError
from sae.files.damage import damaged
from sae.files.hashes import announce_missing, read_checked
from sae.files.reading import MOST_JSON_BYTES, as_object, parse_json
from sae.files.sums import record
from sae.files.writing import stands, write_bytes

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-id.txt"
ONLINE, OFFLINE = "online", "offline"
_SECONDS_TO_CONNECT = 30
_LONGEST_REASON = 200


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
    """One JSON object a line, null for what is not finite.

    Lines after `resume_step` belong to steps that will be repeated, and are dropped.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.path = folder / METRICS_FILE
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step] if resume_step else []
        write_bytes(self.path, "".join(map(_line, kept)).encode(), hashed=False)  # it grows
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainingError(self._explain(error)) from error

    def log(self, metrics: dict[str, float | int]) -> None:
        try:
            self._file.write(_line(metrics))
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

    It never asks and never ends a training: without a server or an account the run is logged offline, for `wandb sync`,
    and after a failure in between only to metrics.jsonl. A warning says so. `WANDB_MODE` counts, unless the mode is
    `offline` already.

    Args:
        settings: project, name, mode.
        folder: run folder; the wandb run's id is kept there.
        config: what is logged as the run's configuration.
        resume: go on with the wandb run whose id the folder has, because training goes on from a checkpoint.

    Raises:
        ConfigError: wandb is not installed.

    Attributes:
        out_of_reach: whether a server could not be reached in this process; then no other run waits for it.
    """

    out_of_reach: ClassVar[bool] = False

    def __init__(self, settings: WandbConfig, folder: Path, config: dict[str, Any], *, resume: bool = False) -> None:
        check_wandb(settings)
        import wandb

        self._histogram, self._run = wandb.Histogram, None
        options: dict[str, Any] = {
            "project": settings.project,
            "name": settings.name or folder.name,
            "id": _wandb_id(folder, resume),
            "resume": "allow",
            "reinit": "create_new",  # a sweep has one for each dictionary
            "dir": folder,
            "config": config,
            "settings": wandb.Settings(silent=True, init_timeout=_SECONDS_TO_CONNECT),
        }
        mode: Any = settings.mode if settings.mode == OFFLINE else os.environ.get("WANDB_MODE") or settings.mode
        mode = OFFLINE if mode == ONLINE and Wandb.out_of_reach else mode
        try:
            if mode == ONLINE and not wandb.login(prompt=False):
                raise ConfigError("nobody is logged in: run 'wandb login', or set WANDB_API_KEY")
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # of wandb or of the network: neither may end a training
            if mode != ONLINE:
                self._give_up("cannot begin a run", error)
                return
            Wandb.out_of_reach = True
            _warn(
                f"wandb: {_reason(error)}; training goes on and is logged offline in {str(folder / 'wandb')!r}, for "
                "'wandb sync'; wandb.mode=offline does so without trying"
            )
            try:
                options["id"] = _wandb_id(folder, resume=False)  # wandb takes the other for one in use
                self._run = wandb.init(mode=OFFLINE, **options)
            except Exception as offline_error:
                self._give_up("cannot begin a run offline either", offline_error)

    def log(self, metrics: dict[str, float | int]) -> None:
        self._send(lambda run: run.log(dict(metrics), step=int(metrics["step"])))

    def log_features(self, step: int, values: dict[str, Float[Tensor, " some"]]) -> None:
        """A histogram of each; none of what is empty."""
        histograms = {name: self._histogram(one.tolist()) for name, one in values.items() if len(one)}
        self._send(lambda run: run.log(histograms, step=step))

    def close(self, failed: bool = False) -> None:
        self._send(lambda run: run.finish(exit_code=int(failed)))

    def _send(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # as above
            self._give_up("stopped", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        _warn(f"wandb: {what} ({_reason(error)}); training goes on, and {METRICS_FILE} has every number")


def check_wandb(settings: WandbConfig) -> None:
    """Raise ConfigError where wandb is asked for and not installed."""
    if settings.project is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "wandb.project is set, and wandb is not installed: pip install 'sae[wandb]', or leave wandb.project out"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _wandb_id(folder: Path, resume: bool) -> str:
    path = folder / WANDB_ID_FILE
    if resume and stands(path):
        return read_checked(path, most=1000).decode("utf-8", "replace").strip()
    new = secrets.token_hex(8)
    write_bytes(path, f"{new}\n".encode())
    return new


def _line(metrics: dict[str, Any]) -> str:
    """JSON, in which what is not finite is null."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in metrics.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        DamagedError: another line is no JSON with a step, or the file of a finished training differs from its hash.
    """
    if not stands(path):
        announce_missing(path, "what it held of the training is left out")
        return []
    *lines, last = read_checked(path, most=MOST_JSON_BYTES, announce=False).split(b"\n")
    records = [_metrics(path, line) for line in lines if line.strip()]
    with contextlib.suppress(DamagedError):
        records += [_metrics(path, last)] if last.strip() else []
    return records


def _metrics(path: Path, line: bytes) -> dict[str, Any]:
    record = as_object(path, parse_json(path, line))
    if type(record.get("step")) is not int or any(
        value is not None and type(value) not in (int, float) for value in record.values()
    ):
        raise damaged(path, "damaged (a line without a step, or with something that is no number)")
    return record
