"""A folder with a policy and labels of known truth, and `holdgate calibrate` at work in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from gateway.cli import app

POLICY = """\
# Orders that a model wrote down.
policy: orders
match: {task: orders}
risk: {base: medium}
stages:
  - name: rules
    checks:
      - {id: finished, use: finish_reason, on_fail: flag}
confidence: {when_uncalibrated: hold}   # until it is calibrated
matrix:
  medium: {confident: return, unsure: hold, doubtful: hold}
"""


class Desk:
    """`labels.jsonl` and a store beside the configuration; commands run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "holdgate.yaml"
        self.policy = folder / "policies" / "orders.yaml"
        self.store_url = f"sqlite:///{folder}/holdgate.db"
        self.policy.parent.mkdir()
        self.policy.write_text(POLICY)
        self.config.write_text(
            f"policies: policies/\ncalibrators: calibrators/\nstore: {{url: '{self.store_url}'}}\n"
        )

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def labels(self, rows: list[dict[str, Any]], name: str = "labels.jsonl") -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def run(self, command: str, *arguments: str) -> Result:
        return CliRunner().invoke(
            app, ["calibrate", command, "--config", str(self.config), *arguments]
        )

    def fit(self, name: str = "orders-1.json", *arguments: str) -> Result:
        labels = [] if "--from-reviews" in arguments else ["--labels", self.path("labels.jsonl")]
        return self.run("fit", "--policy", "orders", *labels, "--out", self.path(name), *arguments)


def some_labels(
    n: int,
    seed: int,
    chance: Callable[[float], float] = lambda p: p,
    prefix: str = "o",
    **fields: Any,
) -> list[dict[str, Any]]:
    """Responses whose mean token probability p is spread from 0.3 to 1, acceptable with probability `chance(p)`."""
    draws = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        p = float(1 - 0.7 * draws.random() ** 3)
        signals = {"mean_logprob": log(p), "n_tokens": float(draws.integers(15, 30))}
        acceptable = bool(draws.random() < chance(p))
        row = {"id": f"{prefix}{number}", "acceptable": acceptable, "signals": signals}
        rows.append(row | {"model": "m", "task": "orders", "tier": "medium", **fields})
    return rows
