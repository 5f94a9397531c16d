"""All tokens of a step as one sequence of vectors, where attention alone tells the sequences apart: ours."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from aiolora.errors import UnsupportedModelError
from aiolora.models.adopted import PROBE, Rows
from aiolora.models.attends import MASK, OURS, REHEARSED, Attends, Audience, Holds, Seat, Turn, answer_by, seat


@dataclass(frozen=True)
class Together:
    """A trunk whose layers attend through transformers' attention interface."""

    output: type[ModelOutput]  # what the trunk returns
    rows: list[str]  # its projections that see a row a token
    attends: Mapping[nn.Module, Attends]

    @classmethod
    def rehearsed(cls, trunk: nn.Module, weight: Tensor, longest: int) -> "Together":
        """Run `trunk` once on vectors like those of the embedding's `weight`; masks are compared over `longest`.

        Raises as `fallback.rehearse`.
        """
        audience = Audience(longest)
        modules = list(trunk.modules())
        for module in modules:
            seat(module, audience)
        answer_by(trunk, REHEARSED)
        rows = Rows(trunk)
        positions = torch.arange(PROBE, device=weight.device).unsqueeze(0)
        nothing_padded = torch.ones_like(positions)  # else it looks whether positions are those of one sequence
        try:
            x = weight.new_zeros((1, PROBE, weight.shape[1]))
            with torch.no_grad():
                output = trunk(inputs_embeds=x, attention_mask=nothing_padded, position_ids=positions, use_cache=False)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            if MASK in str(error):
                raise UnsupportedModelError(
                    "its layers compute attention themselves, not through transformers' attention interface"
                ) from error
            raise not_run(error, weight) from error
        finally:
            for module in modules:
                seat(module, None)
            found = list(rows.done())
        if not audience.found:
            raise UnsupportedModelError("its layers do not attend through transformers' attention interface")
        return cls(type(output), found, audience.found)

    @property
    def holds(self) -> list[Holds]:
        return list(self.attends.values())

    def begin(self, trunk: nn.Module, turn: Turn, device: str) -> None:
        """From now on `run` is what `trunk` is for."""
        for module, how in self.attends.items():
            unrotated = torch.cat((torch.ones(1, how.width // 2), torch.zeros(1, how.width // 2)), dim=1)
            seat(module, Seat(how, turn, unrotated.to(device)))
        answer_by(trunk, OURS)

    def run(self, trunk: nn.Module, x: Tensor, turn: Turn) -> Tensor:
        """Hidden states [T, H] of the vectors `x` [T, E] of the step that it is the turn of."""
        assert turn.step is not None
        positions = turn.step.positions.long().unsqueeze(0)
        out = trunk(inputs_embeds=x.unsqueeze(0), position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def not_run(error: Exception, weight: Tensor) -> Exception:
    """What to raise of an `error` in a rehearsal: on "meta" it may be that values are asked for."""
    if isinstance(error, NotImplementedError) or (weight.is_meta and "meta" in str(error)):
        return NotImplementedError("what it does depends on values")
    return UnsupportedModelError(f"its code does not run on vectors alone: {type(error).__name__}: {error}")
