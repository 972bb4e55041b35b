"""Both CPU implementations, the native one in every instruction set, against the specification."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_cases import (
    Case,
    assert_close_to_specification,
    cases,
    one_hot_inputs,
    routing_is_decided,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pisa_compile.kernels import cpu, reference
from pisa_compile.kernels.cpu import build, native, torch_path
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, poisoned_memory, random_inputs, relative_l2

Implementation = Callable[..., tuple[Tensor, Tensor]]
PARAMS = AttentionParams(scale=0.125, sparsity=0.75)
EXAMPLES = {"torch": 60, "avx512": 80, "avx2": 50, "baseline": 40}


def implementations() -> dict[str, Implementation]:
    """By name. Only the torch path without a compiler; with one, the library must load."""
    found: dict[str, Implementation] = {"torch": torch_path.attention}
    try:
        build.find_compiler()
    except build.BuildError:
        return found
    for name in native.variants():
        found[name] = partial(native.attention, variant=name)
    return found


IMPLEMENTATIONS = implementations()
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)
every_variant = pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "torch"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For the specification; implementations are told how many threads to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native_names() -> list[str]:
    names = [name for name in IMPLEMENTATIONS if name != "torch"]
    if not names:
        pytest.skip("no C++ compiler, so no native library")
    return names


@every_implementation
def test_random_cases(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    orders = ("none", "zeroth", "hybrid", "corrected")

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(case=cases(orders), threads=st.integers(1, 3))
    def check(case: Case, threads: int) -> None:
        assume(routing_is_decided(case))
        with poisoned_memory():
            out, lse = implementation(
                *case.inputs.astuple(), case.params, **case.keywords, threads=threads
            )
        assert_close_to_specification(out, lse, case)

    check()


@every_implementation
@pytest.mark.parametrize("routing", ["topk", "topk_covariance", "threshold"])
def test_long_sequence(name: str, routing: str) -> None:
    """Long enough for several chunks of statistics and of centroids."""
    inputs = random_inputs(query_len=130, key_len=4500, head_dim=32, heads=4, kv_heads=2, seed=2)
    params = replace(PARAMS, routing=routing, sparsity=0.9)
    assert routing_is_decided(Case(inputs, params))
    with poisoned_memory():
        out, lse = IMPLEMENTATIONS[name](*inputs.astuple(), params, threads=2)
    assert_close_to_specification(out, lse, Case(inputs, params))


@every_implementation
@pytest.mark.parametrize("routing", ["topk", "threshold"])
def test_long_sequence_in_another_order(name: str, routing: str) -> None:
    """Several chunks, through a permutation, with a density for each head and masked keys."""
    inputs = random_inputs(query_len=1100, head_dim=24, heads=4, kv_heads=2, masked=0.2, seed=4)
    permutation = torch.arange(1100).flip(0)
    params = replace(PARAMS, routing=routing, order="corrected", block_size=16, exact=(70, 20))
    case = Case(inputs, params, torch.tensor([0.05, 0.5, 1.0, 0.1]), permutation)
    assert routing_is_decided(case)
    with poisoned_memory():
        out, lse = IMPLEMENTATIONS[name](*inputs.astuple(), params, **case.keywords, threads=2)
    assert_close_to_specification(out, lse, case)


@every_implementation
@pytest.mark.parametrize("routing", ["topk", "topk_covariance", "threshold"])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.625])
def test_density_is_the_complement_of_sparsity(name: str, routing: str, density: float) -> None:
    """10 blocks: 0.1 of them is one and 0.3 are three, though the float32 0.3 is a little more."""
    inputs = random_inputs(query_len=640, head_dim=32, heads=2)
    params = replace(PARAMS, routing=routing, sparsity=1 - density)
    assert routing != "threshold" or routing_is_decided(Case(inputs, params))
    other = replace(params, sparsity=0.77)  # what is asked for in the settings no longer counts
    expected = IMPLEMENTATIONS[name](*inputs.astuple(), params, threads=1)
    for tensor in (
        torch.tensor(density),
        torch.full((2,), density),
        torch.full((4,), density)[::2],
    ):
        results = IMPLEMENTATIONS[name](*inputs.astuple(), other, density=tensor, threads=1)
        for result, one in zip(results, expected, strict=True):
            assert torch.equal(result, one)


@every_implementation
@pytest.mark.parametrize("routing", ["topk", "threshold"])
def test_heads_have_densities_of_their_own(name: str, routing: str) -> None:
    inputs = random_inputs(query_len=400, head_dim=32, heads=4, kv_heads=2)
    query, key, value, _ = inputs.astuple()
    params = replace(PARAMS, routing=routing)
    density = torch.tensor([1.0, 0.2, 1.5, 0.6])
    run = partial(IMPLEMENTATIONS[name], key_mask=None, threads=1)
    out, lse = run(query, key, value, params=params, density=density)
    for h, share in enumerate(density.tolist()):
        part = query[:, h : h + 1], key[:, h // 2 : h // 2 + 1], value[:, h // 2 : h // 2 + 1]
        one, one_lse = run(*part, params=replace(params, sparsity=max(0.0, 1 - share)))
        assert torch.equal(out[:, h : h + 1], one)
        assert torch.equal(lse[:, h : h + 1], one_lse)


@every_implementation
def test_a_density_that_is_no_number(name: str) -> None:
    inputs = random_inputs(query_len=200)
    with pytest.raises(ValueError, match=r"density must be a fraction.*nan"):
        IMPLEMENTATIONS[name](*inputs.astuple(), PARAMS, density=torch.tensor([0.5, torch.nan]))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permutation_is_attention_of_the_permuted_tokens(name: str, dtype: torch.dtype) -> None:
    """Bit for bit: the same numbers in the same order of summation."""
    inputs = random_inputs(
        batch=2, heads=4, kv_heads=2, query_len=333, head_dim=40, masked=0.3, dtype=dtype
    )
    permutation = torch.randperm(333, generator=torch.Generator().manual_seed(0))
    params = replace(PARAMS, exact=(20, 30))
    case = Case(inputs, params, permutation=permutation)
    run = partial(IMPLEMENTATIONS[name], params=params, threads=2)
    moved, moved_lse = run(*case.in_order().astuple())
    strided = torch.stack([permutation, permutation], dim=1)[:, 0]
    for order in (permutation, permutation.int(), strided):
        with poisoned_memory():
            out, lse = run(*inputs.astuple(), permutation=order)
        assert torch.equal(out[:, :, permutation], moved)
        assert torch.equal(lse[:, :, permutation], moved_lse)
        assert out.stride() == moved.stride()


@every_implementation
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 1, 2, 4], "got values from 0 to 4"),
        ([0, 1, 2, 2**32 + 3], "got values from 0 to 4294967299"),
        ([-1, 0, 1, 2], "got values from -1 to 2"),
        ([0, 1, 1, 3], "got 1 of them not at all"),
    ],
    ids=["too-large", "beyond-32-bits", "negative", "twice"],
)
def test_bad_permutations_are_refused(name: str, values: list[int], words: str) -> None:
    """Before anything is read: the native library would read outside of the tensors."""
    x = torch.ones(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"every token from 0 to 3 once, {words}"):
        IMPLEMENTATIONS[name](x, x, x, None, PARAMS, permutation=torch.tensor(values))


@every_implementation
@pytest.mark.parametrize("kind", ["outliers", "hot-channel", "identical-keys", "huge"])
def test_correction_stays_within_its_limit(name: str, kind: str) -> None:
    """The mass of a block grows at most eightfold and never shrinks, whatever the keys."""
    inputs = random_inputs(query_len=500, heads=4, kv_heads=2, seed=11)
    query, key, value, _ = inputs.astuple()
    if kind == "outliers":
        generator = torch.Generator().manual_seed(0)
        for x in (query, key, value):
            x[torch.rand(x.shape, generator=generator) < 0.002] = 1e3
    elif kind == "hot-channel":
        query[..., 3] *= 1e3
        key[..., 3] *= 1e3
    elif kind == "identical-keys":
        key[:] = key[:, :, :1].clone()
    else:
        key[:, :, 70] = 1e25  # its variance is beyond float32
    run = partial(IMPLEMENTATIONS[name], query, key, value, None, threads=2)
    assert all(torch.isfinite(x).all() for x in run(replace(PARAMS, order="corrected")))
    params = replace(PARAMS, routing="threshold")  # chooses the same blocks for both orders
    plain, plain_lse = run(params)
    out, lse = run(replace(params, order="corrected"))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    slack = 1e-5 * (1 + plain_lse.abs())
    assert (lse >= plain_lse - slack).all()
    assert (lse <= plain_lse + math.log(8) + slack).all()
    if kind == "identical-keys":
        torch.testing.assert_close(out, plain)
        torch.testing.assert_close(lse, plain_lse)


@every_implementation
def test_the_variance_survives_an_offset_of_all_keys(name: str) -> None:
    """Keys near 3000 scatter by 1; the queries sum to zero, so the offset is not in the logits."""
    inputs = random_inputs(query_len=512, head_dim=32, seed=6)
    query = inputs.query - inputs.query.mean(-1, keepdim=True)
    shifted = Inputs(query, inputs.key + 3000.0, inputs.value, None)
    params = replace(PARAMS, scale=0.3, order="corrected", routing="topk", exact=(256, 0))
    _, lse = IMPLEMENTATIONS[name](*shifted.astuple(), params, threads=2)
    _, expected = Case(shifted, params).specified()
    _, plain = Case(shifted, replace(params, order="hybrid")).specified()
    assert (expected - plain)[:, :, 256:].abs().mean() > 0.1
    assert (lse - expected)[:, :, 256:].abs().mean() < 2e-3


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_sparsity_is_dense_attention(name: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(query_len=200, key_len=333, masked=0.2, dtype=dtype)
    query, key, value, mask = inputs.astuple()
    assert mask is not None
    params = replace(PARAMS, sparsity=0.0)
    out, _ = IMPLEMENTATIONS[name](query, key, value, mask, params, threads=2)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask[:, None, None], scale=params.scale
    )
    rounding = relative_l2(dense.to(dtype), dense)
    assert relative_l2(out, dense) <= 1.05 * rounding + 1e-6


@every_implementation
def test_strides(name: str) -> None:
    """Broadcast heads, a last dimension that is not contiguous, and a view with an offset."""
    inputs = random_inputs(query_len=150, heads=4, batch=2, seed=7)
    query = inputs.query[:, :1].expand(2, 4, 150, 64)
    key = inputs.key.transpose(-1, -2).contiguous().transpose(-1, -2)
    padded = torch.full((2, 4, 155, 70), torch.nan)
    padded[:, :, 3:153, 5:69] = inputs.value
    value = padded[:, :, 3:153, 5:69]
    assert key.stride(-1) != 1
    out, lse = IMPLEMENTATIONS[name](query, key, value, None, PARAMS, threads=2)
    plain = Inputs(query.contiguous(), key.contiguous(), value.contiguous(), None)
    assert routing_is_decided(Case(plain, PARAMS))
    assert_close_to_specification(out, lse, Case(plain, PARAMS))


@every_implementation
@pytest.mark.parametrize("order", ["none", "zeroth", "hybrid", "corrected"])
def test_number_of_threads_changes_nothing(name: str, order: str) -> None:
    inputs = random_inputs(query_len=1100, heads=4, head_dim=40, dtype=torch.bfloat16)
    params = replace(PARAMS, order=order)
    one, lse_one = IMPLEMENTATIONS[name](*inputs.astuple(), params, threads=1)
    for threads in (2, 3):
        out, lse = IMPLEMENTATIONS[name](*inputs.astuple(), params, threads=threads)
        assert torch.equal(out, one)
        assert torch.equal(lse, lse_one)


@every_implementation
@pytest.mark.parametrize("order", ["none", "zeroth", "hybrid", "corrected"])
def test_masked_keys_do_not_leak(name: str, order: str) -> None:
    inputs = random_inputs(query_len=300, batch=3, masked=0.4)
    assert inputs.key_mask is not None
    inputs.key_mask[1] = False  # no key at all
    inputs.key_mask[2, 64:128] = False  # an empty block
    params = replace(PARAMS, order=order)
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        hidden = ~inputs.key_mask[:, None, :, None]
        key, value = (x.masked_fill(hidden, poison) for x in (inputs.key, inputs.value))
        results.append(
            IMPLEMENTATIONS[name](inputs.query, key, value, inputs.key_mask, params, threads=2)
        )
    for out, lse in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        assert (out[1] == 0).all()
        assert (lse[1] == -torch.inf).all()
        assert torch.isfinite(lse[[0, 2]]).all()
    assert_close_to_specification(*results[0], Case(inputs, params))


@every_implementation
@pytest.mark.parametrize("order", ["none", "zeroth", "hybrid", "corrected"])
def test_maximum_in_an_unselected_block(name: str, order: str) -> None:
    """Some rows point away from the mean of their block, so their maximum is in the tail."""
    inputs = random_inputs(query_len=512, head_dim=32, seed=4)
    inputs.query[:, :, 5::64] *= -20.0
    params = AttentionParams(scale=32**-0.5, sparsity=0.8, order=order)
    assert routing_is_decided(Case(inputs, params))
    out, lse = IMPLEMENTATIONS[name](*inputs.astuple(), params, threads=2)
    assert_close_to_specification(out, lse, Case(inputs, params))
    expected, _ = reference.attention(*inputs.to(torch.float64).astuple(), params)
    assert relative_l2(out[:, :, 5::64], expected[:, :, 5::64]) < 1e-5


@every_implementation
@pytest.mark.parametrize("order", ["zeroth", "hybrid", "corrected"])
def test_entries_of_ten_thousand(name: str, order: str) -> None:
    """Logits of 1e8, far outside the range of the exponential on either side of zero."""
    inputs, expected = one_hot_inputs(torch.float32)
    params = AttentionParams(scale=1.0, sparsity=0.5, block_size=16, order=order)
    out, lse = IMPLEMENTATIONS[name](*inputs.astuple(), params, threads=2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, torch.full_like(lse, 1e8))
    negative, _ = IMPLEMENTATIONS[name](
        -inputs.query, inputs.key, inputs.value, None, params, threads=2
    )
    assert torch.isfinite(negative).all()


@every_implementation
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (1, 1)], ids=["no-queries", "no-keys", "one-token"]
)
def test_smallest_shapes(name: str, shape: tuple[int, int]) -> None:
    query_len, key_len = shape
    query = torch.randn(1, 2, query_len, 16)
    key, value = torch.randn(1, 2, key_len, 16), torch.randn(1, 2, key_len, 24)
    out, lse = IMPLEMENTATIONS[name](query, key, value, None, PARAMS)
    expected = value.clone() if key_len == 1 else torch.zeros(1, 2, query_len, 24)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (1, 2, query_len)
    assert (lse == -torch.inf).all() or key_len == 1


@every_implementation
def test_inference_mode(name: str) -> None:
    inputs = random_inputs(query_len=200)
    expected, _ = IMPLEMENTATIONS[name](*inputs.astuple(), PARAMS, threads=2)
    with torch.inference_mode():
        out, _ = IMPLEMENTATIONS[name](*inputs.astuple(), PARAMS, threads=2)
        assert torch.equal(out, expected)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_numbers_are_read_and_rounded_as_torch_does(
    name: str, dtype: torch.dtype
) -> None:
    """Attention over one key copies its value; over two equal keys it rounds their average."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 256, 1, 256)
    value = patterns.nan_to_num(0.0, 0.0, 0.0)
    query = torch.ones(1, 256, 1, 8, dtype=dtype)
    run = partial(IMPLEMENTATIONS[name], params=PARAMS, key_mask=None, threads=2)
    copied, _ = run(query, query, value)
    assert torch.equal(copied, value)
    generator = torch.Generator().manual_seed(0)
    other = value.flatten()[torch.randperm(2**16, generator=generator)].view_as(value)
    both = torch.cat([value, other], dim=2)
    averaged, _ = run(query, query.expand(1, 256, 2, 8), both)
    exact = (value.float() + other.float()) * 0.5
    assert torch.equal(averaged, exact.to(dtype))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_values_stay_infinite(name: str, dtype: torch.dtype) -> None:
    value = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype).view(1, 1, 1, 4)
    query = torch.ones(1, 1, 1, 8, dtype=dtype)
    out, _ = IMPLEMENTATIONS[name](query, query, value, None, PARAMS)
    torch.testing.assert_close(out, value, rtol=0.0, atol=0.0, equal_nan=True)


