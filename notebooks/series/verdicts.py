"""The one rule by which numbers answer a claim: a whole interval against a limit, never a mean alone.

A notebook says which recorded numbers a claim rests on, and what each of them would have to be:

    from series.verdicts import at_least, at_most

    run.claim(2, {"frechet distance by the teacher's, audio": at_most(1.24)}, also=["frechet distance, audio, teacher"])
    run.claim(5, {"operations, teacher / student": at_least(34.6, nothing=1, exact=True)}, note="a count, no timing")
    run.claim(14, verdicts.NOT_TRIED, also=["work of the audio stream"])

`run.claim` looks up the numbers and their 95 % intervals, asks `verdict` for each and `whole` for all. A difference or
a ratio is recorded with an interval of its own: two means with an interval each decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from studies.store import OverSeeds as OverSeeds
from studies.store import over_seeds as over_seeds

REPRODUCED = "reproduced in miniature"
DIRECTION = "the direction only"
CONTRADICTED = "contradicted"
NOT_SEEN = "not seen in miniature"
NOT_SEPARATED = "not separated"
NO_POWER = "no power here"
NOT_TRIED = "not tried"
NOT_RUN = "implemented, not run here"
ANSWERS = (REPRODUCED, DIRECTION, CONTRADICTED, NOT_SEEN, NOT_SEPARATED, NO_POWER)


class Limit(NamedTuple):
    """What a number must be for its claim to hold; `at_least` and `at_most` make one.

    Attributes:
        edge: the paper's own number, or the edge of what counts as equal.
        better: the side of it that the claim asks for, "higher" or "lower".
        nothing: what the number would be without the effect, where the claim is an effect of a known size.
        exact: the number is a count, which needs no interval.
        power: a number on the other side could have been seen; False at a ceiling.
    """

    edge: float
    better: str
    nothing: float
    exact: bool = False
    power: bool = True

    def __str__(self) -> str:
        """Write the limit as a table shows it."""
        return f"{'≥' if self.better == 'higher' else '≤'} {self.edge:.4g}"


def at_least(edge: float, *, nothing: float | None = None, exact: bool = False, power: bool = True) -> Limit:
    """Ask for a number of `edge` or more; ValueError where `nothing` is more than that."""
    return _sound(Limit(edge, "higher", edge if nothing is None else nothing, exact, power))


def at_most(edge: float, *, nothing: float | None = None, exact: bool = False, power: bool = True) -> Limit:
    """Ask for a number of `edge` or less; ValueError where `nothing` is less than that."""
    return _sound(Limit(edge, "lower", edge if nothing is None else nothing, exact, power))


def _sound(limit: Limit) -> Limit:
    if not (limit.nothing <= limit.edge if limit.better == "higher" else limit.nothing >= limit.edge):
        raise ValueError(
            f"{limit.better} is better, so without the effect a number does not pass the limit {limit.edge}; "
            f"found nothing={limit.nothing}"
        )
    return limit


def verdict(value: float, interval: Sequence[float] | None, limit: Limit) -> str:
    """Judge one number by its 95 % interval.

    - *reproduced*: the whole interval is inside the limit.
    - *contradicted*: the whole interval is outside, beyond what there would be without the effect.
    - *the direction only*: the whole interval is better than without the effect, not all of it inside the limit.
    - *not seen*: it holds what there would be without the effect, and stays short of the limit.
    - *not separated*: it holds both.
    - *no power*: there is no interval (one seed), it has no width (all clips alike: a ceiling), or `power` is False.
    """
    low, high = (value, value) if limit.exact else interval or (math.nan, math.nan)
    if not limit.power or not (low < high or (limit.exact and low == high)):
        return NO_POWER
    edge, nothing = limit.edge, limit.nothing
    if limit.better == "lower":
        low, high, edge, nothing = -high, -low, -edge, -nothing
    if low > edge or (limit.exact and low == edge):
        return REPRODUCED
    if high < nothing:
        return CONTRADICTED
    if low > nothing:
        return DIRECTION
    return NOT_SEEN if high < edge else NOT_SEPARATED


def side(interval: Sequence[float] | None, of: float = 0.0) -> str:
    """Say on which side of a value a whole interval lies; one that holds the value is no result."""
    if not interval:
        return "no interval"
    low, high = interval
    return f"above {of:g}" if low > of else f"below {of:g}" if high < of else f"holds {of:g}"


def whole(parts: Mapping[str, str]) -> str:
    """Join the verdicts of a claim's parts: one that holds in part says which part, else the weightiest no stands."""
    if not parts:
        raise ValueError("a claim is judged by one number or more, found none")
    named = {answer: [name for name, verdict_of in parts.items() if verdict_of == answer] for answer in ANSWERS}
    named = {answer: names for answer, names in named.items() if names}
    first, *others = named
    if first not in (REPRODUCED, DIRECTION):
        return first
    if others:
        return "partly: " + "; ".join(f"{answer}: {', '.join(names)}" for answer, names in named.items())
    return first if first == REPRODUCED else f"partly: {first}"
