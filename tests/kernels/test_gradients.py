"""A dictionary in every number type and mode of PyTorch: codes and gradients against plain autograd's."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae import kernels
from sae.architectures import ARCHITECTURES, Gated, JumpReLU, TopK
from sae.architectures.elementwise import OneThreshold
from sae.dictionary.base import Dictionary
from sae.dictionary.codes import Codes
from sae.errors import ShapeError
from sae.kernels import back_end
from sae.kernels.interface import FactoredGradient
from sae.kernels.pattern import Pattern

D_IN, D_SAE, K = 12, 240, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
METHODS = ["encode", "encode_sparse", "decode", "decode_sparse", "forward"]
DENSITIES = ["sparse", "dense"]


def made(architecture: str, density: str = "sparse", dtype: torch.dtype = torch.float64) -> Dictionary:
    """A dictionary of which about 4 or about half of 240 features fire."""
    cls = ARCHITECTURES[architecture]
    settings = {"k": K if density == "sparse" else D_SAE // 2} if "k" in cls.setting_names else {}
    dictionary, generator = cls(D_IN, D_SAE, **settings).double(), torch.Generator().manual_seed(3)
    bound = 6.0 if density == "sparse" else 0.1
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if name.startswith("W") else 0.2))
        if isinstance(dictionary, (OneThreshold, JumpReLU)):
            dictionary.get_parameter("threshold").fill_(bound)
        elif not isinstance(dictionary, TopK):
            dictionary.b_enc.sub_(bound)
    return dictionary.to(dtype)


def batch(dtype: torch.dtype = torch.float64, rows: int = 7) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def plain_features(dictionary: Dictionary, x: Tensor, fires: Tensor) -> Tensor:
    """What the papers' equations give, in plain PyTorch, of the features that fire."""
    centred = (x - dictionary.b_dec) @ dictionary.W_enc
    if isinstance(dictionary, Gated):
        return (centred * dictionary.r_mag.exp() + dictionary.b_mag).relu() * fires
    return (centred + dictionary.b_enc).relu() * fires


def plain(dictionary: Dictionary, x: Tensor, method: str, fires: Tensor) -> Tensor:
    """Σ of everything that comes out, weighted by place, so that each gradient is one of its own."""
    features = plain_features(dictionary, x, fires)
    if method.startswith("encode"):
        return (features * weights(features)).sum()
    reconstruction = features @ dictionary.W_dec + dictionary.b_dec
    return (reconstruction * weights(reconstruction)).sum()


def weights(like: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, like[0].numel(), dtype=torch.float64).to(like.dtype).view(like[0].shape)


def computed(dictionary: Dictionary, x: Tensor, method: str) -> Tensor:
    """The same sum by the dictionary's own method."""
    if method == "encode_sparse":
        codes = dictionary.encode_sparse(x)
        return (codes.values * weights(x.new_zeros(1, D_SAE))[codes.indices]).sum()
    if method == "decode":
        out = dictionary.decode(dictionary.encode(x))
    elif method == "decode_sparse":
        out = dictionary.decode_sparse(dictionary.encode_sparse(x))
    else:
        out = getattr(dictionary, method)(x)
    return (out * weights(out)).sum()


