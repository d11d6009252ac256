"""What happens along the steps of a run: reports, validation, checkpoints."""

import dataclasses
import math

import numpy as np

from vllama2_jax.checkpoints.run import RunCheckpoints
from vllama2_jax.parallel import hosts
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.feeding import Feeding
from vllama2_jax.train.journal import Journal
from vllama2_jax.train.loop import StopSignals, run_steps
from vllama2_jax.train.metrics import MetricsLog
from vllama2_jax.train.profile import Profile
from vllama2_jax.train.report import StepReport, in_words
from vllama2_jax.train.run_folder import write_faults
from vllama2_jax.train.step import TrainState
from vllama2_jax.train.validation import Validation


@dataclasses.dataclass
class Course:
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
