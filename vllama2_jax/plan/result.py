"""What a plan says."""

import dataclasses

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import Communication, largest_gather, totals
from vllama2_jax.parallel.roofline import Roofline
from vllama2_jax.parallel.topology import Topology
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes on a topology.

    Attributes:
      config, network, shape, topology: what was asked for.
      mesh: sizes of its axes.
      memory: of each chip.
      flops: of a step, on all chips.
      stage: the whole run; None where its records are not known.
      compile_seconds: tracing and compiling; None where nothing was compiled to the end.
      sent: collectives, and kernels of a compiled program; None where it does not fit.
      roofline: None likewise, and for chips without a stated peak.
      useful_fraction: of the slots of a batch, those that hold a token or media; None where the
        records are not here.
      refusal: the compiler's word on a program that does not fit.
      estimated: formulas stand in for a compiled program.
      hlo: where the program's text was kept.
    """

    config: TrainConfig
    network: VLlama2Config
    shape: Shape
    topology: Topology
    mesh: dict[str, int]
    memory: Memory
    flops: StepFlops
    stage: Stage | None
    compile_seconds: float | None = None
    sent: Communication | None = None
    roofline: Roofline | None = None
    useful_fraction: float | None = None
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
    def samples_per_second(self) -> float | None:
        """Rows; without packing, each is a sample."""
        return self.roofline and self.shape.rows / self.roofline.step_seconds

    @property
    def hours(self) -> float | None:
        """Of the whole stage."""
        if not (self.roofline and self.stage):
            return None
        return self.stage.steps * self.roofline.step_seconds / _HOUR

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
        roof, hours = self.roofline, self.hours
        return {
            "fits": self.fits,
            "estimated": self.estimated,
            "refusal": self.refusal,
            "chips": self.topology.num_chips,
            "topology": self.topology.name,
            "model": self.network.name,
            "mesh": self.mesh,
            "layout": self.config.mesh.layout,
            "batch": dataclasses.asdict(self.shape),
            "micro_batches": self.config.micro_batches,
            "compile_seconds": self.compile_seconds,
            "hbm_bytes_per_chip": self.memory.to_json(),
            "model_flops_per_step": self.flops.model,
            "hardware_flops_per_step": self.flops.hardware,
            **sent_to_json(self.sent),
            "hlo": self.hlo,
            "roofline": roof and dataclasses.asdict(roof),
            "tokens_per_second": roof and self.shape.rows * self.shape.length / roof.step_seconds,
            "useful_fraction": self.useful_fraction,
            "stage": self.stage
            and {
                **self.stage._asdict(),
                "hours": hours,
                "chip_hours": hours and hours * self.topology.num_chips,
            },
        }


def sent_to_json(sent: Communication | None) -> dict:
    """What a program sends and calls, in plain JSON types."""
    largest = sent and largest_gather(sent.collectives)
    return {
        "collectives": [
            {
                "kind": total.kind,
                "axis": total.axis,
                "bytes": total.bytes,
                "count": total.count,
                "wire_bytes": total.wire_bytes,
                "overlapped_bytes": total.overlapped_bytes,
            }
            for total in totals(sent.collectives if sent else ())
        ],
        "wire_bytes": sent and sent.wire_bytes,
        "largest_gather": largest and {"bytes": largest.bytes, "shape": largest.shape},
        "kernels": dict(sent.kernels if sent else {}),
    }
