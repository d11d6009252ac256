"""What a plan says."""

import abc
import dataclasses
from typing import NamedTuple

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import Communication, largest_gather, totals
from vllama2_jax.parallel.roofline import Roofline, assumptions
from vllama2_jax.parallel.topology import Topology
from vllama2_jax.plan.assumptions import ESTIMATES, FLOPS
from vllama2_jax.plan.program import Shape
from vllama2_jax.plan.records import Records
from vllama2_jax.plan.stage import Stage
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.flops import StepFlops

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each chip's memory.

    Attributes:
      arguments: parameters, optimizer state and the batch.
      temporaries: what the step needs beside them where it needs most, and its code; None where the
        compiler found them too many, and did not say how many it needs.
      limit: what a program may use; None: as much as the machine has.
    """

    arguments: int
    temporaries: int | None
    limit: int | None

    @property
    def peak(self) -> int | None:
        """Arguments and temporaries together; what the compiler holds against the limit."""
        return None if self.temporaries is None else self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the chip has so much."""
        if self.peak is None:
            return False
        return self.limit is None or self.peak <= self.limit

    def to_json(self) -> dict[str, int | None]:
        """The plain numbers."""
        return {**dataclasses.asdict(self), "peak": self.peak}


class Parameters(NamedTuple):
    """How many numbers.

    Attributes:
      total: of the network.
      trainable: that train, adapters too.
    """

    total: int
    trainable: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan(abc.ABC):
    """What one program takes on a topology; a step is one run of it.

    Attributes:
      network, topology, layout: what was asked for.
      mesh: sizes of its axes.
      parameters: of the network.
      memory: of each chip.
      flops: of a step, on all chips.
      dtype: of products.
      compile_seconds: tracing and compiling; None where nothing was compiled to the end.
      sent: collectives of a step, and kernels of a compiled program; None where it does not fit.
      roofline: None likewise, and for chips without a stated peak.
      refusal: the compiler's word on a program that does not fit.
      estimated: formulas stand in for a compiled program.
      hlo: where the program's text was kept.
    """

    network: VLlama2Config
    topology: Topology
    layout: str
    mesh: dict[str, int]
    parameters: Parameters
    memory: Memory
    flops: StepFlops
    dtype: str = "bfloat16"
    compile_seconds: float | None = None
    sent: Communication | None = None
    roofline: Roofline | None = None
    refusal: str | None = None
    estimated: bool = False
    hlo: str | None = None

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.memory.fits

    @property
    def wire_bytes(self) -> int | None:
        """Of a chip and step."""
        return self.sent and self.sent.wire_bytes

    @property
    @abc.abstractmethod
    def tokens_of_a_step(self) -> int:
        """Of all rows; padding counts."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of all chips together."""
        return self.roofline and self.tokens_of_a_step / self.roofline.step_seconds

    @property
    @abc.abstractmethod
    def assumptions(self) -> list[str]:
        """What is taken for granted, one sentence each."""

    def to_json(self) -> dict:
        """The plan in plain JSON types."""
        largest = self.sent and largest_gather(self.sent.collectives)
        return {
            "fits": self.fits,
            "estimated": self.estimated,
            "refusal": self.refusal,
            "chips": self.topology.num_chips,
            "topology": self.topology.name,
            "model": self.network.name,
            "parameters": self.parameters._asdict(),
            "mesh": self.mesh,
            "layout": self.layout,
            "compile_seconds": self.compile_seconds,
            "hbm_bytes_per_chip": self.memory.to_json(),
            "model_flops_per_step": self.flops.model,
            "hardware_flops_per_step": self.flops.hardware,
            "collectives": [
                total._asdict() for total in totals(self.sent.collectives if self.sent else ())
            ],
            "wire_bytes": self.wire_bytes,
            "largest_gather": largest and {"bytes": largest.bytes, "shape": largest.shape},
            "kernels": dict(self.sent.kernels if self.sent else {}),
            "uncounted_loops": list(self.sent.uncounted_loops if self.sent else ()),
            "hlo": self.hlo,
            "roofline": self.roofline and dataclasses.asdict(self.roofline),
            "tokens_per_second": self.tokens_per_second,
            "assumptions": self.assumptions,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(ProgramPlan):
    """What a training step takes on a topology.

    Attributes:
      config, shape: what was asked for.
      stage: the whole run; None where its records are not known.
      useful_fraction: of the slots of a batch, those that hold a token or media; None where the
        records are not here.
    """

    config: TrainConfig
    shape: Shape
    stage: Stage | None
    useful_fraction: float | None = None

    @property
    def tokens_of_a_step(self) -> int:
        """Slots of its rows."""
        return self.shape.rows * self.shape.length

    @property
    def samples_per_second(self) -> float | None:
        """Rows; without packing, each is a sample."""
        return self.roofline and self.shape.rows / self.roofline.step_seconds

    @property
    def hours(self) -> float | None:
        """Of the whole stage."""
        if not (self.roofline and self.stage):
            return None
        return self.stage.steps * self.roofline.step_seconds / _HOUR

    @property
    def assumptions(self) -> list[str]:
        """What is taken for granted, one sentence each."""
        of_roofline = assumptions(self.topology, dtype=self.dtype) if self.roofline else ()
        return [*(ESTIMATES if self.estimated else ()), *FLOPS, *of_roofline]

    def told(self, records: Records) -> "Plan":
        """The same, knowing its run's own records."""
        steps = -(-records.steps * records.rows // self.shape.rows)
        return dataclasses.replace(
            self,
            stage=Stage(records.samples, steps),
            useful_fraction=records.useful_fraction,
        )

    def to_json(self) -> dict:
        """The plan in plain JSON types."""
        hours = self.hours
        of_stage = self.stage and {
            **self.stage._asdict(),
            "hours": hours,
            "chip_hours": hours and hours * self.topology.num_chips,
        }
        return {
            **super().to_json(),
            "batch": dataclasses.asdict(self.shape),
            "micro_batches": self.config.micro_batches,
            "useful_fraction": self.useful_fraction,
            "stage": of_stage,
        }
