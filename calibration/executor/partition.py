"""A part of a GPU: streams whose kernels run on some of its multiprocessors only (CUDA's green contexts).

A smaller GPU to execute on, apart from the memory and the cache, which stay whole. What a graph captured on such a
stream holds stays on the part, too. A device is cut in steps of its own: an H200, of 132 multiprocessors, in eights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from batchsim.errors import InputError, RunError
from batchsim.hardware import Device

# Of cuda.h, CUDA 12.5 and newer.
_SM_RESOURCE, _DEFAULT_STREAM, _NON_BLOCKING = 1, 1, 1
# What tells a device from a part of it, and what a part leaves as it is.
_SAME = ("clock_mhz", "memory_bytes", "memory_gb_per_s", "l2_bytes", "pcie_gb_per_s")


class _Resource(ctypes.Structure):
    """CUdevResource, as libcuda's first version of it."""

    _fields_ = (
        ("type", ctypes.c_uint),
        ("padding", ctypes.c_ubyte * 92),
        ("sms", ctypes.c_uint),
        ("rest", ctypes.c_ubyte * 44),
    )


def part_of(wanted: Device, own: Device | None, sms: int) -> int | None:
    """How many of the `sms` multiprocessors of `own`, the device at hand, `wanted` is; None: all of them.

    Raises:
        InputError: without a file; `wanted` is no part of this device.
    """
    if own is None:
        raise InputError(None, "hardware", wanted.name, "none: of this device the catalogue knows nothing")
    for key in _SAME:
        asked, here = getattr(wanted, key), getattr(own, key)
        if asked != here:
            text = (
                f"{here:,}, as the device at hand has it ({own.name}): but with fewer sms nothing else is executed here"
            )
            raise InputError(None, f"hardware.{key}", f"{asked:,}", text)
    if wanted.sms > sms:
        raise InputError(None, "hardware.sms", f"{wanted.sms}", f"at most {sms}, those of the device at hand")
    return None if wanted.sms == sms else wanted.sms


@contextmanager
def limited_to(sms: int) -> Iterator[int]:
    """Make a stream that reaches `sms` multiprocessors the current one; yields on how many kernels on it ran.

    Streams that `stream_like_current` makes inside stay limited ever after.

    Raises:
        InputError: without a file; the device cannot be cut to that.
        RunError: the driver failed, or kernels ran on another number of multiprocessors.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    device = torch.device("cuda", torch.cuda.current_device())
    _start_cublas(device)
    part = _cut(sms, device.index)
    with torch.cuda.stream(_stream_on(part, device)):
        found = count_multiprocessors()
        if found != sms:
            raise RunError(f"kernels that were limited to {sms} multiprocessors ran on {found}")
        yield found


def stream_like_current(device: torch.device) -> torch.cuda.Stream | None:
    """A new stream on the part of `device` that its current stream is limited to; None: it is not limited."""
    handle = torch.cuda.current_stream(device).cuda_stream
    if not handle:
        return None
    part = ctypes.c_void_p()
    _call("cuStreamGetGreenCtx", ctypes.c_void_p(handle), ctypes.byref(part))
    return None if part.value is None else _stream_on(part, device)


def count_multiprocessors(tries: int = 3) -> int:
    """On how many multiprocessors the kernels of the current stream run: the most of some tries."""
    from calibration.executor.smid import multiprocessors

    return max(len(multiprocessors()) for _ in range(tries))


def smallest_part(sms: int, index: int = 0) -> int:
    """Multiprocessors of the smallest part of a device that has at least `sms`.

    Raises:
        InputError: without a file; the device has not so many to cut off.
    """
    whole = _multiprocessors(index)
    part = _split(whole, sms)
    if part is None or part.sms < sms:
        raise InputError(None, "hardware.sms", f"{sms}", f"a part of the {whole.sms} that there are")
    return int(part.sms)


@cache
def _cut(sms: int, index: int) -> ctypes.c_void_p:
    """A green context of exactly `sms` multiprocessors of a device; kept until the process ends, as its streams are.

    The multiprocessors belong together as the thread block clusters of cuBLAS's kernels need it. Finer cuts would be
    possible, but on those some of its kernels fail to launch.
    """
    whole, device = _multiprocessors(index), ctypes.c_int()
    part = _split(whole, sms)
    if part is None or part.sms != sms:
        others = {int(other.sms) for asked in range(1, whole.sms) if (other := _split(whole, asked)) is not None}
        raise InputError(None, "hardware.sms", f"{sms}", f"{nearest(others, sms)}: so this device can be cut")
    description, context = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevResourceGenerateDesc", ctypes.byref(description), ctypes.byref(part), 1)
    _call("cuGreenCtxCreate", ctypes.byref(context), description, device, _DEFAULT_STREAM)
    return context


def nearest(possible: Iterable[int], sms: int) -> str:
    """Those of `possible` sizes that are next to `sms`, in words."""
    sizes = set(possible)
    below, above = (size for size in sizes if size < sms), (size for size in sizes if size > sms)
    found = [size for size in (max(below, default=None), min(above, default=None)) if size is not None]
    return " or ".join(map(str, found)) or "none"


def _multiprocessors(index: int) -> _Resource:
    device, whole = ctypes.c_int(), _Resource()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDeviceGetDevResource", device, ctypes.byref(whole), _SM_RESOURCE)
    return whole


def _split(whole: _Resource, least: int) -> _Resource | None:
    """A part of at least so many multiprocessors, or None."""
    part, groups = _Resource(), ctypes.c_uint(1)
    arguments = (ctypes.byref(part), ctypes.byref(groups), ctypes.byref(whole), None, 0, least)
    failed = _driver()("cuDevSmResourceSplitByCount", *arguments)
    return None if failed or groups.value != 1 else part


def _start_cublas(device: torch.device) -> None:
    """cuBLAS sets itself up at its first product: on the whole device, with which its handle stays."""
    one = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    torch.mm(one, one)
    torch.cuda.synchronize(device)


def _stream_on(part: ctypes.c_void_p, device: torch.device) -> torch.cuda.Stream:
    stream = ctypes.c_void_p()
    _call("cuGreenCtxStreamCreate", ctypes.byref(stream), part, _NON_BLOCKING, 0)
    return torch.cuda.ExternalStream(stream.value, device=device)  # type: ignore[no-untyped-call]


def _call(name: str, *arguments: object) -> None:
    if failed := _driver()(name, *arguments):
        raise RunError(f"the CUDA driver's {name} failed with error {failed}")


@cache
def _driver() -> Callable[..., int]:
    """Calls a function of libcuda by its name; its result, 0 where all went well."""
    library = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: object) -> int:
        function = getattr(library, name, None)
        if function is None:
            raise RunError(f"the CUDA driver has no {name}: parts of a device need a driver of CUDA 12.5 or newer")
        return int(function(*arguments))

    return call
