"""Answers compressed with gzip, for those who accept it. Pure."""

from __future__ import annotations

import zlib
from dataclasses import replace

from .answers import Answer

GZIP_WBITS = 31


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a request's `accept-encoding` names gzip, and not with q=0."""
    for item in accept_encoding.lower().split(","):
        coding, _, weight = item.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return not weight or weight.strip("0.") != ""
    return False


def gzipped(answer: Answer) -> Answer:
    """The same answer, compressed; each part can be decoded as soon as it is there."""
    if not any(answer.parts) or "content-encoding" in dict(answer.headers):
        return answer
    packer = zlib.compressobj(wbits=GZIP_WBITS)
    *parts, last = answer.parts
    packed = [packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH) for part in parts]
    packed.append(packer.compress(last) + packer.flush())
    return replace(answer, parts=tuple(packed), headers=(*answer.headers, ("content-encoding", "gzip")))
