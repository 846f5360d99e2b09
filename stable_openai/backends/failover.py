"""The broker on Redis, which goes on in memory while that is away: each worker with its share of the pool's keys.

While Redis answers, operations go there, and every few seconds the worker attends: so it knows its place among those
that share the pool. Where an operation fails as if Redis were away, and attending fails too, the worker leaves: from
then on its operations are answered from its share (see away.py). The heartbeat goes on to attend; when that succeeds,
what was used meanwhile is told to Redis, and the worker is back. Who has never attended cannot know its share, and
waits.

Where Redis is away for all, no limit is exceeded. Where it is away for some only, the others go on with the whole, and
the excess is at most the shares of those that are cut off.

A roster is in force for a worker that has attended when it was two periods old, for then all have seen it; until then
the worker has what falls to it by both that and the one before (nothing, in its first ten seconds). Who has not
attended for longer than that when Redis goes away may have been dropped from the roster: it waits.

WHAT IS TOLD AT THE END. For each class what was spent, charged once by (worker, number); leases that are still live;
and how leases that Redis had granted ended. What the upstream said of keys and limits meanwhile is not told: it will
say so again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, Any

from stable_openai._drive import drive
from stable_openai._heartbeat import heartbeat
from stable_openai._ops import Acquired, Attend, Registration, Restore, Roster
from stable_openai._worker import ATTENDS_S
from stable_openai.backends.away import Away, Seat, deal
from stable_openai.backends.redis import RedisBackend, is_passing
from stable_openai.errors import BrokerUnavailable

if TYPE_CHECKING:
    from stable_openai._worker import Steps, Worker

__all__ = ["FailoverBackend"]

log = logging.getLogger("stable_openai.redis")
LOOKS_S = 0.5  # whether Redis is back
TELLS_S = 2.0
IN_FORCE_S = 2 * ATTENDS_S
STALE_S = 2 * ATTENDS_S + LOOKS_S


class FailoverBackend:
    """Runs the broker's operations on Redis, and in memory while that is away.

    Args:
        redis: a hasty one.
        worker: whose operations these are.
    """

    local = False

    def __init__(self, redis: RedisBackend, worker: Worker) -> None:
        self._redis, self._worker = redis, worker
        self._begin_life()

    def _begin_life(self) -> None:
        self._mutex = threading.Lock()
        self._in_force: Seat | None = None
        self._newest: tuple[Seat, float] | None = None
        self._attended = 0.0  # the last time, and the first time since at which it failed
        self._failed: float | None = None
        self._numbers = 0
        self._away: Away | None = None
        self._ahead_ms = time() * 1000 - monotonic() * 1000  # the store's clock, of the one that only goes forward

    @property
    def kind(self) -> str:
        return "redis" if self._away is None else "local"

    def run(self, op: Any) -> Any:
        if type(op) is Attend:
            return self._attend(op)
        away = self._away
        if away is None:
            try:
                return self._note(self._redis.run(op, attempts=1))
            except BrokerUnavailable as error:
                away = self._leave(error)
                if away is None:
                    return self._note(self._redis.run(op))
                away.doubt(op)
        return away.run(op)

    async def arun(self, op: Any) -> Any:
        away = self._away
        if away is None:
            try:
                return self._note(await self._redis.arun(op, attempts=1))
            except BrokerUnavailable as error:
                # In a thread: a loop that is busy may take for silence what is not.
                away = await asyncio.to_thread(self._leave, error)
                if away is None:
                    return self._note(await self._redis.arun(op))
                away.doubt(op)
        return away.run(op)

    def listen(self, to: Registration) -> Any:
        return self._redis.listen(to) if self._away is None else None

    def alisten(self, to: Registration) -> Any:
        return self._redis.alisten(to) if self._away is None else None

    def close(self) -> None:
        """Tell Redis what was used meanwhile, if it is there, and leave the roster; close the threads' connections."""
        try:
            if self._newest is not None:
                drive(self._worker.attend(leave=True), self._worker, self)
        except BrokerUnavailable:
            pass
        until = monotonic() + TELLS_S
        while self._away is not None and self._away.is_sealed and monotonic() < until:
            sleep(0.005)  # the heartbeat is telling it
        if self._away is not None:
            log.warning("redis.untold pool=%s", self._worker.pool)
        self._redis.close()

    async def aclose(self) -> None:
        """The same for those of the running event loop too."""
        await asyncio.to_thread(self.close)
        await self._redis.aclose()

    def after_fork(self) -> None:
        self._redis.after_fork()
        self._begin_life()

    def _note(self, reply: Any) -> Any:
        if type(reply) is Acquired:
            self._ahead_ms = reply.now_ms - monotonic() * 1000
        return reply

    # The roster.

    def _attend(self, op: Attend) -> Roster:
        away = self._away
        if away is not None and away.others:
            op = op._replace(away_ms=max(1, round((monotonic() - away.since) * 1000)))
        try:
            roster: Roster = self._redis.run(op, attempts=1)
        except BrokerUnavailable:
            self._failed = self._failed or monotonic()
            if self._away is None or not op.period_ms:
                raise
            self._look_soon()
            return Roster(0, -1, 0, False)
        if op.period_ms:
            self._seat(Seat(roster.rank, roster.size, roster.alike), monotonic() - roster.age_ms / 1000)
        self._return()
        return roster

    def _seat(self, seat: Seat, since: float) -> None:
        with self._mutex:
            self._attended, self._failed = monotonic(), None
            if self._newest is not None and self._attended - self._newest[1] >= IN_FORCE_S:
                self._in_force = self._newest[0]
            if self._newest is None or self._newest[0] != seat:
                self._newest = (seat, since)
            elif self._attended - since >= IN_FORCE_S:
                self._in_force = seat

    def _shares(self, accounts: list[str]) -> dict[str, tuple[int, int]] | None:
        """What falls to this worker now; None where it cannot know."""
        failed = self._failed or monotonic()
        if self._in_force is None or self._newest is None or failed - self._attended > STALE_S:
            return None
        now, before = deal(accounts, self._newest[0]), deal(accounts, self._in_force)
        # Of two parts the smaller one (place, of how many).
        return {name: max(now[name], before[name], key=lambda part: part[1]) for name in now if name in before}

    # Leaving and coming back.

    def _leave(self, error: BrokerUnavailable) -> Away | None:
        """Go on in memory, if Redis is away and this worker knows its share. None: then it is tried again, with
        patience."""
        if not is_passing(error.__cause__):
            return None
        worker = self._worker
        with self._mutex:
            accounts = sorted({key.account for key in worker.keys.values()})
            shares = self._shares(accounts)
            if self._away is not None or shares is None:
                return self._away
            try:
                self._redis.run(worker.attendance(), attempts=1)
            except BrokerUnavailable:
                pass
            else:
                return None
            assert self._newest is not None
            assert self._in_force is not None
            seat = self._newest[0]
            self._away = away = Away(worker, shares, max(seat.size, self._in_force.size) > 1, self._ahead_ms)
        log.warning(
            "redis.away pool=%s error=%s accounts=%d/%d rank=%d workers=%d: on in memory with this worker's share",
            worker.pool, type(error.__cause__).__name__, len(away.shares), len(accounts), seat.rank, seat.size,
        )  # fmt: skip
        self._look_soon()
        worker.nudge()
        return away

    def _look_soon(self) -> None:
        if not self._worker.attends:
            return
        self._worker.attend_at = monotonic() + LOOKS_S
        heartbeat.watch(self._worker)

    def _return(self) -> None:
        away = self._away
        if away is None or not away.seal():
            return
        try:
            drive(self._tell(away), self._worker, self._redis)
        except BaseException:
            away.reopen()
            self._look_soon()
            raise
        self._away = None
        requests, tokens = away.total()
        log.warning(
            "redis.back pool=%s after=%.1fs requests=%d tokens=%d",
            self._worker.pool, monotonic() - away.since, requests, tokens,
        )  # fmt: skip
        self._worker.nudge()

    def _tell(self, away: Away) -> Steps:
        worker = self._worker
        for book in away.classes():
            standing = yield from worker.register(book.to)
            if book.unsaid:
                self._numbers += 1
                book.batches.append((self._numbers, book.take()))
            batches = tuple(book.batches) or ((0, ()),)
            for number, spent in batches:
                _, done = yield Restore(
                    book.to, worker.ttl_ms, standing.birth, worker.id, (), away.live(book), spent, number
                )
                if not done:
                    raise BrokerUnavailable("the store has lost what was just restored")
                if number:
                    book.batches.popleft()
            yield from worker.see_days(book.to)
        worker.pending.extend(away.take_owed())
        yield from worker.flush()
