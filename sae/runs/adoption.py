"""The configuration of a run for a dictionary that was trained elsewhere: what its files say about its training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sae.architectures import ARCHITECTURES
from sae.config.base import RENAMED, read_words
from sae.config.file import parse_config
from sae.config.progress import Progress, announce
from sae.config.settings import DictionaryConfig, RunConfig, TrainConfig
from sae.config.sources import DataConfig, ModelConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import split
from sae.dictionary.origin import Origin, in_current_form
from sae.dictionary.saved import identify
from sae.dictionary.sites import check_order
from sae.errors import ConfigError, SaeError
from sae.files.formats import fingerprint_of
from sae.files.paths import expanded, short_name
from sae.formats import circuit_tracer
from sae.formats.foreign import CONVERTED
from sae.text.corpus import STANDARD_LIBRARY, read_documents
from sae.text.digests import ReadTexts
from sae.text.document import is_empty
from sae.training.recipe import setting_of

TOKENS, HELD_OUT_TOKENS = 100_000, 50_000
"""Defaults of `data.tokens`, which baselines are fitted on and features are collected from, and of
`data.held_out_tokens`, which everything else is measured on. Nothing is trained, so they are small."""
LOSS_TOKENS = 8192
"""Default of `evaluation.downstream_tokens` and `evaluation.legacy_tokens`."""
FEW_DOCUMENTS = 20
"""Fewer documents than this are divided into sections, each of which counts as a document."""
_HASH = 8
_LENGTH = DataConfig.model_fields["context_length"].default


def words_of(model: str | Path | ModelConfig | None, data: Sequence[str]) -> list[str]:
    """A language model and texts as KEY=VALUE settings."""
    chosen: dict[str, Any] = {}
    if isinstance(model, ModelConfig):
        chosen = {f"model.{key}": value for key, value in model.model_dump(exclude_unset=True).items()}
    elif model is not None:
        chosen = {"model.name": str(model)}
    if data:
        chosen["data.source"] = list(data)
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()]


def at_hooks(dictionary: Dictionary, name: str, hook: str | None, target: str | None) -> Dictionary:
    """The dictionary with its hook points, of which its files may not say all.

    Args:
        dictionary: its metadata is replaced.
        name: beginning of messages.
        hook: hook point that it reads; None: the one in its metadata.
        target: hook point that it gives, for a transcoder; None: likewise.

    Raises:
        ConfigError: a hook point is unknown, or given although the files state another one.
    """
    origin = dictionary.origin
    stated = {"hook": origin.reads.hook, "target": origin.gives.hook if origin.of_transcoder else None}
    for option, given in (("hook", hook), ("target", target)):
        known = stated[option]
        if given is not None and known not in (None, given) and split(str(known)) is not None:
            raise ConfigError(f"{name}: was trained on {known!r}, not {given!r}; leave --{option} out")
    reads = hook or stated["hook"]
    if reads is None or (hook is None and split(reads) is None):
        said = "do not say which hook point it reads" if reads is None else f"name {reads!r}, which is no hook point"
        raise ConfigError(
            f"{name}: its files {said}; give the hook point with --hook, such as --hook blocks.8.hook_resid_pre "
            "(hook=... in Python)"
        )
    if target is None and stated["target"] is None and (origin.of_transcoder or _transcodes(dictionary)):
        raise ConfigError(
            f"{name}: its files say that it is a transcoder, but not what it gives; give the hook point with --target, "
            "such as --target blocks.8.hook_mlp_out (target=... in Python)"
        )
    chosen = {key: value for key, value in (("hook", hook), ("target_hook", target)) if value is not None}
    dictionary.metadata = in_current_form({**dictionary.metadata, **chosen})
    check_order(dictionary.origin.reads, dictionary.origin.gives)
    return dictionary


def _transcodes(dictionary: Dictionary) -> bool:
    """Whether files of another toolkit say that it is a transcoder."""
    converted = dictionary.metadata.get(CONVERTED)
    if not isinstance(converted, Mapping):
        return False
    if converted.get("format") == circuit_tracer.TITLE:
        return True  # it has no others
    settings = converted.get("settings")
    if not isinstance(settings, Mapping):
        return False
    return bool(settings.get("transcode")) or "transcoder" in str(settings.get("architecture"))


def config_of(dictionary: Dictionary, name: str, words: Sequence[str]) -> RunConfig:
    """The configuration of a run for a dictionary.

    Args:
        dictionary: with its hook points, see `at_hooks`.
        name: beginning of messages.
        words: settings of the user, as KEY=VALUE, which come first.

    Raises:
        ConfigError: no model is named, or a setting does not exist or is invalid.
    """
    origin = dictionary.origin
    settings = _settings(dictionary, origin)
    read_words(RunConfig, words, settings, "data.held_out_tokens=20000")
    if not settings["model"].get("name"):
        raise ConfigError(
            f"{name}: its files do not name its language model; give it with --model (model=... in Python)"
        )
    config = parse_config(settings)
    data, harvest, evaluation = config.data, config.harvest, config.evaluation
    updates: dict[str, Any] = {}
    if "holdout_fraction" not in data.model_fields_set:
        share = data.held_out_tokens / (data.tokens + data.held_out_tokens)
        updates["data"] = data.model_copy(update={"holdout_fraction": min(max(round(share, 3), 0.05), 0.5)})
    for section, part in (("harvest", harvest), ("evaluation", evaluation)):
        if "batch_contexts" not in part.model_fields_set:  # results do not depend on it, memory does
            contexts = max(1, part.batch_contexts * _LENGTH // data.context_length)
            updates[section] = part.model_copy(update={"batch_contexts": min(part.batch_contexts, contexts)})
    return config.model_copy(update=updates)


def divided(config: RunConfig, progress: Progress) -> RunConfig:
    """The configuration with sections as documents, if the text has so few that a share of them might be none.

    Only text on this machine is counted, without empty documents and repeated ones; the user may have chosen too.
    """
    data = config.data
    if "holdout_by" in data.model_fields_set:
        return config
    try:
        if any(source == STANDARD_LIBRARY or not expanded(source).exists() for source in data.sources):
            return config
        read, sources = ReadTexts(), [
            read_documents(source, split=data.split, column=data.column) for source in data.sources
        ]  # fmt: skip
        texts = (document.text for document in chain.from_iterable(sources) if not is_empty(document.text))
        count = len(list(islice((text for text in texts if read.add(text)), FEW_DOCUMENTS)))
    except (OSError, SaeError):
        return config  # whoever reads all of it says what is wrong
    if not 0 < count < FEW_DOCUMENTS:
        return config
    announce(
        progress,
        f"the text is {count} document{'s' * (count > 1)}: its sections count as documents, in the held-out split and "
        "in standard errors; data.holdout_by=document keeps documents whole",
    )
    return config.model_copy(update={"data": data.model_copy(update={"holdout_by": "section"})})


def _settings(dictionary: Dictionary, origin: Origin) -> dict[str, Any]:
    """Nested settings that follow from a dictionary."""
    reads, gives = origin.reads.hook, origin.gives.hook
    model, policy = origin.models.get("", {}), origin.tokens if isinstance(origin.tokens, Mapping) else {}
    model_settings = {key: model.get(key) for key in ("name", "weight_processing", "dtype")}
    data = {
        "tokens": TOKENS,
        "held_out_tokens": HELD_OUT_TOKENS,
        "context_length": origin.context_length,
        "prepend_bos": policy.get("prepend_bos"),
        "chat_roles": policy.get("chat_roles"),
    }
    harvest = {
        "hooks": list(dict.fromkeys(hook for hook in (reads, gives) if hook is not None)),
        "dtype": origin.activation_dtype,
        "masked_positions": _masked_positions(policy),
        "mask_special_tokens": policy.get("mask_special_tokens"),
    }
    evaluation = {"downstream_tokens": LOSS_TOKENS, "legacy_tokens": LOSS_TOKENS}
    sections = {"model": model_settings, "data": data, "harvest": harvest, "evaluation": evaluation}
    known = {
        section: {key: value for key, value in part.items() if value is not None} for section, part in sections.items()
    }
    return {**known, **_training_settings(dictionary), **_dictionary_settings(dictionary, origin)}


def _masked_positions(policy: Mapping[str, Any]) -> int | None:
    """First positions to leave out: those that training left out, and here at least the first one.

    In many models its norm is a hundred times the rest, so that it would decide every mean. A cache of this package
    says on purpose how many are left out.
    """
    positions = policy.get("masked_positions")
    return max(1, positions) if isinstance(positions, int) and "mask_special_tokens" not in policy else positions


def _recorded(dictionary: Dictionary) -> Mapping[str, Any]:
    """The settings of its training, if this package trained it."""
    trained = dictionary.metadata.get("trained")
    settings = trained.get("settings") if isinstance(trained, Mapping) else None
    return settings if isinstance(settings, Mapping) else {}


def _recorded_of(kind: type[DictionaryConfig] | type[TrainConfig], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded settings of one section, also those with an older name."""
    older = {new: old for _, old, new in RENAMED}
    names = (name for name in kind.model_fields if name not in ("reads", "gives"))
    return {name: setting_of(recorded, name) for name in names if {name, older.get(name)} & recorded.keys()}


