"""Does a run fit a pod, how long will it take, and what does it send: `plan`."""

from pathlib import Path

import jax

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import communication
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.mesh import make_layout
from vllama2_jax.parallel.topology import Topology, devices
from vllama2_jax.plan.program import (
    Program,
    Shape,
    abstract_arguments,
    check_slices,
    compile_step,
    network_of,
)
from vllama2_jax.plan.result import Memory, Plan
from vllama2_jax.plan.stage import largest_batch, stage_or_none
from vllama2_jax.plan.work import bytes_here, flops_of, roofline_of
from vllama2_jax.train.config import TrainConfig

_TOO_LARGE = "RESOURCE_EXHAUSTED: "


def can_compile(topology: Topology) -> bool:
    """Whether a program can be compiled for it here: for any TPU, for GPUs that are here.

    Raises:
      ValueError: where the compiler for TPUs is missing, or knows no such slice.
    """
    if topology.platform != "gpu":
        devices(topology)
        return True
    try:
        devices(topology)
    except ValueError:
        return False
    return True


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

    Returns:
      What was found; that the program is too large for a chip is a plan that does not fit.

    Raises:
      ValueError: if the run does not fit the topology's mesh, or nothing can compile for it.
    """
    check_slices(config.mesh, topology)
    network = network_of(config.start)
    shape, there = largest_batch(config, network, length), devices(topology)
    try:
        program = compile_step(config, network, shape, there)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith(_TOO_LARGE):
            raise
        return _refused(config, network, shape, topology, there, str(error))
    text = program.compiled.as_text()
    if save_hlo:
        Path(save_hlo).write_text(text, encoding="utf-8")
    return _read_off(config, network, shape, topology, program, text, save_hlo)


def _read_off(config, network, shape, topology, program: Program, text, hlo) -> Plan:
    mesh = dict(program.layout.mesh.shape)
    across = {"data": config.mesh.dcn_data, "fsdp": config.mesh.dcn_fsdp}
    sent = communication(text, mesh, across)
    of_step = (config, network, shape, program.arguments, program.layout)
    found = None
    if topology.platform == "tpu":  # of other devices nothing says where they lie
        placement = Placement.of_devices(topology, program.layout.mesh.devices)
        found = roofline_of(*of_step, placement, sent.collectives)
    return Plan(
        config=config,
        network=network,
        shape=shape,
        topology=topology,
        mesh=mesh,
        memory=memory_of(program.compiled, topology),
        flops=flops_of(config, network, shape, program.arguments),
        stage=stage_or_none(config),
        compile_seconds=program.seconds,
        sent=sent,
        roofline=found,
        hlo=str(hlo) if hlo else None,
    )


def _refused(config, network: VLlama2Config, shape: Shape, topology, there, error: str) -> Plan:
    """The plan of a program that the compiler found too large."""
    layout = make_layout(config.mesh, there)
    arguments = abstract_arguments(config, network, shape, layout)
    return Plan(
        config=config,
        network=network,
        shape=shape,
        topology=topology,
        mesh=dict(layout.mesh.shape),
        memory=Memory(bytes_here(arguments[:3]), None, topology.chip.hbm_bytes),
        flops=flops_of(config, network, shape, arguments),
        stage=stage_or_none(config),
        refusal=error.removeprefix(_TOO_LARGE).splitlines()[0],
    )


def memory_of(compiled: jax.stages.Compiled, topology: Topology) -> Memory:
    """What a compiled program takes of each chip.

    `temp_size_in_bytes` is no measure on TPUs: it counts some arrays twice, so that the compiler
    accepts programs that would be too large by it (docs/decisions/plan-memory.md).
    """
    stats = compiled.memory_analysis()
    if topology.platform == "tpu":
        beside = stats.peak_memory_in_bytes - stats.argument_size_in_bytes
    else:  # other compilers do not say
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        beside = stats.temp_size_in_bytes + results
    temporaries = beside + stats.generated_code_size_in_bytes
    return Memory(stats.argument_size_in_bytes, temporaries, topology.chip.hbm_bytes)
