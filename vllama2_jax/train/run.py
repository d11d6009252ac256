"""Carry a training run out, from its configuration to its last checkpoint.

`run_folder.py` says what a run's folder holds.
"""

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from rich.console import Console

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.checkpoints.store import float_dtype
from vllama2_jax.checkpoints.store import place as folder_of
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.parallel import hosts
from vllama2_jax.parallel.backends import attention_backend, moe_backend
from vllama2_jax.parallel.mesh import axes_in_words, make_layout
from vllama2_jax.parallel.program_cache import open_folder, using_folder
from vllama2_jax.parallel.sharding import param_axes
from vllama2_jax.progress import bar
from vllama2_jax.text import Tokenizer, load_tokenizer, tokenizer_files
from vllama2_jax.train.compiling import StepPrograms, about_step
from vllama2_jax.train.config import TrainConfig, to_json
from vllama2_jax.train.curves import draw_curves
from vllama2_jax.train.feeding import Feeding, feeding_of
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
from vllama2_jax.train.step import TrainState, init_state, make_step, state_shardings
from vllama2_jax.train.trainable import combine, parameter_table
from vllama2_jax.train.validation import Validation

_DAY = 86_400.0


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


def run(
    config: TrainConfig,
    out: str | Path,
    profile: tuple[int, int] = (0, 0),
    programs: str | Path | None = None,
) -> Outcome:
    """Begin a run, or go on with it.

    Args:
      config: what to do.
      out: its folder, new or that of the same run.
      profile: first and last step of a trace for XProf; zeros trace nothing.
      programs: a folder that all processes see, local or `gs://`, where compiled programs are
        taken from and kept.

    Raises:
      CheckpointError: if the folder is that of another run, or a checkpoint cannot be written.
      ValueError: if the configuration or the data cannot be used.
      FloatingPointError: if a loss or gradient is not finite.
    """
    hosts.join()
    # What people read is said once, by the first process.
    out, console = folder_of(out), Console(stderr=True, quiet=not hosts.is_first())
    programs = programs and folder_of(programs)
    if programs:
        hosts.first_does("programs", lambda: _say_dropped(open_folder(programs), console))
    layout = layout_of(config, jax.devices())
    if layout:
        console.print(f"mesh: {in_words_of(layout)}", highlight=False)
    with locked(out) if hosts.is_first() else contextlib.nullcontext():
        hosts.first_does("claim", lambda: claim(out, config))
        # The data first: what is wrong with them is seen sooner than weights are read.
        card, tokenizer_folder = describe_start(config.start)
        tokenizer = load_tokenizer(tokenizer_folder)
        card = trained_card(card, config, tokenizer)
        if not hosts.is_first():
            hosts.barrier("indexed", _DAY)  # one counts the records' lengths, the others read them
        feeding = feeding_of(config, card, tokenizer, out / INDEX, layout)
        if hosts.is_first():
            hosts.barrier("indexed", _DAY)
        hosts.agree("run", _identity(config, feeding))
        validation = None
        if config.validation.sources:
            validation = Validation(config, card, tokenizer, out / INDEX, layout)
        with bar("reading", unit="tensors") as progress:
            params, _, _ = begin(config.start, None, config.seed, progress, layout)
        dtype, named = float_dtype(config.dtype), layout and param_axes(card.config)
        prepared = prepare(params, config.start, config.rules, dtype, config.seed, named, layout)
        frozen, assigned = prepared.frozen, prepared.assigned
        console.print(parameter_table(combine(prepared.trainable, frozen), assigned))
        files = tokenizer_files(tokenizer_folder)
        known = (config, card, files, prepared.reference, feeding.fingerprints)
        hosts.first_does("introduce", lambda: introduce(out, *known))
        report = StepReport(config, card.config, feeding, assigned, prepared.trainable)
        optimizer = make_optimizer(config.optimizer, len(feeding.schedule), assigned)
        with contextlib.ExitStack() as stack:
            save = config.save
            checkpoints = stack.enter_context(
                RunCheckpoints(out, keep_last=save.keep_last, keep_best=save.keep_best)
            )
            trainable = prepared.trainable
            del params, prepared
            where = state_shardings(layout, optimizer, trainable) if layout else None
            state = _first_state(checkpoints, trainable, optimizer, where, config.masters)
            del trainable
            if state.step:
                console.print(f"going on behind step {state.step} of {len(feeding.schedule)}")
            journal = stack.enter_context(contextlib.closing(Journal(out, jax.process_index())))
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
            step = make_run_step(config, card.config, feeding.datasets, optimizer, layout, where)
            described = (config, card.config, feeding.datasets, len(feeding.schedule))
            step = StepPrograms(
                step,
                devices=list(layout.mesh.devices.flat) if layout else jax.devices()[:1],
                about=functools.partial(about_step, *described),
                folder=programs,
                tell=functools.partial(
                    console.print, highlight=False, markup=False, soft_wrap=True
                ),
            )
            stack.enter_context(using_folder(programs))
            try:
                state = course.run(step, state)
                checkpoints.wait()
            finally:  # what went wrong is seen best in them
                course.write_faults()
                if hosts.is_first() and read_metrics(journal.folder):
                    draw_curves(journal.folder)
            hosts.barrier("done")
        taken, steps = int(state.step), len(feeding.schedule)
        # Another process may have been told, and this one agreed.
        stopped_by = course.stop.received or (signal.SIGTERM if taken < steps else None)
        return Outcome(taken, steps, stopped_by, len(course.faults()))


