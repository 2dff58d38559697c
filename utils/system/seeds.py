"""Seeds as a function of the position in a run: neither workers nor restarts change a run, and there is no generator
state to save."""

import hashlib


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit seed for one random draw of a run; changing any argument gives an unrelated seed.

    Args:
        seed: the seed of the run.
        purpose: what is drawn.
        position: where in the run: epoch, index, step.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
