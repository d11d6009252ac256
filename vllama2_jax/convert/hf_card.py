"""A model card and a released checkpoint's JSON files, each made from the other.

What the released format has no field for stands in an object of ours in config.json,
`vllama2_jax`. Other readers pass over it; transformers keeps it where it saves a model again.
"""

import dataclasses
import json

from vllama2_jax.checkpoints import CheckpointError, GenerationDefaults, ModelCard
from vllama2_jax.convert.hf_config import (
    ACTIVATIONS,
    generation_from_json,
    image_spec,
    model_from_json,
)
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import REFERENCE, MediaPreset
from vllama2_jax.models import zoo
from vllama2_jax.models.config import (
    BeatsConfig,
    ConnectorConfig,
    DecoderConfig,
    ViTConfig,
    VLlama2Config,
    config_from_dict,
    config_to_dict,
)
from vllama2_jax.text import Tokenizer

OWN = "vllama2_jax"

# The file of the tower that the audio-visual model was made of.
_AUDIO_TOWER = "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt"

# decoder family -> class of the original
_ARCHITECTURES = {
    "mistral": "Videollama2MistralForCausalLM",
    "mixtral": "Videollama2MixtralForCausalLM",
    "qwen2": "Videollama2Qwen2ForCausalLM",
    "llama": "Videollama2LlamaForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class OwnFields:
    """`vllama2_jax` in config.json: what differs from what the released fields mean.

    Attributes:
      name: the model's; a released checkpoint is called as its directory is.
      connector_depth: blocks per RegStage, where they are not the published number.
      image: where it is not what the tower's type implies.
      preset: where it is not the original's.
      template: a chat template of `text/chat.py`, where the tokenizer's own is not to be used.
      audio: sizes of the audio tower, where they are not the published.
    """

    name: str
    connector_depth: int | None = None
    image: ImageSpec | None = None
    preset: MediaPreset | None = None
    template: str = ""
    audio: BeatsConfig | None = None

    def __post_init__(self):
        if self.connector_depth is not None and self.connector_depth < 0:
            raise ValueError(f"connector_depth must not be negative, found {self.connector_depth}")


def card_from_json(
    data: dict, generation: GenerationDefaults, tokenizer: Tokenizer, name: str
) -> ModelCard:
    """The card of a released checkpoint, or of one that we wrote in that format.

    Args:
      data: config.json.
      generation: of generation_config.json.
      tokenizer: of the checkpoint.
      name: what to call a model that does not say.

    Raises:
      CheckpointError: for a field that is needed and absent, or has an unknown value.
    """
    own = OwnFields(name)
    if OWN in data:
        try:
            own = config_from_dict(OwnFields, data[OWN])
        except ValueError as error:
            raise CheckpointError(
                f"config.json: `{OWN}`: {error}; export the model again, with this version"
            ) from None
    config = model_from_json(data, own.name, own.connector_depth, own.audio)
    try:
        return ModelCard(
            config=config,
            image=own.image or image_spec(config.vision),
            preset=own.preset or REFERENCE,
            generation=generation,
            template=own.template,
            tokenizer=tokenizer.fingerprint(),
        )
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def card_to_json(card: ModelCard, tokenizer: Tokenizer, dtype: str) -> tuple[dict, dict]:
    """config.json and generation_config.json that `card_from_json` reads as `card`.

    Args:
      card: of the model.
      tokenizer: the one that goes with it.
      dtype: of the tensors, by torch's name.

    Raises:
      CheckpointError: naming everything of the card that these files cannot say.
    """
    config = card.config
    tower, sizes = _tower_json(config.vision)
    family = config.decoder.family
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids = {name: number for name, number in ids.items() if number is not None}
    data = {
        "architectures": [_ARCHITECTURES.get(family, "")],
        "model_type": f"videollama2_{family}",
        "_name_or_path": family,  # by which the original chose its class before `model_type`
        "torch_dtype": dtype,
        **_decoder_json(config.decoder),
        **ids,
        "mm_vision_tower": tower,
        **sizes,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": config.connector.in_dim,
        "mm_projector_type": config.connector.kind,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,  # true marks a repository of a connector alone
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        **_audio_json(config),
        "num_frames": config.num_frames,
        # Read by the original's first inference code; later ones pad in training alone.
        "image_aspect_ratio": "pad" if card.preset.square_pad else "square",
        "tokenizer_padding_side": "right",
        OWN: _own_json(card),
    }
    stop = card.generation.stop_ids
    generation = {
        **ids,
        "eos_token_id": stop[0] if len(stop) == 1 else list(stop),
        "repetition_penalty": card.generation.repetition_penalty,
        "top_k": card.generation.top_k,
    }
    _check_readable(card, tokenizer, data, generation)
    return data, generation


def _decoder_json(config: DecoderConfig) -> dict:
    data = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if config.head_dim != config.width // config.num_heads:
        # The classes of transformers 4.40 know no other width of a head, later ones do.
        data["head_dim"] = config.head_dim
    if config.family in ("mistral", "mixtral"):
        data["sliding_window"] = config.sliding_window
    if config.family == "mixtral":
        data |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.top_k}
    if config.family == "qwen2":
        data["use_sliding_window"] = False
    return data


