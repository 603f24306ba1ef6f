"""What the server counts, in Prometheus' text form: requests, tokens, waiting, experts' load."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of the server's own, and the engine's read at each scrape."""

    def __init__(self, engine: Callable[[], Any]) -> None:
        """`engine` gives the engine, or None while the model loads."""
        self.registry = CollectorRegistry()
        self.requests = Counter("fira_requests", "Requests answered", ["endpoint", "status"],
                                registry=self.registry)
        self.seconds = Histogram("fira_request_seconds", "From request to the end of its answer",
                                 ["endpoint"], buckets=SECONDS, registry=self.registry)
        self.first_token = Histogram("fira_first_token_seconds",
                                     "From request to the answer's first token",
                                     buckets=SECONDS, registry=self.registry)
        self.registry.register(EngineMetrics(engine))  # type: ignore[arg-type]

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineMetrics:
    """The engine's figures and the routers' health, as a collector."""

    def __init__(self, engine: Callable[[], Any]) -> None:
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        engine = self.engine()
        if engine is None:
            return
        stats = engine.stats
        for name, meaning in {"running": "Requests being answered",
                              "waiting": "Requests in the queue"}.items():
            yield GaugeMetricFamily(f"fira_requests_{name}", meaning, value=stats[name])
        for name, meaning in {"generated_tokens": "Tokens generated",
                              "prompt_tokens": "Prompt tokens read or found read",
                              "cached_tokens": "Prompt tokens found read"}.items():
            yield CounterMetricFamily(f"fira_{name}", meaning, value=stats[name])
        yield from expert_metrics(engine.loads)


def expert_metrics(loads: list[list[int]]) -> Iterator[Metric]:
    """Rows per layer and expert, and what they imply, named as in training's routing rows."""
    rows = CounterMetricFamily("fira_expert_rows", "Tokens routed", labels=["layer", "expert"])
    cv = GaugeMetricFamily("fira_expert_cv", "Standard deviation over mean of the load",
                           labels=["layer"])
    busiest = GaugeMetricFamily("fira_expert_max_mean", "Busiest expert over the mean",
                                labels=["layer"])
    dead = GaugeMetricFamily("fira_expert_dead", "Experts without a token", labels=["layer"])
    for layer, counts in enumerate(loads):
        for expert, count in enumerate(counts):
            rows.add_metric([str(layer), str(expert)], count)
        mean = sum(counts) / len(counts)
        if mean:
            spread = (sum((count - mean) ** 2 for count in counts) / len(counts)) ** 0.5
            cv.add_metric([str(layer)], spread / mean)
            busiest.add_metric([str(layer)], max(counts) / mean)
            dead.add_metric([str(layer)], counts.count(0))
    yield from (rows, cv, busiest, dead)