@every_variant
def test_own_threads(name: str) -> None:
    """Without OpenMP's team the library runs on threads of its own, with the same result."""
    inputs = random_inputs(query_len=1000, heads=3)
    expected, _ = IMPLEMENTATIONS[name](*inputs.astuple(), PARAMS, threads=2)
    for _ in range(20):
        out, _ = IMPLEMENTATIONS[name](*inputs.astuple(), PARAMS, threads=3, team="own")
        assert torch.equal(out, expected)


FORK = """
import os, torch
from pisa_compile.kernels.cpu import native
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import random_inputs
torch.set_num_threads(1)  # torch's own operators would hang in the child
inputs, params = random_inputs(query_len=600), AttentionParams(scale=0.1)
for team in ("openmp", "own"):
    expected, _ = native.attention(*inputs.astuple(), params, threads=2, team=team)
    child = os.fork()
    if child == 0:
        out, _ = native.attention(*inputs.astuple(), params, threads=2, team=team)
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_threads_in_a_forked_process(native_names: list[str]) -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


@pytest.mark.parametrize("team", ["openmp", "own"])
def test_calls_at_the_same_time(native_names: list[str], team: str) -> None:
    inputs = [random_inputs(query_len=400 + i, seed=i) for i in range(12)]
    run = partial(native.attention, params=PARAMS, threads=2, team=team)
    expected = [run(*x.astuple()) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for (out, lse), one in zip(
                pool.map(lambda x: run(*x.astuple()), inputs), expected, strict=True
            ):
                assert torch.equal(out, one[0])
                assert torch.equal(lse, one[1])


def test_offsets_beyond_32_bits(native_names: list[str], tmp_path: Path) -> None:
    """Heads that lie 2**32 elements apart, in a file that is nearly all hole."""
    path, apart, tokens = tmp_path / "sparse", 2**32 + 64, 100
    with path.open("wb") as file:
        try:
            file.truncate(2 * (apart + tokens * 8))
        except OSError as error:
            pytest.skip(f"no sparse file of 8 GiB: {error}")
    memory = torch.from_file(str(path), shared=True, size=apart + tokens * 8, dtype=torch.bfloat16)
    far = memory.as_strided((1, 2, tokens, 8), (0, apart, 8, 1))
    inputs = random_inputs(query_len=tokens, head_dim=8, dtype=torch.bfloat16)
    expected, _ = native.attention(*inputs.astuple(), PARAMS)
    for i in range(3):
        near = list(inputs.astuple()[:3])
        far.copy_(near[i])
        near[i] = far
        out, _ = native.attention(*near, None, PARAMS)
        assert torch.equal(out, expected)


def test_the_torch_path_restores_the_number_of_threads() -> None:
    torch.set_num_threads(2)
    try:
        inputs = random_inputs(query_len=300, heads=4)
        torch_path.attention(*inputs.astuple(), PARAMS)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError):
            torch_path.attention(inputs.query, inputs.key[..., :5], inputs.value, None, PARAMS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_workspace_is_smaller_than_the_inputs(
    monkeypatch: pytest.MonkeyPatch, native_names: list[str]
) -> None:
    sizes: list[int] = []
    empty = torch.empty

    def recorded(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        sizes.append(tensor.nbytes)
        return tensor

    for dtype in (torch.float32, torch.bfloat16):
        for tokens, heads in ((2048, 8), (8192, 1), (4096, 2)):
            inputs = random_inputs(query_len=tokens, heads=heads, head_dim=128, dtype=dtype)
            sizes.clear()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", recorded)
                params = replace(PARAMS, sparsity=0.9, order="corrected")
                native.attention(*inputs.astuple(), params, threads=2)
            assert sizes  # the log-sum-exp and the workspace
            assert sum(sizes) < 3 * inputs.query.nbytes


def test_choice_of_the_implementation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used: list[str] = []
    given: dict[str, object] = {"density": None, "permutation": None}
    for name, module in (("native", native), ("torch", torch_path)):

        def recorded(*args: object, name: str = name, **keywords: object) -> tuple[str, str]:
            assert keywords == given
            used.append(name)
            return name, name

        monkeypatch.setattr(module, "attention", recorded)
    inputs = random_inputs(query_len=70)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(native, "unavailable", lambda: None)
        cpu.attention(*inputs.astuple(), PARAMS)
        given |= {"density": torch.tensor(0.5), "permutation": torch.arange(70)}
        cpu.attention(*inputs.astuple(), replace(PARAMS, order="corrected"), **given)
        given |= {"density": None, "permutation": None}
        assert used == ["native"] * 2
        assert not caplog.records
        cpu.attention(*inputs.to(torch.float64).astuple(), PARAMS)
        assert used[2:] == ["torch"]
        caplog.clear()
        monkeypatch.setattr(native, "unavailable", lambda: "a reason of this test")
        for _ in range(3):
            cpu.attention(*inputs.astuple(), PARAMS)
        assert used[3:] == ["torch"] * 3
    assert [record.getMessage() for record in caplog.records if "this test" in record.message] == [
        "attention runs on torch operators, slower than the native library: a reason of this test"
    ]
