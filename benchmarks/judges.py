"""What a judge stage adds to a request beyond the judge's own latency.

    python -m benchmarks.judges [--rounds 3] [--seconds 4]

The same requests go to a gateway with a policy without checks and to one whose policy asks a judge, in turn within each
round; the judge is the benchmark's upstream, which answers after a fixed time. What that takes is measured directly in the same
round. Verdicts are not remembered. The gateway is pinned to one core, as in `benchmarks.gateway`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gateway import PORT, UPSTREAM, Figures, Scenario, measure, process

LATENCIES_MS = (20, 200)
#: The model itself takes 50 ms, so that either gateway comes from a rest when there is something to do.
MODEL = "bench-50ms"
SCENARIOS = {
    "one by one": Scenario(MODEL),
    "50 a second": Scenario(MODEL, connections=64, rate=50),
}


def write_config(folder: Path, judge_ms: int | None) -> Path:
    """A gateway whose policy asks a judge that takes so long, or none."""
    (folder / "policies").mkdir()
    policy: dict[str, Any] = {
        "policy": "bench",
        "risk": {"base": "low"},
        "confidence": {"source": "none", "when_uncalibrated": "return"},
        "stream": "buffer",
    }
    if judge_ms is not None:
        rubric = {
            "name": "bench",
            "description": "Say whether the answer is right.",
            "context": ["question"],
            "criteria": [{"id": "ok", "question": "Is the answer right?"}],
        }
        check = {"id": "sound", "use": "rubric", "rubric": rubric, "on_error": "block"}
        stage = {"name": "judge", "checks": [{**check, "model": f"judge-{judge_ms}ms"}]}
        policy["stages"] = [{**stage, "budget": {"usd_per_day": 1_000_000}}]
    (folder / "policies" / "bench.yaml").write_text(json.dumps(policy))
    price = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 1.0}
    config = {
        "listen": {"port": PORT},
        "store": {"url": f"sqlite:///{folder}/holdgate.db"},
        "policies": "policies/",
        "models": [{"match": "*", "base_url": f"http://127.0.0.1:{UPSTREAM}/v1", "price": price}],
        "judges": {"cache_bytes": 0},
    }
    path = folder / "holdgate.yaml"
    path.write_text(json.dumps(config))
    return path


def through_gateway(judge_ms: int | None, scenario: Scenario, seconds: float) -> Figures:
    """The figures of one gateway, none of whose requests may fail."""
    ours, others = [0], list(range(1, os.cpu_count() or 1)) or [0]
    with tempfile.TemporaryDirectory() as folder:
        config = str(write_config(Path(folder), judge_ms))
        health = f"http://127.0.0.1:{PORT}/healthz"
        with process("gateway.cli", "serve", "-c", config, cores=ours, ready=health) as tree:
            figures = measure(scenario, PORT, seconds, others, tree)
    if figures["failed"]:
        raise RuntimeError(f"{figures['failed']:.0f} requests failed")
    return figures


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    others = list(range(1, os.cpu_count() or 1)) or [0]
    mock = f"http://127.0.0.1:{UPSTREAM}/"
    rows: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with process("benchmarks.upstream", str(UPSTREAM), cores=others, ready=mock):
        for _ in range(given.rounds):
            for name, scenario in SCENARIOS.items():
                without = through_gateway(None, scenario, given.seconds)
                for judge_ms in LATENCIES_MS:
                    judge = Scenario(**{**scenario.__dict__, "model": f"judge-{judge_ms}ms"})
                    direct = measure(judge, UPSTREAM, given.seconds, others, None)
                    judged = through_gateway(judge_ms, scenario, given.seconds)
                    added = [
                        judged[key] - without[key] - direct["latency_p50_ms"]
                        for key in ("latency_p50_ms", "latency_p99_ms")
                    ]
                    cpu_ms = judged["cpu_ms"] - without["cpu_ms"]
                    rows.setdefault((name, judge_ms), []).append((added[0], added[1], cpu_ms))
    print("| load | judge ms | added p50 ms | added p99 ms | added CPU ms |")
    print("|---|--:|--:|--:|--:|")
    for (name, judge_ms), found in rows.items():
        p50_ms, p99_ms, cpu_ms = (median(values) for values in zip(*found, strict=True))
        print(f"| {name} | {judge_ms} | {p50_ms:.2f} | {p99_ms:.2f} | {cpu_ms:.2f} |")


if __name__ == "__main__":
    main()
