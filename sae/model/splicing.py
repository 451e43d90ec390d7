"""Splices a dictionary into its language model: replaces activations with reconstructions while a block is open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import place_in_model
from sae.dictionary.origin import Origin, check_belongs, check_sites
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.passes import Pass

Edit = Callable[[Tensor], Tensor]
Change = Callable[[Tensor, Tensor, "Pass | None"], Tensor]


@contextlib.contextmanager
def splice(
    language_model: LanguageModel,
    dictionary: Dictionary | Sequence[Dictionary],
    *,
    hook: str | None = None,
    target_hook: str | None = None,
    error_term: bool = False,
    edit: Edit | None = None,
) -> Iterator[LanguageModel]:
    """While open, replace the activation x at `hook` with the dictionary's reconstruction x̂ in every forward pass.

    The passes are those of `logits`, `generate`, `bridge` and `hf_model`.

    A transcoder replaces the activation y at its target hook point with ŷ, computed from x at the hook point that it
    reads, in the same pass. Everything below about x then applies to y.

    Tokens that were masked out of training (BOS, first positions) keep their activation. First positions are those of
    the text, however many passes read it: tokens in a key-value cache count, padding does not.

    Args:
        language_model: the model to splice into; `LanguageModel.of` makes one of a Hugging Face model.
        dictionary: a dictionary that takes raw activations. Or several, in any order: each is spliced at the hook point
            it was trained on, and reads activations that those before it in the model have changed. `hook`,
            `target_hook` and `edit` work only with a single one.
        hook: hook point that it reads; None for the one it was trained on.
        target_hook: hook point that it writes; None for the target it was trained on, or `hook` if it has none.
        error_term: use x̂ + (x − x̂) instead, the second part without gradient: the model's output is unchanged but for
            rounding, and its gradients reach the features.
        edit: changes the features `[context, seq, d_sae]` before they are decoded (ablate, scale, steer). With
            `error_term`, the error is that of the unedited features.

    Raises:
        ConfigError: a transcoder's target comes before its input, or is unknown; two dictionaries write the same hook
            point; or an argument for a single dictionary is given with several.
        ModelError: the dictionary belongs to another model; its hook point is unknown or has another width; its record
            of masked tokens cannot be read; a transcoder is in a pass that begins in the middle of the model; or a pass
            without `position_ids` continues from an unknown kind of cache.
    """
    if not isinstance(dictionary, Dictionary):
        if not (hook is target_hook is edit is None):
            raise ConfigError(
                "hook, target_hook and edit are for a single dictionary: splice each in a block of its own"
            )
        with _several(language_model, dictionary, error_term):
            yield language_model
        return

    def new(x: Tensor, y: Tensor, now: Pass | None) -> Tensor:
        return _reconstruct(dictionary, x, y, error_term, edit)

    with replacing_by(language_model, dictionary, new, hook=hook, target_hook=target_hook):
        yield language_model


@contextlib.contextmanager
def replacing_by(
    language_model: LanguageModel, dictionary: Dictionary, new: Change, *,
    hook: str | None = None, target_hook: str | None = None,
) -> Iterator[None]:  # fmt: skip
    """While open, `new` gives the activations that the dictionary gives, on the tokens that are not masked.

    Args:
        language_model: the model.
        dictionary: a dictionary of the model.
        new: maps x, which the dictionary encodes, y, which it reconstructs (x itself, except for a transcoder), and the
            pass to what takes the place of y; all activations are `[context, seq, d_in]`.
        hook: hook point that it reads; None for the one it was trained on.
        target_hook: hook point that it writes; None for the target it was trained on, or `hook` if it has none.

    Raises:
        SaeError: as for `splice`.
    """
    if not isinstance(language_model, LanguageModel):
        raise ConfigError(
            f"a {type(language_model).__name__} as language model: expected a sae.LanguageModel; make one with "
            "sae.LanguageModel(name), or with sae.LanguageModel.of(model, tokenizer) from a Hugging Face model"
        )
    origin = dictionary.origin.at(hook, target_hook)
    reads, gives = origin.reads.hook, origin.gives.hook
    check_sites(origin, gives)
    if reads is None or gives is None:
        raise ModelError("the dictionary does not record its hook point: give hook='blocks.N.…'")
    check_belongs(origin, language_model.as_place)
    policy = token_policy(dictionary)

    def replacement(y: Tensor, now: Pass | None) -> Tensor:
        x = _input(origin, read, now) if origin.of_transcoder else y
        for name, width, expected, verb in (
            (reads, x.shape[-1], dictionary.d_in, "takes"), (gives, y.shape[-1], dictionary.d_out, "gives"),
        ):  # fmt: skip
            if width != expected:
                raise ModelError(f"hook {name!r}: activations are {width} wide, the dictionary {verb} {expected}")
        replaced = new(x, y, now)
        if policy is None or now is None:
            return replaced
        return torch.where(policy.eligible(now.tokens, now.positions)[..., None], replaced, y)

    reading = language_model.reading(reads) if origin.of_transcoder else contextlib.nullcontext([])
    with reading as read, language_model.replacing(gives, replacement, with_pass=True):
        yield


@contextlib.contextmanager
def _several(language_model: LanguageModel, dictionaries: Sequence[Dictionary], error_term: bool) -> Iterator[None]:
    targets = [dictionary.origin.gives.hook for dictionary in dictionaries]
    for hook in targets:
        if hook is not None and targets.count(hook) > 1:
            raise ConfigError(f"{targets.count(hook)} dictionaries give {hook!r}: splice one of them")
    with contextlib.ExitStack() as stack:
        for dictionary in sorted(dictionaries, key=_place):
            stack.enter_context(splice(language_model, dictionary, error_term=error_term))
        yield


def _place(dictionary: Dictionary) -> tuple[int, int]:
    """Orders dictionaries as the model computes what they give."""
    return place_in_model(dictionary.origin.gives.hook or "") or (0, 0)


def _input(origin: Origin, read: list[Tensor], now: Pass | None) -> Tensor:
    """The transcoder's input in this pass."""
    if now is None or now.tokens is None or not read:
        raise ModelError(
            f"hook {origin.gives}: the transcoder there reads {origin.reads}, which is unknown in a pass that "
            "begins in the middle of the model; run the model from the tokens"
        )
    return read.pop()


def _reconstruct(dictionary: Dictionary, x: Tensor, y: Tensor, error_term: bool, edit: Edit | None) -> Tensor:
    """ŷ from x, plus the error of the unedited ŷ if `error_term`; y is x except for transcoders."""
    if edit is None:
        reconstruction = dictionary(x)
        return reconstruction + (y - reconstruction).detach() if error_term else reconstruction
    features = dictionary.encode(x)
    edited = dictionary.decode(edit(features), like=x)
    return edited + (y - dictionary.decode(features, like=x)).detach() if error_term else edited


def token_policy(dictionary: Dictionary) -> TokenPolicy | None:
    """Which tokens counted in training; None if the dictionary does not record it.

    Raises:
        ModelError: the record cannot be read.
    """
    record = dictionary.metadata.get("tokens")
    if not record:
        return None
    try:
        policy = TokenPolicy.from_json(record)
        policy.eligible(torch.zeros(1, 1, dtype=torch.int64))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the dictionary's metadata has tokens={record!r}: expected prepend_bos, masked_positions and masked_ids; "
            "set dictionary.metadata['tokens'] = None to replace every position"
        ) from error
    return policy
