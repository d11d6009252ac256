"""Which mesh and which batch are best on a topology: `search`."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.mesh import MeshConfig, axes_in_words
from vllama2_jax.parallel.topology import Topology
from vllama2_jax.plan.estimate import estimate
from vllama2_jax.plan.planning import plan
from vllama2_jax.plan.program import network_of
from vllama2_jax.plan.records import Records
from vllama2_jax.plan.result import Plan
from vllama2_jax.train.config import TrainConfig

_PARTS = (2, 4, 8)
# What an estimate may exceed the limit by and still be compiled: some are too high by a third
# (docs/results/plan.md).
_SLACK = 1.4


def search(
    config: TrainConfig,
    topology: Topology,
    *,
    rows: tuple[int, ...] = (),
    length: int | None = None,
    records: Records | None = None,
    most: int = 3,
    told: Callable[[str], None] = lambda text: None,
) -> list[Plan]:
    """Plans of meshes and batches, best first: those that fit by samples per second.

    All are estimated by formulas. The fastest of those that seem to fit are compiled, until `most`
    meshes have turned out to fit; where nothing can be compiled for the topology, estimates are the
    result.

    Args:
      config: of the run; its mesh's slices stay, its rows are one of the candidates.
      topology: of `parallel.topology`.
      rows: of a step, to try beside those of the recipe.
      length: slots of a row; None takes the longest rows of the recipe.
      records: that it reads, where they are known.
      most: meshes that are compiled and fit; 0 compiles nothing.
      told: hears what is being compiled.

    Raises:
      ValueError: if no mesh fits rows and topology.
    """
    network, found, reason = network_of(config.start), [], None
    slices = topology.num_slices if topology.platform == "tpu" else 1
    for candidate in candidates(config, network, topology.num_chips, rows, slices):
        try:
            found.append(estimate(candidate, topology, length=length, records=records))
        except ValueError as error:
            reason = reason or error
    if not found:
        raise ValueError(
            f"no mesh fits {topology.name}: "
            + (str(reason) if reason else f"{config.rows} rows divide over none; change --batch")
        )
    found.sort(key=_rank)
    if not most or topology.platform != "tpu":
        return found
    compiled, fitting = [], set()
    for guess in found:
        mesh = guess.config.mesh
        if len(fitting) == most or len(compiled) == 2 * most:
            break
        if mesh in fitting or guess.memory.peak > _SLACK * topology.chip.hbm_bytes:
            continue
        told(f"compiling {mesh_and_batch(guess)}")
        try:
            compiled.append(plan(guess.config, topology, length=length, records=records))
        except ValueError as error:  # what a kernel cannot be split into shows when it is traced
            told(f"left out: {error}")
            continue
        if compiled[-1].fits:
            fitting.add(mesh)
    return sorted(compiled, key=_rank) or found


def candidates(
    config: TrainConfig,
    network: VLlama2Config,
    chips: int,
    rows: tuple[int, ...] = (),
    slices: int = 1,
) -> Iterator[TrainConfig]:
    """Configurations that differ in mesh, rows and micro-batches.

    Meshes split weights and rows over all chips, or over what tensor parallelism, experts or pieces
    of rows leave of them. Micro-batches are as many as leave each chip whole rows.

    Args:
      config, rows: of `search`.
      network: that it trains.
      chips: of the topology, in all.
      slices: of it; where the run's mesh says nothing of them, they hold copies of the model.
    """
    for mesh in _meshes(config.mesh, network, chips, slices):
        apart = chips // (mesh.tensor * mesh.sequence)
        for count in sorted({config.rows, *rows}):
            if count % apart:
                continue
            for parts in (1, 2, 4, 8):
                if count // apart % parts == 0:
                    yield dataclasses.replace(config, mesh=mesh, rows=count, micro_batches=parts)


def _meshes(
    given: MeshConfig, network: VLlama2Config, chips: int, slices: int
) -> Iterator[MeshConfig]:
    c = network.decoder
    across = dict(dcn_data=given.dcn_data, dcn_fsdp=given.dcn_fsdp)
    if given.dcn_data * given.dcn_fsdp == 1:
        across["dcn_data"] = slices
    inside = chips // (across["dcn_data"] * across["dcn_fsdp"])
    # Weights are split over as many chips as divide their width; copies of them over the rest.
    fsdp = math.gcd(inside, c.width)
    yield MeshConfig(**across) if fsdp == inside else MeshConfig(data=inside // fsdp, **across)
    for parts in (parts for parts in _PARTS if inside % parts == 0):
        if c.num_kv_heads % parts == 0 and c.mlp_dim % parts == 0:
            yield MeshConfig(layout="fsdp+tensor", tensor=parts, **across)
        if c.num_experts and c.num_experts % parts == 0:
            yield MeshConfig(layout="fsdp+expert", expert=parts, **across)
        yield MeshConfig(sequence=parts, **across)


def mesh_and_batch(plan: Plan) -> str:
    """Of a plan, in words: "fsdp 32, tensor 2; 128 rows in 2 micro-batches"."""
    parts = plan.config.micro_batches
    batches = f" in {parts} micro-batches" if parts > 1 else ""
    return f"{axes_in_words(plan.mesh)}; {plan.shape.rows} rows{batches}"


def _rank(plan: Plan) -> tuple[bool, float]:
    """Those that fit first, then by speed, or by memory where no speed is known."""
    speed = plan.samples_per_second
    return not plan.fits, -speed if speed else plan.memory.peak or float("inf")
