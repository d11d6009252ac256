"""VideoLLaMA 2 in pure-functional JAX/Flax.

import vllama2_jax as vl

model = vl.load("tiny")
print(model.ask("clip.mp4", "What colour is the shape?"))
"""

import importlib

from vllama2_jax.version import __version__

# Public name -> where it lives. Importing the package pulls in nothing heavy; JAX comes with the
# first name that needs it.
_HOMES = {
    "CheckpointError": "vllama2_jax.checkpoints",
    "MediaError": "vllama2_jax.media",
    "Model": "vllama2_jax.infer.model",
    "load": "vllama2_jax.loading",
}

__all__ = ["CheckpointError", "MediaError", "Model", "__version__", "load"]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
