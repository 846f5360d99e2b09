"""What a proper request is answered, and what it weighs: bodies, streams of events, tokens. Pure.

The text is an echo of the prompt, so that a test sees that an answer belongs to its question.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent: a whole body in one part, or the events of a stream in one part each."""

    status: int
    headers: tuple[tuple[str, str], ...]
    parts: tuple[bytes, ...]
    code: str | None = None
    limit: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is to be answered, with the tokens that the answer will have used."""

    body: Json
    id: str
    created: int
    prompt_tokens: int
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


# tokens


def prompt_tokens(body: Json) -> int:
    """A quarter of the characters of all texts, one for each token id of an embedding's input; at least 1."""
    characters = tokens = 0
    for text in _texts([body.get(name) for name in ("messages", "instructions", "input")]):
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
    """How many answers a chat request asks for."""
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


# answers, one function an endpoint


def chat(work: Work) -> Answer:
    """POST /chat/completions."""
    text = echo(work.body.get("messages"))
    if work.body.get("stream"):
        chunks = (json.dumps(chunk) for chunk in _chat_chunks(work, text))
        return _stream(f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]"))
    message = {"role": "assistant", "content": text, "refusal": None}
    return _json(
        _chat_head(work, "chat.completion")
        | {
            "choices": [
                {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"}
                for index in range(choices(work.body))
            ],
            "usage": _chat_usage(work),
        }
    )


def _chat_chunks(work: Work, text: str) -> Iterator[Json]:
    head = _chat_head(work, "chat.completion.chunk")
    with_usage = bool((work.body.get("stream_options") or {}).get("include_usage"))
    if with_usage:
        head |= {"usage": None}

    def chunk(index: int, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return head | {"choices": [choice]}

    for index in range(choices(work.body)):
        yield chunk(index, {"role": "assistant", "content": ""})
        for word in _words(text):
            yield chunk(index, {"content": word})
        yield chunk(index, {}, "stop")
    if with_usage:
        yield head | {"choices": [], "usage": _chat_usage(work)}


def _chat_head(work: Work, kind: str) -> Json:
    return {"id": f"chatcmpl-{work.id}", "object": kind, "created": work.created, "model": work.body["model"]}


def _chat_usage(work: Work) -> Json:
    return {
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.output_tokens,
        "total_tokens": work.total_tokens,
    }


def responses(work: Work) -> Answer:
    """POST /responses."""
    text = echo(work.body.get("input"))
    if work.body.get("stream"):
        events = enumerate(_response_events(work, text))
        return _stream(
            f"event: {event['type']}\ndata: {json.dumps(event | {'sequence_number': number})}\n\n"
            for number, event in events
        )
    return _json(_response(work, text))


def _response_events(work: Work, text: str) -> Iterator[Json]:
    place = {"item_id": f"msg_{work.id}", "output_index": 0, "content_index": 0}
    done = _response(work, text)
    begun = done | {"status": "in_progress", "output": [], "usage": None}
    message = done["output"][0]
    part = message["content"][0]
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    opened = message | {"status": "in_progress", "content": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
    yield {"type": "response.content_part.added", **place, "part": part | {"text": ""}}
    for word in _words(text):
        yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": part}
    yield {"type": "response.output_item.done", "output_index": 0, "item": message}
    yield {"type": "response.completed", "response": done}


def _response(work: Work, text: str) -> Json:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {
        "type": "message",
        "id": f"msg_{work.id}",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    return {
        "id": f"resp_{work.id}",
        "object": "response",
        "created_at": work.created,
        "model": work.body["model"],
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": work.body.get("instructions"),
        "metadata": {},
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "store": work.body.get("store", True),
        "usage": {
            "input_tokens": work.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": work.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": work.total_tokens,
        },
    }


def embeddings(work: Work) -> Answer:
    """POST /embeddings: vectors that depend on the input alone."""
    given = work.body.get("input")
    inputs = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    size = work.body.get("dimensions") or 8
    as_base64 = work.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(item, size, as_base64)}
        for index, item in enumerate(inputs)
    ]
    usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens}
    return _json({"object": "list", "model": work.body["model"], "data": data, "usage": usage})


def models(names: Iterable[str]) -> Answer:
    """GET /models."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "fake"} for name in names]
    return _json({"object": "list", "data": data})


ENDPOINTS: dict[str, Callable[[Work], Answer]] = {
    "/chat/completions": chat,
    "/responses": responses,
    "/embeddings": embeddings,
}


# pieces


def echo(prompt: Any) -> str:
    """`echo: ` and the last thing that the user said in `messages` or `input`."""
    if isinstance(prompt, list):
        said = [item for item in prompt if isinstance(item, dict) and item.get("role") == "user"]
        prompt = "".join(str(text) for text in _texts(said[-1])) if said else ""
    return f"echo: {prompt or ''}"


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def _vector(item: Any, size: int, as_base64: bool) -> str | list[float]:
    digest = hashlib.shake_128(json.dumps(item).encode()).digest(size)
    numbers = [byte / 256 for byte in digest]
    return b64encode(struct.pack(f"<{size}f", *numbers)).decode() if as_base64 else numbers


def _json(body: Json) -> Answer:
    return Answer(200, (("content-type", "application/json"),), (json.dumps(body).encode(),))


def _stream(events: Iterable[str]) -> Answer:
    parts = tuple(event.encode() for event in events)
    return Answer(200, (("content-type", "text/event-stream; charset=utf-8"),), parts)
