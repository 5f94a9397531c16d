"""Bridge: between the asyncio loop and the engine thread.

Down: a message into a queue, once a request. Up: one `call_soon_threadsafe` a step with all its deltas.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread

from aiolora.engine.core import Engine, Message, Snapshot
from aiolora.engine.interpreter import INTERPRETER
from aiolora.errors import AioloraError, EngineDeadError
from aiolora.types import TokenDelta

T = TypeVar("T")


class Bridge:
    """The engine's thread, and the two ways across. Owned by the loop it is made on; `to_loop` and `post`: any thread.

    `deliver` is called on the loop with what each step brought, `fail` once when the thread has ended.
    """

    def __init__(
        self, deliver: Callable[[list[TokenDelta], Snapshot], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._tell_failure = fail
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._stopping = False
        self._questions: set[asyncio.Future[Any]] = set()  # to the engine thread, not answered
        self.death: BaseException | None = None  # why the thread has ended

    def start(self, engine: Engine) -> None:
        """Let `engine` step in a thread of its own from now on."""
        INTERPRETER.engine_starts()
        self._thread = threading.Thread(target=self._run, args=(engine,), name="aiolora-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread with its step; `fail` hears that it was shut down."""
        self._stopping = True
        self.post(lambda _: None)  # it may be waiting
        if self._thread is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._thread.join)
            INTERPRETER.engine_ends()
        self._fail(RuntimeError("it was shut down"))

    def check(self) -> None:
        """Raise `EngineDeadError` once the thread has ended."""
        if self.death is not None:
            raise EngineDeadError(f"the engine has stopped: {self.death}") from self.death

    def post(self, message: Message) -> None:
        """The engine thread does it between two steps, in the order posted.

        Finalisers post, and Python may run one at any moment of any thread, of this very call too: the queue bears it.
        """
        self._inbox.put(message)

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """As `post`, with an answer: what it returns, or the `AioloraError` it raises."""
        self.check()
        answer: asyncio.Future[T] = self._loop.create_future()
        self._questions.add(answer)
        answer.add_done_callback(self._questions.discard)

        def asked(engine: Engine) -> None:
            try:
                self.to_loop(partial(_resolve, answer, question(engine)))
            except AioloraError as error:
                self.to_loop(partial(_reject, answer, error))

        self.post(asked)
        return await answer

    def to_loop(self, call: Callable[[], None]) -> None:
        """The loop calls it soon."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(call)

    def _fail(self, error: BaseException) -> None:
        self.death = self.death or error
        self._tell_failure(self.death)
        for question in list(self._questions):
            _reject(question, EngineDeadError(f"the engine has stopped: {self.death}"))

    def _run(self, engine: Engine) -> None:
        """The engine thread."""
        try:
            working = True
            while not self._stopping:
                self._listen(engine, wait=not working)
                working = engine.has_work and not engine.stalled and not self._stopping
                deltas = engine.step() if working else []
                self.to_loop(partial(self._deliver, deltas, engine.snapshot()))
        except BaseException as error:
            self.to_loop(partial(self._fail, error))

    def _listen(self, engine: Engine, *, wait: bool) -> None:
        """Do all that was posted; `wait` until there is something."""
        while True:
            try:
                message = self._inbox.get(wait)
            except queue.Empty:
                return
            message(engine)
            del message  # and all that it holds
            wait = False


def _resolve(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _reject(answer: asyncio.Future[Any], error: AioloraError) -> None:
    if not answer.done():
        answer.set_exception(error)
