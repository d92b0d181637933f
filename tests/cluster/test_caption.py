"""`caption` on a real local cluster: every row once, the same captions however the job is cut, and Hugging Face's."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ray_ministral import caption
from ray_ministral.captioning.costs import Profile
from ray_ministral.config import StageOptions
from ray_ministral.data.columns import output_columns
from ray_ministral.driver import step_spans
from ray_ministral.driver.stage_actor import ACTOR_OPTIONS, StageActor
from ray_ministral.driver.summary import CaptionSummary
from tests.cluster.inputs import BAD_ALBUMS, BAD_PICTURES, make_config, picture, read_output, rows_of

pytestmark = pytest.mark.usefixtures("clean_cluster")

PROMPT = "Is there something {colour}? Describe {id}."
Run = Callable[..., tuple[CaptionSummary, Path]]


@pytest.fixture(scope="module")
def run(cluster: None, model: Path, albums: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the albums with some options, once for each set of options: several tests look at the same output."""
    made: dict[str, tuple[CaptionSummary, Path]] = {}

    def run_once(**changes: Any) -> tuple[CaptionSummary, Path]:
        key = repr(sorted(changes.items()))
        if key not in made:
            output = tmp_path_factory.mktemp("out")
            options = {"prompt": PROMPT, "with_token_ids": True} | changes
            made[key] = (caption(make_config(model, albums, output, **options)), output)
        return made[key]

    return run_once


def test_every_row_once_and_in_order_with_the_columns_of_the_contract(run: Run, albums: Path) -> None:
    summary, output = run(stages=2)
    table, source = read_output(output), pq.read_table(albums)
    assert table.column_names == ["colour", "id", *output_columns(with_token_ids=True)]
    assert table.select(["colour", "id"]).equals(source.select(["colour", "id"]))
    assert table["source_row"].to_pylist() == list(range(source.num_rows))
    assert set(table["source_file"].to_pylist()) == {str(albums)}
    assert table.schema.field("source_row_group").type == pa.int32()
    rows = table.to_pylist()
    assert {row["source_row"]: row["status"] for row in rows if row["status"] != "ok"} == BAD_ALBUMS
    for row in rows:
        good = row["status"] == "ok"
        assert (row["caption"] is not None) == good
        assert (row["error"] is None) == (row["error_stage"] is None) == good
        assert (row["finish_reason"] in {"stop", "length"}) == good
        assert row["completion_tokens"] == len(row["token_ids"] or [])
        assert row["attempts"] == 1
        if good:
            assert 0 < row["completion_tokens"] <= 24
            assert (row["image_tokens"] > 0) == (row["source_row"] % 4 > 0), "as many pictures as the list has"
            assert row["prompt_tokens"] > row["image_tokens"]
    assert len({row["caption"] for row in rows if row["status"] == "ok"}) > 3
    good = len(rows) - len(BAD_ALBUMS)
    assert (summary.rows, summary.ok, summary.errors) == (len(rows), good, len(BAD_ALBUMS))


def test_the_folder_says_that_it_is_finished(run: Run) -> None:
    summary, output = run(stages=2)
    assert {path.name for path in output.iterdir() if not path.name.startswith("part-")} == {
        "_job.json",
        "_ledger",
        "_SUCCESS",
        "summary.json",
    }
    stored = json.loads((output / "summary.json").read_text())
    assert stored == summary.to_json()
    assert stored["stages"] == len(stored["stage_busy"]) == 2
    assert stored["replicas"] == 1
    assert all(0 < busy < 1 for busy in stored["stage_busy"]), stored
    assert 0 < stored["startup_seconds"] < stored["seconds"]
    assert stored["images_per_second"] > 0
    assert stored["generated_tokens_per_second"] > 0
    assert stored["recoveries"] == 0
    assert stored["bubble"] == pytest.approx(1 - sum(stored["stage_busy"]) / 2)
    assert stored["steps"] > 24, "one a token at least"
    assert stored["tokens_per_step"] > 1
    assert all(seconds > 0 for name in ("model_seconds", "outside_seconds") for seconds in stored[name]), stored
    assert sum(stored["startup"][name] for name in ("plan", "cluster", "placement", "stages", "first rows")) == (
        pytest.approx(stored["startup_seconds"], abs=0.01)
    )


