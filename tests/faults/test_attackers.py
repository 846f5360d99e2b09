"""Whatever comes from outside, made up by an attacker: no call fails with an error that is nobody's, none hangs, and no
garbage lifts a limit.

A limit is judged by what is granted: of a meter that is garbled in Redis never more than it had left before (it is read
as used up, and is whole again a period later); with the exception of what is well formed, and only wrong, which nobody
can tell from what is right.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stable_openai.manager
from stable_openai import (
    BrokerUnavailable,
    ConfigurationError,
    Exhausted,
    KeyManager,
    Limits,
    StableError,
    Verdict,
)
from stable_openai._headers import SLOTS, seen_in
from stable_openai._limits import quota
from stable_openai._ops import (
    Acquire,
    Acquired,
    Admin,
    Ask,
    Closing,
    Demand,
    Granted,
    Inspect,
    Member,
    NotRegistered,
    Refused,
    Register,
    Registration,
    Renew,
    Settle,
    Snapshot,
    decode,
)
from stable_openai._usage import last_error, tokens_used
from stable_openai._verdict import judge, verdict_of_response
from stable_openai.backends.redis import RedisBackend
from tests.faults.servers import Server, until

START = 1_790_000_000_000
TTL, LONGEST = 60_000, 900_000
POOL = "test-attackers"
VARIABLES = ("STABLE_OPENAI_KEYS", "OPENAI_API_KEY", "STABLE_OPENAI_REDIS", "STABLE_OPENAI_POOL")

quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(quick, max_examples=60)

NUMBERS = st.sampled_from(
    ["0", "-1", "1", "60", "1e3", "nan", "inf", "-inf", "1e999", "9" * 20, "9" * 5000, "0x10", "1_000", "٣", "½", " 5 "]
)
WORDS = NUMBERS | st.text(max_size=40) | st.sampled_from(["7m12s", "1h2m3.5s", "12ms", "2026-11-22T10:00:09Z", "soon"])
DATES = st.sampled_from(
    [
        "Sun, 22 Nov 2026 12:00:10 GMT",
        "Sun, 22 Nov 99999 12:00:10 GMT",
        "Sun, 31 Feb 0001 99:00:00 +9999",
        "Mon, 1 Jan 0001 00:00:00 +2359",
    ]
)
RATE_HEADERS = sorted(name for name in SLOTS if isinstance(name, str))
HEADERS = st.dictionaries(
    st.sampled_from([*RATE_HEADERS, "retry-after", "retry-after-ms", "x-should-retry", "date", "openai-organization"])
    | st.text(max_size=20),
    WORDS | DATES,
    max_size=8,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -(10**30)]) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CODES = st.sampled_from(
    ["rate_limit_exceeded", "insufficient_quota", "model_not_found", "invalid_api_key", "server_error"]
)
ERRORS = st.fixed_dictionaries(
    {},
    optional={
        "code": CODES | JSON,
        "type": CODES | JSON,
        "message": JSON | st.just("try again in 9s9s."),
        "error": JSON,
    },
)
BODIES = JSON | ERRORS | st.fixed_dictionaries({"error": ERRORS | JSON})
STATUSES = st.sampled_from([200, 400, 401, 402, 403, 404, 408, 409, 413, 429, 500, 503, 599]) | st.integers(-1, 10**6)


# What an upstream answers.


@quick
@given(HEADERS)
def test_headers(headers: dict[str, str]) -> None:
    for meter, limit, remaining in seen_in(headers):
        assert 0 <= meter <= 3
        assert limit is None or 1 <= limit <= 10**12
        assert remaining is None or 0 <= remaining <= (limit or 10**12)


@quick
@given(STATUSES, HEADERS, BODIES, JSON)
def test_errors(status: int, headers: dict[str, str], body: Any, code: Any) -> None:
    error = RuntimeError("of some SDK")
    vars(error).update(status_code=status, body=body, code=code, response=headers)
    event = RuntimeError("an event")
    vars(event).update(body=body)
    for verdict in (verdict_of_response(status, headers, body, code=code), judge(error), judge(event)):
        assert isinstance(verdict, Verdict)
        assert verdict.wait_s is None or 0 <= verdict.wait_s <= 900
        assert len(verdict.reason) < 100


@quick
@given(st.binary(max_size=60), st.sampled_from([b"", b'"usage": ', b'data: {"usage": {"total_tokens": ']), NUMBERS)
def test_bodies(garbage: bytes, before: bytes, number: str) -> None:
    for text in (
        before + garbage,
        garbage + before + number.encode() + b"}}\n",
        b'"usage": {"total_tokens": ' + garbage,
    ):
        used = tokens_used(text)
        assert used is None or 0 <= used <= 10**12
        last_error(b'data: {"error": ' + text)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stable-openai-") as folder, Server(folder) as server:
        until(server.admin.ping)
        server.admin.config_set("lua-time-limit", "500")  # a script that does not end is BUSY soon
        yield server


def url(server: Server) -> str:
    return f"redis://127.0.0.1:{server.port}"


REPORTS = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.integers(0, 100) | st.sampled_from([10**12, 10**30, 10**400]),
        "status": STATUSES,
        "headers": HEADERS,
        "error": ERRORS,
    },
)


@few
@given(reports=st.lists(REPORTS, min_size=1, max_size=4))
@pytest.mark.parametrize("rule", ["bucket", "sliding", "calendar"])
@pytest.mark.parametrize("where", ["memory", "redis"])
def test_reports(server: Server, where: str, rule: Any, reports: list[dict[str, Any]]) -> None:
    """What an upstream says of an attempt, however odd: the lease is settled, and no more is granted than the limit."""
    server.admin.flushall()
    limits = Limits(rpm=5, tpm=10**6, rule=rule)
    manager = KeyManager(
        ["sk-a", "sk-b"], url(server) if where == "redis" else None, pool=POOL, limits=limits, max_wait=0, headroom_s=0
    )
    granted = 0
    try:
        for report in [*reports, *[{}] * 12]:
            try:
                with manager.lease(model="gpt", tokens=1) as lease:
                    granted += 1
                    lease.report(**report)
            except (Exhausted, StableError):
                continue
        assert granted <= 10 * (2 if rule == "calendar" else 1)  # the minute may end meanwhile
        assert not manager._worker.live
        assert not manager._worker.pending
        assert all(math.isfinite(meter.used) for key in manager.status().keys for meter in key.meters)
    finally:
        manager.close()


# What the environment says.


@quick
@given(
    keys=st.none()
    | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=30)
    | st.just("sk-a,,sk-b, "),
    where=st.none()
    | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
    | st.builds(
        "{}://{}{}".format,
        st.sampled_from(["redis", "rediss", "unix", "http", "REDIS"]),
        st.sampled_from(["h", ":pw@h", "h:6379", "h:x", "h:99999", "[::1", "[::1]:1", "", "/s", "u:p@:1"]),
        st.sampled_from(
            [
                "",
                "/0",
                "/x",
                "?db=x",
                "?protocol=7",
                "?timeout=5",
                "?max_connections=x",
                "?socket_timeout=nan",
                "?socket_timeout=-1",
                "?retry_on_timeout=2",
                "?nothing=1",
                "?max_connections=0",
                "?port=x",
                "?ssl_cert_reqs=x",
                "?health_check_interval=x",
                "?client_name=%00",
                "?encoding=nope",
                "?host=%zz",
            ]
        ),
    ),
    pool=st.none() | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8),
)
def test_the_environment(keys: str | None, where: str | None, pool: str | None) -> None:
    """A manager that can make connections, or an error that says what is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(VARIABLES, (keys, None, where, pool)):
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)
        try:
            manager = KeyManager()
        except ConfigurationError as error:
            assert error.field in ("keys", "key", "redis", "pool")  # noqa: PT017 - it need not be raised
            return
        try:
            if not manager._backend.local:
                import redis

                manager._backend._redis._make(redis).connection_pool.make_connection()
        finally:
            manager.close()
    assert not stable_openai.manager._open


