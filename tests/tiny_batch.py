"""Batches as the loop takes them."""

import numpy as np


def one_document(tokens, targets, weights=1.0):
    """Rows of a document each: `tokens` and `targets` (B, T), `weights` one for all or (B, T)."""
    B, T = np.shape(tokens)
    return {
        "tokens": np.asarray(tokens, np.int32),
        "targets": np.asarray(targets, np.int32),
        "weights": np.broadcast_to(np.float32(weights), (B, T)),
        "segment_ids": np.ones((B, T), np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }
