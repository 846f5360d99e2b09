"""A thousand coroutines share a few keys: each is answered, none goes over a limit.

    STABLE_OPENAI_KEYS=sk-...,sk-... python examples/async_many.py 1000

See threads.py for how to try it without keys, or with other hosts.
"""

from __future__ import annotations

import asyncio
import sys

import openai

from stable_openai import INJECTED, KeyManager, Limits, StableError, stable

manager = KeyManager(limits=Limits(rpm=5000, tpm=2_000_000, concurrency=32))


@stable(manager=manager)
async def ask(prompt: str, model: str = "gpt-4o-mini", client: openai.AsyncOpenAI = INJECTED) -> str | None:
    response = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
    return response.choices[0].message.content


async def main(count: int) -> None:
    prompts = [f"What is {number} times {number}?" for number in range(count)]
    answers = await asyncio.gather(*map(ask, prompts), return_exceptions=True)
    for prompt, answer in zip(prompts, answers):
        if isinstance(answer, (openai.OpenAIError, StableError)):
            print(f"{prompt} failed: {answer}")
        else:
            print(f"{prompt} {answer}")
    await manager.aclose()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
