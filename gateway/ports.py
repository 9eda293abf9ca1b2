"""The seams: what the use cases need of the world. Each has two implementations, or a test needs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Protocol, Self

import msgspec

from gateway.errors import UpstreamError
from gateway.records import (
    Alarm,
    ApiKey,
    Asked,
    DecisionRecord,
    Delivery,
    Economics,
    Label,
    LabelledDecision,
    NewLabel,
    NewTask,
    Observed,
    Resolution,
    Said,
    Spend,
    Standing,
    Tally,
    TaskRecord,
    TaskState,
)
from policies import Calibrator, PolicySet


class LivePolicies(Protocol):
    """The policies and calibrators now in force; a request keeps the policies it began with."""

    @property
    def current(self) -> PolicySet:
        """The policies, in order."""

    @property
    def calibrators(self) -> Mapping[str, Calibrator]:
        """The calibrators, by name."""


class Clock(Protocol):
    """The time: aware UTC for records, a monotonic counter for durations, and waiting."""

    def now(self) -> datetime:
        """The time, aware UTC."""

    def monotonic_s(self) -> float:
        """A count of seconds that never goes back."""


class Store(Protocol):
    """The truth. What a method says is written is durable when it returns; every method may raise `StoreError`."""

    async def record(
        self,
        decision: DecisionRecord,
        task: NewTask | None = None,
        *,
        erase_at: datetime | None = None,
        redacted_request: bytes | None = None,
        redacted_response: bytes | None = None,
    ) -> None:
        """Store a decision, its audit entry, its task with outbox row, and its spending in one transaction, by group commit.

        At `erase_at` (None: never) request and response are replaced by their redacted copies, or erased if there are
        none; a correction is erased with them.
        """

    async def decision(self, decision_id: str) -> DecisionRecord | None:
        """The decision with that id."""

    async def decision_by_upstream_id(self, upstream_id: str) -> DecisionRecord | None:
        """The newest decision on the response that the provider gave that id."""

    async def decision_by_fingerprint(
        self, fingerprint: str, since: datetime
    ) -> DecisionRecord | None:
        """The newest decision on the same call made since then."""

    async def recent(self, policy: str, limit: int) -> Sequence[DecisionRecord]:
        """The newest decisions of a policy (its name), newest first."""

    async def task(self, task_id: str) -> TaskRecord | None:
        """The task with that id."""

    async def task_of(self, decision_id: str) -> TaskRecord | None:
        """The task that was made with a decision, if there was one; not those for second opinions."""

    async def awaits_opinion(self, decision_id: str) -> bool:
        """Whether a second opinion on a decision has been asked for and not yet been given."""

    async def tasks_of(self, decision_ids: Sequence[str]) -> Mapping[str, TaskRecord]:
        """The tasks that were made with those of these decisions that had one, by decision id."""

    async def unlabelled(self, since: datetime, after: str, limit: int) -> Sequence[DecisionRecord]:
        """Answered decisions taken since then that nobody has labelled, by id, those after the given one."""

    async def queue(
        self, now: datetime, limit: int, reviewer: str | None = None
    ) -> Sequence[TaskRecord]:
        """Unresolved tasks, highest risk first, then by deadline, then oldest; lapsed claims show as open.

        For a reviewer without second opinions on what they have judged themselves.
        """

    async def claim(self, task_id: str, reviewer: str, now: datetime, lease_s: float) -> TaskRecord:
        """Lease a task to a reviewer, or renew their lease.

        Raises `NotFound`, or `Conflict` if another reviewer's claim is live, the task is terminal, or it is a second opinion
        on what the reviewer has judged.
        """

    async def release(self, task_id: str, reviewer: str, now: datetime) -> TaskRecord:
        """Give a claim back. Raises `NotFound`, or `Conflict` if the reviewer does not hold it."""

    async def resolve(self, resolution: Resolution) -> TaskRecord:
        """Resolve a task: state, review, label, audit entry and outbox row in one transaction.

        Raises `NotFound`, or `Conflict` whose `extra["task"]` is the first one's result.
        """

    async def ask_again(self, new_ids: Mapping[str, str], now: datetime) -> Asked:
        """Open tasks for second opinions on decisions that were judged, with those ids by decision, however many ask at once.

        Where one is open already it is counted. Left out are decisions without content, and those of which nobody knows how
        probable it was that they came to be judged. Whoever has labelled the decision can neither claim nor resolve the task.
        """

    async def expire_due(self, now: datetime, limit: int) -> Sequence[TaskRecord]:
        """Expire unresolved tasks past their deadline, each once however many replicas ask; return those expired."""

    async def settled(self, task_ids: Sequence[str]) -> Mapping[str, TaskState]:
        """Which of these tasks are terminal."""

    async def label(self, labels: Sequence[NewLabel]) -> int:
        """Store what people say of responses with audit entries, all of it or nothing; how much of it is new.

        What its labeller said last of the same decision, from the same source, is not stored again. Raises `NotFound` whose
        `extra["decisions"]` are the ids that name no decision.
        """

    async def labels_after(self, policy: str, seq: int, limit: int) -> Sequence[Label]:
        """The labels of a policy (its name) after the one with that number, oldest first."""

    async def said(self, decision_ids: Sequence[str]) -> Mapping[str, Said]:
        """What people and judges said of those of these decisions that there are, by id."""

    async def labels_since(self, at: datetime) -> Sequence[Label]:
        """The labels given since then, oldest first."""

    async def label_counts(self) -> Mapping[str, tuple[int, int]]:
        """By policy, how many decisions were judged, and how many of them somebody found not acceptable."""

    async def labelled(self, after: str, limit: int) -> Sequence[LabelledDecision]:
        """Decisions that were judged, each with its labels reduced to one, in order of their ids.

        Those after the given decision id ("" for the first).
        """

    async def tallies(self, since: datetime) -> Sequence[Tally]:
        """How many answered decisions of each policy came to each action since then, from an index alone."""

    async def observed(
        self, label: str, after: tuple[datetime, str], until: datetime, limit: int
    ) -> Sequence[Observed]:
        """The numbers of a policy's answered decisions before a time, in order of time and id, those after the given two.

        `label` is the policy's, with its digest.
        """

    async def standings(self) -> Sequence[Standing]:
        """Where every policy stands of which that is stored, without what the monitors remember."""

    async def standing(self, policy: str) -> Standing | None:
        """Where a policy (its name) stands, with what the monitors remember; None if nothing is stored."""

    async def put_standing(
        self, standing: Standing, raised: Sequence[Alarm] = (), *, clear: bool = False
    ) -> bool:
        """Store a standing, with audit entry and outbox row for each alarm raised; `clear` the policy's open alarms before.

        Only if `version` is one more than what is stored (0 where nothing is): False if somebody was first, and then nothing
        is stored.
        """

    async def alarm(self, alarm_id: str) -> Alarm | None:
        """The alarm with that id."""

    async def open_alarms(self) -> Sequence[Alarm]:
        """The alarms that are not cleared, by policy and kind."""

    async def erase_due(self, now: datetime, limit: int) -> int:
        """Erase contents whose time has come; return how many decisions were touched."""

    async def spend(self, spends: Sequence[Spend]) -> None:
        """Add what judges cost to their stages' accounts, apart from any decision."""

    async def spent(self, day: date) -> Mapping[tuple[str, str], float]:
        """What the judges of each stage, by policy and name, cost on a day, in US dollars."""

    async def economics(self, since: datetime) -> Economics:
        """What each layer did since then, from indexes alone."""

    async def dispatch(
        self, takers: Mapping[str, Sequence[str]], before: datetime, limit: int
    ) -> int:
        """Make a delivery of each event of the outbox for each webhook that takes its kind; return how many events.

        Events that nobody takes, and events and deliveries from before that time, are dropped.
        """

    async def take_deliveries(
        self, webhook: str, now: datetime, lease_s: float, limit: int
    ) -> Sequence[Delivery]:
        """The deliveries due, longest due first, each an attempt on; nobody else gets them within the lease."""

    async def put_off_delivery(self, delivery_id: str, until: datetime) -> None:
        """Have a delivery due again at that time."""

    async def finish_delivery(self, delivery_id: str) -> None:
        """Forget a delivery."""

    async def announce_samples(self, every: int, now: datetime) -> bool:
        """Put `labels.ready` into the outbox if so many training samples have come since it last was; True if so.

        However many labels there are, a bounded number is read. Of any number of replicas that ask, one is told so.
        """

    async def create_key(self, key: ApiKey) -> None:
        """Store an API key. Raises `Conflict` if the name is taken."""

    async def key_by_digest(self, digest: str) -> ApiKey | None:
        """The unrevoked key with that SHA-256."""

    async def keys(self) -> Sequence[ApiKey]:
        """Every key, newest first."""

    async def revoke_key(self, name: str, now: datetime) -> None:
        """Revoke a key. Raises `NotFound`."""

    async def ping(self) -> None:
        """Return if the store can be written; raise `StoreError` if not."""

    async def close(self) -> None:
        """Finish what is under way and let go of everything."""


