"""`qlora completion`: the scripts complete every command and its options; each shell that is here runs its own."""

import os
import pty
import select
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qlora.cli.app import run as run_cli


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run_cli(["completion", shell]) == 0
    return capsys.readouterr().out


def test_every_script_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["--help"]) == 0
    help_text = capsys.readouterr().out
    for shell in ("bash", "zsh", "fish"):
        text = script(shell, capsys)
        assert all(name in text and name in help_text for name in ("train", "export", "sweep", "completion"))
    assert script("zsh", capsys).startswith("#compdef qlora\n")
    assert "complete -c qlora -n '__fish_seen_subcommand_from export' -l to" in script("fish", capsys)
    assert run_cli(["completion", "csh"]) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize(
    ("words", "completed"),
    [("qlora exp", "export"), ("qlora export --base-no --t", "--to"), ("qlora recipes sh", "show"), ("qlora x y", "")],
)
def test_bash_completes_the_last_word(words: str, completed: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(words.split()) - 1
    call = f'COMP_WORDS=({words}); COMP_CWORD={count}; _qlora; echo "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", script("bash", capsys) + call], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == completed and not result.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
@pytest.mark.parametrize(("words", "completed"), [("exp", "export\t"), ("export --t", "--to"), ("recipes sh", "show")])
def test_fish_completes_the_last_word(
    words: str, completed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call = f"complete -C 'qlora {words}'"
    environment = os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run(
        ["fish", "--no-config", "-c", script("fish", capsys) + call],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert result.stdout.startswith(completed) and len(result.stdout.splitlines()) == 1 and not result.stderr


def type_in_zsh(setup: str, words: str, expected: str, home: Path) -> str:
    """What an interactive zsh shows after `setup` and `words`, up to `expected` or for 20 seconds."""
    terminal, inner = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "HOME": str(home), "PS1": "> "}
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=inner, stdout=inner, stderr=inner, env=environment, cwd=home)
    os.close(inner)
    screen, deadline = "", time.monotonic() + 20
    typed = [f'{setup}; echo re""ady\n', words]
    with suppress(OSError):  # the shell has ended
        while time.monotonic() < deadline and expected not in screen:
            if typed and (len(typed) == 2 or "\nready" in screen):
                os.write(terminal, typed.pop(0).encode())
            if select.select([terminal], [], [], 0.2)[0]:
                screen += os.read(terminal, 4096).decode(errors="replace")
    shell.kill()
    shell.wait()
    os.close(terminal)
    return screen


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
@pytest.mark.parametrize(
    ("setup", "words", "completed"),
    [
        ("source ./_qlora", "qlora recipes sh\t", "qlora recipes show "),
        ("fpath=($PWD $fpath); autoload -U compinit; compinit -u", "qlora export --base-no --t\t", "--base-no --to "),
    ],
)
def test_zsh_completes_the_last_word(
    setup: str, words: str, completed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "_qlora").write_text(script("zsh", capsys))
    assert completed in type_in_zsh(setup, words, completed, tmp_path)
