"""openai's own behaviour is kept: a table of calls, made through openai's client and through ours.

Each call is made against a fake upstream of its own that was told the same, and that makes the same ids. What a call
returns or raises is equal, down to the headers of its response, and so is what the upstream is sent, down to the bytes
of the body and the secret. Each call is defined once, as a coroutine function of a client of either colour: `got()`
awaits what is awaitable, and a sync client never suspends.

What differs by design has tests of its own, behind the table.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import inspect
import io
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from pydantic import BaseModel

import stable_openai
from stable_openai import Key, KeyManager, _transport
from stable_openai._clients import client_for
from stable_openai._wire import http
from stable_openai.testing import Failure, FakeOpenAI, closed_port

HI: Any = [{"role": "user", "content": "hi there"}]
CHAT: dict[str, Any] = {"model": "gpt-4o", "messages": HI}
ASK: dict[str, Any] = {"model": "gpt-4o", "input": "hi there"}
PATIENCE_S = 10.0  # no call waits for so long
SHORT_S = 0.2  # until those time out that nothing answers
SOON = {"retry-after-ms": "1"}  # what both clients wait for before they try again
colours = pytest.mark.parametrize("colour", ["sync", "async"])
# httpx beside the httpx2 that openai 3 is built on; openai takes clients of both.
OLD_HTTP: Any = None
if http.__name__ != "httpx" and importlib.util.find_spec("httpx"):
    OLD_HTTP = importlib.import_module("httpx")


class Weather(BaseModel):
    city: str
    degrees: int


TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


# ---- how calls are written: once, for clients of both colours


async def got(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def each(items: Any) -> AsyncIterator[Any]:
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def listed(items: Any) -> list[Any]:
    return [item async for item in each(items)]


@asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


def run(coroutine: Coroutine[Any, Any, Any], colour: str) -> Any:
    if colour == "async":
        return asyncio.run(coroutine)
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a sync client suspended")


Call = Callable[[Any], Awaitable[Any]]
Notes = list[Any]


def no_options(colour: str, notes: Notes) -> dict[str, Any]:
    return {}


class Case(NamedTuple):
    """A call, and what it is made with.

    failures: what the upstream is told to do, with the arguments of `FakeOpenAI.fail`.
    options: of the clients, for a colour; what is put into `notes` is compared too.
    fake: the upstream's settings.
    """

    call: Call
    failures: Sequence[tuple[Failure, dict[str, Any]]] = ()
    options: Callable[[str, Notes], dict[str, Any]] = no_options
    fake: dict[str, Any] = {}  # noqa: RUF012  (never changed)


TABLE: dict[str, Case] = {}


def case(*failures: Failure, needs: str = "", **settings: Any) -> Callable[[Call], Call]:
    """Put a call into the table, under its name; only where openai has what it needs."""

    def add(call: Call) -> Call:
        if not needs or has(needs):
            orders = [(failure, {}) for failure in failures]
            TABLE[getattr(call, "__name__", "")] = Case(call, **{"failures": orders} | settings)
        return call

    return add


def has(path: str) -> bool:
    """Whether openai's client has such a method, such as `responses.create`."""
    found: Any = openai.OpenAI(api_key="none")
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None


def failing(name: str, failure: Failure, call: Call, **more: Any) -> None:
    """Put a call into the table that fails."""
    TABLE[name] = Case(call, [(failure, more)])


# ---- the table: chat


@case()
async def chat(client: Any) -> Any:
    return await got(client.chat.completions.create(**CHAT, temperature=0.5, user="u-1"))


@case()
async def chat_n(client: Any) -> Any:
    return await got(client.chat.completions.create(**CHAT, n=3, max_tokens=5))


@case()
async def chat_unicode(client: Any) -> Any:
    messages: Any = [{"role": "user", "content": 'é\u2028🙂 "usage": {"total_tokens": 1} \\ \x7f'}]
    return await got(client.chat.completions.create(model="gpt-4o", messages=messages, metadata={"a": None}))


@case()
async def chat_tools(client: Any) -> Any:
    return await got(client.chat.completions.create(**CHAT, tools=[TOOL], tool_choice="required"))


@case()
async def chat_parse(client: Any) -> Any:
    completion = await got(client.chat.completions.parse(**CHAT, response_format=Weather))
    return completion, type(completion.choices[0].message.parsed)


@case()
async def chat_stream(client: Any) -> Any:
    stream = await got(client.chat.completions.create(**CHAT, stream=True))
    return [type(stream).__name__.removeprefix("Async"), await listed(stream)]


@case()
async def chat_stream_of_tools(client: Any) -> Any:
    stream = await got(client.chat.completions.create(**CHAT, stream=True, tools=[TOOL], tool_choice="required"))
    return await listed(stream)


@case()
async def chat_stream_with_usage(client: Any) -> Any:
    stream = await got(client.chat.completions.create(**CHAT, n=2, stream=True, stream_options={"include_usage": True}))
    async with entered(stream):
        return [await listed(stream), stream.response]


@case()
async def chat_stream_closed_early(client: Any) -> Any:
    stream = await got(client.chat.completions.create(**CHAT, stream=True))
    async with entered(stream):
        first = await anext(aiter(each(stream)))
    return first, stream.response.is_closed, await got(client.chat.completions.create(**CHAT))


@case()
async def chat_stream_helper(client: Any) -> Any:
    async with entered(client.chat.completions.stream(**CHAT, stream_options={"include_usage": True})) as stream:
        events = await listed(stream)
        return [(type(event).__name__, event) for event in events], await got(stream.get_final_completion())


@case()
async def chat_stream_helper_that_parses(client: Any) -> Any:
    async with entered(client.chat.completions.stream(**CHAT, response_format=Weather)) as stream:
        await got(stream.until_done())
        return await got(stream.get_final_completion())


@case()
async def chat_stream_helper_of_tools(client: Any) -> Any:
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    async with entered(client.chat.completions.stream(**CHAT, tools=[strict], tool_choice="required")) as stream:
        return await listed(stream)


@case()
async def old_completions(client: Any) -> Any:
    return await got(client.completions.create(model="davinci", prompt=["one", "two"], n=2, max_tokens=3))


