"""What `manager.status()` answers: a snapshot as values, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from stable_openai._ops import Registration, Snapshot
from stable_openai._worker import Worker

__all__ = ["KeyStatus", "MeterStatus", "Status", "key_states"]


@dataclass(frozen=True)
class MeterStatus:
    """How much of one limit is used. `model_class` is the class of models, `limit` such as "rpm"."""

    model_class: str
    limit: str
    used: float
    of: int


@dataclass(frozen=True)
class KeyStatus:
    """One key: its state, why, and for how long.

    `state` is "ready", "cooldown" (refused for its rate), "out" (in `seconds` the next call that needs it probes it) or
    "disabled"; `seconds` is None where a person has to end it. `live` are the leases of its account.
    """

    name: str
    fingerprint: str
    account: str
    state: str
    reason: str
    seconds: float | None
    live: int
    meters: tuple[MeterStatus, ...]


@dataclass(frozen=True)
class Status:
    """A pool at one moment. `breaker` is the kind of failure that pauses it, for `breaker_s` more, or ""."""

    pool: str
    backend: str
    breaker: str
    breaker_s: float
    keys: tuple[KeyStatus, ...]


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
        meters += [MeterStatus(to.model_class, name, used, of) for name, (used, of) in account.meters.items()]
        if row.disabled_ms:
            state, reason, ms = "disabled", "disabled", row.disabled_ms
        elif row.reason or account.reason:
            state, reason, ms = "out", row.reason or account.reason, max(row.out_ms, account.out_ms)
        elif account.cooldown_ms > ms and state in ("ready", "cooldown"):
            state, reason, ms = "cooldown", f"rate limit of {to.model_class}", account.cooldown_ms
    seconds = None if ms < 0 else ms / 1000
    return KeyStatus(key.name, fingerprint, key.account, state, reason, seconds, live, tuple(meters))
