"""What can stand in for a model's modules: transcoders, their skip connections, best affine maps, means, zeros."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.tokens import ContextBatch
from sae.config.environment import memory_of
from sae.config.progress import Progress, within
from sae.config.splits import TRAIN
from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import place_in_model
from sae.dictionary.origin import check_belongs
from sae.errors import ConfigError, named
from sae.evaluation.budget import fitted_tokens
from sae.evaluation.linear_maps import AffineMap, LeastSquares
from sae.evaluation.losses import at_eligible
from sae.model.language_model import LanguageModel

DICTIONARY, SKIP, LINEAR, MEAN, ZERO = KINDS = ("dictionary", "skip", "linear", "mean", "zero")
"""Kinds of stand-ins, in the order of the tables."""
_CONTEXTS_AT_ONCE = 64
_SHARE_OF_MEMORY = 0.25
"""Of the device, for sums of affine maps that are fitted in one pass of the language model."""
Rows = Float[Tensor, "rows _"]


@dataclass(frozen=True)
class Module:
    """A module of the model, from the hook point that its transcoder reads to the one that it gives.

    Attributes:
        name: name of the transcoder.
        dictionary: the transcoder.
        reads, gives: the hook points.
    """

    name: str
    dictionary: Dictionary
    reads: str
    gives: str


@dataclass(frozen=True)
class StandIns:
    """Functions that can compute a module's output from its input, by kind.

    Attributes:
        module: the module.
        functions: of rows of activations; no `skip` if the transcoder has none.
        device: of the rows.
        fitted_tokens: number of training tokens that its mean and affine map are fitted on.
    """

    module: Module
    functions: Mapping[str, Callable[[Rows], Rows]]
    device: torch.device
    fitted_tokens: int

    def __call__(self, kind: str, x: Rows) -> Rows:
        return self.functions[kind](x.float().to(self.device))


def modules_of(dictionaries: Mapping[str, Dictionary], language_model: LanguageModel) -> list[Module]:
    """The modules that transcoders stand in for, in the order in which the model computes them.

    Raises:
        ConfigError: there is none; one is an autoencoder, does not record its hook points, gives a hook point before
            the one it reads, or has another width; or two give the same hook point.
        ModelError: one belongs to another model, or a hook point does not exist.
    """
    if not dictionaries:
        raise ConfigError("there is no transcoder to replace a module with; give at least one")
    modules: dict[str, Module] = {}
    for name, dictionary in dictionaries.items():
        module = _module(name, dictionary)
        with named(name):
            check_belongs(dictionary.origin, language_model.as_place)
            language_model.check_hook(module.reads)
            language_model.check_replaceable(module.gives)
        other = modules.setdefault(module.gives, module)
        if other is not module:
            raise ConfigError(
                f"{other.name} and {name} both give {module.gives!r}: only one can take its place; name one transcoder "
                "for each module"
            )
    _check_widths(list(modules.values()), language_model)
    return sorted(modules.values(), key=lambda module: place_in_model(module.gives) or (0, 0))


def _module(name: str, dictionary: Dictionary) -> Module:
    with named(name):
        origin = dictionary.origin
        reads, gives = origin.reads.hook, origin.gives.hook
    if reads is None or gives is None:
        raise ConfigError(
            f"{name}: does not record which hook points it reads and gives: set dictionary.metadata['hook'] and "
            "['target_hook'] to 'blocks.N.…'"
        )
    if not origin.of_transcoder:
        raise ConfigError(
            f"{name}: reads and gives {gives!r}, so it is an autoencoder, which replaces no module; leave it out (sae "
            "eval measures it)"
        )
    return Module(name, dictionary, reads, gives)


def _check_widths(modules: Sequence[Module], language_model: LanguageModel) -> None:
    hooks = sorted({hook for module in modules for hook in (module.reads, module.gives)})
    activations = language_model.activations(language_model.probe_tokens(1, 2), hooks)
    place = replace(language_model.as_place, width=lambda hook: activations[hook].shape[-1])
    for module in modules:
        with named(module.name):
            check_belongs(module.dictionary.origin, place, reads=module.reads, gives=module.gives)


def fit_stand_ins(
    modules: Sequence[Module], cache: ActivationCache, language_model: LanguageModel, device: torch.device,
    progress: Progress,
) -> list[StandIns]:  # fmt: skip
    """All stand-ins of every module; means and affine maps are those of the model's activations on training tokens.

    The model reads the training tokens once for each group of modules whose sums fit into memory together.

    Raises:
        ConfigError: no training token counts, or the sums of one group do not fit into memory.
    """
    groups, most, fitted = groups_to_fit(modules, device), tokens_to_fit(modules, cache), dict[str, StandIns]()
    report = within(progress, "linear maps")
    for number, group in enumerate(groups):
        check_memory(group, device)

        def report_group(tokens: int, before: int = number * most) -> None:
            report(before + min(most, tokens), len(groups) * most)

        for entry in _fit_group(group, cache, language_model, device, most, report_group):
            fitted[entry.module.gives] = entry
    return [fitted[module.gives] for module in modules]


def _fit_group(
    group: Group, cache: ActivationCache, language_model: LanguageModel, device: torch.device, most: int,
    report: Callable[[int], None],
) -> Iterator[StandIns]:  # fmt: skip
    hooks = sorted({hook for reads, modules in group.items() for hook in (reads, *(entry.gives for entry in modules))})
    fits = {reads: LeastSquares() for reads in group}
    tokens = 0
    report(tokens)
    for batch in _training_contexts(cache, most):
        activations = language_model.activations(batch.tokens.to(language_model.device), hooks)
        rows = {name: x[batch.eligible.to(x.device)].float().to(device) for name, x in activations.items()}
        for reads, fit in fits.items():
            fit.add_(rows[reads], torch.cat([rows[module.gives] for module in group[reads]], 1))
            tokens = fit.tokens
        report(tokens)
    if not tokens:
        raise ConfigError("the token policy leaves no training token, so means are unknown; harvest more text")
    report(most)
    for reads, modules in group.items():
        maps = fits.pop(reads).solve_each([module.dictionary.d_out for module in modules])
        for module, linear in zip(modules, maps, strict=True):
            yield _stand_ins(module, linear.on(device), device, tokens)


Group = dict[str, list[Module]]
"""Modules whose sums are kept at the same time, by the hook point that they read: these share a covariance."""


def groups_to_fit(modules: Sequence[Module], device: torch.device) -> list[Group]:
    """Modules in groups, each of which takes at most a quarter of the device's memory, or is of a single hook point."""
    together: Group = {}
    for module in modules:
        together.setdefault(module.reads, []).append(module)
    groups: list[Group] = [{}]
    for reads, same in together.items():
        if groups[-1] and fit_bytes({**groups[-1], reads: same}) > memory_of(device) * _SHARE_OF_MEMORY:
            groups.append({})
        groups[-1][reads] = same
    return groups


