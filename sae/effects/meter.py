"""The engine that measures effects: copies of contexts with one activation changed, compared with the clean model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.effects.direct import DirectPath
from sae.effects.firings import measurable
from sae.effects.interventions import ELSEWHERE, FIRING, NO_CHANGES, RANDOM, Changes, Plan
from sae.errors import ConfigError
from sae.model.tail import Start, Tail
from sae.numerics.seeding import numpy_generator
from sae.results.estimate import double, row_sums

_CLEAN_LOGITS = 1 << 26
_CHANGED_LOGITS = 1 << 24


@dataclass
class TokenSums:
    """Sums over a feature's FIRING changes, from which first-order log-probabilities of all tokens are computed."""

    normed: Float[Tensor, " d_model"]
    mean_logit: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Changes in row order, and sums along the direct path by feature, if there is one."""

    changes: Changes
    token_sums: dict[int, TokenSums]


@dataclass(frozen=True)
class _Clean:
    """The clean model at every position of some contexts, on the model's device.

    `counts` says which losses count, and `read` is what a transcoder encodes; None: x. Log-probabilities and residuals
    are set only if there is something to change.
    """

    tokens: Int[Tensor, "context seq"]
    documents: Int[Tensor, "context seq"]
    counts: Bool[Tensor, "context seq"]
    start: Start
    x: Float[Tensor, "context seq d_out"]
    read: Float[Tensor, "context seq d_in"] | None = None
    log_p: Float[Tensor, "context seq vocab"] | None = None
    final: Float[Tensor, "context seq d_model"] | None = None


@dataclass(frozen=True)
class _Sites:
    """Changes within some contexts: their places and the vectors added to the activations there."""

    plan: Plan
    context: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    vector: Float[Tensor, "n d_out"]

    def at(self, index: Tensor) -> _Sites:
        parts = (self.context, self.position, self.activation, self.vector)
        return _Sites(self.plan.at(index.numpy()), *(part[index] for part in parts))


class ChangeMeter:
    """Makes changes in batches of context copies and compares them with the clean model.

    A change replaces the activation x at a single position of a context by x + a·W_dec,i (times x's scale, if the
    dictionary normalises each token); the model computes everything else as usual. With f = f_i(x) and scale α, FIRING
    changes have a = (α − 1)·f, so the part of x that the dictionary does not explain is left alone. RANDOM changes have
    the same length, but a direction drawn from the sphere instead of W_dec,i's. ELSEWHERE changes have a = |α − 1|
    times the feature's mean activation, at a position where it does not fire; if it does fire there, the change is left
    out. Each change gets its own copy of its context.

    The features of a transcoder fire where it reads and are changed in what it gives: f is computed from the activation
    at `reads`; x is that at the tail's hook point.

    Changes of length 0 have effects of 0, without a pass of the model.

    Args:
        tail: the model from the hook point on.
        direct: the direct path to the logits; None: unknown.
        dictionary: takes raw activations, on any device.
        cache: its held-out contexts are changed.
        mean: each feature's mean activation, for ELSEWHERE.
        scale: α.
        reads: hook point whose activations the dictionary encodes; None: the tail's.
        window: number of following positions to sum over; those that do not count (see `measurable`) or belong to
            another document are left out.
        seed: seed of the random directions; each depends only on the seed, the feature and the row.
        batch_contexts: maximum number of contexts whose clean log-probabilities are held at once.
        copies: maximum number of context copies in a pass.
    """

    def __init__(
        self, tail: Tail, direct: DirectPath | None, dictionary: Dictionary, cache: ActivationCache, *,
        mean: Float[np.ndarray, " d_sae"], scale: float, window: int, seed: int, reads: str | None = None,
        batch_contexts: int = 16, copies: int = 64,
    ) -> None:  # fmt: skip
        self.tail, self.direct, self.dictionary, self.cache = tail, direct, dictionary, cache
        self.mean = torch.from_numpy(np.asarray(mean)).float()
        self.scale, self.seed, self.reads = scale, seed, reads
        self.window = min(window, cache.context_length - 1)
        vocabulary = int(tail.language_model.bridge.cfg.d_vocab)
        self.contexts = max(1, min(batch_contexts, _CLEAN_LOGITS // (cache.context_length * vocabulary)))
        self.copies = max(1, min(copies, _CHANGED_LOGITS // ((1 + self.window) * vocabulary)))

    @torch.no_grad()
    def measure(self, plan: Plan, progress: Callable[[int], None] | None = None) -> Measured:
        """Make all changes of a plan, given in any order.

        Args:
            plan: the changes.
            progress: called with the number of changes made since the last call.
        """
        plan = plan.at(np.lexsort((plan.kind, plan.feature, plan.row)))
        parts = [NO_CHANGES]
        token_sums: dict[int, TokenSums] = {}
        for clean, sites in self._batches(plan):
            parts.append(self._measure(clean, sites, token_sums))
            if progress is not None:
                progress(len(sites.plan))
        return Measured(Changes.joined(parts), token_sums)

    def _batches(self, plan: Plan) -> Iterator[tuple[_Clean, _Sites]]:
        """Yield contexts with changes in them, a few at a time, and the part of the plan that lies in them."""
        length, device = self.cache.context_length, self.tail.language_model.device
        change_contexts = plan.row // length
        changed_contexts = np.unique(change_contexts)
        for batch in self.cache.contexts(HELD_OUT, batch_contexts=self.cache.manifest.shard_contexts):
            first = batch.first_row // length
            in_batch = changed_contexts[(changed_contexts >= first) & (changed_contexts < first + len(batch.tokens))]
            for start in range(0, len(in_batch), self.contexts):
                contexts = in_batch[start : start + self.contexts]
                chosen = torch.from_numpy(contexts - first)
                tokens = batch.tokens[chosen].to(device)
                beginning, read = self.tail.start(tokens), None
                if self.reads is not None:
                    read = self.tail.language_model.activations(tokens, self.reads)[self.reads]
                clean = _Clean(
                    tokens,
                    batch.documents[chosen].to(device),
                    measurable(batch.eligible[chosen]).to(device),
                    beginning,
                    self.tail.activations(beginning),
                    read,
                )
                part = plan.at(np.isin(change_contexts, contexts))
                context = np.searchsorted(contexts, part.row // length)
                yield clean, self._sites(part, clean, torch.from_numpy(context), torch.from_numpy(part.row % length))

    def _sites(self, plan: Plan, clean: _Clean, context: Tensor, position: Tensor) -> _Sites:
        """The vectors added at each place, on the CPU; ELSEWHERE places where the feature fires are left out."""
        device = self.dictionary.W_dec.device
        feature, kind = torch.from_numpy(plan.feature), torch.from_numpy(plan.kind)
        read = clean.x if clean.read is None else clean.read
        x = read[context.to(read.device), position.to(read.device)].float().to(device)
        values, indices = self.dictionary.encode_sparse(x)
        activation = (values * (indices == feature.to(device)[:, None])).sum(-1).float().cpu()
        amount = (self.scale - 1) * activation
        amount = torch.where(kind == ELSEWHERE, abs(self.scale - 1) * self.mean[feature], amount)
        vector = amount[:, None] * self.dictionary.frame.scale(x).cpu() * self._directions(plan)
        sites = _Sites(plan, context, position, activation, vector)
        return sites.at(((kind != ELSEWHERE) | (activation == 0)).nonzero().flatten())

    def _directions(self, plan: Plan) -> Float[Tensor, "n d_out"]:
        """Decoder rows; for RANDOM changes, directions from the sphere of the same length."""
        directions = self.dictionary.W_dec[torch.from_numpy(plan.feature).to(self.dictionary.W_dec.device)]
        directions = directions.float().cpu()
        for number in np.flatnonzero(plan.kind == RANDOM):
            feature, row = int(plan.feature[number]), int(plan.row[number])
            draw = numpy_generator("effects: random directions", self.seed, feature, row)
            drawn = torch.from_numpy(draw.standard_normal(directions.shape[1])).float()
            directions[number] = drawn * (directions[number].norm() / drawn.norm())
        return directions

    def _measure(self, clean: _Clean, sites: _Sites, token_sums: dict[int, TokenSums]) -> Changes:
        """Measure the changes of some contexts; adds to `token_sums`."""
        n = len(sites.plan)
        loss, kl = torch.zeros(2, n, 2, dtype=torch.float64)
        direct = torch.full((n,), np.nan if self.direct is None else 0.0, dtype=torch.float64)
        moved = sites.vector.any(-1).nonzero().flatten()
        if len(moved):
            clean = self._with_clean_pass(clean)
            moved = moved[sites.position[moved].argsort(stable=True)]  # batches short copies together
            for chosen in moved.split(self.copies):
                part = sites.at(chosen)
                loss[chosen], kl[chosen] = self._changed(clean, part)
                if self.direct is not None:
                    direct[chosen] = self._direct(self.direct, clean, part, token_sums)
        documents = clean.documents.cpu()[sites.context, sites.position]
        return Changes(
            sites.plan.feature, sites.plan.row, sites.plan.kind, documents.numpy(), sites.activation.double().numpy(),
            loss[:, 0].numpy(), loss[:, 1].numpy(), kl[:, 0].numpy(), kl[:, 1].numpy(), direct.numpy(),
        )  # fmt: skip

    def _with_clean_pass(self, clean: _Clean) -> _Clean:
        everywhere = torch.arange(clean.tokens.shape[1], device=clean.tokens.device).expand(clean.tokens.shape)
        readout = self.tail.read_out(clean.start, clean.x, everywhere)
        return replace(clean, log_p=readout.logits.log_softmax(-1), final=readout.final)

    def _changed(self, clean: _Clean, sites: _Sites) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"]]:
        """Loss differences and divergences: at the position, and summed over the following ones."""
        assert clean.log_p is not None
        device = clean.tokens.device
        context, position = sites.context.to(device), sites.position.to(device)
        length = min(clean.tokens.shape[1], int(position.max()) + self.window + 1)
        copies = clean.x[context, :length].clone()
        place = torch.arange(len(copies), device=device)
        changed = (copies[place, position].float() + sites.vector.to(device)).to(copies.dtype)
        self._check_finite(changed.float().square().sum(-1), copies.dtype)  # norms square it
        copies[place, position] = changed
        read = position[:, None] + torch.arange(self.window + 1, device=device)
        inside, read = read < length, read.clamp(max=length - 1)
        rows = context[:, None]
        same_document = clean.documents[rows, read] == clean.documents[context, position][:, None]
        counts = (inside & clean.counts[rows, read] & same_document).cpu()
        log_q = self.tail.read_out(clean.start.at(context, length), copies, read).logits.log_softmax(-1)
        log_p = clean.log_p[rows, read]
        self._check_finite(log_q.amax(-1)[log_p.amax(-1).isfinite()], copies.dtype)
        next_token = clean.tokens[rows, (read + 1).clamp(max=clean.tokens.shape[1] - 1)]
        difference = log_p - log_q
        loss = double(difference.gather(-1, next_token[..., None])[..., 0]).cpu()
        kl = row_sums(difference.mul_(log_p.exp()).flatten(0, 1)).view(read.shape).cpu()
        return _at_and_after(loss * counts), _at_and_after(kl * counts)

    def _check_finite(self, numbers: Tensor, dtype: torch.dtype) -> None:
        """Raise ConfigError if the scale is too large for the model's number type."""
        if not numbers.isfinite().all():
            raise ConfigError(
                f"scale={self.scale:g}: the changed activations overflow in the model, which computes in "
                f"{str(dtype).removeprefix('torch.')}; use a factor nearer to 1, such as 0 or 2"
            )

    def _direct(
        self, direct: DirectPath, clean: _Clean, sites: _Sites, token_sums: dict[int, TokenSums]
    ) -> Float[Tensor, " n"]:
        """First-order changes of the loss; FIRING changes are added to their features' sums."""
        assert clean.log_p is not None and clean.final is not None
        device = clean.tokens.device
        context, position = sites.context.to(device), sites.position.to(device)
        normed = direct.through_norm(clean.final[context, position], sites.vector.to(device))
        change = direct.log_probability(normed, clean.log_p[context, position], clean.tokens[context, position + 1])
        normed, mean = double(normed).cpu(), change.mean_logit.cpu()
        for number in np.flatnonzero(sites.plan.kind == FIRING):
            sums = token_sums.setdefault(int(sites.plan.feature[number]), TokenSums(torch.zeros_like(normed[0])))
            sums.normed += normed[number]
            sums.mean_logit += float(mean[number])
        return -change.log_probability.cpu()


def _at_and_after(numbers: Float[Tensor, "n read"]) -> Float[Tensor, "n 2"]:
    return torch.stack([numbers[:, 0], numbers[:, 1:].sum(-1)], 1)
