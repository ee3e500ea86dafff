"""Attention against a plain softmax in float64, the axis that each kind attends along, and the copies it makes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import close, copies, differ, randn, randomise
from torch import Tensor, nn

from vdm.models import attention
from vdm.models.attention import (
    GEGLU,
    CrossAttention,
    SpatialSelfAttention,
    SpatialTransformer,
    TemporalSelfAttention,
    TemporalTransformer,
)
from vdm.models.operations import _clip_by_clip, attend, attend_frames, by_products, geglu

EMPTY = torch.empty(0)  # what a block gets that does not look at the time step or the text


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v.double()


# attend


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([1, 2, 7, 128, 129, 200]),
    st.integers(1, 8),
)
def test_attend_is_softmax_attention(B: int, N: int, L: int, S: int, D: int) -> None:
    q, k, v = randn(B, N, L, D, seed=1), randn(B, N, S, D, seed=2), randn(B, N, S, D, seed=3)
    close(attend(q, k, v), softmax_attention(q, k, v))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_attend_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (randn(2, 3, 20, 8, seed=i).to(dtype) for i in range(3))
    out = attend(q, k, v)
    assert out.dtype == dtype
    close(out.double(), softmax_attention(q, k, v), tolerance=tolerance)


def test_attend_takes_any_strides() -> None:
    qkv = randn(2, 5, 3, 4, 6)  # (B, L, 3, N, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    close(attend(q, k, v), softmax_attention(q.contiguous(), k.contiguous(), v.contiguous()))
    one_key = k[:1].expand(2, -1, -1, -1)
    close(attend(q[..., ::2], one_key[..., ::2], v), softmax_attention(q[..., ::2], one_key[..., ::2], v))


@torch.no_grad()
@pytest.mark.parametrize("batch", [65_534, 65_535, 65_536, 140_000])
def test_attend_splits_a_batch_that_cuda_kernels_cannot_take(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(batch, 1, 2, 1, seed=i) for i in range(3))
    kernel, sizes = F.scaled_dot_product_attention, []

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes.append(q.shape[0])
        return kernel(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    close(attend(q, k, v), softmax_attention(q, k, v))
    assert max(sizes) <= 65_535 and sum(sizes) == batch


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_attention_by_products_is_softmax_attention(B: int, N: int, L: int, S: int, D: int) -> None:
    q, k, v = randn(B, N, L, D, seed=1), randn(B, N, S, D, seed=2), randn(B, N, S, D, seed=3)
    close(by_products(q, k, v), softmax_attention(q, k, v))
    close(by_products(q.float(), k.float(), v.float()), softmax_attention(q, k, v).float(), tolerance=1e-5)


def test_attend_gradient() -> None:
    q, k, v = (randn(2, 1, length, 2, seed=length).requires_grad_() for length in (2, 3, 3))
    assert torch.autograd.gradcheck(attend, (q, k, v))


# The three kinds of attention


def head_by_head(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Plain attention of one sequence, one head after the other: (L, N*D), (S, N*D), (S, N*D) -> (L, N*D)."""
    pieces = zip(q.chunk(heads, dim=1), k.chunk(heads, dim=1), v.chunk(heads, dim=1), strict=True)
    return torch.cat([softmax_attention(*piece) for piece in pieces], dim=1)


def self_attention(module: SpatialSelfAttention, tokens_LC: Tensor) -> Tensor:
    q, k, v = (tokens_LC @ weight.T for weight in module.to_qkv.weight.chunk(3))
    return module.to_out(head_by_head(q, k, v, module.heads))


def test_spatial_attention_is_among_the_positions_of_a_frame() -> None:
    module, x = randomise(SpatialSelfAttention(6, heads=2, head_dim=4)), randn(2, 3, 5, 6)
    out = module(x, EMPTY)
    for b, t in [(0, 0), (1, 2)]:
        close(out[b, t], self_attention(module, x[b, t]))


def test_temporal_attention_is_among_the_frames_of_a_position() -> None:
    module, x = randomise(TemporalSelfAttention(6, heads=2, head_dim=4)), randn(2, 3, 5, 6)
    out = module(x, EMPTY)
    for b, p in [(0, 0), (1, 4)]:
        close(out[b, :, p], self_attention(module, x[b, :, p]))


def test_cross_attention_is_of_every_token_to_the_text_of_its_video() -> None:
    module = randomise(CrossAttention(6, heads=2, head_dim=4, context_dim=7))
    x, context = randn(2, 3, 5, 6), randn(2, 4, 7, seed=1)
    out = module(x, context)
    key, value = module.to_kv.weight.chunk(2)
    for b, t in [(0, 0), (1, 2)]:
        plain = head_by_head(x[b, t] @ module.to_q.weight.T, context[b] @ key.T, context[b] @ value.T, module.heads)
        close(out[b, t], module.to_out(plain))


