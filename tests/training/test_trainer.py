"""utils/training/trainer.py against a manual step, on the meta device, and with injected faults."""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets.factory import build_model
from tests.conftest import settings, train_epoch
from utils.data.image_list import list_in_memory
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.classifier import Classifier
from utils.modeling.pixel_network import PixelNetwork
from utils.training.loss import TrainingLoss
from utils.training.non_finite import NonFiniteLoss
from utils.training.optimizer import build_optimizer
from utils.training.out_of_memory import OutOfMemory
from utils.training.predict_logits import predict_logits
from utils.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = settings(input_shape=(8, 8), image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.1))


def network(device=CPU, drop_rate=0.0, **freeze) -> PixelNetwork:
    torch.manual_seed(0)
    rates = {"drop_rate": drop_rate, "attn_drop_rate": drop_rate, "drop_path_rate": drop_rate}
    model = build_model("vit_xs_4", 3, (8, 8), **rates)
    if freeze:
        model.freeze_backbone(**freeze)
    return PixelNetwork(model, Preprocessing.from_config(CONFIG), device)


def batch(size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(size) % 3


class Batches(list):
    """A loader in memory."""

    class Sampler:
        epoch, start = -1, 0

        def __init__(self, batch_size):
            self.batch_size = batch_size

        def __iter__(self):
            for start in itertools.count(self.start * self.batch_size, self.batch_size):
                yield [(self.epoch, index, 0) for index in range(start, start + self.batch_size)]

    def __init__(self, batches):
        super().__init__(batches)
        self.batch_sampler = self.Sampler(len(batches[0][1]))
        names = ((0, f"{i:03d}.png") for i in range(sum(len(targets) for _, targets in batches)))
        self.dataset = SimpleNamespace(images=list_in_memory(names))

    def __iter__(self):
        return itertools.islice(list.__iter__(self), self.batch_sampler.start, None)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 4.0])])
def test_step_matches_a_manual_step(weights):
    pixels, targets = batch()
    model = network()
    other = copy.deepcopy(model)
    trainer = Trainer(model, CPU, "fp32", 1, TrainingLoss(weights))
    sgd = settings(optimizer_type="sgd")  # linear in the gradient, while Adam's first step is its sign
    loss, correct = trainer.train_step(pixels, targets, build_optimizer(model.model, sgd, 0.1))

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.image_mean, CONFIG.image_std))
    logits = other.model((pixels / 255 - mean) / std)
    each = torch.ones(6) if weights is None else weights[targets]
    expected = -(each * logits.log_softmax(1)[range(6), targets]).sum() / 6
    expected.backward()
    build_optimizer(other.model, sgd, 0.1).step()
    torch.testing.assert_close(loss, expected.detach())
    assert correct == (logits.argmax(1) == targets).sum()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert trainer.step == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradient_is_clipped(precision):
    for clip_grad in (1e-3, 1e3):
        model = network()
        sgd = build_optimizer(model.model, settings(optimizer_type="sgd", momentum=0, weight_decay=0), 1.0)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        Trainer(model, CPU, precision, 1, clip_grad=clip_grad).train_step(*batch(), sgd)
        moved = torch.linalg.vector_norm(torch.cat([p.detach().flatten() for p in model.parameters()]) - before).item()
        if clip_grad == 1e-3:
            assert moved == pytest.approx(1e-3, rel=1e-2)
        else:
            assert moved > 0.1


