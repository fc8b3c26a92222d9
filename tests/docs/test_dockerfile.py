"""scripts/Dockerfile: rules of hadolint that matter here, and that it copies all that the package is built from."""

import re
import shutil
import subprocess
import tomllib

import pytest
from support.paths import ROOT

PATH = ROOT / "scripts" / "Dockerfile"
STEPS = re.findall(r"^(?!#)(\w+) ((?:[^\\\n]|\\\n)+)", PATH.read_text(), re.MULTILINE)


def test_the_image_has_a_pinned_base_no_caches_and_no_root() -> None:
    arguments = {name: [text for other, text in STEPS if other == name] for name, _ in STEPS}
    assert len(arguments["FROM"]) == 1 and re.fullmatch(r"python:3\.\d+-slim", arguments["FROM"][0])
    for command in arguments["RUN"]:
        if "apt-get" in command:
            assert "--no-install-recommends" in command and "rm -rf /var/lib/apt/lists/*" in command
        assert "pip install" not in command or "--no-cache-dir" in command
    assert "ADD" not in arguments and arguments["USER"][-1] != "root"
    assert all(text.startswith("[") for name in ("ENTRYPOINT", "CMD") for text in arguments[name])


def test_it_copies_all_that_the_package_is_built_from() -> None:
    copied = {source for name, text in STEPS if name == "COPY" for source in text.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= copied
    assert all((ROOT / source).exists() for source in copied)
    assert {"qlora", "recipes"} <= copied


def test_hadolint_finds_nothing() -> None:
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed")
    subprocess.run(["hadolint", str(PATH)], check=True)
