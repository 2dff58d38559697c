"""Checkpoints whose tensors are in files of their own: nets/weights/pieces.py, utils/runs/saving.py. tests/ranks/ has
those that several processes write."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from nets.weights.digest import digest_file
from nets.weights.pieces import Damaged, Pieces, read_group
from tests.conftest import TINY, settings
from tests.faults.harness import digest
from utils.runs.checkpoint import BEST, LAST, amend_checkpoint, load_checkpoint, prune_pieces
from utils.runs.run import Run
from utils.runs.saving import must_divide

WHOLE = TINY | {"ema_decay": 0.9, "cache_features": False, "keep_periodic": 0}
DIVIDED = WHOLE | {"divide_checkpoints": "yes"}


def newest_run():
    return max(Path("logs").iterdir())


def state(path):
    content = load_checkpoint(path)
    return digest([content[name] for name in ("weights", "weights_in_training", "optimizer", "step", "finished")])


def write_pieces(folder, pieces):
    """Files as torch.distributed.checkpoint writes them: {file: {name: (place, tensor)}}; their digests."""
    folder.mkdir()
    for name, content in pieces.items():
        places = {key: {"saved_offsets": place} for key, (place, _) in content.items()}
        tensors = {key: tensor.contiguous() for key, (_, tensor) in content.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places)}
        safetensors.torch.save_file(tensors, folder / name, metadata)
    return {name: digest_file(folder / name) for name in pieces}


def test_a_run_has_the_result_of_one_with_whole_checkpoints(two_classes):
    train.main(settings(**WHOLE))
    whole = newest_run()
    train.main(settings(**DIVIDED | {"resume": "no"}))
    divided = newest_run()
    assert divided != whole
    assert state(divided / LAST) == state(whole / LAST)
    assert (divided / LAST).stat().st_size < (whole / LAST).stat().st_size / 10
    # The selected checkpoint is one file, which works alone.
    shutil.copy(divided / BEST, "alone.safetensors")
    assert state("alone.safetensors") == state(whole / BEST)


def test_folders_that_no_checkpoint_needs_are_deleted(two_classes, monkeypatch):
    present = []
    write = Run._write_here

    def write_and_count(self, *args, **named):
        write(self, *args, **named)
        present.append(sorted(path.name.partition("-")[0] for path in self.folder.glob("ep*-step*-*")))

    monkeypatch.setattr(Run, "_write_here", write_and_count)
    train.main(settings(**DIVIDED))
    assert present[0] == ["ep000"]
    assert all(len(folders) <= 2 for folders in present)  # of the best and the last one
    (left,) = newest_run().glob("ep*-step*-*")
    assert left.name == json.loads(safetensors_metadata(newest_run() / LAST)["pieces"])["folder"]


def safetensors_metadata(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def interrupted_run(monkeypatch, epochs):
    """A divided run that ends after so many epochs."""
    finish = Run.finish_epoch

    def stop(self, metrics):
        finish(self, metrics)
        if self.epoch == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(settings(**DIVIDED))
    return newest_run()


def test_an_interrupted_run_resumes_with_or_without(two_classes, monkeypatch):
    train.main(settings(**DIVIDED))
    wanted = state(newest_run() / LAST)
    for now in ("yes", "no"):
        run = interrupted_run(monkeypatch, 1)
        train.main(settings(**DIVIDED | {"divide_checkpoints": now}))
        assert newest_run() == run
        assert state(run / LAST) == wanted
        assert len(list(run.glob("ep*-step*-*"))) == (now == "yes")


def test_a_run_resumes_from_the_checkpoint_before_if_a_tensor_is_damaged(two_classes, monkeypatch, capsys):
    run = interrupted_run(monkeypatch, 2)
    folder = run / json.loads(safetensors_metadata(run / LAST)["pieces"])["folder"]
    (file,) = (folder / "optimizer").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"the checksum of .*optimizer.* doesn't match"):
        load_checkpoint(run / LAST)
    load_checkpoint(run / LAST, training_state=False)  # other groups aren't affected
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is missing; it belongs to the checkpoint, copy the folder, too"):
        load_checkpoint(run / LAST)
    train.main(settings(**DIVIDED))
    output = capsys.readouterr().out
    assert "trying the next older checkpoint" in output or "it has no intact checkpoint" in output
    assert load_checkpoint(newest_run() / LAST)["finished"]


def test_nothing_is_deleted_beside_a_damaged_checkpoint(two_classes, monkeypatch, capsys):
    run = interrupted_run(monkeypatch, 1)
    (run / "ep009-step9-00000000").mkdir()
    (run / "mine.safetensors").write_bytes(b"\xff" * 8 + b"{" + b"x" * 9)
    prune_pieces(run)
    assert "no tensors are deleted" in capsys.readouterr().out
    assert (run / "ep009-step9-00000000").is_dir()
    (run / "mine.safetensors").unlink()
    prune_pieces(run)
    assert not (run / "ep009-step9-00000000").exists()


def test_an_amended_checkpoint_keeps_its_tensors_in_place_unless_it_becomes_whole(two_classes, monkeypatch):
    run = interrupted_run(monkeypatch, 1)
    before = state(run / LAST)
    amend_checkpoint(run / LAST, {"origin": {"file": "x"}})
    assert load_checkpoint(run / LAST)["origin"] == {"file": "x"}
    assert "pieces" in safetensors_metadata(run / LAST)
    assert state(run / LAST) == before
    amend_checkpoint(run / LAST, {}, whole=True)
    assert "pieces" not in safetensors_metadata(run / LAST)
    assert state(run / LAST) == before


def test_pieces_are_joined(tmp_path):
    whole = torch.arange(35.0).reshape(7, 5)
    pieces = {
        "a.safetensors": {"w": ([0, 0], whole[:3]), "bias": ([], torch.tensor(2.0))},
        "b.safetensors": {"w": ([3, 0], whole[3:, :2]), "empty": ([0, 0], torch.zeros(0, 4))},
        "c.safetensors": {"w": ([3, 2], whole[3:, 2:])},
    }
    found = read_group(tmp_path / "weights", write_pieces(tmp_path / "weights", pieces))
    assert found.keys() == {"w", "bias", "empty"}
    assert torch.equal(found["w"], whole)
    assert (found["bias"], found["empty"].shape) == (2, (0, 4))


@pytest.mark.parametrize("place", [[4, 0], [-3, 0], [3], [3.5, 0], "30", None, [1 << 62, 0]], ids=str)
def test_pieces_that_do_not_fit_are_refused(place, tmp_path):
    tensor = torch.ones(3, 2)
    pieces = {"a.safetensors": {"w": ([0, 0], tensor)}, "b.safetensors": {"w": (place, tensor)}}
    digests = write_pieces(tmp_path / "weights", pieces)
    with pytest.raises(Damaged, match="don't fit together"):
        read_group(tmp_path / "weights", digests)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"folder": "ep001-step2-0123abcd"}',
        '{"folder": "../other", "groups": {}}',
        '{"folder": "ep001-step2-0123abcd/..", "groups": {}}',
        '{"folder": "ep001-step2-0123abcd", "groups": {"../x": {}}}',
        '{"folder": "ep001-step2-0123abcd", "groups": {"weights": {"../x.safetensors": ""}}}',
        '{"folder": "ep001-step2-0123abcd", "groups": {"weights": 3}}',
        '{"folder": "ep001-step2-0123abcd", "groups": {"weights": ["x.safetensors"]}}',
        "[" * 100_000,
    ],
    ids=range(10),
)
def test_lists_of_files_elsewhere_are_refused(text):
    with pytest.raises(Damaged, match="malformed"):
        Pieces.from_text(text)


def test_large_networks_are_written_by_all_ranks(monkeypatch):
    assert must_divide(settings(divide_checkpoints="yes"), 1)
    assert not must_divide(settings(), 3 * 10**9)  # a single process
    monkeypatch.setattr("utils.runs.saving.runtime.world_size", 2)
    assert must_divide(settings(), 3 * 10**9)
    assert not must_divide(settings(), 10**9)
    assert not must_divide(settings(divide_checkpoints="no"), 3 * 10**9)
