"""A worker: this process's presence in a pool.

It knows the keys and their limits, numbers the leases, keeps those that are live for the heartbeat, and holds what
is still to be settled. Its steps are generators that yield operations and do no I/O (see `_flow.py`).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from stable_openai._estimate import Estimate, Outputs
from stable_openai._keys import Key
from stable_openai._limits import METERS, Limits, Quota, class_of, day_starts, limits_of, quota, seen_text, serves
from stable_openai._line import Line
from stable_openai._ops import (
    Acquire,
    Acquired,
    Admin,
    Ask,
    Attend,
    Closing,
    Demand,
    Granted,
    Inspect,
    Live,
    Member,
    NotRegistered,
    Register,
    Registration,
    Renew,
    Restore,
    Settle,
    Settled,
    Snapshot,
    days_of,
)
from stable_openai._siblings import Siblings
from stable_openai._verdict import Verdict
from stable_openai._waiter import Request, Waiter, Waiting
from stable_openai.errors import BrokerUnavailable, ConfigurationError, NoKeys

__all__ = ["NO_MODEL", "Report", "Worker"]

log = logging.getLogger("stable_openai.leases")
waiting_log = logging.getLogger("stable_openai.waiting")

LONGEST_HOLD_MS = 900_000
BATCH = 200
ATTENDS_S = 5.0  # REGATHERING of lua/accounts.lua is longer
FORGETS_S = 86_400.0  # a class that nobody has used for longer has ended by itself
SEEN_A_SECOND = 50  # accounts, of whose days a worker keeps itself informed
MANY_LINES = 64
MANY_MODELS = 512  # that users name: of more, not all are remembered
MOST_DISOWNED = 1000
NO_MODEL = "-"
Steps = Generator[Any, Any, Any]
Rows = tuple[tuple[int, int | None, int | None], ...]


class Report(NamedTuple):
    """What is known of an attempt beside its outcome: the tokens used, a verdict, what the response's headers said of
    the limits (see _headers.py), the organisation that they named, and what the client that is bound to the lease saw
    of its request, if that failed."""

    tokens: int | None = None
    verdict: Verdict | None = None
    seen: Rows = ()
    organization: str = ""
    error: BaseException | None = None


NOTHING = Report()


class Held(NamedTuple):
    """A live lease; `since` when it was granted or renewed last, by the drivers' clock (infinite: it is lost)."""

    to: Registration
    since: float
    lease: Granted
    tokens: int
    granted_ms: int


class Standing:
    """What is known of a class in the store: a ring of it, what it is called there, when it last was (by the drivers'
    clock), and what was used of each account's days."""

    __slots__ = ("at", "birth", "days", "look_at", "to")

    def __init__(self, to: Registration, birth: str, at: float, days: dict[str, str]) -> None:
        self.to, self.birth, self.at, self.days = to, birth, at, days
        self.look_at = 0.0

    def see(self, snapshot: Snapshot) -> None:
        for account, row in snapshot.accounts.items():
            requests, tokens = (row.meters[name][0] if name in row.meters else 0 for name in ("rpd", "tpd"))
            self.note(account, f"{snapshot.now_ms} {requests:.17g} {tokens:.17g}")

    def note(self, account: str, days: str) -> None:
        """Of what the store said of days at different times, some may come late: the last that it said counts."""
        known = self.days.get(account)
        if known is None or _order(days) >= _order(known):
            self.days[account] = days


def _order(days: str) -> tuple[float, ...]:
    return tuple(map(float, days.split()))


_inherited: list[Any] = []


