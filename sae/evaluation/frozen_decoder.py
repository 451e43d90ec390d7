"""The frozen-decoder baseline, which shows what an encoder alone can learn: its decoder stays random."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from sae.activations.loader import ActivationLoader
from sae.architectures import load
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.errors import FormatError, TrainingError, TrainingInterrupted
from sae.evaluation.baselines import Baseline
from sae.evaluation.held_out import HeldOut
from sae.evaluation.reconstruction import Reconstructor, from_dictionary
from sae.training import Recipe, train_all

BATCH, LEAST_STEPS = 1024, 16
_POOL_TOKENS = 65_536
_PURPOSE = "frozen decoder"


def train_frozen_decoders(wanted: Sequence[Baseline], held_out: HeldOut, tokens: int) -> dict[Baseline, Reconstructor]:
    """Train encoders under fixed random decoders, all in one pass over the cache's training activations.

    Each has the architecture, d_sae and k of the dictionary it is compared with, and is trained with the defaults of
    `sae.train`, except that W_dec keeps its random initial unit rows: the "frozen decoder" of Korznikov et al. 2026,
    "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?". No dictionary starts with these rows. In
    the paper it is trained as long as the dictionary; here on `tokens`, which favours the dictionary if these are
    fewer.

    Args:
        wanted: the baselines, with architecture, d_sae and k.
        held_out: of the evaluation; they are trained on the training tokens of its cache, and stored next to its
            unfinished sums.
        tokens: number of training tokens; at most one pass over the split.

    Raises:
        TrainingError: one of them diverged.
        TrainingInterrupted: Ctrl-C.
    """
    if not wanted:
        return {}
    device, progress, folder = held_out.device, held_out.progress, held_out.unfinished.folder
    loader = ActivationLoader(
        held_out.cache, held_out.hook, batch_size=1, purpose=_PURPOSE, pool_tokens=_POOL_TOKENS, device=device
    )
    tokens = min(tokens, loader.tokens_per_epoch)
    loader.batch_size = min(BATCH, max(1, tokens // LEAST_STEPS))
    settings = TrainConfig(tokens=tokens, freeze=("W_dec",))
    recipes = {
        str(number): Recipe(_config(baseline), settings, purpose=_PURPOSE) for number, baseline in enumerate(wanted)
    }
    trained = tokens // loader.batch_size * loader.batch_size
    paths = {} if folder is None else {name: folder / f"frozen-decoder-{name}" for name in recipes}
    with contextlib.suppress(FormatError):
        if paths:
            dictionaries = [load(path) for path in paths.values()]
            pairs = zip(wanted, dictionaries, strict=True)
            return {baseline: _reconstructor(baseline, dictionary, trained, device) for baseline, dictionary in pairs}
    progress("frozen decoder", 0, tokens)
    try:
        outcome = train_all(
            {"activations": loader}, recipes, device=device,
            progress=lambda done, of, _: progress("frozen decoder", done, of),
        )  # fmt: skip
    except TrainingInterrupted as stopped:
        raise TrainingInterrupted(
            "stopped while a baseline of the evaluation was trained; run the same command again to continue"
        ) from stopped
    if outcome.failures:
        reason = next(iter(outcome.failures.values()))
        raise TrainingError(f"the frozen-decoder baseline: {reason}; evaluation.frozen_decoder_tokens=0 leaves it out")
    for name, path in paths.items():
        outcome.dictionaries[name].save(path)
    pairs = zip(wanted, outcome.dictionaries.values(), strict=True)
    return {baseline: _reconstructor(baseline, dictionary, trained, device) for baseline, dictionary in pairs}


def _reconstructor(
    baseline: Baseline, dictionary: Dictionary, trained: int, device: str | torch.device
) -> Reconstructor:  # fmt: skip
    description = (
        f"frozen decoder: {baseline.architecture}, {baseline.d_sae:,} random directions that stay, k = "
        f"{baseline.k}, its encoder trained on {trained:,} tokens"
    )
    return from_dictionary(dictionary.to(device), description)


def _config(baseline: Baseline) -> DictionaryConfig:
    nested = {"prefixes": baseline.prefixes} if baseline.prefixes else {}
    return DictionaryConfig.model_validate(
        {"architecture": baseline.architecture, "d_sae": baseline.d_sae, "k": min(baseline.k, baseline.d_sae), **nested}
    )
