"""The drop-in clients: openai's own, with a broker inside.

    from stable_openai import OpenAI

    client = OpenAI()                       # the default manager's keys
    client = OpenAI(manager=manager, priority=0)

Every HTTP attempt leases a key; a key that is refused is followed by the next within the same call; the lease lives
until the answer is read. All else is openai's: methods, results and exceptions. Where a key of one's own is given
(`api_key=`, a token provider, a workload identity), that is used and nothing is leased.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, TypeVar

import openai

from stable_openai._flow import Policy
from stable_openai._lease import Lease
from stable_openai._transport import AsyncBroker, Broker, Settings, settings_of, token_for
from stable_openai._waiter import BANDS
from stable_openai._wire import AsyncWire, Wire
from stable_openai.errors import ConfigurationError
from stable_openai.manager import PRIORITY, KeyManager, check_number

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncAzureOpenAI", "AsyncOpenAI", "AzureOpenAI", "OpenAI"]

OWN = ("api_key", "workload_identity", "provider", "azure_ad_token", "azure_ad_token_provider")
RESOURCES = ("realtime", "live", "responses", "beta")  # with websockets in them
BESIDE = "is given beside manager=; leave it out, the manager has the keys"
_LEFT_OUT: Any = object()
_Class = TypeVar("_Class", bound=type)


class _HttpClient(openai.DefaultHttpxClient):
    """The HTTP client under a sync client and its copies."""

    def __init__(self, http_client: Any = None) -> None:
        self._users = http_client
        super().__init__(transport=Broker(Wire(http_client)), **_given(http_client))

    def build_request(self, *args: Any, **options: Any) -> Any:
        _follow(self, self._users)
        return super().build_request(*args, **options)

    def __del__(self) -> None:
        try:
            if self._users is None:  # the user's is not closed where this is dropped
                self.close()
        except Exception:  # at the interpreter's end
            return


class _AsyncHttpClient(openai.DefaultAsyncHttpxClient):
    """That of async clients. Its connections are closed with their loop."""

    def __init__(self, http_client: Any = None) -> None:
        self._users = http_client
        super().__init__(transport=AsyncBroker(AsyncWire(http_client)), **_given(http_client))

    def build_request(self, *args: Any, **options: Any) -> Any:
        _follow(self, self._users)
        return super().build_request(*args, **options)


def _given(http_client: Any) -> dict[str, Any]:
    """What is taken over from the user's own HTTP client when that is given; else no cookie is kept: it would be one
    account's, and this serves many."""
    if http_client is None:
        return {"cookies": CookieJar(DefaultCookiePolicy(allowed_domains=()))}
    return {"timeout": _timeout(http_client), "default_encoding": getattr(http_client, "_default_encoding", "utf-8")}


def _follow(mine: Any, http_client: Any) -> None:
    """Put into the next request what the user's own HTTP client now would, and follow redirects as it does."""
    if http_client is None:
        return
    mine.timeout = _timeout(http_client)
    mine.headers = http_client.headers.raw
    mine.params = list(http_client.params.multi_items())
    mine.cookies = http_client.cookies.jar
    mine.follow_redirects, mine.max_redirects = http_client.follow_redirects, http_client.max_redirects


def _timeout(http_client: Any) -> Any:
    return openai.Timeout(**http_client.timeout.as_dict())


def _checked(settings: Settings) -> Settings:
    """How a client asks for leases, if it can be so."""
    if settings.manager is not None and not isinstance(settings.manager, KeyManager):
        raise ConfigurationError("manager", "must be a KeyManager")
    if settings.priority not in range(BANDS):
        raise ConfigurationError("priority", f"must be a whole number from 0 (most urgent) to {BANDS - 1}")
    if settings.max_wait is not None:
        check_number("max_wait", settings.max_wait, 0, float("inf"))
    return settings


