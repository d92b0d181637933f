"""A config is checked when it is made, says which option is wrong, and does not change afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from ray_ministral.config import (
    DEFAULT_PROMPT,
    CaptionConfig,
    ImageLimits,
    PipelineConfig,
    PromptConfig,
    SamplingConfig,
    StageSpec,
)
from ray_ministral.errors import ConfigError, RayMinistralError, RowError, UsageError


def caption_config(**changes: object) -> CaptionConfig:
    return CaptionConfig(**{"model": "m", "inputs": ("i",), "output": "o", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SamplingConfig(max_new_tokens=0), "--max-new-tokens"),
        (lambda: SamplingConfig(temperature=-0.1), "--temperature"),
        (lambda: SamplingConfig(temperature=float("nan")), "--temperature"),
        (lambda: SamplingConfig(top_k=0), "--top-k"),
        (lambda: SamplingConfig(top_p=0.0), "--top-p"),
        (lambda: SamplingConfig(top_p=1.1), "--top-p"),
        (lambda: SamplingConfig(seed=-1), "--seed"),
        (lambda: SamplingConfig(seed=2**63), "--seed"),
        (lambda: SamplingConfig(stop=("ok", "")), "--stop"),
        (lambda: PromptConfig(prompt="p", prompt_column="c"), "--prompt-column"),
        (lambda: ImageLimits(max_pixels=0), "--max-image-pixels"),
        (lambda: ImageLimits(deadline_s=0.0), "deadline_s"),
        (lambda: ImageLimits(deadline_s=float("nan")), "deadline_s"),
        (lambda: ImageLimits(deadline_s=float("inf")), "deadline_s"),
        (lambda: PipelineConfig(stages=0), "--stages"),
        (lambda: PipelineConfig(replicas=0), "--replicas"),
        (lambda: PipelineConfig(threads_per_stage=0), "--threads-per-stage"),
        (lambda: PipelineConfig(stages=2, layers_per_stage=(1, 2, 3)), "layers_per_stage"),
        (lambda: caption_config(model=""), "--model"),
        (lambda: caption_config(inputs=()), "--input"),
        (lambda: caption_config(output=""), "--output"),
        (lambda: caption_config(rows_per_shard=0), "--rows-per-shard"),
        (lambda: caption_config(limit=0), "--limit"),
        (lambda: caption_config(max_error_rate=1.5), "--max-error-rate"),
        (lambda: caption_config(max_error_rate=float("nan")), "--max-error-rate"),
        (lambda: StageSpec(3, 3, is_first=False, is_last=True), "at least one decoder layer"),
    ],
)
def test_a_wrong_value_is_refused_and_the_option_named(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)
    assert caught.value.exit_status == 2


def test_the_edges_are_allowed() -> None:
    SamplingConfig(max_new_tokens=1, temperature=0, top_k=1, top_p=1.0, seed=2**63 - 1)
    caption_config(max_error_rate=0.0, limit=1, rows_per_shard=1)
    assert list(StageSpec(2, 4, is_first=False, is_last=True).layers) == [2, 3]


def test_the_template_is_the_default_unless_rows_bring_their_prompt() -> None:
    assert PromptConfig().template == DEFAULT_PROMPT
    assert PromptConfig(prompt="What is {name}?").template == "What is {name}?"
    # An empty prompt was asked for and is not the default.
    assert PromptConfig(prompt="").template == ""
    assert PromptConfig(prompt_column="question").template is None


@pytest.mark.parametrize("made", [caption_config(), SamplingConfig(), PromptConfig(), PipelineConfig(), ImageLimits()])
def test_nothing_changes_a_config_after_it_was_made(made: object) -> None:
    field = dataclasses.fields(made)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, None)
    # Frozen all through: a list or a dictionary inside could be changed, and would have no hash.
    hash(made)


def test_every_error_of_ours_has_an_exit_status_that_the_command_line_promises() -> None:
    def tree(kind: type[RayMinistralError]) -> list[type[RayMinistralError]]:
        return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]

    for kind in tree(UsageError):
        assert kind.exit_status == 2
    # A row's error becomes a value in its row; only the others end a job.
    ends_a_job = [kind for kind in tree(RayMinistralError) if not issubclass(kind, RowError)]
    assert {kind.exit_status for kind in ends_a_job if kind is not RayMinistralError} == {2, 3, 4}
    statuses = {kind.status for kind in tree(RowError)}
    assert statuses == {"bad_image", "too_large", "prompt_error", "too_long", "engine_error"}
