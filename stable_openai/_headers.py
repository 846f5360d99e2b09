"""What a response's headers say of the account's limits: which meters, how large, how much is left.

Providers agree on the names and not on the window: `x-ratelimit-limit-requests` is of a minute here and of a day there.
The two mistakes do not weigh the same, and that decides the rule.

- A day's limit taken for a minute's is harmless. Who may spend N in a day has no use for more than N in a minute, and
  what is left of a day refills more slowly than we then believe: nothing that the account could have had is refused.
- A minute's limit taken for a day's blocks the account for hours.

So plain names are of the minute unless something proves the day, and nothing need be dropped for want of proof:

1. The header says it: `-minute` and `-day` in the name, `x-ratelimit-renewalperiod-*` (seconds; under 60: no row).
2. Another header tells the provider (PROVIDERS): Groq's requests are of a day, Azure's of a minute.
3. The reset proves it. No minute, be it refilled continuously, sliding or of the calendar, resets later than in 60 s: a
   reset of up to 61 s is never of a day, whatever the rest says (a calendar minute with 59 of 60 left and 45 s to go
   would "refill" in 2700 s; Azure was seen with 2499 of 2500 left and 24 s, which would make 60,000 s). Nor is a bare
   number: 45000 might be milliseconds. Of the others, a day's are
   a. those that a continuous refill explains: it fills `limit` in reset × limit / used, where `used`, a whole number,
      may be up to one too high (OpenAI said 197 of 200 left and 16m17.764s: between 65,184 and 97,776 s). A day, ± 5 %,
      must lie between; what is used is not believed to be less than 2/3 of what is said;
   b. and those later than in 6 hours, as days of the calendar say it: later than the known windows of one, three and
      five hours ever do.

What this cannot tell: an hour's window under a plain name whose numbers happen to fit (a). No provider that we know
sends one: Cerebras and Nous, which have hours, name them. Days that prove nothing (little used, a short reset) count as
minutes and months as days, harmlessly. Where two headers give one meter, both limits hold, and the lesser counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["duration_s", "seen_in"]

RPM, RPD, TPM, TPD = range(4)
DAY_S = 86_400
MINUTE_RESETS_WITHIN_S = 61  # a second of rounding
HOURS_RESET_WITHIN_S = 6 * 3600
LONGEST_S = 31 * DAY_S
LARGEST = 10**12

# Which headers, by the name that "limit", "remaining", "reset" and "renewalperiod" make of the first column, give which
# meter: of the minute, of the day; of both where the window is to be inferred. Who is known to send them, as read in
# their documentation or seen in recorded responses (2026-11-22):
#
#   OpenAI      limit, remaining, reset (Go durations, until full), of a minute or, on small tiers, of a day
#               (docs: guides/rate-limits; recorded: 5000, 4999, 12ms; 200, 197, 16m17.764s). project-tokens: the
#               project's own limit (same docs).
#   Azure       the same names; now with resets in whole seconds and renewalperiod 60 (GitHub Models too), once only
#               with remaining (azure-rest-api-specs #26884); -1, -1, 0 where it does not know (openai-dotnet #838).
#   Groq        the same; "limit-requests always refers to requests per day, limit-tokens to tokens per minute"
#               (console.groq.com/docs/rate-limits; recorded: 14400, 14399, 6s; 1000, 942, 1h23m31s).
#   and         Fireworks, xAI (no resets), Nous (seconds; hours as `-1h`), Venice (requests: an epoch), Anthropic's
#               OpenAI-compatible API (RFC 3339): of a minute by their docs.
#   Cerebras    -requests and -tokens with -minute, -hour (no meter of ours) and -day; resets in seconds, such as
#               33011.382867 (docs: support/rate-limits; measured by several).
#   SambaNova   plain requests of a minute, and -requests-day (docs: models/rate-limits).
#   Mistral     -req-minute and -tokens-minute, no resets; a limit of 0 for models outside the plan (client-ts #169).
#   DigitalOcean  -tokens-per-minute, -tokens-per-day; resets are epochs (docs: quota-specific-response-headers).
#   Anthropic   requests and tokens (input and output together) of a minute, RFC 3339 resets (docs: api/rate-limits).
#   OpenRouter  x-ratelimit-limit, -remaining and -reset (epoch in ms, of a whole minute), on its own 429s: 20 or 50 a
#               minute, 50 or 1000 a day (docs: api_reference/limits; measured: 50, 0, 1785082980000). These names mean
#               a second at Together and anything elsewhere, so they count only with such a reset.
#
# Left out: Together (a second, and moving), Fireworks' tokens (input and output apart), Cohere (a countdown without a
# limit), anthropic-ratelimit-unified-* (subscriptions). DeepSeek, Zhipu and NVIDIA send none.
ENTRIES: tuple[tuple[str, int | None, int | None], ...] = (
    ("x-ratelimit-{}-requests", RPM, RPD),
    ("x-ratelimit-{}-tokens", TPM, TPD),
    ("x-ratelimit-{}-project-tokens", TPM, TPD),
    ("x-ratelimit-{}-requests-minute", RPM, None),
    ("x-ratelimit-{}-requests-day", None, RPD),
    ("x-ratelimit-{}-tokens-minute", TPM, None),
    ("x-ratelimit-{}-tokens-day", None, TPD),
    ("x-ratelimit-{}-req-minute", RPM, None),
    ("x-ratelimit-{}-tokens-per-minute", TPM, None),
    ("x-ratelimit-{}-tokens-per-day", None, TPD),
    ("anthropic-ratelimit-requests-{}", RPM, None),
    ("anthropic-ratelimit-tokens-{}", TPM, None),
    ("x-ratelimit-{}", RPM, RPD),
)
OPENROUTER = len(ENTRIES) - 1
KINDS = ("limit", "remaining", "reset", "renewalperiod")
# A header that tells the provider: the meters that its plain names give.
PROVIDERS: dict[str, tuple[int, ...]] = {
    "x-groq-region": (RPD, TPM),
    "x-ms-region": (RPM, TPM),  # Azure
    "apim-request-id": (RPM, TPM),  # Azure
}


def _slots() -> dict[str | bytes, tuple[int, int, tuple[int, ...]]]:
    """Header -> (index in ENTRIES, index in KINDS, ()) or, of PROVIDERS, (-1, -1, meters). As text and as bytes."""
    slots: dict[str | bytes, tuple[int, int, tuple[int, ...]]] = {}
    for name, meters in PROVIDERS.items():
        slots[name] = slots[name.encode()] = (-1, -1, meters)
    for index, (pattern, _, _) in enumerate(ENTRIES):
        for at, kind in enumerate(KINDS):
            name = pattern.format(kind)
            slots[name] = slots[name.encode()] = (index, at, ())
    return slots


SLOTS = _slots()


def seen_in(headers: Mapping[str, str]) -> tuple[tuple[int, int | None, int | None], ...]:
    """What a response's headers say of the account's limits.

    Returns rows (meter, limit, remaining), at most one a meter, by meter: 0 requests a minute, 1 requests a day,
    2 tokens a minute, 3 tokens a day. A limit is 1 to 1e12, a remaining 0 to the limit (to 1e12 without one); None is
    what the headers do not say. A limit or remaining out of its range, unreadable, or there twice with two values makes
    its row say nothing ("-1" and "0" are some gateways' words for unlimited). Never raises, whatever the headers hold.
    Costs a few µs.

    >>> seen_in({"x-ratelimit-limit-requests": "200", "x-ratelimit-remaining-requests": "199",
    ...          "x-ratelimit-reset-requests": "7m12s", "x-ratelimit-remaining-tokens": "61353"})
    ((1, 200, 199), (2, None, 61353))
    """
    try:
        return _rows(headers)
    except Exception:  # they come from outside, in whatever mapping: what cannot be read says nothing
        return ()


def _rows(headers: Mapping[str, str]) -> tuple[tuple[int, int | None, int | None], ...]:
    # A pass over `raw` takes 2 µs; httpx's items() decodes and joins all headers (10 µs), its get() takes 1 µs a name.
    raw = getattr(headers, "raw", None)
    pairs: Iterable[tuple[Any, Any]] = raw if type(raw) is list else headers.items()
    found: dict[int, list[Any]] = {}
    told: tuple[int, ...] = ()
    for name, value in pairs:
        slot = SLOTS.get(name.lower())
        if slot is None:
            continue
        index, kind, meters = slot
        if meters:
            told = meters
            continue
        values = found.get(index)
        if values is None:
            values = found[index] = [None, None, None, None]
        values[kind] = value if values[kind] is None or values[kind] == value else "twice"

    rows: dict[int, tuple[int | None, int | None]] = {}
    for index, (limit_text, remaining_text, reset, period) in found.items():
        limit, remaining = _count(limit_text), _count(remaining_text)
        if (limit_text is not None and not limit) or (remaining_text is not None and remaining is None):
            continue
        if (limit is None and remaining is None) or (limit is not None and remaining is not None and remaining > limit):
            continue
        meter = _meter(index, limit, remaining, _text(reset), period, told, headers)
        if meter is None:
            continue
        if meter in rows:
            limit = _lesser(limit, rows[meter][0])
            remaining = _lesser(remaining, rows[meter][1])
            remaining = None if remaining is None else _lesser(remaining, limit)  # one may come without the other
        rows[meter] = (limit, remaining)
    return tuple([(meter, *rows[meter]) for meter in sorted(rows)])


def _meter(
    index: int,
    limit: int | None,
    remaining: int | None,
    reset: str,
    period: object,
    told: tuple[int, ...],
    headers: Mapping[str, str],
) -> int | None:
    """Which meter an entry's headers are of; None where they are of no window that is ours. The rule is in the head."""
    _, minute, day = ENTRIES[index]
    if minute is None or day is None:
        return minute if day is None else day
    if index == OPENROUTER and not (len(reset) == 13 and reset.isdigit() and int(reset) % 60_000 == 0):
        return None
    period_s = _count(period)
    if period_s:
        return day if period_s >= DAY_S else minute if period_s >= 60 else None
    if minute in told:
        return minute
    if day not in told and (not reset or (reset.endswith("ms") and len(reset) <= 6)):
        return minute  # the common case, without the arithmetic
    reset_s = duration_s(reset, headers.get("date") or headers.get("Date") if len(reset) > 9 else None)
    shortest_s, longest_s = _refill_s(limit, remaining, reset_s)
    if day in told:
        return day if longest_s >= 3600 else minute  # its word, unless the numbers cannot be a day's
    if reset_s is None or reset_s <= MINUTE_RESETS_WITHIN_S or _bare(reset):
        return minute
    refills_in_a_day = 0 < shortest_s <= 1.05 * DAY_S and longest_s >= DAY_S / 1.05
    return day if refills_in_a_day or reset_s > HOURS_RESET_WITHIN_S else minute


def _refill_s(limit: int | None, remaining: int | None, reset_s: float | None) -> tuple[float, float]:
    """Between which two times a continuous refill fills the whole limit; (0, 31 days) where that cannot be told."""
    if not limit or remaining is None or remaining == limit or reset_s is None:
        return 0.0, LONGEST_S
    used = limit - remaining
    shortest_s = reset_s * limit / used
    return shortest_s, shortest_s * min(1.5, used / max(used - 1, 0.5))


def _bare(reset: str) -> bool:
    """Whether a reset is a number without a unit, and no Unix time."""
    return reset.replace(".", "", 1).isdigit() and len(reset.partition(".")[0]) < 10


def _count(value: object) -> int | None:
    """A whole number of 0 to 1e12 in ASCII digits, else None."""
    if not isinstance(value, (str, bytes)):
        return None
    digits = value.strip()
    number = int(digits) if len(digits) <= 13 and digits.isascii() and digits.isdigit() else None
    return number if number is not None and number <= LARGEST else None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return value.strip() if isinstance(value, str) else ""


def _lesser(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


UNITS = {"d": DAY_S, "h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
NUMBER = re.compile(r"[0-9]{1,15}(?:\.[0-9]{0,15})?")
PART = re.compile(rf"({NUMBER.pattern})(ms|us|µs|ns|d|h|m|s)")
HTTP_DATE = r"[A-Za-z]{3}, ([0-9]{2}) ([A-Za-z]{3}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT"  # rarely needed
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def duration_s(text: str, date: str | None = None) -> float | None:
    """How many seconds a reset header is away: 0 to 31 days, later ones capped. None where it cannot be read.

    Reads Go's durations ("7m12s", "1h2m3.5s", "120ms"), seconds ("0.5"), Unix times in seconds (from 1e9) or
    milliseconds (from 1e11) and RFC 3339. The last two are counted from `date`, the response's own Date header, so that
    no clock of ours matters.

    >>> duration_s("7m12s"), duration_s("33011.38"), duration_s("soon")
    (432.0, 33011.38, None)
    >>> duration_s("2026-11-22T10:00:09Z", "Sun, 22 Nov 2026 10:00:00 GMT")
    9.0
    """
    if len(text) > 40:
        return None
    if text[4:5] == "-":
        return _until(_rfc3339(text), date)
    number = NUMBER.fullmatch(text)
    if number is not None:
        seconds = float(text)
        if seconds < 1e9:
            return min(seconds, LONGEST_S)
        return _until(seconds if seconds < 1e11 else seconds / 1000, date)
    total, at = 0.0, 0
    while at < len(text):
        part = PART.match(text, at)
        if part is None:
            return None
        total += float(part[1]) * UNITS[part[2]]
        at = part.end()
    return min(total, LONGEST_S) if at else None


def _until(then: float | None, date: str | None) -> float | None:
    now = _http_date(date) if date else None
    return None if then is None or now is None else min(max(0.0, then - now), LONGEST_S)


def _rfc3339(text: str) -> float | None:
    from datetime import datetime  # here, so that importing the package stays quick

    try:
        then = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1] in "zZ" else text)
        return then.timestamp() if then.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _http_date(text: str) -> float | None:
    """A Date header as every server must send it (RFC 9110, IMF-fixdate)."""
    from datetime import datetime, timezone

    found = re.fullmatch(HTTP_DATE, text)
    if found is None or found[2].lower() not in MONTHS:
        return None
    day, year, hour, minute, second = (int(number) for number in found.group(1, 3, 4, 5, 6))
    month = MONTHS.index(found[2].lower()) + 1
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None
