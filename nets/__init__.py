"""Networks, and loading of pretrained weights. Imports nothing from `utils`."""
