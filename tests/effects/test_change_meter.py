"""Changes against the slow way, closed forms and gradients; what they leave alone; batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.config.splits import HELD_OUT
from sae.dictionary.frame import PLAIN, Frame
from sae.effects.direct import DirectPath
from sae.effects.firings import scan_firings
from sae.effects.interventions import ELSEWHERE, FIRING, RANDOM, Changes, Plan, plan_changes
from sae.effects.meter import ChangeMeter
from sae.model.language_model import LanguageModel
from sae.model.tail import Readout, Start, Tail
from tests.support.effect_case import DEAD, HEADS, MLP, POST, RESID, by_splicing, contexts, differences, make_dictionary

LENGTH = 16
NUMBERS = ("activation", "loss", "loss_after", "kl", "kl_after", "direct")


class Recorder(Tail):
    """Keeps what it is given, with the number of positions read, and whether the model was read at all."""

    def __init__(self, language_model: LanguageModel, hook: str) -> None:
        super().__init__(language_model, hook)
        self.passes: list[tuple[Tensor, Tensor, int]] = []
        self.reads = 0

    def activations(self, start: Start) -> Tensor:
        self.reads += 1
        return super().activations(start)

    def read_out(self, start: Start, x: Tensor, positions: Tensor) -> Readout:
        self.passes.append((start.tokens, x, positions.shape[1]))
        return super().read_out(start, x, positions)


def make_meter(
    cache: ActivationCache, model: LanguageModel, hook: str, scale: float = 0.0, **options: Any
) -> ChangeMeter:
    options = {"window": 3, "seed": 0, **options}
    dictionary = make_dictionary(cache, hook, frame=options.pop("frame", PLAIN))
    firings = scan_firings(dictionary, cache, hook, positions=1000, seed=0)
    tail = options.pop("tail", model.tail(hook))
    return ChangeMeter(tail, DirectPath.of(model, hook), dictionary, cache, mean=firings.mean, scale=scale, **options)


def every_firing(cache: ActivationCache, hook: str, nulls: int = 0, frame: Frame = PLAIN) -> Plan:
    firings = scan_firings(make_dictionary(cache, hook, frame=frame), cache, hook, positions=1000, seed=0)
    return plan_changes(range(48), firings, null_positions=nulls, seed=0)


def some(plan: Plan, every: int) -> Plan:
    return plan.at(np.arange(0, len(plan), every))


@pytest.mark.parametrize(
    ("hook", "scale", "frame"),
    [
        (RESID, 0.0, PLAIN), (RESID, 2.0, PLAIN), (MLP, 0.0, PLAIN), (POST, 0.0, PLAIN), (HEADS, -0.5, PLAIN),
        (RESID, 0.0, Frame("layer_norm", skip=True)),
    ],
)  # fmt: skip
def test_changes_are_those_of_a_spliced_dictionary_with_one_edited_number(
    held_out: ActivationCache, language_model: LanguageModel, hook: str, scale: float, frame: Frame
) -> None:
    meter = make_meter(held_out, language_model, hook, scale, frame=frame)
    plan = some(every_firing(held_out, hook, frame=frame), 23)
    changes = meter.measure(plan).changes
    assert len(changes) == len(plan) > 25
    texts = contexts(held_out)
    for number in range(len(changes)):
        context, position = divmod(int(changes.row[number]), LENGTH)
        expected = by_splicing(
            language_model, meter.dictionary, texts[context], int(changes.feature[number]), position, scale, 3
        )
        assert changes.document[number] == texts[context].documents[position]
        for name, value in expected.items():
            assert getattr(changes, name)[number] == pytest.approx(value, rel=1e-3, abs=2e-5), (name, number)
    assert np.abs(changes.loss).mean() > 0.01 and changes.kl.mean() > 1e-4, "the test's model must mind"
    after = np.abs(changes.loss_after)
    spreads = hook not in (POST, MLP)  # not after the last attention
    assert after.mean() > 5e-4 if spreads else after.max() < 1e-5


def test_the_last_residual_has_a_closed_form(held_out: ActivationCache, language_model: LanguageModel) -> None:
    """After it there are norm, unembedding and softmax: by Hugging Face's own modules, and nothing happens later."""
    meter = make_meter(held_out, language_model, POST)
    changes = meter.measure(some(every_firing(held_out, POST), 11)).changes
    hf = language_model.bridge.original_model
    texts = contexts(held_out)
    for number in range(len(changes)):
        context, position = divmod(int(changes.row[number]), LENGTH)
        x = language_model.activations(texts[context].tokens, [POST])[POST][0]
        ablated = x.clone()
        feature = int(changes.feature[number])
        ablated[position] -= meter.dictionary.encode(x[position])[feature] * meter.dictionary.W_dec[feature]
        clean, changed = (hf.lm_head(hf.transformer.ln_f(v)).double().log_softmax(-1).numpy() for v in (x, ablated))
        expected = differences(clean, changed, texts[context], position, 3)
        for name, value in expected.items():
            assert getattr(changes, name)[number] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert np.abs(changes.loss_after).max() < 1e-5 and np.abs(changes.kl_after).max() < 1e-5


