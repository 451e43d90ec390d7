"""Effects of a transcoder's features: they fire where it reads, and are changed in what it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN, Frame
from sae.effects import EffectSettings, measure_effects
from sae.effects.direct import DirectPath
from sae.effects.firings import scan_firings
from sae.effects.interventions import ELSEWHERE, FIRING, RANDOM, Plan, plan_changes
from sae.effects.meter import ChangeMeter
from sae.effects.view import markdown
from sae.errors import CacheError, ConfigError
from sae.model.language_model import LanguageModel
from tests.support.effect_case import HEADS, MLP, POST, RESID, by_splicing, contexts, differences, make_dictionary

LENGTH = 16


def make_transcoder(cache: ActivationCache, reads: str, gives: str, frame: Frame = PLAIN) -> Dictionary:
    """The encoder of `make_dictionary`, with a decoder of its own."""
    encoder = make_dictionary(cache, reads)
    metadata = {**encoder.metadata, "target_hook": gives}
    transcoder = TopK(cache.d_in(reads), 48, k=4, metadata=metadata)
    transcoder.set_frame(Frame(frame.input_norm, frame.skip, cache.d_in(gives)))
    generator = torch.Generator().manual_seed(3)
    for parameter in transcoder.requires_grad_(False).parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    transcoder.W_enc.copy_(encoder.W_enc)
    transcoder.b_enc.copy_(encoder.b_enc)
    return transcoder


def make_meter(
    cache: ActivationCache, model: LanguageModel, transcoder: Dictionary, scale: float = 0.0
) -> tuple[ChangeMeter, Plan]:
    reads, gives = transcoder.origin.reads.hook, transcoder.origin.gives.hook
    assert reads is not None and gives is not None
    firings = scan_firings(transcoder, cache, reads, positions=1000, seed=0)
    plan = plan_changes(range(48), firings, null_positions=2, seed=0)
    meter = ChangeMeter(
        model.tail(gives), DirectPath.of(model, gives), transcoder, cache,
        mean=firings.mean, scale=scale, window=3, seed=0, reads=reads,
    )  # fmt: skip
    return meter, plan


@pytest.mark.parametrize(
    ("reads", "gives", "scale", "frame"),
    [
        (RESID, MLP, 0.0, PLAIN), (RESID, POST, 2.0, PLAIN), (HEADS, MLP, -0.5, PLAIN),
        (RESID, MLP, 0.0, Frame("layer_norm", skip=True)),
    ],
)  # fmt: skip
def test_changes_are_those_of_a_spliced_transcoder_with_one_edited_number(
    held_out: ActivationCache, language_model: LanguageModel, reads: str, gives: str, scale: float, frame: Frame
) -> None:
    transcoder = make_transcoder(held_out, reads, gives, frame)
    meter, plan = make_meter(held_out, language_model, transcoder, scale)
    changes = meter.measure(plan.at(np.flatnonzero(plan.kind == FIRING)[::29])).changes
    assert len(changes) > 20
    texts = contexts(held_out)
    for number in range(len(changes)):
        context, position = divmod(int(changes.row[number]), LENGTH)
        feature = int(changes.feature[number])
        expected = by_splicing(language_model, transcoder, texts[context], feature, position, scale, 3)
        for name, value in expected.items():
            assert getattr(changes, name)[number] == pytest.approx(value, rel=1e-3, abs=2e-5), (name, number)
    assert np.abs(changes.loss).mean() > 0.005


def test_a_decoder_row_along_the_unembedding_has_a_closed_form(
    held_out: ActivationCache, language_model: LanguageModel
) -> None:
    """At the last residual nothing but norm, unembedding and softmax follows; f is computed two blocks earlier."""
    transcoder, token = make_transcoder(held_out, RESID, POST), 37
    U = language_model.unembedding()[:, token]
    transcoder.W_dec.copy_((U / U.norm()).expand(48, -1))
    meter, plan = make_meter(held_out, language_model, transcoder)
    measured = meter.measure(plan)
    changes, hf, texts = measured.changes, language_model.bridge.original_model, contexts(held_out)
    firing = np.flatnonzero(changes.kind == FIRING)
    for number in firing[::17]:
        context, position = divmod(int(changes.row[number]), LENGTH)
        activations = language_model.activations(texts[context].tokens, [RESID, POST])
        x, y = activations[RESID][0], activations[POST][0]
        feature = int(changes.feature[number])
        f = (x[position] - transcoder.b_dec) @ transcoder.W_enc[:, feature] + transcoder.b_enc[feature]
        assert changes.activation[number] == pytest.approx(float(f), rel=1e-4)
        ablated = y.clone()
        ablated[position] -= f * U / U.norm()
        clean, changed = (hf.lm_head(hf.transformer.ln_f(v)).double().log_softmax(-1).numpy() for v in (y, ablated))
        for name, value in differences(clean, changed, texts[context], position, 3).items():
            assert getattr(changes, name)[number] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert changed[position, token] < clean[position, token] - 1e-3, "the token loses"
    assert len(firing) > 300 and np.abs(changes.loss_after[firing]).max() < 1e-5
    random = changes.kind == RANDOM
    assert random.any() and np.abs(changes.loss[random]).max() > 0
    elsewhere = np.flatnonzero(changes.kind == ELSEWHERE)
    assert len(elsewhere) and not changes.activation[elsewhere].any()


def test_results_name_both_hook_points_and_the_token_that_a_feature_writes(
    held_out: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    transcoder, token = make_transcoder(held_out, RESID, POST), 37
    U = language_model.unembedding()[:, token]
    transcoder.W_dec.copy_((U / U.norm()).expand(48, -1))
    settings = EffectSettings(positions=6, null_positions=3, window=2, top=4)
    effects = measure_effects(
        transcoder, held_out, language_model, features=[0, 1, 2], settings=settings, folder=tmp_path
    )
    assert effects.hook == POST and effects.dictionary["reads"] == RESID
    assert effects.place == f"{RESID} → {POST}"
    assert f"# Effects of features at `{RESID} → {POST}`" in markdown(effects, None)
    assert effects.over_features is not None
    counts = torch.zeros(48, dtype=torch.long)
    tokens = 0
    for batch in held_out.contexts(HELD_OUT, RESID):
        assert batch.activations is not None
        fired = transcoder.encode(batch.activations[batch.eligible]) > 0
        counts += fired.sum(0)
        tokens += len(fired)
    for number, effect in effects.features.items():
        assert effect.density == pytest.approx(int(counts[number]) / tokens)
        if effect.positions:
            assert effect.lowered[0].token == language_model.to_texts([token])[0]
    assert sum(effect.positions > 0 for effect in effects.features.values()) >= 2
    again = measure_effects(
        transcoder, held_out, language_model, features=[0, 1, 2], settings=settings, folder=tmp_path
    )
    assert again.to_json() == effects.to_json()


def test_refusals(held_out: ActivationCache, language_model: LanguageModel) -> None:
    transcoder = make_transcoder(held_out, RESID, MLP)
    with pytest.raises(ConfigError, match=f"hook '{POST}': the dictionary gives activations of '{MLP}'; use it there"):
        measure_effects(transcoder, held_out, language_model, hook=POST)
    transcoder.metadata["hook"] = "blocks.0.hook_resid_pre"
    with pytest.raises(CacheError, match=r"hook 'blocks\.0\.hook_resid_pre' is not in it; it holds"):
        measure_effects(transcoder, held_out, language_model)
