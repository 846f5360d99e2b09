"""The answers of /chat/completions and of the old /completions. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .answers import Answer, Json, Work, choices, chunks_answer, echo, inputs, json_answer, words
from .schemas import FunctionCall, function_call, structured


def chat(work: Work) -> Answer:
    """POST /chat/completions: an echo, or the call or JSON that the request wants."""
    call = function_call(work.body)
    text = structured(work.body) or echo(work.body.get("messages"))
    if work.streams:
        return chunks_answer(_chat_chunks(work, text, call))
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if call is not None:
        message |= {"content": None, "tool_calls": [_tool_call(work, call)]}
    return json_answer(
        _chat_head(work, "chat.completion")
        | {
            "choices": [
                {"index": index, "message": message, "logprobs": None, "finish_reason": _finish(work, call)}
                for index in range(choices(work.body))
            ],
            "usage": work.usage(),
        }
    )


def _chat_chunks(work: Work, text: str, call: FunctionCall | None) -> Iterator[Json]:
    head = _chat_head(work, "chat.completion.chunk")
    if _with_usage(work):
        head |= {"usage": None}

    def chunk(index: int, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return head | {"choices": [choice]}

    for index in range(choices(work.body)):
        if call is None:
            yield chunk(index, {"role": "assistant", "content": ""})
            for word in words(text):
                yield chunk(index, {"content": word})
        else:
            begun = {"index": 0} | _tool_call(work, FunctionCall(call.name, ""))
            yield chunk(index, {"role": "assistant", "content": None, "tool_calls": [begun]})
            for word in words(call.arguments):
                yield chunk(index, {"tool_calls": [{"index": 0, "function": {"arguments": word}}]})
        yield chunk(index, {}, _finish(work, call))
    if _with_usage(work):
        yield head | {"choices": [], "usage": work.usage()}


def _chat_head(work: Work, kind: str) -> Json:
    return {"id": f"chatcmpl-{work.id}", "object": kind, "created": work.created, "model": work.model}


def _tool_call(work: Work, call: FunctionCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{work.id}", "type": "function", "function": function}


def _finish(work: Work, call: FunctionCall | None) -> str:
    """As OpenAI has it: "stop" also where the request names the function."""
    return "tool_calls" if call is not None and work.body.get("tool_choice") == "required" else "stop"


def _with_usage(work: Work) -> bool:
    return bool((work.body.get("stream_options") or {}).get("include_usage"))


def completions(work: Work) -> Answer:
    """POST /completions: an echo of each prompt, `n` times."""
    prompts = inputs(work.body.get("prompt"))
    texts = [f"echo: {prompt or ''}" for prompt in prompts for _ in range(choices(work.body))]
    head = {"id": f"cmpl-{work.id}", "object": "text_completion", "created": work.created, "model": work.model}
    if work.streams:
        return chunks_answer(_completion_chunks(work, head, texts))
    answers = [_completion(index, text, "stop") for index, text in enumerate(texts)]
    return json_answer(head | {"choices": answers, "usage": work.usage()})


def _completion_chunks(work: Work, head: Json, texts: list[str]) -> Iterator[Json]:
    if _with_usage(work):
        head = head | {"usage": None}
    for index, text in enumerate(texts):
        for word in words(text):
            yield head | {"choices": [_completion(index, word)]}
        yield head | {"choices": [_completion(index, "", "stop")]}
    if _with_usage(work):
        yield head | {"choices": [], "usage": work.usage()}


def _completion(index: int, text: str, finish: str | None = None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
