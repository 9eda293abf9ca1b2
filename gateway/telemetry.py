"""What an operator measures: Prometheus metrics. They never carry content."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from judges import Judge
from validators import Cause, CheckResult

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TIMED = ("upstream", "rules", "judge", "record")
_LAYERS = ("rules", "judge", "person")
_REVIEW_SECONDS = (5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)


class Metrics:
    """The metrics of one process; with several workers, `render` gives the sum over all of them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.decisions = counter(
            "holdgate_decisions_total",
            "Decisions by what was done and what enforce mode would have done.",
            ("policy", "endpoint", "action", "intended", "risk"),
        )
        self.checks = counter(
            "holdgate_checks_total", "Check results.", ("policy", "check", "outcome")
        )
        layer_seconds = histogram(
            "holdgate_layer_seconds",
            "Time a request spent in a layer: upstream, rules, judge, record.",
            ("layer",),
            buckets=_SECONDS,
        )
        self.layer_seconds = {each: layer_seconds.labels(each) for each in _TIMED}
        self.overhead_seconds = histogram(
            "holdgate_overhead_seconds",
            "Time a request spent in the gateway, waiting for the provider and for people left out.",
            buckets=_SECONDS,
        )
        layer_requests = counter(
            "holdgate_layer_requests_total", "Requests to rules, judge, person.", ("layer",)
        )
        self.layer_requests = {each: layer_requests.labels(each) for each in _LAYERS}
        layer_usd = counter(
            "holdgate_layer_usd_total",
            "US dollars a layer has cost, as far as prices are known: judge, person.",
            ("layer",),
        )
        self.layer_usd = {each: layer_usd.labels(each) for each in _LAYERS[1:]}
        self.verdicts = counter(
            "holdgate_verdicts_total",
            "Verdicts of judges, and where they came from: asked, or cached.",
            ("judge", "outcome", "source"),
        )
        self._judge_failures = counter(
            "holdgate_judge_failures_total",
            "Judges that could not tell, by the model concerned and the cause.",
            ("judge", "model", "cause"),
        )
        self.unchecked = counter(
            "holdgate_unchecked_total", "Requests passed through with no policy applied.", ("why",)
        )
        self.errors = counter("holdgate_errors_total", "Errors answered to callers.", ("code",))
        self._add_people(registry)

    def _add_people(self, registry: CollectorRegistry) -> None:
        self.waiting = Gauge(
            "holdgate_waiting_clients",
            "Clients waiting for a held response.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.settled = Counter(
            "holdgate_tasks_settled_total",
            "Review tasks settled here.",
            ("outcome",),
            registry=registry,
        )
        self.alarms = Counter(
            "holdgate_alarms_total",
            "Alarms that monitors raised here.",
            ("policy", "kind"),
            registry=registry,
        )
        self.webhooks = Counter(
            "holdgate_webhook_attempts_total",
            "Attempts to deliver an event: delivered, failed, given_up.",
            ("webhook", "outcome"),
            registry=registry,
        )
        self.quality = Gauge(
            "holdgate_quality",
            "The metrics of docs/metrics.md over the last 24 hours, by policy; all policies without one.",
            ("policy", "metric"),
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.review_seconds = Histogram(
            "holdgate_review_seconds",
            "Time from a task's creation to its resolution.",
            buckets=_REVIEW_SECONDS,
            registry=registry,
        )

    def count_judge_failure(
        self, judge: Judge, result: CheckResult, model: str | None = None
    ) -> None:
        """Count an ERROR of a judge; without a model to blame, its first one."""
        model = model or next(iter(judge.models), "")
        cause = (result.cause or Cause.RAISED).value
        self._judge_failures.labels(judge.id, model, cause).inc()

    def render(self) -> bytes:
        """The metrics in the Prometheus text format."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None:
            return generate_latest(self._registry)
        _forget_the_dead(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _forget_the_dead(folder: Path) -> None:
    """Remove the gauges of workers that were killed: nobody waits there any more."""
    for gauge in folder.glob("gauge_live*.db"):
        pid = int(gauge.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
