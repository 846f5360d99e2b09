"""Which accounts a value likes best: the same value goes to the same account, where its prompts are cached.

Weighted rendezvous hashing: each account draws a number from the value and its own name, and the highest come first. An
account that is added draws the highest for its share of the values, and moves no other; of one that goes, only its own
values move. The value itself never leaves the process.
"""

from __future__ import annotations

import heapq
import math
import uuid
from functools import lru_cache
from hashlib import blake2b

from stable_openai._ops import Registration
from stable_openai.errors import ConfigurationError

__all__ = ["favourites"]

COUNT = 3
REMEMBERED = 4096


def favourites(value: object, to: Registration) -> tuple[str, ...]:
    """The accounts that are tried first for a value, the best first; none for None.

    Raises ConfigurationError for a value that is not the same in every process.
    """
    if value is None:
        return ()
    if isinstance(value, bytes):
        known = value
    elif isinstance(value, (str, int, float, uuid.UUID)):
        known = str(value).encode()
    else:
        raise ConfigurationError("affinity", "must give a str, bytes, a number or a UUID, or None")
    return _favourites(known, to)


@lru_cache(REMEMBERED)
def _favourites(value: bytes, to: Registration) -> tuple[str, ...]:
    best = heapq.nlargest(COUNT, to.members, key=lambda member: _draw(value, member.account, member.weight))
    return tuple(member.account for member in best)


def _draw(value: bytes, account: str, weight: int) -> float:
    drawn = blake2b(value, digest_size=8, key=account.encode()[:64]).digest()
    return -weight / math.log((int.from_bytes(drawn, "big") + 1) / (2**64 + 1))
