"""Create lists from folders of images: scan, split, audit, near-duplicates, outliers, and the built-in digits.

Imports `modeling` and the floors below it.
"""
