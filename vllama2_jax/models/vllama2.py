"""VideoLLaMA 2 as one pure network: encode frames and sound, splice their tokens in, decode.

The batch is one contract for training and inference (`Batch`); its shapes are static, and where
media tokens go is data (`media_index`), so that one compiled program serves every mixture of text,
images, videos and sound.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vllama2_jax.models.axes import (
    behind,
    constrain,
    divisible,
    gather,
    layout_in_force,
    per_device,
    using,
)
from vllama2_jax.models.beats import Beats, normalise_bank
from vllama2_jax.models.cache import KVCache
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.connector import AudioConnector, Connector
from vllama2_jax.models.decoder import Decoder
from vllama2_jax.models.vit import VisionTower, normalise

_MEDIA = ("frames", "clip_frames", "clip_mask", "audio", "audio_mask", "audio_keep")


@flax.struct.dataclass
class Batch:
    """Rows of spliced tokens, each with the media that it refers to.

    B rows of L slots; F distinct frames, K clips of T time steps and A sounds per row. The row's
    table of M media tokens holds those of its clips, one after the other, then those of its sounds.

    Attributes:
      tokens: int32 [B, L]; ids, anything valid (0) at media slots and padding.
      positions: int32 [B, L]; rotary positions, restarting with each segment.
      segment_ids: int32 [B, L]; 0 is padding, samples packed into one row count from 1.
      media_index: int32 [B, L]; into the row's M media tokens; -1 is text.
      frames: uint8 [B, F, S, S, 3]; each distinct frame once. Where no row of a run has pictures
        it is None, and `audio` likewise: the towers in question do not run.
      clip_frames: int32 [B, K, T]; which of the row's frames each time step uses.
      clip_mask: bool [B, K]; False where a clip slot is unused.
      targets: int32 [B, L]; the id that each slot predicts (training only).
      target_weights: float32 [B, L]; 0 where nothing is learnt (training only).
      dataset_ids: int32 [B, L]; which dataset each slot is of, to tell their losses apart.
      audio: float32 [B, A, frames, 128], filter banks.
      audio_mask: bool [B, A]; False where a sound's slot is unused.
      audio_keep: bool [B, layers]; False for layers of the audio tower that a row leaves out
        (training only).
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    media_index: jax.Array
    frames: jax.Array | None = None
    clip_frames: jax.Array | None = None
    clip_mask: jax.Array | None = None
    targets: jax.Array | None = None
    target_weights: jax.Array | None = None
    dataset_ids: jax.Array | None = None
    audio: jax.Array | None = None
    audio_mask: jax.Array | None = None
    audio_keep: jax.Array | None = None


# Names of the axes of a batch's arrays, by which a layout splits them; the rest of each is whole.
BATCH_AXES = {
    field.name: ("batch",) if field.name in _MEDIA else ("batch", "length")
    for field in dataclasses.fields(Batch)
}


def splice(text: jax.Array, media: jax.Array, media_index: jax.Array) -> jax.Array:
    """Put media tokens in their slots: one gather and one `where`.

    Args:
      text: [B, L, W] embeddings of the ids (whatever stands at media slots is dropped).
      media: [B, M, W] tokens of the connectors.
      media_index: int32 [B, L] into M; -1 keeps the text embedding.

    Returns:
      [B, L, W] in the dtype of `text`.
    """
    gathered = jax.vmap(lambda row, slots: row[slots])(media, jnp.maximum(media_index, 0))
    return jnp.where(media_index[..., None] >= 0, gathered.astype(text.dtype), text)


