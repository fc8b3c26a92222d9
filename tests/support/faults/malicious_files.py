"""Files that run code when they are unpickled, imported or believed, in every place where a trainer could meet them."""

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
from support.child_processes import Child, Tell
from support.paths import ATTACKS
from support.small_runs import recipe_of, write_rows

PICKLE = ATTACKS / "canary.pkl"
CODE = "import os\nopen(os.environ['QLORA_CANARY'], 'a').close()\n"

BESIDE_A_BASE = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "model.pt", "model.pth", "model.ckpt",
    "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt", "rng_state.pth",
    "tokenizer.pkl", "tokenizer.model", "spiece.model", "vocab.pkl", "merges.txt", "added_tokens.json", "dataset.arrow",
)  # fmt: skip
INSTEAD_IN_A_BASE = (
    "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json",
)  # fmt: skip
CODE_IN_A_BASE = (
    "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "setup.py", "conftest.py",
    "custom_generate/generate.py",
)  # fmt: skip
BESIDE_AN_ADAPTER = ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "pytorch_model.bin", "eva_state.pkl")
INSTEAD_IN_AN_ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json")
BESIDE_A_CHECKPOINT = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "scaler.pt",
    "random_states_0.pkl",
    "trainer_state.json",
)
INSTEAD_IN_A_CHECKPOINT = (
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
IN_A_RECIPE = (
    "!!python/object/apply:os.system ['touch $QLORA_CANARY']", "!!python/name:os.system", "!!python/module:evil",
    "{_component_: os.system, command: 'touch $QLORA_CANARY'}", "${oc.env:HOME}", "!ENV ${HOME}",
    "{plugins: [evil]}", "{path: 'python:evil'}",
)  # fmt: skip


@dataclass
class Found:
    """What became of the placements."""

    placements: int = 0
    canaries: int = 0
    traces: int = 0  # stack traces, or messages that blame the program
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.canaries or self.traces)


@dataclass(frozen=True)
class Scene:
    """A base, rows and a finished run, copied before they are spoilt."""

    base: Path
    rows: Path
    run: Path

    def fresh(self, home: Path) -> "Scene":
        shutil.rmtree(home / "scene", ignore_errors=True)
        base, run = (
            Path(shutil.copytree(each, home / "scene" / name))
            for each, name in ((self.base, "base"), (self.run, "run"))
        )
        return Scene(base, Path(shutil.copy(self.rows, home / "scene")), run)

    def commands(self, home: Path) -> list[list[str]]:
        """Start, go on, evaluate, generate and export, on what is here."""
        recipe = home / "scene" / "recipe.yaml"
        if not recipe.exists():
            recipe.write_text(
                dump(recipe_of(self.base, self.rows, self.run, "train.max_steps=3", "train.save_every=1"))
            )
        fresh = home / "scene" / "fresh"
        adapter = ("--adapter", str(self.run))
        return [
            ["check", str(recipe)],
            ["train", str(recipe), f"train.output={fresh}", "train.max_steps=1"],
            ["train", str(recipe)],
            ["eval", str(self.base), *adapter, "--data", str(self.rows)],
            ["generate", str(self.run), "hello", "--max-new-tokens", "1"],
            ["export", str(self.run), str(home / "scene" / "merged"), "--to", "merged", "--rows", "0"],
        ]


Placement = tuple[str, Callable[[Scene], Any]]


def placements() -> Iterator[Placement]:
    """Every placement by its name, as a function that spoils a scene."""
    pickled, zipped = PICKLE.read_bytes(), _torch_zip()
    yield from _named("base: beside", BESIDE_A_BASE, lambda scene, name: _put(scene.base / name, pickled))
    yield from _named("base: a zip", BESIDE_A_BASE[:3], lambda scene, name: _put(scene.base / name, zipped))
    yield from _named("base: instead of", INSTEAD_IN_A_BASE, lambda scene, name: _put(scene.base / name, pickled))
    yield from _named("base: code", CODE_IN_A_BASE, lambda scene, name: _code(scene.base, name))
    yield from _named("adapter: beside", BESIDE_AN_ADAPTER, lambda scene, name: _put(scene.run / name, pickled))
    yield from _named("adapter: instead of", INSTEAD_IN_AN_ADAPTER, lambda scene, name: _put(scene.run / name, pickled))
    yield from _named(
        "checkpoint: beside", BESIDE_A_CHECKPOINT, lambda scene, name: _put(_newest(scene) / name, zipped)
    )
    for content in (pickled, zipped):
        yield from _named("checkpoint: instead of", INSTEAD_IN_A_CHECKPOINT, partial(_instead, content))
    yield from _named("data:", AS_DATA, _as_data)
    yield from _named("recipe:", IN_A_RECIPE, _in_recipe)
    yield "data: a folder with a script", _script


