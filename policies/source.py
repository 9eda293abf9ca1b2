"""YAML text to plain data, with the place of every key and value; bounded against hostile text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from validators import JSON

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
#: Characters of the document once every alias is written out, each value counting 40 more.
MAX_EXPANDED = 4_000_000

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something wrong in a file; `line` and `column` count from 1."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        """As `file:line:column: message`."""
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class PolicyError(ValueError):
    """A policy document is wrong. `problems` are sorted by place; `str()` has one on each line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Source:
    """A document as plain data, and where each part of it is written.

    `data` holds dicts with text keys, lists, text, numbers, booleans and None. `problems` are what
    is wrong with the YAML itself though it can be read (duplicate keys, values of kinds that have
    no use here); such parts are left out of `data`.

    Raises
    ------
    PolicyError
        If the text is not one YAML document, or exceeds MAX_BYTES, MAX_DEPTH or MAX_EXPANDED.
    """

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._text = text.removeprefix("\ufeff")
        self._keys: dict[Path, Node] = {}
        self._values: dict[Path, Node] = {}
        self._budget = MAX_EXPANDED
        root = self._compose(self._text)
        if root is None:
            raise PolicyError([Problem(file, 1, 1, "the file is empty")])
        self.data = self._convert(root, ())

    def problem(self, path: Path, message: str, *, key: bool = False) -> Problem:
        """A problem at a value or, with `key`, its key; at the enclosing one if there is none."""
        while path not in self._values:
            path, key = path[:-1], False
        node = self._values[path]
        is_blank = isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index
        if path in self._keys and (key or is_blank):
            node = self._keys[path]
        return self._at(node, message)

    def problem_inside(self, path: Path, line: int, column: int, message: str) -> Problem:
        """A problem at a line and column, from 1, of the text at `path`.

        Exact for text written on one line; at the start of the text for the others.
        """
        node = self._values[path]
        start, end = node.start_mark, node.end_mark
        if start.line != end.line or line != 1:
            return self._at(node, message)
        written = self._text[start.index : end.index]
        return Problem(
            self.file, start.line + 1, start.column + 1 + _offset(written, column - 1), message
        )

    def edited(self, path: Path, written: str) -> str:
        """The text with the value at `path`, of mappings alone, written so, all else as it was; a missing key is added to its mapping.

        Raises
        ------
        PolicyError
            If there is no mapping to add it to, or the place is shared by an alias, so that more would change.
        """
        node, text = self._values.get(path), self._text
        if node is not None and path:
            # A block starts on a line of its own.
            start, end = self._keys[path].end_mark.index, _end(node)
            new = f"{text[:start]}: {written}{text[end:]}"
        else:
            holder = self._values.get(path[:-1])
            if not isinstance(holder, MappingNode) or not holder.value:
                raise PolicyError([self.problem(path, f"write '{path[-1]}: {written}' here")])
            new = _added(text, holder, f"{path[-1]}: {written}")
        if Source(new, self.file).data != _with(self.data, path, Source(written, "").data):
            message = f"cannot be edited without changing more: write '{path[-1]}: {written}' here"
            raise PolicyError([self.problem(path, message)])
        return new

    def _at(self, node: Node, message: str) -> Problem:
        return Problem(self.file, node.start_mark.line + 1, node.start_mark.column + 1, message)

    def _compose(self, text: str) -> Node | None:
        if len(text.encode(errors="replace")) > MAX_BYTES:
            raise PolicyError([Problem(self.file, 1, 1, f"larger than {MAX_BYTES} bytes")])
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = MAX_DEPTH
        yaml.composer.warn_double_anchors = False
        try:
            root: Node | None = yaml.compose(text)
            return root
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise PolicyError([Problem(self.file, line, column, _in_words(error))]) from error
        except ReaderError as error:
            before = text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            message = f"the character U+{ord(text[error.position]):04X} is not allowed"
            raise PolicyError([Problem(self.file, line, column, message)]) from error
        except (ValueError, OverflowError, AssertionError) as error:
            # The parser leaks these for escapes beyond Unicode and for directives, without a place.
            raise PolicyError([Problem(self.file, 1, 1, f"not YAML 1.2: {error}")]) from error

    def _convert(self, node: Node, path: Path) -> JSON:
        self._values[path] = node
        self._budget -= 40 + (len(node.value) if isinstance(node, ScalarNode) else 0)
        if self._budget < 0 or len(path) > MAX_DEPTH:
            message = "the document is too large once its aliases are written out"
            raise PolicyError([self._at(node, message)])
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._convert(item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return _scalar(str(node.tag), node.value)
        except (ValueError, KeyError):
            message = f"{node.value[:40]!r} is no value Holdgate knows; quote it if it is text"
            self.problems.append(self._at(node, message))
            return None

    def _mapping(self, node: MappingNode, path: Path) -> JSON:
        mapping: dict[str, JSON] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or _SURROGATE.search(key.value):
                self.problems.append(self._at(key, "a key must be plain text"))
            elif str(key.tag).endswith(":merge"):
                self.problems.append(self._at(key, "'<<' is not supported; write the keys out"))
            elif key.value in mapping:
                first = self._keys[*path, key.value].start_mark.line + 1
                message = f"the key '{key.value[:40]}' is already given on line {first}"
                self.problems.append(self._at(key, message))
            else:
                place = (*path, key.value)
                self._keys[place] = key
                mapping[key.value] = self._convert(value, place)
        return mapping


def _end(node: Node) -> int:
    """Where the last character of a value stands; a block's own mark is that of what follows it."""
    if not isinstance(node, CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, MappingNode) else last)


