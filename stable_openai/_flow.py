"""The rules of one call, as a generator that does no I/O.

`call()` yields what is to be done and is sent what came of it; a driver (`_drive.py`) only obeys. What it yields:

    an operation of _ops.py   the backend runs it        -> its reply
    Attempt(lease)            call the user's function   -> Returned, Started or Raised
    Deliver()                 pass on what a generator   -> Returned or Raised
                              gives after its first item
    Sleep(seconds)            wait before a next attempt -> None
    Park, Doze, Hush          wait for a lease, see _obtain.py

Everything sent comes as (now, what came of it), `now` in seconds of a clock that only goes forward: the flow has no
other clock. tenacity's strategies say how often and how long; they see a RetryCallState whose times are set here.

WHAT COUNTS. An attempt is a try whose failure is not the key's: a 5xx, a timeout, a lost connection. After it, stop=
and wait= decide. Another key after a refusal of this one (429, 401, an unknown model) is a move: it is made at once
and counts as an attempt only after the eighth of a call. No sleep, of either kind, ends after the call's deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, NamedTuple

from stable_openai._obtain import Sleep, obtain
from stable_openai._ops import Granted
from stable_openai._postpone import Postponed, Visit, obtain_or_postpone
from stable_openai._verdict import Verdict, judge, lease_of, redact
from stable_openai._waiter import Request, Waiter
from stable_openai._worker import Report, Worker
from stable_openai.errors import ConfigurationError

__all__ = [
    "Attempt", "Deliver", "Flow", "Outcome", "Policy", "Raised", "Returned", "Sleep", "Started", "call",
    "outcome_of", "verdict_of", "verdict_on",
]  # fmt: skip

MOVES = 8
NO_OUTAGE = ("408", "409")  # they are about the request: the breaker does not count them


class Attempt(NamedTuple):
    lease: Granted


class Deliver(NamedTuple):
    pass


class Returned(NamedTuple):
    value: Any


class Started(NamedTuple):
    """A generator has given its first item; the rest is delivered."""


class Raised(NamedTuple):
    error: BaseException


Outcome = Returned | Started | Raised
Flow = Generator[Any, Any, Any]


class Policy(NamedTuple):
    """How a decorated function is called. `stop` and `wait` are tenacity's; `classify` is the user's."""

    stop: Callable[[Any], bool]
    wait: Callable[[Any], float]
    classify: Callable[[BaseException], Verdict | None] | None = None


def call(
    worker: Worker,
    request: Request,
    policy: Policy,
    loop: Any,
    now: float,
    report: Callable[[], Report],
    visit: Visit | None = None,
    since_s: float = 0.0,
) -> Flow:
    """One call, from the first lease to the answer; returns the last outcome, Returned or Raised.

    Args:
        loop: the event loop that it runs on; None for a thread.
        report: gives what is known of the attempt beside its outcome.
        visit: the call may be postponed (then it raises Postponed); None: it waits here.
        since_s: for how long it has been on its way; its deadline is `request.max_wait` after it was made first.
    """
    began = now - since_s
    deadline = began + request.max_wait
    avoid: tuple[str, ...] = ()
    missing = list(visit.place.missing) if visit else []
    moves, attempts = (visit.place.moves, visit.place.attempts) if visit else (0, 0)
    error: BaseException | None = None
    waited: Waiter | None = None
    if visit and visit.rest_s > visit.patience_s:
        raise Postponed(visit.rest_s, "the next attempt", visit.place, rests=True)
    if visit and visit.rest_s > 0:
        now, _ = yield Sleep(visit.rest_s)
    while True:
        never = tuple(missing)
        if visit:
            visit = visit.after(attempts, moves, never)
            now, lease, visit = yield from obtain_or_postpone(
                worker, request, visit, began, now, deadline, avoid=avoid, never=never, error=error
            )
        else:
            now, lease, waited = yield from obtain(
                worker, request, loop, now, deadline, avoid=avoid, never=never, error=error, before=waited
            )
        if lease is None:  # no account is left that may know the model
            return Raised(error or AssertionError())
        try:
            now, outcome = yield Attempt(lease)
            started = type(outcome) is Started
            if started:
                now, outcome = yield Deliver()
        except GeneratorExit:  # the driver was closed or dropped, maybe by the garbage collector: no I/O
            worker.abandon(request, lease, "neutral", report())
            raise
        except BaseException:  # cancelled before the attempt was made
            yield from worker.settle(request, lease, "unsent")
            raise
        told = report()
        error = outcome.error if type(outcome) is Raised else None
        if isinstance(error, GeneratorExit):  # closed or dropped: maybe by the garbage collector, so without I/O
            worker.abandon(request, lease, "neutral", told)
            return outcome
        try:
            verdict = verdict_on(lease, told, error, policy.classify)
        except Exception as mistake:  # in the user's classify: the lease must not stay open for it
            redact(mistake)
            redact(error)
            yield from worker.settle(request, lease, "neutral", "", told)
            raise mistake from error
        redact(error)
        advice = yield from worker.settle(request, lease, *outcome_of(verdict), told)
        if verdict is None:
            return outcome
        worker.note(lease, verdict, advice)
        if error is None or started or verdict.action == "raise" or advice == "fault":
            return outcome
        if verdict.outcome == "model":
            if advice != "out":
                missing.append(lease.account)
            if len(missing) >= 3:
                return outcome
        passed = avoid if verdict.action == "move" else ()
        avoid = tuple(dict.fromkeys((*passed, lease.account)))
        moves += verdict.action == "move"
        if verdict.action == "move" and moves <= MOVES:
            continue
        attempts += 1
        pause = _pause(policy, began, now, attempts, error)
        if pause is None:
            return outcome
        if verdict.action == "retry":  # after a move the wait is only that of the account that was refused
            pause = max(pause, verdict.wait_s or 0.0)
        if now + pause > deadline:
            return outcome
        if visit and pause > visit.patience_s:
            place = visit.after(attempts, moves, tuple(missing)).place
            raise Postponed(pause, verdict.reason, place, rests=True) from error
        if pause > 0:
            now, _ = yield Sleep(pause)


def verdict_on(
    lease: Granted,
    told: Report,
    error: BaseException | None,
    classify: Callable[[BaseException], Verdict | None] | None,
) -> Verdict | None:
    """What an attempt came to, None where it succeeded: what was reported, else what it raised. Where that says nothing
    of the key, since it is the caller's own or another lease has answered for it, the outcome is what the request of
    the bound client came to: a failure that the function has caught."""
    if told.verdict is not None:
        return told.verdict
    verdict = None
    if error is not None:
        of = lease_of(error)
        verdict = (
            verdict_of(error, classify) if of in (None, lease.id) else Verdict("neutral", "raise", "another lease")
        )
        if of == lease.id or error is told.error or verdict.outcome != "neutral":
            return verdict
    if told.error is None:
        return verdict
    caught = verdict_of(told.error, classify)
    return caught if verdict is None else replace(caught, action=verdict.action)


def verdict_of(error: BaseException, classify: Callable[[BaseException], Verdict | None] | None) -> Verdict:
    """The user's verdict, else ours."""
    if classify is not None and isinstance(error, Exception):
        verdict = classify(error)
        if verdict is not None and not isinstance(verdict, Verdict):
            raise ConfigurationError("classify", "must give a Verdict, or None")
        if verdict is not None:
            return verdict
    return judge(error)


def outcome_of(verdict: Verdict | None) -> tuple[str, str]:
    """The outcome and detail that a lease is settled with (see settle.lua)."""
    if verdict is None:
        return "ok", ""
    if not verdict.sent:
        return "unsent", verdict.reason if verdict.outcome == "failed" else ""
    if verdict.outcome == "limited":
        return "limited", "" if verdict.wait_s is None else str(round(verdict.wait_s * 1000))
    if verdict.outcome == "failed" and verdict.reason in NO_OUTAGE:
        return "failed", ""
    return verdict.outcome, verdict.reason


def _pause(policy: Policy, began: float, now: float, attempts: int, error: BaseException) -> float | None:
    """How long to wait before the next attempt; None: no further one."""
    from tenacity import RetryCallState

    state = RetryCallState(retry_object=None, fn=None, args=(), kwargs={})  # type: ignore[arg-type]
    state.start_time = began
    state.attempt_number = attempts
    state.set_exception((type(error), error, error.__traceback__))
    state.outcome_timestamp = now
    state.upcoming_sleep = pause = policy.wait(state)
    return None if policy.stop(state) else pause
