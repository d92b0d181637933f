"""The options of a job, as small frozen dataclasses that are checked when made.

They know nothing of torch, Ray or files; `jobs/` makes them from the command line, users make them in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ray_ministral.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]

STAGE_ENVIRONMENT = {
    # Spinning threads of one stage would take the cores of the others.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Huge pages for large tensors: weights load several times faster (torch reads this when it is imported).
    "THP_MEM_ALLOC_ENABLE": "1",
    # Memory of one microbatch's activations is kept for the next one's, instead of given back and fetched anew: with
    # glibc's defaults a forward pass on CPU spends a twentieth of its time on that.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
"""Environment of a process that runs a stage."""

TOKENS_PER_STEP = {"cpu": 320, "cuda": 8_192}
"""Of a captioning step, unless it is said. More make a step longer, and the pipeline slower to fill and to empty."""

DEFAULT_PROMPT = "Describe this image."


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class StageSpec:
    """Which decoder layers a model chunk owns, and whether it is the first or the last of its pipeline.

    `first_layer` is inclusive, `end_layer` exclusive, both counted over the whole decoder. `is_first` chunks hold
    the vision tower, the projector and the embedding; `is_last` chunks the final norm and the output layer.
    """

    first_layer: int
    end_layer: int
    is_first: bool
    is_last: bool

    def __post_init__(self) -> None:
        _require(
            0 <= self.first_layer < self.end_layer,
            f"a stage needs at least one decoder layer, got layers {self.first_layer} up to {self.end_layer}: "
            "use fewer stages or another split",
        )

    @property
    def layers(self) -> range:
        """Global indices of the decoder layers of this chunk."""
        return range(self.first_layer, self.end_layer)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when a caption ends.

    `temperature` 0 is greedy; `top_k` and `top_p` then have no effect. `max_new_tokens_column` names a column of whole
    numbers that end a row's caption earlier than `max_new_tokens` does; a null does not.
    """

    max_new_tokens: int = 64
    max_new_tokens_column: str | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        _require(
            0 <= self.temperature < float("inf"),
            f"--temperature must be a number that is not negative, got {self.temperature}: 0 is greedy",
        )
        _require(self.top_k is None or self.top_k >= 1, f"--top-k must be at least 1, got {self.top_k}: leave it out")
        _require(
            self.top_p is None or 0 < self.top_p <= 1, f"--top-p must lie in (0, 1], got {self.top_p}: leave it out"
        )
        _require(0 <= self.seed < 2**63, f"--seed must lie in [0, 2**63), got {self.seed}")
        _require(all(self.stop), "--stop must not be an empty text: leave it out")


@dataclass(frozen=True)
class PromptConfig:
    """What is asked about each row.

    `prompt` is a template in which `{column}` takes the row's value; `prompt_column` names a column with a whole prompt
    per row instead. `image_column` is a column of encoded bytes, of `{bytes, path}` structs, or of lists of either.
    """

    image_column: str = "image"
    prompt: str | None = None
    prompt_column: str | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        _require(
            self.prompt is None or self.prompt_column is None,
            "--prompt and --prompt-column exclude each other: give one of them",
        )

    @property
    def template(self) -> str | None:
        """The prompt template, or None when each row brings its own prompt."""
        if self.prompt_column is not None:
            return None
        return DEFAULT_PROMPT if self.prompt is None else self.prompt


_SPARE_BYTES = 3 << 29
"""See `ImageLimits.decode_bytes`."""


