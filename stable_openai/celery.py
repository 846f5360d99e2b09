"""Celery: tasks that never hold a worker while they wait.

    @app.task
    @stable(model="gpt-4o")
    def ask(prompt, client): ...

A task that is itself decorated with @stable, as above, and would wait for a key for longer than `celery_wait` goes back
to the queue: a message of its own, with the countdown that the broker of keys named, and everything else as it was.
That is no retry of the task's: `retries` stays, so do its time limits, callbacks, priority and expiry. It comes back to
its place in the line (see `_postpone.py`), and `max_wait` counts from when it was delivered first.

A decorated function that a task only calls waits where it is: to go back, the whole task would have to be run again.
Without a worker (a direct call, `task_always_eager`) all is as without Celery.
"""

from __future__ import annotations

import logging
import math
import random
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from celery import Celery, current_task, signals
from celery.exceptions import Retry, SoftTimeLimitExceeded

from stable_openai._limits import Limits
from stable_openai._ops import RETURNS_MS
from stable_openai._postpone import Place, Postponed, Visit, new_place
from stable_openai.errors import ConfigurationError
from stable_openai.manager import KeyManager, check_number

if TYPE_CHECKING:
    from celery import Task

__all__ = ["Delivery", "delivery_of", "setup"]

log = logging.getLogger("stable_openai.celery")
HEADER = "stable_openai"
PREFIX = "stable_openai_"
WAIT_S = 1.0
OPTIONS = ("pool", "limits", "models", "on_redis_down", "lease_ttl", "max_wait", "headroom_s", "on_wait")
# A message that waits in a worker for longer than the visibility timeout is delivered once more; an hour, unless told.
STEPS, VISIBILITY_S = 4, 3600.0
SCATTER = 0.1
EARLY_S = 0.15  # what it takes to come back

_urls: dict[str, str] = {}  # by what is shown of them


def setup(app: Celery, manager: KeyManager | None = None) -> KeyManager:
    """Make the pool of an app's tasks from its settings, and end it with the workers.

    The settings are `stable_openai_keys` (a list of strings and `Key`, or a text with commas), `stable_openai_redis`,
    and as `KeyManager` has them `stable_openai_pool`, `_limits` (a `Limits` or a dict), `_models`, `_on_redis_down`,
    `_lease_ttl`, `_max_wait`, `_headroom_s` and `_on_wait`; without keys, what `KeyManager()` finds.
    `stable_openai_celery_wait` is for how many seconds a task may wait in its worker (1; None: always there);
    `@app.task(celery_wait=...)` is for one task.

    Args:
        manager: a pool that has been made, instead of one from the settings.

    Returns the manager, which a bare @stable finds by itself. Raises ConfigurationError. Does no I/O.
    """
    conf = app.conf
    _check_names(conf)
    _checked(conf.get(PREFIX + "celery_wait", WAIT_S))
    if manager is None:
        keys, redis = conf.get(PREFIX + "keys"), conf.get(PREFIX + "redis")
        redis = _urls.get(redis, redis) if isinstance(redis, str) else redis  # of an app that is set up once more
        given = {name: conf[PREFIX + name] for name in OPTIONS if conf.get(PREFIX + name) is not None}
        if "limits" in given:
            given["limits"] = _limits(given["limits"])
        if "models" in given:
            given["models"] = {name: _limits(limits) for name, limits in dict(given["models"]).items()}
        if isinstance(keys, str):
            keys = [key.strip() for key in keys.split(",") if key.strip()]
        manager = KeyManager(keys, redis, **given)
        if isinstance(redis, str):  # `celery report` prints settings: it masks those named ..._keys, but not this one
            shown = _without_password(redis)
            _urls[shown] = redis
            conf[PREFIX + "redis"] = shown
    close = manager.close

    def ended(**_: Any) -> None:
        close()

    signals.worker_init.connect(_before_the_fork, weak=False, dispatch_uid=PREFIX + "init")
    for signal in (signals.worker_process_shutdown, signals.worker_shutdown):
        signal.connect(ended, weak=False, dispatch_uid=f"{PREFIX}{id(manager)}")
    return manager