def differentiated(dictionary: Dictionary, x: Tensor) -> list[Tensor]:
    return [x, *(parameter for parameter in dictionary.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_plain_autograd_in_every_number_type(
    architecture: str, dtype: torch.dtype, density: str
) -> None:
    """Against float64, of the same weights: with as much rounding as the number type has."""
    dictionary = made(architecture, density, dtype)
    exact, x = copy.deepcopy(dictionary).double(), batch(dtype)
    for method in METHODS:
        fires = (dictionary.encode(x) > 0).double()
        ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        expected = torch.autograd.grad(
            plain(exact, theirs, method, fires), differentiated(exact, theirs), allow_unused=True
        )
        found = torch.autograd.grad(
            computed(dictionary, ours, method), differentiated(dictionary, ours), allow_unused=True
        )
        for one, other in zip(found, expected, strict=True):
            if other is None or not other.any():
                assert one is None or not one.any()
                continue
            assert one is not None
            assert one.dtype == dtype
            error = (one.double() - other).norm() / other.norm()
            assert error < TOLERANCE[dtype], f"{method}: {tuple(other.shape)} is off by {float(error):.2g}"


def test_a_bias_gradient_over_many_rows_is_not_rounded_away() -> None:
    """1,000 ones summed in bfloat16 one by one end at 256."""
    for dtype in (torch.bfloat16, torch.float16):
        cpu, ones = back_end("cpu"), torch.ones(1000, dtype=dtype)
        pattern = Pattern.from_indices(torch.zeros(1000, 1, dtype=torch.int64), 20)
        assert float(cpu.column_sums(pattern, ones)[0]) == 1000
        rows = torch.ones(1000, 3, dtype=dtype)
        assert cpu.feature_sums(FactoredGradient(pattern, ones, rows))[0].tolist() == [1000] * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_derivatives_are_those_of_plain_autograd(architecture: str) -> None:
    """Such as that of a penalty on a gradient."""
    dictionary = made(architecture)
    fires = (dictionary.encode(batch()) > 0).double()

    def penalty(reconstruct: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = batch().requires_grad_()
        (first,) = torch.autograd.grad(reconstruct(x).pow(3).sum(), x, create_graph=True)
        inputs = differentiated(dictionary, x)
        second = torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)
        return [torch.zeros_like(part) if of is None else of for part, of in zip(inputs, second, strict=True)]

    ours = penalty(dictionary)
    theirs = penalty(lambda x: plain_features(dictionary, x, fires) @ dictionary.W_dec + dictionary.b_dec)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "nested vmap": lambda f, x: torch.func.vmap(torch.func.vmap(f))(x[:6].unflatten(0, (2, 3))),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x[0]),
    "per-sample gradients": lambda f, x: torch.func.vmap(torch.func.grad(lambda row: f(row).square().sum()))(x),
    "vectorised jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x[0], vectorize=True),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_transforms_of_torch_func_give_what_they_give_of_the_equations(architecture: str, transform: str) -> None:
    dictionary, x = made(architecture).requires_grad_(False), batch()
    bound = 6.0 if isinstance(dictionary, (OneThreshold, JumpReLU)) else 0.0

    def features(x: Tensor) -> Tensor:
        if isinstance(dictionary, TopK):
            pre = dictionary.pre_activations(x)
            return pre.relu() * (pre >= pre.topk(K, dim=-1).values[..., -1:])
        return plain_features(dictionary, x, (dictionary.pre_activations(x) > bound).double())

    def reconstruction(x: Tensor) -> Tensor:
        return features(x) @ dictionary.W_dec + dictionary.b_dec

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # torch's own jvp
        for ours, theirs in ((dictionary.encode, features), (dictionary, reconstruction)):
            torch.testing.assert_close(TRANSFORMS[transform](ours, x), TRANSFORMS[transform](theirs, x))


def test_parameters_can_be_given_from_outside_and_mapped_over() -> None:
    """Ensembles, and influence functions: `functional_call` inside `vmap` and `grad`."""
    for architecture in ARCHITECTURES:
        first, second, x = made(architecture), made(architecture, "dense"), batch()
        second.load_state_dict({name: value * 0.9 for name, value in first.state_dict().items()})
        stacked, _ = torch.func.stack_module_state([first, second])  # type: ignore[list-item]
        both = torch.func.vmap(partial(torch.func.functional_call, first), in_dims=(0, None))(stacked, x)
        if architecture != "topk":  # whose k is no parameter
            torch.testing.assert_close(both[1], second(x))
        torch.testing.assert_close(both[0], first(x))


def test_sparse_codes_inside_vmap_work_where_k_is_fixed_and_say_why_not_elsewhere() -> None:
    x = batch()
    for architecture in ARCHITECTURES:
        dictionary = made(architecture)

        def values(row: Tensor, dictionary: Dictionary = dictionary) -> Tensor:
            return dictionary.encode_sparse(row).values

        if architecture == "topk":
            torch.testing.assert_close(torch.func.vmap(values)(x), dictionary.encode_sparse(x).values)
            continue
        with pytest.raises(ShapeError, match=r"inside vmap or on a meta tensor.*use encode, or call encode_sparse out"):
            torch.func.vmap(values)(x)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_under_autocast_codes_and_gradients_are_the_same_bits(
    architecture: str, density: str, kind: torch.dtype
) -> None:
    dictionary = made(architecture, density, torch.float32)
    outside, inside = batch(torch.float32).requires_grad_(), batch(torch.float32).requires_grad_()
    for method in METHODS:
        expected = torch.autograd.grad(computed(dictionary, outside, method), differentiated(dictionary, outside)[:3])
        with torch.autocast("cpu", dtype=kind):
            total = computed(dictionary, inside, method)
        found = torch.autograd.grad(total, differentiated(dictionary, inside)[:3])
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), method
        with torch.autocast("cpu", dtype=kind):
            assert torch.equal(dictionary.encode(outside), made(architecture, density, torch.float32).encode(outside))


