"""Tests of adainf.py and download_generated.py: no network but loopback, no files but their own.

    python -m pytest -q                  # all tests
    python test_adainf.py stress         # kill and resume runs at random moments, minutes

The first part holds the method against something simpler, in the order of adainf.py: a loop, a
formula, or what torchvision and Pillow compute. Docstrings say what mistake a test would catch."""

import copy
import functools
import hashlib
import http.client
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torch.optim import lr_scheduler
from torchvision import transforms

import adainf
import download_generated as dg
from assets import theory

# ---- 1. Mixing -----------------------------------------------------------------------------------


def make_data(images, labels, generated):
    """Data whose real images also serve the probes and the test."""
    return adainf.Data(images, labels, generated, images, labels, images, labels, ["a", "b", "c"])


def make_mixture(ratio, batch_size, seed=0, n_generated=30):
    """Images of one pixel: image i has the grey value i; the first six are real, of label i."""
    numbers = torch.arange(6 + n_generated)
    images = numbers.byte().view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
    data = make_data(images[:6], numbers[:6], images[6:])
    return adainf.Mixture(data, ratio, batch_size, seed)


@pytest.mark.parametrize("ratio, n_generated, copies", [(0, 30, 0), (3, 30, 3), (3, 0, 1)])
def test_an_epoch_has_each_real_image_n_times(ratio, n_generated, copies):
    """And each generated one once, which has no label. Alone, real images are not copied."""
    mixture = make_mixture(ratio, batch_size=6, n_generated=n_generated)
    numbers = []
    for step in range(mixture.steps_per_epoch):
        images, labels = mixture.batch(step)
        batch = images[:, 0, 0, 0].tolist()
        assert labels.tolist() == [number if number < 6 else -1 for number in batch]
        numbers += batch
    expected = [*range(6)] * copies + [*range(6, 6 + n_generated)]
    assert sorted(numbers) == sorted(expected)
    assert mixture.beta == 6 * copies / len(expected)

    make_mixture(ratio, len(expected), n_generated=n_generated)
    with pytest.raises(adainf.InputError, match="--batch-size"):
        make_mixture(ratio, len(expected) + 1, n_generated=n_generated)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    """Catches one drawn by a device, of which each kind makes its own, or drawn as steps come, and
    a last batch that is not full."""
    mixture = make_mixture(10, batch_size=8, seed=7)  # 90 samples, 11 batches
    for epoch, batch in [(2, 3), (0, 5)]:  # a run that goes on asks amid an epoch
        order = np.random.default_rng((7, adainf.EPOCH, epoch)).permutation(90)
        expected = order[8 * batch:8 * batch + 8]
        assert mixture.samples(11 * epoch + batch).tolist() == expected.tolist()


def test_the_random_numbers_of_views_depend_on_seed_and_step_alone():
    """Catches a seed such as seed + step (neighbours share a stream), one of 32 bits (of 100,000
    steps, two are equal), one draw for several images, both views alike."""
    two_views = make_views(seed=7)
    two_views.apply = lambda images, p: p
    p = two_views(IMAGES, step=5)
    expected = two_views.draw(np.random.default_rng((7, adainf.VIEWS, 5)), 48)
    assert all(p[name].equal(expected[name]) for name in expected)


# ---- 2. Views: each operation --------------------------------------------------------------------

# Everything happens in these views, and nothing as often or as much as anything else.
MIXED = dict(crop_min=0.08, jitter_prob=0.6, jitter=(0.8, 0.4, 1.5, 0.2), gray_prob=0.2,
             blur_prob=0.5, flip_prob=0.4)
# Nothing happens in these.
STILL = dict.fromkeys(MIXED, 0.0) | dict(crop_min=1.0, jitter=(0.0, 0.0, 0.0, 0.0))
BICUBIC = TF.InterpolationMode.BICUBIC


def make_views(augmentation=MIXED, n=32, seed=0):
    return adainf.TwoViews(augmentation, n, seed)


def make_images():
    """uint8 24 x 32 x 32 x 3: flat colours (some hues are ties), noise, smooth images."""
    stream = torch.Generator().manual_seed(0)
    colours = torch.tensor([*itertools.product([0, 255], repeat=3)])
    flat = colours.view(8, 1, 1, 3).expand(8, 32, 32, 3)
    noise = torch.randint(256, (8, 32, 32, 3), generator=stream)
    small = torch.randint(256, (8, 3, 7, 7), generator=stream).byte()
    smooth = TF.resize(small, [32, 32], BICUBIC).permute(0, 2, 3, 1)
    return torch.cat([flat, noise, smooth]).byte()


IMAGES = make_images()
PILLOW_IMAGES = [Image.fromarray(image.numpy()) for image in IMAGES]
X = IMAGES.permute(0, 3, 1, 2).float() / 255  # as torchvision takes them


def from_pillow(images):
    return torch.stack([TF.to_tensor(image) for image in images])


def greatest(difference):
    return difference.abs().max().item()


def view_with(**changes):
    """A view of each of IMAGES by parameters that change nothing, except for `changes`."""
    row = dict(start=[0, 0], length=[32, 32], flip=[False], kind=[0, 1, 2, 3],
               amount=[1.0, 1.0, 1.0, 0.0], gray=[False], blur=[0])
    p = {name: torch.tensor(value).expand(24, -1) for name, value in (row | changes).items()}
    return make_views().apply(IMAGES, p)


def crop(image, start, length):
    """torchvision's crop and resize, exact for a tensor, rounded for a Pillow image."""
    return TF.resized_crop(image, *start, *length, [32, 32], BICUBIC)


BOX = crop(X, [3, 7], [20, 9]).clamp(0, 1)  # bicubic overshoots


@pytest.mark.parametrize("changes, expected", [
    (dict(amount=[1.8, 1.0, 1.0, 0.0]), TF.adjust_brightness(X, 1.8)),
    (dict(amount=[1.0, 0.2, 1.0, 0.0]), TF.adjust_contrast(X, 0.2)),
    (dict(amount=[1.0, 1.0, 1.8, 0.0]), TF.adjust_saturation(X, 1.8)),
    (dict(amount=[1.0, 1.0, 1.0, -0.2]), TF.adjust_hue(X, -0.2)),
    (dict(gray=[True]), TF.rgb_to_grayscale(X, 3)),
    (dict(start=[3, 7], length=[20, 9], flip=[True]), TF.hflip(BOX)),
    (dict(start=[31, 31], length=[1, 1]), crop(X, [31, 31], [1, 1])),
    (dict(start=[3, 7], length=[20, 9], kind=[1, 3, 0, 2], amount=[0.4, 0.0, 1.0, 1.0]),
     TF.adjust_contrast(BOX, 0.4))])
def test_each_operation_is_torchvisions(changes, expected):
    """Catches other luma weights, contrast around the mean colour, a hue that runs backwards, a
    crop of pixels from outside its box, of swapped axes, flipped before it, or beyond 0..1, whose
    mean grey is another."""
    assert greatest(view_with(**changes) - expected) < 2e-5


def sigma_of(level):
    return 0.1 + 1.9 * (level - 0.5) / 256


@pytest.mark.parametrize("level", [1, 100, 256])
def test_blur_is_pillows_by_the_sigma_of_its_level(level):
    """Catches a true Gaussian, zeros beyond the edges, a table that is off by one level."""
    sigma = sigma_of(level)
    view = view_with(blur=[level])
    pillow = [image.filter(ImageFilter.GaussianBlur(sigma)) for image in PILLOW_IMAGES]
    error = 255 * (view - from_pillow(pillow))
    assert error.abs().mean() < 0.6
    assert greatest(error) < 3.01  # Pillow rounds six times, by up to a half

    [matrix] = adainf.blur_matrices(torch.tensor([sigma]), 32)
    assert greatest(view - matrix @ X @ matrix.T) < 2e-5


def test_views_are_colours_and_all_first_views_come_first():
    """Catches views in the order a1 a2 b1 b2, of which NT-Xent would take other pairs."""
    views = make_views(STILL)(IMAGES, step=0)
    assert greatest(views - torch.cat([X, X])) < 1e-5
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)


# ---- Views: distributions ------------------------------------------------------------------------


@pytest.fixture(scope="module", name="p")
def drawn_parameters():
    """Parameters of two views of 50,000 images."""
    return make_views().draw(np.random.default_rng(0), 100_000)


def amounts_of(p):
    """M x 4: factors of brightness, contrast, saturation, and turns of hue."""
    return p["amount"].gather(1, p["kind"].argsort(1))


def same_distribution(one, other):
    """Kolmogorov-Smirnov test of two samples: if it is the same, False once in a million times."""
    values = np.concatenate([one, other])
    below_of_one = np.searchsorted(np.sort(one), values, "right") / len(one)
    below_of_other = np.searchsorted(np.sort(other), values, "right") / len(other)
    distance = np.abs(below_of_one - below_of_other).max()
    return distance < 2.7 * math.sqrt(1 / len(one) + 1 / len(other))


def is_share(happened, probability):
    """Whether something happens with a probability, by four standard deviations."""
    deviation = math.sqrt(probability * (1 - probability) / len(happened))
    return abs(happened.double().mean() - probability) <= 4 * deviation


def test_boxes_are_distributed_as_torchvisions(p):
    """Catches a uniform aspect (not its log), one try instead of ten, corners that go together."""
    def statistics_of(top, left, height, width):
        return [top, left, height, width, height * width, height / width, top + height, top - left]

    torch.manual_seed(0)
    sampler = transforms.RandomResizedCrop((32, 32), (MIXED["crop_min"], 1.0))
    boxes = [sampler.get_params(X[0], sampler.scale, sampler.ratio) for _ in range(10_000)]
    theirs = statistics_of(*np.array(boxes).T)
    ours = statistics_of(*p["start"].T, *p["length"].T)
    for one, other in zip(ours, theirs):
        assert same_distribution(one, other)


def test_jitter_is_distributed_as_torchvisions_or_does_nothing(p):
    """Catches a factor of another operation, one below 0, a hue that hangs on jitter_prob, and
    orders that are not equally frequent."""
    ours = amounts_of(p)
    jittered = (ours != torch.tensor([1, 1, 1, 0])).any(dim=1)
    assert is_share(jittered, MIXED["jitter_prob"])

    torch.manual_seed(0)
    jitter = transforms.ColorJitter(*MIXED["jitter"])
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [jitter.get_params(*ranges)[1:] for _ in range(10_000)]
    for one, other in zip(ours[jittered].T, np.array(theirs).T):
        assert same_distribution(one, other)
    for kind in itertools.permutations(range(4)):
        assert is_share((p["kind"] == torch.tensor(kind)).all(dim=1), 1 / 24)


def test_probabilities_are_those_of_the_recipe_in_each_view(p):
    """Also catches a sigma that hangs on blur_prob, and levels that never come."""
    for view in [slice(0, 50_000), slice(50_000, 100_000)]:
        assert is_share(p["flip"][view], MIXED["flip_prob"])
        assert is_share(p["gray"][view], MIXED["gray_prob"])
        assert is_share(p["blur"][view] > 0, MIXED["blur_prob"])
    levels = p["blur"][p["blur"] > 0]
    assert same_distribution(levels, np.tile(np.arange(1, 257), 100))
    assert levels.unique().tolist() == [*range(1, 257)]


def test_parameters_are_independent_of_each_other_and_of_those_of_other_views(p):
    """Catches one random number for two parameters, for both views, for neighbouring images."""
    columns = [
        p["length"].prod(dim=1, keepdim=True),
        (p["start"] + 0.5) / (33 - p["length"]),  # has the mean 0.5, whatever the length
        p["flip"],
        amounts_of(p),
        p["kind"].argmax(dim=1, keepdim=True),
        p["gray"],
        p["blur"] > 0,
        torch.where(p["blur"] > 0, p["blur"] - 128.5, 0)]
    first, second = torch.cat(columns, dim=1).double().chunk(2)
    neighbour = first.roll(1, dims=0)
    together = torch.cat([first, second, neighbour], dim=1)
    correlation = together.T.corrcoef().triu(diagonal=1)
    assert correlation.abs().max() < 5.5 / math.sqrt(50_000)


