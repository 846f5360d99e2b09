"""LangChain's ChatOpenAI with the drop-in clients inside: every request of a chain leases a key.

    pip install stable-openai langchain-openai
    STABLE_OPENAI_KEYS=sk-...,sk-... python examples/langchain_chat.py

All four fields are given, since ChatOpenAI makes clients of its own for those that are missing; and not
`http_client`, under which those would lack the keys. See threads.py for how to try it without keys.
"""

from __future__ import annotations

import asyncio

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from stable_openai import AsyncOpenAI, KeyManager, Limits, OpenAI

manager = KeyManager(limits=Limits(rpm=500, concurrency=2))
client, async_client = OpenAI(), AsyncOpenAI()
chat = ChatOpenAI(
    model="gpt-4o-mini",
    root_client=client,
    client=client.chat.completions,
    root_async_client=async_client,
    async_client=async_client.chat.completions,
)


class Rating(BaseModel):
    stars: int = Field(ge=1, le=5)


def main(prompts: list[str]) -> None:
    for answer in chat.batch(prompts):
        print(answer.text)
    print(*(chunk.text for chunk in chat.stream("Count to ten.")), sep="")
    print(chat.with_structured_output(Rating).invoke("Rate: the food was cold."))


async def amain(prompts: list[str]) -> None:
    for answer in await chat.abatch(prompts):
        print(answer.text)
    print(*[chunk.text async for chunk in chat.astream("Count to ten.")], sep="")
    print(await chat.with_structured_output(Rating).ainvoke("Rate: the food was cold."))
    await manager.aclose()


if __name__ == "__main__":
    questions = [f"What is {number} times {number}?" for number in range(10)]
    main(questions)
    asyncio.run(amain(questions))
