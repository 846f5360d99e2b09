"""What happens to a request from its arrival to its entry in the log: keys, limits, injected failures.

No I/O but the clock's: wall time, as the broker's store has it, which never goes back here.

The order of judgement, on arrival: a path that does not exist (404), an unknown key (401), a body without
sense (400), an unknown model (404), the limits (429), an injected failure. So a failure is used up only by a
request that the limits admitted, and that request is charged like any other; where tokens are charged by use,
only those of an answer are. Only the endpoints of models have limits.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from typing import Any
from urllib.parse import parse_qs

from .answers import Answer, Work, output_limit, prompt_tokens
from .endpoints import ENDPOINTS, NO_OUTPUT
from .failures import Failure
from .limits import Account
from .meters import SECOND_NS
from .multipart import parse_form
from .refusals import limit_headers, over_limit, refusal
from .routes import METHODS
from .schemas import Unsatisfiable
from .settings import Settings
from .stored import Stored
from .visits import NO_FAILURE, Entry, Order, Visit
from .wire import Request

# The endpoints that take a form with a file, and the fields that the form has to have.
FORMS: dict[str, tuple[str, ...]] = {"/files": ("purpose",), "/audio/transcriptions": ()}


class Upstream:
    """The state of the fake, shared by its server's thread and those that look at it: all under `changed`."""

    def __init__(self, settings: Settings) -> None:
        self.changed = threading.Condition()
        self.log: list[Entry] = []
        self.in_flight: Counter[str] = Counter()
        self.max_in_flight: Counter[str] = Counter()
        self.open_connections = 0
        self.total_connections = 0
        self._settings = settings
        self._accounts = settings.accounts()
        self._known_accounts = frozenset(self._accounts.values())
        self._unknown_models = frozenset(settings.unknown_models)
        self._stored = Stored(self._unknown_models)
        self._meters: dict[tuple[str, str], Account] = {}
        self._orders: deque[Order] = deque()
        self._requests = 0
        self._now = 0

    # from tests

    def order(self, order: Order) -> None:
        """Inject a failure."""
        with self.changed:
            self._orders.append(order)

    def clear(self) -> None:
        """Forget injected failures, the log and the highest numbers in flight; the meters stay."""
        with self.changed:
            self._orders.clear()
            self.log.clear()
            self.max_in_flight = Counter(self.in_flight)

    def spend(self, account: str, model: str, requests: int = 0, tokens: int = 0) -> None:
        """Charge what somebody else used."""
        if account not in self._known_accounts:
            raise ValueError(f"no key is of the account {account!r}")
        if requests < 0 or tokens < 0:
            raise ValueError("what was used cannot be negative")
        with self.changed:
            self._meters_of(account, model).spend(requests, tokens, self._clock())

    # from the server, in the order of a request's life

    def arrive(self, request: Request) -> Visit:
        """Judge a request that has just been read, and charge it."""
        with self.changed:
            self._requests += 1
            visit = Visit(self._clock(), request, f"req_{self._requests:012d}")
            visit.key = _secret(request.headers)
            visit.account = self._accounts.get(visit.key or "")
            if visit.account is not None:
                self.in_flight[visit.account] += 1
                self.max_in_flight[visit.account] = max(
                    self.in_flight[visit.account], self.max_in_flight[visit.account]
                )
            visit.refused = self._senseless(visit)
            if visit.refused is None and visit.limited:
                self._admit(visit)
            if visit.refused is None:
                visit.failure = self._ordered(visit)
            self.changed.notify_all()
            return visit

    def readmit(self, visit: Visit) -> None:
        """Judge once more, and for good, a request that was refused for its concurrency."""
        with self.changed:
            visit.refused = None
            self._admit(visit, again=True)
            if visit.refused is None:
                visit.failure = self._ordered(visit)

    def answer(self, visit: Visit) -> Answer:
        """What the request is answered, its failure aside."""
        if visit.refused is not None:
            return visit.refused
        if not visit.limited:
            return self._stored.answer(visit)
        if unknown := self._stored.unknown_previous(visit):
            return unknown
        work = self._work(visit)
        try:
            answer = ENDPOINTS[visit.route.endpoint](work)
        except Unsatisfiable as error:
            return refusal(400, f"Invalid schema: {error}", "invalid_json_schema")
        if visit.held:
            visit.tokens = work.total_tokens
        if visit.route.endpoint == "/responses":
            self._stored.keep_response(visit.account, work)
        return answer

    def leave(self, visit: Visit, status: int = 0, code: str | None = None) -> None:
        """The request is over: end its charges and log it. The first call counts."""
        with self.changed:
            if visit.over:
                return
            visit.over = True
            now = self._clock()
            if visit.account is not None:
                self.in_flight[visit.account] -= 1
            if visit.admitted and visit.meters is not None:
                visit.meters.leave()
                if visit.held:
                    visit.meters.use(visit.held, visit.tokens, now)
            self.log.append(
                Entry(
                    at=visit.at / SECOND_NS,
                    key=visit.key,
                    account=visit.account,
                    model=visit.model,
                    path=visit.request.path,
                    status=status,
                    code=code,
                    limit=visit.refused.limit if visit.refused is not None else None,
                    tokens=visit.tokens,
                    request_id=visit.request_id,
                    connection=visit.request.connection,
                    duration_s=(now - visit.at) / SECOND_NS,
                    user=_user(visit),
                    method=visit.request.method,
                )
            )
            self.changed.notify_all()

    def connections(self, change: int) -> int:
        """Count a connection opened (1) or closed (-1); returns how many there ever were."""
        with self.changed:
            self.open_connections += change
            self.total_connections += change > 0
            self.changed.notify_all()
            return self.total_connections

    # steps of the judgement

    def _clock(self) -> int:
        self._now = max(self._now, time.time_ns())
        return self._now

    def _senseless(self, visit: Visit) -> Answer | None:
        request, route = visit.request, visit.route
        if request.method not in METHODS.get(route.endpoint, ()):
            return refusal(404, f"Invalid URL ({request.method} {request.path})", None)
        if route.versioned and "api-version" not in parse_qs(request.query):
            return refusal(404, "Resource not found", "404")
        if visit.account is None:
            return refusal(401, "Incorrect API key provided.", "invalid_api_key")
        if request.method != "POST":
            return None
        if not _read_body(visit):
            kind = "form, with a file and all its fields," if route.endpoint in FORMS else "JSON"
            return refusal(400, f"We could not parse the {kind} body of your request.", None)
        if not visit.limited:
            return None
        if visit.model is None:
            return refusal(400, "you must provide a model parameter", None)
        if visit.model in self._unknown_models:
            message = f"The model `{visit.model}` does not exist or you do not have access to it."
            return refusal(404, message, "model_not_found")
        return None

    def _admit(self, visit: Visit, *, again: bool = False) -> None:
        assert visit.account is not None
        assert visit.model is not None
        visit.meters = meters = self._meters_of(visit.account, visit.model)
        tokens = max(output_limit(visit.body) or 0, prompt_tokens(visit.body))
        hold = self._settings.charge == "used"
        now = self._clock()
        exceeded = meters.admit(tokens, now, hold=hold)
        visit.headers = limit_headers(meters, now, self._settings.rate_headers)
        if exceeded is not None:
            visit.refused = over_limit(visit.model, visit.account, exceeded)
            if self._settings.refusals_count and (again or exceeded.limit != "concurrency"):
                meters.refuse(now)
        elif hold:
            visit.held = tokens
        else:
            visit.tokens = tokens

    def _meters_of(self, account: str, model: str) -> Account:
        place = (account, self._settings.model_class(model))
        meters = self._meters.get(place)
        if meters is None:
            meters = self._meters[place] = self._settings.meters(*place)
        return meters

    def _ordered(self, visit: Visit) -> Failure:
        order = next((order for order in self._orders if order.matches(visit)), None)
        if order is None:
            return NO_FAILURE
        if order.times is not None:
            order.times -= 1
            if order.times == 0:
                self._orders.remove(order)
        return order.failure

    def _work(self, visit: Visit) -> Work:
        assert visit.model is not None
        return Work(
            body=visit.body,
            model=visit.model,
            id=visit.request_id[4:],
            created=visit.at // SECOND_NS,
            prompt_tokens=prompt_tokens(visit.body),
            output_tokens=0 if visit.route.endpoint in NO_OUTPUT else self._output_tokens(visit.body),
            upload=visit.upload,
        )

    def _output_tokens(self, body: dict[str, Any]) -> int:
        wanted = self._settings.output_tokens
        if callable(wanted):
            wanted = wanted(body)
        limit = output_limit(body)
        return wanted if limit is None else min(wanted, limit)


def _read_body(visit: Visit) -> bool:
    """Read the body of a request, JSON or a form; returns whether it is what its endpoint takes."""
    request, needed = visit.request, FORMS.get(visit.route.endpoint)
    try:
        if needed is not None:
            form = parse_form(request.headers.get("content-type", ""), request.body)
            if form is None or "file" not in form.uploads or not form.fields.keys() >= {*needed}:
                return False
            visit.body, visit.upload = {**form.fields}, form.uploads["file"]
            return True
        value = json.loads(request.body)
    except ValueError:
        return False
    if isinstance(value, dict):
        visit.body = value
    return isinstance(value, dict)


def _secret(headers: dict[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else headers.get("api-key")


def _user(visit: Visit) -> str | None:
    user = visit.body.get("user", visit.request.headers.get("x-test-id"))
    return user if isinstance(user, str) else None
