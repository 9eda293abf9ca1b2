"""Who is asking, and what they may do."""

from __future__ import annotations

import hashlib

import pytest

from gateway import auth
from gateway.auth import Authenticator, Caller, digest, new_key
from gateway.errors import Forbidden, Unauthenticated
from gateway.records import ApiKey, Role
from gateway.store import SqlStore
from tests.fakes import FakeClock

HOST = "localhost:8080"


class Door:
    """An authenticator, its store and its clock."""

    def __init__(self, store: SqlStore, *, required: bool | None = True) -> None:
        self.clock = FakeClock()
        self.store = store
        self._auth = Authenticator(store, required=required, monotonic_s=self.clock.monotonic_s)

    async def key(self, name: str, role: Role = Role.CLIENT) -> str:
        key, secret = new_key(f"key-{name}", name, role, self.clock.now())
        await self.store.create_key(key)
        return secret

    async def ask(
        self, secret: str | None = None, *, origin: str | None = None, host: str = HOST
    ) -> Caller:
        header = None if secret is None else f"Bearer {secret}"
        return await self._auth.caller(header, origin=origin, host=host)


# ------------------------------------------------------------------------------------------------------ keys


def test_a_key_is_256_random_bits_of_which_a_digest_is_kept() -> None:
    now = FakeClock().now()
    (key, secret), (_, other) = (new_key("id", "app", Role.CLIENT, now) for _ in range(2))
    assert secret != other
    assert len(secret) == len("hgk_") + 43
    assert key == ApiKey("id", "app", Role.CLIENT, hashlib.sha256(secret.encode()).hexdigest(), now)
    assert secret not in repr(key)


async def test_a_key_says_who_is_asking(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store)
    secret = await door.key("app", Role.REVIEWER)
    caller = await door.ask(secret)
    assert (caller.name, caller.role) == ("app", Role.REVIEWER)
    assert caller.key is not None
    assert caller.key.digest == digest(secret)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_may_be_written_in_any_case(sqlite_store: SqlStore, scheme: str) -> None:
    door = Door(sqlite_store)
    secret = await door.key("app")
    asked = await door._auth.caller(f"{scheme}  {secret} ", origin=None, host=HOST)
    assert asked.name == "app"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer hgk_unknown", "Bearer {}x", "Bearer é"]
)  # fmt: skip
async def test_without_a_known_key_nothing_is_answered(
    sqlite_store: SqlStore, header: str | None
) -> None:
    door = Door(sqlite_store)
    secret = await door.key("app")
    given = header.replace("{}", secret) if header is not None else None
    with pytest.raises(Unauthenticated) as caught:
        await door._auth.caller(given, origin=None, host=HOST)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert secret not in caught.value.message


# ---------------------------------------------------------------------------------------------- when asked for


async def test_keys_that_are_always_required_are_asked_for_before_there_is_one(
    sqlite_store: SqlStore,
) -> None:
    with pytest.raises(Unauthenticated):
        await Door(sqlite_store, required=True).ask()


async def test_keys_that_are_never_required_are_not_asked_for(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store, required=False)
    await door.key("app")
    caller = await door.ask(host="gateway.example")
    assert caller == Caller("local", Role.ADMIN)


async def test_on_loopback_keys_are_asked_for_once_there_is_one(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store, required=None)
    assert (await door.ask()).role is Role.ADMIN
    secret = await door.key("app")
    door.clock.advance(5)
    assert (await door.ask(secret)).name == "app"
    with pytest.raises(Unauthenticated):
        await door.ask()


async def test_revoking_the_last_key_does_not_open_the_door(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store, required=None)
    await door.key("app")
    await sqlite_store.revoke_key("app", door.clock.now())
    with pytest.raises(Unauthenticated):
        await door.ask()


# -------------------------------------------------------------------------------------------------- caching


