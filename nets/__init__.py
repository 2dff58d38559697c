"""Networks, and the weights of others that they start from. Imports nothing of `utils`."""
