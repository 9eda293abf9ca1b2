"""The official Node client: its own tests, run against a real gateway."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from gateway.settings import PACKAGED_CONFIG
from tests.acceptance.conftest import POLICIES
from tests.conftest import GatewayFactory
from tests.processes import Server

SCRIPT = Path(__file__).parent / "node" / "client.test.js"


def test_the_official_node_client_works_unchanged(
    gateway: GatewayFactory, upstream: Server
) -> None:
    server = gateway(POLICIES, calibrators=str(PACKAGED_CONFIG / "calibrators"))
    run = subprocess.run(
        ["node", "--test-reporter=tap", SCRIPT, server.url, upstream.url],
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    written = len(re.findall(r"^test\(", SCRIPT.read_text(), re.MULTILINE))
    assert f"# pass {written}\n" in run.stdout