def _say_dropped(files: list[str], console: Console) -> None:
    for name in files:
        console.print(f"a damaged program was dropped: {name}", markup=False, soft_wrap=True)


def layout_of(config: TrainConfig, devices) -> Layout | None:
    """How a run is laid out over devices; None for a single one.

    Raises:
      ValueError: if the mesh does not fit the devices, or a step's rows do not fit the mesh.
    """
    if len(devices) == 1:
        config.mesh.sizes(1)
        return None
    layout = make_layout(config.mesh, devices)
    check_rows(config, layout)
    return layout


def check_rows(config: TrainConfig, layout: Layout) -> None:
    """Refuse a step whose rows do not divide over the mesh.

    Raises:
      ValueError: saying what would do.
    """
    parts, rows = layout.size("batch"), config.rows // config.micro_batches
    if rows % parts:
        raise ValueError(
            f"{rows} rows of a {'micro-batch' if config.micro_batches > 1 else 'step'} do not "
            f"divide over {parts} parts of the mesh ({in_words_of(layout)}); make --batch a "
            "multiple of them, or split over tensor or sequence instead"
        )


def in_words_of(layout: Layout) -> str:
    """The axes of a mesh that split anything."""
    return f"{axes_in_words(layout.mesh.shape)} over {layout.mesh.size} devices"


def _identity(config: TrainConfig, feeding: Feeding) -> dict:
    """What all processes must hold alike, in plain JSON."""
    return {
        "config": to_json(config),
        "steps": len(feeding.schedule),
        "data": feeding.fingerprints,
        "devices": jax.device_count(),
    }


def _first_state(
    checkpoints: RunCheckpoints, trainable: dict, optimizer, where: TrainState | None, dtype
) -> TrainState:
    """The newest checkpoint's state, or that of before the first step; never both in memory."""
    # Every array is bound to its place: were some not, the step would be compiled once for them and
    # once more for its own results.
    if checkpoints.latest is None:
        return init_state(trainable, optimizer, where or _here(), dtype)
    shapes = jax.eval_shape(lambda: init_state(trainable, optimizer, None, dtype))
    if where:
        shapes = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where
        )
    for leaf in trainable.values():  # what was trained takes the place of what it began with
        leaf.delete()
    step = checkpoints.latest
    restored = checkpoints.restore(step, shapes.trainable, shapes.optimizer)
    number = jax.device_put(np.asarray(step, np.int32), where.step if where else _here())
    return TrainState(number, *restored)


def _here() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def trained_card(card: ModelCard, config: TrainConfig, tokenizer: Tokenizer) -> ModelCard:
    """The card of the model that a run makes: its media are read as in training."""
    preset = dataclasses.replace(card.preset, square_pad=config.data.square_pad)
    return dataclasses.replace(card, preset=preset, tokenizer=tokenizer.fingerprint())


def make_run_step(
    config: TrainConfig,
    network: VLlama2Config,
    datasets: tuple[str, ...],
    optimizer,
    layout: Layout | None = None,
    where: TrainState | None = None,
    devices: Sequence[jax.Device] = (),
):
    """The step of a run, of `make_step`.

    Args:
      config: of the run.
      network: that it trains.
      datasets: whose losses are told apart.
      optimizer: of `make_optimizer`.
      layout: how it is laid out over several devices.
      where: of `state_shardings`.
      devices: the one device, without a layout; by default JAX's first.
    """
    dtype = float_dtype(config.dtype)
    devices = layout.mesh.devices if layout else devices or jax.devices()[:1]
    model = VLlama2(
        network,
        dtype=dtype,
        remat=config.remat,
        attention_backend=attention_backend(devices),
        moe_backend=moe_backend(devices) if network.decoder.num_experts else "blocks",
    )
    return make_step(
        functools.partial(batch_loss, model, config=config.loss, datasets=datasets),
        optimizer,
        layout=layout,
        shardings=where,
        micro_batches=config.micro_batches,
        average=config.average,
        compute_dtype=None if config.dtype == config.masters else dtype,
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
        self._agreement, self._ending = hosts.StopAgreement(lambda: bool(self.stop)), False

    def run(self, step, state: TrainState) -> TrainState:
        """Take the steps that are left."""
        taken = int(state.step)
        self.window.reached(taken)
        return run_steps(
            step,
            state,
            self.frozen,
            self.feeding.batches(taken),
            quiet=not hosts.is_first(),
            label=self.config.name,
            num_steps=self._steps - taken,
            log=self._write,
            names=lambda number: self.feeding.record_ids(number - 1),
            examine=self._examine,
            keep=self._keep,
            due=lambda number: (
                self._saves(number) or self._validates(number) or self.window.borders(number)
            ),
            stop=self._ends_behind,
        )

    def _ends_behind(self, number: int) -> bool:
        self._ending = self._ending or self._agreement(number)
        return self._ending

    def _saves(self, number: int) -> bool:
        return number % self.config.save.every == 0 or number == self._steps

    def _validates(self, number: int) -> bool:
        return self.validation is not None and number % self.config.validation.every == 0

    def _examine(self, number: int, state: TrainState) -> dict:
        if self._ending or self.validation is None:
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
        if not (self._saves(record["step"]) or self._ending):
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
