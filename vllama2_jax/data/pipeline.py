"""Steps of a schedule -> batches of one host, read and decoded by Grain's workers."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence

import grain
from absl import flags

from vllama2_jax.data.assemble import Assembler, Fault, HostBatch
from vllama2_jax.data.schedule import Schedule

_NAMED = 20  # faults that an error lists
_SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share


def read_ahead(dataset: grain.MapDataset, workers: int, buffer: int, element_bytes: int):
    """An iterator over a dataset, whose elements are made ahead; to be closed.

    Grain's defaults, 16 threads and 500 elements ahead, are for records: here an element is a
    batch or a clip, and one decoder per process leaves nothing for more threads to do.

    Args:
      dataset: its elements.
      workers: processes that make them; 0 is a thread of this one.
      buffer: elements that wait on each side of the way from a worker, or from that thread.
      element_bytes: about the size of one.

    Raises:
      ValueError: for too little shared memory.
    """
    if not workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
        return iter(dataset.to_iter_dataset(options))
    _check_shared_memory(workers, buffer, element_bytes)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # outside absl's `app.run` Grain's own flags are unread
    # While a worker hands one element over, a thread of it makes the next.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(workers, buffer)
    ahead = dataset.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=_begin_worker)
    return iter(ahead)


def _begin_worker(index: int, count: int) -> None:
    """Make a worker end with its parent, and not before.

    An interrupt at a terminal reaches every process, and is the parent's to handle. Killed, the
    parent handles nothing: its workers would wait for good, with their decoders and their memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _check_shared_memory(workers: int, buffer: int, element_bytes: int):
    """Workers hand their arrays over in shared memory; one that finds none left just dies."""
    # Of each worker those that wait on both sides of the way and at its ends; and the one in use
    # (Grain 0.2.18, as counted in /dev/shm).
    needed = element_bytes * (workers * (2 * buffer + 2) + 1)
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return  # not Linux: no such bound is known
    if needed > free:
        raise ValueError(
            f"{workers} workers need {needed >> 20} MiB of shared memory and {_SHARED_MEMORY} has "
            f"{free >> 20} MiB free; enlarge it (docker: --shm-size) or take fewer workers"
        )


class TooManyFaults(ValueError):
    """More records cannot be read than the run allows; the message names them."""


class Feed:
    """One host's batches of a run, from any step on.

    A checkpoint needs the number of the next step and nothing else.

    Attributes:
      assembler: makes this host's batches.
      faults: {(source, number): Fault} of the records met so far that cannot be read.
    """

    def __init__(
        self,
        schedule: Schedule,
        assembler: Assembler,
        *,
        workers: int = 0,
        buffer: int = 1,
        max_faults: int = 100,
    ):
        """Set up, without reading anything.

        Args:
          schedule: the run's steps, the same on all hosts.
          assembler: makes this host's batches.
          workers: processes that read and decode, each with a decoder of its own; 0 is a thread
            of this process. A script that uses them must guard its entry with `__main__`.
          buffer: batches that wait on each side of the way from a worker; with those that it
            holds itself, each is up to 2 * `buffer` + 4 batches ahead.
          max_faults: distinct records of this host that may turn out unreadable, since the start
            of this process.

        Raises:
          ValueError: if the hosts cannot share the rows of a step equally, or the assembler's
            slots for clips and sounds are not the schedule's.
        """
        if schedule.rows % assembler.hosts:
            raise ValueError(
                f"{schedule.rows} rows do not divide among {assembler.hosts} hosts; "
                "make the batch a multiple of them"
            )
        for name in ("max_clips", "max_sounds"):
            planned, held = getattr(schedule, name), getattr(assembler, name)
            if planned != held:
                raise ValueError(
                    f"{name}: the schedule plans {planned} per row, the assembler has slots for "
                    f"{held}; give both the same"
                )
        self._schedule, self.assembler = schedule, assembler
        self._workers, self._buffer, self._max_faults = workers, buffer, max_faults
        self.faults: dict[tuple[int, int], Fault] = {}

    def __len__(self) -> int:
        return len(self._schedule)

    def batches(self, start: int = 0) -> Iterator[HostBatch]:
        """Batches of the steps from `start` to the last, in order.

        Closing the generator ends its workers.

        Raises:
          TooManyFaults: naming the records, once there are more than allowed.
          ValueError: for a start beyond the run's end, or too little shared memory for workers.
        """
        if not 0 <= start <= len(self):
            raise ValueError(
                f"cannot start at step {start} of a run of {len(self)}; was its data changed?"
            )
        if start == len(self):
            return
        maker = self.assembler
        rows = self._schedule.rows // maker.hosts
        how = (self._workers, self._buffer, rows * maker.media_bytes)
        steps = grain.MapDataset.source(self._schedule)[start:].map(maker)
        with contextlib.closing(read_ahead(steps, *how)) as iterator:
            for batch in iterator:
                self._count(batch.faults)
                yield batch

    def _count(self, faults: Sequence[Fault]):
        for fault in faults:
            self.faults.setdefault((fault.source, fault.number), fault)
        if len(self.faults) > self._max_faults:
            named = [f"{fault.record} ({fault.reason})" for fault in self.faults.values()]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            raise TooManyFaults(
                f"{len(named)} records cannot be read, {self._max_faults} are allowed: "
                f"{'; '.join(named[:_NAMED])}{more}; mend or leave them out, check the media "
                "root, or raise max_faults"
            )
