"""Prometheus metrics of the server: requests, times, tokens, queue, load of the experts."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import pstdev
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
GAUGES = {"running": "Requests whose tokens are being generated",
          "waiting": "Requests in the queue"}
COUNTERS = {"generated_tokens": "Tokens generated", "prompt_tokens": "Prompt tokens, cached or not",
            "cached_tokens": "Prompt tokens found in the prefix cache"}


class Metrics:
    """The server's own counters, and the engine's figures, which are read at each scrape."""

    def __init__(self, engine: Callable[[], Any]) -> None:
        """`engine` returns the engine, or None while the model is loading."""
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter("fira_requests", "Requests answered", ["endpoint", "status"],
                                registry=self.registry)
        self.seconds = Histogram("fira_request_seconds", "From a request to its response's end",
                                 ["endpoint"], buckets=SECONDS, registry=self.registry)
        self.first_token = Histogram("fira_first_token_seconds",
                                     "From a request to the first generated token",
                                     buckets=SECONDS, registry=self.registry)
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """The engine's figures and the load of its experts."""
        engine = self.engine()
        if engine is None:
            return
        stats = engine.stats
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f"fira_requests_{name}", meaning, value=stats[name])
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f"fira_{name}", meaning, value=stats[name])
        yield from expert_metrics(engine.loads)


def expert_metrics(loads: list[list[int]]) -> Iterator[Metric]:
    """The load of every expert and its imbalance, named as in the routing rows of training."""
    rows = CounterMetricFamily("fira_expert_rows", "Tokens routed to an expert",
                               labels=["layer", "expert"])
    cv, max_mean, dead = (GaugeMetricFamily(f"fira_expert_{name}", meaning, labels=["layer"])
                          for name, meaning in (
                              ("cv", "Standard deviation over mean of the load"),
                              ("max_mean", "Largest load over the mean load"),
                              ("dead", "Experts without a token")))
    for layer, counts in enumerate(loads):
        for expert, count in enumerate(counts):
            rows.add_metric([str(layer), str(expert)], count)
        if mean := sum(counts) / len(counts):
            cv.add_metric([str(layer)], pstdev(counts) / mean)
            max_mean.add_metric([str(layer)], max(counts) / mean)
            dead.add_metric([str(layer)], counts.count(0))
    yield from (rows, cv, max_mean, dead)
