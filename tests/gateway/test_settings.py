"""Settings from a file and the environment: mistakes have a place, settings are documented."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, ValidationError
from pydantic_core import PydanticUndefined

from gateway.errors import SettingsError
from gateway.settings import (
    PACKAGED_CONFIG,
    ModelEntry,
    Passthrough,
    Section,
    Settings,
    WebhookEntry,
    load_settings,
    variable_names,
)

ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, text: str, env: Mapping[str, str] | None = None) -> Settings:
    file = tmp_path / "holdgate.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, env or {})


def mistakes(tmp_path: Path, text: str, env: Mapping[str, str] | None = None) -> list[str]:
    """The lines of the error, without the path of the folder."""
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text, env)
    return str(caught.value).replace(f"{tmp_path}/", "").split("\n")


def test_no_configuration_at_all_works() -> None:
    settings = load_settings(None, {})
    assert (settings.listen.host, settings.listen.port) == ("127.0.0.1", 8080)
    assert settings.store.url == "sqlite:///holdgate.db"
    assert settings.redis.url is None
    assert settings.policies == PACKAGED_CONFIG / "policies"
    assert settings.models == (ModelEntry(match="*"),)


def test_openai_variables_describe_the_one_provider() -> None:
    env = {"OPENAI_BASE_URL": "http://localhost:1234/v1/", "OPENAI_API_KEY": "sk-1"}
    settings = load_settings(None, env)
    assert settings.models[0].match == "*"
    assert settings.models[0].base_url == "http://localhost:1234/v1"
    assert settings.secret(settings.models[0].api_key_env) == "sk-1"


def test_openai_variables_describe_an_entry_that_names_neither_address_nor_key(
    tmp_path: Path,
) -> None:
    env = {"OPENAI_BASE_URL": "http://localhost:1234/v1", "OPENAI_API_KEY": "sk-1"}
    settings = load(tmp_path, "models: [{match: a, retries: 1}]", env)
    assert settings.models[0].base_url == "http://localhost:1234/v1"
    assert settings.secret(settings.models[0].api_key_env) == "sk-1"


def test_openai_key_is_not_given_to_an_address_that_the_file_names(tmp_path: Path) -> None:
    env = {"OPENAI_BASE_URL": "http://elsewhere/v1", "OPENAI_API_KEY": "sk-1"}
    settings = load(tmp_path, "models: [{match: a, base_url: 'http://here/v1'}]", env)
    assert settings.models == (ModelEntry(match="a", base_url="http://here/v1"),)
    assert settings.secret(settings.models[0].api_key_env) is None


def test_wrong_openai_base_url_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL: write a whole address"):
        load_settings(None, {"OPENAI_BASE_URL": "localhost:1234"})


def test_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    text = "listen: {host: 0.0.0.0, port: 1}\nworkers: 2"
    settings = load(tmp_path, text, {"HOLDGATE_LISTEN_PORT": "2", "HOLDGATE_LOG_LEVEL": "debug"})
    assert (settings.listen.host, settings.listen.port) == ("0.0.0.0", 2)
    assert (settings.workers, settings.log.level, settings.log.format) == (2, "debug", "json")


@pytest.mark.parametrize(
    ("variable", "value", "path", "expected"),
    [
        ("HOLDGATE_LISTEN_PORT", "9000", "listen.port", 9000),
        ("HOLDGATE_STORE_URL", "postgresql://u@h/d", "store.url", "postgresql://u@h/d"),
        ("HOLDGATE_REDIS_URL", "redis://h:1/0", "redis.url", "redis://h:1/0"),
        ("HOLDGATE_LIMITS_REQUEST_BYTES", "1MiB", "limits.request_bytes", 1_048_576),
        ("HOLDGATE_PASSTHROUGH_EXCEPTIONS", "/a*, /b", "passthrough.exceptions", ("/a*", "/b")),
        ("HOLDGATE_SHUTDOWN_GRACE_S", "2.5", "shutdown_grace_s", 2.5),
        ("HOLDGATE_KEYS_REQUIRED", "yes", "keys.required", "yes"),
    ],
)
def test_variable_sets_its_setting(variable: str, value: str, path: str, expected: object) -> None:
    found: object = load_settings(None, {variable: value})
    for name in path.split("."):
        found = getattr(found, name)
    assert found == expected


def test_empty_variable_counts_as_not_set() -> None:
    assert load_settings(None, dict.fromkeys(variable_names(), "")) == load_settings(None, {})


def test_folders_of_the_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    settings = load(tmp_path, "policies: rules/")
    assert settings.policies == tmp_path / "rules"
    assert settings.calibrators == tmp_path / "calibrators"
    assert load(tmp_path, "calibrators: fitted").calibrators == tmp_path / "fitted"


def test_folders_of_the_environment_are_not_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    elsewhere = str(tmp_path / "rules")
    settings = load(tmp_path, "policies: nowhere/", {"HOLDGATE_POLICIES": elsewhere})
    assert settings.policies == Path(elsewhere)
    assert settings.calibrators == tmp_path / "calibrators"


def test_folder_of_policies_must_exist(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, "workers: 1\npolicies: nowhere/")
    assert mistake == "holdgate.yaml:2:11: there is no folder nowhere"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("listen:\n  prot: 1", "holdgate.yaml:2:3: unknown key 'prot'; did you mean 'port'?"),
        ("modles: []", "holdgate.yaml:1:1: unknown key 'modles'; did you mean 'models'?"),
        ("zzzzzz: 1", "holdgate.yaml:1:1: unknown key 'zzzzzz'"),
        (
            "models:\n- match: a\n  retrys: 1",
            "holdgate.yaml:3:3: unknown key 'retrys'; did you mean 'retries'?",
        ),
        (
            "models:\n- match: a\n  timeout_s: {reed: 1}",
            "holdgate.yaml:3:15: unknown key 'reed'; did you mean 'read'?",
        ),
        ("models:\n- provider: openai", "holdgate.yaml:2:3: missing key 'match'"),
        ("workers: 1\nlisten:", "holdgate.yaml:2:1: must be a mapping of settings"),
        (
            "listen: {port: 99999}",
            "holdgate.yaml:1:16: Input should be less than or equal to 65535",
        ),
        ("log: {level: loud}", "holdgate.yaml:1:14: Input should be 'debug', 'info'"),
        ("keys: {required: true}", "holdgate.yaml:1:18: Input should be 'auto', 'yes' or 'no'"),
        ("store: {url: 'mysql://h'}", "holdgate.yaml:1:14: write sqlite:///<file> or postgresql"),
        ("redis: {url: 'http://h'}", "holdgate.yaml:1:14: write redis://"),
        ("hold: {keepalive_s: 0}", "holdgate.yaml:1:21: Input should be greater than 0"),
        ("limits: {request_bytes: many}", "holdgate.yaml:1:25: could not"),
        ("- a", "holdgate.yaml:1:1: must be a mapping of settings"),
        ("a: b: c", "holdgate.yaml:1:5: "),
        ("workers: 1\nworkers: 2", "holdgate.yaml:2:1: the key 'workers' is already given"),
        ("", "holdgate.yaml:1:1: the file is empty"),
    ],
)
def test_mistake_is_reported_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    (mistake,) = mistakes(tmp_path, text)
    assert mistake.startswith(expected)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = "workers: 0\nlog: {format: xml}\nfoo: 1"
    found = mistakes(tmp_path, text, {"HOLDGATE_LISTEN_PORT": "high", "HOLDGATE_LISTEN_PROT": "1"})
    assert [mistake.split(": ")[0] for mistake in found] == [
        "HOLDGATE_LISTEN_PROT",
        "HOLDGATE_LISTEN_PORT",
        "holdgate.yaml:1:10",
        "holdgate.yaml:2:15",
        "holdgate.yaml:3:1",
    ]


def test_variable_that_is_nearly_ours_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match=r"HOLDGATE_STORE_URI: .* mean HOLDGATE_STORE_URL"):
        load_settings(None, {"HOLDGATE_STORE_URI": "sqlite:///x"})


def test_variables_that_kubernetes_sets_are_left_alone() -> None:
    env = {
        "HOLDGATE_PORT": "tcp://10.0.0.1:80",
        "HOLDGATE_SERVICE_HOST": "10.0.0.1",
        "HOLDGATE_SERVICE_PORT": "80",
        "HOLDGATE_PORT_80_TCP_ADDR": "10.0.0.1",
        "HOLDGATE_CONFIG": "holdgate.yaml",
    }
    assert load_settings(None, env) == load_settings(None, {})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("models: [{match: a, api_key_env: MY_KEY}]", "1:34"),
        ("audit_secret_env: MY_KEY", "1:19"),
    ],
)
def test_secret_that_is_not_in_the_environment_is_missed_at_the_start(
    tmp_path: Path, text: str, place: str
) -> None:
    (mistake,) = mistakes(tmp_path, text)
    assert mistake == f"holdgate.yaml:{place}: the environment variable MY_KEY is not set"
    assert load(tmp_path, text, {"MY_KEY": "s"}).secret("MY_KEY") == "s"


def test_no_secret_is_shown(tmp_path: Path) -> None:
    text = "models: [{match: a, api_key_env: MY_KEY}]"
    assert "sk-1" not in repr(load(tmp_path, text, {"MY_KEY": "sk-1"}))
    wrong = {"HOLDGATE_STORE_URL": "mysql://user:sk-1@host/db", "HOLDGATE_REDIS_URL": "sk-1"}
    assert not any("sk-1" in mistake for mistake in mistakes(tmp_path, "workers: 1", wrong))


@pytest.mark.parametrize(
    "url",
    ["https://user:pw@host/v1", "https://host/v1?key=1", "https://host/v1#a", "ftp://host", "host"],
)
def test_base_url_is_a_plain_address(url: str) -> None:
    with pytest.raises(ValidationError):
        ModelEntry(match="*", base_url=url)


def test_fallback_that_nobody_serves_is_a_mistake(tmp_path: Path) -> None:
    text = "models:\n- {match: gpt-*, fallbacks: [gpt-4o, claude]}"
    (mistake,) = mistakes(tmp_path, text)
    assert mistake == "holdgate.yaml:2:38: no entry of models matches claude"


@pytest.mark.parametrize("matches", [("*", "a"), ("a", "b", "a")])
def test_entry_that_is_never_reached_is_a_mistake(tmp_path: Path, matches: tuple[str, ...]) -> None:
    entries = "".join(f"- match: '{match}'\n" for match in matches)
    (mistake,) = mistakes(tmp_path, f"models:\n{entries}")
    assert mistake == f"holdgate.yaml:{len(matches) + 1}:10: an entry above already takes all of a"


@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe", b"listen: [1"], ids=["absent", "not utf-8", "broken"]
)
def test_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"mine\.yaml"):
        load_settings(file, {})


@given(st.text(max_size=60))
def test_any_text_gives_settings_or_a_settings_error(text: str) -> None:
    for variable in ("HOLDGATE_LISTEN_PORT", "HOLDGATE_LIMITS_REQUEST_BYTES", "OPENAI_BASE_URL"):
        message = variable
        try:
            load_settings(None, {variable: text})
        except SettingsError as error:
            message = str(error)
        assert message.startswith(variable)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings(None, {}).workers = 2


@pytest.mark.parametrize(
    ("default", "path", "allowed"),
    [
        ("allow", "/files", True),
        ("allow", "/batches/1", False),
        ("refuse", "/files", False),
        ("refuse", "/batches/1", True),
    ],
)
def test_passthrough_has_exceptions(default: str, path: str, allowed: bool) -> None:
    passthrough = Passthrough.model_validate({"default": default, "exceptions": ["/batches*"]})
    assert passthrough.allows(path) is allowed


@pytest.mark.parametrize(
    ("match", "exact"), [("gpt-4o", True), ("*", False), ("gpt-?", False), ("[ab]", False)]
)
def test_name_without_wildcards_is_exact(match: str, exact: bool) -> None:
    assert ModelEntry(match=match).is_exact is exact


ENTRIES: Mapping[str, type[Section]] = {"models": ModelEntry, "webhooks": WebhookEntry}


def documented(section: type[Section], prefix: str = "") -> dict[str, object]:
    """Every setting below a section by its path, with its default."""
    found: dict[str, object] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= documented(inner, f"{prefix}{name}.")
        elif name in ENTRIES:
            found |= documented(ENTRIES[name], f"{name}[].")
        else:
            found[prefix + name] = field.default
    return found


def test_every_setting_is_in_the_reference_with_its_variable_and_default() -> None:
    """And nothing else is."""
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z_.\[\]]+)` \|(.*)\|$", text, re.MULTILINE))
    settings = documented(Settings)
    assert rows.keys() == settings.keys()
    variables = {".".join(map(str, loc)): name for name, loc in variable_names().items()}
    for path, row in rows.items():
        cells = [cell.strip() for cell in row.split("|")]
        if path in variables:
            assert cells.pop(0) == f"`{variables[path]}`"
        if settings[path] is PydanticUndefined:
            assert cells[0] == "none, required", path
        elif path not in ("policies", "calibrators"):
            assert cells[0] == f"`{as_written(settings[path])}`", path
        assert cells[1].endswith((".", "`.")), path


def as_written(default: object) -> str:
    match default:
        case None:
            return "null"
        case ():
            return "[]"
        case ByteSize():
            return default.human_readable(decimal=True).replace(".0", "")
        case float():
            return f"{default:g}"
        case _:
            return str(default)


def test_example_file_has_every_setting_with_its_default() -> None:
    file = ROOT / "config" / "holdgate.yaml"
    assert load_settings(file, {}) == load_settings(None, {})
    text = file.read_text("utf-8")
    for path in documented(Settings):
        assert re.search(rf"^[# -]*{path.rpartition('.')[2]}:", text, re.MULTILINE), path


def test_example_of_the_reference_loads(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    examples = "".join(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    secret = f"whsec_{b64encode(bytes(32)).decode()}"
    env = {"ANTHROPIC_KEY": "a", "OPENAI_API_KEY": "b", "CRM_WEBHOOK_SECRET": secret}
    settings = load(tmp_path, examples, env)
    assert [entry.match for entry in settings.models] == ["small", "gpt-*", "*"]
    assert [hook.name for hook in settings.webhooks] == ["crm"]


@pytest.mark.parametrize(
    ("hook", "mistake"),
    [
        ({"name": "CRM"}, "1:24: String should match pattern"),
        ({"url": "ftp://here"}, "write a whole address, such as https://example.com/holdgate"),
        ({"url": "https://me:pw@here"}, "no user, password or fragment may be in it"),
        ({"url": "https://here/#part"}, "no user, password or fragment may be in it"),
        ({"events": []}, "at least 1 item"),
        ({"events": ["task.open"]}, "Input should be 'task.opened'"),
        ({"event": ["task.opened"]}, "unknown key 'event'; did you mean 'events'?"),
        ({"secret_env": "NONE"}, "the environment variable NONE is not set"),
        ({"secret_env": "PLAIN"}, "PLAIN must hold whsec_ and 24 to 64 random bytes in base64"),
        ({"secret_env": "SHORT"}, "SHORT must hold whsec_ and 24 to 64 random bytes in base64"),
        ({"secret_env": "HALF"}, "HALF must hold whsec_ and 24 to 64 random bytes in base64"),
    ],
)
def test_mistake_in_a_webhook_is_told_with_its_place(
    tmp_path: Path, hook: Mapping[str, object], mistake: str
) -> None:
    good = f"whsec_{b64encode(bytes(32)).decode()}"
    env = {"GOOD": good, "PLAIN": "secret", "SHORT": "whsec_c2hvcnQ=", "HALF": f"{good} whsec_"}
    base = {
        "name": "crm",
        "url": "http://10.0.0.1/x?y=z",
        "secret_env": "GOOD",
        "events": ["task.opened"],
    }
    load(tmp_path, json.dumps({"webhooks": [base]}), env)
    found, *_ = mistakes(tmp_path, json.dumps({"webhooks": [base | dict(hook)]}), env)
    assert mistake in found
    assert found.startswith("holdgate.yaml:1:")


def test_two_webhooks_of_one_name_are_refused(tmp_path: Path) -> None:
    hook = {"name": "crm", "url": "http://h", "secret_env": "S", "events": ["task.opened"]}
    env = {"S": f"whsec_{b64encode(bytes(32)).decode()}"}
    (found,) = mistakes(tmp_path, json.dumps({"webhooks": [hook, hook]}), env)
    assert found.endswith("an entry above is named crm too")
