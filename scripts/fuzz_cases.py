"""Damages every file of a small run folder in every way, runs every verb on it, and says what came of it.

    scripts/fuzz [--cases N] [--seed 0] [--workers 2]

A cell is a file, a kind of damage and a verb; every cell has a case, and `--cases` draws as many of them. A case is a
fork with its own copy of the folder. What it prints and what it writes must be what the undamaged folder gives, or it
ends with one line that names the file. Exits with 1 if anything was wrong, hung, crashed, or took more than 2 GB.
"""  # fmt: skip

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data.tokens=6000", "data.held_out_tokens=2000", "data.context_length=64", "harvest.shard_contexts=32",
    "dictionary.d_sae=32", "dictionary.k=4", "train.batch_size=256", "train.checkpoint_every=8", "train.log_every=4",
    "features.tokens=3000", "evaluation.downstream_tokens=256", "evaluation.tokens=512", "evaluation.legacy_tokens=0",
    "evaluation.frozen_decoder_tokens=0", "evaluation.baseline_tokens=128",
]  # fmt: skip
SECONDS, MOST_MEMORY = 120, 2 << 30
SLOW_IMPORTS = ("datasets", "transformers", "matplotlib.pyplot")
EFFECTS = ["--positions", "2", "--null-positions", "1", "--window", "2", "--tokens", "512"]
PROBES = ["k=1", "examples=40", "max_tokens=16", "splits=1"]


@dataclass(frozen=True)
class Case:
    """A cell."""

    file: str
    damage: str
    verb: str


@dataclass(frozen=True)
class Outcome:
    """What came of it: `same`, `error`; or what is wrong: `different`, `traceback`, `hang`, `memory`, `unexpected`."""

    kind: str
    text: str