@case()
async def old_completions_stream(client: Any) -> Any:
    return await listed(await got(client.completions.create(model="davinci", prompt="one two", stream=True)))


# ---- responses


@case()
async def responses(client: Any) -> Any:
    made = await got(client.responses.create(**ASK, instructions="be kind", store=False))
    return made, made.output_text


@case()
async def responses_stream(client: Any) -> Any:
    return [
        (type(event).__name__, event) for event in await listed(await got(client.responses.create(**ASK, stream=True)))
    ]


@case()
async def responses_stream_helper(client: Any) -> Any:
    async with entered(client.responses.stream(**ASK)) as stream:
        return await listed(stream), await got(stream.get_final_response())


@case()
async def responses_stream_helper_that_parses(client: Any) -> Any:
    async with entered(client.responses.stream(**ASK, text_format=Weather)) as stream:
        await got(stream.until_done())
        return await got(stream.get_final_response())


@case()
async def responses_parse(client: Any) -> Any:
    made = await got(client.responses.parse(**ASK, text_format=Weather))
    return made, type(made.output_parsed)


@case()
async def responses_kept(client: Any) -> Any:
    made = await got(client.responses.create(**ASK))
    seen = await got(client.responses.retrieve(made.id))
    further = await got(client.responses.create(**ASK, previous_response_id=made.id))
    gone = await got(client.responses.delete(made.id))
    return made, seen, further, gone


@case()
async def responses_unknown(client: Any) -> Any:
    return await got(client.responses.retrieve("resp_none"))


# ---- embeddings and the rest of the models


@case()
async def embeddings(client: Any) -> Any:
    return await got(client.embeddings.create(model="e", input="one"))


@case()
async def embeddings_as_floats(client: Any) -> Any:
    return await got(client.embeddings.create(model="e", input=["one", "two"], encoding_format="float", dimensions=4))


@case()
async def embeddings_as_base64(client: Any) -> Any:
    return await got(client.embeddings.create(model="e", input=["one"], encoding_format="base64"))


@case()
async def embeddings_of_token_ids(client: Any) -> Any:
    one = await got(client.embeddings.create(model="e", input=[1, 2, 3]))
    return one, await got(client.embeddings.create(model="e", input=[[1, 2], [3]]))


@case()
async def moderations(client: Any) -> Any:
    return await got(client.moderations.create(input=["one", "two"]))


@case()
async def images(client: Any) -> Any:
    return await got(client.images.generate(model="gpt-image-1", prompt="a cat", n=2))


@case()
async def transcription_of_a_file_object(client: Any) -> Any:
    file = io.BytesIO(b"RIFF" * 50_000)
    file.name = "a.wav"
    return await got(client.audio.transcriptions.create(model="whisper-1", file=file, language="en"))


@case()
async def transcription_of_bytes(client: Any) -> Any:
    return await got(client.audio.transcriptions.create(model="whisper-1", file=("b.mp3", b"ID3" * 100, "audio/mp3")))


@case()
async def transcription_of_a_path(client: Any) -> Any:
    return await got(client.audio.transcriptions.create(model="whisper-1", file=Path(__file__)))


@case()
async def transcription_stream(client: Any) -> Any:
    made = await got(client.audio.transcriptions.create(model="gpt-4o-transcribe", file=("b.mp3", b"ID3"), stream=True))
    return await listed(made)


# ---- files and models


@case()
async def files(client: Any) -> Any:
    made = [
        await got(client.files.create(file=(f"{number}.jsonl", b"{}\n" * number), purpose="batch"))
        for number in range(1, 6)
    ]
    pages = client.files.list(limit=2)
    first = await got(pages)
    second = await got(first.get_next_page())
    everything = await listed(client.files.list(limit=2, order="asc"))
    content = await got(client.files.content(made[2].id))
    gone = await got(client.files.delete(made[2].id))
    return [
        *(
            made,
            first.data,
            first.has_next_page(),
            second.data,
            everything,
            await got(client.files.retrieve(made[1].id)),
        ),
        *(type(content), content.read(), content.text, content.response.headers, gone),
        len(await listed(client.files.list())),
    ]


@case()
async def file_waited_for(client: Any) -> Any:
    made = await got(client.files.create(file=io.BytesIO(b"{}"), purpose="batch"))
    return await got(client.files.wait_for_processing(made.id))


@case()
async def file_unknown(client: Any) -> Any:
    return await got(client.files.content("file-none"))


@case()
async def models(client: Any) -> Any:
    page = await got(client.models.list())
    return page.data, await listed(client.models.list()), await got(client.models.retrieve("gpt-4o"))


@case(fake={"unknown_models": ["gpt-0"]})
async def model_unknown(client: Any) -> Any:
    return await got(client.models.retrieve("gpt-0"))


# ---- responses as they are


def headers_of(raw: Any) -> list[Any]:
    return [raw.headers, raw.status_code, raw.request_id, raw.retries_taken, raw.url, raw.method, raw.http_version]


@case()
async def raw_chat(client: Any) -> Any:
    raw = await got(client.chat.completions.with_raw_response.create(**CHAT))
    return [*headers_of(raw), type(raw.elapsed), raw.content, raw.text, raw.is_closed, raw.http_response, raw.parse()]


@case()
async def raw_as_another_type(client: Any) -> Any:
    raw = await got(client.chat.completions.with_raw_response.create(**CHAT))
    return raw.parse(to=dict[str, object])["choices"], raw.parse(to=str), raw.parse(to=http.Response)


@case()
async def raw_stream(client: Any) -> Any:
    raw = await got(client.chat.completions.with_raw_response.create(**CHAT, stream=True))
    return [*headers_of(raw), await listed(raw.parse()), raw.http_response, type(raw.elapsed)]


@case()
async def raw_of_the_client(client: Any) -> Any:
    raw = await got(client.with_raw_response.models.list())
    return headers_of(raw), raw.parse().data


@case()
async def raw_responses(client: Any) -> Any:
    raw = await got(client.responses.with_raw_response.create(**ASK))
    stream = await got(client.responses.with_raw_response.create(**ASK, stream=True))
    parsed = await got(client.responses.with_raw_response.parse(**ASK, text_format=Weather))
    return headers_of(raw), raw.parse(), await listed(stream.parse()), parsed.parse()