def central_difference(cache: ActivationCache, model: LanguageModel, hook: str, plan: Plan, step: float) -> Changes:
    """(g(1 + step) − g(1 − step)) / 2 step of every number: its derivative by α at 1, free of the second order."""
    up, down = (make_meter(cache, model, hook, 1 + s).measure(plan).changes for s in (step, -step))
    numbers = {
        name: (getattr(up, name) - getattr(down, name)) / (2 * step) for name in ("loss", "loss_after", "direct")
    }
    return dataclasses.replace(up, **numbers)


def test_close_to_no_change_the_direct_effect_at_the_last_residual_is_the_measured_one(
    held_out: ActivationCache, language_model: LanguageModel
) -> None:
    slope = central_difference(held_out, language_model, POST, some(every_firing(held_out, POST), 5), 0.05)
    assert np.abs(slope.loss).mean() > 0.02
    np.testing.assert_allclose(slope.direct, slope.loss, rtol=0.01, atol=2e-4)


def test_close_to_no_change_losses_follow_their_gradient(
    held_out: ActivationCache, language_model: LanguageModel
) -> None:
    """d loss / dα = f W_dec,i · ∂loss/∂x, by autograd through the rest of the model."""
    plan = some(every_firing(held_out, RESID), 29)
    slope = central_difference(held_out, language_model, RESID, plan, 0.05)
    meter = make_meter(held_out, language_model, RESID)
    texts = contexts(held_out)
    expected: dict[str, list[float]] = {"loss": [], "loss_after": []}
    for feature, row in zip(slope.feature.tolist(), slope.row.tolist(), strict=True):
        context, position = divmod(row, LENGTH)
        text = texts[context]
        x = language_model.activations(text.tokens, [RESID])[RESID].requires_grad_()
        log_p = language_model.bridge(x, start_at_layer=1)[0].log_softmax(-1)
        places = [
            place for place in range(position, min(position + 4, len(text.counts)))
            if text.counts[place] and text.documents[place] == text.documents[position]
        ]  # fmt: skip
        losses = [-log_p[place, text.tokens[0, place + 1]] for place in places]
        direction = (
            meter.dictionary.encode(x.detach()[0, position])[feature] * meter.dictionary.W_dec[feature]
        ).double()
        for name, terms in (("loss", losses[:1]), ("loss_after", losses[1:])):
            gradient = (
                torch.autograd.grad(torch.stack(terms).sum(), x, retain_graph=True)[0] if terms else torch.zeros_like(x)
            )
            expected[name].append(float(gradient[0, position].double() @ direction))
    for name, values in expected.items():
        assert np.abs(values).mean() > 1e-3, name
        np.testing.assert_allclose(getattr(slope, name), values, rtol=0.02, atol=2e-4, err_msg=name)


def test_a_factor_of_one_changes_nothing_and_runs_nothing(
    held_out: ActivationCache, language_model: LanguageModel
) -> None:
    recorder = Recorder(language_model, RESID)
    meter = make_meter(held_out, language_model, RESID, 1.0, tail=recorder)
    changes = meter.measure(every_firing(held_out, RESID, nulls=3)).changes
    assert len(changes) > 500 and changes.activation[changes.kind == FIRING].min() > 0
    for name in ("loss", "loss_after", "kl", "kl_after", "direct"):
        assert not getattr(changes, name).any(), name
    assert recorder.passes == []
    nearly = make_meter(held_out, language_model, RESID, 1.01, tail=recorder)
    assert np.abs(nearly.measure(every_firing(held_out, RESID)).changes.loss).max() > 1e-4
    assert recorder.passes


def test_every_change_is_made_at_its_place_alone(held_out: ActivationCache, language_model: LanguageModel) -> None:
    recorder = Recorder(language_model, RESID)
    meter = make_meter(held_out, language_model, RESID, tail=recorder)
    plan = some(every_firing(held_out, RESID, nulls=4), 3)
    changes = meter.measure(plan).changes
    clean = {
        tuple(tokens.tolist()): x for text in contexts(held_out) for tokens, x in [one(language_model, text.tokens)]
    }
    seen: list[tuple[Any, ...]] = []
    for tokens, copies, read in recorder.passes:
        if read != 4:
            continue  # the clean model, read everywhere
        furthest = 0
        for ids, x in zip(tokens, copies, strict=True):
            whole = next(row for key, row in clean.items() if key[: len(ids)] == tuple(ids.tolist()))
            moved = (x - whole[: len(ids)]).norm(dim=-1)
            assert (moved > 1e-4).sum() == 1, "one position, and no other"
            position = int(moved.argmax())
            furthest = max(furthest, position)
            seen.append((position, float(moved[position])))
        assert tokens.shape[1] in (min(LENGTH, furthest + 4), 250 % LENGTH), "copies end where nothing more is read"
    expected = []
    for feature, row, kind, activation in zip(
        changes.feature.tolist(), changes.row.tolist(), changes.kind.tolist(), changes.activation.tolist(), strict=True
    ):
        length = float(meter.mean[feature]) if kind == ELSEWHERE else activation
        expected.append((row % LENGTH, length * float(meter.dictionary.W_dec[feature].norm())))
    assert [place for place, _ in sorted(seen)] == [place for place, _ in sorted(expected)]
    np.testing.assert_allclose(
        [length for _, length in sorted(seen)], [length for _, length in sorted(expected)], rtol=1e-3
    )