# --- damage


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def fifo(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def swap(path: Path, rng: random.Random) -> None:
    """With another file of the run, of the same kind if there is one."""
    run = next(parent for parent in path.parents if parent.name == "run")
    content = path.read_bytes()
    others = [other for other in sorted(run.rglob("*")) if other.is_file() and other.read_bytes() != content]
    alike = [other for other in others if other.suffix == path.suffix and path.suffix]
    other = rng.choice(alike or others)
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def wrong_number(path: Path, rng: random.Random) -> None:
    """Another digit in a number."""
    text = path.read_text(encoding="utf-8")
    places = [match.start() for match in re.finditer(r"(?<=[\s\[:,.])\d", text)]
    if not places:
        flip(path, rng)
        return
    place = rng.choice(places)
    other = rng.choice([digit for digit in "123456789" if digit != text[place]])
    path.write_text(text[:place] + other + text[place + 1 :], encoding="utf-8")


def wrong_type(path: Path, rng: random.Random) -> None:
    """A value of another type, anywhere in the tree."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    places = list(_places(tree))
    value = rng.choice([None, "text", [], {}, -1, 1.5, True, 10**30, "../../etc/passwd", float("inf")])
    if not places:
        tree = value
    else:
        parent, key = rng.choice(places)
        parent[key] = value
    path.write_text(json.dumps(tree), encoding="utf-8")


def odd_json(path: Path, rng: random.Random) -> None:
    """Too deep, a number too long, a key twice, not UTF-8, half a surrogate pair."""
    content = path.read_bytes()
    odd = [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"format": 1, "format": 2}', b"\xff" + content]
    path.write_bytes(rng.choice([*odd, b'{"a": "\\ud800"}', b"null", b"[]", b'"text"', b"NaN"]))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def unlisted(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    """The change, in a folder without hashes, as older versions wrote them."""

    def changed(path: Path, rng: random.Random) -> None:
        (path.parent / "SHA256SUMS").unlink(missing_ok=True)
        change(path, rng)

    return changed


ANY = {
    "bit": flip, "truncated": truncate, "emptied": empty, "deleted": delete, "swapped": swap, "FIFO": fifo,
    "folder": folder, "link to itself": loop,
}  # fmt: skip
OF_JSON = {"number": wrong_number, "type": wrong_type, "odd": odd_json}
UNLISTED = {f"{name}, no hashes": unlisted(change) for name, change in {"type": wrong_type, "odd": odd_json}.items()}
DAMAGES = {**ANY, **OF_JSON, **UNLISTED}

# --- verbs


def run_verb(verb: str, config: Path) -> None:
    """In a folder that holds `run`."""
    if verb == "load":
        load_in_python()
        return
    if verb == "resume":
        shutil.rmtree("run/dictionary")
    if verb == "finish eval":
        report = Path("run/eval.json")
        report.rmdir() if report.is_dir() else report.unlink(missing_ok=True)
    if verb == UNFINISHED:
        leave_evaluation_unfinished()
        return
    command = {
        "verify": ["verify", "run"],
        "run": ["run", str(config), "out=run", *SETTINGS],
        "resume": ["train", str(config), "out=run", *SETTINGS],
        "eval": ["eval", "run"],
        "finish eval": ["eval", "run"],
        "features": ["features", "run", "--limit", "5"],
        "features N": ["features", "run", "3"],
        "compare": ["compare", "run", "run/checkpoints/step-00000016", "--out", "run/compared"],
        "effects": ["effects", "run", "3", *EFFECTS],
        "probe": ["probe", "run", str(config.with_name("labels.csv")), *PROBES],
    }[verb]
    from sae.cli import main as cli

    sys.argv = ["sae", "--quiet", *command]
    cli.main()


VERBS = (
    "verify", "run", "resume", "eval", "finish eval", "features", "features N", "compare", "effects", "probe", "load",
)  # fmt: skip
CAN_BE_MISSING = {"metrics.jsonl": ("resume", "eval", "finish eval"), "effects.json": ("features N",)}
"""Files that a verb does without, and says so."""
UNFINISHED = "leave an evaluation unfinished"


def leave_evaluation_unfinished() -> None:
    """Beside the report, which is as before: what Ctrl-C keeps of an evaluation after it wrote sums twice."""
    from sae.evaluation import partial
    from sae.evaluation.partial import FOLDER, Stage
    from sae.runs import pipeline

    report, keep, kept = Path("run/eval.json"), Stage.keep, []

    def interrupted(self: Stage) -> None:
        keep(self)
        kept.append(self)
        if len(kept) == 2:
            raise KeyboardInterrupt

    content = report.read_bytes()
    report.unlink()
    Stage.keep, partial.EVERY = interrupted, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        pipeline.Run.open("run").evaluate()
    report.write_bytes(content)
    assert list(Path("run", FOLDER).rglob("*.safetensors"))


def load_in_python() -> None:
    import torch

    import sae
    from sae.errors import SaeError

    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        dictionary = sae.load("run")
        cache = sae.ActivationCache("run")
        [hook] = cache.hooks
        total = sum(float(dictionary(batch.activations).double().sum()) for batch in cache.contexts("held_out", hook))
        first = next(iter(sae.ActivationLoader(cache, hook, batch_size=64)))
        print(total, float(first.sum()), len(cache.documents()), sae.Features("run")[3], torch.__version__)
    except SaeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def share_language_model(config: Path) -> None:
    """Import what takes long and load the model of `config` once, for all forks."""
    for name in (
        "sae.cli.main",
        "sae.runs.comparison",
        "sae.runs.probes",
        "sae.runs.verification",
        "sae.viewer",
        *SLOW_IMPORTS,
    ):
        importlib.import_module(name)
    import torch

    from sae.config.file import load_config
    from sae.model.language_model import LanguageModel
    from sae.runs import pipeline

    kept: dict[str, LanguageModel] = {}

    def shared(settings: Any, device: Any) -> LanguageModel:
        key = f"{settings.model_dump_json()} {device}"
        if key not in kept:
            kept[key] = LanguageModel(settings, device)
        return kept[key]

    pipeline.LanguageModel = shared  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)  # a fork has no others
    assert pipeline.Run(load_config(config, SETTINGS)).language_model in kept.values()


# --- cases


class Fuzzer:
    """A run folder, what verbs give on it undamaged, and cases.

    Args:
        work: an empty folder.
        seed: of what is damaged how.
    """

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work, self.seed = work, seed
        self.config = work / "config.yaml"
        shutil.copy(ROOT / "configs" / "quickstart.yaml", self.config)
        rows = [f"{'the cat sat on a mat' if n % 2 else 'import os and return self'} {n},{n % 2}" for n in range(60)]
        self.config.with_name("labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
        share_language_model(self.config)
        self.whole = work / "whole"
        self.whole.mkdir()
        for verb in ("run", "effects", "probe", "compare", UNFINISHED):
            status, text = self._fork(self.whole, verb)
            if status:
                raise SystemExit(f"the undamaged run folder could not be made: {verb}: {text[-2000:]}")
        self.expected: dict[str, list[tuple[str, dict[str, Any]]]] = {verb: [self._intact(verb)] for verb in VERBS}
        self.expected["run"].append(self._intact("run", without="eval.json"))
        self.expected["compare"].append(self._intact("compare", without="compared/compare.json"))
        for file, verbs in CAN_BE_MISSING.items():
            for verb in verbs:
                self.expected[verb].append(self._intact(verb, without=file))
                if "missing, though SHA256SUMS lists it" not in self.expected[verb][-1][0]:
                    raise SystemExit(f"{verb}: not a word of {file}, which is missing")

    def cells(self) -> list[Case]:
        """Every file × damage × verb, in an order drawn by the seed; what `resume` deletes it cannot meet."""
        files = [path for path in sorted((self.whole / "run").rglob("*")) if path.is_file()]
        cells = [
            Case(path.relative_to(self.whole / "run").as_posix(), damage, verb)
            for path in files
            for damage in DAMAGES
            if damage in ANY or path.suffix == ".json"
            for verb in VERBS
            if not (verb == "resume" and path.parent.name == "dictionary")
        ]
        random.Random(self.seed).shuffle(cells)
        return cells

    def outcome(
        self, case: Case, status: int | None, text: str, memory: int, before: dict[str, Any], place: Path
    ) -> Outcome:
        """How a case ended; `status` is None if it had to be stopped."""
        if status is None:
            kind = "hang"
        elif memory > MOST_MEMORY:
            kind = "memory"
        elif "Error: unexpected" in text:
            kind = "unexpected"
        elif "Traceback" in text or status not in (0, 1):
            kind = "traceback"
        elif status == 1:
            named = [line for line in text.splitlines() if line.startswith("Error: ")]
            kind = "error" if len(named) == 1 else "traceback"
        elif case.damage in UNLISTED:
            kind = "same"  # without hashes nobody can tell
        elif case.verb == "verify":
            kind = "same" if Path(case.file).name in (".lock", "SHA256SUMS") else "different"
        else:
            kind = "same" if self._is_right(case.verb, text, before, contents(place / "run")) else "different"
        return Outcome(kind, f"status {status}, {memory:,} bytes: {text}")

    def _is_right(self, verb: str, text: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
        """Whether a verb printed and wrote what it does on the undamaged folder."""
        written = {name: value for name, value in after.items() if before.get(name) != value}
        printed = normalised(text)
        return any(
            printed == expected_text and all(expected.get(name) == value for name, value in written.items())
            for expected_text, expected in self.expected[verb]
        )

    def run(
        self, cases: list[Case], workers: int = 2, report: Callable[[Case, Outcome], None] | None = None
    ) -> dict[Case, Outcome]:
        """Outcomes by case."""
        waiting, running, outcomes = list(cases)[::-1], {}, {}
        while waiting or running:
            while waiting and len(running) < workers:
                case = waiting.pop()
                place = self.work / f"case-{len(outcomes) + len(running)}-{time.monotonic_ns()}"
                shutil.copytree(self.whole, place)
                rng = random.Random(f"{self.seed} {case}")
                DAMAGES[case.damage](place / "run" / case.file, rng)
                before = contents(place / "run")
                running[self._start(place, case.verb)] = case, place, before, time.monotonic()
            child, status, usage = os.wait4(-1, os.WNOHANG)
            if not child:
                time.sleep(0.002)
                for child, (_, _, _, started) in running.items():
                    if time.monotonic() - started > SECONDS:
                        os.kill(child, signal.SIGKILL)
                continue
            case, place, before, started = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            hung = code == -signal.SIGKILL and time.monotonic() - started > SECONDS
            text = (place / "printed").read_text(encoding="utf-8", errors="replace")
            outcome = self.outcome(case, None if hung else code, text, usage.ru_maxrss * 1024, before, place)
            outcomes[case] = outcome
            shutil.rmtree(place)
            if report:
                report(case, outcome)
        return outcomes

    def _intact(self, verb: str, without: str | None = None) -> tuple[str, dict[str, Any]]:
        place = self.work / "intact"
        shutil.copytree(self.whole, place)
        if without:
            (place / "run" / without).unlink()
        status, text = self._fork(place, verb)
        if status:
            raise SystemExit(f"{verb} on the undamaged run folder: {text[-2000:]}")
        found = normalised(text), contents(place / "run")
        shutil.rmtree(place)
        return found

    def _fork(self, place: Path, verb: str) -> tuple[int, str]:
        _, status = os.waitpid(self._start(place, verb), 0)
        return os.waitstatus_to_exitcode(status), (place / "printed").read_text(encoding="utf-8", errors="replace")

    def _start(self, place: Path, verb: str) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            warnings.resetwarnings()
            os.chdir(place)
            printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
            os.environ["COLUMNS"] = "120"
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
            run_verb(verb, self.config)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


def contents(run: Path) -> dict[str, Any]:
    """What files hold, without times; of those that hold nothing else, nothing."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or path.name in (".lock", "SHA256SUMS", "state.pt") or path.suffix == ".png":
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".md", ".yaml"):
            content = re.sub(rb'"(seconds|tokens_per_second)": [-+.e\d]+', b"", content)
            content = re.sub(rb"\b[\d.,]+ (s|seconds)\b", b"", content)
        found[name] = content
    return found