def _check_names(conf: Any) -> None:
    """A setting that is misspelt would go unseen: Celery itself takes any."""
    known, names = sorted((*OPTIONS, "keys", "redis", "celery_wait")), [str(name).lower() for name in conf]
    prefix = f"{conf.prefix or ''}{PREFIX}".lower()  # known when they have been read
    for name in names:
        if name.startswith(prefix) and name.removeprefix(prefix) not in known:
            raise ConfigurationError(name, f"is no setting; after {prefix} there may be {', '.join(known)}")


def _checked(wait: Any) -> float | None:
    if wait is not None:
        check_number("celery_wait", wait, 0, math.inf)
    return wait  # type: ignore[no-any-return]  # it is a number


def _limits(given: Limits | dict[str, Any]) -> Limits:
    try:
        return given if isinstance(given, Limits) else Limits(**given)
    except TypeError as error:
        raise ConfigurationError("limits", f"must be a Limits(...), or a dict of its arguments ({error})") from None


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name not in ("password", "username")]
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)))


def _before_the_fork(**_: Any) -> None:
    """Have openai and its client ready, which takes a second, once for all children (connections they make each)."""
    from stable_openai._clients import shared_client

    shared_client(False)


def _is_ours(brought: Any, request: Any) -> bool:
    return (
        isinstance(brought, dict)
        and brought.get("id") == request.id
        and brought.get("retries") == request.retries
        and isinstance(brought.get("first"), (int, float))
        and isinstance(brought.get("until"), (int, float))
        and isinstance(brought.get("place"), list)
        and len(brought["place"]) == len(Place._fields)
    )


def delivery_of(function: object) -> Delivery | None:
    """What this thread runs for a worker, if `function` is the body of that task."""
    task = current_task._get_current_object()
    if task is None or task.request.called_directly or task.request.is_eager:
        return None
    return Delivery(task) if _runs(task.run, function) else None


def _runs(body: Any, function: object) -> bool:
    """Whether a task's body is a function, or wraps it as autoretry_for= and pydantic= do (which pass Retry on)."""
    while body is not None:
        body = getattr(body, "__func__", body)
        if body is function:
            return True
        body = getattr(body, "__wrapped__", None)
    return False


class Delivery:
    """The task that this thread runs for a worker, as it was delivered this time."""

    def __init__(self, task: Task) -> None:
        self.task = task
        request = task.request
        self.at = time()
        brought = getattr(request, HEADER, None)
        # What else has these headers is another task (of a chain, say), or the user's own retry.
        self.brought = brought if _is_ours(brought, request) else None

    @property
    def since_s(self) -> float:
        """How long ago it was delivered first, by the clocks of the hosts, by which Celery counts its countdowns."""
        return max(0.0, self.at - self.brought["first"]) if self.brought else 0.0

    def visit(self) -> Visit | None:
        """How the call that is the task waits; None: where it is."""
        wait = _checked(getattr(self.task, "celery_wait", self.task.app.conf.get(PREFIX + "celery_wait", WAIT_S)))
        if wait is None:
            return None
        brought = self.brought
        if not brought:
            return Visit(wait, new_place())
        place = Place(*brought["place"])
        rest_s = brought["until"] - self.at
        return Visit(wait, place._replace(missing=tuple(place.missing)), rest_s)

    def postpone(self, later: Postponed) -> None:
        """Send the task back to the queue, and raise what says so. Where it cannot be sent, this returns."""
        task, request = self.task, self.task.request
        options = task.app.conf.broker_transport_options or {}
        longest = min(RETURNS_MS / 1000, float(options.get("visibility_timeout") or VISIBILITY_S) / STEPS)
        seconds = max(0.0, later.seconds - EARLY_S)
        if seconds > longest:  # so do others: not all at the same time
            seconds = longest * random.uniform(1 - SCATTER, 1)
        header = {
            "id": request.id,
            "retries": request.retries,
            "first": self.brought["first"] if self.brought else self.at,
            "until": time() + later.seconds if later.rests else 0.0,
            "place": list(later.place),
        }
        headers = {**(request.as_execution_options()["headers"] or {}), HEADER: header}  # without a broker's own
        again = task.signature_from_request(request, countdown=seconds, retries=request.retries, headers=headers)
        try:
            again.apply_async(add_to_parent=False)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            log.warning("task.stays task=%s id=%s error=%s", task.name, request.id, type(error).__name__)
            return
        raise Retry(f"{later}: back to the queue", when=seconds, sig=again)