def test_the_ends_of_the_uniform_distribution_give_valid_parameters():
    """Catches a box past the edge, a box of no pixels, a level of blur past the table."""
    def random(shape, kind):
        largest = 1 - 2 ** -24  # of random numbers of fp32
        return largest * stream.integers(2, size=shape).astype(kind)

    stream = np.random.default_rng(0)
    views = make_views(MIXED | dict(crop_min=1e-3), n=8)
    p = views.draw(SimpleNamespace(random=random), 50_000)
    assert p["start"].min() >= 0
    assert p["length"].min() >= 1
    assert (p["start"] + p["length"]).max() <= 8
    assert p["blur"].max() == 256


# ---- Views: all together -------------------------------------------------------------------------


def pillow_view(image, p):
    """The reference: a chain of torchvision's and Pillow's operations for one view."""
    image = crop(image, p["start"], p["length"])
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for kind, amount in zip(p["kind"], p["amount"]):
        image = jitter[kind](image, amount)
    if p["gray"] == [True]:
        image = TF.to_grayscale(image, 3)
    if p["blur"] != [0]:
        image = image.filter(ImageFilter.GaussianBlur(sigma_of(*p["blur"])))
    return TF.hflip(image) if p["flip"] == [True] else image


def test_whole_views_equal_a_chain_of_pillow_operations():
    """Catches a wrong order (it is crop, jitter, grayscale, blur, flip), one order of
    colour jitter for a whole batch, contrast's mean taken too early."""
    two_views = make_views()
    p = two_views.draw(np.random.default_rng(0), 48)
    views = two_views.apply(IMAGES.repeat(2, 1, 1, 1), p)
    expected = []
    for view, image in enumerate(2 * PILLOW_IMAGES):
        own = {name: value[view].tolist() for name, value in p.items()}
        expected.append(pillow_view(image, own))
    error = 255 * (views - from_pillow(expected))
    error_of_view = error.abs().mean(dim=(1, 2, 3))
    assert error_of_view.mean() < 1.5
    assert error_of_view.max() < 8  # Pillow's hue has only 256 levels


@pytest.mark.parametrize("command, strength, own", [
    ("", "strong", dict(crop_min=0.08, jitter_prob=0.8, jitter=(0.8, 0.8, 0.8, 0.2))),
    ("--gen-data x", "weak", dict(crop_min=0.2, jitter_prob=0.4, jitter=(0.4, 0.4, 0.4, 0.1))),
    ("--gen-data x --aug strong --blur-prob 0", "strong", adainf.STRONG | dict(blur_prob=0))])
def test_views_are_the_papers_for_the_data_and_the_users_values_win(command, strength, own):
    """Catches a value of 0 that counts as none."""
    options = adainf.build_parser().parse_args(command.split())
    both = dict(gray_prob=0.2, blur_prob=0.5, flip_prob=0.5)
    assert adainf.choose_augmentation(options) == (strength, both | own)


