"""What a process does in `test_decode_budget.py`; a module of its own, so that a spawned one imports little."""

import time
from ctypes import c_int
from multiprocessing.context import BaseContext

from utils.data.decode_budget import SharedBudget, budget

AMOUNTS = [3, 4, 5, 10, 1, 99, 2] * 4
SIZE = 10


class Usage:
    """Counts what several processes hold at once."""

    def __init__(self, context: BaseContext) -> None:
        self.used, self.most, self.requests = (context.Value(c_int, 0) for _ in range(3))

    def change(self, amount: int) -> None:
        with self.used.get_lock():
            self.used.value += amount
            self.most.value = max(self.most.value, self.used.value)
            self.requests.value += amount > 0


def take_often(shared: SharedBudget, usage: Usage) -> None:
    budget.share(shared)
    for amount in AMOUNTS:
        with budget.take(amount):
            usage.change(min(amount, SIZE))
            time.sleep(0.005)
            usage.change(-min(amount, SIZE))
