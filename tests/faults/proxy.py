"""A TCP proxy between a broker and its Redis, which loses what a network can lose, at a moment that a test chooses.

It reads the commands of clients one by one, so that it knows what each reply is for. A fate meets a command before
the server has seen it, or its reply: when the first byte of that is there, the command has been executed.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any

from stable_openai.backends.redis import script

PASS = "pass"
CUT_BEFORE = "cut before"  # the connection, and the server never sees the command
CUT_AFTER = "cut after"  # the connection, when the server has executed it
SWALLOW = "swallow"  # the reply, and the connection stays open
VERBS = {
    script(verb)[1]: verb
    for verb in ("register", "acquire", "settle", "renew", "restore", "inspect", "admin", "attend")
}


class Proxy:
    """Listens on a loopback port of its own, in a thread of its own.

    Args:
        target: host and port of the server.

    `log` has what came, in order: the broker's verb, or the command's name in lower case.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.log: list[str] = []
        self.cuts = 0
        self.delay_s = 0.0
        self._fates: list[tuple[str, str]] = []
        self._chance: Callable[[str], str] = lambda verb: PASS
        self._refuses = False
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def meet(self, verb: str, fate: str, times: int = 1) -> None:
        """The next so many commands of a verb meet this fate."""
        self._fates += [(verb, fate)] * times

    @property
    def met(self) -> bool:
        """Whether all fates have come."""
        return not self._fates

    def gamble(self, chance: random.Random | None, before: float = 0.0, after: float = 0.0) -> None:
        """From now on commands are lost by chance, and replies; None: no longer."""

        def draw(verb: str) -> str:
            drawn = chance.random() if chance else 1.0
            return CUT_BEFORE if drawn < before else CUT_AFTER if drawn < before + after else PASS

        self._chance = draw

    def cut_every_second(self, *verbs: str) -> None:
        """From now on every second reply to one of these verbs is lost."""
        seen = dict.fromkeys(verbs, 0)

        def alternate(verb: str) -> str:
            if verb in seen:
                seen[verb] += 1
            return CUT_AFTER if seen.get(verb, 0) % 2 else PASS

        self._chance = alternate

    def refuse(self) -> None:
        """Cut all connections, and every new one, until they are admitted again."""
        self._refuses = True
        self.cut()

    def admit(self) -> None:
        self._refuses = False

    def cut(self) -> None:
        """All connections, now."""
        self._run(self._cut())

    def __enter__(self) -> Proxy:
        self._thread.start()
        server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._server = server
        self.port = server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(what, self._loop)
        return future.result(10)

    async def _cut(self) -> None:
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _fate_of(self, verb: str) -> str:
        self.log.append(verb)
        for place, (name, fate) in enumerate(self._fates):
            if name == verb:
                del self._fates[place]
                return fate
        return self._chance(verb)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        self._open.add(writer)
        upstream: asyncio.StreamWriter | None = None
        replies: asyncio.Task[None] | None = None
        try:
            from_server, upstream = await asyncio.open_connection(*self.target)
            fate = [PASS]
            replies = asyncio.create_task(self._pass_on(from_server, writer, fate))
            while True:
                words, raw = await _command(reader)
                fate[0] = self._fate_of(_verb(words))
                if fate[0] == CUT_BEFORE:
                    self.cuts += 1
                    break
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                upstream.write(raw)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # (a server of asyncio's own complains of a handler that is cancelled)
        finally:
            self._open.discard(writer)
            if replies:
                replies.cancel()
            for end in (writer, upstream):
                if end:
                    end.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fate: list[str]) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if fate[0] == PASS:
                    writer.write(data)
                elif fate[0] == CUT_AFTER:
                    self.cuts += 1
                    break
        writer.transport.abort()


async def _command(reader: asyncio.StreamReader) -> tuple[list[bytes], bytes]:
    """One command: its words, and as it came."""
    head = await reader.readuntil(b"\r\n")
    raw, words = [head], []
    for _ in range(int(head[1:])):
        size = await reader.readuntil(b"\r\n")
        word = await reader.readexactly(int(size[1:]) + 2)
        raw += [size, word]
        words.append(word[:-2])
    return words, b"".join(raw)


def _verb(words: list[bytes]) -> str:
    name = words[0].decode().lower()
    if name == "evalsha":
        return VERBS[words[1].decode()]
    if name == "eval":
        return VERBS[hashlib.sha1(words[1], usedforsecurity=False).hexdigest()]
    return name
