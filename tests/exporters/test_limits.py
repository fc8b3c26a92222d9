"""A merge that was killed goes on; one that lost the update, or is not the trained model, is not delivered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows

from qlora.adapters.inject import adapted
from qlora.errors import QloraError
from qlora.exporters.certificate import rounding
from qlora.exporters.export_run import ExportRequest, export_run
from qlora.model import safetensors_writer
from qlora.runs.load_run import LoadedRun, load_run
from qlora.utils.atomic_files import manifest_of

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("limits")
ORDER = {"to": "merged", "onto": "dequantized", "dtype": "bfloat16", "data": None, "rows": 2}


@pytest.fixture(scope="module")
def make(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """A run whose updates are as large as the learning rate makes them."""
    made: dict[float, Path] = {}

    def run_of(rate: float) -> Path:
        if rate not in made:
            folder = tmp_path_factory.mktemp("run")
            data = write_rows(folder / "rows.jsonl", 8)
            shown = ("train.max_steps=2", f"optim.learning_rate={rate}", "data.eval_fraction=0.25")
            run(recipe_of(zoo("llama"), data, folder / "run", *shown))
            made[rate] = folder / "run"
        return made[rate]

    return run_of


class Killed(BaseException):
    """What stops a process without a word."""


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = safetensors_writer._write_tensor, []

    def broken(file: Any, tensor: Any) -> None:
        if len(done) == count:
            file.write(b"half a tensor")
            file.flush()
            raise Killed
        write(file, tensor)
        done.append(tensor.name)

    monkeypatch.setattr(safetensors_writer, "_write_tensor", broken)


@pytest.mark.parametrize(("shard_bytes", "sync_bytes"), [(10**9, 1), (60_000, 40_000), (10**9, 10**9)])
def test_a_killed_merge_goes_on_and_is_the_same_bytes(
    make: Any, sync_bytes: int, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, order = load_run(str(make(0.02))), ExportRequest(**ORDER)  # type: ignore[arg-type]
    monkeypatch.setattr(
        safetensors_writer.write_model, "__defaults__", (shard_bytes, *safetensors_writer.write_model.__defaults__[1:])
    )
    monkeypatch.setattr(safetensors_writer, "SYNC_BYTES", sync_bytes)
    answer = export_run(opened, order, str(tmp_path / "whole"))
    made_again = []
    for count in (1, 9):
        with monkeypatch.context() as patch:
            killed_after(count, patch)
            with pytest.raises(Killed):
                export_run(opened, order, str(tmp_path / "out"))
        assert not (tmp_path / "out").exists() and (tmp_path / ".partial-out").exists()
    write = safetensors_writer._write_tensor
    monkeypatch.setattr(
        safetensors_writer, "_write_tensor", lambda file, tensor: (made_again.append(1), write(file, tensor))
    )
    assert export_run(opened, order, str(tmp_path / "out")) == answer | {
        "path": str(tmp_path / "out"), "servers": json.loads(json.dumps(answer["servers"]).replace("whole", "out"))
    }  # fmt: skip
    assert manifest_of(tmp_path / "out") == manifest_of(tmp_path / "whole")
    if sync_bytes == 1:
        assert len(made_again) < 21 - 9  # of 21 tensors what was written is not made again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_order_starts_anew(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_run(str(make(0.02)))
    monkeypatch.setattr(safetensors_writer, "SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        killed_after(5, patch)
        with pytest.raises(Killed):
            export_run(opened, ExportRequest(**ORDER), str(tmp_path / "out"))  # type: ignore[arg-type]
    other = ExportRequest(**ORDER | {"dtype": "float32"})  # type: ignore[arg-type]
    export_run(opened, other, str(tmp_path / "out"))
    export_run(opened, other, str(tmp_path / "fresh"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model.safetensors"
    ).read_bytes()


# ---- what rounding takes


@pytest.mark.parametrize("rate", [0.02, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_rounding_took_is_what_it_took(make: Any, rate: float, dtype: str, tmp_path: Path) -> None:
    opened: LoadedRun = load_run(str(make(rate)))
    found = export_run(opened, ExportRequest(**ORDER | {"dtype": dtype, "max_lost": 99.0}), str(tmp_path / "out"))[
        "rounding"
    ]  # type: ignore[arg-type]
    error, size, drowned = 0.0, 0.0, {}
    for path, layer in adapted(opened.base.model).items():
        exact = layer.base.weight(torch.float32) + layer.delta()
        lost = (exact.to(getattr(torch, dtype)).double() - exact.double()).norm()
        error, size = error + float(lost**2), size + float(layer.delta().double().norm() ** 2)
        if lost > 0.5 * layer.delta().norm():
            drowned[path] = float(lost / layer.delta().norm())
    assert found["lost"] == pytest.approx((error / size) ** 0.5, rel=1e-3, abs=1e-7)
    assert found["drowned"] == pytest.approx(drowned, rel=1e-3)
    if dtype == "float32":
        assert found == {"lost": 0.0, "drowned": {}}
    if (rate, dtype) == (1e-4, "bfloat16"):
        assert len(drowned) == 14  # a weak update in 8 bits of mantissa


def test_a_drowned_update_is_not_delivered_unless_told_so(make: Any, tmp_path: Path) -> None:
    words = ("export", make(1e-4), tmp_path / "out", "--to", "merged", "--dtype", "bfloat16", "--json")
    said = qlora(*words)
    assert said.code == 1 and said.out == "" and not (tmp_path / "out").exists()
    assert "drowned" in said.err and "self_attn" in said.err + "mlp" and "--max-lost" in said.err
    insisted = qlora(*words, "--max-lost", 100).json
    assert insisted["rounding"]["lost"] > 1 and (tmp_path / "out" / "config.json").is_file()
    assert qlora(*(word if word != tmp_path / "out" else tmp_path / "half" for word in words[:-2]), "float16").code == 0


def test_a_merge_that_is_not_the_trained_model_is_not_delivered(make: Any, tmp_path: Path) -> None:
    opened = load_run(str(make(0.02)))
    limit = ExportRequest(**ORDER | {"onto": "original", "max_kl": 1e-9})  # type: ignore[arg-type]
    with pytest.raises(QloraError, match="mean KL") as caught:
        export_run(opened, limit, str(tmp_path / "out"))
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()
    onto = ExportRequest(**ORDER | {"onto": "original"})  # type: ignore[arg-type]
    found = export_run(opened, onto, str(tmp_path / "out"))["agreement"]
    assert found["mean_kl"] > 1e-9  # onto other weights than were trained on there is no limit, but a figure
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["limits"] == {"max_kl": None, "max_lost": 1.0} and certificate["rounding"]["drowned"] == {}


def test_the_losses_are_those_of_eval(make: Any, tmp_path: Path) -> None:
    source = make(0.02)
    answer = qlora("export", source, tmp_path / "out", "--to", "merged", "--dtype", "float32", "--json").json
    own = qlora("eval", source, "--json").json["loss"]
    assert answer["agreement"]["trained_loss"] == pytest.approx(own, rel=1e-5)
    assert answer["agreement"]["written_loss"] == pytest.approx(own, abs=1e-4)


def test_layers_that_were_not_trained_drown_nothing() -> None:
    noted = {"a": {"error": 1.0, "update": 0.0}, "b": {"error": 0.3, "update": 0.4}, "c": {"error": 0.0, "update": 0.3}}
    found = rounding(noted)
    assert found.drowned == pytest.approx({"b": 0.75}) and found.lost == pytest.approx(0.6)
    assert rounding({}).lost == 0 and "b 75%" in str(found)
