"""Files that were damaged, disks that are full, and files that mean harm."""

import codecs
import contextlib
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
import torch

import eval as evaluation
import predict
import train
from nets.weights import seal
from nets.weights.load import read_weights
from nets.weights.pretrained import find_pretrained
from tests.conftest import NAMES, SMALL, settings
from utils.modeling.build import build_network
from utils.runs import run
from utils.runs.checkpoint import BEST, LAST, SaveError, load_checkpoint, load_newest, read_progress, save_checkpoint
from utils.runs.resume import open_run


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    """A finished run's folder, to be damaged."""
    (source,) = (trained / "logs").iterdir()
    return Path(shutil.copytree(source, tmp_path / "run"))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_cut_off_is_seen_and_the_one_before_is_taken(run_copy, capsys, seed):
    """5 lengths each, 20 in all."""
    whole = (run_copy / LAST).read_bytes()
    lengths = [0, 1, 21, len(whole) - 1, len(whole) - 72] if seed == 0 else None
    for length in lengths or random.Random(seed).sample(range(len(whole)), 5):
        (run_copy / LAST).write_bytes(whole[:length])
        path, content = load_newest(run_copy)
        assert path.name != LAST
        assert content["step"] == 22  # the best, or the one of the same epoch
        assert LAST in capsys.readouterr().out


@pytest.mark.parametrize("number", [10, pytest.param(95, marks=pytest.mark.slow)])
def test_a_single_bit_is_seen_and_the_one_before_is_taken(run_copy, capsys, number):
    """Bits anywhere and at the file's ends: 100 in the whole form."""
    whole = (run_copy / LAST).read_bytes()
    bits = [0, 8 * len(whole) - 1, 8 * (len(whole) - 64), 8 * (len(whole) - 68), 8 * (len(whole) - 93)]
    bits += random.Random(0).sample(range(8 * len(whole)), number)
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (run_copy / LAST).write_bytes(damaged)
        path, _ = load_newest(run_copy)
        assert path.name != LAST, f"bit {bit} of {8 * len(whole)}"
        told = capsys.readouterr().out
        assert LAST in told and "looking for the newest one before it" in told


def test_no_whole_checkpoint_is_an_error(run_copy):
    for path in run_copy.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    assert load_newest(run_copy) is None
    with pytest.raises(ValueError, match="it has no whole checkpoint"):
        open_run(settings(**SMALL, resume=str(run_copy)), ["dark", "light"], {})


