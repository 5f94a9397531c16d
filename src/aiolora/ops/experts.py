"""Routed experts: each token goes through a few of many gated MLPs (Mixtral, arXiv 2401.04088), adapters included.

    row r = t * k + j: token t on its way through the j-th of the k experts that its gate chose
    inner[r] = silu(gate(x[t])) * up(x[t])        by the weights of the row's expert, or another `Gate`
    y[t] = sum over j of weights[t, j] * down(inner[t * k + j])

Each projection has what adapters add to it as in `ops.linear`, with pages that hold every expert's ranks: row r reads
the part of its expert, of the pages of its token's mix.

Rows are sorted by expert and cut into tiles, so that a tile reads one weight. How many tiles there are at most follows
from shapes alone; which they are is found on the device.

Shapes: T tokens, k experts a token, R = T * k rows, E experts, G tiles, I width of an expert, P pages, S slices.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.ops.linear import Partial, Routing, paid
from aiolora.ops.registration import define

APART = 2048  # rows up to which a GPU shrinks each by itself


class ExpertSite(NamedTuple):
    """Where the pool keeps the pages of one projection of all experts of a layer. The addresses never change."""

    kind: int  # index into the second axis of Routing.pages
    a: Tensor  # [P, E, S, 8, K]
    b: Tensor  # [P, E, 8, N]


class Gate(NamedTuple):
    """How an expert's gate opens.

    With a `limit` (gpt-oss, arXiv 2508.10925) gate is at most that and up between it and its negative:
    gate * sigmoid(alpha * gate) * (up + 1). Without (0): silu(gate) * up.
    """

    alpha: float = 1.0
    limit: float = 0.0


SILU = Gate()


class Chosen(NamedTuple):
    """Which experts the tokens of a step go through."""

    weights: Tensor  # [T, k] float32
    experts: Tensor  # [T, k] int32
    rows: Tensor  # [R] int32, sorted by expert, in their order within one
    tiles: Tensor  # [G, 3] int32: (expert, first position in rows, how many); 0: an empty tile
    tile: int  # most rows of a tile


def rows_of_tile(tokens: int, top_k: int, experts: int, device: str) -> int:
    """How many rows of one expert a tile has at most."""
    if device == "cpu":
        return max(1, tokens)
    return 16 if tokens * top_k <= 16 * experts else 64


def sizes_apart(top_k: int, experts: int, most: int) -> set[int]:
    """Sizes of steps, tokens up to `most`, one for each way in which a GPU cuts the work."""
    last = [16, 32, 64, APART // top_k, 16 * experts // top_k]  # of a way, some of them the same
    return {size for end in last for size in (end, end + 1) if 0 < size <= most}


def most_tiles(tokens: int, top_k: int, experts: int, tile: int) -> int:
    """G: however the rows are spread, each expert's last tile may not be full."""
    rows = tokens * top_k
    spread = (rows + min(experts, rows) * (tile - 1)) // tile
    return max(1, min(rows, spread, experts * -(-tokens // tile)))


def choose(gate: Partial, top_k: int, normalised: bool) -> Chosen:
    """The `top_k` experts of each token by the gate's logits [T, E], once what they owe is paid.

    `normalised`: weights of those chosen sum to one.
    """
    y = gate.y
    tile = rows_of_tile(y.shape[0], top_k, y.shape[1], y.device.type)
    return Chosen(*choose_experts_op(*gate.flat, top_k, normalised, tile), tile)


def gated_by(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: Chosen,
    site: ExpertSite | None,
    routing: Routing | None,
    gate: Gate,
) -> Tensor:
    """`gated_experts` with the adapters of `routing`."""
    return gated_experts_op(x, weight, bias, [*chosen[1:4]], *_adapters(chosen, site, routing), *gate)


def summed_by(
    inner: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: Chosen,
    site: ExpertSite | None,
    routing: Routing | None,
) -> Tensor:
    """`summed_experts` with the adapters of `routing`."""
    return summed_experts_op(inner, weight, bias, chosen.weights, [*chosen[1:4]], *_adapters(chosen, site, routing))


def _adapters(chosen: Chosen, site: ExpertSite | None, routing: Routing | None) -> tuple[list[Tensor], list[int]]:
    """[a, b, pages, scales, owners] or [], [rows of a tile, kind] or [rows of a tile]."""
    if site is None or routing is None:
        return [], [chosen.tile]
    return [site.a, site.b, routing.pages, routing.scales, routing.owners], [chosen.tile, site.kind]


def choose_experts(
    y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int], top_k: int, normalised: bool, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four fields of `Chosen`: softmax in float32 over all of a Partial's value [T, E], then the largest."""
    logits = paid(y, bias, owed, where).to(y.dtype)
    tokens, count = logits.shape
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    rows = experts.flatten().argsort(stable=True)
    table, first = [], 0
    for expert, members in enumerate(experts.flatten().bincount(minlength=count).tolist()):
        table += [(expert, low, min(tile, first + members - low)) for low in range(first, first + members, tile)]
        first += members
    table += [(0, 0, 0)] * (most_tiles(tokens, top_k, count, tile) - len(table))
    tiles = torch.tensor(table, dtype=torch.int32, device=logits.device)
    return weights, experts.int(), rows.int(), tiles


def gated_experts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """`Gate(alpha, limit)` of `x` [T, K] for each of its rows, `weight` [E, 2 I, K] = (gate, up): [R, I].

    `bias` [E, 2 I]; `chosen` is [experts, rows, tiles] of `Chosen`; `adapters` and `where` as `_adapters` makes them.
    """
    y = _projected(x, weight, bias, chosen, adapters, where, from_tokens=True)
    gate, up = y.chunk(2, dim=-1)
    if limit <= 0:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def summed_experts(
    inner: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
) -> Tensor:
    """`inner` [R, K] by `weight` [E, N, K] and, times `weights` [T, k], summed over each token's rows: [T, N].

    `bias` [E, N]; the rest as for `gated_experts`.
    """
    y = _projected(inner, weight, bias, chosen, adapters, where, from_tokens=False)
    parts = y.view(*weights.shape, -1) * weights.unsqueeze(-1)
    return parts.sum(1).to(inner.dtype)


def _projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
    *,
    from_tokens: bool,
) -> Tensor:
    """[R, N] in x's dtype, adapters and bias summed in float32."""
    experts, rows, tiles = chosen
    top_k = experts.shape[1]
    y = x.new_empty((len(rows), weight.shape[1]))
    for expert, first, count in tiles.tolist():
        if count == 0:
            continue
        some = rows[first : first + count]
        tokens = some // top_k
        own = x[tokens if from_tokens else some]
        out = F.linear(own, weight[expert])
        if adapters:
            a, b, pages, scales, owners = adapters
            held, by = pages[owners[tokens], where[1]], scales[owners[tokens], where[1]]
            out = _amended(out.float(), own, expert, a, b, held, by)
        if bias is not None:
            out = out.float() + bias[expert].float()
        y[some] = out.to(x.dtype)
    return y


def _amended(out: Tensor, x: Tensor, expert: int, a: Tensor, b: Tensor, pages: Tensor, scales: Tensor) -> Tensor:
    """`out` [n, N] plus what `pages` [n, W] of `expert`, times `scales`, make of `x` [n, K]."""
    slices, ranks = a.shape[2:4]
    width = out.shape[1] // slices
    for mix in pages.unique(dim=0):
        there = mix >= 0
        if not there.any():
            continue
        same, held = (pages == mix).all(1), mix[there]
        scale = scales[same][:, there].repeat_interleave(ranks, 1)
        b_RN = b[held, expert].flatten(0, 1)
        for s in range(slices):
            h = (x[same].to(a.dtype) @ a[held, expert, s].flatten(0, 1).T).float() * scale
            columns = slice(s * width, (s + 1) * width)
            out[same, columns] += (h.to(b.dtype) @ b_RN[:, columns]).float()
    return out


def _choose_fake(
    y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int], top_k: int, normalised: bool, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = y.shape

    def ints(*shape: int) -> Tensor:
        return y.new_empty(shape, dtype=torch.int32)

    tiles = ints(most_tiles(tokens, top_k, experts, tile), 3)
    return y.new_empty((tokens, top_k), dtype=torch.float32), ints(tokens, top_k), ints(tokens * top_k), tiles


def _gated_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    return x.new_empty((chosen[1].shape[0], weight.shape[1] // 2))


def _summed_fake(
    inner: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
) -> Tensor:
    return inner.new_empty((weights.shape[0], weight.shape[1]))


_KERNELS = "aiolora.ops.kernels.experts"
choose_experts_op = define(choose_experts, fake=_choose_fake, cuda=_KERNELS)
gated_experts_op = define(
    gated_experts,
    fake=_gated_fake,
    cuda=_KERNELS,
)
summed_experts_op = define(
    summed_experts,
    fake=_summed_fake,
    cuda=_KERNELS,
)
