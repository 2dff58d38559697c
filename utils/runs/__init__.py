"""Runs on disk: folder, checkpoints, resume, log, cross-validation.

Imports `training` and the floors below it.
"""