class Event(msgspec.Struct, frozen=True):
    """Something happened to a thing: `kind` such as `task.settled` or `task.opened`, and the thing's id."""

    kind: str
    id: str


class Bus(Protocol):
    """Wake-ups between parts and replicas. Nothing is lost that may not be: the store is the truth."""

    async def publish(self, event: Event) -> None:
        """Tell every subscriber of every replica, this one included, soon, or not at all. Never raises for a lost bus."""

    def subscribe(self, handler: Callable[[Event], None]) -> Callable[[], None]:
        """Call `handler` on the event loop for every event from now on; returns the way to stop it."""

    async def recall(self, key: str) -> bytes | None:
        """What a replica kept under that key, if it is at hand at once. Never raises for a lost bus."""

    async def keep(self, key: str, value: bytes, for_s: float) -> None:
        """Have every replica recall this for so many seconds, or not at all. Never raises for a lost bus."""

    async def close(self) -> None:
        """Let go of connections."""


class Attempt(msgspec.Struct, frozen=True):
    """One try at a provider: the model asked, its status or the error's `code`, and the time taken."""

    model: str | None
    status: int | None
    error: str | None
    ms: float


class UpstreamCall(msgspec.Struct, frozen=True):
    """A call to a provider.

    `path` is below the base URL and percent-encoded as the client wrote it (`/chat/completions`),
    `query` the same without its question mark. `model` is what the body asks for; None where a call
    has no model. `headers` are the client's; what may not go upstream is left out on the way.
    `readable` asks for a body that is not compressed, because we read it. Every try is appended to
    `attempts`, whether the call succeeds or raises. `patience_s` is given for calls of our own, which
    nobody else repeats: transient faults are tried again within so many seconds, at least twice, and
    no other model answers in the place of the one that was asked.
    """

    method: str
    path: str
    body: bytes | AsyncIterator[bytes] = b""
    headers: Sequence[tuple[str, str]] = ()
    query: str = ""
    model: str | None = None
    readable: bool = False
    attempts: list[Attempt] = msgspec.field(default_factory=list)
    patience_s: float | None = None


