"""Expandable segments are asked for where the driver has them and the user has not chosen otherwise."""

import os
import subprocess
import sys

import pytest

from qlora.utils.cuda_allocator import EXPANDABLE, use_expandable_segments


@pytest.mark.parametrize(("environment", "platform", "expected"), [
    ({}, "linux", True),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "linux", False),
    ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "linux", False),
    ({"WSL_DISTRO_NAME": "Ubuntu"}, "linux", False),
    ({}, "win32", False),
    ({}, "darwin", False),
])  # fmt: skip
def test_they_are_asked_for_unless_the_user_or_the_platform_says_no(
    environment: dict[str, str], platform: str, expected: bool
) -> None:
    before = dict(environment)
    assert use_expandable_segments(environment, platform) is expected
    assert environment == before | ({"PYTORCH_ALLOC_CONF": EXPANDABLE} if expected else {})


def test_the_command_asks_before_torch_is_imported() -> None:
    code = (
        "import sys, os; sys.argv = ['qlora', '--help']\n"
        "from qlora.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules, file=sys.__stderr__)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH")}
    environment.pop("WSL_DISTRO_NAME", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stderr.strip().endswith(f"{EXPANDABLE} False")
