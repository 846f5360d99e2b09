"""What the fake upstream answers beside chat, responses and embeddings, through the real openai client.

Azure's paths, files, forced calls of functions, JSON by schema; organisations, headers of limits, gzip; streams that
break where a test wants it; somebody else who uses an account.
"""

from __future__ import annotations

import asyncio
import enum
import io
import json
import subprocess
import sys
import zlib
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit
from uuid import UUID

import openai
import pytest
from pydantic import AnyUrl, BaseModel, Field, TypeAdapter

import stable_openai.testing
from stable_openai.testing import Failure, FakeOpenAI, FakeProcess, Limit
from stable_openai.testing.multipart import Upload, parse_form
from stable_openai.testing.packing import accepts_gzip
from stable_openai.testing.refusals import RateHeaders
from stable_openai.testing.routes import Route, route_of
from stable_openai.testing.schemas import minimal
from stable_openai.testing.stored import KEPT

ROOT = Path(stable_openai.testing.__file__).parents[2]
HI: Any = [{"role": "user", "content": "hi"}]
BEARER = {"authorization": "Bearer sk-a"}
FOREVER_S = 1e6  # a window whose end no test meets


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[FakeOpenAI, openai.OpenAI]]:
    """A fake with the keys sk-a of org-1 and sk-b of org-2, unless told otherwise, and a client with sk-a."""
    with (
        FakeOpenAI(**{"keys": {"sk-a": "org-1", "sk-b": "org-2"}} | settings) as fake,
        openai.OpenAI(api_key="sk-a", base_url=fake.url, max_retries=0, timeout=10) as client,
    ):
        yield fake, client


@contextmanager
def azure_client(fake: FakeOpenAI, **settings: Any) -> Iterator[openai.AzureOpenAI]:
    with openai.AzureOpenAI(
        **{"api_key": "sk-a", "azure_endpoint": root_of(fake), "api_version": "2026-01-01", "max_retries": 0} | settings
    ) as client:
        yield client


@contextmanager
def plain(fake: FakeOpenAI) -> Iterator[HTTPConnection]:
    """A connection without a client that interprets what it reads."""
    place = urlsplit(fake.url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


def root_of(fake: FakeOpenAI) -> str:
    return fake.url.removesuffix("/v1")


def ask(client: openai.OpenAI, text: str = "hi", **more: Any) -> Any:
    return client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": text}], **more)


def headers_of(client: openai.OpenAI, model: str = "gpt-4o") -> Any:
    return client.chat.completions.with_raw_response.create(model=model, messages=HI).headers


def told(client: openai.OpenAI) -> dict[str, str]:
    """The headers of limits."""
    return {
        name.removeprefix("x-ratelimit-"): value
        for name, value in headers_of(client).items()
        if name.startswith("x-ratelimit-")
    }


# organisations


def test_every_answer_to_a_known_key_names_its_organisation() -> None:
    with serving(limits=Limit(rpm=2), minute_s=FOREVER_S) as (fake, client):
        assert headers_of(client)["openai-organization"] == "org-1"
        fake.fail(Failure.server_error())
        for kind in (openai.InternalServerError, openai.RateLimitError):
            with pytest.raises(kind) as raised:
                ask(client)
            assert raised.value.response.headers["openai-organization"] == "org-1"
        assert client.files.with_raw_response.list().headers["openai-organization"] == "org-1"
        with pytest.raises(openai.AuthenticationError) as unknown:
            ask(client.with_options(api_key="sk-nobody"))
        assert "openai-organization" not in unknown.value.response.headers


def test_organisations_may_be_others_than_the_accounts() -> None:
    with serving(keys={"sk-a": "p-1", "sk-b": "p-2", "sk-c": "p-3"}, organizations={"p-1": "acme", "p-2": ""}) as (
        fake,
        client,
    ):
        names = [headers_of(client.with_options(api_key=f"sk-{key}")).get("openai-organization") for key in "abc"]
        assert names == ["acme", None, "p-3"]
        fake.fail(Failure.error(500, headers={"OpenAI-Organization": "its own"}))
        with pytest.raises(openai.InternalServerError) as raised:
            ask(client)
        assert raised.value.response.headers.get_list("openai-organization") == ["its own"]


# paths


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", Route("/chat/completions")),
        ("/chat/completions/", Route("/chat/completions")),
        ("/a/b/c/completions", Route("/completions")),
        ("/openai/v1/responses", Route("/responses")),
        ("/openai/v1/files/file-1/content", Route("/files/{id}/content", id="file-1")),
        ("/v1/models/some%2Fmodel", Route("/models/{id}", id="some/model")),
        ("/openai/deployments/chat/completions", Route("/completions", deployment="chat", versioned=True)),
        ("/x/openai/deployments/a%20b/embeddings", Route("/embeddings", deployment="a b", versioned=True)),
        ("/openai/deployments/d/responses", Route("", deployment="d", versioned=True)),
        ("/openai/responses", Route("/responses", versioned=True)),
        ("/openai/files/f", Route("/files/{id}", id="f", versioned=True)),
        ("/openai/chat/completions", Route("/chat/completions")),
        ("/v1/models/m/content", Route("")),
        ("/v1/batches", Route("")),
        ("/", Route("")),
    ],
)
def test_routes(path: str, route: Route) -> None:
    assert route_of(path) == route