def test_a_damaged_best_is_an_error_for_evaluation(run_copy):
    (run_copy / BEST).write_bytes((run_copy / BEST).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{BEST} .*cut off"):
        evaluation.main(model_path=str(run_copy))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes, or skips."""
    with contextlib.ExitStack() as mounted:

        def mount(size: int) -> Path:
            folder = tmp_path / "disk"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("no right to mount a small disk")
            mounted.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield mount


CONFIG = SMALL | {"save_period": 1, "keep_periodic": 1}


@pytest.mark.parametrize("checkpoints", [0.2, 1.5, 2.5])  # the first is smaller: there is no optimizer yet
def test_a_full_disk_leaves_what_was_saved(two_classes, small_disk, monkeypatch, checkpoints, run_copy, capsys):
    """The disk is seen to be full only when it is written to, as with a quota."""
    disk = small_disk(int(checkpoints * (run_copy / LAST).stat().st_size))
    monkeypatch.setattr(run, "free_bytes", lambda folder: 1 << 60)
    os.chdir(two_classes.parent)
    with pytest.raises(SaveError, match=r"\.pth can't be written \(No space left on device\)\. It takes .* are free"):
        train.main(settings(**CONFIG, save_dir=str(disk)))
    kept = list(disk.rglob("*.pth"))
    assert (len(kept) > 0) == (checkpoints > 1) and len(kept) >= int(checkpoints)
    for path in kept:
        load_checkpoint(path)
    assert not list(disk.rglob("*.partial"))
    assert bool(kept) or not list(disk.iterdir())
    assert ("is saved at step" in capsys.readouterr().out) == bool(kept)


def test_a_full_disk_is_seen_before_the_first_epoch(two_classes, small_disk, run_copy):
    disk = small_disk(2 * (run_copy / LAST).stat().st_size)
    os.chdir(two_classes.parent)
    with pytest.raises(ValueError, match=r"save_dir=.*5 checkpoints of up to .* take .* more, and .* are free"):
        train.main(settings(**CONFIG, save_dir=str(disk)))


def test_a_run_goes_on_once_there_is_room(two_classes, small_disk, monkeypatch, run_copy):
    disk = small_disk(int(2.5 * (run_copy / LAST).stat().st_size))
    monkeypatch.setattr(run, "free_bytes", lambda folder: 1 << 60)
    os.chdir(two_classes.parent)
    with pytest.raises(SaveError):
        train.main(settings(**CONFIG, save_dir=str(disk)))
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    train.main(settings(**CONFIG, save_dir=str(disk)))
    (folder,) = disk.iterdir()
    assert load_checkpoint(folder / LAST)["finished"]


def test_a_folder_that_cannot_be_written(two_classes, small_disk):
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


class Trap:
    def __reduce__(self):
        return (os.system, ("touch canary",))


class Bytes:
    """Which torch's safe opening makes, however many there are to be."""

    def __reduce__(self):
        return (bytearray, (600_000_000,))


class Digits:
    """Bytes twice as long each time they are encoded."""

    def __reduce__(self):
        return (codecs.encode, (codecs.encode(bytes(1 << 20), "hex"), "hex"))


class Numbers:
    def __reduce__(self):
        return (torch.FloatTensor, (150_000_000,))


class Doubles:
    """Which torch makes of a tensor however few of its numbers are in the file."""

    def __reduce__(self):
        few = torch.zeros(1).expand(100_000_000)
        return (torch._utils._rebuild_device_tensor_from_cpu_tensor, (few, torch.float64, "cpu", False))


def write_trap(kind: str, path: Path, whole: Path) -> None:
    """A file that means harm, in the place of the checkpoint `whole`."""
    content = torch.load(whole, weights_only=True)
    if kind == "at the top":
        torch.save(Trap(), path)
    elif kind in ("optimizer", "model", "history"):
        torch.save(content | {kind: {"state": Trap()}}, path)
    elif kind == "old format":
        torch.save(content | {"optimizer": Trap()}, path, _use_new_zipfile_serialization=False)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            trap = io.BytesIO()
            torch.save(Trap(), trap, _use_new_zipfile_serialization=False)
            for name in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(name)
                info.size = len(trap.getvalue())
                archive.addfile(info, io.BytesIO(trap.getvalue()))
    elif kind == "zip bomb":
        with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in plain.infolist():
                data = plain.read(entry)
                bomb.writestr(entry.filename, bytes(1 << 28) if entry.filename.endswith("data/0") else data)
    elif kind == "digits of digits":
        torch.save(content | {"history": [Digits()]}, path)
    elif kind == "a tensor made when it is opened":
        torch.save(content | {"calibration": {"x": Numbers()}}, path)
    elif kind == "a tensor of doubles made when it is opened":
        torch.save(content | {"calibration": {"x": Doubles()}}, path)
    elif kind == "the same by another way to write its name":
        torch.save(content | {"calibration": {"x": Doubles()}}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"ctorch._utils\n_rebuild_device", b"ctorch\n_utils._rebuild_device"))
        assert path.read_bytes() != whole
    elif kind == "bytearray":
        torch.save(content | {"history": [Bytes()]}, path)
    elif kind == "bytearray in the old format before an archive":
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
    elif kind == "lists within lists":
        lists: list = []
        for _ in range(60):
            lists = [lists, lists]
        torch.save(content | {"format_version": lists, "origin": {"file": lists}}, path)
    elif kind == "a list in itself":
        lists = []
        lists.append(lists)
        torch.save(content | {"format_version": lists}, path)
    elif kind == "one number for a terabyte":
        huge = torch.zeros(1).expand(1 << 38)
        torch.save(content | {"weights": dict.fromkeys(content["weights"], huge)}, path)


TRAPS = (
    *("a tensor of doubles made when it is opened", "the same by another way to write its name"),
    *("at the top", "optimizer", "model", "history", "old format", "tar"),
    *("zip bomb", "bytearray", "one number for a terabyte", "lists within lists", "a list in itself"),
    *("digits of digits", "a tensor made when it is opened"),
    "bytearray in the old format before an archive",
    *("bytearray in the old format", "bytearray, then a second pickle", "bytearray in capitals"),
)
DOORS = ("model_path", "pretrained", "resume", "eval", "predict")


