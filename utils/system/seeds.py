"""Seeds as a function of the position in a run: neither workers nor restarts change a run, and there is no generator
state to save."""

import hashlib


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit seed for drawing `purpose` at `position` (epoch, index, step) of a run; changing any argument
    gives an unrelated seed."""
    digest = hashlib.blake2b(repr((seed, purpose, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
