# SPDX-License-Identifier: Apache-2.0
"""Chunks one behind another, so that one is encoded while others travel; and the Work of a call that is not waited for.

On the CPU a thread of the group finishes asynchronous calls; tags keep their messages apart from what the caller does
meanwhile. On CUDA the caller enqueues everything on a stream of its own and nobody waits on the host.
"""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._collectives_schedules import Steps
from ._collectives_transport import Channel


class Job:
    """A call: its chunks, and the work that tells when they are done.

    `may_overlap` with the call behind it: not where a chunk sends after it has waited twice. The call behind waits for
    ranks that have not begun it, and those wait for what this rank would send.
    """

    def __init__(self, chunks: Iterator[Steps], result: Tensor, may_overlap: bool) -> None:
        self.chunks, self.result, self.may_overlap = chunks, result, may_overlap
        self.num_open = 0  # chunks begun and not ended
        self.is_exhausted = False
        self.work: Work | None = None


def _advance(steps: Steps) -> bool:
    """Whether there is more to do."""
    try:
        next(steps)
    except StopIteration:
        return False
    return True


def run(job: Job) -> None:
    """The whole call. In each round one chunk begins and those before it go a step on: the newest sends first."""
    in_flight: list[Steps] = []
    while True:
        chunk = next(job.chunks, None)
        if chunk is None and not in_flight:
            break
        started = [] if chunk is None else [chunk]
        in_flight = [steps for steps in (*started, *in_flight) if _advance(steps)]


class Work(dist.Work if dist.is_available() else object):  # type: ignore[misc]
    """What an asynchronous call returns: `wait`, `is_completed`, `exception`, `result` and `get_future` as in torch."""

    def __init__(self, job: Job, event: Any = None) -> None:
        super().__init__()
        self._result = job.result
        self._event = event  # of CUDA: what the waiting stream waits for
        self._done = threading.Event()
        self._error: BaseException | None = None
        device = job.result.device
        self._base: torch.futures.Future[Any] = torch.futures.Future(
            devices=[device] if device.type == "cuda" else None
        )
        self._future = self._base.then(_unwrap)

    def complete(self, error: BaseException | None = None) -> None:
        part = error
        while part is not None:  # frames would keep the group, and the future keeps the error
            part.__traceback__ = None
            part = part.__cause__ or part.__context__
        self._error = error
        self._done.set()
        self._base.set_result(self._result if error is None else _Failure(error))

    def wait(self, timeout: Any = None) -> bool:
        """Until the result is there, on CUDA for the current stream; raises what went wrong."""
        if not self._done.wait(None if timeout is None or not timeout else timeout.total_seconds()):
            raise RuntimeError(f"wait: the call must be done within {timeout}, it is not.")
        if self._error is not None:
            raise copy.copy(self._error) from self._error.__cause__  # which takes the frames of this call along
        if self._event is not None:
            torch.cuda.current_stream(self._result.device).wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        return self._done.is_set() and (self._event is None or self._event.query())

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[Tensor]:
        return [self._result]

    def get_future(self) -> torch.futures.Future[Tensor]:
        return self._future


class _Failure:
    """An error as the value of a future, of which only `then` can make an error that C++ understands."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _unwrap(future: torch.futures.Future[Any]) -> Tensor:
    value = future.value()
    if isinstance(value, _Failure):
        raise copy.copy(value.error)
    return value


class Finisher:
    """The thread of a group that finishes its asynchronous calls, all that are under way in one pipeline."""

    def __init__(self) -> None:
        jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.submit = jobs.put
        threading.Thread(target=_Loop(jobs).run, name="fmkernels collectives", daemon=True).start()
        weakref.finalize(self, jobs.put, None)  # the thread ends with the group


class _Loop:
    """What that thread does. Between rounds it holds nothing of calls that are done, nor of their group."""

    def __init__(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        self._jobs = jobs
        self._current: Job | None = None  # whose chunks begin
        self._in_flight: list[tuple[Steps, Job]] = []

    def run(self) -> None:
        torch.set_grad_enabled(False)
        while self._round():
            pass

    def _round(self) -> bool:
        """Begins a chunk, if there is one, and takes those before it a step on."""
        may_begin = all(job.may_overlap for _, job in self._in_flight)
        if self._current is None and (not self._in_flight or (may_begin and not self._jobs.empty())):
            self._current = self._jobs.get()
            if self._current is None:
                return False
        started = []
        if self._current is not None:
            chunk = self._next_chunk(self._current)
            if chunk is not None:
                started = [(chunk, self._current)]
            else:
                self._end_if_done(self._current)
                self._current = None
        self._in_flight = [pair for pair in (*started, *self._in_flight) if self._step(*pair)]
        return True

    def _next_chunk(self, job: Job) -> Steps | None:
        try:
            chunk = None if job.is_exhausted else next(job.chunks, None)
        except Exception as error:
            self._fail(job, error)
            return None
        if chunk is None:
            job.is_exhausted = True
        else:
            job.num_open += 1
        return chunk

    def _step(self, steps: Steps, job: Job) -> bool:
        if job.work is None:  # it has failed
            steps.close()
            return False
        try:
            if _advance(steps):
                return True
        except Exception as error:
            self._fail(job, error)
            return False
        job.num_open -= 1
        self._end_if_done(job)
        return False

    def _end_if_done(self, job: Job) -> None:
        if not job.is_exhausted or job.num_open or job.work is None:
            return
        work, job.work = job.work, None
        work.complete()

    def _fail(self, job: Job, error: Exception) -> None:
        job.is_exhausted = True
        if job.work is not None:
            work, job.work = job.work, None
            work.complete(error)


def start(job: Job, channel: Channel, tensors: list[Tensor]) -> Work:
    """The call without waiting for it. `tensors` are what it reads and writes."""
    device = job.result.device
    if device.type == "cpu":
        if device not in channel.finishers:
            channel.finishers[device] = Finisher()
        job.work = work = Work(job)
        channel.finishers[device].submit(job)
        return work
    if device not in channel.finishers:
        channel.finishers[device] = torch.cuda.Stream(device)
    stream = channel.finishers[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run(job)
        for tensor in tensors:
            tensor.record_stream(stream)
        work = Work(job, stream.record_event())
        work.complete()
    return work
