"""Create lists from folders of images: scan, split, audit, near-duplicates, and the built-in digits.

Imports `data` and the floors below it.
"""
