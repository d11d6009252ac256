"""Asks `tiny` on one device and, laid out in several ways, on eight simulated ones.

Run by `test_sharded_generation.py` in a process of its own, since the number of devices is fixed
when JAX starts. Prints one JSON object, {mesh: {"alone" and "together": whether answers
are the same, "logits": how they differ, "share": of the parameters' bytes that a device holds}}.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from vllama2_jax.loading import load

QUESTIONS = ("Which way does it move?", "What colour is it?", "What do you see?")


def clips() -> list[np.ndarray]:
    """Three clips of eight frames, in which a square moves."""
    found = []
    for number in range(3):
        frames = np.full((8, 64, 64, 3), 40 * number, np.uint8)
        for at, frame in enumerate(frames):
            frame[20:36, 4 + 5 * at : 20 + 5 * at, number] = 255
        found.append(frames)
    return found


def bytes_of(params, device) -> int:
    """Of parameters on a device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def told(mesh: str | None) -> dict:
    """What a model says, alone and eight pairs at a time, and how much of it a device holds."""
    model = load("tiny", dtype="float32", mesh=mesh)
    pairs = list(zip(clips(), QUESTIONS, strict=True))
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    return {
        "alone": [model.generate(c, messages, 12, stop=False) for c, _ in pairs],
        "together": model.ask_batch(pairs * 3, max_new_tokens=8),
        "logits": model.logits(clips()[0], messages),
        "bytes": bytes_of(model.generator.params, jax.devices()[0]),
    }


def main(meshes: list[str]) -> None:
    """Compare and print."""
    expected, found = told(None), {}
    for mesh in meshes:
        got = told(mesh)
        scale = np.abs(expected["logits"]).max()
        found[mesh] = {
            "alone": got["alone"] == expected["alone"],
            "together": got["together"] == expected["together"],
            "logits": float(np.abs(got["logits"] - expected["logits"]).max() / scale),
            "share": got["bytes"] / expected["bytes"],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
