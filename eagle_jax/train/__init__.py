"""Training of draft heads: data/ reads and packs documents, loss/ has the losses, run/ the training loop.

May import the decoder, conversion and measuring, never the commands.
"""

from eagle_jax.train.loss.dflash import DFlashObjective
from eagle_jax.train.loss.eagle import eagle1_loss, eagle3_loss
from eagle_jax.train.loss.objective import Eagle1Objective, Eagle3Objective
from eagle_jax.train.loss.p_eagle import PEagleObjective
from eagle_jax.train.run.step import optimizer_state, optimizer_step

__all__ = [
    "DFlashObjective",
    "Eagle1Objective",
    "Eagle3Objective",
    "PEagleObjective",
    "eagle1_loss",
    "eagle3_loss",
    "optimizer_state",
    "optimizer_step",
]