async def test_a_revoked_key_stops_working_within_five_seconds(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store)
    secret = await door.key("app")
    await door.ask(secret)
    await sqlite_store.revoke_key("app", door.clock.now())
    door.clock.advance(4.9)
    assert (await door.ask(secret)).name == "app"
    door.clock.advance(0.1)
    with pytest.raises(Unauthenticated):
        await door.ask(secret)


async def test_use_does_not_keep_a_revoked_key_alive(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store)
    secret = await door.key("app")
    await door.ask(secret)
    await sqlite_store.revoke_key("app", door.clock.now())
    for _ in range(2):
        door.clock.advance(2)
        await door.ask(secret)
    door.clock.advance(2)
    with pytest.raises(Unauthenticated):
        await door.ask(secret)


async def test_a_key_made_after_it_was_refused_works_within_five_seconds(
    sqlite_store: SqlStore,
) -> None:
    door = Door(sqlite_store)
    key, secret = new_key("id", "app", Role.CLIENT, door.clock.now())
    with pytest.raises(Unauthenticated):
        await door.ask(secret)
    await sqlite_store.create_key(key)
    door.clock.advance(5)
    assert (await door.ask(secret)).name == "app"


async def test_what_is_remembered_of_unknown_keys_is_bounded(
    sqlite_store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_CACHE_SIZE", 8)
    door = Door(sqlite_store)
    secret = await door.key("app")
    for number in range(50):
        with pytest.raises(Unauthenticated):
            await door.ask(f"hgk_guess_{number}")
    assert len(door._auth._keys._known) == 8
    assert (await door.ask(secret)).name == "app"


# ------------------------------------------------------------------------------------------ pages and other hosts


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "localhost:8080", True),
        (None, "127.0.0.1:8080", True),
        (None, "127.8.0.1", True),
        (None, "[::1]:8080", True),
        (None, "LOCALHOST", True),
        ("http://localhost:8080", "localhost:8080", True),
        ("https://evil.example", "localhost:8080", False),
        ("http://localhost:9999", "localhost:8080", False),
        ("null", "localhost:8080", False),
        ("", "localhost:8080", False),
        ("http://rebound.example:8080", "rebound.example:8080", False),
        (None, "rebound.example", False),
        (None, "localhost.evil.example", False),
        (None, "127.0.0.1.evil.example", False),
    ],
)
async def test_without_keys_only_this_machine_is_answered(
    sqlite_store: SqlStore, origin: str | None, host: str, allowed: bool
) -> None:
    door = Door(sqlite_store, required=None)
    if allowed:
        assert (await door.ask(origin=origin, host=host)).name == "local"
    else:
        with pytest.raises(Forbidden):
            await door.ask(origin=origin, host=host)


async def test_with_a_key_the_page_does_not_matter(sqlite_store: SqlStore) -> None:
    door = Door(sqlite_store)
    secret = await door.key("app")
    caller = await door.ask(secret, origin="https://app.example", host="gateway.example")
    assert caller.name == "app"


# ---------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("role", "wanted", "allowed"),
    [
        (Role.CLIENT, (Role.CLIENT,), True),
        (Role.CLIENT, (Role.REVIEWER,), False),
        (Role.CLIENT, (Role.ADMIN,), False),
        (Role.CLIENT, (), False),
        (Role.REVIEWER, (Role.CLIENT,), False),
        (Role.REVIEWER, (Role.REVIEWER,), True),
        (Role.REVIEWER, (Role.CLIENT, Role.REVIEWER), True),
        (Role.REVIEWER, (Role.ADMIN,), False),
        (Role.ADMIN, (Role.CLIENT,), True),
        (Role.ADMIN, (Role.REVIEWER,), True),
        (Role.ADMIN, (Role.ADMIN,), True),
        (Role.ADMIN, (), True),
    ],
)
def test_what_each_role_may_do(role: Role, wanted: tuple[Role, ...], allowed: bool) -> None:
    caller = Caller("ann", role)
    if allowed:
        caller.require(*wanted)
    else:
        with pytest.raises(Forbidden, match="ann"):
            caller.require(*wanted)
