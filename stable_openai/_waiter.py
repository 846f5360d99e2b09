"""A call that waits: what it asks for, and how it is told."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

from stable_openai._ops import LARGE, Answer, Ask

__all__ = ["BANDS", "Moved", "Request", "Waiter", "Waiting"]

BANDS = 4


class Request(NamedTuple):
    """What a call asks for: the model ("-": none), the tokens it reserves, how long it is willing to wait in s, its
    band (0 the most urgent to 3), the accounts that it likes best, and the tokens of its prompt (-1: not estimated)."""

    model: str
    tokens: int
    max_wait: float
    band: int = 1
    wanted: tuple[str, ...] = ()
    prompt: int = -1


class Waiting(NamedTuple):
    """What is known of a line whose first call has waited for some seconds.

    `calls` wait in this process; `longest_s` is for how long the first has; `reason` is the limit (or what else stands
    in the way) and `key` the name of the key that comes next; `next_s` is when the next is served, None where that is
    not known.
    """

    pool: str
    model_class: str
    calls: int
    longest_s: float
    reason: str
    key: str
    next_s: float | None


class Moved(NamedTuple):
    """The worker's keys have changed: stand in the line of the new ones."""


class Waiter:
    """A call that waits. Its flow looks at `answer` and `leads`; whoever changes them calls `signal`."""

    __slots__ = (
        "answer", "asked", "asking", "avoid", "deadline", "gate", "id", "joined", "large", "leads", "loop", "never",
        "number", "request", "returned", "short_since", "since", "unsure",
    )  # fmt: skip
    _numbers = count()

    def __init__(
        self,
        request: Request,
        avoid: tuple[str, ...],
        never: tuple[str, ...],
        deadline: float,
        id: str,
        loop: Any,
        before: Waiter | None,
    ) -> None:
        self.request, self.avoid, self.never, self.deadline, self.id, self.loop = (
            request, avoid, never, deadline, id, loop,
        )  # fmt: skip
        self.answer: Answer | Moved | Exception | None = None
        self.leads = self.large = False
        # It asked by itself; an ask for it is on its way; what came of the last one is not known.
        self.asked = self.asking = self.unsure = False
        self.gate: Any = None
        self.returned = before is not None
        self.number: int = before.number if before else next(self._numbers)
        self.joined: float | None = before.joined if before else None
        self.since: float | None = before.since if before else None
        self.short_since: float | None = None

    @property
    def shape(self) -> tuple[str, tuple[str, ...]]:
        """Where one of a shape is refused, so is another that is no smaller."""
        return self.request.model, self.never

    def ask(self, band: int, large: bool = False) -> Ask:
        request, self.large = self.request, large
        rank = band + LARGE * large
        return Ask(self.id, request.tokens, request.model, self.avoid, request.wanted, self.never, rank)

    def signal(self) -> None:
        """From the thread, or the loop, of the line's own waiters."""
        gate = self.gate
        if gate is None:
            return
        if self.loop is None:
            gate.set()
        elif not gate.done():
            with suppress(RuntimeError):  # the loop is closed
                gate.set_result(None)

    def signal_from_anywhere(self) -> None:
        if self.loop is None:
            self.signal()
        else:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self.signal)
