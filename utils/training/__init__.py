"""Training: trainer, loss, optimizer, schedule, stages, EMA, feature cache, linear probe.

Imports `annotation`, `modeling` and the floors below them.
"""
