"""What tile synchronisation takes off a decoder's forward: the tile level's answer to the levels above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from batchsim.model import ModelShape
from batchsim.tiles.graph import Chain
from batchsim.tiles.policy import Policy, policies
from batchsim.tiles.profile import LibraryCurve, TileProfile
from batchsim.tiles.shapes import Tiling, gated_mlp, mlp
from batchsim.tiles.sm import simulate

# The product of gate and up, the activation and the product down.
LIBRARY_LAUNCHES = 3
# The finer policies cost as much to simulate as these together, and were never the best for a gated MLP's shapes that
# were measured; for others one of them is tried.
POLICIES = ("RowSync",)
FINER = ("TileSync/4", "RowSync")
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


class MlpShape(NamedTuple):
    """(rows, hidden) -> (rows, inner) -> (rows, hidden): a gate and up product, or an up product alone, then down."""

    kind: Literal["gated_mlp", "mlp"]
    hidden: int
    inner: int


class Fastest(NamedTuple):
    """The fastest of an MLP's tilings and policies, with a launch's gap; `in_order_ns`: that under StreamSync."""

    time_ns: int
    tilings: tuple[Tiling, Tiling]
    policy: Policy
    in_order_ns: int


class MlpLevel:
    """MLPs of one shape on a device, simulated once for each number of rows and remembered."""

    def __init__(self, shape: MlpShape, profile: TileProfile) -> None:
        self.shape, self.profile = shape, profile
        self.library = self._curve()
        self._fastest: dict[int, Fastest | None] = {}
        self._choices: dict[int, Choice | None] = {}

    def choice(self, rows: int) -> Choice | None:
        """What an MLP of `rows` rows should run at; None: at the framework's own kernels, faster by more than TIE."""
        if rows not in self._choices:
            self._choices[rows] = self._choose(rows)
        return self._choices[rows]

    def fastest(self, rows: int) -> Fastest | None:
        """The fastest of our own kernels for `rows` rows, whatever the framework's take; None: the device has none."""
        if rows not in self._fastest:
            self._fastest[rows] = self._simulated(rows)
        return self._fastest[rows]

    def chains(self, rows: int) -> Iterator[tuple[tuple[Tiling, Tiling], Chain]]:
        """The tilings that are worth a try for so many rows, and the chain of each."""
        kind, hidden, inner = self.shape
        for first in self.profile.tilings_of("gated" if kind == "gated_mlp" else "gemm"):
            for second in self.profile.tilings_of("gemm"):
                if not (_divides(first, hidden) and _divides(second, inner)):
                    continue
                chain = (gated_mlp if kind == "gated_mlp" else mlp)(rows, hidden, inner, first, second)
                if self.profile.together((first, second)) and self.profile.suits(chain.kernels, rows):
                    yield (first, second), chain

    def _simulated(self, rows: int) -> Fastest | None:
        costs, device = self.profile.costs, self.profile.device
        only = POLICIES if self.shape.kind == "gated_mlp" and self.library is not None else FINER
        best: tuple[int, tuple[Tiling, Tiling], Policy] | None = None
        in_order: list[int] = []
        for tilings, chain in self.chains(rows):
            for policy in policies(chain, only=only):
                time_ns = round(simulate(policy, costs, device).total_ns + device.launch_gap_ns)
                if best is None or time_ns < best[0]:
                    best = time_ns, tilings, policy
                if policy.barrier:
                    in_order.append(time_ns)
        return Fastest(*best, min(in_order)) if best is not None else None

    def _choose(self, rows: int) -> Choice | None:
        if self.library is None:
            return None
        library_ns = round(self.library.at(rows))
        best = self.fastest(rows)
        doubt = 0.0 if rows in self.library.rows else BETWEEN
        if best is None or best.time_ns >= library_ns * (1 + TIE - doubt):
            return None
        return Choice(best.tilings, best.policy, best.time_ns, library_ns)

    def _curve(self) -> LibraryCurve | None:
        for curve in self.profile.library:
            if (curve.chain, curve.hidden, curve.inner) == self.shape:
                return curve
        return None


def _divides(tiling: Tiling, contraction: int) -> bool:
    """Whether a contraction can be split into the tiling's shares."""
    return tiling.slices == 1 or contraction % (tiling.slices * tiling.depth) == 0


class TileLevel:
    """A decoder's gated MLPs on a device."""

    def __init__(self, shape: ModelShape, profile: TileProfile) -> None:
        self.shape, self.profile = shape, profile
        self._mlp = MlpLevel(MlpShape("gated_mlp", shape.hidden_size, shape.intermediate_size), profile)

    @property
    def known(self) -> bool:
        """Whether the profile holds the library's times for this model's MLP."""
        return self._mlp.library is not None

    def saved(self, rows: int) -> Saved:
        """What a forward of `rows` rows saves."""
        choice = self.choice(rows)
        if choice is None:
            return NOTHING_SAVED
        launches = len(choice.policy.chain.kernels) if choice.policy.barrier else 1
        return Saved((choice.library_ns - choice.time_ns) * self.shape.num_layers, LIBRARY_LAUNCHES - launches)

    def choice(self, rows: int) -> Choice | None:
        """What the MLP of `rows` rows should run at; None: at the framework's own kernels, faster by more than TIE."""
        return self._mlp.choice(rows)