def test_a_finished_job_does_nothing_again(run: Run, model: Path, albums: Path) -> None:
    summary, output = run(stages=2)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = caption(
        make_config(model, albums, output, prompt=PROMPT, with_token_ids=True, stages=2), stage_actor=_NeverStarted
    )
    assert again == summary
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


class _NeverStarted:
    """In place of an actor class: whoever tries to start it has an error."""


@pytest.mark.parametrize(
    "cut",
    [
        {"stages": 1},
        {"stages": 3, "layers_per_stage": (1, 2, 1), "rows_per_microbatch": 3},
        {"stages": 1, "replicas": 2, "kv_tokens_per_microbatch": 1100},
    ],
    ids=str,
)
def test_the_output_does_not_depend_on_the_cut(run: Run, cut: dict[str, Any]) -> None:
    _, expected = run(stages=2)
    summary, output = run(**cut)
    assert read_output(output).equals(read_output(expected))
    assert summary.split_by == "given"
    assert summary.layers_per_stage == list(cut.get("layers_per_stage", (4,)))


def test_the_stages_are_measured_and_the_summary_says_so(run: Run) -> None:
    _, output = run(stages=2)
    stored = json.loads((output / "summary.json").read_text())
    assert stored["split_by"] == "measured"
    assert sum(stored["layers_per_stage"]) == 4
    assert sum(stored["estimated_share"]) == pytest.approx(1.0)
    assert 0 < stored["startup"]["stages: measuring"] < stored["startup"]["stages"]


class Lopsided(StageActor):
    """Image and embedding cost nearly nothing, the output layer as much as a hundred layers."""

    def profile(self, options: StageOptions, *others: Any) -> Profile:
        if options.spec.is_first:
            return Profile(1.0, 0.0, vision=0.1, embedding=0.0)
        return Profile(1.0, 0.0, output=1000.0)


class Unmeasurable(StageActor):
    def profile(self, options: StageOptions, *others: Any) -> Profile:
        raise RuntimeError("no clock here")


@pytest.mark.parametrize(
    ("kind", "by", "layers"),
    [(Lopsided, "measured", [3, 1]), (Unmeasurable, "flops", [1, 3])],
    ids=["lopsided", "fails"],
)
def test_the_model_is_cut_as_the_stages_measured_or_else_by_flops(
    run: Run, model: Path, albums: Path, tmp_path: Path, kind: type[StageActor], by: str, layers: list[int]
) -> None:
    config = make_config(model, albums, tmp_path / "out", prompt=PROMPT, with_token_ids=True, stages=2)
    make: Any = ray.remote
    actor = make(**ACTOR_OPTIONS)(kind)
    summary = caption(config, stage_actor=actor)
    assert (summary.split_by, summary.layers_per_stage) == (by, layers)
    assert read_output(tmp_path / "out").equals(read_output(run(stages=2)[1])), "captions do not depend on the split"


