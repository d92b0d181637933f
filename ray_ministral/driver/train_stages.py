"""`TrainStages`: the live stages of a training job, and how they come to be others: after a loss, or on purpose.

Whatever happens, it is the same three things: which actors there are, what each has of the state after which step, and
to which cut they go from there. `members` has the calls, `migration` what moves, `ScalingPolicy` how many stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_ministral.driver.calls import Calls
from ray_ministral.driver.pipeline import Pipeline, describe_error
from ray_ministral.driver.places import ANNOUNCE_EVERY_S, Place
from ray_ministral.driver.spares import Spares
from ray_ministral.driver.train_actor import Held
from ray_ministral.driver.train_copies import Copies, Copy
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.driver.train_members import Member, change, members_of, plan, set_members
from ray_ministral.driver.train_newcomer import Newcomer
from ray_ministral.driver.train_policies import ScalingPolicy
from ray_ministral.driver.train_replicas import stage_arguments, start_replicas
from ray_ministral.driver.train_resume import CHECKPOINTS
from ray_ministral.driver.train_survivors import complete, find_room, find_survivors
from ray_ministral.errors import PlacementError, StageDiedError
from ray_ministral.training.checkpoint import latest_good, read_state
from ray_ministral.training.migration import Piece, newest_complete, piece_sizes
from ray_ministral.training.plan import TrainStageOptions
from ray_ministral.training.targets import TrainSample

ROOM_PATIENCE_S = 5.0
"""How long a place for a lost stage may take before the run goes on with fewer, where it may."""


class TrainStages:
    """Of all replicas, which are all cut alike. `generation` grows with each change."""

    def __init__(self, job: TrainJob, actor_class: Any, announce: Callable[[str], None]) -> None:
        self._job, self._actor_class, self._announce = job, actor_class, announce
        self._policy = ScalingPolicy.of(job.config, job.arch.num_layers)
        self._sizes = piece_sizes(job.arch)
        self._copies = Copies()
        self._trained: frozenset[Piece] = frozenset()
        self._newcomer: Newcomer | None = None
        self._loading: dict[Any, tuple[Pipeline, int, Member]] = {}
        self._joining = False
        self.generation = 0

    def start(self, stack: ExitStack, sampler: Any) -> None:
        """Find room for all, and start the actors. `recover` makes stages of them."""
        config = self._job.config.pipeline
        self.replicas, self.resolved = start_replicas(self._job, self._actor_class, self.generation, self._announce)
        for pipeline in self.replicas:
            stack.callback(pipeline.close)
        self.calls = Calls(self.replicas, sampler, config)
        stack.callback(self._copies.close)
        stack.callback(self._dismiss)
        self._spares = Spares(config.spares, self.replicas[0].new_actor)
        stack.callback(self._spares.close)

    @property
    def num_stages(self) -> int:
        """Of each replica."""
        return self.replicas[0].num_stages

    @property
    def copies(self) -> bool:
        """Whether stages give copies of their state after each step. With replicas, twins are the copies."""
        return self._job.config.buddy_copies and len(self.replicas) == 1

    def use_samples(self, samples: Sequence[TrainSample]) -> None:
        """Those whose costs the cut goes by; before anything else."""
        self._samples = list(samples)

    # A step's second phase

    def commit(self, done: int, scale: float | None, rate: float) -> list[Any]:
        """Start the commit that makes `done` steps of the state on all stages; references to when each began, and
        how long it took."""
        copied = self.copies
        self._copies.begin(done)
        made = []
        for pipeline in self.replicas:
            for stage, actor in enumerate(pipeline.actors):
                when, parcel = actor.commit.options(num_returns=2).remote(done, scale, rate, copied=copied)
                made.append(when)
                if copied:
                    pieces, report = self._pieces[stage], pipeline.loaded.get(stage)
                    self._copies.add(done, Copy(pieces, parcel, when), report.node_id if report else None)
        return made

    def trainable_chunks(self) -> tuple[bool, ...]:
        """Whether each chunk has weights to train."""
        found = {
            number: trains
            for held in self.calls.get([actor.trainable.remote() for actor in self.replicas[0].actors])
            for number, trains in held.items()
        }
        return tuple(found[number] for number in range(len(found)))

    # Becoming others

    def begin(self) -> int:
        """Read the model, or the checkpoint that the run goes on from; the steps that it is after."""
        number, done = self.num_stages, self._job.first_step
        for replica, pipeline in enumerate(self.replicas):
            self._load(pipeline, members_of(pipeline), self._options(replica, number, self._job.resume_from), done)
        self._wait_loaded()
        self._connect()
        self._copy(done)
        return done

    def recover(self) -> int:
        """After a loss, or at the start: go on with what there is. The steps that the state is after then.

        Raises `PlacementError` where there is no room for the fewest stages, `StageDiedError` where one more dies.
        """
        self.generation += 1
        self._loading.clear()
        self._dismiss()
        config = self._job.config.pipeline
        # Who waits for a dead one at the store that they were to meet at learns it at the group's time-out alone.
        overdue = self.calls.is_overdue or self._joining
        states = [find_survivors(p, config, self._announce, overdue=overdue) for p in self.replicas]
        number = self._stages_to_go_on_with(states)
        live = [(held.done, held.trained) for own in states for held in own.values() if held.done is not None]
        done = newest_complete(self._trained, live, self._copies.kept()) if self._trained else None
        replicas = [
            complete(pipeline, own, number, self._spares) for pipeline, own in zip(self.replicas, states, strict=True)
        ]
        if done is None:
            done = self._read_again(replicas, number)
        else:
            self._form(replicas, number, done)
        self._connect()
        self._copy(done)
        return done

    def resize(self, number: int, done: int) -> None:
        """Another number of stages between two steps, of which `done` are done.

        Who has been prepared for that takes part at once; for others it takes as long as they take to start.
        """
        self.generation += 1
        (pipeline,) = self.replicas
        members = members_of(pipeline)
        for member, held in zip(members, self.calls.everywhere("void"), strict=True):
            member.held = held
        newcomer = None if self._newcomer is None else self._newcomer.member
        if newcomer is not None and len(members) < number:
            members.append(newcomer)
            self._newcomer = None
        self._dismiss()
        timeout_s = self._job.config.pipeline.placement_timeout_s
        while len(members) < number:
            place = Place(self.resolved)
            if not place.wait(timeout_s):
                place.give_back()
                raise PlacementError(
                    f"no room for stage {len(members)} of {number} within {timeout_s:.0f} s: add nodes, or stay at "
                    f"{self.num_stages} stages"
                )
            members.append(Member(*self.replicas[0].new_actor(place), place))
        self._form([members], number, done)
        self._connect()
        self._copy(done)

    def may_grow(self) -> bool:
        """Whether a newcomer is about to be taken in, so that no commit may be under way."""
        return self._newcomer is not None and self._newcomer.is_ready

    def grow(self, done: int) -> bool:
        """One stage more where there is room and more are wanted; whether that has happened. Waits for no newcomer."""
        self._spares.poll()
        larger = self._policy.next_above(self.num_stages)
        if larger is None or larger != self.num_stages + 1:
            return False
        if self._newcomer is None:
            self._newcomer = Newcomer(self.resolved, self.replicas[0].new_actor)
        try:
            ready = self._newcomer.poll(self._role_of)
        except RayError as error:
            self._announce(f"a new stage could not start: {describe_error(error)}; trying again")
            self._dismiss()
            return False
        if ready:
            self._announce(f"there is room again: going on with {larger} stages")
            self.resize(larger, done)
        return ready

    def _role_of(self, member: Member) -> TrainStageOptions:
        """What a newcomer is going to be, as things are."""
        members = members_of(self.replicas[0])
        for other, pieces in zip(members, self._all_pieces, strict=True):
            other.held = Held(0, pieces, pieces)
        options = self._options(0, len(members) + 1, self._source_of_frozen())
        return options[plan([*members, member], options, 0, self._sizes).places.index(len(members))]

    def _dismiss(self) -> None:
        """End who was to come. Never raises."""
        newcomer, self._newcomer = self._newcomer, None
        if newcomer is not None:
            newcomer.end()

    def _stages_to_go_on_with(self, states: Sequence[Mapping[int, Held]]) -> int:
        """As many as there were where there is room for those that are lost, else fewer, else wait for room."""
        config = self._job.config.pipeline
        survivors, before = min(len(own) for own in states), self.num_stages
        lost = [(p, s) for p, own in zip(self.replicas, states, strict=True) for s in range(before) if s not in own]
        patience = ROOM_PATIENCE_S if self._policy.after_loss(before, survivors, 0) else config.placement_timeout_s
        room = find_room(lost, self._spares, patience, self._announce)
        if len(self.replicas) > 1:
            number = before if room >= len(lost) else None
        else:
            number = self._policy.after_loss(before, survivors, room)
        if number is None:
            raise PlacementError(
                f"{len(lost)} stages are lost, and there is room for {room} within {patience:.0f} s: add nodes, or "
                "allow fewer stages with --min-stages; the same command goes on from the last checkpoint"
            )
        return number

    # What they become

    def _options(self, replica: int, number: int, checkpoint: Path | None) -> list[TrainStageOptions]:
        chunks = self._job.chunks(number, self._samples).stages
        read = None if checkpoint is None else str(checkpoint)
        return stage_arguments(self._job, chunks, number, replica, self.resolved, read)

    def _source_of_frozen(self) -> Path | None:
        """The checkpoint that has weights which are not trained; None where those are the model's own."""
        job = self._job
        if job.resume_from is None or job.config.lora_rank is not None or not job.config.freeze:
            return None
        return job.resume_from if job.resume_from.exists() else latest_good(job.output / CHECKPOINTS).checkpoint

    def _read_again(self, replicas: Sequence[list[Member]], number: int) -> int:
        """Everybody reads the last checkpoint, or the model; the steps that it is after."""
        self._copies.clear()
        checkpoint = latest_good(self._job.output / CHECKPOINTS).checkpoint or self._job.resume_from
        done = 0 if checkpoint is None else read_state(checkpoint).step
        if self._trained:
            self._announce(f"the state of the last steps is lost with its copies: going back to step {done}")
        for replica, (pipeline, members) in enumerate(zip(self.replicas, replicas, strict=True)):
            for unused in members[number:]:
                unused.end()
            set_members(pipeline, members[:number])
            self._load(pipeline, members[:number], self._options(replica, number, checkpoint), done)
        self._wait_loaded()
        return done

    def _form(self, replicas: Sequence[list[Member]], number: int, done: int) -> None:
        """Make members the stages of another cut, with the state after `done` steps."""
        calls = []
        unused: list[Member] = []
        frozen = self._source_of_frozen()
        options = [self._options(replica, number, frozen) for replica in range(len(replicas))]
        plans = [plan(members, own, done, self._sizes) for members, own in zip(replicas, options, strict=True)]
        for pipeline, members, own, migration in zip(self.replicas, replicas, options, plans, strict=True):
            set_members(pipeline, members)
            for stage, place in enumerate(migration.places):
                if members[place].report is None:
                    self._load(pipeline, [members[place]], [own[stage]], None)
        self._wait_loaded()
        for replica, (members, own, migration) in enumerate(zip(replicas, options, plans, strict=True)):
            others = [member for other, all_of_it in enumerate(replicas) if other != replica for member in all_of_it]
            calls += change(members, own, migration, done, self._copies, others)
        self.calls.get(calls)
        for pipeline, members, migration in zip(self.replicas, replicas, plans, strict=True):
            set_members(pipeline, [members[place] for place in migration.places])
            unused += [member for place, member in enumerate(members) if place not in migration.places]
        for member in unused:
            member.end()

    def _load(
        self, pipeline: Pipeline, members: Sequence[Member], options: Sequence[TrainStageOptions], done: int | None
    ) -> None:
        for member, own in zip(members, options, strict=True):
            member.loaded = own
            stage = pipeline.actors.index(member.actor)
            self._loading[member.actor.load.remote(own, done)] = pipeline, stage, member

    def _wait_loaded(self) -> None:
        """Wait for what `_load` began. Raises a stage's own error where it refuses the model, else `StageDiedError`."""
        timeout_s = self._job.config.pipeline.start_timeout_s
        pending, began, told = dict(self._loading), time.monotonic(), time.monotonic()
        self._loading.clear()
        while pending:
            for reference in ray.wait(list(pending), num_returns=len(pending), timeout=0.5)[0]:
                pipeline, stage, member = pending.pop(reference)
                try:
                    member.report = pipeline.loaded[stage] = ray.get(reference)
                except RayTaskError as error:
                    raise pipeline.cannot_load(stage, error) from error
                except RayActorError as error:
                    raise pipeline.death(error) from error
            for pipeline, stage, member in pending.values():
                if member.place.is_lost:
                    raise StageDiedError(f"stage {stage} of {pipeline.name} was lost with its node while it started")
            if pending and time.monotonic() - told > ANNOUNCE_EVERY_S:
                told = time.monotonic()
                shown = "; ".join(pipeline.progress() for pipeline in self.replicas)
                self._announce(f"waiting for {len(pending)} stages: {shown}")
                if told - began > timeout_s:
                    raise next(iter(pending.values()))[0].not_ready(timeout_s, shown)

    def _connect(self) -> None:
        """All stages of all replicas meet at the store of the very first one, in the groups of a new generation."""
        self.calls.is_overdue = False
        for pipeline in self.replicas:
            pipeline.generation = self.generation
        address = self.calls.get([self.replicas[0].actors[0].serve_store.remote()])[0]
        self._joining = True
        self.calls.everywhere("join", self.generation, address)
        self._joining = False
        held = self.calls.everywhere("held")
        self._pieces = [own.trained for own in held[: self.num_stages]]
        self._all_pieces = [own.pieces for own in held[: self.num_stages]]
        self._trained = frozenset(piece for own in self._pieces for piece in own)
        layers = self._job.chunks(self.num_stages, self._samples).layers_per_stage
        self._announce(f"decoder layers of each chunk: {', '.join(map(str, layers))}")

    def _copy(self, done: int) -> None:
        """Copies of the state as it is now, unless there are to be none, or there are all of them."""
        if self.copies and not self._copies.kept().get(done, set()) >= self._trained:
            self.calls.get(self.commit(done, None, 0.0))
