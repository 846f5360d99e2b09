"""What is out, and what an outcome does to it: the twin of lua/verdicts.lua."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stable_openai._ops import Closing

if TYPE_CHECKING:
    from stable_openai.backends.state import Index, Lease, ModelClass, Pool

__all__ = ["KeyScope", "Scope", "conclude"]

PROBE_FIRST, PROBE_LAST = 900_000, 86_400_000
AUTH_WINDOW, BREAKER_WINDOW, BREAKER_FAILURES = 60_000, 10_000, 5
BREAKER_FIRST, BREAKER_LAST = 1000, 60_000


class Scope:
    """An account or the pool: until when it is out (0: it is not), why, and the lease that probes it."""

    def __init__(self) -> None:
        self.until = self.pause = self.probe_until = 0
        self.reason = ""
        self.probe: str | None = None
        self.log: list[tuple[int, str, str]] = []

    def put_out(self, now: int, reason: str, id: str, shortest: int, longest: int) -> str:
        """Out, and for twice as long where its own probe says the same again; "out" where this changed anything."""
        if self.until and self.probe != id:
            return ""
        self.pause = min(longest, self.pause * 2) if self.until else shortest
        self.until, self.reason, self.probe, self.probe_until = now + self.pause, reason, None, 0
        return "out"


class KeyScope(Scope):
    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.disabled = 0
        self.models: dict[str, int] = {}


def conclude(pool: Pool, known: ModelClass, index: Index, key_count: int, closing: Closing, lease: Lease) -> str:
    """What follows from the outcome of a lease; returns the advice to who settled. `index` and `key_count` are those
    of its ring."""
    if closing.outcome == "ok":
        account = known.accounts.get(closing.account)
        if account and account.refusals:
            account.refusals = 0
        served = known.served.get(closing.model)
        if served is None:
            served = known.served[closing.model] = []
        if closing.account not in served and len(served) < 2:
            served.append(closing.account)
        if not (pool.auth or pool.breaker or pool.accounts or pool.keys):
            return ""
    advice: str = getattr(Verdicts(pool, known, index, key_count), "_" + closing.outcome)(closing, lease) or ""
    return advice


class Verdicts:
    """The outcomes, one a method."""

    def __init__(self, pool: Pool, known: ModelClass, index: Index, key_count: int) -> None:
        self.pool, self.known, self.index, self.key_count = pool, known, index, key_count

    def _heal_key(self, key: str, scope: KeyScope) -> None:
        scope.until = scope.pause = scope.probe_until = scope.failures = 0
        scope.reason, scope.probe = "", None
        if not scope.disabled and not scope.models:
            self.pool.keys.pop(key, None)

    def _end_probe(self, closing: Closing, well: bool) -> None:
        pool = self.pool
        for scope in (pool.breaker, pool.accounts.get(closing.account), pool.keys.get(closing.key)):
            if scope is None or scope.probe != closing.id:
                continue
            pool.healed = True
            if not well:
                scope.probe, scope.probe_until = None, 0
            elif isinstance(scope, KeyScope):
                self._heal_key(closing.key, scope)
            elif scope is pool.breaker:
                pool.breaker = None
            else:
                del pool.accounts[closing.account]

    def _ok(self, closing: Closing, lease: Lease) -> None:
        self._end_probe(closing, True)
        key = self.pool.keys.get(closing.key)
        if key and not key.until and key.failures:
            self._heal_key(closing.key, key)
        self.pool.auth.clear()
        if self.pool.breaker and self.pool.breaker.until:
            self.pool.healed = True
        self.pool.breaker = None

    def _neutral(self, closing: Closing, lease: Lease) -> None:
        self._end_probe(closing, False)

    def _unsent(self, closing: Closing, lease: Lease) -> None:
        if closing.detail:
            self._fail(closing, closing.detail)
        self._end_probe(closing, False)

    def _limited(self, closing: Closing, lease: Lease) -> None:
        self._end_probe(closing, True)
        self._fail(closing, "")
        now = self.pool.now
        account = self.known.touch(closing.account, self.pool)
        wait: Any = int(closing.detail) if closing.detail else None
        if wait is None:
            if lease.granted >= account.since:
                account.refusals, account.since = account.refusals + 1, now
            wait = min(60_000, 1000 * 2 ** (max(1, account.refusals) - 1))
        account.cooldown = max(account.cooldown, now + math.floor(wait * (1 + closing.jitter / 10)))
        for name in closing.siblings:
            if name in self.index.scores:  # others may be nobody's, and would be kept for nothing
                sibling = self.known.touch(name, self.pool)
                sibling.cooldown = max(sibling.cooldown, account.cooldown)

    def _account(self, closing: Closing, lease: Lease) -> str:
        scope = self.pool.accounts.setdefault(closing.account, Scope())
        advice = scope.put_out(self.pool.now, closing.detail, closing.id, PROBE_FIRST, PROBE_LAST)
        self._end_probe(closing, False)
        return advice

    def _key(self, closing: Closing, lease: Lease) -> str:
        pool, now = self.pool, self.pool.now
        pool.auth[closing.key] = (now, closing.account)
        pool.auth = {key: entry for key, entry in pool.auth.items() if entry[0] + AUTH_WINDOW > now}
        failing = {account for _, account in pool.auth.values()}
        if len(failing) >= min(3, len(self.index.order)) and len(pool.auth) >= min(3, self.key_count):
            returned = False
            for key in pool.auth:
                scope = pool.keys.get(key)
                if scope and (not scope.until or scope.reason == "invalid_api_key"):
                    returned = returned or scope.until > 0
                    self._heal_key(key, scope)
            if returned:  # who returns unasked stands far behind in the index of every ring
                pool.revision += 1
                pool.healed = True
            self._end_probe(closing, False)
            return "fault"
        scope = pool.keys.setdefault(closing.key, KeyScope())
        scope.failures += 1
        advice = ""
        if scope.failures >= 2 or scope.until:
            advice = scope.put_out(now, "invalid_api_key", closing.id, PROBE_FIRST, PROBE_LAST)
        self._end_probe(closing, False)
        return advice

    def _model(self, closing: Closing, lease: Lease) -> str:
        self._end_probe(closing, False)
        now = self.pool.now
        served = self.known.served.get(closing.model)
        if not served:
            return "unknown"
        if served == [closing.account]:
            return ""
        scope = self.pool.keys.setdefault(closing.key, KeyScope())
        scope.models = {model: at for model, at in scope.models.items() if at > now}
        scope.models[closing.model] = now + PROBE_FIRST
        return "out"

    def _failed(self, closing: Closing, lease: Lease) -> None:
        self._fail(closing, closing.detail)
        self._end_probe(closing, False)

    def _fail(self, closing: Closing, kind: str) -> None:
        """The breaker opens after five failures of one kind in 10 s, from at least half of the accounts that were
        heard of meanwhile, without a success. (A refusal for its rate is heard, and no failure: its kind is "".)"""
        pool, now = self.pool, self.pool.now
        breaker = pool.breaker = pool.breaker or Scope()
        if breaker.until:
            if breaker.probe == closing.id and breaker.reason == kind:
                breaker.put_out(now, kind, closing.id, BREAKER_FIRST, BREAKER_LAST)
            return
        log = [entry for entry in breaker.log if entry[0] + BREAKER_WINDOW > now]
        breaker.log = log = [*log, (now, kind, closing.account)][-64:]
        alike = [account for _, other, account in log if other == kind]
        heard = {account for _, _, account in log}
        if kind and len(alike) >= BREAKER_FAILURES and 2 * len(set(alike)) >= len(heard):
            breaker.log = []
            breaker.put_out(now, kind, closing.id, BREAKER_FIRST, BREAKER_LAST)
