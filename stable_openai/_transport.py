"""The broker under an openai client: transports of httpx that lease a key for every attempt.

An openai client of this package holds no secret. Its `api_key` is a token that stands for the client, and every
request that carries it comes here, where it is made anew for the key that is leased (`_endpoint.py`). So whatever the
user sees of a request, in an exception too, names no secret; and a redirect, which httpx makes of the request that
the user sees, carries none to another host.

    Broker, AsyncBroker   the transport: who asks (a client, or one that is bound to a lease), or its own key
    Exchange              one request through the broker: the flow of `_flow.py`, whose attempts are sent from here
    Bound                 the one that uses the lease of a decorated function: it is tried again with the function

An answer that is not streamed is read within its attempt, so that one that breaks off is retried like one that never
came. A stream is retried only until its first chunk is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from time import monotonic, perf_counter
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import openai

from stable_openai._body import AsyncBody, Body, StreamError
from stable_openai._decorator import default_wait
from stable_openai._drive import adrive, drive
from stable_openai._endpoint import Asked, addressed, as_is, read_request
from stable_openai._flow import Deliver, Flow, Outcome, Policy, Raised, Returned, Started, call, verdict_of
from stable_openai._lease import Lease
from stable_openai._ops import Granted
from stable_openai._usage import last_error, tokens_used
from stable_openai._verdict import LEASE, Verdict
from stable_openai._wire import AsyncWire, Wire, http
from stable_openai._worker import Report
from stable_openai.errors import ConfigurationError, StableError
from stable_openai.manager import PRIORITY, KeyManager, default_manager

__all__ = ["AsyncBroker", "Broker", "Settings", "settings_of", "token_for"]


PREFIX = "stable-openai-"
REFUSED = 400
_numbers = itertools.count(1)
_clients: WeakValueDictionary[str, Any] = WeakValueDictionary()


class Settings(NamedTuple):
    """How a client asks for leases. `lease`: one that it is bound to, for its first request; `home`: the base URL of
    keys that have none, where the client shows that of its lease; `policy`: that of the function which it was given to,
    for further requests (`retries` None: as often as that says)."""

    manager: KeyManager | None = None
    max_wait: float | None = None
    priority: int = PRIORITY
    affinity: object = None
    retries: int | None = 2
    lease: Lease | None = None
    home: Any = None
    policy: Policy | None = None


def token_for(client: Any) -> str:
    """What stands for a client in its requests. The client has `settings` and `base_url`."""
    token = f"{PREFIX}{next(_numbers)}"
    _clients[token] = client
    return token


def settings_of(token: object) -> Settings | None:
    """Those of the client that a token stands for."""
    client = _clients.get(token) if isinstance(token, str) else None
    return client and client.settings


def _asker(request: Any) -> Any:
    """The client that sends a request; None where it brings a key of its own, or none."""
    headers = request.headers
    token = headers.get("authorization", "").removeprefix("Bearer ")
    if not token.startswith(PREFIX):
        token = headers.get("api-key", "")
        if not token.startswith(PREFIX):
            return None
    client = _clients.get(token)
    if client is None:
        raise _as_openai(ConfigurationError("api_key", "is the token of a client that is gone"))
    url, base = request.url, client.base_url
    if (url.scheme, url.host, url.port) != (base.scheme, base.host, base.port):
        # A redirect to another host, or a URL that the user gave.
        for name in ("authorization", "api-key"):
            headers.pop(name, None)
        return None
    return client


class Refusal(Exception):
    """A response that is no success, as the flow judges it."""

    def __init__(self, response: Any) -> None:
        self.response, self.status_code = response, response.status_code
        try:
            body = response.json()
        except Exception:  # no JSON
            body = None
        found = body.get("error", body) if isinstance(body, dict) else None
        self.body = found if isinstance(found, dict) else None
        self.code = self.body.get("code") if self.body else None
        super().__init__(str(self.body.get("message", "")) if self.body else "")


class Exchange:
    """One request through the broker, whichever the colour."""

    def __init__(self, client: Any, request: Any, wire: Any) -> None:
        settings: Settings = client.settings
        manager = settings.manager or default_manager()
        self.seen, self.wire, self.manager = request, wire, manager
        self.client, self.settings, self.follow = client, settings, False
        self.asked = read_request(request, client.base_url, settings.home)
        body, affinity = self.asked.body, settings.affinity
        if callable(affinity):
            affinity = affinity(body or {})
        lease = settings.lease
        model = self.asked.model or (lease.request.model if lease else None)
        self.request = manager.request(model, None, settings.max_wait, settings.priority, affinity, body or {})
        if lease is not None and affinity is None:
            self.request = self.request._replace(wanted=lease.wanted)
        self.worker, self.backend = manager._worker, manager._backend
        self.lease: Lease | None = None
        self.answer: Any = None  # of the last attempt
        self.began = 0.0
        self.body: Any = None

    def flow(self, loop: Any) -> Flow:
        policy, retries = self.settings.policy or Policy(lambda state: False, default_wait), self.settings.retries
        if retries is not None:
            policy = policy._replace(stop=lambda state: state.attempt_number > retries)
        once = "transfer-encoding" in self.seen.headers  # its length is not known: it comes from an iterator
        if once or policy.classify is not None:
            policy = policy._replace(classify=partial(self._classify, policy.classify, once))
        return call(self.worker, self.request, policy, loop, monotonic(), self.report)

    def _classify(self, users: Callable[[BaseException], Verdict | None] | None, once: bool, error: Any) -> Verdict:
        """The verdict on a failure; the user's function sees what openai's client would raise. `once`: the body cannot
        be sent twice."""
        verdict = verdict_of(_as_raised(error, self.client, self.seen, self.wire), users)
        return replace(verdict, action="raise") if once else verdict

    def report(self) -> Report:
        return self.lease.reported() if self.lease else Report()

    def begin(self, granted: Granted) -> Any:
        """What is to be sent with a lease."""
        self.lease, self.began = Lease(self.worker, self.backend, self.request, granted), perf_counter()
        self.follow = _follows(self.client, self.asked, self.lease)
        self.seen.extensions[LEASE] = granted.id
        return addressed(self.seen, self.asked, self.lease.key, self.wire.http)

    def streams(self, response: Any) -> bool:
        """Whether the answer is passed on while it comes."""
        return _streams(self.seen, response)

    def failed(self, error: BaseException) -> Outcome:
        if isinstance(error, (http.RequestError, self.wire.http.RequestError)):
            error.request = self.seen  # it may tell whether a repeat is harmless, and holds no secret
        return Raised(error)

    def took(self, response: Any, body: Any = None) -> Outcome:
        """What an answer says: one that was read, or whose body's first chunk is there."""
        assert self.lease is not None
        _note(self.lease, self.asked, response)
        if body is None:
            response = _finished(response, self.began)
        self.answer, self.body = response, body
        if body is not None:
            error = last_error(body.ahead())
            return Started() if error is None else Raised(StreamError(error))
        if response.status_code >= REFUSED:
            return Raised(Refusal(response))
        self.lease.used(_used(self.seen, response))
        return Returned(response)

    def response(self, outcome: Any, end: Callable[[Outcome], Any], drop: Callable[[], None]) -> Any:
        """What the client is given: the last answer, if there was one, whatever the broker concluded from it."""
        if type(outcome) is not Deliver and (self.answer is None or not _is_answer(outcome)):
            raise outcome.error
        if self.body is None:
            return self.answer
        if type(outcome) is Deliver:
            self.body.deliver(self.lease, end, drop)
        return _with_body(self.answer, self.body)


