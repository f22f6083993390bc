"""Model directories and their weights, read as NumPy arrays. No jax here."""

from semipd_jax.models.checkpoint.opening import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
