"""Figures of logits and targets, as plain functions: accuracy, calibration, intervals.

Imports no other package of Thaw.
"""