def test_features_and_codes_of_another_number_type_are_converted_like_activations() -> None:
    dictionary = made("topk", dtype=torch.bfloat16)
    codes, features = dictionary.encode_sparse(batch()), dictionary.encode(batch())
    assert torch.equal(dictionary.decode(features.float()), dictionary.decode(features))
    wide = Codes(codes.values.double(), codes.indices)
    assert torch.equal(dictionary.decode_sparse(wide), dictionary.decode_sparse(codes))


def test_triton_s_kernels_take_the_number_types_that_they_sum_exactly() -> None:
    """They sum in float32; its compiler refuses products of float64."""
    fastest = kernels.fastest
    assert fastest("cuda", torch.float64) == "cpu"
    assert fastest("cpu", torch.float16) == "cpu"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fastest("cuda", dtype) == "triton"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dictionary_is_copied_pickled_converted_and_made_without_data(architecture: str) -> None:
    dictionary, x = made(architecture, dtype=torch.float32), batch(torch.float32)
    dictionary.metadata["hook"] = "blocks.1.hook_resid_pre"
    dictionary.cfg.model_name = "another"
    expected = dictionary(x)
    for twin in (copy.deepcopy(dictionary), pickle.loads(pickle.dumps(dictionary))):
        assert torch.equal(twin(x), expected)
        assert twin.metadata == dictionary.metadata
        assert twin.cfg.model_name == "another"
        with torch.no_grad():
            twin.b_dec += 1
        assert torch.equal(dictionary(x), expected), "the copy shares the weights"
    again = made(architecture, "dense", torch.float32)
    if architecture != "topk":
        again.load_state_dict(dictionary.state_dict())
        assert torch.equal(again(x), expected)
    assert copy.deepcopy(dictionary).half()(x).dtype is torch.float16
    empty = copy.deepcopy(dictionary).to("meta")
    assert empty(x.to("meta")).shape == x.shape
    assert empty.encode(x.to("meta")).shape == (7, D_SAE)
    assert isinstance(dictionary, nn.Module)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dictionary_compiles_and_exports_whole(architecture: str) -> None:
    """In a process whose functions are not wrapped in checks of shapes, which cannot be traced."""
    code = f"""
import torch
from tests.kernels.test_gradients import batch, made
dictionary, x = made({architecture!r}, dtype=torch.float32), batch(torch.float32)
for method in (dictionary.encode, dictionary):
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(compiled(ours), method(theirs))
    compiled(ours).square().sum().backward()
    method(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)  # sums in another order
exported = torch.export.export(dictionary, (x,)).module()
torch.testing.assert_close(exported(x), dictionary(x))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=Path(__file__).parents[2])
