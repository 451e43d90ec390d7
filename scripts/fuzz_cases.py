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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_damages import ANY, DAMAGES, UNLISTED
from fuzz_verbs import CAN_BE_MISSING, UNFINISHED, VERBS, run_verb, share_language_model

ROOT = Path(__file__).parents[1]
SECONDS, MOST_MEMORY = 120, 2 << 30


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
