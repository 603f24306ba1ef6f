"""OpenAI's tests of its Python client, against our server instead of its mock.

`python benchmarks/openai_suite.py CHECKOUT http://127.0.0.1:8000`, with a checkout of
github.com/openai/openai-python and `pip install pytest-asyncio aiohttp`, runs the checkout's own
client and its tests of chat, completions and models; their model names become the served one.
Tests that ask for what this server does not do must end in the client's error for a status in the
four hundreds: they count as refused, and each has its reason below. Prints one table and appends
it to docs/results/openai_suite.jsonl.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from record import append

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "openai_suite.jsonl"
FILES = ("test_completions.py", "test_models.py", "chat/test_completions.py")
UNSENT = "test_path_params"  # refused by the client itself, before anything is sent
NAMES = re.compile(r'"(gpt-[\w.-]+)"')
REFUSED = {  # part of a test's id: why it ends in a refusal
    "with_all_params": "asks for tools, audio, stored chats, best_of or suffix",
    "TestModels::.*delete": "the served model cannot be deleted",
    "chat/.*_(retrieve|update|list|delete)": "the server stores no chats",
}


class Suite:
    """A pytest plugin: expects the refusals, counts what happens."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        from openai import APIStatusError

        for item in items:
            reason = why_refused(item.nodeid)
            if reason:
                item.add_marker(pytest.mark.xfail(raises=APIStatusError, strict=True,
                                                  reason=reason))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome == "failed":
            status = re.search(r"Error code: (\d+)", str(report.longrepr))
            outcome = "refused" if hasattr(report, "wasxfail") else report.outcome
            path = report.nodeid.partition("::")[0].partition("api_resources/")[2]
            self.counts[path, f"{outcome} {status[1]}" if status else outcome] += 1

    @property
    def well(self) -> bool:
        """Whether every test passed or was refused as it should be."""
        return bool(self.counts) and all(
            outcome == "passed" or outcome.startswith("refused 4") for _, outcome in self.counts)


def why_refused(name: str) -> str | None:
    if UNSENT in name:
        return None
    name = name.replace("TestAsync", "Test")
    return next((why for part, why in REFUSED.items() if re.search(part, name)), None)


def copy_tests(checkout: Path, folder: Path, model: str) -> list[str]:
    """The tests, in `folder`, with the served model's name in them."""
    shutil.copytree(checkout / "tests", folder / "tests")
    paths = [folder / "tests" / "api_resources" / name for name in FILES]
    for path in paths:
        path.write_text(NAMES.sub(f'"{model}"', path.read_text()))
    return [str(path) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("address")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = httpx.get(f"{options.address}/v1/models").json()["data"][0]["id"]
    os.environ["TEST_API_BASE_URL"] = f"{options.address}/v1"
    suite = Suite()
    with tempfile.TemporaryDirectory() as folder:
        sys.path[:0] = [str(options.checkout.resolve() / "src"), folder]
        paths = copy_tests(options.checkout, Path(folder), model)
        pytest.main([*paths, "--rootdir", folder, "-c", os.devnull, "-q", "--tb=short",
                     "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "-o",
                     "asyncio_default_fixture_loop_scope=session"], plugins=[suite])
    from openai import __version__

    for (path, outcome), count in sorted(suite.counts.items()):
        print(f"{path:<26} {outcome:<12} {count}")
    append(options.json, {"client": __version__, "tests": [
        [*key, count] for key, count in sorted(suite.counts.items())]})
    sys.exit(not suite.well)


if __name__ == "__main__":
    main()
