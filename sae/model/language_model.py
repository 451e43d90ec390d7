"""A language model by name or already loaded: identity, tokens, hook points, generation, logits with replacements."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config.sources import ComputeDtype, ModelConfig
from sae.dictionary.model_identity import (
    fingerprint,
    hash_config,
    hash_ids,
    hash_tokenizer,
    hash_weights,
    model_label,
)
from sae.dictionary.origin import Place
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, ModelError
from sae.model.bridging import boot, has_bridge
from sae.model.generation import Generated, continuations
from sae.model.hook_probe import Hook
from sae.model.hooked import HookedModel, NoBridgeError
from sae.model.info import ModelInfo, model_shape
from sae.model.loading import code_sha256, load_pretrained
from sae.model.native import NativeModel, native_model, twin_of
from sae.model.placement import place
from sae.model.tail import NO_ROAD, Replacement, Road, Tail, without_inexact
from sae.model.vocabulary import Vocabulary
from sae.numerics.modes import in_own_modes


class LanguageModel(HookedModel):
    """A causal language model whose hook points can be read and replaced.

    Args:
        config: the model's configuration, or only its name: a hub model, a folder, a .gguf file, or `demo`.
        device: device it runs on; `config.device` and `config.device_map` come first.

    Raises:
        ConfigError: `config` is neither a configuration nor a name; there is no such device.
        ModelError: the model cannot be found, downloaded or read.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        info: the model's identity.
        device: the device it runs on; if it is spread over several, that of its tokens and activations.
        rows: number of tokens that it has embeddings for.
    """

    @in_own_modes
    def __init__(self, config: ModelConfig | str | Path, device: str | torch.device = "cpu") -> None:
        config = _configured(config)
        model, tokenizer, label, revision, made_up = load_pretrained(config)
        if model.config.bos_token_id is None and tokenizer.bos_token_id is None:
            model.config.bos_token_id = tokenizer.eos_token_id
        facts = _facts(model, tokenizer, config, label, revision) | {"fingerprint": fingerprint(config.name)}
        device = place(model.eval(), config, device)
        native = native_model(model, device, _shared_rows(model, tokenizer), config)
        bridge = boot(model, copy.deepcopy(tokenizer), label, config) if native is None or has_bridge() else None
        self._begin(bridge, native, model, tokenizer, facts, device, made_up)

    @classmethod
    @in_own_modes
    def of(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> LanguageModel:
        """A language model from a Hugging Face model and its tokenizer that are loaded already.

        Splices and other replacements act on `model` itself as long as they are open: on `model(…)` and on
        `model.generate(…)`. It is not changed otherwise, and its weights are not copied. If transformer-lens bridges it
        (a copy of its modules, on the same weights), all hook points are known, and everything works as with a model
        loaded by name; otherwise the residual stream and what is added to it.

        Args:
            model: such as `AutoModelForCausalLM.from_pretrained(…)`, in evaluation mode, where it is to run.
            tokenizer: its tokenizer.
            name: its name in results; None for that in its configuration.

        Raises:
            ConfigError: `model` is no Hugging Face model, or is in training mode.
            ModelError: it has no list of blocks that pass on one residual stream.
        """
        _check_loaded(model)
        dtype, label = str(model.dtype).removeprefix("torch."), name or model_label(model.config._name_or_path)
        label = label or type(model).__name__
        own_code = code_sha256(model, model.config, tokenizer) is not None
        config = ModelConfig(name=label, dtype=dtype, trust_remote_code=own_code)  # type: ignore[arg-type]
        native = native_model(model, model.device, _shared_rows(model, tokenizer), config, copied=False)
        if native is None:
            raise ModelError(
                f"model {label!r}: a {type(model).__name__} cannot be read through its modules, since it has no list "
                "of blocks that pass on one residual stream; load it by name: sae.LanguageModel(name)"
            )
        bridge, reason = None, "pip install 'sae[lm]'"
        if has_bridge() and not getattr(model, "hf_device_map", None):
            twin = twin_of(model, frozen=True)
            if twin.config.bos_token_id is None and tokenizer.bos_token_id is None:
                twin.config.bos_token_id = tokenizer.eos_token_id
            try:
                bridge = boot(twin, copy.deepcopy(tokenizer), label, config)
            except ModelError as error:
                reason = str(error)
        made = cls.__new__(cls)
        facts = _facts(model, tokenizer, config, label, getattr(model.config, "_commit_hash", None))
        made._begin(bridge, native, model, tokenizer, facts, model.device, frozenset(), reason)
        made._handed_over = True
        return made

    def _begin(
        self, bridge: Any, native: NativeModel | None, model: Any, tokenizer: Any, facts: dict[str, Any],
        device: torch.device, made_up: frozenset[int], without_bridge: str = "pip install 'sae[lm]'",
    ) -> None:  # fmt: skip
        self._tails: dict[str, Tail] = {}
        self._hashes: dict[str, str] = {}
        self._made_up = made_up
        d_model, n_layers, max_context = model_shape(bridge, native, model.config)
        info = ModelInfo(d_model=d_model, n_layers=n_layers, max_context=max_context, **facts)
        rows = int(model.get_input_embeddings().weight.shape[0])
        super().__init__(bridge, native, tokenizer, info, device, rows, without_bridge)

    @property
    def bos(self) -> int | None:
        """The id that begins a context: BOS, or end-of-text if the tokenizer has no BOS."""
        return self._first_in_files(self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)

    @property
    def separator(self) -> int | None:
        """The id that ends a document: EOS, or BOS if the tokenizer has no EOS.

        Without either, documents are not separated. A context may then hold the end of one document and the beginning
        of the next with nothing in between, the token policy masks first positions of contexts and no ids, and the
        first token of a document counts like any other.
        """
        return self._first_in_files(self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)

    def _first_in_files(self, *ids: int | None) -> int | None:
        """The first id that is in a file of the tokenizer: the model has never seen ids that its class made up."""
        return next((token for token in ids if token is not None and token not in self._made_up), None)

    @property
    def as_place(self) -> Place:
        """The model as a place where a dictionary is used: one that it was trained on, in any number type."""
        return Place(f"model {self.info.name!r}", self.info.to_json(), ModelError, weights_in=self._weights_in)

    def _weights_in(self, dtype: str) -> str | None:
        """The hash of the weights in another number type; None if they are not there as they were loaded."""
        if self._native is None or dtype not in get_args(ComputeDtype):
            return None
        if dtype not in self._hashes:
            self._hashes[dtype] = hash_weights(self._native.model, getattr(torch, dtype))
        return self._hashes[dtype]

    def token_policy(self, *, prepend_bos: bool, masked_positions: int, mask_special_tokens: bool) -> TokenPolicy:
        """Which tokens count, with this tokenizer's special tokens.

        Raises:
            ModelError: BOS is requested and the tokenizer's files have neither BOS nor EOS, or the model has no
                embedding for one of them.
        """
        if prepend_bos and self.bos is None:
            made_up = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(token)) for token in sorted(self._made_up))
            reason = f" in its files ({made_up} made up by its class or settings)" if made_up else ""
            raise ModelError(
                f"model {self.info.name!r}: its tokenizer has no BOS or EOS token{reason}; set data.prepend_bos=false"
            )
        for token in (self.bos if prepend_bos else None, self.separator):
            if token is not None and token >= self.rows:
                raise ModelError(
                    f"model {self.info.name!r}: its tokenizer's BOS or EOS token has the id {token}, and the model has "
                    f"embeddings of {self.rows} tokens; load the tokenizer that the model was trained with"
                )
        ids = {*self.tokenizer.all_special_ids, *(token for token in (self.bos, self.separator) if token is not None)}
        return TokenPolicy(prepend_bos, masked_positions, tuple(sorted(ids)) if mask_special_tokens else ())

    def check_context_length(self, context_length: int) -> None:
        """Raise ModelError if contexts are longer than the model can read."""
        if context_length > self.info.max_context:
            raise ModelError(
                f"data.context_length={context_length}: {self.info.name} reads at most {self.info.max_context} tokens"
            )

    def hooks(self) -> list[Hook]:
        """Every hook point of the model, block by block, with its width and whether it can be replaced.

        Hook points count as replaceable only if putting back their own activations leaves the logits unchanged.
        """
        return list(self._checked_hooks.values())

    @functools.cached_property
    def _checked_hooks(self) -> dict[str, Hook]:
        return self._hooks if self._bridge is None else without_inexact(self, self._hooks)

    def to_tokens(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> Int[Tensor, "context seq"]:
        """Token ids of one text, or of several texts with the same number of tokens, on the model's device.

        Args:
            text: a text or texts.
            prepend_bos: begin with `bos`, if the tokenizer has one.

        Raises:
            ModelError: there is no text, a text has no tokens, or lengths differ (padding would change the model's
                input).
        """
        rows = self.token_rows(text, prepend_bos=prepend_bos)
        least, most = min(map(len, rows)), max(map(len, rows))
        if least < most:
            raise ModelError(f"the texts have {least} to {most} tokens: pass texts of equal length together")
        return torch.tensor(rows, device=self.device)

    def token_rows(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> list[list[int]]:
        """As `to_tokens`, for texts of any lengths: a list of ids for each.

        Raises:
            ModelError: there is no text, or a text has no tokens.
        """
        texts = [text] if isinstance(text, str) else list(text)
        start = [self.bos] if prepend_bos and self.bos is not None else []
        rows = [[*start, *self.text_ids(string)] for string in texts]
        if not all(rows) or not rows:
            raise ModelError("there is no text, or a text has no tokens: leave out empty texts")
        return rows

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, without `bos`; none for an empty text.

        Lone surrogates, which stand for undecodable bytes of an argument or a file name, become `?`: no tokenizer takes
        them.
        """
        valid = text.encode("utf-8", "replace").decode()
        return self.tokenizer(valid, add_special_tokens=False, verbose=False)["input_ids"]

    def token_id(self, token: str | int, count: int | None = None) -> int:
        """The id of a token given as text or as id.

        Args:
            token: text, in most vocabularies with the space before the word, or id.
            count: number of ids that are taken; None: all that the model reads.

        Raises:
            ConfigError: the text is not a single token, or there is no such id.
        """
        count = self.rows if count is None else count
        id = token if isinstance(token, int) else self._id_of_text(token)
        if not 0 <= id < count:
            name = f"token {token}" if id == token else f"token {token!r}, with the id {id}"
            raise ConfigError(f"{name}: {self.info.name} has tokens 0 to {count - 1}")
        return id

    def _id_of_text(self, token: str) -> int:
        """The id of a text that is a single token."""
        ids = self.text_ids(token)
        if len(ids) != 1:  # some tokenizers put a space before every text
            texts = self._vocabulary_texts.tokens
            ids = [number for number, text in enumerate(texts) if text == token.encode()][:1] or ids
        if len(ids) != 1:
            parts = ", ".join(repr(self.to_texts([part])[0] or f"<{part}>") for part in ids)
            raise ConfigError(
                f"token {token!r}: {self.info.name} reads it as {len(ids)} tokens{parts and f' ({parts})'}; give the "
                "text of a single one, such as a common word with the space before it"
            )
        return ids[0]

    def to_texts(self, tokens: Int[Tensor, "*context"] | Sequence[int]) -> list[Any]:
        """The text of each token, spaces and line ends included, in lists nested like `tokens`.

        A character that spans several tokens is given to the token that completes it, and the others are empty.

        Args:
            tokens: ids: `[context, seq]`, as `to_tokens` gives them, or of one context.
        """
        if isinstance(tokens, Tensor) and tokens.ndim > 1:
            return [self.to_texts(context) for context in tokens]
        return self._vocabulary_texts.pieces(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    @functools.cached_property
    def _vocabulary_texts(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer)

    def generate(
        self, prompts: str | Sequence[str], *, max_new_tokens: int = 40, seed: int | None = None,
        temperature: float = 1.0, prepend_bos: bool = True, stop: bool = True,
    ) -> list[Generated]:  # fmt: skip
        """Continuations of one or several prompts, with splices and steering that are open.

        The prompts are read together, padded on the left, and continued with a key-value cache.

        Args:
            prompts: texts; each begins with `bos`, as in `to_tokens`.
            max_new_tokens: tokens to generate after each prompt.
            seed: seed of the sampled tokens; None: always the most probable token.
            temperature: of the distribution that is sampled from; without a seed it has no effect.
            prepend_bos: begin with `bos`, if the tokenizer has one.
            stop: end a continuation where the model ends the text.

        Raises:
            ConfigError: `max_new_tokens` or `temperature` is not positive.
            ModelError: a prompt has no tokens, or prompt and continuation are longer than the model reads.
        """
        rows = self.token_rows(prompts, prepend_bos=prepend_bos)
        made = continuations(self, rows, max_new_tokens, seed, temperature, stop=stop)
        return [  # a character may begin in the prompt
            Generated(tokens, "".join(self.to_texts([*row, *tokens])[len(row) :]))
            for row, tokens in zip(rows, made, strict=True)
        ]

    def tail(self, hook: str) -> Tail:
        """The model from a hook point on; checked on this model when first used.

        Raises:
            ModelError: the hook point cannot be replaced, or not exactly.
        """
        if hook not in self._tails:
            self._tails[hook] = Tail(self, hook)
        return self._tails[hook]

    def road(self, hook: str) -> Road:
        """How replacements at a hook point become logits; `none`, with the reason, if it can only be read.

        Raises:
            ModelError: the model has no such hook point, or transformer-lens is not installed.
        """
        self.check_hook(hook)
        try:
            return self.tail(hook).road
        except NoBridgeError:
            raise
        except ModelError as error:
            return Road(NO_ROAD, str(error))

    @torch.no_grad()
    def replaced_logits(
        self, tokens: Int[Tensor, "context seq"], hook: str, replacements: Sequence[Replacement]
    ) -> Iterator[Float[Tensor, "context seq vocab"]]:
        """Logits with the hook point's activations `[context, seq, d_in]` replaced, for each function in turn.

        The blocks before the hook point run once for all replacements if that is exact; see `tail`.
        """
        tail = self.tail(hook)
        start = tail.start(tokens)
        for replacement in replacements:
            yield tail.logits(start, replacement)


def _configured(model: Any) -> ModelConfig:
    """Turn a model's name into a configuration.

    Raises:
        ConfigError: `model` is neither a name nor a configuration.
    """
    if isinstance(model, str | Path):
        return ModelConfig(name=str(model))
    if isinstance(model, ModelConfig):
        return model
    raise ConfigError(
        f"language model {model!r}: expected a name such as 'gpt2', or a sae.ModelConfig; it is a "
        f"{type(model).__name__}"
    )


def _check_loaded(model: Any) -> None:
    """Raise ConfigError unless a model is one of transformers, in evaluation mode."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise ConfigError(
            f"language model of type {type(model).__name__}: expected a Hugging Face model, such as that of "
            "AutoModelForCausalLM.from_pretrained(…); give a name to sae.LanguageModel(name)"
        )
    if model.training:
        raise ConfigError("the language model is in training mode, in which dropout acts: call model.eval() first")


def _shared_rows(model: Any, tokenizer: Any) -> int:
    """Number of ids that both the model's embedding and the tokenizer have."""
    return min(int(model.get_input_embeddings().weight.shape[0]), len(tokenizer))


def _facts(model: Any, tokenizer: Any, config: ModelConfig, label: str, revision: str | None) -> dict[str, Any]:
    """The entries of a model's identity that do not depend on how it is read."""
    return {
        "name": label,
        "revision": revision,
        "requested_revision": config.revision,
        "fingerprint": None,
        "weights_sha256": hash_weights(model),
        "weight_processing": config.weight_processing,
        "dtype": config.dtype,
        "tokenizer_sha256": hash_tokenizer(tokenizer),
        "trust_remote_code": config.trust_remote_code,
        "code_sha256": code_sha256(model, model.config, tokenizer),
        "config_sha256": hash_config(model.config),
        "tokenizer_ids_sha256": hash_ids(tokenizer),
        "library": f"transformers {version('transformers')}",
    }
