"""Evaluation of a checkpoint: lists, mistakes, corruptions, comparison, report.

Imports `inference` and the floors below it.
"""
