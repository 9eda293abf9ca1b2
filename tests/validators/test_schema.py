"""JSON Schema: the official suite, agreement with the reference implementation, and bounded work."""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Any

import jsonschema
import jsonschema_rs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.validators.exchanges import check_of, exchange_of, said
from validators import JSON, MAX_FINDINGS, Outcome
from validators.schema import Schema

SUITE = Path(__file__).parent.parent / "vectors" / "json_schema_suite"
REMOTES = orjson.loads((SUITE / "remotes.json").read_bytes())


def suite(draft: str, dialect: str) -> list[Any]:
    return [
        pytest.param(
            {"$schema": dialect, **group["schema"]}
            if isinstance(group["schema"], dict)
            else group["schema"],
            group["tests"],
            id=f"{keyword}: {group['description']}",
        )
        for keyword, groups in orjson.loads((SUITE / f"{draft}.json").read_bytes()).items()
        for group in groups
    ]


def registry(draft: str, number: int) -> jsonschema_rs.Registry:
    return jsonschema_rs.Registry(
        [(uri, schema) for uri, schema in REMOTES.items() if "/draft" not in uri or draft in uri],
        draft=number,
    )


DRAFT_2020_12 = suite("draft2020-12", "https://json-schema.org/draft/2020-12/schema")
DRAFT_7 = suite("draft7", "http://json-schema.org/draft-07/schema#")
REGISTRY_2020_12 = registry("draft2020-12", jsonschema_rs.Draft202012)
REGISTRY_7 = registry("draft7", jsonschema_rs.Draft7)


def assert_suite(schema: Schema, tests: list[dict[str, Any]]) -> None:
    for test in tests:
        accepted = schema.accepts(test["data"], size_chars=100)
        assert accepted == test["valid"], test["description"]
        assert accepted or schema.problems(test["data"], size_chars=100)


@pytest.mark.parametrize(("schema", "tests"), DRAFT_2020_12)
def test_official_suite_of_draft_2020_12(schema: Any, tests: list[dict[str, Any]]) -> None:
    assert_suite(Schema(schema, REGISTRY_2020_12), tests)


@pytest.mark.parametrize(("schema", "tests"), DRAFT_7)
def test_official_suite_of_draft_7(schema: Any, tests: list[dict[str, Any]]) -> None:
    assert_suite(Schema(schema, REGISTRY_7), tests)


def test_the_suite_is_whole() -> None:
    assert sum(len(param.values[1]) for param in DRAFT_2020_12) == 1299
    assert sum(len(param.values[1]) for param in DRAFT_7) == 927


ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]+$", "maxLength": 3},
        "count": {"type": "integer", "minimum": 0, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    },
    "required": ["id"],
    "additionalProperties": False,
}
ORDERS = st.dictionaries(
    st.sampled_from(["id", "count", "tags", "more"]),
    st.one_of(
        st.text(alphabet="ABab", max_size=4),
        st.integers(-2, 7),
        st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
        st.none(),
    ),
)


@given(document=ORDERS)
def test_problems_are_where_the_reference_implementation_finds_them(
    document: dict[str, Any],
) -> None:
    schema = Schema(ORDER)
    expected = {
        (tuple(error.absolute_path), str(error.validator))
        for error in jsonschema.Draft202012Validator(ORDER).iter_errors(document)
    }

    assert schema.accepts(document, size_chars=100) == (not expected)
    found = {
        (problem.path, problem.keyword) for problem in schema.problems(document, size_chars=100)
    }
    assert found == expected


def test_messages_never_quote_a_value() -> None:
    schema = Schema({"properties": {"ssn": {"type": "integer", "const": 1, "pattern": "^x"}}})

    problems = schema.problems({"ssn": "123-45-6789"}, size_chars=100)

    assert len(problems) == 3
    assert not any("123-45" in problem.message for problem in problems)


