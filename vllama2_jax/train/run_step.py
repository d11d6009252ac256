"""How a run is laid out over its devices, and the step that it takes there."""

import functools
from collections.abc import Sequence

import jax

from vllama2_jax.checkpoints.store import float_dtype
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import VLlama2
from vllama2_jax.parallel.backends import network_options
from vllama2_jax.parallel.mesh import axes_in_words, make_layout
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.loss import batch_loss
from vllama2_jax.train.step import TrainState, make_step


def layout_of(config: TrainConfig, devices) -> Layout | None:
    """How a run is laid out over devices; None for a single one.

    Raises:
      ValueError: if the mesh does not fit the devices, or a step's rows do not fit the mesh.
    """
    if len(devices) == 1:
        config.mesh.sizes(1)
        return None
    layout = make_layout(config.mesh, devices)
    check_rows(config, layout)
    return layout


def check_rows(config: TrainConfig, layout: Layout) -> None:
    """Refuse a step whose rows do not divide over the mesh.

    Raises:
      ValueError: saying what would do.
    """
    parts, rows = layout.size("batch"), config.rows // config.micro_batches
    if rows % parts:
        raise ValueError(
            f"{rows} rows of a {'micro-batch' if config.micro_batches > 1 else 'step'} do not "
            f"divide over {parts} parts of the mesh ({in_words_of(layout)}); make --batch a "
            "multiple of them, or split over tensor or sequence instead"
        )


def in_words_of(layout: Layout) -> str:
    """The axes of a mesh that split anything."""
    return f"{axes_in_words(layout.mesh.shape)} over {layout.mesh.size} devices"


def run_network(
    config: TrainConfig,
    network: VLlama2Config,
    layout: Layout | None = None,
    devices: Sequence[jax.Device] = (),
) -> VLlama2:
    """The network as a run steps and validates it; the arguments are those of `make_run_step`."""
    options = network_options(network, layout, devices)
    return VLlama2(network, dtype=float_dtype(config.dtype), remat=config.remat, **options)


def make_run_step(
    config: TrainConfig,
    network: VLlama2Config,
    datasets: tuple[str, ...],
    optimizer,
    layout: Layout | None = None,
    where: TrainState | None = None,
    devices: Sequence[jax.Device] = (),
):
    """The step of a run, of `make_step`.

    Args:
      config: of the run.
      network: that it trains.
      datasets: whose losses are told apart.
      optimizer: of `make_optimizer`.
      layout: how it is laid out over several devices.
      where: of `state_shardings`.
      devices: the one device, without a layout; by default JAX's first.
    """
    model = run_network(config, network, layout, devices)
    return make_step(
        functools.partial(batch_loss, model, config=config.loss, datasets=datasets),
        optimizer,
        layout=layout,
        shardings=where,
        micro_batches=config.micro_batches,
        average=config.average,
        compute_dtype=None if config.dtype == config.masters else model.dtype,
    )
