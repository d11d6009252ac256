"""Find a model by any of its names and make it ready to be asked."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vllama2_jax.checkpoints import CheckpointError, ModelCard, is_saved_model, load_model
from vllama2_jax.checkpoints.card import read_card
from vllama2_jax.checkpoints.store import TOKENIZER, flatten, unflatten
from vllama2_jax.convert.hf_config import is_connector_only, model_from_json, read_json
from vllama2_jax.convert.huggingface import is_huggingface, load_huggingface, resolve
from vllama2_jax.infer.model import Model
from vllama2_jax.media.preset import MediaPreset
from vllama2_jax.models.stacking import unstacked_place
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import model_config
from vllama2_jax.text import ChatTemplate, Tokenizer, choose_template, load_tokenizer

TINY = Path(__file__).parent / "assets" / "tiny"
_HUB_OWNER = "DAMO-NLP-SG"
_BASE = "-Base"
_DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | Path,
    dtype: str | jnp.dtype | None = None,
    preset: str | MediaPreset | None = None,
    mesh: jax.sharding.Mesh | None = None,
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
      mesh: a mesh of one device to place the parameters on; the default device otherwise.
      progress: called with (tensors read, tensors in all) while importing.

    Raises:
      CheckpointError: if the model cannot be found or trusted, naming everything that is wrong.
      ValueError: for another dtype or preset, or a mesh of several devices.
    """
    device = jax.devices()[0] if mesh is None else _only_device(mesh)
    if dtype is None:
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    dtype = float_dtype(dtype)
    folder = find(source)
    # Few tokens at a time meet few experts; on CPU those are read from arrays of their own.
    split_experts = device.platform == "cpu"
    with jax.default_device(device):
        params, card, tokenizer_folder = read(
            folder, dtype, scan_layers=False, split_experts=split_experts, progress=progress
        )
    if mesh is not None:
        params = jax.device_put(params, device)
    tokenizer = load_tokenizer(tokenizer_folder)
    if card.tokenizer and tokenizer.fingerprint() != card.tokenizer:
        raise CheckpointError(
            f"{tokenizer_folder}: these are not the tokenizer files that the model was saved "
            "with; restore them, or convert the model again"
        )
    return Model(params, card.with_preset(preset), tokenizer, dtype, split_experts)


def float_dtype(name: str | jnp.dtype) -> jnp.dtype:
    """A dtype that weights may have.

    Raises:
      ValueError: for any other; int8, say, would cut the weights to whole numbers.
    """
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; known: {', '.join(_DTYPES)}")
    return dtype


def find(source: str | Path) -> Path:
    """The directory that a model's name stands for; downloads a repository that is not here.

    Raises:
      CheckpointError: if there is no such directory, published model or repository.
    """
    name = str(source)
    if name == "tiny":
        return TINY
    if "/" not in name and not Path(source).exists():
        try:
            published = model_config(name).name
        except ValueError as error:
            raise CheckpointError(
                f"{name}: no such directory, and no published model ({error})"
            ) from None
        # A Base repository shares its shapes with the fine-tuned one, not its weights.
        suffix = _BASE if name.endswith(_BASE) else ""
        return resolve(f"{_HUB_OWNER}/VideoLLaMA{published}{suffix}")
    folder = resolve(source)
    return folder / "model" if is_saved_model(folder / "model") else folder


def read(
    folder: Path, dtype, *, scan_layers: bool, split_experts: bool = False, progress=None
) -> tuple[dict, ModelCard, Path]:
    """Parameters, card and tokenizer directory of a model on disk, whatever its layout."""
    if is_saved_model(folder):
        params, card = load_model(folder, lambda card: abstract_params(card.config), dtype)
        if not scan_layers:
            flat = flatten(params)
            del params
            params = _unstack(flat, split_experts)
        return params, card, folder / TOKENIZER
    if is_huggingface(folder):
        return load_huggingface(
            folder,
            dtype=dtype,
            scan_layers=scan_layers,
            split_experts=split_experts,
            progress=progress,
        )
    raise CheckpointError(
        f"{folder}: not a model (neither model_card.json nor config.json); "
        "give a released checkpoint, a saved model, or a training run"
    )


def text_rules(source: str | Path) -> tuple[Tokenizer, str | ChatTemplate]:
    """Tokenizer and chat template of a model, without reading its weights.

    Args:
      source: as in `load`.

    Raises:
      CheckpointError: if the model cannot be found or understood.
    """
    folder = find(source)
    if is_saved_model(folder):
        card, tokenizer = read_card(folder), load_tokenizer(folder / TOKENIZER)
        return tokenizer, card.template or choose_template(card.config.decoder.family, tokenizer)
    data = read_json(folder / "config.json")
    if is_connector_only(data):
        raise CheckpointError(
            f"{folder}: holds a connector alone; convert it and give what comes out"
        )
    tokenizer = load_tokenizer(folder)
    return tokenizer, choose_template(model_from_json(data, folder.name).decoder.family, tokenizer)


def _unstack(flat: dict[str, jax.Array], split_experts: bool) -> dict:
    """What `unstack_layers` makes of the decoder; empties `flat` as it goes.

    Every stacked array is let go once its layers are copied, so that two copies of a large decoder
    never lie side by side.
    """
    out = {}
    for path in sorted(flat):
        leaf = flat.pop(path)
        # The leading axes that become names: layers, then experts.
        axes = int("/layers/" in path)
        if split_experts and path.rsplit("/", 2)[-2] == "moe":
            axes += 1
        for index in np.ndindex(leaf.shape[:axes]):
            place, _ = unstacked_place(path, index, split_experts)
            out[place] = leaf[index]
    return unflatten(out)


def _only_device(mesh: jax.sharding.Mesh):
    if mesh.size != 1:
        raise ValueError(
            f"the mesh has {mesh.size} devices; this version infers on one, give it a mesh of one"
        )
    return mesh.devices.item()