# ---- 3. Model and loss ---------------------------------------------------------------------------


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop_nt_xent(projections, temperature):
    """NT-Xent by its definition, in float64."""
    views = [row / row.norm() for row in projections.double()]
    total = 0
    for i, view in enumerate(views):
        partner = (i + len(views) // 2) % len(views)
        scores = [torch.exp(view @ other / temperature) for other in views]
        candidates = sum(scores) - scores[i]
        total -= torch.log(scores[partner] / candidates)
    return total / len(views)


def test_nt_xent_and_its_gradient_equal_a_double_loop():
    """Catches a view as its own candidate, wrong pairs, products in less than fp32."""
    projections = random_tensor(14, 5).bfloat16().float().requires_grad_()
    loss = adainf.nt_xent(projections, 0.2)
    expected = loop_nt_xent(projections, 0.2)
    assert greatest(loss - expected) < 1e-5
    assert adainf.nt_xent(projections.bfloat16(), 0.2) == loss

    [gradient] = torch.autograd.grad(loss, projections)
    [expected_gradient] = torch.autograd.grad(expected, projections)
    assert greatest(gradient - expected_gradient) < 1e-5


def test_probe_loss_is_the_mean_over_both_views_of_real_images():
    """Catches a mean over all images, which would shrink with the share of real ones, and nan."""
    logits = random_tensor(8, 3)
    loss = adainf.cross_entropy_of_real(logits, torch.tensor([2, -1, -1, 1]))
    expected = F.cross_entropy(logits[[0, 3, 4, 7]], torch.tensor([2, 1, 2, 1]))
    torch.testing.assert_close(loss, expected)
    assert adainf.cross_entropy_of_real(logits, torch.full((4,), -1)) == 0


@pytest.fixture
def options():
    """A command line's values, of a small network."""
    return adainf.parse_options("--width 8 --proj-hidden 16 --proj-dim 4 --device cpu".split())


@pytest.fixture
def model(options):
    torch.manual_seed(0)
    return adainf.SimCLR(options, classes=3)


def test_the_probe_only_watches(model):
    """Catches labels that reach the backbone."""
    projections, logits = model(random_tensor(8, 3, 8, 8))
    logits.sum().backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert learned == ["probe.weight", "probe.bias"]

    projections.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_first_weights_depend_on_the_seed_alone(options):
    def weights(seed):
        options.seed = seed
        model = adainf.build_model(options, make_data(IMAGES, None, IMAGES))
        return torch.cat([p.flatten() for p in model.parameters()])

    assert weights(0).equal(weights(0))
    assert not weights(0).equal(weights(1))


@pytest.mark.parametrize("training", [True, False])
def test_the_resnet_is_torchvisions_but_for_the_stem(training):
    """Catches other names, first weights of another spread, a ReLU or batch norm out of place."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.fc = nn.Identity()
    theirs = theirs.double().train(training)
    ours = adainf.ResNet().double().train(training)
    first = ours.state_dict()
    for name, value in theirs.state_dict().items():
        if name.startswith("layer") and value.ndim == 4:
            assert abs(first[name].std() / value.std() - 1) < 0.03
        if value.ndim == 1:
            value += torch.rand_like(value)  # batch norm is no identity

    mean, std = random_tensor(2, 3, 1, 1).double().exp()
    ours.load_state_dict(theirs.state_dict() | dict(mean=mean, std=std))  # names and shapes, too
    colours = random_tensor(4, 3, 16, 16).double()
    torch.testing.assert_close(ours(colours), theirs((colours - mean) / std))
    statistics_too = theirs.state_dict() | dict(mean=mean, std=std)  # the running ones
    torch.testing.assert_close(ours.state_dict(), statistics_too)


def test_options_decide_the_sizes_of_the_network():
    words = "--width 8 --blocks 1 2 1 --stem-padding 2".split()
    model = adainf.SimCLR(adainf.build_parser().parse_args(words), classes=10)
    x = torch.zeros(2, 3, 32, 32)
    shapes = []
    for name, module in model.backbone.named_children():
        x = module(x)
        if name.startswith("layer"):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(8, 34, 34), (16, 17, 17), (32, 9, 9)]
    assert [type(layer) for layer in model.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    shapes = [tuple(p.shape) for p in model.projector.parameters()]
    assert shapes == [(2048, 32), (2048,), (256, 2048), (256,)]


def test_gradients_of_the_narrowest_resnet_are_right():
    """Without AVX-512, oneDNN (issue 6035) errs or crashes where a 1 x 1 convolution of stride 2
    has fewer than 8 channels; --width 7 is refused."""
    torch.manual_seed(0)
    narrow = adainf.ResNet(width=8).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(narrow).double()
    images = random_tensor(4, 3, 16, 16).to(memory_format=torch.channels_last)
    direction = random_tensor(4, 64, seed=1)
    torch.sum(narrow(images) * direction).backward()
    torch.sum(exact(images.double()) * direction).backward()
    for p, expected in zip(narrow.parameters(), exact.parameters()):
        error = (p.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-5


# ---- 4. Optimiser --------------------------------------------------------------------------------


def lars_step(p, g, buffer, lr, decay, momentum):
    """One step of LARS for one tensor, written out: the next p and buffer."""
    p_norm = p.norm()
    g_norm = g.norm()
    d = g
    if p.ndim > 1 and p_norm > 0 and g_norm > 0:  # else it is plain momentum
        rate = 0.02 * p_norm / (g_norm + decay * p_norm + 1e-8)
        trust = min(rate / lr, 1)
        d = trust * (g + decay * p)
    buffer = momentum * buffer + d
    return p - lr * buffer, buffer


@pytest.mark.parametrize("size, slopes", [(1, [1, 30, 1e-3, 0]), (0, [0, 1, 0, 1])])
def test_lars_equals_its_formulas_written_out(size, slopes):
    """Catches lr inside the buffer, no clipping, decay of biases, nan where something is 0.

    size: of the weights at first; slopes: the size of the gradients in each step."""
    shapes = [(4, 3, 3, 3), (5,), (7, 2), (7,)]
    weights = [nn.Parameter(size * random_tensor(*shape).double()) for shape in shapes]
    expected = [(p.detach().clone(), 0) for p in weights]
    groups = [dict(params=weights[:2], decay=0.1), dict(params=weights[2:], decay=0.1)]
    optimizer = adainf.LARS(groups, momentum=0.8)
    for step, slope in enumerate(slopes):
        lr = 0.2 * (3 - step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, p in enumerate(weights):
            p.grad = slope * random_tensor(*p.shape, seed=step).double()
            value, buffer = expected[i]
            expected[i] = lars_step(value, p.grad, buffer, lr, decay=0.1, momentum=0.8)

        optimizer.step()
        for p, (value, buffer) in zip(weights, expected):
            torch.testing.assert_close(p.detach(), value)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffer)


def test_the_probe_has_a_learning_rate_of_its_own_and_no_decay(model, options):
    options.warmup = 0
    optimizer = adainf.build_optimizer(model, options)
    adainf.set_learning_rates(optimizer, 0, options)
    learned, probe = optimizer.param_groups
    assert (learned["lr"], learned["decay"], learned["momentum"]) == (0.4, 1e-4, 0.9)
    assert (probe["lr"], probe["decay"], probe["momentum"]) == (0.1, 0, 0.9)
    assert learned["weight_decay"] == probe["weight_decay"] == 0  # SGD's own, which comes on top
    assert learned["params"] + probe["params"] == [*model.parameters()]
    assert probe["params"] == [*model.probe.parameters()]


@pytest.mark.parametrize("warmup", [10, 0])
def test_the_learning_rate_is_torchs_linear_warmup_and_cosine(warmup):
    """Catches a schedule of epochs, a jump after warm-up, an end above 0, a division by 0."""
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = lr_scheduler.CosineAnnealingLR(sgd, 100 - warmup)
    if warmup > 0:
        linear = lr_scheduler.LinearLR(sgd, 3e-5 / 0.4, total_iters=warmup)
        schedule = lr_scheduler.SequentialLR(sgd, [linear, schedule], [warmup])
    for step in range(100):
        [expected] = schedule.get_last_lr()
        rate = adainf.learning_rate(step, 100, warmup, peak=0.4)
        assert rate == pytest.approx(expected, abs=1e-8)
        sgd.step()
        schedule.step()
    assert adainf.learning_rate(10, 10, 10, peak=0.4) == 0.4
    assert adainf.learning_rate(5, 10, 10, peak=1e-6) == 1e-6  # lower than the usual start


# ---- 5. Evaluation -------------------------------------------------------------------------------


def test_statistics_of_colours_are_those_of_all_pixels():
    """Catches a mean over images of means, n - 1 in place of n, and a division by 0."""
    pixels = IMAGES.view(-1, 3).double() / 255
    expected = (pixels.mean(0), pixels.std(0, correction=0))
    for found, value in zip(adainf.colour_statistics(IMAGES), expected):
        assert greatest(found.flatten() - value) < 6e-5
    _, std = adainf.colour_statistics(torch.zeros_like(IMAGES))
    assert std.min() > 0


@pytest.mark.parametrize("training", [True, False])
def test_encode_uses_eval_mode_and_leaves_the_backbone_as_it_was(model, options, training):
    """Catches statistics of batch norm that drift while a frozen backbone is evaluated."""
    backbone = model.backbone.train(training)
    backbone.bn1.running_mean += 0.3
    before = copy.deepcopy(backbone.state_dict())
    images = IMAGES[:, :8, :8].repeat(42, 1, 1, 1)  # 1008: more than one batch
    features = adainf.encode(backbone, adainf.to_colours(images, "cpu"), options)
    assert backbone.bn1.training == training
    torch.testing.assert_close(backbone.state_dict(), before)

    backbone.eval()
    expected = backbone(images.permute(0, 3, 1, 2) / 255).detach()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k, temperature", [(20, 0.07), (20, 0.002), (1000, 0.1)])
def test_knn_predicts_what_a_loop_predicts(k, temperature):
    """Catches distances instead of cosines, votes without weights, k beyond the training set, and
    votes that overflow or underflow at a low temperature."""
    length = torch.linspace(0.1, 9, 60).view(60, 1)
    train = length * random_tensor(60, 6)
    labels = torch.arange(60) % 3
    test = random_tensor(520, 6, seed=1)
    predicted = []
    for row in test.double():
        cosines = F.cosine_similarity(row, train.double())
        votes = [0, 0, 0]
        for neighbour in cosines.argsort(descending=True)[:k]:
            votes[labels[neighbour]] += math.exp(cosines[neighbour] / temperature)
        predicted.append(votes.index(max(votes)))
    score = adainf.knn_top1(train, labels, test, torch.tensor(predicted), k, temperature)
    assert score == 100


def test_the_probes_know_clusters():
    """Catches classes that are counted in the test images (which have two of four), and for the
    linear probe features that are not standardised, or are so by the test images."""
    labels = torch.arange(500) % 4
    features = F.one_hot(labels, 8) + 0.05 * random_tensor(500, 8)
    is_test = (labels < 2) & (torch.arange(500) >= 400)
    sets = [features[:400], labels[:400], features[is_test], labels[is_test]]
    assert adainf.knn_top1(*sets, k=200, temperature=0.1) == 100

    scale = torch.logspace(-3, 3, 8)
    sets[0] = scale * (sets[0] + 50)
    sets[2] = scale * (sets[2] + 50)
    assert adainf.linear_top1(*sets, epochs=30, lr=0.1, seed=0) == 100


def test_the_linear_probe_is_at_chance_on_noise():
    """Catches a probe that has seen the test images: it learns noise by heart."""
    train = random_tensor(1000, 300)
    test = random_tensor(200, 300, seed=1)
    labels = torch.arange(1000) % 4
    score = adainf.linear_top1(train, labels, test, labels[:200], epochs=20, lr=0.1, seed=0)
    deviation = 100 * math.sqrt(0.25 * 0.75 / 200)
    assert abs(score - 25) < 4 * deviation
    seen = adainf.linear_top1(train, labels, train, labels, epochs=20, lr=0.1, seed=0)
    assert seen > 60


def test_the_linear_probe_has_no_small_last_batch():
    """Catches a last batch of one image, which makes a full step all the same."""
    labels = torch.arange(1001) % 4
    features = F.one_hot(labels, 200) + 0.3 * random_tensor(1001, 200)
    scores = [adainf.linear_top1(features[:n], labels[:n], features, labels, 10, 0.1, seed=0)
              for n in (1000, 1001)]
    assert abs(scores[0] - scores[1]) < 3


def test_match_finds_partners_by_features_alone(options, monkeypatch):
    """Catches a view that may be its own partner, and views that are not in pairs."""
    monkeypatch.setattr(adainf, "WEAK", STILL)
    images = random_tensor(40, 32, 32, 3).mul(60).add(128).byte()
    assert adainf.match_top1(nn.Flatten(), images, options) == 100
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    nn.init.zeros_(constant[1].weight)
    assert adainf.match_top1(constant, images, options) < 5


def test_match_takes_weak_views_whatever_a_run_trains_with(options):
    """Written out as a loop. 1100 images: every other one is taken."""
    images = random_tensor(1100, 8, 8, 3).mul(60).add(128).byte()
    options.image_size = 8
    options.aug = "strong"
    options.seed = 3
    score = adainf.match_top1(nn.Flatten(), images, options)
    views = adainf.TwoViews(adainf.WEAK, 8, seed=3)(images[::2], step=0)
    features = F.normalize(views.double().flatten(1))
    found = 0
    for i, feature in enumerate(features):
        cosines = features @ feature
        cosines[i] = -1
        found += int(cosines.argmax()) == (i + 550) % 1100
    assert score == pytest.approx(100 * found / 1100)
    assert 1 < score < 99


def test_evaluate_gives_every_score_its_own_images_and_labels(options):
    """A model names colours; the offline probes learn to give them other names.

    Catches the real images in place of all labelled ones, and scores that are mixed up."""
    labels = torch.arange(60) % 3
    colours = 255 * F.one_hot(labels, 3).byte().view(60, 1, 1, 3)
    data = make_data(colours, (labels + 1) % 3, None)
    data.images = None
    data.labels = None
    model = SimpleNamespace(backbone=nn.Flatten(), probe=nn.Linear(3, 3))
    nn.init.eye_(model.probe.weight)
    options.image_size = 1
    scores = adainf.evaluate(model, data, options)
    assert scores.pop("match_top1") < 50  # of twenty equal images each
    assert scores == dict(online_top1=0, knn_top1=100, linear_top1=100)

    data.classes = ["all"]  # a data set without labels
    assert [*adainf.evaluate(model, data, options)] == ["match_top1"]


# ---- A tiny data set, and runs on it -------------------------------------------------------------

# 24 steps, 7 to an epoch; log lines, checkpoints and evaluations are out of step with each other.
TINY = """--ratio 1 --image-size 8 --width 8 --blocks 1 1 --proj-hidden 8 --proj-dim 4
    --batch-size 8 --steps 24 --warmup 0.125 --lr 0.001 --probe-lr 0.001 --linear-epochs 2
    --log-every 4 --save-every 5 --eval-every 8 --device cpu"""


def write_data(folder):
    """Three classes of 12 + 12 images of 8 x 8 pixels, told apart by colour, and 24 generated."""
    draw = np.random.default_rng(0)
    for split, label, index in itertools.product(("train", "test"), range(3), range(12)):
        place = folder / "images" / split / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 200, (8, 8, 3), dtype=np.uint8)
        pixels[:, :, label] += 55
        Image.fromarray(pixels).save(place / f"{index}.png")
    images = draw.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "gen.npz", image=images, label=np.zeros(24))
    return folder


def arguments(data, out, *more):
    """The command line of a tiny run."""
    where = ["--dataset", data / "images", "--gen-data", data / "gen.npz", "--out", out]
    return [str(word) for word in [*TINY.split(), *where, *more]]


def read_json(path):
    return json.loads(path.read_text())


def read_log(folder, key):
    """The records of a log that have this key, such as "loss"."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def read_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def outcome(folder):
    """All that a run leaves behind, clocks aside, as {part: text}; other bits are other text."""
    parts = dict(
        checkpoint=read_checkpoint(folder),
        encoder=torch.load(folder / "encoder.pt", weights_only=True),
        result=read_json(folder / "result.json"),
        log=read_log(folder, "step"))
    del parts["checkpoint"]["lines"]  # the log's, with clocks
    for record in (parts["result"], *parts["log"]):
        record.pop("images_per_second", None)
        record.pop("minutes_left", None)
    return {name: json.dumps(parts[name], default=torch.Tensor.tolist) for name in parts}


def differences(folder, reference):
    """The parts of a run's outcome that are not those of another, bit for bit."""
    found = outcome(folder)
    return [name for name in found if found[name] != reference[name]]


def contents(folder):
    """{path: bytes} of every file below a folder, None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def call_at(patch, target, count, action, *args):
    """Call action(*args) just before the count-th call (from 1) of a target such as "os.fsync"."""
    module, name = target.split(".")
    original = getattr(sys.modules[module], name)
    calls = itertools.count(1)

    def counting(*its_args, **more):
        if next(calls) == count:
            action(*args)
        return original(*its_args, **more)

    patch.setattr(target, counting)


def sigterm_in(step):
    """A fault for call_at: a signal in the middle of a step, the first being 1."""
    return "adainf.nt_xent", step, signal.raise_signal, signal.SIGTERM


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # fastest for tiny tensors


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tiny, capsys, monkeypatch):
    """run(out, *options, status=0, fault=None): main() on the tiny data ends with that status.

    A failure says one line on stderr at most, success none. fault: arguments of call_at."""
    monkeypatch.setattr(adainf, "two_panels", lambda *_: None)  # slow, and tested once

    def run(out, *more, status=0, fault=None):
        capsys.readouterr()
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            if fault:
                call_at(patch, *fault)
            try:
                adainf.main(arguments(tiny, out, *more))
            except SystemExit as stop:
                code = stop.code
        said = capsys.readouterr()
        assert code == status, said
        assert said.err.count("\n") <= min(status, 1), said.err
        return said

    return run


@pytest.fixture(scope="session")
def straight(tiny, tmp_path_factory):
    """The outcome of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    adainf.main(arguments(tiny, out))
    return outcome(out)


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of a finished run of 3 steps, which no test may change."""
    out = tmp_path_factory.mktemp("finished")
    adainf.main(arguments(tiny, out, "--steps", 3))
    return out


# ---- Processes of their own ----------------------------------------------------------------------
# They are forked from a server that has imported everything and computed nothing: 0.1 s each.

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["adainf", "matplotlib.figure", __name__])


def in_child(output, rank, world, port, work, *args):
    """What a child does: work(*args), with stdout and stderr in a file."""
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=world)
    adainf.RANK = int(rank)  # the server has imported adainf already
    adainf.WORLD = int(world)
    adainf.two_panels = lambda *_: None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    torch.set_num_threads(1)
    work(*args)


def start(output, work, *args, rank=0, world=1, port=0):
    """Start work(*args) in a process of its own, one of `world`."""
    args = (str(output), str(rank), str(world), str(port), work, *args)
    process = FORK.Process(target=in_child, args=args, daemon=True)
    process.start()
    return process


def start_world(output, world, work, *args):
    """Start the same work in `world` processes, as torchrun would."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    return [start(f"{output}{rank}", work, *args, rank=rank, world=world, port=port)
            for rank in range(world)]


def exit_codes(*processes):
    """Wait for processes, which may not hang; -9 is the code of a killed one."""
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "a process hangs"
    return codes


def faulty_main(argv, rank, *fault):
    """main(argv) in processes of which one has a fault, the arguments of call_at."""
    if adainf.RANK == rank:
        call_at(pytest.MonkeyPatch(), *fault)
    adainf.main(argv)


# ---- What a run leaves ---------------------------------------------------------------------------


def test_run_writes_all_its_files_and_says_if_there_is_no_gpu(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = adainf.main(arguments(tiny, tmp_path, "--steps", 2))
    assert set(os.listdir(tmp_path)) == {
        "log.jsonl", "checkpoint.pt", "encoder.pt", "views.png", "curves.png", "result.json"}
    for name in ("views.png", "curves.png"):
        assert Image.open(tmp_path / name).size > (200, 100)
    assert read_json(tmp_path / "result.json") == result
    assert {*adainf.METRICS, "loss", "images_per_second", "augmentation"} < set(result)
    counts = [result[name] for name in ("step", "seed", "n_real", "n_generated", "beta")]
    assert counts == [2, 0, 36, 24, 36 / 60]
    assert "no GPU was found" in capsys.readouterr().out


def test_encoder_is_the_trained_backbone_and_complete_in_itself(finished, tmp_path):
    """Catches prefixes in its names, another network, colours that are not normalised."""
    encoder = adainf.load_encoder(shutil.copy(finished / "encoder.pt", tmp_path))
    assert not encoder.training
    trained = read_checkpoint(finished)["model"]
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, trained[f"backbone.{name}"])
    assert 0.3 < encoder.mean.min() < encoder.mean.max() < 0.6
    with pytest.raises(adainf.InputError, match="checkpoint.pt"):
        adainf.load_encoder(finished / "checkpoint.pt")


def test_learning_rate_rises_and_loss_falls(run, tmp_path):
    run(tmp_path, "--steps", 80, "--lr", 0.1, "--temperature", 0.5, "--log-every", 1)
    records = read_log(tmp_path, "loss")
    assert len(records) == 80
    assert (records[0]["lr"], records[10]["lr"]) == (3e-5, 0.1)  # begin and end of the warm-up
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.02


