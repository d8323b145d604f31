"""Work that is spread over processes: as many as there are cores, forked, so nothing is pickled
but the results.

Where the platform cannot fork, or other threads run, which a fork would leave behind, all is done
here, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, TypeVar

from pavane.errors import PavaneError

T = TypeVar("T")
R = TypeVar("R")

PROCESSES_MAX = 8


class WorkerFailed(PavaneError):
    """A process of ours ended before its work was done."""

    code = "worker-failed"


def cores() -> int:
    """Return how many processes can work at once."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return 1
    return min(len(os.sched_getaffinity(0)), PROCESSES_MAX)


def spread(
    work: Callable[[T], R], items: Sequence[T], processes: int | None = None
) -> Iterator[tuple[int, R]]:
    """Yield the number and the result of each item, as they come; closed, it stops the processes.

    `work` must not raise: an error in it is ours, and ends everything.
    """
    count = min(processes or cores(), len(items))
    if count <= 1:
        yield from ((at, work(item)) for at, item in enumerate(items))
        return
    context = multiprocessing.get_context("fork")
    workers: dict[Any, Any] = {}
    try:
        for number in range(count):
            reader, writer = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(work, items, range(number, len(items), count), writer)
            )
            worker.start()
            writer.close()
            workers[reader] = worker
        yield from _results(workers)
    finally:
        for reader, worker in workers.items():
            reader.close()
            worker.terminate()
            worker.join()


def _results(workers: dict[Any, Any]) -> Iterator[tuple[int, Any]]:
    open_readers = list(workers)
    while open_readers:
        ready: list[Any] = wait(open_readers)
        for reader in ready:
            try:
                at, result, error = reader.recv()
            except EOFError:
                open_readers.remove(reader)
                workers[reader].join()
                if workers[reader].exitcode:
                    raise WorkerFailed(
                        f"A process that did a part of this ended with exit code "
                        f"{workers[reader].exitcode}. Does the code that it runs end its process?"
                    ) from None
            else:
                if error:
                    raise WorkerFailed(error)
                yield at, result


def _work(work: Callable[[T], R], items: Sequence[T], mine: Sequence[int], writer: Any) -> None:
    try:
        for at in mine:
            writer.send((at, work(items[at]), ""))
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # nobody wants to know any more
    except BaseException:
        writer.send((-1, None, traceback.format_exc()))
    finally:
        writer.close()
