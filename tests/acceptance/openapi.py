"""Valid requests for every operation of an OpenAPI 3.1 document, as small as its schemas allow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

METHODS = ("get", "put", "post", "delete", "options", "head", "patch")
_BOUNDARY = "between-the-parts"
FILE = b"\x00\x01\r\n--not-a-boundary\r\n\xff\xfe"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """A request: `options` are those of `httpx.Client.request`. `produces` are the media types of its responses."""

    method: str
    path: str
    options: Json
    produces: frozenset[str]


def operations(document: Json) -> Iterator[Operation]:
    """Every operation of the document, with the parameters and the body that it requires."""
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield _operation(document, path, method, item)


def _operation(document: Json, path: str, method: str, item: Json) -> Operation:
    asked = item[method]
    options: Json = {"params": [], "headers": {}}
    for parameter in [*item.get("parameters", ()), *asked.get("parameters", ())]:
        parameter = _resolved(document, parameter)
        value = parameter.get("example", _instance(document, parameter.get("schema", {})))
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", str(value))
        elif parameter["in"] == "query" and parameter.get("required"):
            options["params"].append((parameter["name"], value))
    path, _, query = path.partition("?")
    options["params"] += [pair.split("=") for pair in query.split("&") if pair]
    body = _resolved(document, asked.get("requestBody", {})).get("content", {})
    answers = [_resolved(document, answer) for answer in asked["responses"].values()]
    produces = frozenset(media for answer in answers for media in answer.get("content", ()))
    return Operation(method.upper(), path, options | _body(document, body), produces)


def _body(document: Json, content: Mapping[str, Json]) -> Json:
    if not content:
        return {}
    media = min(content, key=lambda name: name != "application/json")
    value = _instance(document, content[media].get("schema", {}))
    if media == "application/json":
        return {"json": value}
    if media == "multipart/form-data":
        files = [_part(name, field) for name, field in value.items()]
        return {"files": files, "headers": {"content-type": f"{media}; boundary={_BOUNDARY}"}}
    return {"content": FILE, "headers": {"content-type": media}}


def _part(name: str, value: object) -> tuple[str, tuple[str | None, str | bytes]]:
    if isinstance(value, bytes):
        return name, ("Übersicht.bin", value)
    return name, (None, value if isinstance(value, str) else json.dumps(value))


def _resolved(document: Json, node: Json) -> Json:
    while "$ref" in node:
        names = node["$ref"].removeprefix("#/").split("/")
        node = reduce(lambda place, name: place[name], names, document)
    return node


def _instance(document: Json, schema: Json) -> Any:
    """A value that the schema accepts: the first alternative of each choice, and what is required."""
    schema = _resolved(document, schema)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    choice = next((schema[name][0] for name in ("oneOf", "anyOf") if name in schema), None)
    parts = [*schema.get("allOf", ()), *([choice] if choice is not None else ())]
    if not parts:
        return _plain(document, schema)
    values = [_instance(document, part) for part in parts]
    if not isinstance(values[-1], dict):
        return values[-1]
    own = _plain(document, {**schema, "type": "object"})
    return reduce(lambda whole, value: whole | value, values, own)


def _plain(document: Json, schema: Json) -> Any:
    kind = schema.get("type", "object")
    if isinstance(kind, list):
        kind = kind[0]
    match kind:
        case "array":
            return [_instance(document, schema.get("items", {}))] * schema.get("minItems", 1)
        case "integer" | "number":
            return max(1, schema.get("minimum", 1))
        case "string":
            return _string(schema)
        case "object":
            known = schema.get("properties", {})
            required = [name for name in schema.get("required", ()) if name in known]
            return {name: _instance(document, known[name]) for name in required}
        case _:
            return {"boolean": True, "null": None}[kind]


def _string(schema: Json) -> str | bytes:
    if schema.get("format") == "binary":
        return FILE
    example = schema.get("example")
    return example if isinstance(example, str) else "text" * (1 + schema.get("minLength", 0) // 4)