# What a broker's Redis answers.


def registration(limits: Limits, keys: int = 1) -> Registration:
    members = [Member("a", 0, keys, tuple((f"k{n}" if keys > 1 else "a", 1) for n in range(keys)))]
    return Registration(POOL, "gpt", [quota(limits, 0.0)], members)


TO = registration(Limits(rpm=10, concurrency=4))
OPS: list[Any] = [
    Register(TO, "epoch", {}),
    Acquire(TO, TTL, (Ask("w:1", 1, "gpt"), Ask("w:2", 1, "gpt"))),
    Settle(TO, TTL, (Closing("w:1", "a", "a", "gpt", "ok"),)),
    Renew(TO, TTL, LONGEST, ("w:1",)),
    Inspect(TO, TTL),
    Admin(POOL, "enable", "a", "a", None, ("gpt",)),
]
WHOLE = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 2, 3])
REPLIES = st.recursive(
    st.none() | WHOLE | st.floats() | st.booleans() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=20,
)
LIKELY = st.builds(
    lambda head, rest: [head, *rest],
    st.just(0) | WHOLE,
    st.lists(WHOLE | st.text(max_size=3) | REPLIES, min_size=3, max_size=14),
)


def check_types(value: Any) -> None:
    """Each field of a reply has the type that it is declared with."""
    if isinstance(value, (Acquired, Snapshot, Refused)) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        for name, field in zip(value._fields, value):
            kind = type(value).__annotations__[name]
            for text, expected in (("int", int), ("str", str), ("bool", bool)):
                assert kind != text or type(field) is expected, (value, name)
            assert not name.endswith("_ms") or field >= -1 or name in ("now_ms", "last_ms"), (value, name)
            check_types(field)
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_types(one)
    elif isinstance(value, dict):
        for one in value.values():
            check_types(one)