def test_azures_deployments_name_the_model() -> None:
    with (
        serving(models={"mine": Limit(rpm=1)}, unknown_models=["gpt-9"], minute_s=FOREVER_S) as (fake, _),
        azure_client(fake, azure_deployment="mine") as client,
    ):
        assert client.chat.completions.create(model="gpt-9", messages=HI).model == "mine"
        with pytest.raises(openai.RateLimitError, match="mine in organization org-1"):
            client.embeddings.create(model="another", input="x")
        assert client.responses.create(model="gpt-4o", input="hi").output_text == "echo: hi"
        assert [(entry.model, entry.path) for entry in fake.log] == [
            ("mine", "/openai/deployments/mine/chat/completions"),
            ("mine", "/openai/deployments/mine/embeddings"),
            ("gpt-4o", "/openai/responses"),
        ]


def test_a_request_to_a_deployment_needs_no_model() -> None:
    with serving() as (fake, _), azure_client(fake, azure_deployment="mine") as client:
        answer: Any = client.post("/chat/completions", cast_to=object, body={"messages": HI})
        assert (answer["model"], fake.log[0].model) == ("mine", "mine")


def test_azure_takes_the_model_for_the_deployment_and_tokens_of_entra() -> None:
    with serving() as (fake, _), azure_client(fake, api_key=None, azure_ad_token="sk-b") as client:
        client.chat.completions.create(model="gpt-4o", messages=HI)
        client.completions.create(model="davinci", prompt="hi")
        client.audio.transcriptions.create(model="whisper", file=("a.mp3", b"sound"))
        client.images.generate(model="painter", prompt="a cat")
        client.files.list()
        client.models.list()
        assert [entry.model for entry in fake.log] == ["gpt-4o", "davinci", "whisper", "painter", None, None]
        assert {entry.account for entry in fake.log} == {"org-2"}
        assert {entry.status for entry in fake.log} == {200}


def test_azures_classic_paths_need_a_version_and_its_new_ones_do_not() -> None:
    with serving() as (fake, client):
        classic = client.with_options(base_url=f"{root_of(fake)}/openai/deployments/d")
        with pytest.raises(openai.NotFoundError) as raised:
            ask(classic)
        assert raised.value.code == "404"
        ask(classic, extra_query={"api-version": "2026-01-01"})
        with pytest.raises(openai.NotFoundError):
            client.with_options(base_url=f"{root_of(fake)}/openai").files.list()
        new = client.with_options(base_url=f"{root_of(fake)}/openai/v1", default_headers={"api-key": "sk-a"})
        ask(new)
        new.responses.create(model="gpt-4o", input="hi")
        assert [entry.status for entry in fake.log] == [404, 200, 404, 200, 200]


# endpoints of models


