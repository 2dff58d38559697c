"""The settings of a run, their checks, and what a recipe chooses.

Imports no other package of Thaw.
"""
