"""Trains small networks on one device and on eight simulated ones, and prints how they differ.

Run by `test_same_numbers.py` in a process of its own, since the number of devices is fixed when JAX
starts. Prints one JSON object, {"network, mesh": {"loss": ..., "gradients": {...}, "parameters"}}.
"""

import dataclasses
import functools
import json
import os
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.miniature import HEARING, MINIATURE
from vllama2_jax.models.vllama2 import Batch, VLlama2, init_params
from vllama2_jax.models.zoo import connector_config
from vllama2_jax.parallel.backends import network_options
from vllama2_jax.parallel.mesh import MeshConfig, make_layout
from vllama2_jax.parallel.sharding import (
    batch_shardings,
    optimizer_shardings,
    param_axes,
    shardings,
)
from vllama2_jax.train.loss import LossConfig, batch_loss
from vllama2_jax.train.step import TrainState, init_state, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, partition

LENGTH, STEPS = 96, 5

_WIDE = dict(width=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64)


def networks():
    """CLIP + stc + Mixtral, and SigLIP + v35 + Qwen2 + BEATs."""
    tower = dataclasses.replace(MINIATURE.vision, width=16, num_heads=4)
    clip = dataclasses.replace(
        tower, class_token=True, pre_norm=True, patch_bias=False, activation="quick_gelu"
    )
    mixtral = dataclasses.replace(
        MINIATURE.decoder, family="mixtral", qkv_bias=False, num_experts=8, top_k=2, **_WIDE
    )
    yield dataclasses.replace(
        MINIATURE,
        name="mixtral",
        vision=clip,
        connector=connector_config("stc_connector", 16, 32, depth=1),
        decoder=mixtral,
    )
    decoder = dataclasses.replace(MINIATURE.decoder, **_WIDE)
    yield dataclasses.replace(
        HEARING,
        name="qwen2",
        vision=tower,
        connector=connector_config("stc_connector_v35", 16, 32, depth=1),
        decoder=decoder,
        audio=dataclasses.replace(HEARING.audio, width=16, num_heads=4),
        audio_connector=dataclasses.replace(HEARING.audio_connector, in_dim=16, out_dim=32),
    )


KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, *_: (updates, updates)
)

MESHES = {
    "fsdp 8": MeshConfig(),
    "data 2, fsdp 4": MeshConfig(data=2),
    "fsdp 4, tensor 2": MeshConfig(layout="fsdp+tensor", tensor=2),
    "fsdp 2, expert 4": MeshConfig(layout="fsdp+expert", expert=4),
    "fsdp 4, sequence 2": MeshConfig(sequence=2),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(layout="fsdp+tensor", sequence=2, tensor=2),
    "fsdp 4, sequence 2, half the rows": MeshConfig(sequence=2),
    "fsdp 4, two slices": MeshConfig(dcn_data=2),
    "fsdp 2, expert 4, all to all": MeshConfig(
        layout="fsdp+expert", expert=4, expert_exchange="all_to_all"
    ),
}


def rows_of(name: str) -> int:
    """Of a batch; half as many are fewer clips than devices."""
    return 4 if name.endswith("half the rows") else 8


