"""stable_openai: a broker that leases API keys.

Many workers on many hosts share a pool of keys; before each attempt a worker leases the key that may be used now,
and afterwards settles the lease with what happened. See `KeyManager`, `stable` and `OpenAI`.
"""

from typing import TYPE_CHECKING, Any

from stable_openai._decorator import INJECTED, stable
from stable_openai._keys import Key
from stable_openai._lease import Lease
from stable_openai._limits import Limits
from stable_openai._verdict import Verdict
from stable_openai._waiter import Waiting
from stable_openai.errors import (
    BrokerUnavailable,
    ConfigurationError,
    Exhausted,
    LeaseLost,
    NoKeys,
    RequestTooLarge,
    StableError,
)
from stable_openai.manager import KeyManager

if TYPE_CHECKING:
    from stable_openai.client import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

__all__ = [
    "INJECTED",
    "AsyncAzureOpenAI",
    "AsyncOpenAI",
    "AzureOpenAI",
    "BrokerUnavailable",
    "ConfigurationError",
    "Exhausted",
    "Key",
    "KeyManager",
    "Lease",
    "LeaseLost",
    "Limits",
    "NoKeys",
    "OpenAI",
    "RequestTooLarge",
    "StableError",
    "Verdict",
    "Waiting",
    "stable",
]


def __getattr__(name: str) -> Any:
    """The clients, when they are first asked for: importing openai takes most of a second."""
    if name in ("AsyncAzureOpenAI", "AsyncOpenAI", "AzureOpenAI", "OpenAI"):
        from stable_openai import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
