"""Each check against its vectors: `tests/vectors/<use>.json`, which any implementation in any language could run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import orjson
import pytest

from tests.validators.exchanges import check_of, covered, exchange_of, joined
from validators import AnyValidator

VECTORS = Path(__file__).parent.parent / "vectors"
USES = sorted(
    use
    for cls in get_args(get_args(AnyValidator)[0])
    for use in get_args(cls.model_fields["use"].annotation)
)
CASES = [
    pytest.param(use, case, id=f"{use}: {case['name']}")
    for use in USES
    for case in orjson.loads((VECTORS / f"{use}.json").read_bytes())
]


@pytest.mark.parametrize(("use", "case"), CASES)
def test_check_gives_what_its_vector_says(use: str, case: dict[str, Any]) -> None:
    check = check_of(use, **case["config"])
    exchange = exchange_of(case["exchange"])

    result = check.run(exchange)

    assert result.outcome == case["outcome"], result
    assert result.score == {"pass": 1.0, "fail": 0.0, "error": None}[case["outcome"]]
    assert (result.error is not None) == (case["outcome"] == "error")
    expected = case.get("findings", [])
    assert [(f.path, f.rule) for f in result.findings] == [(f["path"], f["rule"]) for f in expected]
    for finding, wanted in zip(result.findings, expected, strict=True):
        if "span" in wanted:
            assert finding.span == tuple(wanted["span"])
        if "covers" in wanted:
            (text,) = covered(exchange, check.verdict([finding]))
            assert text == joined(wanted["covers"])
        if "replacement" in wanted:
            assert finding.replacement == wanted["replacement"]


def test_every_check_has_vectors() -> None:
    assert {path.stem for path in VECTORS.glob("*.json")} >= set(USES)
