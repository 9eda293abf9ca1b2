"""One request, top to bottom.

`Pipeline.answer` is the story: attach retries to the decision under way, ask the provider, run the cascade, decide, make
it durable, and only then say anything. Whatever touches the network or the disk comes in as a port.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from gateway import sse, wire
from gateway.asking import Answer, Asker, with_feedback
from gateway.calls import Call, Held, Reply, relayed
from gateway.delivery import decision_headers
from gateway.errors import GatewayError, InvalidRequest, UpstreamError
from gateway.judging import Assessor, Judgement
from gateway.live import LiveStreams
from gateway.ports import Clock, Store
from gateway.recording import Outcome, Recorder, blocked, was_answered
from gateway.records import DecisionRecord, TaskState
from gateway.window import can_follow
from policies import Action, Match, Mode, Policy, StreamMode, effective_stream

_ATTACH_WINDOW = timedelta(hours=24)


class Pipeline:
    """Answers calls to the checked endpoints."""

    def __init__(
        self,
        store: Store,
        asker: Asker,
        assessor: Assessor,
        recorder: Recorder,
        live: LiveStreams,
        clock: Clock,
    ) -> None:
        self._store = store
        self._asker = asker
        self._assessor = assessor
        self._recorder = recorder
        self._live = live
        self._clock = clock
        self._under_way: dict[str, asyncio.Future[None]] = {}

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
            raise blocked(record)
        if record.response is None:
            return None
        return _reply(call, record, None, record.response)

    async def _answer_anew(self, call: Call, match: Match) -> Reply | Held:
        policy = match.policy
        mode = effective_stream(policy) if call.streamed else StreamMode.BUFFER
        if mode is StreamMode.WINDOW and not can_follow(call.endpoint, call.request):
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
                return await self._live.reply(call, match, answer, mode)
            if not answer.is_usable:
                return await self._fail(call, match, answer)
            judgement = await self._assessor.judge(call, policy, answer, attempts_left)
            if not judgement.decision.regenerate:
                return await self._settle(call, match, answer, judgement)
            attempts_left -= 1
            question = with_feedback(call, question, answer, judgement.evidence)

    async def _settle(
        self, call: Call, match: Match, answer: Answer, judgement: Judgement
    ) -> Reply | Held:
        """Make the decision durable, then give the client what it says."""
        body = answer.delivered_body(judgement.decision)
        record, task = await self._recorder.record(Outcome(call, match, judgement, answer, body))
        if record.action is Action.BLOCK:
            raise blocked(record)
        if record.action is Action.HOLD and task is not None:
            return self._held(call, match.policy, record, task.id)
        stream = answer.collected
        if stream is None or judgement.decision.redactions or stream.assembler.says_more:
            return _reply(call, record, answer, body)
        return _reply(call, record, answer, stream.replay(), is_stream=True)

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
        is_read = answer.fault is None
        if answer.collected is None or (is_read and answer.collected.assembler.says_more):
            return _reply(call, record, answer, answer.client_body(), is_stream=not is_read)
        return _reply(call, record, answer, answer.collected.replay(), is_stream=True)

    async def _record_failure(
        self, call: Call, match: Match, answer: Answer | None, action: Action, note: str
    ) -> DecisionRecord:
        judgement = self._assessor.unanswered(call, match.policy, action, note)
        body = answer.body if answer is not None else None
        record, _ = await self._recorder.record(Outcome(call, match, judgement, answer, body))
        return record


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