@case(Failure.bad_request())
async def raw_refusal(client: Any) -> Any:
    return await got(client.chat.completions.with_raw_response.create(**CHAT))


def streaming(client: Any, **more: Any) -> Any:
    return entered(client.chat.completions.with_streaming_response.create(**CHAT, **more))


@case()
async def streaming_lines(client: Any) -> Any:
    async with streaming(client, stream=True) as response:
        lines = await listed(response.iter_lines())
    return [*headers_of(response), lines, response.http_response.is_closed, type(response.elapsed)]


@case()
async def streaming_bytes(client: Any) -> Any:
    async with streaming(client, stream=True) as response:
        return b"".join(await listed(response.iter_bytes(7))), response.is_closed


@case()
async def streaming_text(client: Any) -> Any:
    async with streaming(client) as response:
        return "".join(await listed(response.iter_text()))


@case()
async def streaming_read(client: Any) -> Any:
    async with streaming(client) as response:
        unread = response.is_closed
        content = await got(response.read())
        again = await got(response.text()), await got(response.json())
        return [unread, content, *again, await got(response.parse()), response.http_response]


@case()
async def streaming_parse(client: Any) -> Any:
    async with streaming(client, stream=True) as response:
        return await listed(await got(response.parse()))


@case()
async def streaming_unread(client: Any) -> Any:
    async with streaming(client) as response:
        status = response.status_code
    return status, response.is_closed, await got(client.chat.completions.create(**CHAT))


@case()
async def streaming_file(client: Any) -> Any:
    made = await got(client.files.create(file=("a", bytes(range(256)) * 1000), purpose="batch"))
    async with entered(client.files.with_streaming_response.content(made.id)) as response:
        return await got(response.read())


@case(Failure.server_error())
async def streaming_refusal(client: Any) -> Any:
    async with streaming(client.with_options(max_retries=0)) as response:
        return response


# ---- options


@case()
async def options_of_a_copy(client: Any) -> Any:
    copy = client.with_options(
        timeout=5, default_headers={"x-one": "1"}, default_query={"a": "b"}, organization="org-x", project="p"
    )
    raw = await got(copy.chat.completions.with_raw_response.create(**CHAT))
    timeout = raw.http_request.extensions["timeout"]
    plain = copy.copy(set_default_headers={"x-two": "2"}, set_default_query={})
    return [timeout, raw.parse(), plain.timeout, await got(plain.chat.completions.create(**CHAT)), copy.timeout]


@case()
async def options_of_a_request(client: Any) -> Any:
    return await got(
        client.chat.completions.create(
            **CHAT,
            extra_headers={"x-one": "1", "User-Agent": "mine", "x-stainless-arch": openai.Omit()},
            extra_query={"a": ["b", "c"]},
            extra_body={"seed": 7, "user": "u-2"},
            timeout=7,
        )
    )


@case()
async def options_of_keys(client: Any) -> Any:
    """A secret that the caller puts into a request is the one that is sent."""
    name, value = ("api-key", "sk-b") if "Azure" in client.user_agent else ("Authorization", "Bearer sk-b")
    return await got(client.chat.completions.create(**CHAT, extra_headers={name: value}))


@case(options=lambda colour, notes: {"default_headers": {"x-a": "1", "Accept": "x/y"}, "default_query": {"q": "1"}})
async def options_of_the_client(client: Any) -> Any:
    return [await got(client.models.list()), client.default_headers["x-a"], client.timeout, client.user_agent]


@case(options=lambda colour, notes: {"_strict_response_validation": True})
async def strict_validation(client: Any) -> Any:
    return await got(client.post("/chat/completions", cast_to=Weather, body=CHAT))


@case()
async def posted_by_hand(client: Any) -> Any:
    as_dict = await got(client.post("/chat/completions", cast_to=object, body=CHAT))
    as_text = await got(client.post("/chat/completions", cast_to=str, body=CHAT, options={"params": {"a": "b"}}))
    response = await got(client.post("/embeddings", cast_to=http.Response, body={"model": "e", "input": "x"}))
    listing = await got(client.get("/models", cast_to=object))
    return [as_dict, as_text, response, response.json(), listing]


@case()
async def posted_content(client: Any) -> Any:
    options = {"headers": {"Content-Type": "application/json"}}
    content = json.dumps(CHAT).encode()
    return await got(client.post("/chat/completions", cast_to=object, content=content, options=options))


@case()
async def unknown_path(client: Any) -> Any:
    return await got(client.post("/nowhere", cast_to=object, body={"a": 1}))


@case()
async def unknown_method(client: Any) -> Any:
    return await got(client.put("/models", cast_to=object))


@case(Failure.redirect("/v1/chat/completions?again=1"))
async def redirected(client: Any) -> Any:
    return await got(client.chat.completions.create(**CHAT))


@case(Failure.redirect("/v1/models", 303))
async def redirected_to_a_get(client: Any) -> Any:
    return (await got(client.chat.completions.with_raw_response.create(**CHAT))).http_response


@case(Failure.redirect("/v1/models"))
async def redirect_not_followed(client: Any) -> Any:
    body = {"model": "e", "input": "x"}
    return await got(client.post("/embeddings", cast_to=object, body=body, options={"follow_redirects": False}))


@case(Failure.redirect("http://localhost:1/v1/models"))
async def redirected_to_nowhere(client: Any) -> Any:
    return await once(client)


@case(fake={"gzip": True})
async def compressed(client: Any) -> Any:
    made = await got(client.chat.completions.with_raw_response.create(**CHAT))
    stream = await got(client.chat.completions.create(**CHAT, stream=True))
    encoding = made.headers["content-encoding"], stream.response.headers["content-encoding"]
    return encoding, made.text, made.parse(), await listed(stream)


@case(fake={"gzip": True})
async def compressed_as_it_comes(client: Any) -> Any:
    async with streaming(client) as response:
        return await listed(
            response.http_response.aiter_raw() if hasattr(response, "aclose") else response.iter_bytes()
        )


