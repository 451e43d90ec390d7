"""Reads and checks a dictionary's folder for `sae.architectures.load`; identity and hash of a dictionary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.base import CONFIG_FILE, FORMAT, TRAINED_AS, WEIGHTS_FILE, WEIGHTS_HASH, Dictionary, dtype_name
from sae.dictionary.origin import Origin
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, FormatError
from sae.files.damage import damaged
from sae.files.digest import sha256_of
from sae.files.formats import HEAD
from sae.files.paths import expanded, resolve
from sae.files.reading import load_tensors, read_object, taken_apart, tensor_outlines
from sae.files.sums import recorded


def weights_sha256(dictionary: Dictionary) -> str:
    """Hash of a dictionary's weights, independent of their device."""
    digest = hashlib.sha256(dictionary.architecture.encode())
    for name, parameter in sorted(dictionary.named_parameters()):
        # `detach` refuses tensors created in inference mode and moved outside it.
        content = parameter.data.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


@dataclass(frozen=True)
class SavedDictionary:
    """A dictionary's two files, read and checked, before an object is built from them."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)


def read_saved(path: str | Path, device: str | torch.device = "cpu") -> SavedDictionary:
    """Read a dictionary folder (or a run folder that holds one).

    Raises:
        FormatError: no dictionary there, another format, a newer version, a pickle, or weights that are damaged or of
            the wrong shape.
    """
    folder, config = _read_config(path)
    tensors = load_tensors(folder / WEIGHTS_FILE, device)
    _check_saved(folder, config, tensors)
    if WEIGHTS_HASH in config and config[WEIGHTS_HASH] != sha256_of(folder / WEIGHTS_FILE):
        raise damaged(
            folder / WEIGHTS_FILE,
            f"its SHA-256 is not the one in {CONFIG_FILE}: they belong to two dictionaries, or saving was interrupted",
        )
    return SavedDictionary(config, tensors)


def read_outline(path: str | Path) -> SavedDictionary:
    """As `read_saved`, but with tensors on the device `meta`: weights are neither read nor compared with their hash.

    Raises:
        FormatError: as `read_saved`, as far as `config.json` and the header of the weights show it.
    """
    folder, config = _read_config(path)
    tensors = tensor_outlines(folder / WEIGHTS_FILE)
    _check_saved(folder, config, tensors)
    return SavedDictionary(config, tensors)


def _read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """A dictionary's folder, and its configuration."""
    if expanded(path).suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise FormatError(
            f"dictionary {str(path)!r}: pickled files are not read, since they can run code; "
            f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    folder = resolve(path, "dictionary", CONFIG_FILE)
    if folder is None:
        raise FormatError(f"dictionary {str(path)!r}: no {CONFIG_FILE} there; give a dictionary folder or a run folder")
    config = read_object(folder / CONFIG_FILE)
    FORMAT.check(config, f"dictionary {str(folder)!r}", CONFIG_FILE)
    return folder, config


def _check_saved(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration that contradicts the tensors or itself, and weights that are not finite."""
    for key in ("d_in", "d_sae", *(key for key in ("k", "d_out") if key in config)):
        if type(config.get(key)) is not int:
            raise damaged(folder / CONFIG_FILE, f"{key}={config.get(key)!r}: expected a whole number")
    shape = tuple(tensors["W_dec"].shape) if "W_dec" in tensors else None
    d_out = config.get("d_out", config["d_in"])
    if shape != (config["d_sae"], d_out):
        actual = "no W_dec" if shape is None else f"W_dec {list(shape)}"
        raise damaged(
            folder / WEIGHTS_FILE,
            f"weights do not fit {CONFIG_FILE}: {actual}, expected [{config['d_sae']}, {d_out}]",
        )
    for name, tensor in tensors.items():
        dtype = dtype_name(tensor.dtype)
        if dtype != config.get("dtype", dtype):
            raise damaged(folder / WEIGHTS_FILE, f"{name} is {dtype}, but {CONFIG_FILE} says {config['dtype']!r}")
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise damaged(folder / WEIGHTS_FILE, f"{name} has values that are not finite (NaN or infinity)")
    _check_metadata(folder / CONFIG_FILE, config)


def _check_metadata(path: Path, config: Mapping[str, Any]) -> None:
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise damaged(path, "metadata should be keys and values")
    try:
        Origin.of(metadata)
    except ConfigError as error:
        raise FormatError(f"{str(path)!r}: {error}") from error
    if isinstance(metadata.get("tokens"), dict):
        with taken_apart(path):
            TokenPolicy.from_json(metadata["tokens"])
    trained = metadata.get("trained", {})
    settings = trained.get("settings", {}) if isinstance(trained, dict) else None
    if not isinstance(settings, dict):
        raise damaged(path, "metadata.trained should be keys and values")
    if recorded(path):
        return  # saved like this, possibly with a k that differs from training
    for key in TRAINED_AS & config.keys() & settings.keys():
        if config[key] != settings[key]:
            raise damaged(path, f"{key}={config[key]!r}, but {settings[key]!r} in its own metadata")


def identify(dictionary: Dictionary) -> dict[str, Any]:
    """Identity of a dictionary: its configuration, the hook point a transcoder reads, and a hash of its weights."""
    excluded = (*HEAD, "metadata")
    config = {key: value for key, value in dictionary.config().items() if key not in excluded}
    reads = dictionary.origin.read_elsewhere
    return {**config, **({"reads": reads} if reads else {}), "weights_sha256": weights_sha256(dictionary)}
