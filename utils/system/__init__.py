"""What every program needs and none is about: files, locks, signals, seeds, digests, text, the command line.

Imports no other package of Thaw.
"""
