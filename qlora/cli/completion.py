"""`qlora completion`: a completion script for a shell, written from the commands themselves. It calls no program."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from qlora.cli.app import app

BASH = """\
_qlora() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words=""
    if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -o bashdefault -F _qlora qlora
"""
# As a file of $fpath the script is the body of the function and completes; read by `source` it registers the function.
ZSH = """\
#compdef qlora
_qlora() {{
    local -a candidates
    if (( CURRENT == 2 )); then candidates=({commands}); else
        case $words[2] in
{cases}
        esac
        _files
    fi
    compadd -- $candidates
}}
if [[ $funcstack[1] == _qlora ]]; then _qlora "$@"; else
    (( $+functions[compdef] )) || {{ autoload -U compinit && compinit; }}
    compdef _qlora qlora
fi
"""


class Shell(StrEnum):
    """The shells that a script is written for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="the shell that reads the script")]) -> None:
    """Print a script that completes commands, options and files in a shell.

    Example: qlora completion bash > ~/.local/share/bash-completion/completions/qlora
    """
    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    writers = {Shell.BASH: _bash, Shell.ZSH: _zsh, Shell.FISH: _fish}
    typer.echo(writers[shell](commands), nl=False)


def _bash(commands: Mapping[str, Any]) -> str:
    cases = (f'            {name}) words="{" ".join(_words(command))}" ;;' for name, command in commands.items())
    return BASH.format(commands=" ".join(commands), cases="\n".join(cases))


def _zsh(commands: Mapping[str, Any]) -> str:
    cases = (f"            {name}) candidates=({' '.join(_words(command))}) ;;" for name, command in commands.items())
    return ZSH.format(commands=" ".join(commands), cases="\n".join(cases))


def _fish(commands: Mapping[str, Any]) -> str:
    lines = ["complete -c qlora -e"]
    for name, command in commands.items():
        help_text = (command.help or "").strip().splitlines()[0].replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c qlora -f -n __fish_use_subcommand -a {name} -d '{help_text}'")
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        for word in _words(command):
            lines.append(f"complete -c qlora {seen} {f'-l {word[2:]}' if word.startswith('--') else f'-a {word}'}")
    return "\n".join(lines) + "\n"


def _words(command: Any) -> list[str]:
    """What may follow a command: the commands of a group, long options."""
    options = [name for p in command.params for name in p.opts if name.startswith("--")]
    return [*getattr(command, "commands", ()), *options, "--help"]
