"""The base class of all dictionaries: parameters, encode, decode, save."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.dictionary.codes import Codes
from sae.dictionary.exchange import Exchanged
from sae.dictionary.frame import EQUAL_WIDTHS, PLAIN, Frame
from sae.dictionary.origin import Origin
from sae.dictionary.rescalable import Rescalable
from sae.dictionary.saelens_cfg import ToolConfig, tool_config
from sae.errors import ConfigError, ShapeError
from sae.files.formats import Format
from sae.files.writing import write_json, write_tensors
from sae.kernels.interface import DENSE_ABOVE, Selection
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import decode, encode_at, padded
from sae.numerics.modes import has_values, needs_plain_operators, without_autocast

FORMAT = Format("sae-dictionary", EQUAL_WIDTHS)
"""Version 2 has a frame that is not plain, version 3 that of a transcoder between equal widths; others are written as
the first version that can hold them, which older packages read."""
CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.safetensors"
WEIGHTS_HASH = "weights_file_sha256"
TRAINED_AS = {"architecture", "d_in", "d_sae", "k", "prefixes"}
"""Training settings that are also attributes of the saved dictionary."""


class Dictionary(Rescalable, Exchanged, ABC):
    """f = act((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec, on raw activations of a language model.

    Subclasses define `act`: `select` and `lets_through` decide which features fire, `activate` computes their
    activations from the pre-activations. Inputs have shape `[..., d_in]`, features `[..., d_sae]`.

    Everything is twice differentiable in the input and the parameters. Inside the transforms of `torch.func`, in
    forward-mode differentiation, and while `torch.compile` or `torch.export` traces, codes are computed by PyTorch's
    dense operators; otherwise sparsely, if few features fire. Results have the weights' dtype, even inside
    `torch.autocast`.

    Attributes:
        W_enc: `[d_in, d_sae]`; stored by feature, as the transpose of a contiguous `[d_sae, d_in]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_out]`, rows of norm 1: row j is the direction of feature j. (Rows of a TopK of another
            toolkit may have other norms; see `sae.formats.foreign`.)
        b_dec: `[d_out]`, with d_out = d_in unless the frame says otherwise.
        frame: what is done to each token before encoding and after decoding; plain, so nothing, unless the dictionary
            is a transcoder or comes from another toolkit.
        W_skip: `[d_in, d_out]` if the frame has a skip connection, otherwise None.
        metadata: JSON-able facts saved with the weights: model, hook point, token policy, training.
    """

    W_skip: nn.Parameter | None

    def __init__(self, d_in: int, d_sae: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._cfg: ToolConfig | None = None
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        for name in self.bias_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)))
        self.set_frame(PLAIN)

    def set_frame(self, frame: Frame) -> None:
        """Give the dictionary a frame, and new zeros for W_dec, b_dec and W_skip, whose shapes depend on it."""
        self.frame, self.d_out = frame, frame.d_out or self.d_in
        like = self.W_enc.detach()
        self.W_dec = nn.Parameter(like.new_zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(like.new_zeros(self.d_out))
        skip = nn.Parameter(like.new_zeros(self.d_in, self.d_out)) if frame.skip else None
        self.register_parameter("W_skip", skip)

    @property
    def centre(self) -> Float[Tensor, " d_in"]:
        """What is subtracted before encoding: b_dec, or 0 of a transcoder, whose b_dec belongs to the output."""
        return self.b_dec if self.frame.d_out is None else self.b_dec.new_zeros(self.d_in)

    @abstractmethod
    def select(self, x: Float[Tensor, "rows d_in"]) -> Selection:
        """The features that may fire on each row, and their pre-activations; x is normalised already by the frame."""

    @abstractmethod
    def lets_through(self, pre: Float[Tensor, "*batch d_sae"]) -> Bool[Tensor, "*batch d_sae"]:
        """Mask of features that may fire, from dense pre-activations: the result of `select`, in plain PyTorch."""

    def activate(
        self, pre: Float[Tensor, "*batch"], features: Int[Tensor, " pairs"] | slice
    ) -> Float[Tensor, "*batch"]:
        """Activations of selected features from their pre-activations; 0 if negative.

        Args:
            pre: pre-activations, one per pair, or `[..., d_sae]` with `features=slice(None)`.
            features: the pairs' features.
        """
        return pre.relu()

    def settings(self) -> dict[str, Any]:
        """Constructor arguments other than d_in, d_sae and metadata, as in `config.json`."""
        return {name: getattr(self, name) for name in self.setting_names}

    def magnitude_encoder(
        self, rows: Float[Tensor, "some d_in"], features: Int[Tensor, " some"] | slice
    ) -> tuple[Float[Tensor, "some d_in"], Float[Tensor, " some"]]:
        """Encoder rows and biases whose output, after a ReLU, is the activation if no gate is closed.

        Args:
            rows: of W_enc.T, for these features.
            features: which ones.
        """
        return rows, self.b_enc[features]

    @without_autocast
    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """(x − b_dec) W_enc + b_enc, or x W_enc + b_enc of a transcoder; of the y of a frame that is not plain.

        Raises:
            ShapeError: the width of x is not d_in; every method that encodes raises it.
        """
        self._check_width(x)
        return (self.frame.normalised(x.to(self.W_enc.dtype)) - self.centre) @ self.W_enc + self.b_enc

    @without_autocast
    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        """The features that fire, as values and indices `[..., k]`, strongest first.

        Here k is the number of features of the input with the most, and other rows are padded with 0 (see `Codes`).
        For TopK, k is the dictionary's k.

        Raises:
            ShapeError: inside `torch.func.vmap` or on a meta tensor, unless the dictionary is a TopK.
        """
        if self._is_dense(x):
            features = self._encode_densely(x)
            return Codes(*features.topk(self._widest(features), dim=-1))
        pattern, values = self._encode_rows(x)
        rows_values, rows_indices = padded(pattern, values)
        shape = (*x.shape[:-1], rows_values.shape[1])
        return Codes(rows_values.reshape(shape), rows_indices.reshape(shape))

    @without_autocast
    def encode_pairs(
        self, x: Float[Tensor, "rows d_in"]
    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Row, feature and activation ≥ 0 of every feature that may fire, by rows; without sorting them by strength."""
        pattern, values = Pattern.of_nonzeros(self._encode_densely(x)) if self._is_dense(x) else self._encode_rows(x)
        return pattern.rows, pattern.features, values

    @without_autocast
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense: zero where a feature does not fire."""
        if self._is_dense(x):
            return self._encode_densely(x)
        pattern, values = self._encode_rows(x)
        return pattern.dense(values).view(*x.shape[:-1], self.d_sae)

    @without_autocast
    def decode(
        self, features: Float[Tensor, "*batch d_sae"], like: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction from dense features.

        On a CPU, only features that fire are multiplied, if they are few and need no gradient: as in `forward`, so that
        `decode(encode(x))` is the same to the last bit.

        Args:
            features: activations of all features.
            like: the activations that they were encoded from; only needed if `frame.needs_input`.

        Raises:
            ShapeError: `like` is needed and missing.
        """
        features = features.to(self.W_dec.dtype)
        if not self._is_worth_sparse(features):
            return self._framed(features @ self.W_dec + self.b_dec, like)
        pattern, values = Pattern.of_nonzeros(features.reshape(-1, self.d_sae))
        decoded = decode(pattern, values, self.W_dec).view(*features.shape[:-1], self.d_out) + self.b_dec
        return self._framed(decoded, like)

    @without_autocast
    def decode_sparse(
        self, codes: Codes, like: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction from sparse codes; equal to `decode` of the same features."""
        values, indices = codes.values.to(self.W_dec.dtype), codes.indices
        batch, k = values.shape[:-1], values.shape[-1]
        if needs_plain_operators(values):
            features = values.new_zeros(*batch, self.d_sae).scatter_add(-1, indices, values)
            return self._framed(features @ self.W_dec + self.b_dec, like)
        pattern = Pattern.from_indices(indices.reshape(-1, k), self.d_sae)
        decoded = decode(pattern, values.reshape(-1), self.W_dec).reshape(*batch, self.d_out) + self.b_dec
        return self._framed(decoded, like)

    @without_autocast
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction x̂ of x."""
        if self._is_dense(x):
            return self.decode(self._encode_densely(x), x)
        pattern, values = self._encode_rows(x)
        if pattern.density > DENSE_ABOVE and values.device.type == "cpu":  # many are selected, but few may fire
            return self.decode(pattern.dense(values).view(*x.shape[:-1], self.d_sae), x)
        decoded = decode(*pattern.ascending(values), self.W_dec).reshape(*x.shape[:-1], self.d_out) + self.b_dec
        return self._framed(decoded, x)

    def _framed(self, decoded: Float[Tensor, "*batch d_out"], x: Tensor | None) -> Float[Tensor, "*batch d_out"]:
        """x̂ from f W_dec + b_dec."""
        if self.frame.needs_input and x is not None:
            self._check_width(x)
            x = x.to(decoded.dtype)
        return self.frame.restored(decoded, x, self.W_skip)

    def _is_dense(self, x: Tensor) -> bool:
        """Whether to compute codes of x densely."""
        self._check_width(x)
        return needs_plain_operators(x)

    def _encode_densely(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.pre_activations(x)
        return self.activate(pre, slice(None)).masked_fill(~self.lets_through(pre), 0)

    def _widest(self, features: Float[Tensor, "*batch d_sae"]) -> int:
        """Largest number of features that fire on one input, at least 1."""
        if not has_values(features):
            raise ShapeError(
                f"encode_sparse of a {type(self).__name__}, inside vmap or on a meta tensor: its shape depends on how "
                "many features fire, which is unknown then; use encode, or call encode_sparse outside vmap"
            )
        return max(int((features != 0).sum(-1).max()), 1) if features.numel() else 1

    def _encode_rows(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Pattern, Float[Tensor, " pairs"]]:
        self._check_width(x)
        rows = self.frame.normalised(x.to(self.W_enc.dtype).reshape(-1, self.d_in))
        selection = self.select(rows)
        pattern = selection.pattern
        pre = encode_at(rows, self.centre, self.W_enc.T, self.b_enc, selection)
        return pattern, self.activate(pre, pattern.features)

    def _is_worth_sparse(self, features: Tensor) -> bool:
        """Whether dense features have so few non-zeros that finding them costs less than multiplying the zeros."""
        fits = features.shape[-1:] == (self.d_sae,) and not needs_plain_operators(features)
        if not fits or features.device.type != "cpu" or (features.requires_grad and torch.is_grad_enabled()):
            return False
        return int(features.count_nonzero()) <= DENSE_ABOVE * features.numel()

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.d_in,):
            hook = None
            with contextlib.suppress(ConfigError):  # metadata that cannot be read is not the problem here
                hook = self.origin.reads.sites[0].hook
            raise ShapeError(
                f"activations of shape {list(x.shape)}: this dictionary takes [..., {self.d_in}]; give it those of the "
                f"model and hook point it was trained on{f' ({hook})' if hook else ''}"
            )

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `weights.safetensors`, which are all that is needed to load the dictionary again.

        `config.json` contains the SHA-256 of the other file. If an older dictionary is overwritten and a kill comes
        between the two writes, the files left behind therefore do not pass for one dictionary.

        Raises:
            CacheError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters()}
        digest = write_tensors(folder / WEIGHTS_FILE, tensors)
        write_json(folder / CONFIG_FILE, self.config() | {WEIGHTS_HASH: digest})

    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {
            **FORMAT.head(self.frame.least_version(self.d_in)),
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            **self.settings(),
            **self.frame.to_json(),
            "dtype": dtype_name(self.dtype),
            "metadata": self.metadata,
        }

    @property
    def origin(self) -> Origin:
        """What it was trained on, from its metadata: hook points, model, tokens, text.

        Raises:
            ConfigError: the metadata cannot be read.
        """
        return Origin.of(self.metadata, self.d_in, self.frame.d_out)

    @property
    def is_transcoder(self) -> bool:
        """Whether it reconstructs other activations than it reads."""
        return self.origin.of_transcoder

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of all computations; inputs of another dtype are converted."""
        return self.W_dec.dtype

    @property
    def cfg(self) -> ToolConfig:
        """Attributes that SAELens and SAEBench read from a dictionary, under their names; created on first access.

        You may change it, as in `dictionary.cfg.model_name = "gpt2"`: this package does not read or save it.
        """
        if self._cfg is None:
            self._cfg = tool_config(self.config(), self.saebench_name or self.architecture, str(self.device))
        return self._cfg

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dictionary:
        """Called by `.to()`, `.cuda()`, `.bfloat16()` and the like."""
        moved = super()._apply(fn, recurse)
        if self._cfg is not None:
            self._cfg.dtype, self._cfg.device = dtype_name(self.dtype), str(self.device)
        return moved

    def extra_repr(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in {**self.settings(), **self.frame.to_json()}.items())
        return f"d_in={self.d_in}, d_sae={self.d_sae}" + (f", {settings}" if settings else "")


SparseAutoencoder = Dictionary
"""The same class under the name that most papers use."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_k(k: int, d_sae: int) -> None:
    """Refuse a number of features that no token can have.

    Raises:
        ValueError: 1 ≤ k ≤ d_sae does not hold.
    """
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k}: expected 1 ≤ k ≤ d_sae={d_sae}")
