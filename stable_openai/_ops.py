"""The broker's operations and replies as values, and how they travel: to KEYS and ARGV, and back.

Every backend takes one of the operations and answers with its reply:

    Register -> Registered                            Restore -> bool (False: register first)
    Acquire  -> NotRegistered or Acquired             Inspect -> Snapshot
    Settle   -> NotRegistered or list[Settled]        Admin   -> bool (False: the pool is not known)
    Renew    -> NotRegistered or list[bool] (lives)   Attend  -> Roster

An Answer is Granted, Refused, Gone or TooLarge. Times are whole milliseconds. These are named tuples and not
dataclasses because some are made for every attempt, and a frozen dataclass takes four times as long to make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from stable_openai._limits import METERS, Quota
from stable_openai.errors import BrokerUnavailable

__all__ = [
    "LARGE",
    "RETURNS_MS",
    "TICKETS",
    "Acquire",
    "Acquired",
    "Admin",
    "Answer",
    "Ask",
    "Attend",
    "Closing",
    "Days",
    "Demand",
    "Gone",
    "Granted",
    "Inspect",
    "Live",
    "Member",
    "NotRegistered",
    "Op",
    "Refused",
    "Register",
    "Registered",
    "Registration",
    "Renew",
    "Restore",
    "Roster",
    "Settle",
    "Settled",
    "Snapshot",
    "Spent",
    "TooLarge",
    "days_of",
    "decode",
    "encode",
    "is_ticket",
]  # fmt: skip


class Member(NamedTuple):
    """An account of a ring: its quota's number, its weight and its keys (fingerprint, weight)."""

    account: str
    quota: int
    weight: int
    keys: tuple[tuple[str, int], ...]


class Registration:
    """The keys that a worker holds for one class, with their limits. Its digest is the ring's name: an acquire
    that names a digest the store does not know is answered with NotRegistered."""

    __slots__ = ("fingerprints", "keys", "members", "model_class", "pool", "quotas", "ring", "zones")

    def __init__(self, pool: str, model_class: str, quotas: Sequence[Quota], members: Iterable[Member]) -> None:
        self.pool = pool
        self.model_class = model_class
        self.quotas = tuple(quotas)
        self.members = tuple(members)
        self.fingerprints = [fingerprint for member in self.members for fingerprint, _ in member.keys]
        self.zones = sorted({quota[-1] for quota in quotas if quota[-1]})
        import hashlib  # here, so that importing the package stays quick
        import json

        text = json.dumps([model_class, self.quotas, self.members])
        self.ring = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        tag = f"stable:{{{pool}}}"
        self.keys = (
            f"{tag}:pool",
            f"{tag}:class:{model_class}",
            f"{tag}:expiry:{model_class}",
            f"{tag}:ring:{self.ring}",
            f"{tag}:ready:{self.ring}",
            f"{tag}:wakes:{model_class}",
        )

    def counts_days(self) -> Iterator[Member]:
        """The members whose days have limits."""
        days = [quota[6] > 0 or quota[14] > 0 for quota in self.quotas]
        return (member for member in self.members if days[member.quota])


LARGE = 4
LONGEST_MS = 10**12
# Claims of calls that go away and come again (lua/line.lua): so many are kept, each for so long unless it comes.
TICKETS, RETURNS_MS = 128, 60_000


class Ask(NamedTuple):
    """One request for a lease. Of the accounts, `avoid` is passed over while others can serve, `wanted` is tried first,
    and `never` is not chosen. `rank` is the band, 0 the most urgent to 3; LARGE more: it may hold an account."""

    id: str
    tokens: int
    model: str
    avoid: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    rank: int = 1


class Demand(NamedTuple):
    """What a worker's line wants: the id of its claim, how many wait in each band, the tokens of the smallest, how long
    the last of them waits at most (-1: for ever), and how many other workers may use the wake that it got (-1: it got
    none)."""

    claim: str
    bands: tuple[int, int, int, int]
    smallest: int
    patience_ms: int = -1
    hops: int = -1


def is_ticket(claim: str) -> bool:
    return claim.startswith("t")


class Closing(NamedTuple):
    """How a lease ended. `outcome` and `detail` are those of settle.lua; tokens None: not known. `seen` is what the
    response's headers said of limits (see _limits.seen_text); `siblings` are accounts that share this one's quota
    though nobody has declared it."""

    id: str
    account: str
    key: str
    model: str
    outcome: str
    tokens: int | None = None
    detail: str = ""
    jitter: float = 0.0
    seen: str = ""
    siblings: tuple[str, ...] = ()


