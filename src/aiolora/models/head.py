"""What adapters do to the head, over logits that were computed for all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.models.inputs import HeadInputs
from aiolora.ops.blocks import own_logits_op
from aiolora.ops.linear import Partial, Site, complete_op, shrink_op


def amended(logits: Tensor, hidden: Tensor, adapters: HeadInputs, site: Site | None) -> Tensor:
    """`logits` [S, V], the head's product with `hidden` [S, H] and nothing more, with rows and factors of adapters.

    Wider where an adapter has added tokens. May write to `logits`.
    """
    routing, vocabulary = adapters.routing, logits.shape[1]
    if adapters.widest > vocabulary:
        logits = F.pad(logits, (0, adapters.widest - vocabulary))
    if adapters.own is not None:
        own_logits_op(logits, hidden, *adapters.own, routing.perm, routing.tiles, routing.tile)
    if site is None or not adapters.low_rank:
        return logits
    tables = [routing.perm, routing.tiles, routing.items, routing.pages, routing.scales]
    h = shrink_op(hidden, site.a, tables, [site.kind, routing.tile])
    of_base: Tensor = complete_op(*Partial(logits[:, :vocabulary].contiguous(), None, h, site, routing).flat)
    return of_base if logits.shape[1] == vocabulary else torch.cat((of_base, logits[:, vocabulary:]), dim=1)


def known(logits: Tensor, adapters: HeadInputs, vocabulary: int) -> Tensor:
    """`logits` [S, V or more] with -inf for tokens that a row's own adapter, or the base of `vocabulary`, knows not."""
    if adapters.vocabularies is None:
        return logits
    known = torch.where(adapters.vocabularies > 0, adapters.vocabularies, vocabulary)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill(ids >= known.unsqueeze(1), -torch.inf)
