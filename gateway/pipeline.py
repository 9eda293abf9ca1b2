"""One request, top to bottom.

`Pipeline.answer` is the story: attach retries to the decision under way, ask the provider, run the cascade, decide, make
it durable, and only then say anything. Whatever touches the network or the disk comes in as a port.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable
from datetime import datetime, timedelta

from gateway import edits, sse, streaming, wire
from gateway.asking import Answer, Asker, read_collected, with_feedback
from gateway.calls import Call, Headers, Held, Reply, relayed
from gateway.delivery import decision_headers
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    ResponseBlocked,
    StoreError,
    UpstreamError,
)
from gateway.ports import Clock, LivePolicies, Store
from gateway.recording import (
    Judgement,
    Outcome,
    Recorder,
    blocking_reasons,
    stopped,
    unchecked,
    was_answered,
)
from gateway.records import DecisionRecord, TaskState
from gateway.window import Window
from policies import (
    Action,
    Decision,
    Evidence,
    Match,
    Mode,
    Policy,
    Reason,
    RunStage,
    StreamMode,
    Variables,
    assess,
    decide,
    effective_stream,
    next_step,
    run_stage,
    start,
)
from validators import Exchange

_ATTACH_WINDOW = timedelta(hours=24)


class Pipeline:
    """Answers calls to the checked endpoints.

    `audit_secret` keys the draw that samples returned responses for audit, so that a sample can be reproduced and not foreseen.
    """

    def __init__(
        self,
        store: Store,
        asker: Asker,
        recorder: Recorder,
        clock: Clock,
        *,
        policies: LivePolicies,
        audit_secret: bytes,
        response_bytes: int,
    ) -> None:
        self._store = store
        self._asker = asker
        self._recorder = recorder
        self._clock = clock
        self._policies = policies
        self._audit_secret = audit_secret
        self._response_bytes = response_bytes
        self._under_way: dict[str, asyncio.Future[None]] = {}
        self._finishing: set[asyncio.Future[GatewayError | None]] = set()

    async def answer(self, call: Call, match: Match) -> Reply | Held:
        """Decide on the response to this call and say what its client gets; the record is durable by then.

        Raises
        ------
        GatewayError
            What the client gets instead: the provider cannot be reached or understood, the response is blocked, or the
            record could not be written.
        """
        repeats = call.is_retry or call.is_idempotent
        came_at = self._clock.now()
        while repeats and (under_way := self._under_way.get(call.fingerprint)) is not None:
            await asyncio.shield(under_way)
        ended = self._under_way[call.fingerprint] = asyncio.get_running_loop().create_future()
        try:
            earlier = await self._earlier(call, match.policy, came_at) if repeats else None
            return earlier or await self._answer_anew(call, match)
        finally:
            if self._under_way.get(call.fingerprint) is ended:
                del self._under_way[call.fingerprint]
            ended.set_result(None)

    async def drain(self) -> None:
        """Wait until the decisions of streams whose clients left are durable."""
        await asyncio.gather(*self._finishing, return_exceptions=True)

    async def _earlier(self, call: Call, policy: Policy, came_at: datetime) -> Reply | Held | None:
        """What a repeated call is answered with: the decision taken on the same call, if there is one.

        A retry without a key gets a response that is held, or was decided on while it waited (since `came_at`).
        """
        since = self._clock.now() - _ATTACH_WINDOW
        record = await self._store.decision_by_fingerprint(call.fingerprint, since)
        if record is None:
            return None
        if record.request_digest != call.digest:
            raise InvalidRequest(
                "This Idempotency-Key was used with another request body.",
                code="idempotency_key_reused",
            )
        repeated = call.is_idempotent or record.created_at >= came_at
        return await self._again(call, policy, record, repeated=repeated)

    async def _again(
        self, call: Call, policy: Policy, record: DecisionRecord, *, repeated: bool
    ) -> Reply | Held | None:
        task = await self._store.task_of(record.id) if record.action is Action.HOLD else None
        if task is not None and (repeated or task.state in (TaskState.OPEN, TaskState.CLAIMED)):
            return self._held(call, policy, record, task.id)
        if not repeated or record.action is Action.HOLD or not was_answered(record):
            return None
        if record.action is Action.BLOCK:
            raise _blocked(record)
        if record.response is None:
            return None
        return _reply(call, record, None, record.response)

    async def _answer_anew(self, call: Call, match: Match) -> Reply | Held:
        policy = match.policy
        mode = effective_stream(policy) if call.streamed else StreamMode.BUFFER
        if call.endpoint == wire.RESPONSES and mode is StreamMode.WINDOW:
            mode = StreamMode.BUFFER
        question = self._asker.question(call, policy)
        attempts_left = policy.regenerate.attempts if call.endpoint != wire.COMPLETIONS else 0
        while True:
            try:
                answer = await self._asker.ask(call, question, mode)
            except GatewayError as error:
                await self._record_failure(call, match, None, Action.BLOCK, error.message)
                raise
            if answer.live is not None:
                return Reply(
                    200,
                    self._live_headers(call, policy, answer),
                    self._live(call, match, answer, mode),
                )
            if not answer.is_usable:
                return await self._fail(call, match, answer)
            judgement = self._judge(call, policy, answer, attempts_left)
            if not judgement.decision.regenerate:
                return await self._settle(call, match, answer, judgement)
            attempts_left -= 1
            question = with_feedback(call, question, answer, judgement.evidence)

    def _judge(self, call: Call, policy: Policy, answer: Answer, attempts_left: int) -> Judgement:
        """Run the cascade over an answer and decide."""
        reading = answer.reading
        exchange = Exchange(
            endpoint=call.endpoint,
            request=call.request,
            choices=reading.choices if reading else (),
            model=(reading.model if reading else "") or call.facts.model,
            task=call.facts.task,
            context=call.facts.context,
        )
        calibrator = self._policies.calibrators.get(policy.confidence.calibrator or "")
        evidence = start(policy, exchange)
        while isinstance(step := next_step(policy, evidence, exchange, calibrator), RunStage):
            results = run_stage(step.stage, exchange, self._monotonic_ms)
            evidence = step.evidence.after(step.stage.name, results)
        decision = decide(
            policy,
            step.evidence,
            risk=step.risk,
            estimate=step.estimate,
            draw=self._draw(call.id),
            attempts_left=attempts_left,
        )
        return Judgement(decision, step.evidence)

    async def _settle(
        self, call: Call, match: Match, answer: Answer, judgement: Judgement
    ) -> Reply | Held:
        """Make the decision durable, then give the client what it says."""
        body = _delivered_body(answer, judgement.decision)
        record, task = await self._recorder.record(Outcome(call, match, judgement, answer, body))
        if record.action is Action.BLOCK:
            raise _blocked(record)
        if record.action is Action.HOLD and task is not None:
            return self._held(call, match.policy, record, task.id)
        stream = answer.collected
        if stream is None or judgement.decision.redactions or stream.assembler.repeats:
            return _reply(call, record, answer, body)
        replayed = stream.replay(strip=answer.question.injected)
        return _reply(call, record, answer, replayed, is_stream=True)

    def _held(self, call: Call, policy: Policy, record: DecisionRecord, task_id: str) -> Held:
        hold = policy.hold
        return Held(
            decision_id=record.id,
            task_id=task_id,
            endpoint=call.endpoint,
            streamed=call.streamed,
            include_usage=call.include_usage,
            placeholder=hold.as_ == "placeholder",
            wait_s=call.patience.of_hold_s(hold.wait, streamed=call.streamed),
            due_at=record.created_at + timedelta(seconds=hold.deadline),
            headers=decision_headers(record),
        )

    async def _fail(self, call: Call, match: Match, answer: Answer) -> Reply:
        """Relay the provider's own error; refuse an answer that cannot be checked, unless nothing is enforced."""
        relay = answer.fault is None or (match.policy.mode is Mode.OBSERVE and bool(answer.body))
        action = Action.RETURN if relay else Action.BLOCK
        note = answer.message or f"the provider answered {answer.status}"
        record = await self._record_failure(call, match, answer, action, note)
        if not relay:
            raise UpstreamError(answer.message, code=f"upstream_{answer.fault}")
        if answer.collected is None:
            as_it_is = answer.fault is not None
            return _reply(call, record, answer, answer.client_body(), is_stream=as_it_is)
        stream = answer.collected.replay(strip=answer.question.injected)
        return _reply(call, record, answer, stream, is_stream=True)

    async def _record_failure(
        self, call: Call, match: Match, answer: Answer | None, action: Action, note: str
    ) -> DecisionRecord:
        exchange = Exchange(
            call.endpoint, call.request, (), call.facts.model, call.facts.task, call.facts.context
        )
        risk = assess(match.policy, Variables(exchange))
        decision = unchecked(action, risk, Reason("upstream", note, action))
        body = answer.body if answer is not None else None
        outcome = Outcome(call, match, Judgement(decision, Evidence()), answer, body)
        record, _ = await self._recorder.record(outcome)
        return record

    async def _live(
        self, call: Call, match: Match, answer: Answer, mode: StreamMode
    ) -> AsyncIterator[bytes]:
        """The stream as it comes, decided on and recorded before its end is let through."""
        assert answer.live is not None
        collected = streaming.Collected(sse.Assembler(call.endpoint))
        window = Window(match.policy) if mode is StreamMode.WINDOW else None

        ending: asyncio.Future[GatewayError | None] | None = None

        def conclude(collected: streaming.Collected) -> Awaitable[GatewayError | None]:
            nonlocal ending
            if ending is None:
                ending = asyncio.ensure_future(self._conclude(call, match, answer, collected))
                self._finishing.add(ending)
                ending.add_done_callback(self._finishing.discard)
            return asyncio.shield(ending)

        events = streaming.Relay(
            answer.live,
            collected,
            strip=answer.question.injected,
            window=window,
            limit_bytes=self._response_bytes,
            lenient=match.policy.mode is Mode.OBSERVE,
            conclude=conclude,
        ).events()
        try:
            async for part in events:
                yield part
        except (GeneratorExit, asyncio.CancelledError):
            if ending is None:
                collected.fault, collected.message = "truncated", "the client went away"
                conclude(collected)
            raise
        finally:
            await events.aclose()

    async def _conclude(
        self, call: Call, match: Match, answer: Answer, collected: streaming.Collected
    ) -> GatewayError | None:
        """Decide on a stream that has been let through; what to tell its client in place of a good end, if anything."""
        answer.upstream_ms = 1000 * (self._clock.monotonic_s() - call.received_s)
        collected.check()
        read_collected(answer, collected)
        try:
            reading = answer.reading
            if reading is None or reading.is_failure or (answer.fault and not reading.choices):
                await self._record_failure(call, match, answer, Action.RETURN, answer.message)
                return _failure(answer, match.policy)
            judgement = self._judge(call, match.policy, answer, attempts_left=0)
            if answer.fault == "blocked":
                judgement = stopped(judgement, answer.message)
            body = _delivered_body(answer, judgement.decision)
            note = answer.message or None
            record, _ = await self._recorder.record(
                Outcome(call, match, judgement, answer, body, note)
            )
        except StoreError as error:
            return error
        if record.action in (Action.BLOCK, Action.HOLD):
            return _blocked(record)
        return _failure(answer, match.policy)

    def _live_headers(self, call: Call, policy: Policy, answer: Answer) -> Headers:
        ours = [
            ("x-request-id", call.request_id),
            ("x-holdgate-decision", call.id),
            ("x-holdgate-policy", policy.label),
        ]
        return [*relayed(answer.headers), *ours]

    def _draw(self, decision_id: str) -> float:
        """A number in [0, 1) that the decision's id and the secret determine."""
        mac = hmac.digest(self._audit_secret, decision_id.encode(), hashlib.sha256)
        return int.from_bytes(mac[:7], "big") / 2**56

    def _monotonic_ms(self) -> float:
        return 1000 * self._clock.monotonic_s()


