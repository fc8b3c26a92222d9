"""docs/add-a-kind.md, followed in a copy of the project: the laws and the planner use the new quantizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import ROOT, fences
from support.published_models import CONFIGS


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the page has been followed."""
    folder = tmp_path_factory.mktemp("project")
    module, line, bound = (
        fence.text for fence in fences(ROOT / "docs" / "add-a-kind.md") if fence.words == ("python",)
    )
    for name in ("qlora", "tests/support"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    names = ("README.md", "pyproject.toml", "tests/conftest.py", "tests/test_architecture.py")
    for name in (*names, "tests/laws/test_quantizers.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "qlora/quant/int8.py").write_text(module)
    table, laws = folder / "qlora/quant/__init__.py", folder / "tests/laws/test_quantizers.py"
    table.write_text(table.read_text().replace("    dense=", line + "    dense="))
    laws.write_text(laws.read_text().replace("\n\n\ndef ", f"\n{bound}\n\ndef ", 1))
    return folder


def run_python(project: Path, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments], cwd=project, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(project)},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def test_the_kind_of_the_page_passes_the_laws_of_its_table(project: Path) -> None:
    tests = ("tests/laws/test_quantizers.py", "tests/test_architecture.py")
    selected = ("-n", "0", "-q", "-k", "int8 or table_key or readme_draws")
    assert run_python(project, "-m", "pytest", *selected, *tests).count(".") > 40, (
        "the laws did not run on the new kind"
    )


def test_the_planner_uses_the_kind_without_another_edit(project: Path) -> None:
    (project / "config.json").write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    packed = {}
    for kind in ("int8", "nf4"):
        plan = run_python(
            project, "-m", "qlora", "plan", "config.json", "--gpu", "80GiB", "--json", f"quant.kind={kind}"
        )
        packed[kind] = json.loads(plan)["owners"]["packed_base"]
    # One byte per weight against a half, and in both the same bytes for the absmax of each block of 64.
    assert packed["int8"] / packed["nf4"] == pytest.approx((1 + 1 / 64) / (0.5 + 1 / 64), rel=1e-3)