class VLlama2(nn.Module):
    """Frames -> tower -> connector -> decoder, and sound likewise.

    Attributes:
      config: the shapes; a network without `config.audio` does not hear.
      dtype: of activations and matmuls; norms, softmax, rotary angles and logits are float32.
      param_dtype: of the parameters that `init` makes.
      remat: recomputation policy of the decoder's and the towers' blocks (see `remat.py`).
      scan_layers: one scanned stack of decoder layers (training) or a Python loop over layers with
        parameters of their own (inference; see docs/decisions/decoder-layers.md).
      split_experts: every expert has arrays of its own (inference on CPU).
      attention_backend: of the decoder and the vision tower, "xla", "splash" (TPU) or "cudnn"
        (GPU): see `attention.attend`. `parallel.backends` says which suits a mesh.
      moe_backend: of the experts' products, see `grouped_matmul.grouped_matmul`.
      expert_exchange: how tokens travel to experts of other devices, "ring" or "all_to_all" (see
        `expert_parallel.exchange`).
    """

    config: VLlama2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    split_experts: bool = False
    attention_backend: str = "xla"
    moe_backend: str = "blocks"
    expert_exchange: str = "ring"

    def setup(self):
        """Build the networks under the names of `config.PARTS`."""
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.vision = VisionTower(
            config=self.config.vision,
            remat=self.remat,
            attention_backend=self.attention_backend,
            **common,
        )
        self.connector = Connector(config=self.config.connector, **common)
        if self.config.audio:
            self.audio = Beats(config=self.config.audio, remat=self.remat, **common)
            self.audio_connector = AudioConnector(config=self.config.audio_connector, **common)
        self.decoder = Decoder(
            self.config.decoder,
            remat=self.remat,
            scan_layers=self.scan_layers,
            split_experts=self.split_experts,
            attention_backend=self.attention_backend,
            moe_backend=self.moe_backend,
            expert_exchange=self.expert_exchange,
            **common,
        )

    def encode(
        self, frames: jax.Array, clip_frames: jax.Array, clip_mask: jax.Array | None = None
    ) -> jax.Array:
        """What the decoder sees of each row's clips.

        Every distinct frame goes through the tower once; an image repeated over T time steps costs
        one frame (the connector still sees all T).

        Args:
          frames: uint8 [B, F, S, S, 3].
          clip_frames: int32 [B, K, T] into F.
          clip_mask: bool [B, K]; tokens of unused clips are zeros.

        Returns:
          [B, K * num_tokens, W] in `dtype`.
        """
        rows, num_frames = frames.shape[:2]
        clips, steps = clip_frames.shape[1:]
        images = constrain(frames.reshape(-1, *frames.shape[2:]), "images", None, None, None)
        pixels = normalise(images, self.config.vision)
        features = self.vision(pixels.astype(self.dtype))
        features = features.reshape(rows, num_frames, *features.shape[1:])
        by_clip = jax.vmap(lambda row, index: row[index])(features, clip_frames)
        tokens = self._connect(by_clip.reshape(rows * clips, steps, *features.shape[2:]))
        tokens = tokens.reshape(rows, clips, *tokens.shape[1:])
        if clip_mask is not None:
            tokens = jnp.where(clip_mask[..., None, None], tokens, 0)
        return tokens.reshape(rows, -1, tokens.shape[-1])

    def _connect(self, features: jax.Array) -> jax.Array:
        """The connector's tokens [clips, num_tokens, W] of features [clips, T, patches, width].

        Where the mesh gives every device whole clips, each gathers the kernels and runs on its own:
        XLA, left to split the same program, takes three times as long to compile it for 64 TPUs and
        sums gradients up whole (docs/decisions/gathering.md). Where there are fewer clips than
        devices, those that share rows do the same work.
        """
        layout, count = layout_in_force(), len(features)
        clips = divisible("images", count) or divisible("clips", count)
        if layout is None or self.is_initializing() or clips is None:
            return self.connector(features)
        with using(None):
            boxes = named_params(self.config)["connector"]
        names = jax.tree.map(
            lambda box: tuple(map(divisible, box.names, box.value.shape)),
            boxes,
            is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
        )
        connector = self.connector.clone(parent=None)

        def local(params, features):
            whole = jax.tree.map(lambda leaf, axes: gather(leaf, axes, layout), params, names)
            return connector.apply({"params": whole}, features)

        apart = per_device(local, (names, (clips, None, None, None)), (clips, None, None))
        return constrain(apart(self.connector.variables["params"], features), "clips", None, None)

    def hear(
        self,
        audio: jax.Array,
        audio_mask: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> jax.Array:
        """What the decoder hears of each row's sounds.

        Args:
          audio: float32 [B, A, frames, 128], filter banks.
          audio_mask: bool [B, A]; tokens of unused slots are zeros.
          keep: bool [B, layers], see `Batch.audio_keep`.

        Returns:
          [B, A * num_sound_tokens, W] in `dtype`.
        """
        rows, sounds = audio.shape[:2]
        banks = constrain(audio.reshape(-1, *audio.shape[2:]), "images", None, None)
        banks = normalise_bank(banks, self.config.audio)
        keep = None if keep is None else jnp.repeat(keep, sounds, axis=0)
        tokens = self.audio_connector(self.audio(banks, keep))
        tokens = tokens.reshape(rows, sounds, *tokens.shape[1:])
        if audio_mask is not None:
            tokens = jnp.where(audio_mask[..., None, None], tokens, 0)
        return tokens.reshape(rows, -1, tokens.shape[-1])

    def media_tokens(self, batch: Batch) -> jax.Array | None:
        """The tables of media tokens [B, M, W] of a batch; None for one of text alone."""
        tables = []
        if batch.frames is not None:
            tables.append(self.encode(batch.frames, batch.clip_frames, batch.clip_mask))
        if batch.audio is not None:
            audio = behind(batch.audio, tables[0]) if tables else batch.audio
            tables.append(self.hear(audio, batch.audio_mask, batch.audio_keep))
        return jnp.concatenate(tables, axis=1) if tables else None

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        media: jax.Array | None = None,
        media_index: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        with_router_logits: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Hidden states of spliced rows, optionally behind what a cache already holds.

        Args:
          tokens, positions, segment_ids: int32 [B, L].
          media: [B, M, W] from `media_tokens`, with `media_index` int32 [B, L]; both None for text
            alone.
          cache: keys and values of earlier slots; the new slots are appended.
          with_router_logits: also return what `moe.load_balancing_loss` takes.

        Returns:
          hidden [B, L, W] behind the final norm, and the extended cache (None if none was given);
          with `with_router_logits` a third, the routers' logits [num_layers, B, L, E].

        Raises:
          ValueError: for router logits of a decoder without experts.
        """
        x = self.decoder.embed(tokens)
        if media is not None:
            x = splice(x, media, media_index)
        return self.decoder(x, positions, segment_ids, cache, with_router_logits=with_router_logits)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., vocab] of hidden states [..., W]."""
        return self.decoder.logits(hidden)

    def __call__(self, batch: Batch) -> jax.Array:
        """Hidden states [B, L, W] of a training batch (see `logits` for the head)."""
        hidden, _ = self.decode(
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            self.media_tokens(batch),
            batch.media_index,
        )
        if self.is_initializing():
            self.logits(hidden[:, :1])
        return hidden


def init_params(config: VLlama2Config, rng: jax.Array, param_dtype=jnp.float32, **kwargs):
    """Random parameters, each in a box that carries its logical axis names.

    Use under `jax.eval_shape` for shapes alone, and `nn.meta.unbox` for plain arrays.
    """
    size, frames = config.vision.image_size, config.num_frames
    # The shortest row that touches every parameter: one clip, one sound, one text slot.
    row = jnp.zeros((1, 1), jnp.int32)
    sound = config.audio and jnp.zeros((1, 1, config.audio.num_frames, config.audio.num_bins))
    batch = Batch(
        tokens=row,
        positions=row,
        segment_ids=row + 1,
        media_index=row - 1,
        frames=jnp.zeros((1, 1, size, size, 3), jnp.uint8),
        clip_frames=jnp.zeros((1, 1, frames), jnp.int32),
        clip_mask=jnp.ones((1, 1), bool),
        audio=sound,
    )
    model = VLlama2(config, param_dtype=param_dtype, **kwargs)
    return model.init(rng, batch)["params"]


def abstract_params(
    config: VLlama2Config, *, scan_layers: bool = True, split_experts: bool = False
) -> dict:
    """Shapes and dtypes of the parameters, as a nested dict of `jax.ShapeDtypeStruct`."""
    return nn.meta.unbox(named_params(config, scan_layers=scan_layers, split_experts=split_experts))


def named_params(config: VLlama2Config, **kwargs) -> dict:
    """The same, each in a box that carries its logical axis names."""
    return jax.tree.map(lambda leaf: leaf, _traced(config, **kwargs))


@functools.lru_cache(maxsize=8)
def _traced(config: VLlama2Config, **kwargs) -> dict:
    # Takes seconds, and a search of plans asks for the same network again and again.
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), **kwargs))
