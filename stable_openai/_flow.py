"""The rules of one call, as a generator that does no I/O.

`call()` yields what is to be done and is sent what came of it; a driver (`_drive.py`) only obeys. What it yields:

    an operation of _ops.py   the backend runs it        -> its reply
    Attempt(lease)            call the user's function   -> Returned, Started or Raised
    Deliver()                 pass on what a generator   -> Returned or Raised
                              gives after its first item
    Sleep(seconds, refusal)   wait                       -> None

Everything sent comes as (now, what came of it), `now` in seconds of a clock that only goes forward: the flow has no
other clock. tenacity's strategies say how often and how long; they see a RetryCallState whose times are set here.

WHAT COUNTS. An attempt is a try whose failure is not the key's: a 5xx, a timeout, a lost connection. After it, stop=
and wait= decide. Another key after a refusal of this one (429, 401, an unknown model) is a move: it is made at once
and counts as an attempt only after the eighth of a call. No sleep, of either kind, ends after the call's deadline.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, NoReturn

from stable_openai._ops import Gone, Granted, Refused, TooLarge
from stable_openai._verdict import Verdict, judge, redact
from stable_openai._worker import Request, Worker
from stable_openai.errors import BrokerUnavailable, ConfigurationError, Exhausted, NoKeys, RequestTooLarge

__all__ = [
    "Attempt", "Deliver", "Flow", "Outcome", "Policy", "Raised", "Returned", "Sleep", "Started", "call", "obtain",
    "outcome_of", "verdict_of",
]  # fmt: skip

MOVES = 8
POLL_S = 5.0
REASONS = {kind: f"the breaker, after failures of the upstream ({kind})" for kind in ("5xx", "connection", "timeout")}
SHORTEST_S = 0.02
ASK_AGAIN_S = 1.0
NO_OUTAGE = ("408", "409")  # they are about the request: the breaker does not count them


class Attempt(NamedTuple):
    lease: Granted


class Deliver(NamedTuple):
    pass


class Sleep(NamedTuple):
    seconds: float
    refusal: Refused | None


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


def call(worker: Worker, request: Request, policy: Policy, began: float, report: Callable[[], Any]) -> Flow:
    """One call, from the first lease to the answer; returns the last outcome, Returned or Raised.

    Args:
        began: the time at which the call began; its deadline is `request.max_wait` seconds later.
        report: gives what the user reported of the lease during the attempt: (tokens, verdict).
    """
    deadline = began + request.max_wait
    avoid: tuple[str, ...] = ()
    missing: list[str] = []
    moves, attempts, now = 0, 0, began
    error: BaseException | None = None
    while True:
        now, lease = yield from obtain(worker, request, avoid, tuple(missing), now, deadline, error)
        if lease is None:  # no account is left that may know the model
            return Raised(error or AssertionError())
        try:
            now, outcome = yield Attempt(lease)
            started = type(outcome) is Started
            if started:
                now, outcome = yield Deliver()
        except GeneratorExit:  # the driver was closed or dropped, maybe by the garbage collector: no I/O
            worker.abandon(request, lease, "neutral", report()[0])
            raise
        tokens, verdict = report()
        if type(outcome) is Returned:
            yield from worker.settle(request, lease, *outcome_of(verdict), tokens=tokens)
            return outcome
        error = outcome.error
        if isinstance(error, GeneratorExit):  # closed or dropped: maybe by the garbage collector, so without I/O
            worker.abandon(request, lease, "neutral", tokens)
            return outcome
        try:
            verdict = verdict or verdict_of(error, policy.classify)
        except Exception as mistake:  # in the user's classify: the lease must not stay open for it
            redact(mistake)
            redact(error)
            yield from worker.settle(request, lease, "neutral", tokens=tokens)
            raise mistake from error
        redact(error)
        advice = yield from worker.settle(request, lease, *outcome_of(verdict), tokens=tokens)
        worker.note(lease, verdict, advice)
        if started or verdict.action == "raise" or advice == "fault":
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
        if pause > 0:
            now, _ = yield Sleep(pause, None)


def obtain(
    worker: Worker,
    request: Request,
    avoid: tuple[str, ...],
    never: tuple[str, ...],
    now: float,
    deadline: float,
    error: BaseException | None,
) -> Generator[Any, Any, tuple[float, Granted | None]]:
    """A lease, waiting for it until the deadline; None where `never` leaves no account. `error` is what the attempt
    before raised; what is raised here is raised from it."""
    looks = 0
    while True:
        try:
            now, answer = yield from worker.acquire(request, avoid, never)
        except BrokerUnavailable:
            if worker.on_redis_down == "raise" or now + ASK_AGAIN_S > deadline:
                raise
            now, _ = yield Sleep(ASK_AGAIN_S, None)
            continue
        if isinstance(answer, Granted):
            return now, answer
        if isinstance(answer, TooLarge) and not answer.limit:
            return now, None
        if isinstance(answer, TooLarge):
            raise RequestTooLarge(
                f"a request of {request.tokens} tokens is larger than the {answer.limit} of every key",
                tokens=request.tokens,
                limit=answer.limit,
            )
        if isinstance(answer, Gone):  # only where an id comes twice
            continue
        wait = answer.wait_ms / 1000
        if answer.reason == "disabled" and not answer.timed and (yield from worker.all_disabled(request)):
            yield from _give_up(worker, request, answer, error)  # until somebody enables one
        if not answer.timed and wait >= POLL_S:  # look again, not all at the same moment
            wait *= random.uniform(0.9, 1.1)
        if not answer.exact and wait < SHORTEST_S:  # there are more accounts than one look covers
            wait = min(POLL_S, SHORTEST_S * 2**looks)
            looks += 1
        if now + wait > deadline:
            if answer.timed or deadline - now < SHORTEST_S:
                yield from _give_up(worker, request, answer, error)
            wait = deadline - now
        now, _ = yield Sleep(wait, answer)


def _give_up(
    worker: Worker, request: Request, refusal: Refused, error: BaseException | None
) -> Generator[Any, Any, NoReturn]:
    """Raise what says most about why no key could serve in time."""
    out = yield from worker.why_out(request)
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
    when = "at a time that is not known" if retry_after is None else f"in {wait:.1f} s, which is later"
    raise Exhausted(
        f"no key of pool {worker.pool!r} can serve before the call's {request.max_wait:g} s (max_wait) are over; "
        f"the next can {when}; in the way: {REASONS.get(refusal.reason, refusal.reason)}",
        retry_after=retry_after,
        reason=refusal.reason,
    ) from error


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
