"""Files that run code when they are unpickled or imported, in every place where a trainer might read them."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora.cli.app import run as run_cli
from qlora.recipe.recipe import dump
from qlora.utils.atomic_files import sha256_of
from support.child_processes import Child, Notify
from support.paths import ATTACKS
from support.small_runs import recipe_of, write_records

PICKLE = ATTACKS / "canary.pkl"
CODE = "import os\nopen(os.environ['QLORA_CANARY'], 'a').close()\n"

EXTRA_IN_BASE = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "model.pt", "model.pth", "model.ckpt",
    "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt", "rng_state.pth",
    "tokenizer.pkl", "tokenizer.model", "spiece.model", "vocab.pkl", "merges.txt", "added_tokens.json", "dataset.arrow",
)  # fmt: skip
REPLACED_IN_BASE = (
    "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json",
)  # fmt: skip
CODE_IN_BASE = (
    "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "setup.py", "conftest.py",
    "custom_generate/generate.py",
)  # fmt: skip
EXTRA_IN_ADAPTER = ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "pytorch_model.bin", "eva_state.pkl")
REPLACED_IN_ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json")
EXTRA_IN_CHECKPOINT = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "scaler.pt",
    "random_states_0.pkl",
    "trainer_state.json",
)
REPLACED_IN_CHECKPOINT = (
    "optimizer.safetensors", "position.json", "manifest.json", "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
AS_DATA = (
    "rows.jsonl",
    "rows.json",
    "rows.pkl",
    "rows.pt",
    "rows.npy",
    "rows.npz",
    "rows.arrow",
    "rows.parquet",
    "rows.csv",
)
RECIPE_VALUES = (
    "!!python/object/apply:os.system ['touch $QLORA_CANARY']", "!!python/name:os.system", "!!python/module:evil",
    "{_component_: os.system, command: 'touch $QLORA_CANARY'}", "${oc.env:HOME}", "!ENV ${HOME}",
    "{plugins: [evil]}", "{path: 'python:evil'}",
)  # fmt: skip


@dataclass
class Result:
    """Counts of malicious files, and of what they did."""

    placements: int = 0
    canaries: int = 0  # files whose code ran
    traces: int = 0  # stack traces, or messages that call it a bug of qlora
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.canaries or self.traces)


@dataclass(frozen=True)
class Workspace:
    """A base model, a data file and a finished run; tests damage copies of it."""

    base: Path
    rows: Path
    run: Path

    def copy_to(self, home: Path) -> "Workspace":
        """A new copy, `home`/workspace, in place of an older one."""
        shutil.rmtree(home / "workspace", ignore_errors=True)
        base = Path(shutil.copytree(self.base, home / "workspace" / "base"))
        run = Path(shutil.copytree(self.run, home / "workspace" / "run"))
        return Workspace(base, Path(shutil.copy(self.rows, home / "workspace")), run)

    def commands(self, home: Path) -> list[list[str]]:
        """Check, train, resume, evaluate, generate and export with this workspace's files."""
        recipe = home / "workspace" / "recipe.yaml"
        if not recipe.exists():
            recipe.write_text(
                dump(recipe_of(self.base, self.rows, self.run, "train.max_steps=3", "train.save_every=1"))
            )
        fresh = home / "workspace" / "fresh"
        adapter = ("--adapter", str(self.run))
        return [
            ["check", str(recipe)],
            ["train", str(recipe), f"train.output={fresh}", "train.max_steps=1"],
            ["train", str(recipe)],
            ["eval", str(self.base), *adapter, "--data", str(self.rows)],
            ["generate", str(self.run), "hello", "--max-new-tokens", "1"],
            ["export", str(self.run), str(home / "workspace" / "merged"), "--to", "merged", "--rows", "0"],
        ]


Placement = tuple[str, Callable[[Workspace], Any]]


def placements() -> Iterator[Placement]:
    """Every placement: its name, and a function that puts the file into a workspace."""
    pickled, zipped = PICKLE.read_bytes(), _torch_zip()
    yield from _each("base: extra", EXTRA_IN_BASE, lambda space, name: _put(space.base / name, pickled))
    yield from _each("base: a zip", EXTRA_IN_BASE[:3], lambda space, name: _put(space.base / name, zipped))
    yield from _each("base: instead of", REPLACED_IN_BASE, lambda space, name: _put(space.base / name, pickled))
    yield from _each("base: code", CODE_IN_BASE, lambda space, name: _add_code(space.base, name))
    yield from _each("adapter: extra", EXTRA_IN_ADAPTER, lambda space, name: _put(space.run / name, pickled))
    yield from _each("adapter: instead of", REPLACED_IN_ADAPTER, lambda space, name: _put(space.run / name, pickled))
    yield from _each("checkpoint: extra", EXTRA_IN_CHECKPOINT, lambda space, name: _put(_newest(space) / name, zipped))
    for content in (pickled, zipped):
        yield from _each("checkpoint: instead of", REPLACED_IN_CHECKPOINT, partial(_replace_in_checkpoint, content))
    yield from _each("data:", AS_DATA, _replace_data)
    yield from _each("recipe:", RECIPE_VALUES, _replace_recipe)
    yield "data: a folder with a script", _replace_data_by_script


