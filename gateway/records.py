"""What is kept: decisions, review tasks, resolutions, API keys. Values only; times are aware UTC."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from policies.model import Action, RiskTier
from validators import JSON


class TaskKind(StrEnum):
    """Why a response is in the queue. A caller may be waiting only for a hold."""

    HOLD = "hold"
    FLAG = "flag"
    AUDIT = "audit"


class TaskState(StrEnum):
    """open -> claimed -> resolved | expired; a lapsed claim is open again. The last two are terminal."""

    OPEN = "open"
    CLAIMED = "claimed"
    RESOLVED = "resolved"
    EXPIRED = "expired"


class Verdict(StrEnum):
    """What a reviewer decided. Expiry is not one: nobody decided."""

    APPROVE = "approve"
    CORRECT = "correct"
    REJECT = "reject"


class Role(StrEnum):
    """What an API key may do; each role may do what the ones before it may, except that reviewers and clients differ."""

    CLIENT = "client"
    REVIEWER = "reviewer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision as it is stored.

    `request` and `response` are the original JSON bodies (a stream is stored as the equivalent non-stream body); either is
    None where the policy keeps no content, or after erasure. `detail` is the whole `policies.decision.Decision` and the
    evidence as JSON. `fingerprint` identifies the same call made again (key, idempotency key or body). `status` is the
    upstream's HTTP status, 0 if there was no response.
    """

    id: str
    created_at: datetime
    endpoint: str
    model: str
    task_type: str | None
    policy: str
    action: Action
    risk: RiskTier
    confidence: float | None
    fingerprint: str
    key_id: str | None
    request_id: str
    status: int
    upstream_id: str | None = None
    streamed: bool = False
    latency_ms: float = 0.0
    overhead_ms: float = 0.0
    detail: dict[str, JSON] = field(default_factory=dict)
    request_digest: str = ""
    response_digest: str = ""
    request: bytes | None = None
    response: bytes | None = None
    response_headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewTask:
    """A review task to be stored together with its decision. `due_at` is the hold's deadline, None if it has none."""

    id: str
    kind: TaskKind
    inclusion: float
    due_at: datetime | None
    on_deadline: str = "reject"


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A review task as it is stored. `version` grows by one with every change and is what compare-and-set compares.

    `verdict`, `reviewer`, `reason`, `comment`, `correction` are set by a resolution; an expired task has none of them.
    `correction` is the corrected response body. `claimed_by` and `claimed_until` are set while state is CLAIMED.
    """

    id: str
    decision_id: str
    kind: TaskKind
    state: TaskState
    version: int
    risk: RiskTier
    policy: str
    confidence: float | None
    created_at: datetime
    due_at: datetime | None
    on_deadline: str
    inclusion: float
    claimed_by: str | None = None
    claimed_until: datetime | None = None
    resolved_at: datetime | None = None
    verdict: Verdict | None = None
    reviewer: str | None = None
    reason: str | None = None
    comment: str | None = None
    correction: bytes | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """A reviewer's decision on a task, to be applied only if the task is still at `version` and not terminal.

    A live claim by somebody else refuses it; no claim at all does not.
    """

    task_id: str
    version: int
    verdict: Verdict
    reviewer: str
    at: datetime
    reason: str | None = None
    comment: str | None = None
    correction: bytes | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key; only the SHA-256 of the secret is kept."""

    id: str
    name: str
    role: Role
    digest: str
    created_at: datetime
    revoked_at: datetime | None = None
