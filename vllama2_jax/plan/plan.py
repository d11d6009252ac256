"""Does a run fit a pod, how long will it take, and what does it send: `plan`."""

import dataclasses
import json
from pathlib import Path

import jax

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import (
    Communication,
    communication,
    largest_gather,
    totals,
    wire_bytes,
)
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.roofline import Roofline, moved_bytes, roofline
from vllama2_jax.parallel.topology import Topology, devices
from vllama2_jax.plan.program import Program, Shape, compile_step, network_of
from vllama2_jax.plan.stage import Stage, largest_batch, stage_of
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.flops import StepFlops, step_flops
from vllama2_jax.train.report import adapter_params, part_actions

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each chip's memory.

    Attributes:
      arguments: parameters, optimizer state and the batch.
      temporaries: what the step needs beside them, at most.
      peak: both together.
      limit: what a program may use.
    """

    arguments: int
    temporaries: int
    peak: int
    limit: int | None

    @property
    def fits(self) -> bool:
        """Whether the chip has so much."""
        return self.limit is None or self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes on a topology.

    Attributes:
      config, network, shape, topology: what was asked for.
      mesh: sizes of its axes.
      compile_seconds: tracing and compiling.
      memory: of each chip.
      flops: of a step, on all chips.
      sent: collectives and kernels of the compiled program.
      roofline: None for chips without a stated peak.
      stage: the whole run.
      hlo: where the program's text was kept.
    """

    config: TrainConfig
    network: VLlama2Config
    shape: Shape
    topology: Topology
    mesh: dict[str, int]
    compile_seconds: float
    memory: Memory
    flops: StepFlops
    sent: Communication
    roofline: Roofline | None
    stage: Stage | None
    hlo: str | None = None

    @property
    def wire_bytes(self) -> int:
        """Of a chip and step."""
        return sum(map(wire_bytes, self.sent.collectives))

    def to_json(self) -> dict:
        """The plan in plain JSON types."""
        roof, memory = self.roofline, dataclasses.asdict(self.memory)
        hours = roof and self.stage and self.stage.steps * roof.step_seconds / _HOUR
        largest = largest_gather(self.sent.collectives)
        return {
            "fits": self.memory.fits,
            "chips": self.topology.num_chips,
            "topology": self.topology.name,
            "model": self.network.name,
            "mesh": self.mesh,
            "batch": dataclasses.asdict(self.shape),
            "compile_seconds": self.compile_seconds,
            "hbm_bytes_per_chip": memory,
            "model_flops_per_step": self.flops.model,
            "hardware_flops_per_step": self.flops.hardware,
            "collectives": [
                {
                    "kind": total.kind,
                    "axis": total.axis,
                    "bytes": total.bytes,
                    "count": total.count,
                    "wire_bytes": total.wire_bytes,
                    "overlapped_bytes": total.overlapped_bytes,
                }
                for total in totals(self.sent.collectives)
            ],
            "wire_bytes": self.wire_bytes,
            "largest_gather": largest and {"bytes": largest.bytes, "shape": largest.shape},
            "kernels": dict(self.sent.kernels),
            "hlo": self.hlo,
            "roofline": roof and dataclasses.asdict(roof),
            "tokens_per_second": roof and self.shape.rows * self.shape.length / roof.step_seconds,
            "useful_fraction": None,
            "stage": self.stage
            and {
                **self.stage._asdict(),
                "hours": hours,
                "chip_hours": hours and hours * self.topology.num_chips,
            },
        }


