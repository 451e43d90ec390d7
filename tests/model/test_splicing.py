from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures import ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def tokens(language_model: LanguageModel) -> Tensor:
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = ids[1, 5] = language_model.bos
    return ids


def make_dictionary(language_model: LanguageModel, kind: type[Dictionary] = TopK, d_in: int = 32, **metadata: Any):
    policy = language_model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)
    metadata = {"hook": HOOK, "model": language_model.info.to_json(), "tokens": policy.to_json(), **metadata}
    dictionary = kind(d_in, 64, metadata=metadata, **({"k": 4} if kind is TopK else {}))
    generator = torch.Generator().manual_seed(2)
    for parameter in dictionary.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return dictionary.requires_grad_(False)


def by_hand(language_model: LanguageModel, tokens: Tensor, new: Tensor, everywhere: bool = False) -> Tensor:
    """Logits from block 1 on, with `new` entering it where the token is neither first nor special."""
    resid = language_model.bridge(tokens, stop_at_layer=1)
    keep = (tokens == language_model.bos) | (torch.arange(tokens.shape[1]) == 0)
    return language_model.bridge(torch.where(keep[..., None] & (not everywhere), resid, new), start_at_layer=1)


@pytest.mark.parametrize("kind", [TopK, ReLU])
def test_reconstruction_takes_the_activations_place(
    language_model: LanguageModel, tokens: Tensor, kind: type[Dictionary]
) -> None:
    dictionary = make_dictionary(language_model, kind)
    resid = language_model.bridge(tokens, stop_at_layer=1)
    clean = language_model.logits(tokens)
    with splice(language_model, dictionary) as spliced:
        assert spliced is language_model
        logits = language_model.logits(tokens)
    f = (resid - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    if kind is TopK:
        f = torch.where(f >= f.sort(-1).values[..., -4, None], f, 0)
    x_hat = f.relu() @ dictionary.W_dec + dictionary.b_dec
    torch.testing.assert_close(logits, by_hand(language_model, tokens, x_hat), rtol=1e-4, atol=1e-4)
    assert (logits - clean).abs().max() > 0.05
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)


def test_what_a_dictionary_does_to_each_token_is_undone(language_model: LanguageModel, tokens: Tensor) -> None:
    dictionary = make_dictionary(language_model)
    dictionary.set_frame(Frame("layer_norm", skip=True))
    generator = torch.Generator().manual_seed(5)
    for parameter in dictionary.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    resid = language_model.bridge(tokens, stop_at_layer=1)
    assert dictionary.W_skip is not None
    mean, std = resid.mean(-1, keepdim=True), resid.std(-1, keepdim=True)
    f = ((resid - mean) / (std + 1e-5) - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    f = torch.where(f >= f.sort(-1).values[..., -4, None], f, 0).relu()
    x_hat = (f @ dictionary.W_dec + dictionary.b_dec) * std + mean + resid @ dictionary.W_skip
    doubled = x_hat + std * (f @ dictionary.W_dec)
    double = {"edit": lambda features: 2 * features}
    for new, options in ((x_hat, {}), (doubled, double), (doubled + resid - x_hat, {**double, "error_term": True})):
        expected = by_hand(language_model, tokens, new)
        with splice(language_model, dictionary, **options):
            torch.testing.assert_close(language_model.logits(tokens), expected, rtol=1e-4, atol=1e-4)


def test_without_a_policy_every_position_is_replaced(language_model: LanguageModel, tokens: Tensor) -> None:
    dictionary = make_dictionary(language_model, tokens=None)
    expected = by_hand(language_model, tokens, dictionary(language_model.bridge(tokens, stop_at_layer=1)), True)
    with splice(language_model, dictionary):
        torch.testing.assert_close(language_model.logits(tokens), expected, rtol=1e-4, atol=1e-4)


def test_masked_positions_keep_their_activation(language_model: LanguageModel, tokens: Tensor) -> None:
    dictionary = make_dictionary(language_model)
    clean = language_model.bridge_activations(tokens, [HOOK])[HOOK]
    seen: list[Tensor] = []
    with splice(language_model, dictionary):
        language_model.bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: seen.append(x.clone()))])
    keep = (tokens == language_model.bos) | (torch.arange(12) == 0)
    assert keep.sum() == 4
    changed = (seen[0] - clean).abs().amax(-1)
    assert changed[keep].max() == 0
    assert changed[~keep].min() > 1e-3


