"""FCOS: weights, exact batches, post-processing. Knows tensors and devices, not files of images or Ray."""
