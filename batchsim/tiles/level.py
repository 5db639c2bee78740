"""What tile synchronisation takes off a decoder's forward: the tile level's answer to the levels above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from batchsim.model import ModelShape
from batchsim.tiles.graph import Chain
from batchsim.tiles.policy import Policy, policies
from batchsim.tiles.profile import LibraryCurve, TileProfile
from batchsim.tiles.shapes import Tiling, gated_mlp
from batchsim.tiles.sm import simulate

# The product of gate and up, the activation and the product down.
LIBRARY_LAUNCHES = 3
# The finer policies cost as much to simulate as these together, and were never the best for a gated MLP's shapes.
POLICIES = ("RowSync",)
# A tie is given to our kernels, for the launches that they save.
TIE = 0.01
# By how much the library's time may be off between the rows at which it was measured: it changes kernels there.
BETWEEN = 0.05


class Saved(NamedTuple):
    """Device time of a forward, nanoseconds, and launches of each of its layers, that need not be spent."""

    ns: int
    launches: int


NOTHING_SAVED = Saved(0, 0)


@dataclass(frozen=True)
class Choice:
    """The tilings and the policy that a layer's gated MLP should run at, and its time against the library's."""

    tilings: tuple[Tiling, Tiling]
    policy: Policy
    time_ns: int
    library_ns: int


class TileLevel:
    """A decoder's gated MLPs on a device, simulated once for each number of rows and remembered."""

    def __init__(self, shape: ModelShape, profile: TileProfile) -> None:
        self.shape, self.profile = shape, profile
        self._library = self._curve()
        self._choices: dict[int, Choice | None] = {}

    @property
    def known(self) -> bool:
        """Whether the profile holds the library's times for this model's MLP."""
        return self._library is not None

    def saved(self, rows: int) -> Saved:
        """What a forward of `rows` rows saves."""
        choice = self.choice(rows)
        if choice is None:
            return NOTHING_SAVED
        launches = len(choice.policy.chain.kernels) if choice.policy.barrier else 1
        return Saved((choice.library_ns - choice.time_ns) * self.shape.num_layers, LIBRARY_LAUNCHES - launches)

    def choice(self, rows: int) -> Choice | None:
        """What the MLP of `rows` rows should run at; None: at the framework's own kernels, faster by more than TIE."""
        if rows not in self._choices:
            self._choices[rows] = self._choose(rows)
        return self._choices[rows]

    def _choose(self, rows: int) -> Choice | None:
        if self._library is None:
            return None
        library_ns = round(self._library.at(rows))
        costs, device = self.profile.costs, self.profile.device
        best: tuple[int, tuple[Tiling, Tiling], Policy] | None = None
        for first in self.profile.tilings_of("gated"):
            for second in self.profile.tilings_of("gemm"):
                chain = self._chain(rows, first, second)
                if not (self.profile.together((first, second)) and self.profile.suits(chain.kernels, rows)):
                    continue
                for policy in policies(chain, only=POLICIES):
                    time_ns = round(simulate(policy, costs, device).total_ns + device.launch_gap_ns)
                    if best is None or time_ns < best[0]:
                        best = time_ns, (first, second), policy
        doubt = 0.0 if rows in self._library.rows else BETWEEN
        if best is None or best[0] >= library_ns * (1 + TIE - doubt):
            return None
        time_ns, tilings, policy = best
        return Choice(tilings, policy, time_ns, library_ns)

    def _chain(self, rows: int, first: Tiling, second: Tiling) -> Chain:
        return gated_mlp(rows, self.shape.hidden_size, self.shape.intermediate_size, first, second)

    def _curve(self) -> LibraryCurve | None:
        wanted = "gated_mlp", self.shape.hidden_size, self.shape.intermediate_size
        for curve in self.profile.library:
            if (curve.chain, curve.hidden, curve.inner) == wanted:
                return curve
        return None
