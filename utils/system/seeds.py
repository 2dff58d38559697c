"""Randomness as a function: what is drawn depends on where in the run it is drawn, not on what was drawn before.

So neither the number of workers nor a restart changes a run, and there is no generator state to save.
"""

import hashlib


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A seed of 64 bits for one draw of a run: `purpose` says for what, `position` where (epoch, index, step).

    Any change of any argument gives an unrelated seed.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
