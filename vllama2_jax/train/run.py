"""Carry a training run out, from its configuration to its last checkpoint.

`run_folder.py` says what a run's folder holds.
"""

import contextlib
import dataclasses
import functools
import math
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.checkpoints.store import float_dtype, place
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
from vllama2_jax.train.run_folder import (
    INDEX,
    PROFILE,
    claim,
    introduce,
    locked,
    write_faults,
)
from vllama2_jax.train.start import begin, describe_start, prepare
from vllama2_jax.train.step import TrainState, init_state, make_step
from vllama2_jax.train.trainable import combine, parameter_table
from vllama2_jax.train.validation import Validation


class Outcome(NamedTuple):
    """How far a run has come.

    Attributes:
      step: steps taken.
      steps: of the whole run.
      stopped_by: a signal that ended it before its last step.
      faults: records that could not be read, told in `faults.jsonl`.
    """

    step: int
    steps: int
    stopped_by: signal.Signals | None = None
    faults: int = 0


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
    _check_devices(console)
    with locked(out):
        claim(out, config)
        # The data first: what is wrong with them is seen sooner than weights are read.
        card, tokenizer_folder = describe_start(config.start)
        tokenizer = load_tokenizer(tokenizer_folder)
        card = trained_card(card, config, tokenizer)
        feeding = make_feeding(
            config.data,
            card,
            tokenizer,
            rows=config.rows,
            seed=config.seed,
            index_folder=out / INDEX,
            epochs=config.epochs,
            steps=config.steps,
            layer_drop=config.layer_drop,
        )
        validation = None
        if config.validation.sources:
            validation = Validation(config, card, tokenizer, out / INDEX)
        with bar("reading", unit="tensors") as progress:
            params, _, _ = begin(config.start, None, config.seed, progress)
        dtype = float_dtype(config.dtype)
        prepared = prepare(params, config.start, config.rules, dtype, config.seed)
        frozen, assigned = prepared.frozen, prepared.assigned
        console.print(parameter_table(combine(prepared.trainable, frozen), assigned))
        files = tokenizer_files(tokenizer_folder)
        introduce(out, config, card, files, prepared.reference, feeding.fingerprints)
        report = StepReport(config, card.config, feeding, assigned, prepared.trainable)
        optimizer = make_optimizer(config.optimizer, len(feeding.schedule), assigned)
        with contextlib.ExitStack() as stack:
            save = config.save
            checkpoints = stack.enter_context(
                RunCheckpoints(out, keep_last=save.keep_last, keep_best=save.keep_best)
            )
            trainable = prepared.trainable
            del params, prepared
            # Orbax gives arrays that are bound to a device; were some others not, the step would be
            # compiled once for them and once more for its own results.
            state = jax.device_put(
                _first_state(checkpoints, trainable, optimizer), jax.local_devices()[0]
            )
            del trainable
            if state.step:
                console.print(f"going on behind step {state.step} of {len(feeding.schedule)}")
            journal = stack.enter_context(contextlib.closing(Journal(out)))
            log = stack.enter_context(MetricsLog(journal.folder, restored_step=int(state.step)))
            course = _Course(
                config=config,
                journal=journal,
                feeding=feeding,
                validation=validation,
                report=report,
                checkpoints=checkpoints,
                log=log,
                window=stack.enter_context(
                    contextlib.closing(Profile(journal.folder / PROFILE, *profile))
                ),
                stop=stack.enter_context(StopSignals()),
                frozen=frozen,
            )
            del frozen
            try:
                state = course.run(make_run_step(config, card, feeding, optimizer), state)
                checkpoints.wait()
            finally:  # what went wrong is seen best in them
                course.write_faults()
                if read_metrics(journal.folder):
                    draw_curves(journal.folder)
        return Outcome(
            int(state.step), len(feeding.schedule), course.stop.received, len(course.faults())
        )


def _check_devices(console: Console) -> None:
    if jax.process_count() > 1:
        raise ValueError(
            f"this version trains in one process, and there are {jax.process_count()}; start one"
        )
    if jax.device_count() > 1:
        console.print(
            f"this version trains on one device; {jax.device_count() - 1} of "
            f"{jax.device_count()} stay idle"
        )


def _first_state(checkpoints: RunCheckpoints, trainable: dict, optimizer) -> TrainState:
    """The newest checkpoint's state, or that of before the first step; never both in memory."""
    if checkpoints.latest is None:
        return init_state(trainable, optimizer)
    shapes = jax.eval_shape(lambda: init_state(trainable, optimizer))
    for leaf in trainable.values():  # what was trained takes the place of what it began with
        leaf.delete()
    step = checkpoints.latest
    restored = checkpoints.restore(step, shapes.trainable, shapes.optimizer)
    return TrainState(jnp.asarray(step, jnp.int32), *restored)


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
            due=lambda number: (
                self._saves(number) or self._validates(number) or self.window.borders(number)
            ),
            stop=lambda: bool(self.stop),
        )

    def _saves(self, number: int) -> bool:
        return number % self.config.save.every == 0 or number == self._steps

    def _validates(self, number: int) -> bool:
        return self.validation is not None and number % self.config.validation.every == 0

    def _examine(self, number: int, state: TrainState) -> dict:
        if self.stop or self.validation is None:
            return {}  # told to stop: what matters now is to save
        if not (self._saves(number) or self._validates(number)):
            return {}
        return self.validation(state.trainable, self.frozen)

    def _write(self, record: dict) -> str:
        record = self.report(record)
        if math.isfinite(record["loss"]):
            self._losses.append(record["loss"])
        self.log.write(record)
        self.checkpoints.check()
        self.window.reached(record["step"])
        return in_words(record)

    def _keep(self, state: TrainState, record: dict) -> None:
        if not (self._saves(record["step"]) or self.stop):
            return
        score = record.get("validation/loss")
        if self.validation is None and self._losses:  # two kinds of score cannot be compared
            score = float(np.mean(self._losses))
        self._losses.clear()
        self.write_faults()
        self.journal.publish()
        self.checkpoints.save(record["step"], state.trainable, state.optimizer, score)

    def faults(self) -> list[dict]:
        """Records that this process could not read, as `faults.jsonl` holds them."""
        read = [(self.config.data.sources, self.feeding.feed.faults.values())]
        if self.validation:
            read.append((self.config.validation.sources, self.validation.faults))
        return [
            fault._asdict() | {"source": sources[fault.source].name}
            for sources, faults in read
            for fault in sorted(faults)
        ]

    def write_faults(self) -> None:
        """Keep them, beside those of earlier processes."""
        write_faults(self.journal.folder, self.faults())
