"""Training of draft heads."""

from eagle_jax.train.loss.eagle import eagle1_loss, eagle3_loss

__all__ = ["eagle1_loss", "eagle3_loss"]
