"""What runs beside the requests."""

from __future__ import annotations

import asyncio

import pytest

from gateway.app import kept_running


async def test_background_work_that_breaks_is_told_of_and_run_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    again, runs = asyncio.Event(), 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ZeroDivisionError
        again.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(kept_running(work, pause_s=0))
    await asyncio.wait_for(again.wait(), 5)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert [each.message for each in caplog.records] == ["background_work_broke"]