def _each(label: str, names: Iterable[str], place: Callable[[Workspace, str], Any]) -> Iterator[Placement]:
    for name in names:
        yield f"{label} {name}", lambda workspace, name=name: place(workspace, name)


def place_all(workspace: Workspace, home: Path, selection: slice, report: Callable[[Result], None]) -> Result:
    """Run all commands over each placement, in a copy of the workspace each."""
    result, canary = Result(), home / "canary"
    for name, place in list(placements())[selection]:
        copy = workspace.copy_to(home)
        place(copy)

        def work(notify: Notify, copy: Workspace = copy) -> None:
            os.environ["QLORA_CANARY"] = str(canary)
            for command in copy.commands(home):
                notify(f"{run_cli(command)} {command[0]}")

        Child(work, home / "log").wait()
        output = (home / "log").read_text()
        result.placements += 1
        if canary.exists():
            canary.unlink()
            result.canaries += 1
            result.notes.append(f"{name}: canary")
        if "Traceback" in output or "a bug in qlora" in output:
            result.traces += 1
            result.notes.append(f"{name}: {output[-400:]}")
        (home / "log").unlink()
        report(result)
    shutil.rmtree(home / "workspace", ignore_errors=True)
    return result


def make_workspace(home: Path, model: Path) -> Workspace:
    """A finished run of three steps."""
    from qlora.runs.train import train

    rows, output = write_records(home / "rows.jsonl", 8), home / "finished-run"
    train(recipe_of(model, rows, output, "train.max_steps=3", "train.save_every=1"), quiet=True)
    return Workspace(model, rows, output)


def _torch_zip() -> bytes:
    """A file of torch.save, with its pickle replaced by the attack."""
    harmless, malicious = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, harmless)
    with zipfile.ZipFile(harmless) as source, zipfile.ZipFile(malicious, "w") as target:
        for name in source.namelist():
            target.writestr(name, PICKLE.read_bytes() if name.endswith("data.pkl") else source.read(name))
    return malicious.getvalue()


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if path.name == "pytorch_model.bin":  # leave nothing else to load
        (path.parent / "model.safetensors").unlink(missing_ok=True)
    if path.name == "adapter_model.bin":
        (path.parent / "adapter_model.safetensors").unlink(missing_ok=True)


def _newest(workspace: Workspace) -> Path:
    return max(workspace.run.glob("checkpoint-*"))


def _replace_in_checkpoint(content: bytes, workspace: Workspace, name: str) -> None:
    """Replace a file of a checkpoint, and its digest in the manifest."""
    folder = _newest(workspace)
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = sha256_of(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest) + "\n")


def _add_code(base: Path, name: str) -> None:
    """Add a Python file, and the settings that make transformers load remote code."""
    _put(base / name, CODE.encode())
    module = Path(name).stem
    changes: dict[str, dict[str, Any]] = {
        "modeling_evil": {"auto_map": {"AutoModelForCausalLM": f"{module}.Evil"}, "model_type": "evil"},
        "configuration_evil": {"auto_map": {"AutoConfig": f"{module}.Evil"}, "model_type": "evil"},
    }
    for file, change in (("config.json", changes.get(module, {})), ("tokenizer_config.json", {})):
        if file == "tokenizer_config.json" and module == "tokenization_evil":
            change = {"auto_map": {"AutoTokenizer": [f"{module}.Evil", None]}, "tokenizer_class": "Evil"}
        path = base / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _replace_data(workspace: Workspace, name: str) -> None:
    workspace.rows.unlink()
    path = workspace.rows.with_name(name)
    path.write_bytes(PICKLE.read_bytes())
    (path.parent / "recipe.yaml").write_text(dump(recipe_of(workspace.base, path, workspace.run, "train.max_steps=3")))


def _replace_recipe(workspace: Workspace, value: str) -> None:
    recipe = f"model: {workspace.base}\ndata: {{train: {workspace.rows}}}\ntrain: {{output: {value}}}\n"
    (workspace.rows.parent / "recipe.yaml").write_text(recipe)


def _replace_data_by_script(workspace: Workspace) -> None:
    """A data set with a loading script, which older versions of datasets ran."""
    folder = workspace.rows.with_name("evil")
    folder.mkdir()
    (folder / "evil.py").write_text(CODE)
    (folder / "dataset_infos.json").write_text("{}")
    (workspace.rows.parent / "recipe.yaml").write_text(dump(recipe_of(workspace.base, folder, workspace.run)))
