"""The chain of resolvers: one call a name, a time limit, faults that stay where they are, names that nobody knows."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable

import pytest

from aiolora.errors import AdapterError, AdapterFormatError, AdapterResolveError, EngineDeadError
from aiolora.lora import resolving
from aiolora.lora.resolver import LoRAResolver, LoRAResolverRegistry
from aiolora.lora.resolving import Resolving
from aiolora.types import LoRARequest


class Answers(LoRAResolver):
    """Gives what `answer` gives, once `gate` is open."""

    def __init__(self, answer: Callable[[str], object]) -> None:
        self.answer, self.asked, self.cancelled = answer, list[tuple[str, str]](), 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        self.asked.append((base_model_name, lora_name))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.answer(lora_name)  # type: ignore[return-value]


class Chain:
    """`Resolving` over some resolvers, with what it has loaded and a clock that stands still."""

    def __init__(self, *resolvers: LoRAResolver, timeout_s: float = 60) -> None:
        self.loaded: list[LoRARequest] = []
        self.now = 0.0
        chosen = {f"r{number}": resolver for number, resolver in enumerate(resolvers)}
        self.resolving = Resolving("base", chosen, self._load, timeout_s=timeout_s, clock=lambda: self.now)

    async def _load(self, request: LoRARequest) -> None:
        await asyncio.sleep(0)
        if request.lora_path == "broken":
            raise AdapterFormatError(request.lora_name, "broken")
        self.loaded.append(request)

    async def resolve(self, name: str) -> bool:
        return await self.resolving.resolve(name)


def found(name: str) -> LoRARequest:
    return LoRARequest(name, 7, f"/somewhere/{name}")


def nothing(_: str) -> None:
    return None


def failing(_: str) -> None:
    raise ConnectionError("s3://key:secret@host")


def knowing_none() -> Answers:
    return Answers(nothing)


@pytest.fixture(autouse=True)
async def nobody_is_left_behind() -> AsyncIterator[None]:
    yield
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_resolvers_are_asked_in_order_until_one_knows() -> None:
    first, second, third = knowing_none(), Answers(found), Answers(found)
    chain = Chain(first, second, third)
    assert await chain.resolve("org/sql")
    assert chain.loaded == [found("org/sql")]
    assert first.asked == second.asked == [("base", "org/sql")]
    assert third.asked == []


async def test_registered_resolvers_come_after_the_chosen_ones_whenever_they_registered() -> None:
    chain, late = Chain(knowing_none()), Answers(found)
    LoRAResolverRegistry.register_resolver("late", late)
    try:
        assert "late" in LoRAResolverRegistry.get_supported_resolvers()
        assert LoRAResolverRegistry.get_resolver("late") is late
        assert await chain.resolve("sql")
    finally:
        LoRAResolverRegistry.remove_resolver("late")
    assert not await chain.resolve("other")


async def test_twenty_who_ask_together_cost_one_call_and_one_load() -> None:
    resolver = Answers(found)
    resolver.gate.clear()
    chain = Chain(resolver)
    asking = [asyncio.ensure_future(chain.resolve("sql")) for _ in range(20)]
    await asyncio.sleep(0)
    resolver.gate.set()
    assert await asyncio.gather(*asking) == [True] * 20
    assert len(resolver.asked) == len(chain.loaded) == 1


async def test_one_who_leaves_takes_it_from_nobody_and_the_last_one_ends_it() -> None:
    resolver = Answers(found)
    resolver.gate.clear()
    chain = Chain(resolver)
    asking = [asyncio.ensure_future(chain.resolve("sql")) for _ in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    for task in asking[:2]:
        task.cancel()
    await asyncio.wait(asking[:2])
    assert resolver.cancelled == 0
    asking[2].cancel()
    await asyncio.wait(asking)
    for _ in range(3):
        await asyncio.sleep(0)
    assert resolver.cancelled == 1
    resolver.gate.set()
    assert await chain.resolve("sql"), "what was left is asked anew"


async def test_a_resolver_that_fails_does_not_end_the_chain() -> None:
    chain = Chain(Answers(failing), Answers(found))
    assert await chain.resolve("sql")


async def test_where_nobody_knows_and_one_failed_the_error_names_it_without_its_words() -> None:
    chain = Chain(knowing_none(), Answers(failing), knowing_none())
    with pytest.raises(AdapterResolveError, match=r"'sql'.*'r1' \(ConnectionError\)") as caught:
        await chain.resolve("sql")
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)
    with pytest.raises(AdapterResolveError):
        await chain.resolve("sql")  # a failure is not remembered: it may be over


async def test_a_resolver_that_never_answers_is_given_up_and_the_next_one_asked() -> None:
    slow = Answers(found)
    slow.gate.clear()
    chain = Chain(slow, Answers(found), timeout_s=0.01)
    assert await chain.resolve("sql")
    await asyncio.sleep(0)
    assert slow.cancelled == 1


async def test_a_resolver_that_ignores_its_cancellation_holds_nobody_up() -> None:
    over = asyncio.Event()

    class Deaf(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            while not over.is_set():
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    continue
            return None

    chain = Chain(Deaf(), timeout_s=0.01)
    with pytest.raises(AdapterResolveError, match="TimeoutError"):
        await chain.resolve("sql")
    over.set()


async def test_a_resolver_that_cancels_itself_cancels_nobody() -> None:
    def cancel(_: str) -> None:
        raise asyncio.CancelledError

    with pytest.raises(AdapterResolveError, match="RuntimeError"):
        await Chain(Answers(cancel)).resolve("sql")


@pytest.mark.parametrize("answer", [lambda _: found("other"), lambda _: "a path", lambda name: {"lora_name": name}])
async def test_what_is_no_request_for_the_name_asked_for_is_refused(answer: Callable[[str], object]) -> None:
    chain = Chain(Answers(answer))
    with pytest.raises(AdapterResolveError):
        await chain.resolve("sql")
    assert chain.loaded == []


async def test_an_unknown_name_is_not_asked_for_again_until_a_while_has_passed() -> None:
    resolver = knowing_none()
    chain = Chain(resolver)
    assert not await chain.resolve("sql")
    chain.now = 9.9
    assert not await chain.resolve("sql")
    assert len(resolver.asked) == 1
    chain.now = 10.0
    resolver.answer = found
    assert await chain.resolve("sql")


async def test_unknown_names_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "_MAX_UNKNOWN", 4)
    resolver = knowing_none()
    chain = Chain(resolver)
    for number in range(10):
        assert not await chain.resolve(f"n{number}")
    assert not await chain.resolve("n9")
    assert len(resolver.asked) == 10
    assert not await chain.resolve("n0")
    assert len(resolver.asked) == 11, "the oldest is forgotten"


async def test_names_are_resolved_side_by_side_up_to_a_limit_and_the_rest_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "_WAITING", 20)
    resolver = Answers(found)
    resolver.gate.clear()
    chain = Chain(resolver)
    asking = [asyncio.ensure_future(chain.resolve(f"n{number}")) for number in range(20)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(resolver.asked) == 16
    with pytest.raises(AdapterResolveError, match="20 other names"):
        await chain.resolve("one more")
    resolver.gate.set()
    assert await asyncio.gather(*asking) == [True] * 20


async def test_an_adapter_that_was_found_but_cannot_be_loaded_says_why_to_all_who_asked() -> None:
    chain = Chain(Answers(lambda name: LoRARequest(name, 1, "broken")))
    told = await asyncio.gather(*(chain.resolve("sql") for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in told] == [AdapterFormatError] * 3


@pytest.mark.parametrize("resolver", [Answers(lambda name: LoRARequest(name, 7, "broken")), Answers(failing)])
async def test_an_error_keeps_nobody_alive_who_has_got_it(resolver: Answers, caplog: pytest.LogCaptureFixture) -> None:
    """It leads to the frames of who asked, so to their requests: nothing of it may wait for a collection."""

    async def asking() -> "weakref.ref[Exception]":
        try:
            await Chain(resolver).resolve("x")
        except AdapterError as error:
            return weakref.ref(error)
        raise AssertionError("it is found")

    gc.disable()
    try:
        error = await asking()
        caplog.clear()
        for _ in range(3):
            await asyncio.sleep(0)
        assert error() is None
    finally:
        gc.enable()


async def test_stopping_ends_every_question() -> None:
    resolver = Answers(found)
    resolver.gate.clear()
    chain = Chain(resolver)
    asking = asyncio.ensure_future(chain.resolve("sql"))
    for _ in range(3):
        await asyncio.sleep(0)
    chain.resolving.stop()
    with pytest.raises(EngineDeadError):
        await asking


_OUT = ("../sql", "a/../sql", "a/..", "..", ".", "/etc", "a//b", "a/", "", "a/ .. /b", "%2e%2e/sql", "a\\b")


@pytest.mark.parametrize("name", [*_OUT, "a\0", "a\n", "\ud800", "a" * 257])
async def test_names_that_could_lead_out_of_a_path_are_shown_to_no_resolver(name: str) -> None:
    resolver = Answers(found)
    assert not await Chain(resolver).resolve(name)
    assert resolver.asked == []
