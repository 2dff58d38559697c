"""From a checkpoint to predictions: classifier, rejection, explanations, exported files read back.

Imports `runs` and the floors below it.
"""
