"""Does a run fit a pod, how long will it take, and what does it send: `plan`."""

from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import Communication, communication
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.mesh import MeshConfig, make_layout
from vllama2_jax.parallel.program_cache import open_folder
from vllama2_jax.parallel.topology import Topology, devices
from vllama2_jax.plan.program import (
    Program,
    Shape,
    abstract_arguments,
    check_slices,
    compile_step,
    network_of,
)
from vllama2_jax.plan.records import Records
from vllama2_jax.plan.result import Memory, Plan
from vllama2_jax.plan.stage import largest_batch, stage_or_none
from vllama2_jax.plan.work import bytes_here, flops_of, parameters_of, roofline_of
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
    records: Records | None = None,
    save_program: epath.Path | None = None,
) -> Plan:
    """Compile a run's own step for a topology, and read off what it takes.

    Args:
      config: of the run.
      topology: of `parallel.topology`.
      length: slots of a row; None takes the longest rows of the recipe.
      save_hlo: a file for the compiled program's text.
      records: that it reads, where they are known.
      save_program: a folder for the program, from which `train --programs` takes it.

    Returns:
      What was found; that the program is too large for a chip is a plan that does not fit.

    Raises:
      ValueError: if the run does not fit the topology's mesh, or nothing can compile for it.
    """
    check_slices(config.mesh, topology)
    network = network_of(config.start)
    shape, there = largest_batch(config, network, length, records), devices(topology)
    try:
        program = compile_step(config, network, shape, there, records, save_program)
    except jax.errors.JaxRuntimeError as error:
        return _refused(config, network, shape, topology, there, refusal_of(error))
    text = program.compiled.as_text()
    if save_hlo:
        Path(save_hlo).write_text(text, encoding="utf-8")
    return _read_off(config, network, shape, topology, program, text, save_hlo)


def save_programs(
    config: TrainConfig,
    topology: Topology,
    records: Records,
    folder: epath.Path,
    told: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compile every program of a run's step for a topology, and keep it for `train --programs`.

    Args:
      config, topology: as of `plan`.
      records: that the run reads; there is a program for each length of its rows.
      folder: where to, local or `gs://`.
      told: hears what is being compiled.

    Returns:
      The plan of the longest rows, which need the most.
    """
    open_folder(folder)
    plans = []
    for length in reversed(records.lengths):
        told(f"compiling {config.name} for {topology.name}, rows of {length:,} slots")
        plans.append(plan(config, topology, length=length, records=records, save_program=folder))
        if not plans[0].fits:
            break
    return plans[0]


def _read_off(config, network, shape, topology, program: Program, text, hlo) -> Plan:
    sent = sent_by(text, config.mesh, program.layout)
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
        layout=config.mesh.layout,
        mesh=dict(program.layout.mesh.shape),
        parameters=parameters_of(network, program.arguments.state.trainable),
        dtype=config.dtype,
        memory=memory_of(program.compiled, topology),
        flops=flops_of(config, network, shape, program.arguments),
        stage=stage_or_none(config),
        compile_seconds=program.seconds,
        sent=sent,
        roofline=found,
        hlo=str(hlo) if hlo else None,
    )


def _refused(config, network: VLlama2Config, shape: Shape, topology, there, refusal: str) -> Plan:
    """The plan of a program that the compiler found too large."""
    layout = make_layout(config.mesh, there)
    arguments = abstract_arguments(config, network, shape, layout)
    return Plan(
        config=config,
        network=network,
        shape=shape,
        topology=topology,
        layout=config.mesh.layout,
        mesh=dict(layout.mesh.shape),
        parameters=parameters_of(network, arguments.state.trainable),
        dtype=config.dtype,
        memory=Memory(bytes_here(arguments[:3]), None, topology.chip.hbm_bytes),
        flops=flops_of(config, network, shape, arguments),
        stage=stage_or_none(config),
        refusal=refusal,
    )


def refusal_of(error: jax.errors.JaxRuntimeError) -> str:
    """The compiler's word on a program that is too large.

    Raises:
      ValueError: for any other error, which is the compiler's own.
    """
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if not said.startswith(_TOO_LARGE):
        raise ValueError(
            f"the compiler failed ({said[:300]}); take another mesh, or other micro-batches"
        ) from error
    return said.removeprefix(_TOO_LARGE)


def sent_by(text: str, mesh: MeshConfig, layout: Layout) -> Communication:
    """What a compiled program sends.

    Args:
      text: of the program.
      mesh: that it was laid out by, which says what lies across slices.
      layout: made of it.
    """
    across = {"data": mesh.dcn_data, "fsdp": mesh.dcn_fsdp}
    return communication(text, dict(layout.mesh.shape), across)


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