def test_finished_run_is_evaluated_again_and_not_trained(run, finished, tmp_path):
    """So the options of the probes may be others, and those of the training may not."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "result.json").unlink()
    more = ("--steps", 3, "--knn-k", 1, "--linear-epochs", 9)
    run(out, *more, fault=("adainf.nt_xent", 1, sys.exit, "trains"))
    result = read_json(out / "result.json")
    before = read_json(finished / "result.json")
    assert result["loss"] == before["loss"]
    assert result["online_top1"] == before["online_top1"]
    assert result["knn_top1"] != before["knn_top1"]


def test_without_labels_a_run_gives_what_needs_none(run, tiny, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(tiny / "images" / split / "a", tmp_path / "images" / split / "all")
    run(tmp_path / "run", "--dataset", tmp_path / "images", "--steps", 9)
    assert adainf.METRICS & read_json(tmp_path / "run" / "result.json").keys() == {"match_top1"}


# ---- First save, then speak ----------------------------------------------------------------------


@pytest.mark.parametrize("console", ["/dev/full", "ascii"])
def test_what_cannot_be_printed_stops_no_run(run, straight, tmp_path, monkeypatch, console):
    """A full disk, and letters that the console lacks."""
    out = tmp_path / "mit Umläuten"
    monkeypatch.setattr(sys, "stdout", open(tmp_path / console, "w", encoding="ascii"))
    run(out)
    assert not differences(out, straight)
    assert console == "/dev/full" or r"Uml\xe4uten" in (tmp_path / console).read_text()


def test_a_run_without_pictures_in_a_thread(run, straight, tmp_path, monkeypatch):
    """A picture that fails is a note. Only the main thread may listen to signals."""
    monkeypatch.setattr(adainf, "two_panels", None)
    monkeypatch.setattr(adainf, "draw_views", None)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(run, tmp_path).result().out
    assert "no curves.png ('NoneType'" in said
    assert "no views.png ('NoneType'" in said
    assert not differences(tmp_path, straight)


def test_a_closed_pipe_and_a_shell_of_jupyter_stop_no_run(tiny, straight, tmp_path):
    """Ctrl-C ends the `tee` of a pipe first, and `head` closes it. Jupyter exports a backend that
    may not be there. Catches a status of 120, of Python's last flush."""
    environment = dict(os.environ, MPLBACKEND="module://no.such.backend", OMP_NUM_THREADS="1")
    command = [sys.executable, adainf.__file__, *arguments(tiny, tmp_path)]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipe) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0, process.stderr.read()
    assert not differences(tmp_path, straight)


# ---- Stopped and continued: signals, kills, full disks, changed options --------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_resume_is_exact(run, tmp_path, monkeypatch, amp):
    """7, 14, 21 end an epoch; 4 and 16 have a log line, 5 a checkpoint, 8 and 16 an evaluation.

    In fp16 the first scales are too large: skipped steps are no divergence, and are remembered."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    out = tmp_path / "run"
    done = 0
    for stop in (1, 4, 5, 7, 8, 14, 16, 23):
        run(out, "--amp", amp, status=143, fault=sigterm_in(stop - done))
        assert read_checkpoint(out)["step"] == stop
        assert not (out / "result.json").exists()
        done = stop
    run(out, "--amp", amp)
    run(out, "--amp", amp)  # once more, which changes nothing
    run(tmp_path / "straight", "--amp", amp)
    assert not differences(out, outcome(tmp_path / "straight"))


@pytest.mark.parametrize("name, target, count, step", [
    ("SIGINT", "adainf.nt_xent", 6, 6),
    ("SIGTERM", "adainf.knn_top1", 1, 8),  # in an evaluation, which it waits for
    ("SIGHUP", "os.fsync", 3, 6),  # while the checkpoint of step 5 is written
    ("SIGTERM", "adainf.knn_top1", 3, 24)])  # after the last step
def test_signal_saves_and_says_how_to_go_on(run, straight, tmp_path, name, target, count, step):
    number = signal.Signals[name]
    handler = signal.getsignal(number)

    def send():
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one would stop at once

    said = run(tmp_path, status=128 + number, fault=(target, count, send)).out
    if step < 24:
        last = said.splitlines()[-1]
        assert f"stopped by {name} after step {step}," in last
        assert "same command" in last
    assert read_checkpoint(tmp_path)["step"] == step
    assert signal.getsignal(number) is handler
    run(tmp_path)
    assert not differences(tmp_path, straight)


@pytest.mark.parametrize("target", ["os.fsync", "os.replace"])
def test_sigkill_during_a_save_leaves_a_good_checkpoint(run, straight, tiny, tmp_path, target):
    """Killed before a file gets to the disk or gets its name: the first two checkpoints (after
    log.jsonl and views.png), and the result of the run that goes on from step 5."""
    out = tmp_path / "run"
    for count in (3, 4, 8):
        fault = (target, count, signal.raise_signal, signal.SIGKILL)
        child = start(tmp_path / "said", faulty_main, arguments(tiny, out), 0, *fault)
        assert exit_codes(child) == [-9]
    assert (out / "encoder.pt").exists()
    assert not (out / "result.json").exists()
    run(out)
    assert not differences(out, straight)


def test_full_disk_is_one_line_and_the_run_goes_on(run, straight, tmp_path):
    """First there is no room for a line of the log, then for a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 20, limits[1]))

    for name in ("log.jsonl", "checkpoint.pt"):
        fault = ("adainf.nt_xent", 7, fill_disk, tmp_path / name)
        try:
            said = run(tmp_path, status=1, fault=fault).err
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert name in said
    run(tmp_path)
    assert not differences(tmp_path, straight)


@pytest.mark.parametrize("save_every, saved", [(100, 0), (1, 10)])
def test_diverged_run_stops_and_is_never_saved(
        run, straight, tmp_path, monkeypatch, save_every, saved):
    """In step 11 the weights become nan; what was saved before is good to go on from."""
    monkeypatch.setattr(adainf, "ETA", adainf.ETA)
    fault = ("adainf.nt_xent", 11, setattr, adainf, "ETA", math.nan)
    said = run(tmp_path, "--save-every", save_every, status=1, fault=fault).err
    assert "try a lower --lr" in said
    assert f"at step {saved + 1 if saved else 12}" in said  # or at the next log line
    assert saved == (read_checkpoint(tmp_path)["step"] if saved else 0)
    monkeypatch.undo()
    run(tmp_path)
    assert not differences(tmp_path, straight)


@pytest.mark.parametrize("words", [
    "--lr 0.001 0.1", "--seed 0 1", "--amp off bf16", "--gray-prob None 0.3", "--steps 3 4",
    "--temperature 0.2 0.3", "--gen-size None 23", "--real-size None 36"])
def test_changed_option_is_refused(run, finished, tmp_path, words):
    """With nothing but the checkpoint, too: it has its options in it."""
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    before = contents(tmp_path)
    option, old, new = words.split()
    said = run(tmp_path, "--steps", 3, option, new, status=2).err
    assert f"{option} = {old}, not {new}" in said
    assert "new --out" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("pool", ["images", "generated"])
def test_other_images_are_refused(run, finished, monkeypatch, pool):
    """One value of them, at the same path and of the same number."""
    def load_changed(options):
        data = load_data(options)
        getattr(data, pool).view(-1)[5] ^= 1
        return data

    load_data = adainf.load_data
    monkeypatch.setattr(adainf, "load_data", load_changed)
    assert "sum of some" in run(finished, "--steps", 3, status=2).err