@pytest.mark.parametrize("optimizer_type", ["sgd", "adam", "adamw", "muon"])
def test_step_on_the_meta_device(optimizer_type):
    """Where tensors of another device, and reading a value (which synchronizes), are errors."""
    meta = torch.device("meta")
    model = network(meta, drop_rate=0.1, blocks=2).train()
    config = settings(optimizer_type=optimizer_type)
    optimizer = build_optimizer(model.model, config, 1e-3)
    pixels, targets = (tensor.to(meta) for tensor in batch())
    loss_function = TrainingLoss(label_smoothing=0.1, mixup=0.2, cutmix=1.0)
    loss, correct = Trainer(model, meta, "fp32", 1, loss_function, clip_grad=1.0).train_step(pixels, targets, optimizer)
    assert (loss.device, loss.shape, correct.shape) == (meta, (), ())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_step_on_cuda_does_not_synchronize(precision):
    device = torch.device("cuda")
    model = network(device, drop_rate=0.1).train()
    trainer = Trainer(model, device, precision, seed=1)
    optimizer = build_optimizer(model.model, CONFIG, 1e-3)
    pixels, targets = (tensor.pin_memory() for tensor in batch())
    trainer.train_step(pixels, targets, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(pixels, targets, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 2


def test_code_does_not_call_cuda():
    root = Path(__file__).resolve().parents[2]
    files = [*root.glob("*.py"), *root.glob("nets/*.py"), *root.glob("utils/*.py")]
    assert len(files) > 10
    assert [file.name for file in files if ".cuda(" in file.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_like_fp32(precision):
    pixels, targets = batch()
    losses = {}
    for name in ("fp32", precision):
        model = network().train()
        trainer = Trainer(model, CPU, name, seed=1)
        optimizer = build_optimizer(model.model, CONFIG, 1e-3)
        losses[name] = torch.stack([trainer.train_step(pixels, targets, optimizer)[0] for _ in range(30)])
    assert losses[precision][0] != losses["fp32"][0]
    assert losses[precision][0].item() == pytest.approx(losses["fp32"][0].item(), abs=0.03)
    assert losses[precision][-1] < 0.5 * losses[precision][0]
    assert trainer.scaler.is_enabled() == (precision == "fp16")


def test_frozen_weights_are_constant_and_have_no_optimizer_state():
    model = network(drop_rate=0.3, blocks=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model.model, CONFIG, 1e-2)
    trainer = Trainer(model.train(), CPU, "fp32", seed=1)
    for _ in range(3):
        trainer.train_step(*batch(), optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}


def test_randomness_depends_on_seed_and_step_only():
    def loss(seed, step, noise):
        model = network(drop_rate=0.5).train()
        trainer = Trainer(model, CPU, "fp32", seed)
        trainer.step = step
        torch.manual_seed(noise)
        return trainer.train_step(*batch(), build_optimizer(model.model, CONFIG, 1e-3))[0].item()

    assert loss(1, 5, noise=0) == loss(1, 5, noise=9)
    assert len({loss(1, 5, 0), loss(1, 6, 0), loss(2, 5, 0)}) == 3


def test_epoch_returns_means_and_sets_the_rate_every_step():
    model = network()
    optimizer = build_optimizer(model.model, CONFIG, 1.0)
    positions = []

    def rate(epoch):
        positions.append(epoch)
        return 0.0  # the weights stay constant

    batches = Batches([batch(6), batch(6), batch(6), batch(6)])
    numbers = train_epoch(Trainer(model, CPU, "fp32", 1), batches, optimizer, number=3, learning_rate=rate)
    assert positions[:4] == [3, 3.25, 3.5, 3.75]
    assert batches.batch_sampler.epoch == 3
    model.eval()
    batches.batch_sampler.start = 0
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y).item() for x, y in batches]
        hits = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
    assert numbers["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert numbers["top1"] == pytest.approx(hits / 24)


def test_epoch_sets_training_mode():
    """Validation leaves the network in evaluation mode."""
    model = network(drop_rate=0.5)
    trainer = Trainer(model, CPU, "fp32", 1)
    seen = []
    model.model.register_forward_hook(lambda module, *_: seen.append(module.training))
    trainer.validate(Batches([batch(6)]))
    train_epoch(trainer, Batches([batch(6)]), build_optimizer(model.model, CONFIG, 1e-3), 0, lambda epoch: 1e-3)
    assert seen == [False, True]


def test_training_learns():
    model = network()
    trainer = Trainer(model, CPU, "fp32", 1)
    optimizer = build_optimizer(model.model, CONFIG, 1e-3)
    epochs = []
    for epoch in range(8):
        trainer.finish_epoch()
        epochs.append(train_epoch(trainer, Batches([batch()] * 5), optimizer, epoch, lambda epoch: 1e-3))
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert epochs[-1]["top1"] == 1


def test_non_finite_loss_error_has_step_and_image():
    model = network()
    trainer = Trainer(model, CPU, "fp32", 1)
    trainer.step = 100
    poisoned = []

    def rate(epoch):
        poisoned.append(epoch)
        if len(poisoned) == 13:
            nn.init.constant_(model.model.head.bias, float("nan"))
        return 1e-3

    with pytest.raises(NonFiniteLoss, match=r"finite at step 113 .*images: 072\.png.*Lower init_lr"):
        train_epoch(trainer, Batches([batch()] * 30), build_optimizer(model.model, CONFIG, 1e-3), 0, rate)
    assert len(poisoned) == 20  # found at the next check


def test_non_finite_validation_loss():
    model = network()
    nn.init.constant_(model.model.head.bias, float("nan"))
    with pytest.raises(NonFiniteLoss, match="validation loss is nan"):
        Trainer(model, CPU, "fp32", 1).validate(Batches([batch()]))
    with torch.no_grad():
        model.model.head.bias.zero_()[-1] = -math.inf  # as if overflowed, for a class without images
    pixels, targets = batch()
    with pytest.raises(NonFiniteLoss, match="validation loss is nan"):
        Trainer(model, CPU, "fp32", 1).validate(Batches([(pixels, torch.zeros_like(targets))]))


def test_evaluation_has_all_images_in_order_without_dropout():
    model = network(drop_rate=0.5).train()
    pixels, targets = batch(11)
    whole = predict_logits(model, Batches([(pixels, targets)]), CPU, "fp32")
    parts = predict_logits(
        model,
        Batches([(pixels[:4], targets[:4]), (pixels[4:8], targets[4:8]), (pixels[8:], targets[8:])]),
        CPU,
        "fp32",
    )
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    trainer = Trainer(model, CPU, "fp32", 1)
    trainer.micro_batches.count = 3
    results = trainer.validate(Batches([(pixels, targets)]))
    assert sizes == [4, 4, 3]
    assert results["val_loss"] == pytest.approx(nn.functional.cross_entropy(*whole).item(), abs=1e-5)
    handle.remove()
    assert whole[0].shape == (11, 3)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(parts[1], targets)


@pytest.mark.parametrize("way", ["loader", "images"])
def test_evaluation_uses_the_precision(way):
    model = network().eval()
    pixels, targets = batch()

    def logits(precision):
        if way == "loader":
            return predict_logits(model, Batches([(pixels, targets)]), CPU, precision)[0].log_softmax(1)
        preprocessing = Preprocessing.from_config(settings())
        transform = EvalTransform(preprocessing)
        return Classifier(model, preprocessing, transform, ["a", "b", "c"], CPU, precision).probabilities(pixels).log()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(pixels).float().log_softmax(1)
    torch.testing.assert_close(logits("bf16"), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits("fp32"), expected, atol=1e-5)


def test_loss_scaler_is_restored():
    trainer = Trainer(network(), CPU, "fp16", 1)
    optimizer = build_optimizer(trainer.network.model, CONFIG, 1e-3)
    trainer.train_step(*batch(), optimizer)
    trainer.scaler.update(new_scale=1234.0)
    state = trainer.state_dict()
    assert state["scaler"]["scale"] == 1234.0
    other = Trainer(network(), CPU, "fp16", 1)
    other.load_state_dict(state)
    assert other.state_dict()["scaler"] == state["scaler"]
    assert other.step == 1


def test_only_convolutional_networks_are_channels_last():
    preprocessing = Preprocessing.from_config(CONFIG)
    for name, channels_last in (("vit_xs_4", False), ("resnet18", True), ("timm/convnext_atto", True)):
        model = PixelNetwork(build_model(name, 2, (64, 64)), preprocessing, CPU).model
        weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_micro_batches_after_out_of_memory_give_the_same_result(capsys):
    class LittleMemory(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, inputs):
            if len(inputs) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return self.network(inputs)

    pixels, targets = batch(7)
    sgd = settings(optimizer_type="sgd")
    weights, losses = [], []
    for little_memory in (False, True):
        model = network()
        loss = TrainingLoss(torch.tensor([0.5, 1.0, 4.0]), mixup=0.5)
        trainer = Trainer(LittleMemory(model) if little_memory else model, CPU, "fp32", 1, loss)
        optimizer = build_optimizer(model.model, sgd, 0.1)
        results = [trainer.train_step(pixels, targets, optimizer) for _ in range(3)]
        losses.append(torch.tensor(results))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-5)
    assert trainer.micro_batches.count == 4
    assert trainer.state_dict()["micro_batches"] == 4
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    expected = "warning: out of memory at step 1: batches of 7 images are now split into 4 micro-batches"
    assert printed[1].startswith(expected)


def test_skipped_step_changes_neither_batch_norm_nor_metrics():
    """With a batch of NaN among others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))
    trainer = Trainer(model, CPU, "fp32", 1, on_nan="skip")
    good = [(torch.rand(6, 3, 2, 2), torch.arange(6) % 3) for _ in range(3)]
    bad = (torch.full((6, 3, 2, 2), math.nan), torch.arange(6) % 3)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0}], 0.0)
    numbers = train_epoch(trainer, Batches([good[0], bad, *good[1:]]), optimizer, 0, lambda epoch: 0.0)
    other = nn.BatchNorm1d(12)
    for pixels, _ in good:
        other(pixels.flatten(1))
    for name, buffer in other.named_buffers():
        assert torch.equal(model[1].get_buffer(name), buffer), name
    assert numbers["skipped"] == 1
    with torch.no_grad():
        hits = sum((model.train()(x).argmax(1) == y).sum().item() for x, y in good)
    assert numbers["top1"] == pytest.approx(hits / 18)


def test_out_of_memory_with_a_single_image():
    class NoMemory(nn.Module):
        def forward(self, inputs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    model = network()
    with pytest.raises(OutOfMemory, match="cpu is out of memory with a single image"):
        Trainer(NoMemory(), CPU, "fp32", 1).train_step(*batch(), build_optimizer(model.model, CONFIG, 1e-3))


def test_other_errors_are_not_out_of_memory():
    model = network()
    pixels, targets = batch()
    with pytest.raises(RuntimeError, match="size"):
        Trainer(model, CPU, "fp32", 1).train_step(pixels[:, :, :5], targets, build_optimizer(model.model, CONFIG, 1e-3))


def test_interrupted_epoch_continues():
    """It loads only the remaining batches, and its means cover all."""
    batches = [batch(6, seed) for seed in range(5)]
    means = []
    for cut in (False, True):
        model = network()
        optimizer = build_optimizer(model.model, CONFIG, 1e-3)
        trainer = Trainer(model, CPU, "fp32", 1)
        if cut:

            def interrupt(trainer=trainer):
                if trainer.epoch.done == 2:
                    raise InterruptedError

            with pytest.raises(InterruptedError):
                train_epoch(trainer, Batches(batches), optimizer, 0, lambda epoch: 1e-3 * (1 + epoch), interrupt)
            state = trainer.state_dict()
            assert state["epoch_losses"].shape == (2,)
            trainer = Trainer(model, CPU, "fp32", 1)
            trainer.load_state_dict(state)
        loader = Batches(batches)
        means.append(train_epoch(trainer, loader, optimizer, 0, lambda epoch: 1e-3 * (1 + epoch)))
        assert loader.batch_sampler.start == (2 if cut else 0)
    assert means[0] == means[1]


def test_resumed_epoch_of_a_shorter_list_finishes():
    model = network()
    trainer = Trainer(model, CPU, "fp32", 1)
    trainer.load_state_dict(trainer.state_dict() | {"epoch_losses": torch.ones(4), "epoch_hits": torch.ones(4)})
    numbers = train_epoch(
        trainer, Batches([batch()] * 3), build_optimizer(model.model, CONFIG, 1e-3), 0, lambda epoch: 1e-3
    )
    assert numbers["loss"] == 1
    assert trainer.step == 0
