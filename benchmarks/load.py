"""Load time and peak memory of each stage of a Ministral 3 3B, against a plain read of the same bytes.

Writes a checkpoint of the true 3B shape with random bf16 weights (7.7 GB, kept in --folder), then loads each stage of a
cut in a process of its own. Peak memory is held against what is wanted: 1.1 times the stage's own tensors, plus what a
process with the same imports has. The plain read puts the same bytes into fresh memory; what memory itself costs shows
beside it, where they pass through one small buffer. All come from the page cache: the disk is not what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from ray_ministral.config import STAGE_ENVIRONMENT  # noqa: E402

WANTED_FACTOR = 1.1
READ_BYTES = 16 << 20
SHARD_LAYERS = 4


def main() -> int:
    """Measure and print a table; status 1 when a stage's peak is above what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/bench-load"), help="where the checkpoint is kept")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=26, help="fewer for a quick try; the 3B has 26")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_child(options.child, options.folder, options.stages, options.dtype)))
        return 0
    if not (options.folder / "config.json").exists():
        print(f"writing a checkpoint with {options.layers} layers to {options.folder}", file=sys.stderr)
        write_checkpoint(options.folder, options.layers)

    empty = _in_process("imports", options)
    print(f"a process with the same imports: {empty['peak_rss'] / 1e6:.0f} MB after {empty['seconds']:.1f} s\n")
    print(
        "| stage | layers | own tensors MB | peak RSS MB | wanted MB | load s | plain read s | through one buffer s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = False
    for index in range(options.stages):
        read = _in_process(f"read:{index}", options)
        found = _in_process(f"load:{index}", options)
        wanted = WANTED_FACTOR * found["parameters"] + empty["peak_rss"]
        failed |= found["peak_rss"] > wanted
        figures = [found["parameters"] / 1e6, found["peak_rss"] / 1e6, wanted / 1e6]
        print(
            f"| {index} | {found['layers']} | {' | '.join(f'{figure:.0f}' for figure in figures)} | "
            f"{found['seconds']:.2f} | {read['seconds']:.2f} | {read['one_buffer_seconds']:.2f} |"
        )
    return 1 if failed else 0


def write_checkpoint(folder: Path, layers: int) -> None:
    """A checkpoint of the 3B's shape with random bf16 weights, by hub names, in several files with an index."""
    import torch
    from safetensors.torch import save_file

    from ray_ministral.model.checkpoint import INDEX_FILE, OUTPUT_LAYER, expected_shapes, hub_name

    config = ministral_3b(layers)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: shape for name, shape in expected_shapes(config).items() if name != OUTPUT_LAYER}
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1]) if name.startswith("model.language_model.layers") else -1
        files.setdefault(f"model-{layer // SHARD_LAYERS + 1:05d}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file_name, names in files.items():
        tensors = {}
        for name in names:
            tensors[hub_name(name)] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(
                0, 0.02, generator=generator
            )
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    weight_map = {hub_name(name): file_name for file_name, names in files.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def ministral_3b(layers: int = 26) -> object:
    """Hugging Face's config of Ministral 3 3B, as on the hub."""
    from transformers import Mistral3Config

    text = {
        "model_type": "ministral3",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 1540,
        "hidden_act": "silu",
    }
    return Mistral3Config(text_config=text, vision_config=vision, dtype="bfloat16", tie_word_embeddings=True)


def _in_process(child: str, options: argparse.Namespace) -> dict[str, float]:
    arguments = [sys.executable, "-m", "benchmarks.load", "--child", child, "--folder", str(options.folder)]
    arguments += ["--stages", str(options.stages), "--dtype", options.dtype]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | STAGE_ENVIRONMENT
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _child(what: str, folder: Path, stages: int, dtype: str) -> dict[str, float]:
    """Runs in a process of its own: `imports`, `read:N` or `load:N`."""
    started = time.perf_counter()
    from ray_ministral.captioning.stage import CaptionStage
    from ray_ministral.config import SamplingConfig, StageOptions
    from ray_ministral.model.architecture import Architecture, load_config
    from ray_ministral.pipeline.partition import Costs, Partition
    from ray_ministral.pipeline.stage import process_memory

    config = load_config(folder)
    kind, _, index = what.partition(":")
    if kind == "imports":
        return {**process_memory(), "seconds": time.perf_counter() - started}
    spec = Partition.balanced(Costs.from_flops(Architecture.from_config(config)), stages).stages[int(index)]
    if kind == "read":
        return _read_bytes(folder, spec.layers, spec.is_first, spec.is_last)
    options = StageOptions(str(folder), spec, "cpu", dtype, threads=1)  # type: ignore[arg-type]
    stage = CaptionStage(options, SamplingConfig(), kv_tokens_per_microbatch=1024)
    seconds = stage.load()
    return {**stage.memory(), "seconds": seconds, "layers": len(spec.layers)}


def _read_bytes(folder: Path, layers: range, is_first: bool, is_last: bool) -> dict[str, float]:
    """Reads the byte ranges of a stage's tensors."""
    from ray_ministral.model.checkpoint import EMBEDDING, Checkpoint

    wanted: dict[str, list[tuple[int, int]]] = {}
    for name, stored in Checkpoint.open(folder).tensors.items():
        parts = name.split(".")
        if name.startswith("model.language_model.layers"):
            mine = int(parts[3]) in layers
        elif name == EMBEDDING:
            mine = is_first or is_last
        elif name == "model.language_model.norm.weight":
            mine = is_last
        else:
            mine = is_first
        if mine:
            with open(stored.path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                begin, end = json.loads(file.read(size))[stored.name]["data_offsets"]
            wanted.setdefault(stored.path, []).append((8 + size + begin, 8 + size + end))
    into_one, total = _timed_read(wanted, keep=False)
    into_fresh, _ = _timed_read(wanted, keep=True)
    return {"seconds": into_fresh, "one_buffer_seconds": into_one, "bytes": float(total)}


def _timed_read(wanted: dict[str, list[tuple[int, int]]], *, keep: bool) -> tuple[float, int]:
    """Seconds and bytes; with `keep` each range into memory of its own, else all through one small buffer."""
    buffer = memoryview(bytearray(READ_BYTES))
    kept: list[np.ndarray] = []
    started, total = time.perf_counter(), 0
    for path, ranges in wanted.items():
        descriptor = os.open(path, os.O_RDONLY)
        for begin, end in ranges:
            if keep:
                kept.append(np.empty(end - begin, np.uint8))
            done = 0
            while begin + done < end:
                target = memoryview(kept[-1])[done:] if keep else buffer[: end - begin - done]
                done += os.preadv(descriptor, [target], begin + done)
            total += done
        os.close(descriptor)
    return time.perf_counter() - started, total


if __name__ == "__main__":
    sys.exit(main())
