"""A language model's weights and tokenizer, from the hub, a folder or a file, and bridged to transformer-lens.

Code that comes with a model runs only with `ModelConfig.trust_remote_code`. Weights are safetensors or GGUF.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from sae import gguf_copies
from sae.config import ModelConfig
from sae.errors import ModelError
from sae.hub_errors import explain_hub_error, first_line
from sae.model_identity import DEMO, DEMO_FOLDER, model_label
from sae.paths import expanded

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Where libraries fetch or run the code of a model, whether or not they are told to trust it: transformer-lens imports
# some architectures' modules by the name that config.json gives.
_RUNS_CODE = {
    "transformers.dynamic_module_utils": ("get_cached_module_file", "get_class_in_module"),
    "transformers.integrations.hub_kernels": ("get_kernel",),
}
_READS_PICKLES = {"torch": ("load",)}
_OPENED = (
    "config", "generation_config", "model", "tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges",
    "chat_template",
)  # fmt: skip
"""How names of the files begin that transformers opens in a model's folder."""
_PROBE_TEXT = "The sum of 1 and 2 is 3."
_REMOTE_MODULES = "transformers_modules"


class _RefusedError(Exception):
    """A library was about to do what is not allowed."""


class _CodeRefusedError(_RefusedError):
    pass


class _PickleRefusedError(_RefusedError):
    pass


class _MissingWeightsError(Exception):
    pass


def load_pretrained(config: ModelConfig) -> tuple[Any, Any, str, str | None]:
    """Model, tokenizer, label, revision.

    Raises:
        ModelError: it cannot be found, downloaded or read; it needs code of its own and `config` does not allow it; its
            weights are a pickle.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # code from the hub, chosen by what is installed
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # by a service of the hub
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
        with _quiet(), _guarded(config):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, config.dtype), output_loading_info=True, **weights, **arguments
            )
            model, found = loaded
            _check_whole(model, found)
            tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
            if copy:
                gguf_copies.write(copy, model, tokenizer)
    except Exception as error:
        raise ModelError(f"model {config.name!r}: {_explain(config, source, error)}") from error
    _check_tokenizer(config, tokenizer)
    return model, tokenizer, model_label(config.name), _commit(source, arguments.get("revision"))


def _check_whole(model: Any, found: dict[str, Any]) -> None:
    """Refuse a model of whose weights the files lack some: transformers would make them random numbers.

    Raises:
        _MissingWeightsError: naming some.
    """
    lacking = sorted({*found["missing_keys"], *(str(name) for name, *_ in found["mismatched_keys"])})
    if not lacking:
        return
    others = sorted(found["unexpected_keys"])
    raise _MissingWeightsError(
        f"its files lack {len(lacking):,} of the tensors of {type(model).__name__} ({_some(lacking)})"
        + (f" and hold {len(others):,} that it does not have ({_some(others)})" if others else "")
        + ": they would be random numbers; check that the files are whole and of the model that config.json describes"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


def _commit(source: Path | str, revision: str | None) -> str | None:
    """The git commit of a hub model that was just loaded, by the folder of the hub's cache it lies in."""
    if isinstance(source, Path):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def boot(model: Any, tokenizer: Any, label: str, config: ModelConfig) -> Any:
    """The model as transformer-lens sees it, with its weights processed as `config` asks.

    Raises:
        ModelError: transformer-lens has no adapter for it.
    """
    with _quiet():  # importing it changes what transformers says
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers import source

    try:
        # The processor of images or sound is looked up on the hub by the label, and torchvision installed for it.
        with _quiet(), _guarded(config), _replaced(source, "load_modality_processor", lambda *_: None):
            bridge = TransformerBridge.boot_transformers(
                label,
                hf_model=model,
                tokenizer=tokenizer,
                dtype=getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
            )
            if config.weight_processing != "none":
                centre = config.weight_processing == "center_and_fold"
                bridge.process_weights(fold_ln=True, center_writing_weights=centre, center_unembed=centre)
    except _CodeRefusedError as error:
        raise ModelError(f"model {config.name!r}: {_needs_code()}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {config.name!r}: transformer-lens cannot bridge {type(model).__name__} ({reason})"
        ) from error
    return bridge.requires_grad_(False)


def code_sha256(*objects: Any) -> str | None:
    """A hash of the code that came with a model and that these objects' classes are made of; None: there is none."""
    packages = {
        name.rpartition(".")[0] for one in objects if (name := type(one).__module__).startswith(_REMOTE_MODULES)
    }
    modules = {name: module for name, module in sys.modules.items() if name.rpartition(".")[0] in packages}
    if not modules:
        return None
    sources = sorted(hashlib.sha256(inspect.getsource(module).encode()).hexdigest() for module in modules.values())
    return hashlib.sha256(" ".join(sources).encode()).hexdigest()


