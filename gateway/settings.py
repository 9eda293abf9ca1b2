"""What `holdgate.yaml` and the environment may say, read once and frozen."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)
from yarl import URL

from gateway.errors import SettingsError
from policies.source import PolicyError, Source
from validators import JSON

Loc: TypeAlias = tuple[str | int, ...]

#: The folder `config/` of the project: inside the package when installed, beside it in a checkout.
PACKAGED_CONFIG = next(
    folder / "config"
    for folder in (Path(__file__).parent, Path(__file__).parent.parent)
    if (folder / "config").is_dir()
)


def _provider_url(value: str) -> str:
    url = URL(value)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("write a whole address, such as https://api.openai.com/v1")
    if url.user or url.password or url.query_string or url.fragment:
        raise ValueError(
            "no user, password, query or fragment may be in it; keys go into api_key_env"
        )
    return value.rstrip("/")


def _webhook_url(value: str) -> str:
    url = URL(value)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("write a whole address, such as https://example.com/holdgate")
    if url.user or url.password or url.fragment:
        raise ValueError("no user, password or fragment may be in it; events are signed instead")
    return value


def _store_url(value: str) -> str:
    if not value.startswith(("sqlite:///", "postgresql://")):
        raise ValueError("write sqlite:///<file> or postgresql://<user>@<host>/<database>")
    return value


def _redis_url(value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("write redis://<host>:<port>/<database>, or rediss:// for TLS")
    return value


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(word.strip() for word in value.split(",") if word.strip())


ProviderUrl = Annotated[str, AfterValidator(_provider_url)]
WebhookUrl = Annotated[str, AfterValidator(_webhook_url)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
EventKind: TypeAlias = Literal["task.opened", "task.settled", "alarm.raised", "labels.ready"]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Usd = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping in the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Listen(Section):
    """Where clients, reviewers and operators connect."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080


class StoreSettings(Section):
    """Where the truth is kept."""

    url: Annotated[str, AfterValidator(_store_url)] = "sqlite:///holdgate.db"


class RedisSettings(Section):
    """What carries wake-ups between replicas; null within one process."""

    url: Annotated[str, AfterValidator(_redis_url)] | None = None


class Timeouts(Section):
    """Seconds to wait for a provider: to connect, between two bytes, and for the whole answer."""

    connect: Seconds = 5.0
    read: Seconds = 600.0
    total: Seconds = 3600.0


class Price(Section):
    """What a model costs, in US dollars per million tokens; cached input costs as much as other input if not said."""

    input_usd_per_million_tokens: Usd
    output_usd_per_million_tokens: Usd
    cached_input_usd_per_million_tokens: Usd | None = None


class ModelEntry(Section):
    """The provider of the models whose names match a glob; the first entry that matches is the one.

    `provider: openai` is any server of the OpenAI dialect; every other name is one of litellm's.
    """

    match: Annotated[str, Field(min_length=1, max_length=200)]
    base_url: ProviderUrl | None = None
    api_key_env: VariableName | None = None
    provider: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = "openai"
    rename: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    timeout_s: Timeouts = Timeouts()
    retries: Annotated[int, Field(ge=0, le=5)] = 0
    fallbacks: tuple[str, ...] = ()
    logprobs: Literal["auto", "yes", "no"] = "auto"
    max_top_logprobs: Annotated[int, Field(ge=0, le=20)] = 5
    price: Price | None = None

    @property
    def is_exact(self) -> bool:
        """Whether `match` is the name of one model."""
        return not set(self.match) & set("*?[")


class Passthrough(Section):
    """What happens to paths under /v1 that no policy covers; `exceptions` are globs."""

    default: Literal["allow", "refuse"] = "allow"
    exceptions: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()

    def allows(self, path: str) -> bool:
        """Say whether a path below /v1, such as `/files/abc`, may pass."""
        is_exception = any(fnmatchcase(path, pattern) for pattern in self.exceptions)
        return (self.default == "allow") is not is_exception


class Limits(Section):
    """Sizes beyond which a message is refused."""

    request_bytes: ByteSize = ByteSize(50_000_000)
    response_bytes: ByteSize = ByteSize(20_000_000)
    header_bytes: ByteSize = ByteSize(64_000)


class Keys(Section):
    """Whether clients need an API key; `auto`: not on loopback while the store has none."""

    required: Literal["auto", "yes", "no"] = "auto"


