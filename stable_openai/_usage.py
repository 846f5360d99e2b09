"""What the body of an answer says of it: the tokens that were used, and an error event in a stream.

An answer is not parsed for that, since the client does so anyway: the object behind the last "usage" is. In JSON a
quote inside a string is escaped, so that an unescaped `"usage":` is a name and nothing that a model said.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["Tail", "last_error", "tokens_used"]

LONGEST = 65_536
_DECODER = json.JSONDecoder()


def tokens_used(text: bytes) -> int | None:
    """All tokens, in and out, that an answer (JSON, or the end of a stream of events) says it cost; None where it says
    nothing.

    >>> tokens_used(b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}')
    7
    >>> tokens_used(b'{"content": "\\\\"usage\\\\": {}"}') is None
    True
    """
    end = len(text)
    while (at := text.rfind(b'"usage"', 0, end)) >= 0:
        end = at
        if text[at - 1 : at] == b"\\":
            continue
        usage = _object_behind(text, at + 7)
        if usage is not None:
            return _total(usage)
    return None


def _object_behind(text: bytes, at: int) -> Mapping[str, Any] | None:
    """The object that is the value of the name that ends at `at`."""
    behind = text[at : at + 4096].decode("utf-8", "replace").lstrip()
    if not behind.startswith(":"):
        return None
    try:
        value, _ = _DECODER.raw_decode(behind[1:].lstrip())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _total(usage: Mapping[str, Any]) -> int | None:
    total = usage.get("total_tokens")
    if total is None:
        parts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")]
        counted = [part for part in parts if part is not None]
        if not counted or not all(map(_is_count, counted)):
            return None
        total = sum(counted)
    return total if _is_count(total) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**12


def last_error(text: bytes) -> Mapping[str, Any] | None:
    """The error that the last event of a stream is; None where it is none.

    >>> last_error(b'data: {"choices": []}\\n\\ndata: {"error": {"code": "slow_down"}}\\n\\n')
    {'code': 'slow_down'}
    """
    at = text.rfind(b"data:")
    if at < 0 or b'"error"' not in text[at:]:
        return None
    try:
        event = json.loads(text[at + 5 :].partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    error = event.get("error") or (event if event.get("type") == "error" else None)
    return error if isinstance(error, dict) else None


class Tail:
    """The last 64 KiB of a body, decoded. (What is encoded otherwise than as gzip or deflate says nothing.)"""

    def __init__(self, encoding: str = "") -> None:
        self._parts: list[bytes] = []
        self._length = 0
        self._end = b""
        self._known = encoding in ("", "identity", "gzip", "deflate")
        self._inflate = zlib.decompressobj(47) if encoding in ("gzip", "deflate") else None

    def add(self, chunk: bytes) -> None:
        if not self._known:
            return
        if self._inflate is not None:
            try:
                chunk = self._inflate.decompress(chunk)
            except zlib.error:
                self._known = False
                return
        self._parts.append(chunk)
        self._length += len(chunk)
        self._end = (self._end + chunk)[-32:]
        if self._length > 2 * LONGEST:
            text = self.text()
            self._parts, self._length = [text], len(text)

    def text(self) -> bytes:
        return b"".join(self._parts)[-LONGEST:]

    def is_done(self) -> bool:
        """Whether the stream said that nothing follows."""
        return self._end.rstrip().endswith(b"[DONE]")
