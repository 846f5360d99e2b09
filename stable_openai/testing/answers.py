"""What an answer is, what a request weighs, and the pieces that answers are made of. Pure.

The text is an echo of the prompt, so that a test sees that an answer belongs to its question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .multipart import Upload

Json = dict[str, Any]
Headers = tuple[tuple[str, str], ...]

OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
PROMPTS = ("messages", "instructions", "input", "prompt")


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent: a whole body in one part, or the events of a stream in one part each."""

    status: int
    headers: Headers
    parts: tuple[bytes, ...]
    code: str | None = None
    limit: str | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """A request of a model that is to be answered, with the tokens that the answer will have used."""

    body: Json
    model: str
    id: str
    created: int
    prompt_tokens: int
    output_tokens: int
    upload: Upload | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def streams(self) -> bool:
        """Whether a stream is wanted; a form says so in text."""
        return self.body.get("stream") in (True, "true")

    def usage(self) -> Json:
        """The tokens, as chat and completions tell them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.total_tokens,
        }


# tokens


def prompt_tokens(body: Json) -> int:
    """A quarter of the characters of all texts, one for each token id of an embedding's input; at least 1."""
    characters = tokens = 0
    for text in _texts([body.get(name) for name in PROMPTS]):
        if isinstance(text, str):
            characters += len(text)
        else:
            tokens += 1
    return max(1, characters // 4 + tokens)


def output_limit(body: Json) -> int | None:
    """The output limit that the request gives, times `n`; None if it gives none."""
    given = [body[name] for name in OUTPUT_LIMITS if _is_count(body.get(name))]
    return max(given) * choices(body) if given else None


def choices(body: Json) -> int:
    """How many answers a request asks for."""
    n = body.get("n")
    return n if isinstance(n, int) and _is_count(n) else 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _texts(node: Any) -> Iterator[str | int]:
    if isinstance(node, str | int):
        yield node
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item)
    elif isinstance(node, dict):
        yield from _texts(node.get("content") or node.get("text"))


# pieces


def echo(prompt: Any) -> str:
    """`echo: ` and the last thing that the user said in `messages` or `input`."""
    if isinstance(prompt, list):
        said = [item for item in prompt if isinstance(item, dict) and item.get("role") == "user"]
        prompt = "".join(str(text) for text in _texts(said[-1])) if said else ""
    return f"echo: {prompt or ''}"


def inputs(given: Any) -> list[Any]:
    """The inputs of a request that takes one or several: texts, or lists of token ids."""
    return given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]


def words(text: str) -> list[str]:
    """The pieces in which a text is streamed."""
    return re.findall(r"\s*\S+|\s+$", text)


def json_answer(body: Json) -> Answer:
    """200, with this body."""
    return Answer(200, (("content-type", "application/json"),), (json.dumps(body).encode(),))


def stream_answer(events: Iterable[str]) -> Answer:
    """200, with these events."""
    parts = tuple(event.encode() for event in events)
    return Answer(200, (("content-type", "text/event-stream; charset=utf-8"),), parts, stream=True)


def chunks_answer(chunks: Iterable[Json]) -> Answer:
    """A stream as chat and completions have it: events without a name, and [DONE]."""
    texts = (json.dumps(chunk) for chunk in chunks)
    return stream_answer(f"data: {text}\n\n" for text in (*texts, "[DONE]"))


def events_answer(events: Iterable[Json]) -> Answer:
    """A stream as responses and transcriptions have it: events named after their type."""
    return stream_answer(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
