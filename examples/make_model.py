"""Makes the quick start's small Ministral 3: first weights and pictures, `jobs/train.py`, and a measurement.

    python examples/make_model.py --output examples/model      pictures, training, the model directory, its measurement
    python examples/make_model.py --evaluate examples/model    the measurement alone

Exit status 1 if fewer than 95 in 100 captions are right. Everything follows from the seed but the order in which a
machine adds floats. What was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from make_pairs import Pairs, write_pairs
from make_tokenizer import IMG, PAD, VOCABULARY, write_tokenizer
from measure import evaluate
from pictures import LONGEST_EDGE
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
PATCH, MERGE = 14, 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as every Pixtral has them
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
COPIED = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; the defaults made the model in the repository."""

    steps: int = 6400
    batch: int = 32
    microbatch: int = 16
    learning_rate: float = 3e-3
    warmup: int = 150
    weight_decay: float = 0.02
    beta2: float = 0.98
    checkpoint_every: int = 400

    def command(self, first: Path, pairs: Path, output: Path, seed: int) -> list[str]:
        """The training job: two stages of a thread each, on a Ray cluster of its own."""
        return [
            *(sys.executable, str(ROOT / "jobs" / "train.py"), "--address", "local"),
            *("--model", str(first), "--train", str(pairs), "--output", str(output), "--messages-column", "messages"),
            *("--stages", "2", "--threads-per-stage", "1", "--dtype", "float32", "--seed", str(seed)),
            *("--steps", str(self.steps), "--checkpoint-every", str(self.checkpoint_every)),
            *("--global-batch-size", str(self.batch), "--microbatch-size", str(self.microbatch)),
            *("--optimizer", "muon", "--learning-rate", str(self.learning_rate), "--lr-schedule", "cosine"),
            *("--warmup-steps", str(self.warmup), "--weight-decay", str(self.weight_decay)),
            *("--adam-beta2", str(self.beta2)),
        ]


def model_config() -> Mistral3Config:
    """About 2.5 million parameters: the architecture of the 3B (tied embeddings, grouped queries, YaRN), made small.

    `original_max_position_embeddings` is so low that a caption's own tokens lie beyond it: the quick start goes wrong
    if YaRN or the query scale by position do.
    """
    return Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 32,
                "max_position_embeddings": 1024,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 32,
            "image_size": LONGEST_EDGE,
            "patch_size": PATCH,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
        image_token_index=IMG,
        spatial_merge_size=MERGE,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )


def write_first_model(directory: Path, seed: int) -> None:
    """A Hugging Face directory with random weights in float32, and all that belongs to them.

    Hugging Face draws every weight with the same deviation of 0.02, which suits large matrices: here it took AdamW
    more than twice as many steps to the same loss. What multiplies n hidden values is drawn with 1 / sqrt(n) instead,
    and what adds to the residual stream smaller by the square root of the additions, as GPT-2 did it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = model_config()
    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration(config)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and weight is not model.get_input_embeddings().weight:
            deviation = weight[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                part = config.vision_config if "vision_tower" in name else config.text_config
                deviation /= math.sqrt(2 * part.num_hidden_layers)
            torch.nn.init.normal_(weight, 0.0, deviation)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    write_processor(directory)


def write_processor(output: Path) -> None:
    """Writes processor_config.json as `PixtralProcessor.save_pretrained` does for Ministral 3.

    Written by hand, since that class cannot be made without torchvision. `patch_size` is the tower's, and
    `spatial_merge_size` stands beside it: `PixtralProcessor` resizes images to multiples of their product, and whoever
    calls the image processor on its own has to pass it that product.
    """
    config = {
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_processor": {
            "data_format": "channels_first",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_processor_type": "PixtralImageProcessor",
            "image_std": list(IMAGE_STD),
            "patch_size": PATCH,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": LONGEST_EDGE},
        },
        "image_token": "[IMG]",
        "patch_size": PATCH,
        "processor_class": "PixtralProcessor",
        "spatial_merge_size": MERGE,
    }
    (output / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_model(trained: Path, output: Path) -> None:
    """The model directory of the repository: the trained weights rounded to bf16, in one file."""
    output.mkdir(parents=True, exist_ok=True)
    model = Mistral3ForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # what was loaded, not what is saved
    model.to(torch.bfloat16).save_pretrained(output)
    for name in COPIED:
        shutil.copyfile(trained / name, output / name)


def make(output: Path, work: Path, seed: int) -> None:
    """All steps but the measurement; what is in `work` already is not done again."""
    first, pairs, run = (work / f"{name}-{seed}" for name in ("first", "pairs", "run"))
    write_pairs(Pairs(seed=seed), pairs)
    write_first_model(first, seed)
    status = subprocess.run(Recipe().command(first, pairs, run, seed), check=False).returncode
    if status:
        sys.exit(status)
    write_model(run / "final", output)


def main() -> int:
    """Reads the options; 0, or 1 if too few captions are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="make the model, and write its directory here")
    parser.add_argument("--work", type=Path, default=Path("out/model"), help="folder of pictures and checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, of the pictures and of their order")
    parser.add_argument("--evaluate", type=Path, help="measure the model of this directory instead")
    parser.add_argument("--pictures", type=int, default=500, help="how many new pictures to measure on")
    options = parser.parse_args()
    if (options.output is None) == (options.evaluate is None):
        parser.error("give one of --output DIR and --evaluate DIR")
    if options.output is not None:
        make(options.output, options.work, options.seed)
    return 0 if evaluate(options.evaluate or options.output, options.pictures) else 1


if __name__ == "__main__":
    sys.exit(main())
