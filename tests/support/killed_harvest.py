"""Harvests in child processes that are killed with SIGKILL, resumed, and killed again. Run by test_*harvest.py.

    python killed_harvest.py MODEL TEXT OUT KILLS

TEXT is a source, or two with a colon between them, which are mixed 7 to 3. Everything is imported once; each harvest is
a fork, so torch must have one thread only (OMP_NUM_THREADS=1). Kills come in two kinds: by the clock, at random moments
of the whole harvest, and at file-system steps: right before or after a sync or a rename. Prints JSON: the state of the
folder at every kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.activations import harvest as harvest_module
from sae.config.file import parse_config
from sae.config.sources import ModelConfig
from sae.model.language_model import LanguageModel

FORWARD_SECONDS, WRITE_SECONDS = 0.004, 0.003


def main() -> None:
    model, text, out = sys.argv[1:4]
    sources = text.split(os.pathsep)
    rng = random.Random(0)
    language_model = LanguageModel(ModelConfig(name=model))
    slow_down(language_model)

    def run(name: str) -> Callable[[], Any]:
        config = parse_config(
            {
                "out": f"{out}/{name}",
                "model": {"name": model},
                "data": {
                    "source": sources, "weights": [7, 3] if len(sources) > 1 else None, "tokens": 1001,
                    "held_out_tokens": 199, "context_length": 16, "holdout_fraction": 0.25,
                },
                "harvest": {
                    "hooks": ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"], "batch_contexts": 2,
                    "shard_contexts": 8,
                },
            }
        )  # fmt: skip
        return lambda: harvest_module.harvest(config, language_model)

    begun = time.monotonic()
    steps = count_steps(run("whole"))
    seconds = time.monotonic() - begun
    states = []
    for number in range(int(sys.argv[4])):  # one after another, each going on where the last was killed
        states.append(["clock", kill_after(rng.uniform(0, 0.5) * seconds, run("by-clock")), look(f"{out}/by-clock")])
        if number % 2 == 0:  # and from the start, at any moment
            kill_after(rng.uniform(0.02, 0.98) * seconds, run(f"once-{number}"))
            states.append(["once", True, look(f"{out}/once-{number}")])
            finish(run(f"once-{number}"))
    finish(run("by-clock"))
    for step in range(1, steps, max(1, steps // int(sys.argv[4]))):
        states.append(["step", kill_at_step(step, run(f"step-{step}")), look(f"{out}/step-{step}")])
        finish(run(f"step-{step}"))
    print(json.dumps({"seconds": seconds, "steps": steps, "states": states}))


def slow_down(language_model: LanguageModel) -> None:
    """A forward pass and a write take long enough to be hit."""
    forward, fsync = language_model.activations, os.fsync

    def slow_forward(*args: Any) -> Any:
        time.sleep(FORWARD_SECONDS)
        return forward(*args)

    def slow_fsync(descriptor: int) -> None:
        time.sleep(WRITE_SECONDS)
        fsync(descriptor)

    language_model.activations = slow_forward
    os.fsync = slow_fsync


def fork(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def finish(work: Callable[[], Any]) -> None:
    _, status = os.waitpid(fork(work), 0)
    if status != 0:
        raise SystemExit(f"the resumed harvest ended with status {status}")


def kill_after(seconds: float, work: Callable[[], Any]) -> bool:
    """Whether it was still running."""
    child = fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def on_every_step(act: Callable[[], None]) -> None:
    """Call `act` before and after every sync and every rename."""
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        act()
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        act()
        result = replace(self, target)
        act()
        return result

    os.fsync, Path.replace = watched_fsync, watched_replace


def count_steps(work: Callable[[], Any]) -> int:
    read, write = os.pipe()

    def counted() -> None:
        on_every_step(lambda: os.write(write, b"."))
        work()

    finish(counted)
    os.close(write)
    count = len(os.read(read, 65536))
    os.close(read)
    return count


def kill_at_step(step: int, work: Callable[[], Any]) -> bool:
    done = [0]

    def count() -> None:
        done[0] += 1
        if done[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        on_every_step(count)
        work()

    _, status = os.waitpid(fork(killed), 0)
    return os.WIFSIGNALED(status)


def look(run_folder: str) -> str:
    """How far a killed harvest had come."""
    manifest = Path(run_folder) / "activations" / "manifest.json"
    if not manifest.is_file():
        return "text"
    return "done" if json.loads(manifest.read_bytes())["complete"] else "activations"


if __name__ == "__main__":
    main()
