"""Attention against its definition: torch's, written out, and by the machine's own kernels."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.attention import FLOPS, TiledAttention, attention, fits, has_tiles
from models.blocks import Attention


def needs_tiles(dtype: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has_tiles(dtype), reason=f"no kernels of attention in {dtype} here")


each_type = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=needs_tiles(dtype)) for dtype in (torch.float32, torch.bfloat16)]
)
#: Relative errors of what tiles compute.
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def softmax_average(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention written out for one query at a time, in float64."""
    batch, heads, length, width = query.shape
    out = torch.zeros(batch, heads, length, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keep = torch.ones(key.shape[2], dtype=torch.bool)
                if mask is not None:
                    keep = mask.expand(batch, heads, length, -1)[b, h, i]
                scores = key[b, h][keep].double() @ query[b, h, i].double() / math.sqrt(width)
                out[b, h, i] = torch.softmax(scores, 0) @ value[b, h][keep].double()
    return out


@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_is_its_definition(rng: torch.Generator, kind: str, grad: bool) -> None:
    query = torch.randn(2, 3, 6, 8, generator=rng)
    keys = 6 if kind == "causal" else 4
    key, value = (torch.randn(2, 3, keys, 8, generator=rng) for _ in range(2))
    mask = None
    if kind == "padding":
        mask = (torch.arange(4) < torch.tensor([[1], [3]]))[:, None, None, :]
    elif kind == "causal":
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
    with torch.set_grad_enabled(grad):
        result = attention(query, key, value, mask)
    torch.testing.assert_close(
        result.double(), softmax_average(query, key, value, mask), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bfloat16_stays_near_float32(rng: torch.Generator, masked: bool) -> None:
    query, key, value = (torch.randn(2, 2, 16, 32, generator=rng) for _ in range(3))
    mask = (torch.arange(16) < torch.tensor([[5], [16]]))[:, None, None, :] if masked else None
    exact = attention(query, key, value, mask)
    for grad in (True, False):  # two ways of computing it on a CPU
        with torch.set_grad_enabled(grad):
            rough = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
        assert rough.dtype == torch.bfloat16
        torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gradients_under_a_mask_are_finite(rng: torch.Generator, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 2, 4, 8, generator=rng).to(dtype).requires_grad_() for _ in range(3))
    mask = (torch.arange(4) < torch.tensor([[1], [2]]))[:, None, None, :]
    attention(query, key, value, mask).square().sum().backward()
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()
    assert value.grad[0, :, 1:].abs().sum() == 0
    assert value.grad[0, :, 0].abs().sum() > 0
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("masked", [True, False])
def test_written_out_attention_has_the_gradients_of_its_definition(
    rng: torch.Generator, masked: bool
) -> None:
    inputs = [
        torch.randn(2, 2, length, 4, generator=rng, dtype=torch.float64, requires_grad=True)
        for length in (5, 3, 3)
    ]
    mask = (torch.arange(3) < torch.tensor([[1], [3]]))[:, None, None, :] if masked else None
    assert torch.autograd.gradcheck(lambda *given: attention(*given, mask), inputs)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(attention(*inputs, mask).sum(), inputs, create_graph=True)


def test_written_out_attention_keeps_its_inputs_alone(rng: torch.Generator) -> None:
    query, key, value = (
        torch.randn(1, 2, 64, 8, generator=rng).bfloat16().requires_grad_() for _ in range(3)
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        attention(query, key, value, None)
    assert sorted(kept) == sorted(each.data_ptr() for each in (query, key, value))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use of it
def test_forward_derivatives_of_attention_are_there(rng: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 1, 3, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    _, slope = torch.func.jvp(lambda q: attention(q, key, value, None), (query,), (torch.ones_like(query),))
    step = 1e-6
    moved = attention(query + step, key, value, None) - attention(query - step, key, value, None)
    torch.testing.assert_close(slope, moved / (2 * step), rtol=1e-5, atol=1e-7)


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def given(rng: torch.Generator, queries: int, keys: int, width: int, dtype: torch.dtype) -> Four:
    """Query, key, value and a gradient of two samples, as linear layers make them: two heads side by side."""
    lengths = (queries, keys, keys, queries)
    made = [torch.randn(2, each, 2, width, generator=rng).to(dtype).transpose(1, 2) for each in lengths]
    return made[0], made[1], made[2], made[3]


def outcome(four: Four, mask: Tensor | None, dtype: torch.dtype, native: bool) -> list[Tensor]:
    """Output and gradients of attention in a type."""
    query, key, value = (each.to(dtype).detach().requires_grad_() for each in four[:3])
    out = attention(query, key, value, mask, native)
    out.backward(four[3].to(dtype))
    found = [out, query.grad, key.grad, value.grad]
    return [each.detach().double() for each in found if each is not None]


def error(mine: Tensor, true: Tensor) -> float:
    return ((mine - true).norm() / true.norm()).item()


@each_type
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "each"])
@pytest.mark.parametrize(("queries", "keys", "width"), [(64, 64, 32), (70, 70, 16), (33, 33, 5), (1, 1, 64)])
def test_tiles_are_nearer_to_the_truth_than_matrices(
    rng: torch.Generator, dtype: torch.dtype, queries: int, keys: int, width: int, kind: str
) -> None:
    four = given(rng, queries, keys, width, dtype)
    mask = {
        "none": None,
        "padding": (torch.arange(keys) < torch.tensor([[1], [keys]]))[:, None, None, :],
        "causal": torch.ones(queries, keys, dtype=torch.bool).tril(),
        "each": torch.rand(2, 2, queries, keys, generator=rng) < 0.6,
    }[kind]
    if mask is not None:
        mask = mask.clone()
        mask[..., 0] = True
    true = outcome(four, mask, torch.float64, False)
    own, written = (outcome(four, mask, dtype, native) for native in (True, False))
    for mine, theirs, exact in zip(own, written, true, strict=True):
        if exact.norm() < 1e-6:  # a single key has all of the attention, and no slope
            assert mine.norm() < 1e-6
        else:
            assert error(mine, exact) < ERRORS[dtype]
            assert error(mine, exact) <= 1.05 * error(theirs, exact) + ERRORS[dtype] / 5


@each_type
def test_tiles_serve_fewer_keys_than_queries_and_more(rng: torch.Generator, dtype: torch.dtype) -> None:
    for queries, keys in ((50, 7), (7, 50)):
        four = given(rng, queries, keys, 24, dtype)
        true, own = outcome(four, None, torch.float64, False), outcome(four, None, dtype, True)
        assert max(error(mine, exact) for mine, exact in zip(own, true, strict=True)) < ERRORS[dtype]


@each_type
def test_tiles_see_nothing_of_hidden_keys(rng: torch.Generator, dtype: torch.dtype) -> None:
    query, key, value, up = given(rng, 20, 40, 32, dtype)
    mask = (torch.arange(40) < 25)[None, None, None, :]
    other = [torch.where(mask.transpose(2, 3), each, 100.0) for each in (key, value)]
    one = outcome((query, key, value, up), mask, dtype, True)
    two = outcome((query, other[0], other[1], up), mask, dtype, True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not one[2][:, :, 25:].any()
    assert not one[3][:, :, 25:].any()


@each_type
def test_tiles_do_not_care_how_their_inputs_lie(rng: torch.Generator, dtype: torch.dtype) -> None:
    four = given(rng, 40, 40, 32, dtype)
    dense = tuple(each.contiguous() for each in four)
    across = tuple(each.transpose(2, 3).contiguous().transpose(2, 3) for each in four)
    one, two, three = (outcome(each, None, dtype, True) for each in (four, dense, across))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


@each_type
def test_tiles_have_the_same_bits_on_two_threads_and_of_each_head_alone(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    four, threads, found = given(rng, 40, 40, 32, dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(outcome(four, None, dtype, True))
    finally:
        torch.set_num_threads(threads)
    alone = outcome(tuple(each[1:, 1:] for each in four), None, dtype, True)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(torch.equal(one[1:, 1:], two) for one, two in zip(found[0], alone, strict=True))


@each_type
def test_what_is_not_finite_stays_so_in_tiles(rng: torch.Generator, dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf):
        for number in range(3):
            four = given(rng, 20, 20, 32, dtype)
            four[number][0, 1, 4, 7] = bad
            out = outcome(four, None, dtype, True)[0]
            assert not out[0, 1].isfinite().all()
            assert out[1].isfinite().all()


@each_type
@pytest.mark.parametrize("by", [10, 100])
def test_large_scores_do_not_overflow_in_tiles(rng: torch.Generator, dtype: torch.dtype, by: int) -> None:
    four = given(rng, 40, 40, 32, dtype)
    most = 1e-6 * by**2 if dtype == torch.float32 else 5e-3  # a score of 1000 is rounded to 1e-4
    large = (by * four[0], by * four[1], *four[2:])
    true, own = outcome(large, None, torch.float64, False), outcome(large, None, dtype, True)
    assert error(own[0], true[0]) < most
    assert error(own[3], true[3]) < most
    assert all(each.isfinite().all() for each in own)
    if by == 10:  # at 100 each query looks at one key alone, and the slopes are those of rounding
        assert max(error(own[n], true[n]) for n in (1, 2)) < most


@each_type
def test_tiles_keep_their_inputs_and_a_number_a_query(rng: torch.Generator, dtype: torch.dtype) -> None:
    query, key, value = (each.requires_grad_() for each in given(rng, 64, 64, 8, dtype)[:3])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(query, key, value, None, native=True)
    more = [each for each in kept if each.data_ptr() not in {t.data_ptr() for t in (query, key, value)}]
    assert len(kept) == 4
    assert [tuple(each.shape) for each in more] == [(2, 2, 64)]


@each_type
def test_what_tiles_cannot_read_is_computed_by_torch(rng: torch.Generator, dtype: torch.dtype) -> None:
    query, key, value, up = given(rng, 6, 6, 8, dtype)
    assert fits(query, key, value)
    assert not fits(query, key[:1], value[:1])
    assert not fits(query, key, value[..., :4])
    assert not fits(query, key[..., :4], value[..., :4])
    assert not fits(query[:, :, :0], key, value)
    assert not fits(query, key[:, :, :0], value[:, :, :0])
    with pytest.raises(RuntimeError, match="type"):
        attention(query.requires_grad_(), key.double(), value.double(), None, native=True)
    repeated = (query, *(each[:1].expand(2, -1, -1, -1) for each in (key, value)), up)
    true, own = outcome(repeated, None, torch.float64, False), outcome(repeated, None, dtype, True)
    assert max(error(mine, exact) for mine, exact in zip(own, true, strict=True)) < ERRORS[dtype]


@each_type
def test_flops_of_tiles_are_those_of_the_products(rng: torch.Generator, dtype: torch.dtype) -> None:
    four, counts = given(rng, 20, 12, 8, dtype), []
    for native in (True, False):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            outcome(four, None, dtype, native)
        counts.append(counter.get_total_flops())
    again = 2 * 2 * 2 * 20 * 12 * 8  # matrices make their scores again, which torch counts
    assert counts[0] == counts[1] - again == 3 * 2 * again


@each_type
def test_tiles_refuse_a_second_derivative(rng: torch.Generator, dtype: torch.dtype) -> None:
    inputs = [each.requires_grad_() for each in given(rng, 8, 8, 8, dtype)[:3]]
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(attention(*inputs, None, native=True).sum(), inputs, create_graph=True)


@each_type
def test_what_tiles_serve(rng: torch.Generator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    real = TiledAttention.forward
    monkeypatch.setattr(
        TiledAttention,
        "forward",
        staticmethod(lambda ctx, q, *rest: calls.append(q.dtype) or real(ctx, q, *rest)),
    )
    query, key, value = (each.requires_grad_() for each in given(rng, 8, 8, 8, dtype)[:3])
    attention(query.double(), key.double(), value.double(), None, native=True)
    attention(query, key, value, None)
    assert calls == []
    with torch.no_grad():  # what a training only looks at
        attention(query, key, value, None, native=True)
    assert calls == [dtype]
    calls.clear()
    attention(query, key, value, None, native=True)
    assert calls == [dtype]


@each_type
def test_a_layer_with_tiles_goes_through_the_compiler_in_one_piece(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    """Traced as `torch.compile` does, without the minute that its code takes to build."""
    layer = Attention(32, 2, 32).to(dtype)
    layer.native = True
    x = torch.randn(2, 9, 32, generator=rng).to(dtype)
    eager = layer(x, x)
    eager.square().sum().backward()
    slopes = [each.grad.clone() for each in layer.parameters() if each.grad is not None]
    layer.zero_grad()
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, x)
    out.square().sum().backward()
    torch.testing.assert_close(out, eager)
    for parameter, slope in zip(layer.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope)
