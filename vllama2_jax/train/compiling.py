"""A run's step as programs, one for each length of rows: compiled, or taken from a folder."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import jax
from etils import epath

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import Batch
from vllama2_jax.parallel.program_cache import Compiling, compile_program, reason
from vllama2_jax.train.config import TrainConfig, flat_json, to_json
from vllama2_jax.train.step import TrainState

# What a step is made of; the rest of a configuration makes data and checkpoints.
_OF_THE_STEP = ("rules", "optimizer", "loss", "rows", "micro_batches", "average")
_OF_THE_STEP += ("dtype", "masters", "remat", "mesh")
_LONG = 10.0  # seconds of compiling that are worth a line


def about_step(
    config: TrainConfig,
    network: VLlama2Config,
    datasets: Sequence[str],
    steps: int,
    batch: Batch,
) -> dict[str, object]:
    """What tells one program from another, in plain JSON types.

    Args:
      config: of the run.
      network: that it trains.
      datasets: whose losses are told apart.
      steps: of the whole run, which learning rates are made of.
      batch: arrays or shapes.
    """
    chosen = {name: value for name, value in to_json(config).items() if name in _OF_THE_STEP}
    shapes = json.dumps(dataclasses.asdict(network), sort_keys=True, default=str)
    return {
        "model": network.name,
        "its shapes": hashlib.sha256(shapes.encode()).hexdigest()[:8],
        "slots of a row": batch.tokens.shape[1],
        "clips": 0 if batch.clip_mask is None else batch.clip_mask.shape[1],
        "sounds": 0 if batch.audio_mask is None else batch.audio_mask.shape[1],
        "steps": steps,
        "datasets": ", ".join(datasets),
        **flat_json(chosen),
    }


class StepPrograms:
    """A step that is compiled for each length of rows when the first of them comes, and says so."""

    def __init__(
        self,
        step: Callable,
        *,
        devices: Sequence[jax.Device],
        about: Callable[[Batch], dict],
        folder: epath.Path | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ):
        """Nothing is compiled yet.

        Args:
          step: of `make_step`.
          devices: that it runs on.
          about: a batch -> `about_step`.
          folder: of compiled programs, in use (`using_folder`); None for none.
          tell: hears what is compiled, or from where it is taken.
        """
        self._step, self._devices, self._about = step, devices, about
        self._folder, self._tell = folder, tell
        self._programs: dict[int, jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, frozen: dict, batch: Batch):
        """Take a step, as `make_step` says."""
        length = batch.tokens.shape[1]
        if length not in self._programs:
            self._tell(f"compiling the step for rows of {length:,} slots")
            made = compile_program(self._step.lower(state, frozen, batch))
            self._tell_origin(batch, made)
            self._programs[length] = made.compiled
        return self._programs[length](state, frozen, batch)

    def _tell_origin(self, batch: Batch, made: Compiling) -> None:
        if made.taken:
            where = self._folder or "JAX's compilation cache"
            self._tell(f"its program was taken from {where} in {made.seconds:.1f} s")
            return
        why = self._folder and reason(self._folder, self._devices, self._about(batch))
        if why:
            self._tell(
                f"compiled in {made.seconds:.1f} s: no program in {self._folder} is for it ({why})"
            )
        elif made.seconds >= _LONG:
            self._tell(f"compiled in {made.seconds:.0f} s")
