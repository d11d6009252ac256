"""Files -> NumPy: sampled, resized frames of videos and images. No JAX here."""

from vllama2_jax.media.clip import Clip, MediaInfo, load_clip, probe
from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.image import CLIP_336, SIGLIP_384, ImageSpec, normalise, prepare
from vllama2_jax.media.preset import PAPER, PRESETS, REFERENCE, MediaPreset

__all__ = [
    "CLIP_336",
    "PAPER",
    "PRESETS",
    "REFERENCE",
    "SIGLIP_384",
    "Clip",
    "ImageSpec",
    "Limits",
    "MediaError",
    "MediaInfo",
    "MediaPreset",
    "load_clip",
    "normalise",
    "prepare",
    "probe",
]