class UpstreamResponse:
    """What a provider answered: status and headers (names in lower case) are here, the body is still on its way.

    Read it once, by `read` or by `iter_chunks`; both may raise `UpstreamError`. Closing it before its
    end, which leaving the context or being cancelled does, ends the connection: the provider stops.
    """

    __slots__ = ("_chunks", "_close", "headers", "status")

    def __init__(
        self,
        status: int,
        headers: list[tuple[str, str]],
        chunks: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None] | None] = lambda: None,
    ) -> None:
        self.status = status
        self.headers = headers
        self._chunks = chunks
        self._close = close

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return next((value for key, value in self.headers if key == name), None)

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """The body piece by piece, as it arrives."""
        try:
            async for chunk in self._chunks:
                yield chunk
        finally:
            await self.close()

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises `UpstreamError` if it is longer than `limit_bytes`."""
        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in self._chunks:
                size += len(chunk)
                if size > limit_bytes:
                    raise UpstreamError(
                        f"The provider's response is longer than {limit_bytes} bytes "
                        "(limits.response_bytes).",
                        code="upstream_response_too_large",
                    )
                parts.append(chunk)
        finally:
            await self.close()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def close(self) -> None:
        """Let go of the connection: kept for the next call if the body is at its end, else closed."""
        if (closing := self._close()) is not None:
            await closing

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class Upstream(Protocol):
    """The way to the providers."""

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """Return as soon as the provider's status and headers are known, whatever the status.

        Raises `NotFound` for a model nobody serves, `UpstreamError` if the provider cannot be
        reached, `UpstreamTimeout` if it does not answer in time. Cancelling the caller ends the
        connection.
        """


class Models(Upstream, Protocol):
    """The providers by model: `send` goes to the one that serves the call's model."""

    def top_logprobs(self, model: str) -> int | None:
        """How many alternatives per token may be asked of the model; None if it gives no logprobs."""

    def refuses_logprobs(self, model: str, status: int, body: bytes) -> bool:
        """Whether an answer refuses logprobs; if so the model is not asked for them for a while."""

    def list_models(self) -> bytes | None:
        """The models in the shape of GET /v1/models; None if the provider is to be asked."""
