"""How good a checkpoint is: lists, mistakes, corruptions, comparison, report.

Imports `inference` and the floors below it.
"""
