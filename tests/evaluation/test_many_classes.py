"""Memory of the evaluation and the calibration of a network with 100,000 classes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import write_image
from utils.runs.checkpoint import BEST, find_checkpoint, load_checkpoint, save_checkpoint

CLASSES, IMAGES = 100_000, 600
EVALUATE = """
import runpy
runpy.run_path("eval.py", run_name="__main__")
"""
CALIBRATE = """
import utils.system.startup
import sys
from pathlib import Path
from utils.config.train_config import TrainConfig
from utils.data.image_list import read_list
from utils.inference.fit_calibration import calibrate_checkpoint
checkpoint, data, classes = sys.argv[1:]
images = read_list(data, int(classes))
assert calibrate_checkpoint(Path(checkpoint), images, images, TrainConfig(num_workers=0)).calibration
"""
PEAK = """
import atexit
def report():
    with open("/proc/self/status") as file:
        print("\\npeak", next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
atexit.register(report)
"""


def peak_memory(code: str, *args: object) -> int:
    """Peak memory in bytes of a new process, not counting its workers."""
    command = [sys.executable, "-c", PEAK + code, *map(str, args)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no peak memory of a process")
def test_many_classes_take_less_than_2_gb(trained, tmp_path):
    generator = torch.Generator().manual_seed(0)
    content = load_checkpoint(find_checkpoint(""))
    directions = F.normalize(torch.randn(CLASSES, 192, generator=generator), dim=1)
    head = {"head.weight": torch.randn(CLASSES, 192, generator=generator), "head.bias": torch.zeros(CLASSES)}
    content |= {
        "model": content["model"] | {"num_classes": CLASSES},
        "weights": content["weights"] | head,
        "class_names": [f"class {k}" for k in range(CLASSES)],
        "calibration": content["calibration"] | {"directions": directions},
    }
    save_checkpoint(tmp_path / BEST, content)
    paths = [write_image(tmp_path / f"{i}.png", 10 * i, seed=i) for i in range(20)]
    data = tmp_path / "list.txt"
    data.write_text("".join(f"{100 * i};{paths[i % len(paths)]}\n" for i in range(IMAGES)))
    assert peak_memory(EVALUATE, tmp_path / BEST, "--data", data, "--out", tmp_path / "out") < 2e9
    assert (tmp_path / "out" / "report.html").is_file()
    assert peak_memory(CALIBRATE, tmp_path / BEST, data, CLASSES) < 2e9