@case()
async def attributes(client: Any) -> Any:
    names = ("base_url", "timeout", "organization", "project", "websocket_base_url", "user_agent", "qs", "custom_auth")
    found = [getattr(client, name, None) for name in names[:6]]
    closed = client.is_closed()
    await got(client.close())
    return [*found, closed, client.is_closed(), await failed(client.models.list)]


async def failed(call: Callable[..., Any]) -> Any:
    try:
        return await got(call())
    except Exception as error:
        return error


# ---- HTTP clients of the user's own


def client_of(library: Any, colour: str, **options: Any) -> Any:
    return (library.AsyncClient if colour == "async" else library.Client)(**options)


def content_of(request: Any) -> bytes:
    """The body of a request, but of a form, which is read from its files."""
    content: bytes = b"" if "multipart" in request.headers.get("content-type", "") else request.content
    return content


def noting(notes: Notes, colour: str) -> dict[str, list[Any]]:
    """Event hooks of which one reads all that it is given."""

    def sent(request: Any) -> None:
        notes.append((request.method, request.url, dict(request.headers) | {"host": ""}, content_of(request)))
        request.headers["x-hook"] = "1"

    def answered(response: Any) -> None:
        notes.append((response.status_code, response.request.url, response.headers, response.is_closed))

    async def asent(request: Any) -> None:
        sent(request)

    async def aanswered(response: Any) -> None:
        answered(response)

    both: tuple[Any, Any] = (asent, aanswered) if colour == "async" else (sent, answered)
    return {"request": [both[0]], "response": [both[1]]}


