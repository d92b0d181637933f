"""`Split`: who decides where the model is cut; and that no measurement ends a job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from ray_ministral.captioning.costs import Profile, Shapes
from ray_ministral.config import CaptionConfig, PipelineConfig
from ray_ministral.driver import profiling as profiling_module
from ray_ministral.driver.cluster import Resolved
from ray_ministral.driver.profiling import Profiling
from ray_ministral.driver.split import Split
from ray_ministral.errors import InputError
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.pipeline.partition import Costs, Partition

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
ARCH = Architecture.from_config(load_config(MODEL))
SHAPES = Shapes(((28, 28),), 784.0, 30, 1, 1, 1)
ENDS_ALONE = [Profile(1.0, 0.0, 100.0, 0.0), Profile(1.0, 0.0, output=0.0)]


def test_shares_add_up() -> None:
    partition = Partition.from_layers((1, 2, 3), 6)
    assert partition.shares(Costs((2.0,) * 6, 4.0, 2.0)) == pytest.approx((6 / 18, 4 / 18, 8 / 18))
    assert Partition.from_layers((2,), 2).shares(Costs((1.0, 1.0), 1.0, 1.0)) == (1.0,)


@pytest.mark.parametrize(
    ("config", "by", "layers"),
    [
        (PipelineConfig(stages=1), "given", (4,)),
        (PipelineConfig(stages=2), "flops", (1, 3)),
        (PipelineConfig(stages=2, layers_per_stage=(3, 1)), "given", (3, 1)),
    ],
)
def test_before_anything_is_measured(config: PipelineConfig, by: str, layers: tuple[int, ...]) -> None:
    split = Split.before_measuring(config, ARCH)
    assert (split.by, split.partition.layers_per_stage) == (by, layers)
    assert split.is_to_be_measured == (by == "flops")
    assert sum(split.shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("vision", "output", "layers"), [(0.0, 0.0, (2, 2)), (2.0, 0.0, (1, 3)), (0.0, 1.9, (3, 1)), (50.0, 51.0, (2, 2))]
)
def test_the_measured_split_is_the_balanced_one(vision: float, output: float, layers: tuple[int, ...]) -> None:
    before = Split.before_measuring(PipelineConfig(stages=2), ARCH)
    after = before.measured([Profile(1.0, 0.0, vision, 0.0), Profile(1.0, 0.0, output=output)], SHAPES)
    assert (after.by, after.partition.layers_per_stage) == ("measured", layers)
    whole = 4 + vision + output
    assert after.shares == pytest.approx(((layers[0] + vision) / whole, (layers[1] + output) / whole))
    assert not after.is_to_be_measured


def test_what_people_read() -> None:
    split = Split.before_measuring(PipelineConfig(stages=2), ARCH).measured(ENDS_ALONE, SHAPES)
    assert split.describe() == (
        "layers of each stage: 1 + 3, as measured: a caption takes 1e+05 ms for image and embedding, 1e+03 ms a layer, "
        "0 ms for the output layer; estimated shares of the work: 97%, 3%"
    )
    assert split.outcome([0.9, 0.1]) == [
        "stage 0: 1 layer, estimated 97% of the work, had 90% of it, was busy 0.90",
        "stage 1: 3 layers, estimated 3% of the work, had 10% of it, was busy 0.10",
    ]
    assert split.outcome([0.0, 0.0]) == [], "a job that was over before it began"
    assert Split.before_measuring(PipelineConfig(stages=1), ARCH).outcome([0.9]) == [], "there was nothing to choose"


class Actor:
    """A stage of which `profile.remote` gives a reference, here the answer itself."""

    def __init__(self, answer: Any) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.profile = SimpleNamespace(remote=lambda *arguments: (self.asked.append(arguments), answer)[1])


class FakeRay:
    """References are answers; `late` ones never come, exceptions are raised."""

    def wait(self, references: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return [r for r in references if r != "late"], [r for r in references if r == "late"]

    def get(self, references: Sequence[Any]) -> list[Any]:
        for reference in references:
            if isinstance(reference, Exception):
                raise reference
        return list(references)


class NoRows:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def peek(self, timeout_s: float) -> None:
        assert timeout_s <= 5, "a job should not wait long for what is only an estimate"
        if self.error is not None:
            raise self.error


def choose(
    monkeypatch: pytest.MonkeyPatch,
    answers: Sequence[Sequence[Any]],
    *,
    warm_ups: Sequence[Any] = (),
    feeder: Any = None,
    **options: Any,
) -> tuple[Split, list[Actor]]:
    monkeypatch.setattr(profiling_module, "ray", FakeRay())
    pipeline = PipelineConfig(stages=len(answers[0]), replicas=len(answers), start_timeout_s=0.05, **options)
    config = CaptionConfig(model=str(MODEL), inputs=("x",), output="y", pipeline=pipeline)
    actors = [[a if isinstance(a, SimpleNamespace) else Actor(a) for a in own] for own in answers]
    replicas: list[Any] = [SimpleNamespace(actors=own, warm_ups=list(warm_ups)) for own in actors]
    profiling = Profiling(config, ARCH, str(MODEL), 100, Resolved("cpu", "float32", 1), lambda _: None)
    split = Split.before_measuring(pipeline, ARCH)
    chosen = profiling.choose(split, replicas, feeder or NoRows())
    return chosen, [actor for replica in replicas for actor in replica.actors]


def test_all_stages_of_all_replicas_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Profile(1.0, 0.0, output=1000.0)
    split, actors = choose(monkeypatch, [[Profile(1.0, 0.0, 1.0, 0.0), slow], [ENDS_ALONE[0], ENDS_ALONE[1]]])
    assert (split.by, split.partition.layers_per_stage) == ("measured", (3, 1))
    assert [len(actor.asked) for actor in actors] == [1] * 4
    specs = [actor.asked[0][0].spec for actor in actors]
    assert [(spec.is_first, spec.is_last) for spec in specs] == [(True, False), (False, True)] * 2


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([ENDS_ALONE[0], "late"], "1 of 2 stages have not answered within 30 s"),
        ([ENDS_ALONE[0], ActorDiedError()], "ActorDiedError"),
        ([ENDS_ALONE[0], Profile(float("nan"), 0.0, output=0.0)], "prefill was measured as nan seconds"),
        ([ENDS_ALONE[0], ENDS_ALONE[0]], "nobody has measured"),
        ([ENDS_ALONE[0], SimpleNamespace()], "no attribute 'profile'"),
    ],
    ids=["late", "died", "nan", "lacking", "an actor class without it"],
)
def test_without_a_measurement_flops_decide(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answers: list[Any], says: str
) -> None:
    with caplog.at_level(logging.WARNING, "ray_ministral"):
        split, _ = choose(monkeypatch, [answers])
    assert split == Split.before_measuring(PipelineConfig(stages=2), ARCH)
    (record,) = caplog.records
    assert "cutting the model by FLOPs" in record.message
    assert says in record.message


@pytest.mark.parametrize("warm_up", ["late", ActorDiedError()], ids=["late", "died"])
def test_stages_that_do_not_import_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, warm_up: Any
) -> None:
    split, actors = choose(monkeypatch, [ENDS_ALONE], warm_ups=["done", warm_up])
    assert split.by == "flops"
    assert [len(actor.asked) for actor in actors] == [0, 0]
    assert not caplog.records, "who waits for the stages to load says what is wrong"


@pytest.mark.parametrize("options", [{"layers_per_stage": (2, 2)}, {}], ids=["given", "one stage"])
def test_nothing_is_measured_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    answers = ENDS_ALONE if options else ENDS_ALONE[:1]
    split, actors = choose(monkeypatch, [answers], feeder=NoRows(InputError("not even rows are waited for")), **options)
    assert split.by == "given"
    assert not any(actor.asked for actor in actors)


def test_what_is_wrong_with_the_input_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such column"):
        choose(monkeypatch, [ENDS_ALONE], feeder=NoRows(InputError("no such column")))