def nested_not(depth: int) -> dict[str, JSON]:
    schema: dict[str, JSON] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"type": "strng"}}}, "$.properties.a.type"),
        ({"minimum": "1"}, "$.minimum"),
        ({"pattern": "a(?=b)"}, "look-around"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "127.0.0.1"),
        ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"$schema": "http://example.org/mine"}, "example.org/mine"),
        (nested_not(5_000), "Recursion"),
    ],
)
def test_unusable_schema_is_refused_at_load_with_its_place(
    schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="not a usable JSON Schema") as refused:
        check_of("json_schema", schema=schema)
    assert words in str(refused.value)


def test_schema_file_is_read_through_the_reader_given() -> None:
    files = {"schemas/a.json": '{"type":"object"}'}
    check = check_of("json_schema", schema="schemas/a.json", read=files.__getitem__)

    assert check.run(said("{}")).outcome is Outcome.PASS
    assert check.run(said("[]")).outcome is Outcome.FAIL


def missing(path: str) -> str:
    raise FileNotFoundError(2, "No such file or directory", path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"schema": "a.json"}, "no reader was given"),
        ({"schema": "a.json", "read": missing}, "No such file"),
        ({"schema": "a.json", "read": lambda _: "{oops"}, "is not JSON"),
        ({"schema": "a.json", "read": lambda _: "[1]"}, "holds no JSON object"),
        ({"schema": {}, "tool": "pay"}, "tool is for target: tool_arguments"),
        ({"schema": "request"}, "schema: response_format"),
        (
            {"schema": "response_format", "target": "tool_arguments"},
            "write schema: request",
        ),
    ],
)
def test_wrong_configuration_is_refused_at_load(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_of("json_schema", **config)


def doubling(keyword: str, steps: int) -> dict[str, JSON]:
    """A schema of a few lines that asks for 2 ** steps evaluations."""
    definitions: dict[str, JSON] = {
        f"s{step}": {keyword: [{"$ref": f"#/$defs/s{step + 1}"}, {"$ref": f"#/$defs/s{step + 1}"}]}
        for step in range(steps)
    }
    definitions[f"s{steps}"] = {"type": "string"}
    return {"$defs": definitions, "$ref": "#/$defs/s0"}


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf"])
def test_exponential_schema_is_refused(keyword: str) -> None:
    with pytest.raises(ValueError, match="unfolds to more than"):
        Schema(doubling(keyword, 40))


def test_exponential_schema_of_a_request_is_an_error_not_a_hang() -> None:
    check = check_of("json_schema", schema="response_format")
    request = {"response_format": {"json_schema": {"schema": doubling("anyOf", 40)}}}

    result = check.run(exchange_of({"choices": [{"text": "1"}], "request": request}))

    assert result.outcome is Outcome.ERROR
    assert "unfolds to more than" in (result.error or "")


@pytest.mark.parametrize(
    "smuggled",
    [
        {
            "$defs": {"x": {"$id": "http://x.example/x", **doubling("anyOf", 3)}},
            "$ref": "#/$defs/x",
        },
        {"$defs": {"a%b": {}}, "$ref": "#/$defs/a%25b"},
    ],
    ids=["a definition with an id of its own", "a reference in percent encoding"],
)
def test_request_schema_whose_references_cannot_be_measured_is_an_error(
    smuggled: dict[str, Any],
) -> None:
    check = check_of("json_schema", schema="response_format")
    request = {"response_format": {"json_schema": {"schema": smuggled}}}

    result = check.run(exchange_of({"choices": [{"text": "1"}], "request": request}))

    assert result.outcome is Outcome.ERROR


def test_request_schema_nested_past_every_limit_is_an_error() -> None:
    check = check_of("json_schema", schema="response_format")
    request = {"response_format": {"json_schema": {"schema": nested_not(5_000)}}}

    result = check.run(exchange_of({"choices": [{"text": "1"}], "request": request}))

    assert result.outcome is Outcome.ERROR


RECURSIVE = {
    "$defs": {
        "node": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"a": {"$ref": "#/$defs/node"}},
                    "required": ["a"],
                },
                {
                    "type": "object",
                    "properties": {"a": {"$ref": "#/$defs/node"}},
                    "required": ["a"],
                },
                {"type": "string"},
            ]
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (RECURSIVE, '{"a":' * 500 + "1" + "}" * 500),
        ({"items": {"type": "string"}}, "[" + "1," * 500_000 + "1]"),
        ({"anyOf": [{"items": {"type": "string"}}, {"items": False}]}, "[" + "1," * 300_000 + "1]"),
        ({"uniqueItems": True}, "[" + ",".join(f"[{n}]" for n in range(150_000)) + "]"),
        ({"pattern": "^(a+)+$"}, f'"{"a" * 1_000_000}!"'),
        ({"type": "object"}, "[" * 1_000_000),
        ({"type": "object"}, '{"a":' * 200_000),
    ],
    ids=["recursion", "errors", "branches", "unique", "pattern", "open", "open objects"],
)
@pytest.mark.parametrize("target", ["answer", "json_block"])
def test_hostile_document_fails_in_bounded_time(
    schema: dict[str, Any], text: str, target: str
) -> None:
    check = check_of("json_schema", schema=schema, target=target)
    text = text if target == "answer" else f"```json\n{text}\n```"

    started = process_time()
    result = check.run(said(text))

    assert process_time() - started < 1.0
    assert result.outcome is (Outcome.PASS if "uniqueItems" in schema else Outcome.FAIL)


