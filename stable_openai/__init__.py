"""stable_openai: a broker that leases API keys.

Many workers on many hosts share a pool of keys; before each attempt a worker leases the key that may be used now,
and afterwards settles the lease with what happened. See `KeyManager` and `stable`.
"""

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

__all__ = [
    "INJECTED",
    "BrokerUnavailable",
    "ConfigurationError",
    "Exhausted",
    "Key",
    "KeyManager",
    "Lease",
    "LeaseLost",
    "Limits",
    "NoKeys",
    "RequestTooLarge",
    "StableError",
    "Verdict",
    "Waiting",
    "stable",
]
