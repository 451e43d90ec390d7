"""Putting a dictionary into its language model: the activation replaced by the reconstruction while a block is open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.origin import Place, check_belongs
from sae.dictionary.sites import Hooks
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.passes import Pass

Edit = Callable[[Tensor], Tensor]


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
    """While open, the activation x at `hook` is replaced by the dictionary's reconstruction x̂ in every forward pass.

    Of a transcoder, the activation y at its target's hook point is replaced by ŷ, made from x at the hook point that it
    reads, in the same pass; what is said of x below then holds for y.

    Tokens that were masked out of training (BOS, first positions) keep their activation. First positions are those of
    the text, however many passes read it: tokens in a key-value cache count, and padding does not.

    Args:
        language_model: where to splice.
        dictionary: what to splice; it takes raw activations. Or several, each at the hook point that it was trained
            on, and reading what those before it in the model have changed. `hook`, `target_hook` and `edit` are for a
            single one.
        hook: hook point that it reads; None: the one the dictionary was trained on.
        target_hook: hook point that it gives; None: the target that it was trained on, or without one `hook`.
        error_term: give x̂ + (x − x̂) instead, the second part without gradient: the model computes as before, and its
            gradients reach the features.
        edit: changes the features `[context, seq, d_sae]` before they are decoded (ablate, scale, steer); with
            `error_term` the reconstruction's error is that of the unedited features.

    Raises:
        ConfigError: a transcoder's target comes before what it reads; two dictionaries give the same hook point; or
            several are given with what is for one.
        ModelError: another model than the dictionary's, no hook point known, or one of another width; the dictionary's
            record of masked tokens cannot be read; a transcoder is in a pass that begins in the middle of the model; or
            a pass goes on from a cache of a kind that is not known here, and has no `position_ids`.
    """
    if not isinstance(dictionary, Dictionary):
        if not (hook is target_hook is edit is None):
            raise ConfigError(
                "hook, target_hook and edit are for a single dictionary: splice each in a block of its own"
            )
        with _several(language_model, dictionary, error_term):
            yield language_model
        return
    hooks = Hooks.of(dictionary.metadata, hook, target_hook)
    if hooks.reads is None or hooks.gives is None:
        raise ModelError("the dictionary does not say which hook point it belongs to: give hook='blocks.N.…'")
    info = language_model.info
    check_belongs(dictionary, Place(f"model {info.name!r}", info.to_json(), ModelError))
    policy = _token_policy(dictionary)

    def replacement(y: Tensor, now: Pass | None) -> Tensor:
        x = _input(hooks, read, now) if hooks.of_transcoder else y
        for name, activation, does in ((hooks.reads, x, "takes"), (hooks.gives, y, "gives")):
            if activation.shape[-1] != dictionary.d_in:
                width = activation.shape[-1]
                raise ModelError(
                    f"hook {name!r}: activations are {width} wide, the dictionary {does} {dictionary.d_in}"
                )
        new = _reconstruct(dictionary, x, y, error_term, edit)
        if policy is None or now is None:
            return new
        return torch.where(policy.eligible(now.tokens, now.positions)[..., None], new, y)

    reading = language_model.reading(hooks.reads) if hooks.of_transcoder else contextlib.nullcontext([])
    with reading as read, language_model.replacing(hooks.gives, replacement, with_pass=True):
        yield language_model


@contextlib.contextmanager
def _several(language_model: LanguageModel, dictionaries: Sequence[Dictionary], error_term: bool) -> Iterator[None]:
    given = [Hooks.of(dictionary.metadata).gives for dictionary in dictionaries]
    for hook in given:
        if hook is not None and given.count(hook) > 1:
            raise ConfigError(f"{given.count(hook)} dictionaries give {hook!r}: splice one of them")
    with contextlib.ExitStack() as stack:
        for dictionary in dictionaries:
            stack.enter_context(splice(language_model, dictionary, error_term=error_term))
        yield


def _input(hooks: Hooks, read: list[Tensor], now: Pass | None) -> Tensor:
    """What the transcoder reads in this pass."""
    if now is None or now.tokens is None or not read:
        raise ModelError(
            f"hook {hooks.gives!r}: the transcoder there reads {hooks.reads!r}, which is not known in a pass that "
            "begins in the middle of the model; run it from the tokens"
        )
    return read.pop()


def _reconstruct(dictionary: Dictionary, x: Tensor, y: Tensor, error_term: bool, edit: Edit | None) -> Tensor:
    """ŷ from x, with its error as an edit leaves it where that is asked for; y is x, but for transcoders."""
    if edit is None:
        reconstruction = dictionary(x)
        return reconstruction + (y - reconstruction).detach() if error_term else reconstruction
    features = dictionary.encode(x)
    edited = dictionary.decode(edit(features))
    return edited + (y - dictionary.decode(features)).detach() if error_term else edited


def _token_policy(dictionary: Dictionary) -> TokenPolicy | None:
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
