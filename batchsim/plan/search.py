"""The cheapest candidate that meets the objectives, by bracketing and refinement instead of trying all.

Four things make it quick. More replicas of a configuration only help, so that the fewest that do are bracketed and
bisected. A lower bound on them costs no simulation. Of all configurations the one whose next candidate is cheapest goes
on, so that little is looked at beyond the cost of the answer. And most candidates miss by so much that one run without
draws of what is uncertain tells it: only what passes such a screening is confirmed with draws.

More replicas help nearly always: the requests fall to them differently, and a percentile may come out a little worse.
So where a candidate misses by less than `NEAR`, the one below it is looked at as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from batchsim.plan.bench import Bench
from batchsim.plan.candidate import Candidate, Configuration, Trial

NEAR = 0.02  # of a limit
Tell = Callable[[float], None]


@dataclass(slots=True)
class _Line:
    """One configuration: its candidates, each with more replicas than the one before.

    None up to `low` will do. The next that is looked at is one further, then one, two, four, and so on. `confirming`:
    the screening has been bracketed, and what passed it is to be confirmed. `hopeless`: by what is known none will be,
    so that the last is looked at, which would rule out all.
    """

    options: list[Candidate]
    low: int = -1
    failures: int = 0
    confirming: bool = False
    hopeless: bool = False

    @property
    def next(self) -> int:
        if self.hopeless:
            return len(self.options) - 1
        return min(self.low + max(1 << self.failures >> 1, 1), len(self.options) - 1)

    @property
    def cost(self) -> float:
        """Of what is next, USD an hour."""
        return self.options[self.next].cost_per_hour


class Search:
    """Trials made so far: `trials` holds each candidate at the most draws that it had."""

    def __init__(self, bench: Bench, replicas: Sequence[int]) -> None:
        self.bench, self.replicas = bench, tuple(replicas)
        self.trials: dict[Candidate, Trial] = {}
        self._screened: dict[Candidate, Trial] = {}
        self._least: dict[Configuration, int | None] = {}

    def cheapest(self, configurations: Iterable[Configuration], tell: Tell | None = None) -> Trial | None:
        """The candidate that comes first by `Trial.merit` of those that meet the objectives; None where none does."""
        lines = [_Line(options) for each in configurations if (options := self._options(each))]
        turns = sorted((line.cost, i) for i, line in enumerate(lines))
        best: Trial | None = None
        while turns:
            _, i = heappop(turns)
            line = lines[i]
            if (found := self._look(line, best)) is not None:
                best = found
            elif line.low < self._last(line, best):
                heappush(turns, (line.cost, i))
            if tell is not None:
                tell(1 - len(turns) / len(lines))
        return best

    def floor(self, configuration: Configuration) -> float:
        """The least that a candidate of a configuration may cost an hour; infinite where none can do."""
        options = self._options(configuration)
        return options[0].cost_per_hour if options else inf

    def least(self, configuration: Configuration) -> int | None:
        """The bench's lower bound on replicas, asked once."""
        if configuration not in self._least:
            self._least[configuration] = self.bench.least(configuration)
        return self._least[configuration]

    def screen(self, candidate: Candidate) -> Trial:
        """One run, at the costs as they were measured."""
        if candidate not in self._screened:
            self._screened[candidate] = self.bench.screen(candidate)
            self.trials.setdefault(candidate, self._screened[candidate])
        return self._screened[candidate]

    def confirm(self, candidate: Candidate) -> Trial:
        """With draws of what is uncertain; what does not pass the screening is not worth them."""
        screened = self.screen(candidate)
        if not screened.passes:
            return screened
        if not self.trials[candidate].draws:
            self.trials[candidate] = self.bench.confirm(screened)
        return self.trials[candidate]

    def complete(self, trial: Trial) -> Trial:
        """A trial with all of its draws."""
        if trial.result is not None and not (trial.draws and trial.complete):
            self.trials[trial.candidate] = self.bench.whole(trial.candidate)
        return self.trials[trial.candidate]

    def _options(self, configuration: Configuration) -> list[Candidate]:
        least = self.least(configuration)
        if least is None:
            return []
        return [Candidate(configuration, count) for count in self.replicas if count >= least]

    def _last(self, line: _Line, best: Trial | None) -> int:
        """The place of the dearest candidate that may be better than `best`, or less than `low`."""
        if best is None:
            return len(line.options) - 1
        cost = best.candidate.cost_per_hour
        last = sum(each.cost_per_hour <= cost for each in line.options) - 1
        if last > line.low and line.options[last].cost_per_hour == cost:
            rival = self.screen(line.options[last])
            if rival.passes and rival.merit > self.screen(best.candidate).merit:
                return last - 1
        return last

    def _look(self, line: _Line, best: Trial | None) -> Trial | None:
        """Take the next step in a configuration; what it finds is better than `best`."""
        last = self._last(line, best)
        if last <= line.low:
            line.low = last
            return None

        def look(i: int) -> Trial:
            return self.confirm(line.options[i]) if line.confirming else self.screen(line.options[i])

        i = start = min(line.next, last)
        while not _does(trial := look(i), line):
            if i - 1 > line.low and _near(trial):
                i -= 1
                continue
            line.low, line.failures = start, line.failures + 1
            if line.confirming and not line.hopeless and start < last:
                line.hopeless = _worse(self.screen(line.options[last]), look(start))
            return None
        first = _first(line, i, look)
        if line.confirming:
            line.low = len(line.options)
            return look(first)
        line.low, line.failures, line.confirming = first - 1, 0, True
        return None


def _first(line: _Line, index: int, look: Callable[[int], Trial]) -> int:
    """The first candidate of a configuration that does; that at `index` does, none up to `low` will."""
    low = line.low
    while index - low > 1:
        middle = (low + index) // 2
        trial = look(middle)
        if _does(trial, line):
            index = middle
        elif middle - 1 > low and _near(trial) and _does(look(middle - 1), line):
            index = middle - 1
        else:
            low = middle
    return index


def _does(trial: Trial, line: _Line) -> bool:
    return trial.meets if line.confirming else trial.passes


def _near(trial: Trial) -> bool:
    """Whether it misses by so little that chance may have done it."""
    return trial.stable and -NEAR <= min(trial.confident_margins.values()) < 0


def _worse(screened: Trial, missed: Trial) -> bool:
    """Whether what has been screened misses, too, if its figures turn out as much worse as those of `missed` did."""
    for each in screened.objectives:
        value, predicted, bound = screened.values[each.key], missed.values[each.key], missed.bounds.get(each.key)
        if value is None or (predicted and bound is not None and each.margin(value * bound / predicted) < 0):
            return True
    return False


def exhaustive(bench: Bench, candidates: Iterable[Candidate]) -> tuple[Trial | None, list[Trial]]:
    """The best of all candidates, each simulated with all draws, and the trials: what `Search` is held to."""
    trials = [bench.whole(candidate) for candidate in candidates]
    return min((trial for trial in trials if trial.meets), key=lambda trial: trial.merit, default=None), trials
