"""`Suspects`: in whose company a row is tried again, after a step has failed or a stage has died. Pure.

Nobody says which row was to blame. So those that may be are halved again and again, each half in a microbatch that no
other row enters, until the one at fault stands alone: n rows cost about log2(n) more failures, and no good row is lost.
A step that raises an error names its own rows. A death may have come from outside, and does so mostly: it is held
against a row only when it has been there twice, and a row is given up only when it has been all by itself twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from ray_ministral.captioning.batching import Request

MAX_ATTEMPTS = 2
"""A row alone whose step failed is tried once more."""

DEATHS_TO_SUSPECT = 2
DEATHS_BY_ITSELF = 2
"""So many stages must have died while a row, and nothing else, was on them."""


@dataclass
class Verdict:
    """What becomes of rows that have lost their places: `again` in this order, and `given_up`.

    narrowed: whether there are fewer suspects now, or some that were none before.
    """

    again: list[Request] = field(default_factory=list)
    given_up: list[Request] = field(default_factory=list)
    narrowed: bool = False


class Suspects:
    """Of a whole job: its groups have numbers that no other group has."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def after_error(self, rows: Sequence[Request]) -> Verdict:
        """The model refused a step with these rows."""
        verdict = Verdict(narrowed=True)
        if len(rows) == 1 and rows[0].attempts >= MAX_ATTEMPTS:
            verdict.given_up = list(rows)
            return verdict
        for request in rows:
            request.attempts += 1
        verdict.again = self._halved(rows)
        return verdict

    def after_death(self, in_flight: Sequence[Request], others: Sequence[Request]) -> Verdict:
        """A stage died with the rows of some steps `in_flight`, and `others` that were waiting for a step."""
        verdict = Verdict()
        for request in in_flight:
            request.attempts += 1
        groups: dict[int, list[Request]] = {}
        for request in in_flight:
            if request.group is not None:
                groups.setdefault(request.group, []).append(request)
        tried: list[Request] = []
        if groups:
            # Those that run beside suspects are none.
            for rows in groups.values():
                tried += self._after_death_of(rows, verdict)
        else:
            for request in in_flight:
                request.deaths += 1
            again = [request for request in in_flight if request.deaths >= DEATHS_TO_SUSPECT]
            # A row that had just come is likelier than one that has had steps before.
            newest = [request for request in again if request.is_new]
            suspected = newest or again
            if suspected:
                verdict.narrowed = True
                tried = self._halved(suspected)
                if len(suspected) == 1:
                    suspected[0].exclusive = True
        gone = {id(request) for request in (*tried, *verdict.given_up)}
        rest = [request for request in (*in_flight, *others) if id(request) not in gone]
        tried.sort(key=lambda request: not request.exclusive)
        verdict.again = [*tried, *rest]
        return verdict

    def _after_death_of(self, rows: list[Request], verdict: Verdict) -> list[Request]:
        """A group that was there; the rows of it that are tried again, in new groups."""
        verdict.narrowed = True
        if len(rows) > 1:
            return self._halved(rows)
        (request,) = rows
        if request.exclusive:
            request.deaths_by_itself += 1
        request.exclusive = True
        if request.deaths_by_itself >= DEATHS_BY_ITSELF:
            verdict.given_up.append(request)
            return []
        return rows

    def _halved(self, rows: Sequence[Request]) -> list[Request]:
        middle = -(-len(rows) // 2)
        for half in (rows[:middle], rows[middle:]):
            number = next(self._numbers)
            for request in half:
                request.group = number
        return list(rows)
