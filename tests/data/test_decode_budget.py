"""Tests of utils/data/decode_budget.py: threads, and the workers of a loader, share the memory for decoding."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.conftest import settings, write_image
from tests.data.budget_user import AMOUNTS, SIZE, Usage, take_often
from utils.data import image_io, loader
from utils.data.dataset import FileSource, ImageDataset
from utils.data.decode_budget import DecodeBudget, SharedBudget, budget
from utils.data.image_io import ImageError, open_image, open_to_decode, read_size
from utils.data.image_list import list_in_memory
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.system.signals import WorkerDied, clear_pending


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


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & {*multiprocessing.get_all_start_methods()}))
def test_processes_wait_for_each_other(method):
    context = multiprocessing.get_context(method)
    usage = Usage(context)
    arguments = SharedBudget(SIZE, context), usage
    processes = [context.Process(target=take_often, args=arguments, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert usage.requests.value == 3 * len(AMOUNTS)
    assert usage.most.value == SIZE


class Watched(EvalTransform):
    """Counts the images that are being decoded; may die at the first one."""

    def __init__(self, context, dies: bool) -> None:
        super().__init__(PREPROCESSING)
        self.usage, self.dies = Usage(context), dies

    def region(self, image):
        self.usage.change(1)
        if self.dies and self.usage.requests.value == 1:
            time.sleep(0.5)  # until the others wait
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)
        try:
            return super().region(image)
        finally:
            self.usage.change(-1)


PREPROCESSING = Preprocessing.from_config(settings(input_shape=(16, 16)))


def watched_loader(folder, num_workers: int, dies: bool = False):
    images = list_in_memory((0, str(write_image(folder / f"{i}.png"))) for i in range(24))
    transform = Watched(loader._context(), dies)
    return loader.eval_loader(ImageDataset(FileSource(images, PREPROCESSING), transform, 0), 2, num_workers), transform


@pytest.mark.parametrize("large", [True, False])
def test_workers_of_a_loader_wait_for_each_other(here, monkeypatch, large):
    """Two images of half the budget's size are decoded at once, of its whole size one."""
    monkeypatch.setattr(loader, "SIZE", 15 * 20 * 16 * (1 if large else 2))
    batches, transform = watched_loader(here, 4)
    assert sum(len(targets) for _, targets in batches) == 24
    assert transform.usage.most.value == (1 if large else 2)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is missing")
def test_a_worker_killed_while_it_decodes_ends_the_loader(here, monkeypatch):
    """What it holds isn't returned, so the others wait until the loader stops them."""
    monkeypatch.setattr(loader, "SIZE", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds until it stops them
    batches, transform = watched_loader(here, 3, dies=True)
    with pytest.raises(WorkerDied, match="DataLoader worker"):
        list(loader.iterate_batches(batches))
    clear_pending()  # or the next test would get the error too
    workers = batches._iterator._workers
    batches._iterator._shutdown_workers()
    for worker in workers:
        worker.join(10)
    assert sorted(worker.exitcode for worker in workers) == [-signal.SIGKILL, 0, 0]  # 0: stopped by torch's handler
    assert transform.usage.requests.value == 1


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
