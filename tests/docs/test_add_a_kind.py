"""docs/add-a-kind.md adds a quantiser: what it says is done in a copy of the house, and the laws run over it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.documents import ROOT, fences


def test_the_kind_of_the_document_passes_the_laws_of_its_table(tmp_path: Path) -> None:
    blocks = [fence.text for fence in fences(ROOT / "docs" / "add-a-kind.md") if fence.words == ("python",)]
    module, line, bound = blocks
    shutil.copytree(ROOT / "qlora", tmp_path / "qlora", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / path, tmp_path / path)
    for path in ("tests/laws/test_quantizers.py", "tests/test_architecture.py", "tests/conftest.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)

    (tmp_path / "qlora/quant/int8.py").write_text(module)
    table, laws = tmp_path / "qlora/quant/__init__.py", tmp_path / "tests/laws/test_quantizers.py"
    table.write_text(table.read_text().replace("    dense=", line + "    dense="))
    laws.write_text(laws.read_text().replace("\nNESTED_HALF_GAP", f"\n{bound}NESTED_HALF_GAP", 1))

    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-k", "int8 or table_key or readme_draws"]
    found = subprocess.run(
        [*command, "tests/laws/test_quantizers.py", "tests/test_architecture.py"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:]
    passed = found.stdout.count(".")
    assert passed > 40, "the laws did not run over it"
