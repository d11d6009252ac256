"""VideoLLaMA 2 as one pure network: encode the frames, splice their tokens in, decode.

The batch is one contract for training and inference (`Batch`); its shapes are static, and where
media tokens go is data (`media_index`), so that one compiled program serves every mixture of text,
images and videos.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vllama2_jax.models.cache import KVCache
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.connector import Connector
from vllama2_jax.models.decoder import Decoder
from vllama2_jax.models.vit import VisionTower, normalise


@flax.struct.dataclass
class Batch:
    """Rows of spliced tokens, each with the media that it refers to.

    B rows of L slots; F distinct frames, K clips of T time steps per row; M = K * num_tokens.

    Attributes:
      tokens: int32 [B, L]; ids, anything valid (0) at media slots and padding.
      positions: int32 [B, L]; rotary positions, restarting with each segment.
      segment_ids: int32 [B, L]; 0 is padding, samples packed into one row count from 1.
      media_index: int32 [B, L]; into the row's M media tokens, clip after clip; -1 is text.
      frames: uint8 [B, F, S, S, 3]; each distinct frame once.
      clip_frames: int32 [B, K, T]; which of the row's frames each time step uses.
      clip_mask: bool [B, K]; False where a clip slot is unused.
      targets: int32 [B, L]; the id that each slot predicts (training only).
      target_weights: float32 [B, L]; 0 where nothing is learnt (training only).
      dataset_ids: int32 [B, L]; which dataset each slot is of, to tell their losses apart.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    media_index: jax.Array
    frames: jax.Array
    clip_frames: jax.Array
    clip_mask: jax.Array
    targets: jax.Array | None = None
    target_weights: jax.Array | None = None
    dataset_ids: jax.Array | None = None


def splice(text: jax.Array, media: jax.Array, media_index: jax.Array) -> jax.Array:
    """Put media tokens in their slots: one gather and one `where`.

    Args:
      text: [B, L, W] embeddings of the ids (whatever stands at media slots is dropped).
      media: [B, M, W] tokens of the connector.
      media_index: int32 [B, L] into M; -1 keeps the text embedding.

    Returns:
      [B, L, W] in the dtype of `text`.
    """
    gathered = jax.vmap(lambda row, slots: row[slots])(media, jnp.maximum(media_index, 0))
    return jnp.where(media_index[..., None] >= 0, gathered.astype(text.dtype), text)


class VLlama2(nn.Module):
    """Frames -> tower -> connector -> decoder.

    Attributes:
      config: the shapes.
      dtype: of activations and matmuls; norms, softmax, rotary angles and logits are float32.
      param_dtype: of the parameters that `init` makes.
      remat: recomputation policy of the decoder's and the tower's blocks (see `remat.py`).
      scan_layers: one scanned stack of decoder layers (training) or a Python loop over layers with
        parameters of their own (inference; see docs/decisions/decoder-layers.md).
      split_experts: every expert has arrays of its own (inference on CPU).
      attention_backend: of the decoder: "xla", or "cudnn" (GPU, float16 or bfloat16; see
        `attention.attend`). The tower chooses by platform.
      moe_backend: of the experts' products, "blocks" or "ragged_dot" (see `grouped_matmul`).
    """

    config: VLlama2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    split_experts: bool = False
    attention_backend: str = "xla"
    moe_backend: str = "blocks"

    def setup(self):
        """Build the three networks under the names `vision`, `connector` and `decoder`."""
        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.vision = VisionTower(config=self.config.vision, remat=self.remat, **common)
        self.connector = Connector(config=self.config.connector, **common)
        self.decoder = Decoder(
            self.config.decoder,
            remat=self.remat,
            scan_layers=self.scan_layers,
            split_experts=self.split_experts,
            attention_backend=self.attention_backend,
            moe_backend=self.moe_backend,
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
        pixels = normalise(frames.reshape(-1, *frames.shape[2:]), self.config.vision)
        features = self.vision(pixels.astype(self.dtype))
        features = features.reshape(rows, num_frames, *features.shape[1:])
        by_clip = jax.vmap(lambda row, index: row[index])(features, clip_frames)
        tokens = self.connector(by_clip.reshape(rows * clips, steps, *features.shape[2:]))
        tokens = tokens.reshape(rows, clips, *tokens.shape[1:])
        if clip_mask is not None:
            tokens = jnp.where(clip_mask[..., None, None], tokens, 0)
        return tokens.reshape(rows, -1, tokens.shape[-1])

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
          media: [B, M, W] from `encode`, with `media_index` int32 [B, L]; both None for text alone.
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
        media = self.encode(batch.frames, batch.clip_frames, batch.clip_mask)
        hidden, _ = self.decode(
            batch.tokens, batch.positions, batch.segment_ids, media, batch.media_index
        )
        if self.is_initializing():
            self.logits(hidden[:, :1])
        return hidden


def init_params(config: VLlama2Config, rng: jax.Array, param_dtype=jnp.float32, **kwargs):
    """Random parameters, each in a box that carries its logical axis names.

    Use under `jax.eval_shape` for shapes alone, and `nn.meta.unbox` for plain arrays.
    """
    size, frames = config.vision.image_size, config.num_frames
    # The shortest row that touches every parameter: one clip, one text slot.
    row = jnp.zeros((1, 1), jnp.int32)
    batch = Batch(
        tokens=row,
        positions=row,
        segment_ids=row + 1,
        media_index=row - 1,
        frames=jnp.zeros((1, 1, size, size, 3), jnp.uint8),
        clip_frames=jnp.zeros((1, 1, frames), jnp.int32),
        clip_mask=jnp.ones((1, 1), bool),
    )
    model = VLlama2(config, param_dtype=param_dtype, **kwargs)
    return model.init(rng, batch)["params"]


def abstract_params(
    config: VLlama2Config, *, scan_layers: bool = True, split_experts: bool = False
) -> dict:
    """Shapes and dtypes of the parameters, as a nested dict of `jax.ShapeDtypeStruct`."""
    boxed = jax.eval_shape(
        lambda: init_params(
            config, jax.random.key(0), scan_layers=scan_layers, split_experts=split_experts
        )
    )
    return nn.meta.unbox(boxed)
