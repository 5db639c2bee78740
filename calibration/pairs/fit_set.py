"""The pairs that the prediction was fitted on: what each is there to show stands in its description."""

from __future__ import annotations

from functools import partial

from calibration.pairs.decoding import decode
from calibration.pairs.dependent import (
    Careful,
    Fields,
    HostFeedback,
    InOrder,
    ListByList,
    Queued,
    RowsMidway,
    ValueMidway,
)
from calibration.pairs.loop import Async, Pair, Sync, staged
from calibration.pairs.pipelines import (
    Alternating,
    Branches,
    Images,
    LargeResults,
    Ranking,
    Scores,
    Spectra,
    Texts,
    TinyKernels,
    Training,
)

FIT = (
    decode(
        partial(Pair, "decode_light", "decode in a CUDA graph, little Python between", "gains", annotation="own"),
        batch=32, hidden=4096, layers=16, context=512, care=20,
    ),
    decode(
        partial(Pair, "decode_heavy", "decode in a CUDA graph, much Python between", "gains", annotation="steps"),
        batch=64, hidden=4096, layers=16, context=256, care=200,
    ),
    decode(
        partial(Pair, "decode_tiny", "a tiny decode in a CUDA graph, far less than its Python", "gains",
                annotation="none"),
        batch=64, hidden=512, layers=4, context=128, care=150,
    ),
    decode(
        partial(Pair, "decode_eager", "a small decode launched kernel by kernel: the host is the bottleneck, and "
                "asynchrony gives it more to do", "loses", annotation="steps"),
        batch=8, hidden=512, layers=8, context=64, care=5, graph=False,
    ),
    staged("scores", "an eager perceptron, device-bound, with some Python before and after", "gains",
           lambda lab: Scores(lab, rows=4096, width=2048, layers=12, care=8000), "none"),
    staged("tiny_kernels", "tiny kernels launched one by one: nothing but launches to wait for", "loses", TinyKernels,
           "steps"),
    staged("images", "numpy makes images ready, large pageable copies, convolutions", "gains",
           lambda lab: Images(lab, batch=16, depth=4), "record"),
    staged("ranking", "a recommender in a CUDA graph, numpy and sorting around it", "gains",
           lambda lab: Ranking(lab, candidates=4096, layers=12), "own"),
    staged("spectra", "Fourier transforms of sound that numpy has cut into windows", "gains",
           lambda lab: Spectra(lab, windows=256, filters=16), "none"),
    staged("texts", "Python cuts texts into tokens for an eager encoder", "gains",
           lambda lab: Texts(lab, texts=64, length=128, layers=12), "steps"),
    staged("large_results", "results of 16 MiB come back in every step", "gains",
           lambda lab: LargeResults(lab, rows=2048, width=2048, layers=12, care=500), "own"),
    staged("branches", "two branches on two streams, joined by events", "gains",
           lambda lab: Branches(lab, rows=1024, width=2048, layers=10, care=6000), "steps"),
    staged("alternating", "a long step and a short one by turns", "gains",
           lambda lab: Alternating(lab, rows=8192, width=2048, layers=8, care=6000), "steps", period=2),
    staged("training", "training whose host reads the loss of every step", "gains",
           lambda lab: Training(lab, rows=4096, width=2048, layers=4, care=8000), "steps"),
    Pair("careful", "a loop that synchronises after everything", "gains",
         lambda lab: Careful(Scores(lab, rows=2048, width=2048, layers=10, care=5000)),
         lambda lab: Async(Scores(lab, rows=2048, width=2048, layers=10, care=5000)), "own"),
    Pair("fields", "many short lists copied one by one, against one pinned copy", "gains",
         lambda lab: ListByList(Fields(lab, rows=2048, width=2048, layers=6, care=100, fields=32, length=64)),
         lambda lab: Async(Fields(lab, rows=2048, width=2048, layers=6, care=100, fields=32, length=64)), "none"),
    staged("rows_midway", "nonzero() midway stops the host in both loops; what follows can be hidden", "gains",
           lambda lab: RowsMidway(lab, rows=4096, width=2048, layers=4, care=8000), "steps"),
    staged("value_midway", "item() midway decides what comes next, and there is little else to do", "nothing",
           lambda lab: ValueMidway(lab, rows=8192, width=2048, layers=6, care=50), "none"),
    Pair("host_feedback", "each step's inputs are made by Python of the results before", "nothing",
         lambda lab: Sync(HostFeedback(lab, rows=8192, width=2048, layers=10, care=3000)),
         lambda lab: InOrder(HostFeedback(lab, rows=8192, width=2048, layers=10, care=3000)), "record"),
    Pair("queued", "a loop that already reads its results a step late", "nothing",
         lambda lab: Queued(Scores(lab, rows=4096, width=2048, layers=10, care=5000)),
         lambda lab: Async(Scores(lab, rows=4096, width=2048, layers=10, care=5000)), "steps"),
    staged("long_device", "50 ms of matrix products and next to nothing on the host", "nothing",
           lambda lab: Scores(lab, rows=16384, width=4096, layers=8, care=500), "steps"),
)  # fmt: skip
