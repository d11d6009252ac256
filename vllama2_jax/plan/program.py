"""The training step of a recipe, compiled for devices that need not be here."""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import SingleDeviceSharding

from vllama2_jax.checkpoints.store import float_dtype
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import Batch, abstract_params
from vllama2_jax.models.zoo import model_config
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.mesh import MeshConfig, make_layout
from vllama2_jax.parallel.program_cache import compile_program, keep_program
from vllama2_jax.parallel.sharding import batch_shardings, param_axes, shardings
from vllama2_jax.parallel.topology import Topology
from vllama2_jax.plan.records import Records
from vllama2_jax.train.compiling import about_step
from vllama2_jax.train.config import StartConfig, TrainConfig
from vllama2_jax.train.lora import adapt
from vllama2_jax.train.optimizer import make_optimizer
from vllama2_jax.train.run_step import check_rows, make_run_step
from vllama2_jax.train.start import describe_start
from vllama2_jax.train.step import TrainState, init_state, state_shardings
from vllama2_jax.train.trainable import Rule, assign_rules, partition


@dataclasses.dataclass(frozen=True)
class Shape:
    """The largest batch of a recipe.

    Attributes:
      rows: of a step, on all devices.
      length: slots of a row.
      frames: distinct frames of a row.
      clips: of a row.
      sounds: of a row.
    """

    rows: int
    length: int
    frames: int
    clips: int
    sounds: int


class Arguments(NamedTuple):
    """What a step takes, as shapes that know where they lie.

    Attributes:
      state: what trains, and the optimizer's.
      frozen: {path: shape} of what does not.
      batch: of one step.
      assigned: {path: rule} of all parameters.
    """

    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: Batch
    assigned: dict[str, Rule]


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      compiled: the executable.
      seconds: how long tracing and compiling took.
      arguments: what it takes.
      layout: how it is laid out.
    """

    compiled: jax.stages.Compiled
    seconds: float
    arguments: Arguments
    layout: Layout


def network_of(start: StartConfig) -> VLlama2Config:
    """The network that a run would train, without looking for its weights where its name says all.

    Raises:
      CheckpointError: for a directory that is no model.
      ValueError: for an unknown name.
    """
    name = start.model
    try:
        published = model_config(name)
    except ValueError:
        published = None
    if published is None or start.connector_kind or start.hearing:
        return describe_start(start)[0].config
    return published


def abstract_arguments(
    config: TrainConfig, network: VLlama2Config, shape: Shape, layout: Layout
) -> Arguments:
    """Shapes of everything that a step takes.

    Args:
      config: of the run.
      network: of `network_of`.
      shape: of its batch.
      layout: how it is laid out.

    Raises:
      ValueError: if rules do not fit the network.
    """
    dtype = float_dtype(config.dtype)
    params = jax.eval_shape(
        lambda: adapt(
            jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), abstract_params(network)),
            config.rules,
            jax.random.key(0),
        )
    )
    assigned = assign_rules(config.rules, params)
    trainable, frozen = (
        _placed(leaves, shardings(layout, leaves, param_axes(network)))
        for leaves in partition(params, assigned)
    )
    optimizer = make_optimizer(config.optimizer, 2, assigned)
    state = jax.eval_shape(
        lambda leaves: init_state(leaves, optimizer, None, config.masters), trainable
    )
    state = _placed(state, state_shardings(layout, optimizer, trainable))
    batch = abstract_batch(network, shape)
    return Arguments(state, frozen, _placed(batch, batch_shardings(layout, batch)), assigned)


def abstract_batch(network: VLlama2Config, shape: Shape) -> Batch:
    """Shapes of a batch's arrays."""
    slots, rows = (shape.rows, shape.length), shape.rows

    def array(kind, *sizes):
        return jax.ShapeDtypeStruct(sizes, kind)

    media = {}
    if shape.clips:
        size = network.vision.image_size
        media |= {
            "frames": array(jnp.uint8, rows, shape.frames, size, size, 3),
            "clip_frames": array(jnp.int32, rows, shape.clips, network.num_frames),
            "clip_mask": array(jnp.bool_, rows, shape.clips),
        }
    if shape.sounds:
        tower = network.audio
        media |= {
            "audio": array(jnp.float32, rows, shape.sounds, tower.num_frames, tower.num_bins),
            "audio_mask": array(jnp.bool_, rows, shape.sounds),
            "audio_keep": array(jnp.bool_, rows, tower.num_layers),
        }
    whole_numbers = ("tokens", "positions", "segment_ids", "media_index", "targets", "dataset_ids")
    return Batch(
        target_weights=array(jnp.float32, *slots),
        **{name: array(jnp.int32, *slots) for name in whole_numbers},
        **media,
    )


def check_slices(mesh: MeshConfig, topology: Topology) -> None:
    """Refuse a mesh that says nothing of a topology's slices, or of others.

    Raises:
      ValueError: saying what would do.
    """
    across = mesh.dcn_data * mesh.dcn_fsdp
    if topology.platform == "tpu" and across != topology.num_slices:
        raise ValueError(
            f"{topology.name} has {topology.num_slices} slices and the mesh {across}; say what "
            f"lies across them, as in --mesh dcn_data={topology.num_slices}"
        )


def compile_step(
    config: TrainConfig,
    network: VLlama2Config,
    shape: Shape,
    devices: Sequence[jax.Device],
    records: Records | None = None,
    folder: epath.Path | None = None,
) -> Program:
    """Trace and compile a run's own step.

    Args:
      config: of the run.
      network: of `network_of`.
      shape: of its batch.
      devices: to compile for.
      records: that it reads. Without them, constants in the program are not the run's own.
      folder: where to keep the program for `train --programs`.

    Raises:
      ValueError: if mesh, rows and devices do not fit.
    """
    layout = make_layout(config.mesh, devices)
    check_network(config.mesh, layout, network, (shape.length,))
    check_rows(config, layout)
    arguments = abstract_arguments(config, network, shape, layout)
    datasets, steps = (records.datasets, records.steps) if records else (("all",), 2)
    optimizer = make_optimizer(config.optimizer, steps, arguments.assigned)
    began = time.perf_counter()
    if len(devices) > 1:
        where = jax.tree.map(lambda leaf: leaf.sharding, arguments.state)
        step = make_run_step(config, network, datasets, optimizer, layout, where)
    else:  # as a run on one device
        step = make_run_step(config, network, datasets, optimizer, devices=devices)
        here = SingleDeviceSharding(devices[0])
        held = jax.tree.map(lambda leaf: here, arguments[:2])
        batch = abstract_batch(network, shape)  # which is bound to no device, as those of a run
        arguments = Arguments(*_placed(arguments[:2], held), batch, arguments.assigned)
    lowered = step.lower(arguments.state, arguments.frozen, arguments.batch)
    lowering = time.perf_counter() - began
    if folder is None:
        made = compile_program(lowered)
    else:
        about = about_step(config, network, datasets, steps, arguments.batch)
        made = keep_program(lowered, folder, devices, about)
    return Program(made.compiled, lowering + made.seconds, arguments, layout)


def _placed(tree, where):
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        where,
    )
