"""What one forward is given, all of it: no global context, so a compiler sees one graph."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from aiolora.ops.blocks import Blocks, OwnNorms
from aiolora.ops.linear import Routing


class MediaRows(NamedTuple):
    """What encoders made of images and recordings, in the place of the vectors of M placeholder tokens."""

    rows: Tensor  # [M, H]
    at: Tensor  # [M] int64, positions in [T]


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """Device tensors of one step: T tokens of B sequences, of which S positions are sampled. Engine thread only."""

    tokens: Tensor  # [T] int32; -(i + 1): the token that the step before sampled at row i
    previous: Tensor  # [P] int32, what the step before sampled
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32, KV slot = page * page_size + offset; -1: nowhere
    block_tables: Tensor  # [B, max pages] int32
    kv_lengths: Tensor  # [B] int32, tokens of the sequence once this step is done; 0: padding
    query_starts: Tensor  # [B + 1] int32, where each sequence's tokens begin in [T]
    logits_at: Tensor | None  # [S] int32, positions in [T] whose logits are wanted; None: all
    routing: Routing | None = None  # None: no adapter in this step, and nothing is spent on any
    embeds: bool = False  # whether an adapter of this step has a low-rank share in the embedding
    own_embeddings: Blocks | None = None  # None: no adapter of this step has rows of its own there
    own_norms: OwnNorms | None = None
    media: MediaRows | None = None  # None: no token of this step stands for an image or a recording
    axes: Tensor | None = None  # [3, T] int32, rotary positions on three axes (M-RoPE); None: all are `positions`


class HeadInputs(NamedTuple):
    """What adapters do to the head, over some of the positions that `StepInputs.logits_at` names."""

    routing: Routing  # over those positions: who has no adapter on the head is without one
    low_rank: bool  # whether any has a low-rank share in it
    own: Blocks | None  # None: none has rows of its own there
    vocabularies: Tensor | None = None  # [S] int32, token ids that each knows, 0: the base's; None: all know those
    widest: int = 0  # columns that the logits need at least


class LayerKV(NamedTuple):
    """One layer's cache."""

    k: Tensor  # [P, page_size, G, D]
    v: Tensor  # [P, page_size, G, D]
