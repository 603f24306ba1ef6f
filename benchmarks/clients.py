"""Requests that others wrote, to `fira serve` with a tiny random model.

    python benchmarks/clients.py fuzz --cases 1000 --seed 3
    python benchmarks/clients.py client PATH/TO/openai-python
    python benchmarks/clients.py programs FOLDER

fuzz lets schemathesis read /openapi.json and send `cases` valid requests to each operation and as
many invalid ones to each that takes a body. No response may be a 5xx, take 30 seconds, or have a
status, content type or form that is not described, and no invalid request may be accepted.

client runs the tests of a checkout of openai-python (pip install pytest-asyncio aiohttp). Tests of
what the server does not do must end in the client's error for a status 4xx; REFUSED has reasons.

programs runs the programs of docs/clients.md with FOLDER/bin/python, or with node and
FOLDER/node_modules; each must print an object of their schema, unless its package is not there.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from record import new_parser
from serve import report, serving

# The model's context: short where chats ask for as much as it allows.
TESTS = {"fuzz": 32, "client": 32, "programs": 4096}
TEST_FILES = ("test_completions.py", "test_models.py", "chat/test_completions.py")
REFUSED = {  # part of a test's name: why the server refuses its request
    "with_all_params": "asks for audio or stored chats, or for several forms at once",
    "TestModels::.*delete": "the served model cannot be deleted",
    "chat/.*_(retrieve|update|list|delete)": "the server stores no chats",
}


def fuzz(address: str, cases: int, number: int) -> dict[str, Any]:
    """Send generated requests; counts by kind, path and status, and the first of each fault."""
    import requests
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi import checks

    wanted = [not_a_server_error, checks.status_code_conformance, checks.negative_data_rejection,
              checks.content_type_conformance, checks.response_headers_conformance,
              checks.response_schema_conformance]
    counts: Counter[tuple[str, str, int]] = Counter()
    faults: dict[str, str] = {}
    seconds = [0.0]

    def check(case: Any, mode: str) -> None:
        start = time.monotonic()
        try:
            response = case.call(timeout=30)
        except requests.RequestException:
            faults.setdefault(f"{case.path} no response", case.as_curl_command())
            return
        seconds.append(time.monotonic() - start)
        counts[mode, case.path, response.status_code] += 1
        try:
            case.validate_response(response, checks=wanted)
        except FailureGroup as group:
            for fault in group.exceptions:
                faults.setdefault(f"{case.path} {type(fault).__name__}", str(fault))

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation in schema.get_all_operations():
            found = operation.ok()
            if mode is GenerationMode.POSITIVE or found.method.upper() == "POST":
                draw(found.as_strategy(generation_mode=mode), check, mode.value, cases, number)
    for name, example in faults.items():
        print(f"{name}\n{example}\n", file=sys.stderr)
    return {"requests": sum(counts.values()), "seed": number, "slowest_s": round(max(seconds), 1),
            "faults": list(faults), "responses": [[*key, n] for key, n in sorted(counts.items())]}


def draw(strategy: Any, check: Any, mode: str, cases: int, number: int) -> None:
    """Call `check` with `cases` requests of a hypothesis strategy."""
    from hypothesis import HealthCheck, given, seed, settings

    @seed(number)
    @given(case=strategy)
    @settings(max_examples=cases, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    def send(case: Any) -> None:
        check(case, mode)

    send()


class Outcomes:
    """A pytest plugin that expects the refusals and counts the outcomes by file."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import pytest
        from openai import APIStatusError

        for item in items:
            if reason := find_refusal(item.nodeid):
                item.add_marker(pytest.mark.xfail(raises=APIStatusError, strict=True,
                                                  reason=reason))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome == "failed":
            status = re.search(r"Error code: (\d+)", str(report.longrepr))
            outcome = "refused" if hasattr(report, "wasxfail") else report.outcome
            path = report.nodeid.partition("::")[0].partition("api_resources/")[2]
            self.counts[path, f"{outcome} {status[1]}" if status else outcome] += 1


def find_refusal(name: str) -> str | None:
    if "test_path_params" in name:  # the client itself refuses it before it sends anything
        return None
    name = name.replace("TestAsync", "Test")
    return next((why for part, why in REFUSED.items() if re.search(part, name)), None)


def run_client_tests(checkout: Path, address: str) -> dict[str, Any]:
    """Run the tests of openai-python with the served model's name in place of their names."""
    import pytest

    model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
    os.environ["TEST_API_BASE_URL"] = f"{address}/v1"
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        sys.path[:0] = [str(checkout.resolve() / "src"), folder]
        shutil.copytree(checkout / "tests", Path(folder) / "tests")
        paths = [Path(folder) / "tests" / "api_resources" / name for name in TEST_FILES]
        for path in paths:
            path.write_text(re.sub(r'"(gpt-[\w.-]+)"', f'"{model}"', path.read_text()))
        pytest.main([*map(str, paths), "--rootdir", folder, "-c", os.devnull, "-q", "--tb=short",
                     "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "-o",
                     "asyncio_default_fixture_loop_scope=session"], plugins=[outcomes])
    counts = sorted(outcomes.counts.items())
    faults = [key for key, _ in counts if not re.match("passed|refused 4", key[1])]
    return {"tests": [[*key, n] for key, n in counts], "faults": faults}


def run_programs(folder: Path, address: str) -> dict[str, Any]:
    """What each program of docs/clients.md printed; the faults are what is not of their schema."""
    page = (Path(__file__).parents[1] / "docs" / "clients.md").read_text("utf-8")
    results: dict[str, Any] = {"faults": []}
    for name, language, code in re.findall(r"^## (.+?)$.*?^```(python|js) no-run\n(.*?)^```", page,
                                           re.MULTILINE | re.DOTALL):
        command = (["node", "--input-type=module", "-"] if language == "js" else
                   [str(folder.resolve() / "bin" / "python"), "-"])
        done = subprocess.run(command, input=code, text=True, capture_output=True, cwd=folder, env={
            **os.environ, "OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "none"})
        missing = re.search(r"No module named '\w+'|Cannot find package '\S+'", done.stderr)
        results[name] = missing[0] if missing else done.stdout.strip() or done.stderr[-300:]
        if not missing and not re.fullmatch(r'\{"name": ?".*", ?"kind": ?"[ab]"\}', results[name]):
            results["faults"].append(name)
    return results


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("test", choices=TESTS)
    parser.add_argument("folder", type=Path, nargs="?", help="openai-python, for client; the "
                        "folder with the packages, for programs")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.test != "fuzz" and not options.folder:
        parser.error(f"{options.test} needs a folder")
    with serving(TESTS[options.test]) as (server, _):
        if options.test == "fuzz":
            result = fuzz(server.address, options.cases, options.seed)
        else:
            run = run_programs if options.test == "programs" else run_client_tests
            result = run(options.folder, server.address)
    report(options.json, result,
           {"openai-python": options.folder} if options.test == "client" else None)


if __name__ == "__main__":
    main()
