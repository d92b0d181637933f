"""The vLLM peer of the captioning benchmark; runs in vLLM's own environment and imports nothing of ours.

    .venv-vllm/bin/python benchmarks/caption_vllm.py --model DIR --requests FILE --result FILE --stages 1|2

Two cores: one process of two threads, or two pipeline stages of one. Weights are loaded, the model is compiled and
other images are captioned before the clock starts; then all requests are given to `LLM.generate` at once, and vLLM
batches them as it likes. Decoding the images is part of what the clock sees, as it is for all.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import time
from pathlib import Path
from typing import Any

KV_CACHE_GB = 2


def main() -> None:
    """Generate and write the result: seconds of the counted part, and token ids of each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--stages", type=int, required=True)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    # One list of cores for each stage.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ("|" if options.stages > 1 else ",").join(map(str, cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GB))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    from vllm import LLM, SamplingParams

    requests = json.loads(options.requests.read_text())
    longest = max(request["prompt_tokens"] + request["max_new_tokens"] for request in requests["rows"])
    llm = LLM(
        model=options.model,
        dtype="float32",
        pipeline_parallel_size=options.stages,
        distributed_executor_backend="mp" if options.stages > 1 else None,
        max_model_len=longest,
        max_num_batched_tokens=max(4096, longest),
        max_num_seqs=64,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,  # no two rows have an image in common
        seed=0,
    )

    def generate(rows: list[dict[str, Any]]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0.0, max_tokens=row["max_new_tokens"], ignore_eos=True, detokenize=True)
            for row in rows
        ]
        outputs = llm.generate([prompt(row) for row in rows], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    generate(requests["warm_up"])
    started = time.perf_counter()
    token_ids = generate(requests["rows"])
    seconds = time.perf_counter() - started
    options.result.write_text(json.dumps({"seconds": seconds, "token_ids": token_ids}))


def prompt(row: dict[str, Any]) -> dict[str, Any]:
    """As vLLM takes it; it expands the image token itself."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")
    return {"prompt_token_ids": row["token_ids"], "multi_modal_data": {"image": image}}


if __name__ == "__main__":
    main()
