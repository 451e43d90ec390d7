"""Puts a loaded model on its device, or spreads its modules over several devices by accelerate."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from sae.config.environment import choose_device
from sae.config.sources import BALANCES, ModelConfig
from sae.errors import ConfigError, ModelError
from sae.files.hub_errors import first_line


def place(model: Any, config: ModelConfig, device: str | torch.device) -> torch.device:
    """Put a model where its configuration says.

    Its modules then move their inputs to their own device, and what it returns comes back to the first.

    Args:
        model: the Hugging Face model, on the CPU; changed in place.
        config: its configuration; `device_map`, or else `device`, is read.
        device: where it goes if the configuration does not say.

    Returns:
        The device of its tokens, of what it returns, and of the activations that are read from it.

    Raises:
        ConfigError: there is no such device, or the map does not fit the model.
        ModelError: accelerate is not installed, or the model does not fit on the devices.
    """
    if config.device_map is None:
        chosen = choose_device(config.device or str(device))
        model.to(chosen)
        return chosen
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("model.device_map needs the package accelerate: pip install accelerate")
    from accelerate import dispatch_model

    device_map = dict(_map_of(model, config.device_map))
    names = dict.fromkeys(map(str, device_map.values()))
    if "cpu" in names and len(names) > 1:
        raise ConfigError(
            f"model.device_map of {config.name!r}: some modules are on cpu and others are not: their weights would be "
            "copied for every pass; put every module on a GPU, or none"
        )
    for name in names:
        choose_device(f"cuda:{name}" if name.isdigit() else name)
    first = _first_device(model, device_map)
    try:
        dispatch_model(
            model, device_map, main_device=first, skip_keys=getattr(model, "_skip_keys_device_placement", None)
        )
    except (ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"model.device_map of {config.name!r} ({first_line(error)}); name modules such as "
            f"{_some_modules(model)}, every one of them, or take auto"
        ) from error
    check_shared(model, config.name)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"model {config.name!r}: does not fit on the devices of model.device_map; add a device to it")
    return torch.device(f"cuda:{first}" if isinstance(first, int) else first)


def _map_of(model: Any, wanted: str | dict[str, Any]) -> dict[str, Any]:
    """Devices of modules by name; if only a way to balance is given, as it divides them."""
    if not isinstance(wanted, str):
        return wanted
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: list[str] = list(getattr(model, "_no_split_modules", None) or ())
    most = None
    if BALANCES[wanted]:
        most = get_balanced_memory(model, no_split_module_classes=whole, low_zero=wanted == "balanced_low_0")
    return dict(infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole))


def _first_device(model: Any, device_map: dict[str, Any]) -> Any:
    """The device of the embedding, which reads the tokens."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    parents = [".".join(name.split(".")[:length]) for length in range(len(name.split(".")), -1, -1)]
    return next((device_map[parent] for parent in parents if parent in device_map), next(iter(device_map.values())))


def check_shared(model: Any, name: str) -> None:
    """Raise ConfigError if a module's weights are not where it runs, because another module shares them."""
    for path, module in model.named_modules():
        runs_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if runs_on is None or isinstance(runs_on, dict):
            continue
        runs_on = torch.device(f"cuda:{runs_on}" if isinstance(runs_on, int) else runs_on)
        places = {
            (parameter.device.type, parameter.device.index or 0) for parameter in module.parameters(recurse=False)
        }
        if places - {(runs_on.type, runs_on.index or 0), ("meta", 0)}:
            raise ConfigError(
                f"model.device_map of {name!r}: {path} is to run on {runs_on}, and shares its weights with a module on "
                "another device, as an embedding and the last layer often do: put both on one"
            )


def _some_modules(model: Any) -> str:
    return ", ".join(name for name, _ in model.named_modules() if 1 <= name.count(".") <= 2)[:120]
