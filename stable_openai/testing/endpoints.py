"""The endpoints of models: which function answers each, and the answers of those that are neither chat nor responses.

Pure. A request of one of these is charged to its model's limits.
"""

from __future__ import annotations

import hashlib
import json
import struct
from base64 import b64encode
from collections.abc import Callable
from typing import Any

from .answers import Answer, Json, Work, choices, events_answer, inputs, json_answer, words
from .chat import chat, completions
from .responses import responses

# The models of requests that need not name one.
DEFAULT_MODELS = {"/moderations": "omni-moderation-latest", "/images/generations": "gpt-image-1"}

# Answers that have no tokens of their own.
NO_OUTPUT = ("/embeddings", "/moderations")

CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent"),
    *("self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors"),
    *("violence", "violence/graphic"),
)

# A PNG of one pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def embeddings(work: Work) -> Answer:
    """POST /embeddings: vectors that depend on the input alone."""
    size = work.body.get("dimensions") or 8
    as_base64 = work.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(item, size, as_base64)}
        for index, item in enumerate(inputs(work.body.get("input")))
    ]
    usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens}
    return json_answer({"object": "list", "model": work.model, "data": data, "usage": usage})


def moderations(work: Work) -> Answer:
    """POST /moderations: nothing is ever flagged. One result for each text, or one for a list of parts."""
    given = inputs(work.body.get("input"))
    result = {
        "flagged": False,
        "categories": dict.fromkeys(CATEGORIES, False),
        "category_scores": dict.fromkeys(CATEGORIES, 0.0),
        "category_applied_input_types": {category: ["text"] for category in CATEGORIES},
    }
    results = [result] * (1 if any(isinstance(item, dict) for item in given) else len(given))
    return json_answer({"id": f"modr-{work.id}", "model": work.model, "results": results})


def images(work: Work) -> Answer:
    """POST /images/generations: the same pixel, `n` times."""
    usage = {
        "input_tokens": work.prompt_tokens,
        "input_tokens_details": {"text_tokens": work.prompt_tokens, "image_tokens": 0},
        "output_tokens": work.output_tokens,
        "total_tokens": work.total_tokens,
    }
    data = [{"b64_json": PIXEL}] * choices(work.body)
    return json_answer({"created": work.created, "data": data, "output_format": "png", "usage": usage})


def transcriptions(work: Work) -> Answer:
    """POST /audio/transcriptions: an echo of the file's name, also streamed."""
    assert work.upload is not None
    text = f"echo: {work.upload.name}"
    usage = {
        "type": "tokens",
        "input_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        "total_tokens": work.total_tokens,
    }
    if not work.streams:
        return json_answer({"text": text, "usage": usage})
    deltas: list[Json] = [{"type": "transcript.text.delta", "delta": word} for word in words(text)]
    return events_answer([*deltas, {"type": "transcript.text.done", "text": text, "usage": usage}])


def _vector(item: Any, size: int, as_base64: bool) -> str | list[float]:
    digest = hashlib.shake_128(json.dumps(item).encode()).digest(size)
    numbers = [byte / 256 for byte in digest]
    return b64encode(struct.pack(f"<{size}f", *numbers)).decode() if as_base64 else numbers


ENDPOINTS: dict[str, Callable[[Work], Answer]] = {
    "/chat/completions": chat,
    "/completions": completions,
    "/responses": responses,
    "/embeddings": embeddings,
    "/moderations": moderations,
    "/images/generations": images,
    "/audio/transcriptions": transcriptions,
}