def test_harmless_options_may_change(run, straight, tiny, tmp_path, monkeypatch):
    """How often it logs, saves and evaluates, and where things are, is not part of the result."""
    run(tmp_path / "run", status=143, fault=sigterm_in(6))
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    images = shutil.copy(tiny / "gen.npz", tmp_path / "moved.npz")
    shutil.copytree(tiny / "images", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    run(moved, "--log-every", 3, "--save-every", 7, "--eval-every", 5, "--gen-data", images,
        "--dataset", "./copy/")
    assert differences(moved, straight) == ["log"]


# ---- Bad input -----------------------------------------------------------------------------------


class Bomb:
    """Makes a folder "bomb" when it is unpickled, as malicious files do worse."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty present folder, in which a bomb goes off."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    os.rmdir("bomb")


@pytest.fixture
def refused(run, here, tmp_path):
    """refused(*options): a run that is refused in one line, and neither writes nor unpickles."""
    def refused(*more):
        before = contents(tmp_path)
        said = run(tmp_path / "run", *more, status=2).err
        assert contents(tmp_path) == before
        return said

    return refused


@pytest.mark.parametrize("words", [
    "--ratio 1.5", "--batch-size 999", "--lr nan", "--steps 0", "--warmup 1.1", "--device abacus",
    "--gen-size 25", "--real-size 37", "--nonsense", "--width 7", "--dataset nowhere",
    "--gen-data nowhere.npz", "--dataset cifar10", "--out file/run", "--out ", "--gen-data ",
    "--seeds 2", "--aug weak --compare", "--dataset no\nwhere", "--blocks 1 1 1 1 1",
    "--batch-size 30 --compare --real-size 20"])  # two cells have only 20 images
def test_bad_option_is_one_line(refused, tmp_path, words):
    """Also before any cell of a comparison is trained."""
    (tmp_path / "file").write_text("mine")
    assert refused(*words.split(" "))


def test_rank_without_a_world_is_refused(refused, monkeypatch):
    """Left over in the environment, it gave a run on empty batches."""
    monkeypatch.setattr(adainf, "RANK", 1)
    assert "RANK=1" in refused()


def test_the_users_options_win_over_those_of_the_demo():
    """Catches options that are derived from others, such as more warm-up than steps."""
    options = adainf.parse_options("--demo --steps 50".split())
    assert (options.steps, options.width, options.compare) == (50, 8, True)


@pytest.mark.parametrize("pattern, spoil, words", [
    ("images/test", shutil.rmtree, "of the same classes"),
    ("images/test/c", shutil.rmtree, "of the same classes"),
    ("images/train/b/3.png", lambda path: os.truncate(path, 99), "3.png"),
    ("gen.npz", lambda path: np.savez(path, image=np.full((9, 8, 8, 3), 7, np.uint8)), "colour"),
    ("gen.npz", lambda path: np.savez(path, image=np.array([Bomb()])), "--convert"),
    ("gen.npz", lambda path: path.write_bytes(path.read_bytes()[:-99]), "gen.npz")])
def test_bad_images_are_one_line(refused, tiny, tmp_path, pattern, spoil, words):
    """More kinds of bad files are among the tests of download_generated.py, which reads them."""
    data = shutil.copytree(tiny, tmp_path / "data")
    spoil(data / pattern)
    assert words in refused("--dataset", data / "images", "--gen-data", data / "gen.npz")


def flip_a_bit(path):
    """Of a weight."""
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["projector.0.weight"]
    content[content.index(weights.numpy().tobytes()) + 7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [
    lambda path: os.truncate(path, 99),
    flip_a_bit,
    lambda path: torch.save(dict(step=Bomb()), path),
    lambda path: torch.save(dict(step=1), path)])
def test_bad_checkpoint_is_one_line(refused, finished, tmp_path, spoil):
    """It is never overwritten, as there might be something left in it."""
    out = shutil.copytree(finished, tmp_path / "run")
    spoil(out / "checkpoint.pt")
    assert "checkpoint.pt" in refused("--steps", 3)


# ---- Subsets -------------------------------------------------------------------------------------


def load(folder, *more):
    """The Data of a run with these options."""
    options = adainf.parse_options(arguments(folder, "unused", *more))
    return adainf.choose_subsets(adainf.load_data(options), options)


def places(images, pool):
    """Where in a pool each of the images is."""
    pool = [image.tobytes() for image in pool.numpy()]
    return [pool.index(image.tobytes()) for image in images.numpy()]


def test_subsets_are_random_by_the_seed_alone_and_the_probes_learn_from_all(tiny):
    """No image twice, and not the same ones of the real and the generated images."""
    pool = load(tiny)
    more = ("--real-size", 11, "--gen-size", 12, "--seed")
    first, again, other = [load(tiny, *more, seed) for seed in (0, 0, 1)]
    for name, size in (("images", 11), ("generated", 12)):
        chosen = places(getattr(first, name), getattr(pool, name))
        assert len(set(chosen)) == size
        assert getattr(first, name).equal(getattr(again, name))
        assert set(chosen) != set(places(getattr(other, name), getattr(pool, name)))
    one_class = adainf.balanced_subset(np.zeros(24), 12, seed=0)
    assert len(set(chosen) & {*one_class}) < 10

    assert first.labels.equal(pool.labels[places(first.images, pool.images)])
    assert sorted(first.labels.bincount().tolist()) == [3, 4, 4]
    assert first.train_images.equal(pool.images)
    assert first.train_labels.equal(pool.labels)


def test_a_subset_is_as_balanced_as_the_classes_allow():
    """Catches a remainder that always goes to the first classes."""
    labels = np.array([0] * 9 + [1] * 2 + [2] * 5)
    chosen = [labels[adainf.balanced_subset(labels, 11, seed)] for seed in range(20)]
    counts = {tuple(np.bincount(each).tolist()) for each in chosen}
    assert counts == {(5, 2, 4), (4, 2, 5)}


# ---- Experiments ---------------------------------------------------------------------------------

CELLS = ("none-strong", "none-weak", "vanilla-1to1-strong", "adainf-3to1-weak")


def test_comparison_has_cells_that_differ_only_in_data_and_augmentation(
        tiny, tmp_path, monkeypatch, capsys):
    """And their results in its table. A seed has real images of its own, so that the spread has
    what their choice adds."""
    monkeypatch.setattr(adainf, "fill_curves", None)  # slow, and tested once
    more = "--compare --seeds 2 --steps 4 --ratio 3 --real-size 18".split()
    adainf.main(arguments(tiny, tmp_path, *more))
    said = capsys.readouterr().out.splitlines()
    table = read_json(tmp_path / "comparison.json")["table"]
    assert Image.open(tmp_path / "comparison.png").size > (500, 200)

    seen = []
    for seed in (0, 1):
        results = [read_json(tmp_path / f"{cell}-{seed}" / "result.json") for cell in CELLS]
        assert [result["n_generated"] for result in results] == [0, 0, 24, 24]
        assert [result["beta"] for result in results] == [1, 1, 18 / 42, 54 / 78]
        augmentations = [result["augmentation"] for result in results]
        assert augmentations == ["strong", "weak", "strong", "weak"]
        for cell, result in zip(CELLS, results):
            for metric in adainf.METRICS:
                assert table[cell][metric]["values"][seed] == result[metric]

        checkpoints = [read_checkpoint(tmp_path / f"{cell}-{seed}") for cell in CELLS]
        first, *others = [checkpoint["decisive"] for checkpoint in checkpoints]
        assert (first["--seed"], first["--real-size"]) == (seed, 18)
        for each in others:
            other = {name for name in first if each[name] != first[name]}
            assert other <= {"--aug", "--ratio", "--gen-size", "number of generated images",
                             "sum of some generated images"}
        seen.append(first["sum of some real images"])
    assert seen[0] != seen[1]

    assert set(table) == {*CELLS, "raw pixels", "untrained network"}
    assert set(table["raw pixels"]) == {"linear_top1", "knn_top1"}
    assert set(table["untrained network"]) == set(adainf.METRICS)
    for name, row in table.items():
        [line] = [line for line in said if line.startswith(f"{name} ")]
        for entry in row.values():
            assert entry["mean"] == pytest.approx(np.mean(entry["values"]))
            assert entry["std"] == pytest.approx(np.std(entry["values"], ddof=1))
            assert f"{entry['mean']:.2f} +- {entry['std']:5.2f}" in line


# ---- Many processes ------------------------------------------------------------------------------


def main_in_eval_mode(argv):
    """main(argv) with batch norms that normalise by fixed numbers, not by those of each share."""
    build_model = adainf.build_model
    adainf.build_model = lambda *args: build_model(*args).eval()
    adainf.main(argv)


def test_processes_do_the_work_of_one(tiny, tmp_path):
    """Catches a share of images, loss or gradient that is missing or counts double."""
    more = "--steps 8 --lr 0.1 --probe-lr 0.1 --log-every 1".split()

    def learned(world):
        out = tmp_path / f"run{world}"
        said = tmp_path / f"said{world}-"
        processes = start_world(said, world, main_in_eval_mode, arguments(tiny, out, *more))
        assert exit_codes(*processes) == [0] * world, Path(f"{said}0").read_text()
        losses = [[line["loss"], line["probe_loss"]] for line in read_log(out, "loss")]
        return dict(read_checkpoint(out)["model"], losses=torch.tensor(losses))

    one = learned(1)
    for world in (2, 4):
        torch.testing.assert_close(learned(world), one, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "said2-1").read_text() == ""  # only the first one speaks


def test_synchronised_batch_norm_keeps_the_weights_that_the_optimizer_has(
        monkeypatch, model, options):
    """Catches copies, which would never be updated. (Its statistics need several GPUs.)"""
    monkeypatch.setattr(adainf, "WORLD", 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)
    options.device = "cuda"
    names = list(model.state_dict())
    optimizer = adainf.build_optimizer(model, options)
    network = adainf.accelerate(model, None, options)
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in network.parameters()} == {id(p) for p in optimized}
    assert list(model.state_dict()) == names
    assert isinstance(model.backbone.bn1, nn.SyncBatchNorm)


def test_processes_resume_exactly_after_a_signal_to_one(tiny, tmp_path):
    """They agree to stop at a step that 10 divides."""
    straight, out, said = (tmp_path / name for name in ("straight", "run", "said"))
    whole = arguments(tiny, straight, "--steps", 12)
    assert exit_codes(*start_world(said, 2, adainf.main, whole)) == [0, 0]
    argv = arguments(tiny, out, "--steps", 12)
    assert exit_codes(*start_world(said, 2, faulty_main, argv, 1, *sigterm_in(7))) == [143, 143]
    assert "after step 10" in Path(f"{said}0").read_text().splitlines()[-1]
    assert read_checkpoint(out)["step"] == 10
    assert exit_codes(*start_world(said, 2, adainf.main, argv)) == [0, 0]
    assert not differences(out, outcome(straight))


def main_on_a_disk_of_its_own(argv, folder):
    """main(argv) where the second process does not see the checkpoint of the first."""
    adainf.main([*argv, "--out", f"{folder}/elsewhere"] if adainf.RANK == 1 else argv)


def test_processes_that_resume_from_other_steps_are_refused(tiny, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    said = tmp_path / "said"
    argv = arguments(tiny, out, "--steps", 3)
    first, second = start_world(said, 2, main_on_a_disk_of_its_own, argv, tmp_path)
    second.join(60)
    assert second.exitcode == 2
    first.kill()
    assert "the same disk" in Path(f"{said}1").read_text()


def test_processes_share_a_batch_equally_and_download_nothing(tiny, tmp_path, monkeypatch):
    """A data set that is not there would be downloaded by each of them, into one file."""
    monkeypatch.setattr(adainf, "WORLD", 4)
    with pytest.raises(adainf.InputError, match="4 processes cannot share"):
        load(tiny, "--batch-size", 7)
    with pytest.raises(adainf.InputError, match="download_generated.py cifar10"):
        load(tiny, "--dataset", "cifar10", "--image-size", 32, "--data-dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# ---- On a machine with a GPU ---------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_the_host_never_waits_in_a_step(tiny):
    options = adainf.parse_options(arguments(tiny, "unused", "--device", "cuda", "--no-compile"))
    data = adainf.load_data(options)
    mixture = adainf.Mixture(data, 1, 8, 0, "cuda")
    two_views = adainf.TwoViews(adainf.WEAK, 8, 0, "cuda")
    model = adainf.build_model(options, data)
    parts = (mixture, two_views, model, adainf.build_optimizer(model, options),
             torch.amp.GradScaler("cuda", enabled=False), options)
    adainf.training_step(0, *parts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            adainf.training_step(step, *parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_compiled_and_half_precision_runs_learn_what_a_plain_one_learns(tiny, tmp_path):
    def losses(*more):
        out = tmp_path / "-".join(more)
        adainf.main(arguments(tiny, out, "--device", "cuda", "--log-every", 1, *more))
        return torch.tensor([line["loss"] for line in read_log(out, "loss")])

    plain = losses("--amp", "off", "--no-compile")
    compiled = losses("--amp", "off", "--compile")
    half = losses("--no-compile")
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(half, plain, rtol=2e-2, atol=2e-2)


@needs_gpu
def test_run_on_a_gpu_goes_on_and_its_encoder_is_read_without_one(run, tmp_path):
    run(tmp_path, "--device", "cuda", status=143, fault=sigterm_in(6))
    run(tmp_path, "--device", "cuda")
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)["weights"]
    assert {value.device.type for value in weights.values()} == {"cpu"}


# ---- download_generated.py: downloads ------------------------------------------------------------


class DownloadHandler(http.server.BaseHTTPRequestHandler):
    """Answers with the next act of the script of server.plan.

    An int is an HTTP status, slice(k) the first k bytes of what was asked for, bytes are another
    answer than that, and None is an endless one, nearly, of no announced size."""

    def do_GET(self):
        plan = self.server.plan
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes="):-1])
        plan.starts.append(start)
        act = plan.script.pop(0) if plan.script else slice(None)
        if isinstance(act, int):
            self.send_response(act)
            self.send_header("Location", plan.address)
            self.end_headers()
            return

        body = act if isinstance(act, bytes) else plan.body
        size = len(body)
        current = self.headers["If-Range"] == plan.version or plan.blind
        if start and current and not isinstance(act, bytes):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            start = 0
            self.send_response(200)
        self.send_header("ETag", plan.version)
        if act is not None:
            more = plan.more if start else b""
            self.send_header("Content-Length", size - start + len(more))
            body = body[start:][act if isinstance(act, slice) else slice(None)] + more
        self.end_headers()
        for _ in range(20 if act is None else 1):
            self.wfile.write(body)

    def log_message(self, *message):
        pass


@pytest.fixture
def serve_file(monkeypatch):
    """serve_file(body, *script) starts a server till the end of the test, a source of `tiny`."""
    servers = []

    def serve_file(body, *script, archive=False):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DownloadHandler)
        server.handle_error = lambda *_: None  # a client that hangs up is part of these tests
        # blind: to the version that is asked for; more: behind the end of what is continued;
        # starts: the first byte that each request asked for; pauses: instead of waiting, in s.
        server.plan = SimpleNamespace(
            body=body, script=list(script), version='"1"', blind=False, more=b"", starts=[],
            pauses=[], address=f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
        monkeypatch.setattr(dg.time, "sleep", server.plan.pauses.append)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

        servers.append(server)
        urls = " ".join(server.plan.address for server in servers)
        monkeypatch.setattr(dg, "SOURCES", f"name\ntiny 400 0.001 DDPM ? used ? {urls}")
        monkeypatch.setattr(dg, "MD5", {"tiny": hashlib.md5(body).hexdigest()} if archive else {})
        return server.plan

    yield serve_file
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tool(here, capfd):
    """tool(line, status) runs a command in an empty folder and returns what it said."""
    def tool(line, status=0):
        if status == 0:
            dg.main(line.split())
            return capfd.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            dg.main(line.split())
        said = capfd.readouterr().err
        assert stopped.value.code == status, said
        assert said.count("\n") == 1
        return said

    return tool


def colour_noise(count=400, size=32):
    """uint8 images, brighter in red than in blue as CIFAR-10 is, with black and with white."""
    noise = np.random.default_rng(count).integers(0, 200, (count, size, size, 3))
    images = (noise + [30, 25, 10]).astype(np.uint8)
    images[0, 0, :2] = [[0], [255]]
    return images


def npz_bytes(images, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, image=images)
    return buffer.getvalue()


def tar_bytes(members):
    """A tar.gz of {path: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in members.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def other_process(code):
    """A process that has run this Python code, in the present folder."""
    path = dict(os.environ, PYTHONPATH=str(Path(dg.__file__).parent))
    return subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)


NPZ = npz_bytes(colour_noise())  # 1.2 MB
BAD_NPZ = NPZ[:600_000] + bytes([NPZ[600_000] ^ 1]) + NPZ[600_001:]
ARCHIVE = tar_bytes({"batches/one": os.urandom(400_000), "batches/two": b"2"})
DOWNLOADED = Path("data/tiny.npz")
PART = Path("data/tiny.npz.part")


def test_list_names_every_source_and_imports_nothing_slow():
    """Catches a torchvision that would not find or would not accept the archive."""
    code = ("import sys, download_generated; download_generated.main(['--list']); "
            "assert not {'torch', 'adainf', 'PIL'} & set(sys.modules)")
    _, *rows = other_process(code).stdout.split("\n\n")[0].splitlines()
    assert len(rows) == 13
    for name, images, _, _, _, _, _, *urls in map(str.split, rows):
        assert int(images.replace(",", "")) >= 5000
        assert all(url.startswith("https://") for url in urls)
        if name in ("cifar10", "cifar100"):
            expected = getattr(torchvision.datasets, name.upper())
            assert (dg.MD5[name], urls[1]) == (expected.tgz_md5, expected.url)
            assert "zenodo" in urls[0] and expected.filename in urls[0]


@pytest.mark.parametrize("line, word", [
    ("", "required"), ("no-such-name", "--list"), ("--convert x", "--out"),
    ("--convert x --out new.npz", "does not exist"), ("--verify none.npz", "none.npz"),
    ("--convert empty --out new.npz", "0 images"), ("--inspect none.npz", "does not exist"),
    ("--inspect none.npz --out new.npz", "new.npz"), ("--convert x --out n --size 0", "--size 0"),
    ("--convert x --out n --size -3", "-3"), ("--convert x --out n --range 1 1", "--range"),
    ("--convert x --out n --range nan 1", "--range")])
def test_bad_input_is_one_line_and_status_2(line, word, tool):
    os.mkdir("empty")
    assert word in tool(line, 2)
    assert os.listdir() == ["empty"]


@pytest.mark.parametrize("script, more, starts, pauses", [
    ([500, 429, slice(1), slice(0), slice(dg.BLOCK), slice(70_000)], b"",
     [0, 0, 0, 1, 1, 1 + dg.BLOCK, 70_001 + dg.BLOCK], [2, 4, 2, 4, 2, 2]),
    ([slice(300_000)], b"more", [0, 300_000, 0], [2, 2]),
    ([slice(300_000), 416], b"", [0, 300_000, 0], [2, 4])])
def test_download_survives_trouble_and_is_recorded(script, more, starts, pauses, serve_file, tool):
    """Nothing is fetched twice, unless it is of another size than announced or no longer to be
    had (416); pauses grow only while nothing comes."""
    server = serve_file(NPZ, *script)
    server.more = more
    tool("tiny")
    assert (server.starts, server.pauses) == (starts, pauses)
    assert sorted(os.listdir("data")) == ["tiny.npz", "tiny.npz.json"]
    assert DOWNLOADED.read_bytes() == NPZ
    record = json.loads(Path("data/tiny.npz.json").read_text())
    assert record["source"] == server.address
    assert record["sha256"] == hashlib.sha256(NPZ).hexdigest()


def test_an_endless_answer_is_no_file(serve_file, tool):
    serve_file(NPZ, None)
    assert "bytes came" in tool("tiny", 1)
    assert dg.size_of(PART) < 3 * len(NPZ) and not DOWNLOADED.exists()


@pytest.mark.parametrize("count, version, blind, start", [
    (400, '"1"', False, 300_000), (400, '"2"', False, 300_000), (400, '"2"', True, 0),
    (500, '"1"', False, 0)])
def test_what_came_is_neither_lost_nor_spliced(count, version, blind, start, serve_file, tool):
    """Catches what is replaced by an answer that is no data, is appended to another version of the
    file, or cannot be gone on with."""
    server = serve_file(NPZ, slice(300_000), *[slice(0)] * 5)
    said = tool("tiny", 1)
    assert server.address in said and len(server.starts) == dg.ATTEMPTS
    server.version = '"other"'
    server.script = [b"", b"\n<!DOCTYPE html>", b"<?xml?><Error/>", b'{"error": 1}',
                     b"\xef\xbb\xbfAccess denied", b"502"]
    tool("tiny", 1)
    assert sorted(os.listdir("data")) == [PART.name, f"{PART.name}.json"]
    assert PART.read_bytes() == NPZ[:300_000]

    server.body = NPZ if version == '"1"' and count == 400 else npz_bytes(colour_noise(count)[::-1])
    server.version = version
    server.blind = blind
    tool("tiny")
    assert server.starts[-1] == start
    assert DOWNLOADED.read_bytes() == server.body


@pytest.mark.parametrize("record", ["null", "[]", "[1]", "7", '"ab"', '{"url"', "{}"])
def test_record_that_says_nothing_is_no_record(record, serve_file, tool):
    server = serve_file(NPZ)
    PART.parent.mkdir()
    PART.write_bytes(b"PK old")
    Path(f"{PART}.json").write_text(record)
    tool("tiny")
    assert server.starts == [0]
    assert DOWNLOADED.read_bytes() == NPZ
    Path("data/tiny.npz.json").write_text(record)
    tool("--verify data/tiny.npz", 2)


def test_second_download_of_a_file_is_refused(serve_file, tool, monkeypatch):
    """Catches two processes that write to one file, which then is a mixture."""
    serve_file(NPZ)
    code = f"import download_generated as dg; dg.SOURCES = {dg.SOURCES!r}; dg.main(['tiny'])"
    others = []
    copy = dg.copy
    monkeypatch.setattr(dg, "copy", lambda *_: (others.append(other_process(code)), copy(*_)))
    tool("tiny")
    assert others[0].returncode == 1 and "another process" in others[0].stderr
    assert DOWNLOADED.read_bytes() == NPZ


@pytest.mark.parametrize("trouble, status", [
    ("dg.print = lambda said, **_: kill(9) if said.startswith('0.4') else None", -9),
    ("dg.keep = lambda *_: kill(9)", -9),  # just before it is named
    ("dg.print = lambda said, **_: kill(2) if said.startswith('0.4') else print(said, **_)", 130),
    ("resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))", 1)])
def test_stopped_download_goes_on_where_it_stopped(trouble, status, serve_file, tool):
    server = serve_file(NPZ)
    # A test that runs in the background may have been told to ignore Ctrl-C.
    code = ("import os, resource, signal; signal.signal(2, signal.default_int_handler); "
            "kill = lambda number: os.kill(os.getpid(), number); "
            f"import download_generated as dg; dg.SOURCES = {dg.SOURCES!r}; {trouble}; "
            "dg.main(['tiny'])")
    stopped = other_process(code)
    assert (stopped.returncode, stopped.stderr.count("\n")) == (status, int(status > 0))
    assert server.starts == [0]  # another attempt would not have helped
    kept = dg.size_of(PART)
    assert kept > 190_000 and not DOWNLOADED.exists()
    tool("tiny")
    assert server.starts == ([0] if kept == len(NPZ) else [0, kept])
    assert DOWNLOADED.read_bytes() == NPZ


def test_redirects_never_lead_from_https_to_http(serve_file, tool, monkeypatch):
    # The server speaks http behind an https address, as only the address matters here.
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open",
                        lambda self, request: self.do_open(http.client.HTTPConnection, request))
    server = serve_file(NPZ, 302, 302)
    monkeypatch.setattr(dg, "SOURCES", dg.SOURCES.replace("http:", "https:"))
    assert "not https" in tool("tiny", 1)
    server.address = server.address.replace("http:", "https:")
    tool("tiny")
    assert len(server.starts) == 3


