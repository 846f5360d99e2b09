"""The four drivers of a flow: for functions, coroutine functions, generators and async generators.

A driver obeys: it runs operations on the backend, calls the user's function, sleeps, and sends back what came of it
with the time. Every rule is in `_flow.py`.

Under asyncio an operation once sent is never cancelled: it runs in a task of its own. What a cancelled waiter was
granted all the same is given back as never sent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from time import monotonic
from typing import TYPE_CHECKING, Any

from stable_openai._flow import Attempt, Deliver, Flow, Outcome, Raised, Returned, Sleep, Started
from stable_openai._ops import Acquire, Closing, Granted, Settle

if TYPE_CHECKING:
    from stable_openai._worker import Worker

__all__ = ["adrive", "adrive_generator", "drive", "drive_generator"]

log = logging.getLogger("stable_openai.waiting")


def drive(flow: Flow, worker: Worker, backend: Any, attempt: Callable[[Granted], Outcome] | None = None) -> Any:
    """Drive a flow in this thread; returns what it returns."""
    send = flow.send
    try:
        effect = next(flow)
        while True:
            kind = type(effect)
            if kind is Attempt:
                value: Any = attempt(effect.lease)  # type: ignore[misc]
            elif kind is Sleep:
                value = None
                sleep(worker, effect)
            else:
                try:
                    value = backend.run(effect)
                except Exception as error:
                    effect = flow.throw(error)
                    continue
            effect = send((monotonic(), value))
    except StopIteration as stop:
        return stop.value


async def adrive(
    flow: Flow, worker: Worker, backend: Any, attempt: Callable[[Granted], Awaitable[Outcome]] | None = None
) -> Any:
    """Drive a flow on the running event loop."""
    send = flow.send
    try:
        effect = next(flow)
        while True:
            kind = type(effect)
            if kind is Attempt:
                value: Any = await attempt(effect.lease)  # type: ignore[misc]
            elif kind is Sleep:
                value = None
                await asleep(worker, effect)
            else:
                try:
                    value = await arun(worker, backend, effect)
                except Exception as error:
                    effect = flow.throw(error)
                    continue
            effect = send((monotonic(), value))
    except StopIteration as stop:
        return stop.value


def drive_generator(
    flow: Flow, worker: Worker, backend: Any, start: Callable[[Granted], Generator[Any, Any, Any]]
) -> Generator[Any, Any, Any]:
    """Drive a flow whose attempt is a generator: retried only before its first item."""
    inner: Generator[Any, Any, Any] | None = None
    first: Any = None
    value: Any
    failure: Exception | None
    effect = next(flow)
    while True:
        kind, value, failure = type(effect), None, None
        if kind is Attempt:
            try:
                inner = start(effect.lease)
                first = next(inner)
                value = Started()
            except StopIteration as stop:
                value = Returned(stop.value)
            except BaseException as error:
                value = Raised(error)
        elif kind is Deliver:
            assert inner is not None
            try:
                value = yield from _deliver(inner, first)
            except GeneratorExit as error:  # closed, and the inner one with it
                value = Raised(error)
        elif kind is Sleep:
            value = None
            sleep(worker, effect)
        else:
            try:
                value = backend.run(effect)
            except Exception as error:
                failure = error
        try:
            effect = flow.send((monotonic(), value)) if failure is None else flow.throw(failure)
        except StopIteration as stop:
            return result(stop.value)


def _deliver(inner: Generator[Any, Any, Any], item: Any) -> Generator[Any, Any, Outcome]:
    """Pass the items on, and back what is sent or thrown in."""
    try:
        while True:
            try:
                sent = yield item
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as error:
                item = inner.throw(error)
            else:
                item = inner.send(sent)
    except StopIteration as stop:
        return Returned(stop.value)
    except GeneratorExit:
        raise
    except BaseException as error:
        return Raised(error)


async def adrive_generator(
    flow: Flow, worker: Worker, backend: Any, start: Callable[[Granted], AsyncGenerator[Any, Any]]
) -> AsyncGenerator[Any, Any]:
    """Drive a flow whose attempt is an async generator."""
    inner: AsyncGenerator[Any, Any] | None = None
    item: Any = None
    value: Any
    failure: Exception | None
    effect = next(flow)
    try:
        while True:
            kind, value, failure = type(effect), None, None
            if kind is Attempt:
                try:
                    inner = start(effect.lease)
                    item = await inner.__anext__()
                    value = Started()
                except StopAsyncIteration:
                    value = Returned(None)
                except BaseException as error:
                    value = Raised(error)
            elif kind is Deliver:
                assert inner is not None
                try:
                    while True:
                        try:
                            sent = yield item
                        except GeneratorExit:
                            raise
                        except BaseException as error:
                            item = await inner.athrow(error)
                        else:
                            item = await inner.asend(sent)
                except StopAsyncIteration:
                    value = Returned(None)
                except BaseException as error:
                    value = Raised(error)
            elif kind is Sleep:
                value = None
                await asleep(worker, effect)
            else:
                try:
                    value = await arun(worker, backend, effect)
                except Exception as error:
                    failure = error
            try:
                effect = flow.send((monotonic(), value)) if failure is None else flow.throw(failure)
            except StopIteration as stop:
                result(stop.value)
                return
    finally:
        if inner is not None:
            await inner.aclose()


def result(outcome: Outcome | None) -> Any:
    """What the call comes to: the user's result, or the user's error, unchanged. (None: the flow was finalised first,
    in a cycle that the garbage collector found.)"""
    if outcome is None:
        return None
    if type(outcome) is Raised:
        raise outcome.error
    return outcome.value  # type: ignore[union-attr]


def sleep(worker: Worker, effect: Sleep) -> None:
    from time import sleep as block

    _warn_on_a_loop()
    if effect.refusal is None or effect.refusal.exact:
        block(effect.seconds)
    else:
        worker.line.wait(effect.seconds)


async def asleep(worker: Worker, effect: Sleep) -> None:
    import asyncio

    if effect.refusal is None or effect.refusal.exact:
        await asyncio.sleep(effect.seconds)
    else:
        await worker.line.await_(effect.seconds)


def _warn_on_a_loop() -> None:
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        log.warning(
            "wait.blocks_loop: a sync call waits on the thread of a running event loop; decorate a coroutine function"
        )


async def arun(worker: Worker, backend: Any, op: Any) -> Any:
    """Run an operation that goes on when the caller is cancelled."""
    if backend.local:
        return backend.run(op)
    import asyncio

    task = asyncio.ensure_future(backend.arun(op))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done() or type(op) is Acquire:
            _keep(worker, asyncio.ensure_future(_finish(worker, backend, op, task)))
        raise


async def _finish(worker: Worker, backend: Any, op: Any, task: Awaitable[Any]) -> None:
    try:
        reply = await task
        if type(op) is Acquire and isinstance(reply, list):
            granted = [answer for answer in reply if type(answer) is Granted]
            closings = tuple(Closing(one.id, one.account, one.key, op.asks[0].model, "unsent") for one in granted)
            if closings:
                await backend.arun(Settle(op.to, op.ttl_ms, closings))
                worker.line.wake()
    except Exception as error:
        if type(op) is Settle:
            worker.pending.extend((op.to, closing) for closing in op.closings)
        log.warning("operation.lost pool=%s op=%s error=%s", worker.pool, type(op).__name__, type(error).__name__)


def _keep(worker: Worker, task: Any) -> None:
    """Hold a task until it is done: a loop itself holds tasks only weakly."""
    worker.tasks.add(task)
    task.add_done_callback(worker.tasks.discard)