def _is_answer(outcome: Any) -> bool:
    return type(outcome) is Returned or isinstance(outcome.error, (Refusal, StreamError))


def _as_raised(error: BaseException, client: Any, request: Any, wire: Any) -> BaseException:
    """A failure as openai's client raises it."""
    if isinstance(error, Refusal):
        error.response.request = request
        return client._make_status_error_from_response(error.response)  # type: ignore[no-any-return]
    if isinstance(error, StreamError):
        return openai.APIError(str(error), request, body=error.body)
    if not isinstance(error, (http.RequestError, wire.http.RequestError)):
        return error
    late = isinstance(error, (http.TimeoutException, wire.http.TimeoutException))
    raised = openai.APITimeoutError(request) if late else openai.APIConnectionError(request=request)
    raised.__cause__ = error
    return raised


def _note(lease: Lease, asked: Asked, response: Any) -> None:
    lease.report(headers=response.headers)
    if asked.elsewhere(lease.key) is not None:  # of a host that the client does not know: it would mistake it
        response.headers.pop("set-cookie", None)


def _follows(client: Any, asked: Asked, lease: Lease) -> bool:
    """Whether the wire follows redirects: only within the endpoint of a key that has its own, which the client does not
    know. Others the client follows, and shows them in the response's history."""
    return client._client.follow_redirects and asked.elsewhere(lease.key) is not None