def fit_bytes(group: Group) -> int:
    """Memory that sums take: covariances in float64 of most tokens and of those held back, and what solving takes."""
    sizes = [
        (modules[0].dictionary.d_in, sum(module.dictionary.d_out for module in modules)) for modules in group.values()
    ]
    sums = sum(2 * d_in * (d_in + d_out) for d_in, d_out in sizes)
    return 8 * (sums + max(d_in * (4 * d_in + 3 * d_out) for d_in, d_out in sizes))


def check_memory(group: Group, device: torch.device) -> None:
    """Refuse affine maps whose sums the machine cannot hold.

    Raises:
        ConfigError: they take more memory than the device has.
    """
    needed, available = fit_bytes(group), memory_of(device)
    if needed > available:
        raise ConfigError(
            f"affine maps from {', '.join(group)}: their sums take {needed / 1e9:.1f} GB, but the device has "
            f"{available / 1e9:.1f}; use a machine with more memory, or leave these transcoders out"
        )


def tokens_to_fit(modules: Sequence[Module], cache: ActivationCache) -> int:
    """Most training tokens that means and affine maps are fitted on; those that the token policy masks are left out."""
    return min(fitted_tokens(cache, max(module.dictionary.d_in for module in modules)), cache.rows(TRAIN))


def _training_contexts(cache: ActivationCache, most: int) -> Iterator[ContextBatch]:
    """Training contexts, evenly spaced over the cache."""
    length = cache.context_length
    stride = max(1, -(-cache.rows(TRAIN) // max(most, length)))
    for batch in cache.contexts(TRAIN, batch_contexts=_CONTEXTS_AT_ONCE):
        first = batch.first_row // length
        chosen = (torch.arange(first, first + len(batch.tokens)) % stride == 0).nonzero().flatten()
        if len(chosen):
            yield replace(
                batch, tokens=batch.tokens[chosen], documents=batch.documents[chosen], eligible=batch.eligible[chosen],
                sections=None,
            )  # fmt: skip


def _stand_ins(module: Module, linear: AffineMap, device: torch.device, tokens: int) -> StandIns:
    dictionary = module.dictionary
    if dictionary.W_dec.device != torch.empty(0, device=device).device:
        dictionary = copy.deepcopy(dictionary).to(device)
    functions: dict[str, Callable[[Rows], Rows]] = {
        DICTIONARY: dictionary,
        LINEAR: linear,
        MEAN: lambda x: linear.mean_y.expand(len(x), -1),
        ZERO: lambda x: torch.zeros_like(linear.mean_y).expand(len(x), -1),
    }
    if dictionary.W_skip is not None:
        functions[SKIP] = AffineMap(dictionary.W_skip.detach(), linear.mean_x, linear.mean_y).on(device)
    return StandIns(module, {kind: functions[kind] for kind in KINDS if kind in functions}, device, tokens)


@contextlib.contextmanager
def together(
    language_model: LanguageModel, stand_ins: Sequence[StandIns], kind: str | None,
    eligible: Bool[Tensor, "context seq"],
) -> Iterator[None]:  # fmt: skip
    """While open, every pass over these contexts has all modules replaced, each reading what the others have changed.

    Args:
        language_model: the model.
        stand_ins: of the modules, in the order in which the model computes them.
        kind: which of them; None: the modules' own activations, which changes nothing.
        eligible: positions that are replaced; the others keep the activations that the model computes there.
    """
    with contextlib.ExitStack() as stack:
        for entry in stand_ins:
            latest = stack.enter_context(language_model.reading(entry.module.reads))
            new = torch.clone if kind is None else _replacement(entry, kind, latest, eligible)
            stack.enter_context(language_model.replacing(entry.module.gives, new))
        yield


def _replacement(
    entry: StandIns, kind: str, latest: list[Tensor], eligible: Bool[Tensor, "context seq"]
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    return at_eligible(eligible, lambda _: entry(kind, latest.pop()[eligible]))
