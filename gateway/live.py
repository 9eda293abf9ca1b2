"""Streams let through while they are checked: decided on and recorded before their end goes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable

from gateway import sse
from gateway.asking import Answer, read_collected
from gateway.calls import Call, Reply, relayed
from gateway.errors import GatewayError, StoreError, UpstreamError
from gateway.judging import Assessor, stopped
from gateway.ports import Clock
from gateway.recording import Outcome, Recorder, blocked
from gateway.streaming import Collected, Relay
from gateway.window import Window
from policies import Action, Match, Mode, Policy, StreamMode


class LiveStreams:
    """The streams now being let through."""

    def __init__(
        self, assessor: Assessor, recorder: Recorder, clock: Clock, *, response_bytes: int
    ) -> None:
        self._assessor = assessor
        self._recorder = recorder
        self._clock = clock
        self._response_bytes = response_bytes
        self._ending: set[asyncio.Future[GatewayError | None]] = set()

    async def reply(self, call: Call, match: Match, answer: Answer, mode: StreamMode) -> Reply:
        """The reply to a call whose answer is a stream still to come; what is decided on it can only be asked for later."""
        headers = [
            *relayed(answer.headers),
            ("x-request-id", call.request_id),
            ("x-holdgate-decision", call.id),
            ("x-holdgate-policy", match.policy.label),
        ]
        events = self._events(call, match, answer, mode)
        # A generator that has not begun ends without a word, and with it the call to the provider and its record.
        await anext(events)
        return Reply(200, headers, events)

    async def drain(self) -> None:
        """Wait until the decisions of streams whose clients left are durable."""
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _events(
        self, call: Call, match: Match, answer: Answer, mode: StreamMode
    ) -> AsyncGenerator[bytes]:
        """The stream as it comes behind an empty part, decided on and recorded before its end is let through."""
        assert answer.live is not None
        collected = Collected(sse.Assembler(call.endpoint))
        window = Window(match.policy) if mode is StreamMode.WINDOW else None

        ending: asyncio.Future[GatewayError | None] | None = None

        def conclude(collected: Collected) -> Awaitable[GatewayError | None]:
            nonlocal ending
            if ending is None:
                ending = asyncio.ensure_future(self._conclude(call, match, answer, collected))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
            return asyncio.shield(ending)

        events = Relay(
            answer.live,
            collected,
            strip=answer.question.injected,
            window=window,
            limit_bytes=self._response_bytes,
            lenient=match.policy.mode is Mode.OBSERVE,
            conclude=conclude,
        ).events()
        try:
            yield b""
            async for part in events:
                yield part
        except (GeneratorExit, asyncio.CancelledError):
            if ending is None:
                collected.fault, collected.message = "truncated", "the client went away"
                conclude(collected)
            raise
        finally:
            await events.aclose()
            await answer.live.close()

    async def _conclude(
        self, call: Call, match: Match, answer: Answer, collected: Collected
    ) -> GatewayError | None:
        """Decide on a stream that has been let through; what to tell its client in place of a good end, if anything."""
        answer.upstream_ms = 1000 * (self._clock.monotonic_s() - call.received_s)
        collected.check()
        read_collected(answer, collected)
        try:
            reading = answer.reading
            if reading is None or reading.is_failure or (answer.fault and not reading.choices):
                unanswered = self._assessor.unanswered(
                    call, match.policy, Action.RETURN, answer.message
                )
                await self._recorder.record(Outcome(call, match, unanswered, answer, answer.body))
                return _failure(answer, match.policy)
            judgement = await self._assessor.judge(call, match.policy, answer, attempts_left=0)
            if answer.fault == "blocked":
                judgement = stopped(judgement, answer.message)
            body = answer.delivered_body(judgement.decision)
            note = answer.message or None
            if collected.assembler.says_more:
                note = note or "the stream said more than what was checked: its whole answer"
            record, _ = await self._recorder.record(
                Outcome(call, match, judgement, answer, body, note)
            )
        except StoreError as error:
            return error
        if record.action in (Action.BLOCK, Action.HOLD):
            return blocked(record)
        return _failure(answer, match.policy)


def _failure(answer: Answer, policy: Policy) -> UpstreamError | None:
    """What the client of a stream that went wrong is told, unless the stream itself has told it or nothing is enforced."""
    if answer.fault in (None, "error", "blocked") or policy.mode is Mode.OBSERVE:
        return None
    return UpstreamError(answer.message, code=f"upstream_{answer.fault}")
