"""The miniature network on what the pipeline makes."""

import dataclasses

import numpy as np
from feeding import NUM_FRAMES, SPEC
from miniature import MINIATURE

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.models.vllama2 import Batch, VLlama2, abstract_params
from vllama2_jax.train.loss import batch_loss

CONFIG = dataclasses.replace(
    MINIATURE,
    vision=dataclasses.replace(MINIATURE.vision, image_size=SPEC.size, patch_size=4),
    decoder=dataclasses.replace(MINIATURE.decoder, vocab_size=640),  # that of tiny's tokenizer
    num_frames=NUM_FRAMES,
)
FIELDS = {field.name for field in dataclasses.fields(Batch)}


def random_parts():
    """({path: parameter} that trains, the same that is frozen): all but the tower trains."""
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(0, 0.4, leaf.shape).astype(np.float32)
        for path, leaf in flatten(abstract_params(CONFIG)).items()
    }
    frozen = {path: leaf for path, leaf in params.items() if path.startswith("vision/")}
    return {path: params[path] for path in params.keys() - frozen.keys()}, frozen


def as_batch(arrays):
    """The `Batch` of a `HostBatch`'s arrays."""
    return Batch(**{name: value for name, value in arrays.items() if name in FIELDS})


def loss(params, batch):
    """The real loss."""
    return batch_loss(VLlama2(CONFIG), params, batch)
