"""The table of formats in the guide is what the files of the other tests give.

`python -m tests.formats.test_formats_table` prints it.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import sae
from sae.formats import FORMATS, SET_WRITERS, WRITERS
from sae.formats.circuit_tracer import WRITES
from sae.formats.foreign import CONVERTED
from tests.formats.test_formats_refused import REFUSED
from tests.formats.test_formats_writing import HELD
from tests.support.foreign_files import CASES

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "convert.md"
TOPICS = {
    "norm": "norms of decoder rows", "not centred": "input without centring",
    "input scale": "constant scale of the input", "both signs": "features of both signs",
}  # fmt: skip
"""Words in what is said to be folded, and what the table calls it."""
CARRIED = {
    "input_norm=centre": "mean of a centred stream", "input_norm=layer_norm": "layer norm of each token",
    "input_norm=constant_norm": "norm of each token", "skip=True": "skip connection",
    "d_out=": "output of another width",
}  # fmt: skip
"""The same for what is said to be carried."""
ALSO_REFUSED = {
    "openai": ["TopK without ReLU"], "circuit_tracer": ["TopK with negative features"],
}  # fmt: skip
"""What tests of their own, or the class of the file, refuse."""
NOT_A_KIND = ("no ", "k of", "unheard", "widths", "norms", "in training", "class", "NaN")


def format_of(case: str) -> str:
    return next(name for name in FORMATS if case.replace("-", "_").replace(" ", "_").startswith(name))


def table(folder: Path) -> str:
    """A Markdown row for each format: what is read of it, folded, carried, and refused; what is written."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    folded: defaultdict[str, set[str]] = defaultdict(set)
    carried: defaultdict[str, set[str]] = defaultdict(set)
    for number, (name, case) in enumerate(CASES.items()):
        of = format_of(name)
        dictionary = sae.load(case.write(folder / str(number)))
        architecture = type(dictionary).__name__
        said = [part for part in dictionary.metadata[CONVERTED]["folded"] if "kept" not in part]
        if dictionary.origin.of_transcoder:
            architecture += " transcoder"
        if architecture not in kinds[of]:
            kinds[of].append(architecture)
        folded[of] |= {topic for word, topic in TOPICS.items() if any(word in part for part in said)}
        carried[of] |= {
            topic
            for word, topic in CARRIED.items()
            for part in dictionary.metadata[CONVERTED]["carried"]
            if word in part
        }
    rows = []
    for name, module in FORMATS.items():
        refused = [
            key for key, (case, *_) in REFUSED.items() if format_of(case) == name and not key.startswith(NOT_A_KIND)
        ]
        refused = list(dict.fromkeys([*refused, *ALSO_REFUSED.get(name, [])]))
        written = ", ".join(sorted(HELD[name])) if name in WRITERS else "–"
        if name in SET_WRITERS:
            written = f"transcoders of all layers: {', '.join(sorted(WRITES))}"
        cells = [module.TITLE, ", ".join(kinds[name])]
        cells += ["; ".join(sorted(topics[name])) or "–" for topics in (folded, carried)]
        rows.append("| " + " | ".join([*cells, "; ".join(refused) or "–", written]) + " |")
    head = "| | read as | folded exactly | carried | refused by name | written |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def test_the_guide_has_the_table(tmp_path: Path) -> None:
    assert table(tmp_path) in GUIDE.read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(table(Path(temporary)))