def test_completions() -> None:
    with serving(limits=Limit(tpm=100, rule="sliding")) as (fake, client):
        answer = client.completions.create(model="davinci", prompt=["one", "two"], n=2, max_tokens=20)
        assert [choice.text for choice in answer.choices] == ["echo: one"] * 2 + ["echo: two"] * 2
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 1
        assert (fake.log[0].tokens, fake.log[0].model) == (40, "davinci")
        options: Any = {"include_usage": True}
        chunks = list(client.completions.create(model="m", prompt="a b", stream=True, stream_options=options))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "echo: a b"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_moderations() -> None:
    with serving() as (fake, client):
        (result,) = client.moderations.create(input="hi").results
        assert not result.flagged
        assert result.categories.harassment_threatening is False
        assert result.category_scores.self_harm_intent == 0.0
        assert len(client.moderations.create(model="m", input=["a", "b"]).results) == 2
        parts: Any = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "https://x/"}}]
        assert len(client.moderations.create(model="m", input=parts).results) == 1
        assert [entry.model for entry in fake.log] == ["omni-moderation-latest", "m", "m"]


def test_images() -> None:
    with serving() as (fake, client):
        answer = client.images.generate(prompt="a cat on a mat", n=2)
        assert answer.data is not None
        assert len(answer.data) == 2
        assert b64decode(answer.data[0].b64_json or "").startswith(b"\x89PNG")
        assert answer.usage is not None
        assert answer.usage.input_tokens == 3
        assert fake.log[0].model == "gpt-image-1"


def test_transcriptions() -> None:
    with serving(limits=Limit(rpm=3), minute_s=FOREVER_S) as (fake, client):
        sound = io.BytesIO(bytes(range(256)))
        assert client.audio.transcriptions.create(model="whisper-1", file=("a.mp3", sound)).text == "echo: a.mp3"
        stream = client.audio.transcriptions.create(model="whisper-1", file=("b c.mp3", b""), stream=True)
        events = list(stream)
        assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == "echo: b c.mp3"
        assert events[-1].type == "transcript.text.done"
        with pytest.raises(openai.BadRequestError):
            client.post("/audio/transcriptions", cast_to=object, body={"model": "whisper-1"})
        assert [(entry.model, entry.status) for entry in fake.log] == [
            ("whisper-1", 200),
            ("whisper-1", 200),
            (None, 400),
        ]


def test_only_endpoints_of_models_are_charged_and_all_are_logged() -> None:
    with serving(limits=Limit(rpm=1), minute_s=FOREVER_S) as (fake, client):
        made = client.responses.create(model="gpt-4o", input="hi")
        for _ in range(2):
            client.models.list()
            client.responses.retrieve(made.id)
        client.files.create(file=b"x", purpose="batch")
        client.responses.delete(made.id)
        assert [entry.method for entry in fake.log] == ["POST", "GET", "GET", "GET", "GET", "POST", "DELETE"]
        assert [entry.tokens for entry in fake.log] == [1, 0, 0, 0, 0, 0, 0]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-nobody").files.list()
        with pytest.raises(openai.NotFoundError):
            client.post("/models", cast_to=object, body={})
        assert not fake.over


def test_models() -> None:
    with serving(unknown_models=["gpt-9"]) as (_, client):
        assert client.models.retrieve("some/model").id == "some/model"
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("gpt-9")
        assert raised.value.code == "model_not_found"


# files and kept responses


def test_files() -> None:
    content = bytes(range(256)) + b"\r\n--\r\n"
    with serving() as (fake, client):
        made = client.files.create(file=("née ü.bin", content), purpose="user_data")
        assert (made.filename, made.bytes, made.purpose) == ("née ü.bin", len(content), "user_data")
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).content == content
        other = client.with_options(api_key="sk-b")
        assert not other.files.list().data
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        assert client.files.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made.id)
        form = {"content-type": "multipart/form-data"}  # without a purpose
        with pytest.raises(openai.BadRequestError):
            client.post("/files", cast_to=object, files={"file": b"x"}, options={"headers": form})
        assert {entry.model for entry in fake.log} == {None}


def test_lists_of_files_have_pages() -> None:
    async def ids(url: str, **query: Any) -> list[str]:
        async with openai.AsyncOpenAI(api_key="sk-a", base_url=url, max_retries=0) as client:
            return [file.id async for file in client.files.list(**query)]

    with serving() as (fake, client):
        made = [client.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(5)]
        client.files.create(file=b"x", purpose="vision")
        client.with_options(api_key="sk-b").files.create(file=b"x", purpose="batch")
        fake.clear()
        assert [file.id for file in client.files.list(purpose="batch", limit=2)] == made[::-1]
        assert len(fake.log) == 3
        assert [file.id for file in client.files.list(limit=4, order="asc", purpose="batch")] == made
        assert asyncio.run(ids(fake.url, limit=3, purpose="batch")) == made[::-1]
        page = client.files.list(after=made[1], order="asc", purpose="batch", limit=3)
        assert [file.id for file in page.data] == made[2:]
        assert page.has_more is False
        with pytest.raises(openai.NotFoundError):
            client.files.list(after="file-of-nobody")