class Noted(http.BaseTransport, http.AsyncBaseTransport):
    """A transport that notes what it sends."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.sync, self.asynchronous = http.HTTPTransport(), http.AsyncHTTPTransport()

    def note(self, request: Any) -> None:
        self.notes.append((request.url, content_of(request), request.extensions["timeout"]))

    def handle_request(self, request: Any) -> Any:
        self.note(request)
        return self.sync.handle_request(request)

    async def handle_async_request(self, request: Any) -> Any:
        self.note(request)
        return await self.asynchronous.handle_async_request(request)

    def close(self) -> None:
        self.sync.close()
        self.notes.append("closed")

    async def aclose(self) -> None:
        await self.asynchronous.aclose()
        self.notes.append("closed")


async def used(client: Any) -> Any:
    """What is asked of clients with an HTTP client of their own."""
    made = await got(client.chat.completions.with_raw_response.create(**CHAT))
    stream = await got(client.chat.completions.create(**CHAT, stream=True))
    items = await listed(stream)
    form = await got(client.files.create(file=("a", b"1"), purpose="batch"))
    async with streaming(client) as response:
        text = await got(response.text())
    refused = await failed(lambda: client.files.retrieve("file-none"))
    return [made.http_response, made.parse(), items, stream.response, form, text, refused]


def used_with(
    name: str, options: Callable[[str, Notes], dict[str, Any]], *failures: Failure, call: Call = used
) -> None:
    def made(colour: str, notes: Notes) -> dict[str, Any]:
        return {"http_client": client_of(http, colour, **options(colour, notes))}

    TABLE[f"http_client_{name}"] = Case(call, [(failure, {}) for failure in failures], made)


def reading(colour: str) -> dict[str, list[Any]]:
    def read(response: Any) -> None:
        response.read()

    async def aread(response: Any) -> None:
        await response.aread()

    return {"response": [aread if colour == "async" else read]}


def raising(colour: str) -> dict[str, list[Any]]:
    def check(response: Any) -> None:
        response.raise_for_status()

    async def acheck(response: Any) -> None:
        response.raise_for_status()

    return {"response": [acheck if colour == "async" else check]}


def mocked(notes: Notes) -> Any:
    """A transport whose responses were never sent: whole ones, a stream, a broken one."""

    def answer(request: Any) -> Any:
        notes.append((request.method, request.url, content_of(request)))
        if "multipart" in request.headers.get("content-type", ""):
            raise ValueError("the transport's own")
        if b'"stream":' in request.content:
            events = b'data: {"choices": []}\n\ndata: [DONE]\n\n'
            return http.Response(200, headers={"content-type": "text/event-stream"}, content=events)
        return http.Response(404 if request.method == "GET" else 200, json={"choices": [], "id": "x"})

    return http.MockTransport(answer)


async def used_with_care(client: Any) -> Any:
    """The same, of a client with an HTTP client that fails."""
    client = client.with_options(max_retries=0)
    form = await failed(lambda: client.files.create(file=("a", b"1"), purpose="batch"))
    stream = await failed(lambda: client.chat.completions.create(**CHAT, stream=True))
    items = [] if isinstance(stream, Exception) else await listed(stream)
    async with streaming(client) as response:
        text = await got(response.text())
    return [await failed(lambda: once(client)), form, items, text, await failed(client.models.list)]


used_with("alone", lambda colour, notes: {})
used_with("with_a_transport", lambda colour, notes: {"transport": Noted(notes), "timeout": 5})
used_with("with_hooks", lambda colour, notes: {"event_hooks": noting(notes, colour)})
used_with("with_hooks_that_read", lambda colour, notes: {"event_hooks": reading(colour)})
used_with(
    "with_hooks_that_raise",
    lambda colour, notes: {"event_hooks": raising(colour)},
    *[Failure.bad_request()] * 2,
    call=used_with_care,
)
used_with("that_is_a_mock", lambda colour, notes: {"transport": mocked(notes)}, call=used_with_care)
used_with("with_headers", lambda colour, notes: {"headers": {"x-a": "1", "user-agent": "u"}, "params": {"p": "1"}})
used_with("with_cookies", lambda colour, notes: {"cookies": {"a": "b"}})
used_with("with_auth", lambda colour, notes: {"auth": lambda request: headed(request, "sk-b")})
used_with("that_follows_nothing", lambda colour, notes: {}, Failure.redirect("/v1/models"))
used_with(
    "that_follows", lambda colour, notes: {"follow_redirects": True}, Failure.redirect("/v1/chat/completions?again=1")
)
used_with("with_few_redirects", lambda colour, notes: {"follow_redirects": True, "max_redirects": 0})
used_with("with_an_encoding", lambda colour, notes: {"default_encoding": "latin-1"})
used_with("with_a_base_url", lambda colour, notes: {"base_url": "http://localhost:1/x"})
used_with(
    "given_cookies",
    lambda colour, notes: {},
    Failure.error(200, headers={"set-cookie": "c=d; Path=/", "x-request-id": "r"}, body=json.dumps({"choices": []})),
)


def headed(request: Any, secret: str) -> Any:
    request.headers["Authorization"] = f"Bearer {secret}"
    return request


if OLD_HTTP is not None:
    for title, more in {"": {}, "_with_headers": {"headers": {"x-a": "1"}, "cookies": {"a": "b"}}}.items():
        TABLE[f"old_http_client{title}"] = Case(
            used, options=lambda colour, notes, more=more: {"http_client": client_of(OLD_HTTP, colour, **more)}
        )
    TABLE["old_http_client_with_hooks"] = Case(
        used,
        options=lambda colour, notes: {"http_client": client_of(OLD_HTTP, colour, event_hooks=noting(notes, colour))},
    )


# ---- failures


async def once(client: Any) -> Any:
    return await got(client.with_options(max_retries=0).chat.completions.create(**CHAT))


async def streamed_once(client: Any) -> Any:
    """What comes of a stream until it fails, and how it does."""
    items = []
    try:
        stream = await got(client.with_options(max_retries=0).chat.completions.create(**CHAT, stream=True))
        async for item in each(stream):
            items.append(item)
    except Exception as error:
        items.append(error)
    return items


async def in_time(client: Any) -> Any:
    return await once(client.with_options(timeout=SHORT_S))


async def streamed_in_time(client: Any) -> Any:
    return await streamed_once(client.with_options(timeout=SHORT_S))


async def read_once(client: Any) -> Any:
    parts = []
    async with streaming(client.with_options(max_retries=0), stream=True) as response:
        try:
            async for line in each(response.iter_lines()):
                parts.append(line)
        except Exception as error:
            parts.append(error)
    return parts


async def helped_once(client: Any) -> Any:
    events: list[Any] = []
    try:
        async with entered(client.with_options(max_retries=0).responses.stream(**ASK)) as stream:
            async for event in each(stream):
                events.append(event)
    except Exception as error:
        events.append(error)
    return events


def json_error(status: int, body: str, **headers: str) -> Failure:
    return Failure.error(status, body=body, headers=headers)


ANSWERS = {
    "400": Failure.bad_request(),
    "401_of_a_key": Failure.invalid_api_key(),
    "401_of_a_gateway": Failure.gateway_unauthorized(),
    "401_of_a_gateway_in_html": Failure.gateway_unauthorized(html=True),
    "401_of_the_host": Failure.ip_not_authorized(),
    "403_of_the_country": Failure.unsupported_country(),
    "403_of_the_model": Failure.model_not_found(403),
    "404": Failure.error(404, message="No such thing."),
    "404_of_the_model": Failure.model_not_found(),
    "408": Failure.request_timeout(),
    "409": Failure.conflict(),
    "413": Failure.error(413, message="Too large."),
    "418": Failure.error(418, type="teapot", code="tea"),
    "422": Failure.unprocessable(),
    "429_not_to_be_repeated": Failure.error(429, code="other").no_retry(),
    "429_too_large": Failure.error(429, code="rate_limit_exceeded", type="tokens", message="Request too large for x."),
    "500": Failure.server_error(),
    "502_in_html": Failure.error(502, body="<html>bad gateway</html>", headers={"content-type": "text/html"}),
    "503_empty": json_error(503, ""),
    "504": Failure.server_error(504).no_retry(),
    "529": Failure.server_error(529),
    "an_error_that_is_text": json_error(400, '{"error": "text"}'),
    "an_error_that_is_a_list": json_error(400, "[1]"),
    "an_error_without_json": json_error(400, "{"),
    "304": json_error(304, "", etag="x"),
    "300": json_error(300, "[]"),
    "204": json_error(204, ""),
    "201": json_error(201, '{"choices": [], "id": "x"}'),
    "malformed_json": json_error(200, '{"choices": ['),
    "json_that_is_null": json_error(200, "null"),
    "json_that_is_a_list": json_error(200, "[1]"),
    "empty": json_error(200, ""),
    "html": Failure.error(200, body="<html>", headers={"content-type": "text/html"}),
    "bytes_that_are_no_gzip": json_error(200, "{}", **{"content-encoding": "gzip"}),
    "an_encoding_that_nobody_knows": json_error(200, "{}", **{"content-encoding": "xyz"}),
    "closed": Failure.closed(),
    "cut": Failure.cut(),
    "cut_after_its_headers": Failure.cut(after=0),
}
# openai 2 raises httpx's own error where a stream breaks; ours reads its first piece sooner, where openai wraps it.
WRAPS = "APIConnectionError" in inspect.getsource(importlib.import_module("openai._streaming"))
BEFORE_ITS_FIRST_PIECE = ("bytes_that_are_no_gzip", "cut_after_its_headers")
for title, failure in ANSWERS.items():
    failing(f"answer_{title}", failure, once)
    if WRAPS or title not in BEFORE_ITS_FIRST_PIECE:
        failing(f"stream_answer_{title}", failure, streamed_once)
failing("stream_cut", Failure.cut(), streamed_once)
failing("stream_cut_at_its_end", Failure.cut(after=4), streamed_once)
failing("stream_with_an_error", Failure.stream_error(), streamed_once)
failing("stream_with_an_error_without_a_code", Failure.stream_error(None), streamed_once)
failing("stream_that_begins_with_an_error", Failure.stream_error(after=0), streamed_once)
failing("stream_read_as_lines_cut", Failure.cut(), read_once)
failing("stream_of_responses_cut", Failure.cut(), helped_once)
failing("stream_of_responses_with_an_error", Failure.stream_error(), helped_once)
failing("stream_of_responses_refused", Failure.bad_request(), helped_once)
failing("timeout", Failure.hang(), in_time)
failing("stream_timeout", Failure.hang(), streamed_in_time)
failing("stream_stalled", Failure.stall(), streamed_in_time)
failing("body_stalled", Failure.stall(), in_time)
TABLE["refused"] = Case(once, options=lambda colour, notes: {"base_url": REFUSED})
TABLE["no_such_host"] = Case(once, options=lambda colour, notes: {"base_url": "http://no.invalid/v1"})
TABLE["no_such_scheme"] = Case(once, options=lambda colour, notes: {"base_url": "gopher://localhost/v1"})
REFUSED = f"http://127.0.0.1:{closed_port()}/v1"


@case(Failure.error(500, headers=SOON), Failure.error(503, headers=SOON))
async def tried_again(client: Any) -> Any:
    return await got(client.chat.completions.create(**CHAT))


@case(*[Failure.error(500, headers=SOON, message=f"No. {number}") for number in range(4)])
async def tried_again_in_vain(client: Any) -> Any:
    return await got(client.with_options(max_retries=3).chat.completions.create(**CHAT))


@case(Failure.error(500, headers=SOON))
async def form_tried_again(client: Any) -> Any:
    return await got(client.files.create(file=io.BytesIO(b"1" * 100_000), purpose="batch"))


@case(Failure.error(429, code="rate_limit_exceeded", headers=SOON))
async def limited_for_a_moment(client: Any) -> Any:
    return await got(client.chat.completions.create(**CHAT))


@case(fake={"keys": ["sk-other"]})
async def the_only_key_is_bad(client: Any) -> Any:
    """All accounts fail alike: that is a fault of the pool, and no key is put out (design.md, section 6)."""
    return [await failed(lambda: client.chat.completions.create(**CHAT)) for _ in range(4)]


@case(json_error(200, '{"choices": []}'), *[Failure.invalid_api_key()] * 3)
async def the_only_key_is_revoked(client: Any) -> Any:
    return [await failed(lambda: client.chat.completions.create(**CHAT)) for _ in range(4)]


# ---- comparing


class Seen(NamedTuple):
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


class Recorded(FakeOpenAI):
    """A fake that also remembers what it was sent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["seen"] = seen = []
        arrive = self._upstream.arrive

        def noted(request: Any) -> Any:
            boundary = re.findall("boundary=(.+)", request.headers.get("content-type", ""))
            body, headers = request.body, {**request.headers, "host": ""}
            if boundary:
                body = body.replace(boundary[0].encode(), b"boundary")
                headers["content-type"] = "multipart/form-data"
            # How often openai has tried before; here it is the broker that does.
            headers.pop("x-stainless-retry-count", None)
            seen.append(Seen(request.method, request.path, request.query, headers, body))
            return arrive(request)

        self._upstream.arrive = noted  # type: ignore[method-assign]