class Worker:
    def __init__(
        self,
        pool: str,
        keys: Sequence[Key],
        limits: Limits,
        classes: Mapping[str, Limits],
        *,
        ttl_s: float,
        headroom_s: float,
        on_redis_down: str,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.classes = dict(classes)
        self.ttl_ms = round(ttl_s * 1000)
        self.headroom_s = headroom_s
        self.on_redis_down = on_redis_down
        self.attends = False  # others share the store, and it has not left them
        self.warn_once = False
        self._warned = False
        self.class_names: set[str] = set()
        self.known: dict[str, Key] = {}
        self.siblings = Siblings(pool, self.known)
        self._outputs: dict[str, Outputs] = {}
        self.run: Callable[[Steps], Any] = list
        self.on_wait: Callable[[Waiting], object] | None = None
        self.lines: dict[tuple[str, Any], Line] = {}
        self.tasks: set[Any] = set()
        self.hold(keys)
        self.begin_life()

    def begin_life(self) -> None:
        """A new name and no leases; in a forked child too, which is another worker. (What hangs on its parent's event
        loops is kept there: its end would take sockets out of the parent's selector.)"""
        of_loops = [line for (_, loop), line in self.lines.items() if loop is not None]
        if of_loops or self.tasks:
            _inherited.append((of_loops, self.tasks))
        self.id = os.urandom(8).hex()
        self._numbers = itertools.count(1)
        self._registered: set[str] = set()
        self.lines = {}
        self._line_numbers = itertools.count(1)
        self._why_out: tuple[float, str, dict[str, str] | None] = (-math.inf, "", None)
        self.live: dict[str, Held] = {}
        self.closing: dict[str, Held] = {}  # those that are being settled
        self._standings: dict[str, Standing] = {}
        self._restoring: set[str] = set()  # classes
        self.attend_at = math.inf  # when it attends next, by the drivers' clock
        self.pending: deque[tuple[Registration, Closing]] = deque()
        self._stuck = False  # what is pending could not be settled the last time
        self.tasks = set()

    def hold(self, keys: Sequence[Key]) -> None:
        """Hold these keys from now on. Raises ConfigurationError where keys of one account disagree on its limits."""
        declared: dict[str, Key] = {}
        for key in keys:
            first = declared.setdefault(key.account, key)
            if (first.limits or Limits()) != (key.limits or Limits()):
                raise ConfigurationError(
                    "limits", f"the keys {first.name} and {key.name} share an account but differ in limits"
                )
        self.keys = {key.fingerprint: key for key in keys}
        # A lease may outlive its key: those that were removed are still known.
        self.known.update(self.keys)
        self._by_model: dict[str, Registration] = {}
        self._needs_tokens: dict[str, bool] = {}

    def registration(self, model: str) -> Registration:
        """The keys that serve a model, with the limits of its class: a ring of their own where not all of them do."""
        by_model = self._by_model  # that of these keys, whatever is held meanwhile
        found = by_model.get(model)
        if found is None:
            _make_room(by_model)
            found = by_model[model] = self._register_for(model, by_model)
        return found

    def _register_for(self, model: str, by_model: dict[str, Registration]) -> Registration:
        name = class_of(model, self.classes)
        keys = [key for key in self.keys.values() if serves(key.models, model)]
        if not self.keys:
            raise NoKeys(f"no keys are left in pool {self.pool!r}", keys={}, retry_after=None, reason="removed")
        if not keys:
            raise ConfigurationError("model", f"{model!r} is served by no key of pool {self.pool!r}; see Key(models=)")
        if len(self.class_names) >= MANY_MODELS:  # (the store has them all)
            self.class_names.clear()
        self.class_names.add(name)
        made = self._ring(name, self.declared(model), keys)
        return next((one for one in tuple(by_model.values()) if one.ring == made.ring), made)

    def _ring(self, model_class: str, declared: Limits, keys: Iterable[Key]) -> Registration:
        quotas: list[Quota] = [quota(declared, self.headroom_s)]
        accounts: dict[str, list[Key]] = {}
        for key in keys:
            accounts.setdefault(key.account, []).append(key)
        members = []
        for account, its in accounts.items():
            mine = quota(its[0].limits.over(declared), self.headroom_s) if its[0].limits else quotas[0]
            if mine not in quotas:
                quotas.append(mine)
            weighted = tuple((key.fingerprint, key.weight) for key in its)
            members.append(Member(account, quotas.index(mine), sum(key.weight for key in its), weighted))
        return Registration(self.pool, model_class, quotas, members)

    def counts_tokens(self, model: str) -> bool:
        """Whether the limits of the model's class count tokens: otherwise nobody need estimate them. (Where none is
        declared here, others may have declared some.)"""
        known = self._needs_tokens.get(model)
        if known is None:
            names = [limits_of(quota).keys() for quota in self.registration(model).quotas]
            _make_room(self._needs_tokens)
            known = any(of & {"tpm", "tpd"} or (self.attends and not of) for of in names)
            self._needs_tokens[model] = known
        return known

    def reserve(self, model: str, estimate: Estimate) -> int:
        """The tokens that a call reserves."""
        to = self.registration(model)
        outputs = self._outputs.get(to.model_class) or Outputs()
        reserved = outputs.reserved(estimate, by_use=bool(to.quotas[0][1]))
        declared = [limit for quota in to.quotas for limit in (quota[11], quota[15]) if limit]
        if not declared or estimate.output is not None:
            return reserved
        return min(reserved, max(1, estimate.prompt, int(min(declared))))  # a guess is never too large

    def declared(self, model: str) -> Limits:
        """The limits of a model's class, as the manager was given them."""
        of_class = self.classes.get(class_of(model, self.classes))
        return self.limits if of_class is None else of_class.over(self.limits)

    def next_id(self) -> str:
        return f"{self.id}:{next(self._numbers)}"

    def register(self, to: Registration) -> Generator[Any, Any, Standing]:
        """Make a ring known; and where the store has lost its class, what is known of that."""
        now_ms = time.time_ns() // 1_000_000
        days = {zone: day_starts(zone, now_ms) for zone in to.zones}
        known = self._standings.get(to.model_class) or Standing(to, "", 0.0, {})
        ago_ms = max(0, round((time.monotonic() - known.at) * 1000))
        now, reply = yield Register(to, self.id, days, os.urandom(8).hex(), known.birth, ago_ms)
        if reply.lost:
            self._restoring.add(to.model_class)
            try:
                yield from self._restore(to, reply.birth, known.days)
            finally:
                self._restoring.discard(to.model_class)
        if len(self._registered) >= MANY_MODELS:  # they are registered again
            self._registered.clear()
        _make_room(self._standings)
        if self.attends and self.attend_at == math.inf:
            self.attend_at = 0.0
            heartbeat.watch(self)
        standing = self._standings[to.model_class] = Standing(to, reply.birth, now, known.days)
        self._registered.add(to.ring)
        if reply.moved:
            log.info("limits.changed pool=%s class=%s accounts=%d", self.pool, to.model_class, reply.moved)
        return standing

    def _restore(self, to: Registration, birth: str, seen: dict[str, str]) -> Steps:
        live = tuple(
            Live(id, held.lease.account, held.lease.key, held.tokens, held.granted_ms)
            for id, held in tuple(self.live.items())
            if held.to.model_class == to.model_class
        )
        days = tuple(days_of(account, text) for account, text in tuple(seen.items()))
        log.warning("state.lost pool=%s class=%s leases=%d", self.pool, to.model_class, len(live))
        _, done = yield Restore(to, self.ttl_ms, birth, self.id, days, live)
        if not done:
            raise BrokerUnavailable("the store has lost what was just restored")

    def attend(self, leave: bool = False) -> Steps:
        """Be in the pool's roster; where the store has lost a class, tell it what is known here; and see all days once,
        for the times when it is away."""
        if not (self.attends or leave):
            self.attend_at = math.inf
            return
        self.attend_at = math.inf if leave else time.monotonic() + ATTENDS_S
        known = dict(self._standings)
        _, roster = yield self.attendance(leave)
        for name in roster.lost if self.attends else ():
            yield from self.register(known[name].to)
        for standing in tuple(self._standings.values()) if self.attends and roster.rank >= 0 else ():
            if standing.look_at <= time.monotonic() and standing.to.counts_days():
                yield from self.see_days(standing.to)

    def see_days(self, to: Registration) -> Steps:
        """See what all workers have used of the days: seldom where accounts are many, since it is of all of them."""
        standing = self._standings.get(to.model_class)
        if standing is not None and to.counts_days():
            _, snapshot = yield Inspect(to, self.ttl_ms)
            standing.see(snapshot)
            standing.look_at = time.monotonic() + len(to.members) / SEEN_A_SECOND

    def attendance(self, leave: bool = False) -> Attend:
        import hashlib  # here, so that importing the package stays quick

        accounts = sorted({key.account for key in self.keys.values()})
        shares = hashlib.blake2b("\n".join(accounts).encode(), digest_size=8).hexdigest()
        births = tuple(
            (name, standing.birth)
            for name, standing in tuple(self._standings.items())
            if standing.birth and time.monotonic() - standing.at < FORGETS_S
        )
        return Attend(self.pool, self.id, shares, 0 if leave else round(ATTENDS_S * 1000), births)

    def days_seen(self, to: Registration) -> dict[str, str]:
        """What was used of the days of each account, as the store said last (see Granted)."""
        standing = self._standings.get(to.model_class)
        return {} if standing is None else dict(standing.days)

    def birth_of(self, to: Registration) -> str:
        """What a class is called in the store, as far as this worker knows."""
        standing = self._standings.get(to.model_class)
        return "" if standing is None else standing.birth

    def line(self, model: str, loop: Any) -> Line:
        """Where calls for a model wait: on an event loop, or (None) in threads."""
        to = self.registration(model)
        line = self.lines.get((to.ring, loop))
        if line is None:
            many = len(self.lines) > MANY_LINES
            for place, other in tuple(self.lines.items()):
                if (many and other.is_idle()) or (place[1] is not None and place[1].is_closed()):
                    self.lines.pop(place, None)
            made = Line(to, f"{self.id}.{next(self._line_numbers)}")
            line = self.lines.setdefault((to.ring, loop), made)
        return line

    def nudge(self, model_class: str | None = None) -> None:
        """Something was freed, or the keys have changed: all who lead here ask at once."""
        for line in tuple(self.lines.values()):
            if model_class in (None, line.to.model_class):
                line.nudge()

    def ask(
        self, to: Registration, asks: tuple[Ask, ...], demand: Demand
    ) -> Generator[Any, Any, tuple[float, Acquired]]:
        """Ask for leases; those that are granted are renewed from now on."""
        if self.warn_once:
            self._warn()
        if self.pending and not self._stuck:
            yield from self.flush()
        standing = self._standings.get(to.model_class)
        if standing is None or to.ring not in self._registered:
            standing = yield from self.register(to)
        now, reply = yield Acquire(to, self.ttl_ms, asks, demand, standing.birth)
        if type(reply) is NotRegistered:
            standing = yield from self.register(to)
            now, reply = yield Acquire(to, self.ttl_ms, asks, demand, standing.birth)
            if type(reply) is NotRegistered:
                raise BrokerUnavailable("the store forgets what is registered; is it evicting keys?")
        standing.at = now
        for ask, answer in zip(asks, reply.answers):
            if type(answer) is Granted:
                if answer.key not in self.known:  # it expires
                    raise BrokerUnavailable("the store grants a key that nobody holds; who else writes to it?")
                self.live[answer.id] = Held(to, now, answer, ask.tokens, reply.now_ms)
                if answer.days:
                    standing.note(answer.account, answer.days)
                heartbeat.watch(self)
        return now, reply

    def give_back(self, line: Line, request: Request, lease: Granted) -> Steps:
        """A lease whose call has gone: for the next one in line, else it was never used."""
        if not line.hand_on(lease, request.tokens, request.model):
            yield from self.settle(request, lease, "unsent")

    def disown(self, to: Registration, waiter: Waiter, finalising: bool = False) -> None:
        """The answer to a call's ask is not known, and nobody waits for it: what it may be granted is given back (or
        expires, where there are too many; or where it was a parent's, in a forked child, is its own affair)."""
        if len(self.pending) < MOST_DISOWNED and waiter.id.startswith(f"{self.id}:"):
            self.pending.append((to, Closing(waiter.id, "", "", waiter.request.model, "unsent")))
            if not finalising:
                heartbeat.watch(self)

    def awaits(self, id: str) -> bool:
        """Whether somebody has the lease, or will ask for it again."""
        return id in self.live or any(id in line for line in tuple(self.lines.values()))

    def forsake(self, line: Line, waiter: Waiter) -> None:
        """Leave the line from a finaliser: nothing is sent, and the claim ends by itself."""
        line.leave(waiter)
        granted, request = waiter.answer, waiter.request
        if type(granted) is Granted and not line.hand_on(granted, request.tokens, request.model):
            self.abandon(request, granted, "unsent")
        if waiter.unsure and not waiter.asking:
            self.disown(line.to, waiter, finalising=True)
        _, listener = line.end()
        if listener is not None:
            listener.drop()

    def report(self, waiting: Waiting) -> None:
        """Calls have waited for some seconds: say so, and to the user's hook."""
        waiting = waiting._replace(key=self.label_of_account(waiting.key))
        waiting_log.warning(
            "wait.long pool=%s class=%s calls=%d longest=%.0fs reason=%s key=%s next=%s",
            waiting.pool,
            waiting.model_class,
            waiting.calls,
            waiting.longest_s,
            waiting.reason,
            waiting.key,
            "unknown" if waiting.next_s is None else f"{waiting.next_s:.1f}s",
        )
        if self.on_wait is not None:
            try:
                self.on_wait(waiting)
            except Exception:
                waiting_log.exception("wait.hook_failed pool=%s", self.pool)

    def settle(
        self, request: Request, lease: Granted, outcome: str, detail: str = "", told: Report = NOTHING
    ) -> Generator[Any, Any, str | None]:
        """Close a lease; what cannot be closed now is closed with the next operation. Returns the store's advice; None
        where there was nothing to close."""
        held = self.live.pop(lease.id, None)
        if held is None:  # a parent's lease in a forked child, or one that has been settled
            return None
        to = held.to
        closing = self._closing(request, lease, outcome, detail, told)
        self.closing[lease.id] = held
        try:
            _, replies = yield Settle(to, self.ttl_ms, (closing,), self.birth_of(to))
            if type(replies) is NotRegistered:
                self.live[lease.id] = held  # it is to be restored
                if to.model_class in self._restoring:
                    raise BrokerUnavailable("the store is being told what it lost")
                yield from self.register(to)
                self.live.pop(lease.id, None)
                _, replies = yield Settle(to, self.ttl_ms, (closing,))
        except BaseException as error:
            self.pending.append((to, closing))  # settled twice is settled once
            if not isinstance(error, BrokerUnavailable):
                raise
            self.live[lease.id] = held  # so that it is restored, if the store has lost it
            log.warning("settle.deferred pool=%s lease=%s", self.pool, lease.id)
            heartbeat.watch(self)
            return ""
        finally:
            self.closing.pop(lease.id, None)
        reply: Settled = replies[0]
        if reply.code == 1 and held.since < math.inf:
            self._log_lost(closing)
        self._note_days(to, lease.account, reply.days)
        advice = reply.advice
        if advice == "healed":
            yield from self.wake_all(to)
        return advice

    def _note_days(self, to: Registration, account: str, days: str) -> None:
        standing = self._standings.get(to.model_class)
        if days and standing is not None:
            standing.note(account, days)

    def _log_lost(self, closing: Closing) -> None:
        log.warning("lease.lost pool=%s lease=%s key=%s", self.pool, closing.id, self.label(closing.key))

    def abandon(self, request: Request, lease: Granted, outcome: str, told: Report = NOTHING) -> None:
        """Close a lease from a finaliser: the closing is only queued, and no lock is taken."""
        held = self.live.get(lease.id)
        if held is not None:
            told = told._replace(organization="")  # what that may log takes a lock
            self.pending.append((held.to, self._closing(request, lease, outcome, "", told)))
            self.live.pop(lease.id, None)

    def _closing(self, request: Request, lease: Granted, outcome: str, detail: str, told: Report) -> Closing:
        """What is said of a lease at its end; and what this worker itself learns of it."""
        tokens, _, seen, organization, _ = told
        jitter = random.random() if outcome == "limited" else 0.0
        if tokens is not None and request.prompt >= 0:
            name = class_of(request.model, self.classes)
            if name not in self._outputs:
                _make_room(self._outputs)
            self._outputs.setdefault(name, Outputs()).note(max(0, tokens - request.prompt))
        text = ""
        if seen:
            text = seen_text(seen, self.declared(request.model), self.headroom_s)
            if any(number > 1 and limit for number, limit, _ in seen):
                _make_room(self._needs_tokens)
                self._needs_tokens[request.model] = True
        siblings = self.siblings.of(lease.key, organization) if organization else ()
        return Closing(
            lease.id, lease.account, lease.key, request.model, outcome, tokens, detail, jitter, text, siblings
        )

    def flush(self) -> Steps:
        """Settle what is pending. Where the store does not answer, that is left to the heartbeat, from the rest on."""
        taken: dict[str, tuple[Registration, list[Closing]]] = {}
        try:
            while True:
                to, closing = self.pending.popleft()
                taken.setdefault(to.ring, (to, []))[1].append(closing)
        except IndexError:
            pass
        open_still = [(to, closing) for to, closings in taken.values() for closing in closings]
        later: list[tuple[Registration, Closing]] = []
        try:
            while open_still:
                to = open_still[0][0]
                batch = [closing for of, closing in open_still[:BATCH] if of is to]
                healed = False
                try:
                    _, replies = yield Settle(to, self.ttl_ms, tuple(batch), self.birth_of(to))
                    if type(replies) is NotRegistered:
                        yield from self.register(to)
                        _, replies = yield Settle(to, self.ttl_ms, tuple(batch))
                    healed = any(reply.advice == "healed" for reply in replies)
                    for closing, reply in zip(batch, replies):
                        self.live.pop(closing.id, None)
                        self._note_days(to, closing.account, reply.days)
                        if reply.code == 1:
                            self._log_lost(closing)
                except BrokerUnavailable:
                    later = open_still[: len(batch)]
                del open_still[: len(batch)]
                self._stuck = bool(later)
                if later:
                    break
                if healed:
                    yield from self.wake_all(to)
        finally:  # a caller who is cancelled meanwhile leaves the rest to the next one
            self.pending.extend(open_still + later)
            if later:
                heartbeat.watch(self)

    def renew(self, now: float) -> Steps:
        """Extend the leases that were granted or renewed a third of their ttl ago."""
        old: dict[str, tuple[Registration, list[str]]] = {}
        for id, held in tuple(self.live.items()):
            if now - held.since >= self.ttl_ms / 3000:
                old.setdefault(held.to.ring, (held.to, []))[1].append(id)
        for to, ids in old.values():
            for first in range(0, len(ids), BATCH):
                batch = ids[first : first + BATCH]
                _, renewed = yield Renew(to, self.ttl_ms, LONGEST_HOLD_MS, tuple(batch), self.birth_of(to))
                if type(renewed) is NotRegistered:
                    yield from self.register(to)  # which restores them
                    renewed = [True] * len(batch)
                for id, alive in zip(batch, renewed):
                    known = self.live.get(id)
                    if known is not None:  # what is lost is kept until it is settled, and no longer renewed
                        self.live[id] = known._replace(since=now if alive else math.inf)
                    if known is not None and not alive:
                        log.warning("lease.lost pool=%s lease=%s", self.pool, id)

    def inspect_registration(self, to: Registration) -> Generator[Any, Any, tuple[Registration, Snapshot]]:
        if to.ring not in self._registered:
            yield from self.register(to)
        _, snapshot = yield Inspect(to, self.ttl_ms)
        return to, snapshot

    def check(self) -> Steps:
        """Make contact, as a first call would."""
        for to in self.registrations() or ([self._all_keys(NO_MODEL)] if self.keys else []):
            yield from self.inspect_registration(to)

    def look(self) -> Generator[Any, Any, list[tuple[Registration, Snapshot]]]:
        """All keys, the classes that this worker has used, and all others of the pool. Nothing is registered for it."""
        if self.pending and not self._stuck:
            yield from self.flush()
        everything = self._all_keys(NO_MODEL)  # what is said of keys and accounts counts for every class
        _, first = yield Inspect(everything, self.ttl_ms)
        rings = self.registrations()
        own = {to.model_class for to in rings}
        rings += [self._all_keys(name) for name in first.classes if name not in own]
        if not rings:
            return [(everything, _as_declared(everything, first))]
        seen = []
        for to in rings:
            _, snapshot = yield Inspect(to, self.ttl_ms)
            seen.append((to, snapshot if to.model_class in snapshot.classes else _as_declared(to, snapshot)))
        return [*seen, (everything, first)]

    def _all_keys(self, model_class: str) -> Registration:
        return self._ring(model_class, self.declared(model_class), self.keys.values())

    def registrations(self) -> list[Registration]:
        """Those that have been used (lately, where they are many), one for each ring."""
        return list({to.ring: to for to in tuple(self._by_model.values())}.values())

    def why_out(self, request: Request, now: float) -> Generator[Any, Any, dict[str, str] | None]:
        """Why every key that serves the model is out, by label; None where one is not. (Asked once for calls that give
        up together.)"""
        to = self.registration(request.model)
        at, ring, known = self._why_out
        if at <= now <= at + 0.5 and ring == to.ring:
            return known
        found = yield from self._look_why_out(to)
        self._why_out = (now, to.ring, found)
        return found

    def _look_why_out(self, to: Registration) -> Generator[Any, Any, dict[str, str] | None]:
        _, snapshot = yield from self.inspect_registration(to)
        why = {}
        for member in to.members:
            account = snapshot.accounts[member.account]
            for fingerprint, _ in member.keys:
                key = snapshot.keys[fingerprint]
                reason = (
                    "disabled"
                    if key.disabled_ms
                    else key.reason
                    if key.out_ms
                    else account.reason
                    if account.out_ms
                    else ""
                )
                if not reason:
                    return None
                why[self.label(fingerprint)] = reason
        return why

    def all_disabled(self, request: Request) -> Generator[Any, Any, bool]:
        """Whether every key that serves the model is disabled until somebody enables it."""
        _, snapshot = yield from self.inspect_registration(self.registration(request.model))
        return all(key.disabled_ms == -1 for key in snapshot.keys.values())

    def admin(self, verb: str, key: Key, ms: int | None = None) -> Steps:
        """disable, enable or reset a key in the whole pool."""
        to = next(iter(self.registrations()), None) or self.registration(NO_MODEL)
        for _ in range(2):
            _, snapshot = yield from self.inspect_registration(to)
            classes = tuple(dict.fromkeys((*snapshot.classes, *self.class_names)))
            _, done = yield Admin(self.pool, verb, key.fingerprint, key.account, ms, classes)
            if done:
                break
            self._registered.discard(to.ring)  # Redis has lost its state since then
        log.info("key.%s pool=%s key=%s", verb, self.pool, key.name)

    def wake_all(self, to: Registration) -> Steps:
        """Something healed that others wait for, in classes that this worker may not know."""
        try:
            _, snapshot = yield from self.inspect_registration(to)
            yield Admin(self.pool, "wake", "", "", None, tuple(snapshot.classes))
        except BrokerUnavailable:  # they look again by themselves
            return

    def note(self, lease: Granted, verdict: Verdict, advice: str | None) -> None:
        """Say what an error did to the key that it came with (None: nothing any more)."""
        if advice is None:
            return
        if advice == "fault":
            log.error("pool.fault pool=%s reason=%s: all keys fail alike, none is put out", self.pool, verdict.reason)
        elif advice == "out":
            log.warning(
                "key.out pool=%s key=%s fingerprint=%s scope=%s reason=%s",
                self.pool,
                self.label(lease.key),
                lease.key,
                verdict.outcome,
                verdict.reason,
            )
        elif verdict.outcome != "neutral":
            log.info(
                "attempt.%s pool=%s key=%s reason=%s", verdict.outcome, self.pool, self.label(lease.key), verdict.reason
            )

    def label(self, fingerprint: str) -> str:
        key = self.known.get(fingerprint)
        return key.name if key else fingerprint

    def label_of_account(self, account: str) -> str:
        """The name of the first key of an account."""
        return next((key.name for key in self.known.values() if key.account == account), account)

    def warn_of_no_model(self) -> None:
        """Say once that a call without a model passes by what was declared for models."""
        if not self._warned and (self.classes or any(key.models for key in self.keys.values())):
            self._warned = True
            log.warning(
                "model.unknown pool=%s: a call names no model, so models= does not apply; write @stable(model=...), "
                "or give the function a parameter `model`",
                self.pool,
            )

    def _warn(self) -> None:
        self.warn_once = False
        log.warning(
            "memory.forked pool=%s: the limits are kept in memory, by each process for itself; redis= shares them",
            self.pool,
        )


def _as_declared(to: Registration, snapshot: Snapshot) -> Snapshot:
    """The limits of a class that the store does not know so far: nothing is used of them."""
    accounts = {}
    for member in to.members:
        limits = limits_of(to.quotas[member.quota])
        meters = {name: (0.0, limits[name], False) for name in METERS if name in limits}
        accounts[member.account] = snapshot.accounts[member.account]._replace(meters=meters)
    return snapshot._replace(accounts=accounts)


def _make_room(known: dict[str, Any]) -> None:
    """Where there are many, forget those that came first; what is still used is soon known again."""
    if len(known) >= MANY_MODELS:
        for name in list(known)[: MANY_MODELS // 2]:
            known.pop(name, None)


def runs_under_a_forking_server() -> bool:
    """Whether this process was started as a Celery or gunicorn worker, which are one of several."""
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("celery", "gunicorn")


from stable_openai._heartbeat import heartbeat  # noqa: E402  (it names Worker only in its types)