class Register(NamedTuple):
    """`birth` is what a new class will be called, `known` what it was called when the worker knew it last, `ago_ms`
    before now ("": it never did)."""

    to: Registration
    epoch: str
    days: dict[str, list[int]]
    birth: str = ""
    known: str = ""
    ago_ms: int = 0


class Acquire(NamedTuple):
    """`demand` None: who asks does not wait. No asks: nobody waits any more. `birth` is what the class was called when
    the worker registered: of another one, it is told to register."""

    to: Registration
    ttl_ms: int
    asks: tuple[Ask, ...]
    demand: Demand | None = None
    birth: str = ""


class Settle(NamedTuple):
    """`birth` as in Acquire, but "" is any."""

    to: Registration
    ttl_ms: int
    closings: tuple[Closing, ...]
    birth: str = ""


class Renew(NamedTuple):
    """`birth` as in Settle."""

    to: Registration
    ttl_ms: int
    longest_ms: int
    ids: tuple[str, ...]
    birth: str = ""


class Days(NamedTuple):
    """What was used of an account's days at a time of the store's (ms)."""

    account: str
    at: int
    requests: float
    tokens: float


def days_of(account: str, text: str) -> Days:
    """What the store said of an account's days (see Granted)."""
    at, requests, tokens = text.split()
    return Days(account, int(at), float(requests), float(tokens))


class Live(NamedTuple):
    id: str
    account: str
    key: str
    tokens: int
    granted: int


class Spent(NamedTuple):
    """What was used of an account where the store was away, `last` in its last minute."""

    account: str
    last_requests: int
    requests: int
    last_tokens: int
    tokens: int


class Restore(NamedTuple):
    """What a worker knows of a class and the store does not. What was `spent` is charged once: `number` is higher than
    that of all that the worker has restored before."""

    to: Registration
    ttl_ms: int
    birth: str
    worker: str
    days: tuple[Days, ...] = ()
    live: tuple[Live, ...] = ()
    spent: tuple[Spent, ...] = ()
    number: int = 0


class Attend(NamedTuple):
    """Be in the roster for some periods of so many ms (0: leave it). `shares` says what the worker can share, `births`
    what the classes that it knows are called, `away_ms` for how long it could not reach the store."""

    pool: str
    worker: str
    shares: str
    period_ms: int
    births: tuple[tuple[str, str], ...] = ()
    away_ms: int = 0


class Inspect(NamedTuple):
    to: Registration
    ttl_ms: int


class Admin(NamedTuple):
    """`verb` is "disable", "enable", "reset" or "wake" (only who waits, whatever the key); `classes` are all that the
    pool has."""

    pool: str
    verb: str
    key: str
    account: str
    ms: int | None
    classes: tuple[str, ...]


Op = Register | Acquire | Settle | Renew | Restore | Inspect | Admin | Attend


class Registered(NamedTuple):
    """`lost`: what the worker knew of the class is not there any more."""

    epoch: str
    moved: int
    birth: str = ""
    lost: bool = False


class Roster(NamedTuple):
    """A worker's place among those of the pool, since `age_ms`; `alike`: all can share the same. The classes that are
    others now are `lost`."""

    age_ms: int
    rank: int
    size: int
    alike: bool
    lost: tuple[str, ...] = ()


class NotRegistered(NamedTuple):
    pass


class Granted(NamedTuple):
    """`days` is what was used of the account's days, where they have limits (see days_seen in lua/meters.lua)."""

    id: str
    key: str
    account: str
    days: str = ""


class Refused(NamedTuple):
    """`exact`: the request can be served after `wait_ms`, else not before. `timed`: else that is only when to look
    again, for what is in the way has no time. `account` is the one that comes next."""

    wait_ms: int
    reason: str
    exact: bool
    timed: bool
    account: str = ""


class Gone(NamedTuple):
    pass


class TooLarge(NamedTuple):
    """`limit` "": no account is left that may be chosen."""

    limit: str


Answer = Granted | Refused | Gone | TooLarge


class Acquired(NamedTuple):
    """`now_ms` is the pool's time; `in_time` how many of the line can be served before the last of them gives up (-1:
    all, or it is not known), `last_ms` until the last of them would be. For a ticket (see lua/line.lua) `in_time` is
    how many tickets came before it."""

    now_ms: int
    in_time: int
    last_ms: int
    answers: list[Answer]


class Settled(NamedTuple):
    """`code` 0 done, 1 late, 2 gone; `advice` "", "out", "fault", "unknown" or "healed" (see settle.lua); `days` as in
    Granted."""

    code: int
    advice: str
    days: str = ""