def _tower_json(config: ViTConfig) -> tuple[str, dict]:
    """The tower's name, and the fields that give its sizes where the name does not."""
    for name, published in zoo.TOWERS.items():
        if dataclasses.replace(published, select_layer=config.select_layer) == config:
            return name, {}
    kind = "clip" if config.class_token else "siglip"
    sizes = {
        "model_type": f"{kind}_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(config.activation),
        "layer_norm_eps": config.norm_eps,
    }
    # The original asks the name for the kind.
    return f"{kind}-patch{config.patch_size}-{config.image_size}", {"vision_config": sizes}


def _audio_json(config: VLlama2Config) -> dict:
    if config.audio is None:
        return {}
    connector = config.audio_connector
    return {
        "mm_audio_tower": _AUDIO_TOWER,
        "mm_projector_a_type": connector.kind,
        "mm_hidden_size_a": connector.in_dim,
        "hidden_size_a": connector.out_dim,
        "tune_mm_mlp_adapter_a": False,
    }


def _own_json(card: ModelCard) -> dict:
    """`OwnFields`, only those that say something."""
    config = card.config
    own = OwnFields(
        name=config.name,
        connector_depth=_unpublished_depth(config.connector),
        image=None if card.image == image_spec(config.vision) else card.image,
        preset=None if card.preset == REFERENCE else card.preset,
        template=card.template,
        audio=None if config.audio == zoo.BEATS_ITER3 else config.audio,
    )
    silent = {field.name: field.default for field in dataclasses.fields(OwnFields)}
    return {name: value for name, value in config_to_dict(own).items() if value != silent[name]}


def _unpublished_depth(config: ConnectorConfig) -> int | None:
    if config.kind not in zoo.CONNECTOR_KINDS:
        return None  # refused where it is read back
    published = zoo.connector_config(config.kind, config.in_dim, config.out_dim)
    return None if published.depth == config.depth else config.depth


def _check_readable(card: ModelCard, tokenizer: Tokenizer, data: dict, generation: dict) -> None:
    """Read the files as an importer will, and hold the card that it gets against ours."""
    data, generation = json.loads(json.dumps([data, generation]))
    defaults = generation_from_json(generation, data, tokenizer.eos_id, "generation_config.json")
    found = card_from_json(data, defaults, tokenizer, card.config.name)
    # Whose files the tokenizer's are is not said here.
    wanted = dataclasses.replace(card, tokenizer=found.tokenizer)
    if problems := list(_differences(config_to_dict(wanted), config_to_dict(found))):
        raise CheckpointError(
            f"the Hugging Face layout cannot hold this model: {'; '.join(problems)}; "
            "keep it as an Orbax directory"
        )


def _differences(wanted: dict, found: dict, path: str = ""):
    for name, value in wanted.items():
        if isinstance(value, dict):
            yield from _differences(value, found[name], f"{path}{name}.")
        elif value != found[name]:
            yield f"{path}{name} {value!r} would be read as {found[name]!r}"
