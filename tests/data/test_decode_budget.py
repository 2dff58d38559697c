"""Tests of utils/data/decode_budget.py: threads share the memory for decoding."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from utils.data import image_io
from utils.data.decode_budget import DecodeBudget, budget
from utils.data.image_io import ImageError, open_image, open_to_decode, read_size


def test_threads_wait_for_each_other():
    shared = DecodeBudget(10)
    used = [0]
    most = []
    lock = threading.Lock()

    def work(amount: int) -> None:
        with shared.take(amount):
            with lock:
                used[0] += min(amount, 10)
                most.append(used[0])
            time.sleep(0.002)
            with lock:
                used[0] -= min(amount, 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 5, 10, 1, 1, 99, 2] * 4, timeout=20))
    assert max(most) <= 10
    assert len(most) == 32


def test_errors_return_what_was_taken():
    shared = DecodeBudget(10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), shared.take(10):
            raise ZeroDivisionError


def test_images_take_from_the_budget(here, monkeypatch):
    Image.new("RGB", (100, 50)).save("a.png")
    taken = []
    monkeypatch.setattr(image_io, "budget", DecodeBudget(10**9))
    monkeypatch.setattr(image_io.budget, "take", lambda amount: taken.append(amount) or budget.take(amount))
    open_image("a.png")
    with open_to_decode("a.png"):
        pass
    read_size("a.png")
    assert taken == [15 * 100 * 50] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is missing")
def test_forked_process_has_a_budget_of_its_own():
    with budget.take(10**12):
        child = os.fork()
        if not child:
            with budget.take(1):
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_formats_that_take_more_memory_may_have_fewer_pixels(here):
    Image.new("RGB", (100, 75)).save("a.jp2")
    Image.new("RGBA", (100, 75)).save("a.png")
    Image.new("RGB", (100, 75)).save("b.png")
    assert open_image("b.png", max_pixels=7500).size == (100, 75)
    for name, most, kind in (("a.jp2", 9_999, "JPEG2000 in mode RGB"), ("a.png", 8_499, "PNG in mode RGBA")):
        with pytest.raises(ImageError, match=f"pixels of {kind} take .* to decode, more than max_pixels={most}"):
            open_image(name, max_pixels=most)
        assert open_image(name, max_pixels=most + 1).size == (100, 75)