def plan(
    config: TrainConfig,
    topology: Topology,
    *,
    length: int | None = None,
    save_hlo: str | Path | None = None,
) -> Plan:
    """Compile a run's own step for a topology, and read off what it takes.

    Args:
      config: of the run.
      topology: of `parallel.topology`.
      length: slots of a row; None takes the longest rows of the recipe.
      save_hlo: a file for the compiled program's text.

    Raises:
      ValueError: if the run does not fit the topology's mesh, or nothing can compile for it.
    """
    network = network_of(config.start)
    shape = largest_batch(config, network, length)
    program = compile_step(config, network, shape, devices(topology))
    text = program.compiled.as_text()
    if save_hlo:
        Path(save_hlo).write_text(text, encoding="utf-8")
    mesh = dict(program.layout.mesh.shape)
    across = {"data": config.mesh.dcn_data, "fsdp": config.mesh.dcn_fsdp}
    sent = communication(text, mesh, across)
    flops = _flops(config, network, shape, program)
    found = None
    if topology.platform == "tpu":
        found = roofline(
            Placement.of_devices(topology, program.layout.mesh.devices),
            model_flops=flops.model,
            hardware_flops=flops.hardware,
            hbm_bytes=_moved(config, network, shape, program, sent),
            collectives=sent.collectives,
        )
    try:
        stage = stage_of(config)
    except ValueError:
        stage = None  # of records that are not here; what a step takes is known all the same
    return Plan(
        config=config,
        network=network,
        shape=shape,
        topology=topology,
        mesh=mesh,
        compile_seconds=program.seconds,
        memory=_memory(program, topology),
        flops=flops,
        sent=sent,
        roofline=found,
        stage=stage,
        hlo=str(save_hlo) if save_hlo else None,
    )


def write_json(found: Plan) -> str:
    """One JSON object."""
    return json.dumps(found.to_json(), indent=1)


def _memory(program: Program, topology: Topology) -> Memory:
    stats = program.compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    # What is returned in the place of an argument takes no room of its own.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes + results + stats.generated_code_size_in_bytes
    return Memory(arguments, temporaries, arguments + temporaries, topology.chip.hbm_bytes)


def _flops(config, network, shape: Shape, program: Program) -> StepFlops:
    return step_flops(
        network,
        part_actions(program.arguments.assigned),
        rows=shape.rows,
        length=shape.length,
        frames=shape.frames,
        clips=shape.clips,
        sounds=shape.sounds,
        remat=config.remat,
        loss_chunk=config.loss.chunk,
        adapter_params=adapter_params(network, program.arguments.state.trainable),
    )


def _moved(config, network, shape: Shape, program: Program, sent: Communication) -> float:
    """Bytes between a chip and its memory, see `roofline.moved_bytes`."""
    arguments, layout = program.arguments, program.layout
    actions = part_actions(arguments.assigned)
    learning = {part for part, action in actions.items() if action != "freeze"}
    passes = 3 if config.remat == "full" else 2
    width = 2 if config.dtype == "bfloat16" else 4
    parts = layout.size("mlp")
    read = gradients = 0
    for path, leaf in {**arguments.frozen, **arguments.state.trainable}.items():
        part = path.split("/", 1)[0]
        if not _runs(part, shape):
            continue
        # A tower that is frozen has nothing below it that learns.
        through = part in learning or (part == "decoder" and learning)
        read += leaf.size * width / parts * (passes if through else 1)
        gradients += leaf.size * width / parts * (path in arguments.state.trainable)
    gathered = sum(c.bytes * c.count for c in sent.collectives if c.kind == "all-gather")
    rows = shape.rows / layout.size("batch")
    slots = rows * shape.length / layout.size("length")
    decoder = network.decoder
    saved = slots * decoder.num_layers * decoder.width * width if "decoder" in learning else 0
    return moved_bytes(
        weights_read=read,
        weights_gathered=gathered,
        gradients=gradients,
        state=_bytes_here(arguments.state),
        saved=saved,
    )


def _runs(part: str, shape: Shape) -> bool:
    needs = {"vision": shape.frames, "connector": shape.clips}
    return bool(needs.get(part, shape.sounds if part.startswith("audio") else True))


def _bytes_here(tree) -> int:
    """Of a chip's share of arrays."""
    return sum(
        leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