def test_responses_are_kept_for_their_account() -> None:
    with serving() as (_, client):
        made = client.responses.create(model="gpt-4o", input="hi")
        assert client.responses.retrieve(made.id).output_text == "echo: hi"
        *_, last = client.responses.create(model="gpt-4o", input="streamed", stream=True)
        assert last.type == "response.completed"
        assert client.responses.retrieve(last.response.id) == last.response
        unkept = client.responses.create(model="gpt-4o", input="hi", store=False)
        other = client.with_options(api_key="sk-b")
        for caller, id in ((other, made.id), (client, unkept.id)):
            with pytest.raises(openai.NotFoundError):
                caller.responses.retrieve(id)
            with pytest.raises(openai.BadRequestError) as raised:
                caller.responses.create(model="gpt-4o", input="on", previous_response_id=id)
            assert raised.value.code == "previous_response_not_found"
        on = client.responses.create(model="gpt-4o", input="on", previous_response_id=made.id)
        assert on.previous_response_id == made.id
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)


def test_only_the_last_responses_are_kept() -> None:
    with serving() as (fake, client), plain(fake) as connection:
        first = client.responses.create(model="gpt-4o", input="hi")
        for _ in range(KEPT):
            connection.request("POST", "/v1/responses", json.dumps({"model": "m", "input": "hi"}), BEARER)
            connection.getresponse().read()
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_forms() -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--b\r\ncontent-type: x/y\r\ncontent-disposition: form-data; name="file"; filename="a \\"b\\""\r\n\r\n'
        b"1\r\n\r\n2\r\n--b--\r\n"
    )
    form = parse_form("multipart/form-data; boundary=b", body)
    assert form is not None
    assert form.fields == {"model": "m"}
    assert form.uploads == {"file": Upload('a "b"', b"1\r\n\r\n2")}
    assert parse_form("application/json", b"{}") is None
    assert parse_form("multipart/form-data", body) is None
    assert parse_form("multipart/form-data; boundary=b", b"x") is None


# calls of functions, JSON by schema


def function(name: str, **properties: Any) -> Any:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    function("weather", city={"type": "string"}, days={"type": "integer"}, exact={"type": "boolean"}),
    function("tides", harbours={"type": "array", "items": {"type": "string"}}),
]
CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "tides"}}]
CALLS = [
    ("weather", {"city": "", "days": 0, "exact": False}, "tool_calls"),
    ("tides", {"harbours": []}, "stop"),
]


@pytest.mark.parametrize(("choice", "call"), [*zip(CHOICES, CALLS)])
def test_forced_tool_calls(choice: Any, call: tuple[str, Any, str]) -> None:
    with serving() as (_, client):
        answer = ask(client, tools=TOOLS, tool_choice=choice).choices[0]
        (made,) = answer.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments), answer.finish_reason) == call
        assert answer.message.content is None
        with client.chat.completions.stream(model="m", messages=HI, tools=TOOLS, tool_choice=choice) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.message.tool_calls is not None
        found = streamed.message.tool_calls[0].function
        assert (found.name, json.loads(found.arguments), streamed.finish_reason) == call
        flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
        wanted: Any = choice if choice == "required" else {"type": "function", "name": "tides"}
        item: Any = client.responses.create(model="m", input="hi", tools=flat, tool_choice=wanted).output[0]
        assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", *call[:2])
        with client.responses.stream(model="m", input="hi", tools=flat, tool_choice=wanted) as events:
            item = events.get_final_response().output[0]
        assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", *call[:2])


def test_tools_that_nothing_forces_are_not_called() -> None:
    with serving() as (_, client):
        for choice in ("auto", "none"):
            assert ask(client, tools=TOOLS, tool_choice=choice).choices[0].message.content == "echo: hi"
        assert ask(client, tools=TOOLS).choices[0].finish_reason == "stop"