@pytest.mark.parametrize(
    "text", ["[" * 1_000_000, "[1," * 330_000, "{" * 1_000_000, "```\n" * 250_000]
)
def test_hunt_for_a_block_ends_in_bounded_time(text: str) -> None:
    started = process_time()
    result = check_of("json_schema", schema={}, target="json_block").run(said(text))

    assert process_time() - started < 1.0
    assert result.outcome is Outcome.FAIL


def test_document_and_schema_too_large_together_are_an_error() -> None:
    wide: dict[str, JSON] = {"properties": {f"p{number}": {} for number in range(20_000)}}

    result = check_of("json_schema", schema=wide).run(said(f'"{"a" * 20_000}"'))

    assert result.outcome is Outcome.ERROR
    assert "too large together" in (result.error or "")


def test_request_schema_over_the_limit_is_an_error() -> None:
    request = {"response_format": {"json_schema": {"schema": {"title": "x" * 300_000}}}}
    exchange = exchange_of({"choices": [{"text": "1"}], "request": request})

    result = check_of("json_schema", schema="response_format").run(exchange)

    assert "over 262144 bytes" in (result.error or "")


def test_problem_found_outweighs_another_that_could_not_be_looked_at() -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in (("bad", {"type": "strng"}), ("pay", {"required": ["amount"]}))
    ]
    choices = [{"tool_calls": [{"name": name, "arguments": "{}"}]} for name in ("bad", "pay")]
    exchange = exchange_of({"choices": choices, "request": {"tools": tools}})

    result = check_of("json_schema", schema="request", target="tool_arguments").run(exchange)

    assert result.outcome is Outcome.FAIL
    assert [finding.rule for finding in result.findings] == ["required"]


def test_answer_in_parts_is_one_document_and_its_findings_have_no_span() -> None:
    exchange = exchange_of({"choices": [{"texts": ['{"a":', '"x"}']}]})

    result = check_of("json_schema", schema={"properties": {"a": {"type": "null"}}}).run(exchange)

    assert [(finding.path, finding.span) for finding in result.findings] == [
        ("choices[0]#/a", None)
    ]


def test_long_message_is_cut() -> None:
    (problem,) = Schema({"enum": ["x" * 1_000]}).problems("y", size_chars=3)

    assert len(problem.message) == 301


def test_findings_and_blocks_are_bounded() -> None:
    block = "```json\n[1, 1, 1]\n```\n"
    check = check_of("json_schema", schema={"items": {"type": "null"}}, target="json_block")

    result = check.run(said(block * 100))

    assert len(result.findings) == MAX_FINDINGS


def test_constants_that_are_not_json_are_no_block() -> None:
    result = check_of("json_schema", schema={}, target="json_block").run(said("see [NaN] there"))

    assert result.outcome is Outcome.FAIL