def _streams(request: Any, response: Any) -> bool:
    # A hook of the user's has read it; or openai's client will.
    if response.is_closed or response.status_code >= REFUSED:
        return False
    kind: str = response.headers.get("content-type", "")
    return kind.startswith("text/event-stream") or bool(request.headers.get("x-stainless-raw-response") == "stream")


def _used(request: Any, response: Any) -> int | None:
    """The tokens that an answer cost. What is only looked at again cost them before."""
    return tokens_used(response.content) if request.method == "POST" else None


def _with_body(response: Any, body: Any) -> Any:
    return http.Response(
        response.status_code, headers=response.headers.raw, stream=body, extensions=response.extensions
    )


def _finished(response: Any, began: float) -> Any:
    """An answer that was read, in the HTTP library that the client is built on. Reading it is what tells that client
    otherwise how long it took."""
    if not isinstance(response, http.Response):
        decoded = (b"content-encoding", b"content-length") if "content-encoding" in response.headers else ()
        headers = [row for row in response.headers.raw if row[0].lower() not in decoded]
        response = http.Response(
            response.status_code, headers=headers, content=response.content, extensions=response.extensions
        )
    # They hold the request with the secret: what it was read from, and what the user's own client makes of a redirect.
    response.stream, response.next_request = http.ByteStream(response.content), None
    response.elapsed = timedelta(seconds=perf_counter() - began)
    return response


class Bound:
    """The request that uses the lease which its client is bound to, whichever the colour."""

    def __init__(self, client: Any, lease: Lease, request: Any, wire: Any) -> None:
        self.client, self.lease, self.seen, self.wire = client, lease, request, wire
        self.began, self.follow = perf_counter(), False

    def begin(self) -> Any:
        """What is to be sent."""
        self.asked = read_request(self.seen, self.client.base_url, self.client.settings.home)
        self.follow = _follows(self.client, self.asked, self.lease)
        self.seen.extensions[LEASE] = self.lease.id
        return addressed(self.seen, self.asked, self.lease.key, self.wire.http)

    def streams(self, response: Any) -> bool:
        """Whether the answer is passed on while it comes."""
        _note(self.lease, self.asked, response)
        return _streams(self.seen, response)

    def deliver(self, response: Any, body: Any) -> Any:
        body.deliver(self.lease, self._ended, self.lease.drop_body)
        return _with_body(response, body)

    def _ended(self, outcome: Outcome) -> Any:
        return self.lease.end_body(self._told(outcome.error) if type(outcome) is Raised else outcome)

    def took(self, response: Any) -> Any:
        """The answer, which was read."""
        self.lease.used(_used(self.seen, response))
        return _finished(response, self.began)

    def outcome(self, response: Any) -> Outcome:
        """What the lease is told of it."""
        return Returned(None) if response.status_code < REFUSED else self._told(Refusal(response))

    def failed(self, error: BaseException) -> Outcome:
        if isinstance(error, (http.RequestError, self.wire.http.RequestError)):
            error.request = self.seen  # the one that was sent holds the secret
        return self._told(error)

    def _told(self, error: BaseException) -> Outcome:
        return Raised(_as_raised(error, self.client, self.seen, self.wire))


