"""What the clients are made of and that does no I/O: how a request is addressed, what an answer's body says."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_openai import ConfigurationError, Exhausted, Key, NoKeys, RequestTooLarge
from stable_openai._endpoint import addressed, read_request
from stable_openai._estimate import Estimate, Outputs
from stable_openai._transport import _as_openai
from stable_openai._usage import Tail, last_error, tokens_used
from stable_openai._wire import http

OPENAI = http.URL("https://api.openai.com/v1/")
AZURE = http.URL("https://mine.openai.azure.com/openai/")
DEPLOYED = http.URL("https://mine.openai.azure.com/openai/deployments/d1/")
VERSION = "2024-10-21"


def request(url: str, body: dict[str, Any] | None = None, *, azure: bool = False, **options: Any) -> Any:
    headers = {"api-key": "token"} if azure else {"Authorization": "Bearer token"}
    if body is not None:
        options["json"] = body
    return http.Request("POST", url, headers=headers, **options)


def sent(made: Any, base: Any, key: Key) -> Any:
    return addressed(made, read_request(made, base), key, http)


CASES = {
    "the client's own endpoint": (
        request(f"{OPENAI}chat/completions", {"model": "gpt-4o"}),
        OPENAI,
        {},
        f"{OPENAI}chat/completions",
        "gpt-4o",
    ),
    "an endpoint of the key": (
        request(f"{OPENAI}chat/completions?x=1", {"model": "gpt-4o"}),
        OPENAI,
        {"base_url": "https://host/api/v1", "models": {"gpt-4o": "large"}},
        "https://host/api/v1/chat/completions?x=1",
        "large",
    ),
    "a query in the key's endpoint": (
        request(f"{OPENAI}embeddings", {"model": "e"}),
        OPENAI,
        {"base_url": "https://host/v1?team=a"},
        "https://host/v1/embeddings?team=a",
        "e",
    ),
    "a deployment, from OpenAI's client": (
        request(f"{OPENAI}chat/completions", {"model": "gpt-4o"}),
        OPENAI,
        {"base_url": "https://other.openai.azure.com", "api_version": VERSION, "models": {"gpt-4*": "my dep"}},
        f"https://other.openai.azure.com/openai/deployments/my%20dep/chat/completions?api-version={VERSION}",
        "my dep",
    ),
    "what is no deployment's": (
        request(f"{OPENAI}responses", {"model": "gpt-4o"}),
        OPENAI,
        {"base_url": "https://other.openai.azure.com/openai", "api_version": VERSION},
        f"https://other.openai.azure.com/openai/responses?api-version={VERSION}",
        "gpt-4o",
    ),
    "OpenAI's endpoint, from Azure's client": (
        request(f"{AZURE}deployments/gpt-4o/chat/completions?api-version=old", {"model": "gpt-4o"}, azure=True),
        AZURE,
        {"base_url": "https://api.openai.com/v1"},
        "https://api.openai.com/v1/chat/completions",
        "gpt-4o",
    ),
    "another resource, from a client of one deployment": (
        request(f"{DEPLOYED}chat/completions?api-version=old", {"model": "d1"}, azure=True),
        DEPLOYED,
        {"base_url": "https://other.openai.azure.com", "api_version": VERSION, "models": {"d1": "d2"}},
        f"https://other.openai.azure.com/openai/deployments/d2/chat/completions?api-version={VERSION}",
        "d2",
    ),
    "another deployment of the client's own resource": (
        request(f"{AZURE}deployments/gpt-4o/embeddings?api-version=1", {"model": "gpt-4o"}, azure=True),
        AZURE,
        {"models": {"gpt-4o": "mine"}},
        f"{AZURE}deployments/mine/embeddings?api-version=1",
        "mine",
    ),
}


@pytest.mark.parametrize(("made", "base", "options", "url", "model"), CASES.values(), ids=CASES)
def test_where_a_request_goes(made: Any, base: Any, options: dict[str, Any], url: str, model: str) -> None:
    key = Key("sk-secret", **options)
    got = sent(made, base, key)
    assert str(got.url) == url
    assert json.loads(got.read())["model"] == model
    azure = key.api_version is not None or ("api-key" in made.headers and not key.base_url)
    name, value = ("api-key", "sk-secret") if azure else ("authorization", "Bearer sk-secret")
    assert [(n, v) for n, v in got.headers.items() if "sk-secret" in v] == [(name, value)]
    assert got.headers["host"] == got.url.netloc.decode()
    assert int(got.headers["content-length"]) == len(got.read())
    assert "sk-secret" not in str(made.headers.raw)


def test_a_form_is_read_without_its_files_and_renamed() -> None:
    class Unread(io.BytesIO):
        reads = 0

        def read(self, *args: Any) -> bytes:
            self.reads += 1
            return super().read(*args)

    file = Unread(b"x" * 100_000)
    made = request(
        f"{OPENAI}audio/transcriptions", data={"language": "en", "model": "whisper"}, files={"file": ("a.wav", file)}
    )
    asked = read_request(made, OPENAI)
    assert (asked.model, asked.body, asked.path, file.reads) == ("whisper", None, "audio/transcriptions", 0)
    key = Key("sk-a", base_url="https://host/v1", models={"whisper": "w-2"})
    for _ in range(2):  # it is sent again to another key
        got = addressed(made, asked, key, http)
        body = got.read()
        assert b'name="model"\r\n\r\nw-2\r\n' in body
        assert int(got.headers["content-length"]) == len(body)
        assert body.count(b"x" * 100_000) == 1


def test_a_key_without_an_endpoint_is_at_home() -> None:
    """A client that was bound to a lease shows the endpoint of its key, and leases others later."""
    elsewhere = http.URL("https://host/api/v1/")
    made = request(f"{elsewhere}chat/completions", {"model": "gpt-4o"})
    asked = read_request(made, elsewhere, OPENAI)
    got = addressed(made, asked, Key("sk-a"), http)
    assert (str(got.url), got.headers["host"]) == (f"{OPENAI}chat/completions", "api.openai.com")
    got = addressed(made, asked, Key("sk-b", base_url="https://host/api/v1"), http)
    assert (str(got.url), got.headers["host"]) == (f"{elsewhere}chat/completions", "host")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b'{"model": 7}'])
def test_a_body_without_sense_is_passed_on(content: bytes) -> None:
    made = http.Request(
        "POST", f"{OPENAI}x", headers={"Content-Type": "application/json", "Authorization": "t"}, content=content
    )
    assert read_request(made, OPENAI).model == ""
    assert sent(made, OPENAI, Key("sk-a", models={"gpt-4o": "x"})).read() == content


def test_names_that_a_key_gives_models() -> None:
    key = Key("sk-a", models={"gpt-4o": "one", "gpt-*": "many"})
    assert [key.called(name) for name in ("gpt-4o", "gpt-5", "o1", "")] == ["one", "many", "o1", ""]
    for options in ({"models": {"a": ""}}, {"models": {"a": 1}}, {"api_version": "x"}, {"api_version": 1}):
        with pytest.raises(ConfigurationError):
            Key("sk-a", **options)  # type: ignore[arg-type]


ANSWERS = {
    b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}': 7,
    b'{"usage": {"input_tokens": 3, "output_tokens": 4}}': 7,
    b'{"usage" : {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 1}, "total_tokens": 9}, "user": 1}': 9,
    b'data: {"usage": {"total_tokens": 5}}\n\ndata: {"choices": [], "usage": null}\n\ndata: [DONE]': 5,
    b'data: {"choices": [], "usage": null}': None,
    b'{"content": "\\"usage\\": {\\"total_tokens\\": 5}"}': None,
    b'{"usage": {"total_tokens": 5}, "content": "say \\"usage\\": {\\"total_tokens\\": 9}"}': 5,
    b'{"usage": {"total_tokens": -1}}': None,
    b'{"usage": {"total_tokens": true}}': None,
    b'{"usage": {"total_tokens": 1e3}}': None,
    b'{"usage": {"total_tokens": 99999999999999999}}': None,
    b'{"usage": "much"}': None,
    b'{"usage": {"total_tokens"': None,
    b'"usage"': None,
    b"": None,
}


@pytest.mark.parametrize(("text", "tokens"), ANSWERS.items())
def test_the_tokens_that_an_answer_says(text: bytes, tokens: int | None) -> None:
    assert tokens_used(text) == tokens


@given(st.binary() | st.text().map(str.encode))
def test_no_body_breaks_a_worker(text: bytes) -> None:
    for found in (tokens_used(text), tokens_used(b'{"usage": ' + text), tokens_used(b'"usage":{' + text)):
        assert found is None or 0 <= found <= 10**12
    last_error(text), last_error(b'data: {"error": ' + text)
    for encoding in ("", "gzip", "deflate", "br"):
        tail = Tail(encoding)
        tail.add(text)
        tail.text(), tail.is_done()


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.sampled_from(["", "gzip", "deflate"]))
def test_the_end_of_a_body_however_it_is_cut(chunks: list[bytes], encoding: str) -> None:
    text = b"".join(chunks) + b"data: [DONE]\n\n"
    body = {"": text, "gzip": gzip.compress(text), "deflate": zlib.compress(text)}[encoding]
    tail = Tail(encoding)
    for at in range(0, len(body), 7):
        tail.add(body[at : at + 7])
    assert tail.text() == text
    assert tail.is_done()


def test_what_is_kept_of_a_long_stream_is_bounded() -> None:
    tail = Tail()
    for _ in range(1000):
        tail.add(b"x" * 1000)
    tail.add(b"data: [DONE]\n\n")
    assert len(tail.text()) == 65_536
    assert sum(map(len, tail._parts)) <= 3 * 65_536
    assert tail.is_done()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'data: {"error": {"code": "slow_down"}}\n\n', {"code": "slow_down"}),
        (
            b'data: {}\n\nevent: error\ndata: {"type": "error", "code": "x"}\n\n',
            None,
        ),  # no member "error": the type says it
        (b'data: {"type": "error", "error": {"code": "x"}}\n\n', {"code": "x"}),
        (b'data: {"error": {"code": "x"}}\n\ndata: {"choices": []}\n\n', None),
        (b'data: {"choices": [{"delta": {"content": "\\"error\\""}}]}\n\n', None),
        (b'data: {"error": "text"}\n\n', None),
        (b"data: [DONE]\n\n", None),
    ],
)
def test_an_error_that_ends_a_stream(text: bytes, error: dict[str, Any] | None) -> None:
    found = last_error(text)
    if b'"type": "error", "code"' in text:
        assert found is not None
        assert found["code"] == "x"
    else:
        assert found == error


def test_the_estimate_learns_and_never_goes_above_the_requests_own_limit() -> None:
    outputs = Outputs()
    assert outputs.reserved(Estimate(10, None), by_use=False) == 10
    for tokens in [100, 110, 90, 105, 95, 100, 100, 100, 100, 100]:
        outputs.note(tokens)
    assert 110 <= outputs.reserved(Estimate(10, None), by_use=False) <= 150
    assert outputs.reserved(Estimate(10, 5), by_use=True) == 15
    assert outputs.reserved(Estimate(10, 4000), by_use=True) <= 150
    assert outputs.reserved(Estimate(10, 4000), by_use=False) == 4000  # as OpenAI counts


@given(st.lists(st.integers(0, 10**6), max_size=50), st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_estimate_is_bounded(tokens: list[int], prompt: int, output: int) -> None:
    outputs = Outputs()
    for one in tokens:
        outputs.note(one)
    for by_use in (False, True):
        assert 1 <= outputs.reserved(Estimate(prompt, output), by_use=by_use) <= max(1, prompt + output)


def test_a_path_stays_as_it_is_encoded() -> None:
    made = http.Request("GET", f"{OPENAI}models/..%2Fa%3Fb%23c%25", headers={"Authorization": "Bearer token"})
    got = sent(made, OPENAI, Key("sk-a", base_url="https://host/v1"))
    assert got.url.raw_path == b"/v1/models/..%2Fa%3Fb%23c%25"


def test_the_headers_of_the_clients_own_account_stay_at_its_host() -> None:
    own = {"OpenAI-Organization": "org-1", "OpenAI-Project": "p", "Cookie": "a=b", "X-Mine": "1"}
    made = http.Request("GET", f"{OPENAI}models", headers={"Authorization": "Bearer token", **own})
    got = sent(made, OPENAI, Key("sk-a", base_url="https://host/v1"))
    assert {name for name in own if name in got.headers} == {"X-Mine"}
    assert {name for name in own if name in sent(made, OPENAI, Key("sk-a")).headers} == {*own}


def test_errors_travel_between_processes() -> None:
    for error in (
        Exhausted("m", retry_after=1.5, reason="rpm", key="a"),
        NoKeys("m", keys={"a": "b"}, retry_after=None, reason="401"),
        ConfigurationError("field", "is wrong"),
        _as_openai(RequestTooLarge("m", tokens=3, limit="tpm")),
    ):
        same = pickle.loads(pickle.dumps(error))
        assert isinstance(error, type(same))
        assert (str(same), same.__dict__) == (str(error), error.__dict__)
