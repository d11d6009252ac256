"""A released checkpoint's JSON files -> our configuration and decoding defaults.

Sizes that shape a tensor (widths, layers, heads, patch, vocabulary) must stand in the file, but for
a tower of a published name. What else is absent takes the value that transformers 4.40's
configuration classes give it, as it did when the original loaded the same file; of the original's
own fields, `mm_projector_type` is then linear, `mm_vision_select_layer` -2 and `num_frames` 8.
Fields that neither shape nor move a number here are not looked at.
"""

import dataclasses
import json
from pathlib import Path

from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.models import zoo
from vllama2_jax.models.config import (
    AudioConnectorConfig,
    BeatsConfig,
    DecoderConfig,
    ViTConfig,
    VLlama2Config,
)

# model_type -> decoder family ("videollama2" is what early uploads of the Mistral models say)
FAMILIES = {
    "videollama2": "mistral",
    "videollama2_mistral": "mistral",
    "videollama2_mixtral": "mixtral",
    "videollama2_qwen2": "qwen2",
    "videollama2_llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "llama": "llama",
}

# (num_key_value_heads, rms_norm_eps, rope_theta, sliding_window, max_position_embeddings) of a
# bare 4.40 configuration
_FAMILY_DEFAULTS = {
    "mistral": (8, 1e-6, 1e4, 4096, 131072),
    "mixtral": (8, 1e-5, 1e6, None, 131072),
    "qwen2": (32, 1e-6, 1e4, None, 32768),
    "llama": (None, 1e-6, 1e4, None, 2048),
}
_TOWERS_BY_TYPE = {
    "clip": zoo.CLIP_L_336,
    "clip_vision_model": zoo.CLIP_L_336,
    "siglip": zoo.SIGLIP_SO400M_384,
    "siglip_vision_model": zoo.SIGLIP_SO400M_384,
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_NEEDED = object()
# Any of these makes a repository an audio-visual one.
_AUDIO_FIELDS = ("mm_audio_tower", "mm_projector_a", "mm_projector_a_type")


def read_json(path: Path) -> dict:
    """One JSON object from a file.

    Raises:
      CheckpointError: if it is missing or broken.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; the copy of the checkpoint is incomplete"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def is_connector_only(data: dict) -> bool:
    """Whether config.json marks a Base repository: a connector beside a plain language model."""
    return bool(data.get("tune_mm_mlp_adapter", False))


def has_audio(data: dict) -> bool:
    """Whether config.json is of an audio-visual model."""
    return any(data.get(field) for field in _AUDIO_FIELDS)


def tower_name(data: dict) -> str:
    """What config.json calls the vision tower: a path or repository id; "" where it says nothing.

    Raises:
      CheckpointError: if it is not a string.
    """
    name = data.get("mm_vision_tower") or data.get("vision_tower") or ""
    if not isinstance(name, str):
        raise CheckpointError(f"config.json: `mm_vision_tower` must be a string, found {name!r}")
    return name


def model_from_json(
    data: dict,
    name: str,
    connector_depth: int | None = None,
    audio: BeatsConfig | None = None,
) -> VLlama2Config:
    """The network that a released config.json describes.

    Args:
      data: config.json.
      name: what to call it.
      connector_depth: blocks per RegStage, which no released field says; None for the published 4.
      audio: sizes of the audio tower, which no released field says; None for the published.

    Raises:
      CheckpointError: for a field that is needed and absent, or has an unknown value.
    """
    decoder = decoder_from_json(data)
    vision = vision_from_json(data)
    kind = data.get("mm_projector_type", "linear")
    if has_audio(data):
        audio = audio or zoo.BEATS_ITER3
    elif audio:
        raise CheckpointError("config.json: an audio tower without `mm_audio_tower`; name it there")
    try:
        return VLlama2Config(
            name=name,
            vision=vision,
            connector=zoo.connector_config(
                kind,
                _size(data, "mm_hidden_size", vision.width),
                decoder.width,
                connector_depth,
            ),
            decoder=decoder,
            num_frames=_size(data, "num_frames", 8),
            audio=audio,
            audio_connector=audio
            and AudioConnectorConfig(
                kind=data.get("mm_projector_a_type", "linear"),
                in_dim=_size(data, "mm_hidden_size_a", audio.width),
                out_dim=_size(data, "hidden_size_a", decoder.width),
            ),
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from None


def decoder_from_json(data: dict) -> DecoderConfig:
    """The language model's part of config.json (a plain Hugging Face one will do as well).

    Raises:
      CheckpointError: for a field that is needed and absent, or has an unknown value.
    """
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    kv_heads, eps, theta, window, positions = _FAMILY_DEFAULTS[family]
    width, heads = _size(data, "hidden_size"), _size(data, "num_attention_heads")
    # An explicit null means as many as query heads; an absent field does not.
    kv_heads = _size(
        data, "num_key_value_heads", heads if "num_key_value_heads" in data else kv_heads
    )
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if family == "qwen2":
        if data.get("use_sliding_window", False):
            raise CheckpointError(
                "config.json: use_sliding_window is true; windows that differ by layer are not "
                "supported (no released model has them)"
            )
        window = None
    elif family != "llama":
        # Here too null is a choice: no window.
        window = _size(data, "sliding_window", None if "sliding_window" in data else window)
    # transformers 5 writes rotary settings into a group of their own.
    rope = _group(data, "rope_parameters") or _group(data, "rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"config.json: rotary scaling {rope} is not supported")
    return DecoderConfig(
        family=family,
        vocab_size=_size(data, "vocab_size"),
        width=width,
        mlp_dim=_size(data, "intermediate_size"),
        num_layers=_size(data, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_size(data, "head_dim", width // heads),
        rope_theta=_number(data, "rope_theta", _number(rope, "rope_theta", theta)),
        norm_eps=_number(data, "rms_norm_eps", eps),
        qkv_bias=family == "qwen2",
        num_experts=_size(data, "num_local_experts", 8) if family == "mixtral" else 0,
        top_k=_size(data, "num_experts_per_tok", 2),
        sliding_window=window,
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        max_positions=_size(data, "max_position_embeddings", positions),
    )


def vision_from_json(data: dict) -> ViTConfig:
    """The tower: from `vision_config` (Hugging Face fields), else by its published name.

    Raises:
      CheckpointError: for a field that is needed and absent, or has an unknown value.
    """
    tower, sizes = tower_name(data), _group(data, "vision_config")
    config = _published_tower(tower) if sizes is None else _sized_tower(tower, sizes)
    feature = data.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise CheckpointError(
            f"config.json: mm_vision_select_feature {feature!r} is not supported, only 'patch'"
        )
    select = data.get("mm_vision_select_layer", -2)
    # Negative numbers count from the last block's output (-1), others from the first's (1).
    allowed = {*range(-config.num_layers, 0), *range(1, config.num_layers + 1)}
    if type(select) is not int or select not in allowed:
        raise CheckpointError(
            f"config.json: `mm_vision_select_layer` must be the number of one of the tower's "
            f"{config.num_layers} blocks (usually -2), found {json.dumps(select)}"
        )
    return dataclasses.replace(config, select_layer=select)


def _published_tower(tower: str) -> ViTConfig:
    for name, config in zoo.TOWERS.items():
        if name.rsplit("/", 1)[1] in tower:
            return config
    raise CheckpointError(
        f"config.json: the sizes of tower {tower!r} are not known; add `vision_config`, or let "
        f"`mm_vision_tower` name one of: {', '.join(zoo.TOWERS)}"
    )


def _sized_tower(tower: str, sizes: dict) -> ViTConfig:
    kind = sizes.get("model_type")
    if kind is None:
        # Only without a declared type does the name decide ("siglip" does not hold "clip").
        kind = next((known for known in ("siglip", "clip") if known in tower.lower()), None)
    if not isinstance(kind, str) or kind not in _TOWERS_BY_TYPE:
        raise CheckpointError(
            f"config.json: `vision_config.model_type` {kind!r} is not supported; "
            f"known: {', '.join(_TOWERS_BY_TYPE)}"
        )
    base, group = _TOWERS_BY_TYPE[kind], "vision_config."
    act = sizes.get("hidden_act")
    if act is not None and act not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: `vision_config.hidden_act` {act!r} is not supported; "
            f"known: {', '.join(ACTIVATIONS)}"
        )
    return dataclasses.replace(
        base,
        image_size=_size(sizes, "image_size", 224, group),
        patch_size=_size(sizes, "patch_size", group=group),
        width=_size(sizes, "hidden_size", group=group),
        mlp_dim=_size(sizes, "intermediate_size", group=group),
        num_layers=_size(sizes, "num_hidden_layers", group=group),
        num_heads=_size(sizes, "num_attention_heads", group=group),
        norm_eps=_number(sizes, "layer_norm_eps", base.norm_eps, group),
        activation=ACTIVATIONS.get(act, base.activation),
    )


def image_spec(vision: ViTConfig) -> ImageSpec:
    """How frames are resized for a tower: CLIP crops the middle, SigLIP stretches."""
    return ImageSpec(
        size=vision.image_size,
        geometry="shortest_edge_crop" if vision.class_token else "stretch",
        mean=vision.image_mean,
        std=vision.image_std,
    )


def generation_defaults(folder: Path, data: dict, eos_id: int | None) -> GenerationDefaults:
    """Stop ids and sampling of generation_config.json; absent, of config.json and transformers.

    Args:
      folder: where generation_config.json may lie.
      data: config.json.
      eos_id: the tokenizer's own end, at which the original stops as well.

    Raises:
      CheckpointError: for a value of another type.
    """
    path = folder / "generation_config.json"
    return generation_from_json(read_json(path) if path.is_file() else {}, data, eos_id, str(path))


def generation_from_json(
    found: dict, data: dict, eos_id: int | None, where: str
) -> GenerationDefaults:
    """`generation_defaults` of a generation_config.json in memory, called `where` in errors."""
    stop = found.get("eos_token_id", data.get("eos_token_id", eos_id))
    stop = [] if stop is None else list(stop) if isinstance(stop, list) else [stop]
    if any(type(token) is not int for token in stop):
        raise CheckpointError(f"{where}: `eos_token_id` must be one id or a list, found {stop}")
    if eos_id is not None and eos_id not in stop:
        stop.append(eos_id)
    try:
        return GenerationDefaults(
            stop_ids=tuple(stop),
            repetition_penalty=_number(found, "repetition_penalty", 1.0),
            # transformers filters by 50 unless told otherwise; 0 turns it off.
            top_k=0 if found.get("top_k") == 0 else _size(found, "top_k", 50),
        )
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("config.json", where, 1)) from None


def _size(data: dict, name: str, default: int | None = _NEEDED, group: str = "") -> int | None:
    """A whole number above 0; null counts as absent."""
    return _field(data, name, default, group, (int,), "a whole number above 0")


def _number(data: dict, name: str, default: float, group: str = "") -> float:
    """A number above 0; null counts as absent."""
    return float(_field(data, name, default, group, (int, float), "a number above 0"))


def _field(data, name, default, group, kinds, words):
    value = data.get(name)
    if value is None:
        if default is _NEEDED:
            raise CheckpointError(f"config.json: `{group}{name}` is missing")
        return default
    if type(value) not in kinds or not value > 0:
        raise CheckpointError(f"config.json: `{group}{name}` must be {words}, found {value!r}")
    return value


def _group(data: dict, name: str) -> dict | None:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"config.json: `{name}` must be an object, found {value!r}")
    return value
