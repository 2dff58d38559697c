"""From folders to lists: scan, split, audit, duplicates, and the demo data set.

Imports `data` and the floors below it.
"""
