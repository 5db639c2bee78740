"""The pairs that the prediction is tested on: other kernels, host work, copies and loops than in the set of the fit."""

from __future__ import annotations

from calibration.pairs.generation import Prompts, drafting, sampling
from calibration.pairs.loop import Async, Pair, Sync, staged
from calibration.pairs.numerics import Fused, Pieces, Quantised, Scans, Solver
from calibration.pairs.parts import AsyncParts, in_parts
from calibration.pairs.perception import Detection
from calibration.pairs.signals import Kalman, Sensors, Unrolled, Volumes
from calibration.pairs.styles import PinnedPieces, Polling, Prefetched, Rotated, Thorough, TwoLate
from calibration.pairs.tables import Events, Groups, Neighbours, Sorting, Towers

TEST = (
    drafting(
        "drafts", "two graphs a step: a small model drafts tokens, a large one checks them", "steps",
        batch=32, hidden=2048, layers=16, context=256, care=60,
    ),
    sampling(
        "sampling", "a model with state in a graph, sampling behind it launched kernel by kernel", "own",
        batch=128, heads=16, layers=12, care=30,
    ),
    in_parts("prompts", "causal attention over whole prompts; a dictionary of known prefixes; lists as results",
             "gains", lambda lab: Prompts(lab, prompts=2, length=4096, hidden=512, layers=8), "record", lists=True),
    in_parts("detection", "numpy brings frames to size, convolutions, three results one by one, boxes in Python",
             "gains", lambda lab: Detection(lab, frames=3, channels=64, blocks=10, candidates=32), "none"),
    in_parts("events", "JSON and regular expressions; sums of table rows, counts, the best of two million items",
             "gains", lambda lab: Events(lab, events=64, items=2_000_000), "own"),
    in_parts("towers", "three towers on three streams, negatives drawn by numpy", "gains",
             lambda lab: Towers(lab, rows=6144, width=256, layers=5), "none"),
    staged("volumes", "25 MB of pageable memory go over; sums along three axes", "gains",
           lambda lab: Volumes(lab, passes=8), "none"),
    staged("fused", "kernels of Triton; hashes and counts on the host", "gains",
           lambda lab: Fused(lab, rows=8192, width=4096, layers=60, chunks=800), "steps"),
    Pair("pieces", "a dozen pinned arrays go over and three come back, none overlapped", "gains",
         lambda lab: PinnedPieces(Pieces(lab, pieces=12, copies=32)),
         lambda lab: AsyncParts(Pieces(lab, pieces=12, copies=32)), "steps"),
    Pair("rotated", "a graph network; each step begins by waiting for the one before", "gains",
         lambda lab: Rotated(Neighbours(lab, nodes=200_000, edges=2_000_000, layers=3, seeds=2048)),
         lambda lab: Async(Neighbours(lab, nodes=200_000, edges=2_000_000, layers=3, seeds=2048)), "steps"),
    Pair("polling", "sorting; the host asks an event over and over whether it has happened", "gains",
         lambda lab: Polling(Sorting(lab, keys=16_000_000, limits=3000)),
         lambda lab: Async(Sorting(lab, keys=16_000_000, limits=3000)), "none"),
    Pair("thorough", "8-bit products; event, stream and device are waited for in a row", "gains",
         lambda lab: Thorough(Quantised(lab, rows=8192, width=2048, layers=12, jobs=1200)),
         lambda lab: Async(Quantised(lab, rows=8192, width=2048, layers=12, jobs=1200)), "record"),
    Pair("prefetched", "an LSTM; the next inputs are already prepared under it, the results are used behind it",
         "nothing", lambda lab: Prefetched(Sensors(lab, batch=64, length=128, width=1024)),
         lambda lab: Async(Sensors(lab, batch=64, length=128, width=1024)), "own"),
    Pair("two_late", "Kalman filters whose results are read two steps late already", "nothing",
         lambda lab: TwoLate(Kalman(lab, filters=49152, size=32, readings=2048)),
         lambda lab: Async(Kalman(lab, filters=49152, size=32, readings=2048)), "own"),
    staged("unrolled", "a recurrent cell in small operations: the host is the bottleneck", "loses",
           lambda lab: Unrolled(lab, length=32), "steps"),
    staged("groups", "Python and small kernels by turns: the host is the bottleneck", "loses",
           lambda lab: Groups(lab, groups=40), "none"),
    Pair("solver", "conjugate gradients: the residual of every iteration decides whether another follows", "nothing",
         lambda lab: Sync(Solver(lab, size=16384)), lambda lab: Async(Solver(lab, size=16384)), "none"),
    staged("scans", "20 ms of sums along rows and next to nothing on the host", "nothing",
           lambda lab: Scans(lab, rows=4096, length=65536, passes=12), "record"),
)  # fmt: skip
