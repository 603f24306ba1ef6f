"""Thousands of generated requests: `python benchmarks/serve_fuzz.py http://127.0.0.1:8000`.

schemathesis reads a running server's /openapi.json and sends each operation `cases` valid requests
and, where it takes a body, as many invalid ones. Answers are held against the description: no 5xx,
no silence of 30 seconds, no undescribed status, content type or form, no invalid request taken.
Prints one table and appends it to docs/results/serve_fuzz.jsonl. Serve a model with a window of
some dozen tokens: chats ask for answers as long as it allows, up to 64 at a time.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from record import append
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "serve_fuzz.jsonl"
CHECKS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_headers_conformance, checks.response_schema_conformance,
          checks.negative_data_rejection]


class Tally:
    """Answers by kind, path and status; of each kind of fault the first example."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, int]] = Counter()
        self.faults: dict[tuple[str, str], str] = {}
        self.slowest = 0.0

    def ask(self, case: schemathesis.Case, mode: str) -> None:
        start = time.monotonic()
        try:
            response = case.call(timeout=30)
        except requests.RequestException:
            self.faults.setdefault((case.path, "no answer"), case.as_curl_command())
            return
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.counts[mode, case.path, response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            for fault in group.exceptions:
                self.faults.setdefault((case.path, type(fault).__name__), str(fault))


def fuzz(address: str, cases: int, number: int) -> Tally:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{address}/openapi.json").json())
    schema.config.update(base_url=address)
    tally = Tally()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation in schema.get_all_operations():
            found = operation.ok()
            if mode is GenerationMode.NEGATIVE and found.method.upper() != "POST":
                continue
            send(found.as_strategy(generation_mode=mode), tally, mode.value, cases, number)
    return tally


def send(strategy: Any, tally: Tally, mode: str, cases: int, number: int) -> None:
    """Draw `cases` requests and send them."""
    @seed(number)
    @given(case=strategy)
    @settings(max_examples=cases, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        tally.ask(case, mode)

    ask()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    tally = fuzz(options.address, options.cases, options.seed)
    for (mode, path, status), count in sorted(tally.counts.items()):
        print(f"{mode:>9}  {path:<22} {status}  {count}")
    total = sum(tally.counts.values())
    print(f"{total} requests, {len(tally.faults)} faults, slowest {tally.slowest:.1f} s")
    for (path, fault), example in tally.faults.items():
        print(f"\n{path}: {fault}\n{example}", file=sys.stderr)
    append(options.json, {
        "requests": total, "seed": options.seed, "slowest_s": round(tally.slowest, 1),
        "faults": [" ".join(key) for key in tally.faults],
        "answers": [[*key, count] for key, count in sorted(tally.counts.items())]})
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
