"""Published dictionaries as SAELens itself loads them by name, for scripts/conformance_scopes.py.

    python conformance_scopes_peer.py FOLDER

Runs in SAELens's environment, which does not have this toolkit, with the loopback hub as the hub. FOLDER/N holds:

    case.json     `release` and `id` in SAELens's registry, `dtype`, `sizes`: settings that its loader takes for granted
    inputs.pt     activations [rows, d_in]
    outputs.pt    strengths [rows, d_sae] (features × norms of their decoder rows), reconstruction, hooks, model
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HEADS = 8


@torch.no_grad()
def main(folder: Path) -> None:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.loading.pretrained_saes_directory import (  # pyright: ignore[reportMissingImports]
        get_pretrained_saes_directory,
    )

    registry = get_pretrained_saes_directory()
    for file in sorted(folder.glob("*/case.json")):
        case = json.loads(file.read_text(encoding="utf-8"))
        x = torch.load(file.with_name("inputs.pt"), weights_only=True)
        entry = registry[case["release"]]
        kept, entry.config_overrides = entry.config_overrides, {**(entry.config_overrides or {}), **case["sizes"]}
        dictionary = SAE.from_pretrained(case["release"], case["id"], dtype=case["dtype"])
        entry.config_overrides = kept
        metadata = dictionary.cfg.metadata
        hooks = [hook for hook in (metadata.hook_name, metadata.get("hook_name_out")) if hook]
        by_head = dictionary.cfg.reshape_activations == "hook_z"  # which it takes as [..., heads, width of a head]
        given = x.unflatten(-1, (HEADS, -1)) if by_head else x
        outputs = {
            "strengths": dictionary.encode(given) * dictionary.W_dec.norm(dim=-1),
            "reconstruction": dictionary(given).reshape(len(x), -1), "hooks": hooks, "model": metadata.model_name,
        }  # fmt: skip
        torch.save(outputs, file.with_name("outputs.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