class _Leasing:
    """What the drop-in clients add to openai's.

    Args:
        manager: whose keys; the default manager, found at each request, where it is None.
        max_wait: seconds that a request may wait for a key; the manager's where it is None.
        priority: 0 (most urgent) to 3.
        affinity: a value, or a function of the request's JSON that gives one: requests with the same value go to the
            same account while that can serve.
        max_retries: further attempts after failures that are not the key's, such as a 5xx (as at openai; the broker
            makes them, so the attribute of this name is 0). A move to another key does not count.
        http_client: an httpx client of your own, which then sends.

    `with_options()` takes the first four too. Raises what openai's client raises, and in waiting for a key NoKeys,
    Exhausted, RequestTooLarge or BrokerUnavailable, which are openai.OpenAIError too.
    """

    _own_http: Callable[[Any], Any]

    def __init__(
        self,
        *,
        manager: KeyManager | None = None,
        max_wait: float | None = None,
        priority: int = PRIORITY,
        affinity: object = None,
        max_retries: int = openai.DEFAULT_MAX_RETRIES,
        http_client: Any = None,
        _settings: Settings | None = None,
        **options: Any,
    ) -> None:
        made = _checked(Settings(manager, max_wait, priority, affinity, max_retries))
        inherited = settings_of(options.get("api_key"))
        self.settings: Settings | None = None
        if inherited is None and any(options.get(name) is not None for name in OWN):
            if manager is not None or _settings is not None:
                raise ConfigurationError("api_key", BESIDE)
        else:
            self.settings = _settings or inherited or made
            options["api_key"] = token_for(self)
        if not isinstance(http_client, (_HttpClient, _AsyncHttpClient)) and (self.settings or http_client is None):
            http_client = self._own_http(http_client)
        super().__init__(max_retries=max_retries, http_client=http_client, **options)  # type: ignore[call-arg]
        if self.settings:
            self.max_retries = 0

    def copy(
        self,
        *,
        manager: KeyManager | None = None,
        max_wait: float | None = _LEFT_OUT,
        priority: int | None = None,
        affinity: object = _LEFT_OUT,
        max_retries: Any = openai.NOT_GIVEN,
        **options: Any,
    ) -> Self:
        """A client with other options, on the same connections."""
        settings = self.settings
        given = not isinstance(max_retries, type(openai.NOT_GIVEN))
        if settings is None or any(options.get(name) is not None for name in OWN):
            if manager is not None:
                raise ConfigurationError("api_key", BESIDE)
            if settings is not None and not given:
                max_retries = openai.DEFAULT_MAX_RETRIES if settings.retries is None else settings.retries
            return super().copy(max_retries=max_retries, **options)  # type: ignore[misc,no-any-return]
        changed: dict[str, Any] = {"manager": manager, "priority": priority}
        changed = {name: value for name, value in changed.items() if value is not None}
        changed |= {} if max_wait is _LEFT_OUT else {"max_wait": max_wait}
        changed |= {} if affinity is _LEFT_OUT else {"affinity": affinity}
        changed |= {"retries": max_retries} if given else {}
        changed |= {"home": None} if options.get("base_url") else {}
        extra = {**options.pop("_extra_kwargs", {}), "_settings": _checked(settings._replace(**changed))}
        return super().copy(max_retries=max_retries, _extra_kwargs=extra, **options)  # type: ignore[misc,no-any-return]

    with_options = copy

    def __copy__(self) -> Self:
        return self.copy()

    def bound(self, manager: KeyManager, lease: Lease, policy: Policy | None = None) -> Self:
        """A copy whose first request uses a lease. Further ones lease for themselves, and are tried again as `policy`
        says. It shows the base URL of the lease's key."""
        key, home = lease.key, self.base_url  # type: ignore[attr-defined]
        asked, retries = lease.request, None if policy else openai.DEFAULT_MAX_RETRIES
        settings = Settings(manager, asked.max_wait, asked.band, None, retries, lease, home, policy)
        shown = {"base_url": key.base_url} if key.base_url and key.api_version is None else {}
        return super().copy(_extra_kwargs={"_settings": settings}, **shown)  # type: ignore[misc,no-any-return]


def _refuse(self: Any, *args: Any, **options: Any) -> Any:
    """In place of a resource's connect()."""
    if self._client.settings is None:
        return super(type(self), self).connect(*args, **options)
    raise ConfigurationError(
        "connect",
        "opens a websocket, which bypasses the broker; hold a lease meanwhile and give its key to openai's own client: "
        "`with manager.lease(model=...) as lease: openai.OpenAI(api_key=lease.api_key).realtime.connect(...)`",
    )


def _refuse_websockets(kind: _Class) -> _Class:
    """Have the resources of a client, or of a resource, refuse to open a websocket with what is no key."""
    if "connect" in dir(kind):
        kind.connect = _refuse  # type: ignore[attr-defined]
    for name in RESOURCES:
        made = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        if made is not None:
            remade = cached_property(_remade(getattr(made, "func", None) or made.fget))
            remade.__set_name__(kind, name)
            setattr(kind, name, remade)
    return kind


def _remade(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def resource(self: Any) -> Any:
        found = make(self)
        kind: Any = type(found)
        found.__class__ = _refusing(kind)
        return found

    return resource


@cache
def _refusing(kind: Any) -> Any:
    return _refuse_websockets(type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__}))


@_refuse_websockets
class OpenAI(_Leasing, openai.OpenAI):
    __doc__ = f"openai.OpenAI, every request of which leases a key.\n{_Leasing.__doc__}"
    _own_http = _HttpClient


@_refuse_websockets
class AsyncOpenAI(_Leasing, openai.AsyncOpenAI):
    __doc__ = f"openai.AsyncOpenAI, every request of which leases a key.\n{_Leasing.__doc__}"
    _own_http = _AsyncHttpClient


@_refuse_websockets
class AzureOpenAI(_Leasing, openai.AzureOpenAI):
    __doc__ = f"openai.AzureOpenAI, every request of which leases a key.\n{_Leasing.__doc__}"
    _own_http = _HttpClient


@_refuse_websockets
class AsyncAzureOpenAI(_Leasing, openai.AsyncAzureOpenAI):
    __doc__ = f"openai.AsyncAzureOpenAI, every request of which leases a key.\n{_Leasing.__doc__}"
    _own_http = _AsyncHttpClient
