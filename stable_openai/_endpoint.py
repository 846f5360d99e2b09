"""How a request that an openai client has built is made for a key: where to, under which name of the model.

The client builds a request for its own `base_url`. A key that has one of its own is sent the same request there:

    Key(base_url="https://host/v1")                             {base_url}/chat/completions
    Key(base_url="https://x.openai.azure.com", api_version=..)  {base_url}/openai/deployments/{model}/chat/completions
                                                                ?api-version=.. with the header `api-key`

So clients of either kind and keys of either kind go together. A key's `models={"gpt-4o": "my-deployment"}` says under
which name it knows a model. A secret is put only into a request for the host that is its key's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from stable_openai._keys import Key

__all__ = ["Asked", "addressed", "as_is", "read_request"]

DEPLOYMENT = re.compile(r"/deployments/[^/?]+")
FIELD = re.compile(rb'(name="model"\r\n\r\n)([^\r\n]+)')
# The endpoints of Azure that are a deployment's own; others stand beside the deployments.
OF_HOST = {b"host", b"cookie", b"openai-organization", b"openai-project"}  # of the client's own
OF_DEPLOYMENTS = ("completions", "embeddings", "audio", "images")


class Asked(NamedTuple):
    """What is known of a request: its model ("": none), its JSON (None: it has none), the base URL that it was built
    for, the path behind that, without a deployment, and the base URL of keys that have none of their own."""

    model: str
    body: dict[str, Any] | None
    base: str
    path: str
    home: str

    def elsewhere(self, key: Key) -> str | None:
        """The base URL of a key, where that is another than the request was built for."""
        base = key.base_url or self.home
        return base if base != self.base else None


def read_request(request: Any, base: Any, home: Any = None) -> Asked:
    """Read a request of httpx that was built for the base URL `base`; keys that have none of their own are at `home`
    (where that is another)."""
    full = request.url.path
    path = _without_deployment(request.url).removeprefix(_without_deployment(base).rstrip("/")).lstrip("/")
    kind = request.headers.get("content-type", "")
    body, model = None, None
    if kind.startswith("application/json"):
        try:
            found = json.loads(request.content)
        except Exception:  # not JSON, or not read: then nothing is known of it
            found = None
        if isinstance(found, dict):
            body, model = found, found.get("model")
    elif kind.startswith("multipart/form-data"):
        model = _model_of_form(request.stream)
    if not model:
        deployment = DEPLOYMENT.search(full)
        model = deployment and deployment.group().rpartition("/")[2]
    mine = str(base).rstrip("/")
    return Asked(model if isinstance(model, str) else "", body, mine, path, str(home).rstrip("/") if home else mine)


def _without_deployment(url: Any) -> str:
    """The path, encoded as it is."""
    return DEPLOYMENT.sub("", url.raw_path.decode("ascii").partition("?")[0])


def _model_of_form(stream: Iterable[bytes]) -> str | None:
    """The field `model` of a form. What comes before its first file is rendered, and no file is read for it."""
    try:
        found = FIELD.search(b"".join(_before_files(stream)))
    except Exception:
        return None
    return found.group(2).decode("utf-8", "replace") if found else None


def _before_files(form: Iterable[bytes]) -> Iterator[bytes]:
    for part in form:
        if b'filename="' in part:
            return
        yield part


def addressed(request: Any, asked: Asked, key: Key, http: Any) -> Any:
    """The request, made for a key: a new one, for what the user holds must not hold the secret.

    Args:
        http: httpx, or what follows it, of whoever sends it.
    """
    url, dropped = request.url, {b"authorization", b"api-key"}
    name, azure = key.called(asked.model), "api-key" in request.headers
    base = asked.elsewhere(key)
    if base is not None:
        azure = key.api_version is not None
        url, dropped = _place(url, base, key, asked.path, name, http), dropped | OF_HOST
    elif name != asked.model:
        url = DEPLOYMENT.sub(f"/deployments/{quote(name, safe='')}", str(url), count=1)
    if not isinstance(url, http.URL):
        url = http.URL(str(url))
    if name == asked.model:
        body = _body(request, http)
    else:
        body, dropped = _renamed(request, asked, name, http), dropped | {b"content-length"}
    headers = [row for row in request.headers.raw if row[0].lower() not in dropped]
    if b"host" in dropped:
        headers.append((b"Host", url.netloc))
    secret = key.secret.reveal().encode("ascii")
    headers.append((b"api-key", secret) if azure else (b"Authorization", b"Bearer " + secret))
    return _read(http.Request(request.method, url, headers=headers, extensions=request.extensions, **body), http)


def _place(url: Any, base: str, key: Key, path: str, name: str, http: Any) -> Any:
    """Where the endpoint of a key has a path."""
    base, _, own = base.partition("?")
    query = url.params.remove("api-version").merge(own) if own or url.query else url.params
    if key.api_version is not None:
        query = query.set("api-version", key.api_version)
        if name and (path.startswith("chat/completions") or path.partition("/")[0] in OF_DEPLOYMENTS):
            path = f"deployments/{quote(name, safe='')}/{path}"
        base = f"{base.removesuffix('/openai')}/openai"
    return http.URL(f"{base}/{path}?{query}" if query else f"{base}/{path}")


def as_is(request: Any, http: Any) -> Any:
    """The request, as one of another HTTP library."""
    if isinstance(request, http.Request):
        return request
    body = _body(request, http)
    return http.Request(
        request.method, str(request.url), headers=request.headers.raw, extensions=request.extensions, **body
    )


def _read(request: Any, http: Any) -> Any:
    """The request, its body read if it lies in memory: a hook or a transport of the user's may look at it."""
    if isinstance(request.stream, http.ByteStream):
        request.read()
    return request


def _body(request: Any, http: Any) -> dict[str, Any]:
    return {"stream": request.stream} if isinstance(request, http.Request) else {"content": b"".join(request.stream)}


def _renamed(request: Any, asked: Asked, name: str, http: Any) -> dict[str, Any]:
    """The body with another name of the model."""
    if asked.body is not None:
        return {"content": json.dumps({**asked.body, "model": name}).encode()}
    content = b"".join(request.stream)
    return {"content": FIELD.sub(lambda field: field.group(1) + name.encode(), content, count=1)}
