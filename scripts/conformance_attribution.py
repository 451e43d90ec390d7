"""Whether circuit-tracer makes attribution graphs of transcoders in our files: part of conformance_formats.py.

Sets of three layers are written, of each architecture, of several, with skip connections in all layers or in one. In
circuit-tracer, in a model of GPT-2's shape with random weights, they must give the same features and reconstructions on
the model's own activations; the graph must have the same active features; the edge from a feature of the last layer to
a logit must be its activation times the direct effect of its decoder row; and the edges into a logit must add up to it,
except for what comes from no node, within 1e-4 of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sae
from sae.dictionary.frame import Frame
from sae.formats.circuit_tracer import write_set

if TYPE_CHECKING:
    from conformance_formats import Row

PEER = Path(__file__).with_name("conformance_attribution_peer.py")
LAYERS, SUM_TOLERANCE = 3, 1e-4
SETS: dict[str, tuple[tuple[str, ...], tuple[bool, ...], str]] = {
    "set of relu": (("relu",) * 3, (False,) * 3, "mlp.hook_in"),
    "set of relu, skip": (("relu",) * 3, (True,) * 3, "mlp.hook_in"),
    "set of jumprelu, before the norm": (("jumprelu",) * 3, (False,) * 3, "hook_mlp_in"),
    "set of relu, gated, batch_topk, skip of one, lazy": (
        ("relu", "gated", "batch_topk"), (False, True, False), "mlp.hook_in",
    ),
    "set of matryoshka, skip, lazy": (("matryoshka",) * 3, (True,) * 3, "hook_resid_mid"),
    "set of topk": (("topk",) * 3, (False,) * 3, "mlp.hook_in"),
}  # fmt: skip
"""Architectures of the layers, whether each has a skip connection, and what they read."""


def set_rows(interpreter: Path, folder: Path) -> list[Row]:
    """The rows of the table."""
    from conformance_formats import TOLERANCE, Row, dtype_name, run_peer

    made: dict[Path, tuple[Row, dict[str, sae.Dictionary]]] = {}
    for dtype in TOLERANCE:
        for name in SETS:
            place = folder / dtype_name(dtype) / name
            transcoders = {layer: one.to(dtype) for layer, one in transcoders_of(name).items()}
            write_set(transcoders, transcoders.__getitem__, place / "set")
            made[place] = Row("circuit_tracer", name, dtype_name(dtype)), transcoders
    run_peer(interpreter, PEER, str(folder))
    for place, (row, transcoders) in made.items():
        compare(row, transcoders, torch.load(place / "graph.pt", weights_only=True))
    return [row for row, _ in made.values()]


def transcoders_of(name: str) -> dict[str, sae.Dictionary]:
    """Random transcoders of our own for each layer, in float64."""
    from conformance_formats import D_IN, MODEL, ours

    architectures, skips, kind = SETS[name]
    made = {}
    for layer, (architecture, skip) in enumerate(zip(architectures, skips, strict=True)):
        hooks = {"hook": f"blocks.{layer}.{kind}", "target_hook": f"blocks.{layer}.hook_mlp_out"}
        made[str(layer)] = ours(architecture, {**MODEL, **hooks}, Frame(skip=skip, d_out=D_IN))
    return made


@torch.no_grad()
def compare(row: Row, transcoders: Mapping[str, sae.Dictionary], graph: dict[str, Any]) -> None:
    """Compare what circuit-tracer computed with our own transcoders."""
    last, distances = LAYERS - 1, list[float]()
    for layer, transcoder in enumerate(transcoders.values()):
        x = graph["inputs"][layer]
        row.compare("written", transcoder, x, {
            "strengths": graph["strengths"][layer], "reconstruction": graph["reconstructions"][layer],
        })  # fmt: skip
        distances.append(row.distance["written"])
        mine = transcoder.encode(x)[1:]  # nothing fires at the first position there
        at_layer = graph["active"][:, 0] == layer
        theirs = torch.zeros_like(mine)
        positions, features = graph["active"][at_layer][:, 1:].T
        theirs[positions - 1, features] = graph["activations"][at_layer].to(mine)
        if not torch.allclose(theirs, mine, rtol=1e-4, atol=1e-5):
            row.failures.append(f"layer {layer}: active features differ from ours")
    row.distance["written"] = max(distances)
    edges, totals = graph["edges"].double(), graph["totals"].double()
    rows = transcoders[str(last)].W_dec.double()
    centred = rows - rows.mean(-1, keepdim=True)
    direct = (centred * graph["gain"].double()) @ graph["direct"].double().T  # [d_sae, logits]
    here = ((graph["active"][:, 0] == last) & (graph["active"][:, 1] == len(graph["inputs"][0]) - 1)).nonzero()[:, 0]
    expected = direct[graph["active"][here, 2]] * graph["activations"][here, None].double()
    scale = float(totals.abs().max())
    off_edge = float((edges[:, here].T - expected).abs().max()) / scale
    off_sum = float((edges.sum(-1) - totals).abs().max()) / scale
    row.verdict = f"equal; edges off by {off_edge:.1e}, their sums by {off_sum:.1e}"
    if not (off_edge <= SUM_TOLERANCE and off_sum <= SUM_TOLERANCE and len(here)):
        row.failures.append(row.verdict)
