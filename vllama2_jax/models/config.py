"""Shapes of the networks, as frozen dataclasses that hold no arrays and no code.

They are what a checkpoint's model card stores, and all that a network is built from.
"""

import dataclasses
import re
import types
import typing

# Of the network, in the order in which data run through them; parameters begin with these names.
# Those of hearing are absent from a network without it.
PARTS = ("vision", "connector", "audio", "audio_connector", "decoder")


_MLP = re.compile(r"mlp(\d+)x_gelu")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A CLIP or SigLIP image tower, read at one of its hidden layers.

    `select_layer` counts like the original's `mm_vision_select_layer`: -2 is the output of the
    last block but one, so only `num_blocks_used` blocks are ever run or stored.
    """

    image_size: int
    patch_size: int
    width: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    activation: str  # "quick_gelu" (CLIP) or "gelu_tanh" (SigLIP)
    norm_eps: float
    class_token: bool  # CLIP: one class token in front, dropped from the output
    pre_norm: bool  # CLIP: LayerNorm between embeddings and blocks
    patch_bias: bool  # SigLIP: the patch convolution has a bias
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    select_layer: int = -2

    @property
    def grid(self) -> int:
        """Patches along one side (SigLIP's 384 = 27 * 14 + 6 leaves 6 pixels unused)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Tokens per frame."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def num_blocks_used(self) -> int:
        """Blocks in front of the selected hidden state (23 of 24 for CLIP at -2)."""
        return (
            self.num_layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer
        )


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """A vision-to-decoder connector; `kind` names it as the original's `mm_projector_type` does.

    The three free axes of the paper's Table 1 are `depth` (RegStage blocks per stage, 0 = none),
    `sampler` and `downsample`; `connector_config` in `zoo.py` fills them in for each kind.
    """

    kind: str
    in_dim: int
    out_dim: int
    sampler: str  # "conv", "pool" or "mean" (mean over time, then an MLP)
    downsample: tuple[int, int, int] = (2, 2, 2)  # kernel = stride over (time, height, width)
    padding: tuple[int, int, int] = (0, 0, 0)  # zeros on each side of (time, height, width)
    depth: int = 4  # bottleneck blocks in each of the two RegStages
    mlp_depth: int = 2  # dense layers of the read-out

    def num_tokens(self, num_frames: int, grid: int) -> int:
        """Decoder slots that one clip of `num_frames` frames of `grid` x `grid` patches takes."""
        if self.sampler == "mean":
            return grid * grid
        t, h, w = (
            (size + 2 * pad - step) // step + 1
            for size, pad, step in zip(
                (num_frames, grid, grid), self.padding, self.downsample, strict=True
            )
        )
        if min(t, h, w) < 1:
            raise ValueError(
                f"{self.kind} cannot take {num_frames} frame(s) of {grid}x{grid} patches: "
                f"its window is {self.downsample}; give it more frames"
            )
        return t * h * w


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """A BEATs audio tower, read at its last layer.

    The patch embedding cuts the filter bank into squares; `patch_width` is its width, `width` that
    of the layers. `deep_norm` weighs what bypasses a layer by (2 layers)^(1/4). Layer-drop
    is of training alone.
    """

    patch_size: int
    patch_width: int
    width: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    seconds: float = 30.0  # of sound; shorter sound is filled with silence, longer cut
    num_bins: int = 128  # of the filter bank
    patch_bias: bool = False
    conv_window: int = 128  # taps of the convolution that tells positions
    conv_groups: int = 16
    conv_norm_eps: float = 1e-6  # under the root of the norm of each of its taps
    num_buckets: int = 320  # of relative positions
    max_distance: int = 800
    deep_norm: bool = True
    norm_eps: float = 1e-5
    mean: float = 15.41663  # of the filter bank
    std: float = 6.55582
    layer_drop: float = 0.05  # probability
    gradient_decay: float = 0.6  # factor of the gradient that goes through a layer

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def residual_weight(self) -> float:
        """Of what bypasses a layer."""
        return (2 * self.num_layers) ** 0.25 if self.deep_norm else 1.0

    @property
    def num_frames(self) -> int:
        """Frames of the filter bank, of 25 ms every 10 ms at 16 kHz (2,998 of 30 s)."""
        return 1 + (round(self.seconds * 16_000) - 400) // 160

    @property
    def num_tokens(self) -> int:
        """Tokens of a sound (1,496 of 30 s); frames that fill no last patch are left out."""
        return self.num_frames // self.patch_size * (self.num_bins // self.patch_size)


@dataclasses.dataclass(frozen=True)
class AudioConnectorConfig:
    """An audio-to-decoder connector, named as the original's `mm_projector_a_type`.

    Dense layers with GELU between them: "linear", "mlp2x_gelu", "mlp3x_gelu" ...
    """

    kind: str
    in_dim: int
    out_dim: int

    def __post_init__(self):
        """Refuse a kind that is not known."""
        if self.kind != "linear" and not _MLP.fullmatch(self.kind):
            raise ValueError(
                f"unknown audio connector {self.kind!r}; known: linear, mlp2x_gelu, mlp3x_gelu ..."
            )

    @property
    def depth(self) -> int:
        """Dense layers."""
        return 1 if self.kind == "linear" else int(_MLP.fullmatch(self.kind)[1])


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Mistral, Mixtral, Qwen2 or Llama decoder."""

    family: str  # "mistral", "mixtral", "qwen2" or "llama"
    vocab_size: int
    width: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool = False
    num_experts: int = 0  # 0: dense MLP
    top_k: int = 2  # experts per token
    sliding_window: int | None = None
    tie_embeddings: bool = False
    max_positions: int = 32768


@dataclasses.dataclass(frozen=True)
class VLlama2Config:
    """The whole network: frames -> tower -> connector -> decoder, and sound likewise."""

    name: str
    vision: ViTConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    num_frames: int  # the clip length the checkpoint was trained with
    audio: BeatsConfig | None = None  # both or none
    audio_connector: AudioConnectorConfig | None = None

    def __post_init__(self):
        """Refuse parts that do not fit each other."""
        if self.connector.in_dim != self.vision.width:
            raise ValueError(
                f"connector.in_dim {self.connector.in_dim} != vision.width {self.vision.width}"
            )
        if self.connector.out_dim != self.decoder.width:
            raise ValueError(
                f"connector.out_dim {self.connector.out_dim} != decoder.width {self.decoder.width}"
            )
        tower, connector = self.audio, self.audio_connector
        if (tower is None) != (connector is None):
            raise ValueError("audio and audio_connector must both be there, or neither")
        if tower and (connector.in_dim, connector.out_dim) != (tower.width, self.decoder.width):
            raise ValueError(
                f"audio_connector takes {connector.in_dim} to {connector.out_dim}, the audio tower "
                f"has {tower.width} and the decoder {self.decoder.width}"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of `PARTS` that this network has."""
        return tuple(part for part in PARTS if getattr(self, part) is not None)

    @property
    def num_sound_tokens(self) -> int:
        """Decoder slots that one sound takes; 0 of a network that does not hear."""
        return self.audio.num_tokens if self.audio else 0

    def num_media_tokens(self, num_frames: int | None = None) -> int:
        """Decoder slots that one clip takes."""
        return self.connector.num_tokens(num_frames or self.num_frames, self.vision.grid)


def config_to_dict(config) -> dict:
    """Plain JSON types of a config, nested."""
    return dataclasses.asdict(config)


def config_from_dict(cls, data: dict):
    """Rebuild a config dataclass from `config_to_dict`, strictly.

    Args:
      cls: the dataclass; its fields are int, float, str, bool, tuples, other dataclasses, one of
        these or None, or one of several dataclasses that differ in their fields.
      data: plain JSON types; a whole number will do for a float, nothing else is converted.

    Raises:
      ValueError: naming every unknown and missing field and every value of another type.
    """
    problems: list[str] = []
    value = _dataclass(cls, data, "", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return value


_ABSENT = object()  # stands for a value that could not be built; the reason is in `problems`


def _dataclass(cls, data, path: str, problems: list[str]):
    at = path or cls.__name__
    if not isinstance(data, dict):
        problems.append(f"{at} must be an object, not {data!r}")
        return _ABSENT
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for kind, names in (("unknown", set(data) - set(fields)), ("missing", required - set(data))):
        if names:
            problems.append(f"{at}: {kind} fields {', '.join(sorted(names))}")
    kinds = typing.get_type_hints(cls)
    values = {
        name: _value(kinds[name], value, f"{path}.{name}" if path else name, problems)
        for name, value in data.items()
        if name in fields
    }
    if required - set(values) or any(value is _ABSENT for value in values.values()):
        return _ABSENT
    try:
        return cls(**values)
    except ValueError as error:  # of the class's own checks
        problems.append(f"{at}: {error}")
        return _ABSENT


def _value(kind, value, path: str, problems: list[str]):
    """`value` as the type `kind`, or `_ABSENT` and a line in `problems`."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path, problems)
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in typing.get_args(kind):
            return None
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return _value(_fitting(kinds, value), value, path, problems)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if isinstance(value, list | tuple):
            if items[-1] is Ellipsis:
                items = items[:1] * len(value)
            if len(items) == len(value):
                built = [
                    _value(item, part, f"{path}[{i}]", problems)
                    for i, (item, part) in enumerate(zip(items, value, strict=True))
                ]
                return _ABSENT if any(part is _ABSENT for part in built) else tuple(built)
            problems.append(f"{path} must have {len(items)} values, not {len(value)}")
        else:
            problems.append(f"{path} must be a list, not {value!r}")
        return _ABSENT
    # A bool is an int to Python, and to nobody else.
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    if kind is float and type(value) is int:
        return float(value)
    problems.append(f"{path} must be {_IN_WORDS[kind]}, not {value!r}")
    return _ABSENT


def _fitting(kinds: list, value):
    """The first of several dataclasses that has all the fields of `value`, or the first."""
    names = set(value) if isinstance(value, dict) else set()
    return next(
        (k for k in kinds[1:] if names <= _names(k) and not names <= _names(kinds[0])), kinds[0]
    )


def _names(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


_IN_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
