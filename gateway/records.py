"""What is kept: decisions, review tasks, resolutions, API keys. Values only; times are aware UTC."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from enum import StrEnum

import msgspec

from policies.model import Action, RiskTier
from validators import JSON


class TaskKind(StrEnum):
    """Why a response is in the queue. A caller may be waiting only for a hold.

    A second opinion is asked for where what people said of a response is suspect (`policies.suspects`).
    """

    HOLD = "hold"
    FLAG = "flag"
    AUDIT = "audit"
    SECOND_OPINION = "second_opinion"


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


class LabelSource(StrEnum):
    """Who says whether a response was acceptable, and why they were asked.

    A reviewer of a held or flagged response, a reviewer of an audit, one who was asked because others' labels are suspect, the
    application that got the response, or a file.
    """

    REVIEW = "review"
    AUDIT = "audit"
    SECOND_OPINION = "second_opinion"
    FEEDBACK = "feedback"
    IMPORT = "import"


class Role(StrEnum):
    """What an API key may do; each role may do what the ones before it may, except that reviewers and clients differ."""

    CLIENT = "client"
    REVIEWER = "reviewer"
    ADMIN = "admin"


class Spend(msgspec.Struct, frozen=True):
    """What the judges of a stage cost, to be added to the stage's account of a day (UTC)."""

    day: date
    policy: str
    stage: str
    usd: float


class Effort(msgspec.Struct, frozen=True):
    """What it took to judge an answer.

    `rules_ms` is the time spent in validators. `judge_ms` is the time spent waiting for judges, None if none was asked;
    `judge_usd` what they cost, None if that is not known; `spends` the same by stage, as far as it is known.
    """

    rules_ms: float = 0.0
    judge_ms: float | None = None
    judge_usd: float | None = None
    spends: tuple[Spend, ...] = ()


class DecisionRecord(msgspec.Struct, frozen=True):
    """One decision as it is stored.

    `request` and `response` are the original JSON bodies (a stream is stored as the equivalent non-stream body); either is
    None where the policy keeps no content, or after erasure. `detail` is the whole `policies.decision.Decision` and the
    evidence as JSON. `fingerprint` identifies the same call made again (key, idempotency key or body). `status` is the
    upstream's HTTP status, 0 if there was no response. `intended` is the action that enforce mode takes, None if there was
    no answer to decide on. `inclusion` is the probability with which the response was to be reviewed, `inclusion_floor` the lowest that any
    response of the policy had at the time; 0 if nobody was to review any.
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
    detail: dict[str, JSON] = msgspec.field(default_factory=dict)
    request_digest: str = ""
    response_digest: str = ""
    request: bytes | None = None
    response: bytes | None = None
    response_headers: dict[str, str] = msgspec.field(default_factory=dict)
    effort: Effort = msgspec.field(default_factory=Effort)
    intended: Action | None = None
    inclusion: float = 0.0
    inclusion_floor: float = 0.0


class NewTask(msgspec.Struct, frozen=True):
    """A review task to be stored together with its decision. `due_at` is the hold's deadline, None if it has none."""

    id: str
    kind: TaskKind
    inclusion: float
    due_at: datetime | None
    on_deadline: str = "reject"


