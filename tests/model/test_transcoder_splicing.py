"""A transcoder inside its model: what it gives takes its target's place, made from what it reads in the same pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures import TopK
from sae.dictionary.frame import Frame
from sae.dictionary.hook_points import KINDS, place_in_model
from sae.dictionary.origin import Origin
from sae.dictionary.sites import Sites
from sae.effects.attribution_paths import spliced_on
from sae.errors import ConfigError, ModelError, SaeError
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice
from tests.model.test_language_model import at_hf, hf_activation

READS, GIVES = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def hf_model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval().requires_grad_(False)


@pytest.fixture
def tokens(language_model: LanguageModel) -> Tensor:
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    assert language_model.bos is not None
    ids[:, 0] = ids[1, 5] = language_model.bos
    return ids


def make_transcoder(model: LanguageModel, reads: str | None = READS, gives: str = GIVES, **metadata: Any) -> TopK:
    policy = model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)
    known = {"hook": reads, "target_hook": gives, "model": model.info.to_json(), "tokens": policy.to_json()}
    dictionary = TopK(32, 64, k=4, metadata=known | metadata).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in dictionary.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dictionary


@pytest.mark.parametrize(
    ("reads", "gives"),
    [
        (READS, GIVES),
        ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre"),
        ("blocks.1.attn.hook_z", "blocks.1.hook_attn_out"),
        ("blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"),
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_what_it_gives_takes_the_targets_place(
    language_model: LanguageModel, hf_model: Any, tokens: Tensor, reads: str, gives: str, masked: bool
) -> None:
    transcoder = make_transcoder(language_model, reads, gives, **({} if masked else {"tokens": None}))
    clean = language_model.logits(tokens)
    with splice(language_model, transcoder) as spliced:
        assert spliced is language_model
        logits = language_model.logits(tokens)
        torch.testing.assert_close(language_model.logits(tokens), logits, rtol=0, atol=0)
    given = transcoder(hf_activation(hf_model, tokens, reads))
    keep = (tokens == language_model.bos) | (torch.arange(12) == 0)
    with at_hf(hf_model, gives, lambda y: torch.where(keep[..., None] & masked, y, given)):
        torch.testing.assert_close(logits, hf_model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (logits - clean).abs().max() > 0.02
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)


def test_with_its_error_the_model_is_as_before_and_edits_add_up(
    language_model: LanguageModel, hf_model: Any, tokens: Tensor
) -> None:
    transcoder, clean = make_transcoder(language_model, tokens=None), language_model.logits(tokens)
    for edit in (None, lambda f: f):
        with splice(language_model, transcoder, error_term=True, edit=edit):
            torch.testing.assert_close(language_model.logits(tokens), clean, rtol=1e-4, atol=1e-4)

    def steer(features: Tensor) -> Tensor:
        return features + 2 * torch.nn.functional.one_hot(torch.tensor(9), 64)

    with splice(language_model, transcoder, error_term=True, edit=steer):
        steered = language_model.logits(tokens)
    with at_hf(hf_model, GIVES, lambda y: y + 2 * transcoder.W_dec[9]):
        torch.testing.assert_close(steered, hf_model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (steered - clean).abs().max() > 0.01


def test_hook_points_can_be_others(language_model: LanguageModel, tokens: Tensor) -> None:
    transcoder = make_transcoder(language_model)
    elsewhere = make_transcoder(language_model, "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out")
    with splice(language_model, transcoder, hook="blocks.0.hook_resid_mid", target_hook="blocks.0.hook_mlp_out"):
        logits = language_model.logits(tokens)
    with splice(language_model, elsewhere):
        torch.testing.assert_close(logits, language_model.logits(tokens), rtol=0, atol=0)
    assert (logits - language_model.logits(tokens)).abs().max() > 0.02


def refusal(model: LanguageModel, transcoder: TopK, run: Any, kind: type[SaeError] = ModelError, **options: Any) -> str:
    with pytest.raises(kind) as caught, splice(model, transcoder, **options):
        run(model)
    return str(caught.value)


def test_refusals(language_model: LanguageModel, tokens: Tensor) -> None:
    def run(model: LanguageModel) -> Tensor:
        return model.logits(tokens)

    message = refusal(language_model, make_transcoder(language_model, GIVES, READS), run, ConfigError)
    assert message == (
        f"target hook {READS!r} comes before {GIVES!r}, which the transcoder reads: a later activation cannot give an "
        "earlier one; swap them"
    )
    message = refusal(language_model, make_transcoder(language_model, None), run, ConfigError)
    assert message.startswith(
        f"target hook {GIVES!r}: the transcoder does not say which hook point it reads: give hook="
    )
    message = refusal(language_model, make_transcoder(language_model, gives="blocks.1.hook_q"), run, ConfigError)
    expected = f"hook 'blocks.1.hook_q': expected blocks.N. and one of {', '.join(KINDS)}"
    assert message == f"{expected}; did you mean blocks.1.attn.hook_q?"
    message = refusal(language_model, make_transcoder(language_model, gives="blocks.7.hook_mlp_out"), run)
    assert message.endswith("has blocks 0 to 2")
    message = refusal(language_model, make_transcoder(language_model, gives="blocks.1.mlp.hook_post"), run)
    assert message == "hook 'blocks.1.mlp.hook_post': activations are 128 wide, the dictionary gives 32"
    message = refusal(
        language_model, make_transcoder(language_model, "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"), run
    )
    assert message == "hook 'blocks.1.mlp.hook_post': activations are 128 wide, the dictionary takes 32"
    transcoder = make_transcoder(language_model, "blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out")
    resid = language_model.bridge(tokens, stop_at_layer=1)
    message = refusal(language_model, transcoder, lambda model: model.bridge(resid, start_at_layer=1))
    assert message.startswith(
        "hook 'blocks.1.hook_mlp_out': the transcoder there reads 'blocks.0.hook_resid_mid', which"
    )
    assert message.endswith("run the model from the tokens")


def test_places_are_in_the_order_of_computation(language_model: LanguageModel, tokens: Tensor) -> None:
    """The order in which hooks fire in a pass is that of their places."""
    names = [hook.name for hook in language_model.hooks()]
    fired: list[str] = []
    hooks = [(name, lambda activation, hook, name=name: fired.append(name)) for name in names]
    language_model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert list(dict.fromkeys(fired)) == sorted(names, key=lambda name: place_in_model(name) or (0, 0))


def test_a_dictionary_that_gives_what_it_reads_is_no_transcoder() -> None:
    assert not Origin.of({"hook": READS}).of_transcoder
    assert not Origin.of({"hook": READS, "target_hook": READS}).of_transcoder
    assert not Origin.of({}).of_transcoder
    assert Origin.of({"hook": READS, "target_hook": GIVES}) == Origin(Sites.one(READS), Sites.one(GIVES))
    assert Origin.of({"hook": READS}).at(target_hook=GIVES).of_transcoder


def without_hook_points(**metadata: Any) -> TopK:
    """A transcoder of equal widths as `sae.train(..., target=IterableSource(y))` returns it."""
    transcoder = TopK(32, 64, k=4, metadata=metadata)
    transcoder.set_frame(Frame(d_out=32))
    generator = torch.Generator().manual_seed(2)
    for parameter in transcoder.requires_grad_(False).parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return transcoder


def test_a_transcoder_without_hook_points_is_no_autoencoder(language_model: LanguageModel, tokens: Tensor) -> None:
    def run(model: LanguageModel) -> Tensor:
        return model.logits(tokens)

    way_out = "; give both with hook= and target_hook= (--hook and --target), or set them in dictionary.metadata"
    plain, same = without_hook_points(), without_hook_points(hook=READS, target_hook=READS)
    current = without_hook_points(**Origin.of({"hook": READS}).to_json())
    assert plain.origin.of_transcoder and same.origin.of_transcoder and current.origin.of_transcoder
    message = refusal(language_model, plain, run, ConfigError)
    assert message == "the dictionary is a transcoder, and which hook points it reads and gives is unknown" + way_out
    unknown = f"hook {READS!r}: the dictionary is a transcoder, and which other one it gives is unknown{way_out}"
    assert refusal(language_model, plain, run, ConfigError, hook=READS) == unknown
    for dictionary in (same, current):
        assert refusal(language_model, dictionary, run, ConfigError) == unknown
        with pytest.raises(ConfigError, match="which other one it gives is unknown"):
            spliced_on(dictionary, language_model, tokens, None)
    with splice(language_model, plain, hook=READS, target_hook=GIVES):
        logits = language_model.logits(tokens)
    with splice(language_model, without_hook_points(hook=READS, target_hook=GIVES)):
        assert torch.equal(language_model.logits(tokens), logits)


def test_several_are_spliced_in_the_order_of_the_model(
    language_model: LanguageModel, hf_model: Any, tokens: Tensor
) -> None:
    """One reads what another gives: it reads ŷ, in whichever order they are named."""
    first = make_transcoder(language_model, tokens=None)
    second = make_transcoder(language_model, GIVES, "blocks.2.hook_mlp_out", tokens=None)
    y = first(hf_activation(hf_model, tokens, READS))
    with at_hf(hf_model, GIVES, lambda _: y), at_hf(hf_model, "blocks.2.hook_mlp_out", lambda _: second(y)):
        expected = hf_model(tokens).logits
    for order in ([first, second], [second, first]):
        with splice(language_model, order):
            torch.testing.assert_close(language_model.logits(tokens), expected, rtol=1e-4, atol=1e-4)
