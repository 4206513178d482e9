"""Data sets: the catalog, loaders, images as bytes, the k-shot sampler. Imports no torch."""
