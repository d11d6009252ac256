"""What answering takes by formulas alone, such as on GPUs that are not here."""

from collections.abc import Iterator

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.parallel.collectives import Collective, Communication
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.mesh import MeshConfig, abstract_layout
from vllama2_jax.parallel.topology import Topology
from vllama2_jax.plan.program import check_slices
from vllama2_jax.plan.result import Memory
from vllama2_jax.plan.serving import Answering
from vllama2_jax.plan.serving_result import Serving, ServingPlan
from vllama2_jax.plan.work import assumed, bytes_here


def estimate_serving(
    network: VLlama2Config,
    serving: Serving,
    mesh: MeshConfig,
    topology: Topology,
    *,
    dtype: str = "bfloat16",
) -> ServingPlan:
    """What a program of inference takes on a topology, without compiling it.

    Args:
      network, serving, mesh, topology, dtype: as of `plan_serving`.

    Raises:
      ValueError: if the mesh does not fit the topology.
    """
    check_slices(mesh, topology)
    layout = abstract_layout(mesh, topology.num_chips)
    check_network(mesh, layout, network)
    answering = Answering(network, serving, topology, layout, dtype)
    width = answering.programs.dtype.itemsize
    sent = Communication(tuple(_collectives(network, serving, layout, width)), {}, ())
    needed = bytes_here((answering.params["decoder"], *answering.arguments[1:]))
    temporaries = round(_temporaries(network, serving, layout, width))
    if serving.program == "decode":  # whose loop holds a second one, as programs for TPUs do
        temporaries += bytes_here((answering.cache.keys, answering.cache.values))
    return answering.found(
        mesh.layout,
        Memory(needed, temporaries, topology.chip.hbm_bytes),
        sent=sent,
        roofline=answering.roofline(Placement.in_order(topology), sent),
        estimated=True,
    )


def _slots(serving: Serving, layout: Layout) -> float:
    """That a run of the program computes on each chip."""
    rows = serving.rows / layout.size("batch") if serving.rows >= layout.size("batch") else 1
    return rows * (serving.length if serving.program == "prefill" else 1)


def _layer(network: VLlama2Config, layout: Layout) -> tuple[int, float]:
    """Parameters of attention and of the MLP of a layer, of a chip that has gathered them."""
    c = network.decoder
    attention = c.width * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    mlp = 3 * c.width * c.mlp_dim * max(1, c.num_experts) / layout.size("expert")
    return attention // layout.size("mlp"), mlp / layout.size("mlp")


def _temporaries(network, serving, layout, width) -> float:
    """Bytes of a layer's activations and gathered weights, and of the logits."""
    c, slots = network.decoder, _slots(serving, layout)
    rows = slots * (c.top_k if c.num_experts else 1)
    mlp = rows * 3 * c.mlp_dim / layout.size("mlp") * width
    scores = slots * c.num_heads / layout.size("mlp") * serving.capacity * 4
    within = slots * 8 * c.width * width + max(mlp, scores)
    weights = 0 if layout.axes("act_embed") else sum(_layer(network, layout))
    logits = serving.rows * c.vocab_size / layout.size("vocab")
    return within + weights * bool(layout.axes("embed")) * width + logits * (4 + width)


def _collectives(network, serving, layout, width) -> Iterator[Collective]:
    c, slots = network.decoder, _slots(serving, layout)
    of_rows = slots * c.width * width
    split, stream = layout.axes("mlp"), layout.axes("act_embed")
    if split:  # behind attention and the MLP
        size = of_rows / layout.size("act_embed")
        yield assumed(layout, "all-reduce", split, size, 2 * c.num_layers)
    if (
        stream
    ):  # behind queries, keys and values, gate and up: sums over the residual stream's parts
        heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        wide = 2 * c.mlp_dim * (c.top_k if c.num_experts else 1)
        size = slots * (heads + wide) / layout.size("mlp") * width
        yield assumed(layout, "all-reduce", stream, size, c.num_layers)
    elif layout.axes("embed"):
        size = sum(_layer(network, layout)) * width
        yield assumed(layout, "all-gather", layout.axes("embed"), size, c.num_layers, True)
    if c.num_experts and layout.axes("expert"):
        axes, size = layout.axes("expert"), of_rows * layout.size("expert")
        yield assumed(layout, "all-gather", axes, size, c.num_layers)
        yield assumed(layout, "reduce-scatter", axes, of_rows, c.num_layers)
