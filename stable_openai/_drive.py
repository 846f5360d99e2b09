"""The four drivers of a flow: for functions, coroutine functions, generators and async generators.

A driver obeys: it runs operations on the backend, calls the user's function, waits, and sends back what came of it
with the time. Every rule is in `_flow.py` and `_obtain.py`.

Under asyncio an operation once sent is never cancelled: it runs in a task of its own. A cancellation that comes
meanwhile is held back until its reply is there (for a second, then the operation goes on by itself), and thrown into
the flow where that would next wait, or call the user's function: so that it knows what it was granted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from stable_openai._flow import Attempt, Deliver, Flow, Outcome, Raised, Returned, Sleep, Started
from stable_openai._heartbeat import heartbeat
from stable_openai._obtain import Doze, Hush, Park
from stable_openai._ops import Acquire, Closing, Granted, NotRegistered, Settle

if TYPE_CHECKING:
    from stable_openai._line import Line
    from stable_openai._waiter import Waiter
    from stable_openai._worker import Worker

__all__ = ["adrive", "adrive_generator", "drive", "drive_generator"]

log = logging.getLogger("stable_openai.waiting")
WAITS = (Park, Doze, Sleep)
PATIENCE_S = 1.0
BROKEN_S, DEAF_S = 0.1, 5.0
LISTEN_AFTER_S = 0.25  # a shorter wait is not worth a blocking pop


def drive(
    flow: Flow,
    worker: Worker,
    backend: Any,
    attempt: Callable[[Granted], Outcome] | None = None,
    delivered: Outcome | None = None,
) -> Any:
    """Drive a flow in this thread; returns what it returns.

    Where an attempt has begun what somebody else delivers (a response's stream), this returns Deliver() and the flow
    is not over: whoever delivers drives it again with what came of that, or drops it.
    """
    send = flow.send
    try:
        effect = send(None if delivered is None else (monotonic(), delivered))
        while True:
            if type(effect) is Attempt:
                value: Any = attempt(effect.lease)  # type: ignore[misc]
            elif type(effect) is Deliver:
                return effect
            else:
                try:
                    value = perform(worker, backend, effect)
                except BaseException as error:
                    effect = flow.throw(error)
                    continue
            effect = send((monotonic(), value))
    except StopIteration as stop:
        return stop.value


async def adrive(
    flow: Flow,
    worker: Worker,
    backend: Any,
    attempt: Callable[[Granted], Awaitable[Outcome]] | None = None,
    delivered: Outcome | None = None,
) -> Any:
    """The same on the running event loop."""
    send = flow.send
    cancelled: list[BaseException] = []
    effect: Any = None
    try:
        effect = send(None if delivered is None else (monotonic(), delivered))
        while True:
            if type(effect) is Attempt and not cancelled:
                value: Any = await attempt(effect.lease)  # type: ignore[misc]
            elif type(effect) is Deliver:
                return effect
            else:
                try:
                    value = await aperform(worker, backend, effect, cancelled)
                except BaseException as error:
                    effect = flow.throw(error)
                    continue
            effect = send((monotonic(), value))
    except StopIteration as stop:
        if cancelled:
            raise cancelled[0] from None
        return stop.value
    except Exception as error:
        if cancelled:
            raise cancelled[0] from error
        raise
    finally:
        if type(effect) is not Deliver:
            flow.close()


def drive_generator(
    flow: Flow, worker: Worker, backend: Any, start: Callable[[Granted], Generator[Any, Any, Any]]
) -> Generator[Any, Any, Any]:
    """Drive a flow whose attempt is a generator: retried only before its first item."""
    inner: Generator[Any, Any, Any] | None = None
    first: Any = None
    value: Any
    failure: BaseException | None
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
        else:
            try:
                value = perform(worker, backend, effect)
            except BaseException as error:
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
    failure: BaseException | None
    cancelled: list[BaseException] = []
    effect = next(flow)
    try:
        while True:
            kind, value, failure = type(effect), None, None
            if kind is Attempt and not cancelled:
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
            else:
                try:
                    value = await aperform(worker, backend, effect, cancelled)
                except BaseException as error:
                    failure = error
            try:
                effect = flow.send((monotonic(), value)) if failure is None else flow.throw(failure)
            except StopIteration as stop:
                if cancelled:
                    raise cancelled[0] from None
                result(stop.value)
                return
            except Exception as error:
                if cancelled:
                    raise cancelled[0] from error
                raise
    finally:
        if inner is not None:
            await inner.aclose()
        flow.close()


def result(outcome: Outcome | None) -> Any:
    """What the call comes to: the user's result, or the user's error, unchanged. (None: the flow was finalised first,
    in a cycle that the garbage collector found.)"""
    if outcome is None:
        return None
    if type(outcome) is Raised:
        raise outcome.error
    return outcome.value  # type: ignore[union-attr]


def perform(worker: Worker, backend: Any, effect: Any) -> Any:
    """What is neither an attempt nor a delivery, in a thread."""
    kind = type(effect)
    if kind in WAITS:
        _warn_on_a_loop()
        return pause(backend, effect)
    return effect.listener.stop() if kind is Hush else backend.run(effect)


async def aperform(worker: Worker, backend: Any, effect: Any, cancelled: list[BaseException]) -> Any:
    """The same on the running event loop. `cancelled` keeps a cancellation that was held back."""
    kind = type(effect)
    if cancelled and (kind in WAITS or kind is Attempt):
        raise cancelled.pop()
    if kind in WAITS:
        return await apause(backend, effect)
    if kind is Hush:
        return await _stop(worker, effect.listener, cancelled)
    return backend.run(effect) if backend.local else await _arun(worker, backend, effect, cancelled)


def pause(backend: Any, effect: Any) -> int | None:
    """Wait in a thread; what a Doze is answered."""
    if type(effect) is Sleep:
        sleep(effect.seconds)
    elif type(effect) is Doze:
        return _doze(backend, effect)
    else:
        _rest(effect.waiter, effect.seconds, effect.is_over)
    return None


async def apause(backend: Any, effect: Any) -> int | None:
    """The same on the running event loop."""
    if type(effect) is Doze:
        return await _adoze(backend, effect)
    if type(effect) is Park:
        await _arest(effect.waiter, effect.seconds, effect.is_over)
    elif effect.seconds > 0:
        import asyncio

        await asyncio.sleep(effect.seconds)
    return None


def _rest(waiter: Waiter, seconds: float, is_over: Callable[[], object]) -> None:
    """Block the thread until the waiter is signalled, unless what it waits for is there."""
    import threading

    if waiter.gate is None:
        waiter.gate = threading.Event()
    if not is_over():  # it may have been signalled before it had a gate
        waiter.gate.wait(min(seconds, threading.TIMEOUT_MAX))
    waiter.gate.clear()


async def _arest(waiter: Waiter, seconds: float, is_over: Callable[[], object]) -> None:
    import asyncio

    waiter.gate = asyncio.get_running_loop().create_future()
    if not is_over():
        await asyncio.wait((waiter.gate,), timeout=None if seconds > 1e9 else seconds)
    waiter.gate = None


def _doze(backend: Any, effect: Doze) -> int | None:
    """The leader waits: for the store's wake too, if that is worth a blocking pop."""
    line, waiter, seconds = effect
    if line.listener is None and seconds >= LISTEN_AFTER_S:
        line.listener = backend.listen(line.to)
    listener, quiet = line.listener, line.quiet(monotonic())
    if quiet:
        seconds = min(seconds, quiet)
    elif listener is not None and not line.nudged:
        hops: int | None = listener.wait(seconds)
        if not listener.broken:
            line.deaf_s = 0.0
            return hops
        seconds = _after_break(line, seconds, listener.refused)
    _rest(waiter, seconds, effect.is_over)
    return None


async def _adoze(backend: Any, effect: Doze) -> int | None:
    line, waiter, seconds = effect
    if line.listener is None and seconds >= LISTEN_AFTER_S:
        line.listener = backend.alisten(line.to)
    listener, quiet = line.listener, line.quiet(monotonic())
    if quiet:
        seconds = min(seconds, quiet)
    elif listener is not None and not line.nudged:
        hops: int | None = await listener.wait(seconds)
        if not listener.broken:
            line.deaf_s = 0.0
            return hops
        seconds = _after_break(line, seconds, listener.refused)
    await _arest(waiter, seconds, effect.is_over)
    return None


def _after_break(line: Line, seconds: float, refused: bool) -> float:
    """The connection was lost, or BLPOP is refused: how long to wait before another one is tried (where none lasts,
    ever less often). A wake may have been lost with it: then the leader asks."""
    line.listener = None
    line.deaf_s = min(max(2 * line.deaf_s, BROKEN_S), DEAF_S)
    if not refused:
        line.delay(monotonic(), min(seconds, line.deaf_s))
    return min(seconds, line.deaf_s)


def _warn_on_a_loop() -> None:
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        log.warning(
            "wait.blocks_loop: a sync call waits on the thread of a running event loop; decorate a coroutine function"
        )


async def _arun(worker: Worker, backend: Any, op: Any, cancelled: list[BaseException]) -> Any:
    """Run an operation to its end, whatever happens to the caller."""
    import asyncio

    task = asyncio.ensure_future(backend.arun(op))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError as error:
        if task.cancelled():
            raise
        try:
            await asyncio.wait((task,), timeout=PATIENCE_S)
        finally:
            if not task.done():
                _keep(worker, asyncio.ensure_future(_finish(worker, backend, op, task)))
        if not task.done():
            raise
        cancelled.append(error)
        return task.result()


async def _stop(worker: Worker, listener: Any, cancelled: list[BaseException]) -> int | None:
    """Stop listening, whatever happens to the caller: a pop that goes on would take what others wait for."""
    import asyncio

    task = asyncio.ensure_future(listener.stop())
    _keep(worker, task)
    while True:
        try:
            hops: int | None = await asyncio.shield(task)
            return hops
        except asyncio.CancelledError as error:
            cancelled[:] = [error]
            if task.cancelled():  # the loop ends
                listener.drop()
                return None


async def _finish(worker: Worker, backend: Any, op: Any, task: Awaitable[Any]) -> None:
    """What comes of an operation that its caller could not wait for: nobody has what it granted."""
    try:
        reply = await task
        if type(op) is Acquire and type(reply) is not NotRegistered:
            closings = tuple(
                Closing(answer.id, answer.account, answer.key, ask.model, "unsent")
                for ask, answer in zip(op.asks, reply.answers)
                if type(answer) is Granted and not worker.awaits(answer.id)
            )
            if closings:
                await backend.arun(Settle(op.to, op.ttl_ms, closings))
    except Exception as error:
        if type(op) is Settle:
            worker.pending.extend((op.to, closing) for closing in op.closings)
            heartbeat.watch(worker)
        log.warning("operation.lost pool=%s op=%s error=%s", worker.pool, type(op).__name__, type(error).__name__)


def _keep(worker: Worker, task: Any) -> None:
    """Hold a task until it is done: a loop itself holds tasks only weakly."""
    worker.tasks.add(task)
    task.add_done_callback(worker.tasks.discard)
