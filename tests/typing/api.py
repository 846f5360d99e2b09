"""The public API as its users see it: checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
from tenacity import stop_after_attempt, wait_none
from typing_extensions import assert_type

from stable_openai import INJECTED, Exhausted, Key, KeyManager, Lease, Limits, Verdict, stable

manager = KeyManager(
    [
        "sk-a",
        Key("sk-b", name="b", account="org-1", limits=Limits(rpm=60), models=["gpt-4o*"], weight=1),
    ],
    redis="redis://localhost:6379/0",
    pool="default",
    limits=Limits(rpm=500, rpd=10_000, tpm=200_000, tpd=None, concurrency=None, rule="bucket", tz="UTC"),
    models={"gpt-4o*": Limits(rpm=100)},
    on_redis_down="local",
    lease_ttl=60.0,
    max_wait=600.0,
    headroom_s=0.25,
)


@stable
def plain(prompt: str, api_key: str = INJECTED) -> str:
    return prompt


@stable(manager=manager, model="gpt-4o", tokens=100, max_wait=5, stop=stop_after_attempt(3), wait=wait_none())
async def coroutine(prompt: str, client: openai.AsyncOpenAI = INJECTED) -> int:
    return 1


@stable(tokens=lambda prompt: len(prompt))
def items(prompt: str, lease: Lease = INJECTED) -> Iterator[str]:
    lease.report(tokens=3, status=200, headers={"x": "y"})
    yield prompt


@stable()
async def async_items(prompt: str, base_url: str | None = INJECTED) -> AsyncIterator[str]:
    yield prompt


class Service:
    @stable
    def method(self, prompt: str, api_key: str = INJECTED) -> bytes:
        return b""


def mine(error: BaseException) -> Verdict | None:
    return Verdict("account", "move", "my_reason", wait_s=3.0) if isinstance(error, OSError) else None


@stable(classify=mine)
def classified(api_key: str = INJECTED) -> None: ...


async def use() -> None:
    assert_type(plain("x"), str)
    assert_type(plain("x", api_key="mine"), str)
    assert_type(await coroutine("x"), int)
    assert_type(list(items("x")), list[str])
    assert_type([item async for item in async_items("x")], list[str])
    assert_type(Service().method("x"), bytes)
    with manager.lease(model="gpt-4o", tokens=10, max_wait=1) as lease:
        assert_type(lease.api_key, str)
        assert_type(lease.key, Key)
    async with manager.lease() as lease:
        assert_type(lease.id, str)
    for key in manager.status().keys:
        assert_type(key.seconds, float | None)
    await manager.adisable("b", seconds=10)
    try:
        plain("x")
    except Exhausted as error:
        assert_type(error.retry_after, float | None)
    plain(1)  # type: ignore[arg-type]
    plain()  # type: ignore[call-arg]
