"""Loads a language model's weights and tokenizer from the hub, a folder or a file.

Code that comes with a model runs only with `ModelConfig.trust_remote_code`. Weights are safetensors or GGUF.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.config.progress import import_tqdm
from sae.config.sources import ModelConfig
from sae.dictionary.model_identity import DEMO, DEMO_FOLDER, hash_ids, model_label
from sae.errors import ModelError
from sae.files.hub_errors import explain_hub_error, first_line
from sae.files.paths import expanded
from sae.model import gguf_copies
from sae.model.files import PICKLES, check_folder, damaged_file, weights_are
from sae.model.guard import NEEDS_CODE, CodeRefusedError, PickleRefusedError, guarded, quiet
from sae.model.special_tokens import made_up_tokens

_PROBE_TEXT = "The sum of 1 and 2 is 3."
_REMOTE_MODULES = "transformers_modules"


class _MissingWeightsError(Exception):
    """A model's files lack some of its weights; the message names some."""


class Pretrained(NamedTuple):
    """A language model that is loaded but not yet bridged.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
        label: its name in results.
        revision: git commit of a hub model.
        made_up: ids of BOS and EOS tokens that no file of the tokenizer holds; see `sae.model.special_tokens`.
    """

    model: Any
    tokenizer: Any
    label: str
    revision: str | None
    made_up: frozenset[int]


def load_pretrained(config: ModelConfig) -> Pretrained:
    """Load a model and its tokenizer from the hub, a folder or a file.

    Raises:
        ModelError: the model cannot be found, downloaded or read; it needs its own code and `config` does not allow
            that; its weights are a pickle; or its tokenizer cannot be used.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # they are code from the hub, chosen by the installed libraries
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # it is a service of the hub
    import_tqdm()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError("language models need the package's extra: pip install 'sae[lm]'") from error
    source, arguments = _find(config)
    arguments["trust_remote_code"] = config.trust_remote_code
    copy = (
        gguf_copies.folder_of(Path(source, arguments["gguf_file"]), config.dtype) if "gguf_file" in arguments else None
    )
    if copy and gguf_copies.is_whole(copy):
        source, copy = copy, None
        del arguments["gguf_file"]
    weights = {} if "gguf_file" in arguments else {"use_safetensors": True}
    try:
        with quiet(), guarded(config):
            pretrained: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, config.dtype), output_loading_info=True, **weights, **arguments
            )
            model, loading_info = pretrained
            _check_complete(model, loading_info)
            tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
            if copy:
                gguf_copies.write(copy, model, tokenizer)
    except Exception as error:
        raise ModelError(f"model {config.name!r}: {_explain(config, source, error)}") from error
    _check_tokenizer(config, tokenizer)
    revision = arguments.get("revision")
    made_up = frozenset()
    if not type(tokenizer).__module__.startswith(_REMOTE_MODULES):
        made_up = made_up_tokens(tokenizer, model.config, lambda name: _file(source, revision, name))
    return Pretrained(model, tokenizer, model_label(config.name), _commit(source, revision), made_up)


def _check_complete(model: Any, loading_info: dict[str, Any]) -> None:
    """Refuse a model if its files lack some of the weights: transformers would initialise them randomly.

    Raises:
        _MissingWeightsError: weights are missing; the message names some.
    """
    missing = sorted({*loading_info["missing_keys"], *(str(name) for name, *_ in loading_info["mismatched_keys"])})
    if missing:
        others = sorted(loading_info["unexpected_keys"])
        raise _MissingWeightsError(
            f"its files lack {len(missing):,} of the tensors of {type(model).__name__} ({_some(missing)})"
            + (f" and hold {len(others):,} that it does not have ({_some(others)})" if others else "")
            + ": they would be random numbers; check that the files are complete and belong to the model in config.json"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


def _commit(source: Path | str, revision: str | None) -> str | None:
    """The git commit of a hub model that was just loaded, from its folder in the hub's cache."""
    cached = None if isinstance(source, Path) else _file(source, revision, "config.json")
    return None if cached is None else cached.parent.name


