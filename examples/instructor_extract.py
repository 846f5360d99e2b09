"""Instructor on the drop-in clients: every request, a repeated one too, leases a key.

    pip install stable-openai instructor
    STABLE_OPENAI_KEYS=sk-...,sk-... python examples/instructor_extract.py

See threads.py for how to try it without keys.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import instructor
from pydantic import BaseModel, Field

from stable_openai import AsyncOpenAI, KeyManager, Limits, OpenAI

manager = KeyManager(limits=Limits(rpm=500, concurrency=2))
client = instructor.from_openai(OpenAI(), model="gpt-4o-mini")
async_client = instructor.from_openai(AsyncOpenAI(), mode=instructor.Mode.JSON_SCHEMA, model="gpt-4o-mini")


class Review(BaseModel):
    stars: int = Field(ge=1, le=5)
    complaints: list[str]


def extract(text: str) -> Review:
    return client.create(response_model=Review, messages=[{"role": "user", "content": text}])


async def aextract(text: str) -> Review:
    return await async_client.create(response_model=Review, messages=[{"role": "user", "content": text}])


async def main(texts: list[str]) -> None:
    for review in await asyncio.gather(*map(aextract, texts)):
        print(review)
    messages = [{"role": "user", "content": texts[0]}]
    async for part in async_client.create_partial(response_model=Review, messages=messages):
        print(f"so far: {part}")
    await manager.aclose()


if __name__ == "__main__":
    reviews = [f"{number} stars: the food was cold." for number in range(1, 6)]
    with ThreadPoolExecutor(5) as threads:
        print(*threads.map(extract, reviews), sep="\n")
    for part in client.create_partial(response_model=Review, messages=[{"role": "user", "content": reviews[0]}]):
        print(f"so far: {part}")
    asyncio.run(main(reviews))