class AccountRow(NamedTuple):
    live: int
    held: int
    cooldown_ms: int
    out_ms: int
    reason: str
    meters: dict[str, tuple[float, int, bool]]
    """The limits that are known: name -> (used, limit, whether it was learned from responses)."""


class KeyRow(NamedTuple):
    """`disabled_ms`: -1 until it is enabled again."""

    out_ms: int
    reason: str
    failures: int
    disabled_ms: int


class ClaimRow(NamedTuple):
    """A worker that waits: when it asks again, what stands in its way, how many wait in each band."""

    claim: str
    ms: int
    reason: str
    bands: tuple[int, int, int, int]


class Snapshot(NamedTuple):
    breaker: str
    breaker_ms: int
    line: list[ClaimRow]
    classes: list[str]
    """All that workers have registered."""
    accounts: dict[str, AccountRow]
    keys: dict[str, KeyRow]
    now_ms: int


def encode(op: Op, now: str) -> tuple[str, tuple[str, ...], list[Any]]:
    """The verb, KEYS and ARGV of an operation; `now` is ARGV[1]: ms in tests, else empty."""
    verb, encoder, _ = _CODECS[type(op)]
    keys, args = encoder(op, now)
    return verb, keys, args


def decode(op: Op, reply: Any) -> Any:
    """The reply of a script as a value. Raises BrokerUnavailable where it is none of the broker's."""
    try:
        return _CODECS[type(op)][2](op, reply)
    except (TypeError, ValueError, LookupError, AttributeError):
        raise BrokerUnavailable(f"Redis answered {type(op).__name__} with what is no reply of the broker's") from None


def _text(value: Any) -> str:
    return value if type(value) is str else value.decode()


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError
    return value


def _wait(value: Any) -> int:
    """Milliseconds; what is negative did not fit into the server's whole numbers."""
    return value if 0 <= _whole(value) <= LONGEST_MS else LONGEST_MS


def _register(op: Register, now: str) -> tuple[tuple[str, ...], list[Any]]:
    import json

    to = op.to
    members = [
        [member.account, member.quota + 1, member.weight, *(part for key in member.keys for part in key)]
        for member in to.members
    ]
    parts = (json.dumps(part) for part in (op.days, to.quotas, members))
    return to.keys, [now, to.ring, op.epoch, *parts, op.birth, op.known, op.ago_ms]


def _registered(op: Register, reply: list[Any]) -> Registered:
    epoch, moved, birth, lost = reply
    return Registered(_text(epoch), _whole(moved), _text(birth), _whole(lost) == 1)


def _acquire(op: Acquire, now: str) -> tuple[tuple[str, ...], list[Any]]:
    to = op.to
    demand = op.demand
    if demand is None:
        wanted = ""
    else:
        claim, (urgent, normal, low, idle), smallest, patience, hops = demand
        wanted = f"{claim} {urgent} {normal} {low} {idle} {smallest} {patience} {hops}"
    args: list[Any] = [now, op.ttl_ms, f"{to.ring}.{op.birth}", wanted]
    for id, tokens, model, avoid, first, never, rank in op.asks:
        args += (id, tokens, model, "\n".join(avoid), "\n".join(first), "\n".join(never), rank)
    return to.keys, args


def _acquired(op: Acquire, reply: list[Any]) -> NotRegistered | Acquired:
    if reply[0]:
        return NotRegistered()
    answers: list[Answer] = []
    place = 4
    for ask in op.asks:
        code, first, second, how, account = reply[place : place + 5]
        place += 5
        if code == 1:
            answers.append(Granted(ask.id, _text(first), _text(second), _text(account)))
        elif code == 0:
            answers.append(Refused(_wait(first), _text(second), how == 1, how != 2, _text(account)))
        else:
            answers.append(Gone() if _whole(code) == 2 else TooLarge(_text(second)))
    return Acquired(_whole(reply[1]), _whole(reply[2]), _whole(reply[3]), answers)


def _settle(op: Settle, now: str) -> tuple[tuple[str, ...], list[Any]]:
    keys = op.to.keys
    args: list[Any] = [now, op.ttl_ms, len(op.to.fingerprints), op.birth]
    for closing in op.closings:
        args += closing
        args[-1] = "\n".join(closing.siblings)
        if closing.tokens is None:
            args[-5] = ""
    return (keys[0], keys[1], keys[2], keys[4], keys[5]), args


