"""Support code for every program: files, locks, signals, seeds, digests, text, the command line.

Imports no other package of Thaw.
"""
