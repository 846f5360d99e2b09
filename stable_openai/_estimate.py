"""The tokens of a request, estimated before it is sent.

As OpenAI counts for its limits: the larger of the output limit (times the number of answers) and an estimate of the
prompt, a token being about four characters. A request that states no output limit reserves what the outputs of its
class were so far, on top of its prompt; so does, up to its own limit, one whose tokens are charged by use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Estimate", "Outputs", "estimate"]

CHARACTERS_A_TOKEN = 4
MOST = 10**12  # as limits can be
PROMPTS = ("messages", "input", "prompt")
OUTPUTS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


class Estimate(NamedTuple):
    """Tokens of the prompt, and what the request itself allows its answers together (None: it does not say)."""

    prompt: int
    output: int | None


def estimate(arguments: Mapping[str, Any]) -> Estimate:
    """What the arguments of a call, or a request's JSON, say of its tokens.

    >>> estimate({"messages": [{"role": "user", "content": "x" * 400}]})
    Estimate(prompt=100, output=None)
    >>> estimate({"input": "hi", "max_output_tokens": 500})
    Estimate(prompt=0, output=500)
    """
    prompt = sum(_characters(arguments.get(name), 0) for name in PROMPTS) // CHARACTERS_A_TOKEN
    limits = (arguments.get(name) for name in OUTPUTS)
    output = next((min(limit, MOST) for limit in limits if isinstance(limit, int) and limit >= 0), None)
    answers = arguments.get("n")
    if output is not None and isinstance(answers, int):
        output = min(output * max(0, answers), MOST)
    return Estimate(prompt, output)


class Outputs:
    """What the outputs of a class of models were: their mean and how far they stray from it, both weighted towards the
    last (as TCP estimates round trips: V. Jacobson, "Congestion Avoidance and Control", 1988)."""

    ENOUGH = 8

    def __init__(self) -> None:
        self._count, self._mean, self._deviation = 0, 0.0, 0.0

    def note(self, tokens: int) -> None:
        self._count += 1
        error = tokens - self._mean
        self._mean += error / min(self._count, 8)
        self._deviation += (abs(error) - self._deviation) / min(self._count, 4)

    def reserved(self, estimate: Estimate, *, by_use: bool) -> int:
        """The tokens that a call reserves; at least 1.

        >>> outputs = Outputs()
        >>> outputs.reserved(Estimate(100, 500), by_use=False), outputs.reserved(Estimate(100, None), by_use=False)
        (500, 100)
        >>> for _ in range(8):
        ...     outputs.note(50)
        >>> outputs.reserved(Estimate(100, 500), by_use=True) < 300
        True
        """
        prompt, output = estimate
        known = self._count >= self.ENOUGH
        expected = math.ceil(self._mean + 2 * self._deviation) if known else 0
        if output is None:
            return max(1, prompt + expected)
        if by_use and known:
            return max(1, prompt + min(output, expected))
        return max(1, prompt, output)


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
