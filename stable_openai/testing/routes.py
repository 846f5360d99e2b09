"""Which endpoint a path means, whatever the base path before it: with or without /v1, a gateway's, Azure's. Pure.

Azure's classic paths name the API's version in the query, and some of them the model:

    /openai/deployments/{deployment}/chat/completions?api-version=...     and the others of DEPLOYED
    /openai/responses?api-version=...                                     and the others that name no model

Azure's newer ones (/openai/v1/...) are like OpenAI's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

DEPLOYED = ("/chat/completions", "/completions", "/embeddings", "/images/generations", "/audio/transcriptions")

POST, GET, GET_DELETE = ("POST",), ("GET",), ("GET", "DELETE")

METHODS = dict.fromkeys((*DEPLOYED, "/responses", "/moderations"), POST) | {
    "/files": ("GET", "POST"),
    "/models": GET,
    "/files/{id}": GET_DELETE,
    "/files/{id}/content": GET,
    "/models/{id}": GET,
    "/responses/{id}": GET_DELETE,
}

_COLLECTIONS = tuple(endpoint for endpoint in METHODS if "{id}" not in endpoint)
_DEPLOYMENT = re.compile(r".*/openai/deployments/([^/]+)(/.+)")
_ITEM = re.compile(r"(.*)/(files|models|responses)/([^/]+)(/content)?")


@dataclass(frozen=True, slots=True)
class Route:
    """What a path asks for. `endpoint` is one of METHODS, or "" if there is none.

    id: of the file, model or response, where the endpoint has one.
    deployment: Azure's name for the model, where the path has one.
    versioned: whether it is one of Azure's that need `api-version` in the query.
    """

    endpoint: str
    id: str | None = None
    deployment: str | None = None
    versioned: bool = False

    def covers(self, other: Route) -> bool:
        """Whether `other` is the same endpoint, of the same id; "{id}" stands for any."""
        return self.endpoint == other.endpoint and self.id in ("{id}", other.id)


def route_of(path: str) -> Route:
    """The route of a path without its query."""
    path = path.rstrip("/")
    if deployed := _DEPLOYMENT.fullmatch(path):
        endpoint = deployed[2] if deployed[2] in DEPLOYED else ""
        return Route(endpoint, deployment=unquote(deployed[1]), versioned=True)
    for endpoint in _COLLECTIONS:
        if path.endswith(endpoint):
            azure = path.endswith("/openai" + endpoint) and endpoint not in DEPLOYED
            return Route(endpoint, versioned=azure)
    if item := _ITEM.fullmatch(path):
        endpoint = f"/{item[2]}/{{id}}{item[4] or ''}"
        if endpoint in METHODS:
            return Route(endpoint, id=unquote(item[3]), versioned=item[1].endswith("/openai"))
    return Route("")