def test_a_single_token_without_a_cache_is_a_first_position(language_model: LanguageModel) -> None:
    dictionary, word = make_dictionary(language_model), torch.tensor([[7]])
    with splice(language_model, dictionary):
        on_word = language_model.logits(word)
    torch.testing.assert_close(on_word, language_model.logits(word), rtol=0, atol=0)


def test_error_term_leaves_logits_unchanged(language_model: LanguageModel, tokens: Tensor) -> None:
    clean = language_model.logits(tokens)
    for edit in (None, lambda f: f):
        with splice(language_model, make_dictionary(language_model), error_term=True, edit=edit):
            torch.testing.assert_close(language_model.logits(tokens), clean, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_features_through_the_error_term(language_model: LanguageModel, tokens: Tensor) -> None:
    """∂loss/∂f at every unmasked token is W_dec ∂loss/∂x, and ∂loss/∂x is that of the model alone."""
    dictionary = make_dictionary(language_model, ReLU)
    leaves: list[Tensor] = []

    def watch(features: Tensor) -> Tensor:
        leaves.append(features.detach().requires_grad_())
        return leaves[0]

    with splice(language_model, dictionary, error_term=True, edit=watch):
        language_model.bridge(tokens)[:, -1, 5].sum().backward()
    resid = language_model.bridge(tokens, stop_at_layer=1).detach().requires_grad_()
    language_model.bridge(resid, start_at_layer=1)[:, -1, 5].sum().backward()
    keep = (tokens == language_model.bos) | (torch.arange(12) == 0)
    assert leaves[0].grad is not None and resid.grad is not None
    expected = resid.grad.masked_fill(keep[..., None], 0) @ dictionary.W_dec.T
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(leaves[0].grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("edit", [None, lambda f: f])
def test_the_error_term_itself_has_no_gradient(language_model: LanguageModel, tokens: Tensor, edit: Any) -> None:
    """∂loss/∂W_dec is Σ f ∂loss/∂x over unmasked tokens: the error's share would cancel it."""
    dictionary = make_dictionary(language_model, ReLU).requires_grad_()
    with splice(language_model, dictionary, error_term=True, edit=edit):
        language_model.bridge(tokens)[:, -1, 5].sum().backward()
    resid = language_model.bridge(tokens, stop_at_layer=1).detach().requires_grad_()
    language_model.bridge(resid, start_at_layer=1)[:, -1, 5].sum().backward()
    keep = (tokens == language_model.bos) | (torch.arange(12) == 0)
    assert dictionary.W_dec.grad is not None and resid.grad is not None
    features = dictionary.encode(resid.detach()).detach()
    expected = features[~keep].T @ resid.grad[~keep]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(dictionary.W_dec.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("error_term", [False, True])
def test_edit_changes_the_features(language_model: LanguageModel, tokens: Tensor, error_term: bool) -> None:
    """Adding 2 to feature 9 adds 2 W_dec[9] to what the model sees."""
    dictionary = make_dictionary(language_model)
    resid = language_model.bridge(tokens, stop_at_layer=1)
    base = resid if error_term else dictionary(resid)

    def steer(features: Tensor) -> Tensor:
        return features + 2 * torch.nn.functional.one_hot(torch.tensor(9), 64)

    with splice(language_model, dictionary, error_term=error_term, edit=steer):
        logits = language_model.logits(tokens)
    expected = by_hand(language_model, tokens, base + 2 * dictionary.W_dec[9])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - by_hand(language_model, tokens, base)).abs().max() > 0.01


def test_reading_activations_inside_leaves_the_splice(language_model: LanguageModel, tokens: Tensor) -> None:
    clean = language_model.logits(tokens)
    with splice(language_model, make_dictionary(language_model)):
        spliced = language_model.logits(tokens)
        language_model.activations(tokens, [HOOK, "blocks.2.hook_mlp_out"])
        torch.testing.assert_close(language_model.logits(tokens), spliced, rtol=0, atol=0)
    assert (spliced - clean).abs().max() > 0.05
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)


def test_the_hook_can_be_another_one(language_model: LanguageModel, tokens: Tensor) -> None:
    dictionary = make_dictionary(language_model, tokens=None)
    with splice(language_model, dictionary, hook="blocks.2.hook_resid_post"):
        logits = language_model.logits(tokens)
    expected = next(language_model.replaced_logits(tokens, "blocks.2.hook_resid_post", [dictionary]))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_error_inside_takes_the_splice_away(language_model: LanguageModel, tokens: Tensor) -> None:
    clean = language_model.logits(tokens)
    with pytest.raises(KeyError), splice(language_model, make_dictionary(language_model)):
        raise KeyError
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)


