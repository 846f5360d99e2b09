"""What an error means: the table of design.md, section 6, as code.

`judge(error)` names the outcome that the lease is settled with (which scope it concerns), and what the call does
next. The user's `classify` runs first; then the error's code decides, then its type, then its status; never its
text alone, since some gateways say "insufficient quota" where they mean that too many requests run at once.

    outcome    scope            what the store does                     action of the call
    limited    account × class  cooldown                                move
    account    account          out, probed after 15 min                move
    key        key              out after two in a row, probed          move
    model      key × model      out if others have served the model     move
    failed     attempt          counts for the breaker                  retry (with backoff)
    neutral    request          nothing                                 raise

A move takes another key at once and is not an attempt; a retry is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stable_openai.errors import ConfigurationError, StableError

__all__ = ["LEASE", "Verdict", "judge", "lease_of", "redact", "verdict_of_response"]

Action = Literal["move", "retry", "raise"]
Outcome = Literal["limited", "account", "key", "model", "failed", "neutral"]

LONGEST_WAIT_MS = 900_000
LEASE = "stable_openai.lease"  # the extension of a request that names the lease that it was sent with


@dataclass(frozen=True)
class Verdict:
    """What an error means. `classify=` may return one of its own.

    Args:
        outcome: "limited", "account", "key", "model", "failed" or "neutral"; see the table above.
        action: "move", "retry" or "raise".
        reason: a word for logs and status(), such as "insufficient_quota" or "5xx".
        wait_s: how long the server asks to be left alone; None where it does not say.
        sent: False only if the request certainly never left: then it is refunded.
    """

    outcome: Outcome
    action: Action
    reason: str = ""
    wait_s: float | None = None
    sent: bool = True

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome) or self.action not in get_args(Action):
            raise ConfigurationError("classify", f"gave the unknown verdict ({self.outcome!r}, {self.action!r})")
        if self.wait_s is not None and not 0 <= self.wait_s < float("inf"):
            raise ConfigurationError("classify", "gave a wait that is not a number of seconds")


# Codes that name their meaning, whatever the status (OpenAI's error reference; `*` ends a prefix or starts a suffix).
ACCOUNT_CODES = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "credit_balance_exhausted",
    "project_spend_limit_exceeded",
    "account_deactivated",
)
ORGANIZATION_CODE = re.compile(r"organization_\w+_limit_exceeded")
RATE_CODES = ("rate_limit_exceeded", "slow_down")
RATE_TYPES = ("requests", "tokens")
POOL_CODES = ("ip_not_authorized", "unsupported_country_region_territory")
# The status that an error event's code or type would have come with, had it come before the stream.
EVENTS = ((RATE_CODES, 429), (("model_not_found",), 404), (("server_error",), 500))

# Types, by name, so that neither openai nor an HTTP library need be imported to know them.
NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout"})
TIMEOUTS = frozenset({"APITimeoutError", "ReadTimeout", "WriteTimeout", "TimeoutException"})
CONNECTIONS = frozenset(
    {"APIConnectionError", "ReadError", "WriteError", "RemoteProtocolError", "NetworkError", "CloseError", "ProxyError"}
)
LIBRARIES = ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "stable_openai")
HARMLESS = ("/chat/completions", "/embeddings", "/completions", "/moderations")


def judge(error: BaseException) -> Verdict:
    """The verdict of an exception that an attempt has raised."""
    if not isinstance(error, Exception):
        return Verdict("neutral", "raise")
    if isinstance(error, StableError):  # of another call; what it was raised from, too
        return Verdict("neutral", "raise", type(error).__name__)
    status = getattr(error, "status_code", None)
    response = getattr(error, "response", None)
    if status is None and response is not None:
        status = getattr(response, "status_code", None)
    if not isinstance(status, int):
        return _event(error) or _transport(error)
    headers = getattr(response, "headers", None)
    return verdict_of_response(
        status,
        headers if isinstance(headers, Mapping) else {},
        getattr(error, "body", None),
        code=getattr(error, "code", None),
        message=str(error),
    )


def verdict_of_response(
    status: int, headers: Mapping[str, str], body: object = None, *, code: object = None, message: str = ""
) -> Verdict:
    """The verdict of an HTTP response that is not a success.

    Args:
        body: the decoded body, or the `error` object inside it (as openai's exceptions hold it).
    """
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    details: Mapping[Any, Any] = inner if isinstance(inner, Mapping) else {}
    code = code or details.get("code")
    code = code if isinstance(code, str) else ""
    wait_s = _wait(headers, str(details.get("message") or message))
    stop = str(headers.get("x-should-retry", "")).lower() == "false"

    if code in POOL_CODES:
        return Verdict("neutral", "raise", code)
    if code in ACCOUNT_CODES or ORGANIZATION_CODE.fullmatch(code):
        return Verdict("account", "move", code)
    if code == "model_not_found" and status in (403, 404):
        return Verdict("model", "move", code)
    if code in RATE_CODES and status in (429, 503):
        # Asking for more than the whole limit says so in its type or message and cannot succeed later either.
        return Verdict("neutral", "raise", code) if _too_large(details) else Verdict("limited", "move", code, wait_s)
    if status == 402:
        return Verdict("account", "move", "payment_required")
    if status == 429:
        return (
            Verdict("neutral", "raise", "429")
            if stop or _too_large(details)
            else Verdict("limited", "move", "429", wait_s)
        )
    if status == 401:
        shaped = bool(details.get("message")) and ("type" in details or "code" in details)
        return Verdict("key", "move", "invalid_api_key") if shaped else Verdict("neutral", "raise", "401")
    if stop:
        return Verdict("neutral", "raise", str(status))
    if status in (408, 409) or status >= 500:
        return Verdict("failed", "retry", "5xx" if status >= 500 else str(status), wait_s)
    return Verdict("neutral", "raise", str(status))


def _too_large(details: Mapping[Any, Any]) -> bool:
    told = details.get("code") in RATE_CODES or details.get("type") in RATE_TYPES
    return told and "request too large" in str(details.get("message", "")).lower()


def _event(error: Exception) -> Verdict | None:
    """An error event inside a stream: openai raises it without a response, so that its code, then its type, decides
    what its status would have been. None where neither is known."""
    details = getattr(error, "body", None)
    if not isinstance(details, Mapping):
        return None
    code = details.get("code")
    code = code if isinstance(code, str) else ""
    status = next((status for codes, status in EVENTS if code in codes or details.get("type") in codes), None)
    if status is None and code not in ACCOUNT_CODES and not ORGANIZATION_CODE.fullmatch(code):
        return None
    return verdict_of_response(status or 429, {}, details, message=str(error))


def _transport(error: Exception) -> Verdict:
    """No response: a connection or a timeout, told by the types of the error and of what caused it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain and len(chain) < 8:
        chain.append(link)
        link = link.__cause__
    names = {
        kind.__name__ for link in chain for kind in type(link).__mro__ if kind.__module__.partition(".")[0] in LIBRARIES
    }
    if not names & (NEVER_SENT | TIMEOUTS | CONNECTIONS | {"PoolTimeout"}):
        return Verdict("neutral", "raise", type(error).__name__)
    if "PoolTimeout" in names:  # this process's own pool is used up: that says nothing of the upstream
        return Verdict("neutral", "retry", "pool_timeout", sent=False)
    kind = "timeout" if names & TIMEOUTS else "connection"
    if names & NEVER_SENT:
        return Verdict("failed", "retry", kind, sent=False)
    return Verdict("failed", "retry" if _harmless(error) else "raise", kind)


def _harmless(error: Exception) -> bool:
    """Whether doing the request twice does no harm; where it cannot be told, it does."""
    import json  # here, so that importing the package stays quick

    try:
        request = error.request  # type: ignore[attr-defined]
        path = str(request.url.path).rstrip("/")
        if path.endswith("/responses"):
            return json.loads(request.content).get("store") is False
        return (request.method == "POST" and path.endswith(HARMLESS)) or request.method == "GET"
    except Exception:
        return False


def _wait(headers: Mapping[str, str], message: str) -> float | None:
    """The wait in seconds that the server asks for: retry-after-ms, retry-after, "try again in 7m12s". Capped."""
    wait: float | None = None
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            wait = float(headers.get(name, "")) / unit
            break
        except (TypeError, ValueError):
            continue
    if wait is None:
        wait = _wait_until(headers.get("retry-after"), headers.get("date"))
    if wait is None:
        found = re.search(r"try again in ((?:[\d.]+(?:ms|[smhd]))+)", message, re.IGNORECASE)
        if found:
            units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
            parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", found.group(1))
            wait = sum(float(number) * units[unit] for number, unit in parts) if parts else None
    if wait is None or not 0 <= wait < float("inf"):
        return None
    return min(wait, LONGEST_WAIT_MS / 1000)


def _wait_until(then: object, now: object) -> float | None:
    """`retry-after` may be a date: how long after that of the response, so that no clock of ours matters."""
    if not isinstance(then, str) or not isinstance(now, str):
        return None
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, (parsedate_to_datetime(then) - parsedate_to_datetime(now)).total_seconds())
    except (TypeError, ValueError):
        return None


def lease_of(error: BaseException) -> str | None:
    """The lease of the request that came to an error, where a client of ours has sent it; else None."""
    extensions = _get(_get(error, "request"), "extensions")
    return extensions.get(LEASE) if isinstance(extensions, dict) else None


def redact(error: BaseException | None) -> None:
    """Overwrite the secrets in the headers of the requests that an exception and its chain hold, in place."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        link = todo.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        for holder in (link, _get(link, "response")):
            headers = _get(_get(holder, "request"), "headers")
            for name in ("authorization", "api-key", "x-api-key", "x-goog-api-key"):
                try:
                    if headers is not None and name in headers:
                        headers[name] = "[redacted]"
                except Exception:
                    continue
        todo += (link.__cause__, link.__context__, *getattr(link, "exceptions", ()))  # a group's, such as a TaskGroup's


def _get(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # httpx raises where a response has no request
        return None
