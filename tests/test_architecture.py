"""What holds for the project as a whole: sizes, names, ownership, and that the documents keep up with the code."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import gateway
from gateway.policy_files import load
from gateway.settings import load_settings, variable_names

ROOT = Path(__file__).parents[1]
CORE = ("validators", "judges", "policies")
PACKAGES = ("gateway", *CORE)
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
API = (ROOT / "docs" / "api.md").read_text()


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_module_has_more_than_500_lines() -> None:
    lengths = {_name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_function_has_more_than_60_lines() -> None:
    functions = (
        (f"{_name(path)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {name: length for name, length in functions if length > 60} == {}


@pytest.mark.parametrize("package", CORE)
def test_what_a_core_package_imports_into_itself_is_its_sorted_public_list(package: str) -> None:
    tree = TREES[ROOT / package / "__init__.py"]
    imported = [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
    ]
    made = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id != "__all__"
    ]
    public = importlib.import_module(package).__all__
    assert sorted(public) == sorted([*imported, *made])
    assert public == sorted(public, key=lambda name: (not name.isupper(), name.islower(), name))


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_are_ours_alone(package: str) -> None:
    """`validators` and `judges` are names on the public index: no dependency may bring them."""
    assert packages_distributions().get(package, ["holdgate"]) == ["holdgate"]
    assert importlib.import_module(package).__path__ == [str(ROOT / package)]


def test_the_wheel_holds_our_packages_and_the_starter_files_and_works(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    tops = {path.name for path in (tmp_path / "site").iterdir()}
    assert tops == {*PACKAGES, f"holdgate-{gateway.__version__}.dist-info"}
    lint = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "policy", "lint"],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (lint.returncode, lint.stderr) == (0, ""), lint.stdout + lint.stderr


def test_the_starter_files_load_without_a_warning() -> None:
    config = ROOT / "config"
    settings = load_settings(config / "holdgate.yaml", {})
    loaded = load(settings.policies, settings.calibrators)
    assert loaded.policies.policies
    assert [str(problem) for problem in loaded.policies.warnings] == []
    named = {policy.confidence.calibrator for policy in loaded.policies.policies} - {None}
    assert named <= loaded.calibrators.keys()


def test_every_setting_is_documented() -> None:
    documented = (ROOT / "docs" / "configuration.md").read_text()
    settings = (".".join(map(str, place)) for place in variable_names().values())
    assert [name for name in settings if f"`{name}`" not in documented] == []


def _codes() -> Iterator[str]:
    """Every `code` that an error of ours can have; `*` stands for what is put in at run time."""
    for path, tree in TREES.items():
        if path.is_relative_to(ROOT / "gateway" / "demo"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "code":
                yield from _text(node.value)
    for node in TREES[ROOT / "gateway" / "errors.py"].body:
        if isinstance(node, ast.ClassDef):
            yield from _class_code(node)


def _class_code(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if not isinstance(statement, ast.Assign):
            continue
        (target,) = statement.targets
        pairs = (
            zip(target.elts, statement.value.elts, strict=True)
            if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple)
            else [(target, statement.value)]
        )
        for name, value in pairs:
            if isinstance(name, ast.Name) and name.id == "code":
                yield from _text(value)


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values
        )


def test_every_error_code_is_in_the_reference_and_no_other() -> None:
    codes = set(_codes())
    assert {"internal_error", "response_held", "upstream_*"} <= codes
    documented = set(re.findall(r"^\| `([a-z_]+)` \| (?:\d{3}|as sent) \|", API, re.MULTILINE))
    pattern = re.compile("|".join(code.replace("*", "[a-z]+") for code in codes))
    assert {code for code in documented if not pattern.fullmatch(code)} == set()
    assert {code for code in codes if "*" not in code} - documented == set()


@pytest.mark.parametrize("module", ["admin", "decisions", "review"])
def test_every_endpoint_of_ours_is_in_the_reference(module: str) -> None:
    router = importlib.import_module(f"gateway.api.{module}").router
    served = {(method, route.path) for route in router.routes for method in route.methods}
    assert served - set(re.findall(r"\| `([A-Z]+) (/\S+)` \|", API)) == set()


def test_the_changelog_is_about_this_version() -> None:
    titles = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[:2] == ["Unreleased", gateway.__version__]
