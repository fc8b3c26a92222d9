"""The package's structure: import directions, one module per foreign library, tables, sizes, the drawn trees."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "qlora"
# From the bottom: a package imports from lower levels only, never from one beside it.
LEVELS = (
    ("errors",),
    ("config", "utils"),
    ("quant", "data", "distributed"),
    ("model", "adapters"),
    ("memory",),
    ("training",),
    ("recipe",),
    ("runs",),
    ("exporters",),
    ("demo", "api"),
    ("cli",),
)
BESIDE = {"adapters": {"model"}, "utils": {"config"}}
FREE = {"qlora", "qlora._version", "qlora.__main__"}
LIBRARIES = {  # foreign library -> the only places that import it
    "yaml": {"config"},
    "pydantic": {"config"},
    "pydantic_core": {"config"},
    "bitsandbytes": {"quant/bitsandbytes_ops.py", "training/optimizers.py"},
    "transformers": {"model", "data/conversations/compiled_template.py"},
    "huggingface_hub": {"model/download.py", "exporters/hub.py"},
    "accelerate": {"distributed"},
    "datasets": {"data/reading/arrow.py"},
    "safetensors": {"adapters/peft_files.py", "model/safetensors_reader.py", "model/quantized_cache.py"},
    "triton": {
        "quant/triton_kernel.py",
        "model/kernels/norm_kernel.py",
        "model/kernels/product_kernel.py",
        "model/kernels/rotary_kernel.py",
    },
    "typer": {"cli"},
    "rich": {"cli", "training/run_log.py", "training/live_panel.py", "demo/walkthrough.py"},
    "gguf": {"exporters/gguf/gguf_file.py"},
    "tokenizers": {"exporters/gguf/file_tokenizer.py"},
    "lm_eval": {"runs/harness_model.py"},
    "peft": set(),
    "trl": set(),
}
MOST_ENTRIES, MOST_FILE_LINES, MOST_TEST_LINES, MOST_FUNCTION_LINES = 16, 250, 300, 40
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`qlora.quant.nf4` for qlora/quant/nf4.py, `qlora.quant` for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """`quant` for qlora.quant.nf4."""
    return module.split(".")[1]


def level_of(package: str) -> int:
    return next(level for level, packages in enumerate(LEVELS) if package in packages)


MODULES = {module_of(path): path for path in FILES}
TOP = sorted({path.relative_to(PACKAGE).parts[0] for path in FILES})  # packages, and files beside them


def files_of(top: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(PACKAGE).parts[0] == top]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file: for type checkers and by `import_module("...")` too."""
    modules: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            modules |= submodules | ({node.module} if len(submodules) < len(names) else set())
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            modules |= {node.args[0].value} if ast.unparse(node.func).endswith("import_module") else set()
    return modules


@cache
def graph() -> dict[str, set[str]]:
    """The modules of the package that each of them imports."""
    return {module: (imports_of(path) & MODULES.keys()) - {module} for module, path in MODULES.items()}


@pytest.mark.parametrize("own", sorted({package_of(module) for module in MODULES.keys() - FREE}))
def test_imports_only_go_down(own: str) -> None:
    for module in (module for module in MODULES.keys() - FREE if package_of(module) == own):
        for other in (package_of(name) for name in graph()[module] - FREE):
            beside = other == own or other in BESIDE.get(own, ())
            assert beside or level_of(other) < level_of(own), f"{module} imports {other}"


def test_no_cycle_between_files() -> None:
    remaining = {module: set(imported) for module, imported in graph().items()}
    while leaves := {module for module, imported in remaining.items() if not imported & remaining.keys()}:
        for module in leaves:
            del remaining[module]
    assert sorted(remaining) == []


def test_a_level_has_three_packages_at_most() -> None:
    packages = {package_of(module) for module in MODULES.keys() - FREE}
    assert packages == {package for level in LEVELS for package in level}
    assert all(len(level) <= 3 for level in LEVELS)


def test_the_top_of_the_package_is_small() -> None:
    hidden = ("py.typed", "_version.py")
    entries = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name not in hidden]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_no_file_name_and_no_public_class_name_occurs_twice() -> None:
    names = Counter(path.name for path in FILES if path.name != "__init__.py" and path.parent.name != "cli")
    classes = Counter(
        node.name
        for path in FILES
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in (names + classes).items() if count > 1] == []


@pytest.mark.parametrize("top", TOP)
def test_each_foreign_library_has_one_module_that_imports_it(top: str) -> None:
    for path in files_of(top):
        place = path.relative_to(PACKAGE).as_posix()
        for library in {module.split(".")[0] for module in imports_of(path)} & LIBRARIES.keys():
            owners = LIBRARIES[library]
            assert any(place == owner or place.startswith(f"{owner}/") for owner in owners), f"{place}: {library}"


def test_every_table_key_is_a_file_and_a_camel_case_class() -> None:
    for package in ("quant", "adapters", "data", "distributed", "exporters"):
        text = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
        for kind, module, name in re.findall(r'^    (\w+)="([\w.]+):(\w+)"', text, flags=re.MULTILINE):
            assert module.rsplit(".", 1)[1] == kind, f"{kind} is in {module}"
            assert name.removesuffix("Exporter").lower() == kind.replace("_", ""), f"{kind} is class {name}"


@pytest.mark.parametrize("top", TOP)
def test_files_and_functions_are_short_and_say_what_they_are(top: str) -> None:
    for path in files_of(top):
        text = path.read_text(encoding="utf-8")
        tree = tree_of(path)
        docstring = ast.get_docstring(tree)
        assert docstring and len(docstring.splitlines()[0]) > 15, path
        assert len(text.splitlines()) <= MOST_FILE_LINES, path
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
        assert {name: lines for name, lines in sizes.items() if lines > MOST_FUNCTION_LINES} == {}, path


def test_test_files_are_short_and_their_names_too() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_TEST_LINES, path
        assert [name for name in re.findall(r"def (test_\w+)", text) if len(name) >= 70] == [], path


def test_the_readme_draws_the_package_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("<!-- tree -->")[1].split("```")[1]
    listed = [name.rstrip("/") for name in re.findall(r"[├└]── ([\w.]+/?)", tree)]
    hidden = ("__init__.py", "__main__.py", "__pycache__", "py.typed", "_version.py")
    assert sorted(listed) == sorted(path.name for path in PACKAGE.iterdir() if path.name not in hidden)
    levels = [level_of(name.removesuffix(".py")) for name in listed]
    assert levels == sorted(levels, reverse=True), "from the top down"


def test_the_readme_starts_with_its_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks[0] == "make demo\nmake test\n"
    assert blocks[1] == "pip install .\n" and "accelerate launch" in blocks[2]
