"""`qlora doctor`: what this machine can do."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False) -> None:
    """Versions, cards, bfloat16, bitsandbytes, memory and disk, with a remedy for what is missing.

    Example: qlora doctor
    """
    from qlora.doctor import examine

    found = examine()
    if as_json:
        return answer(found)
    for key, value in found.items():
        if key != "problems":
            say(f"{key:14} {value if not isinstance(value, list) else '; '.join(map(str, value))}")
    for problem in found["problems"]:
        say(f"problem: {problem}")
    return None
