"""The loop around the step: what it logs, when it stops, and that nothing of it stays behind."""

import math
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from vllama2_jax.train import loop
from vllama2_jax.train.loop import prefetch, run_steps
from vllama2_jax.train.step import TrainState


def step(state, frozen, batch):
    """A step whose loss is the batch."""
    return state.replace(step=state.step + 1), {"loss": batch, "grad_norm": frozen["norm"]}


def run(batches, num_steps, log=None, taken=0, norm=2.0, **kwargs):
    state = TrainState(jnp.full((), taken, jnp.int32), {}, None)
    options = dict(label="test", num_steps=num_steps, log=log, **kwargs)
    return run_steps(step, state, {"norm": jnp.float32(norm)}, batches, **options)


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Endless:
    """A generator of 0, 1, 2 ... that says when it was closed."""

    def __init__(self):
        self.closed = False

    def __call__(self):
        try:
            number = 0.0
            while True:
                yield jnp.float32(number)
                number += 1
        finally:
            self.closed = True


def test_every_step_is_logged_with_its_number_and_metrics():
    history = []
    state = run([jnp.float32(5), jnp.float32(4), jnp.float32(3)], 3, history.append)
    assert int(state.step) == 3
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in history] == [
        (1, 5.0, 2.0),
        (2, 4.0, 2.0),
        (3, 3.0, 2.0),
    ]
    assert all(record["seconds"] >= 0 for record in history)


def test_run_stops_when_batches_run_out():
    with pytest.raises(ValueError, match="test: the batches ran out before step 2 of 3"):
        run([jnp.float32(1)], 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_run_stops_at_a_loss_that_is_not_finite(bad):
    history = []
    with pytest.raises(FloatingPointError, match="at step 2"):
        run([jnp.float32(1), jnp.float32(bad), jnp.float32(1)], 3, history.append)
    # The bad step is told, too: the curves mark it.
    assert [record["step"] for record in history] == [1, 2]
    assert not np.isfinite(history[1]["loss"])


def test_a_step_that_compiles_is_charged_for_it_itself(monkeypatch):
    """The numbers of a step are read behind the dispatch of the next."""
    now = 0.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)

    def compiling(state, frozen, batch):
        nonlocal now
        now += batch
        return step(state, frozen, jnp.float32(1))

    history = []
    state = TrainState(jnp.int32(0), {}, ())
    frozen, seconds = {"norm": jnp.float32(1)}, [5.0, 1.0, 7.0, 2.0]
    run_steps(compiling, state, frozen, seconds, label="test", num_steps=4, log=history.append)
    assert [record["seconds"] for record in history] == seconds


def test_error_of_a_bad_batch_names_step_and_records():
    asked = []

    def names(number):
        asked.append(number)
        return [f"clips.json#{number}", "clips.json#0"]

    batches = [jnp.float32(1), jnp.float32("nan")]
    with pytest.raises(FloatingPointError) as caught:
        run(batches, 2, taken=6, names=names)
    message = str(caught.value)
    assert "test: loss nan at step 8 of records clips.json#8, clips.json#0" in message
    assert "\n" not in message and asked == [8]


def test_run_stops_at_a_gradient_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="grad_norm inf at step 1"):
        run([jnp.float32(1)], 1, norm=float("inf"))


def test_finished_run_leaves_no_thread_and_closes_its_batches():
    source = Endless()
    run(source(), 3)
    assert not prefetching() and source.closed


def test_failed_run_leaves_no_thread_and_closes_its_batches():
    source = Endless()

    def full(record):
        raise OSError("disk full")

    # The traceback holds the run's frame, so that nothing is left to the garbage collector.
    with pytest.raises(OSError, match="disk full") as caught:
        run(source(), 3, full)
    assert not prefetching() and source.closed
    assert caught.value.__traceback__ is not None


def test_prefetch_keeps_order_and_raises_the_errors_of_its_source():
    def source():
        yield from range(5)
        raise OSError("disk")

    items = prefetch(source())
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="disk"):
        next(items)
    assert not prefetching()


def test_prefetch_prepares_ahead_and_no_further_than_its_depth():
    made = []

    def source():
        for number in range(100):
            made.append(number)
            yield number

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    # One is taken, two wait, and one more is in the thread's hand.
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]
    items.close()
    assert not prefetching()


@pytest.mark.parametrize("seconds, steps", [(math.inf, (1, 4)), (0.0, (1, 2, 3, 4))])
def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch, capsys, seconds, steps):
    monkeypatch.setattr(loop, "_LINE_SECONDS", seconds)
    losses = [jnp.float32(k) for k in range(4)]
    run(losses, 4, lambda record: "fast")
    assert capsys.readouterr().err.splitlines() == [
        f"test: step {k} of 4, loss {k - 1}.000 fast" for k in steps
    ]
    run(losses, 4, quiet=True)
    assert capsys.readouterr().err == ""