class Colour(enum.Enum):
    RED = "red"


class Leaf(BaseModel):
    name: str
    size: int


class Tree(BaseModel):
    """What openai's strict schemas can say."""

    title: str
    leaf: Leaf
    leaves: list[Leaf]
    colour: Colour
    kind: Literal["oak"]
    height: float
    alive: bool
    parent: Tree | None
    children: list[Tree]
    either: int | str


class Exacting(BaseModel):
    """What other upstreams' schemas say too."""

    short: str = Field(min_length=3)
    many: list[int] = Field(min_length=2)
    pair: tuple[int, str]
    positive: int = Field(gt=0)
    negative: float = Field(lt=0)
    between: float = Field(gt=0.25, lt=0.5)
    ninth: int = Field(ge=10, le=20, multiple_of=9)
    at: datetime
    on: date
    id: UUID
    table: dict[str, int]


def test_answers_by_schema() -> None:
    with serving() as (_, client):
        chat = client.chat.completions.parse(model="m", messages=HI, response_format=Tree)
        tree = chat.choices[0].message.parsed
        assert tree is not None
        assert (tree.leaf, tree.leaves, tree.parent) == (Leaf(name="", size=0), [], None)
        assert client.responses.parse(model="m", input="hi", text_format=Tree).output_parsed == tree
        with client.responses.stream(model="m", input="hi", text_format=Tree) as stream:
            assert stream.get_final_response().output_parsed == tree
        with client.chat.completions.stream(model="m", messages=HI, response_format=Tree) as chunks:
            assert chunks.get_final_completion().choices[0].message.parsed == tree
        assert json.loads(ask(client, response_format={"type": "json_object"}).choices[0].message.content) == {}


@pytest.mark.parametrize("type", [Exacting, list[Tree], Leaf | None, int, Literal[3, 4], AnyUrl | date])
def test_minimal_values_satisfy_their_schemas(type: Any) -> None:
    adapter = TypeAdapter(type)
    adapter.validate_json(json.dumps(minimal(adapter.json_schema())))


def test_schemas_joined_by_all_of() -> None:
    schema = {
        "$defs": {"a": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {"const": 5}}, "required": ["y"]}],
    }
    assert minimal(schema) == {"x": 0, "y": 5}


def test_a_schema_that_nothing_satisfies_is_refused() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "endless", "schema": node}}
    with serving() as (_, client), pytest.raises(openai.BadRequestError, match="endless"):
        ask(client, response_format=form)


# gzip


def test_gzip_for_those_who_accept_it() -> None:
    with serving(gzip=True) as (fake, client):
        fake.fail(Failure.server_error())
        with pytest.raises(openai.InternalServerError, match="had an error") as raised:
            ask(client)
        assert raised.value.response.headers["content-encoding"] == "gzip"
        answer = client.chat.completions.with_raw_response.create(model="m", messages=HI)
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.parse().choices[0].message.content == "echo: hi"
        for accepted in ("identity", "deflate, gzip;q=0"):
            plain = client.chat.completions.with_raw_response.create(
                model="m", messages=HI, extra_headers={"accept-encoding": accepted}
            )
            assert "content-encoding" not in plain.headers
            assert plain.parse().choices[0].message.content == "echo: hi"
        made = client.files.create(file=b"", purpose="batch")
        assert client.files.content(made.id).content == b""
        text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, "a b", stream=True))
        assert text == "echo: a b"
        fake.fail(Failure.stream_error("overloaded"))
        with pytest.raises(openai.APIError) as broken:
            list(ask(client, "a b", stream=True))
        assert broken.value.code == "overloaded"


def test_each_event_can_be_decoded_when_it_arrives() -> None:
    with serving(gzip=True) as (fake, client):
        fake.fail(Failure.stall(after=2))
        with client.chat.completions.with_streaming_response.create(
            model="m", messages=[{"role": "user", "content": "a b"}], stream=True
        ) as response:
            assert response.headers["content-encoding"] == "gzip"
            lines = response.iter_lines()
            assert [json.loads(line[6:]) for line in (next(lines), next(lines), next(lines)) if line]
            assert fake.in_flight == 1
            fake.release()
            assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("accepted", "whether"),
    [
        *[("gzip", True), ("br, GZip", True), ("gzip; q=0.5", True), ("deflate, gzip;q=1", True)],
        *[("", False), ("gzip;q=0", False), ("gzip; q=0.00", False), ("x-gzip", False), ("identity", False)],
    ],
)
def test_accepted_encodings(accepted: str, whether: bool) -> None:
    assert accepts_gzip(accepted) is whether


