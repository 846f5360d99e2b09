"""A request under way, its entry in the log afterwards, and an order to let requests fail: values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .answers import Answer
from .endpoints import DEFAULT_MODELS, ENDPOINTS
from .failures import Failure
from .limits import Account
from .multipart import Upload
from .routes import Route, route_of
from .wire import Request

NO_FAILURE = Failure.slow(0)


@dataclass(frozen=True, slots=True)
class Entry:
    """One request as the log keeps it, written when it is over.

    at: time.time() of its arrival.
    key: the secret as sent, also an unknown one.
    model: Azure's deployment, else the request's model, else the one that its endpoint takes for granted.
    path: without its query.
    status: 0 if no answer was sent.
    code: of the error, if it had one.
    limit: the name of the limit that it would have exceeded: "rpm", "rpd", "tpm", "tpd", "concurrency".
    tokens: what it was charged.
    connection: the number of its connection, counted from 1.
    duration_s: from its arrival to the end of its answer.
    user: the request's `user`, else its header X-Test-Id: a test's name for it.
    """

    at: float
    key: str | None
    account: str | None
    model: str | None
    path: str
    status: int
    code: str | None
    limit: str | None
    tokens: int
    request_id: str
    connection: int
    duration_s: float
    user: str | None
    method: str = "POST"


def entries_over(log: Sequence[Entry]) -> list[Entry]:
    """Those that were refused because a limit was exceeded."""
    return [entry for entry in log if entry.limit is not None]


@dataclass(slots=True)
class Visit:
    """One request between its arrival and its end. Times in ns."""

    at: int
    request: Request
    request_id: str
    key: str | None = None
    account: str | None = None
    route: Route = field(init=False)
    body: dict[str, Any] = field(default_factory=dict)
    upload: Upload | None = None
    meters: Account | None = None
    held: int = 0
    tokens: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    refused: Answer | None = None
    failure: Failure = NO_FAILURE
    over: bool = False

    def __post_init__(self) -> None:
        self.route = route_of(self.request.path)

    @property
    def model(self) -> str | None:
        """The model asked for."""
        model = self.route.deployment or self.body.get("model", DEFAULT_MODELS.get(self.route.endpoint))
        return model if isinstance(model, str) else None

    @property
    def limited(self) -> bool:
        """Whether it asks for a model: only such a request is charged to limits."""
        return self.request.method == "POST" and self.route.endpoint in ENDPOINTS

    @property
    def admitted(self) -> bool:
        """Whether the limits let it pass: it is in flight for them."""
        return self.meters is not None and self.refused is None


@dataclass(slots=True)
class Order:
    """A failure waiting for the requests that it is meant for; `times` None: for ever."""

    failure: Failure
    key: str | None
    account: str | None
    model: str | None
    path: str | None
    times: int | None

    def matches(self, visit: Visit) -> bool:
        return (
            self.times != 0
            and self.key in (None, visit.key)
            and self.account in (None, visit.account)
            and (self.model is None or fnmatchcase(visit.model or "", self.model))
            and (self.path is None or route_of(self.path).covers(visit.route))
        )