@settings(quick, max_examples=600)
@given(st.sampled_from(OPS), REPLIES | LIKELY)
def test_replies(op: Any, reply: Any) -> None:
    try:
        value = decode(op, reply)
    except BrokerUnavailable:
        return
    check_types(value)


# A Redis whose values were tampered with.

NANS = (math.nan, math.inf, -math.inf, 1e300, -1e300)
DOUBLES = st.sampled_from([*NANS, -1.0, 0.0, 1.5, 2.0**53, -(2.0**53)])


@st.composite
def garbled(draw: st.DrawFn, value: str, number: st.SearchStrategy[float] = DOUBLES) -> bytes:
    """A field's value as somebody may leave it."""
    raw = value.encode("latin-1")
    how = draw(st.sampled_from(["cut", "bytes", "double", "text", "flip", "longer"]))
    if how == "cut":
        return raw[: draw(st.integers(0, max(0, len(raw) - 1)))]
    if how == "bytes":
        return draw(st.binary(max_size=200))
    if how == "text":
        return draw(
            st.sampled_from([b"", b"garbage", b"nan", b"inf", b"-1", b"1e999", b"\x93\xc0\xc0\xc0", b"\x81\xa1a\xc1"])
        )
    if how == "longer":
        return raw + draw(st.binary(min_size=1, max_size=50))
    if how == "flip" or len(raw) < 8:
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        return raw[:place] + draw(st.binary(min_size=1, max_size=1)) + raw[place + 1 :]
    place = 8 * draw(st.integers(0, len(raw) // 8 - 1))
    return raw[:place] + struct.pack("<d", draw(number)) + raw[place + 8 :]


class Client:
    """What a worker does with the store: it registers when it is told to. What the store does not serve is counted."""

    def __init__(self, server: Server, to: Registration) -> None:
        self.now = START
        self.backend = RedisBackend(url(server), now=lambda: self.now)
        self.to, self.number, self.refused = to, 0, 0
        self.granted: list[int] = []
        self.held: list[str] = []
        self.said: set[str] = set()

    def run(self, op: Any) -> Any:
        try:
            reply = self.backend.run(op)
        except BrokerUnavailable as error:
            self.refused += 1
            self.said.add(str(error))
            return None
        check_types(reply)
        return reply

    def ask(self, tokens: int = 1, waits: int = 0) -> Any:
        self.number += 1
        ask = Ask(f"w:{self.number}", tokens, "gpt")
        op = Acquire(self.to, TTL, (ask,), Demand("w", (0, waits, 0, 0), tokens) if waits else None)
        reply = self.run(op)
        if isinstance(reply, NotRegistered):
            self.run(Register(self.to, "epoch", {}))
            reply = self.run(op)
            assert not isinstance(reply, NotRegistered), "it is told to register twice"
        if reply is None:
            return None
        answer = reply.answers[0]
        assert isinstance(answer, (Granted, Refused)), answer
        if isinstance(answer, Granted):
            self.granted.append(self.now)
            self.held.append(answer.id)
        return answer

    def settle(self, outcome: str = "ok", tokens: int | None = 1) -> None:
        for id in self.held:
            self.run(Settle(self.to, TTL, (Closing(id, "a", "a", "gpt", outcome, tokens, "0"),)))
        self.held.clear()

    def all_verbs(self) -> None:
        self.run(Renew(self.to, TTL, LONGEST, tuple(self.held)))
        self.run(Inspect(self.to, TTL))
        for verb in ("disable", "enable", "reset"):
            self.run(Admin(POOL, verb, "k0", "a", None, ("gpt",)))

    def story(self) -> None:
        """Something of everything: leases, a 401, a 429, a failure, somebody who waits."""
        for outcome in ("ok", "key", "failed", "model"):
            self.ask()
            self.settle(outcome)
        self.ask()
        self.ask()
        for _ in range(3):
            self.ask(waits=2)


@pytest.mark.parametrize("keys", [1, 3], ids=["one key", "three keys"])
@pytest.mark.parametrize("rule", ["bucket", "sliding", "calendar"])
def test_what_was_tampered_with(server: Server, rule: Any, keys: int) -> None:
    """One value of all that a pool holds, garbled: every verb answers or is not served, none hangs the server."""
    limits = Limits(rpm=20, tpm=1000, concurrency=4, rule=rule, charge="used")
    to = registration(limits, keys)
    client = Client(server, to)

    @settings(quick, max_examples=60)
    @given(st.data())
    def tamper(data: st.DataObject) -> None:
        admin = server.admin
        admin.flushall()
        client.__init__(server, to)  # type: ignore[misc]
        client.story()
        assert client.refused == 0
        places = [(key, field) for key in sorted(admin.keys()) for field in fields_of(server, key)]
        key, field = data.draw(st.sampled_from(places))
        before = (len(client.granted), len(client.held))
        spoil(server, key, field, data)
        client.now += data.draw(st.sampled_from([0, 1, 500]))
        client.all_verbs()
        for _ in range(30):
            client.ask()
        assert len(client.granted) <= 20 + 4, (key, field, before)  # (and what some ms refill)
        client.settle()
        client.now += 130_000
        client.ask(waits=1)
        client.all_verbs()
        client.backend.close()
        assert not [said for said in client.said if "BUSY" in said or "imeout" in said], "a script does not end"

    tamper()


def fields_of(server: Server, key: str) -> list[bytes]:
    import redis

    with redis.Redis(port=server.port) as admin:
        kind = admin.type(key)
        if kind == b"hash":
            return sorted(admin.hkeys(key))
        if kind == b"zset":
            return sorted(admin.zrange(key, 0, -1))
        return [b"0"]


def spoil(server: Server, key: str, field: bytes, data: st.DataObject) -> None:
    import redis

    with redis.Redis(port=server.port) as admin:
        kind = admin.type(key)
        if kind == b"hash":
            value = admin.hget(key, field) or b""
            admin.hset(key, field, data.draw(garbled(value.decode("latin-1"))))
        elif kind == b"zset":
            admin.zadd(key, {field: data.draw(st.sampled_from([math.inf, -math.inf, -1.0, 1e300, 0.0, 1.5]))})
        else:
            admin.lset(key, 0, data.draw(st.binary(max_size=10)))


@pytest.mark.parametrize("number", [*NANS, -1.0], ids=str)
@pytest.mark.parametrize("place", range(15))
@pytest.mark.parametrize("rule", ["bucket", "sliding", "calendar"])
def test_no_garbled_number_of_an_account_lifts_a_limit(server: Server, rule: Any, place: int, number: float) -> None:
    """Ten a minute, four at a time, five used and four held: whatever one number of the account becomes, no more than
    that is granted, and after some minutes the limit is what it was."""
    server.admin.flushall()
    to = registration(Limits(rpm=10, tpm=1000, concurrency=4, rule=rule))
    client = Client(server, to)
    client.ask()
    client.settle()
    for _ in range(4):
        client.ask()
    replace(server, to.keys[1], "a:a", place, number)
    for _ in range(20):
        client.ask()
    assert len(client.granted) <= 10
    assert len(client.held) <= 4
    client.settle()
    client.now += 200_000
    client.ask()
    client.settle()
    client.now += 61_000
    client.granted.clear()
    for _ in range(20):
        client.ask()
        client.settle()
    if not (rule == "bucket" and place in (6, 10)) or abs(number) < 1e15:
        assert len(client.granted) == 10
    client.backend.close()


@pytest.mark.parametrize("keys", [["sk-a"], ["sk-a", "sk-b", "sk-c"]], ids=len)
def test_a_key_that_nobody_holds(server: Server, keys: list[str]) -> None:
    """An account is smuggled into the index: no call is given it."""
    import redis

    server.admin.flushall()
    manager = KeyManager(keys, url(server), pool=POOL, on_redis_down="raise", max_wait=1)
    manager.check()
    to = manager._worker.registration("-")
    served = refused = 0
    with redis.Redis(port=server.port) as admin:
        admin.zadd(to.keys[4], {"nobody": 0})
    for _ in range(20):
        try:
            with manager.lease() as lease:
                served += lease.api_key in keys
        except BrokerUnavailable:
            refused += 1
    assert served >= 1
    assert refused >= 1
    assert served + refused == 20
    manager.close()


def replace(server: Server, key: str, field: str, place: int, number: float) -> None:
    import redis

    with redis.Redis(port=server.port) as admin:
        value = admin.hget(key, field)
        assert value is not None
        admin.hset(key, field, value[: 8 * place] + struct.pack("<d", number) + value[8 * place + 8 :])


@pytest.mark.parametrize("number", NANS, ids=str)
@pytest.mark.parametrize("place", range(18))
def test_no_garbled_number_of_a_quota_lifts_a_limit(server: Server, place: int, number: float) -> None:
    """It is registered again, and what was used is still used."""
    server.admin.flushall()
    to = registration(Limits(rpm=10, tpm=1000, rule="sliding"))
    client = Client(server, to)
    for _ in range(6):
        client.ask()
    replace(server, to.keys[1], "q", place, number)
    for _ in range(10):
        client.ask()
    assert client.refused == 0
    assert len(client.granted) == 10
    client.backend.close()
