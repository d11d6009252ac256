"""Where every array of a run lies: parameters, optimizer state, batches."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.lora import LORA_A, LORA_B, LORA_SCALE, kernel_axes, kernel_path
from vllama2_jax.models.vllama2 import BATCH_AXES, Batch, named_params


def param_axes(config: VLlama2Config, **kwargs) -> dict[str, tuple[str, ...]]:
    """{path: logical axis names} of every parameter, as the networks declare them.

    Args:
      config: of the network.
      **kwargs: of `VLlama2`, such as `scan_layers`.

    Raises:
      ValueError: listing parameters without names.
    """
    boxes, _ = jax.tree_util.tree_flatten_with_path(
        named_params(config, **kwargs), is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    named, nameless = {}, []
    for keys, box in boxes:
        path = "/".join(key.key for key in keys)
        if not isinstance(box, nn.LogicallyPartitioned) or None in box.names:
            nameless.append(path)
        else:
            named[path] = box.names
    if nameless:
        raise ValueError(
            f"these parameters have no names for their axes: {', '.join(nameless)}; give them some "
            "with nn.with_logical_partitioning"
        )
    return named


def leaf_axes(path: str, named: Mapping[str, tuple[str, ...]]) -> tuple[str | None, ...]:
    """Names of the axes of a leaf as a run holds it, with adapters and quantised kernels.

    Args:
      path: of the leaf.
      named: of `param_axes`.

    Raises:
      ValueError: for a path that is neither a parameter's nor beside one.
    """
    kernel = kernel_path(path)
    if kernel not in named:
        raise ValueError(f"{path}: no parameter of this network, so nothing says how it is split")
    names = named[kernel]
    if path == kernel:
        return names
    leading, inputs = kernel_axes(kernel)
    stack, into, out = names[:leading], names[leading : leading + inputs], names[leading + inputs :]
    part = path.removeprefix(kernel)
    return {
        LORA_A: (*stack, *into, "lora_rank"),
        LORA_B: (*stack, "lora_rank", *out),
        LORA_SCALE: stack,
    }.get(part, _of_codes(part, stack, into, out))


def _of_codes(part: str, stack, into, out) -> tuple[str | None, ...]:
    """Names of a quantised kernel's parts: heads and their dimensions are one axis there."""
    first_in, first_out = into[0], out[0]
    return {
        "_int8": (*stack, first_in, first_out),
        "_int8_scale": (*stack, first_out),
        "_nf4": (*stack, first_in, None, first_out),
        "_nf4_absmax": (*stack, first_in, first_out),
    }.get(part, stack)


def shardings(
    layout: Layout, leaves: Mapping[str, jax.ShapeDtypeStruct], named: Mapping[str, tuple[str, ...]]
) -> dict[str, NamedSharding]:
    """Where each leaf of a flat dict lies.

    Args:
      layout: the mesh and its rules.
      leaves: {path: array or shape}.
      named: of `param_axes`.
    """
    return {
        path: layout.sharding(leaf_axes(path, named)[: len(leaf.shape)], leaf.shape)
        for path, leaf in leaves.items()
    }


def param_shardings(
    layout: Layout | None, config: VLlama2Config, leaves: Mapping, **kwargs
) -> dict[str, NamedSharding | None]:
    """Where each parameter of a network lies; None for each without a layout.

    Args:
      layout: the mesh and its rules.
      config: of the network.
      leaves: {path: array or shape} of parameters of it, all or some.
      **kwargs: of `param_axes`.
    """
    if layout is None:
        return dict.fromkeys(leaves)
    return shardings(layout, leaves, param_axes(config, **kwargs))


def whole(layout: Layout) -> NamedSharding:
    """Where an array lies that every device holds whole."""
    return NamedSharding(layout.mesh, PartitionSpec())


def optimizer_shardings(
    layout: Layout, optimizer: optax.GradientTransformation, trainable: Mapping
) -> optax.OptState:
    """Where an optimizer's state lies: what it keeps of a parameter, where that lies.

    Args:
      layout: the mesh and its rules.
      optimizer: whose state it is.
      trainable: {path: `jax.ShapeDtypeStruct` with its sharding}.
    """
    state = jax.eval_shape(optimizer.init, dict(trainable))
    return optax.tree.map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        state,
        dict(trainable),
        transform_non_params=lambda _: whole(layout),
    )


def batch_shardings(layout: Layout, batch: Batch) -> Batch:
    """Where a batch's arrays lie, field by field; None where the batch has none.

    Args:
      layout: the mesh and its rules.
      batch: arrays or shapes, of all hosts together.
    """
    return Batch(
        **{
            name: None if array is None else layout.sharding(names, array.shape)
            for name, names in BATCH_AXES.items()
            for array in [getattr(batch, name)]
        }
    )