def test_queries_keys_and_values_have_no_bias() -> None:
    module = CrossAttention(6, 2, 4, 7)
    assert module.to_q.bias is module.to_kv.bias is SpatialSelfAttention(6, 2, 4).to_qkv.bias is None
    assert module.to_out.bias is not None


@pytest.mark.parametrize("kind", [SpatialSelfAttention, TemporalSelfAttention])
def test_self_attention_gradient(kind: type[SpatialSelfAttention]) -> None:
    module = randomise(kind(2, heads=1, head_dim=2))
    assert torch.autograd.gradcheck(lambda x: module(x, EMPTY), (randn(2, 3, 2, 2).requires_grad_(),))


def test_geglu_gates_with_gelu_and_is_four_times_as_wide() -> None:
    module, x, before = randomise(GEGLU(4)), randn(2, 3, 5, 4), randn(2, 3, 5, 4, seed=1)
    value, gate = F.linear(x, module.linear1.weight, module.linear1.bias).split(16, dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    expected = before + F.linear(value * gelu, module.linear2.weight, module.linear2.bias)
    close(module(x, before), expected)
    with torch.no_grad():
        close(module(x, before), expected)
        torch.testing.assert_close(
            module.float()(x.float(), before.float()), expected.float()
        )  # gelu and product by oneDNN


def test_geglu_gradient() -> None:
    assert torch.autograd.gradcheck(geglu, (randn(2, 3, 6).requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: geglu(2 * x), (randn(2, 3, 6).requires_grad_(),))


def test_the_gradient_of_geglu_is_written_over_what_is_needed_no_more() -> None:
    given = randn(2, 3, 6).requires_grad_()
    expected = torch.autograd.grad(geglu(given).sum(), given)[0]
    assert torch.equal(given, randn(2, 3, 6)), "what somebody made stays as it is"
    between = given * 2 / 2
    before, result = between.detach().clone(), geglu(between).sum()
    for again in (True, True, False):
        close(torch.autograd.grad(result, given, retain_graph=again)[0], expected)
        assert torch.equal(between, before) == again


@pytest.mark.parity
def test_geglu_is_that_of_diffusers() -> None:
    from diffusers.models.attention import FeedForward

    ours, theirs = randomise(GEGLU(4)), FeedForward(4, activation_fn="geglu").double()
    pairs = zip(ours.state_dict().values(), theirs.state_dict(), strict=True)
    theirs.load_state_dict({name: tensor for tensor, name in pairs})
    x = randn(2, 3, 4)
    close(ours(x, torch.zeros_like(x)), theirs(x))


# Transformers


def spatial() -> SpatialTransformer:
    return SpatialTransformer(8, heads=2, head_dim=4, context_dim=6, groups=2)


def temporal() -> TemporalTransformer:
    return TemporalTransformer(8, heads=3, head_dim=4, groups=2)


@pytest.mark.parametrize("module, keep", [(spatial(), (2, 3)), (temporal(), (0,))])
def test_transformers_mix_no_more_than_their_axes(module: nn.Module, keep: tuple[int, ...]) -> None:
    """Change one position of one frame: a spatial transformer leaves other frames alone; norms reach what they may."""
    module = randomise(module)
    x, context = randn(2, 8, 4, 2, 3), randn(2, 5, 6, seed=1)
    changed = x.clone()
    changed[0, :, 1, 0, 0] += 1.0
    delta = (module(changed, EMPTY, context) - module(x, EMPTY, context)).abs().amax(1)  # (B, T, H, W)
    assert not delta[1].any(), "another video changed"
    frames = delta[0].amax((1, 2)) > 1e-6
    assert frames.tolist() == ([False, True, False, False] if keep == (2, 3) else [True] * 4)


def test_temporal_transformer_starts_as_the_identity_and_spatial_does_not() -> None:
    x, context = torch.randn(2, 8, 3, 2, 2), torch.randn(2, 5, 6)
    assert torch.equal(temporal()(x, EMPTY, context), x)
    assert differ(spatial()(x, EMPTY, context), x)


def test_temporal_transformer_ignores_the_text_and_spatial_does_not() -> None:
    x, a, b = randn(2, 8, 3, 2, 2), randn(2, 5, 6, seed=1), randn(2, 5, 6, seed=2)
    module = randomise(spatial())
    assert differ(module(x, EMPTY, a), module(x, EMPTY, b))
    module = randomise(temporal())
    assert torch.equal(module(x, EMPTY, a), module(x, EMPTY, b))


@pytest.mark.parametrize("module", [spatial(), temporal()])
def test_transformer_norms_have_the_eps_of_the_original(module: SpatialTransformer | TemporalTransformer) -> None:
    assert module.norm.eps == 1e-6
    assert {norm.eps for norm in (module.block.norm1, module.block.norm2, module.block.norm3)} == {1e-5}


def test_spatial_transformer_norms_each_frame_and_temporal_the_video() -> None:
    x = randn(2, 8, 4, 2, 3) * torch.arange(1, 5)[:, None, None]
    for module, parts in ((spatial(), x.unbind(2)), (temporal(), [x])):
        norm = randomise(module).norm
        plain = [F.group_norm(part, 2, norm.weight, norm.bias, eps=1e-6) for part in parts]
        close(norm(x), torch.stack(plain, dim=2) if len(plain) > 1 else plain[0])


# Memory


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def test_temporal_attention_copies_once_in_and_once_out() -> None:
    module = TemporalSelfAttention(16, heads=4, head_dim=4)
    tokens = channels_last(2, 16, 3, 9, 16).permute(0, 2, 3, 4, 1).flatten(2, 3)
    assert len(copies(lambda: module(tokens, EMPTY), numel=tokens.numel())) <= 2


@settings(max_examples=20)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.tuples(st.integers(1, 3), st.integers(1, 6)))
def test_clip_by_clip_it_is_the_same_attention(sizes: tuple[int, int, int], head: tuple[int, int]) -> None:
    B, T, P = sizes
    qkv = randn(B, T, P, 3, *head)
    one_by_one, together = _clip_by_clip(qkv), attend_frames(qkv)
    assert one_by_one.shape == (B, T, P, *head)
    assert B == 1 or one_by_one.is_contiguous()  # of a single clip it lies as the kernel wrote it
    close(one_by_one, together)


def test_clip_by_clip_a_fused_kernel_takes_views_and_the_result_is_copied_once() -> None:
    qkv = torch.randn(2, 3, 9, 3, 4, 16)
    callers = copies(lambda: _clip_by_clip(qkv), numel=qkv[0, :, :, 0].numel())
    assert callers == []  # the results become one tensor by one concatenation, which `copies` does not count
    assert len(copies(lambda: _clip_by_clip(qkv).flatten(3), numel=1)) == 0


@settings(max_examples=20)
@given(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)), st.integers(1, 40))
def test_a_feed_forward_network_in_pieces_is_the_same(shape: tuple[int, int, int], rows: int) -> None:
    network, x = GEGLU(4).double(), randn(*shape, 4)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        whole = x + network._inside(x)
        patch.setattr(attention, "CACHED", rows * 32)
        pieces = network(x, x)
    assert pieces.shape == whole.shape
    close(pieces, whole)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 4), st.integers(1, 400), st.booleans(), st.integers(1, 2))