def normalised(text: str) -> str:
    lines = [line for line in text.splitlines() if "has no SHA-256" not in line]
    return re.sub(r"\b[\d.,]+ (s|seconds)\b", "", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=None, help="as many of the cells, drawn by the seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="the totals as the last line, for programs")
    arguments = parser.parse_args()
    started, counts = time.monotonic(), collections.Counter[tuple[str, str]]()
    bad = []

    def report(case: Case, outcome: Outcome) -> None:
        counts[case.damage, outcome.kind] += 1
        if outcome.kind not in ("same", "error"):
            bad.append((case, outcome))
            print(f"{outcome.kind.upper()}  {case}\n    {outcome.text[-600:]}", flush=True)
        if counts.total() % 500 == 0:
            print(f"{counts.total():,} cases, {time.monotonic() - started:,.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as work:
        fuzzer = Fuzzer(Path(work), arguments.seed)
        cells = fuzzer.cells()
        fuzzer.run(cells[: arguments.cases], arguments.workers, report)
    kinds = ("same", "error", "different", "traceback", "hang", "memory", "unexpected")
    print(f"\n{'damage':24}" + "".join(f"{kind:>12}" for kind in kinds))
    for damage in DAMAGES:
        print(f"{damage:24}" + "".join(f"{counts[damage, kind]:12,}" for kind in kinds))
    totals = {kind: sum(counts[damage, kind] for damage in DAMAGES) for kind in kinds}
    print(f"{'all':24}" + "".join(f"{totals[kind]:12,}" for kind in kinds))
    files = len({cell.file for cell in cells})
    print(f"{counts.total():,} cases of {len(cells):,} cells: {files} files × damage × {len(VERBS)} verbs")
    if arguments.json:
        print(json.dumps(totals))
    allowed = {"same", "error", "unexpected"}
    sys.exit(0 if totals["unexpected"] <= 5 and not any(totals[kind] for kind in set(kinds) - allowed) else 1)


if __name__ == "__main__":
    main()