def one(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[0], model.activations(tokens, [RESID])[RESID][0]


def test_nulls(held_out: ActivationCache, language_model: LanguageModel) -> None:
    """Random directions lie at the feature's first places; its own direction only where it does not fire."""
    meter = make_meter(held_out, language_model, RESID)
    firings = scan_firings(meter.dictionary, held_out, RESID, positions=1000, seed=0)
    plan = every_firing(held_out, RESID, nulls=6)
    changes = meter.measure(plan).changes
    elsewhere = changes.at(changes.kind == ELSEWHERE)
    assert not elsewhere.activation.any()
    fired = {(int(f), int(r)) for f in range(48) for r in firings.places.rows_of(f)}
    planned = [(int(f), int(r)) for f, r, k in zip(plan.feature, plan.row, plan.kind, strict=True) if k == ELSEWHERE]
    assert len(elsewhere) == len(set(planned) - fired) < len(planned), "some of the rows drawn are left out"
    for feature in (0, 7):
        random = changes.at((changes.kind == RANDOM) & (changes.feature == feature))
        assert sorted(random.row.tolist()) == sorted(firings.places.rows_of(feature)[:6].tolist())
    directions = meter._directions(plan.at(plan.kind == RANDOM))
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(len(directions)), rtol=1e-4, atol=0)
    cosines = directions @ directions.T - torch.eye(len(directions))
    assert cosines.abs().max() < 0.8, "each change has a direction of its own"
    assert float(cosines.square().mean()) == pytest.approx(1 / 32, rel=0.15), "uniform on the sphere"


def test_batches_and_order_do_not_matter(held_out: ActivationCache, language_model: LanguageModel) -> None:
    plan = some(every_firing(held_out, RESID, nulls=3), 7)
    reference = make_meter(held_out, language_model, RESID).measure(plan)
    shuffled = plan.at(np.random.default_rng(0).permutation(len(plan)))
    for batch_contexts, copies in ((1, 1000), (3, 5), (100, 17)):
        meter = make_meter(held_out, language_model, RESID, batch_contexts=batch_contexts, copies=copies)
        measured = meter.measure(shuffled)
        for name in ("feature", "row", "kind", "document"):
            assert getattr(measured.changes, name).tolist() == getattr(reference.changes, name).tolist()
        for name in NUMBERS:
            np.testing.assert_allclose(
                getattr(measured.changes, name), getattr(reference.changes, name), rtol=1e-4, atol=5e-6, err_msg=name
            )
        for feature, sums in reference.token_sums.items():
            torch.testing.assert_close(measured.token_sums[feature].normed, sums.normed, rtol=1e-4, atol=1e-5)
            assert measured.token_sums[feature].mean_logit == pytest.approx(sums.mean_logit, rel=1e-4, abs=1e-5)


def test_without_a_direct_path_it_is_not_a_number(held_out: ActivationCache, language_model: LanguageModel) -> None:
    measured = make_meter(held_out, language_model, HEADS).measure(some(every_firing(held_out, HEADS), 40))
    assert np.isnan(measured.changes.direct).all() and measured.token_sums == {}


def test_features_that_never_fire_have_no_changes(held_out: ActivationCache, language_model: LanguageModel) -> None:
    firings = scan_firings(make_dictionary(held_out, RESID), held_out, RESID, positions=9, seed=0)
    plan = plan_changes([DEAD], firings, null_positions=9, seed=0)
    assert len(plan) == 0
    recorder = Recorder(language_model, RESID)
    assert len(make_meter(held_out, language_model, RESID, tail=recorder).measure(plan).changes) == 0
    assert recorder.passes == [] and recorder.reads == 0


def test_windows_end_with_the_document(held_out: ActivationCache, language_model: LanguageModel) -> None:
    """Whatever the window, what comes after a document's end is not summed; without one, nothing is."""
    plan = some(every_firing(held_out, RESID), 7)
    none, long, longer = (
        make_meter(held_out, language_model, RESID, window=window).measure(plan).changes for window in (0, 15, 40)
    )
    assert not none.loss_after.any() and not none.kl_after.any()
    np.testing.assert_allclose(none.loss, long.loss, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(long.kl_after, longer.kl_after, rtol=1e-4, atol=5e-6)
    ids = np.concatenate([batch.documents.flatten().numpy() for batch in held_out.contexts(HELD_OUT, batch_contexts=1)])
    last = np.array([row + 2 < len(ids) and ids[row + 2] != ids[row] for row in long.row])  # a separator comes between
    assert last.any() and not long.kl_after[last].any() and long.kl_after[~last].any()
