"""Run a step over batches, with a bar that shows how it goes."""

import contextlib
import math
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vllama2_jax.train.step import TrainState

# Between lines where there is no terminal for a bar.
_LINE_SECONDS = 30.0


def run_steps(
    step: Callable,
    state: TrainState,
    frozen: dict,
    batches: Iterable,
    *,
    label: str,
    num_steps: int,
    log: Callable[[dict], str | None] | None = None,
    names: Callable[[int], Sequence[str]] | None = None,
    examine: Callable[[int, TrainState], dict] | None = None,
    keep: Callable[[TrainState, dict], None] | None = None,
    due: Callable[[int], bool] = lambda number: False,
    stop: Callable[[int], bool] = lambda number: False,
    quiet: bool = False,
) -> TrainState:
    """Take `num_steps` steps, or fewer when told to stop.

    The numbers of a step are read while the next one runs, so that the device never waits for them,
    but for steps at which something is due.

    Args:
      step: of `make_step`.
      state: consumed.
      frozen: what does not train.
      batches: at least `num_steps` of them; consumed, and a generator is closed.
      label: what the bar says.
      num_steps: how many to take.
      log: called after each step, in order, with {"step", "seconds", and the step's metrics},
        numbers; what it returns stands beside the bar.
      names: step -> the ids of its batch's records, asked only when that step fails. Steps count as
        in `log`: the batch that makes `state.step` 1 is step 1's.
      examine: called with a step and the state behind it, where something is due; what it returns
        joins the step's numbers.
      keep: called with the state and the step's numbers where something is due, after `log`, so
        that what is logged is never behind what is kept.
      due: whether `examine` and `keep` are called behind a step; they are behind the last.
      stop: called with each step that has begun; once true, that step is the last.
      quiet: show nothing, as all processes but one. The one shows a bar at a terminal; elsewhere,
        as in the log of a pod, a line for the first step, now and then one, and for the last.

    Returns:
      The state behind the last step taken.

    Raises:
      FloatingPointError: as soon as a loss or gradient is not finite, naming step and records.
      ValueError: if the batches run out.
    """
    console = Console(file=sys.stderr)
    taken = int(state.step)
    last = taken + num_steps
    source = prefetch(iter(batches))
    clock, said = time.perf_counter(), -math.inf

    def read(number: int, metrics: dict, dispatch: float, next_dispatch: float = 0.0) -> dict:
        """The numbers of a step, once it is done.

        A program is compiled while a step is dispatched, which for the next step is before this one
        is read: that time is the next step's.
        """
        nonlocal clock
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        before, clock = clock, time.perf_counter()
        seconds = clock - before + dispatch - next_dispatch
        record = {"step": number, **metrics, "seconds": seconds}
        if not all(math.isfinite(metrics[name]) for name in _MUST_BE_FINITE):
            if log:
                log(record)
            raise _not_finite(record, label, names)
        return record

    def show(record: dict) -> None:
        nonlocal said
        number, words = record["step"], (log(record) if log else None) or ""
        bar.update(task, completed=number - taken, loss=record["loss"], words=words)
        if quiet or console.is_terminal:
            return
        if number == last or clock - said >= _LINE_SECONDS:
            said = clock
            line = f"{label}: step {number} of {last}, loss {record['loss']:.3f} {words}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    # However the run ends, the thread that prepares its batches ends with it.
    with (
        contextlib.closing(source),
        Progress(
            # In a narrow terminal the bar gives way, then the words, never the count.
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn(
                "loss {task.fields[loss]:.3f} {task.fields[words]}",
                table_column=Column(no_wrap=True),
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            console=console,
            disable=quiet or not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task(label, total=num_steps, loss=float("nan"), words="")
        unread = None
        for number in range(taken + 1, last + 1):
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"{label}: the batches ran out before step {number} of {last}")
            began = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            dispatch = time.perf_counter() - began
            if unread:
                show(read(*unread, dispatch))
            else:
                dispatch = 0.0  # the clock has not been read since
            unread = (number, metrics, dispatch)
            stopping = stop(number)
            if stopping or number == last or due(number):
                record, unread = read(*unread), None
                if examine:
                    record |= examine(number, state)
                show(record)
                if keep:
                    keep(state, record)
                clock = time.perf_counter()  # none of that is a part of the next step
            if stopping:
                break
    return state


class StopSignals:
    """Turns SIGTERM and SIGINT into a request to stop; a second one acts at once.

    A context manager; `bool` of it says whether a signal came. Outside the main thread, where
    Python takes no signals, it does nothing.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in self._SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = signal.Signals(number)
        for known, handler in self._before.items():
            signal.signal(known, handler)


_MUST_BE_FINITE = ("loss", "grad_norm")


def _not_finite(record: dict, label: str, names) -> FloatingPointError:
    """What ends a run at the first step whose loss or gradient is not a number."""
    bad = [f"{k} {record[k]}" for k in _MUST_BE_FINITE if not math.isfinite(record[k])]
    records = f" of records {', '.join(names(record['step']))}" if names else ""
    return FloatingPointError(
        f"{label}: {' and '.join(bad)} at step {record['step']}{records}; look at those records, "
        "or train from the last checkpoint with a lower learning rate"
    )


def prefetch(batches: Iterator, depth: int = 2) -> Generator:
    """The same items, prepared by a thread while the device works; its errors are raised here.

    The thread starts with the first item. Closing the returned generator, or its end, waits for the
    item in preparation, closes `batches` if that is a generator, and ends the thread.
    """
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    end = object()

    def offer(item) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in batches:
                if not offer((item, None)):
                    return
            offer((end, None))
        except BaseException as error:
            offer((end, error))
        finally:
            if isinstance(batches, Generator):
                batches.close()  # here, since only the thread that runs a generator can close it

    def drain():
        thread = threading.Thread(target=work, daemon=True, name="prefetch")
        thread.start()
        try:
            while True:
                item, error = waiting.get()
                if error is not None:
                    raise error
                if item is end:
                    return
                yield item
        finally:
            stopped.set()
            thread.join()

    return drain()