def _added(text: str, holder: MappingNode, line: str) -> str:
    """The text with a key more in a mapping: the first of a flow mapping, the last of a block."""
    first = holder.value[0][0].start_mark
    if holder.flow_style:
        return f"{text[: first.index]}{line}, {text[first.index :]}"
    end = _end(holder)
    if text[end - 1] != "\n":
        end = text.find("\n", end) + 1 or len(text)
    before = text[:end] if text[end - 1] == "\n" else text[:end] + "\n"
    return f"{before}{' ' * first.column}{line}\n{text[end:]}"


def _with(data: JSON, path: Path, value: JSON) -> JSON:
    if not path:
        return value
    if isinstance(data, dict):
        key = str(path[0])
        return {**data, key: _with(data.get(key), path[1:], value)}
    items = list(data) if isinstance(data, list) else []
    at = int(path[0])
    return [*items[:at], _with(items[at], path[1:], value), *items[at + 1 :]]


def _in_words(error: MarkedYAMLError) -> str:
    message: str = error.problem or error.context or "not YAML"
    if message.startswith("but ") and error.context:
        return f"{error.context}, {message}"
    return message.partition(", if necessary")[0]


#: What escapes can write and no encoding can hold.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _scalar(tag: str, text: str) -> JSON:
    if _SURROGATE.search(text):
        raise ValueError(text)
    match tag.removeprefix("tag:yaml.org,2002:"):
        case "str" | "timestamp" | "value":
            return text
        case "null":
            return None
        case "bool":
            return {"true": True, "false": False}[text.lower()]
        case "int":
            prefixed = text.lstrip("+-")[:2].lower() in {"0x", "0o", "0b"}
            number = int(text, 0 if prefixed else 10)
            if abs(number) >= 2**63:
                raise ValueError(text)
            return number
        case "float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            raise ValueError(tag)


#: One character of a value as it is written between quotes (YAML 1.2, sections 7.3.1 and 7.3.2).
_ESCAPE = {
    "'": re.compile(r"''|."),
    '"': re.compile(r"\\x.{2}|\\u.{4}|\\U.{8}|\\.|."),
}


def _offset(written: str, index: int) -> int:
    """Where in a value as it is written its character `index` stands."""
    pattern = _ESCAPE.get(written[:1])
    if pattern is None:
        return index
    at = 1
    for _ in range(index):
        found = pattern.match(written, at)
        at = found.end() if found else at
    return at