def test_a_gzipped_answer_is_one_gzip_stream() -> None:
    with serving(gzip=True) as (fake, _), plain(fake) as connection:
        headers = BEARER | {"accept-encoding": "gzip"}
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": HI}), headers)
        body = connection.getresponse().read()
    decoder = zlib.decompressobj(wbits=31)
    assert json.loads(decoder.decompress(body))["model"] == "m"
    assert decoder.eof
    assert not decoder.unused_data


# failures


def test_redirects() -> None:
    with serving() as (fake, client):
        fake.fail(Failure.redirect("/elsewhere/chat/completions"))
        assert ask(client, "hi").choices[0].message.content == "echo: hi"
        assert [(entry.status, entry.path) for entry in fake.log] == [
            (307, "/v1/chat/completions"),
            (200, "/elsewhere/chat/completions"),
        ]
        fake.fail(Failure.redirect("/v1/models", status=302))
        with pytest.raises(openai.APIStatusError) as raised:
            client.post("/chat/completions", cast_to=object, body={"model": "m"}, options={"follow_redirects": False})
        assert raised.value.status_code == 302
        assert raised.value.response.headers["location"] == "/v1/models"


@pytest.mark.parametrize("after", [0, 1, 3])
def test_streams_break_after_as_many_events_as_a_test_wants(after: int) -> None:
    with serving() as (fake, client):
        fake.fail(Failure.cut(after=after))
        stream = iter(ask(client, "a b c", stream=True))
        for _ in range(after):
            next(stream)
        with pytest.raises(openai.APIConnectionError):
            next(stream)
        fake.fail(Failure.stream_error("overloaded", after=after))
        stream = iter(ask(client, "a b c", stream=True))
        for _ in range(after):
            next(stream)
        with pytest.raises(openai.APIError) as raised:
            next(stream)
        assert raised.value.code == "overloaded"
        assert [(entry.status, entry.code) for entry in fake.log] == [(200, None), (200, "overloaded")]


def test_a_whole_answer_cut_after_its_headers() -> None:
    with serving() as (fake, _), plain(fake) as connection:
        fake.fail(Failure.cut(after=0))
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": HI}), BEARER)
        response = connection.getresponse()
        assert response.status == 200
        with pytest.raises(IncompleteRead) as raised:
            response.read()
        assert raised.value.partial == b""


def test_an_async_stream_cut_before_its_first_byte() -> None:
    async def use(url: str) -> None:
        async with openai.AsyncOpenAI(api_key="sk-a", base_url=url, max_retries=0) as client:
            stream = await client.chat.completions.create(model="m", messages=HI, stream=True)
            with pytest.raises(openai.APIConnectionError):
                await anext(aiter(stream))

    with serving() as (fake, _):
        fake.fail(Failure.cut(after=0))
        asyncio.run(use(fake.url))


def test_failures_may_be_meant_for_one_thing_or_for_all() -> None:
    with serving() as (fake, client):
        one, two = (client.files.create(file=b"x", purpose="batch").id for _ in range(2))
        fake.fail(Failure.server_error(), path=f"/files/{one}")
        fake.fail(Failure.server_error(), path="/v1/files/{id}/content")
        client.files.retrieve(two)
        client.files.list()
        for call in (lambda: client.files.retrieve(one), lambda: client.files.content(two)):
            with pytest.raises(openai.InternalServerError):
                call()


# what headers tell of limits

STYLES: dict[RateHeaders, dict[str, str]] = {
    "openai": {
        "limit-requests": "10",
        "remaining-requests": "9",
        "reset-requests": "1m0s",
        "limit-tokens": "100",
        "remaining-tokens": "99",
        "reset-tokens": "1m0s",
    },
    "groq": {
        "limit-requests": "200",
        "remaining-requests": "199",
        "reset-requests": "24h0m0s",
        "limit-tokens": "100",
        "remaining-tokens": "99",
        "reset-tokens": "1m0s",
    },
    "azure": {
        "limit-requests": "10",
        "remaining-requests": "9",
        "limit-tokens": "100",
        "remaining-tokens": "99",
    },
    "none": {},
}


