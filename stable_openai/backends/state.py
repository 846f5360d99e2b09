"""The state of a pool in memory: what lua/prelude.lua calls the schema, as objects."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable

from stable_openai._limits import Quota
from stable_openai._ops import Member
from stable_openai.backends.line import Claim, valid, wake
from stable_openai.backends.meters import POLL, Meter, drain, make_meter
from stable_openai.backends.scopes import KeyScope, Scope

__all__ = [
    "DAY",
    "EXAMINED",
    "EXPIRED",
    "LIVE",
    "NEVER",
    "TOMB",
    "UNHEARD",
    "Account",
    "Index",
    "Lease",
    "ModelClass",
    "Pool",
    "Ring",
]

NEVER = 2**52
DAY = 86_400_000
SETTLING, REGATHERING, UNHEARD = 2000, 8000, 250
EXAMINED = 16
LIVE, EXPIRED, TOMB = 1, 2, 3


class Index:
    """Names in the order of their scores, as in a sorted set."""

    __slots__ = ("order", "scores")

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self.order: list[tuple[float, str]] = []

    def put(self, name: str, score: float) -> None:
        old = self.scores.get(name)
        if old is not None:
            del self.order[bisect_left(self.order, (old, name))]
        self.scores[name] = score
        insort(self.order, (score, name))

    def drop(self, name: str) -> None:
        old = self.scores.pop(name, None)
        if old is not None:
            del self.order[bisect_left(self.order, (old, name))]

    def zero(self) -> None:
        self.scores = dict.fromkeys(self.scores, 0)
        self.order = [(0, name) for name in sorted(self.scores)]


class Ring:
    __slots__ = ("index", "members", "seen")

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.members: dict[str, Member] = {}
        self.index = Index()


class Account:
    """`quota` is what was declared, and under it what was learned; `learned` says since when, by the meter's number.
    `ever_held` are all tokens that it has ever held."""

    __slots__ = ("cooldown", "ever_held", "held", "learned", "live", "meters", "quota", "refusals", "since", "turn")

    def __init__(self, quota: Quota, pool: Pool) -> None:
        self.quota = quota
        self.live = self.held = self.cooldown = self.refusals = self.since = self.turn = self.ever_held = 0
        self.learned: dict[int, int] = {}
        self.meters: list[Meter | None] = [make_meter(quota, number, pool) for number in range(4)]

    def drain(self, pool: Pool) -> None:
        """It was lost, and of its last minute anything may have been used (see account_of in lua/accounts.lua)."""
        for meter in self.meters[::2]:
            if meter:
                drain(meter, pool.now)
        regathers = self.quota[0] or self.quota[1] or self.meters[1] or self.meters[3]
        if not pool.alone:
            self.cooldown = max(self.cooldown, pool.now + (REGATHERING if regathers else SETTLING))

    def charged(self, lease: Lease) -> list[tuple[int, Meter]]:
        """The meters that a lease was charged to: not those of limits that were learned since; nor, where tokens are
        charged by use, theirs."""
        return [
            (number, meter)
            for number, meter in enumerate(self.meters)
            if meter and not (number > 1 and self.quota[1]) and lease.granted >= self.learned.get(number, 0)
        ]

    def days_seen(self, now: int) -> str:
        requests, tokens = self.meters[1], self.meters[3]
        if not (requests or tokens):
            return ""
        return f"{now} {requests.used(now) if requests else 0:.17g} {tokens.used(now) if tokens else 0:.17g}"


class Lease:
    """`let_go`: of the tokens that the account had ever held, those that it held no longer when this was granted."""

    __slots__ = ("account", "expires", "granted", "key", "let_go", "probe", "state", "tokens")

    def __init__(
        self, state: int, tokens: int, granted: int, expires: int, probe: bool, account: str, key: str, let_go: int
    ) -> None:
        self.state, self.tokens, self.granted, self.expires = state, tokens, granted, expires
        self.probe, self.account, self.key, self.let_go = probe, account, key, let_go


class ModelClass:
    """What the pool knows of one class of models."""

    def __init__(self, usual: Quota, birth: str) -> None:
        self.usual, self.birth = usual, birth
        self.lost: int | None = None  # when a worker said so
        self.restored: dict[str, tuple[int, int]] = {}
        self.quotas: dict[str, Quota] = {}
        self.rings: dict[str, Ring] = {}
        self.accounts: dict[str, Account] = {}
        self.leases: dict[str, Lease] = {}
        self.expiry = Index()
        self.due: int | None = None
        self.served: dict[str, list[str]] = {}
        self.claims: list[Claim] = []
        self.wakes: list[int] = []

    def look(self, name: str, pool: Pool) -> Account:
        """The account; a new one, that is not kept, where nothing has been charged to it so far."""
        return self.accounts.get(name) or self._begin(name, pool)

    def touch(self, name: str, pool: Pool) -> Account:
        """The account, to be changed."""
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = self._begin(name, pool)
        return account

    def _begin(self, name: str, pool: Pool) -> Account:
        quota, now = self.quotas.get(name) or self.usual, pool.now
        if self.lost is None or not 0 <= now - self.lost < DAY:
            return Account(quota, pool)
        pool.now = self.lost  # it was lost too
        account = Account(quota, pool)
        account.drain(pool)
        pool.now = now
        return account

    def watch(self, id: str, at: int) -> None:
        self.expiry.put(id, at)
        if self.due is None or at < self.due:
            self.due = at


class Pool:
    """The clock, and what is out."""

    def __init__(self, epoch: str, now: int, alone: bool) -> None:
        self.epoch, self.alone = epoch, alone
        self.base = 0
        self.now = self.last = now
        self.back: int | None = None
        self.revision = 0
        self.days: dict[str, list[int]] = {}
        self.stale_days = False
        self.accounts: dict[str, Scope] = {}
        self.keys: dict[str, KeyScope] = {}
        self.breaker: Scope | None = None
        self.auth: dict[str, tuple[int, str]] = {}
        self.classes: dict[str, ModelClass] = {}
        self.freed, self.healed = 0, False  # by the settle that runs

    def wake(self, known: ModelClass, count: int | None = None) -> None:
        """Wake so many waiting workers, or all."""
        claims = valid(known.claims, self.now)
        wake(known.wakes, claims, len(claims) if count is None else count)

    def take_wakes(self) -> list[str]:
        """The classes of which somebody is to be woken; they are, from now on."""
        names: list[str] = []
        for name, known in self.classes.items():
            if known.wakes:
                known.wakes.clear()
                names.append(name)
        return names

    def tick(self, raw: int) -> None:
        now = raw - self.base
        if now >= self.last:
            if self.back is not None or now - self.last >= 1000:
                self.last, self.back = now, None
        else:
            now = self.last
            if self.back is None or raw < self.back:
                self.back = raw
            elif raw - self.back >= 60_000:
                self.base, self.back = raw - now, None
        self.now = now

    def window(self, period: int, zone: str) -> Callable[[int], tuple[int, int] | None]:
        """The calendar's window at a time: its start and end in epoch ms; None when its days are not registered."""

        def minute(at: int) -> tuple[int, int] | None:
            start = (at + self.base) // period * period
            return start, start + period

        def day(at: int) -> tuple[int, int] | None:
            days = self.days.get(zone, [])
            for start, finish in itertools.pairwise(days):
                if start <= at + self.base < finish:
                    return start, finish
            self.stale_days = self.stale_days or at == self.now
            return None

        return minute if period else day

    def opens(self, scope: Scope | None) -> int | None:
        if scope is None or not scope.until:
            return 0
        return None if scope.probe and scope.probe_until > self.now else scope.until

    def key_opens(self, key: str, model: str) -> tuple[int, str, bool]:
        scope = self.keys.get(key)
        if scope is None:
            return 0, "", False
        if scope.disabled == -1:
            return self.now + POLL, "disabled", True
        open_at, why, loose = self.opens(scope), scope.reason, False
        if open_at is None:
            open_at, loose = self.now + POLL, True
        if scope.disabled and scope.disabled > open_at:
            open_at, why, loose = scope.disabled, "disabled", False
        missing = scope.models.get(model, 0)
        if missing > open_at:
            open_at, why, loose = missing, "model_not_found", False
        return open_at, why, loose

    def key_of(self, member: Member, turn: int, model: str) -> tuple[str, int, str, bool]:
        keys = member.keys
        if len(keys) == 1:
            return (keys[0][0], *self.key_opens(keys[0][0], model))
        place, start = turn % member.weight, 0
        while place >= keys[start][1]:
            place, start = place - keys[start][1], start + 1
        best: tuple[str, int, str, bool] | None = None
        for i in range(start, start + min(len(keys), EXAMINED)):
            key = keys[i % len(keys)][0]
            found = (key, *self.key_opens(key, model))
            if best is None or found[1] < best[1]:
                best = found
            if found[1] <= self.now:
                break
        assert best is not None
        return best
