"""The next major version of the official client, which cannot be installed beside litellm and so has an environment of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.processes import Server

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-openai3" / "bin" / "python"


def test_version_3_of_the_official_client_works_unchanged(
    holdgate: Server, upstream: Server
) -> None:
    script = ROOT / "tests" / "acceptance" / "openai_next.py"
    run = subprocess.run(
        [PYTHON, "-W", "error", script, holdgate.url, upstream.url],
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("openai 3.")
