"""Causal attention within each of the sequences that a micro-batch lays end to end, and never across them.

On a GPU in 16-bit numbers: PyTorch's own variable-length flash kernel. Elsewhere: sequences of similar length side by
side in one call of scaled_dot_product_attention, so that the work grows with the sum of their squares.

Legend: S tokens; b sequences of a bucket, L its longest; h heads, d their size.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from buffer.errors import InvalidSettings

PACKED_ATTENTION = "stalewise_packed"
"""The name that transformers knows this attention by."""

_SHORTEST_SHARE = 0.8
"""Of a bucket's longest: shorter sequences go to the next bucket, so that at most a fifth of a row is padding."""
_LARGEST_FLASH_HEAD = 256
_HALVES = (torch.bfloat16, torch.float16)


class _Bucket(NamedTuple):
    take: Tensor  # [b, L] int64: tokens of each sequence, padded with its last one
    longest: int


class _Plan(NamedTuple):
    """How S tokens become rows and come back."""

    buckets: tuple[_Bucket, ...]
    put: Tensor | None  # [S] int64: where each token stands among the flattened rows; None = in order


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, h, S, d]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # [sequences + 1] int32
    max_length_q: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """See transformers' attention interface. Without `cu_seq_lens_q` each row is one sequence, unpadded on the left."""
    del attention_mask  # transformers makes none for an attention of ours
    if odd := sorted(name for name in ("s_aux", "position_bias") if other.get(name) is not None):
        raise InvalidSettings(f"packed attention does not know {odd[0]}, which {type(module).__name__} uses")
    if value.dtype in _HALVES:  # under autocast a norm of queries and keys (Qwen 3) leaves them in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if cu_seq_lens_q is None or max_length_q is None:
        return _causal(query, key, value, scaling, sliding_window, softcap).transpose(1, 2), None
    if _flash_can(query, value, softcap):
        out = varlen_attn(
            query[0].transpose(0, 1),  # [S, h, d]
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=key.shape[1] != query.shape[1],
        )
        assert isinstance(out, Tensor)
        return out[None], None
    return _by_bucket(query, key, value, cu_seq_lens_q, scaling, sliding_window, softcap), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _flash_can(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    return (
        query.is_cuda
        and query.dtype in _HALVES
        and softcap is None
        and query.shape[-1] == value.shape[-1] <= _LARGEST_FLASH_HEAD
    )


# the plan follows the lengths of each micro-batch, which a compiled graph must not depend on
@torch.compiler.disable  # type: ignore[untyped-decorator]  # by torch
def _by_bucket(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """[1, S, h, d]"""
    plan = _plan(tuple(bounds.diff().tolist()), query.device)
    rows = []
    for take, longest in plan.buckets:
        chosen = None if plan.put is None else take.flatten()
        queries, keys, values = (_rows(part, chosen, longest) for part in (query, key, value))
        rows.append(_causal(queries, keys, values, scaling, sliding_window, softcap).transpose(1, 2).flatten(0, 1))
    out = torch.cat(rows)  # [sum b * L, h, d]
    return (out if plan.put is None else out.index_select(0, plan.put))[None]


def _rows(part: Tensor, chosen: Tensor | None, longest: int) -> Tensor:
    """From [1, h, S, d] the chosen tokens, or all, as rows of `longest`: [b, h, L, d]."""
    tokens = part[0].transpose(0, 1)
    if chosen is not None:
        tokens = tokens.index_select(0, chosen)
    return tokens.reshape(-1, longest, *tokens.shape[1:]).transpose(1, 2)


@lru_cache(maxsize=4)  # the layers of one model ask for one plan in a row
def _plan(lengths: Sequence[int], device: torch.device) -> _Plan:
    starts = list(accumulate(lengths, initial=0))
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    sets: list[list[int]] = []
    for index in longest_first:
        if sets and lengths[index] >= _SHORTEST_SHARE * lengths[sets[-1][0]]:
            sets[-1].append(index)
        else:
            sets.append([index])
    buckets = []
    put = torch.empty(starts[-1], dtype=torch.int64)
    offset = 0
    for members in sets:
        longest = lengths[members[0]]
        start = torch.tensor([starts[index] for index in members])[:, None]
        length = torch.tensor([lengths[index] for index in members])[:, None]
        position = torch.arange(longest).expand(len(members), longest)
        take = start + position.minimum(length - 1)
        real = position < length
        put[take[real]] = offset + torch.arange(take.numel()).view_as(take)[real]
        offset += take.numel()
        buckets.append(_Bucket(take.to(device), longest))
    in_order = len(sets) == 1 and torch.equal(put, torch.arange(offset))
    return _Plan(tuple(buckets), None if in_order else put.to(device))


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """Attention of each row to itself and before, within the window: [b, h, L, d]."""
    grouped = key.shape[1] != query.shape[1]
    length = query.shape[2]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    if softcap is None and sliding_window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if sliding_window is not None:
        seen = seen.triu(1 - sliding_window)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores.float() / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype) @ value
