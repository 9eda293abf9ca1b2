"""The command line, as a person types it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from gateway.settings import PACKAGED_CONFIG, load_settings

POLICY = """\
policy: tickets
match: {task: tickets}
stages:
  - name: rules
    checks:
      - {id: words, use: forbid, patterns: ["foo"], on_fail: blok}
confidence: {when_uncalibrated: flag}
"""


def holdgate(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *arguments],
        cwd=cwd,
        # Line editing in the process that runs the tests may have set a width.
        env={key: value for key, value in os.environ.items() if key != "COLUMNS"} | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def write_policy(folder: Path, text: str) -> Path:
    policies = folder / "policies"
    policies.mkdir()
    (policies / "tickets.yaml").write_text(text)
    return policies


def test_lint_names_file_line_column_and_the_nearest_word(tmp_path: Path) -> None:
    write_policy(tmp_path, POLICY)
    done = holdgate("policy", "lint", "policies", cwd=tmp_path)
    assert done.returncode == 1
    assert "policies/tickets.yaml:6:62: " in done.stderr
    assert "'block'" in done.stderr


def test_lint_of_sound_policies_exits_0(tmp_path: Path) -> None:
    write_policy(tmp_path, POLICY.replace("blok", "block"))
    done = holdgate("policy", "lint", "policies", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "1 policy, no problems\n")


def test_lint_warns_of_a_calibrator_that_is_not_there(tmp_path: Path) -> None:
    text = POLICY.replace("blok", "block").replace("{when", "{calibrator: nowhere, when")
    write_policy(tmp_path, text)
    done = holdgate("policy", "lint", "policies", cwd=tmp_path)
    assert done.returncode == 0
    assert "there is no calibrator 'nowhere'" in done.stderr


def test_lint_refuses_a_calibrator_that_was_fitted_for_other_checks(tmp_path: Path) -> None:
    text = POLICY.replace("blok", "score").replace("{when", "{calibrator: demo, when")
    write_policy(tmp_path, text)
    shutil.copytree(PACKAGED_CONFIG / "calibrators", tmp_path / "calibrators")
    done = holdgate("policy", "lint", "policies", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "policy tickets: calibrator demo is stale: the checks that feed the score have changed\n"
    )


def test_lint_of_a_missing_folder_says_so(tmp_path: Path) -> None:
    done = holdgate("policy", "lint", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no such folder" in done.stderr


def test_schema_accepts_the_starter_policies_and_refuses_a_misspelt_key(tmp_path: Path) -> None:
    schema = json.loads(holdgate("policy", "schema", cwd=tmp_path).stdout)
    validator = jsonschema.Draft202012Validator(schema)
    for path in sorted((PACKAGED_CONFIG / "policies").glob("*.yaml")):
        document = YAML(typ="safe", pure=True).load(path)
        assert list(validator.iter_errors(document)) == []
        assert not validator.is_valid(document | {"stagez": []})


def test_init_writes_files_that_serve_and_lint_accept_and_never_overwrites(tmp_path: Path) -> None:
    assert holdgate("init", cwd=tmp_path).returncode == 0
    settings = load_settings(tmp_path / "holdgate.yaml", {"OPENAI_API_KEY": "sk-1"})
    assert settings.secret(settings.models[0].api_key_env) == "sk-1"
    assert settings.policies == tmp_path / "policies"
    assert holdgate("policy", "lint", cwd=tmp_path).returncode == 0
    written = json.loads((tmp_path / "policy.schema.json").read_text())
    assert written == json.loads(holdgate("policy", "schema", cwd=tmp_path).stdout)
    again = holdgate("init", cwd=tmp_path)
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_keys_are_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    made = holdgate("key", "create", "ann", "--role", "reviewer", cwd=tmp_path)
    secret = made.stdout.strip()
    assert secret.startswith("hgk_")
    assert secret.encode() not in (tmp_path / "holdgate.db").read_bytes()
    assert "ann" in holdgate("key", "list", cwd=tmp_path).stdout
    twice = holdgate("key", "create", "ann", cwd=tmp_path)
    assert twice.returncode == 1
    assert "ann" in twice.stderr
    assert holdgate("key", "revoke", "ann", cwd=tmp_path).returncode == 0
    assert holdgate("key", "revoke", "nobody", cwd=tmp_path).returncode == 1


def test_a_key_can_be_made_and_policies_linted_without_the_providers_keys(tmp_path: Path) -> None:
    write_policy(tmp_path, POLICY.replace("blok", "block"))
    (tmp_path / "holdgate.yaml").write_text("models: [{match: '*', api_key_env: NOT_SET_HERE}]\n")
    assert holdgate("key", "create", "ann", cwd=tmp_path).stdout.startswith("hgk_")
    assert holdgate("policy", "lint", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("listen: {prot: 80}\n", "holdgate.yaml:1:10: unknown key 'prot'; did you mean 'port'?"),
        ("store: {url: mysql://here}\n", "holdgate.yaml:1:14: "),
        ("models: [{match: '*', api_key_env: NOT_SET_HERE}]\n", "NOT_SET_HERE is not set"),
        ("policies: nowhere/\n", "holdgate.yaml:1:11: there is no folder nowhere"),
    ],
)
def test_wrong_setting_stops_the_start_with_its_place(
    tmp_path: Path, settings: str, message: str
) -> None:
    (tmp_path / "holdgate.yaml").write_text(settings)
    done = holdgate("serve", cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_port_in_use_is_said_in_a_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = holdgate("serve", "--port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert done.returncode != 0
    assert "Cannot listen on 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_shows_every_action(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    closed = "http://127.0.0.1:9"
    proxies = {"HTTP_PROXY": closed, "http_proxy": closed, "all_proxy": closed, "no_proxy": ""}
    done = holdgate("demo", "--once", "--port", str(port), cwd=tmp_path, env=proxies)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("│")) > 100
    for word in ("return", "auto+audit", "flag", "hold", "block", "423", "403", "redacted"):
        assert word in done.stdout
    assert "/submit" in done.stdout
