"""The answers of /responses. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .answers import Answer, Json, Work, echo, events_answer, json_answer, words
from .schemas import function_call, structured


def responses(work: Work) -> Answer:
    """POST /responses: an echo, or the call or JSON that the request wants."""
    done = response(work)
    if work.streams:
        return events_answer(event | {"sequence_number": number} for number, event in enumerate(_events(done)))
    return json_answer(done)


def response(work: Work) -> Json:
    """The response, as it is also kept."""
    return {
        "id": response_id(work),
        "object": "response",
        "created_at": work.created,
        "model": work.model,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": work.body.get("instructions"),
        "metadata": {},
        "output": [_call(work) or _message(work)],
        "parallel_tool_calls": True,
        "previous_response_id": work.body.get("previous_response_id"),
        "tool_choice": work.body.get("tool_choice") or "auto",
        "tools": work.body.get("tools") or [],
        "store": work.body.get("store", True),
        "usage": {
            "input_tokens": work.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": work.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": work.total_tokens,
        },
    }


def response_id(work: Work) -> str:
    """The id of the response to a request."""
    return f"resp_{work.id}"


def _message(work: Work) -> Json:
    text = structured(work.body) or echo(work.body.get("input"))
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": f"msg_{work.id}",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def _call(work: Work) -> Json | None:
    call = function_call(work.body)
    if call is None:
        return None
    return {
        "type": "function_call",
        "id": f"fc_{work.id}",
        "call_id": f"call_{work.id}",
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _events(done: Json) -> Iterator[Json]:
    begun = done | {"status": "in_progress", "output": [], "usage": None}
    item = done["output"][0]
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    if item["type"] == "message":
        yield from _message_events(item)
    else:
        yield from _call_events(item)
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": done}


def _message_events(message: Json) -> Iterator[Json]:
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    part = message["content"][0]
    opened = message | {"status": "in_progress", "content": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
    yield {"type": "response.content_part.added", **place, "part": part | {"text": ""}}
    for word in words(part["text"]):
        yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": part}


def _call_events(call: Json) -> Iterator[Json]:
    place = {"item_id": call["id"], "output_index": 0}
    opened = call | {"status": "in_progress", "arguments": ""}
    yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
    for word in words(call["arguments"]):
        yield {"type": "response.function_call_arguments.delta", **place, "delta": word}
    yield {
        "type": "response.function_call_arguments.done",
        **place,
        "name": call["name"],
        "arguments": call["arguments"],
    }