@dataclass(frozen=True)
class ImageLimits:
    """What is refused from an image's header alone, before anything is decoded, and what decoding may take.

    A row that takes longer than `deadline_s` seconds, from its prompt to its pixels and tokens, is given up.
    """

    max_pixels: int = 64_000_000
    max_side: int = 32_768
    max_aspect: float = 200.0
    deadline_s: float = 60.0

    def __post_init__(self) -> None:
        _require(self.max_pixels >= 1, f"--max-image-pixels must be at least 1, got {self.max_pixels}")
        _require(self.max_side >= 1, f"max_side must be at least 1, got {self.max_side}")
        _require(self.max_aspect >= 1, f"max_aspect must be at least 1, got {self.max_aspect}")
        _require(
            0 < self.deadline_s < math.inf,
            f"deadline_s must be a number of seconds above 0, got {self.deadline_s}; a day is 86400",
        )

    @property
    def decode_bytes(self) -> int:
        """Memory that one row's images may take beside what the process has already.

        14 bytes a pixel were measured; the rest is room for the row's encoded bytes, its pixels once resized, and
        allocators, which take memory by the gigabyte (Arrow's does) and do not give all of it back.
        """
        return 16 * self.max_pixels + _SPARE_BYTES


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is cut and where it runs.

    `layers_per_stage` overrides the split by cost. `threads_per_stage` None divides the cluster's cores among the
    stages. A microbatch holds at most `rows_per_microbatch` sequences and room for `kv_tokens_per_microbatch` tokens in
    the KV cache. A step is filled with prompts up to `tokens_per_step`; None: a number at which the device's matrix
    products are near their full rate. Time-outs in seconds: a stage hangs that gives no sign of life for
    `health_timeout_s`, or is in one step for `step_timeout_s`. `max_restarts` deaths of a replica's stages in a row, in
    which no row gets done, are one too many by one more; `spares` actors wait to stand in for dead ones.
    """

    stages: int = 1
    replicas: int = 1
    threads_per_stage: int | None = None
    device: Device = "auto"
    dtype: DType = "auto"
    layers_per_stage: tuple[int, ...] | None = None
    rows_per_microbatch: int = 128
    kv_tokens_per_microbatch: int = 16_384
    tokens_per_step: int | None = None
    placement_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    step_timeout_s: float = 600.0
    health_timeout_s: float = 30.0
    max_restarts: int = 3
    spares: int = 0

    def __post_init__(self) -> None:
        _require(self.stages >= 1, f"--stages must be at least 1, got {self.stages}")
        _require(self.replicas >= 1, f"--replicas must be at least 1, got {self.replicas}")
        _require(
            self.threads_per_stage is None or self.threads_per_stage >= 1,
            f"--threads-per-stage must be at least 1, got {self.threads_per_stage}",
        )
        _require(
            self.layers_per_stage is None or len(self.layers_per_stage) == self.stages,
            f"layers_per_stage has {len(self.layers_per_stage or ())} entries for {self.stages} stages: give one each",
        )
        _require(self.max_restarts >= 0, f"--max-restarts must be at least 0, got {self.max_restarts}")
        _require(self.spares >= 0, f"--spares must be at least 0, got {self.spares}")
        _require(self.rows_per_microbatch >= 1, f"rows_per_microbatch must be positive, got {self.rows_per_microbatch}")
        _require(
            self.tokens_per_step is None or self.tokens_per_step >= 1,
            f"tokens_per_step must be positive, got {self.tokens_per_step}",
        )

    @property
    def microbatches(self) -> int:
        """Of a replica in captioning: one more than stages, so that every stage has work."""
        return self.stages + 1

    def tokens_in_step(self, device: str) -> int:
        """`tokens_per_step`, of a device "cpu" or "cuda"."""
        return TOKENS_PER_STEP[device] if self.tokens_per_step is None else self.tokens_per_step


@dataclass(frozen=True)
class StageOptions:
    """Where and how one stage runs. `device` is cpu or cuda, `dtype` float32 or bfloat16; nothing is "auto" here."""

    model_dir: str
    spec: StageSpec
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1


@dataclass(frozen=True)
class CaptionConfig:
    """A captioning job: parquet in, parquet out."""

    model: str
    inputs: tuple[str, ...]
    output: str
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    images: ImageLimits = field(default_factory=ImageLimits)
    rows_per_shard: int = 256
    limit: int | None = None
    columns: tuple[str, ...] | None = None
    with_token_ids: bool = False
    max_error_rate: float = 1.0
    retry_failed: bool = False
    trace: str | None = None
    address: str = "auto"

    def __post_init__(self) -> None:
        _require(bool(self.model), "--model is missing: give a Hugging Face model directory")
        _require(bool(self.inputs), "--input is missing: give a parquet file, folder, glob or filesystem URI")
        _require(bool(self.output), "--output is missing: give a folder")
        _require(self.rows_per_shard >= 1, f"--rows-per-shard must be at least 1, got {self.rows_per_shard}")
        _require(self.limit is None or self.limit >= 1, f"--limit must be at least 1, got {self.limit}: leave it out")
        _require(0 <= self.max_error_rate <= 1, f"--max-error-rate must lie in [0, 1], got {self.max_error_rate}")
        _require(self.trace != "", "--trace is empty: name a file, or leave it out")


ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
OptimizerName = Literal["adamw", "muon"]
LearningRateName = Literal["constant", "cosine", "linear"]
Freezable = Literal["vision", "projector", "language"]


@dataclass(frozen=True)
class SampleConfig:
    """Where the pairs to train on are: image, prompt and response columns, or one column of messages.

    `prompt`, `prompt_column` and `system_prompt` are as in `PromptConfig`, so that the same options ask the trained
    model the same question. A `system_prompt` is also for conversations in `messages_column` that have none.
    """

    image_column: str = "image"
    prompt: str | None = None
    prompt_column: str | None = None
    system_prompt: str | None = None
    response_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        if self.messages_column is None:
            _require(
                self.response_column is not None,
                "--response-column is missing: name the column of answers, or give --messages-column",
            )
            PromptConfig(prompt=self.prompt, prompt_column=self.prompt_column)  # for its refusal of both
        else:
            for option, value in (
                ("--prompt", self.prompt),
                ("--prompt-column", self.prompt_column),
                ("--response-column", self.response_column),
            ):
                _require(
                    value is None,
                    f"--messages-column excludes {option}: the messages hold questions and answers; give one or the "
                    "other",
                )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on other samples while a model trains. `path` None: nothing.

    It comes before the first step, then every `every` steps (None: whenever a checkpoint is due), and at the end. The
    loss is over the first `limit` rows (None: all); the first `captions` whole rows are captioned, too, greedily, in at
    most `max_new_tokens` tokens each.
    """

    path: str | None = None
    every: int | None = None
    limit: int | None = None
    captions: int = 8
    max_new_tokens: int = SamplingConfig.max_new_tokens

    def __post_init__(self) -> None:
        _require(self.path != "", "--eval is empty: give a parquet file, folder, glob or filesystem URI")
        for option, value in (("--eval-every", self.every), ("--eval-limit", self.limit)):
            _require(value is None or value >= 1, f"{option} must be at least 1, got {value}: leave it out")
        _require(self.captions >= 0, f"--eval-captions must not be negative, got {self.captions}: 0 is none")
        _require(self.max_new_tokens >= 1, f"--eval-max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.path is None:
            for option, given in (
                ("--eval-every", self.every is not None),
                ("--eval-limit", self.limit is not None),
                ("--eval-captions", self.captions != EvalConfig.captions),
                ("--eval-max-new-tokens", self.max_new_tokens != EvalConfig.max_new_tokens),
            ):
                _require(not given, f"{option} needs --eval: say which rows to evaluate on, or leave it out")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, clipping and the learning rate. No decay on norms and biases.

    `muon` steps the matrices of the layers by their orthogonalised momentum, and the rest as `adamw` does.
    """

    learning_rate: float = 1e-5
    warmup_steps: int = 0
    lr_schedule: LearningRateName = "constant"
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    name: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < float("inf"), f"--learning-rate must be positive, got {self.learning_rate}")
        _require(self.warmup_steps >= 0, f"--warmup-steps must not be negative, got {self.warmup_steps}")
        _require(
            0 <= self.weight_decay < float("inf"),
            f"--weight-decay must be a number that is not negative, got {self.weight_decay}",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"--clip-norm must be positive, got {self.clip_norm}: inf is no clipping",
        )
        for name, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            _require(0 <= beta < 1, f"{name} must lie in [0, 1), got {beta}")
        _require(self.adam_eps > 0, f"--adam-eps must be positive, got {self.adam_eps}")


@dataclass(frozen=True)
class TrainConfig:
    """A fine-tuning job.

    `global_batch_size` samples make an optimizer step, whatever the stages and replicas; they are filled into
    microbatches of `microbatch_size` samples on average, evenly by tokens. `lora_alpha` None is the rank. `min_stages`
    and `max_stages` are the bounds within which the number of stages may differ from `pipeline.stages` (None: not at
    all): fewer where the cluster has no room for more, at the start or after a loss, more as soon as there is room.
    `buddy_copies`: each stage's trained state is kept outside its process after each of the last two steps, in the
    object stores of its node and of another one; without them a lost stage takes the run back to the last checkpoint.
    """

    model: str
    train: tuple[str, ...]
    output: str
    samples: SampleConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    schedule: ScheduleName = "1f1b"
    chunks_per_stage: int = 1
    global_batch_size: int = 16
    microbatch_size: int = 2
    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    freeze: tuple[Freezable, ...] = ()
    lora_rank: int | None = None
    lora_alpha: float | None = None
    merge_lora: bool = False
    recompute: bool = False
    max_tokens: int = 8192
    min_stages: int | None = None
    max_stages: int | None = None
    buddy_copies: bool = True
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    resume: str = "auto"
    trace: str | None = None
    address: str = "auto"

    def __post_init__(self) -> None:
        _require(bool(self.model), "--model is missing: give a Hugging Face model directory")
        _require(bool(self.train), "--train is missing: give a parquet file, folder, glob or filesystem URI")
        _require(bool(self.output), "--output is missing: give a folder")
        _require(
            (self.steps is None) != (self.epochs is None),
            f"give one of --steps and --epochs, got steps {self.steps} and epochs {self.epochs}",
        )
        _require(self.trace != "", "--trace is empty: name a file, or leave it out")
        for name, value in (
            ("--steps", self.steps),
            ("--epochs", self.epochs),
            ("--chunks-per-stage", self.chunks_per_stage),
            ("--global-batch-size", self.global_batch_size),
            ("--microbatch-size", self.microbatch_size),
            ("--lora-rank", self.lora_rank),
            ("--checkpoint-every", self.checkpoint_every),
            ("--keep-checkpoints", self.keep_checkpoints),
            ("--min-stages", self.min_stages),
            ("--max-stages", self.max_stages),
        ):
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(self.max_tokens >= 2, f"--max-tokens must be at least 2, got {self.max_tokens}")
        stages = self.pipeline.stages
        _require(
            self.fewest_stages <= stages <= (self.max_stages or stages),
            f"--stages {stages} must lie between --min-stages {self.fewest_stages} and --max-stages "
            f"{self.max_stages or stages}",
        )
        _require(
            self.pipeline.layers_per_stage is None,
            f"layers_per_stage {self.pipeline.layers_per_stage} is for captioning, training cuts by cost: leave it out",
        )
        _require(
            self.microbatch_size <= self.global_batch_size,
            f"--microbatch-size {self.microbatch_size} must not exceed --global-batch-size {self.global_batch_size}",
        )
        _require(
            self.schedule != "interleaved" or self.chunks_per_stage > 1,
            "--schedule interleaved needs several chunks a stage: give --chunks-per-stage 2, or --schedule 1f1b",
        )
        _require(
            self.chunks_per_stage == 1 or self.schedule == "interleaved",
            f"--chunks-per-stage {self.chunks_per_stage} needs --schedule interleaved, got {self.schedule}",
        )
        microbatches = -(-self.global_batch_size // self.microbatch_size)
        _require(
            microbatches >= self.pipeline.replicas,
            f"{microbatches} microbatches a step for {self.pipeline.replicas} replicas: every replica needs one; lower "
            "--replicas or --microbatch-size, or raise --global-batch-size",
        )
        _require(set(self.freeze) != {"vision", "projector", "language"}, "--freeze leaves nothing to train: name less")
        if self.lora_rank is None:
            _require(self.lora_alpha is None, "--lora-alpha needs --lora-rank: give both or neither")
            _require(not self.merge_lora, "--merge-lora needs --lora-rank: there are no adapters to merge without it")
        else:
            _require(
                "language" not in self.freeze,
                "--freeze language leaves --lora-rank nothing to train: its adapters are those of the language model, "
                "and all else is frozen anyway; leave one of them out",
            )
            _require(
                self.lora_alpha is None or 0 < self.lora_alpha < float("inf"),
                f"--lora-alpha must be positive, got {self.lora_alpha}",
            )
        if self.steps is not None:
            self.require_warmup_within(self.steps)
        _require(0 <= self.seed < 2**63, f"--seed must lie in [0, 2**63), got {self.seed}")

    @property
    def fewest_stages(self) -> int:
        """What the run may start with where the cluster has no room for more."""
        return self.pipeline.stages if self.min_stages is None else self.min_stages

    def require_warmup_within(self, steps: int) -> None:
        """Raises ConfigError where the learning rate would never reach its peak in so many steps."""
        warmup = self.optimizer.warmup_steps
        _require(
            warmup <= steps,
            f"--warmup-steps {warmup} is more than all {steps} steps: the learning rate would never reach its peak; "
            "lower it, or raise --steps or --epochs",
        )
