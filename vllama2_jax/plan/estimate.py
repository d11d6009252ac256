"""What a step takes by formulas alone: where nothing can be compiled, or to choose what shall be.

Arguments are counted exactly. The rest is a sum of what is surely there at once; how far that is
from compiled programs, docs/results/plan.md tells.
"""

import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import DecoderConfig, VLlama2Config
from vllama2_jax.parallel.collectives import Collective, Communication
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.mesh import abstract_layout
from vllama2_jax.parallel.topology import Topology
from vllama2_jax.plan.program import (
    Arguments,
    Shape,
    abstract_arguments,
    check_slices,
    network_of,
)
from vllama2_jax.plan.records import Records
from vllama2_jax.plan.result import Memory, Plan
from vllama2_jax.plan.stage import largest_batch, stage_or_none
from vllama2_jax.plan.work import (
    assumed,
    bytes_here,
    flops_of,
    is_expert,
    learning_parts,
    parameters_of,
    roofline_of,
    runs,
    saved_width,
    slots_of,
    width_of,
)
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.run_step import check_rows


def estimate(
    config: TrainConfig,
    topology: Topology,
    *,
    length: int | None = None,
    records: Records | None = None,
) -> Plan:
    """What a run's step takes on a topology, without compiling it.

    Args:
      config: of the run.
      topology: of `parallel.topology`.
      length: slots of a row; None takes the longest rows of the recipe.
      records: that it reads, where they are known.

    Raises:
      ValueError: if the run does not fit the topology's mesh.
    """
    network = network_of(config.start)
    shape = largest_batch(config, network, length, records)
    layout = abstract_layout(config.mesh, topology.num_chips)
    check_slices(config.mesh, topology)
    check_network(config.mesh, layout, network, (shape.length,))
    check_rows(config, layout)
    arguments = abstract_arguments(config, network, shape, layout)
    of_step = (config, network, shape, arguments, layout)
    step = _Step(*of_step)
    sent = tuple(step.collectives())
    return Plan(
        config=config,
        network=network,
        shape=shape,
        topology=topology,
        layout=config.mesh.layout,
        mesh=dict(layout.mesh.shape),
        parameters=parameters_of(network, arguments.state.trainable),
        dtype=config.dtype,
        memory=Memory(
            bytes_here(arguments[:3]), round(sum(step.temporaries())), topology.chip.hbm_bytes
        ),
        flops=flops_of(config, network, shape, arguments),
        stage=stage_or_none(config),
        sent=Communication(sent, {}, ()),
        roofline=roofline_of(*of_step, Placement.in_order(topology), sent),
        estimated=True,
    )


