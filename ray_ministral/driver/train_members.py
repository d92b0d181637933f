"""`Member`: an actor on its way from one stage to another, and the calls by which stages of one cut become those of
another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ministral.driver.pipeline import Pipeline, end_actor
from ray_ministral.driver.places import Place
from ray_ministral.driver.stage_actor import LoadReport
from ray_ministral.driver.train_actor import Held
from ray_ministral.driver.train_copies import Copies, Copy
from ray_ministral.training.migration import Migration, Piece, pieces_of, plan_migration
from ray_ministral.training.plan import TrainStageOptions

NOTHING = Held(None, frozenset(), frozenset())


@dataclass(eq=False)
class Member:
    """An actor at its place. held: what it has, by its own word. loaded: what a new one has read."""

    actor: Any
    warm_up: Any
    place: Place
    held: Held = NOTHING
    report: LoadReport | None = None
    loaded: TrainStageOptions | None = None

    def pieces_at(self, done: int) -> frozenset[Piece]:
        """What it has of the state after `done` steps."""
        return self.held.pieces if self.held.done == done else frozenset()

    def end(self) -> None:
        """Take it away. Never raises."""
        end_actor(self.actor)
        self.place.give_back()


def members_of(pipeline: Pipeline) -> list[Member]:
    """The actors of a pipeline, first to last."""
    return [
        Member(actor, warm_up, place, report=pipeline.loaded.get(stage))
        for stage, (actor, warm_up, place) in enumerate(
            zip(pipeline.actors, pipeline.warm_ups, pipeline.places, strict=True)
        )
    ]


def set_members(pipeline: Pipeline, members: Sequence[Member]) -> None:
    """Make these the stages of a pipeline, first to last."""
    pipeline.actors = [member.actor for member in members]
    pipeline.warm_ups = [member.warm_up for member in members]
    pipeline.places = [member.place for member in members]
    pipeline.loaded = {stage: member.report for stage, member in enumerate(members) if member.report is not None}


def wanted_of(options: Sequence[TrainStageOptions]) -> list[frozenset[Piece]]:
    """What each stage is to have."""
    return [pieces_of([spec for _, spec in own.chunks]) for own in options]


def plan(
    members: Sequence[Member], options: Sequence[TrainStageOptions], done: int, sizes: Mapping[Piece, int]
) -> Migration:
    """Which member becomes which stage, and what moves."""
    return plan_migration([member.pieces_at(done) for member in members], wanted_of(options), sizes)


def change(
    members: Sequence[Member],
    options: Sequence[TrainStageOptions],
    migration: Migration,
    done: int,
    copies: Copies,
    others: Sequence[Member],
) -> list[Any]:
    """Start the calls that make members the stages of `options`; those that are new have loaded these already.

    What no member has comes from `others` (of another replica), else from `copies`. What is sent is kept among the
    copies until it is needed no more. References to the results.
    """
    wanted = wanted_of(options)
    parcels: dict[int, list[Any]] = {place: [] for place in migration.places}

    def send(source: Member, target: int, pieces: Sequence[Piece]) -> None:
        made, parcel = source.actor.give.options(num_returns=2).remote(pieces)
        copies.add(done, Copy(frozenset(pieces), parcel, made))
        parcels[target].append(parcel)

    for move in migration.moves:
        send(members[move.source], move.target, move.pieces)
    for target, missing in migration.missing.items():
        left = set(missing)
        for other in others:
            found = left & other.pieces_at(done)
            if found:
                send(other, target, sorted(found, key=str))
                left -= found
        parcels[target] += copies.parcels(done, left)
    calls = []
    for own, place in zip(options, migration.places, strict=True):
        member = members[place]
        stale = member.held.done != done
        again = sorted(wanted[own.stage] & _here(member), key=str) if stale else ()
        calls.append(member.actor.change.remote(own, done, again, *parcels[place]))
    return calls


def _here(member: Member) -> frozenset[Piece]:
    """What a member has that may be of another step: what it was before, or has loaded."""
    if member.loaded is not None:
        return wanted_of([member.loaded])[0]
    return member.held.pieces