TIMES = ("created", "created_at", "completed_at", "expires_at", "openai-processing-ms", "date")
# Ours shows the caller no secret, nor what a hook puts into the request that is really sent; and does not count.
HIDDEN = ("authorization", "api-key", "x-hook", "x-stainless-retry-count")


def told(value: Any) -> Any:
    """A result or an exception as plain data, without what differs by nature: times, the port, the secret."""
    if value is None or isinstance(value, bool | int | float | type):
        return value
    if isinstance(value, str):
        value = re.sub(r"127\.0\.0\.1:\d+", "upstream", value)
        return re.sub(r'("created(?:_at)?": ?|boundary=)\w+', r"\1", value)
    if isinstance(value, bytes):
        return told(value.decode("latin-1"))
    if isinstance(value, BaseException):
        return error_told(value)
    if isinstance(value, BaseModel):
        fields: Any = value.model_dump(warnings=False)
        return type(value).__name__, getattr(value, "_request_id", None), told(fields)
    if hasattr(value, "multi_items") and hasattr(value, "raw"):
        return [(told(n), told(v)) for n, v in value.multi_items() if n.lower() not in (*TIMES, *HIDDEN, "host")]
    if isinstance(value, dict):
        return {name: 0 if name in TIMES and item else told(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [told(item) for item in value]
    if isinstance(value, timedelta):
        return "a time"
    name = type(value).__name__
    if name == "Response":
        return response_told(value)
    if name == "Request":
        return value.method, told(value.url), told(value.headers)
    if name in ("URL", "Timeout"):
        return told(str(value))
    raise TypeError(f"cannot compare {value!r}")


def response_told(response: Any) -> Any:
    return {
        # Where the user's HTTP client is of httpx, and openai of httpx2, the response is one of httpx2.
        "from": (type(response).__module__, response.num_bytes_downloaded) if OLD_HTTP is None else None,
        **{name: told(getattr(response, name)) for name in ("status_code", "reason_phrase", "http_version", "url")},
        **{name: told(getattr(response, name)) for name in ("headers", "is_closed", "is_stream_consumed", "encoding")},
        "elapsed": type(response.elapsed) if response.is_closed and "http_version" in response.extensions else None,
        "next_request": told(response.next_request),
        "history": [response_told(earlier) for earlier in response.history],
        "request": told(response.request),
        "cookies": dict(response.cookies),
        "text": told(response.text) if hasattr(response, "_content") else None,
        "extensions": {name: told(response.extensions.get(name)) for name in ("http_version", "reason_phrase")},
    }


def error_told(error: BaseException) -> Any:
    names = ("message", "body", "code", "param", "type", "status_code", "request_id", "response", "request")
    facts: dict[str, Any] = {"class": type(error), "text": told(str(error))}
    for name in names:
        with suppress(AttributeError, RuntimeError):
            facts[name] = told(getattr(error, name))
    cause = error.__cause__
    return facts | {"cause": cause and (type(cause), told(str(cause)))}


class Outcome(NamedTuple):
    """What came of a call, and of the requests that it made."""

    result: Any
    seen: list[Seen]
    statuses: list[int]
    notes: Any


KEYS = {"sk-a": "org-1", "sk-b": "org-2"}
numbers = count()
Make = Callable[[FakeOpenAI, dict[str, Any]], Any]


def came(entry: Case, colour: str, make: Make) -> Outcome:
    """Make a call of the table."""
    notes: Notes = []
    with Recorded(**{"keys": KEYS} | entry.fake) as upstream:
        for failure, more in entry.failures:
            upstream.fail(failure, **more)

        async def called() -> Any:
            client = make(upstream, {"timeout": PATIENCE_S} | entry.options(colour, notes))
            try:
                return told(await failed(lambda: entry.call(client)))
            finally:
                await got(client.close())

        result = run(called(), colour)
        upstream.release()
        upstream.wait_for(lambda fake: not fake.in_flight)
        statuses = [line.status for line in upstream.log]
        assert "sk-" not in str(result), "a secret in what the caller is given"
        return Outcome(result, upstream.__dict__["seen"], statuses, told(notes))


@contextmanager
def managing(keys: Sequence[str] = ("sk-a",), **options: Any) -> Iterator[KeyManager]:
    manager = KeyManager(keys, **{"pool": f"test-table-{next(numbers)}", "max_wait": PATIENCE_S} | options)
    try:
        yield manager
    finally:
        manager.close()


def usual(module: Any, colour: str, **given: Any) -> Make:
    kind: Any = module.AsyncOpenAI if colour == "async" else module.OpenAI
    return lambda fake, options: kind(**{"base_url": fake.url} | options | given)


def azure(module: Any, colour: str, **given: Any) -> Make:
    kind: Any = module.AsyncAzureOpenAI if colour == "async" else module.AzureOpenAI
    where = {"api_version": "2026-01-01"}
    return lambda fake, options: kind(**where, azure_endpoint=fake.url.removesuffix("/v1"), **options | given)


def ours(colour: str, **given: Any) -> Make:
    return usual(stable_openai, colour, **given)


PLAIN: dict[str, Callable[[str], Make]] = {
    "openai": lambda colour: usual(openai, colour, api_key="sk-a"),
    "azure": lambda colour: azure(openai, colour, api_key="sk-a"),
}


def agree(name: str, colour: str, theirs: str, make: Make) -> None:
    """A call of the table comes to the same through `make`."""
    expected, found = plainly(name, colour, theirs), came(TABLE[name], colour, make)
    assert found.seen == expected.seen
    assert found.statuses == expected.statuses
    assert found.notes == expected.notes
    assert found.result == expected.result


@cache
def plainly(name: str, colour: str, kind: str) -> Outcome:
    """What comes of a call through openai's client."""
    return came(TABLE[name], colour, PLAIN[kind](colour))


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """One TLS context for all clients, which takes most of their making; and no backoff, which is not compared."""
    context = ssl.create_default_context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", lambda *args, **options: context)
        patch.setattr(_transport, "default_wait", lambda state: 0.0)
        yield


# ---- the tests


@pytest.mark.parametrize("name", TABLE)
@colours
def test_a_client_that_leases(name: str, colour: str) -> None:
    with managing() as manager:
        agree(name, colour, "openai", ours(colour, manager=manager))


@pytest.mark.parametrize("name", TABLE)
@colours
def test_a_client_with_a_key_of_its_own(name: str, colour: str) -> None:
    agree(name, colour, "openai", ours(colour, api_key="sk-a"))


ON_AZURE = [name for name, entry in TABLE.items() if "base_url" not in entry.options("sync", [])]


@pytest.mark.parametrize("name", ON_AZURE)
@colours
def test_a_client_of_azure(name: str, colour: str) -> None:
    with managing() as manager:
        agree(name, colour, "azure", azure(stable_openai, colour, manager=manager))


OVER_REDIS = ("chat", "chat_stream", "chat_stream_helper", "responses_kept", "files", "streaming_lines", "stream_cut")


@pytest.mark.parametrize("name", [*OVER_REDIS, "stream_with_an_error", "tried_again", "the_only_key_is_bad"])
@colours
def test_over_redis(name: str, colour: str, redis_url: str) -> None:
    with managing(redis=redis_url) as manager:
        agree(name, colour, "openai", ours(colour, manager=manager))


# What is tried again is the business of whoever holds the lease; and it has the options of no client.
BOUND = [
    name
    for name, entry in TABLE.items()
    if entry.options is no_options and not {"attributes", "limited_for_a_moment"} & {name} and "tried" not in name
]


@pytest.mark.parametrize("name", BOUND)
@colours
def test_the_client_of_a_lease(name: str, colour: str) -> None:
    with ExitStack() as stack:

        def make(fake: FakeOpenAI, options: dict[str, Any]) -> Any:
            manager = stack.enter_context(managing([Key("sk-a", base_url=fake.url)]))
            lease = stack.enter_context(manager.lease(model="gpt-4o"))
            return client_for(manager, lease, colour == "async").with_options(**options)

        agree(name, colour, "openai", make)


# ---- what differs by design


async def given_up(client: Any) -> Any:
    """What the broker gave up with, and after."""
    error = await failed(lambda: once(client))
    return [type(error).__name__, isinstance(error, openai.OpenAIError), error.__cause__]


async def stream_given_up(client: Any) -> Any:
    (error,) = await errors_of(client)
    return [type(error).__name__, isinstance(error, openai.OpenAIError), error.__cause__]


async def errors_of(client: Any) -> list[Any]:
    async def read() -> None:
        await listed(await got(client.with_options(max_retries=0).chat.completions.create(**CHAT, stream=True)))

    return [await failed(read)]


LATER = {"retry-after": "60"}


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (Failure.rate_limit(retry_after=60), "Exhausted"),
        (Failure.error(429, headers=LATER, body="<html>"), "Exhausted"),
        (Failure.insufficient_quota(), "NoKeys"),
        (Failure.account_deactivated(), "NoKeys"),
        (Failure.payment_required(), "NoKeys"),
    ],
)
@colours
def test_a_pool_that_is_used_up(failure: Failure, name: str, colour: str) -> None:
    """The call waits for a key; if none comes in time, that is raised, from the error that openai's client raises."""
    theirs = came(Case(once, [(failure, {})]), colour, PLAIN["openai"](colour))
    with managing(max_wait=1.0) as manager:
        found = came(Case(given_up, [(failure, {})]), colour, ours(colour, manager=manager))
    assert found.result == [name, True, theirs.result]
    assert (found.seen, found.statuses) == (theirs.seen, theirs.statuses)


