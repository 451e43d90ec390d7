"""Releases of dictionaries that have a short name: where they are on the hub, and what their files do not say.

Repositories, paths, scales and published numbers are those of SAELens's registry; contexts and BOS those that its
loaders give to files without them (sae-lens 6.54.12).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sae.dictionary.hook_points import name_of
from sae.dictionary.published import Published
from sae.errors import FormatError

REGISTRY = "SAELens's registry"
_CENTRED = "center_and_fold"
"""Processing that leaves a residual stream of mean 0, as these dictionaries take it; folded norms do not change it."""
_OPENWEBTEXT, _PILE, _SLIMPAJAMA = "Skylion007/openwebtext", "monology/pile-uncopyrighted", "cerebras/SlimPajama-627B"
_WITH_BOS = {"prepend_bos": True, "masked_positions": 0, "masked_ids": []}
_WITHOUT_BOS = _WITH_BOS | {"prepend_bos": False}


@dataclass(frozen=True)
class Release:
    """Dictionaries published together.

    Attributes:
        repository: on the hub.
        model: name of their language model on the hub.
        paths: the path of each dictionary in the repository by its id; empty: any path below `folder`.
        folder: folder of the repository that has all of them.
        numbered: an id with `{}` for the number of a block, which may be given instead; empty: numbers are not taken.
        hooks: hook points by id; others are in the files, or in the names of their folders.
        processing: `weight_processing` of the model whose activations they take.
        normalisation: of activations before they are encoded: `none`; `constant`, by one number; `per token`.
        scales: the number by id, for files that say that there is one but not which.
        context_length: tokens per context in training; None: unknown.
        tokens: which tokens counted, as JSON of a `TokenPolicy`; None: unknown.
        data: the text of the training; empty: unknown.
        published: numbers by id.
    """

    repository: str
    model: str
    paths: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    numbered: str = ""
    hooks: Mapping[str, str] = field(default_factory=dict)
    processing: str = "none"
    normalisation: Literal["none", "constant", "per token"] = "none"
    scales: Mapping[str, float] = field(default_factory=dict)
    context_length: int | None = None
    tokens: Mapping[str, Any] | None = None
    data: str = ""
    published: Mapping[str, Published] = field(default_factory=dict)

    def path_of(self, name: str, key: str) -> str:
        """Path of a dictionary in the repository.

        Args:
            name: of this release, for the message.
            key: the dictionary's id or path, or the number of its block.

        Raises:
            FormatError: the release has no such dictionary.
        """
        if not self.paths:
            return f"{self.folder}/{key}".strip("/")
        id = self.numbered.format(key) if self.numbered and key.isdecimal() else key
        if id in self.paths or id in self.paths.values():
            return self.paths.get(id, id)
        ids = list(self.paths)
        shown = ", ".join(ids) if len(ids) < 5 else f"{', '.join(ids[:2])}, …, {ids[-1]}"
        number = ", or the number of a block" if self.numbered else ""
        raise FormatError(f"release {name!r}: has no {key!r}; give one of {shown}{number} ('sae list {name}')")

    def id_of(self, path: str) -> str | None:
        """The id of the dictionary at a path; None if this release has none there."""
        if self.paths:
            return next((id for id, place in self.paths.items() if place == path), None)
        return path.removeprefix(f"{self.folder}/") if not self.folder or path.startswith(f"{self.folder}/") else None

    def origin(self, id: str) -> dict[str, Any]:
        """What is known of the training of a dictionary, in the words of its metadata (see `sae.dictionary.origin`)."""
        known = {
            "hook": self.hooks.get(id),
            "model": {"name": self.model, "weight_processing": self.processing},
            "tokens": self.tokens and dict(self.tokens),
            "context_length": self.context_length,
            "data": {"source": self.data} if self.data else None,
        }
        return {key: value for key, value in known.items() if value is not None}


def _by_block(release: Release, kind: str, path: str, blocks: int) -> Release:
    """A release with a dictionary at one hook point of every block.

    Args:
        release: without paths.
        kind: of the hook points.
        path: of a dictionary, with `{}` for the number of its block.
        blocks: their number.
    """
    paths = {name_of(block, kind): path.format(block) for block in range(blocks)}
    return replace(release, paths=paths, numbered=name_of(0, kind).replace("0", "{}"), hooks={id: id for id in paths})


def _with(release: Release, id: str, path: str) -> Release:
    """A release with one more dictionary, at the hook point that its id is."""
    return replace(release, paths={**release.paths, id: path}, hooks={**release.hooks, id: id})


def _numbers(release: Release, l0: str, variance_explained: str = "") -> Release:
    """A release with published numbers, in the order of its dictionaries."""
    variances = variance_explained.split() or [None] * len(release.paths)
    rows = zip(release.paths, l0.split(), variances, strict=True)
    return replace(
        release, published={id: Published(float(a), None if b is None else float(b), REGISTRY) for id, a, b in rows}
    )  # fmt: skip


_JB = Release(
    "jbloom/GPT2-Small-SAEs-Reformatted", "gpt2", processing=_CENTRED, context_length=128, tokens=_WITH_BOS,
    data=_OPENWEBTEXT,
)  # fmt: skip
_JB_BY_BLOCK = _with(
    _by_block(_JB, "hook_resid_pre", "blocks.{}.hook_resid_pre", 12), name_of(11, "hook_resid_post"),
    name_of(11, "hook_resid_post"),
)  # fmt: skip
_SPLIT = {name_of(8, f"hook_resid_pre_{768 << power}"): 768 << power for power in range(8)}
_TM = _by_block(
    Release(
        "tommmcgrath/gpt2-small-mlp-out-saes", "gpt2", processing=_CENTRED, normalisation="constant",
        tokens=_WITH_BOS, data=_OPENWEBTEXT,
    ),
    "hook_mlp_out", "sae_group_gpt2_blocks.{}.hook_mlp_out_24576:v0", 12,
)  # fmt: skip
_TM_VERSIONS = {0: "v1", 8: "v1", 11: "v2"}
_TM_SCALES = (
    1.049317316132615, 2.3693984005104283, 1.6411934982190302, 1.8958522157897557, 1.81673478700627, 1.550234472245924,
    1.3237742807210804, 1.1042905114723296, 0.9123762783479742, 0.6955335635232373, 0.3619728926727644,
    0.2851548652550073,
)  # fmt: skip
_OPENAI = {"attn-out": "hook_attn_out", "mlp-out": "hook_mlp_out", "resid-mid": "hook_resid_mid",
           "resid-post": "hook_resid_post"}  # fmt: skip
_SCOPE_KINDS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoders": "transcoder"}
_SCOPE_2_LARGEST = ("res", "res-all", "transcoders-all")
"""What Gemma Scope 2 has of the pretrained 27B model."""


def _tm() -> Release:
    versions = {name_of(block, "hook_mlp_out"): version for block, version in _TM_VERSIONS.items()}
    paths = {id: path.replace(":v0", f":{versions.get(id, 'v0')}") for id, path in _TM.paths.items()}
    return replace(_TM, paths=paths, scales=dict(zip(paths, _TM_SCALES, strict=True)))


def _openai(place: str, width: str) -> Release:
    """OpenAI's TopK dictionaries of GPT-2 small, in SAELens's files."""
    suffix = ".pt" if (place, width) == ("resid-post", "32k") else ""
    release = Release(
        f"jbloom/GPT2-Small-OAI-v5-{width}-{place}-SAEs", "gpt2", normalisation="per token", context_length=64,
        tokens=_WITHOUT_BOS, data=_OPENWEBTEXT,
    )  # fmt: skip
    return _by_block(release, _OPENAI[place], f"v5_{width}_layer_{{}}{suffix}", 12)


def _gemma_scope(size: str, tuned: str, kind: str) -> Release:
    model = f"google/gemma-2-{size}{'-it' * (tuned == 'it')}"
    return Release(
        f"google/gemma-scope-{size}-{tuned}-{kind}", model, context_length=1024, tokens=_WITH_BOS, data=_PILE
    )  # fmt: skip


def _gemma_scope_2(size: str, tuned: str, folder: str) -> Release:
    model = f"google/gemma-3-{size}{'' if (size, tuned) == ('270m', 'pt') else f'-{tuned}'}"
    return Release(
        f"google/gemma-scope-2-{size}-{tuned}", model, folder=folder, context_length=1024, data=_PILE
    )  # fmt: skip


def _llama_scope(place: str, width: str) -> Release:
    release = Release(
        f"fnlp/Llama3_1-8B-Base-LX{place.upper()}-{width}", "meta-llama/Llama-3.1-8B", normalisation="constant",
        context_length=1024, data=_SLIMPAJAMA,
    )  # fmt: skip
    paths = {f"l{block}{place}_{width}": f"Llama3_1-8B-Base-L{block}{place.upper()}-{width}" for block in range(32)}
    return replace(release, paths=paths, numbered=f"l{{}}{place}_{width}")


def _qwen_scope(model: str, width: str, l0: int) -> Release:
    return Release(f"Qwen/SAE-Res-{model}-W{width}-L0_{l0}", f"Qwen/{model}")


_QWEN = {
    "Qwen3-1.7B-Base": ("32K",), "Qwen3-8B-Base": ("64K",), "Qwen3.5-2B-Base": ("32K",), "Qwen3.5-9B-Base": ("64K",),
    "Qwen3.5-27B": ("80K",),
}  # fmt: skip

RELEASES: dict[str, Release] = {
    "gpt2-small-res-jb": _numbers(
        _JB_BY_BLOCK,
        "10 10 18 23 31 41 51 54 60 70 52 56 70",
        "0.999 0.999 0.999 0.999 0.9 0.9 0.9 0.9 0.9 0.77 0.77 0.77 0.77",
    ),
    "gpt2-small-res-jb-feature-splitting": _numbers(
        replace(
            _JB,
            repository="jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
            paths={id: id for id in _SPLIT},
            hooks=dict.fromkeys(_SPLIT, name_of(8, "hook_resid_pre")),
        ),
        "36 39 41 43 43 40 40 43",
        "0.61 0.67 0.72 0.76 0.77 0.79 0.81 0.82",
    ),
    "gpt2-small-mlp-tm": _numbers(
        _tm(),
        "15 21 137 54 74 76 40 52 36 49 167 170",
        "0.999 0.57 0.55 0.57 0.44 0.52 0.508 0.53 0.46 0.49 0.22 0.59",
    ),
    **{f"gpt2-small-{place}-v5-{width}": _openai(place, width) for place in _OPENAI for width in ("32k", "128k")},
    **{
        f"gemma-scope-{size}-{tuned}-{kind}": _gemma_scope(size, tuned, kind)
        for size, tuned, kinds in (
            ("2b", "pt", ("res", "mlp", "att", "transcoders")),
            ("9b", "pt", ("res", "mlp", "att")),
            ("9b", "it", ("res",)),
            ("27b", "pt", ("res",)),
        )
        for kind in kinds
    },
    **{
        f"gemma-scope-2-{size}-{tuned}-{kind}{which}": _gemma_scope_2(
            size, tuned, _SCOPE_KINDS[kind] + which.replace("-", "_")
        )
        for size in ("270m", "1b", "4b", "12b", "27b")
        for tuned in ("pt", "it")
        for kind in _SCOPE_KINDS
        for which in ("", "-all")
        if (size, tuned) != ("27b", "pt") or f"{kind}{which}" in _SCOPE_2_LARGEST
    },
    **{
        f"llama_scope_lx{place}_{width}": _numbers(_llama_scope(place, width), " ".join(["50"] * 32))
        for place in "rma"
        for width in ("8x", "32x")
    },
    **{
        f"qwen-scope-{model.lower().removeprefix('qwen')}-w{width.lower()}-l{l0}": _qwen_scope(model, width, l0)
        for model, widths in _QWEN.items()
        for width in widths
        for l0 in (50, 100)
    },
}
"""The releases by name."""


def release_of(repository: str, path: str) -> tuple[str, str] | None:
    """Name of the release that a dictionary belongs to, and its id there; None if it belongs to none."""
    for name, release in RELEASES.items():
        if release.repository == repository and (id := release.id_of(path)) is not None:
            return name, id
    return None
