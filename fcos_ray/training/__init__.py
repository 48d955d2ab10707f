"""Training: the model's other mode. COCO-format truth and images in, weights for `detect` out."""
