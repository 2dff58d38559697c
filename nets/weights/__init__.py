"""Find, download, open, recognize, convert and load files of weights.

May import `nets.network`, `nets.timm_networks` and `nets.torchvision_networks`, but not the factory.
"""