@pytest.mark.parametrize("style", get_args(RateHeaders))
def test_headers_of_limits(style: RateHeaders) -> None:
    limit = Limit(rpm=10, rpd=200, tpm=100, tpd=5000, rule="sliding")
    with serving(limits=limit, rate_headers=style) as (_, client):
        assert told(client) == STYLES[style]


def test_groq_tells_nothing_of_a_minutes_requests() -> None:
    with serving(limits=Limit(rpm=1, tpd=100, rule="sliding"), rate_headers="groq", minute_s=FOREVER_S) as (_, client):
        assert not told(client)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
        assert "retry-after" in raised.value.response.headers


def test_headers_of_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="rate_headers is one of openai, groq"):
        FakeOpenAI(keys=["sk-a"], rate_headers="anthropic")  # type: ignore[arg-type]


# somebody else


def test_what_somebody_else_spends_is_seen_in_headers_and_refusals() -> None:
    limit = Limit(rpm=10, rpd=50, tpm=100, rule="sliding")
    with serving(limits=limit, models={"gpt-4o*": limit}) as (fake, client):
        fake.spend("org-1", "gpt-4o-mini", requests=4, tokens=30)
        assert (told(client)["remaining-requests"], told(client)["remaining-tokens"]) == ("5", "68")
        assert told(client.with_options(api_key="sk-b"))["remaining-requests"] == "9"
        assert headers_of(client, "o3")["x-ratelimit-remaining-requests"] == "9"
        fake.spend("org-1", "gpt-4o", requests=1000)
        with pytest.raises(openai.RateLimitError, match="Limit 10, Used 10, Requested 1"):
            ask(client)
        assert len(fake.log) == 5


def test_what_somebody_else_cannot_have_is_not_spent() -> None:
    with serving(limits=Limit(rpm=10, rpd=50), minute_s=FOREVER_S, day_s=FOREVER_S) as (fake, client):
        fake.spend("org-1", "gpt-4o", requests=1000)
        with pytest.raises(openai.RateLimitError, match=r"\(RPM\): Limit 10, Used 10"):
            ask(client)
        with pytest.raises(ValueError, match="org-9"):
            fake.spend("org-9", "gpt-4o", requests=1)
        with pytest.raises(ValueError, match="negative"):
            fake.spend("org-1", "gpt-4o", tokens=-1)


# in another process


def test_a_process_has_all_this_too() -> None:
    with (
        FakeProcess(
            keys={"sk-a": "org-1"},
            limits=Limit(rpm=5, rpd=9, rule="sliding"),
            organizations={"org-1": "acme"},
            rate_headers="groq",
            gzip=True,
        ) as fake,
        openai.OpenAI(api_key="sk-a", base_url=fake.url, max_retries=0) as client,
    ):
        fake.spend("org-1", "gpt-4o", requests=2)
        headers = headers_of(client)
        assert (headers["openai-organization"], headers["content-encoding"]) == ("acme", "gzip")
        assert headers["x-ratelimit-remaining-requests"] == "6"
        fake.fail(Failure.cut(after=1))
        stream = iter(ask(client, stream=True))
        assert next(stream)
        with pytest.raises(openai.APIConnectionError):
            next(stream)
        client.files.list()
        assert [entry.method for entry in fake.log] == ["POST", "POST", "GET"]
        with pytest.raises(RuntimeError, match="org-9"):
            fake.spend("org-9", "gpt-4o")


def test_the_command_line_has_all_this_too() -> None:
    command = [sys.executable, "-m", "stable_openai.testing", "--keys", "sk-a=org-1,sk-b", "--rpm", "9"]
    command += ["--organizations", "org-1=acme,sk-b=", "--rate-headers", "azure", "--gzip"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            with openai.OpenAI(api_key="sk-a", base_url=url, max_retries=0) as client:
                headers = headers_of(client)
                assert (headers["openai-organization"], headers["content-encoding"]) == ("acme", "gzip")
                assert told(client) == {"limit-requests": "9", "remaining-requests": "7"}
                assert "openai-organization" not in headers_of(client.with_options(api_key="sk-b"))
        finally:
            child.kill()