@colours
def test_a_stream_that_begins_with_a_refusal(colour: str) -> None:
    failure = Failure.stream_error("insufficient_quota", after=0)
    (theirs,) = came(Case(errors_of, [(failure, {})]), colour, PLAIN["openai"](colour)).result
    with managing(max_wait=1.0) as manager:
        found = came(Case(stream_given_up, [(failure, {})]), colour, ours(colour, manager=manager))
    assert found.result == ["NoKeys", True, theirs]


@pytest.mark.parametrize("failure", [Failure.rate_limit(retry_after=60), Failure.invalid_api_key()])
@colours
def test_another_key(failure: Failure, colour: str) -> None:
    with managing(["sk-a", "sk-b"]) as manager:
        found = came(Case(chat, [(failure, {})]), colour, ours(colour, manager=manager))
    assert found.statuses == [failure.status, 200]
    assert found.seen[0].headers["authorization"] != found.seen[1].headers["authorization"]
    assert found.seen[0].body == found.seen[1].body


@pytest.mark.parametrize("title", BEFORE_ITS_FIRST_PIECE)
@colours
def test_a_stream_that_breaks_before_its_first_piece(title: str, colour: str) -> None:
    """It is tried again as if it had not come; in the end it fails where it is asked for, as a connection does."""
    entry = Case(streamed_once, [(ANSWERS[title], {})])
    (theirs,) = came(entry, colour, PLAIN["openai"](colour)).result
    with managing() as manager:
        (found,) = came(entry, colour, ours(colour, manager=manager)).result
    assert found["class"] is openai.APIConnectionError
    assert found["cause"] == (theirs["cause"] if WRAPS else (theirs["class"], theirs["text"]))


