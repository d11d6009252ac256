"""Files -> NumPy: frames of videos and images, filter banks of sound. No JAX here."""

from vllama2_jax.media.clip import Clip, MediaInfo, load_clip, media_kind, probe
from vllama2_jax.media.errors import Limits, MediaError
from vllama2_jax.media.fbank import NUM_BINS
from vllama2_jax.media.image import CLIP_336, SIGLIP_384, ImageSpec, normalise, prepare
from vllama2_jax.media.preset import PAPER, PRESETS, REFERENCE, MediaPreset
from vllama2_jax.media.sound import Sound, SoundSpec, load_sound

__all__ = [
    "CLIP_336",
    "NUM_BINS",
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
    "Sound",
    "SoundSpec",
    "load_clip",
    "load_sound",
    "media_kind",
    "normalise",
    "prepare",
    "probe",
]