class Log(Section):
    """What is logged on standard error, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class HoldSettings(Section):
    """Clients that wait for a held response: how often they hear from us, and how many may wait."""

    keepalive_s: Seconds = 10.0
    max_waiting: Annotated[int, Field(ge=0)] = 5000


class JudgeSettings(Section):
    """How judges are asked: how long where a policy does not say, how many calls at once, what is remembered."""

    timeout_s: Seconds = 30.0
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 32
    cache_bytes: ByteSize = ByteSize(32_000_000)
    cache_s: Seconds = 3600.0


class ReviewSettings(Section):
    """What people cost; null: not known."""

    usd_per_minute: Usd | None = None


class LearningSettings(Section):
    """After how many new training samples (corrected, rejected, or approved though unsure) `labels.ready` is told."""

    retrain_samples: Annotated[int, Field(ge=1)] = 500


class WebhookEntry(Section):
    """Where some kinds of events are told; `secret_env` holds what they are signed with."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
    url: WebhookUrl
    secret_env: VariableName
    events: Annotated[tuple[EventKind, ...], Field(min_length=1)]


class Settings(Section):
    """Every setting of one gateway, made once by `load_settings`."""

    listen: Listen = Listen()
    store: StoreSettings = StoreSettings()
    redis: RedisSettings = RedisSettings()
    policies: Path = PACKAGED_CONFIG / "policies"
    calibrators: Path = PACKAGED_CONFIG / "calibrators"
    models: tuple[ModelEntry, ...] = (ModelEntry(match="*"),)
    passthrough: Passthrough = Passthrough()
    limits: Limits = Limits()
    keys: Keys = Keys()
    audit_secret_env: VariableName | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    log: Log = Log()
    hold: HoldSettings = HoldSettings()
    judges: JudgeSettings = JudgeSettings()
    review: ReviewSettings = ReviewSettings()
    learning: LearningSettings = LearningSettings()
    webhooks: tuple[WebhookEntry, ...] = ()
    shutdown_grace_s: Seconds = 30.0

    _secrets: dict[str, str] = PrivateAttr(default_factory=dict)

    def secret(self, variable: str | None) -> str | None:
        """Return what a variable named by a setting held at the start; None for None."""
        return self._secrets[variable] if variable else None


def load_settings(path: Path | None, env: Mapping[str, str], *, secrets: bool = True) -> Settings:
    """Read the settings of a file and of the variables `HOLDGATE_<PATH>`, which win.

    Without `secrets`, the variables named by settings need not be set, and `Settings.secret` knows none.

    Folders named in the file are relative to it; `calibrators` is beside `policies` if not named.
    An entry of `models` that names neither address nor key (and the one there is without `models`) takes them from
    `OPENAI_BASE_URL` and `OPENAI_API_KEY`.

    Raises
    ------
    SettingsError
        With every problem found, a line for each: file, line and column, or the variable.
    """
    source = _read(path) if path else None
    data = source.data if source else {}
    problems = [str(problem) for problem in source.problems] if source else []
    problems += _misspelt(env)
    variables: dict[Loc, str] = {}
    if isinstance(data, dict):
        _anchor(data, path)
        _overlay(data, env, variables)

    def placed(loc: Loc, message: str, *, key: bool = False) -> str:
        if variable := variables.get(loc):
            return f"{variable}: {message}"
        dotted = ".".join(map(str, loc))
        return str(source.problem(loc, message, key=key)) if source else f"{dotted}: {message}"

    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(problems + list(_translated(error, placed)))) from error
    named = _named(settings) if secrets else {}
    unset = ((loc, name) for loc, name in named.items() if not env.get(name))
    problems += [placed(loc, message) for loc, message in _unmet(settings)]
    problems += [placed(loc, f"the environment variable {name} is not set") for loc, name in unset]
    problems += [placed(loc, message) for loc, message in _unfit(named, env)]
    if problems:
        raise SettingsError("\n".join(problems))
    settings._secrets.update((name, env[name]) for name in named.values())
    return settings


def variable_names(section: type[Section] = Settings, loc: Loc = ()) -> dict[str, Loc]:
    """Return the environment variable of every setting that has one, with the setting's place."""
    found: dict[str, Loc] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= variable_names(inner, (*loc, name))
        elif _entry_type(inner) is None:
            found["_".join(("HOLDGATE", *map(str, loc), name)).upper()] = (*loc, name)
    return found


def _entry_type(annotation: object) -> type[Section] | None:
    """The section that each entry of a list is; None if it is no list of sections."""
    inner = (annotation, *get_args(annotation))
    return next((e for e in inner if isinstance(e, type) and issubclass(e, Section)), None)


