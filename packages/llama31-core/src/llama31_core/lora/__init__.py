"""LoRA adapters at inference (Hu et al. 2021): read, kept beside the base weights, chosen row by row of a batch.

`adapter` and `table` import without MindSpore; `layers` computes.
"""
