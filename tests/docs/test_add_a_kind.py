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


PLANS = """
import json
import pytest
from support.command_line import qlora


def test_the_plan_of_int8():
    plans = [
        qlora("plan", "config.json", "--gpu", "80GiB", "--json", f"quant.kind={kind}").json for kind in ("int8", "nf4")
    ]
    packed = [plan["owners"]["packed_base"] for plan in plans]
    # One byte per weight against a half, and in both the same bytes for the absmax of each block of 64.
    assert packed[0] / packed[1] == pytest.approx((1 + 1 / 64) / (0.5 + 1 / 64), rel=1e-3)
"""


@pytest.mark.slow
def test_the_laws_and_the_planner_use_the_kind_of_the_page(project: Path) -> None:
    (project / "config.json").write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    (project / "tests" / "test_plan_of_int8.py").write_text(PLANS)
    tests = ("tests/laws/test_quantizers.py", "tests/test_architecture.py", "tests/test_plan_of_int8.py")
    selected = ("-n", "0", "-q", "-k", "int8 or table_key or readme_draws or (test_architecture and quant)")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *selected, *tests], cwd=project, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(project)},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert process.stdout.count(".") > 41, "the laws did not run on the new kind"