def test_tokens_transformed_in_pieces_are_the_same(
    sizes: tuple[int, int, int, int], numbers: int, temporal: bool, texts: int
) -> None:
    shape = {"channels": 4, "heads": 2, "head_dim": 3, "groups": 2}
    module = TemporalTransformer(**shape) if temporal else SpatialTransformer(**shape, context_dim=5)
    torch.nn.init.normal_(module.proj_out.weight)
    module, (clips, *rest) = module.double(), sizes
    x, context = randn(clips, 4, *rest), randn(texts * clips, 6, 5)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        whole = module(x, EMPTY, context)
        patch.setattr(attention, "TOKENS", numbers)
        pieces = module(x, EMPTY, context)
    assert pieces.shape == whole.shape and len(whole) == clips * (1 if temporal else texts)
    close(pieces, whole)


def test_temporal_transformer_copies_nothing_else() -> None:
    module = TemporalTransformer(16, heads=4, head_dim=4, groups=4).eval()
    x = channels_last(2, 16, 3, 9, 16)
    assert module(x, EMPTY, EMPTY).is_contiguous(memory_format=torch.channels_last_3d)
    assert len(copies(lambda: module(x, EMPTY, EMPTY), numel=x.numel())) <= 4  # it has two attentions


def test_spatial_transformer_copies_nothing() -> None:
    module = SpatialTransformer(16, heads=4, head_dim=4, context_dim=6, groups=4).eval()
    x, context = channels_last(2, 16, 3, 9, 16), torch.randn(2, 5, 6)
    assert module(x, EMPTY, context).is_contiguous(memory_format=torch.channels_last_3d)
    assert copies(lambda: module(x, EMPTY, context), numel=x.numel()) == []
