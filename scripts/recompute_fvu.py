"""Recomputes a run's held-out FVU from its saved files with transformers and torch alone, as a check on this package.

    python scripts/recompute_fvu.py runs/quickstart [MODEL]

MODEL is the model's folder or .gguf file; without it, the embedded demo model. For hook_resid_post, and for
hook_resid_pre of every block but the first.
"""  # fmt: skip

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

run = Path(sys.argv[1])
evaluation, manifest = (json.loads((run / name).read_text()) for name in ("eval.json", "activations/manifest.json"))
config = json.loads((run / "dictionary/config.json").read_text())
weights = load_file(run / "dictionary/weights.safetensors")
path = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "sae" / "demo"
gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
model = AutoModelForCausalLM.from_pretrained(path.parent if gguf else path, dtype=torch.float32, **gguf).eval()
_, layer, kind = evaluation["hook"].split(".")
index = int(layer) + (kind == "hook_resid_post")
length, masked = manifest["context_length"], torch.tensor(manifest["tokens"]["masked_ids"])
shards = sorted((run / "activations/tokens").glob("held_out-*.safetensors"))
tokens = torch.cat([load_file(shard)["tokens"] for shard in shards]).long()
limit = evaluation["settings"]["tokens"]  # in whole contexts: 8,000 tokens are 7,936 of contexts of 128
tokens = tokens if limit is None or limit >= len(tokens) else tokens[: limit // length * length]

rows = []
for context in tokens.split(length):
    captured = []
    decoder = getattr(model, "transformer", None) or model.model
    blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
    handle = blocks[index - 1].register_forward_hook(lambda block, inputs, out: captured.append(out))  # noqa: B023
    with torch.no_grad():
        model(context[None])
    handle.remove()
    keep = ~torch.isin(context, masked) & (torch.arange(len(context)) >= manifest["tokens"]["masked_positions"])
    out = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    rows.append(out.reshape(len(context), -1)[keep])
x = torch.cat(rows)
pre = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
if "k" in config:
    pre[pre < pre.topk(config["k"], dim=1).values[:, -1:]] = 0
residual = (x - (pre @ weights["W_dec"] + weights["b_dec"])).double()
variance = (x.double() - x.double().mean(0)).square().sum()
ours, theirs = evaluation["fvu"]["value"], float(residual.square().sum() / variance)
print(f"eval.json {ours:.8f}, recomputed {theirs:.8f}, relative difference {abs(ours - theirs) / theirs:.1e}")
