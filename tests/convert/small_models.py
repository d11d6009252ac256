"""Models of ours with all kinds of parts and small sizes, for tests of the export.

A model is (parameters, card, its tokenizer's files), as `export_huggingface` takes them.
"""

import dataclasses
from pathlib import Path

import numpy as np
import oracle
from safetensors.torch import load_file

import vllama2_jax as vl
from vllama2_jax.checkpoints import GenerationDefaults, ModelCard, load_model
from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.media.preset import REFERENCE
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import ZOO, connector_config
from vllama2_jax.text import load_tokenizer, tokenizer_files

TINY = Path(vl.__file__).parent / "assets" / "tiny"


def tiny_model():
    """The shipped model."""
    params, card = load_model(TINY, lambda card: abstract_params(card.config), "float32")
    return params, card, tokenizer_files(TINY / "tokenizer")


def small_model(tokenizers, name, connector, depth=None):
    """Random weights in a published network's kinds of parts.

    Args:
      tokenizers: directory in which families' tokenizers are kept from one model to the next.
      name: of the published network.
      connector: its kind.
      depth: blocks per stage of the connector, the published number if None.
    """
    config = ZOO[name]
    sizes = dict(image_size=29, patch_size=7, width=24, mlp_dim=48, num_layers=4, num_heads=2)
    vision = dataclasses.replace(config.vision, **sizes)
    sizes = dict(vocab_size=400, width=40, mlp_dim=64, num_layers=3, max_positions=4096)
    heads = dict(num_heads=4, num_kv_heads=2, head_dim=10)
    config = dataclasses.replace(
        config,
        vision=vision,
        connector=connector_config(connector, 24, 40, depth),
        decoder=dataclasses.replace(config.decoder, **sizes, **heads),
        num_frames=4,
    )
    folder = tokenizers / config.decoder.family
    if not folder.exists():
        oracle.write_tokenizer(folder, config.decoder.family)
    tokenizer = load_tokenizer(folder)
    card = ModelCard(
        config=config,
        image=image_spec(vision),
        preset=REFERENCE,
        generation=GenerationDefaults((tokenizer.eos_id,), repetition_penalty=1.05, top_k=20),
        tokenizer=tokenizer.fingerprint(),
    )
    return _random_params(config), card, tokenizer_files(folder)


def _random_params(config):
    """Weights large enough that every part matters."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if path.endswith("/scale"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    shapes = flatten(abstract_params(config))
    return unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})


def tensors_of(folder):
    """name -> torch tensor, of all files of a checkpoint."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state
