"""Carry a training run out, from its configuration to its last checkpoint.

`run_folder.py` says what a run's folder holds.
"""

import contextlib
import functools
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from rich.console import Console

from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.checkpoints.store import float_dtype
from vllama2_jax.checkpoints.store import place as folder_of
from vllama2_jax.parallel import hosts
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.program_cache import open_folder, using_folder
from vllama2_jax.parallel.sharding import param_axes
from vllama2_jax.parallel.software import software
from vllama2_jax.progress import bar
from vllama2_jax.text import load_tokenizer, tokenizer_files
from vllama2_jax.train.compiling import StepPrograms, about_step
from vllama2_jax.train.config import TrainConfig, to_json
from vllama2_jax.train.course import Course
from vllama2_jax.train.curves import draw_curves
from vllama2_jax.train.feeding import Feeding, feeding_of, row_lengths
from vllama2_jax.train.journal import Journal
from vllama2_jax.train.loop import StopSignals
from vllama2_jax.train.metrics import MetricsLog, read_metrics
from vllama2_jax.train.optimizer import make_optimizer
from vllama2_jax.train.profile import Profile
from vllama2_jax.train.report import StepReport
from vllama2_jax.train.run_folder import (
    INDEX,
    PROFILE,
    claim,
    introduce,
    locked,
)
from vllama2_jax.train.run_step import in_words_of, layout_of, make_run_step
from vllama2_jax.train.start import begin, describe_start, prepare, trained_card
from vllama2_jax.train.step import TrainState, init_state, state_shardings
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
    hosts.new_run()
    hosts.agree("software", software())
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
        if layout:
            lengths = row_lengths(config.data, card.config)
            check_network(config.mesh, layout, card.config, lengths)
        if not hosts.is_first():
            hosts.barrier("indexed", _DAY)  # one counts the records' lengths, the others read them
        feeding = feeding_of(config, card, tokenizer, out / INDEX, layout)
        if hosts.is_first():
            hosts.barrier("indexed", _DAY)
        validation = None
        if config.validation.sources:
            validation = Validation(config, card, tokenizer, out / INDEX, layout)
        hosts.agree("run", _identity(config, feeding, validation))
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
            hosts.agree("start", {"the newest checkpoint in --out": checkpoints.latest})
            trainable = prepared.trainable
            del params, prepared
            where = state_shardings(layout, optimizer, trainable) if layout else None
            state = _first_state(checkpoints, trainable, optimizer, where, config.masters)
            del trainable
            if state.step:
                console.print(f"going on behind step {state.step} of {len(feeding.schedule)}")
            journal = stack.enter_context(contextlib.closing(Journal(out, jax.process_index())))
            log = stack.enter_context(MetricsLog(journal.folder, restored_step=int(state.step)))
            course = Course(
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


def _identity(config: TrainConfig, feeding: Feeding, validation: Validation | None) -> dict:
    """What all processes must hold alike, in plain JSON."""
    return {
        "config": to_json(config),
        "steps": len(feeding.schedule),
        "data": feeding.fingerprints,
        "validation data": validation and validation.fingerprints,
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