class _Step:
    """A step's sizes, per chip and micro-batch where not said otherwise."""

    def __init__(
        self,
        config: TrainConfig,
        network: VLlama2Config,
        shape: Shape,
        arguments: Arguments,
        layout: Layout,
    ):
        """Of the same things that `estimate` puts together."""
        self.config, self.network, self.shape = config, network, shape
        self.arguments, self.layout = arguments, layout
        self.width = width_of(config)
        self.slots = slots_of(shape, layout) / config.micro_batches
        self.learning = learning_parts(arguments)

    def temporaries(self) -> Iterator[float]:
        """Bytes of everything that is there at once."""
        trainable = self.arguments.state.trainable
        here = bytes_here(trainable)
        masters = next(iter(trainable.values())).dtype.itemsize
        narrow = here * self.width / masters
        yield narrow if masters > self.width else 0
        yield here * 4 / masters if self.config.micro_batches > 1 else narrow
        yield self._decoder()
        yield self._head()
        yield self._towers()

    def _decoder(self) -> float:
        c = self.network.decoder
        if not self.learning:
            return 0
        saved = self.slots * saved_width(c, self.config.remat) * self.width
        parts = self.layout.size("mlp")
        rows = self.slots * (c.top_k if c.num_experts else 1)
        within = rows * (6 * c.mlp_dim / parts + 3 * c.width) + self.slots * 8 * c.width
        weights = sum(_layer_params(c).values()) / parts / self.layout.size("expert")
        largest = max(_layer_params(c).values()) / parts / self.layout.size("expert")
        return saved + (within + weights + 2 * largest) * self.width

    def _head(self) -> float:
        c = self.network.decoder
        whole = c.width * c.vocab_size / self.layout.size("vocab")
        chunk = min(self.config.loss.chunk or self.shape.length, self.shape.length)
        logits = self.slots / self.shape.length * chunk * c.vocab_size / self.layout.size("vocab")
        # Its gradient adds up in float32, chunk by chunk.
        gradient = 4 if "decoder" in self.learning else 0
        return whole * (4 + gradient + self.width) + logits * (4 + self.width)

    def _towers(self) -> float:
        """Of the tower with the most; they run one after the other."""
        frames = self.shape.rows * self.shape.frames / self.config.micro_batches
        clips = self.shape.rows * self.shape.clips / self.config.micro_batches
        most = [0.0]
        if frames:
            most.append(self._tower("vision", frames / self.layout.size("images")))
            tokens = self.network.num_frames * self.network.vision.grid**2
            learns = "connector" in self.learning
            here = clips / self.layout.size("clips") * tokens * self.network.decoder.width
            most[-1] += here * self.width * (8 if learns else 3)
            # Its kernels are gathered once for both passes.
            most[-1] += self._params("connector") * self.width * learns
        if self.shape.sounds:
            sounds = self.shape.rows * self.shape.sounds / self.config.micro_batches
            most.append(self._tower("audio", sounds / self.layout.size("images")))
        return max(most)

    def _params(self, part: str) -> int:
        leaves = {**self.arguments.frozen, **self.arguments.state.trainable}
        return sum(leaf.size for path, leaf in leaves.items() if path.split("/", 1)[0] == part)

    def _tower(self, name: str, inputs: float) -> float:
        tower = getattr(self.network, name)
        tokens = inputs * (tower.grid**2 if name == "vision" else self.network.num_sound_tokens)
        saved = tower.num_layers * tower.width if name in self.learning else 0
        return tokens * (saved + 6 * tower.width + 2 * tower.mlp_dim) * self.width

    def collectives(self) -> Iterator[Collective]:
        """What every chip sends in a step."""
        for path, leaf in {**self.arguments.frozen, **self.arguments.state.trainable}.items():
            part = path.split("/", 1)[0]
            if runs(part, self.shape):
                yield from self._of_parameter(path, part, leaf)
        yield from self._of_activations()

    def _of_parameter(self, path, part, leaf) -> Iterator[Collective]:
        taken = {*self.layout.axes("batch"), *self.layout.axes("length")}
        if is_expert(path):  # which stay where they lie
            taken -= {*self.layout.axes("expert")}
        axes = tuple(a for a in _axes_of(leaf) if a in taken and self.layout.mesh.shape[a] > 1)
        kept = math.prod(
            self.layout.mesh.shape[axis] for axis in _axes_of(leaf) if axis not in taken
        )
        layers, shape = (1, leaf.shape)
        if "/layers/" in path or "/blocks/" in path:  # which are gathered one by one
            layers, shape = leaf.shape[0], leaf.shape[1:]
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)  # others are a quantised kernel's codes
        dtype = jnp.dtype(self.config.dtype) if floating else leaf.dtype
        whole = math.prod(shape) * dtype.itemsize / kept
        times = self.config.micro_batches * layers
        trains = path in self.arguments.state.trainable
        through = trains or (part == "decoder" and self.learning)
        layered = "/layers/" in path
        passes = 2 if through and layered and self.config.remat == "full" else 1
        if axes:
            name = f"{dtype.name}[{','.join(map(str, shape))}]"
            yield self._collective("all-gather", axes, whole, passes * times, True, name)
            if trains:
                parts = math.prod(self.layout.mesh.shape[axis] for axis in axes)
                yield self._collective("reduce-scatter", axes, whole / parts, times)
        rest = tuple(a for a in taken - {*axes} if self.layout.mesh.shape[a] > 1)
        if trains and rest:
            left = whole / math.prod(self.layout.mesh.shape[axis] for axis in axes)
            yield self._collective("all-reduce", rest, left, times)

    def _of_activations(self) -> Iterator[Collective]:
        c, times = self.network.decoder, self.config.micro_batches
        again = self.config.remat == "full" and bool(self.learning)
        backward = bool(self.learning)
        of_rows = self.slots * c.width * self.width
        turns = c.num_layers * times
        if self.layout.axes("mlp"):
            # Behind attention and the MLP; in front of both on the way back.
            sums = 2 + again + 2 * backward
            yield self._collective("all-reduce", self.layout.axes("mlp"), of_rows, sums * turns)
        if c.num_experts and self.layout.axes("expert"):
            parts = self.layout.size("expert")
            passes = 1 + again + backward
            axes = self.layout.axes("expert")
            yield self._collective("all-gather", axes, of_rows * parts, passes * turns)
            yield self._collective("reduce-scatter", axes, of_rows, passes * turns)
        if self.layout.axes("length"):
            parts = self.layout.size("length")
            keys = 2 * self.slots * parts * c.num_kv_heads * c.head_dim * self.width
            passes = 1 + again + backward
            yield self._collective("all-gather", self.layout.axes("length"), keys, passes * turns)

    def _collective(self, kind, axes, size, count, hidden=False, shape="") -> Collective:
        return assumed(self.layout, kind, axes, size, count, hidden, shape)


def _layer_params(c: DecoderConfig) -> dict[str, int]:
    """Parameters of the large kernels of one layer."""
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    mlp = c.width * c.mlp_dim * max(1, c.num_experts)
    return {"attention": c.width * heads, "gate": mlp, "up": mlp, "down": mlp}


def _axes_of(leaf) -> Iterable[str]:
    for entry in leaf.sharding.spec:
        yield from (entry,) if isinstance(entry, str) else entry or ()
