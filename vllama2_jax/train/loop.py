"""Run a step over batches, with a bar that shows how it goes."""

import contextlib
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllama2_jax.train.step import TrainState


def run_steps(
    step: Callable,
    state: TrainState,
    frozen: dict,
    batches: Iterable,
    *,
    label: str,
    num_steps: int,
    log: Callable[[dict], None] | None = None,
    names: Callable[[int], Sequence[str]] | None = None,
) -> TrainState:
    """Take `num_steps` steps.

    Args:
      step: of `make_step`.
      state: consumed.
      frozen: what does not train.
      batches: at least `num_steps` of them; consumed, and a generator is closed.
      label: what the bar says.
      num_steps: how many to take.
      log: called after each step with {"step", "seconds", and the step's metrics}, numbers.
      names: step -> the ids of its batch's records, asked only when that step fails. Steps count as
        in `log`: the batch that makes `state.step` 1 is step 1's.

    Returns:
      The state behind the last step.

    Raises:
      FloatingPointError: as soon as a loss or gradient is not finite, naming step and records.
      ValueError: if the batches run out.
    """
    console = Console(file=sys.stderr)
    taken = int(state.step)
    last = taken + num_steps
    source = prefetch(iter(batches))
    # However the run ends, the thread that prepares its batches ends with it.
    with (
        contextlib.closing(source),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task(label, total=num_steps, loss=float("nan"))
        for number in range(taken + 1, last + 1):
            start = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"{label}: the batches ran out before step {number} of {last}")
            state, metrics = step(state, frozen, batch)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            _check_finite(metrics, label, number, names)
            bar.update(task, advance=1, loss=metrics["loss"])
            if log:
                log({"step": number, **metrics, "seconds": time.perf_counter() - start})
    return state


def _check_finite(metrics, label: str, number: int, names) -> None:
    """Stop at the first step whose loss or gradient is not a number."""
    bad = [f"{k} {metrics[k]}" for k in ("loss", "grad_norm") if not math.isfinite(metrics[k])]
    if bad:
        records = f" of records {', '.join(names(number))}" if names else ""
        raise FloatingPointError(
            f"{label}: {' and '.join(bad)} at step {number}{records}; look at those records, or "
            "train from the last checkpoint with a lower learning rate"
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