def _read(path: Path) -> Source:
    try:
        return Source(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8, from byte {error.start} on") from error
    except PolicyError as error:
        raise SettingsError(str(error)) from error


def _misspelt(env: Mapping[str, str]) -> list[str]:
    """Say which variables are almost ours. Kubernetes sets others, such as HOLDGATE_PORT."""
    known = variable_names()
    strangers = sorted(name for name in env if name.startswith("HOLDGATE_") and name not in known)
    nearest = {name: get_close_matches(name, known, n=1, cutoff=0.9) for name in strangers}
    return [f"{name}: unknown; did you mean {near[0]}?" for name, near in nearest.items() if near]


def _anchor(data: dict[str, JSON], path: Path | None) -> None:
    """Make the folders named in the file relative to it."""
    for name in ("policies", "calibrators"):
        if path and isinstance(folder := data.get(name), str):
            data[name] = str(path.parent / folder)


def _overlay(data: dict[str, JSON], env: Mapping[str, str], variables: dict[Loc, str]) -> None:
    """Put the values of the environment into `data`, and their places into `variables`."""
    for variable, loc in variable_names().items():
        if not env.get(variable):
            continue
        section: JSON = data
        for part in loc[:-1]:
            section = section.setdefault(str(part), {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[str(loc[-1])] = env[variable]
            variables[loc] = variable
    if isinstance(policies := data.get("policies"), str):
        data.setdefault("calibrators", str(Path(policies).parent / "calibrators"))
    if not data.get("models"):
        data["models"] = [{"match": "*"}]
    models = data["models"]
    for index, entry in enumerate(models if isinstance(models, list) else ()):
        if isinstance(entry, dict) and not _says_where(entry):
            entry["base_url"] = env.get("OPENAI_BASE_URL") or None
            entry["api_key_env"] = "OPENAI_API_KEY" if env.get("OPENAI_API_KEY") else None
            variables["models", index, "base_url"] = "OPENAI_BASE_URL"


def _says_where(entry: dict[str, JSON]) -> bool:
    named = bool(entry.get("base_url") or entry.get("api_key_env"))
    return named or entry.get("provider", "openai") != "openai"


def _translated(error: ValidationError, placed: Callable[..., str]) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        loc = detail["loc"]
        match detail["type"]:
            case "extra_forbidden":
                near = get_close_matches(str(loc[-1]), _known_keys(loc[:-1]), n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                yield placed(loc, f"unknown key '{loc[-1]}'{hint}", key=True)
            case "missing":
                yield placed(loc[:-1], f"missing key '{loc[-1]}'")
            case "model_type":
                yield placed(loc, "must be a mapping of settings")
            case _:
                yield placed(loc, detail["msg"].removeprefix("Value error, "))


def _known_keys(loc: Loc) -> list[str]:
    section: type[Section] = Settings
    for part in loc:
        if isinstance(part, str):
            section = _entry_type(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _named(settings: Settings) -> dict[Loc, str]:
    """The variables that hold secrets, by the place that names them."""
    places: list[tuple[Loc, str | None]] = [(("audit_secret_env",), settings.audit_secret_env)]
    for index, entry in enumerate(settings.models):
        places.append((("models", index, "api_key_env"), entry.api_key_env))
    for index, hook in enumerate(settings.webhooks):
        places.append((("webhooks", index, "secret_env"), hook.secret_env))
    return {loc: name for loc, name in places if name}


def _unfit(named: Mapping[Loc, str], env: Mapping[str, str]) -> Iterator[tuple[Loc, str]]:
    """Find the secrets that nothing can be signed with."""
    for loc, name in named.items():
        if loc[0] == "webhooks" and not all(map(_is_signing_secret, env.get(name, "").split())):
            yield (
                loc,
                f"{name} must hold whsec_ and 24 to 64 random bytes in base64: "
                'make it with `echo "whsec_$(openssl rand -base64 32)"`',
            )


def _is_signing_secret(secret: str) -> bool:
    """Whether it has the form that the Standard Webhooks specification demands ("Signature scheme")."""
    try:
        key = b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        return False
    return secret.startswith("whsec_") and 24 <= len(key) <= 64


def _unmet(settings: Settings) -> Iterator[tuple[Loc, str]]:
    """Find what the settings presuppose and is not so."""
    if not settings.policies.is_dir():
        yield ("policies",), f"there is no folder {settings.policies}"
    for index, entry in enumerate(settings.models):
        loc: Loc = ("models", index)
        earlier = [other.match for other in settings.models[:index]]
        if "*" in earlier or entry.match in earlier:
            yield (*loc, "match"), f"an entry above already takes all of {entry.match}"
        if entry.provider != "openai" and find_spec("litellm") is None:
            yield (*loc, "provider"), "needs litellm: install holdgate[providers]"
        for place, model in enumerate(entry.fallbacks):
            if not any(fnmatchcase(model, other.match) for other in settings.models):
                yield (*loc, "fallbacks", place), f"no entry of models matches {model}"
    names = [hook.name for hook in settings.webhooks]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield ("webhooks", index, "name"), f"an entry above is named {name} too"
