"""What an account keeps at the upstream, files and responses; and the list of models. No I/O.

What one account made another is answered 404, as if it did not exist. Each shelf keeps its last KEPT things. Used by
the server's thread alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import parse_qsl

from .answers import Answer, Json, Work, json_answer
from .meters import SECOND_NS
from .multipart import Upload
from .refusals import refusal
from .responses import response, response_id
from .visits import Visit

KEPT = 1000
LISTED_MODELS = ("gpt-4o", "gpt-4o-mini", "text-embedding-3-small")

T = TypeVar("T")


class Shelf(Generic[T]):
    """Things by their id, oldest first, each of an account."""

    def __init__(self) -> None:
        self._things: OrderedDict[str, tuple[str | None, T]] = OrderedDict()

    def put(self, account: str | None, id: str, thing: T) -> None:
        self._things[id] = (account, thing)
        if len(self._things) > KEPT:
            self._things.popitem(last=False)

    def get(self, account: str | None, id: str | None) -> T | None:
        owner, thing = self._things.get(id or "", (None, None))
        return thing if owner == account else None

    def drop(self, id: str) -> None:
        del self._things[id]

    def all(self, account: str | None) -> list[T]:
        return [thing for owner, thing in self._things.values() if owner == account]


@dataclass(frozen=True, slots=True)
class File:
    """A file, as it is told of, and its bytes."""

    about: Json
    content: bytes


class Stored:
    """All files and responses, and the answers to those that ask for them."""

    def __init__(self, unknown_models: frozenset[str]) -> None:
        self._unknown_models = unknown_models
        self._files: Shelf[File] = Shelf()
        self._responses: Shelf[Work] = Shelf()

    def answer(self, visit: Visit) -> Answer:
        """The answer to a request that no model's limits are charged for."""
        match visit.request.method, visit.route.endpoint:
            case "GET", "/models":
                return json_answer({"object": "list", "data": [_model(name) for name in LISTED_MODELS]})
            case "GET", "/models/{id}":
                return self._one_model(visit.route.id or "")
            case "POST", "/files":
                return self._add_file(visit)
            case "GET", "/files":
                return self._list_files(visit)
            case _, "/responses/{id}":
                return self._one_response(visit)
            case _:
                return self._one_file(visit)

    def keep_response(self, account: str | None, work: Work) -> None:
        """Keep the response to a request, unless it says `store: false`."""
        if work.body.get("store", True):
            self._responses.put(account, response_id(work), work)

    def unknown_previous(self, visit: Visit) -> Answer | None:
        """400 where a request goes on from a response that its account does not have."""
        previous = visit.body.get("previous_response_id")
        if previous is None or self._responses.get(visit.account, str(previous)) is not None:
            return None
        return refusal(400, f"Previous response with id '{previous}' not found.", "previous_response_not_found")

    def _one_model(self, name: str) -> Answer:
        if name in self._unknown_models:
            return refusal(404, f"The model '{name}' does not exist", "model_not_found")
        return json_answer(_model(name))

    def _one_response(self, visit: Visit) -> Answer:
        found = self._responses.get(visit.account, visit.route.id)
        if found is None:
            return refusal(404, f"Response with id '{visit.route.id}' not found.", None)
        if visit.request.method == "DELETE":
            self._responses.drop(response_id(found))
            return json_answer({"id": response_id(found), "object": "response", "deleted": True})
        return json_answer(response(found))

    def _add_file(self, visit: Visit) -> Answer:
        assert visit.upload is not None
        made = _file(visit, visit.upload)
        self._files.put(visit.account, made.about["id"], made)
        return json_answer(made.about)

    def _list_files(self, visit: Visit) -> Answer:
        """A page of those of a purpose, newest first unless `order=asc`, that come after the file `after`."""
        query = dict(parse_qsl(visit.request.query))
        files = [file.about for file in self._files.all(visit.account)]
        if query.get("order") != "asc":
            files.reverse()
        files = [file for file in files if query.get("purpose") in (None, file["purpose"])]
        ids = [file["id"] for file in files]
        if "after" in query:
            if query["after"] not in ids:
                return _no_file(query["after"])
            files = files[ids.index(query["after"]) + 1 :]
        limit = query.get("limit", "10000")
        if not limit.isdecimal() or int(limit) < 1:
            return refusal(400, f"Invalid 'limit': {limit}", None)
        page = files[: int(limit)]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return json_answer({"object": "list", "data": page, "has_more": len(page) < len(files)} | ends)

    def _one_file(self, visit: Visit) -> Answer:
        found = self._files.get(visit.account, visit.route.id)
        if found is None:
            return _no_file(visit.route.id)
        if visit.route.endpoint == "/files/{id}/content":
            return Answer(200, (("content-type", "application/octet-stream"),), (found.content,))
        if visit.request.method == "DELETE":
            self._files.drop(found.about["id"])
            return json_answer({"id": found.about["id"], "object": "file", "deleted": True})
        return json_answer(found.about)


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fake"}


def _file(visit: Visit, upload: Upload) -> File:
    about = {
        "id": f"file-{visit.request_id[4:]}",
        "object": "file",
        "bytes": len(upload.content),
        "created_at": visit.at // SECOND_NS,
        "filename": upload.name,
        "purpose": visit.body["purpose"],
        "status": "processed",
    }
    return File(about, upload.content)


def _no_file(id: str | None) -> Answer:
    return refusal(404, f"No such File object: {id}", None)
