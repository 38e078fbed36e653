"""Oracle of sampling in NumPy, float64, by sorting: the next token's distribution as Hugging Face defines it."""

from __future__ import annotations

import numpy as np


def probabilities(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: np.ndarray | None = None,
    seen: set[int] = frozenset(),
) -> np.ndarray:
    """Returns probabilities [V] of logits [V]. Ties with the last kept token are kept."""
    x = logits.astype(np.float64)
    if logit_bias is not None:
        x = x + logit_bias
    for token in seen:
        x[token] = x[token] * repetition_penalty if x[token] < 0 else x[token] / repetition_penalty
    if temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x = x / temperature
    if top_k:
        x = np.where(x >= np.sort(x)[-min(top_k, len(x))], x, -np.inf)
    if top_p < 1:
        x = np.where(_softmax(x) >= np.sort(_softmax(x))[::-1][nucleus(x, top_p)[0] - 1], x, -np.inf)
    p = _softmax(x)
    return _softmax(np.where(p >= min_p * p.max(), x, -np.inf))


def nucleus(x: np.ndarray, top_p: float) -> tuple[int, float]:
    """Returns the size of the nucleus, and the distance of top_p to the nearest cumulative sum."""
    before = np.concatenate([[0.0], np.cumsum(np.sort(_softmax(x))[::-1])[:-1]])  # more probable than the i-th
    return int((before < top_p).sum()), float(np.abs(before - top_p).min())


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