def _training_settings(dictionary: Dictionary) -> dict[str, Any]:
    recorded = _recorded(dictionary)
    train = {name: value for name, value in _recorded_of(TrainConfig, recorded).items() if value is not None}
    return {"train": train, **({"seed": recorded["seed"]} if "seed" in recorded else {})}


def _dictionary_settings(dictionary: Dictionary, origin: Origin) -> dict[str, Any]:
    recorded, sites = _recorded_of(DictionaryConfig, _recorded(dictionary)), {"reads": origin.reads.hook}
    if origin.of_transcoder:
        sites["gives"] = origin.gives.hook
    if not recorded and dictionary.architecture in ARCHITECTURES:
        own = {key: value for key, value in dictionary.settings().items() if key in DictionaryConfig.model_fields}
        k = min(DictionaryConfig.model_fields["k"].default, dictionary.d_sae)
        recorded = {"architecture": dictionary.architecture, "d_sae": dictionary.d_sae, "k": k, **own}
    return {"dictionary": {**recorded, **sites}}


def activations_key(config: RunConfig) -> str:
    """A hash of everything in a configuration that decides the activations of its cache."""
    facts = {
        "model": config.model.model_dump(mode="json", exclude={"device", "device_map", "trust_remote_code"}),
        "data": config.data.model_dump(mode="json"),
        "harvest": config.harvest.model_dump(mode="json", exclude={"batch_contexts", "cache"}),
    }
    return fingerprint_of(facts)


def folder_name(place: str | Path | Dictionary, dictionary: Dictionary, config: RunConfig) -> str:
    """The name of a run folder: the dictionary's, and a hash of its weights and of all that decides activations."""
    parts = [dictionary.architecture] if isinstance(place, Dictionary) else Path(place).absolute().parts[-2:]
    name = short_name("-".join(part for part in parts if part.strip("/\\")))
    facts = [identify(dictionary), config.hook, config.gives, activations_key(config)]
    return f"{name}-{fingerprint_of(facts)[:_HASH]}"
