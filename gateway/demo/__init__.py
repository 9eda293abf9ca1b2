"""The scripted upstream of demo and tests: it says, and breaks, what the request asks it to."""

from gateway.demo.scenarios import SCENARIOS, Scenario
from gateway.demo.script import Script
from gateway.demo.server import main, run_upstream

__all__ = ["SCENARIOS", "Scenario", "Script", "main", "run_upstream"]