def test_good_file_is_kept_and_replaced_only_by_a_whole_one(serve_file, tool):
    server = serve_file(BAD_NPZ)
    DOWNLOADED.parent.mkdir()
    DOWNLOADED.write_bytes(BAD_NPZ)  # saved by hand, so without a record
    assert "--force" in tool("tiny", 2)
    assert DOWNLOADED.read_bytes() == BAD_NPZ
    DOWNLOADED.write_bytes(NPZ)
    for _ in range(2):
        assert "whole" in tool("tiny")
    assert "CRC" in tool("tiny --force", 1)
    assert not PART.exists()  # or the next run would take it for whole, and stop at it again
    assert DOWNLOADED.read_bytes() == NPZ
    tool("--verify data/tiny.npz")
    DOWNLOADED.write_bytes(BAD_NPZ)
    tool("--verify data/tiny.npz", 1)
    assert len(server.starts) == 1  # that with --force
    server.body = NPZ
    tool("tiny --force")
    assert DOWNLOADED.read_bytes() == NPZ


@pytest.mark.parametrize("body, script", [
    (ARCHIVE, [404]), (b"\x1f\x8b" + b"x" * 999, []), (ARCHIVE, [slice(1000), 404, 404])])
def test_archive_comes_from_the_source_that_has_it(body, script, serve_file, tool):
    """Catches what came from one source and is continued by another."""
    serve_file(body, *script)
    second = serve_file(ARCHIVE, slice(200_000), 404, archive=True)
    tool("tiny", 1)
    for _ in range(2):
        tool("tiny")
        assert second.starts == [0, 200_000, 200_000]  # the second time it is there
    name = "cifar-10-python.tar.gz"  # where torchvision looks for it
    assert sorted(os.listdir("data")) == ["batches", name, f"{name}.json"]
    assert sorted(os.listdir("data/batches")) == ["one", "two"]


def test_archive_cannot_write_outside_its_folder(serve_file, tool):
    serve_file(tar_bytes({"batches/one": b"1", "../../outside": b"2"}), archive=True)
    tool("tiny", 2)
    assert os.listdir() == ["data"] and not Path("data/batches").exists()


@pytest.mark.parametrize("code, status, word", [
    ("open(sys.argv[4], 'wb').write(open('good.npz', 'rb').read())", 0, "whole"),
    ("open(sys.argv[4], 'wb').write(b'<html>Quota exceeded')", 1, "zip"),
    ("sys.exit(1)", 1, "pip install")])
def test_google_drive_by_gdown(code, status, word, tool, monkeypatch):
    """A gdown of our own writes what comes to the file that it is told."""
    Path("good.npz").write_bytes(NPZ)
    Path("gdown.py").write_text(f"import sys; assert sys.argv[2:4] == ['--continue', '-O']; {code}")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    assert word in tool("cifar10-5k", status)
    assert len(os.listdir("data")) == (0 if status else 2)


# ---- download_generated.py: conversion -----------------------------------------------------------


def converted(tool, line):
    """(what was said, the images) of --convert LINE."""
    said = tool(f"--convert {line} --out mine.npz --force")
    with np.load("mine.npz") as file:
        images = file["image"]
    assert images.dtype == np.uint8
    tool("--verify mine.npz")
    return said, images


def save_pictures(images, folder="pictures", first=0, **more):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, first):
        Image.fromarray(image).save(f"{folder}/{number:03}.png", **more)


def zip_pictures(images):
    """As StyleGAN and EDM do, with a file of labels beside them."""
    save_pictures(images, "made/00000")
    Path("made/dataset.json").write_text("{}")
    Path(shutil.make_archive("dataset", "zip", "made")).rename("dataset.zip")


NOISE = colour_noise(40, 8)
FIRST = np.ascontiguousarray(NOISE.transpose(0, 3, 1, 2))  # N x 3 x n x n
SIGNED = FIRST / np.float32(127.5) - 1
GREY = NOISE[..., :1]


