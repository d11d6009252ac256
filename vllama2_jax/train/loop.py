"""Run a step over batches, with a bar that shows how it goes."""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator

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
) -> TrainState:
    """Take `num_steps` steps.

    Args:
      step: of `make_step`.
      state: consumed.
      frozen: what does not train.
      batches: at least `num_steps` of them; consumed, and a generator is closed.
      label: what the bar says.
      num_steps: how many to take.
      log: called after each step with {"step", "loss", "grad_norm", "seconds"}, numbers.

    Returns:
      The state behind the last step.

    Raises:
      FloatingPointError: as soon as a loss is not finite.
      ValueError: if the batches run out.
    """
    console = Console(file=sys.stderr)
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
        for _ in range(num_steps):
            start = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"{label}: the batches ran out before step {num_steps}")
            state, metrics = step(state, frozen, batch)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            number = int(state.step)
            if not abs(metrics["loss"]) < float("inf"):
                raise FloatingPointError(f"{label}: loss {metrics['loss']} at step {number}")
            bar.update(task, advance=1, loss=metrics["loss"])
            if log:
                log({"step": number, **metrics, "seconds": time.perf_counter() - start})
    return state


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
