"""What a request costs in the gateway, beside a direct call in the same run.

    python -m benchmarks.gateway [--rounds 3] [--seconds 3] [--only plain16,lp1]

One gateway worker is pinned to one core, load and upstream to the others. CPU is user plus system time of the gateway's
process tree over the load and 0.3 s after it, so that deferred work counts. Targets take turns within each round; the
tables give medians of the rounds. Added latency is the gateway's minus the direct call's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import answers


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


UPSTREAM, PORT = free_port(), free_port()
Figures = dict[str, float]


@dataclass(frozen=True)
class Scenario:
    """One way to load a server."""

    model: str = "bench"
    connections: int = 1
    logprobs: bool = False
    stream: bool = False
    rate: float | None = None


SCENARIOS = {
    "plain1": Scenario(),
    "plain16": Scenario(connections=16),
    "lp1": Scenario(logprobs=True),
    "rate50": Scenario(model="bench-50ms", connections=64, rate=50),
    "stream16": Scenario(model="bench-50ms-5mspt", connections=16, stream=True),
}
POLICIES = ("empty", "rules", "window", "observe")
#: Which policies a scenario is run with: the stream modes matter to streams only.
PLAN = {
    name: POLICIES if scenario.stream else ("empty", "rules")
    for name, scenario in SCENARIOS.items()
}


def policy_text(kind: str) -> str:
    """The policy document of a kind: nothing, or the full set of rules, or rules that a stream mode can carry."""
    patterns = [{"name": name, "pattern": pattern} for name, pattern in answers.patterns().items()]
    words: dict[str, Any] = {
        "id": "words",
        "use": "forbid",
        "patterns": patterns,
        "on_fail": "block",
    }
    shape = {
        "id": "shape",
        "use": "json_schema",
        "target": "answer",
        "schema": "schemas/answer.json",
    }
    policy: dict[str, Any] = {"policy": "bench", "risk": {"base": "low"}}
    policy["confidence"] = {"source": "none", "when_uncalibrated": "return"}
    if kind == "empty":
        policy["stream"] = "buffer"
    elif kind == "rules":
        policy["confidence"] = {"calibrator": "bench", "when_uncalibrated": "return"}
        policy["matrix"] = {
            tier: dict.fromkeys(("confident", "unsure", "doubtful"), "return") for tier in ("low",)
        }
        policy["stages"] = [{"name": "rules", "checks": [{**shape, "on_fail": "hold"}, words]}]
    elif kind == "window":
        policy["stages"] = [{"name": "rules", "checks": [{**words, "on_error": "flag"}]}]
        policy["stream"] = "window"
    else:
        policy["stages"] = [
            {"name": "rules", "checks": [{**words, "on_fail": "flag", "on_error": "flag"}]}
        ]
        policy["stream"] = "observe"
    return json.dumps(policy)


def write_config(folder: Path, kind: str) -> Path:
    """The gateway's configuration for one policy; logprobs are used where a client asks, never asked for besides."""
    for name in ("policies", "schemas", "calibrators"):
        (folder / name).mkdir(parents=True)
    (folder / "policies" / "bench.yaml").write_text(policy_text(kind))
    (folder / "schemas" / "answer.json").write_text(json.dumps(answers.schema()))
    demo = Path(__file__).parent.parent / "config" / "calibrators" / "demo.json"
    calibrator = json.loads(demo.read_text()) | {"name": "bench", "model": "*"}
    (folder / "calibrators" / "bench.json").write_text(json.dumps(calibrator))
    model = {"match": "*", "base_url": f"http://127.0.0.1:{UPSTREAM}/v1", "logprobs": "no"}
    config = {
        "listen": {"port": PORT},
        "store": {"url": f"sqlite:///{folder}/holdgate.db"},
        "policies": "policies/",
        "calibrators": "calibrators/",
        "models": [model],
    }
    path = folder / "holdgate.yaml"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def process(*argv: str, cores: list[int], ready: str) -> Iterator[psutil.Process]:
    """A server on these cores, from the time its `ready` address answers."""
    child = subprocess.Popen(
        [sys.executable, "-m", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tree = psutil.Process(child.pid)
    tree.cpu_affinity(cores)
    try:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            with suppress(OSError), urllib.request.urlopen(ready, timeout=5):
                break
            if child.poll() is not None:
                raise RuntimeError(f"{argv[0]} did not start")
            time.sleep(0.05)
        yield tree
    finally:
        child.terminate()
        child.wait(timeout=30)


def cpu_s(tree: psutil.Process) -> float:
    """User and system seconds of a process and its children so far."""
    return sum(
        t.user + t.system for t in (p.cpu_times() for p in (tree, *tree.children(recursive=True)))
    )


def peak_mib(tree: psutil.Process) -> float:
    """The largest resident size so far, in MiB."""
    status = Path(f"/proc/{tree.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(
    scenario: Scenario, port: int, seconds: float, cores: list[int], tree: psutil.Process | None
) -> Figures:
    """The figures of one scenario against one server, after a short warm-up."""
    wanted = {"url": f"http://127.0.0.1:{port}", **scenario.__dict__}

    def load(for_s: float) -> Figures:
        command = [sys.executable, "-m", "benchmarks.load"]
        given = json.dumps({**wanted, "seconds": for_s})
        pin = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, check=True, preexec_fn=pin
        )
        figures: Figures = json.loads(done.stdout)
        return figures

    load(0.7)
    before_s = cpu_s(tree) if tree else 0.0
    figures = load(seconds)
    if tree is not None:
        time.sleep(0.3)
        figures["cpu_ms"] = 1000 * (cpu_s(tree) - before_s) / max(figures["requests"], 1)
        figures["peak_mib"] = peak_mib(tree)
    return figures


def run(only: list[str], rounds: int, seconds: float) -> dict[tuple[str, str], list[Figures]]:
    """The figures of every scenario and target, one for each round."""
    count = os.cpu_count() or 1
    ours, others = [0], list(range(1, count)) or [0]
    found: dict[tuple[str, str], list[Figures]] = {}
    mock = f"http://127.0.0.1:{UPSTREAM}/"
    with process("benchmarks.upstream", str(UPSTREAM), cores=others, ready=mock):
        for _ in range(rounds):
            for name in only:
                found.setdefault((name, "direct"), []).append(
                    measure(SCENARIOS[name], UPSTREAM, seconds, others, None)
                )
            for kind in POLICIES:
                chosen = [name for name in only if kind in PLAN[name]]
                if not chosen:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    config = str(write_config(Path(folder), kind))
                    health = f"http://127.0.0.1:{PORT}/healthz"
                    with process(
                        "gateway.cli", "serve", "-c", config, cores=ours, ready=health
                    ) as tree:
                        for name in chosen:
                            figures = measure(SCENARIOS[name], PORT, seconds, others, tree)
                            found.setdefault((name, kind), []).append(figures)
    return found


def table(found: dict[tuple[str, str], list[Figures]]) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| scenario | policy | CPU ms/request | added p50 ms | added p99 ms | first token +p50 ms | events/s | failed | peak MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, kind), rounds in found.items():
        middle = {key: median(figures.get(key, 0.0) for figures in rounds) for key in rounds[0]}
        direct = {
            key: median(f[key] for f in found[name, "direct"]) for key in found[name, "direct"][0]
        }
        cells = [name, kind]
        cells.append(f"{middle['cpu_ms']:.3f}" if "cpu_ms" in middle else "")
        for key in ("latency_p50_ms", "latency_p99_ms", "first_p50_ms"):
            known = key in middle and kind != "direct"
            cells.append(
                f"{middle[key] - direct[key]:.2f}"
                if known
                else f"({direct[key]:.2f})"
                if key in direct
                else ""
            )
        cells.append(f"{middle['events_per_s']:.0f}" if SCENARIOS[name].stream else "")
        cells += [
            f"{middle['failed']:.0f}",
            f"{middle['peak_mib']:.0f}" if "peak_mib" in middle else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print the table; direct latencies are in brackets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    given = parser.parse_args()
    print(table(run(given.only.split(","), given.rounds, given.seconds)))


if __name__ == "__main__":
    main()
