"""How a call comes by a lease: by itself where nobody waits, else in the line, which its head leads (see `_line.py`).

Generators of a flow (see `_flow.py`), without I/O. Besides operations they yield

    Sleep(seconds)           wait; 0 only asks what time it is                    -> None
    Park(waiter, seconds)    wait until the waiter is signalled, at most so long  -> None
    Doze(line, waiter, seconds)  the leader: the same, or until the store wakes it    -> the wake's hops, or None
    Hush(listener)           listen for wakes no longer                           -> the hops of one that came, or None

A driver throws what ends the wait (a cancellation, say) in where the generator stands, never while an operation runs:
so whoever leaves can still pass on the lead, and what was granted.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from stable_openai._line import Line
from stable_openai._ops import Acquire, Demand, Granted, Refused, TooLarge
from stable_openai._waiter import Moved, Request, Waiter
from stable_openai._worker import Worker
from stable_openai.errors import BrokerUnavailable, ConfigurationError, Exhausted, NoKeys, RequestTooLarge

__all__ = ["ASK_AGAIN_S", "Doze", "Hush", "Park", "Sleep", "give_up", "if_all_disabled", "obtain", "taken"]

ASK_AGAIN_S = 1.0
# Then some key is not out.
NOT_OUT = ("rpm", "rpd", "tpm", "tpd", "concurrency", "cooldown", "held", "line", "elsewhere", "back", "redis")
GLANCE_S, LATE_S, BUSY_S = 0.002, 0.003, 0.25
REASONS = {
    **{kind: f"the breaker, after failures of the upstream ({kind})" for kind in ("5xx", "connection", "timeout")},
    "held": "a large request, for which the account is held",
    "line": "the calls that came before",
    "back": "that Redis has just come back",
    "elsewhere": "that Redis is away, and other workers have the keys",
    "redis": "that Redis cannot be reached",
}


class Sleep(NamedTuple):
    seconds: float


class Park(NamedTuple):
    waiter: Waiter
    seconds: float

    def is_over(self) -> bool:
        return self.waiter.answer is not None or self.waiter.leads


class Doze(NamedTuple):
    line: Line
    waiter: Waiter
    seconds: float

    def is_over(self) -> bool:
        return self.waiter.answer is not None or self.line.nudged


class Hush(NamedTuple):
    listener: Any


Steps = Generator[Any, Any, Any]


def obtain(
    worker: Worker,
    request: Request,
    loop: Any,
    now: float,
    deadline: float,
    *,
    avoid: tuple[str, ...] = (),
    never: tuple[str, ...] = (),
    error: BaseException | None = None,
    before: Waiter | None = None,
) -> Generator[Any, Any, tuple[float, Granted | None, Waiter]]:
    """A lease, waiting for it until the deadline; None where `never` leaves no account.

    Args:
        loop: the event loop that the call runs on; None for a thread.
        error: what the attempt before raised; what is raised here is raised from it.
        before: how the call waited the last time: it keeps its place.

    Raises Exhausted, NoKeys, RequestTooLarge or BrokerUnavailable.
    """
    while True:
        line = worker.line(request.model, loop)
        waiter = before = Waiter(request, avoid, never, deadline, worker.next_id(), loop, before)
        now, answer = yield from _ask_alone(worker, line, waiter, now)
        if answer is None:
            now, answer = yield from _stand(worker, line, waiter, now)
        if isinstance(answer, Exception):
            raise BrokerUnavailable(*answer.args) from answer
        if isinstance(answer, Refused):
            yield from give_up(worker, request, answer, now, error)
        if isinstance(answer, (Granted, TooLarge)):
            return now, taken(request, answer), waiter


def taken(request: Request, answer: Granted | TooLarge) -> Granted | None:
    """The lease that was granted; None where no account is left that may serve. Raises RequestTooLarge."""
    if isinstance(answer, Granted):
        return answer
    if not answer.limit:
        return None
    raise RequestTooLarge(
        f"a request of {request.tokens} tokens is larger than the {answer.limit} of every key",
        tokens=request.tokens,
        limit=answer.limit,
    )


def _ask_alone(worker: Worker, line: Line, waiter: Waiter, now: float) -> Steps:
    """Ask for this call only, if nobody waits: the answer, or None where it is to wait."""
    alone = line.begin_alone(waiter, now)
    if alone is None:
        return now, None
    answer: Any = None
    now_ms = 0
    try:
        waiter.asked = waiter.unsure = True
        now, reply = yield from worker.ask(line.to, alone[:1], alone[1])
        waiter.unsure = False
        answer, now_ms = reply.answers[0], reply.now_ms
    except BrokerUnavailable:
        line.failing = True
        now, _ = yield Sleep(0)  # it has taken its time
        if worker.on_redis_down == "raise" or now + ASK_AGAIN_S > waiter.deadline:
            worker.disown(line.to, waiter)
            raise
        line.delay(now, ASK_AGAIN_S)
    except ConfigurationError:  # the server is too old: it was not asked
        raise
    except BaseException as error:
        worker.disown(line.to, waiter, isinstance(error, GeneratorExit))
        raise
    finally:
        line.end_alone(waiter, answer, now_ms, now)
    if type(answer) is Refused and not (answer.timed and now + answer.wait_ms / 1000 > waiter.deadline):
        answer = yield from if_all_disabled(worker, waiter.request, answer)
        if answer is None:
            return now, None
    if line.has_traces():
        yield from _clear(worker, line)
    return now, answer


def if_all_disabled(worker: Worker, request: Request, refusal: Refused) -> Steps:
    """The refusal, if every key is disabled until somebody enables one: then nobody need wait."""
    hopeless = refusal.reason == "disabled" and not refusal.timed
    return refusal if hopeless and (yield from worker.all_disabled(request)) else None


def _stand(worker: Worker, line: Line, waiter: Waiter, now: float) -> Steps:
    """Wait in the line, and lead it where it comes to that: (now, the answer)."""
    if now >= waiter.deadline:
        return now, line.late(now)
    line.join(waiter, now)
    try:
        while waiter.answer is None and now < waiter.deadline and not waiter.leads:
            now, _ = yield Park(waiter, waiter.deadline - now)
        if waiter.leads:
            now = yield from _lead(worker, line, waiter, now)
    except GeneratorExit:  # closed or dropped, maybe by the garbage collector: no I/O
        worker.forsake(line, waiter)
        raise
    except BaseException:
        yield from _leave(worker, line, waiter, cancelled=True)
        raise
    yield from _leave(worker, line, waiter)
    return now, line.late(now) if waiter.answer is None else waiter.answer


def _leave(worker: Worker, line: Line, waiter: Waiter, cancelled: bool = False) -> Steps:
    """Leave the line, and no trace. (Where an ask for the waiter is on its way, who asks sees to what comes of it.)"""
    line.leave(waiter)
    if waiter.unsure and not waiter.asking:
        worker.disown(line.to, waiter)
    if cancelled and type(waiter.answer) is Granted:
        yield from worker.give_back(line, waiter.request, waiter.answer)
    if line.has_traces():
        yield from _clear(worker, line)


def _clear(worker: Worker, line: Line) -> Steps:
    """The last one takes back what the store has of the line."""
    claim, listener = line.end()
    hops = None
    if listener is not None:
        _, hops = yield Hush(listener)
    if claim or hops is not None:
        demand = Demand(claim or line.claim, (0, 0, 0, 0), 0, -1, -1 if hops is None else hops)
        with suppress(BrokerUnavailable):  # the claim ends by itself
            yield Acquire(line.to, worker.ttl_ms, (), demand, worker.birth_of(line.to))


def _lead(worker: Worker, line: Line, waiter: Waiter, now: float) -> Steps:
    """Ask for everyone until this waiter is answered or out of time; returns now."""
    while waiter.answer is None:
        if worker.line(waiter.request.model, waiter.loop) is not line:
            line.dismiss(Moved())
            break
        if line.grants_more():
            now = yield from _let_them_send(line, waiter, now)
        pause = line.pause(now)
        if now > waiter.deadline or (now == waiter.deadline and pause > 0):
            break
        if pause <= 0:
            now = yield from _ask_for_all(worker, line, now)
            continue
        until_report, report = line.report(now, worker.pool)
        if report is not None:
            worker.report(report)
        pause = min(pause, until_report, waiter.deadline - now)
        now, hops = yield Doze(line, waiter, pause)
        if hops is not None:
            line.woken(hops, now)
    return now


def _let_them_send(line: Line, waiter: Waiter, now: float) -> Steps:
    """What was just granted is to be sent before there is more, since the upstream counts when requests arrive: wait
    while this thread, or its loop, is so busy that a short wait ends late."""
    until = now + BUSY_S
    while now < until and waiter.answer is None:
        before = now
        now, hops = yield Doze(line, waiter, GLANCE_S)
        if hops is not None:
            line.woken(hops, now)
        if now - before < GLANCE_S + LATE_S:
            break
    return now


def _ask_for_all(worker: Worker, line: Line, now: float) -> Steps:
    asked, asks, demand = line.pick(now)
    if not asked:
        return now
    try:
        now, reply = yield from worker.ask(line.to, asks, demand)
    except BaseException as error:
        for waiter in line.miss(asked):
            worker.disown(line.to, waiter, isinstance(error, GeneratorExit))
        if not isinstance(error, BrokerUnavailable):
            raise
        line.failing = True
        now, _ = yield Sleep(0)  # it has taken its time
        if worker.on_redis_down == "raise":
            line.dismiss(error)
        line.delay(now, ASK_AGAIN_S)
        return now
    for waiter, granted in line.deliver(asked, reply, now):
        yield from worker.give_back(line, waiter.request, granted)
    if line.refusal is not None and (yield from if_all_disabled(worker, asked[0].request, line.refusal)):
        line.dismiss(line.refusal)
    return now


def give_up(
    worker: Worker, request: Request, refusal: Refused, now: float, error: BaseException | None
) -> Generator[Any, Any, NoReturn]:
    """Raise what says most about why no key could serve in time."""
    out = None
    if refusal.reason not in NOT_OUT:
        with suppress(BrokerUnavailable):
            out = yield from worker.why_out(request, now)
    wait = refusal.wait_ms / 1000
    retry_after = wait if refusal.timed else None
    if out is not None:
        why = ", ".join(f"{name}: {reason}" for name, reason in out.items())
        raise NoKeys(
            f"no key of pool {worker.pool!r} can be used ({why})",
            keys=out,
            retry_after=retry_after,
            reason=refusal.reason,
        ) from error
    come = f"the call's turn would have come in {wait:.1f} s" if refusal.timed else "when one can is not known"
    key = worker.label_of_account(refusal.account)
    raise Exhausted(
        f"no key of pool {worker.pool!r} can serve the call within its {request.max_wait:g} s (max_wait): {come}; "
        f"in the way: {REASONS.get(refusal.reason, refusal.reason)}" + (f"; the next key is {key}" if key else ""),
        retry_after=retry_after,
        reason=refusal.reason,
        key=key,
    ) from error
