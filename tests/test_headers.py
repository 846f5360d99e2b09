"""What responses' headers say of the limits (_headers.py): as providers send them, as a hostile one might, and quickly.

The samples are recorded responses or the providers' own documentation, as far as the table says so; the properties play
windows of every kind and look whether a minute is ever taken for a day, the one mistake that does harm.
"""

from __future__ import annotations

import doctest
import math
import timeit
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from importlib import import_module
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_openai import _headers
from stable_openai._headers import LARGEST, LONGEST_S, RPD, RPM, SLOTS, TPD, TPM, duration_s, seen_in

httpx: Any = import_module(openai.DefaultHttpxClient.__bases__[0].__module__)  # httpx2; httpx under openai 2.x
NOON = datetime(2026, 11, 22, 12, 0, 10, tzinfo=timezone.utc)
DATE = {"date": "Sun, 22 Nov 2026 12:00:10 GMT"}
DAY_S = 86_400


def plain(limit: object, remaining: object, reset: str | None = None, unit: str = "requests") -> dict[str, str]:
    """OpenAI's names."""
    headers = {f"x-ratelimit-limit-{unit}": str(limit), f"x-ratelimit-remaining-{unit}": str(remaining)}
    return headers if reset is None else {**headers, f"x-ratelimit-reset-{unit}": reset}


def epoch_ms(after_s: float) -> str:
    return str(round((NOON.timestamp() + after_s) * 1000))


