"""Evaluation and prediction give the same files on any number of processes."""

from pathlib import Path

import pytest

from tests.conftest import write_image
from tests.ranks import evaluations
from tests.ranks.conftest import torchrun, wait_until_gone

SHORT, LONG = (33,), (7, 33, 1001)


@pytest.fixture(scope="module")
def folder(trained_folder, tmp_path_factory) -> Path:
    """A folder with lists of images, and OOD images in a single batch, so that only rank 0 has any."""
    folder = tmp_path_factory.mktemp("evaluated")
    images = sorted((trained_folder / "datasets/train").rglob("*.png"))
    for count in LONG:
        paths = [images[i % len(images)] for i in range(count)]
        lines = [f"{int(path.parent.name == 'light')};{path}\n" for path in paths]
        (folder / f"list-{count}.txt").write_text("".join(lines), encoding="utf-8")
    for i in range(3):
        write_image(folder / "ood" / f"{i}.png", 100 * i)
    (folder / "ood/1.png").write_bytes(b"damaged")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder."""
    files = filter(Path.is_file, folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run_alone(counts: tuple[int, ...], out: Path, trained_folder: Path) -> dict[str, bytes]:
    """What one process writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained_folder)
        patch.setattr("predict.BATCH", evaluations.BATCH)
        evaluations.run_all(out, counts)
    return contents(out)


def run_ranks(ranks: int, counts: tuple[int, ...], out: Path, trained_folder: Path) -> dict[str, bytes]:
    """What several processes write."""
    script, *arguments = ("tests/ranks/evaluations.py", str(out), *map(str, counts))
    status, output = torchrun(ranks, script, *arguments, cwd=trained_folder, timeout=600)
    assert status == 0, output[-3000:]
    assert "warning: unreadable OOD image skipped" in output
    assert "rank 1" not in output
    return contents(out)


@pytest.mark.slow
def test_two_ranks(folder, trained_folder):
    expected = run_alone(SHORT, folder / "alone", trained_folder)
    assert {"33 images/metrics.json", "33 images/report.html", "comparison/flipped.csv"} <= expected.keys()
    assert {"saved/00_3.png", "sorted/dark/00.png", "all.csv"} <= expected.keys()
    assert expected["printed.txt"].endswith(b"}\n1\n")
    assert run_ranks(2, SHORT, folder / "ranks", trained_folder) == expected


@pytest.mark.slow
def test_any_number_of_ranks(folder, trained_folder):
    expected = run_alone(LONG, folder / "alone, long", trained_folder)
    for ranks in (1, 2, 3, 4):
        assert run_ranks(ranks, LONG, folder / f"{ranks}, long", trained_folder) == expected


@pytest.mark.slow
def test_a_part_on_several_ranks(folder, trained_folder):
    """It writes the same file."""
    images = sorted(map(str, (trained_folder / "datasets/train").rglob("*.png")))
    for script, arguments in {
        "eval.py": ["--data", str(folder / "list-33.txt"), "--ood", str(folder / "ood"), "--batch-size", "4"],
        "predict.py": [*images, "missing.png", *images],
    }.items():
        written = []
        for ranks in (1, 3):
            out = folder / f"{script} on {ranks}"
            target = out if script == "eval.py" else out / "all.csv"
            status, output = torchrun(ranks, script, *arguments, "--out", str(target), "--part=2/2", cwd=trained_folder)
            assert status == 0, output[-3000:]
            written.append(contents(out))
        assert written[0] == written[1]
        assert len(written[0]) == 1


@pytest.mark.slow
def test_an_unreadable_image_on_one_rank_ends_all(folder, trained_folder):
    damaged = folder / "damaged.png"
    damaged.write_bytes(b"damaged")
    lines = (folder / "list-33.txt").read_text(encoding="utf-8").splitlines()
    lines[5] = f"0;{damaged}"
    (folder / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = ("--data", str(folder / "list.txt"), "--batch-size", "4", "--out", str(folder / "unreadable"))
    status, output = torchrun(2, "eval.py", *flags, cwd=trained_folder)
    assert status != 0
    assert f"rank 1: error: {damaged} can't be read" in output
    assert not wait_until_gone(trained_folder, 5)
    assert contents(folder / "unreadable") == {}


@pytest.mark.slow
def test_arguments_are_refused_once(trained_folder):
    for script, argument in (("predict.py", "-"), ("export.py", "--format=onnx"), ("eval.py", "--merge")):
        status, output = torchrun(2, script, argument, cwd=trained_folder)
        assert status != 0
        assert output.count("error: ") == 1, output
