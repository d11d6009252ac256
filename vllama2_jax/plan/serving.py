"""What answering takes on devices that need not be here: a prompt's program, and a new token's."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vllama2_jax.infer.buckets import bucket
from vllama2_jax.infer.generate import STOP_SLOTS, room_for
from vllama2_jax.infer.programs import Programs, Prompt
from vllama2_jax.infer.sampling import Sampler, Sampling
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.parallel.collectives import Communication
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.mesh import MeshConfig, make_layout
from vllama2_jax.parallel.roofline import Roofline, roofline
from vllama2_jax.parallel.sharding import param_shardings, whole
from vllama2_jax.parallel.topology import Topology, devices
from vllama2_jax.plan.planning import memory_of, refusal_of, sent_by
from vllama2_jax.plan.program import check_slices
from vllama2_jax.plan.result import Memory
from vllama2_jax.plan.serving_result import Serving, ServingPlan
from vllama2_jax.plan.serving_work import serving_bytes, serving_flops
from vllama2_jax.plan.work import bytes_here, chip_flops, parameters_of, shares

PROGRAMS = ("prefill", "decode")
_TEXT = 128  # slots of a prompt beside its media, where nobody says how many


def serving_of(
    network: VLlama2Config, program: str, rows: int, length: int | None, new_tokens: int
) -> Serving:
    """What is planned, with the length of a prompt about one clip where none is given.

    Raises:
      ValueError: for numbers below 1.
    """
    least = {"--batch": rows, "--length": 1 if length is None else length, "--new": new_tokens}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if length is None:
        length = network.num_media_tokens() + network.num_sound_tokens + _TEXT
    return Serving(program, rows, bucket(length), room_for(new_tokens))


class Answering:
    """A program of inference laid out over a mesh, and the shapes of all that it takes.

    Attributes:
      network, serving, topology, layout: what is planned.
      programs: of inference.
      params: {part: tree of shapes} that know where they lie.
      cache: `KVCache` of such.
      arguments: of the program.
    """

    def __init__(
        self,
        network: VLlama2Config,
        serving: Serving,
        topology: Topology,
        layout: Layout,
        dtype: str,
    ):
        """Of the same things that `plan_serving` takes."""
        self.network, self.serving, self.topology = network, serving, topology
        self.layout = layout
        self.programs = Programs(network, jnp.dtype(dtype), layout=layout)
        self.params = _abstract_params(network, layout, self.programs.dtype)
        self.cache = self.programs.abstract_cache(serving.rows, serving.capacity)
        self.arguments = (self.params, *_arguments(self.programs, serving, self.cache))

    def compile(self) -> jax.stages.Compiled:
        """The program, for the layout's devices."""
        return getattr(self.programs, self.serving.program).lower(*self.arguments).compile()

    def found(self, layout_name: str, memory: Memory, **found) -> ServingPlan:
        """A plan of it.

        Args:
          layout_name: of the mesh's configuration.
          memory: of the program; the towers' parameters, which it does not take, come on top.
          **found: further fields of `ServingPlan`.
        """
        entries = (self.cache.keys, self.cache.values)
        beside = bytes_here(self.params) - bytes_here(self.params["decoder"])
        return ServingPlan(
            serving=self.serving,
            network=self.network,
            topology=self.topology,
            layout=layout_name,
            mesh=dict(self.layout.mesh.shape),
            parameters=parameters_of(self.network),
            dtype=self.programs.dtype.name,
            cache=(
                bytes_here(entries),
                sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(entries)),
            ),
            flops=serving_flops(self.network, self.serving, self.layout),
            memory=dataclasses.replace(memory, arguments=memory.arguments + beside),
            **found,
        )

    def roofline(self, placement: Placement, sent: Communication) -> Roofline | None:
        """How long a run of the program takes; None on chips without a stated peak."""
        network, serving, layout = self.network, self.serving, self.layout
        dtype = self.programs.dtype.name
        if self.topology.chip.peak_flops(dtype) is None:
            return None
        flops = serving_flops(network, serving, layout)
        return roofline(
            placement,
            model_flops=flops.model,
            chip_flops=chip_flops(flops, shares(layout, serving.rows)),
            hbm_bytes=serving_bytes(network, serving, layout, self.params, self.cache, sent),
            collectives=sent.collectives,
            dtype=dtype,
        )


def plan_serving(
    network: VLlama2Config,
    serving: Serving,
    mesh: MeshConfig,
    topology: Topology,
    *,
    dtype: str = "bfloat16",
    save_hlo: str | Path | None = None,
) -> ServingPlan:
    """Compile a program of inference for a topology, and read off what it takes.

    Args:
      network: that answers.
      serving: what is planned.
      mesh: how it is laid out.
      topology: of `parallel.topology`.
      dtype: of parameters, activations and the cache.
      save_hlo: a file for the compiled program's text.

    Raises:
      ValueError: if mesh and devices do not fit, or nothing can compile for them.
    """
    check_slices(mesh, topology)
    layout = make_layout(mesh, devices(topology))
    check_network(mesh, layout, network)
    answering = Answering(network, serving, topology, layout, dtype)
    began = time.perf_counter()
    try:
        compiled = answering.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_here((answering.params["decoder"], *answering.arguments[1:]))
        memory = Memory(needed, None, topology.chip.hbm_bytes)
        return answering.found(mesh.layout, memory, refusal=refusal_of(error))
    seconds, text = time.perf_counter() - began, compiled.as_text()
    if save_hlo:
        Path(save_hlo).write_text(text, encoding="utf-8")
    sent, found = sent_by(text, mesh, layout), None
    if topology.platform == "tpu":  # of other devices nothing says where they lie
        found = answering.roofline(Placement.of_devices(topology, layout.mesh.devices), sent)
    return answering.found(
        mesh.layout,
        memory_of(compiled, topology),
        compile_seconds=seconds,
        sent=sent,
        roofline=found,
        hlo=str(save_hlo) if save_hlo else None,
    )


def _abstract_params(network: VLlama2Config, layout: Layout, dtype) -> dict:
    flat = flatten_dict(abstract_params(network, scan_layers=False), sep="/")
    where = param_shardings(layout, network, flat, scan_layers=False)
    return unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where[path])
            for path, leaf in flat.items()
        },
        sep="/",
    )


def _arguments(programs: Programs, serving: Serving, cache) -> tuple:
    """Shapes of what a program takes beside the parameters."""
    network, layout, rows = programs.config, programs.layout, serving.rows

    def array(kind, *sizes):
        return jax.ShapeDtypeStruct(sizes, kind, sharding=whole(layout))

    if serving.program == "prefill":
        prompt = Prompt(*(array(jnp.int32, rows, serving.length) for _ in range(4)))
        media = network.num_media_tokens() + network.num_sound_tokens
        return prompt, array(programs.dtype, rows, media, network.decoder.width), cache
    sampler, stops = Sampler.create(Sampling()), array(jnp.int32, STOP_SLOTS)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    logits = array(jnp.float32, rows, network.decoder.vocab_size)
    state = jax.eval_shape(
        lambda *known: programs.start(*known, room=serving.room),
        *(logits, cache, array(jnp.int32, rows), keys, sampler, stops),
    )
    state = jax.tree.map(lambda leaf: array(leaf.dtype, *leaf.shape), state)
    return state.replace(cache=cache), sampler, stops, array(jnp.int32)
