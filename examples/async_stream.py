"""The main job in asyncio: three streams at once, each through its own adapter, all in one batch."""

import asyncio

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams

ADAPTERS = [LoRARequest(name, number, f"examples/adapters/{name}") for number, name in enumerate(("sql", "pirate"), 1)]


async def main() -> None:
    args = EngineArgs(model="smollm2-135m", enable_lora=True)
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        for adapter in ADAPTERS:
            await engine.add_lora(adapter)

        async def ask(lora: str | None) -> None:
            messages = [{"role": "user", "content": "Tell me about a cat."}]
            answer = ""
            async for token in engine.stream(messages, SamplingParams(temperature=0, max_tokens=24), lora=lora):
                answer += token.text
            print(f"{lora or 'base'}: {answer}")

        await asyncio.gather(ask(None), ask("sql"), ask("pirate"))


asyncio.run(main())
