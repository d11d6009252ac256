"""An independent audio-visual model in PyTorch: `oracle.py`'s networks with speechbrain's BEATs."""

import dataclasses
import json
from pathlib import Path

import audio_oracle
import numpy as np
import oracle
import torch
from torch import nn

# Sizes of the miniature's tower, by the names of `models.config.BeatsConfig`.
TOWER = dict(
    patch_size=16,
    patch_width=24,
    width=32,
    mlp_dim=48,
    num_layers=3,
    num_heads=4,
    conv_groups=4,
)


@dataclasses.dataclass
class AVMiniature(oracle.Miniature):
    """A miniature that hears.

    Attributes:
      audio: speechbrain's BEATs.
      audio_connector: dense layers.
    """

    audio: nn.Module
    audio_connector: nn.Module

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All of them, as `oracle.released_state` takes them."""
        return *super().networks, self.audio, self.audio_connector

    def hear(self, bank: np.ndarray) -> torch.Tensor:
        """Filter bank [frames, 128] -> [tokens, width]."""
        normal = ((bank[None] - 15.41663) / (2 * 6.55582)).astype(np.float32)
        return self.audio_connector(audio_oracle.run_beats(self.audio, normal))[0]

    @torch.no_grad()
    def encode(self, media) -> torch.Tensor:
        """(frames or None, bank or None) -> [tokens, width], pictures before sound."""
        frames, bank = media
        parts = [] if frames is None else [super().encode(frames)]
        return torch.cat(parts + ([] if bank is None else [self.hear(bank)]))


def write_av_miniature(folder: Path, seed: int = 0, seconds: float = 30.0) -> AVMiniature:
    """SigLIP, stc_connector_v35, BEATs and Qwen2 with random weights, in the released layout."""
    from vllama2_jax.models.config import BeatsConfig  # sizes alone

    small = oracle.write_miniature(folder, "qwen2", "siglip", "stc_connector_v35", seed=seed)
    sizes = BeatsConfig(**TOWER, seconds=seconds)
    audio = audio_oracle.speechbrain_beats(sizes, seed)
    width = small.language.config.hidden_size
    connector = nn.Sequential(nn.Linear(sizes.width, width), nn.GELU(), nn.Linear(width, width))
    oracle._randomise(connector)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "mm_audio_tower": "BEATs.pt",
        "mm_projector_a_type": "mlp2x_gelu",
        "mm_hidden_size_a": sizes.width,
        "hidden_size_a": width,
        # No released field gives the tower's sizes.
        "vllama2_jax": {"name": "miniature", "audio": dataclasses.asdict(sizes)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = oracle.released_state(*small.networks, audio, connector)
    oracle.write_shards(folder, state, 2)
    parts = {field.name: getattr(small, field.name) for field in dataclasses.fields(small)}
    return AVMiniature(**parts, audio=audio.eval(), audio_connector=connector.eval())
