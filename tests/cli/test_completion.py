"""`qlora completion`: the scripts complete every command and its options; bash runs its own here."""

import shutil
import subprocess

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
