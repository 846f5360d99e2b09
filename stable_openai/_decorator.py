"""@stable: lease a key for every attempt of a function, and give it to the function."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import update_wrapper
from time import monotonic
from typing import Any, ParamSpec, TypeVar, overload

from stable_openai._drive import adrive, adrive_generator, drive, drive_generator, result
from stable_openai._flow import Deliver, Flow, Outcome, Policy, Raised, Returned, Started, call
from stable_openai._lease import Lease
from stable_openai._ops import Granted
from stable_openai._postpone import Postponed, Visit
from stable_openai._verdict import Verdict
from stable_openai._waiter import BANDS, Request
from stable_openai._worker import Report
from stable_openai.errors import ConfigurationError
from stable_openai.manager import PRIORITY, KeyManager, check_number, default_manager

__all__ = ["INJECTED", "stable"]

P = ParamSpec("P")
R = TypeVar("R")

BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
PROVIDED = ("api_key", "client", "base_url", "lease")
_BARE = frozenset({"api_key", "base_url"})
ATTEMPTS = 6

INJECTED: Any = None
"""A default for the injected parameters, so that a type checker lets callers leave them out:
`def ask(prompt: str, api_key: str = INJECTED) -> str`."""


@overload
def stable(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def stable(
    *,
    manager: KeyManager | None = None,
    model: str | None = None,
    tokens: int | Callable[..., int] | None = None,
    max_wait: float | None = None,
    stop: Callable[[Any], bool] | None = None,
    wait: Callable[[Any], float] | None = None,
    priority: int | Callable[..., int] = PRIORITY,
    affinity: str | Callable[..., object] | None = None,
    classify: Callable[[BaseException], Verdict | None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def stable(function: Any = None, /, **options: Any) -> Any:
    """Lease a key for every attempt of a function; retry what may be retried; raise what may not.

    The function may be a coroutine function, a generator or an async generator, or a method. It declares one or more
    of the parameters `api_key`, `client`, `base_url` and `lease`, and is given them; its callers leave them out. A
    caller who passes `api_key=` or `client=` himself uses his own: nothing is leased.

    The first request of `client` uses the lease of the call; the function is called again where that fails. Further
    ones lease for themselves, and are tried again by themselves, by the same `stop`, `wait` and `classify`; the
    function is not called again for what they raise.

    Args:
        manager: the pool; by default the one that is the default when the function is called.
        model: the model that the limits are counted for; else the call's `model` argument.
        tokens: the tokens of a call, or a function of its arguments that tells; else estimated from its messages,
            input or prompt and its output limit, where the limits count tokens.
        max_wait: seconds that a call may wait in all; else the manager's.
        stop, wait: tenacity's strategies: how often, and how long between attempts.
        priority: 0 (most urgent) to 3, or a function of the arguments that tells. Of the calls that wait, the more
            urgent come first, on whichever host; a call that waits rises by one every 30 s.
        affinity: the name of an argument, or a function of the arguments: calls with the same value go to the same
            account while that can serve, so that the provider's prompt cache keeps its hits.
        classify: gives the verdict of an exception, or None to leave it to the table.

    Raises ConfigurationError, when it decorates, for a function that declares none of the parameters.

    >>> from stable_openai import KeyManager, stable
    >>> manager = KeyManager(["sk-doc"], pool="doc-stable")
    >>> @stable(manager=manager)
    ... def ask(prompt, api_key):
    ...     return f"{prompt} with a key of {len(api_key)} letters"
    >>> ask("hello")
    'hello with a key of 6 letters'
    >>> manager.close()
    """
    if function is not None:
        return Decorated(function, **options).wrapper()
    return lambda function: Decorated(function, **options).wrapper()


class Decorated:
    """A decorated function: what it declares, and how it is called."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        manager: KeyManager | None = None,
        model: str | None = None,
        tokens: int | Callable[..., int] | None = None,
        max_wait: float | None = None,
        stop: Callable[[Any], bool] | None = None,
        wait: Callable[[Any], float] | None = None,
        priority: int | Callable[..., int] = PRIORITY,
        affinity: str | Callable[..., object] | None = None,
        classify: Callable[[BaseException], Verdict | None] | None = None,
    ) -> None:
        if not callable(function):
            raise ConfigurationError("stable", "decorates a function; its options are given by name")
        self.function = function
        if hasattr(function, "apply_async"):
            raise ConfigurationError("stable", "decorates what a Celery task runs: write @app.task above @stable")
        if manager is not None and not isinstance(manager, KeyManager):
            raise ConfigurationError("manager", "must be a KeyManager")
        if tokens is not None and not callable(tokens) and (type(tokens) is not int or tokens < 0):
            raise ConfigurationError("tokens", "must be a whole number, 0 or more, or a function of the arguments")
        if max_wait is not None:
            check_number("max_wait", max_wait, 0, math.inf)
        for name, strategy in (("stop", stop), ("wait", wait), ("classify", classify)):
            if strategy is not None and not callable(strategy):
                raise ConfigurationError(name, "must be a function")
        self.name = getattr(function, "__qualname__", "the function")
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters
        self.injected = tuple(name for name in PROVIDED if name in parameters and _by_name(parameters[name]))
        if not self.injected:
            raise ConfigurationError(
                "stable", f"{self.name} declares none of the parameters {', '.join(PROVIDED)}; add client or api_key"
            )
        # Callers do not see the injected parameters: what they give by place is for the others, in their order.
        declared = [name for name, parameter in parameters.items() if parameter.kind in BY_PLACE]
        order = sorted(declared, key=lambda name: name in self.injected)
        self.positions = {name: place for place, name in enumerate(order)}
        self.reordered = order != declared
        self.defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty and name not in self.injected
        }
        if self.reordered and any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters.values()):
            raise ConfigurationError("stable", "the injected parameters must come after those that are given by place")
        if not callable(priority) and priority not in range(BANDS):
            raise ConfigurationError("priority", "must be 0 (most urgent) to 3, or a function of the arguments")
        if affinity is not None and not callable(affinity) and affinity not in parameters:
            raise ConfigurationError("affinity", f"{affinity!r} is not an argument of {self.name}")
        self.manager, self.model, self.tokens, self.max_wait = manager, model, tokens, max_wait
        self.priority, self.affinity = priority, affinity
        self.policy = Policy(stop or default_stop, wait or default_wait, classify)

    def wrapper(self) -> Any:
        function, made = self.function, self
        if inspect.isasyncgenfunction(function):

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                args, kwargs = made.arranged(args, kwargs)
                if made.has_own(kwargs, args):
                    return function(*args, **kwargs)
                one = OneCall(made, args, kwargs, is_async=True)
                return adrive_generator(one.flow(), one.worker, one.backend, one.arguments_for)

        elif inspect.isgeneratorfunction(function):

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                args, kwargs = made.arranged(args, kwargs)
                if made.has_own(kwargs, args):
                    return function(*args, **kwargs)
                one = OneCall(made, args, kwargs)
                return drive_generator(one.flow(), one.worker, one.backend, one.arguments_for)

        elif inspect.iscoroutinefunction(function):

            async def wrapped(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]  # its colour differs
                args, kwargs = made.arranged(args, kwargs)
                if made.has_own(kwargs, args):
                    return await function(*args, **kwargs)
                return await OneCall(made, args, kwargs, is_async=True).arun()

        else:

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                args, kwargs = made.arranged(args, kwargs)
                if made.has_own(kwargs, args):
                    return function(*args, **kwargs)
                one = OneCall(made, args, kwargs)
                return one.run_in_celery(wrapped) if "celery._state" in sys.modules else one.run()

        update_wrapper(wrapped, function)
        visible = [parameter for name, parameter in self.signature.parameters.items() if name not in self.injected]
        wrapped.__signature__ = self.signature.replace(parameters=visible)  # type: ignore[attr-defined]
        annotations = getattr(function, "__annotations__", {})
        wrapped.__annotations__ = {name: kind for name, kind in annotations.items() if name not in self.injected}
        return wrapped

    def arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What was given by place, by name, where an injected parameter stands in between."""
        if not self.reordered or len(args) > len(self.positions):
            return args, kwargs
        named = dict(zip(self.positions, args))
        twice = named.keys() & kwargs.keys()
        if twice:
            raise TypeError(f"{self.name}() got multiple values for argument {min(twice)!r}")
        return (), {**named, **kwargs}

    def has_own(self, kwargs: Mapping[str, Any], args: tuple[Any, ...]) -> bool:
        """Whether the caller brings a key or a client of his own."""
        return any(
            self.argument(name, args, kwargs) is not None for name in ("api_key", "client") if name in self.injected
        )

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An argument of a call, by name or place, else its default."""
        if name in kwargs:
            return kwargs[name]
        place = self.positions.get(name)
        return args[place] if place is not None and place < len(args) else self.defaults.get(name)

    def request(self, manager: KeyManager, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        model = self.model or self.argument("model", args, kwargs)
        model = model if isinstance(model, str) else None
        tokens = self.tokens
        if callable(tokens):
            tokens = tokens(*args, **kwargs)
        priority, affinity = self.priority, self.affinity
        if callable(priority):
            priority = priority(*args, **kwargs)
        liked: object = None
        if affinity is not None:
            liked = affinity(*args, **kwargs) if callable(affinity) else self.argument(affinity, args, kwargs)
        arguments = {**self.defaults, **dict(zip(self.positions, args)), **kwargs} if tokens is None else None
        return manager.request(model, tokens, self.max_wait, priority, liked, arguments)


def _by_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class OneCall:
    """One call of a decorated function."""

    __slots__ = (
        "args", "backend", "decorated", "is_async", "kwargs", "lease", "manager", "request", "since_s", "value",
        "visit", "worker",
    )  # fmt: skip

    def __init__(
        self, decorated: Decorated, args: tuple[Any, ...], kwargs: dict[str, Any], is_async: bool = False
    ) -> None:
        manager = decorated.manager or default_manager()
        self.decorated, self.args, self.kwargs, self.is_async = decorated, args, kwargs, is_async
        self.manager = manager
        self.worker, self.backend = manager._worker, manager._backend
        self.request = decorated.request(manager, args, kwargs)
        self.lease: Lease | None = None
        self.value: Any = None
        self.visit: Visit | None = None
        self.since_s = 0.0

    def run(self) -> Any:
        flow, worker, backend = self.flow(), self.worker, self.backend
        outcome = drive(flow, worker, backend, self.attempt)
        if type(outcome) is not Deliver:
            return result(outcome)
        self._lease.outlive(lambda outcome: drive(flow, worker, backend, None, outcome), flow.close)
        return self.value

    def run_in_celery(self, wrapped: object) -> Any:
        """The same, in a worker's task too, which goes back to its queue rather than wait for long."""
        from stable_openai.celery import delivery_of

        delivery = delivery_of(wrapped)
        if delivery is not None:
            self.visit, self.since_s = delivery.visit(), delivery.since_s
        try:
            return self.run()
        except Postponed as later:
            assert delivery is not None
            delivery.postpone(later)
            self.visit, self.since_s = None, delivery.since_s
        return self.run()  # where it is

    async def arun(self) -> Any:
        flow, worker, backend = self.flow(), self.worker, self.backend
        outcome = await adrive(flow, worker, backend, self.aattempt)
        if type(outcome) is not Deliver:
            return result(outcome)
        ended = self._lease.outlive(lambda outcome: adrive(flow, worker, backend, None, outcome), flow.close)
        if ended is not None:
            await ended
        return self.value

    def flow(self) -> Flow:
        if "client" in self.decorated.injected:
            # Before there is a lease: it may take a second, and what is leased should be sent at once.
            from stable_openai._clients import prepare

            prepare(self.is_async)
        loop = None
        if self.is_async:
            from asyncio import get_running_loop

            loop = get_running_loop()
        policy, visit, since_s = self.decorated.policy, self.visit, self.since_s
        return (yield from call(self.worker, self.request, policy, loop, monotonic(), self.reported, visit, since_s))

    def reported(self) -> Report:
        return self.lease.reported() if self.lease else Report()

    def injection(self, granted: Granted) -> dict[str, Any]:
        """The function's keyword arguments, with what it declares."""
        key = self.worker.known[granted.key]
        given = dict(self.kwargs)
        policy = self.decorated.policy
        self.lease = None
        if not _BARE.issuperset(self.decorated.injected):
            self.lease = Lease(self.worker, self.backend, self.request, granted, policy.classify)
        for name in self.decorated.injected:
            if name == "api_key":
                given[name] = key.secret.reveal()
            elif name == "base_url":
                given[name] = given.get(name) or key.base_url
            elif name == "client":
                from stable_openai._clients import client_for

                given[name] = client_for(self.manager, self._lease, self.is_async, policy)
            else:
                given[name] = self.lease
        return given

    @property
    def _lease(self) -> Lease:
        assert self.lease is not None
        return self.lease

    def _returned(self, value: Any) -> Outcome:
        """What the function returned: a stream of its client, if one is still open, is delivered by that."""
        if self.lease is None or self.lease.is_over():
            return Returned(value)
        self.value = value
        return Started()

    def arguments_for(self, granted: Granted) -> Any:
        return self.decorated.function(*self.args, **self.injection(granted))

    def attempt(self, granted: Granted) -> Outcome:
        try:
            return self._returned(self.arguments_for(granted))
        except BaseException as error:
            return Raised(error)

    async def aattempt(self, granted: Granted) -> Outcome:
        try:
            return self._returned(await self.arguments_for(granted))
        except BaseException as error:
            return Raised(error)


def default_stop(state: Any) -> bool:
    """After six attempts."""
    return bool(state.attempt_number >= ATTEMPTS)


def default_wait(state: Any) -> float:
    """Exponential with full jitter: up to 0.5 s, doubling to 30 s."""
    from tenacity import wait_random_exponential

    return wait_random_exponential(multiplier=0.5, max=30)(state)