def go_through(door: str, file: Path) -> None:
    """Open a file as a user would; that of a run's folder is its only checkpoint."""
    if door == "model_path":
        build_network(settings(**SMALL, model_path=str(file)), NAMES)
    elif door == "pretrained":
        Path("model_data").mkdir(exist_ok=True)
        shutil.copy(file, "model_data/vit-patch_16.pth")
        read_weights(find_pretrained("vit_b_16").path)
    elif door == "resume":
        open_run(settings(**SMALL, resume=str(file.parent)), ["dark", "light"], {})
    elif door == "eval":
        evaluation.main(model_path=str(file))
    else:
        predict.main(("image.png",), model_path=str(file))


PAIRS = [(kind, door) for kind in TRAPS for door in DOORS]
IN_SHORT = {(kind, DOORS[i % len(DOORS)]) for i, kind in enumerate(TRAPS)}


@pytest.mark.parametrize(
    ("kind", "door"), [pair if pair in IN_SHORT else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_no_file_runs_code_or_takes_more_memory_than_it_is_long(trained, tmp_path, monkeypatch, kind, door):
    (source,) = (trained / "logs").iterdir()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    write_trap(kind, folder / LAST, source / LAST)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_memory()
    with pytest.raises(ValueError, match=r"opened as weights|whole|damaged"):
        go_through(door, folder / LAST)
    assert not list(tmp_path.rglob("canary"))
    assert peak_memory() - before < 200_000  # the bomb has 268 MB


def peak_memory() -> int:
    """Of this process since the peak was last forgotten, in kB."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line)


def test_the_traps_go_off_where_nobody_looks(here):
    """Else the test above would prove nothing."""
    torch.save({"a": Trap()}, "trap.pth")
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


def test_bytes_reach_the_disk_before_the_name_does(here, tmp_path):
    """As the system sees it: a kill doesn't lose what only a power cut would."""
    program = (
        "import torch; from utils.runs.checkpoint import KEYS, save_checkpoint; "
        "save_checkpoint('a.pth', {k: t() for k, t in KEYS.items() if k != 'format_version'})"
    )
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat2", "-o", "trace", sys.executable, "-c", program]
    if not shutil.which("strace") or subprocess.run(["strace", "-o", "probe", "true"], capture_output=True).returncode:
        pytest.skip("no strace here")
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    lines = Path("trace").read_text().splitlines()
    calls = [line.split(maxsplit=1)[1] for line in lines if ".pth" in line or "fsync" in line]
    assert [call.partition("(")[0] for call in calls] == ["fsync", "rename", "fsync"]
    assert ".partial" in calls[0]
    assert f"<{here}>" in calls[2]


def test_two_archives_in_one_file(run_copy):
    """The end names the first directory, and another stands right before it: readers differ in which they take."""
    whole = (run_copy / LAST).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        directory, end = archive.start_dir, len(whole) - len(archive.comment) - 22
    twice = whole[:end] + whole[directory:end] + whole[end : end + 20] + bytes(2)
    (run_copy / LAST).write_bytes(twice)
    with pytest.raises(ValueError, match="two archives"):
        load_checkpoint(run_copy / LAST)
    # The same, of a file that claims to be so large that its end has no room to say where the directory is.
    large = whole[:end] + whole[directory:end] + whole[end : end + 16] + b"\xff" * 4 + bytes(2)
    (run_copy / LAST).write_bytes(large)
    with pytest.raises(ValueError, match="two archives"):
        load_checkpoint(run_copy / LAST)


@pytest.mark.parametrize("note", ["[1]", "[" * 60_000, '{"step": "x", "finished": false}', "null"])
def test_a_note_that_means_harm(run_copy, monkeypatch, note):
    """The note is read of every run's last checkpoint at each start."""
    with (run_copy / "ep999-loss.pth").open("w+b") as file:
        torch.save({}, file)
        monkeypatch.setattr(seal.json, "dumps", lambda _: note)
        seal.seal(file, {})
    assert read_progress(run_copy / "ep999-loss.pth") is None
    assert load_newest(run_copy)[0].name == LAST
