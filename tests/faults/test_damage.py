"""Damaged files, full disks and malicious files."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import eval as evaluation
import predict
import train
from nets.weights import tree
from nets.weights.load import read_weights
from nets.weights.pretrained import find_pretrained
from tests.conftest import NAMES, SMALL, settings
from utils.modeling.build import build_network
from utils.runs import saving
from utils.runs.checkpoint import (
    BEST,
    LAST,
    OLD_VERSIONS,
    SaveError,
    load_checkpoint,
    load_newest,
    read_progress,
    save_checkpoint,
)
from utils.runs.resume import open_run


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    """A copy of a finished run, to be damaged."""
    (source,) = (trained / "logs").iterdir()
    return Path(shutil.copytree(source, tmp_path / "run"))


@pytest.mark.parametrize("seed", range(4))
def test_truncation_is_detected_and_an_older_checkpoint_is_loaded(run_copy, capsys, seed):
    """5 lengths each, 20 in total."""
    whole = (run_copy / LAST).read_bytes()
    lengths = [0, 1, 21, len(whole) - 1, len(whole) - 72] if seed == 0 else None
    for length in lengths or random.Random(seed).sample(range(len(whole)), 5):
        (run_copy / LAST).write_bytes(whole[:length])
        path, content = load_newest(run_copy)
        assert path.name != LAST
        assert content["step"] == 22  # the best, or the one of the same epoch
        assert LAST in capsys.readouterr().out


@pytest.mark.parametrize("number", [10, pytest.param(95, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_detected_and_an_older_checkpoint_is_loaded(run_copy, capsys, number):
    """Random bits and the ends of the file, 100 in total."""
    whole = (run_copy / LAST).read_bytes()
    bits = [0, 8 * len(whole) - 1, 8 * (len(whole) - 64), 8 * (len(whole) - 68), 8 * (len(whole) - 93)]
    bits += random.Random(0).sample(range(8 * len(whole)), number)
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (run_copy / LAST).write_bytes(damaged)
        path, _ = load_newest(run_copy)
        assert path.name != LAST, f"bit {bit} of {8 * len(whole)}"
        output = capsys.readouterr().out
        assert LAST in output and "trying the next older checkpoint" in output


def test_a_run_without_intact_checkpoint_is_refused(run_copy):
    for path in run_copy.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert load_newest(run_copy) is None
    with pytest.raises(ValueError, match="it has no intact checkpoint"):
        open_run(settings(**SMALL, resume=str(run_copy)), ["dark", "light"], {})


def test_evaluation_refuses_a_damaged_checkpoint(run_copy):
    (run_copy / BEST).write_bytes((run_copy / BEST).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{BEST} .*cut off"):
        evaluation.main(model_path=str(run_copy))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size, or skip the test."""
    with contextlib.ExitStack() as mounted:

        def mount(size: int) -> Path:
            folder = tmp_path / "disk"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("no permission to mount a small disk")
            mounted.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield mount


CONFIG = SMALL | {"save_period": 1, "keep_periodic": 1}


@pytest.mark.parametrize("checkpoints", [0.2, 1.5, 2.5])  # the first one is smaller, without optimizer
def test_a_full_disk_keeps_earlier_checkpoints(two_classes, small_disk, monkeypatch, checkpoints, run_copy, capsys):
    """As with a quota, the disk is full only when written to."""
    disk = small_disk(int(checkpoints * (run_copy / LAST).stat().st_size))
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 1 << 60)
    os.chdir(two_classes.parent)
    with pytest.raises(SaveError, match=r"tensors can't be written \(No space left on device\): it needs .* are free"):
        train.main(settings(**CONFIG, save_dir=str(disk)))
    kept = list(disk.rglob("*.safetensors"))
    assert (len(kept) > 0) == (checkpoints > 1) and len(kept) >= int(checkpoints)
    for path in kept:
        load_checkpoint(path)
    assert not list(disk.rglob("*.partial"))
    assert bool(kept) or not list(disk.iterdir())
    assert ("is saved at step" in capsys.readouterr().out) == bool(kept)


def test_free_space_is_checked_before_the_first_epoch(two_classes, small_disk, run_copy):
    disk = small_disk(2 * (run_copy / LAST).stat().st_size)
    os.chdir(two_classes.parent)
    with pytest.raises(ValueError, match=r"save_dir=.*5 checkpoints of up to .* need .* more, .* are free"):
        train.main(settings(**CONFIG, save_dir=str(disk)))


def test_a_run_resumes_once_there_is_space(two_classes, small_disk, monkeypatch, run_copy):
    disk = small_disk(int(2.5 * (run_copy / LAST).stat().st_size))
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 1 << 60)
    os.chdir(two_classes.parent)
    with pytest.raises(SaveError):
        train.main(settings(**CONFIG, save_dir=str(disk)))
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    train.main(settings(**CONFIG, save_dir=str(disk)))
    (folder,) = disk.iterdir()
    assert load_checkpoint(folder / LAST)["finished"]


