"""Write ranked features as one self-contained static page, without any script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sae.features.text import visible
from sae.files.writing import write_bytes
from sae.results.estimate import Estimate
from sae.results.sheet import Sheet, ShownExample
from sae.viewer.page import asset, escaped, head

_EXAMPLES_OF = 5
"""Number of features whose examples are on the page."""
_HEATS = 10
_WIDTH, _LEFT, _ROW, _TOP = 720, 130, 24, 22


def write_sheet(sheet: Sheet, path: str | Path) -> None:
    """Write ranked features as one HTML file: what was found, their scores, and held-out examples of the best.

    All text is escaped, and the page's policy allows neither scripts nor anything from elsewhere.

    Args:
        sheet: the content, such as `sae.probing.concept_sheet(result)`.
        path: the file.

    Raises:
        CacheError: the file cannot be written.
    """
    style = asset("page.css") + asset("sheet.css")
    parts = [
        f'{head(sheet.title, style)}<body>\n<main class="sheet">',
        f'<h1>{escaped(sheet.title)}</h1>\n<p class="meta">{escaped(sheet.subtitle)}</p>',
        *(f"<p>{escaped(sentence)}</p>" for sentence in sheet.sentences),
        f'<figure class="card">{_chart(sheet)}<figcaption>AUC on held-out examples with its 95 % interval; grey: the '
        "same search with shuffled labels, mean ± 2 deviations.</figcaption></figure>",
        f'<div class="card">{_table(sheet)}</div>',
        *_examples(sheet),
        "</main>\n</body>\n</html>\n",
    ]
    write_bytes(Path(path), "\n".join(parts).encode(), hashed=False)  # the path can be anywhere


def _table(sheet: Sheet) -> str:
    """The table; rows that are not of features are grey."""
    headings = "".join(f"<th>{escaped(column.heading)}</th>" for column in sheet.table.columns)
    features = sum(bool(one.examples) for one in sheet.scored)
    body = ""
    for number, cells in enumerate(zip(*(column.cells for column in sheet.table.columns), strict=True)):
        kind = ' class="other"' if number >= features > 0 else ""
        body += f"<tr{kind}>{''.join(f'<td>{escaped(str(cell))}</td>' for cell in cells)}</tr>\n"
    return f"<table><thead><tr>{headings}</tr></thead>\n<tbody>{body}</tbody></table>"


def _chart(sheet: Sheet) -> str:
    """AUC as marks with intervals, over the band of what a search finds by chance."""
    marks = [(one.name, one.auc) for one in sheet.scored]
    low, high = max(0.0, min(0.4, *(_interval(auc)[0] for _, auc in marks), sheet.chance[0])), 1.0

    def x(value: float) -> float:
        return round(_LEFT + (min(max(value, low), high) - low) / (high - low) * (_WIDTH - _LEFT - 16), 1)

    bottom = _TOP + _ROW * len(marks)
    lines = [f'<svg viewBox="0 0 {_WIDTH} {bottom + 20}" role="img" aria-label="AUC of features and of a neuron">']
    band = x(sheet.chance[0]), x(sheet.chance[1])
    size = f'width="{band[1] - band[0]:.1f}" height="{bottom - _TOP + 8}"'
    lines.append(f'<rect class="band" x="{band[0]}" y="{_TOP - 8}" {size}/>')
    lines.append(f'<line class="half" x1="{x(0.5)}" x2="{x(0.5)}" y1="{_TOP - 8}" y2="{bottom}"/>')
    for number, (name, auc) in enumerate(marks):
        y = _TOP + _ROW * number + 8
        lower, upper = _interval(auc)
        lines.append(f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escaped(name)}</text>')
        lines.append(f'<line class="error" x1="{x(lower)}" x2="{x(upper)}" y1="{y}" y2="{y}"/>')
        lines.append(f'<circle class="mark" cx="{x(auc.value or 0.0)}" cy="{y}" r="5"/>')
    ticks = [
        f'<text x="{x(value)}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>' for value in (0.5, 0.75, 1.0)
    ]
    return "\n".join([*lines, *ticks, "</svg>"])


def _interval(auc: Estimate) -> tuple[float, float]:
    return auc.interval or (auc.value or 0.0, auc.value or 0.0)


def _examples(sheet: Sheet) -> Iterator[str]:
    shown = [one for one in sheet.scored if one.examples][:_EXAMPLES_OF]
    for one in shown:
        yield f"<h2>{escaped(one.name.capitalize())} on held-out examples</h2>"
        largest = max(max(example.activations) for example in one.examples)
        items = "\n".join(_example(example, largest) for example in one.examples)
        yield f'<section class="examples"><ol>\n{items}\n</ol></section>'
    if shown:
        yield '<p class="meta">The examples on which a feature is strongest, then examples with the concept on which '
        yield "it is weakest. The number is the activation, or its mean over the tokens of a text.</p>"


def _example(example: ShownExample, largest: float) -> str:
    tokens = []
    for place, (token, activation) in enumerate(zip(example.tokens, example.activations, strict=True)):
        text = escaped(visible(token)) if token or place == example.position else ""
        if activation > 0:
            heat = min(_HEATS - 1, int(_HEATS * activation / largest))
            peak = " peak" if place == example.position else ""
            text = f'<span class="fires{peak} h{heat}" title="{activation:.3g}">{text}</span>'
        elif place == example.position:
            text = f'<span class="peak">{text}</span>'
        tokens.append(text)
    side, name = ("up", "with") if example.positive else ("down", "without")
    return (
        f'<li><span class="value">{example.value:.3g}</span><span class="side-of {side}">{name}</span>'
        f'<div class="text">{"".join(tokens)}</div></li>'
    )
