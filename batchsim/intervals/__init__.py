"""90% prediction intervals: what a run's figures may come to, given what is uncertain of its costs and its requests."""

from batchsim.intervals.affordable import DRAWS, again, of_run
from batchsim.intervals.bounds import bound
from batchsim.intervals.perturb import perturbed
from batchsim.intervals.within import with_intervals

# Simulations that the intervals of each point of a sweep are made from; DRAWS are those of one run. Whole blocks of
# the design: see `batchsim.intervals.design`.
SWEEP_DRAWS = 8

__all__ = ["DRAWS", "SWEEP_DRAWS", "again", "bound", "of_run", "perturbed", "with_intervals"]
