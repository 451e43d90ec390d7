"""The content of `probe.json`: results by data set, each with the identity of everything it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae.files.formats import Format
from sae.files.kept import KeptResult
from sae.files.reading import conforming, taken_apart
from sae.probing.sparse_probes import ProbeResult

MARKDOWN_FILE = "probe.md"
PROBES = KeptResult(
    Format("sae-probes", 2),
    "probe.json",
    grows=True,
    outdated={
        1: "written by an earlier version, which could confuse data sets with dots in their names and put copies on "
        "both sides of a split; everything is probed again"
    },
)
FIRST_LETTERS = "first-letters"


@dataclass(frozen=True)
class Entry:
    """The outcome for one data set.

    Attributes:
        identity: hash of dictionary, model, hook point, token policy, data set and settings.
        settings: settings of its probes.
        result: result for a labelled data set; None for first letters, and on failure.
        letters: the JSON of first letters; None for labelled data sets.
        failure: why there is no result.
        left_out: number of rows without text or label, spans without label, and texts without a token that counts.
        equal: number of texts equal to an earlier one except for line ends and surrounding whitespace; both are on the
            same side of each split.
        seconds: time taken, including the language model's passes.
    """

    identity: str
    settings: dict[str, Any]
    result: ProbeResult | None = None
    letters: dict[str, Any] | None = None
    failure: str | None = None
    left_out: int = 0
    equal: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "settings": self.settings,
            "failure": self.failure,
            "left_out": self.left_out,
            "equal": self.equal,
            "seconds": self.seconds,
            **({"letters": self.letters} if self.letters is not None else {}),
            **(self.result.to_json() if self.result is not None else {}),
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> Entry:
        result = ProbeResult.from_json(record) if "methods" in record else None
        return Entry(
            record["identity"], record["settings"], result, record.get("letters"), record["failure"],
            record["left_out"], record["equal"], record["seconds"],
        )  # fmt: skip


@dataclass(frozen=True)
class ProbeRecord:
    """All results of one dictionary.

    Attributes:
        subject: what was probed: dictionary, model, hook point, token policy.
        entries: entries by data set in the order they were added, including failures.
        others: entries with other settings, or for other data of the same name; kept in case they are requested again.
    """

    subject: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    others: tuple[tuple[str, Entry], ...] = ()

    @property
    def results(self) -> dict[str, ProbeResult]:
        """Results for labelled data sets that were probed."""
        return {name: entry.result for name, entry in self.entries.items() if entry.result is not None}

    @property
    def failures(self) -> dict[str, str]:
        """Reasons why the other data sets were not probed."""
        return {name: entry.failure for name, entry in self.entries.items() if entry.failure is not None}

    @property
    def letters(self) -> dict[str, Any] | None:
        """First letters, if they were measured."""
        entry = self.entries.get(FIRST_LETTERS)
        return None if entry is None else entry.letters

    def with_entry(self, name: str, entry: Entry) -> ProbeRecord:
        """A copy with an entry added or replaced."""
        return replace(self, entries={**self.entries, name: entry})

    def only(self, names: Mapping[str, Any]) -> ProbeRecord:
        """A copy with only the data sets of these names, in this order."""
        return ProbeRecord(self.subject, {name: self.entries[name] for name in names if name in self.entries})

    def arranged(self, belongs: Callable[[str, Entry], bool]) -> ProbeRecord:
        """A copy where entries that belong are `entries` and the rest are `others`; failures that do not are dropped.

        If several that belong are the same probes of the same data, only the first becomes an entry.
        """
        candidates = [*self.entries.items(), *self.others]
        inside: dict[str, Entry] = {}
        for name, entry in candidates:
            is_duplicate = name in inside or any(entry.identity == other.identity for other in inside.values())
            if not is_duplicate and belongs(name, entry):
                inside[name] = entry
        rest = [(name, entry) for name, entry in candidates if entry.failure is None and inside.get(name) is not entry]
        return ProbeRecord(self.subject, inside, tuple(rest))

    def to_json(self) -> dict[str, Any]:
        """The content of `probe.json`."""
        return {
            "subject": self.subject,
            "data_sets": {name: entry.to_json() for name, entry in self.entries.items()},
            "others": [{"name": name, **entry.to_json()} for name, entry in self.others],
        }

    @staticmethod
    def read(folder: Path, subject: dict[str, Any]) -> ProbeRecord:
        """Read `probe.json`; the record is empty if the file is missing or has another subject or version.

        Raises:
            DamagedError: the file is damaged.
        """
        record = PROBES.find(folder, subject=subject)
        if record is None:
            return ProbeRecord(subject)
        with taken_apart(folder / PROBES.index):
            entries = {name: conforming(Entry.from_json(entry)) for name, entry in record["data_sets"].items()}
            others = tuple((entry["name"], conforming(Entry.from_json(entry))) for entry in record["others"])
            return ProbeRecord(subject, entries, others)
