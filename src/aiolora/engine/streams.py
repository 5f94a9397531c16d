"""Streams: requests under way, and whom what the engine says of each is for, on the loop."""

import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial

from msgspec import structs

from aiolora.engine.beside import beside, takes_long
from aiolora.engine.core import Engine, Message
from aiolora.engine.mailbox import Mailbox
from aiolora.engine.output import Assembler
from aiolora.errors import RequestError
from aiolora.types import Mix, Request, TokenDelta, TokenOutput


class Streams:
    """From prepared requests to their tokens. `post` gives the engine thread a message; `charge` hears of every token.

    The engine knows a request by a ticket that is never used twice. Owned by the loop.
    """

    def __init__(self, post: Callable[[Message], None], charge: Callable[[Mix | None, int], None]) -> None:
        self._post = post
        self._charge = charge
        self._mailboxes: dict[str, Mailbox] = {}  # by ticket
        self._tickets: dict[str, Request] = {}  # request id -> the request as the engine knows it: no id is used twice
        self._num_tickets = itertools.count()

    async def run(self, assemblers: Sequence[Assembler]) -> AsyncGenerator[list[tuple[int, TokenOutput]], None]:
        """As `AsyncLLMEngine.run`."""
        requests = [assembler.request for assembler in assemblers]
        taken = next((request.id for request in requests if request.id in self._tickets), None)
        if taken is not None:
            raise RequestError(f"request_id {taken!r} is in use; give each request its own", param="request_id")
        # a delta of a request that was left may still be on its way when its id is used again: tickets tell them apart
        tickets = [
            structs.replace(request, id=f"{request.id}#{next(self._num_tickets)}", held=None)  # it has books
            for request in requests
        ]
        positions = {ticket.id: position for position, ticket in enumerate(tickets)}
        mailbox = Mailbox()
        delta: TokenDelta | None = None
        try:
            for request, ticket in zip(requests, tickets):
                self._tickets[request.id] = ticket
                self._mailboxes[ticket.id] = mailbox
                self._post(partial(_add, request=ticket))
                self._charge(request.mix, len(request.prompt_token_ids))
            unfinished = set(positions.values())
            while unfinished:
                burst = []
                for delta in await mailbox.get():
                    position = positions[delta.request_id]
                    assembler = assemblers[position]
                    if takes_long(delta.prompt_logprobs):
                        await beside(True, assembler.take_prompt, delta)
                    output = assembler.feed(delta)
                    if assembler.finished:
                        unfinished.discard(position)
                    if output is None:
                        continue
                    self._charge(requests[position].mix, 1)
                    if output.finish_reason is not None and delta.finish_reason is None:
                        self._abort(delta.request_id, delta.index)  # a stop string, which only text can show
                    burst.append((position, output))
                if burst:
                    yield burst
        finally:
            delta = None  # its error leads to this frame, which must not lead to the error
            for assembler, ticket in zip(assemblers, tickets):
                self._tickets.pop(assembler.request.id, None)
                self._mailboxes.pop(ticket.id, None)
                if not assembler.finished:
                    self._abort(ticket.id)

    def abort(self, request_id: str) -> None:
        """As `AsyncLLMEngine.abort`."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._abort(ticket.id)
            for index in range(ticket.params.n):
                self._mailboxes[ticket.id].put(TokenDelta(ticket.id, index, token_id=None, finish_reason="abort"))

    def deliver(self, deltas: Iterable[TokenDelta]) -> None:
        """What one step brought, onto each stream."""
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:
                mailbox.put(delta)

    def fail(self, error: BaseException) -> None:
        """The engine has stopped: say so to every stream."""
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    def _abort(self, ticket: str, index: int | None = None) -> None:
        self._post(lambda engine: engine.abort(ticket, index))


def _add(engine: Engine, *, request: Request) -> None:
    engine.add(request)
