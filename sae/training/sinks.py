"""Sinks for logged numbers: metrics.jsonl always, Weights & Biases if configured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    """A sink that also takes values per feature, by metric name."""

    def log_features(self, step: int, values: dict[str, Float[Tensor, " some"]]) -> None: ...


class JsonLines:
    """Writes one JSON object per line, with null for numbers that are not finite.

    Lines after `resume_step` belong to steps that will be repeated, and are dropped.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.path = folder / METRICS_FILE
        lines = [line for line in read_metrics(self.path) if line["step"] <= resume_step] if resume_step else []
        write_bytes(self.path, "".join(map(_line, lines)).encode(), hashed=False)  # it grows
        try:
            self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a line at a time
        except OSError as error:
            raise TrainingError(self._explain(error)) from error

    def log(self, metrics: dict[str, float | int]) -> None:
        try:
            self._file.write(_line(metrics))
        except OSError as error:
            raise TrainingError(self._explain(error)) from error

    def close(self) -> None:
        """Close the file and record its hash. Lines that could not be written are lost."""
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

    It never prompts and never ends a training. Without a server or an account the run is logged offline, for `wandb
    sync`; after a failure during the run, only metrics.jsonl is written. A warning says so. `WANDB_MODE` applies unless
    the mode is `offline` already.

    Args:
        settings: project, name, mode.
        folder: run folder; the wandb run's id is kept there.
        config: the run's configuration to log.
        resume: continue the wandb run whose id the folder has, because training continues from a checkpoint.

    Raises:
        ConfigError: wandb is not installed.

    Attributes:
        out_of_reach: whether a server could not be reached in this process; other runs then do not wait for it.
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
        except Exception as error:  # from wandb or the network: neither may end a training
            if mode != ONLINE:
                self._give_up("cannot start a run", error)
                return
            Wandb.out_of_reach = True
            _warn(
                f"wandb: {_reason(error)}; training continues and is logged offline in {str(folder / 'wandb')!r}, "
                "for 'wandb sync'; wandb.mode=offline does so without trying"
            )
            try:
                options["id"] = _wandb_id(folder, resume=False)  # wandb treats the first id as in use
                self._run = wandb.init(mode=OFFLINE, **options)
            except Exception as offline_error:
                self._give_up("cannot start a run offline either", offline_error)

    def log(self, metrics: dict[str, float | int]) -> None:
        self._send(lambda run: run.log(dict(metrics), step=int(metrics["step"])))

    def log_features(self, step: int, values: dict[str, Float[Tensor, " some"]]) -> None:
        """Log a histogram of each metric that has values."""
        histograms = {name: self._histogram(numbers.tolist()) for name, numbers in values.items() if len(numbers)}
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

    def _give_up(self, event: str, error: Exception) -> None:
        self._run = None
        _warn(f"wandb: {event} ({_reason(error)}); training continues, and {METRICS_FILE} has every number")


@contextlib.contextmanager
def closing(sinks: Sequence[Wandb]) -> Iterator[Sequence[Wandb]]:
    """Close the sinks at the end, and tell them whether the training failed."""
    failed = True
    try:
        yield sinks
        failed = False
    finally:
        for sink in sinks:
            sink.close(failed=failed)


def check_wandb(settings: WandbConfig) -> None:
    """Raise ConfigError if wandb is configured but not installed."""
    if settings.project is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "wandb.project is set, but wandb is not installed: pip install 'sae[wandb]', or leave wandb.project out"
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
    """A JSON line, with null for numbers that are not finite."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in metrics.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        DamagedError: another line is not JSON with a step, or the file of a finished training differs from its hash.
    """
    if not stands(path):
        announce_missing(path, "the earlier metrics of the training are left out")
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
        raise damaged(path, "damaged (a line without a step, or with a value that is not a number)")
    return record
