"""Prediction: a continuous-batching engine over a paged key-value cache; token ids in, token ids out."""
