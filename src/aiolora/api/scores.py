"""How many scores of a prompt's tokens fit into one answer."""

from collections.abc import Sequence

from aiolora.engine.output import Assembler
from aiolora.errors import RequestError

MAX_SCORED = (
    250_000  # of all prompts, in all choices: each becomes some 60 bytes, written in one call with the GIL held
)


def check_scored(assemblers: Sequence[Assembler], *, param: str, copies: int = 1) -> None:
    """Raises `RequestError` about `param` where too many were asked for; `copies`: choices that each repeat them."""
    asked = assemblers[0].request.params.prompt_logprobs
    if asked is None:
        return
    each = copies * (asked + 1)
    tokens = sum(len(assembler.request.prompt_token_ids) for assembler in assemblers)
    if tokens * each > MAX_SCORED:
        raise RequestError(
            f"{tokens} prompt tokens with {each} scores each are {tokens * each}, at most {MAX_SCORED} fit into an "
            "answer; send fewer prompts, or ask for fewer prompt_logprobs or a smaller n",
            param=param,
        )
