"""utils/inference/outputs.py: outputs of batches are put together."""

import torch

from tests.conftest import write_image
from utils.data.image_list import list_in_memory
from utils.inference.classifier import load_classifier
from utils.inference.outputs import compute_outputs
from utils.inference.predictor import read_region


def test_unreadable_images_are_skipped_in_every_batch(trained, tmp_path):
    paths = [write_image(tmp_path / f"{i}.png", 20 * i, seed=i) for i in range(10)]
    classifier = load_classifier("", "cpu")
    images = list_in_memory((i % 2, str(path)) for i, path in enumerate(paths))
    expected = compute_outputs(classifier, images, num_workers=0, batch_size=10)
    assert expected.indices.tolist() == list(range(10)) and expected.logits.shape == (10, 2)
    for i in (1, 3, 4, 5, 9):  # one in the first batch, all in the second, the only one in the last
        paths[i].write_text("no image")
    readable = [0, 2, 6, 7, 8]
    for keep_logits in (True, False):
        options = {"batch_size": 3, "skip_unreadable": True, "keep_logits": keep_logits}
        outputs = compute_outputs(classifier, images, num_workers=0, **options)
        assert outputs.indices.tolist() == readable
        assert outputs.class_ids.tolist() == [i % 2 for i in readable]
        torch.testing.assert_close(outputs.embeddings, expected.embeddings[readable], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outputs.brightness, expected.brightness[readable])
        logits = expected.logits[readable] if keep_logits else torch.zeros(5, 0)
        torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-4)


def test_tta_outputs_are_means_over_views_and_skip_unreadable_images(trained, tmp_path):
    paths = [write_image(tmp_path / f"{i}.png", 40 * i, seed=i) for i in range(5)]
    classifier = load_classifier("", "cpu")
    images = list_in_memory((i % 2, str(path)) for i, path in enumerate(paths))
    views = classifier.tta_views
    logits, embeddings = [], []
    for path in paths:
        pixels = views.resize(read_region(path, classifier.preprocessing, views))
        of_views = classifier.forward(pixels)
        for values, tensor in zip((embeddings, logits), of_views, strict=True):
            values.append(tensor.mean(dim=0))
    paths[1].write_text("no image")
    outputs = compute_outputs(classifier, images, num_workers=0, batch_size=2, skip_unreadable=True, tta=True)
    assert outputs.indices.tolist() == [0, 2, 3, 4]
    torch.testing.assert_close(outputs.logits, torch.stack(logits)[outputs.indices], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.embeddings, torch.stack(embeddings)[outputs.indices], atol=1e-5, rtol=1e-4)