def refusal(language_model: LanguageModel, dictionary: Dictionary, tokens: Tensor, **options: Any) -> str:
    with pytest.raises(ModelError) as caught, splice(language_model, dictionary, **options):
        language_model.logits(tokens)
    return str(caught.value)


def test_refusals(language_model: LanguageModel, tokens: Tensor) -> None:
    other = {**language_model.info.to_json(), "name": "other", "weights_sha256": "0" * 64}
    message = refusal(language_model, make_dictionary(language_model, model=other), tokens)
    assert message.startswith("model 'tiny': not the dictionary's model: weights_sha256 is '")
    assert message.endswith("'000" + "0" * 61 + "' in training, on 'other'; use the model it was trained on")
    folded = {**language_model.info.to_json(), "weight_processing": "fold_ln"}
    message = refusal(language_model, make_dictionary(language_model, model=folded), tokens)
    assert "weight_processing is 'none' there and 'fold_ln' in training" in message
    message = refusal(language_model, make_dictionary(language_model, d_in=16), tokens)
    assert message == f"hook {HOOK!r}: activations are 32 wide, the dictionary takes 16"
    message = refusal(language_model, make_dictionary(language_model, hook=None), tokens)
    assert "does not record its hook point" in message
    message = refusal(language_model, make_dictionary(language_model, hook=3), tokens)
    assert "does not record its hook point" in message
    message = refusal(language_model, make_dictionary(language_model, model={"weights_sha256": "0" * 64}), tokens)
    assert "0' in training, on None; use the model" in message
    message = refusal(language_model, make_dictionary(language_model), tokens, hook="blocks.1.hook_resid_mid")
    assert "not replace it" in message


@pytest.mark.parametrize("model", [None, "gpt2", {}, {"name": "gpt2"}, {"weights_sha256": None}])
def test_what_the_metadata_does_not_say_of_the_model_is_not_checked(
    language_model: LanguageModel, tokens: Tensor, model: Any
) -> None:
    with splice(language_model, make_dictionary(language_model)):
        expected = language_model.logits(tokens)
    with splice(language_model, make_dictionary(language_model, model=model)):
        torch.testing.assert_close(language_model.logits(tokens), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "record",
    [
        "all",
        {"prepend_bos": True},
        {"prepend_bos": True, "masked_positions": 1, "masked_ids": 3},
        {"prepend_bos": True, "masked_positions": 1, "masked_ids": ["a"]},
        {"prepend_bos": True, "masked_positions": "1", "masked_ids": []},
    ],
)
def test_record_of_masked_tokens_that_cannot_be_read(
    language_model: LanguageModel, tokens: Tensor, record: Any
) -> None:
    message = refusal(language_model, make_dictionary(language_model, tokens=record), tokens)
    assert message.startswith(f"the dictionary's metadata has tokens={record!r}: expected prepend_bos, ")
    assert message.endswith("set dictionary.metadata['tokens'] = None to replace every position")


def test_unpublished_dictionary_fits_any_model(language_model: LanguageModel, tokens: Tensor, tiny_model: Path) -> None:
    dictionary = make_dictionary(language_model, model=None)
    with splice(language_model, dictionary, hook=HOOK):
        assert language_model.logits(tokens).isfinite().all()


def test_several_dictionaries_are_spliced_as_in_nested_blocks(language_model: LanguageModel, tokens: Tensor) -> None:
    first, later = make_dictionary(language_model), make_dictionary(language_model, hook="blocks.2.hook_mlp_out")
    clean = language_model.logits(tokens)
    with splice(language_model, first), splice(language_model, later):
        nested = language_model.logits(tokens)
    for order in ([first, later], (later, first)):
        with splice(language_model, order):
            assert torch.equal(language_model.logits(tokens), nested)
    with splice(language_model, [first]):
        assert not torch.equal(language_model.logits(tokens), nested)
    with splice(language_model, [first, later], error_term=True):
        torch.testing.assert_close(language_model.logits(tokens), clean, rtol=1e-4, atol=1e-4)


def test_what_is_for_one_dictionary_is_refused_for_several(language_model: LanguageModel) -> None:
    one, other = make_dictionary(language_model), make_dictionary(language_model, ReLU)
    message = f"2 dictionaries give '{HOOK}': splice one of them"
    with pytest.raises(ConfigError, match=message), splice(language_model, [one, other]):
        pass
    with pytest.raises(ConfigError, match="are for a single dictionary"), splice(language_model, [one], hook=HOOK):
        pass
