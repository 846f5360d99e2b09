"""The tokens of a request, estimated before it is sent.

As OpenAI counts for its limits: the larger of the output limit (times the number of answers) and an estimate of the
prompt, a token being about four characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["estimate_tokens"]

CHARACTERS_A_TOKEN = 4
PROMPTS = ("messages", "input", "prompt")
OUTPUTS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def estimate_tokens(arguments: Mapping[str, Any]) -> int:
    """The tokens that a call with these arguments reserves; at least 1.

    >>> estimate_tokens({"messages": [{"role": "user", "content": "x" * 400}]})
    100
    >>> estimate_tokens({"input": "hi", "max_output_tokens": 500})
    500
    """
    prompt = sum(_characters(arguments.get(name), 0) for name in PROMPTS) // CHARACTERS_A_TOKEN
    limits = (arguments.get(name) for name in OUTPUTS)
    output = next((limit for limit in limits if isinstance(limit, int)), 0)
    answers = arguments.get("n")
    return max(1, prompt, output * (answers if isinstance(answers, int) else 1))


def _characters(value: Any, depth: int) -> int:
    """The characters of the text in a prompt: a string, or messages with parts. Images and roles do not count."""
    if isinstance(value, str):
        return len(value)
    if depth > 4:
        return 0
    if isinstance(value, Mapping):
        return sum(_characters(value.get(name), depth + 1) for name in ("content", "text"))
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], int):  # token ids, as embeddings accept them
            return len(value) * CHARACTERS_A_TOKEN
        return sum(_characters(part, depth + 1) for part in value)
    return 0
