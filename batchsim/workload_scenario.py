"""What a user may write of a workload: how many requests, when they arrive, how long they are."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from batchsim.errors import nearest, one_of, shown
from batchsim.fields import MAX_ENTRIES, Count, Model, Text
from batchsim.refusal import Refusals, refused
from batchsim.yaml_loader import Document

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Spec = TypeVar("Spec", bound=Model)

MAX_TOKENS = 10_000_000
TraceFormat = Literal["auto", "azure", "burstgpt", "mooncake", "vidur", "splitwise"]
MIN_RATE, MAX_RATE = 1e-6, 1e9
PREFIX_BLOCK = 16
MAX_HASHES = 200_000_000

Rate = Annotated[float, Field(ge=MIN_RATE, le=MAX_RATE, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.001, le=1e9, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refused(shown(value), "a number")
    return value


Parameter = Annotated[float, BeforeValidator(_number)]


class Piece(Model):
    """A time during which the rate of arrivals is constant."""

    rate: Annotated[float, Field(ge=0, le=MAX_RATE, allow_inf_nan=False)]
    """Requests per second; 0: none arrive."""
    duration_s: Seconds | None = None
    """For how long; that of the last piece does not matter, because its rate goes on for ever."""


class Diurnal(Model):
    """A rate that swings: `mean * (1 + amplitude * cos(2 pi (t - peak_s) / period_s))` at t seconds."""

    mean: Rate
    """Requests per second, averaged over a period."""
    amplitude: Annotated[float, Field(ge=0, le=0.999, allow_inf_nan=False)]
    """How far the rate swings to either side of the mean, as a share of it."""
    period_s: Seconds = 86_400.0
    """Seconds from peak to peak."""
    peak_s: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """When the rate is highest, seconds after the start."""


class Family(Model):
    """A distribution of `scipy.stats`; its parameters, by their names there, are further keys."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Parameter]

    dist: Text
    """Its name in scipy.stats, such as lognorm (with s and scale) or poisson (with mu)."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        import numpy as np
        from scipy import stats

        known = [
            name for name in dir(stats) if isinstance(getattr(stats, name), stats.rv_continuous | stats.rv_discrete)
        ]
        if self.dist not in known:
            guess = nearest(self.dist, known)
            wanted = "a continuous or discrete distribution of scipy.stats" + (
                f" (the nearest: {guess})" if guess else ""
            )
            raise refused(shown(self.dist), wanted, "dist")
        family = getattr(stats, self.dist)
        shapes = [name.strip() for name in (family.shapes or "").split(",") if name.strip()]
        names = [*shapes, "loc", "scale"] if isinstance(family, stats.rv_continuous) else [*shapes, "loc"]
        for name in self.__pydantic_extra__:
            if name not in names:
                own = [key for key in type(self).model_fields if key != "dist"]
                raise refused(f"no parameter of {self.dist}", one_of([*names, *own]), name)
        for name in shapes:
            if name not in self.__pydantic_extra__:
                raise refused("nothing", f"a number, for {self.dist} has the parameters {', '.join(names)}", name)
        try:
            sound = not np.isnan(self.draw(1, np.random.default_rng(0))).any()
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError):
            sound = False
        if not sound:
            told = ", ".join(f"{name} = {value:g}" for name, value in self.__pydantic_extra__.items())
            raise refused(told or "no parameters", f"parameters that scipy.stats.{self.dist} is defined for")
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters as scipy takes them: where one has to be an integer, a float of its value will not do."""
        return {name: int(x) if x.is_integer() else x for name, x in self.__pydantic_extra__.items()}

    def draw(self, count: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
        """Values as they are drawn."""
        import numpy as np
        from scipy import stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = getattr(stats, self.dist).rvs(**self.parameters, size=count, random_state=generator)
        return np.asarray(drawn, dtype=np.float64)


class Distribution(Family):
    """A distribution of `scipy.stats`; its parameters, by their names there, are further keys.

    What is drawn is rounded to the nearest integer (halves to even) and cut to `min` and `max`.
    """

    min: Count = 1
    """What a smaller value becomes."""
    max: Count = MAX_TOKENS
    """What a larger value becomes."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise refused(f"{self.max}, less than min = {self.min}", f"at least {self.min}", "max")
        return self


class Empirical(Model):
    """Values that occur, and how often."""

    values: Annotated[tuple[Count, ...], Field(strict=False, min_length=1, max_length=MAX_ENTRIES)]
    """Values to draw from."""
    weights: Annotated[tuple[Weight, ...], Field(strict=False, min_length=1, max_length=MAX_ENTRIES)] | None = None
    """How often each occurs, in proportion; without it all equally often."""

    @model_validator(mode="after")
    def _match(self) -> Self:
        if self.weights is not None:
            if len(self.weights) != len(self.values):
                raise refused(f"{len(self.weights)} weights for {len(self.values)} values", "one for each", "weights")
            if not sum(self.weights):
                raise refused("weights that are all 0", "one that is more", "weights")
        return self


class Priority(Model):
    """A class of requests that are equally urgent."""

    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)]
    """What such requests have as their priority; lower is more urgent, as in vLLM."""
    share: Weight
    """How many such requests there are, in proportion to the other classes."""


class SharedPrefix(Model):
    """Beginnings that requests have in common, such as system prompts."""

    len: Annotated[int, Field(ge=PREFIX_BLOCK, le=MAX_TOKENS)]
    """Tokens of each prefix, part of a request's input_len; a shorter prompt has as much of it as fits.

    Whole blocks of 16 tokens are known to be shared; the rest is not.
    """
    count: Count = 1
    """Different prefixes; each request begins with one of them, all equally likely."""


def specified(model: type[Spec], value: dict[str, Any], place: str = "") -> Spec:
    """`value` as `model`; what is wrong with it, as an error that the validator of a union may raise."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = Refusals(model.model_json_schema(), {}).explain(error, Document(value), "", ()).problems[0]
        raise refused(first.found, first.wanted, ".".join(filter(None, [place, first.key]))) from None


def _rate(value: object) -> object:
    wanted = f"a number from {MIN_RATE:g} to {MAX_RATE:g}, a list of pieces with rate and duration_s, or a mapping"
    match value:
        case None | Diurnal():
            return value
        case dict():
            return specified(Diurnal, value)
        case list() | tuple() if value:
            pieces = [piece if isinstance(piece, Piece) else _piece(i, piece) for i, piece in enumerate(value)]
            return _pieces(pieces)
        case int() | float() if not isinstance(value, bool) and MIN_RATE <= value <= MAX_RATE:
            return float(value)
    raise refused(shown(value), f"{wanted} with mean, amplitude, period_s and peak_s; all at the start without it")


def _piece(index: int, value: object) -> Piece:
    if isinstance(value, dict):
        return specified(Piece, value, str(index))
    raise refused(shown(value), "a mapping with rate and duration_s", str(index))


def _pieces(pieces: list[Piece]) -> tuple[Piece, ...]:
    if len(pieces) > MAX_ENTRIES:
        raise refused(f"{len(pieces)} pieces", f"at most {MAX_ENTRIES}")
    for i, piece in enumerate(pieces[:-1]):
        if piece.duration_s is None:
            raise refused("nothing", "the seconds that this rate lasts, before the next piece", f"{i}.duration_s")
    if pieces[-1].rate < MIN_RATE:
        wanted = f"at least {MIN_RATE:g}, for this rate goes on for ever"
        raise refused(shown(pieces[-1].rate), wanted, f"{len(pieces) - 1}.rate")
    return tuple(pieces)


def length_of(
    value: object,
    least: int = 1,
    distribution: type[Distribution] = Distribution,
    empirical: type[Empirical] = Empirical,
) -> object:
    """What a file says of lengths of at least `least`, as a number or as one of the two models."""
    match value:
        case Distribution() | Empirical():
            return value
        case dict() if "values" in value or "weights" in value:
            return specified(empirical, value)
        case dict() if "dist" in value:
            return specified(distribution, value)
        case int() if not isinstance(value, bool) and least <= value <= MAX_TOKENS:
            return value
    found = f"{shown(value)} without dist or values" if isinstance(value, dict) else shown(value)
    raise refused(found, f"an integer from {least} to {MAX_TOKENS}, a mapping with dist, or a mapping with values")


RequestRate = Annotated[Rate | tuple[Piece, ...] | Diurnal | None, BeforeValidator(_rate)]
Length = Annotated[Distribution | Empirical | Count, BeforeValidator(lambda value: length_of(value))]


class Clients(Model):
    max_concurrency: Count | None = None
    """Requests that are outstanding at most; latencies count from when one was to arrive, held back or not.

    Where no times of arrival are given, a request arrives when an earlier one has finished: a closed loop.
    """
    priorities: Annotated[tuple[Priority, ...], Field(strict=False, min_length=1, max_length=MAX_ENTRIES)] | None = None
    """Classes that requests are drawn from; without it all have priority 0."""

    @property
    def open_loop(self) -> bool:
        """Whether requests arrive at times that are given, whatever becomes of those before them."""
        return self.max_concurrency is None

    @model_validator(mode="after")
    def _classes(self) -> Self:
        classes = [entry.priority for entry in self.priorities or ()]
        for i, priority in enumerate(classes):
            if priority in classes[:i]:
                raise refused(f"{priority} twice", "each priority once", "priorities")
        if self.priorities and not sum(entry.share for entry in self.priorities):
            raise refused("shares that are all 0", "one that is more", "priorities")
        return self


class Arrivals(Clients):
    num_prompts: Count
    """Requests in all."""
    request_rate: RequestRate = None
    """Requests per second: a number, pieces of time after each other, or a swing.

    Without it all requests are there at the start, or with max_concurrency form a closed loop.
    """
    burstiness: Annotated[float, Field(ge=0.001, le=1e6, allow_inf_nan=False)] = 1.0
    """Shape of the gamma distribution of gaps, as in vLLM's benchmark; 1: Poisson arrivals, less: burstier."""

    @property
    def open_loop(self) -> bool:
        return super().open_loop and self.request_rate is not None

    @model_validator(mode="after")
    def _timed(self) -> Self:
        if self.burstiness != 1 and self.request_rate is None:
            raise refused(f"{self.burstiness:g} without request_rate", "request_rate beside it", "burstiness")
        return self


class FixedWorkload(Arrivals):
    """Equal requests."""

    kind: Literal["fixed"]
    """What the requests are: all equal."""
    input_len: Count
    """Prompt tokens of each request."""
    output_len: Count
    """Tokens that each request is continued by."""


class RandomWorkload(Arrivals):
    """Requests whose lengths are drawn."""

    kind: Literal["random"]
    """What the requests are: drawn."""
    input_len: Length
    """Prompt tokens: a number, a distribution of scipy.stats, or values to draw from."""
    output_len: Length
    """Tokens that a request is continued by: a number, a distribution of scipy.stats, or values to draw from."""
    shared_prefix: SharedPrefix | None = None
    """Prefixes that requests begin with; without it no two requests have anything in common."""


class TraceWorkload(Clients):
    """Requests of a trace, each at its time."""

    kind: Literal["trace"]
    """What the requests are: those of a trace."""
    path: Text
    """The trace, CSV or JSON lines and perhaps gzipped: a path relative to the scenario's folder."""
    format: TraceFormat = "auto"
    """What the trace's columns mean; auto: as their names say."""
    rate_scale: Annotated[float, Field(ge=0.001, le=1e6, allow_inf_nan=False)] = 1.0
    """How much faster the requests arrive than in the trace; 2: twice as many per second."""
    start: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Requests at the beginning of the file that are left out; the first of the others arrives at 0."""
    limit: Count | None = None
    """Requests after those that are read at most, in the order of the file, dropped ones included; without it all."""
    no_output: Literal["refuse", "drop"] = "refuse"
    """What to do with requests without prompt or output tokens, such as failed ones; drop: leave out and count them."""


Workload = Annotated[FixedWorkload | RandomWorkload | TraceWorkload, Field(discriminator="kind")]
