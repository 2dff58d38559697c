"""Inference: classifiers from checkpoints and ONNX files, predictions, rejection, explanations.

Imports `runs` and the floors below it.
"""
