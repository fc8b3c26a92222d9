"""Clients of exports in environments of their own: a job in, answers and prompt ids out, compared with the run's."""

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

PROGRAMS = ROOT / "tests" / "clients" / "programs"
LIMIT_SECONDS = 900
VARIABLES = {
    "vllm": "QLORA_CLIENT_VLLM", "mlx": "QLORA_CLIENT_MLX", "transformers": "QLORA_CLIENT_TRANSFORMERS",
    "cyllama": "QLORA_CLIENT_CYLLAMA",
}  # fmt: skip


def python_of(client: str) -> str:
    """The Python of a client's environment; the test is skipped where there is none."""
    python = os.environ.get(VARIABLES[client], "")
    if not (python and Path(python).is_file()):
        pytest.skip(f"{client} is not installed: `make clients` installs it and sets {VARIABLES[client]}")
    return str(Path(python).absolute())


def ask(client: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the client's program on a job: {version, answers, prompts}."""
    python, job_file, answers = python_of(client), folder / f"{client}-job.json", folder / f"{client}-answers.json"
    job_file.write_text(json.dumps(job))
    command = [python, str(PROGRAMS / f"{client}_answers.py"), str(job_file), str(answers)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS, check=False
    )
    assert result.returncode == 0, f"{client}: {result.stdout[-1000:]}{result.stderr[-3000:]}"
    content: dict[str, Any] = json.loads(answers.read_text())
    return content


def equal(found: list[Any], expected: list[Any]) -> int:
    """How many answers or prompts are the same, token for token."""
    assert len(found) == len(expected)
    return sum(one == other for one, other in zip(found, expected, strict=True))


def record(client: str, version: str, model: str, export: str, figures: dict[str, int]) -> None:
    """Add a line to the results file that QLORA_CLIENTS_RESULTS names."""
    target = os.environ.get("QLORA_CLIENTS_RESULTS")
    if not target:
        return
    path = Path(target)
    content = json.loads(path.read_text()) if path.exists() else {"lines": []}
    key = {"client": client, "model": model, "export": export}
    lines = [line for line in content["lines"] if any(line[name] != value for name, value in key.items())]
    lines.append({**key, "version": version, "date": datetime.now(UTC).date().isoformat(), **figures})
    content["lines"] = sorted(lines, key=lambda line: (line["client"], line["export"], line["model"]))
    path.write_text(json.dumps(content, indent=1) + "\n")
