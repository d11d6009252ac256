"""A released checkpoint's JSON files -> our configuration and decoding defaults.

Absent fields take the value that transformers 4.40's configuration classes give them, as they did
when the original loaded the same file.
"""

import dataclasses
import json
from pathlib import Path

from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.models import zoo
from vllama2_jax.models.config import DecoderConfig, ViTConfig, VLlama2Config

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

# (num_key_value_heads, rms_norm_eps, rope_theta, sliding_window) of a bare 4.40 configuration
_FAMILY_DEFAULTS = {
    "mistral": (8, 1e-6, 1e4, 4096),
    "mixtral": (8, 1e-5, 1e6, None),
    "qwen2": (32, 1e-6, 1e4, None),
    "llama": (None, 1e-6, 1e4, None),
}


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


def model_from_json(data: dict, name: str) -> VLlama2Config:
    """The network that a released config.json describes.

    Args:
      data: config.json.
      name: what to call it.

    Raises:
      CheckpointError: for a field that is needed and absent, or has an unknown value.
    """
    decoder = decoder_from_json(data)
    vision = vision_from_json(data)
    kind = data.get("mm_projector_type", "linear")
    try:
        return VLlama2Config(
            name=name,
            vision=vision,
            connector=zoo.connector_config(kind, vision.width, decoder.width),
            decoder=decoder,
            num_frames=data.get("num_frames") or 8,
        )
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def decoder_from_json(data: dict) -> DecoderConfig:
    """The language model's part of config.json (a plain Hugging Face one will do as well)."""
    model_type = data.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    kv_heads, eps, theta, window = _FAMILY_DEFAULTS[family]
    width, heads = _need(data, "hidden_size"), _need(data, "num_attention_heads")
    if family == "qwen2":
        if data.get("use_sliding_window", False):
            raise CheckpointError(
                "config.json: use_sliding_window is true; windows that differ by layer are not "
                "supported (no released model has them)"
            )
        window = None
    elif family != "llama":
        window = data.get("sliding_window", window)
    # transformers 5 writes rotary settings into a group of their own.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"config.json: rotary scaling {rope} is not supported")
    return DecoderConfig(
        family=family,
        vocab_size=_need(data, "vocab_size"),
        width=width,
        mlp_dim=_need(data, "intermediate_size"),
        num_layers=_need(data, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or kv_heads or heads,
        head_dim=data.get("head_dim") or width // heads,
        rope_theta=float(data.get("rope_theta") or rope.get("rope_theta") or theta),
        norm_eps=data.get("rms_norm_eps", eps),
        qkv_bias=family == "qwen2",
        num_experts=data.get("num_local_experts", 8) if family == "mixtral" else 0,
        top_k=data.get("num_experts_per_tok", 2),
        sliding_window=window,
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        max_positions=data.get("max_position_embeddings", 32768),
    )


def vision_from_json(data: dict) -> ViTConfig:
    """The tower: from `vision_config` (Hugging Face fields), else by its published name."""
    tower = data.get("mm_vision_tower") or data.get("vision_tower") or ""
    select_layer = data.get("mm_vision_select_layer", -2)
    sizes = data.get("vision_config")
    if sizes is None:
        published = [c for n, c in zoo.TOWERS.items() if n.rsplit("/", 1)[1] in tower]
        if not published:
            raise CheckpointError(
                f"config.json: the sizes of tower {tower!r} are not known; add `vision_config`, or "
                f"name one of: {', '.join(zoo.TOWERS)}"
            )
        base = published[0]
    else:
        hint = f"{sizes.get('model_type', '')} {tower}".lower()
        if "siglip" in hint:
            base = zoo.SIGLIP_SO400M_384
        elif "clip" in hint:
            base = zoo.CLIP_L_336
        else:
            raise CheckpointError(
                f"config.json: vision_config.model_type {sizes.get('model_type')!r} is neither "
                "CLIP nor SigLIP"
            )
        activation = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
        act = sizes.get("hidden_act")
        if act is not None and act not in activation:
            raise CheckpointError(f"config.json: vision_config.hidden_act {act!r} is not supported")
        base = dataclasses.replace(
            base,
            image_size=sizes.get("image_size", 224),
            patch_size=_need(sizes, "patch_size"),
            width=_need(sizes, "hidden_size"),
            mlp_dim=_need(sizes, "intermediate_size"),
            num_layers=_need(sizes, "num_hidden_layers"),
            num_heads=_need(sizes, "num_attention_heads"),
            norm_eps=sizes.get("layer_norm_eps", base.norm_eps),
            activation=activation.get(act, base.activation),
        )
    if data.get("mm_vision_select_feature", "patch") != "patch":
        raise CheckpointError(
            "config.json: mm_vision_select_feature "
            f"{data['mm_vision_select_feature']!r} is not supported, only 'patch'"
        )
    return dataclasses.replace(base, select_layer=select_layer)


def image_spec(vision: ViTConfig) -> ImageSpec:
    """How frames are resized for a tower: CLIP crops the middle, SigLIP stretches."""
    return ImageSpec(
        size=vision.image_size,
        geometry="shortest_edge_crop" if vision.class_token else "stretch",
        mean=vision.image_mean,
        std=vision.image_std,
    )


def generation_defaults(folder: Path, data: dict, eos_id: int | None) -> GenerationDefaults:
    """Stop ids and sampling of generation_config.json; absent, of config.json and transformers."""
    path = folder / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    stop = found.get("eos_token_id", data.get("eos_token_id", eos_id))
    stop = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    if eos_id is not None and eos_id not in stop:
        # The original also stops at the tokenizer's own end string.
        stop.append(eos_id)
    return GenerationDefaults(
        stop_ids=tuple(stop),
        repetition_penalty=found.get("repetition_penalty") or 1.0,
        top_p=found.get("top_p") or 1.0,
        top_k=50 if found.get("top_k") is None else found["top_k"],
    )


def _need(data: dict, name: str):
    if data.get(name) is None:
        raise CheckpointError(f"config.json: `{name}` is missing")
    return data[name]
