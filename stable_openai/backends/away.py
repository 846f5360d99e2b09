"""What a worker does while Redis is away: a memory backend that holds its share of the keys, and books of what is used.

Whole accounts are dealt by rank. Only where there are fewer accounts than workers, or the workers hold different ones,
is an account split: each limit into whole parts, the remainder to the low ranks. A part of nothing waits, and so does
an account whose days nobody here has seen. Nothing is left of the last minute, since others may have used it: as after
a loss (see lua/accounts.lua). Slots that are not our own may be others', who renew them, and so are taken for as long
as a lease may be held.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from stable_openai._limits import BUCKET, Quota, day_starts
from stable_openai._ops import (
    AccountRow,
    Acquire,
    Acquired,
    Admin,
    Answer,
    Closing,
    Days,
    Granted,
    Inspect,
    KeyRow,
    Live,
    Member,
    NotRegistered,
    Refused,
    Register,
    Registered,
    Registration,
    Renew,
    Restore,
    Settle,
    Settled,
    Snapshot,
    Spent,
    TooLarge,
    days_of,
)
from stable_openai._worker import LONGEST_HOLD_MS
from stable_openai.backends.memory import MemoryBackend
from stable_openai.errors import BrokerUnavailable

if TYPE_CHECKING:
    from stable_openai._worker import Held, Worker

__all__ = ["Away", "Book", "Seat", "deal", "part"]

LATELY_S = 71.0  # a minute, and the largest headroom
SHARE_MS = 1000  # after which who has no share of a key looks again
NOTHING = Snapshot("", 0, [], [], {}, {}, 0)


class Seat(NamedTuple):
    """A worker's place in a roster."""

    rank: int
    size: int
    alike: bool


