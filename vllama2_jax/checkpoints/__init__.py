"""What a saved model is: a card, a tokenizer and arrays, written and read strictly."""

from vllama2_jax.checkpoints.card import CheckpointError, GenerationDefaults, ModelCard
from vllama2_jax.checkpoints.store import is_saved_model, load_model, save_model

__all__ = [
    "CheckpointError",
    "GenerationDefaults",
    "ModelCard",
    "is_saved_model",
    "load_model",
    "save_model",
]