def _find(config: ModelConfig) -> tuple[str | Path, dict[str, Any]]:
    """Where the model is, and how transformers is told so."""
    path = DEMO_FOLDER if config.name == DEMO else expanded(config.name)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name, "local_files_only": True}
    if path.is_file() and path.suffix in (".safetensors", *_PICKLES):
        raise ModelError(f"model {config.name!r}: a file of weights alone; name the folder that its config.json is in")
    if path.is_dir():
        _check_regular(config, path)
        if (pickles := _pickles(path)) and not any(file.is_file() for file in path.glob("*.safetensors*")):
            raise ModelError(f"model {config.name!r}: {_is_pickle(config, pickles[0])}")
        return path, {"local_files_only": True}
    if config.name.startswith((".", "/", "~")) or config.name.endswith(".gguf"):
        raise ModelError(f"model {config.name!r}: no such folder or file")
    return config.name, {"revision": config.revision or "main"}


def _pickles(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES and path.is_file())


def _check_regular(config: ModelConfig, folder: Path) -> None:
    """Raise ModelError if something else stands where transformers would open a file, and perhaps wait for ever."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_OPENED) and not path.is_file() and not path.is_dir():
            raise ModelError(
                f"model {config.name!r}: {path.name} is a pipe, a device or a link to nothing where a file should be; "
                "put the file there, or take it away"
            )


def _check_tokenizer(config: ModelConfig, tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer knows no text, as one is that transformers makes without the files of any."""
    ids = tokenizer(_PROBE_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    if set(ids) <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"model {config.name!r}: its tokenizer makes no tokens of {_PROBE_TEXT!r}; are its files missing, such as "
            "tokenizer.json? Put those of the model's tokenizer beside its weights"
        )


def _explain(config: ModelConfig, source: str | Path, error: Exception) -> str:
    reason = first_line(error)
    if isinstance(error, _PickleRefusedError):
        return _is_pickle(config, "weights that its configuration or index names")
    if isinstance(error, _MissingWeightsError):
        return str(error)
    if isinstance(error, _CodeRefusedError) or "trust_remote_code" in str(error):
        return _needs_code()
    if isinstance(source, Path):
        return f"cannot be loaded ({reason})"
    if isinstance(error, OSError) and "does not appear to have a file named model.safetensors" in str(error):
        return _is_pickle(config, "not there as safetensors on the hub")
    return explain_hub_error(error, config.name, "model", "model")


def _needs_code() -> str:
    return (
        "it needs Python code that comes with it, and none of it was run; if you have read and trust that code, add "
        "model.trust_remote_code=true (in Python ModelConfig(trust_remote_code=True))"
    )


def _is_pickle(config: ModelConfig, what: str) -> str:
    """What to do about weights that are no safetensors."""
    name = str(expanded(config.name)) if expanded(config.name).exists() else config.name
    target = f"{Path(name).name}-safetensors"
    return (
        f"its weights are {what}, and only safetensors and GGUF are read, since a pickle can run code; if you trust "
        f'it, convert it once: python -c "import transformers as t; [c.from_pretrained({name!r}).save_pretrained('
        f'{target!r}) for c in (t.AutoModelForCausalLM, t.AutoTokenizer)]", then model.name=./{target}'
    )


@contextlib.contextmanager
def _guarded(config: ModelConfig) -> Iterator[None]:
    """While open, no pickle is read, and no code of a model is fetched or run unless `config` allows it."""

    def refuse(kind: type[_RefusedError]) -> Callable[..., NoReturn]:
        def refused(*_: Any, **__: Any) -> NoReturn:
            raise kind

        return refused

    refused = dict.fromkeys(_places(_READS_PICKLES), _PickleRefusedError)
    if not config.trust_remote_code:
        refused |= dict.fromkeys(_places(_RUNS_CODE), _CodeRefusedError)
    with contextlib.ExitStack() as stack:
        for (module, name), kind in refused.items():
            stack.enter_context(_replaced(import_module(module), name, refuse(kind)))
        yield


def _places(names: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    return ((module, name) for module, several in names.items() for name in several)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    previous = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, previous)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, keep the libraries' warnings and progress bars off the user's terminal; they are then as before."""
    import logging
    import warnings

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
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
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # and those of the hub
        if bars and not hub_bars:
            disable_progress_bars()
        elif hub_bars and not bars:
            enable_progress_bars()