class TaskRecord(msgspec.Struct, frozen=True):
    """A review task as it is stored. `version` grows by one with every change and is what compare-and-set compares.

    `verdict`, `reviewer`, `reason`, `comment`, `correction` are set by a resolution; an expired task has none of them.
    `correction` is the corrected response body. `claimed_by` and `claimed_until` are set while state is CLAIMED. `worked_s` is
    the time that whoever resolved the task had claimed it for; None if they had not.
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
    worked_s: float | None = None


class Layer(msgspec.Struct, frozen=True):
    """What one layer of the cascade did in a time: rules, judge or person.

    `usd` is what it cost, as far as that is known; `unknown` is how many of its `requests` cost nobody knows what. The
    latencies are the median and the 95th percentile (nearest rank), None without requests.
    """

    name: str
    requests: int
    usd: float
    unknown: int
    latency_p50_ms: float | None
    latency_p95_ms: float | None


class Economics(msgspec.Struct, frozen=True):
    """What the layers did since a time: `decisions` taken, and of the judges' cost the part that no decision carries.

    `person_minutes` is how long the people who resolved tasks had claimed them for. `abandoned_usd` counts whole days (UTC).
    """

    decisions: int
    layers: tuple[Layer, ...]
    person_minutes: float
    abandoned_usd: float


class Resolution(msgspec.Struct, frozen=True):
    """A reviewer's decision on a task, to be applied only if the task is still at `version` and not terminal.

    A live claim by somebody else refuses it; no claim at all does not. `blind` says that the reviewer saw neither confidence nor
    verdicts.
    """

    task_id: str
    version: int
    verdict: Verdict
    reviewer: str
    at: datetime
    reason: str | None = None
    comment: str | None = None
    correction: bytes | None = None
    blind: bool = False


class NewLabel(msgspec.Struct, frozen=True):
    """What somebody says of a response: whether it was acceptable as it was.

    `weight` in (0, 1] is the trust in it. `inclusion` in (0, 1] is the probability with which the response came to be judged;
    None stands for that of its review task where a reviewer says it, and otherwise for not known: nobody drew it. `blind` says that the labeller
    saw neither confidence nor verdicts. `task_id` is the task that was resolved with it.
    """

    decision_id: str
    at: datetime
    source: LabelSource
    labeller: str
    acceptable: bool
    weight: float = 1.0
    inclusion: float | None = None
    blind: bool = False
    comment: str | None = None
    task_id: str | None = None


class Label(NewLabel, frozen=True):
    """A label as it is stored, with what its decision says; `seq` grows with every label.

    `inclusion_floor` in (0, `inclusion`] is known when `inclusion` is. `policy` is the name alone. `intended` is the action
    that enforce mode takes.
    """

    seq: int = 0
    inclusion_floor: float | None = None
    policy: str = ""
    intended: Action = Action.RETURN
    risk: RiskTier = RiskTier.MEDIUM
    confidence: float | None = None


class LabelledDecision(msgspec.Struct, frozen=True):
    """A decision that was judged, its labels reduced to one as `gateway.labels.reduced` does.

    `source`, `labeller`, `at` and `blind` are those of the label that counts most; `labels` is how many labellers there are.
    `inclusion` in (0, 1] is the probability with which it came to be judged; None if that is not known, because an
    application or a file chose it. `weight` in (0, 1] is the trust in the label. `settled` says that two labellers of that
    trust, and more than say otherwise, agree on it.
    """

    decision: DecisionRecord
    acceptable: bool
    inclusion: float | None
    source: LabelSource
    labeller: str
    at: datetime
    weight: float = 1.0
    blind: bool = False
    labels: int = 1
    settled: bool = False


class Asked(msgspec.Struct, frozen=True):
    """How many second opinions were asked for now, and how many have been asked for before and not been given yet."""

    opened: int = 0
    waiting: int = 0


class Said(msgspec.Struct, frozen=True):
    """What was said of a decision: its labels, oldest first, and by check id whether each judge passed it that came to a verdict."""

    labels: tuple[Label, ...]
    judges: Mapping[str, bool]


class Alarm(msgspec.Struct, frozen=True):
    """Something that a monitor found about a policy; open until somebody, or a new artefact, clears it.

    `kind` is the monitor's, such as `drift.confidence`; `evidence` its figures.
    """

    id: str
    at: datetime
    policy: str
    kind: str
    message: str
    evidence: dict[str, JSON]
    cleared_at: datetime | None = None


class Tally(msgspec.Struct, frozen=True):
    """How many answered decisions of a policy (its name) came to an action, as enforce mode takes it."""

    policy: str
    intended: Action
    decisions: int


class Observed(msgspec.Struct, frozen=True):
    """The numbers of a decision that monitors look at, by their name: `confidence`, `score`, and the signals it has, those of judges too."""

    id: str
    at: datetime
    values: dict[str, float]


class Standing(msgspec.Struct, frozen=True):
    """Where a policy stands: how much it is audited, and whether its calibrator may be believed.

    `suspended` says why it may not be, None if it may; `artefact` is the one that is meant, so that another is not.
    `memory` is what the monitors remember, as JSON. `version` grows by one with every change and is what compare-and-set
    compares; 0 is a policy of which nothing is stored.
    """

    policy: str
    version: int
    at: datetime
    audit_level: str
    suspended: str | None = None
    artefact: str | None = None
    memory: bytes | None = None


class Delivery(msgspec.Struct, frozen=True):
    """An event on its way to one webhook. `attempt` counts from 1; the id is the same at every attempt."""

    id: str
    kind: str
    subject: str
    at: datetime
    attempt: int


class ApiKey(msgspec.Struct, frozen=True):
    """An API key; only the SHA-256 of the secret is kept."""

    id: str
    name: str
    role: Role
    digest: str
    created_at: datetime
    revoked_at: datetime | None = None
