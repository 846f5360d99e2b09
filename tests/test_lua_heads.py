"""The head of each Lua verb against its body: what it says of KEYS and ARGV, and which names it uses.

A verb is a file with a KEYS line; what it runs is the prelude, the parts of its USES line, and itself. A head numbers
what KEYS and ARGV hold; after "then" follows what has no number of its own ("then for each request 5 more: ..").
"""

from __future__ import annotations

import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from stable_openai.backends.redis import script

LUA = Path(__file__).resolve().parents[1] / "lua"
FILES = sorted(path.stem for path in LUA.glob("*.lua"))
VERBS = [name for name in FILES if re.search(r"^-- KEYS ", (LUA / f"{name}.lua").read_text(), re.MULTILINE)]
LONGEST = 120

# What Redis gives to a script: https://redis.io/docs/latest/develop/programmability/lua-api/
GIVEN = frozenset([
    "KEYS", "ARGV", "redis", "cjson", "cmsgpack", "struct", "bit", "math", "string", "table", "assert", "error",
    "ipairs", "next", "pairs", "pcall", "select", "setmetatable", "getmetatable", "tonumber", "tostring", "type",
    "unpack", "xpcall",
])  # fmt: skip
RESERVED = frozenset([
    "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil", "not",
    "or", "repeat", "return", "then", "true", "until", "while",
])  # fmt: skip
TOKEN = re.compile(
    r"""(?P<skip>\s+|--\[(?P<c>=*)\[.*?\](?P=c)\]|--[^\n]*)
      |(?P<string>'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|\[(?P<s>=*)\[.*?\](?P=s)\])
      |(?P<number>0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][+-]?\d+)?)
      |(?P<name>[A-Za-z_]\w*)
      |(?P<sign>\.\.\.|\.\.|[=~<>]=|[-+*/%^\#=<>(){}\[\];:,.])""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    text: str
    place: str
    """File and line."""
    is_name: bool


@cache
def tokens(name: str) -> list[Token]:
    """The tokens of a file, without its comments."""
    text, at, found = (LUA / f"{name}.lua").read_text(), 0, []
    while at < len(text):
        match = TOKEN.match(text, at)
        line = 1 + text.count("\n", 0, at)
        place = f"{name}.lua:{line}"
        assert match, f"{place}: {text[at : at + 20]!r} is not Lua"
        if match.lastgroup != "skip":
            is_name = match.lastgroup == "name" and match[0] not in RESERVED
            found.append(Token(match[0], place, is_name))
        at = match.end()
    return found


@cache
def head(name: str) -> dict[str, str]:
    """The parts of a head, each on one line: USES, KEYS, ARGV and REPLY; "" is what stands before them."""
    lines = (LUA / f"{name}.lua").read_text().splitlines()
    found: dict[str, str] = {}
    word = ""
    for line in takewhile(lambda line: line.startswith("--"), lines):
        tag = re.match(r"-- ([A-Z]+) +(.+)", line)
        word, text = tag.groups() if tag else (word, line.removeprefix("--"))
        found[word] = f"{found.get(word, '')} {text.strip()}".strip()
    return found


def parts(verb: str) -> list[str]:
    """The files that a verb runs."""
    return ["prelude", *filter(None, head(verb).get("USES", "").split(", ")), verb]


def code(verb: str) -> str:
    return " ".join(token.text for part in parts(verb) for token in tokens(part))


def documented(verb: str, word: str) -> list[int]:
    """The numbers that a head explains, as in "1 pool, 2 class, 3 expiry"."""
    return [int(number) for number in re.findall(r"(?:^|[,;] )(\d+) (?=[a-z'])", head(verb)[word])]


def indexes(verb: str, word: str) -> set[int]:
    """The literal indexes that the code of a verb has for KEYS or ARGV."""
    return {int(number) for number in re.findall(rf"\b{word} \[ (\d+) \]", code(verb))}


def item_size(verb: str) -> int:
    """How many arguments each item of ARGV's tail has; 0: there is no tail."""
    tail = re.search(r"\bthen (?:for each \w+ (\d+) more)?", head(verb)["ARGV"])
    return int(tail[1] or 1) if tail else 0


class Names(NamedTuple):
    """What the names in a verb stand for, each with its place."""

    unknown: set[str]
    """Neither local nor given: globals."""
    declared: set[str]
    """Local variables and functions (not parameters, nor what begins with _)."""
    read: set[str]
    """Locals that are named again."""


@cache
def names(verb: str) -> Names:
    """One pass over the tokens of a verb with a stack of blocks: a local is known from its declaration to the end of
    its block. Generous in two ways: it is known in its own first value too, and one of a `repeat` after its `until`."""
    found = Names(set(), set(), set())
    stream = [token for part in parts(verb) for token in tokens(part)]
    blocks: list[tuple[str, dict[str, str]]] = [("file", {})]
    listing = ""  # new names follow: those of "local", "local function", "for" or a function's "parameters"
    for before, token, after in zip([stream[-1], *stream], stream, [*stream[1:], stream[0]]):
        text, kind = token.text, blocks[-1][0]
        if listing and token.is_name:
            home = f"{text} at {token.place}"
            blocks[-2 if listing == "local function" else -1][1][text] = home
            if listing.startswith("local"):
                if not text.startswith("_"):
                    found.declared.add(home)
                if after.text != ",":
                    listing = ""
        elif token.is_name:
            home = next((known[text] for _, known in reversed(blocks) if text in known), "")
            is_field = kind == "{" and before.text in ("{", ",", ";") and after.text == "="
            if before.text in (".", ":") or is_field:
                continue
            if home:
                found.read.add(home)
            elif text not in GIVEN:
                found.unknown.add(f"{text} at {token.place}")
        elif text == "local":
            listing = "local"
        elif text == "function":
            listing = "local function" if listing else ""
            blocks.append(("function", {}))
        elif text == "(" and kind == "function":
            listing, blocks[-1] = "parameters", ("body", blocks[-1][1])
        elif text == ")" and listing == "parameters":
            listing = ""
        elif text in ("for", "while"):
            listing = text if text == "for" else ""
            blocks.append(("loop", {}))
        elif text in ("=", "in") and listing == "for":
            listing = ""
        elif text == "do" and kind == "loop":
            blocks[-1] = ("body", blocks[-1][1])
        elif text in ("do", "then", "{"):
            blocks.append((text, {}))
        elif text in ("end", "}", "elseif"):
            blocks.pop()
        elif text == "else":
            blocks[-1] = ("else", {})
    assert len(blocks) == 1, f"{verb}: the blocks do not close"
    return found


def test_there_are_verbs() -> None:
    assert {"acquire", "settle", "renew", "register", "inspect", "admin"} <= set(VERBS)


def test_every_part_is_used_by_a_verb() -> None:
    assert {part for verb in VERBS for part in parts(verb)} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_first_line_says_what_it_is_for(name: str) -> None:
    assert re.match(rf"{name}\.lua: \w", head(name)[""])


@pytest.mark.parametrize("name", FILES)
def test_names_are_snake_case(name: str) -> None:
    case = re.compile("[a-z_][a-z0-9_]*|[A-Z][A-Z0-9_]*")
    assert not [token for token in tokens(name) if token.is_name and not case.fullmatch(token.text)]


def test_every_local_is_used() -> None:
    declared = {local for verb in VERBS for local in names(verb).declared}
    assert not declared - {local for verb in VERBS for local in names(verb).read}


@pytest.mark.parametrize("verb", VERBS)
class TestVerb:
    def test_is_short(self, verb: str) -> None:
        assert len((LUA / f"{verb}.lua").read_text().splitlines()) <= LONGEST

    def test_says_what_it_replies(self, verb: str) -> None:
        assert head(verb).get("REPLY")

    @pytest.mark.parametrize("word", ["KEYS", "ARGV"])
    def test_numbers_without_gaps(self, verb: str, word: str) -> None:
        assert documented(verb, word) == list(range(1, 1 + len(documented(verb, word)))) != []

    def test_keys(self, verb: str) -> None:
        assert indexes(verb, "KEYS") == set(documented(verb, "KEYS"))

    def test_more_keys(self, verb: str) -> None:
        if "then" in head(verb)["KEYS"]:
            assert "# KEYS" in code(verb)

    def test_arguments(self, verb: str) -> None:
        """Each that is explained is used; one beyond those is of the first item of the tail."""
        fixed = documented(verb, "ARGV")
        size = item_size(verb)
        used = indexes(verb, "ARGV")
        assert set(fixed) <= used <= set(range(1, 1 + len(fixed) + size))

    def test_more_arguments(self, verb: str) -> None:
        """A tail that is explained is read, one that is not is not; an item's size is the loop's step, and each of its
        parts is read there, or ahead of it for the first item."""
        size = item_size(verb)
        assert ("# ARGV" in code(verb)) == (size > 0)
        if size > 1:
            first = 1 + len(documented(verb, "ARGV"))
            assert f"= {first} , # ARGV , {size} do" in code(verb)
            looped = {int(offset or 0) for offset in re.findall(r"ARGV \[ i(?: \+ (\d+))? \]", code(verb))}
            ahead = {index - first for index in indexes(verb, "ARGV") if index >= first}
            assert looped | ahead == set(range(size))

    def test_has_no_globals(self, verb: str) -> None:
        assert not names(verb).unknown

    def test_is_lua(self, verb: str, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as client:
            assert client.script_load(script(verb)[0]) == script(verb)[1]