@colours
def test_what_is_not_harmless_is_not_repeated(colour: str) -> None:
    """Where it may have been done already: a stored response (design.md, section 6)."""

    async def ask(client: Any) -> Any:
        return [await failed(lambda: client.responses.create(**ASK)), await got(client.responses.create(**ASK))]

    with managing() as manager:
        found = came(Case(ask, [(Failure.closed(), {})]), colour, ours(colour, manager=manager))
    assert found.result[0]["class"] is openai.APIConnectionError
    assert found.statuses == [0, 200]


@colours
def test_the_broker_tries_again_so_the_client_counts_nothing(colour: str) -> None:
    async def ask(client: Any) -> Any:
        raw = await got(client.chat.completions.with_raw_response.create(**CHAT))
        return [client.max_retries, raw.retries_taken, raw.http_request.headers["x-stainless-retry-count"]]

    with managing() as manager:
        found = came(Case(ask, [(Failure.server_error(), {})]), colour, ours(colour, manager=manager, max_retries=1))
    assert (found.result, found.statuses) == ([0, 0, "0"], [500, 200])


# ---- making clients, and their end


def kinds(colour: str) -> tuple[Any, Any]:
    name = "AsyncOpenAI" if colour == "async" else "OpenAI"
    return getattr(openai, name), getattr(stable_openai, name)


@pytest.mark.parametrize(
    "options",
    [
        {"max_retries": None},
        {"max_retries": -1},
        {"max_retries": "2"},
        {"base_url": 7},
        {"no_such_option": 1},
    ],
    ids=str,
)
@colours
def test_clients_that_cannot_be_made(options: dict[str, Any], colour: str) -> None:
    plain, mine = kinds(colour)
    with managing() as manager:
        theirs, found = (
            outcome_of(lambda: plain(api_key="sk-a", **options)),
            outcome_of(lambda: mine(manager=manager, **options)),
        )
        assert found == theirs
        if "max_retries" in options:
            copies = [plain(api_key="sk-a"), mine(manager=manager)]
            theirs, found = (outcome_of(lambda made=made: made.copy(**options)) for made in copies)
            assert found == theirs


def outcome_of(make: Callable[[], Any]) -> Any:
    try:
        make()
    except Exception as error:
        return type(error)
    return None


@colours
def test_a_client_of_the_other_colour_cannot_send(colour: str) -> None:
    plain, mine = kinds(colour)
    other = http.Client() if colour == "async" else http.AsyncClient()
    for make in (lambda: plain(api_key="sk-a", http_client=other), lambda: mine(http_client=other)):
        with pytest.raises(TypeError, match="Invalid `http_client` argument"):
            make()


@pytest.mark.parametrize("which", [0, 1])
@colours
def test_the_users_own_http_client(which: int, colour: str) -> None:
    """It ends with close(), and not where the client is dropped; and what it is told later counts."""
    kind = kinds(colour)[which]

    async def story() -> None:
        own = client_of(http, colour, timeout=3)
        for _ in range(2):
            client = kind(**given, base_url=fake.url, http_client=own)
            own.headers["x-later"] = "1"
            raw = await got(client.models.with_raw_response.list())
            assert raw.http_request.headers["x-later"] == "1"
            assert client.timeout == http.Timeout(3)
            assert raw.http_request.extensions["timeout"]["read"] == 3
            del client, raw
            gc.collect()
            assert not own.is_closed
        await got(kind(**given, http_client=own).close())
        assert own.is_closed

    with FakeOpenAI(keys=KEYS) as fake, managing() as manager:
        given = {"api_key": "sk-a"} if which == 0 else {"manager": manager}
        run(story(), colour)


@colours
def test_a_proxy_of_the_environment(colour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake is the proxy; the host behind it does not exist."""

    async def ask(client: Any) -> Any:
        return [await got(client.chat.completions.create(**CHAT)), (await got(client.models.list())).data]

    def through(make: Make) -> Make:
        def made(fake: FakeOpenAI, options: dict[str, Any]) -> Any:
            monkeypatch.setenv("HTTP_PROXY", fake.url.removesuffix("/v1"))
            return make(fake, options | {"base_url": "http://behind.invalid/v1"})

        return made

    theirs = came(Case(ask), colour, through(PLAIN["openai"](colour)))
    with managing() as manager:
        found = came(Case(ask), colour, through(ours(colour, manager=manager)))
    assert found == theirs
    assert theirs.seen[0].path == "http://behind.invalid/v1/chat/completions"
