"""The network that a run trains: built from a config, with normalization, on a device, in a precision.

Imports `data` and the floors below it, and `nets`.
"""