def make_batch(config, num_rows=8, seed=0) -> Batch:
    """Rows of two samples, some with a clip, some with a sound, all with padding."""
    rng = np.random.default_rng(seed)
    slots = (num_rows, LENGTH)
    media = config.num_media_tokens()
    sound = config.num_sound_tokens
    segments, positions = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    index = np.full(slots, -1, np.int32)
    for row in range(num_rows):
        first = 8 + media + row % 3
        last = first + 8 + sound + row % 4
        segments[row, :first], segments[row, first:last] = 1, 2
        positions[row, :first], positions[row, first:last] = (
            np.arange(first),
            np.arange(last - first),
        )
        if row % 4 != 3:
            index[row, 1 : 1 + media] = np.arange(media)
        if sound and row % 2:
            index[row, first + 1 : first + 1 + sound] = media + np.arange(sound)
    weights = (segments > 0) & (index < 0) & (rng.random(slots) < 0.7)
    frames, size = config.num_frames, config.vision.image_size
    heard = {}
    if config.audio:
        heard = {
            "audio": rng.normal(-8, 3, (num_rows, 1, config.audio.num_frames, 128)).astype(
                np.float32
            ),
            "audio_mask": np.arange(num_rows)[:, None] % 2 == 1,
            "audio_keep": rng.random((num_rows, config.audio.num_layers)) < 0.8,
        }
    return Batch(
        tokens=rng.integers(0, config.decoder.vocab_size, slots, np.int32),
        positions=positions,
        segment_ids=segments,
        media_index=index,
        frames=rng.integers(0, 256, (num_rows, frames, size, size, 3), np.uint8),
        clip_frames=np.tile(np.arange(frames, dtype=np.int32), (num_rows, 1, 1)),
        clip_mask=(np.arange(num_rows) % 4 != 3)[:, None],
        targets=rng.integers(0, config.decoder.vocab_size, slots, np.int32),
        target_weights=weights.astype(np.float32),
        dataset_ids=(np.arange(num_rows, dtype=np.int32)[:, None] + np.zeros(slots, np.int32)) % 2,
        **heard,
    )


def results(config, mesh: MeshConfig | None, num_rows: int):
    """Loss, gradients and, behind steps of plain SGD, parameters; without a mesh on one device."""
    params = nn.meta.unbox(init_params(config, jax.random.key(0)))
    # Larger than usual, so that no gradient drowns in rounding.
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)
    rules = (Rule("vision/.*", "freeze"), Rule(".*", "train"))
    trainable, frozen = partition(params, assign_rules(rules, params))
    batch = make_batch(config, num_rows)
    layout = mesh and make_layout(mesh, jax.devices())
    loss = functools.partial(
        batch_loss,
        VLlama2(config, remat="full", **network_options(config, layout)),
        config=LossConfig(
            chunk=8, z_loss=1e-3, load_balancing=0.02 * bool(config.decoder.num_experts)
        ),
        datasets=("a", "b"),
    )
    optimizer, placed = optax.chain(KEEP_GRADIENTS, optax.sgd(0.05)), None
    state = init_state(trainable, optimizer)
    if layout:
        named = param_axes(config)
        placed = shardings(layout, trainable, named)
        split = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[p])
            for p, x in trainable.items()
        }
        where = TrainState(
            jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec()),
            placed,
            optimizer_shardings(layout, optimizer, split),
        )
        state = jax.device_put(state, where)
        frozen = jax.device_put(frozen, shardings(layout, frozen, named))
        batch = jax.device_put(batch, batch_shardings(layout, batch))
        placed = where

    step = make_step(loss, optimizer, layout=layout, shardings=placed)
    state, metrics = step(state, frozen, batch)
    first = jax.device_get((metrics["loss"], state.optimizer[0]))
    for _ in range(STEPS - 1):
        state, _ = step(state, frozen, batch)
    if layout:
        for path, leaf in state.trainable.items():
            assert leaf.sharding == placed.trainable[path], path
    return *first, jax.device_get(state.trainable)


def relative(found, wanted) -> float:
    """The largest difference, relative to the largest number."""
    scale = max(float(np.abs(wanted).max()), 1e-6)
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max()) / scale


def main():
    differences, wanted = {}, sys.argv[1:]
    for config in networks():
        if wanted and not any(case.startswith(config.name) for case in wanted):
            continue
        of_one = functools.cache(functools.partial(results, config, None))
        for name, mesh in MESHES.items():
            if mesh.expert > 1 and not config.decoder.num_experts:
                continue
            if wanted and f"{config.name}, {name}" not in wanted:
                continue
            found = results(config, mesh, rows_of(name))
            loss, gradients, parameters = of_one(rows_of(name))
            differences[f"{config.name}, {name}"] = {
                "loss": abs(float(found[0]) - float(loss)),
                "gradients": {p: relative(found[1][p], g) for p, g in gradients.items()},
                "parameters": {p: relative(found[2][p], x) for p, x in parameters.items()},
            }
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