def deal(accounts: list[str], seat: Seat) -> dict[str, tuple[int, int]]:
    """The accounts that fall to a worker: for each its place among those who share it, and how many they are.

    >>> deal(["a", "b", "c"], Seat(1, 2, True))
    {'b': (0, 1)}
    >>> deal(["a", "b"], Seat(2, 3, True))
    {'a': (1, 2)}
    """
    rank, size, alike = seat
    if not alike:
        return dict.fromkeys(accounts, (rank, size))
    if len(accounts) >= size:
        return dict.fromkeys(sorted(accounts)[rank::size], (0, 1))
    mine = rank % len(accounts)
    return {sorted(accounts)[mine]: (rank // len(accounts), len(range(mine, size, len(accounts))))}


def part(quota: Quota, place: int, of: int) -> Quota | None:
    """One of so many parts of an account's limits, the remainders to the first; None where that is nothing of one."""
    if of == 1:
        return quota
    concurrency, by_use, *numbers = quota[:-1]
    parted = [_part(concurrency, place, of), by_use]
    if concurrency and not parted[0]:
        return None
    for first in range(0, 16, 4):
        rule, limit, *compiled = numbers[first : first + 4]
        mine = _part(limit, place, of)
        if rule == BUCKET:
            compiled = [compiled[0] * mine / limit, _part(compiled[1], place, of)]
        if (rule and not mine) or (rule == BUCKET and not compiled[1]):
            return None
        parted += [rule, mine, *compiled]
    return (*parted, quota[-1])


def _held(worker: Worker) -> dict[str, Held]:
    """The leases of a worker, those that are being settled too."""
    return {**worker.live, **worker.closing}


def _live(id: str, held: Held) -> Live:
    return Live(id, held.lease.account, held.lease.key, held.tokens, held.granted_ms)


def _part(whole: int, place: int, of: int) -> int:
    return whole // of + (place < whole % of)


class Tally:
    """What was used of one account: at which time how many requests and tokens, as far as it is a minute ago; and all
    before."""

    __slots__ = ("before", "lately")

    def __init__(self) -> None:
        self.lately: deque[tuple[float, int, int]] = deque()
        self.before = (0, 0)

    def add(self, requests: int, tokens: int) -> None:
        now = monotonic()
        while self.lately and self.lately[0][0] < now - LATELY_S:
            _, old_requests, old_tokens = self.lately.popleft()
            self.before = (self.before[0] + old_requests, self.before[1] + old_tokens)
        self.lately.append((now, requests, tokens))

    def spent(self, account: str) -> Spent:
        self.add(0, 0)
        requests = sum(requests for _, requests, _ in self.lately)
        tokens = sum(tokens for _, _, tokens in self.lately)
        all_requests, all_tokens = self.before[0] + requests, self.before[1] + tokens
        return Spent(account, max(0, requests), max(0, all_requests), max(0, tokens), max(0, all_tokens))


class Book:
    """What was used of a class, and not said so far; `batches` are those that were sent, maybe in vain."""

    def __init__(self, to: Registration) -> None:
        self.to = to
        self.unsaid: dict[str, Tally] = {}
        self.batches: deque[tuple[int, tuple[Spent, ...]]] = deque()
        self.total = [0, 0]

    def add(self, account: str, requests: int, tokens: int) -> None:
        self.unsaid.setdefault(account, Tally()).add(requests, tokens)
        self.total[0] += requests
        self.total[1] += tokens

    def take(self) -> tuple[Spent, ...]:
        unsaid, self.unsaid = self.unsaid, {}
        return tuple(tally.spent(account) for account, tally in unsaid.items())


class Open(NamedTuple):
    """A lease of a class, that was granted here. `by_use`: its tokens are charged when it is settled. `doubtful`: Redis
    may have granted it too, and its answer was lost."""

    to: Registration
    live: Live
    by_use: bool
    doubtful: bool


class Away:
    """The broker while Redis is away: a memory backend that holds this worker's share, and books of what is used."""

    def __init__(self, worker: Worker, shares: dict[str, tuple[int, int]], others: bool, ahead_ms: float) -> None:
        self.worker, self.shares, self.since = worker, shares, monotonic()
        self.others = others
        self.books: dict[str, Book] = {}
        self._mutex = threading.RLock()  # what is woken may ask again
        self._sealed = False
        self._ahead_ms = ahead_ms
        self._memory = MemoryBackend(self._now_ms, alone=True)
        self._memory.on_wake = worker.nudge
        self._rings: dict[str, Registration | None] = {}
        self._open: dict[str, Open] = {}
        self._doubtful: set[str] = set()
        self._owed: list[tuple[Registration, Closing]] = []
        # What Redis has granted before.
        self._before = {id: Open(held.to, _live(id, held), False, False) for id, held in _held(worker).items()}

    def run(self, op: Any) -> Any:
        with self._mutex:
            if self._sealed:
                raise BrokerUnavailable("Redis is back, and is being told what was used meanwhile")
            if type(op) is Acquire:
                return self._acquire(op)
            if type(op) is Settle:
                return [self._settle(op, closing) for closing in op.closings]
            if type(op) is Inspect:
                return self._inspect(op)
            if type(op) is Renew:
                self._memory.run(op._replace(to=self._share(op.to) or op.to, birth=""))
                return [True for _ in op.ids]
            if type(op) is Restore:
                raise BrokerUnavailable("Redis is away again")
            if type(op) is Register:
                return Registered("", 0, op.known)
            assert type(op) is Admin
            raise BrokerUnavailable("Redis is away: what is decided about a key is for the whole pool")

    def _now_ms(self) -> int:
        """The store's time, as far as it is known."""
        return round(monotonic() * 1000 + self._ahead_ms)

    def doubt(self, op: Any) -> None:
        """Redis did not answer this; it may have run it."""
        if type(op) is Acquire:
            with self._mutex:
                self._doubtful.update(ask.id for ask in op.asks)

    def seal(self) -> bool:
        """Nothing more is granted here; False: it is sealed already."""
        with self._mutex:
            sealed, self._sealed = self._sealed, True
            return not sealed

    @property
    def is_sealed(self) -> bool:
        return self._sealed

    def reopen(self) -> None:
        with self._mutex:
            self._sealed = False

    def classes(self) -> list[Book]:
        """The books of all classes that there is something to tell of."""
        for open in tuple(self._live().values()):
            self._book(open.to)
        return list(self.books.values())

    def live(self, book: Book) -> tuple[Live, ...]:
        """The leases of a class that are to be live in Redis: those that were granted here; and there before, also if
        they have ended meanwhile, since they are settled next."""
        leases = self._live().values()
        return tuple(open.live for open in leases if open.to.model_class == book.to.model_class)

    def _live(self) -> dict[str, Open]:
        needed = {closing.id for _, closing in self._owed} | _held(self.worker).keys()
        before = {id: open for id, open in self._before.items() if id in needed}
        return {**before, **self._open}

    def take_owed(self) -> list[tuple[Registration, Closing]]:
        """How leases ended that Redis had granted."""
        owed, self._owed = self._owed, []
        return owed

    def total(self) -> tuple[int, int]:
        books = self.books.values()
        return sum(book.total[0] for book in books), sum(book.total[1] for book in books)

    def _book(self, to: Registration) -> Book:
        book = self.books.get(to.model_class)
        if book is None:
            book = self.books[to.model_class] = Book(to)
        return book

    # A ring's share.

    def _share(self, to: Registration) -> Registration | None:
        """What this worker holds of a ring; None where that is nothing."""
        if to.ring not in self._rings:
            self._rings[to.ring] = share = self._cut(to)
            if share is not None:
                self._begin(to, share)
        return self._rings[to.ring]

    def _cut(self, to: Registration) -> Registration | None:
        quotas: list[Quota] = []
        members: list[Member] = []
        seen = self.worker.days_seen(to)
        unseen = {member.account for member in to.counts_days() if member.account not in seen}
        for member in to.members:
            if member.account not in self.shares or member.account in unseen:
                continue
            parted = part(to.quotas[member.quota], *self.shares[member.account])
            if parted is not None:
                if parted not in quotas:
                    quotas.append(parted)
                members.append(member._replace(quota=quotas.index(parted)))
        return Registration(to.pool, to.model_class, quotas, members) if members else None

    def _begin(self, to: Registration, share: Registration) -> None:
        self._register(share)
        seen, quotas = self.worker.days_seen(to), {member.account: to.quotas[member.quota] for member in to.members}
        days, mine = [], {member.account: share.quotas[member.quota] for member in share.members}
        for account, text in seen.items():
            if account in mine:
                at, *used = days_of(account, text)[1:]
                place, of = self.shares[account]
                left = [
                    mine[account][number] - _part(max(0, int(quotas[account][number] - n)), place, of)
                    for number, n in zip((7, 15), used)
                ]
                days.append(Days(account, int(at), *left))
        live = tuple(
            open.live
            for open in self._before.values()
            if open.to.model_class == to.model_class and open.live.account in mine and open.live.id in self.worker.live
        )
        own = Counter(row.account for row in live)
        slots = {account: mine[account][0] - own[account] if self.others else 0 for account in mine}
        taken = [Live(f"{account}:{n}", account, "", 0, 0) for account in mine for n in range(slots[account])]
        self._memory.run(Restore(share, self.worker.ttl_ms, "here", self.worker.id, tuple(days), live))
        self._memory.run(Restore(share, LONGEST_HOLD_MS, "here", self.worker.id, (), tuple(taken)))

    def _register(self, share: Registration) -> None:
        days = {zone: day_starts(zone, self._now_ms()) for zone in share.zones}
        self._memory.run(Register(share, "here", days, "here", known="in Redis"))

    # The operations.

    def _acquire(self, op: Acquire) -> Acquired:
        share = self._share(op.to)
        if share is None:
            refusal = Refused(SHARE_MS, "elsewhere", False, False)
            return Acquired(self._now_ms(), -1, -1, [refusal for _ in op.asks])
        local = op._replace(to=share, birth="here")
        reply = self._memory.run(local)
        if type(reply) is NotRegistered:  # the days that were registered are over
            self._register(share)
            reply = self._memory.run(local)
        by_use = {member.account: bool(share.quotas[member.quota][1]) for member in share.members}
        answers: list[Answer] = []
        for ask, answer in zip(op.asks, reply.answers):
            if type(answer) is Granted:
                answers.append(answer._replace(days=""))  # it is a part's
                if answer.id not in self._open and answer.id not in self.worker.live:
                    charged_later, doubtful = by_use[answer.account], ask.id in self._doubtful
                    live = Live(answer.id, answer.account, answer.key, ask.tokens, reply.now_ms)
                    self._open[answer.id] = Open(op.to, live, charged_later, doubtful)
                    self._book(op.to).add(answer.account, 1, 0 if by_use[answer.account] else ask.tokens)
            elif type(answer) is TooLarge and answer.limit and self._fits(op.to, ask.tokens):
                answers.append(Refused(SHARE_MS, answer.limit, False, False))  # for a part
            else:
                answers.append(answer)
        return Acquired(reply.now_ms, reply.in_time, reply.last_ms, answers)

    @staticmethod
    def _fits(to: Registration, tokens: int) -> bool:
        """Whether some account's whole limits admit a request."""
        return any(all(tokens <= quota[n] for n in (11, 15) if quota[n - 1]) for quota in to.quotas)

    def _settle(self, op: Settle, closing: Closing) -> Settled:
        share = self._share(op.to)
        (settled,) = self._memory.run(op._replace(to=share or op.to, closings=(closing,), birth=""))
        lease = self._open.pop(closing.id, None)
        if lease is not None and lease.doubtful:
            self._owed.append((op.to, Closing(closing.id, "", "", closing.model, "unsent")))
        if lease is None:
            self._owed.append((op.to, closing))
        elif closing.outcome == "unsent":
            self._book(op.to).add(lease.live.account, -1, 0 if lease.by_use else -lease.live.tokens)
        else:
            used = lease.live.tokens if closing.tokens is None else closing.tokens
            more = used if lease.by_use else max(0, used - lease.live.tokens)
            self._book(op.to).add(lease.live.account, 0, more)
        return Settled(0 if settled.code == 2 else settled.code, settled.advice)

    def _inspect(self, op: Inspect) -> Snapshot:
        share = self._share(op.to)
        found = self._memory.run(op._replace(to=share)) if share else NOTHING
        elsewhere = AccountRow(0, 0, 0, SHARE_MS, "elsewhere", {})
        accounts = {member.account: found.accounts.get(member.account, elsewhere) for member in op.to.members}
        keys = {key: found.keys.get(key, KeyRow(0, "", 0, 0)) for key in op.to.fingerprints}
        return found._replace(accounts=accounts, keys=keys)
