"""Imports go only downwards, in no circle; files and functions stay small; the map is complete."""
import ast
import re
from pathlib import Path

import pytest

from tests import lines

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fira"
# Bottom to top. A room may import rooms before it, and itself; never one after it.
ORDER = ["files", "runtime", "config", "runlog", "data", "model", "loss", "convert", "infer",
         "parallel", "checkpoint", "train", "eval", "stages", "serve", "report", "cli",
         "__init__", "__main__"]
STRANGERS = [{"data", "model", "loss"}, {"eval", "train"}, {"stages", "serve"}]
FILES_ONLY = {"files", "runtime", "config", "runlog"}  # all that report may import


def modules(path):
    """Modules of fira that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fira":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fira")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def broken_rules():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for module in modules(path):
            other = module.split(".")[1] if "." in module else "__init__"
            if other == room or other not in ORDER or other == "__init__":
                continue
            strangers = any({room, other} <= group for group in STRANGERS)
            reads_too_much = room == "report" and other not in FILES_ONLY
            if ORDER.index(other) > ORDER.index(room) or strangers or reads_too_much:
                yield f"{path.relative_to(PACKAGE)} imports {other}"


def test_imports_go_only_downwards():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} - {"presets"} <= set(ORDER)
    assert sorted(set(broken_rules())) == []


def test_no_files_import_each_other_in_a_circle_also_not_inside_functions():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in PACKAGE.rglob("*.py")}
    imports = {name: {module for module in modules(path) if module in names and module != name}
               for name, path in names.items()}
    while removable := [name for name, found in imports.items() if not found & imports.keys()]:
        for name in removable:
            del imports[name]
    assert {name: sorted(found & imports.keys()) for name, found in imports.items()} == {}


def test_only_runtime_reads_the_environment():
    assert {path.name for path in PACKAGE.rglob("*.py") if "environ" in path.read_text("utf-8")
            } <= {"runtime.py"}


def test_files_and_functions_stay_small():
    long = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        if text.count("\n") > 350:
            long[path.name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > 45:
                    long[f"{path.name}:{node.name}"] = size
    assert long == {}


def test_the_model_knows_one_device_and_plain_torch():
    words = re.compile(r"autocast|is_compiling|torch\.compile|ctypes|is_cuda|device\.type|numpy")
    files = set((PACKAGE / "model").rglob("*.py")) - {PACKAGE / "model" / "fast.py"}
    found = [f"{path.name}: {line.strip()}" for path in files
             for line in path.read_text("utf-8").splitlines() if words.search(line)]
    assert found == []
    assert len(list((PACKAGE / "model").rglob("*.py"))) <= 13


def test_the_code_stays_within_its_budget():
    counted, budget = lines.count(ROOT), lines.budget(ROOT)
    assert {room: (used, budget[room]) for room, used in counted.items()
            if used > budget[room]} == {}


@pytest.mark.parametrize("path", sorted(path for path in PACKAGE.rglob("*")
                                        if path.suffix in (".py", ".html", ".toml")),
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_map_names_every_file(path):
    if path.name == "__init__.py" and path.read_text().count("\n") < 9:
        return  # a docstring
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    room = next(line for line in page.splitlines()
                if line.startswith(f"| `fira/{path.relative_to(PACKAGE).parts[0]}"))
    assert path.stem in re.split(r"[\s,;.`()/]+", room), f"{path} is not in the map"
