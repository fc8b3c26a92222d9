"""The house stays as it was drawn: imports only go down, every foreign library has one door, tables name files."""

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "qlora"
FLOORS = {
    0: ("errors", "kinds", "files", "folders", "redact", "ceiling", "quiet", "rates", "replay", "__init__"),
    1: ("config",),
    2: ("quant", "data", "distributed"),
    3: ("base", "adapters"),
    4: ("memory",),
    5: ("train", "export", "report"),
    6: (
        "api",
        "run",
        "recipe",
        "aliases",
        "said",
        "others",
        "convert",
        "compare",
        "artefacts",
        "whole",
        "reopen",
        "ask",
        "deliver",
        "push",
        "likeness",
        "talk",
        "chat",
        "naming",
        "inspection",
        "rework",
        "look",
        "sight",
        "starter",
        "prospect",
        "judgement",
        "retrospect",
        "planning",
        "strategy",
        "portions",
        "counsel",
        "obey",
        "show",
        "doctor",
        "demo",
        "sweep",
    ),
    7: ("cli", "__main__"),
}
# Rooms of one floor that may not know each other; other neighbours may, without a cycle.
STRANGERS = {"quant", "data", "distributed", "base", "adapters", "train", "report"}
DOORS = {
    "yaml": {"config"},
    "pydantic": {"config"},
    "pydantic_core": {"config"},
    "bitsandbytes": {"quant/kernels.py", "train/optim.py"},
    "transformers": {"base", "demo"},
    "huggingface_hub": {"base/folder.py", "export/hub.py"},
    "accelerate": {"distributed"},
    "datasets": {"data/tables.py"},
    "safetensors": {"adapters/weights.py", "base/shards.py", "base/packed.py", "demo"},
    "triton": {"quant/fused.py"},
    "typer": {"cli"},
    "rich": {"cli", "train/log.py", "train/panel.py", "show.py"},
    "peft": set(),
    "trl": set(),
}
FILES = sorted(HOUSE.rglob("*.py"))


def room_of(path: Path) -> str:
    """`quant` for qlora/quant/nf4.py, `run` for qlora/run.py."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in FLOORS.items() if room in rooms)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file; those only for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    left_out = {id(node) for block in checking for node in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(path)
    for module in imports_of(path):
        if not module.startswith("qlora."):
            continue
        other = module.split(".")[1]
        if other != room:
            assert floor_of(other) <= floor_of(room), f"{path.name} imports {module}, which is above it"
            if floor_of(other) == floor_of(room):
                assert other not in STRANGERS, f"{path.name} imports {module}: these rooms know nothing of each other"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_foreign_library_has_its_door(path: Path) -> None:
    place = path.relative_to(HOUSE).as_posix()
    for module in imports_of(path):
        library = module.split(".")[0]
        if library in DOORS:
            assert any(place == door or place.startswith(f"{door}/") for door in DOORS[library]), f"{place}: {library}"


def test_no_cycle_between_rooms() -> None:
    edges = {(room_of(path), m.split(".")[1]) for path in FILES for m in imports_of(path) if m.startswith("qlora.")}
    graph: dict[str, set[str]] = {}
    for here, there in edges:
        if here != there:
            graph.setdefault(here, set()).add(there)

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        later = graph.get(start, set()) - seen
        return goal in later or any(reaches(room, goal, seen | later) for room in later)

    assert [room for room in graph if reaches(room, room, set())] == []


def test_every_table_key_is_a_file_and_a_camel_case_class() -> None:
    for room in ("quant", "adapters", "data", "distributed", "export"):
        text = (HOUSE / room / "__init__.py").read_text(encoding="utf-8")
        for kind, module, name in re.findall(r'^    (\w+)="([\w.]+):(\w+)"', text, flags=re.MULTILINE):
            assert module.rsplit(".", 1)[1] == kind, f"{kind} lives in {module}"
            assert name.lower() == kind.replace("_", ""), f"{kind} is class {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_file_says_what_it_owns(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and len(docstring.splitlines()[0]) > 15


def test_the_readme_draws_the_house_as_it_is() -> None:
    readme = (HOUSE.parent / "README.md").read_text(encoding="utf-8")
    drawn = dict(re.findall(r"^\| (\d) \| (.+) \|$", readme, flags=re.MULTILINE))
    for floor, rooms in FLOORS.items():
        named = {name.strip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", drawn[str(floor)])}
        assert named == set(rooms) - {"__init__"}, f"floor {floor} of the README's plan"
    tree = readme.split("<!-- tree -->")[1].split("```")[1]
    listed = {name.rstrip("/") for name in re.findall(r"[├└]── (\S+)", tree)}
    there = {
        path.name
        for path in HOUSE.iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "py.typed") and not path.name.startswith(".")
    }
    assert listed == there


def test_the_readme_starts_with_its_two_commands() -> None:
    readme = (HOUSE.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks[0] == "make demo\nmake test\n"
    assert "accelerate launch" in blocks[1]
