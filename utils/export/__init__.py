"""Export of a checkpoint to other formats, checked against the original, with a model card.

Imports `inference` and the floors below it.
"""
