"""Thousands of generated requests: `python benchmarks/serve_fuzz.py http://127.0.0.1:8000`.

schemathesis reads a running server's /openapi.json and sends `cases` requests of each kind, valid
and invalid ones. No answer may be a 5xx or take longer than 30 seconds. Prints one table.
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--cases", type=int, default=500)
    options = parser.parse_args()
    schema = schemathesis.openapi.from_dict(httpx.get(f"{options.address}/openapi.json").json())
    schema.config.update(base_url=options.address)
    counts: Counter[tuple[str, str, int]] = Counter()
    bad = 0
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation in schema.get_all_operations():
            found = operation.ok()
            if mode is GenerationMode.NEGATIVE and found.method.upper() != "POST":
                continue

            @given(case=found.as_strategy(generation_mode=mode))
            @settings(max_examples=options.cases, deadline=None, database=None,
                      suppress_health_check=list(HealthCheck))
            def ask(case: schemathesis.Case, mode: GenerationMode = mode) -> None:
                status = case.call(timeout=30).status_code
                counts[mode.value, case.path, status] += 1
                assert status < 500, case.as_curl_command()

            try:
                ask()
            except AssertionError as error:
                bad += 1
                print(error, file=sys.stderr)
    for (mode_name, path, status), count in sorted(counts.items()):
        print(f"{mode_name:>9}  {path:<22} {status}  {count}")
    print(f"{sum(counts.values())} requests, {bad} operations with a 5xx")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