def test_a_read_only_folder(two_classes, small_disk):
    disk = small_disk(1 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(SaveError, match=r"save_dir=.*can't be written \(Read-only file system"):
        train.main(settings(**CONFIG, save_dir=str(disk)))


def test_a_limit_on_file_sizes(run_copy):
    content = load_checkpoint(run_copy / LAST)
    del content["format_version"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(SaveError, match=r"can't be written \(File too large\)"):
            save_checkpoint(run_copy / LAST, content | {"step": 99})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(run_copy / LAST)["step"] == 22


class Code:
    def __reduce__(self):
        return (os.system, ("touch canary",))


class Bytes:
    """torch.load with weights_only allocates any number of bytes."""

    def __reduce__(self):
        return (bytearray, (600_000_000,))


class Numbers:
    def __reduce__(self):
        return (torch.FloatTensor, (150_000_000,))


class Doubles:
    """torch expands a tensor with few stored numbers."""

    def __reduce__(self):
        few = torch.zeros(1).expand(100_000_000)
        return (torch._utils._rebuild_device_tensor_from_cpu_tensor, (few, torch.float64, "cpu", False))


def write_trap(kind: str, path: Path, whole: Path) -> None:
    """Write a malicious version of the checkpoint `whole`."""
    content = load_checkpoint(whole) | {"format_version": OLD_VERSIONS[0]}
    whole = path.with_name("harmless.pth")
    torch.save(content, whole)
    if kind == "top level":
        torch.save(Code(), path)
    elif kind in ("optimizer", "model", "history"):
        torch.save(content | {kind: {"state": Code()}}, path)
    elif kind == "old format":
        torch.save(content | {"optimizer": Code()}, path, _use_new_zipfile_serialization=False)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            trap = io.BytesIO()
            torch.save(Code(), trap, _use_new_zipfile_serialization=False)
            for name in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(name)
                info.size = len(trap.getvalue())
                archive.addfile(info, io.BytesIO(trap.getvalue()))
    elif kind == "zip bomb":
        with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in plain.infolist():
                data = plain.read(entry)
                bomb.writestr(entry.filename, bytes(1 << 28) if entry.filename.endswith("data/0") else data)
    elif kind == "legacy tensor":
        torch.save(content | {"calibration": {"x": Numbers()}}, path)
    elif kind == "expanded doubles":
        torch.save(content | {"calibration": {"x": Doubles()}}, path)
    elif kind == "expanded doubles by another name":
        torch.save(content | {"calibration": {"x": Doubles()}}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"ctorch._utils\n_rebuild_device", b"ctorch\n_utils._rebuild_device"))
        assert path.read_bytes() != whole
    elif kind == "bytearray":
        torch.save(content | {"history": [Bytes()]}, path)
    elif kind == "bytearray in the old format, then an archive":
        torch.save(content | {"history": [Bytes()]}, path, _use_new_zipfile_serialization=False)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x", b"")
    elif kind == "bytearray in the old format":
        torch.save(content | {"history": [Bytes()]}, path, _use_new_zipfile_serialization=False)
    elif kind in ("bytearray, then a second pickle", "bytearray in capitals"):
        torch.save(content | {"history": [Bytes()]}, path)
        with zipfile.ZipFile(path) as bad, zipfile.ZipFile(whole) as good:
            bad_entries = [(entry.filename, bad.read(entry)) for entry in bad.infolist()]
            (pickled,) = (good.read(name) for name in good.namelist() if name.endswith(".pkl"))
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two entries have one name
            for name, data in bad_entries:
                is_pickle = name.endswith(".pkl")
                archive.writestr(name.replace(".pkl", ".PKL") if kind.endswith("capitals") else name, data)
                if is_pickle and kind.endswith("second pickle"):
                    archive.writestr(name, pickled)
    elif kind == "nested lists":
        lists: list = []
        for _ in range(60):
            lists = [lists, lists]
        torch.save(content | {"format_version": lists, "origin": {"file": lists}}, path)
    elif kind == "recursive list":
        lists = []
        lists.append(lists)
        torch.save(content | {"format_version": lists}, path)
    elif kind == "expanded terabyte":
        huge = torch.zeros(1).expand(1 << 38)
        torch.save(content | {"weights": dict.fromkeys(content["weights"], huge)}, path)


TRAPS = (
    *("expanded doubles", "expanded doubles by another name"),
    *("top level", "optimizer", "model", "history", "old format", "tar"),
    *("zip bomb", "bytearray", "expanded terabyte", "nested lists", "recursive list"),
    "legacy tensor",
    "bytearray in the old format, then an archive",
    *("bytearray in the old format", "bytearray, then a second pickle", "bytearray in capitals"),
)
ENTRIES = ("model_path", "pretrained", "resume", "eval", "predict")


def open_with(entry: str, file: Path) -> None:
    """Open a file as a user would; in a run folder it is the only checkpoint."""
    if entry == "model_path":
        build_network(settings(**SMALL, model_path=str(file)), NAMES)
    elif entry == "pretrained":
        Path("model_data").mkdir(exist_ok=True)
        shutil.copy(file, "model_data/vit-patch_16.pth")
        read_weights(find_pretrained("vit_b_16").path)
    elif entry == "resume":
        open_run(settings(**SMALL, resume=str(file.parent)), ["dark", "light"], {})
    elif entry == "eval":
        evaluation.main(model_path=str(file))
    else:
        predict.main(("image.png",), model_path=str(file))


PAIRS = [(kind, entry) for kind in TRAPS for entry in ENTRIES]
FAST = {(kind, ENTRIES[i % len(ENTRIES)]) for i, kind in enumerate(TRAPS)}


@pytest.mark.parametrize(
    ("kind", "entry"), [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_malicious_files_neither_run_code_nor_exhaust_memory(trained, tmp_path, monkeypatch, kind, entry):
    (source,) = (trained / "logs").iterdir()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    write_trap(kind, folder / LAST, source / LAST)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = peak_memory()
    with pytest.raises(ValueError, match=r"opened as weights|intact|damaged"):
        open_with(entry, folder / LAST)
    assert not list(tmp_path.rglob("canary"))
    assert peak_memory() - before < 200_000  # the bomb has 268 MB


def peak_memory() -> int:
    """The peak memory of this process since the last reset, in kB."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line)


def test_the_malicious_file_works_without_protection(here):
    """Otherwise the test above would prove nothing."""
    torch.save({"a": Code()}, "trap.pth")
    torch.load("trap.pth", weights_only=False)
    assert Path("canary").exists()


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, None),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 1 << 60),
    ],
)
def test_a_header_that_claims_terabytes(here, header, size):
    text = json.dumps(header).encode()
    Path("w.safetensors").write_bytes(struct.pack("<Q", size or len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match=r"w\.safetensors can't be opened as weights"):
        read_weights("w.safetensors")


def test_data_is_flushed_before_the_rename(here, tmp_path):
    """In system calls, since a kill doesn't lose what a power failure would."""
    program = (
        "import torch; from utils.runs.checkpoint import KEYS, save_checkpoint; "
        "save_checkpoint('a.safetensors', {k: t() for k, t in KEYS.items() if k != 'format_version'})"
    )
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat2", "-o", "trace", sys.executable, "-c", program]
    if not shutil.which("strace") or subprocess.run(["strace", "-o", "probe", "true"], capture_output=True).returncode:
        pytest.skip("strace isn't available")
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    lines = Path("trace").read_text().splitlines()
    calls = [line.split(maxsplit=1)[1] for line in lines if ".safetensors" in line or "fsync" in line]
    assert [call.partition("(")[0] for call in calls] == ["fsync", "rename", "fsync"]
    assert ".partial" in calls[0]
    assert f"<{here}>" in calls[2]


@pytest.mark.parametrize("note", ["[1]", "[" * 60_000, '{"step": "x", "finished": false}', "null"])
def test_malicious_notes(run_copy, monkeypatch, note):
    """Each start reads the notes of all last checkpoints."""
    metadata = {"plain": "{}", "note": note, "groups": "{}", "sha256": ""}
    safetensors.torch.save_file({}, run_copy / "ep999-loss.safetensors", metadata)
    assert read_progress(run_copy / "ep999-loss.safetensors") is None
    assert load_newest(run_copy)[0].name == LAST


@pytest.mark.parametrize(
    "plain",
    [
        "[" * 100_000,
        "[1]",
        '{"weights": {"$tensor": ["x"]}}',
        '{"weights": {"$items": 3}}',
        '{"weights": {"$items": [[[], 1]]}}',
        '{"format_version": 5}',
        '{"format_version": {"$tuple": 7}}',
    ],
)
def test_malicious_descriptions(run_copy, plain):
    """With a checksum that is right."""
    path = run_copy / LAST
    monkey = {"plain": plain, "note": "{}", "groups": "{}", "sha256": tree.UNSEALED}
    header = json.dumps({"__metadata__": monkey}).encode()
    header = header.replace(tree.UNSEALED.encode(), hashlib.sha256(header).hexdigest().encode())
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"is damaged: |can't be used: it lacks|isn't a checkpoint of Thaw"):
        load_checkpoint(path)
