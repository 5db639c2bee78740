"""The device's side of the simulated machine: in-order streams and their commands, copy engines, the launch queue.

Nothing overtakes on a stream, so when a command starts and ends is settled as soon as it is at the head and what it
needs is known. Two things can hold it up: a recording that is not settled yet, and a copy engine, which a copy asks
for when its turn comes and not before. No simulation event is spent on anything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import simpy

from batchsim.records import Lane, Observer, Span

Waiting = Generator[simpy.Event, Any, None]  # what a SimPy process is made of

LONG_AGO_NS = -1_000_000_000  # The first command of a stream pays no gap.


class Environment(simpy.Environment):
    """SimPy's environment; its time is an integer, nanoseconds."""

    if TYPE_CHECKING:

        @property
        def now(self) -> int:
            raise NotImplementedError

    def skip(self, delay_ns: int) -> bool:
        """Let time pass at once where nothing else is to happen meanwhile: as a timeout does, but without an event.

        False: something is, and the caller has to yield a timeout. For a process that nothing else waits with: an
        event's other callbacks would run late.
        """
        then = self._now + delay_ns
        if self._queue and self._queue[0][0] <= then:
            return False
        self._now = then
        return True


@dataclass(frozen=True, slots=True)
class Burst:
    """Kernels launched one after the other: what each costs the host, and for how long each runs on the device.

    A captured graph is a burst of one. The burst takes as many places of the launch queue as it has kernels,
    until the last of them has started.

    From these follow the sums `launch_ns` and `kernels_ns`, and `alone_ns`: how long after the first kernel could
    start the last one ends, on a device that has nothing else to do.
    """

    host_ns: tuple[int, ...]
    device_ns: tuple[int, ...]
    launch_ns: int = field(init=False, repr=False, compare=False)
    kernels_ns: int = field(init=False, repr=False, compare=False)
    alone_ns: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        host_ns, device_ns = self.host_ns, self.device_ns
        alone_ns = kernels_ns = sum(device_ns)
        if len(host_ns) > 1 or len(device_ns) != 1:
            # A kernel starts when those before it have been launched; then it and all after it must still run.
            before = zip(accumulate(host_ns[:-1], initial=0), accumulate(device_ns[:-1], initial=0), strict=True)
            alone_ns += max(launched - run for launched, run in before)
        object.__setattr__(self, "launch_ns", sum(host_ns))
        object.__setattr__(self, "kernels_ns", kernels_ns)
        object.__setattr__(self, "alone_ns", alone_ns)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Fixed delays of the machine, nanoseconds.

    `launch_ns`: from the start of a launch call to the earliest start of its kernel; `copy_ns`: the same for a
    copy; `event_ns`: from an event's completion to the start of a stream that waited for it; `gap_ns`: between
    the end of one command and the start of the next on a busy stream; `wake_up_ns`: from an event's completion
    to the return of the host's synchronising call.
    """

    launch_ns: int = 0
    copy_ns: int = 0
    event_ns: int = 0
    gap_ns: int = 0
    wake_up_ns: int = 0


class Command(Protocol):
    """What a stream carries out."""

    def settle(self, stream: Stream) -> bool:
        """Settle when this command starts and ends, now that it is at the head of `stream`.

        False: not yet; `stream.go_on` will be called when that has changed.
        """
        ...


class Stream:
    """An in-order queue of commands.

    The command at the head is reached at `reached_ns`; the last kernel or copy before it ended at `end_ns`.
    """

    def __init__(self, env: Environment, latencies: Latencies, queue: LaunchQueue, observe: Observer) -> None:
        self.env = env
        self.latencies = latencies
        self.queue = queue
        self.observe = observe
        self.reached_ns = 0
        self.end_ns = LONG_AGO_NS
        self.forward_ns = 0  # when the latest forward began, and
        self.kernels_ns = 0  # how long the kernels of it run that have been launched
        self._commands: deque[Command] = deque()

    def push(self, command: Command) -> None:
        """Enqueue a command, at this moment."""
        now = self.env.now
        if self._commands:
            self._commands.append(command)
            return
        if self.reached_ns < now:
            self.reached_ns = now
        if not command.settle(self):
            self._commands.append(command)

    def go_on(self, _event: simpy.Event | None = None) -> None:
        """Settle all commands that can be."""
        commands = self._commands
        while commands and commands[0].settle(self):
            commands.popleft()


@dataclass(slots=True)
class Recording:
    """A recording of an event: once it is settled, it completes at `completed_ns`. `waiters` are told of that."""

    settled: bool = False
    completed_ns: int = 0
    waiters: list[Callable[[], object]] = field(default_factory=list)

    def settle(self, stream: Stream) -> bool:
        self.settled, self.completed_ns = True, stream.reached_ns
        for waiter in self.waiters:
            waiter()
        return True

    def settlement(self, env: Environment) -> simpy.Event:
        """An event that happens when this is settled."""
        event = simpy.Event(env)
        self.waiters.append(event.succeed)
        return event


@dataclass(slots=True)
class Wait:
    """The stream goes on when the recording has completed, and a little later if it had to wait."""

    recording: Recording

    def settle(self, stream: Stream) -> bool:
        recording = self.recording
        if not recording.settled:
            recording.waiters.append(stream.go_on)
            return False
        if recording.completed_ns > stream.reached_ns:
            stream.reached_ns = recording.completed_ns + stream.latencies.event_ns
        return True


@dataclass(slots=True)
class Engine:
    """A copy engine, or the compute engine of several machines: one command at a time, first come, first served."""

    free_ns: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """The engines of a device. Where one machine has it to itself, its stream alone orders forwards: no `compute`."""

    engines: dict[Lane, Engine] = field(default_factory=lambda: {"copy_in": Engine(), "copy_out": Engine()})
    compute: Engine | None = None


@dataclass(slots=True)
class Copy:
    """A copy that is ready at `ready_ns`, and asks for its engine when the stream is."""

    step: int
    lane: Lane
    ready_ns: int
    duration_ns: int
    engine: Engine

    def settle(self, stream: Stream) -> bool:
        env = stream.env
        now, turn = env.now, max(stream.reached_ns, self.ready_ns, stream.end_ns + stream.latencies.gap_ns)
        if turn > now:
            simpy.Timeout(env, turn - now).callbacks.append(stream.go_on)
            return False
        start = max(turn, self.engine.free_ns)
        end = self.engine.free_ns = stream.reached_ns = stream.end_ns = start + self.duration_ns
        stream.queue.starts(start, 1)
        stream.observe(Span(self.step, self.lane, self.lane, start, end))
        return True


@dataclass(slots=True)
class Kernels:
    """A burst that is ready at `ready_ns`: part of a forward, which the first burst opens and the last one closes.

    Each kernel starts when it has been launched and its predecessor has ended.
    """

    step: int
    stage: str
    ready_ns: int
    burst: Burst
    opens: bool
    closes: bool
    shared: Engine | None = None  # by several machines, which take turns with it as their bursts are ready

    def settle(self, stream: Stream) -> bool:
        burst = self.burst
        start = max(stream.reached_ns, self.ready_ns)
        if self.opens:
            start = max(start, stream.end_ns + stream.latencies.gap_ns)
        if self.shared is not None:
            if start > stream.env.now:
                simpy.Timeout(stream.env, start - stream.env.now).callbacks.append(stream.go_on)
                return False
            start = max(start, self.shared.free_ns)
        if self.opens:
            stream.forward_ns = start
            stream.kernels_ns = 0
        end = stream.reached_ns = stream.end_ns = max(start + burst.kernels_ns, self.ready_ns + burst.alone_ns)
        if self.shared is not None:
            self.shared.free_ns = end
        stream.kernels_ns += burst.kernels_ns
        stream.queue.starts(end - burst.device_ns[-1], len(burst.device_ns))
        if self.closes:
            began = stream.forward_ns
            span = Span(self.step, "compute", self.stage, began, end, end - began - stream.kernels_ns)
            simpy.Timeout(stream.env, end - stream.env.now).callbacks.append(lambda _: stream.observe(span))
        return True


class HostThreads:
    """As many programs run on the host at once as there are threads; others await their turn."""

    def __init__(self, env: Environment, count: int) -> None:
        self.env = env
        self._free = count
        self._turns: deque[simpy.Event] = deque()

    def take(self) -> Waiting:
        """Take a thread, as soon as it is this caller's turn."""
        if self._free:
            self._free -= 1
        else:
            turn = simpy.Event(self.env)
            self._turns.append(turn)
            yield turn

    def give(self) -> None:
        """Give the thread to the next in turn."""
        if self._turns:
            self._turns.popleft().succeed()
        else:
            self._free += 1


class LaunchQueue:
    """Places for commands that have been launched and have not started; without a free one the host is blocked."""

    def __init__(self, env: Environment, depth: int) -> None:
        self.env = env
        self.depth = depth
        self._taken = 0
        self._starts: list[tuple[int, int]] = []
        self._settled: simpy.Event | None = None

    def take(self, places: int) -> bool:
        """Take places if they are free; for more than there are at all, the queue must be empty."""
        if self._taken + places > self.depth:
            starts, now = self._starts, self.env.now
            while starts and starts[0][0] <= now:
                self._taken -= heappop(starts)[1]
            if self._taken and self._taken + places > self.depth:
                return False
        self._taken += places
        return True

    def wait(self, places: int) -> Waiting:
        """Take places as soon as they are free."""
        while not self.take(places):
            self._settled = simpy.Event(self.env)
            if self._starts:
                yield self._settled | simpy.Timeout(self.env, self._starts[0][0] - self.env.now)
            else:
                yield self._settled

    def starts(self, start_ns: int, places: int) -> None:
        """Commands that took `places` will start at `start_ns`."""
        heappush(self._starts, (start_ns, places))
        if self._settled is not None and not self._settled.triggered:
            self._settled.succeed()
