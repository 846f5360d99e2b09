"""Failures to inject: what an upstream, or a gateway before it, does other than answer.

Every row of the table of verdicts has a constructor here. Bodies and codes are those that OpenAI sends; an
injected failure carries no headers but its own, `x-request-id` and `openai-organization`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Act = Literal["answer", "close", "cut", "hang", "stall", "event", "slow"]


def error_body(message: str, type: str | None, code: str | None, param: str | None = None) -> str:
    """An error in OpenAI's shape, as JSON."""
    return json.dumps({"error": {"message": message, "type": type, "param": param, "code": code}})


@dataclass(frozen=True, slots=True)
class Failure:
    """What happens to a request in place of its proper answer. Use the constructors.

        fake.fail(Failure.rate_limit(retry_after_ms=20))
        fake.fail(Failure.server_error(503).no_retry(), account="org-1", times=None)

    `act` is what is done: "answer" with `status`, `headers` and `body`; "close" the connection before an
    answer or "cut" it in the middle of one; "hang" before, or "stall" in the middle of, the proper answer,
    until the client gives up or the fake is released; "event": break a stream off with the error event
    `body`; "slow": give the proper answer after `seconds`. The middle of a stream is after `after` events, or
    after half of them if that is None. An answer that is no stream has its middle after half of its bytes; with
    `after=0`, before the first.
    """

    act: Act = "answer"
    status: int = 200
    code: str | None = None
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    after: int | None = None

    @classmethod
    def error(
        cls,
        status: int,
        *,
        code: str | None = None,
        type: str | None = None,
        message: str = "Injected failure.",
        headers: Mapping[str, str] | None = None,
        body: str | None = None,
    ) -> Failure:
        """Any answer: an OpenAI-shaped error, or `body` as it stands."""
        named = {"content-type": "application/json"}
        named |= {name.lower(): value for name, value in (headers or {}).items()}
        text = error_body(message, type, code) if body is None else body
        return cls(status=status, code=code, body=text, headers=tuple(named.items()))

    def no_retry(self) -> Failure:
        """The same, with `x-should-retry: false`."""
        return replace(self, headers=(*self.headers, ("x-should-retry", "false")))

    @classmethod
    def redirect(cls, location: str, status: int = 307) -> Failure:
        """Another place to ask; 307 and 308 keep the method and the body."""
        return cls.error(status, headers={"location": location}, body="")

    # 429, 402: limits and quotas

    @classmethod
    def rate_limit(
        cls,
        *,
        retry_after_ms: float | None = None,
        retry_after: float | str | None = None,
        message_wait: str | None = None,
    ) -> Failure:
        """429, its wait in headers (ms; seconds or a date), in the text ("7m12s"), in several, or nowhere."""
        message = "Rate limit reached for gpt-4o in organization org-fake on requests per min (RPM): "
        message += "Limit 60, Used 60, Requested 1."
        if message_wait:
            message += f" Please try again in {message_wait}."
        waits = {"retry-after-ms": retry_after_ms, "retry-after": retry_after}
        headers = {name: str(value) for name, value in waits.items() if value is not None}
        return cls.error(429, code="rate_limit_exceeded", type="requests", message=message, headers=headers)

    @classmethod
    def slow_down(cls, status: int = 429) -> Failure:
        """`slow_down`, which OpenAI also sends as a 503."""
        message = "Slow down: reduce your request rate, keep it for 15 minutes, then increase it gradually."
        return cls.error(status, code="slow_down", type="requests", message=message)

    @classmethod
    def insufficient_quota(cls) -> Failure:
        """429: the account has no credit."""
        message = "You exceeded your current quota, please check your plan and billing details."
        return cls.error(429, code="insufficient_quota", type="insufficient_quota", message=message)

    @classmethod
    def billing_hard_limit_reached(cls) -> Failure:
        """429: the account's own ceiling."""
        return cls._quota("billing_hard_limit_reached", "Billing hard limit has been reached.")

    @classmethod
    def billing_not_active(cls) -> Failure:
        """429: the account has no billing."""
        return cls._quota("billing_not_active", "Your account is not active, check your billing details.")

    @classmethod
    def credit_balance_exhausted(cls) -> Failure:
        """429: prepaid credit used up."""
        return cls._quota("credit_balance_exhausted", "Your credit balance is exhausted.")

    @classmethod
    def organization_spend_limit_exceeded(cls) -> Failure:
        """429: the organisation's budget; other `organization_*` codes with `error`."""
        return cls._quota("organization_spend_limit_exceeded", "The organization's spend limit is exceeded.")

    @classmethod
    def project_spend_limit_exceeded(cls) -> Failure:
        """429: the project's budget."""
        return cls._quota("project_spend_limit_exceeded", "The project's spend limit is exceeded.")

    @classmethod
    def payment_required(cls) -> Failure:
        """402, without a code."""
        return cls.error(402, type="billing_error", message="Payment required.")

    @classmethod
    def quota_in_text_only(cls) -> Failure:
        """429 that says "insufficient quota" while its code is null: a gateway's mere concurrency limit."""
        return cls.error(429, message="insufficient quota: too many concurrent requests for this key")

    # 401, 403, 404: keys and models

    @classmethod
    def invalid_api_key(cls) -> Failure:
        """401 in OpenAI's shape."""
        message = "Incorrect API key provided."
        return cls.error(401, code="invalid_api_key", type="invalid_request_error", message=message)

    @classmethod
    def gateway_unauthorized(cls, *, html: bool = False) -> Failure:
        """401 of a gateway, not OpenAI-shaped: `{"detail": ...}`, or a page of HTML."""
        if html:
            page = "<html><head><title>401 Authorization Required</title></head></html>"
            return cls.error(401, headers={"content-type": "text/html"}, body=page)
        return cls.error(401, body='{"detail": "Not authenticated"}')

    @classmethod
    def account_deactivated(cls) -> Failure:
        """401 for good."""
        message = "The OpenAI account associated with this API key has been deactivated."
        return cls.error(401, code="account_deactivated", type="invalid_request_error", message=message)

    @classmethod
    def ip_not_authorized(cls) -> Failure:
        """401: this host may not call, whatever the key."""
        message = "Your IP address is not authorized to make this request."
        return cls.error(401, code="ip_not_authorized", type="invalid_request_error", message=message)

    @classmethod
    def unsupported_country(cls) -> Failure:
        """403: this country may not call, whatever the key."""
        message = "Country, region, or territory not supported"
        code = "unsupported_country_region_territory"
        return cls.error(403, code=code, type="request_forbidden", message=message)

    @classmethod
    def model_not_found(cls, status: int = 404) -> Failure:
        """404, or 403 as projects without access to a model are answered."""
        message = "The model does not exist or you do not have access to it."
        return cls.error(status, code="model_not_found", type="invalid_request_error", message=message)

    # 4xx, 5xx: the request, or the service

    @classmethod
    def bad_request(cls) -> Failure:
        """400."""
        return cls.error(400, type="invalid_request_error", message="We could not parse your request.")

    @classmethod
    def unprocessable(cls) -> Failure:
        """422."""
        return cls.error(422, type="invalid_request_error", message="The request cannot be processed.")

    @classmethod
    def request_timeout(cls) -> Failure:
        """408."""
        return cls.error(408, type="server_error", message="Request timeout.")

    @classmethod
    def conflict(cls) -> Failure:
        """409."""
        return cls.error(409, type="server_error", message="The resource was changed by another request.")

    @classmethod
    def server_error(cls, status: int = 500) -> Failure:
        """500, 502, 503, 504 and the like."""
        message = "The server had an error while processing your request."
        return cls.error(status, type="server_error", message=message)

    # what no status tells

    @classmethod
    def closed(cls) -> Failure:
        """The connection is closed before an answer."""
        return cls(act="close", status=0)

    @classmethod
    def cut(cls, after: int | None = None) -> Failure:
        """The connection is closed in the middle of the body, or of the stream: see `after` above.

        `after=0`: the headers were sent, and nothing else.
        """
        return cls(act="cut", after=after)

    @classmethod
    def hang(cls) -> Failure:
        """No answer, until the client gives up; or the proper one after `FakeOpenAI.release`."""
        return cls(act="hang")

    @classmethod
    def stall(cls, after: int | None = None) -> Failure:
        """Half an answer, then nothing until the client gives up; or the rest after `FakeOpenAI.release`."""
        return cls(act="stall", after=after)

    @classmethod
    def slow(cls, seconds: float) -> Failure:
        """The proper answer, late."""
        return cls(act="slow", seconds=seconds)

    @classmethod
    def stream_error(cls, code: str | None = "server_error", *, after: int | None = None) -> Failure:
        """An error event in the middle of a stream; a request without a stream is answered 500 with it.

        `after=0`: it is the first event, of an answer whose status is 200.
        """
        message = "The server had an error while processing your request."
        return replace(cls.error(500, code=code, type="server_error", message=message), act="event", after=after)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Failure:
        """The inverse of `dataclasses.asdict` over JSON, which makes lists of tuples."""
        return cls(**{**fields, "headers": tuple((name, value) for name, value in fields.get("headers", ()))})

    @classmethod
    def _quota(cls, code: str, message: str) -> Failure:
        return cls.error(429, code=code, type="billing_error", message=message)


def closed_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on (best effort: it was free a moment ago), for connect errors."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
