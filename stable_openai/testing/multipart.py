"""A form as clients post files: multipart/form-data. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from email.message import Message


@dataclass(frozen=True, slots=True)
class Upload:
    """A file in a form."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a form; of several with one name, the last."""

    fields: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)


def parse_form(content_type: str, body: bytes) -> Form | None:
    """The form in a request's body; None if it is not one. Raises ValueError for text that is not UTF-8."""
    kind = _header("content-type", content_type)
    boundary = kind.get_param("boundary")
    if kind.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        return None
    form = Form()
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        return None
    for part in pieces[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        disposition = next(
            (line for line in head.decode().split("\r\n") if line.lower().startswith("content-disposition:")), ""
        )
        about = _header("content-disposition", disposition.partition(":")[2])
        name = about.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            return None
        filename = about.get_filename()
        if filename is None:
            form.fields[name] = content.decode()
        else:
            form.uploads[name] = Upload(filename, content)
    return form


def _header(name: str, value: str) -> Message:
    message = Message()
    message[name] = value.strip()
    return message
