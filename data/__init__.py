"""Data sets: catalog rows, sources, images as bytes, the k-shot sampler. Knows no model; imports no torch."""
