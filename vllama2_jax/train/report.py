"""What is told of each step: the numbers that are logged, and the words beside the bar."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.lora import kernel_path
from vllama2_jax.parallel.chips import peak_flops
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.feeding import Feeding
from vllama2_jax.train.flops import step_flops
from vllama2_jax.train.loss import dataset_losses
from vllama2_jax.train.optimizer import learning_rate
from vllama2_jax.train.speed import Speed
from vllama2_jax.train.trainable import Rule


class StepReport:
    """Completes the numbers of a step."""

    def __init__(
        self,
        config: TrainConfig,
        network: VLlama2Config,
        feeding: Feeding,
        assigned: dict[str, Rule],
        trainable: dict[str, jax.Array],
    ):
        """Prepare, without computing anything.

        Args:
          config: of the run.
          network: its shapes.
          feeding: its data.
          assigned: of `assign_rules`.
          trainable: what trains, {path: array or shape}.
        """
        self._config, self._network, self._feeding = config, network, feeding
        self._actions = part_actions(assigned)
        self._adapter_params = adapter_params(network, trainable)
        steps = len(feeding.schedule)
        # All at once: a rate that is computed in its turn waits for the steps in front of it.
        self._rates = np.asarray(learning_rate(config.optimizer, steps)(jnp.arange(steps)))
        self._flops: dict[int, int] = {}
        device = jax.devices()[0]
        self._speed = Speed(peak_flops=peak_flops(device.device_kind, config.dtype))

    def __call__(self, record: dict) -> dict:
        """The record with losses per dataset, samples, learning rate and rates.

        Args:
          record: {"step", "tokens", "seconds", ...}, as `run_steps` logs it.
        """
        number = record["step"] - 1
        step = self._feeding.schedule[number]
        record = dataset_losses(record)
        if not record["supervised_tokens"]:  # nothing was learnt, so there is no mean
            record["loss"] = record["cross_entropy"] = math.nan
        record["samples"] = sum(len(row) for row in step.rows)
        record["learning_rate"] = float(self._rates[number])
        return record | self._speed.update(
            tokens=record["tokens"],
            samples=record["samples"],
            seconds=record["seconds"],
            model_flops=self.model_flops(step.length),
            slots=self._config.rows * step.length,
            shape=step.length,
        )

    def model_flops(self, length: int) -> int:
        """FLOPs of a step whose rows have so many slots (`flops.StepFlops.model`)."""
        if length not in self._flops:
            clips, sounds = self._feeding.schedule.max_clips, self._feeding.schedule.max_sounds
            self._flops[length] = step_flops(
                self._network,
                self._actions,
                rows=self._config.rows,
                length=length,
                frames=clips * self._network.num_frames,
                clips=clips,
                sounds=sounds,
                remat=self._config.remat,
                loss_chunk=self._config.loss.chunk,
                adapter_params=self._adapter_params,
            ).model
        return self._flops[length]


def adapter_params(network: VLlama2Config, trainable: dict[str, jax.Array]) -> int:
    """Parameters of adapters, as often as a slot meets them, for `flops.step_flops`."""
    share = network.decoder.top_k / max(network.decoder.num_experts, 1)  # of experts in use
    return round(
        sum(
            leaf.size * (share if re.search("/moe/(gate|up|down)_", path) else 1)
            for path, leaf in trainable.items()
            if path != kernel_path(path)
        )
    )


def in_words(record: dict) -> str:
    """The rates of a record, for the bar; "" where none is known yet."""
    if "tokens_per_second" not in record:
        return ""
    words = [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['samples_per_second']:.1f} samples/s",
        _flops_in_words(record["model_flops_per_second"]),
    ]
    if "utilisation" in record:
        words.append(f"{record['utilisation']:.0%} of peak")
    return " · ".join(words)


def _flops_in_words(flops: float) -> str:
    return f"{flops / 1e9:.3g} GFLOP/s" if flops < 1e12 else f"{flops / 1e12:.3g} TFLOP/s"


def part_actions(assigned: dict[str, Rule]) -> dict[str, str]:
    """How each part trains: "train" where anything of it does, else "lora", else "freeze"."""
    found: dict[str, set[str]] = {}
    for path, rule in assigned.items():
        found.setdefault(path.split("/", 1)[0], set()).add(rule.action)
    return {
        part: next((action for action in ("train", "lora") if action in actions), "freeze")
        for part, actions in found.items()
    }
