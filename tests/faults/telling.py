"""Whether a secret can be found in what an object shows, holds or sends: as it is, and as encodings write it."""

from __future__ import annotations

import base64
import gc
import json
import pickle
import traceback
import types
from collections import deque
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

import redis
import redis.asyncio

from stable_openai import KeyManager
from stable_openai._keys import Secret

__all__ = ["Leaks"]

# Code, and what has to hold a secret: a key's, and the settings of a connection.
CLOSED = (type, types.ModuleType, types.FrameType, types.TracebackType, types.CodeType, types.FunctionType)
CLOSED += (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
HOLDERS = (Secret, KeyManager, redis.ConnectionPool, redis.asyncio.ConnectionPool)
HOLDERS += (redis.connection.AbstractConnection, redis.asyncio.connection.AbstractConnection)


class Leaks:
    """Looks for secrets.

    Args:
        secrets: as their owner writes them. Of each any twelve characters that are its own give it away.
    """

    def __init__(self, *secrets: str) -> None:
        self.forms = {form for secret in secrets for form in _forms(secret)}

    def in_text(self, text: str | bytes) -> list[str]:
        """Those forms of secrets that a text has."""
        text = text if isinstance(text, str) else text.decode("latin-1")
        return sorted(form for form in self.forms if form in text)

    def in_error(self, error: BaseException) -> list[str]:
        """In an exception: what is printed of it and its chain, its pickles, and what can be reached from it."""
        texts = [str(error), repr(error), *traceback.format_exception(error)]
        for protocol in (0, pickle.HIGHEST_PROTOCOL):
            try:
                texts.append(pickle.dumps(error, protocol).decode("latin-1"))
            except Exception:
                continue
        return [form for text in texts for form in self.in_text(text)] + self.in_object(error)

    def in_object(self, root: object) -> list[str]:
        """In what can be reached from an object, other than through what has to hold secrets."""
        todo: deque[object] = deque([root])
        seen: dict[int, object] = {}
        found: list[str] = []
        while todo:
            one = todo.popleft()
            if id(one) in seen or isinstance(one, (*CLOSED, *HOLDERS)):
                continue
            seen[id(one)] = one
            if isinstance(one, (str, bytes, bytearray)):
                found += self.in_text(one if isinstance(one, str) else bytes(one))
            else:
                todo += gc.get_referents(one)
                todo += _chain(one)
        return found


def _chain(one: object) -> Iterable[object]:
    return (one.__cause__, one.__context__, one.args) if isinstance(one, BaseException) else ()


def _forms(secret: str) -> Iterable[str]:
    half = max(12, len(secret) // 2)
    parts = {secret, secret[:half], secret[-half:]}
    for part in parts:
        yield part
        yield quote(part, safe="")
        yield quote_plus(part)
        yield json.dumps(part)[1:-1]
        yield part.encode().hex()
    for before in ("", "x", "xx"):  # base64 of a text that has it, wherever in the text that is
        coded = base64.b64encode((before + secret).encode()).decode().rstrip("=")
        yield coded[4 if before else 0 : -2]
        yield coded[4 if before else 0 : -2].replace("+", "-").replace("/", "_")
