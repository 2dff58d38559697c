"""The network that a run trains: built from a config, behind its normalisation, on a device, in a precision.

Imports `data` and the floors below it, and `nets`.
"""