def _delivered_body(answer: Answer, decision: Decision) -> bytes:
    if not decision.redactions or answer.reading is None or decision.action is Action.BLOCK:
        return answer.client_body()
    texts = edits.redacted_texts(answer.reading, decision.redactions)
    return edits.with_texts(answer.body, texts, answer.reading)


def _failure(answer: Answer, policy: Policy) -> UpstreamError | None:
    """What the client of a stream that went wrong is told, unless the stream itself has told it or nothing is enforced."""
    if answer.fault in (None, "error", "blocked") or policy.mode is Mode.OBSERVE:
        return None
    return UpstreamError(answer.message, code=f"upstream_{answer.fault}")


def _blocked(record: DecisionRecord) -> ResponseBlocked:
    return ResponseBlocked(
        "The response was blocked by policy; asking again gives the same policy.",
        extra={"decision": record.id, "policy": record.policy, "reasons": blocking_reasons(record)},
        headers=dict(decision_headers(record)),
    )


def _reply(
    call: Call,
    record: DecisionRecord,
    answer: Answer | None,
    body: bytes,
    *,
    is_stream: bool = False,
) -> Reply:
    """A recorded response on its way to its client; a whole body becomes a stream if the client asked for one."""
    status = answer.status if answer else record.status
    headers = relayed(answer.headers) if answer else [("content-type", "application/json")]
    headers += [*decision_headers(record), ("x-holdgate-overhead-ms", f"{record.overhead_ms:.2f}")]
    if call.streamed and not is_stream and 200 <= status < 300:
        body = b"".join(sse.stream_of(call.endpoint, body, include_usage=call.include_usage))
        headers = [(name, value) for name, value in headers if name.lower() != "content-type"]
        headers.append(("content-type", "text/event-stream; charset=utf-8"))
    return Reply(status, headers, body)