def test_a_timeline_has_every_step_of_every_stage_once(
    run: Run, model: Path, albums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_spans, "TAKE_EVERY_S", 0.05)  # so that steps are taken again and again
    file, output = tmp_path / "new" / "trace.json", tmp_path / "out"
    begun = time.time()
    config = make_config(model, albums, output, prompt=PROMPT, with_token_ids=True, stages=2, trace=str(file))
    summary = caption(config)
    ended = time.time()
    assert read_output(output).equals(read_output(run(stages=2)[1]))

    events = json.loads(file.read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "driver", (1, 0): "stage 0", (1, 1): "stage 1"}
    timed = [event for event in events if event["ph"] != "M"]
    slack = 0.05  # the clock of time.time may be set while we run
    assert all(begun - slack <= event["ts"] / 1e6 for event in timed)
    assert all((event["ts"] + event.get("dur", 0)) / 1e6 <= ended + slack for event in timed)
    does = Counter(event["name"] for event in timed if event["pid"] == 0 and event["ph"] == "X")
    parts = len(list(output.glob("part-*")))
    assert does["launch"] == does["admit"] >= does["wait"] >= summary.steps / 3, (
        "three microbatches may be ready at once"
    )
    assert (does["complete"], does["file"]) == (summary.steps, parts)
    assert (does["cluster"], does["stages"]) == (1, 1)
    beside = Counter((event["name"], event["ph"]) for event in timed if event["ph"] in "be")
    assert beside["write", "b"] == beside["write", "e"] == parts
    assert beside["prepare", "b"] == beside["prepare", "e"] > 0

    spans = [[e for e in timed if (e["pid"], e["tid"]) == (1, stage)] for stage in range(2)]
    steps = [{e["args"]["step"]: e for e in own if e["name"] != "model"} for own in spans]
    models = [{e["args"]["step"]: e for e in own if e["name"] == "model"} for own in spans]
    for stage in range(2):
        assert sorted(steps[stage]) == sorted(models[stage]) == list(range(summary.steps))
        assert len(spans[stage]) == 2 * summary.steps, "none twice"
        in_steps = sum(event["dur"] for event in steps[stage].values()) / 1e6
        assert in_steps == pytest.approx(summary.model_seconds[stage] + summary.outside_seconds[stage])
        in_model = sum(event["dur"] for event in models[stage].values()) / 1e6
        assert in_model == pytest.approx(summary.model_seconds[stage])
        for number, step in steps[stage].items():
            within = models[stage][number]
            assert step["ts"] <= within["ts"]
            assert within["ts"] + within["dur"] <= step["ts"] + step["dur"]
    for number, step in steps[0].items():
        # Half a microsecond: that of times in doubles.
        assert step["ts"] + step["dur"] <= steps[1][number]["ts"] + 0.5, "a stage begins when the one before it is done"
    good = [row for row in rows_of(output) if row["status"] == "ok"]
    for stage in range(2):
        values = [event["args"] for event in steps[stage].values()]
        prefill, decode = (sum(value[name] for value in values) for name in ("prefill_tokens", "decode_tokens"))
        assert prefill == sum(row["prompt_tokens"] for row in good)
        assert decode == sum(row["completion_tokens"] - 1 for row in good), "a prompt gives the first token"
        assert (prefill + decode) / summary.steps == pytest.approx(summary.tokens_per_step)
        images = sum(row["source_row"] % 4 for row in good) if stage == 0 else 0
        assert sum(value["images"] for value in values) == images


def test_captions_are_those_of_hugging_face(run: Run, model: Path, albums: Path) -> None:
    expected = hugging_face_captions(model, albums)
    _, output = run(stages=2)
    rows = {row["source_row"]: row for row in rows_of(output) if row["status"] == "ok"}
    assert {key: row["token_ids"] for key, row in rows.items()} == expected
    assert len(expected) == 26 - len(BAD_ALBUMS)