def _file(source: Path | str, revision: str | None, name: str) -> Path | None:
    """The path of a file of a model that was just loaded; None if there is none."""
    if isinstance(source, Path):
        return source / name if (source / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def code_sha256(*objects: Any) -> str | None:
    """Hash of the code that came with a model and defines these objects' classes; None if there is none."""
    packages = {
        name.rpartition(".")[0] for item in objects if (name := type(item).__module__).startswith(_REMOTE_MODULES)
    }
    modules = {name: module for name, module in sys.modules.items() if name.rpartition(".")[0] in packages}
    if not modules:
        return None
    sources = sorted(hashlib.sha256(inspect.getsource(module).encode()).hexdigest() for module in modules.values())
    return hashlib.sha256(" ".join(sources).encode()).hexdigest()


def _find(config: ModelConfig) -> tuple[str | Path, dict[str, Any]]:
    """The model's name or path, and the arguments that make transformers load it."""
    path = DEMO_FOLDER if config.name == DEMO else expanded(config.name)
    is_path = path.exists() or config.name.startswith((".", "/", "~")) or config.name.endswith(".gguf")
    if is_path and config.revision is not None:
        raise ModelError(
            f"model.revision={config.revision!r}: model {config.name!r} is a local folder or file, and only hub models "
            "have revisions; leave it out"
        )
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name, "local_files_only": True}
    if path.is_file() and path.suffix in (".safetensors", *PICKLES):
        raise ModelError(f"model {config.name!r}: a file with weights only; give the folder that its config.json is in")
    if path.is_dir():
        check_folder(config.name, path)
        return path, {"local_files_only": True}
    if path.exists():
        raise ModelError(
            f"model {config.name!r}: neither a folder nor a .gguf file; give the folder of the model's config.json, "
            f"weights and tokenizer, perhaps {str(path.parent)!r}"
        )
    if is_path:
        raise ModelError(f"model {config.name!r}: no such folder or file")
    return config.name, {"revision": config.revision or "main"}


def _check_tokenizer(config: ModelConfig, tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer fails or encodes no text, as when transformers builds one without its files."""
    try:
        ids = tokenizer(_PROBE_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
        hash_ids(tokenizer)
    except Exception as error:
        raise ModelError(
            f"model {config.name!r}: its tokenizer, a {type(tokenizer).__name__}, cannot encode a text "
            f"({first_line(error)}); put the files of the model's own tokenizer next to its weights, with the class "
            "that made them in tokenizer_config.json"
        ) from error
    if set(ids) <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"model {config.name!r}: its tokenizer gives no tokens for {_PROBE_TEXT!r}; are its files missing, such as "
            "tokenizer.json? Put those of the model's tokenizer next to its weights"
        )


def _explain(config: ModelConfig, source: str | Path, error: Exception) -> str:
    if isinstance(error, _MissingWeightsError):
        return str(error)
    if isinstance(error, PickleRefusedError):
        return weights_are(config.name, "a pickle that its configuration names")
    if isinstance(error, CodeRefusedError) or "trust_remote_code" in str(error):
        return NEEDS_CODE
    if "Unrecognized configuration class" in str(error):
        return (
            f"it is not a causal language model ({first_line(error).partition(' for this')[0]}): encoder-decoders, and "
            "models of images or sound, are not supported; use a decoder, such as 'gpt2'"
        )
    if isinstance(source, Path):
        advice = damaged_file(source) or "check that its files are complete and belong to one model"
        return f"cannot be loaded ({first_line(error)}); {advice}"
    return _explain_hub(config, error)


def _explain_hub(config: ModelConfig, error: Exception) -> str:
    if isinstance(error, OSError) and "does not appear to have a file named model.safetensors" in str(error):
        return weights_are(config.name, "not there as safetensors on the hub")
    return explain_hub_error(error, config.name, "model", "model")
