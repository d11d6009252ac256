"""Carry a training run out, from its configuration to its last checkpoint.

`run_folder.py` says what a run's folder holds.
"""

import contextlib
import dataclasses
import functools
import signal
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.checkpoints.store import place
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.progress import bar
from vllama2_jax.text import Tokenizer, load_tokenizer, tokenizer_files
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.curves import draw_curves
from vllama2_jax.train.feeding import Feeding, make_feeding
from vllama2_jax.train.journal import Journal
from vllama2_jax.train.loop import StopSignals, run_steps
from vllama2_jax.train.loss import batch_loss
from vllama2_jax.train.metrics import MetricsLog, read_metrics
from vllama2_jax.train.optimizer import make_optimizer
from vllama2_jax.train.profile import Profile
from vllama2_jax.train.report import StepReport, in_words
from vllama2_jax.train.run_folder import INDEX, PROFILE, claim, introduce, write_faults
from vllama2_jax.train.start import begin, prepare
from vllama2_jax.train.step import TrainState, init_state, make_step
from vllama2_jax.train.trainable import combine, parameter_table
from vllama2_jax.train.validation import Validation
from vllama2_jax.weights import float_dtype


class Outcome(NamedTuple):
    """How far a run has come.

    Attributes:
      step: steps taken.
      steps: of the whole run.
      signal: what stopped it before its end, None if nothing did.
    """

    step: int
    steps: int
    signal: signal.Signals | None


def run(config: TrainConfig, out: str | Path, profile: tuple[int, int] = (0, 0)) -> Outcome:
    """Begin a run, or go on with it.

    Args:
      config: what to do.
      out: its folder, new or that of the same run.
      profile: first and last step of a trace for XProf; zeros trace nothing.

    Raises:
      CheckpointError: if the folder is that of another run, or a checkpoint cannot be written.
      ValueError: if the configuration or the data cannot be used.
      FloatingPointError: if a loss or gradient is not finite.
    """
    out, console = place(out), Console(stderr=True)
    claim(out, config)
    journal = Journal(out)
    window = Profile(journal.folder / PROFILE, *profile)
    with bar("reading", unit="tensors") as progress:
        params, card, tokenizer_folder = begin(config.start, None, config.seed, progress)
    tokenizer = load_tokenizer(tokenizer_folder)
    card = trained_card(card, config, tokenizer)
    dtype = float_dtype(config.dtype)
    trainable, frozen, assigned = prepare(params, config.rules, dtype, config.seed)
    del params
    console.print(parameter_table(combine(trainable, frozen), assigned))
    index = out / INDEX
    feeding = make_feeding(
        config.data,
        card,
        tokenizer,
        rows=config.rows,
        seed=config.seed,
        index_folder=index,
        epochs=config.epochs,
        steps=config.steps,
    )
    validation = None
    if config.validation.sources:
        validation = Validation(config, card, tokenizer, index)
    introduce(out, config, card, tokenizer_files(tokenizer_folder), frozen, feeding)
    steps = len(feeding.schedule)
    optimizer = make_optimizer(config.optimizer, steps, assigned)
    state = init_state(trainable, optimizer)
    report = StepReport(config, card.config, feeding, assigned, trainable)
    del trainable
    with (
        contextlib.closing(journal),
        contextlib.closing(window),
        RunCheckpoints(
            out, keep_last=config.save.keep_last, keep_best=config.save.keep_best
        ) as checkpoints,
    ):
        if checkpoints.latest is not None:
            step = checkpoints.latest
            restored = checkpoints.restore(step, state.trainable, state.optimizer)
            state = TrainState(jnp.asarray(step, jnp.int32), *restored)
            console.print(f"going on behind step {step} of {steps}")
        with (
            MetricsLog(journal.folder, restored_step=int(state.step)) as log,
            StopSignals() as stop,
        ):
            course = _Course(
                config, journal, feeding, validation, report, checkpoints, log, window, stop, frozen
            )
            try:
                state = course.run(make_run_step(config, card, feeding, optimizer), state)
                checkpoints.wait()
            finally:  # what went wrong is seen best in them
                write_faults(out, feeding)
                if read_metrics(journal.folder):
                    draw_curves(journal.folder)
    return Outcome(int(state.step), steps, stop.received)


def trained_card(card: ModelCard, config: TrainConfig, tokenizer: Tokenizer) -> ModelCard:
    """The card of the model that a run makes: its media are read as in training."""
    preset = dataclasses.replace(card.preset, square_pad=config.data.square_pad)
    return dataclasses.replace(card, preset=preset, tokenizer=tokenizer.fingerprint())


def make_run_step(config: TrainConfig, card: ModelCard, feeding: Feeding, optimizer):
    """The step of a run, of `make_step`."""
    dtype = float_dtype(config.dtype)
    model = VLlama2(card.config, dtype=dtype, remat=config.remat)
    return make_step(
        functools.partial(batch_loss, model, config=config.loss, datasets=feeding.datasets),
        optimizer,
        micro_batches=config.micro_batches,
        average=config.average,
        compute_dtype=None if dtype == jnp.float32 else dtype,
    )


@dataclasses.dataclass
class _Course:
    """What happens along the steps of a run: reports, validation, checkpoints."""

    config: TrainConfig
    journal: Journal
    feeding: Feeding
    validation: Validation | None
    report: StepReport
    checkpoints: RunCheckpoints
    log: MetricsLog
    window: Profile
    stop: StopSignals
    frozen: dict

    def __post_init__(self):
        self._steps = len(self.feeding.schedule)
        self._losses: list[float] = []  # since the checkpoint before

    def run(self, step, state: TrainState) -> TrainState:
        """Take the steps that are left."""
        taken = int(state.step)
        self.window.reached(taken)
        return run_steps(
            step,
            state,
            self.frozen,
            self.feeding.batches(taken),
            label=self.config.name,
            num_steps=self._steps - taken,
            log=self._write,
            names=lambda number: self.feeding.record_ids(number - 1),
            examine=self._examine,
            keep=self._keep,
            due=lambda number: self._saves(number) or self._validates(number),
            stop=lambda: bool(self.stop),
        )

    def _saves(self, number: int) -> bool:
        return number % self.config.save.every == 0 or number == self._steps

    def _validates(self, number: int) -> bool:
        return self.validation is not None and number % self.config.validation.every == 0

    def _examine(self, number: int, state: TrainState) -> dict:
        if self.validation is None or not (self._saves(number) or self._validates(number)):
            return {}  # told to stop: what matters now is to save
        return self.validation(state.trainable, self.frozen)

    def _write(self, record: dict) -> str:
        record = self.report(record)
        self._losses.append(record["loss"])
        self.log.write(record)
        self.checkpoints.check()
        self.window.reached(record["step"])
        return in_words(record)

    def _keep(self, state: TrainState, record: dict) -> None:
        if not (self._saves(record["step"]) or self.stop):
            return
        score = record.get("validation/loss", np.mean(self._losses))
        self._losses.clear()
        self.journal.publish()
        self.checkpoints.save(record["step"], state.trainable, state.optimizer, score)
