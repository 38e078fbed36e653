"""Training of draft heads: data/ prepares what is learned from, loss/ says what is learned, run/ does it.

May import the decoder, conversion and measuring, never the commands.
"""

from eagle_jax.train.loss.eagle import eagle1_loss, eagle3_loss

__all__ = ["eagle1_loss", "eagle3_loss"]
