"""What a request wants in place of an echo: a call of one of its functions, or JSON after a schema. Pure."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

# The formats that pydantic and openai's helpers write.
FORMATS = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "duration": "PT0S",
    "email": "a@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "hostname": "example.com",
}

BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}


class Unsatisfiable(ValueError):
    """A schema of which no value was found: only an endless one would do, or no number is in its range."""


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function that the answer calls; `arguments` is JSON."""

    name: str
    arguments: str


def function_call(body: Json) -> FunctionCall | None:
    """The call that `tool_choice` forces: of the function it names, or of the first if any is required.

    Knows the shapes of chat and of responses. Raises Unsatisfiable.
    """
    tools = [tool for tool in body.get("tools") or () if isinstance(tool, dict) and tool.get("type") == "function"]
    functions: list[Json] = [tool.get("function", tool) for tool in tools]
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        name = choice.get("function", choice).get("name")
        functions = [function for function in functions if function["name"] == name]
    elif choice != "required":
        return None
    if not functions:
        return None
    return FunctionCall(functions[0]["name"], json.dumps(minimal(functions[0].get("parameters") or {})))


def structured(body: Json) -> str | None:
    """The least JSON after the schema that the request gives (`{}` if it wants any JSON); None if it wants none.

    Knows `response_format` of chat and `text.format` of responses. Raises Unsatisfiable.
    """
    text = body.get("text")
    wanted = text.get("format") if isinstance(text, dict) else body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_schema", "json_object"):
        return None
    schema = wanted.get("json_schema", wanted).get("schema")
    return json.dumps(minimal(schema) if schema else {})


def minimal(schema: Json) -> Any:
    """A small value that satisfies a JSON schema: only what is required, nulls, zeros, empty strings and lists.

    Knows no patterns, and of `not` and conditions nothing. Raises Unsatisfiable.
    """
    return _minimal(schema, schema, frozenset())


def _minimal(schema: Json, root: Json, under: frozenset[str]) -> Any:
    """`under`: the references that this is a part of. A least value never has itself as a part."""
    if reference := schema.get("$ref"):
        if reference in under:
            raise Unsatisfiable(f"endless: {reference}")
        return _minimal(_resolved(root, reference) | _without(schema, "$ref"), root, under | {reference})
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for name in ("anyOf", "oneOf"):
        if schema.get(name):
            return _first(({**_without(schema, name), **option} for option in schema[name]), root, under)
    if schema.get("allOf"):
        return _minimal(_merged([_without(schema, "allOf"), *schema["allOf"]], root), root, under)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = "null" if "null" in kind else kind[0]
    match kind:
        case "null":
            return None
        case "boolean":
            return False
        case "integer" | "number":
            return _number(schema)
        case "array":
            items = [*schema.get("prefixItems", ())]
            items += [schema.get("items") or {}] * (schema.get("minItems", 0) - len(items))
            return [_minimal(item, root, under) for item in items]
        case "object":
            properties = schema.get("properties", {})
            return {name: _minimal(properties.get(name, {}), root, under) for name in schema.get("required", ())}
        case _:
            return FORMATS.get(schema.get("format", ""), "").ljust(schema.get("minLength", 0), "x")


def _first(options: Iterable[Json], root: Json, under: frozenset[str]) -> Any:
    """The value of the first option that has one; null before all others."""
    for option in sorted(options, key=lambda option: option.get("type") != "null"):
        try:
            return _minimal(option, root, under)
        except Unsatisfiable:
            continue
    raise Unsatisfiable("no option has an end")


def _number(schema: Json) -> Any:
    """0, or else a number beside an edge of its range, a multiple where one is wanted, or else one in the middle."""
    bounds = [(compare, schema[name]) for name, compare in BOUNDS.items() if name in schema]
    edges = [edge for _, edge in bounds]
    step = schema.get("multipleOf", 1)
    values = [0, *(edge // step * step + by for edge in edges for by in (0, step, -step))]
    if schema["type"] == "integer":
        values = [int(value) for value in values]
    elif edges:
        values.append(sum(edges) / len(edges))
    for value in values:
        if all(compare(value, edge) for compare, edge in bounds):
            return value
    raise Unsatisfiable(f"no number found for {schema}")


def _merged(schemas: list[Json], root: Json) -> Json:
    """One schema in place of several that hold together."""
    merged: Json = {}
    for schema in schemas:
        if "$ref" in schema:
            schema = _resolved(root, schema["$ref"]) | _without(schema, "$ref")
        merged |= schema | {
            "properties": merged.get("properties", {}) | schema.get("properties", {}),
            "required": [*merged.get("required", ()), *schema.get("required", ())],
        }
    return {name: value for name, value in merged.items() if value not in ({}, [])}


def _resolved(root: Json, reference: str) -> Json:
    node: Any = root
    for step in reference.removeprefix("#").split("/"):
        if step:
            node = node[step.replace("~1", "/").replace("~0", "~")]
    found: Json = node
    return found


def _without(schema: Json, name: str) -> Json:
    return {key: value for key, value in schema.items() if key != name}