def hugging_face_captions(model: Path, albums: Path) -> dict[int, list[int]]:
    """Generated ids of the good rows, by Hugging Face's own model, tokenizer, template and image processor."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    theirs = Mistral3ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    # `PixtralProcessor`, which needs torchvision, resizes to multiples of patch times merge; so it is given here.
    processor = PixtralImageProcessorPil.from_pretrained(model, patch_size=28)
    found = {}
    for index, row in enumerate(pq.read_table(albums).to_pylist()):
        if index in BAD_ALBUMS:
            continue
        pixels, places = [], []
        for item in row["image"]:
            image = Image.open(BytesIO(item["bytes"])).convert("RGB")
            tensor = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])[0]
            pixels.append(tensor)
            height, width = tensor.shape[1] // 28, tensor.shape[2] // 28
            places.append("[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]")
        content = [{"type": "image"}] * len(places)
        content += [{"type": "text", "text": PROMPT.format(**row)}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        pieces = text.split("[IMG]")
        assert len(pieces) == len(places) + 1
        text = pieces[0] + "".join(place + piece for place, piece in zip(places, pieces[1:], strict=True))
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        images: dict[str, Any] = {}
        if pixels:
            sizes = torch.tensor([tuple(image.shape[1:]) for image in pixels])
            high, wide = sizes.max(0).values.tolist()
            padded = torch.zeros(len(pixels), 3, high, wide)
            for target, image in zip(padded, pixels, strict=True):
                target[:, : image.shape[1], : image.shape[2]] = image
            images = {"pixel_values": padded, "image_sizes": sizes}
        with torch.inference_mode():
            output = theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, **images
            )
        found[index] = output[0, ids.shape[1] :].tolist()
    return found


def test_sampled_captions_do_not_depend_on_the_neighbours(run: Run) -> None:
    sampled = {"temperature": 1.3, "top_p": 0.95, "top_k": 50, "seed": 5}
    _, alone = run(stages=1, rows_per_microbatch=1, **sampled)
    _, together = run(stages=2, **sampled)
    _, greedy = run(stages=2)
    assert read_output(alone).equals(read_output(together))
    assert not read_output(alone).equals(read_output(greedy))


def test_a_row_can_have_a_limit_of_its_own(cluster: None, model: Path, tmp_path: Path) -> None:
    limits = [3, None, 40, 1]
    table = pa.table({"image": [picture(row) for row in range(4)], "most": pa.array(limits, pa.int32())})
    pq.write_table(table, tmp_path / "in.parquet")
    config = make_config(
        model,
        tmp_path / "in.parquet",
        tmp_path / "out",
        max_new_tokens=8,
        max_new_tokens_column="most",
        ignore_eos=True,
        with_token_ids=True,
    )
    caption(config)
    rows = rows_of(tmp_path / "out")
    assert [row["completion_tokens"] for row in rows] == [3, 8, 8, 1]
    assert [len(row["token_ids"]) for row in rows] == [3, 8, 8, 1]
    assert {row["finish_reason"] for row in rows} == {"length"}


def test_limit_columns_prompt_column_and_stop(cluster: None, model: Path, pictures: Path, tmp_path: Path) -> None:
    config = make_config(
        model,
        pictures,
        tmp_path / "out",
        limit=30,
        columns=("weight", "id"),
        prompt_column="question",
        stop=("a",),
        ignore_eos=True,
        stages=2,
    )
    summary = caption(config)
    table = read_output(tmp_path / "out")
    assert table.column_names == ["weight", "id", *output_columns(with_token_ids=False)]
    assert table["id"].to_pylist() == list(range(1000, 1030))
    # 45 rows in groups of 23 and 22: the limit cuts the second one.
    keys = list(zip(table["source_row_group"].to_pylist(), table["source_row"].to_pylist(), strict=True))
    assert keys == [(0, row) for row in range(23)] + [(1, row) for row in range(7)]
    rows = table.to_pylist()
    wanted = {row: status for row, (_, status) in BAD_PICTURES.items() if row < 30}
    assert {index: row["status"] for index, row in enumerate(rows) if row["status"] != "ok"} == wanted
    for row in rows:
        if row["status"] == "ok":
            assert "a" not in row["caption"]
            assert row["finish_reason"] == "stop" or row["completion_tokens"] == 24
    assert {row["finish_reason"] for row in rows if row["status"] == "ok"} >= {"stop"}
    assert summary.rows == 30
    assert ray.is_initialized(), "a cluster that the caller has joined is left as it is"