SAMPLES: dict[str, tuple[dict[str, str], tuple[tuple[int, int | None, int | None], ...]]] = {
    "OpenAI, recorded (community.openai.com 1268905), usage-based tokens and all": (
        plain(5000, 4999, "12ms")
        | plain(160000, 159976, "9ms", "tokens")
        | plain(160000, 159976, "9ms", "tokens_usage_based"),
        ((RPM, 5000, 4999), (TPM, 160000, 159976)),
    ),
    "OpenAI, recorded (openai-python #416)": (plain(3500, 3499, "17ms"), ((RPM, 3500, 3499),)),
    "OpenAI, a day, recorded; a fraction of the third request is back": (
        plain(200, 197, "16m17.764s") | plain(40000, 39929, "106ms", "tokens"),
        ((RPD, 200, 197), (TPM, 40000, 39929)),
    ),
    "OpenAI, a day, the first request": (plain(200, 199, "7m12s"), ((RPD, 200, 199),)),
    "OpenAI, a day, nothing left": (plain(200, 0, "23h55m0s"), ((RPD, 200, 0),)),
    "OpenAI, a day of 10,000, little used: proves nothing, and is harmless": (
        plain(10000, 9999, "8.64s"),
        ((RPM, 10000, 9999),),
    ),
    "OpenAI's documentation: the tokens' reset is no minute's, and no day's either": (
        plain(60, 59, "1s") | plain(150000, 149984, "6m0s", "tokens"),
        ((RPM, 60, 59), (TPM, 150000, 149984)),
    ),
    "OpenAI, the project's own limit is the lesser": (
        plain(2000000, 1990000, "300ms", "tokens") | plain(60000, 57000, "3s", "project-tokens"),
        ((TPM, 60000, 57000),),
    ),
    "Azure, recorded (oaib #11): no limits, no resets": (
        {"x-ms-region": "North Central US"} | plain("", "79") | plain("", "61353", None, "tokens"),
        (),  # an empty limit is no number
    ),
    "Azure, recorded, as it came": (
        {
            "apim-request-id": "bb943c68",
            "x-ms-region": "North Central US",
            "x-ratelimit-remaining-requests": "79",
            "x-ratelimit-remaining-tokens": "61353",
        },
        ((RPM, None, 79), (TPM, None, 61353)),
    ),
    "Azure, recorded: the resets are whole seconds": (
        plain(2500, 2499, "24")
        | plain(250000, 249993, "1", "tokens")
        | {"x-ratelimit-renewalperiod-requests": "60", "x-ratelimit-renewalperiod-tokens": "60"},
        ((RPM, 2500, 2499), (TPM, 250000, 249993)),
    ),
    "Azure, recorded (openai-dotnet #838): it does not know": (plain(-1, -1, "0", "tokens"), ()),
    "Azure, a day's wait is no day's limit": (
        {"x-ms-region": "Sweden Central"} | plain(1000, 0, "86400", "tokens"),
        ((TPM, 1000, 0),),
    ),
    "GitHub Models, recorded": (
        plain(20000, 19999, "3") | {"x-ratelimit-renewalperiod-requests": "60"},
        ((RPM, 20000, 19999),),
    ),
    "a period of a day": (plain(1000, 999, "3") | {"x-ratelimit-renewalperiod-requests": "86400"}, ((RPD, 1000, 999),)),
    "a period of ten seconds is no meter of ours": (
        plain(10, 9, "3") | {"x-ratelimit-renewalperiod-requests": "10"},
        (),
    ),
    "Groq's documentation": (
        plain(14400, 14370, "2m59.56s") | plain(18000, 17997, "7.66s", "tokens"),
        ((RPD, 14400, 14370), (TPM, 18000, 17997)),
    ),
    "Groq, recorded: six seconds a request, known by its region": (
        {"x-groq-region": "dls"} | plain(14400, 14399, "6s") | plain(6000, 5963, "370ms", "tokens"),
        ((RPD, 14400, 14399), (TPM, 6000, 5963)),
    ),
    "Groq, recorded, paid": (
        {"x-groq-region": "yul"} | plain(500000, 499999, "172ms") | plain(250000, 249901, "23ms", "tokens"),
        ((RPD, 500000, 499999), (TPM, 250000, 249901)),
    ),
    "Groq, recorded, without its region": (plain(1000, 942, "1h23m31s"), ((RPD, 1000, 942),)),
    "Groq, full": ({"x-groq-region": "fra"} | plain(1000, 1000, "0s"), ((RPD, 1000, 1000),)),
    "Groq, should it ever send a minute's": ({"x-groq-region": "fra"} | plain(30, 27, "6s"), ((RPM, 30, 27),)),
    "Cerebras, measured: minutes, hours and days": (
        {
            f"x-ratelimit-{kind}-{unit}-{window}": number
            for unit, window, numbers in (
                ("requests", "minute", ("5", "4", "11.5")),
                ("requests", "hour", ("150", "149", "3011.5")),
                ("requests", "day", ("2400", "2399", "33011.382867")),
                ("tokens", "minute", ("64000", "63990", "11.5")),
                ("tokens", "hour", ("1000000", "999990", "3011.5")),
                ("tokens", "day", ("1000000", "999990", "33011.382867")),
            )
            for kind, number in zip(("limit", "remaining", "reset"), numbers, strict=True)
        },
        ((RPM, 5, 4), (RPD, 2400, 2399), (TPM, 64000, 63990), (TPD, 1000000, 999990)),
    ),
    "SambaNova: a minute's and a day's": (
        plain(60, 42, "30") | plain(1000, 900, "80000", "requests-day"),
        ((RPM, 60, 42), (RPD, 1000, 900)),
    ),
    "Mistral, recorded (client-ts #169)": (
        {
            "x-ratelimit-limit-tokens-minute": "5000000",
            "x-ratelimit-remaining-tokens-minute": "4999911",
            "x-ratelimit-tokens-query-cost": "52",
            "x-ratelimit-limit-req-minute": "720",
            "x-ratelimit-remaining-req-minute": "717",
        },
        ((RPM, 720, 717), (TPM, 5000000, 4999911)),
    ),
    "Mistral, a model outside the plan": (plain(0, 0, None, "req-minute"), ()),
    "Nous: minutes in seconds, hours apart": (
        plain(800, 795, "45.5") | plain(33600, 33590, "3500.0", "requests-1h"),
        ((RPM, 800, 795),),
    ),
    "DigitalOcean": (
        plain(1000, 990, str(int(NOON.timestamp()) + 30), "tokens-per-minute")
        | plain(9000, 8000, None, "tokens-per-day")
        | DATE,
        ((TPM, 1000, 990), (TPD, 9000, 8000)),
    ),
    "Anthropic, recorded (tidyllm)": (
        {
            "date": "Thu, 21 Aug 2025 12:41:00 GMT",
            "anthropic-ratelimit-input-tokens-limit": "80000",
            "anthropic-ratelimit-input-tokens-remaining": "80000",
            "anthropic-ratelimit-requests-limit": "1000",
            "anthropic-ratelimit-requests-remaining": "999",
            "anthropic-ratelimit-requests-reset": "2025-08-21T12:40:59Z",
            "anthropic-ratelimit-tokens-limit": "96000",
            "anthropic-ratelimit-tokens-remaining": "96000",
            "anthropic-ratelimit-tokens-reset": "2025-08-21T12:40:59Z",
        },
        ((RPM, 1000, 999), (TPM, 96000, 96000)),
    ),
    "Anthropic's compatible API: OpenAI's names, RFC 3339": (
        DATE | plain(1000, 999, "2026-11-22T12:00:11Z"),
        ((RPM, 1000, 999),),
    ),
    "OpenRouter, measured: a minute": (
        {"Date": "Sun, 26 Jul 2026 16:22:11 GMT"}
        | {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1785082980000"},
        ((RPM, 50, 0),),
    ),
    "OpenRouter: a day, until midnight": (
        DATE | {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": epoch_ms(43_190)},
        ((RPD, 50, 0),),
    ),
    "Together: a second, so nothing": (
        {
            "x-ratelimit-limit": "10",
            "x-ratelimit-remaining": "9",
            "x-ratelimit-reset": "1",
            "x-tokenlimit-limit": "3000",
        },
        (),
    ),
    "a gateway's seconds since 1970 under the shortest names": (
        DATE | {"x-ratelimit-limit": "10", "x-ratelimit-remaining": "9", "x-ratelimit-reset": "1795348860"},
        (),
    ),
    "Fireworks: input and output apart": ({"x-ratelimit-limit-tokens-prompt": "21600000"}, ()),
    "a calendar minute whose refill would take 2700 s": (plain(60, 59, "45s"), ((RPM, 60, 59),)),
    "a calendar minute in bare milliseconds": (plain(60, 29, "45000"), ((RPM, 60, 29),)),
    "a calendar day": (plain(1000, 400, "10h0m0s"), ((RPD, 1000, 400),)),
    "a calendar day, full": (plain(1000, 1000, "10h0m0s"), ((RPD, 1000, 1000),)),
    "a calendar day of tokens, as a Unix time": (
        DATE | plain(1000000, 400000, str(int(NOON.timestamp()) + 36_000), "tokens"),
        ((TPD, 1000000, 400000),),
    ),
    "five hours are not a day": (plain(100, 50, "4h59m0s"), ((RPM, 100, 50),)),
    "a limit alone": ({"x-ratelimit-limit-requests": "500"}, ((RPM, 500, None),)),
    "a full meter proves nothing": (plain(200, 200, "0s"), ((RPM, 200, 200),)),
    "both names of a minute: the lesser": (plain(60, 20) | plain(30, 29, None, "requests-minute"), ((RPM, 30, 20),)),
    "a limit from one, what is left from the other": (
        {"anthropic-ratelimit-tokens-limit": "5", "x-ratelimit-remaining-tokens": "9"},
        ((TPM, 5, 5),),
    ),
    "no such headers": ({"content-type": "application/json", "openai-version": "2020-10-01"} | DATE, ()),
    "none": ({}, ()),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_providers_send(sample: str) -> None:
    headers, rows = SAMPLES[sample]
    assert seen_in(headers) == rows
    for spelt in (str.lower, str.title, str.upper):
        assert seen_in(httpx.Headers({spelt(name): value for name, value in headers.items()})) == rows


@pytest.mark.parametrize(
    ("limit", "remaining"),
    [
        ("-1", "-1"), ("0", "0"), ("-1", "5"), ("60", "-1"), ("60", "61"), ("60.0", "59"), ("60", "5.5"),
        ("nan", "nan"), ("inf", "1"), ("1e3", "1"), ("", "1"), ("60", ""), ("1_000", "1"), ("1,000", "1"), ("+60", "1"),
        ("٦٠", "1"), ("60", "²"), ("0x3c", "1"), (str(LARGEST + 1), "1"), ("9" * 5000, "1"), ("100, 100", "1"),
        ("60;w=60", "1"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_makes_its_row_say_nothing(limit: str, remaining: str) -> None:
    assert seen_in(plain(limit, remaining, "1s") | plain(7, 6, "1s", "tokens")) == ((TPM, 7, 6),)


def test_the_ends_of_the_ranges() -> None:
    assert seen_in(plain(1, 0)) == ((RPM, 1, 0),)
    assert seen_in(plain(f" {LARGEST}\t", LARGEST)) == ((RPM, LARGEST, LARGEST),)
    assert seen_in({"x-ratelimit-remaining-requests": str(LARGEST + 1)}) == ()


def test_a_header_that_is_there_twice() -> None:
    names = [("x-ratelimit-limit-requests", "60"), ("X-RateLimit-Limit-Requests", "60")]
    assert seen_in(httpx.Headers(names)) == ((RPM, 60, None),)
    assert seen_in(httpx.Headers([*names, ("x-ratelimit-limit-requests", "50")])) == ()
    assert seen_in({"x-ratelimit-limit-requests": "60", "X-RateLimit-Limit-Requests": "50"}) == ()


class Broken(dict[str, str]):
    @property
    def raw(self) -> list[int]:
        return [1]


def test_whatever_the_mapping_is() -> None:
    strange: Any
    for strange in (
        None,
        5,
        [("x-ratelimit-limit-requests", "60")],
        {None: "60"},
        Broken(),
        {"x-ratelimit-limit-tokens": 1},
    ):
        assert seen_in(strange) == ()
    strange = {b"x-ratelimit-limit-requests": b"60", b"x-ratelimit-remaining-requests": b"\xb2"}
    assert seen_in(strange) == ()
    strange = {b"x-ratelimit-limit-requests": b"60", b"x-ratelimit-reset-requests": b"\xff"}
    assert seen_in(strange) == ((RPM, 60, None),)


NUMBERS = st.one_of(st.integers(-2, 70).map(str), st.integers(0, 2 * LARGEST).map(str), st.floats().map(str))
ODD_RESETS = (
    "1s 7m12s 6m0s 12ms 1h2m3.5s 24h 86400 0.5 1795348860 -1s 2026-11-23T11:00:00Z 2026-11-23T11:00:00+23:59 ms . "
    "0001-01-01T00:00:00+01:00 9999-99-99 1111111111111111111111 1795348860000 1795435200000"
)
RESETS = st.sampled_from(ODD_RESETS.split())
VALUES = st.one_of(NUMBERS, RESETS, st.text(max_size=20))
KNOWN = st.sampled_from(sorted(name for name in SLOTS if isinstance(name, str)))
HEADERS = st.dictionaries(st.one_of(KNOWN, KNOWN, st.just("date"), st.text(max_size=12)), VALUES, max_size=12)


@given(HEADERS, st.booleans())
def test_any_headers_give_rows_within_the_ranges(headers: dict[str, str], dated: bool) -> None:
    rows = _headers._rows(headers | DATE if dated else headers)  # not even caught: nothing that is text raises
    assert [row[0] for row in rows] == sorted({row[0] for row in rows} & {RPM, RPD, TPM, TPD})
    for _, limit, remaining in rows:
        assert limit is None or 1 <= limit <= LARGEST
        assert remaining is None or 0 <= remaining <= (limit or LARGEST)
        assert (limit, remaining) != (None, None)
    raw = [(name.encode("utf-8", "replace"), value.encode("utf-8", "replace")) for name, value in headers.items()]
    _headers._rows(httpx.Headers(raw))


def go_duration(ns: int) -> str:
    """As Go's time.Duration.String writes it."""
    for unit, size in (("ns", 1), ("µs", 10**3), ("ms", 10**6)):
        if ns < size * 1000:
            return f"{ns / size:.9f}".rstrip("0").rstrip(".") + unit if ns else "0s"
    minutes, rest = divmod(ns, 60 * 10**9)
    seconds = f"{rest // 10**9}.{rest % 10**9:09}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}" if hours else f"{minutes}m{seconds}" if minutes else seconds


@given(st.integers(0, LONGEST_S * 10**9))
def test_durations_round_trip(ns: int) -> None:
    read = duration_s(go_duration(ns))
    assert read is not None
    assert math.isclose(read, ns / 1e9, rel_tol=1e-12, abs_tol=1e-15)


@given(st.integers(0, LONGEST_S * 1000), st.datetimes(datetime(2002, 1, 1), datetime(2100, 1, 1)), st.integers(-23, 23))
def test_dates_round_trip(ms: int, now: datetime, zone_h: int) -> None:
    now = now.replace(microsecond=0, tzinfo=timezone.utc)
    then = now + timedelta(milliseconds=ms)
    date = format_datetime(now, usegmt=True)
    zoned = then.astimezone(timezone(timedelta(hours=zone_h)))
    for text in (
        str(round(then.timestamp() * 1000)),
        f"{round(then.timestamp() * 1000) / 1000:.3f}",
        then.isoformat().replace("+00:00", "Z"),
        zoned.isoformat(),
    ):
        read = duration_s(text, date)
        assert read is not None
        assert abs(read - ms / 1000) < 1e-3, text
        assert duration_s(text) is None  # no clock of ours counts


NO_DURATIONS = (
    "s ms -1s -5 +5 1x 1h5 1e3 nan inf 1_0 ٣s ² 1..2s .5 1111111111111111 "
    "2026-11-22 2026-11-22T10:00:00 2026-13-40T99:00:00Z 2026-"
)


@pytest.mark.parametrize("text", ["", " ", "5 s", "1s\n", "1m" * 30, "9" * 5000, *NO_DURATIONS.split()])
def test_what_is_no_duration(text: str) -> None:
    assert duration_s(text, DATE["date"]) is None


@pytest.mark.parametrize(
    "date", ["", "now", "Sun, 32 Nov 2026 12:00:10 GMT", "Sun, 22 Foo 2026 12:00:10 GMT", "٣" * 29]
)
def test_what_is_no_date(date: str) -> None:
    assert duration_s("2026-11-22T12:00:11Z", date) is None


def test_durations_are_capped_and_never_negative() -> None:
    assert (
        duration_s("9999h") == duration_s("999999999") == duration_s("9999-12-31T00:00:00Z", DATE["date"]) == LONGEST_S
    )
    assert duration_s("2001-01-01T00:00:00Z", DATE["date"]) == duration_s("1000000000", DATE["date"]) == 0


WRITTEN = st.sampled_from(["go", "seconds", "milliseconds", "epoch", "epoch_ms", "rfc3339", "ceil"])


def written(reset_s: float, how: str) -> str:
    then = NOON + timedelta(seconds=reset_s)
    return {
        "go": lambda: go_duration(round(reset_s * 1e9)),
        "seconds": lambda: f"{reset_s:.3f}",
        "milliseconds": lambda: str(round(reset_s * 1000)),
        "epoch": lambda: str(math.ceil(then.timestamp())),
        "epoch_ms": lambda: epoch_ms(reset_s),
        "rfc3339": lambda: then.isoformat(),
        "ceil": lambda: f"{math.ceil(reset_s)}s",
    }[how]()


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 60), WRITTEN)
def test_no_minute_is_taken_for_a_day(limit: int, share: float, reset_s: float, how: str) -> None:
    """Calendar and sliding minutes reset within 60 s whatever is left; a bucket's reset follows from what is left."""
    remaining = math.floor(limit * share)
    for reset in (reset_s, 60 * (1 - share)):
        for unit, meter in (("requests", RPM), ("tokens", TPM)):
            assert seen_in(plain(limit, remaining, written(reset, how), unit) | DATE) == ((meter, limit, remaining),)


@given(st.integers(1, 10**6), st.floats(0, 1), st.sampled_from(["go", "epoch_ms", "rfc3339", "ceil"]))
def test_a_day_that_refills_is_known_where_it_shows(limit: int, share: float, how: str) -> None:
    used, reset_s = limit * share, DAY_S * share
    remaining = math.floor(limit - used)
    shows = reset_s > 63 and used >= 0.7 * (limit - remaining)
    rows = seen_in(plain(limit, remaining, written(reset_s, how)) | DATE)
    assert rows == ((RPD, limit, remaining),) if shows else rows[0][1:] == (limit, remaining)


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(_headers).failed == 0


def test_what_it_costs() -> None:
    """Printed, with -s; nothing is asserted of times."""
    common = {f"x-some-header-{number}": "a value of some length" for number in range(18)} | DATE
    six = plain(5000, 4999, "12ms") | plain(160000, 159976, "9ms", "tokens")
    day = plain(200, 199, "7m12s") | plain(40000, 39929, "1.06s", "tokens")
    for name, headers in (("none", {}), ("OpenAI's six", six), ("OpenAI's six, a day", day)):
        for kind, given_ in (("httpx", httpx.Headers(common | headers)), ("dict", common | headers)):
            best_s = min(timeit.repeat(lambda: seen_in(given_), number=1000, repeat=5)) / 1000  # noqa: B023
            print(f"{name}, {kind}: {best_s * 1e6:.1f} µs")
