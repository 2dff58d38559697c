"""Metrics as plain functions of logits and targets: accuracy, calibration, confidence intervals.

Imports no other package of Thaw.
"""
