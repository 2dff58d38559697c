"""Files of weights: found, downloaded, opened safely, recognised, converted, loaded.

Imports `nets.network` and the libraries' tables in `nets`, never the factory.
"""
