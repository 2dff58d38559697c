"""From lists to batches: image files, lists, preprocessing, transforms, datasets, sampler, loader, caches.

Imports `system`, `config` and `metrics`.
"""
