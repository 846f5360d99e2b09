"""The errors of this package. openai's own errors pass to the caller unwrapped.

StableError
├── ConfigurationError   a setting is wrong; raised before anything is sent (also a ValueError)
├── NoKeys               every key of the pool is out; `.keys` says why, key by key
├── Exhausted            no key can serve within max_wait; `.retry_after` seconds, `.reason`, `.key`
├── RequestTooLarge      the request is larger than the limit of every key; `.tokens`, `.limit`
├── LeaseLost            a lease expired while its holder was still using it
└── BrokerUnavailable    Redis cannot be reached or does not serve the broker

Where one is remade from its message alone, as Celery's result backends do, its other attributes are empty.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BrokerUnavailable",
    "ConfigurationError",
    "Exhausted",
    "LeaseLost",
    "NoKeys",
    "RequestTooLarge",
    "StableError",
]


class StableError(Exception):
    """The root of the errors of this package."""

    def __reduce__(self) -> Any:
        """Errors travel between processes: as what they are here, also those that a client has raised."""
        kind = next(kind for kind in type(self).__mro__ if globals().get(kind.__name__) is kind)
        return _remade, (kind, self.args, self.__dict__)


def _remade(kind: type[StableError], args: tuple[Any, ...], attributes: dict[str, Any]) -> StableError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigurationError(StableError, ValueError):
    """A setting is wrong. `field` names it; the message says what would be right, and holds no secret."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Exhausted(StableError):
    """No key can serve within the time the caller is willing to wait.

    `retry_after` is how long it would have taken, in seconds (None where that is not known, as for a concurrency slot);
    `reason` is what stands in the way: "rpm", "rpd", "tpm", "tpd", "concurrency", "cooldown", "held" (the account, for
    a large request), "line" (the calls that came before), the failure that opened the breaker, or why a key is out;
    `key` is the name of the key that comes next, or "".
    """

    def __init__(self, message: str, *, retry_after: float | None = None, reason: str = "", key: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason
        self.key = key


class NoKeys(Exhausted, ValueError):
    """Every key is out (or disabled). `keys` maps each key's label to the reason."""

    def __init__(
        self,
        message: str,
        *,
        keys: dict[str, str] | None = None,
        retry_after: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message, retry_after=retry_after, reason=reason)
        self.keys = keys or {}


class RequestTooLarge(StableError):
    """The request asks for more tokens than any key may use in a whole period."""

    def __init__(self, message: str, *, tokens: int = 0, limit: str = "") -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class LeaseLost(StableError):
    """A lease expired before it was settled; its slot has been given to others."""


class BrokerUnavailable(StableError):
    """Redis cannot be reached, or what was reached cannot serve the broker."""