@pytest.mark.parametrize("save, line, expected", [
    (lambda: save_pictures(NOISE), "pictures", NOISE),
    (lambda: zip_pictures(NOISE), "dataset.zip", NOISE),
    (lambda: np.savez("a.npz", NOISE), "a.npz", NOISE),
    (lambda: np.savez("a.npz", samples=NOISE, label=np.arange(40)), "a.npz", NOISE),
    (lambda: np.savez_compressed("a.npz", x=SIGNED), "a.npz", NOISE),
    (lambda: np.savez("a.npz", x=NOISE[:5], y=NOISE), "a.npz --key y", NOISE),
    (lambda: np.save("a.npy", FIRST / 255), "a.npy", NOISE),
    (lambda: np.save("a.npy", NOISE.astype(np.int64)), "a.npy", NOISE),
    (lambda: np.save("a.npy", (FIRST / 255).astype(">f8")), "a.npy", NOISE),
    (lambda: np.save("a.npy", NOISE.astype(np.float16)), "a.npy", NOISE),
    (lambda: np.save("a.npy", FIRST.reshape(40, -1)), "a.npy", NOISE),
    (lambda: np.save("a.npy", np.asfortranarray(NOISE)), "a.npy", NOISE),
    (lambda: np.save("a.npy", GREY), "a.npy", np.repeat(GREY, 3, 3)),
    (lambda: torch.save(torch.tensor(SIGNED), "a.pt"), "a.pt", NOISE),
    (lambda: torch.save({"x": torch.tensor(FIRST), "y": torch.arange(40)}, "a.pt"), "a.pt", NOISE),
    (lambda: [np.savez(f"{k}.npz", SIGNED[k::2]) for k in (0, 1)], "0.npz 1.npz",
     np.concatenate([NOISE[::2], NOISE[1::2]])),
    # Shards have one range, even where the values of one would fit another.
    (lambda: [np.save("0.npy", SIGNED.clip(0)), np.save("1.npy", SIGNED)], "0.npy 1.npy",
     np.concatenate([NOISE.clip(128), NOISE])),
    (lambda: np.savez(open("a.jpg", "wb"), SIGNED), "a.jpg", NOISE),
    (lambda: np.save("a.npy", NOISE[..., ::-1]), "a.npy --bgr", NOISE),
    (lambda: np.save("a.npy", SIGNED * 3), "a.npy --range -3 3", NOISE)])
def test_every_row_of_the_table_of_what_is_taken(save, line, expected, tool):
    """Exact to the pixel, as nothing is resized."""
    save()
    _, images = converted(tool, line)
    assert np.array_equal(images, expected)


@pytest.mark.parametrize("low, high, black, white", [
    (-1.05, 1.05, -1, 1), (-0.03, 1.03, 0, 1), (-0.015, 1.01, 0, 1), (-6, 262, 0, 255),
    (-1, 0.4, -1, 1), (-2.1, 2.6, None, None), (-0.3, 1, None, None), (0, 0.3, None, None),
    (0, 10, None, None), (0, 65535, None, None), (np.nan, 1, None, None), (0, np.inf, None, None)])
def test_values_fit_one_window_or_are_refused(low, high, black, white, tool, monkeypatch):
    """Catches black images: -1.05..1.05 was taken for 0..255, and -0.015..1.01 for -1..1."""
    monkeypatch.setattr(dg, "CHUNK", 4000)
    values = np.linspace(low, high, 40 * 192) if np.isfinite(high - low) else np.zeros(40 * 192)
    values[-2:] = low, high
    np.save("a.npy", values.reshape(40, 8, 8, 3))
    if black is None:
        assert "--range" in tool("--convert a.npy --out mine.npz", 2)
        return
    said, images = converted(tool, "a.npy")
    assert f"{black} is black and {white} is white" in said
    expected = ((values - black) / (white - black) * 255).clip(0, 255)
    assert np.abs(images.ravel() - expected).max() < 0.51


def npz_of(shape, content=b"", method=zipfile.ZIP_STORED):
    """An npz file whose `image` says it has this shape, and its checksum is right."""
    stream, file = io.BytesIO(), io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("image.npy", stream.getvalue() + content)
    return file.getvalue()


@pytest.mark.parametrize("bad, words", [
    (lambda: np.savez("a", x=NOISE, y=NOISE), ["`x` uint8 40 x 8 x 8 x 3", "--key"]),
    (lambda: np.savez("a", x=np.zeros((4, 7))), ["`x` float64 4 x 7", "--key"]),
    (lambda: np.savez("a", x=NOISE[:, :4]), ["--size"]),
    (lambda: np.savez("a", x=np.array([Bomb()])), ["`x` object 1"]),
    (lambda: np.savez("a", image=np.array([Bomb()])), ["`image` object 1"]),
    (lambda: np.savez("a", image=NOISE[..., :2]), ["--key"]),
    (lambda: torch.save(Bomb(), "a.npz"), ["a.npz"]),
    (lambda: os.mkfifo("a.npz"), ["neither a file nor a folder"]),
    (lambda: save_pictures([NOISE[0], colour_noise(1, 9)[0]], "a.npz"), ["9 x 9", "--size 8"]),
    (pickle.dumps(Bomb()), ["a pickle"]),
    (b"\x89HDF\r\n\x1a\n", ["HDF5", "np.save"]),
    (b"MATLAB 5.0 MAT", ["MATLAB", "np.save"]),
    (b"PAR1", ["Parquet", "np.save"]),
    (b"text", ["no file that is known here", "np.save"]),
    (NPZ[:9999], ["a.npz", "zip"]),
    *[(npz_of((count, 8, 8, 3), bytes(192)), []) for count in (0, -1, 2, 2**70, 400_000_000_000)],
    (npz_of((1, 8, 8, 3), bytes(193)), []),
    (npz_of((1, 8, 8, 3), bytes(192), zipfile.ZIP_BZIP2), ["expand"]),
    (npz_of((), b"1"), []),
    (npz_of((1, 2000, 2000, 3), bytes(12 * 10**6), zipfile.ZIP_DEFLATED), [])])