def _named(place: str, names: Iterable[str], spoil: Callable[[Scene, str], Any]) -> Iterator[Placement]:
    for name in names:
        yield f"{place} {name}", lambda scene, name=name: spoil(scene, name)


def place_all(scene: Scene, home: Path, chosen: slice, report: Callable[[Found], None]) -> Found:
    """Each placement in a fresh scene, all verbs run over it."""
    found, canary = Found(), home / "canary"
    for name, spoil in list(placements())[chosen]:
        spoilt = scene.fresh(home)
        spoil(spoilt)

        def work(tell: Tell, spoilt: Scene = spoilt) -> None:
            os.environ["QLORA_CANARY"] = str(canary)
            for command in spoilt.commands(home):
                tell(f"{run_cli(command)} {command[0]}")

        Child(work, home / "said").end()
        said = (home / "said").read_text()
        found.placements += 1
        if canary.exists():
            canary.unlink()
            found.canaries += 1
            found.notes.append(f"{name}: canary")
        if "Traceback" in said or "qlora's mistake" in said:
            found.traces += 1
            found.notes.append(f"{name}: {said[-400:]}")
        (home / "said").unlink()
        report(found)
    shutil.rmtree(home / "scene", ignore_errors=True)
    return found


def scene_in(home: Path, model: Path) -> Scene:
    """A finished run of three steps."""
    from qlora.runs.train import train

    rows, output = write_rows(home / "rows.jsonl", 8), home / "spoilt-run"
    train(recipe_of(model, rows, output, "train.max_steps=3", "train.save_every=1"), quiet=True)
    return Scene(model, rows, output)


def _torch_zip() -> bytes:
    """What torch.save writes, with the attack where it keeps its pickle."""
    plain, evil = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            target.writestr(name, PICKLE.read_bytes() if name.endswith("data.pkl") else source.read(name))
    return evil.getvalue()


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if path.name == "pytorch_model.bin":  # nothing else to load from
        (path.parent / "model.safetensors").unlink(missing_ok=True)
    if path.name == "adapter_model.bin":
        (path.parent / "adapter_model.safetensors").unlink(missing_ok=True)


def _newest(scene: Scene) -> Path:
    return max(scene.run.glob("checkpoint-*"))


def _instead(content: bytes, scene: Scene, name: str) -> None:
    """In place of a file of a checkpoint, with a manifest that vouches for it."""
    folder = _newest(scene)
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = sha256_of(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest) + "\n")


def _code(base: Path, name: str) -> None:
    """Remote code, and the settings that ask for it."""
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


def _as_data(scene: Scene, name: str) -> None:
    scene.rows.unlink()
    path = scene.rows.with_name(name)
    path.write_bytes(PICKLE.read_bytes())
    (path.parent / "recipe.yaml").write_text(dump(recipe_of(scene.base, path, scene.run, "train.max_steps=3")))


def _in_recipe(scene: Scene, text: str) -> None:
    recipe = f"model: {scene.base}\ndata: {{train: {scene.rows}}}\ntrain: {{output: {text}}}\n"
    (scene.rows.parent / "recipe.yaml").write_text(recipe)


def _script(scene: Scene) -> None:
    """A data set's loading script, as datasets used to run them."""
    folder = scene.rows.with_name("evil")
    folder.mkdir()
    (folder / "evil.py").write_text(CODE)
    (folder / "dataset_infos.json").write_text("{}")
    (scene.rows.parent / "recipe.yaml").write_text(dump(recipe_of(scene.base, folder, scene.run)))
