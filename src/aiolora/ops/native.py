"""The decode path's ops compiled for this CPU: calls the kernels that build_native.py compiled from csrc/.

Each function here takes the tensors of the reference of the same name and returns its result, or None where the
compiled kernel does not serve (no compiler, another dtype, strides, too many tokens): the caller then runs the
reference. Arguments cross as one packed struct: ctypes converts 20 separate ones in 2.0 us, a packed one in 0.5 us
(2-core EPYC Zen4, Python 3.11), and a decode step makes 270 calls.
"""

import struct

import torch
from torch import Tensor

from aiolora.ops.build_native import library

MAX_TOKENS = 1024  # of a linear; with 64 oneDNN and MKL take 1.4 times as long, from 256 on as long
MAX_QUERIES = 8  # of one sequence in attention
MAX_HEAD_DIM = 512

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SHORT = {n: struct.Struct(f"{n}q").pack for n in range(64)}  # the `_args` of csrc/: all fields have 8 bytes
_NORM = struct.Struct("10q2d").pack
_ROPE = struct.Struct("17q2d").pack
_ATTENTION = struct.Struct("17q2d").pack


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `whole_linear` of this dtype on this device runs compiled."""
    return device.type == "cpu" and dtype in _TYPES and library() is not None


def linear(x: Tensor, weight: Tensor, adapters: list[Tensor], where: list[int]) -> Tensor | None:
    """See `linear.whole_linear`; at most MAX_TOKENS tokens, and adapters of float32 or bfloat16 whatever x is."""
    loaded, kind = library(), _TYPES.get(x.dtype)
    tokens, width = x.shape
    if loaded is None or kind is None or not 0 < tokens <= MAX_TOKENS or not _alike(x, weight):
        return None
    columns = weight.shape[0]
    fields: tuple[int, ...] = (0,)
    if adapters:
        a, b, vectors, perm, tiles, pages, scales, vector_pages = adapters
        slices, _, _, a_width = a.shape
        (a_slice, a_page, *a_rest), (b_page, *b_rest), adapter_kind = a.stride(), b.stride(), _TYPES.get(a.dtype)
        if (
            adapter_kind is None
            or b.dtype is not a.dtype
            or a_rest != [width, 1]
            or b_rest != [columns, 1]
            or (a_width, len(where)) != (width, slices + 2)
            or not (_is_int32(perm) and _is_int32(tiles) and _is_int32(pages) and _is_int32(vector_pages))
            or not (scales.dtype is vectors.dtype is torch.float32 and scales.is_contiguous())
            or vectors.stride()[1:] != (columns, 1)
        ):
            return None
        _, kinds, most = pages.shape
        skipped = 4 * where[0] * most  # bytes of pages and of scales alike
        fields = (
            *(slices, adapter_kind, a.data_ptr(), b.data_ptr(), a_slice, a_page, b_page),
            *(perm.data_ptr(), tiles.data_ptr(), tiles.shape[0], pages.data_ptr() + skipped),
            *(scales.data_ptr() + skipped, kinds * most, most),
            *(vectors.data_ptr(), vectors.stride(0), vector_pages.data_ptr() + 4 * where[0], kinds, *where[1:]),
        )
    y = x.new_empty((tokens, columns))
    ends = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    packed = _SHORT[8 + len(fields)](torch.get_num_threads(), kind, tokens, width, columns, *ends, *fields)
    return None if loaded.linear(packed) else y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor | None:
    """See `norm.rms_norm`."""
    loaded, kind = library(), _TYPES.get(x.dtype)
    if loaded is None or kind is None or not _alike(x, weight):
        return None
    out = torch.empty_like(x)
    width = weight.shape[0]
    ends = weight.data_ptr(), out.data_ptr(), 0
    sizes = x.numel() // width, width
    loaded.norm(_NORM(torch.get_num_threads(), kind, *sizes, x.data_ptr(), 0, 0, *ends, eps, offset))
    return out


def add_norm(
    y: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor] | None:
    """See `norm.add_norm`, nothing owed."""
    loaded, kind = library(), _TYPES.get(y.dtype)
    if loaded is None or kind is None or not _alike(y, weight, residual, bias):
        return None
    out, total = torch.empty_like(y), torch.empty_like(y)
    tokens, width = y.shape
    terms = residual.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr()
    ends = weight.data_ptr(), out.data_ptr(), total.data_ptr()
    loaded.norm(_NORM(torch.get_num_threads(), kind, tokens, width, *terms, *ends, eps, offset))
    return out, total


def gate_mul(y: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor | None:
    """See `activation.silu_mul` and `gelu_mul`, nothing owed."""
    loaded, kind = library(), _TYPES.get(y.dtype)
    if loaded is None or kind is None or not _alike(y, bias):
        return None
    tokens, width = y.shape
    out = y.new_empty((tokens, width // 2))
    ends = y.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    loaded.gate_mul(_SHORT[8](torch.get_num_threads(), kind, tokens, width // 2, *ends, gelu))
    return out


def rope_store(
    y: Tensor,
    bias: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    num_heads: int,
    norm_offset: float,
) -> Tensor | None:
    """See `attention.rope_store`, nothing owed."""
    loaded, kind = library(), _TYPES.get(y.dtype)
    (q_norm, k_norm), (k_cache, v_cache) = norms, caches
    _, _, num_kv_heads, head_dim = k_cache.shape
    if (
        loaded is None
        or kind is None
        or head_dim > MAX_HEAD_DIM
        or (q_norm is not None and q_norm.shape[0] != head_dim)
        or not (_alike(y, bias, q_norm, k_norm) and _alike(k_cache, v_cache))
        or not (k_cache.dtype is y.dtype and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous())
    ):
        return None
    positions, slots = _int32(positions), _int32(slots)
    tokens = y.shape[0]
    q = y.new_empty((tokens, num_heads, head_dim))
    if q_norm is None or k_norm is None:
        q_norm = k_norm = None
    sizes = tokens, num_heads, num_kv_heads, head_dim, cos_sin.shape[1]
    terms = y.data_ptr(), *(0 if term is None else term.data_ptr() for term in (bias, q_norm, k_norm))
    places = cos_sin.data_ptr(), positions.data_ptr(), slots.data_ptr()
    ends = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    loaded.rope_store(_ROPE(torch.get_num_threads(), kind, *sizes, *terms, *places, *ends, eps, norm_offset))
    return q


def attention(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    block_tables: Tensor,
    kv_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, int] | None:
    """See `attention.attention`: the result and how many sequences, those with over MAX_QUERIES, it leaves undone."""
    loaded, kind = library(), _TYPES.get(q.dtype)
    k_cache, v_cache = caches
    tokens, num_heads, head_dim = q.shape
    if (
        loaded is None
        or kind is None
        or head_dim % 16 != 0
        or not (_alike(k_cache, v_cache) and k_cache.dtype is q.dtype and q.is_contiguous())
    ):
        return None
    block_tables, kv_lengths, query_starts = _int32(block_tables), _int32(kv_lengths), _int32(query_starts)
    sinks = None if sinks is None else sinks.float().contiguous()
    out = q.new_empty((tokens, num_heads * head_dim))
    sequences, max_pages = block_tables.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    sizes = sequences, num_heads, num_kv_heads, head_dim, page_size, max_pages, window
    starts = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    where = block_tables.data_ptr(), kv_lengths.data_ptr(), query_starts.data_ptr()
    ends = out.data_ptr(), 0 if sinks is None else sinks.data_ptr(), scale, cap
    left = loaded.attention(_ATTENTION(torch.get_num_threads(), kind, *sizes, *starts, *where, *ends))
    return None if left < 0 else (out, left)


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all have the dtype of `x` and all are contiguous."""
    if not x.is_contiguous():
        return False
    dtype = x.dtype
    for other in others:  # a plain loop: a generator in all() costs 0.5 us more
        if other is None:
            continue
        if other.dtype is not dtype or not other.is_contiguous():
            return False
    return True


def _is_int32(x: Tensor) -> bool:
    return x.dtype is torch.int32 and x.is_contiguous()


def _int32(x: Tensor) -> Tensor:
    return x if _is_int32(x) else x.to(torch.int32).contiguous()
