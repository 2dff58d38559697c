"""Load batches from lists: image files, preprocessing, transforms, datasets, sampler, loader, caches.

Imports `system`, `config` and `metrics`.
"""
