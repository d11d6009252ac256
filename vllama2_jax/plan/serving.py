"""What answering takes on devices that need not be here: a prompt's program, and a new token's."""

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
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.mesh import MeshConfig, make_layout
from vllama2_jax.parallel.roofline import roofline
from vllama2_jax.parallel.sharding import param_shardings, whole
from vllama2_jax.parallel.topology import Topology, devices
from vllama2_jax.plan.planning import can_compile, memory_of, refusal_of, sent_by
from vllama2_jax.plan.program import check_slices
from vllama2_jax.plan.result import Memory
from vllama2_jax.plan.serving_result import Serving, ServingPlan
from vllama2_jax.plan.serving_work import serving_bytes, serving_flops
from vllama2_jax.plan.work import bytes_here

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
    if not can_compile(topology):
        raise ValueError(
            f"{topology.name}: no such GPUs are here, and programs of inference are compiled and "
            "not estimated; plan for a TPU slice, or run this where the GPUs are"
        )
    layout = make_layout(mesh, devices(topology))
    programs = Programs(network, jnp.dtype(dtype), layout=layout)
    params = _abstract_params(network, layout, programs.dtype)
    cache = programs.abstract_cache(serving.rows, serving.capacity)
    entries = (cache.keys, cache.values)
    in_all = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(entries))
    arguments = (params, *_arguments(programs, serving, cache))
    flops = serving_flops(network, serving, layout)
    asked = dict(
        serving=serving,
        network=network,
        topology=topology,
        layout=mesh.layout,
        mesh=dict(layout.mesh.shape),
        cache=(bytes_here(entries), in_all),
        flops=flops,
    )
    began = time.perf_counter()
    try:
        compiled = getattr(programs, serving.program).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        memory = Memory(bytes_here(arguments), None, topology.chip.hbm_bytes)
        return ServingPlan(**asked, memory=memory, refusal=refusal_of(error))
    seconds, text = time.perf_counter() - began, compiled.as_text()
    if save_hlo:
        Path(save_hlo).write_text(text, encoding="utf-8")
    sent, found = sent_by(text, mesh, layout), None
    if topology.platform == "tpu":
        found = roofline(
            Placement.of_devices(topology, layout.mesh.devices),
            model_flops=flops.model,
            hardware_flops=flops.hardware,
            hbm_bytes=serving_bytes(network, serving, layout, params, cache, sent),
            collectives=sent.collectives,
        )
    # The towers' parameters lie there too, though these programs do not take them.
    beside = bytes_here(params) - bytes_here(params["decoder"])
    memory = memory_of(compiled, topology)
    return ServingPlan(
        **asked,
        memory=Memory(memory.arguments + beside, memory.temporaries, memory.limit),
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
