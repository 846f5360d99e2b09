"""What `manager.status()` answers: a snapshot as values, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from stable_openai._ops import Registration, Snapshot, is_ticket
from stable_openai._worker import Worker

__all__ = ["KeyStatus", "LineStatus", "MeterStatus", "Status", "key_states", "line_states"]


@dataclass(frozen=True)
class MeterStatus:
    """How much of one limit is used. `model_class` is the class of models, `limit` such as "rpm"; `learned`: nobody
    declared it, the upstream's responses said so."""

    model_class: str
    limit: str
    used: float
    of: int
    learned: bool = False


@dataclass(frozen=True)
class KeyStatus:
    """One key: its state, why, and for how long.

    `state` is "ready", "cooldown" (refused for its rate), "out" (in `seconds` the next call that needs it probes it) or
    "disabled"; `seconds` is None where a person has to end it. `live` are the leases of its account. `organization` is
    what this key shares with another, by what responses said, though they are declared as two accounts; else "".
    """

    name: str
    fingerprint: str
    account: str
    state: str
    reason: str
    seconds: float | None
    live: int
    meters: tuple[MeterStatus, ...]
    organization: str = ""


@dataclass(frozen=True)
class LineStatus:
    """Who waits for keys of one class of models.

    `calls` wait in all `workers` (Celery's tasks that have gone back to their queue in none, and of these the first 128
    are counted), `here` of them in this process; `by_priority` has how many in each band, the most
    urgent first; `reasons` is what stands in their way, and `next_s` when the first worker asks again.
    """

    model_class: str
    calls: int
    by_priority: tuple[int, ...]
    workers: int
    here: int
    reasons: tuple[str, ...]
    next_s: float


@dataclass(frozen=True)
class Status:
    """A pool at one moment. `breaker` is the kind of failure that pauses it, for `breaker_s` more, or ""; `line` has
    the classes of models that somebody waits for."""

    pool: str
    backend: str
    breaker: str
    breaker_s: float
    keys: tuple[KeyStatus, ...]
    line: tuple[LineStatus, ...] = ()


def line_states(worker: Worker, seen: list[tuple[Registration, Snapshot]]) -> tuple[LineStatus, ...]:
    """The lines, from the snapshots of the classes that a worker has used."""
    states = []
    for name, claims in {to.model_class: snapshot.line for to, snapshot in seen}.items():
        if claims:
            bands = tuple(map(sum, zip(*(claim.bands for claim in claims))))
            here = sum(len(line) for line in tuple(worker.lines.values()) if line.to.model_class == name)
            reasons = tuple(sorted({claim.reason for claim in claims if claim.reason}))
            next_s = min(claim.ms for claim in claims) / 1000
            workers = sum(not is_ticket(claim.claim) for claim in claims)
            states.append(LineStatus(name, sum(bands), bands, workers, here, reasons, next_s))
    return tuple(states)


def key_states(worker: Worker, seen: list[tuple[Registration, Snapshot]]) -> tuple[KeyStatus, ...]:
    """The keys of a worker, from the snapshots of the classes that it has used."""
    return tuple(_key_state(worker, fingerprint, seen) for fingerprint in worker.keys)


def _key_state(worker: Worker, fingerprint: str, seen: list[tuple[Registration, Snapshot]]) -> KeyStatus:
    key = worker.keys[fingerprint]
    state, reason, ms, live = "ready", "", 0, 0
    meters: list[MeterStatus] = []
    classes: set[str] = set()
    for to, snapshot in seen:
        row, account = snapshot.keys.get(fingerprint), snapshot.accounts.get(key.account)
        if row is None or account is None:
            continue
        if to.model_class not in classes:  # several rings may hold the account
            live += account.live
            classes.add(to.model_class)
        else:
            account = account._replace(meters={})
        meters += [MeterStatus(to.model_class, name, *used) for name, used in account.meters.items()]
        if row.disabled_ms:
            state, reason, ms = "disabled", "disabled", row.disabled_ms
        elif row.reason or account.reason:
            state, reason, ms = "out", row.reason or account.reason, max(row.out_ms, account.out_ms)
        elif account.cooldown_ms > ms and state in ("ready", "cooldown"):
            state, reason, ms = "cooldown", f"rate limit of {to.model_class}", account.cooldown_ms
    seconds = None if ms < 0 else ms / 1000
    shared = worker.siblings.organization(key.account)
    return KeyStatus(key.name, fingerprint, key.account, state, reason, seconds, live, tuple(meters), shared)
