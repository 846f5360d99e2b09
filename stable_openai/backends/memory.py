"""The broker in memory, for one process: the twin of the Lua scripts.

The same operations give the same replies, proved by random sequences in tests/test_twins.py; the names are those of
lua/prelude.lua. One mutex guards the whole, since every operation is short.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from stable_openai._limits import METERS, limits_of
from stable_openai._ops import (
    LONGEST_MS,
    AccountRow,
    Acquire,
    Acquired,
    Admin,
    Ask,
    ClaimRow,
    Closing,
    Granted,
    Inspect,
    KeyRow,
    Member,
    NotRegistered,
    Refused,
    Register,
    Registered,
    Renew,
    Restore,
    Settle,
    Settled,
    Snapshot,
)
from stable_openai.backends.asking import Asking
from stable_openai.backends.learning import declare, forget, learn
from stable_openai.backends.line import valid
from stable_openai.backends.meters import POLL, Calendar, use_up_to
from stable_openai.backends.scopes import KeyScope, conclude
from stable_openai.backends.state import (
    DAY,
    EXPIRED,
    LIVE,
    NEVER,
    TOMB,
    Account,
    Index,
    Lease,
    ModelClass,
    Pool,
    Ring,
)

__all__ = ["MemoryBackend"]

KEEP = 172_800_000


class MemoryBackend:
    """Runs the broker's operations in this process.

    Args:
        clock: the time in ms since 1970; tests hand in their own.
        alone: no other worker is waited for where something was lost.

    `on_wake` is called with a class of models when something was freed that somebody waits for.
    """

    local = True
    kind = "memory"

    def __init__(self, clock: Callable[[], int] | None = None, alone: bool = False) -> None:
        self._alone = alone
        self._clock = clock or (lambda: time.time_ns() // 1_000_000)
        self.on_wake: Callable[[str], object] | None = None
        self._mutex = threading.Lock()
        self._pool: Pool | None = None
        self._verbs: dict[type, Callable[[Any], Any]] = {
            Acquire: self._acquire,
            Settle: self._settle,
            Renew: self._renew,
            Restore: self._restore,
            Register: self._register,
            Inspect: self._inspect,
            Admin: self._admin,
        }

    def run(self, op: Any) -> Any:
        with self._mutex:
            if self._pool is not None:
                self._pool.tick(self._clock())
            reply = self._verbs[type(op)](op)
            woken = self._pool.take_wakes() if self._pool is not None and self.on_wake else ()
        for name in woken:
            self.on_wake(name)  # type: ignore[misc]
        return reply

    async def arun(self, op: Any) -> Any:
        return self.run(op)

    def listen(self, to: Any) -> None:
        """There is nothing to listen for: see `on_wake`."""

    alisten = listen

    def close(self) -> None:
        """Nothing is held open."""

    async def aclose(self) -> None:
        """Nothing is held open."""

    def after_fork(self) -> None:
        self._mutex = threading.Lock()

    def _register(self, op: Register) -> Registered:
        pool, to = self._pool, op.to
        if pool is None:
            pool = self._pool = Pool(op.epoch, self._clock(), self._alone)
        pool.days.update(op.days)
        known = pool.classes.get(to.model_class)
        if known is None:
            known = pool.classes[to.model_class] = ModelClass(to.quotas[0], op.birth)
        moved = 0
        ring = known.rings.setdefault(to.ring, Ring(pool.revision))
        for member in to.members:
            name, quota = member.account, to.quotas[member.quota]
            if limits_of(quota) and known.quotas.get(name, known.usual) != quota:  # (see register.lua)
                if name in known.accounts:
                    declare(known.accounts[name], quota, pool)
                moved += 1
                if quota == known.usual:
                    known.quotas.pop(name, None)
                else:
                    known.quotas[name] = quota
            ring.members[name] = member
            if name not in ring.index.scores:
                ring.index.put(name, 0)
        if moved:
            pool.revision += 1
            pool.wake(known)
        ring.seen = pool.revision
        lost = op.known not in ("", known.birth) and op.ago_ms < DAY
        if lost and known.lost is None:
            known.lost = pool.now
            for account in known.accounts.values():  # who knew nothing may have been here first
                account.drain(pool)
        return Registered(pool.epoch, moved, known.birth, lost)

    def _reap(self, known: ModelClass, ttl: int) -> None:
        pool = self._pool
        assert pool is not None
        if known.due is None or pool.now < known.due:
            return
        self._expire(known, [id for at, id in known.expiry.order[:100] if at <= pool.now], ttl)

    def _expire(self, known: ModelClass, ids: list[str], ttl: int) -> None:
        pool = self._pool
        assert pool is not None
        for id in ids:
            lease = known.leases.get(id)
            if lease and lease.state == LIVE:
                self._close(known, lease, lease.tokens)
                lease.state = EXPIRED
                known.expiry.put(id, pool.now + 2 * ttl)
            else:
                known.leases.pop(id, None)
                known.expiry.drop(id)
        known.due = int(known.expiry.order[0][0]) if known.expiry.order else NEVER

    def _close(self, known: ModelClass, lease: Lease, tokens: int) -> Account:
        pool = self._pool
        assert pool is not None
        account = known.touch(lease.account, pool)
        account.live = max(0, account.live - 1)
        if account.quota[1]:
            account.held = max(0, account.held - lease.tokens)
            for meter in account.meters[2:]:
                if meter:
                    meter.charge(tokens, pool.now)
        return account

    def _earliest(self, known: ModelClass, account: Account, tokens: int, count: int = 1) -> tuple[int, str, bool]:
        """When the meters admit a request of so many tokens (the last of `count`), what stands in the way, and whether
        that has no time."""
        now = self._pool.now  # type: ignore[union-attr]
        at, why, loose = now, "", False
        quota = account.quota
        if account.cooldown > at:
            at, why = account.cooldown, "cooldown"
        opens = at
        while True:
            before, calendar = at, False
            for number, meter in enumerate(account.meters):
                if meter is None:
                    continue
                n, held = (1, 0) if number < 2 else (tokens, account.held if quota[1] else 0)
                if n > meter.limit:
                    if number not in account.learned:
                        return NEVER, METERS[number], False
                    n = meter.limit
                time = meter.ready(n, held, at, opens, count)
                if time is None:
                    if not loose:
                        at, why, loose = max(at, now + POLL), METERS[number], True
                elif time > at:
                    at, why = min(time, now + LONGEST_MS), METERS[number]
                calendar = calendar or type(meter) is Calendar
            if at == before or not calendar:
                break
        if quota[0] and account.live + count > quota[0]:
            # Look again when a lease may expire: its holder may be gone.
            again = min(now + POLL, max(now + 1, NEVER if known.due is None else known.due))
            if at < again:
                at, why = again, "concurrency"
            loose = True
        return at, why, loose

    def _acquire(self, op: Acquire) -> NotRegistered | Acquired:
        pool, to = self._pool, op.to
        known = pool.classes.get(to.model_class) if pool else None
        ring = known.rings.get(to.ring) if known else None
        if pool is None or known is None or ring is None or op.birth != known.birth:
            return NotRegistered()
        if known.due is not None and pool.now >= known.due:
            self._reap(known, op.ttl_ms)
        if ring.seen != pool.revision:
            ring.index.zero()
            ring.seen = pool.revision
        pool.stale_days = False
        asking = Asking(self, pool, known, ring, op)
        if len(op.asks) == 1 and not known.claims and op.asks[0].id not in known.leases:
            # Most often nobody waits, and the one request is served at once.
            alone = asking.serve(op.asks[0], "")
            if type(alone) is not Refused:
                return NotRegistered() if pool.stale_days else Acquired(pool.now, -1, -1, [alone])
            asking.alone = alone
        answers = [asking.answer(ask) for ask in op.asks]
        in_time = asking.end()
        return NotRegistered() if pool.stale_days else Acquired(pool.now, *in_time, answers)

    def judge(
        self,
        pool: Pool,
        known: ModelClass,
        member: Member,
        tokens: int,
        model: str,
        count: int = 1,
        held_until: int = 0,
    ) -> tuple[int, str, bool, str]:
        """When an account can serve a request (the last of `count`), what stands in the way, whether that is loose,
        and its key."""
        account = known.look(member.account, pool)
        at, why, loose = self._earliest(known, account, tokens, count)
        if held_until > at:
            at, why = held_until, "held"
        if pool.accounts:
            out = pool.accounts.get(member.account)
            if out:
                open_at = pool.opens(out)
                if open_at is None:
                    at, why, loose = max(at, pool.now + POLL), out.reason, True
                elif open_at > at:
                    at, why = open_at, out.reason
        key, open_at, key_why, key_loose = pool.key_of(member, account.turn, model)
        if open_at > at:
            at, why = open_at, key_why
        return at, why, loose or key_loose, key

    @staticmethod
    def back(pool: Pool, account: Account, weight: int) -> float:
        return pool.now + account.turn // weight % 1000 / 1000

    def grant(
        self, pool: Pool, known: ModelClass, ring: Ring, ask: Ask, member: Member, key: str, before: float, ttl: int
    ) -> Granted:
        name, now = member.account, pool.now
        account = known.touch(name, pool)
        by_use, tokens = account.quota[1], ask.tokens
        for number in (2, 3):
            if number in account.learned:  # (see lua/choose.lua)
                tokens = min(tokens, account.quota[3 + 4 * number])
            elif account.meters[number]:
                tokens = ask.tokens
                break
        for number, meter in enumerate(account.meters):
            if meter and (number < 2 or not by_use):
                meter.charge(tokens if number > 1 else 1, now)
        if by_use:
            account.held += tokens
            account.ever_held += tokens
        account.live += 1
        account.turn += 1
        expires, probe = now + ttl, False
        for scope in (pool.breaker, pool.accounts.get(name), pool.keys.get(key)):
            if scope and scope.until:
                scope.probe, scope.probe_until, probe = ask.id, expires, True
        let_go = account.ever_held - account.held
        known.leases[ask.id] = Lease(LIVE, tokens, now, expires, probe, name, key, let_go)
        known.watch(ask.id, expires)
        at = self._earliest(known, account, 0)[0]
        if at > now:
            ring.index.put(name, at)
        elif before >= now + 1 or account.turn % member.weight == 0:
            ring.index.put(name, self.back(pool, account, member.weight))
        return Granted(ask.id, key, name, account.days_seen(now))

    def _settle(self, op: Settle) -> NotRegistered | list[Settled]:
        pool, to = self._pool, op.to
        known = pool.classes.get(to.model_class) if pool else None
        if op.birth and (known is None or op.birth != known.birth):
            return NotRegistered()
        if pool is None or known is None:
            return [Settled(2, "") for _ in op.closings]
        self._reap(known, op.ttl_ms)
        ring = known.rings.get(to.ring)
        index = ring.index if ring else Index()
        key_count = len(to.fingerprints)
        pool.freed, pool.healed = 0, False
        settled = [self._close_lease(pool, known, index, key_count, closing, op.ttl_ms) for closing in op.closings]
        if pool.healed:
            pool.wake(known)
        elif pool.freed:
            pool.wake(known, pool.freed)
        if pool.healed and len(pool.classes) > 1 and settled and not settled[-1].advice:
            settled[-1] = settled[-1]._replace(advice="healed")
        return settled

    def _close_lease(
        self, pool: Pool, known: ModelClass, index: Index, key_count: int, closing: Closing, ttl: int
    ) -> Settled:
        lease = known.leases.get(closing.id)
        if lease is None or lease.state == TOMB:
            if lease is None:
                self._bury(known, closing.id, ttl)
            return Settled(2, "")
        if lease.state == LIVE and lease.expires <= pool.now:
            self._expire(known, [closing.id], ttl)
        if closing.account != lease.account or closing.key != lease.key:
            closing = closing._replace(account=lease.account, key=lease.key)
        late = lease.state == EXPIRED
        if not late:
            self._count(pool, known, index, lease, closing)
        elif closing.tokens is not None and closing.tokens > lease.tokens:
            account = known.touch(lease.account, pool)
            for number, meter in enumerate(account.meters[2:], 2):
                if meter and lease.granted >= account.learned.get(number, 0):
                    meter.amend(closing.tokens - lease.tokens, lease.granted, pool.now)
        if closing.seen and closing.outcome != "unsent":
            account = known.touch(lease.account, pool)
            learn(pool, account, lease, closing.seen, lambda: self._earliest(known, account, 0)[0])
        if known.lost is not None and known.lost + 2 * ttl > pool.now:
            self._bury(known, closing.id, ttl)  # a restore of it may still be on its way
        else:
            del known.leases[closing.id]
            known.expiry.drop(closing.id)
        account = known.look(lease.account, pool)
        amended = closing.outcome == "unsent" or (closing.tokens is not None and closing.tokens > lease.tokens)
        days = account.days_seen(pool.now) if amended or account.quota[1] else ""
        return Settled(int(late), conclude(pool, known, index, key_count, closing, lease), days)

    def _bury(self, known: ModelClass, id: str, ttl: int) -> None:
        known.leases[id] = Lease(TOMB, 0, 0, 0, False, "", "", 0)
        known.watch(id, self._pool.now + 2 * ttl)  # type: ignore[union-attr]

    def _count(self, pool: Pool, known: ModelClass, index: Index, lease: Lease, closing: Closing) -> None:
        unsent, tokens = closing.outcome == "unsent", closing.tokens
        account = known.touch(lease.account, pool)
        quota = account.quota
        sooner = unsent or (quota[0] and account.live >= quota[0]) or account.held > 0
        pool.freed += bool(sooner or quota[0])
        if unsent:
            self.refund(known, lease)
        else:
            self._close(known, lease, lease.tokens if tokens is None else tokens)
            for number, meter in account.charged(lease):
                if number > 1 and tokens is not None and tokens > lease.tokens:
                    meter.amend(tokens - lease.tokens, lease.granted, pool.now)
        if sooner:
            at = self._earliest(known, account, 0)[0]
            at = 0 if at <= pool.now else at
            if at < index.scores.get(lease.account, -1):
                index.put(lease.account, at)

    def refund(self, known: ModelClass, lease: Lease) -> None:
        """A lease ends of which nothing was used."""
        account = self._close(known, lease, 0)
        for number, meter in account.charged(lease):
            meter.amend(-lease.tokens if number > 1 else -1, lease.granted, self._pool.now)  # type: ignore[union-attr]

    def _renew(self, op: Renew) -> NotRegistered | list[bool]:
        pool = self._pool
        known = pool.classes.get(op.to.model_class) if pool else None
        if op.birth and (known is None or op.birth != known.birth):
            return NotRegistered()
        if pool is None or known is None:
            return [False for _ in op.ids]
        self._reap(known, op.ttl_ms)
        renewed = []
        for id in op.ids:
            lease = known.leases.get(id)
            if lease and lease.state == LIVE and lease.expires <= pool.now:
                self._expire(known, [id], op.ttl_ms)
            alive = lease is not None and lease.state == LIVE
            if lease and alive:
                lease.expires = max(lease.expires, min(pool.now + op.ttl_ms, lease.granted + op.longest_ms))
                known.watch(id, lease.expires)
                if lease.probe:
                    for scope in (pool.breaker, pool.accounts.get(lease.account), pool.keys.get(lease.key)):
                        if scope and scope.probe == id:
                            scope.probe_until = lease.expires
            renewed.append(alive)
        return renewed

    def _restore(self, op: Restore) -> bool:
        pool = self._pool
        known = pool.classes.get(op.to.model_class) if pool else None
        if pool is None or known is None or op.birth != known.birth:
            return False
        self._reap(known, op.ttl_ms)
        for id, name, key, tokens, granted in op.live:
            lease = known.leases.get(id)
            if lease and lease.state == LIVE and (lease.account, lease.key) != (name, key):
                self.refund(known, lease)  # what was told came to be elsewhere: its answer was lost
                lease = None
            elif lease and lease.state == EXPIRED:
                account = known.touch(lease.account, pool)
                for meter in account.meters[2:] if account.quota[1] else ():
                    if meter:
                        meter.amend(-lease.tokens, int(known.expiry.scores[id]) - 2 * op.ttl_ms, pool.now)
                lease = None
            if lease is None:
                account = known.touch(name, pool)
                account.live += 1
                if account.quota[1]:
                    account.held += tokens
                    account.ever_held += tokens
                let_go, expires = account.ever_held - account.held, pool.now + op.ttl_ms
                known.leases[id] = Lease(LIVE, tokens, granted, expires, False, name, key, let_go)
                known.watch(id, expires)
        for name, at, *used in op.days:
            account = known.touch(name, pool)
            for meter, n in zip(account.meters[1::2], used):
                if meter:
                    use_up_to(meter, meter.still(n, at, pool.now), pool.now)
        kept = {worker: last for worker, last in known.restored.items() if pool.now - last[1] < KEEP}
        if op.spent and kept.get(op.worker, (-1, 0))[0] < op.number:
            known.restored = {**kept, op.worker: (op.number, pool.now)}
            for name, *spent in op.spent:
                for meter, n in zip(known.touch(name, pool).meters, spent):
                    if meter and n > 0:
                        meter.charge(n, pool.now)
        return True

    def _inspect(self, op: Inspect) -> Snapshot:
        pool, to = self._pool, op.to
        known = pool.classes.get(to.model_class) if pool else None
        if pool and known:
            self._reap(known, op.ttl_ms)
        now = pool.now if pool else 0

        def left(at: float) -> int:
            return int(max(0, at - now))

        breaker = pool.breaker if pool else None
        accounts = {}
        for member in to.members:
            name = member.account
            out = pool.accounts.get(name) if pool else None
            out_ms, reason = (left(out.until), out.reason) if out else (0, "")
            if pool is None or known is None:
                accounts[name] = AccountRow(0, 0, 0, out_ms, reason, {})
                continue
            account = known.look(name, pool)
            meters = {
                METERS[number]: (float(meter.used(now)), meter.limit, number in account.learned)
                for number, meter in enumerate(account.meters)
                if meter
            }
            accounts[name] = AccountRow(account.live, account.held, left(account.cooldown), out_ms, reason, meters)
        keys = {}
        for key in to.fingerprints:
            scope = pool.keys.get(key) if pool else None
            if scope is None:
                keys[key] = KeyRow(0, "", 0, 0)
            else:
                disabled = -1 if scope.disabled == -1 else left(scope.disabled)
                keys[key] = KeyRow(left(scope.until), scope.reason, scope.failures, disabled)
        claims = valid(known.claims, now) if known else []
        line = [
            ClaimRow(claim.id, left(claim.told), claim.reason, tuple(claim.waiting))  # type: ignore[arg-type]
            for claim in claims
        ]
        breaker_ms = left(breaker.until) if breaker else 0
        classes = list(pool.classes) if pool else []
        return Snapshot(breaker.reason if breaker else "", breaker_ms, line, classes, accounts, keys, now)

    def _admin(self, op: Admin) -> bool:
        pool = self._pool
        if pool is None:
            return False
        if op.verb == "disable":
            scope = pool.keys.setdefault(op.key, KeyScope())
            scope.disabled = -1 if op.ms is None else pool.now + op.ms
        elif op.verb != "wake":
            pool.keys.pop(op.key, None)
            pool.accounts.pop(op.account, None)
            for name in op.classes if op.verb == "reset" else ():
                known = pool.classes.get(name)
                account = known.accounts.get(op.account) if known else None
                if account:
                    account.cooldown = account.refusals = account.since = 0
                    forget(account)
        for name in op.classes if op.verb != "disable" else ():
            if name in pool.classes:
                pool.wake(pool.classes[name])
        pool.revision += op.verb != "wake"
        return True