class Broker(http.BaseTransport):
    """The transport of sync clients."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def handle_request(self, request: http.Request) -> Any:
        client = _asker(request)
        if client is None:
            response = self._wire.send(as_is(request, self._wire.http))
            return response if self._wire.http is http else _with_body(response, Body(response, self._wire))
        lease = client.settings.lease
        try:
            if lease is not None:
                if lease.begin():
                    return self._bound(client, lease, request)
                lease.make_way(lease.finish)
            return self._lease(Exchange(client, request, self._wire))
        except StableError as error:
            raise _as_openai(error) from _cause(error, client, request, self._wire)

    def open(self) -> None:
        """Have what is needed before there is a lease."""
        self._wire.open()

    def _lease(self, exchange: Exchange) -> Any:
        self.open()
        flow, worker, backend = exchange.flow(None), exchange.worker, exchange.backend

        def attempt(granted: Granted) -> Outcome:
            try:
                if exchange.body is not None:
                    exchange.body.close()
                response = self._wire.send(exchange.begin(granted), exchange.follow)
                if not exchange.streams(response):
                    response.read()
                    return exchange.took(response)
                body = Body(response, self._wire)
                body.look_ahead()
            except BaseException as error:
                return exchange.failed(error)
            return exchange.took(response, body)

        def end(outcome: Outcome) -> None:
            drive(flow, worker, backend, None, outcome)

        return exchange.response(drive(flow, worker, backend, attempt), end, flow.close)

    def _bound(self, client: Any, lease: Lease, request: Any) -> Any:
        one = Bound(client, lease, request, self._wire)
        try:
            response = self._wire.send(one.begin(), one.follow)
            if one.streams(response):
                body = Body(response, self._wire)
                body.look_ahead()
                return one.deliver(response, body)
            response.read()
            response = one.took(response)
        except BaseException as error:
            lease.end_body(one.failed(error))
            raise
        lease.end_body(one.outcome(response))
        return response

    def close(self) -> None:
        self._wire.close()


class AsyncBroker(http.AsyncBaseTransport):
    """That of async clients."""

    def __init__(self, wire: AsyncWire) -> None:
        self._wire = wire

    async def handle_async_request(self, request: http.Request) -> Any:
        client = _asker(request)
        if client is None:
            response = await self._wire.send(as_is(request, self._wire.http))
            return response if self._wire.http is http else _with_body(response, AsyncBody(response, self._wire))
        lease = client.settings.lease
        try:
            if lease is not None:
                if lease.begin():
                    return await self._bound(client, lease, request)
                if (ending := lease.make_way(lease.afinish)) is not None:
                    await ending
            return await self._lease(Exchange(client, request, self._wire))
        except StableError as error:
            raise _as_openai(error) from _cause(error, client, request, self._wire)

    def open(self) -> None:
        """Have what is needed before there is a lease."""
        self._wire.open()

    async def _lease(self, exchange: Exchange) -> Any:
        from asyncio import get_running_loop

        self.open()
        flow, worker, backend = exchange.flow(get_running_loop()), exchange.worker, exchange.backend

        async def attempt(granted: Granted) -> Outcome:
            try:
                if exchange.body is not None:
                    await exchange.body.aclose()
                response = await self._wire.send(exchange.begin(granted), exchange.follow)
                if not exchange.streams(response):
                    await response.aread()
                    return exchange.took(response)
                body = AsyncBody(response, self._wire)
                await body.look_ahead()
            except BaseException as error:
                return exchange.failed(error)
            return exchange.took(response, body)

        async def end(outcome: Outcome) -> None:
            await adrive(flow, worker, backend, None, outcome)

        return exchange.response(await adrive(flow, worker, backend, attempt), end, flow.close)

    async def _bound(self, client: Any, lease: Lease, request: Any) -> Any:
        one = Bound(client, lease, request, self._wire)
        try:
            response = await self._wire.send(one.begin(), one.follow)
            if one.streams(response):
                body = AsyncBody(response, self._wire)
                await body.look_ahead()
                return one.deliver(response, body)
            await response.aread()
            response = one.took(response)
        except BaseException as error:
            if (ended := lease.end_body(one.failed(error))) is not None:
                await ended
            raise
        if (ended := lease.end_body(one.outcome(response))) is not None:
            await ended
        return response

    async def aclose(self) -> None:
        await self._wire.aclose()


@cache
def _both(kind: Any) -> Any:
    """An error of this package that openai lets pass: its client wraps and retries any other (as openai 2 does)."""
    return type(kind.__name__, (kind, openai.OpenAIError), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _as_openai(error: StableError) -> StableError:
    if not isinstance(error, openai.OpenAIError):
        kind: Any = type(error)
        error.__class__ = _both(kind)
    return error


def _cause(error: StableError, client: Any, request: Any, wire: Any) -> BaseException | None:
    """The last failure before the broker gave up, as openai's client raises it."""
    cause = error.__cause__
    return _as_raised(cause, client, request, wire) if isinstance(cause, (Refusal, StreamError)) else cause
