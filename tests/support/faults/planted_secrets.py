"""Twenty secrets in environment, arguments, URLs, data and error messages: is one ever written to a file?"""

import base64
import json
import os
import random
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qlora.cli.app import main
from qlora.recipe.recipe import dump
from qlora.utils.redact import MARK
from support.child_processes import Child, Notify
from support.small_runs import recipe_of, write_records

LETTERS = string.ascii_letters + string.digits


@dataclass
class Result:
    """Counts of secrets, of the bytes searched, and of what was found in them."""

    secrets: int = 0
    bytes_read: int = 0
    redactions: int = 0  # places where a secret was replaced
    hits: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.hits


def plant(seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """Secrets recognizable by their variable's name, and secrets of known shapes; generated, so that none is stored."""
    rng = random.Random(seed)

    def some(length: int, letters: str = LETTERS) -> str:
        return "".join(rng.choice(letters) for _ in range(length))

    variables = {
        "HF_TOKEN": "hf_" + some(34),
        "WANDB_API_KEY": some(40, "0123456789abcdef"),
        "AWS_SECRET_ACCESS_KEY": some(40),
        "MLFLOW_TRACKING_PASSWORD": some(9) + '"$\\' + some(9),
        "COMET_API_KEY": some(25),
        "MY_SERVICE_SECRET": some(12) + " " + some(12),
        "DB_CREDENTIALS": some(30),
    }
    shapes = {
        "openai": "sk-proj-" + some(40),
        "anthropic": "sk-ant-api03-" + some(60),
        "github": "ghp_" + some(36),
        "github fine": "github_pat_" + some(22) + "_" + some(40),
        "gitlab": "glpat-" + some(20),
        "aws id": "AKIA" + some(16, string.ascii_uppercase + string.digits),
        "google": "AIza" + some(35),
        "slack": "xoxb-" + some(12, string.digits) + "-" + some(24),
        "nvidia": "nvapi-" + some(60),
        "npm": "npm_" + some(36),
        "pypi": "pypi-" + some(60),
        "web token": ".".join("eyJ" + base64.urlsafe_b64encode(some(24).encode()).decode().rstrip("=") for _ in "abc"),
        "url password": some(20),
    }
    return variables, shapes


def commands(home: Path, model: Path, shapes: dict[str, str]) -> list[list[str]]:
    """Commands that check, train, fail, resume, evaluate and export, with secrets wherever a user might put one."""
    rows, output = write_records(home / "secret-rows.jsonl", 8), home / "out" / "run"
    with rows.open("a") as file:
        for name, secret in shapes.items():
            text = f"my {name} is {secret}" if name != "url password" else f"see https://me:{secret}@host/x"
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}, thanks"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    invalid = home / "invalid-rows.jsonl"
    message = json.dumps({"messages": f"Authorization: Bearer {shapes['openai']}"})
    invalid.write_text(f'{message}\n{{"no": "{shapes["github"]}\n')
    options = ("data.max_length=1024", "data.eval_fraction=0.4", "train.max_steps=2", "train.save_every=1")
    recipe, bad = home / "secret.yaml", home / "bad.yaml"
    recipe.write_text(dump(recipe_of(model, rows, output, *options)))
    address = f"https://me:{shapes['url password']}@host/data.jsonl"
    bad.write_text(f"model: {model}\ndata: {{train: '{address}'}}\ntrain: {{outptu: {shapes['gitlab']}}}\n")
    return [
        ["check", str(recipe)],
        ["train", str(recipe)],
        ["train", str(recipe), "train.max_steps=3", "optim.warmup=1"],
        ["train", str(bad)],
        ["check", str(recipe), f"data.train={invalid}"],
        ["train", str(recipe), f"data.train={invalid}"],
        ["train", str(recipe), f"data.train={address}"],
        ["train", str(recipe), f"model.name=me/{shapes['aws id']}", "--debug"],
        ["train", str(recipe), f"model.name=https://me:{shapes['url password']}@host/me/base"],
        ["train", str(recipe), f"adapter.targets={shapes['npm']}", "train.output=" + str(home / "out" / "other")],
        ["train", str(recipe), f"--password={shapes['pypi']}"],
        ["eval", str(output), "--data", address],
        ["eval", str(output), "--data", str(home / shapes["slack"])],
        ["export", str(output), str(home / "out" / "merged"), "--to", "merged", "--rows", "2"],
    ]


def search(model: Path, home: Path, seed: int, report: Callable[[Result], None]) -> Result:
    """Run all commands, then search all files and output that they wrote."""
    variables, shapes = plant(seed)
    result, out = Result(secrets=len(variables) + len(shapes)), home / "out"
    out.mkdir()

    def work(notify: Notify) -> None:
        import sys

        os.environ |= variables
        os.environ["QLORA_CACHE"] = str(out / "cache")
        for command in commands(home, model, shapes):
            sys.argv = ["qlora", *command]
            try:
                main()
            except SystemExit as stop:
                notify(f"{stop.code} {command[0]}")
        # A crash report that quotes the environment, and one in a library's format.
        sys.stderr.write(f"crash: {variables}\n")
        for name, value in variables.items():
            sys.stderr.write(f"{name} repr {value!r} {json.dumps({name: value})}\n")

    child = Child(work, out / "log")
    child.wait()
    result.notes = child.lines()
    for path in (path for path in out.rglob("*") if path.is_file()):
        _search_file(path, variables | shapes, result)
    report(result)
    shutil.rmtree(out)
    return result


def _search_file(path: Path, secrets: dict[str, str], result: Result) -> None:
    """Search a file for every secret: plain, and as JSON, Python and base64 write it."""
    content = path.read_bytes()
    result.bytes_read += len(content)
    result.redactions += content.count(MARK.encode())
    for name, secret in secrets.items():
        forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], base64.b64encode(secret.encode()).decode()}
        if any(form.encode() in content for form in forms):
            result.hits += 1
            result.notes.append(f"{name} in {path.name}")