def _settled(op: Settle, reply: list[Any]) -> NotRegistered | list[Settled]:
    if not reply and op.closings:
        return NotRegistered()
    if len(reply) != 3 * len(op.closings):
        raise ValueError
    return [Settled(_whole(code), _text(advice), _text(days)) for code, advice, days in zip(*[iter(reply)] * 3)]


def _renew(op: Renew, now: str) -> tuple[tuple[str, ...], list[Any]]:
    return op.to.keys[:3], [now, op.ttl_ms, op.longest_ms, op.birth, *op.ids]


def _renewed(op: Renew, reply: list[Any]) -> NotRegistered | list[bool]:
    if not reply and op.ids:
        return NotRegistered()
    if len(reply) != len(op.ids):
        raise ValueError
    return [_whole(code) == 1 for code in reply]


def _restore(op: Restore, now: str) -> tuple[tuple[str, ...], list[Any]]:
    import json

    parts = (json.dumps(part) for part in (op.days, op.live, op.spent))
    return op.to.keys[:3], [now, op.ttl_ms, op.birth, op.worker, op.number, *parts]


def _inspect(op: Inspect, now: str) -> tuple[tuple[str, ...], list[Any]]:
    accounts = [member.account for member in op.to.members]
    return op.to.keys[:3], [now, op.ttl_ms, len(accounts), *accounts, *op.to.fingerprints]


def _snapshot(op: Inspect, reply: list[Any]) -> Snapshot:
    (breaker, breaker_ms, now_ms), claims, classes, rows = reply[0], reply[1], reply[2], reply[3:]
    line = [ClaimRow(_text(claim), _wait(ms), _text(why), _bands(bands)) for claim, ms, why, *bands in claims]
    accounts = {}
    for member, (live, held, cooldown, out, why, *meters) in zip(op.to.members, rows):
        known = {name: (float(row[0]), int(row[1]), row[2] == 1) for name, row in zip(METERS, meters) if row}
        numbers = _whole(live), _whole(held), _wait(cooldown), _wait(out)
        accounts[member.account] = AccountRow(*numbers, _text(why), known)
    keys = {
        fingerprint: KeyRow(_wait(out), _text(why), _whole(failures), -1 if disabled == -1 else _wait(disabled))
        for fingerprint, (out, why, failures, disabled) in zip(op.to.fingerprints, rows[len(op.to.members) :])
    }
    if len(accounts) < len(op.to.members) or len(keys) < len(op.to.fingerprints):
        raise ValueError
    return Snapshot(
        _text(breaker), _wait(breaker_ms), line, [_text(name) for name in classes], accounts, keys, _whole(now_ms)
    )


def _bands(counts: list[Any]) -> tuple[int, int, int, int]:
    urgent, normal, low, idle = map(_whole, counts)
    return urgent, normal, low, idle


def _admin(op: Admin, now: str) -> tuple[tuple[str, ...], list[Any]]:
    tag = f"stable:{{{op.pool}}}"
    keys = (f"{tag}:pool", *(f"{tag}:{what}:{name}" for what in ("class", "wakes") for name in op.classes))
    return keys, [now, op.verb, op.key, op.account, "" if op.ms is None else op.ms]


def _attend(op: Attend, now: str) -> tuple[tuple[str, ...], list[Any]]:
    tag = f"stable:{{{op.pool}}}"
    keys = (f"{tag}:pool", f"{tag}:roster", *(f"{tag}:class:{name}" for name, _ in op.births))
    births = "\n".join(birth for _, birth in op.births)
    return keys, [now, op.worker, op.shares, op.period_ms or "", births, op.away_ms]


def _roster(op: Attend, reply: list[Any]) -> Roster:
    age_ms, rank, size, alike, *lost = reply
    return Roster(
        _whole(age_ms),
        _whole(rank),
        _whole(size),
        _whole(alike) == 1,
        tuple(op.births[number - 1][0] for number in lost),
    )


_Codec = tuple[str, Callable[[Any, str], tuple[tuple[str, ...], list[Any]]], Callable[[Any, Any], Any]]
_CODECS: dict[type, _Codec] = {
    Register: ("register", _register, _registered),
    Acquire: ("acquire", _acquire, _acquired),
    Settle: ("settle", _settle, _settled),
    Renew: ("renew", _renew, _renewed),
    Restore: ("restore", _restore, lambda op, reply: _whole(reply) == 1),
    Inspect: ("inspect", _inspect, _snapshot),
    Admin: ("admin", _admin, lambda op, reply: _whole(reply) == 1),
    Attend: ("attend", _attend, _roster),
}