def test_bad_file_is_one_line_for_both_programs(bad, words, tool, monkeypatch):
    """Catches what is unpickled, a FIFO that is waited for, and memory that is reserved or filled
    for what a header only promises."""
    monkeypatch.setattr(dg, "LARGEST", 10**7)
    if isinstance(bad, bytes):
        Path("a.npz").write_bytes(bad)
    else:
        bad()
    tracemalloc.start()
    try:
        said = tool("--convert a.npz --out mine.npz", 2)
        tool("--inspect a.npz", 2)
        with pytest.raises(dg.Problem, match="--convert 'a.npz' --size 8|of one colour"):
            dg.read_generated("a.npz", 8)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert not [word for word in words if word not in said], said
    assert os.listdir() == ["a.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_file_is_refused_or_intact(save, tool):
    """Damage never yields other images and never a traceback, but always one line."""
    good = npz_bytes(NOISE[:9, :4, :4], save)
    draw = random.Random(0)
    intact = 0
    for _ in range(150):
        at = draw.randrange(len(good))
        Path("damaged.npz").write_bytes(good[:at] + draw.randbytes(at % 2) + good[at + 1:])
        try:
            dg.main("--convert damaged.npz --out mine.npz --force".split())
        except SystemExit as stopped:
            assert stopped.code == 2
            continue
        assert np.array_equal(np.load("mine.npz")["image"], NOISE[:9, :4, :4])
        intact += 1
    assert intact  # there are bytes that do not matter


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak there")
def test_conversion_needs_memory_for_a_chunk_only(tool):
    """Catches chunks of as many images whatever their size, or a file that stays in memory."""
    np.save("a.npy", np.ones((100, 256, 256, 3), np.float32))  # 79 MB
    # Not ru_maxrss, in which a new process begins with what the tests have.
    code = ("import PIL.ImageOps, download_generated as dg; status = '/proc/self/status'; "
            "peak = lambda: int(open(status).read().split('VmHWM:')[1].split()[0]); "
            "before = peak(); "
            "dg.main('--convert a.npy --out mine.npz --size 32 --range 0 1'.split()); "
            "print(peak() - before)")
    assert int(other_process(code).stdout.split()[-1]) < 50_000  # kB


def test_arrays_and_pictures_are_resized_alike(tool):
    """The central square, bicubic, as Pillow does it."""
    large = colour_noise(3, 40)[:, :30]
    save_pictures(large)
    np.save("a.npy", large)
    expected = [np.asarray(ImageOps.fit(Image.fromarray(image), (16, 16), Image.Resampling.BICUBIC))
                for image in large]
    for line in ("a.npy --size 16", "pictures --size 16"):
        said, images = converted(tool, line)
        assert "3 images; sizes seen: 40 x 30" in said
        assert np.array_equal(images, expected)
    assert np.array_equal(dg.read_image("pictures/001.png", 16), expected[1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_pictures_are_read_as_upright_rgb_or_refused_by_name(tool):
    """Catches 16 bits and floats that become white or black, and what is waited for or skipped."""
    os.mkdir("pictures")
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        Image.new("RGB", (8, 8), "white").convert(mode).save("pictures/a.tif")
        assert (dg.read_image("pictures/a.tif", 8) == 255).all(), mode
    ramp = np.arange(64).reshape(8, 8)
    for spoil in (lambda path: Image.fromarray((ramp * 999).astype(np.uint16)).save(path, "PNG"),
                  lambda path: Image.fromarray(ramp.astype(np.int32)).save(path),
                  lambda path: Image.fromarray(ramp.astype(np.float32)).save(path),
                  # Pillow would start Ghostscript for this, whatever its name.
                  lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8"),
                  lambda path: os.truncate(path, 9)):
        spoil(Path("pictures/a.tif"))
        assert "a.tif" in tool("--convert pictures --out mine.npz", 2)
    os.remove("pictures/a.tif")
    os.mkfifo("pictures/a.tif")
    assert "a.tif" in tool("--convert pictures --out mine.npz", 2)
    assert os.listdir() == ["pictures"]

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    save_pictures(NOISE[:1], exif=exif)
    assert np.array_equal(dg.read_image("pictures/000.png", 8), np.rot90(NOISE[0], -1))


def test_inspect_draws_a_contact_sheet_and_warns(tool):
    images = colour_noise(300)
    np.savez("good.npz", image=images, label=np.arange(300) % 10)
    said = tool("--inspect good.npz")
    assert "300 x 32 x 32 x 3" in said and "123.0" in said  # the latter is CIFAR-10's green
    assert "warning" not in said
    sheet = np.asarray(Image.open("good.npz.png"))
    assert sheet.shape == (10 * 34, 16 * 34, 3)  # every second image, and borders of 2
    assert (sheet[2:34, 2:34] == images[0]).all()  # in RGB
    assert (sheet[308:340, 172:204] == images[298]).all()

    for spoiled, labels, warning in [
            (images[..., ::-1], 0, "looks BGR against CIFAR-10"),
            (images, np.arange(300) // 30, "looks sorted by class"),
            (images // 64, 0, "nearly constant")]:
        np.savez("bad.npz", image=spoiled, label=labels + np.zeros(300, int))
        said = tool("--inspect bad.npz --out sheet.png")
        assert f"warning: {warning}" in said and said.count("warning") == 1


# ---- What adainf.py reads ------------------------------------------------------------------------


def save_greys(folder, *numbers):
    """Pictures in a folder; number 5 has the grey 5, and so on."""
    for number in numbers:
        save_pictures([np.full((8, 8, 3), number, np.uint8)], folder, number)


def greys(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("split", ["test", "val", "valid"])
def test_folder_of_classes_is_read_in_order(here, split):
    """Catches names with a dot as a class or as images, as --convert would also take them (it
    lists images by the same function), and links that are followed twice or not at all."""
    save_greys("train/a/deep", 0, 50)
    save_greys("train/b", 100)
    save_greys(f"{split}/a", 10)
    save_greys(f"{split}/b", 20)
    save_greys("train/.ipynb_checkpoints", 9)
    save_greys("train/a/.cache/c", 9)
    save_greys("train", 9)  # is in no class
    Path("train/a/._0.png").write_bytes(b"of a Mac")
    Path("train/a/notes.txt").write_text("no picture")
    Path("train/a/loop").symlink_to(".")
    save_greys("elsewhere", 150)
    Path("train/b/link").symlink_to(Path("elsewhere").absolute())
    Path("train/b/once_more").symlink_to("link")
    train, test, classes = dg.read_dataset(".", 8)
    assert classes == ["a", "b"]
    assert greys(train[0]) == [0, 50, 100, 150] and train[1].tolist() == [0, 0, 1, 1]
    assert greys(test[0]) == [10, 20] and test[1].tolist() == [0, 1]


def test_tiny_imagenet_is_read_by_its_annotations(here):
    """Its test/ has no classes."""
    save_greys("train/a/images", 1, 90)
    save_greys("train/b/images", 2, 80)
    save_greys("test/images", 3)
    save_greys("val/images", 4, 50)
    Path("val/val_annotations.txt").write_text("004.png\tb\t0\t0\t62\t62\n050.png\ta\t0\t0\t62\t62")
    _, (images, labels), classes = dg.read_dataset(".", 8)
    assert (greys(images), labels.tolist(), classes) == ([50, 4], [0, 1], ["a", "b"])


def test_pair_of_npz_files_is_a_data_set(here):
    for split in ("train", "test"):
        np.savez(f"{split}.npz", image=colour_noise(6, 8), label=np.arange(6) % 3)
    train, test, classes = dg.read_dataset(".", 8)
    assert np.array_equal(train[0], colour_noise(6, 8))
    assert test[1].tolist() == [0, 1, 2, 0, 1, 2] and classes == ["0", "1", "2"]
    np.savez("test.npz", image=colour_noise(6, 8), label=np.arange(6) - 1)
    with pytest.raises(dg.Problem, match="test.npz"):
        dg.read_dataset(".", 8)


def test_what_cannot_be_read_is_named_with_the_command_that_converts_it(here):
    zip_pictures(NOISE[:7])
    np.savez("a.npz", SIGNED, np.arange(4))
    np.savez("b.npz", image=FIRST)
    np.save("a.npy", GREY)
    torch.save(torch.zeros(3), "a.pt")
    Path("c.npz").write_bytes(npz_of((9999, 8, 8, 3), bytes(9999 * 192), zipfile.ZIP_DEFLATED))
    for path, words in {
            "made": "a folder of 7 images", "dataset.zip": "a zip of 7 images", "a.pt": "torch",
            "a.npz": "an npz with `arr_0` float32 40 x 3 x 8 x 8, `arr_1` int64 4",
            "b.npz": "40 x 3 x 8 x 8", "a.npy": "an npy with uint8 40 x 8 x 8 x 1",
            "c.npz": "bytes instead of"}.items():
        with pytest.raises(dg.Problem) as raised:
            dg.read_generated(path, 8)
        assert words in str(raised.value)
        assert f"--convert '{path}' --size 8" in str(raised.value)


def test_file_of_generated_images_is_in_memory_once(here):
    """Catches a second copy, which for a million images of 32 x 32 is 3 GB."""
    np.savez("gen.npz", image=np.tile(NOISE, (3000, 1, 1, 1)))
    tracemalloc.start()
    images = dg.read_generated("gen.npz", 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.nbytes <= peak < 1.3 * images.nbytes


def test_cifar10_comes_from_torchvision_or_from_here(serve_file, tool, monkeypatch):
    """When a host is down, adainf.py names the command, whose files it finds."""
    images = colour_noise(40)
    pixels = images.transpose(0, 3, 1, 2).reshape(40, 3072)
    batch = pickle.dumps({"data": pixels, "labels": [*range(10)] * 4})
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    body = tar_bytes({"cifar-10-batches-py/40": batch, "cifar-10-batches-py/batches.meta": meta})
    server = serve_file(body, archive=True)
    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "url", server.address)
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(body).hexdigest())
    monkeypatch.setattr(dataset, "train_list", [["40", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(dataset, "test_list", dataset.train_list)
    monkeypatch.setitem(dataset.meta, "md5", hashlib.md5(meta).hexdigest())

    tool("tiny --data-dir ours")
    options = adainf.parse_options(["--data-dir", "ours"])
    adainf.read_cifar(options)
    assert len(server.starts) == 1
    options.data_dir = "theirs"
    server.script = [404] * 9
    with pytest.raises(adainf.InputError, match="lacks 40, 40; .* cifar10 --data-dir 'theirs'"):
        adainf.read_cifar(options)
    server.script.clear()
    train, _, _ = adainf.read_cifar(options)
    assert np.array_equal(train[0], images)


# ---- assets/theory.py ----------------------------------------------------------------------------


def spectral_loss(features, pairs):
    """L(f), written as its definition: a sum over positive pairs and one over all pairs."""
    marginal = pairs.sum(1)
    products = features @ features.T
    return -2 * (pairs * products).sum() + marginal @ products ** 2 @ marginal


def test_features_minimise_the_spectral_contrastive_loss_and_extend_to_new_points():
    """Catches rows divided by another power of P(x): descent from a random start finds no less.
    For the extension, a missing weight or eigenvalue, and 0 / 0 without a partner."""
    points = theory.draw_world(seed=1)["+ 600 perfect"][1][52:72].double()  # 8 real, 12 generated
    weights = theory.mixture_weights(8, 12, ratio=3).double()
    pairs = theory.positive_pairs(points, weights, 0.4)
    features, eigenvalues, _ = theory.best_features(pairs, 4)
    least = spectral_loss(features, pairs)
    assert least.item() == pytest.approx(-(eigenvalues ** 2).sum().item())  # its closed form
    torch.manual_seed(0)
    found = torch.randn(20, 4).double().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=500, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)

    def loss():
        value = spectral_loss(found, pairs)
        found.grad, = torch.autograd.grad(value, found)
        return value

    optimizer.step(loss)
    assert least - 1e-12 < loss() < least + 1e-6

    shared = theory.shared_views(torch.cat([points, points[:1] + 9]), points, 0.4)
    extended = theory.extend(shared, weights, features, eigenvalues)
    assert torch.allclose(extended[:20], features, rtol=1e-9, atol=1e-12)
    assert (extended[20] == 0).all()


def test_shared_views_are_the_overlap_of_two_discs():
    """Catches a wrong formula: one million views of a point, how many are views of the other?"""
    square = torch.rand(1_000_000, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    views = square[square.norm(dim=1) < 0.5]
    for distance in (0.0, 0.1, 0.35, 0.7, 0.9):
        other = torch.tensor([[distance, 0.0]])
        counted = ((views - other).norm(dim=1) < 0.5).float().mean()
        assert abs(theory.shared_views(torch.zeros(1, 2), other, 0.5) - counted) < 0.003


@pytest.mark.parametrize("ratio", [1, 10])
def test_mixture_is_that_of_theorem_3_1(ratio):
    """beta = N n / (N n + m), and D_TV(P_t, P_d) = (1 - beta) D_TV(P_g, P_d), here 1 - beta."""
    real, generated = torch.eye(2).repeat_interleave(torch.tensor([60, 600]), dim=1)
    beta = ratio * 60 / (ratio * 60 + 600)
    mixed = theory.mixture_weights(60, 600, ratio)
    assert torch.allclose(mixed, beta * real / 60 + (1 - beta) * generated / 600)
    assert (mixed - real / 60).abs().sum().item() / 2 == pytest.approx(1 - beta)


def test_mixtures_of_a_draw_share_their_points():
    """Catches unpaired differences, and classes of other points."""
    world, again, other = (theory.draw_world(seed) for seed in (5, 5, 6))
    (_, perfect, classes), (_, few, _), _, (_, many, _) = list(world.values())[3:7]
    assert torch.equal(many, again["+ 600, 60 % faults"][1])
    assert not torch.equal(perfect, other["+ 600 perfect"][1])
    assert ((few == perfect) | (few == many)).all()  # who fails at 15 % fails so at 60 %
    assert 0.1 < (few != perfect)[60:].float().mean() < 0.2
    angle = torch.atan2(perfect[:, 1], perfect[:, 0])
    start = angle - 2.6 * (perfect.norm(dim=1) - 0.25) / 0.75  # of the arm that a point lies on
    assert ((start / (math.pi / 2)).round() % 4 == classes).float().mean() > 0.99
    assert theory.measure(world, "60 real", 0.2, 1) == theory.measure(world, "60 real", 0.2, 10)


def test_alpha_is_a_loop_over_pairs():
    """Catches pairs of one class counted, or N and the pairs of a point with itself left out."""
    points, classes = (values[40:80] for values in theory.draw_world(2)["+ 600 perfect"][1:])
    total = wrong = 0
    for i, j in itertools.product(range(40), repeat=2):
        shared = theory.shared_views(points[i, None], points[j, None], 0.4).item()
        edge = (10 if i < 20 else 1) * (10 if j < 20 else 1) * shared
        total += edge
        wrong += edge * (classes[i] != classes[j]).item()
    world = {"small": (20, points, classes), "test": (1, points[:1], classes[:1])}
    alpha = theory.measure(world, "small", 0.4, 10)[1].item()
    assert alpha == pytest.approx(wrong / total, rel=1e-4)


def test_lambda_of_graphs_whose_eigenvalues_are_known():
    """Catches lambda_k or lambda_{k+2} in place of lambda_{k+1}, and a wrong normalisation."""
    complete = (1 - torch.eye(5)) / 20  # no loops: eigenvalues 1 and -1/4
    edge = torch.tensor([[3.0, 2.0], [2.0, 7.0]]) / 14  # eigenvalues 1 and 3/5 + 7/9 - 1
    pieces = torch.block_diag(complete, 9 * complete, edge) / 11
    for pairs, k, value in [(complete, 1, 5 / 4), (edge, 1, 2 / 5 + 2 / 9), (pieces, 1, 0),
                            (pieces, 2, 0), (pieces, 3, 2 / 5 + 2 / 9)]:
        assert theory.best_features(pairs, k)[2].item() == pytest.approx(value, abs=1e-6)


def significance(gains):
    """Mean of paired differences in standard errors: above 2, it is no accident of the draws."""
    mean, error = theory.mean_and_error(gains)
    return mean / error


def test_the_claims_of_the_paper():
    """Catches a computation in which inflation, strength, faults or N act as they should not."""
    mixtures = ["60 real", "600 real", "+ 600 perfect", "+ 600, 60 % faults"]
    seeds = range(100, 108)
    errors, alphas, lambdas = theory.measure_all(mixtures, [0.1, 0.2], [1], seeds)
    (few,), = theory.measure_all(["+ 600, 15 % faults"], [0.14], [1], seeds)[0].values()
    (weak_none, none), (weak_more, more), (weak, strong), (weak_poor, poor) = errors.values()
    # 1. Complementary roles: alone, real points want strong views, and with more points weak ones.
    assert significance(weak_none - none) > 2
    assert significance(more - weak_more) > 4 and significance(strong - weak) > 4
    # 2. Strong views and a poor generator harm. (With a perfect one strong views gain here, too.)
    assert significance(poor - none) > 2 and significance(none - strong) > 2
    # 3. Weaker views and a good generator win, but not with a poor one.
    assert significance(none - weak) > 3 and significance(none - few) > 2
    assert significance(weak_poor - none) > 3
    # 4. The best N lies inside: neither no weight nor nothing but real points.
    by_ratio = theory.measure_all(["half shifted"], [0.1], [1, 10, 300], range(3000, 3012))[0]
    one, ten, many = by_ratio["half shifted"]
    assert significance(one - ten) > 2 and significance(many - ten) > 2
    # Why: in every draw strength raises alpha and lambda, and inflation raises weak views' lambda.
    for mixture in mixtures[:3]:
        for weak, strong in (alphas[mixture], lambdas[mixture]):
            assert (strong > weak + 0.01).all()
    assert (lambdas["+ 600 perfect"][0] > lambdas["60 real"][0] + 0.01).all()


# ---- python test_adainf.py stress ----------------------------------------------------------------


def kill_at_random(argv, out, longest, draw):
    """Kill the run of argv after random times until it is done; returns the number of kills."""
    said = out.with_suffix(".said")
    for kills in itertools.count():
        child = start(said, adainf.main, argv)
        child.join(draw.uniform(0, longest))
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            assert child.exitcode == 0, said.read_text()
            return kills


def stress(least=50):
    """Kill runs at random moments, and compare all they leave with a run that nothing stopped."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        more = ("--steps", 60, "--save-every", 2)
        for name in ("first", "straight"):  # the first one also starts the server of processes
            begun = time.perf_counter()
            child = start(os.devnull, adainf.main, arguments(data, data / name, *more))
            assert exit_codes(child) == [0]
            seconds = time.perf_counter() - begun
        reference = outcome(data / "straight")

        kills = 0
        for count in itertools.count(1):
            out = data / f"killed-{count}"
            kills += kill_at_random(arguments(data, out, *more), out, seconds, draw)
            different = differences(out, reference)
            print(f"run {count}: {kills} kills so far, {len(different)} differences", flush=True)
            assert not different, f"differs from a run that was not stopped in {different}"
            if kills >= least:
                break
    print(f"{count} runs were killed {kills} times; each ended bit for bit as one that was not")


if __name__ == "__main__":
    if sys.argv[1:2] != ["stress"]:
        sys.exit("usage: python test_adainf.py stress [KILLS]")
    stress(*map(int, sys.argv[2:3]))
