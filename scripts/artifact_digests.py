"""The sha256 of what a checkout trains, resumes and merges: python artifact_digests.py QLORA OUT.

    python scripts/artifact_digests.py .venv/bin/qlora /tmp/digests > after.json

QLORA is the command of one installed version. Two versions that compute the same give the same JSON on one machine.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ADAPTER, MERGED = ("adapter_model.safetensors", "adapter_config.json"), ("model.safetensors", "config.json")
RECIPE = """
model: {{name: {base}, dtype: float32}}
adapter: {{rank: 4, dropout: 0.05, kind: {kind}}}
data: {{train: {data}, max_length: 256}}
optim: {{schedule: cosine, kind: {optimizer}}}
train: {{output: {output}, max_steps: 8, save_every: 4, global_batch: 8, micro_batch: 2, keep: 9}}
"""
RUNS = {
    "lora": ("lora", "paged_adamw_32bit"),
    "dora": ("dora", "adamw"),
    "rslora": ("rslora", "paged_adamw_8bit"),
}


def run(qlora: str, *arguments: str) -> None:
    """One command; its output is shown if it fails."""
    environment = {**os.environ, "QLORA_CACHE": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([qlora, *arguments], capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        sys.exit(f"qlora {' '.join(arguments)}: exit code {result.returncode}\n{result.stderr}")


def digests(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and sha256 of the files of a folder; where the base model's own folder is does not count."""
    for name in names:
        content = (folder / name).read_bytes()
        if name == "adapter_config.json":
            content = json.dumps(json.loads(content) | {"base_model_name_or_path": ""}).encode()
        yield f"{folder.name}/{name}", hashlib.sha256(content).hexdigest()


def losses(folder: Path) -> str:
    """The sha256 of all losses, in full precision."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [(line["event"], line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def main(qlora: str, out: Path) -> dict[str, str]:
    """All digests, by what they are of."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run(qlora, "demo", "--out", str(out / "demo"))
    package = Path(__file__).parents[1] / "qlora" / "demo"
    result = dict(digests(out / "demo", ADAPTER)) | dict(digests(out / "demo" / "merged", MERGED))
    certificate = json.loads((out / "demo" / "merged" / "certificate.json").read_text())
    result["demo/certificate.json"] = hashlib.sha256(json.dumps(certificate, sort_keys=True).encode()).hexdigest()
    result["demo/losses"] = losses(out / "demo")
    for name, (kind, optimizer) in RUNS.items():
        values = {"base": package / "base", "data": package / "data" / "train.jsonl", "kind": kind}
        recipe = RECIPE.format(**values, optimizer=optimizer, output=out / name)
        (out / f"{name}.yaml").write_text(recipe)
        run(qlora, "train", str(out / f"{name}.yaml"))
        resumed = f"{name}-resumed"
        shutil.copytree(out / name / "checkpoint-000004", out / resumed / "checkpoint-000004")
        run(qlora, "train", str(out / f"{name}.yaml"), f"train.output={out / resumed}")
        run(qlora, "export", str(out / name), str(out / f"{name}-merged"), "--to", "merged", "--dtype", "bfloat16")
        for folder, names in ((name, ADAPTER), (resumed, ADAPTER), (f"{name}-merged", MERGED)):
            result |= dict(digests(out / folder, names))
        state = (out / name / "checkpoint-000004" / "optimizer.safetensors").read_bytes()
        result[f"{name}/optimizer state"] = hashlib.sha256(state).hexdigest()
        result[f"{name}/losses"] = losses(out / name)
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2])), indent=1))
