"""A language model's weights and tokenizer, from the hub, a folder or a file, and bridged to transformer-lens."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sae.config import ModelConfig
from sae.errors import ModelError
from sae.model_identity import DEMO, DEMO_FOLDER, model_label


def load_pretrained(config: ModelConfig) -> tuple[Any, Any, str, str | None]:
    """Model, tokenizer, label, revision."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError("language models need the package's extra: pip install 'sae[lm]'") from error
    path = DEMO_FOLDER if config.name == DEMO else Path(config.name).expanduser()
    arguments: dict[str, Any] = {}
    if path.is_file() and path.suffix == ".gguf":
        source, arguments = path.parent, {"gguf_file": path.name, "local_files_only": True}
    elif path.is_dir():
        source, arguments = path, {"local_files_only": True}
    elif config.name.startswith((".", "/", "~")) or config.name.endswith(".gguf"):
        raise ModelError(f"model {config.name!r}: no such folder or file")
    else:
        source, arguments = config.name, {"revision": config.revision or "main"}
    local = isinstance(source, Path)
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, config.dtype), **arguments)
            tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        if local:
            raise ModelError(f"model {config.name!r}: cannot be loaded ({reason})") from error
        raise ModelError(
            f"model {config.name!r}: neither a folder nor a .gguf file here, and the hub did not give it ({reason}). "
            "Check the name and the network, or give a local folder, a .gguf file, or 'demo'"
        ) from error
    return model, tokenizer, model_label(config.name), getattr(model.config, "_commit_hash", None)


def boot(model: Any, tokenizer: Any, label: str, config: ModelConfig) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with _quiet():
            bridge = TransformerBridge.boot_transformers(
                label, hf_model=model, tokenizer=tokenizer, dtype=getattr(torch, config.dtype)
            )
            if config.weight_processing != "none":
                centre = config.weight_processing == "center_and_fold"
                bridge.process_weights(fold_ln=True, center_writing_weights=centre, center_unembed=centre)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {config.name!r}: transformer-lens cannot bridge {type(model).__name__} ({reason})"
        ) from error
    return bridge.requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings and progress bars off the user's terminal."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
