"""Model folders whose own Python code leaves a file behind when it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

class OwnConfig(GPT2Config):
    model_type = {model_type!r}

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

class InternLM2ForCausalLM(OwnModel):
    pass

def generate(*_, **__):
    raise NotImplementedError
"""
MODEL_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
TOKENIZER_MAP = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}


def write_hostile_model(
    model: Path, folder: Path, marker: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None
) -> Path:
    """A copy of `model` with code that writes `marker`, and with entries added to its two configurations."""
    shutil.copytree(model, folder)
    own = CODE.format(marker=str(marker), model_type=config.get("model_type", "gpt2"))
    for name in ("own.py", "modeling_internlm2.py", "custom_generate/generate.py", "setup.py", "conftest.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(own, encoding="utf-8")
    for name, entries in (("config.json", config), ("tokenizer_config.json", tokenizer or {})):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")
    return folder
