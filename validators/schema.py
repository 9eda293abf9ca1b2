"""JSON Schemas compiled to run within bounds: nothing is fetched, patterns are linear, work is known beforehand.

A schema may come from a client, and a few lines of it can ask for exponential work (`anyOf` of two references, thirty
times over), so its size is measured with every reference unfolded before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, cast

import jsonschema_rs

from validators.base import JSON, MAX_FINDINGS

#: Subschemas after unfolding references. The largest schema OpenAI accepts has 5,000 properties.
MAX_SIZE = 50_000
#: Subschemas times characters of the document: about a second of work at worst.
MAX_WORK = 200_000_000
#: The same for explaining, which is a thousand times dearer than deciding.
_MAX_EXPLAIN_WORK = 250_000
_MAX_DEPTH = 200
_MAX_MESSAGE_CHARS = 300
_MAX_PATTERN_BYTES = 1 << 20

_IN_PLACE = (
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "dependentSchemas",
    "dependencies",
)
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_CHILDREN = (
    "properties",
    "patternProperties",
    "additionalProperties",
    "propertyNames",
    "items",
    "prefixItems",
    "additionalItems",
    "contains",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_MAPS = ("dependentSchemas", "dependencies", "properties", "patternProperties")
_BRANCHES = (
    "anyOf",
    "oneOf",
    "not",
    "if",
    "contains",
    "dependentSchemas",
    "dependencies",
    "propertyNames",
)


class Problem(NamedTuple):
    """A place in a document that breaks a schema: path, what is wrong, and the keyword that says so."""

    path: tuple[str | int, ...]
    message: str
    keyword: str


class _Measure:
    """How many subschemas a schema has with its references unfolded, capped; a cycle is unfolded once.

    `recursive`: there is a cycle. `branches`: a keyword tries alternatives. `foreign`: a reference was not followed.
    """

    def __init__(self, document: object) -> None:
        self.recursive = self.branches = self.foreign = False
        self._root = document
        self._names: dict[str, object] = {}
        self._sizes: dict[tuple[int, int | None], int] = {}
        self._under_way: set[tuple[int, int | None]] = set()
        self._index(document)

    def size(self, node: object, levels: int | None = None, depth: int = 0) -> int:
        """Subschemas from `node` on. With `levels`, those that documents nested no deeper can reach, cycles repeated."""
        if not isinstance(node, dict):
            return 1
        key = id(node), levels
        if key in self._under_way:
            self.recursive = True
            return 1
        if depth > _MAX_DEPTH:
            return MAX_SIZE + 1
        if key not in self._sizes:
            self._under_way.add(key)
            total = 1
            for child, is_below in self._subschemas(node):
                if is_below and levels == 0:
                    continue
                below = levels - 1 if is_below and levels is not None else levels
                total = min(total + self.size(child, below, depth + 1), MAX_SIZE + 1)
            self._under_way.discard(key)
            self._sizes[key] = total
        return self._sizes[key]

    def _subschemas(self, node: Mapping[str, object]) -> Iterator[tuple[object, bool]]:
        """Subschemas and referred ones, each with whether it applies to what is below the value at hand."""
        for keyword in node:
            self.branches |= keyword in _BRANCHES
            value = node[keyword]
            if keyword in _REFERENCES and isinstance(value, str):
                yield self._referred(value), False
            elif keyword in _MAPS and isinstance(value, dict):
                for child in value.values():
                    yield child, keyword in _CHILDREN
            elif keyword in _IN_PLACE or keyword in _CHILDREN:
                for child in value if isinstance(value, list) else (value,):
                    yield child, keyword in _CHILDREN

    def _referred(self, reference: str) -> object:
        if reference == "#":
            return self._root
        if reference.startswith("#/") and "%" not in reference:
            return self._pointed_at(reference[2:].split("/"))
        if reference in self._names:
            return self._names[reference]
        self.foreign |= not reference.startswith(
            ("https://json-schema.org/", "http://json-schema.org/")
        )
        return True

    def _pointed_at(self, steps: Sequence[str]) -> object:
        node = self._root
        for step in steps:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            else:
                self.foreign = True
                return True
        return node

    def _index(self, document: object) -> None:
        pending = [document]
        while pending:
            node = pending.pop()
            if isinstance(node, list):
                pending += node
            elif isinstance(node, dict):
                pending += node.values()
                for keyword in ("$anchor", "$dynamicAnchor"):
                    if isinstance(node.get(keyword), str):
                        self._names.setdefault(f"#{node[keyword]}", node)
                if isinstance(node.get("$id"), str):
                    self._names.setdefault(node["$id"], node)
                    # References inside are relative to it, which is more than is followed here.
                    self.foreign |= node is not document


class Schema:
    """A compiled schema; draft 2020-12 unless `$schema` names another.

    `registry` holds the documents that references may lead to besides the schema itself.

    Raises
    ------
    ValueError
        If it is no schema, refers to what is not there, has a pattern that needs look-around or back-references, or
        unfolds to more than `MAX_SIZE` subschemas; the message says where.
    """

    def __init__(
        self, schema: Mapping[str, object] | bool, registry: jsonschema_rs.Registry | None = None
    ) -> None:
        document = schema if isinstance(schema, bool) else dict(schema)
        try:
            self._validator = jsonschema_rs.validator_for(
                document,
                registry=registry,
                offline=True,
                mask="the value",
                pattern_options=jsonschema_rs.RegexOptions(size_limit=_MAX_PATTERN_BYTES),
            )
        except ValueError as error:
            raise ValueError(
                _explanation(cast("dict[str, JSON] | bool", document), error)
            ) from error
        self._document = document
        measure = _Measure(document)
        self._size = measure.size(document)
        self._recursive = measure.recursive
        self._branches = measure.branches
        self.foreign = measure.foreign
        if self._size > MAX_SIZE:
            raise ValueError(
                f"the schema unfolds to more than {MAX_SIZE} subschemas, or is nested more than {_MAX_DEPTH} deep;"
                " refer to each definition less often"
            )

    def accepts(self, document: JSON, size_chars: int) -> bool:
        """Whether a document, `size_chars` long as text, satisfies the schema.

        Raises
        ------
        ValueError
            If deciding could take more than about a second.
        """
        if self._size * size_chars > MAX_WORK:
            raise ValueError("schema and document are too large together to be checked")
        return self._validator.is_valid(document)

    def problems(self, document: JSON, size_chars: int) -> list[Problem]:
        """What is wrong with a document that is not accepted, at most `MAX_FINDINGS`, never quoting its values.

        All problems if finding them is cheap, else the first, else one without a place.
        """
        size = self._unfolded(document) if self._recursive else self._size
        if size * size_chars <= _MAX_EXPLAIN_WORK:
            errors = self._validator.iter_errors(document)
            return [_problem(error) for error in islice(errors, MAX_FINDINGS)]
        if not self._branches:
            try:
                self._validator.validate(document)
            except jsonschema_rs.ValidationError as error:
                return [_problem(error)]
        return [Problem((), "does not satisfy the schema; too large to say where", "schema")]

    def _unfolded(self, document: JSON) -> int:
        return _Measure(self._document).size(self._document, _depth(document))


def _problem(error: jsonschema_rs.ValidationError) -> Problem:
    message = error.message
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[:_MAX_MESSAGE_CHARS]}…"
    return Problem(tuple(error.instance_path), message, error.kind.name)


def _explanation(schema: dict[str, JSON] | bool, error: ValueError) -> str:
    """Where and why a schema is none, in the words of the reference implementation where it finds fault too."""
    # 3 MB and 0.1 s that only a schema with a fault is worth.
    import jsonschema  # noqa: PLC0415
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    reason = getattr(error, "message", None) or str(error)
    try:
        draft = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        worst = best_match(draft(draft.META_SCHEMA).iter_errors(schema))
    except (RecursionError, TypeError, AttributeError):
        worst = None
    if worst is not None:
        reason = f"{worst.message} at {worst.json_path}"
    elif reason.endswith('is not a "regex"'):
        reason = (
            f"{reason}: look-around, back-references and very large repetitions are not supported"
        )
    return f"not a usable JSON Schema: {reason[:_MAX_MESSAGE_CHARS]}"


def _depth(document: JSON) -> int:
    """How deep objects and arrays are nested; 0 for a scalar."""
    depth = 0
    level: list[JSON] = [document]
    while level := [
        child
        for value in level
        if isinstance(value, dict | list)
        for child in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
    return depth
