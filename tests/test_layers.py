"""Imports go only downwards, as the table in docs/design.md says."""
import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fira"
LAYERS = [
    {"config", "runtime", "runlog", "files"},
    {"data", "model", "loss"},
    {"checkpoint", "convert", "parallel"},
    {"train", "infer"},
    {"eval"},
    {"stages", "serve"},
    {"cli", "report", "__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES_ONLY = {"config", "runtime", "runlog", "files", "report"}
STRANGERS = ({"data", "model", "loss"},)


def imports(path):
    """Rooms of fira that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("fira."):
                yield name.split(".")[1]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def broken_rules():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for other in imports(path):
            if other == room or room in ("__init__", "__main__") or room.startswith("cli"):
                continue
            strangers = any({room, other} <= group for group in STRANGERS)
            reads_too_much = room == "report" and other not in FILES_ONLY
            if LEVEL[other] > LEVEL[room] or strangers or reads_too_much:
                yield f"{path.relative_to(PACKAGE)} imports {other}"


def test_every_room_has_a_layer():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} - {"presets"} <= set(LEVEL)


def test_imports_go_only_downwards():
    assert list(broken_rules()) == []


def test_only_runtime_reads_the_environment():
    readers = [path.name for path in PACKAGE.rglob("*.py") if "environ" in path.read_text("utf-8")]
    assert set(readers) <= {"runtime.py"}


def test_files_say_one_thing():
    lengths = {path.name: path.read_text("utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    assert {name for name, lines in lengths.items() if lines > 330} == set()
