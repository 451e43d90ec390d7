"""Putting a dictionary into its language model: the activation replaced by the reconstruction while a block is open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae.dictionary import Dictionary
from sae.errors import ModelError
from sae.language_model import LanguageModel
from sae.tokens import TokenPolicy

Edit = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def splice(
    language_model: LanguageModel,
    dictionary: Dictionary,
    *,
    hook: str | None = None,
    error_term: bool = False,
    edit: Edit | None = None,
) -> Iterator[LanguageModel]:
    """While open, the activation x at `hook` is replaced by the dictionary's reconstruction x̂ in every forward pass.

    Tokens that were masked out of training (BOS, first positions) keep their activation. In cached generation, passes
    of a single token have no first position.

    Args:
        language_model: where to splice.
        dictionary: what to splice; it takes raw activations.
        hook: hook point; None: the one the dictionary was trained on.
        error_term: give x̂ + (x − x̂) instead, the second part without gradient: the model computes as before, and its
            gradients reach the features.
        edit: changes the features `[context, seq, d_sae]` before they are decoded (ablate, scale, steer); with
            `error_term` the reconstruction's error is that of the unedited features.

    Raises:
        ModelError: another model than the dictionary's, no hook point known, or one of another width; or the
            dictionary's record of masked tokens cannot be read.
    """
    hook = hook or dictionary.metadata.get("hook")
    if not isinstance(hook, str):
        raise ModelError("the dictionary does not say which hook point it belongs to: give hook='blocks.N.…'")
    _check_model(language_model, dictionary)
    policy = _token_policy(dictionary)

    def replacement(x: Tensor, tokens: Tensor | None) -> Tensor:
        if x.shape[-1] != dictionary.d_in:
            raise ModelError(
                f"hook {hook!r}: activations are {x.shape[-1]} wide, the dictionary takes {dictionary.d_in}"
            )
        new = _reconstruct(dictionary, x, error_term, edit)
        if policy is None or tokens is None:
            return new
        eligible = policy.eligible(tokens)
        if tokens.shape[1] == 1:
            eligible = TokenPolicy(policy.prepend_bos, 0, policy.masked_ids).eligible(tokens)
        return torch.where(eligible[..., None], new, x)

    with language_model.replacing(hook, replacement, with_tokens=True):
        yield language_model


def _reconstruct(dictionary: Dictionary, x: Tensor, error_term: bool, edit: Edit | None) -> Tensor:
    if edit is None:
        reconstruction = dictionary(x)
        return reconstruction + (x - reconstruction).detach() if error_term else reconstruction
    features = dictionary.encode(x)
    edited = dictionary.decode(edit(features))
    return edited + (x - dictionary.decode(features)).detach() if error_term else edited


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


def _check_model(language_model: LanguageModel, dictionary: Dictionary) -> None:
    """Compare what the metadata says of the model; what it does not say is not checked."""
    trained_on = dictionary.metadata.get("model")
    if not isinstance(trained_on, dict):
        return
    for key in ("weights_sha256", "weight_processing"):
        there, here = trained_on.get(key), getattr(language_model.info, key)
        if there not in (None, here):
            raise ModelError(
                f"the dictionary was trained on {trained_on.get('name')!r} with {key}={there!r}; "
                f"{language_model.info.name!r} has {here!r}: load the model it was trained on"
            )
