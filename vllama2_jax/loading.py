"""Load any model, ready to be asked."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.store import float_dtype
from vllama2_jax.infer.model import Model
from vllama2_jax.media.preset import MediaPreset
from vllama2_jax.parallel.fitting import check_network
from vllama2_jax.parallel.mesh import make_layout, parse_mesh
from vllama2_jax.text import load_tokenizer
from vllama2_jax.weights import describe, find, read


def load(
    source: str | Path,
    dtype: str | jnp.dtype | None = None,
    preset: str | MediaPreset | None = None,
    mesh: str | jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a model.

    Args:
      source: "tiny" (embedded in the package), a directory (released Hugging Face layout, a saved
        model of ours, or a training run), a published name ("2-8x7B", "VideoLLaMA2-8x7B") or a
        Hugging Face repository id.
      dtype: of parameters and activations; by default float32 on CPU and bfloat16 elsewhere.
        float32 is multiplied in full precision on every platform.
      preset: "reference" or "paper", how media are read; the checkpoint's own by default.
      mesh: how the parameters are split over all devices, in words as `vllama2 train --mesh` takes
        them ("fsdp+tensor:tensor=-1,fsdp=1"), or a mesh of one device to place them on; the default
        device otherwise.
      progress: called with (tensors read, tensors in all) while importing.

    Raises:
      CheckpointError: if the model cannot be found or trusted, naming everything that is wrong.
      ValueError: for another dtype or preset, or a mesh that the devices cannot form or that does
        not divide the model.
    """
    split = parse_mesh(mesh) if isinstance(mesh, str) else None
    layout = make_layout(split, jax.devices()) if split else None
    if layout:
        device = jax.devices()[0]
    else:
        device = jax.devices()[0] if mesh is None else _only_device(mesh)
    if dtype is None:
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    dtype = float_dtype(dtype)
    folder = find(source)
    if layout:
        check_network(split, layout, describe(folder)[0].config)
    # Few tokens at a time meet few experts; on CPU those are read from arrays of their own.
    split_experts = device.platform == "cpu" and layout is None
    with jax.default_device(device):
        params, card, tokenizer_folder = read(
            folder,
            dtype,
            scan_layers=False,
            split_experts=split_experts,
            layout=layout,
            progress=progress,
        )
    if mesh is not None and layout is None:
        params = jax.device_put(params, device)
    tokenizer = load_tokenizer(tokenizer_folder)
    if card.tokenizer and tokenizer.fingerprint() != card.tokenizer:
        raise CheckpointError(
            f"{tokenizer_folder}: these are not the tokenizer files that the model was saved "
            "with; restore them, or convert the model again"
        )
    return Model(params, card.with_preset(preset), tokenizer, dtype, split_experts, layout)


def _only_device(mesh: jax.sharding.Mesh):
    if mesh.size != 1:
        raise ValueError(
            f"the mesh has {mesh.size} devices; say in words how several are used, as in "
            "mesh='fsdp+tensor:tensor=-1,fsdp=1'"
        )
    return mesh.devices.item()
