"""Tests of adainf.py and download_generated.py: no network but loopback, no files but their own.

    python -m pytest -q                  # all tests
    python test_adainf.py theory         # the claims of the paper, computed: a minute
    python test_adainf.py stress         # kill and resume runs at random moments, minutes
    python test_adainf.py benchmark      # speed of every part beside what peers do, minutes

The first part holds the method against something simpler, in the order of adainf.py: a loop, a
formula, or what torchvision and Pillow compute. Docstrings say what mistake a test would catch."""

import argparse
import contextlib
import copy
import functools
import hashlib
import http.client
import http.server
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import socket
import statistics
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

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from matplotlib.figure import Figure
from PIL import Image
from PIL import ImageFilter
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import adainf
import download_generated as dg

# ---- 1. Mixing -----------------------------------------------------------------------------------


def make_data(images, labels, generated):
    """Data whose training images also serve the probes and the test."""
    return adainf.Data(
        images=images,
        labels=labels,
        generated=generated,
        probe_images=images,
        probe_labels=labels,
        test_images=images,
        test_labels=labels,
        classes=["a", "b", "c"],
        mean=torch.tensor([0.3, 0.4, 0.5]).view(3, 1, 1),
        std=torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))


def make_mixture(ratio, batch_size, seed=0, n_generated=30):
    """Images of one pixel: image i has the grey value i; the first six are real, of label i."""
    numbers = torch.arange(6 + n_generated)
    images = numbers.byte().view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
    data = make_data(images[:6], numbers[:6], images[6:])
    return adainf.Mixture(data, ratio, batch_size, seed)


@pytest.mark.parametrize("ratio, n_generated, copies", [
    (0, 30, 0),
    (3, 30, 3),
    (3, 0, 1)])
def test_an_epoch_has_each_real_image_n_times(ratio, n_generated, copies):
    """And each generated one once, which has no label. Alone, real images are not copied."""
    mixture = make_mixture(ratio, batch_size=6, n_generated=n_generated)
    numbers = []
    for step in range(mixture.steps_per_epoch):
        images, labels, n_real = mixture.batch(step)
        batch = images[:, 0, 0, 0].tolist()
        assert labels.tolist() == [number if number < 6 else -1 for number in batch]
        assert n_real == sum(number < 6 for number in batch)
        numbers += batch
    expected = [*range(6)] * copies + [*range(6, 6 + n_generated)]
    assert sorted(numbers) == sorted(expected)
    assert mixture.beta == 6 * copies / len(expected)


def test_processes_share_a_batch_and_each_counts_all_its_real_images(monkeypatch):
    """Catches a count of a process's own real images, which would give them a larger weight."""
    mixture = make_mixture(10, batch_size=8)
    images, labels, n_real = mixture.batch(0)
    monkeypatch.setattr(adainf, "RANK", 2)
    monkeypatch.setattr(adainf, "WORLD", 4)
    own_images, own_labels, own_real = mixture.batch(0)
    assert own_images.equal(images[4:6])
    assert own_labels.equal(labels[4:6])
    assert own_real == n_real


def test_a_batch_larger_than_an_epoch_is_refused():
    make_mixture(1, batch_size=36)
    with pytest.raises(adainf.InputError, match="batch-size 37"):
        make_mixture(1, batch_size=37)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    """Catches one drawn by a device, of which each kind makes its own, or drawn as steps come, and
    a last batch that is not full."""
    mixture = make_mixture(10, batch_size=8, seed=7)  # 90 samples, 11 batches
    for epoch, batch in [(2, 3), (0, 5)]:  # a run that goes on asks amid an epoch
        order = np.random.default_rng((7, adainf.EPOCH, epoch)).permutation(90)
        expected = order[8 * batch:8 * batch + 8]
        assert mixture.samples(11 * epoch + batch).tolist() == expected.tolist()


def test_the_random_numbers_of_views_depend_on_seed_and_step_alone(monkeypatch):
    """Catches a seed such as seed + step (neighbours share a stream), one of 32 bits (of 100,000
    steps, two are equal), one draw for several images, processes that all draw the same."""
    monkeypatch.setattr(adainf, "RANK", 1)
    monkeypatch.setattr(adainf, "WORLD", 2)
    two_views = make_views(seed=7)
    two_views.apply = lambda images, p: p
    p = two_views(IMAGES[12:], step=5)
    stream = np.random.default_rng((7, adainf.VIEWS, 5))
    of_all = two_views.draw(stream, 24)
    for name in of_all:
        assert p[name].equal(of_all[name][:, 12:].flatten(0, 1))


# ---- 2. Views: each operation --------------------------------------------------------------------

# Everything happens in these views, and nothing as often or as much as anything else.
MIXED = dict(
    crop_min=0.08,
    jitter_prob=0.6,
    jitter=(0.8, 0.4, 1.5, 0.2),
    gray_prob=0.2,
    blur_prob=0.5,
    solarize_prob=(0.1, 0.3),
    flip_prob=0.4)


def make_views(augmentation=MIXED, n=32, seed=0):
    """TwoViews whose views are not normalised."""
    mean = torch.zeros(3, 1, 1)
    std = torch.ones(3, 1, 1)
    return adainf.TwoViews(augmentation, n, mean, std, seed)


def make_images():
    """uint8 24 x 32 x 32 x 3: flat colours (some hues are ties), noise, smooth images."""
    stream = torch.Generator().manual_seed(0)
    colours = torch.tensor([*itertools.product([0, 255], repeat=3)])
    flat = colours.view(8, 1, 1, 3).expand(8, 32, 32, 3)
    noise = torch.randint(256, (8, 32, 32, 3), generator=stream)
    small = torch.randint(256, (8, 3, 7, 7), generator=stream).byte()
    smooth = TF.resize(small, [32, 32], BICUBIC).permute(0, 2, 3, 1)
    images = torch.cat([flat, noise, smooth]).byte()
    images[images == 128] = 129  # of 128, rounding decides whether solarize inverts it
    return images


BICUBIC = TF.InterpolationMode.BICUBIC
IMAGES = make_images()
PILLOW_IMAGES = [Image.fromarray(image.numpy()) for image in IMAGES]
X = IMAGES.permute(0, 3, 1, 2).float() / 255  # as torchvision takes them


def from_pillow(images):
    return torch.stack([TF.to_tensor(image) for image in images])


def greatest(difference):
    return difference.abs().max().item()


def view_with(**changes):
    """A view of each of IMAGES by parameters that change nothing, except for `changes`."""
    row = dict(
        start=[0, 0],
        length=[32, 32],
        flip=[False],
        kind=[0, 1, 2],
        factor=[1.0, 1.0, 1.0],
        before_hue=[True, True, True],
        hue=[0.0],
        gray=[False],
        blur=[0],
        solarize=[False])
    row.update(changes)
    p = {name: torch.tensor(value).expand(24, -1) for name, value in row.items()}
    return make_views().apply(IMAGES, p)


def crop(image, start, length):
    """torchvision's crop and resize, exact for a tensor, rounded for a Pillow image."""
    return TF.resized_crop(image, *start, *length, [32, 32], BICUBIC)


@pytest.mark.parametrize("changes, expected", [
    (dict(factor=[1.8, 1.0, 1.0]), TF.adjust_brightness(X, 1.8)),
    (dict(factor=[1.0, 0.2, 1.0]), TF.adjust_contrast(X, 0.2)),
    (dict(factor=[1.0, 1.0, 1.8]), TF.adjust_saturation(X, 1.8)),
    (dict(hue=[-0.2]), TF.adjust_hue(X, -0.2)),
    (dict(gray=[True]), TF.rgb_to_grayscale(X, 3)),
    (dict(start=[3, 7], length=[20, 9], kind=[1, 0, 2], factor=[0.4, 1.0, 1.0]),
     TF.adjust_contrast(crop(X, [3, 7], [20, 9]).clamp(0, 1), 0.4))])
def test_each_operation_is_torchvisions(changes, expected):
    """Catches other luma weights, contrast around the mean colour, a hue that runs backwards, and
    a crop beyond 0..1 (bicubic overshoots), whose mean grey is another."""
    assert greatest(view_with(**changes) - expected) < 2e-5


@pytest.mark.parametrize("start, length, flip", [
    ((3, 7), (20, 9), True),
    ((31, 31), (1, 1), False)])
def test_crop_and_flip(start, length, flip):
    """Catches pixels from outside the box, swapped axes, half a pixel off, a flip before it."""
    view = view_with(start=start, length=length, flip=[flip])
    if flip:
        view = TF.hflip(view)
    exact = crop(X, start, length).clamp(0, 1)
    rounded = from_pillow([crop(image, start, length) for image in PILLOW_IMAGES])
    assert greatest(view - exact) < 1e-4
    assert (view - rounded).abs().mean() < 0.5 / 255


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


def test_views_are_normalised_and_all_first_views_come_first():
    """Catches views in the order a1 a2 b1 b2, of which NT-Xent would take other pairs."""
    never = dict.fromkeys(MIXED, 0.0)
    no_jitter = (0.0, 0.0, 0.0, 0.0)
    recipe = never | dict(crop_min=1.0, jitter=no_jitter, solarize_prob=(0.0, 1.0))
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    std = 2 * mean
    two_views = adainf.TwoViews(recipe, 32, mean, std, seed=0)
    views = two_views(IMAGES, step=0)
    expected = torch.cat([X, TF.solarize(X, 128 / 255)])
    assert greatest(views - (expected - mean) / std) < 1e-5
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)


# ---- Views: distributions ------------------------------------------------------------------------


def in_rows(p):
    """Parameters, 2 x images x ..., as apply() takes them: first all first views."""
    return {name: value.flatten(0, 1) for name, value in p.items()}


@pytest.fixture(scope="module", name="p")
def drawn_parameters():
    """Parameters of two views of 50,000 images."""
    stream = np.random.default_rng(0)
    return in_rows(make_views().draw(stream, 50_000))


def factors_of(p):
    """M x 3: factors of brightness, contrast, saturation."""
    return p["factor"].gather(1, p["kind"].argsort(1))


def same_distribution(one, other):
    """Kolmogorov-Smirnov test of two samples: if it is the same, False once in a million times."""
    values = np.concatenate([one, other])
    below_of_one = np.searchsorted(np.sort(one), values, "right") / len(one)
    below_of_other = np.searchsorted(np.sort(other), values, "right") / len(other)
    distance = np.abs(below_of_one - below_of_other).max()
    deviation = math.sqrt(1 / len(one) + 1 / len(other))
    return distance < 2.7 * deviation


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
    """Catches a factor of another operation, one below 0, a hue that hangs on jitter_prob."""
    ours = torch.cat([factors_of(p), p["hue"]], dim=1)
    jittered = (ours != torch.tensor([1, 1, 1, 0])).any(dim=1)
    assert is_share(jittered, MIXED["jitter_prob"])

    torch.manual_seed(0)
    jitter = transforms.ColorJitter(*MIXED["jitter"])
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [jitter.get_params(*ranges)[1:] for _ in range(10_000)]
    for one, other in zip(ours[jittered].T, np.array(theirs).T):
        assert same_distribution(one, other)


def test_the_order_of_colour_jitter_is_uniform(p):
    hue_place = p["before_hue"].sum(dim=1)
    assert p["before_hue"].equal(torch.arange(3) < hue_place[:, None])
    for kind in itertools.permutations(range(3)):
        has_kind = (p["kind"] == torch.tensor(kind)).all(dim=1)
        for place in range(4):
            assert is_share(has_kind & (hue_place == place), 1 / 24)


def test_probabilities_are_those_of_the_recipe_in_each_view(p):
    """Also catches a sigma that hangs on blur_prob, and levels that never come."""
    first_solarized, second_solarized = p["solarize"].chunk(2)
    assert is_share(first_solarized, 0.1)
    assert is_share(second_solarized, 0.3)
    for view in [slice(0, 50_000), slice(50_000, 100_000)]:
        assert is_share(p["flip"][view], MIXED["flip_prob"])
        assert is_share(p["gray"][view], MIXED["gray_prob"])
        assert is_share(p["blur"][view] > 0, MIXED["blur_prob"])

    levels = p["blur"][p["blur"] > 0]
    assert same_distribution(levels, np.tile(np.arange(1, 257), 100))


def test_parameters_are_independent_of_each_other_and_of_those_of_other_views(p):
    """Catches one random number for two parameters, for both views, for neighbouring images."""
    blurred = p["blur"] > 0
    columns = [
        p["length"].prod(dim=1, keepdim=True),
        (p["start"] + 0.5) / (33 - p["length"]),  # has the mean 0.5, whatever the length
        p["flip"],
        factors_of(p),
        p["hue"],
        p["before_hue"].sum(dim=1, keepdim=True),
        p["gray"],
        blurred,
        torch.where(blurred, p["blur"] - 128.5, 0),
        p["solarize"]]
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
    recipe = MIXED | dict(crop_min=1e-3)
    p = make_views(recipe, n=8).draw(SimpleNamespace(random=random), 50_000)
    assert p["start"].min() >= 0
    assert p["length"].min() >= 1
    assert (p["start"] + p["length"]).max() <= 8
    assert p["blur"].max() == 256


# ---- Views: all together -------------------------------------------------------------------------


def pillow_view(image, p):
    """The reference: a chain of torchvision's and Pillow's operations for one view."""
    image = crop(image, p["start"], p["length"])

    [hue] = p["hue"]
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    operations = [(jitter[kind], factor) for kind, factor in zip(p["kind"], p["factor"])]
    operations.insert(sum(p["before_hue"]), (TF.adjust_hue, hue))
    for operation, value in operations:
        image = operation(image, value)

    if p["gray"] == [True]:
        image = TF.to_grayscale(image, 3)
    if p["blur"] != [0]:
        sigma = sigma_of(*p["blur"])
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    if p["solarize"] == [True]:
        image = TF.solarize(image, 128)
    if p["flip"] == [True]:
        image = TF.hflip(image)
    return image


def test_whole_views_equal_a_chain_of_pillow_operations():
    """Catches a wrong order (it is crop, jitter, grayscale, blur, solarize, flip), one order of
    colour jitter for a whole batch, contrast's mean taken too early."""
    two_views = make_views()
    p = in_rows(two_views.draw(np.random.default_rng(0), 24))
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
    ("--gen-data x --aug strong --blur-prob 0 --solarize-prob 0 .2", "strong",
     adainf.STRONG | dict(blur_prob=0, solarize_prob=[0, 0.2]))])
def test_views_are_the_papers_for_the_data_and_the_users_values_win(command, strength, own):
    """Catches a value of 0 that counts as none."""
    options = adainf.build_parser().parse_args(command.split())
    both = dict(gray_prob=0.2, blur_prob=0.5, solarize_prob=(0, 0), flip_prob=0.5)
    assert adainf.choose_augmentation(options) == (strength, both | own)


# ---- 3. Model and loss ---------------------------------------------------------------------------


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop_nt_xent(projections, temperature):
    """NT-Xent by its definition, in float64."""
    views = [row / row.norm() for row in projections.double()]
    images = len(views) // 2
    total = 0
    for i, view in enumerate(views):
        partner = (i + images) % len(views)
        scores = [torch.exp(view @ other / temperature) for other in views]
        candidates = sum(scores) - scores[i]
        total -= torch.log(scores[partner] / candidates)
    return total / len(views)


def test_nt_xent_and_its_gradient_equal_a_double_loop():
    """Catches a view as its own candidate, wrong pairs, products in less than fp32."""
    projections = random_tensor(14, 5).bfloat16().float()
    projections.requires_grad_()
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
    labels = torch.tensor([2, -1, -1, 1])
    loss = adainf.probe_cross_entropy(logits, labels, n_real=2)
    real_logits = logits[[0, 3, 4, 7]]
    expected = F.cross_entropy(real_logits, torch.tensor([2, 1, 2, 1]))
    torch.testing.assert_close(loss, expected)

    no_labels = torch.full((4,), -1)
    assert adainf.probe_cross_entropy(logits, no_labels, n_real=0) == 0


@pytest.fixture
def options():
    """A command line's values, of a small network."""
    command = "--width 8 --proj-hidden 16 --proj-dim 4"
    return adainf.build_parser().parse_args(command.split())


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


def test_the_projector_is_simclrs():
    options = adainf.build_parser().parse_args([])
    projector = adainf.SimCLR(options, classes=10).projector
    assert [type(layer) for layer in projector] == [nn.Linear, nn.ReLU, nn.Linear]
    shapes = [tuple(p.shape) for p in projector.parameters()]
    assert shapes == [(2048, 512), (2048,), (256, 2048), (256,)]


def test_first_weights_depend_on_the_seed_alone(options):
    data = make_data(IMAGES, None, IMAGES)
    weights = []
    for seed in (0, 0, 1):
        options.seed = seed
        model = adainf.build_model(options, data)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    first, same, other = weights
    assert first.equal(same)
    assert not first.equal(other)


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

    ours.load_state_dict(theirs.state_dict())  # refuses other names and shapes
    images = random_tensor(4, 3, 16, 16).double()
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())  # running statistics, too


def test_blocks_and_stem_padding_decide_stages_and_sizes():
    backbone = adainf.ResNet(width=8, blocks=(1, 2, 1), stem_padding=2)
    x = torch.zeros(2, 3, 32, 32)
    shapes = []
    for name, module in backbone.named_children():
        x = module(x)
        if name.startswith("layer"):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(8, 34, 34), (16, 17, 17), (32, 9, 9)]
    assert x.shape == (2, backbone.features)


def test_gradients_of_the_narrowest_resnet_are_right():
    """Without AVX-512, oneDNN (issue 6035) errs or crashes where a 1 x 1 convolution of stride 2
    has fewer than 8 channels. Catches a network as narrow as that."""
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

    with pytest.raises(adainf.InputError):
        adainf.build_parser().parse_args(["--width", "7"])


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


@pytest.mark.parametrize("size, slopes", [
    (1, [1, 30, 1e-3, 0]),
    (0, [0, 1, 0, 1])])
def test_lars_equals_its_formulas_written_out(size, slopes):
    """Catches lr inside the buffer, no clipping, decay of biases, nan where something is 0.

    size: of the weights at first; slopes: the size of the gradients in each step."""
    shapes = [(4, 3, 3, 3), (5,), (7, 2), (7,)]
    weights = [nn.Parameter(size * random_tensor(*shape).double()) for shape in shapes]
    expected = [(p.detach().clone(), 0) for p in weights]
    optimizer = adainf.LARS([
        dict(params=weights[:2], decay=0.1),
        dict(params=weights[2:], decay=0.1)], momentum=0.8)
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
    options.warmup_steps = 0
    optimizer = adainf.build_optimizer(model, options)
    adainf.set_learning_rates(optimizer, 0, options)
    learned, probe = optimizer.param_groups
    assert (learned["lr"], learned["decay"], learned["momentum"]) == (0.4, 1e-4, 0.9)
    assert (probe["lr"], probe["decay"], probe["momentum"]) == (0.1, 0, 0.9)
    assert learned["weight_decay"] == probe["weight_decay"] == 0  # SGD's own, which comes on top
    assert learned["params"] + probe["params"] == [*model.parameters()]
    assert probe["params"] == [*model.probe.parameters()]
    with pytest.raises(TypeError):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("warmup", [10, 0])
def test_the_learning_rate_is_torchs_linear_warmup_and_cosine(warmup):
    """Catches a schedule of epochs, a jump after warm-up, an end above 0, a division by 0."""
    weight = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.4)
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


@pytest.mark.parametrize("training", [True, False])
def test_encode_uses_eval_mode_and_leaves_the_backbone_as_it_was(model, training):
    """Catches statistics of batch norm that drift while a frozen backbone is evaluated."""
    backbone = model.backbone.train(training)
    backbone.bn1.running_mean += 0.3
    before = copy.deepcopy(backbone.state_dict())
    images = IMAGES[:, :8, :8].repeat(42, 1, 1, 1)  # 1008: more than one chunk
    data = make_data(images, None, None)
    features = adainf.encode(backbone, images, data, contextlib.nullcontext())
    assert backbone.bn1.training == training
    torch.testing.assert_close(backbone.state_dict(), before)

    backbone.eval()
    pixels = images.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = backbone((pixels - data.mean) / data.std)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k, temperature", [
    (20, 0.07),
    (20, 0.002),
    (1000, 0.1)])
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


@pytest.mark.parametrize("stride", [1, 4])
def test_the_probes_know_clusters(stride):
    """Catches classes that are counted in the test images (at a stride of 4, those have one), and
    for the linear probe features that are not standardised, or are so by the test images."""
    labels = torch.arange(500) % 4
    features = F.one_hot(labels, 8) + 0.05 * random_tensor(500, 8)
    train = features[:400]
    test = features[400::stride]
    test_labels = labels[400::stride]
    score = adainf.knn_top1(train, labels[:400], test, test_labels, k=200, temperature=0.1)
    assert score == 100

    scale = torch.logspace(-3, 3, 8)
    train = scale * (train + 50)
    test = scale * (test + 50)
    score = adainf.linear_top1(train, labels[:400], test, test_labels, epochs=30, lr=0.1, seed=0)
    assert score == 100


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


def test_evaluate_gives_every_score_its_own_images_and_labels(options):
    """A model names colours; the offline probes learn to give them other names.

    Catches the training images in place of those of the probes, and scores that are mixed up."""
    labels = torch.arange(60) % 3
    colours = 255 * F.one_hot(labels, 3).byte()
    colours = colours.view(60, 1, 1, 3)
    data = make_data(colours, (labels + 1) % 3, None)
    data.images = None
    data.labels = None
    model = SimpleNamespace(backbone=nn.Flatten(), probe=nn.Linear(3, 3))
    nn.init.eye_(model.probe.weight)
    scores = adainf.evaluate(model, data, options, contextlib.nullcontext())
    assert scores == dict(online_top1=0, knn_top1=100, linear_top1=100)
    assert sorted(scores) == sorted(adainf.METRICS)


# ---- A tiny data set, and runs on it -------------------------------------------------------------

# 24 steps, 7 to an epoch; log lines, checkpoints and evaluations are out of step with each other.
TINY = """--ratio 1 --image-size 8 --width 8 --blocks 1 1 --proj-hidden 8 --proj-dim 4
    --batch-size 8 --steps 24 --warmup-steps 3 --lr 0.001 --probe-lr 0.001 --linear-epochs 2
    --log-every 4 --save-every 5 --eval-every 8 --device cpu --amp off"""
CLOCK = ("images_per_second", "seconds_left")  # what may differ between equal runs


def write_data(folder):
    """Three classes of 12 + 12 images of 8 x 8 pixels, told apart by colour, and 24 generated."""
    draw = np.random.default_rng(0)
    for split, label, index in itertools.product(("train", "test"), range(3), range(12)):
        place = folder / "images" / split / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 200, (8, 8, 3), dtype=np.uint8)
        pixels[:, :, label] += 55
        Image.fromarray(pixels).save(place / f"{index}.png")
    for name, save in (("gen", np.savez), ("other", np.savez_compressed)):
        images = draw.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
        save(folder / f"{name}.npz", image=np.asfortranarray(images), label=np.zeros(24))
    return folder


def arguments(data, out, *more):
    """The command line of a tiny run."""
    where = ["--dataset", data / "images", "--gen-data", data / "gen.npz", "--out", out]
    return [str(word) for word in [*TINY.split(), *where, *more]]


def read_json(path):
    return json.loads(path.read_text())


def read_log(folder, *events):
    """The records of a log that are of these events."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] in events]


def read_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def outcome(folder):
    """All that a run leaves behind, clocks aside, as {part: text}; other bits are other text."""
    parts = dict(
        checkpoint=read_checkpoint(folder),
        encoder=torch.load(folder / "encoder.pt", weights_only=True),
        result=read_json(folder / "result.json"),
        log=read_log(folder, "training", "evaluation"))
    del parts["checkpoint"]["lines"]  # the log's, with clocks
    for record in (parts["result"], *parts["log"]):
        for name in CLOCK:
            record.pop(name, None)
    return {name: json.dumps(parts[name], default=torch.Tensor.tolist) for name in parts}


def differences(folder, reference):
    """The parts of a run's outcome that are not those of another, bit for bit."""
    found = outcome(folder)
    return [name for name in found if found[name] != reference[name]]


def contents(folder):
    """{path: bytes} of every file below a folder, None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def call_at(patch, target, count, action, *args):
    """Call action(*args) just before the count-th call (from 1) of a target such as "os.fsync".

    train() calls adainf.nt_xent in the middle of every step."""
    module, name = target.split(".")
    original = getattr(sys.modules[module], name)
    calls = itertools.count(1)

    def counting(*its_args, **more):
        if next(calls) == count:
            action(*args)
        return original(*its_args, **more)

    patch.setattr(target, counting)


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
    monkeypatch.setattr(adainf, "write_figure", lambda *_: None)  # slow, and tested once

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
    adainf.write_figure = lambda *_: None
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


def test_import_has_no_side_effect(monkeypatch):
    """What is set for speed is set by the command."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delitem(sys.modules, "adainf")
    random_state = torch.get_rng_state()
    importlib.import_module("adainf")
    assert not torch.backends.cudnn.benchmark
    assert "OMP_WAIT_POLICY" not in os.environ
    assert torch.equal(torch.get_rng_state(), random_state)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("mine, seen", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_the_command_sets_the_wait_policy_before_torch_is_loaded(tmp_path, monkeypatch, mine, seen):
    """In place of torch stands a module that says what it would have read."""
    (tmp_path / "torch.py").write_text("import os, sys; sys.exit(os.environ['OMP_WAIT_POLICY'])")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = dict(os.environ, PYTHONPATH=str(tmp_path), **mine)
    command = [sys.executable, adainf.__file__]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.stderr.strip() == seen


def test_dry_run_writes_all_files_in_a_folder_of_its_own(tiny, tmp_path, monkeypatch):
    """Twice, as a second one with other options must not meet the folder of the first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for width in (8, 16):
        options = ("--dry-run", "--amp", "auto", "--width", width)
        result = adainf.main(arguments(tiny, tmp_path / "never", *options))
    assert not (tmp_path / "never").exists()
    [folder] = (path.parent for path in tmp_path.glob("*/result.json") if read_json(path) == result)
    assert set(os.listdir(folder)) == {"config.json", "log.jsonl", "checkpoint.pt", "encoder.pt",
                                       "views.png", "curves.png", "result.json"}
    for name in ("views.png", "curves.png"):
        assert Image.open(folder / name).size > (200, 100)

    assert {*adainf.METRICS, "loss", "images_per_second", "n_real", "n_generated"} < set(result)
    assert (result["steps"], result["seed"], result["beta"]) == (1, 0, 36 / 60)
    stored = read_json(folder / "config.json")["options"]
    assert stored["amp"] == adainf.choose_precision("auto", "cpu")  # "auto" may change


def test_encoder_is_the_trained_backbone(finished):
    """Catches prefixes in its names, and a load_encoder that builds another network."""
    encoder = adainf.load_encoder(finished / "encoder.pt")
    assert not encoder.training
    trained = read_checkpoint(finished)["model"]
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, trained[f"backbone.{name}"])
    config = read_json(finished / "config.json")
    assert encoder.mean.flatten().tolist() == pytest.approx(config["mean"])
    assert encoder.std.shape == (3, 1, 1)


def test_learning_rate_rises_and_loss_falls(run, tmp_path):
    run(tmp_path, "--steps", 120, "--lr", 0.1, "--temperature", 0.5, "--log-every", 1,
        "--eval-every", 0)
    records = read_log(tmp_path, "training")
    assert len(records) == 120
    assert (records[0]["lr"], records[3]["lr"]) == (3e-5, 0.1)  # begin and end of the warm-up
    losses = [record["loss"] for record in records]
    assert statistics.mean(losses[-20:]) < statistics.mean(losses[:20]) - 0.02


def test_a_run_of_a_gpu_is_evaluated_on_a_cpu(finished, tmp_path):
    """Here only its config.json says that it was one."""
    out = shutil.copytree(finished, tmp_path / "run")
    config = read_json(out / "config.json")
    config["options"].update(device="cuda", data_device="cuda")
    (out / "config.json").write_text(json.dumps(config))
    assert adainf.main(["--eval-only", str(out)])["steps"] == 3  # and not refused


# ---- Stopped and continued: signals, kills, full disks, changed options --------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_resume_is_exact(run, tmp_path, monkeypatch, amp):
    """7, 14, 21 end an epoch; 4 and 16 have a log line, 5 a checkpoint, 8 and 16 an evaluation.

    In fp16 the first scales are too large: skipped steps are no divergence, and are remembered."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    out = tmp_path / "run"
    done = 0
    for stop in (1, 4, 5, 7, 8, 13, 14, 16, 21, 23):
        fault = ("adainf.nt_xent", stop - done, signal.raise_signal, signal.SIGTERM)
        run(out, "--amp", amp, status=143, fault=fault)
        assert read_checkpoint(out)["step"] == stop
        assert not (out / "result.json").exists()
        done = stop
    assert "after step 23" in run(out, "--amp", amp).out
    run(out, "--amp", amp)  # once more, which changes nothing
    run(tmp_path / "straight", "--amp", amp)
    assert not differences(out, outcome(tmp_path / "straight"))


@pytest.mark.parametrize("name, target, count, step", [
    ("SIGINT", "adainf.nt_xent", 6, 6),
    ("SIGTERM", "adainf.knn_top1", 2, 8),  # in an evaluation, which it waits for
    ("SIGUSR1", "os.fsync", 3, 6)])  # while the checkpoint of step 5 is written
def test_signal_saves_and_says_how_to_go_on(run, straight, tmp_path, name, target, count, step):
    number = signal.Signals[name]
    handler = signal.getsignal(number)

    def send():
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one would stop at once

    said = run(tmp_path, status=128 + number, fault=(target, count, send)).out
    last = said.splitlines()[-1]
    assert f"stopped by {name} after step {step}," in last
    assert "same command" in last
    assert read_checkpoint(tmp_path)["step"] == step
    assert signal.getsignal(number) is handler
    run(tmp_path)
    assert not differences(tmp_path, straight)


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "same command"),
    (MemoryError(), 1, "out of memory"),
    (RuntimeError("can't allocate memory"), 1, "--data-device cpu")])
def test_failure_outside_of_training_is_one_line(run, tmp_path, error, status, words):
    def fail():
        raise error

    assert words in run(tmp_path, status=status, fault=("adainf.load_data", 1, fail)).err


@pytest.mark.parametrize("target", ["os.fsync", "os.replace"])
def test_sigkill_during_a_save_leaves_a_good_checkpoint(run, straight, tiny, tmp_path, target):
    """Killed before the 3rd, 4th, ... file of a run gets to the disk, or gets its name."""
    out = tmp_path / "run"
    argv = arguments(tiny, out)
    for count in (3, 4, 3, 5, 6):  # the first two are config.json and views.png
        fault = (target, count, signal.raise_signal, signal.SIGKILL)
        assert exit_codes(start(tmp_path / "said", faulty_main, argv, 0, *fault)) == [-9]
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
        assert "same command" in said
    run(tmp_path)
    assert not differences(tmp_path, straight)


def test_second_process_on_a_folder_is_refused(run, straight, tmp_path):
    said = []

    def begin_again():
        said.append(run(tmp_path, status=2).err)

    run(tmp_path, fault=("adainf.nt_xent", 3, begin_again))
    assert f"{tmp_path}: another process" in said[0]
    assert not differences(tmp_path, straight)


@pytest.mark.parametrize("save_every, saved", [(100, 8), (1, 10)])
def test_diverged_run_stops_and_is_never_saved(
        run, straight, tmp_path, monkeypatch, save_every, saved):
    """The loss of step 11 is not a number; what was saved before is good to go on from."""
    original = adainf.nt_xent
    calls = itertools.count(1)

    def nt_xent(*args):
        factor = math.nan if next(calls) == 11 else 1
        return original(*args) * factor

    monkeypatch.setattr(adainf, "nt_xent", nt_xent)
    said = run(tmp_path, "--save-every", save_every, status=1).err
    assert "try a lower --lr" in said
    assert next(calls) <= 14  # the next log line is the latest time to see it
    assert read_checkpoint(tmp_path)["step"] == saved
    run(tmp_path)
    assert not differences(tmp_path, straight)


@pytest.mark.parametrize("words", [
    "--lr 0.001 0.1", "--seed 0 1", "--amp off bf16", "--gray-prob None 0.3", "--linear-epochs 2 3",
    "--steps 3 4"])
def test_changed_option_is_refused(run, finished, words):
    before = contents(finished)
    option, old, new = words.split()
    said = run(finished, "--steps", 3, option, new, status=2).err
    assert f"{option} {old}, not {new}" in said
    assert "new --out" in said
    assert contents(finished) == before


@pytest.mark.parametrize("pool", ["images", "labels", "generated", "test_images", "test_labels"])
def test_changed_data_are_refused(run, finished, monkeypatch, pool):
    """One value of it, at the same paths."""
    load_data = adainf.load_data

    def load_changed(options):
        data = load_data(options)
        getattr(data, pool).view(-1)[5] ^= 1
        return data

    monkeypatch.setattr(adainf, "load_data", load_changed)
    assert "other images" in run(finished, "--steps", 3, status=2).err


def test_harmless_options_may_change(run, straight, tiny, tmp_path):
    """How often it logs, saves and evaluates, and where things are, is not part of the result."""
    out = tmp_path / "run"
    run(out, status=143, fault=("adainf.nt_xent", 6, signal.raise_signal, signal.SIGTERM))
    moved = shutil.move(out, tmp_path / "moved")
    images = shutil.copy(tiny / "gen.npz", tmp_path / "moved.npz")
    run(moved, "--log-every", 3, "--save-every", 7, "--eval-every", 5, "--gen-data", images)
    assert differences(moved, straight) == ["log"]


def test_folder_without_a_checkpoint_may_be_begun_anew(run, finished, straight, tmp_path):
    """Stopped before anything was saved, nothing is lost with other options."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoint.pt").unlink()
    run(out)
    assert not differences(out, straight)


# ---- Bad input -----------------------------------------------------------------------------------


class Bomb:
    """Makes a folder "bomb" when it is unpickled, as malicious files do worse."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """refused(*options): a run that is refused in one line, and neither writes nor unpickles."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    os.rmdir("bomb")  # it was there, so a bomb goes off

    def refused(*more):
        before = contents(tmp_path)
        said = run(tmp_path / "run", *more, status=2).err
        assert contents(tmp_path) == before
        return said

    return refused


@pytest.mark.parametrize("words", [
    "--ratio 1.5", "--batch-size 999", "--lr nan", "--warmup-steps 25", "--device abacus",
    "--gen-size 25", "--real-size 37", "--jitter 1 1 1 0.6", "--solarize-prob 0 0 0", "--nonsense",
    "--eval-only nowhere", "--dataset nowhere", "--gen-data nowhere.npz", "--dataset cifar10",
    "--data-device cuda", "--out file/run", "--seeds 0 1", "--compare --seeds 0 0",
    "--compare --aug weak", "--dataset no\nwhere"])
def test_bad_option_is_one_line(refused, tmp_path, words):
    (tmp_path / "file").write_text("mine")
    assert refused(*words.split(" "))


CUT = functools.partial(os.truncate, length=99)
ZEROS = np.zeros((5, 8, 8, 3), np.uint8)


def write_member(path, content):
    """An npz file in which `image` holds these bytes, and its checksum is right."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", content)


def append_to_array(path):
    """Such a file is whole for zip, and yet has more in it than its header says."""
    content = io.BytesIO()
    np.save(content, ZEROS)
    write_member(path, content.getvalue() + b"\0")


def flip_a_bit(path):
    """Of a pixel: only the checksum in the file tells."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("pattern, spoil, words", [
    ("images/test", shutil.rmtree, "test has no classes"),
    ("images/test/c", shutil.rmtree, "differ in the classes ['c']"),
    ("images/*/[ab]", shutil.rmtree, "one class only, c"),
    ("images/train/b/3.png", CUT, "3.png is no readable image"),
    ("gen.npz", CUT, "no whole array `image`"),
    ("gen.npz", append_to_array, "gen.npz: has bytes after"),
    ("gen.npz", lambda path: write_member(path, b"text"), "no whole array `image`"),
    ("gen.npz", flip_a_bit, "no whole array `image`"),
    ("gen.npz", lambda path: np.savez(path, image=ZEROS / 255), "gen.npz: has float64"),
    ("gen.npz", lambda path: np.savez(path, image=ZEROS.transpose(0, 3, 1, 2)), "(5, 3, 8, 8)"),
    ("gen.npz", lambda path: np.savez(path, image=ZEROS[:0]), "(0, 8, 8, 3)"),
    ("gen.npz", lambda path: np.savez(path, image=np.array([Bomb()])), "gen.npz"),
    ("gen.npz", lambda path: np.savez(path, other=ZEROS), "no whole array `image`")])
def test_bad_images_are_one_line(refused, tiny, tmp_path, pattern, spoil, words):
    data = shutil.copytree(tiny, tmp_path / "data")
    for path in list(data.glob(pattern)):
        spoil(path)
    assert words in refused("--dataset", data / "images", "--gen-data", data / "gen.npz")


@pytest.mark.parametrize("name, spoil", [
    ("checkpoint.pt", CUT),
    ("checkpoint.pt", lambda path: torch.save(dict(step=Bomb()), path)),
    ("config.json", CUT)])
def test_bad_file_of_a_run_is_one_line(refused, finished, tmp_path, name, spoil):
    """It is never overwritten, as there might be something left in it."""
    out = shutil.copytree(finished, tmp_path / "run")
    spoil(out / name)
    assert name in refused("--steps", 3)
    assert name in refused("--eval-only", out)
    with pytest.raises(adainf.InputError):
        adainf.load_encoder(out / "checkpoint.pt")


# ---- Data and subsets ----------------------------------------------------------------------------


def load(folder, *more):
    """The Data of a run with these options."""
    options = adainf.parse_options(arguments(folder, "unused", *more))
    return adainf.choose_subsets(adainf.load_data(options), options)


def test_file_of_generated_images_is_in_memory_once(tiny, tmp_path, monkeypatch):
    """Catches a second copy, which for a million images of 32 x 32 is 3 GB."""
    path = tmp_path / "gen.npz"
    np.savez(path, image=np.zeros((20_000, 16, 16, 3), np.uint8))
    tracemalloc.start()
    images = adainf.read_generated(path, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.nbytes <= peak < 1.2 * images.nbytes

    monkeypatch.setattr(adainf, "read_generated", lambda *_: images)
    assert load(tiny).generated.data_ptr() == images.ctypes.data


def places(images, pool):
    """Where in a pool each of the images is."""
    pool = [image.tobytes() for image in pool.numpy()]
    return [pool.index(image.tobytes()) for image in images.numpy()]


def test_gen_size_is_a_seeded_random_subset(tiny):
    """No image twice, from both files, another for another seed."""
    paths = (tiny / "gen.npz", tiny / "other.npz")
    pool = load(tiny, "--gen-data", *paths).generated
    assert np.array_equal(pool, np.concatenate([np.load(path)["image"] for path in paths]))

    more = ("--gen-data", *paths, "--gen-size", 12, "--seed")
    first, again, other = [places(load(tiny, *more, seed).generated, pool) for seed in (0, 0, 1)]
    assert len(set(first)) == 12
    assert min(first) < 24 <= max(first)
    assert first == again
    assert set(first) != set(other)


def test_real_size_is_a_seeded_balanced_subset(tiny):
    """The probes learn from it as well, or from a larger one that has it in it."""
    pool = load(tiny)
    more = ("--real-size", 11, "--seed")
    first, again, other = [load(tiny, *more, seed) for seed in (0, 0, 1)]
    chosen = places(first.images, pool.images)
    assert len(set(chosen)) == 11
    assert sorted(first.labels.bincount().tolist()) == [3, 4, 4]
    assert torch.equal(first.labels, pool.labels[chosen])
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)

    assert torch.equal(first.probe_images, first.images)
    assert torch.equal(first.probe_labels, first.labels)
    larger = load(tiny, *more, 0, "--probe-size", 20)
    assert torch.equal(larger.images, first.images)
    learned = places(larger.probe_images, pool.images)
    assert len(learned) == 20
    assert set(chosen) < set(learned)
    assert torch.equal(larger.probe_labels, pool.labels[learned])


def test_a_subset_is_as_balanced_as_the_classes_allow():
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 5)
    data = make_data(torch.arange(16), labels, None)
    _, chosen = adainf.balanced_subset(data, 11, seed=0)
    assert chosen.bincount().tolist() == [5, 2, 4]
    with pytest.raises(adainf.InputError, match="16 labelled"):
        adainf.balanced_subset(data, 17, seed=0)


# ---- Experiments ---------------------------------------------------------------------------------

CELLS = ("none-strong", "none-weak", "vanilla-1to1-strong", "adainf-3to1-weak")


@pytest.fixture(scope="module")
def comparison(tiny, tmp_path_factory):
    """(folder, what was printed) of a comparison over two seeds, each with its own real images."""
    folder = tmp_path_factory.mktemp("comparison")
    more = "--compare --seeds 0 1 --steps 4 --eval-every 0 --ratio 3 --real-size 18".split()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        adainf.main(arguments(tiny, folder, *more))
    return folder, said.getvalue()


def test_cells_differ_only_in_data_and_augmentation(comparison):
    """A seed has real images of its own, so that the spread has what their choice adds."""
    folder, _ = comparison
    own = ("aug", "ratio", "gen_data", "gen_size", "out")
    checksums = []
    for seed in (0, 1):
        configs = [read_json(folder / f"{cell}-{seed}" / "config.json") for cell in CELLS]
        assert [config["n_generated"] for config in configs] == [0, 0, 24, 24]
        assert [config["beta"] for config in configs] == [1, 1, 18 / 42, 54 / 78]
        first, *others = options = [config["options"] for config in configs]
        assert [each["aug"] for each in options] == ["strong", "weak", "strong", "weak"]
        assert not first["compare"]  # a cell is a run like any other
        for each in others:
            assert each | {name: first[name] for name in own} == first
        checksums += {config["checksums"][0] for config in configs}
    assert len(set(checksums)) == len(checksums) == 2


def test_comparison_has_the_results_of_its_cells(comparison):
    """And --eval-only repeats them, and writes nothing."""
    folder, said = comparison
    before = contents(folder)
    table = read_json(folder / "comparison.json")["table"]
    assert set(table) == {*CELLS, "raw pixels", "untrained network"}
    for cell in CELLS:
        runs = [folder / f"{cell}-{seed}" for seed in (0, 1)]
        results = [read_json(path / "result.json") for path in runs]
        again = adainf.main(["--eval-only", str(runs[1]), "--device", "cpu"])
        for metric in adainf.METRICS:
            entry = table[cell][metric]
            assert entry["values"] == [result[metric] for result in results]
            assert entry["mean"] == pytest.approx(np.mean(entry["values"]))
            assert entry["std"] == pytest.approx(np.std(entry["values"], ddof=1))
            assert again[metric] == results[1][metric]
    assert contents(folder) == before

    assert set(table["raw pixels"]) == {"linear_top1", "knn_top1"}
    assert set(table["untrained network"]) == set(adainf.METRICS)
    for name, row in table.items():
        [line] = [line for line in said.splitlines() if line.startswith(f"{name} ")]
        for entry in row.values():
            assert f"{entry['mean']:.2f} +- {entry['std']:5.2f}" in line
    assert Image.open(folder / "comparison.png").size > (500, 200)


# ---- Many processes ------------------------------------------------------------------------------


def main_in_eval_mode(argv):
    """main(argv) with batch norms that normalise by fixed numbers, not by those of each share."""
    build_model = adainf.build_model
    adainf.build_model = lambda *args: build_model(*args).eval()
    adainf.main(argv)


def test_processes_do_the_work_of_one(tiny, tmp_path):
    """Catches a share of images, loss or gradient that is missing or counts double."""
    def learned(world):
        out = tmp_path / f"run{world}"
        said = tmp_path / f"said{world}-"
        argv = arguments(tiny, out, "--lr", 0.1, "--probe-lr", 0.1, "--log-every", 1)
        processes = start_world(said, world, main_in_eval_mode, argv)
        assert exit_codes(*processes) == [0] * world, Path(f"{said}0").read_text()
        losses = [[line["loss"], line["probe_loss"]] for line in read_log(out, "training")]
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
    network, _ = adainf.accelerate(model, None, options)
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in network.parameters()} == {id(p) for p in optimized}
    assert list(model.state_dict()) == names
    assert isinstance(model.backbone.bn1, nn.SyncBatchNorm)


@pytest.mark.parametrize("number, codes, step, words", [
    (signal.SIGTERM, [143, 143], 10, "after step 10"),
    (signal.SIGKILL, [1, -9], 5, "lost another process")])
def test_processes_resume_exactly_after_a_signal_to_one(
        tiny, tmp_path, number, codes, step, words):
    """They agree to stop at a step that 10 divides; one that is lost ends the others."""
    straight, out, said = (tmp_path / name for name in ("straight", "run", "said"))
    assert exit_codes(*start_world(said, 2, adainf.main, arguments(tiny, straight))) == [0, 0]

    argv = arguments(tiny, out)
    fault = ("adainf.nt_xent", 7, signal.raise_signal, number)
    assert exit_codes(*start_world(said, 2, faulty_main, argv, 1, *fault)) == codes
    *_, last = Path(f"{said}0").read_text().splitlines()
    assert words in last
    assert read_checkpoint(out)["step"] == step
    assert exit_codes(*start_world(said, 2, adainf.main, argv)) == [0, 0]
    assert not differences(out, outcome(straight))


def test_processes_share_a_batch_equally_and_download_nothing(tiny, tmp_path, monkeypatch):
    """A data set that is not there would be downloaded by each of them, into one file."""
    monkeypatch.setattr(adainf, "WORLD", 2)
    with pytest.raises(adainf.InputError, match="2 processes cannot share it equally"):
        load(tiny, "--batch-size", 7)
    with pytest.raises(adainf.InputError, match="download_generated.py cifar10"):
        load(tiny, "--dataset", "cifar10", "--image-size", 32, "--data-dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# ---- download_generated.py -----------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the next act of the server's script: an HTTP status, or slice(k), k bytes."""

    def do_GET(self):
        server = self.server
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes="):-1])
        server.starts.append(start)
        act = server.script.pop(0) if server.script else slice(None)
        if isinstance(act, int):
            self.send_response(act)
            self.send_header("Location", server.address)
            self.end_headers()
            return

        size = len(server.body)
        if start and (self.headers["If-Range"] == server.version or server.blind):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            start = 0
            self.send_response(200)
        self.send_header("Content-Length", size - start)
        self.send_header("ETag", server.version)
        self.end_headers()
        self.wfile.write(server.body[start:][act])

    def log_message(self, *message):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(body, *script) starts a server till the end of the test, a source of `tiny`."""
    servers = []

    def serve(body, *script, archive=False):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a client that hangs up is part of these tests
        server.body = body
        server.script = list(script)
        server.version = '"1"'
        server.blind = False  # to the version that is asked for
        server.address = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        server.starts = []  # the first byte that each request asked for
        server.pauses = []  # instead of waiting, in seconds
        monkeypatch.setattr(dg.time, "sleep", server.pauses.append)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

        servers.append(server)
        urls = [server.address for server in servers]
        md5 = hashlib.md5(body).hexdigest() if archive else None
        source = dg.Source("tiny", 400, "DDPM", "unknown", 1e-3, "used", "unknown", urls, md5)
        monkeypatch.setattr(dg, "SOURCES", [source])
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """tool(line, status) runs a command in an empty folder and returns what it said."""
    monkeypatch.chdir(tmp_path)

    def tool(line, status=0):
        if status == 0:
            dg.main(line.split())
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            dg.main(line.split())
        said = capsys.readouterr().err
        assert stopped.value.code == status, said
        assert said.count("\n") == 1
        return said

    return tool


def random_images(count=400):
    """uint8 images, brighter in red than in blue as CIFAR-10 is: count x 32 x 32 x 3."""
    noise = np.random.default_rng(count).integers(0, 200, (count, 32, 32, 3))
    return (noise + [30, 25, 10]).astype(np.uint8)


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


BODY = npz_bytes(random_images())  # 1.2 MB
DAMAGED = BODY[:600_000] + bytes([BODY[600_000] ^ 1]) + BODY[600_001:]
ARCHIVE = tar_bytes({"batches/one": os.urandom(400_000), "batches/two": b"2"})
HERE = Path(dg.__file__).parent
DOWNLOADED = Path("data/tiny.npz")
PART = Path("data/tiny.npz.part")


def test_list_names_every_source_and_imports_nothing_slow():
    code = ("import sys, download_generated; download_generated.main(['--list']); "
            "assert not {'torch', 'adainf', 'PIL'} & set(sys.modules)")
    said = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True)
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    for source in dg.SOURCES:
        assert f" {source.images:,} " in rows[source.name] and source.fid in rows[source.name]
        for url in source.urls:
            assert url.startswith("https://") and url in said
        if source.md5:
            expected = getattr(torchvision.datasets, source.name.upper())
            assert (source.md5, source.urls[0]) == (expected.tgz_md5, expected.url)


@pytest.mark.parametrize("line, word", [
    ("", "required"), ("no-such-name", "--list"), ("--from-folder x", "--out"),
    ("--from-folder x --out new.npz", "no images"), ("--verify none.npz", "none.npz"),
    ("--inspect none.npz", "none.npz"), ("--from-npy none.npy --out new.npz", "none.npy")])
def test_bad_input_is_one_line_and_status_2(line, word, tool):
    assert word in tool(line, 2)
    assert not os.listdir()


def test_download_survives_trouble_and_is_recorded(serve, tool):
    """Nothing is fetched twice; pauses grow only while nothing comes."""
    images = random_images()
    images[7] = images[8] = images[9]
    body = npz_bytes(images)
    server = serve(body, 500, 429, slice(1), slice(0), slice(dg.BLOCK), slice(70_000))
    tool("tiny")
    assert server.starts == [0, 0, 0, 1, 1, 1 + dg.BLOCK, 70_001 + dg.BLOCK]
    assert server.pauses == [2, 4, 2, 4, 2, 2]

    assert sorted(os.listdir("data")) == ["tiny.npz", "tiny.npz.json"]
    assert DOWNLOADED.read_bytes() == body
    record = json.loads(Path("data/tiny.npz.json").read_text())
    assert np.allclose(record.pop("channel_means"), images.mean((0, 1, 2)), atol=0.01)
    assert record == {
        "source": server.address, "date": time.strftime("%Y-%m-%d"), "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(), "shape": [400, 32, 32, 3], "dtype": "uint8",
        "duplicates": 2}


@pytest.mark.parametrize("count, version, blind", [
    (400, '"2"', False), (400, '"2"', True), (500, '"1"', False)])
def test_what_came_is_neither_lost_nor_spliced(count, version, blind, serve, tool, monkeypatch):
    """Catches what is appended to another version, or replaced by a page or on a full disk."""
    server = serve(BODY, slice(300_000), *[slice(0)] * 5)
    said = tool("tiny", 1)
    assert "connection lost" in said and server.address in said
    assert len(server.starts) == dg.ATTEMPTS
    assert sorted(os.listdir("data")) == [PART.name, f"{PART.name}.json"]

    server.version = '"page"'
    with monkeypatch.context() as patch:
        patch.setattr(dg.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "GB are free" in tool("tiny", 1)
    server.body = b"\n<!DOCTYPE html>Please log in"
    assert "web page" in tool("tiny", 1)
    assert PART.read_bytes() == BODY[:300_000]

    server.body = npz_bytes(random_images(count)[::-1])
    server.version = version
    server.blind = blind
    tool("tiny")
    assert DOWNLOADED.read_bytes() == server.body


@pytest.mark.parametrize("trouble, status, word", [
    ("dg.show_progress = lambda _, done, *more: done < 200_000 or kill()", -9, ""),
    ("dg.keep = lambda *_: kill()", -9, ""),
    ("dg.show_progress = lambda _, done, *more: done < 200_000 or interrupt(2, None)", 130, "same"),
    ("resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))", 1, "same command"),
], ids=["killed", "killed before the renaming", "Ctrl-C", "full disk"])
def test_stopped_download_goes_on_where_it_stopped(trouble, status, word, serve, tool):
    server = serve(BODY)
    code = ("import os, resource, signal, sys; import download_generated as dg; "
            "kill = lambda: os.kill(os.getpid(), 9); interrupt = signal.default_int_handler; "
            "dg.SOURCES = [dg.Source('tiny', 400, '', '', 1e-3, '', '', sys.argv[3:])]; "
            f"{trouble}; dg.main(['tiny', *sys.argv[1:3]])")
    command = [sys.executable, "-c", code, "--data-dir", Path("data").absolute(), server.address]
    stopped = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert stopped.returncode == status and word in stopped.stderr
    assert len(stopped.stderr.splitlines()) <= 1
    assert server.starts == [0]  # another attempt would not have helped
    kept = dg.size_of(PART)
    assert kept > 190_000 and not DOWNLOADED.exists()

    tool("tiny")
    assert server.starts == ([0] if kept == len(BODY) else [0, kept])
    assert DOWNLOADED.read_bytes() == BODY


def test_redirects_never_lead_from_https_to_http(serve, tool, monkeypatch):
    # The server speaks http behind an https address, as only the address matters here.
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open",
                        lambda self, request: self.do_open(http.client.HTTPConnection, request))
    server = serve(BODY, 302, 302)
    dg.SOURCES[0].urls[0] = secure = server.address.replace("http:", "https:")
    assert "not https" in tool("tiny", 1)
    server.address = secure
    tool("tiny")
    assert len(server.starts) == 3


def test_good_file_is_kept_and_replaced_only_by_a_whole_one(serve, tool):
    server = serve(DAMAGED)
    DOWNLOADED.parent.mkdir()
    DOWNLOADED.write_bytes(DAMAGED)  # saved by hand, so without a record
    assert "--force" in tool("tiny", 1)
    assert DOWNLOADED.read_bytes() == DAMAGED
    DOWNLOADED.write_bytes(BODY)
    for _ in range(2):
        assert "already there" in tool("tiny")
    assert "CRC" in tool("tiny --force", 1)
    assert not PART.exists()  # or the next run would take it for whole, and stop at it again
    assert DOWNLOADED.read_bytes() == BODY
    tool("--verify data/tiny.npz")

    DOWNLOADED.write_bytes(DAMAGED)
    tool("--verify data/tiny.npz", 1)
    assert len(server.starts) == 1  # that with --force
    server.body = BODY
    tool("tiny --force")
    assert DOWNLOADED.read_bytes() == BODY


def test_progress_says_speed_and_time_left(capsys):
    for done in (490, 500, 510):  # a log is not flooded
        dg.show_progress((done - 10) * 10**6, done * 10**6, 10**9, 10e6)
    assert capsys.readouterr().out == "500.0 of 1,000.0 MB, 10.0 MB/s, 00:00:50 left  \n"


@pytest.mark.parametrize("body, script, slow, second_script, starts", [
    (ARCHIVE, [404], 0, [], [0]), (b"x" * 1000, [], 0, [], [0]),
    (ARCHIVE, [], 1e12, [], [0]), (ARCHIVE, [], 1e12, [404], [0, dg.BLOCK]),
], ids=["down", "other", "slow", "slow, but the only one"])
def test_archive_comes_from_the_source_that_has_it(
        body, script, slow, second_script, starts, serve, tool, monkeypatch):
    monkeypatch.setattr(dg, "SLOW", slow)
    monkeypatch.setattr(dg, "SLOW_AFTER", 0)
    first = serve(body, *script)
    second = serve(ARCHIVE, *second_script, archive=True)
    for _ in range(2):
        tool("tiny")
        assert first.starts == starts and second.starts == [0]  # the second time it is there
    name = "cifar-10-python.tar.gz"  # where torchvision looks for it
    assert sorted(os.listdir("data")) == ["batches", name, f"{name}.json"]
    assert sorted(os.listdir("data/batches")) == ["one", "two"]


def test_archive_goes_on_with_the_source_that_was_interrupted(serve, tool):
    serve(ARCHIVE, slice(1000), 404, 404)
    second = serve(ARCHIVE, slice(200_000), 404, archive=True)
    tool("tiny", 1)
    tool("tiny")
    assert second.starts == [0, 200_000, 200_000]  # not 1000, which came from the first


def test_archive_cannot_write_outside_its_folder(serve, tool):
    serve(tar_bytes({"batches/one": b"1", "../../outside": b"2"}), archive=True)
    tool("tiny", 1)
    assert os.listdir() == ["data"] and not Path("data/batches").exists()


@pytest.mark.parametrize("answer, status, word", [
    (BODY, 0, "whole"), (b"<html>Google Drive - Quota exceeded", 1, "quota"),
    (RuntimeError("Cannot retrieve:\n\n\tToo many users have viewed this file.\n"), 1, "quota"),
    (RuntimeError("No\n\nnetwork"), 1, "No network"), (None, 1, "pip install"),
], ids=["data", "page", "quota", "error", "not installed"])
def test_google_drive_by_gdown(answer, status, word, tool, monkeypatch):
    def download(url, output, resume):
        if isinstance(answer, Exception):
            raise answer
        return Path(output).write_bytes(answer)

    gdown = SimpleNamespace(download=download) if answer else None
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    assert word in tool("cifar10-5k", status)
    assert len(os.listdir("data")) == (0 if status else 2)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_file_is_refused_or_intact(save, tmp_path):
    """Damage never yields other images and never a traceback, but always one line."""
    images = random_images(9)[:, :4, :4]
    good = npz_bytes(images, save)
    path = tmp_path / "damaged.npz"
    draw = random.Random(0)
    intact = 0
    for _ in range(300):
        at = draw.randrange(len(good))
        path.write_bytes(good[:at] + draw.randbytes(at % 2) + good[at + 1:])
        try:
            chunks = list(dg.ArrayFile(path, rows=4))
        except dg.Problem as error:
            assert error.status == 2 and len(str(error).splitlines()) == 1
        else:
            assert [len(chunk) for chunk in chunks] == [4, 4, 1]
            assert np.array_equal(np.concatenate(chunks), images)
            intact += 1
    assert intact  # there are bytes that do not matter


INSPECT = "--inspect bad.npz"
CONVERT = "--from-npz bad.npz image --out out.npz"


@pytest.mark.parametrize("command, content", [
    (INSPECT, BODY.replace(b"(400, 32, 32, 3), }         ", b"(400000000000, 32, 32, 3), }")),
    (INSPECT, BODY.replace(b"(400, ", b"(399, ")),
    (INSPECT, npz_bytes(np.array([Bomb()]))),
    (INSPECT, npz_bytes(np.asfortranarray(random_images(2)))),
    (INSPECT, npz_bytes(random_images(2)[:, :8])),
    (INSPECT, npz_bytes(random_images(2) / 255)),
    (INSPECT, npz_bytes(random_images(0))),
    (CONVERT, npz_bytes(random_images(2) * 2.0)),
    (CONVERT, npz_bytes(np.append(np.zeros(12 * 4100 - 1), np.nan).reshape(4100, 3, 2, 2))),
    (CONVERT, npz_bytes(np.zeros((4, 3072)))),
], ids=["few", "more", "objects", "Fortran", "wide", "float", "empty", "range", "nan", "flat"])
def test_file_that_makes_no_sense_is_refused(command, content, tool):
    """Catches, among others, memory reserved for what a header only promises."""
    Path("bad.npz").write_bytes(content)
    tool(command, 2)
    assert os.listdir() == ["bad.npz"]


def test_inspect_draws_a_contact_sheet_and_warns(tool):
    images = random_images(300)
    np.savez("good.npz", image=images, label=np.arange(300) % 10)
    said = tool("--inspect good.npz")
    assert "(300, 32, 32, 3)" in said and "123.0" in said  # the latter is CIFAR-10's green
    assert "warning" not in said
    sheet = np.asarray(Image.open("good.npz.png"))
    assert sheet.shape[1] == 16 * 34 + 2  # 16 in a row, with a border of 2
    assert (sheet[2:34, 2:34] == images[0]).all()  # in RGB
    assert (sheet[-34:-2, -34:-2] == images[299]).all()

    np.savez("bad.npz", image=images[..., ::-1])
    assert "warning: looks BGR" in tool("--inspect bad.npz --out sheet.png")
    np.savez("bad.npz", image=images, label=np.arange(300) // 30)
    assert "warning: looks sorted by class" in tool("--inspect bad.npz --out sheet.png")


def test_folder_skips_a_broken_image_and_counts_it(tool):
    deep = Path("pictures/b/deep")
    deep.mkdir(parents=True)
    Image.new("L", (64, 64), 77).save("pictures/a-grey.png")
    Image.new("RGB", (32, 32), (200, 100, 50)).save(deep / "colour.png")
    high = Image.new("RGBA", (8, 24), "white")
    high.paste((1, 2, 3, 255), (0, 8, 8, 16))
    high.save("pictures/c-high.webp", lossless=True)
    Path("pictures/b/broken.png").write_bytes((deep / "colour.png").read_bytes()[:60])
    Path("pictures/.hidden.png").touch()

    command = "--from-folder pictures --out mine.npz --size 8"
    assert "broken.png" in tool(f"{command} --strict", 2)
    assert os.listdir() == ["pictures"]
    said = tool(command)
    assert "broken.png" in said and "3 images, 1 skipped" in said
    images = np.load("mine.npz")["image"]
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8
    colours = [[77, 77, 77], [200, 100, 50], [1, 2, 3]]  # sorted: a, b, c
    assert (images == np.reshape(colours, (3, 1, 1, 3))).all()
    assert "--force" in tool(command, 2)
    tool(f"{command} --force")


@pytest.mark.parametrize("command", ["--from-npy array.npy", "--from-npz array.npz samples"])
@pytest.mark.parametrize("black, white, dtype", [
    (0, 1, "float32"), (-1, 1, ">f8"), (0, 255, "float16"), (0, 255, "int64")])
def test_array_in_another_layout_and_range(command, black, white, dtype, tool):
    """4100 images are two chunks. Two pixels overshoot, one below black and one above white."""
    images = random_images(4100)[:, :4, :4]
    images[0, 0, :2] = [[0], [255]]
    scaled = images.transpose(0, 3, 1, 2) / 255 * (white - black) + black
    scaled[0, :, 0, :2] += (white - black) / 200 * np.array([-1, 1])
    array = np.ascontiguousarray(scaled, dtype)
    np.save("array.npy", array)
    np.savez("array.npz", samples=array)
    said = tool(f"{command} --out mine.npz")
    assert "N x 3 x n x n" in said and f"{black} is black and {white} is white" in said
    assert np.array_equal(np.load("mine.npz")["image"], images)


def test_cifar10_comes_from_torchvision_or_from_here(serve, tool, monkeypatch):
    """When a host is down, adainf.py names the command, whose files it finds."""
    images = random_images(40)
    pixels = images.transpose(0, 3, 1, 2).reshape(40, 3072)
    batch = pickle.dumps({"data": pixels, "labels": [*range(10)] * 4})
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    body = tar_bytes({"cifar-10-batches-py/40": batch, "cifar-10-batches-py/batches.meta": meta})
    server = serve(body, archive=True)

    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "url", server.address)
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(body).hexdigest())
    monkeypatch.setattr(dataset, "train_list", [["40", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(dataset, "test_list", dataset.train_list)
    monkeypatch.setitem(dataset.meta, "md5", hashlib.md5(meta).hexdigest())

    tool("tiny --data-dir ours")
    options = SimpleNamespace(data_dir="ours", image_size=32)
    adainf.read_cifar("cifar10", options)
    assert len(server.starts) == 1

    options.data_dir = "theirs"
    server.script = [404] * 9
    with pytest.raises(adainf.InputError, match="python download_generated.py cifar10"):
        adainf.read_cifar("cifar10", options)
    server.script.clear()
    train, _, _ = adainf.read_cifar("cifar10", options)
    assert np.array_equal(train[0], images)


# ---- python test_adainf.py theory ---------------------------------------------------------------
# Does generated data help? Here nothing is trained. The features that minimise the spectral
# contrastive loss,
#     L(f) = -2 E[f(x)' f(x+)] + E[(f(x)' f(x'))^2],   x, x+ a positive pair, x' independent of x,
# are eigenvectors of the augmentation graph (HaoChen, Wei, Gaidon, Ma 2021, Section 3): one eigh.
# Inflation adds points to this graph, augmentation widens its edges, the weight N weighs points.
# Where views are so weak that the graph falls into more pieces than there are features, L has many
# minimisers: an error there says "poor" (another precision gives other figures), not how poor.

CLASSES = 4
FEATURES = 12  # more than classes: an arm may fall into several pieces of the graph
STRENGTHS = (0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
WEAK, STRONG = 0.1, 0.2
RATIOS = (1, 3, 10, 30, 100, 300)  # N, the weight of a real point

MIXTURES = {  # real points, generated points, their fault, the share that has it
    "60 real": (60, 0, "smear", 0),
    "+ 600 perfect": (60, 600, "smear", 0),
    "+ 600, 15 % faults": (60, 600, "smear", 0.15),
    "+ 600, 30 % faults": (60, 600, "smear", 0.3),
    "+ 600, 60 % faults": (60, 600, "smear", 0.6),
    "600 real": (600, 0, "smear", 0),
    "half mixed": (60, 600, "mix", 0.5),
    "half shifted": (60, 600, "shift", 0.5),
    "half noise": (60, 600, "noise", 0.5),
}
BY_STRENGTH, BY_RATIO = list(MIXTURES)[:6], list(MIXTURES)[6:]


def spiral_arms(classes, stream):
    """Points on four arms: both ends of an arm are one class, neighbouring arms are not."""
    position = torch.rand(len(classes), generator=stream)
    radius = 0.25 + 0.75 * position
    angle = 2 * math.pi * classes / CLASSES + 2.6 * position
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return arm + 0.06 * torch.randn(arm.shape, generator=stream)


def draw_world(seed):
    """All that is random. Every setting of a draw shares it, so that differences are paired."""
    stream = torch.Generator().manual_seed(seed)
    world = SimpleNamespace()
    world.labels = torch.arange(600) % CLASSES
    world.real = spiral_arms(world.labels, stream)
    world.test_labels = torch.arange(500) % CLASSES
    world.test = spiral_arms(world.test_labels, stream)

    perfect = spiral_arms(torch.randint(CLASSES, (600,), generator=stream), stream)
    other = perfect[torch.randperm(600, generator=stream)]
    cos, sin = math.cos(0.5), math.sin(0.5)
    world.perfect = perfect
    world.faults = {
        "smear": perfect + 0.25 * torch.randn(600, 2, generator=stream),
        "mix": (perfect + other) / 2,
        "shift": perfect @ torch.tensor([[cos, sin], [-sin, cos]]),  # turned by 0.5 rad
        "noise": 2.2 * torch.rand(600, 2, generator=stream) - 1.1,
    }
    world.luck = torch.rand(600, 1, generator=stream)  # the same points fail first in every mixture
    return world


def mixture_weights(n_real, n_generated, ratio):
    """P_t = beta P_d + (1 - beta) P_g with beta = N n / (N n + m) (the paper, Theorem 3.1)."""
    weights = torch.ones(n_real + n_generated)
    weights[:n_real] = ratio
    return weights / weights.sum()


def shared_views(points, others, strength):
    """Views lie anywhere within `strength` of a point: two points share the discs' overlap."""
    distance = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    apart = (distance / (2 * strength)).clamp(max=1)
    return 2 / math.pi * (apart.acos() - apart * (1 - apart ** 2).sqrt())


def positive_pairs(points, weights, strength):
    """P(x, x+): the edges of the augmentation graph (HaoChen et al., Section 3)."""
    edges = weights[:, None] * weights * shared_views(points, points, strength)
    return edges / edges.sum()


def best_features(pairs, n_features):
    """The minimiser of L(f), with its eigenvalues (HaoChen et al., Section 3).

    Let A = P(x, x+) / sqrt(P(x) P(x+)), and let F have the rows sqrt(P(x)) f(x). Then
    L(f) = |A - F F'|^2 - |A|^2, and by Eckart-Young F F' keeps A's largest eigenvalues.
    """
    marginal = pairs.sum(1)
    adjacency = pairs / (marginal[:, None] * marginal).sqrt()
    eigenvalues, vectors = torch.linalg.eigh(adjacency)
    eigenvalues, vectors = eigenvalues[-n_features:], vectors[:, -n_features:]
    return vectors * eigenvalues.sqrt() / marginal[:, None].sqrt(), eigenvalues


def extend(shared, weights, features, eigenvalues):
    """Features of new points (Nystroem): at the minimum, f(x) = E[f(x+) | x] / eigenvalue."""
    partners = shared * weights
    total = partners.sum(1, keepdim=True).clamp(min=1e-30)  # a point without partners: f(x) = 0
    return partners / total @ features / eigenvalues


def probe_error(world, mixture, strength, ratio):
    """Features from the mixture, a linear probe on the real points, error on new points in %."""
    n_real, n_generated, fault, share = MIXTURES[mixture]
    generated = torch.where(world.luck < share, world.faults[fault], world.perfect)
    points = torch.cat([world.real[:n_real], generated[:n_generated]])
    weights = mixture_weights(n_real, n_generated, ratio)

    features, eigenvalues = best_features(positive_pairs(points, weights, strength), FEATURES)
    shared = shared_views(world.test, points, strength)
    test_features = extend(shared, weights, features, eigenvalues)

    # Ridge regression. A probe may scale features: each gets mean square 1 over the mixture.
    known = features[:n_real] / eigenvalues.sqrt()
    targets = F.one_hot(world.labels[:n_real], CLASSES).to(known.dtype)
    gram = known.T @ known + 1e-3 * torch.eye(FEATURES, dtype=known.dtype)
    probe = torch.linalg.solve(gram, known.T @ targets)
    guesses = (test_features / eigenvalues.sqrt() @ probe).argmax(1)
    return 100 * (guesses != world.test_labels).float().mean().item()


def measure_errors(settings, seeds):
    """{(mixture, strength, N): one error a draw}."""
    def one_draw(seed):
        world = draw_world(seed)
        return [probe_error(world, *setting) for setting in settings]

    # A core for a draw: a single eigh gains little from a second one.
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads,
                            initargs=(1,)) as pool:
        errors = torch.tensor(list(pool.map(one_draw, seeds)))
    return dict(zip(settings, errors.T, strict=True))


def mean_of_faults(errors, ratio):
    return sum(errors[mixture, WEAK, ratio] for mixture in BY_RATIO) / len(BY_RATIO)


def statements(errors):
    """What the paper says, as the gain in error that it foretells, one a draw."""
    none = errors["60 real", STRONG, 1]
    weak = {mixture: errors[mixture, WEAK, 1] for mixture in BY_STRENGTH}
    strong = {mixture: errors[mixture, STRONG, 1] for mixture in BY_STRENGTH}
    best = mean_of_faults(errors, 10)
    return {
        "1 no inflation: strong beats weak": weak["60 real"] - none,
        "1 perfect generator: weak beats strong": strong["+ 600 perfect"] - weak["+ 600 perfect"],
        "1 600 real: weak beats strong": strong["600 real"] - weak["600 real"],
        "2 strong: a perfect generator harms": strong["+ 600 perfect"] - none,
        "2 strong: 15 % faults harm": strong["+ 600, 15 % faults"] - none,
        "2 strong: 30 % faults harm": strong["+ 600, 30 % faults"] - none,
        "2 strong: 60 % faults harm": strong["+ 600, 60 % faults"] - none,
        "3 perfect, weak: beats no inflation": none - weak["+ 600 perfect"],
        "3 15 % faults, 0.14: beats no inflation": none - errors["+ 600, 15 % faults", 0.14, 1],
        "3 60 % faults, weak: too poor, loses": weak["+ 600, 60 % faults"] - none,
        "4 half faulty, weak: N = 10 beats 1": mean_of_faults(errors, 1) - best,
        "4 half faulty, weak: N = 10 beats 300": mean_of_faults(errors, 300) - best,
    }


def mean_and_error(values):
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def print_theory_table(title, columns, rows):
    print(f"\n{title:20}", *(f"{column:>12g}" for column in columns))
    for name, cells in rows.items():
        texts = [f"{mean:.1f} +- {error:.1f}" for mean, error in map(mean_and_error, cells)]
        print(f"{name:20}", *(f"{text:>12}" for text in texts))


def plot_curve(axis, x, cells, colour, above=False):
    """Means with a band of one standard error; the optimum is marked and told."""
    means, errors = torch.tensor([mean_and_error(cell) for cell in cells]).T
    axis.fill_between(x, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, means, color=colour, linewidth=3)
    best = means.argmin()
    axis.plot(x[best], means[best], "o", color=colour, markersize=13, markeredgecolor="white")
    axis.annotate(f"{means[best]:.1f} %", (x[best], means[best]), color=colour, weight="bold",
                  xytext=(0, 12 if above else -28), textcoords="offset points", ha="center",
                  bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1})


def plot_theory(by_strength, by_ratio, path):
    blue, grey = "#1f6fb2", "#666666"  # as in assets/idea.png, and generated points orange
    light, orange, dark = "#eeb064", "#d9822b", "#94500f"
    figure = Figure(figsize=(14, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])

    # Labels stand where the curves begin, a line apart.
    for mixture, colour, label, y in [("+ 600 perfect", blue, "perfect\ngenerator", 0.235),
                                      ("+ 600, 15 % faults", light, "15 % faults", 20),
                                      ("60 real", grey, "no inflation", 32),
                                      ("+ 600, 30 % faults", orange, "30 % faults", 51),
                                      ("+ 600, 60 % faults", dark, "60 % faults", 80)]:
        plot_curve(left, STRENGTHS, by_strength[mixture], colour, above=colour in (orange, dark))
        left.text(0.066, y, label, color=colour, weight="bold", ha="right", va="center")
    names = {WEAK: f"{WEAK}\nweak", STRONG: f"{STRONG}\nstrong"}
    ticks = [0.1, 0.3, 1, 3, 10, 30, 100]
    left.set(xscale="log", xlim=(0.036, 0.45), xticks=STRENGTHS)
    left.set(xticklabels=[names.get(strength, f"{strength}\n") for strength in STRENGTHS])
    left.set(yscale="log", ylim=(0.08, 110), yticks=ticks, yticklabels=ticks)
    left.set(xlabel="strength of augmentation", ylabel="test error, %")
    left.set_title("More data wants weaker views", weight="bold", pad=14)

    for mixture, colour in zip(BY_RATIO, [light, orange, dark], strict=True):
        means = [cell.mean() for cell in by_ratio[mixture]]
        right.plot(RATIOS, means, color=colour, linewidth=1.5)
        right.text(0.85, means[0], mixture.removeprefix("half "), color=colour, ha="right")
    plot_curve(right, RATIOS, by_ratio["mean of the three"], blue)
    right.text(10, 1.2, "mean of three\nkinds of faults", color=blue, weight="bold", ha="center")
    right.set(xscale="log", xlim=(0.19, 400), xticks=RATIOS, xticklabels=RATIOS, ylim=(0, None))
    right.set(xlabel="weight N of a real point", ylabel="test error, %")
    right.set_title("Half faulty: N has an optimum", weight="bold", pad=14)

    for axis in (left, right):
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def theory(argv):
    parser = argparse.ArgumentParser(prog="python test_adainf.py theory")
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--out", default="theory.png")
    options = parser.parse_args(argv)

    settings = [(mixture, strength, 1) for mixture in BY_STRENGTH for strength in STRENGTHS]
    settings += [(mixture, WEAK, ratio) for mixture in BY_RATIO for ratio in RATIOS]
    errors = measure_errors(settings, range(options.draws))

    by_strength = {mixture: [errors[mixture, strength, 1] for strength in STRENGTHS]
                   for mixture in BY_STRENGTH}
    by_ratio = {mixture: [errors[mixture, WEAK, ratio] for ratio in RATIOS]
                for mixture in BY_RATIO}
    by_ratio["mean of the three"] = [mean_of_faults(errors, ratio) for ratio in RATIOS]
    print(f"Test error in %, mean +- standard error of {options.draws} draws")
    print_theory_table("strength s (N = 1)", STRENGTHS, by_strength)
    print_theory_table(f"weight N (s = {WEAK})", RATIOS, by_ratio)

    print("\nWhat the paper says, and the gain in error, paired over the draws")
    for statement, gains in statements(errors).items():
        gain, error = mean_and_error(gains)
        verdict = "holds" if gain > 2 * error else "does not" if gain < -2 * error else "open"
        print(f"{statement:42}{gain:6.1f} +- {error:.1f}   {verdict}")
    with matplotlib.rc_context({"font.size": 17}):
        plot_theory(by_strength, by_ratio, options.out)


def small_graph(n_real=8, n_generated=12, ratio=3, strength=0.4):
    world = draw_world(seed=1)
    points = torch.cat([world.real[:n_real], world.perfect[:n_generated]]).double()
    weights = mixture_weights(n_real, n_generated, ratio).double()
    return points, weights / weights.sum(), strength


def spectral_loss(features, pairs):
    """L(f), written as its definition: a sum over positive pairs and one over all pairs."""
    marginal = pairs.sum(1)
    products = features @ features.T
    independent = marginal[:, None] * marginal
    return -2 * (pairs * products).sum() + (independent * products ** 2).sum()


def test_features_minimise_the_spectral_contrastive_loss():
    """Catches rows divided by another power of P(x): descent from random starts finds no less."""
    pairs = positive_pairs(*small_graph())
    features, eigenvalues = best_features(pairs, 4)
    least = spectral_loss(features, pairs)
    assert torch.isclose(least, -(eigenvalues ** 2).sum())  # the closed form of the minimum

    features.requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_loss(features, pairs), features)
    assert gradient.abs().max() < 1e-12

    for seed in range(3):
        start = torch.randn(20, 4, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(seed))
        found = start.requires_grad_()
        optimizer = torch.optim.LBFGS([found], max_iter=500, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-10, tolerance_change=1e-14)

        def closure(optimizer=optimizer, found=found):
            optimizer.zero_grad()
            loss = spectral_loss(found, pairs)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert least - 1e-12 < spectral_loss(found, pairs) < least + 1e-6


def test_extension_gives_a_training_point_its_own_features():
    """Catches a missing weight or eigenvalue in the Nystroem extension."""
    points, weights, strength = small_graph()
    features, eigenvalues = best_features(positive_pairs(points, weights, strength), 4)
    extended = extend(shared_views(points, points, strength), weights, features, eigenvalues)
    assert torch.allclose(extended, features, rtol=1e-9, atol=1e-12)


def test_a_point_far_from_all_others_has_features_zero():
    """Catches 0 / 0: with bounded views a test point may have no partner."""
    points, weights, strength = small_graph()
    features, eigenvalues = best_features(positive_pairs(points, weights, strength), 4)
    shared = shared_views(points[:1] + 9, points, strength)
    assert (extend(shared, weights, features, eigenvalues) == 0).all()


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.35, 0.7, 0.9])
def test_shared_views_are_the_overlap_of_two_discs(distance):
    """Catches a wrong formula: one million views of a point, how many are views of the other?"""
    stream = torch.Generator().manual_seed(0)
    square = 0.8 * torch.rand(1_000_000, 2, generator=stream) - 0.4
    views = square[square.norm(dim=1) < 0.4]
    other = torch.tensor([[distance, 0.0]])
    counted = ((views - other).norm(dim=1) < 0.4).float().mean()
    assert abs(shared_views(torch.zeros(1, 2), other, 0.4) - counted) < 0.003


@pytest.mark.parametrize("ratio", [1, 10])
def test_mixture_is_that_of_theorem_3_1(ratio):
    """beta = N n / (N n + m), and D_TV(P_t, P_d) = (1 - beta) D_TV(P_g, P_d)."""
    weights = mixture_weights(60, 600, ratio)
    beta = ratio * 60 / (ratio * 60 + 600)
    assert torch.isclose(weights[:60].sum(), torch.tensor(beta))
    assert torch.isclose(weights.sum(), torch.tensor(1.0))

    # Let some generated points be copies of real ones, so that D_TV(P_g, P_d) is less than 1.
    place = torch.cat([torch.arange(60), torch.arange(30, 630)])
    mixed = torch.zeros(630).index_add(0, place, weights)
    real = torch.zeros(630).index_add(0, place[:60], torch.full((60,), 1 / 60))
    generated = torch.zeros(630).index_add(0, place[60:], torch.full((600,), 1 / 600))
    distance = (mixed - real).abs().sum() / 2
    assert torch.isclose(distance, (1 - beta) * (generated - real).abs().sum() / 2)


def test_a_draw_is_the_same_in_every_setting():
    """Catches settings that differ by their points: then differences would not be paired."""
    one, same, other = draw_world(5), draw_world(5), draw_world(6)
    assert torch.equal(one.test, same.test) and torch.equal(one.luck, same.luck)
    assert not torch.equal(one.real, other.real)


def test_without_generated_points_the_weight_changes_nothing():
    """Catches weights that are not made to sum to one."""
    world = draw_world(5)
    assert probe_error(world, "60 real", STRONG, 1) == probe_error(world, "60 real", STRONG, 10)


def gain_in_errors(worse, better):
    """Mean of paired differences in standard errors: above 2, it is no accident of the draws."""
    mean, error = mean_and_error(worse - better)
    return mean / error


def test_the_claims_of_the_paper_on_strength():
    """Catches a computation in which inflation, strength or faults do not act as they should."""
    settings = [("+ 600, 15 % faults", 0.14, 1)]
    for mixture in ("60 real", "600 real", "+ 600 perfect", "+ 600, 60 % faults"):
        settings += [(mixture, WEAK, 1), (mixture, STRONG, 1)]
    errors = measure_errors(settings, range(100, 112))
    none = errors["60 real", STRONG, 1]

    # 1. Complementary roles: alone, real points want strong views, and with more points weak ones.
    assert gain_in_errors(errors["60 real", WEAK, 1], none) > 2
    for mixture in ("600 real", "+ 600 perfect"):
        assert gain_in_errors(errors[mixture, STRONG, 1], errors[mixture, WEAK, 1]) > 4

    # 2. Strong views and a poor generator harm. (With a perfect one strong views gain here, too.)
    assert gain_in_errors(errors["+ 600, 60 % faults", STRONG, 1], none) > 2
    assert gain_in_errors(none, errors["+ 600 perfect", STRONG, 1]) > 2

    # 3. Weaker views and a good generator win, but not with a poor one.
    assert gain_in_errors(none, errors["+ 600 perfect", WEAK, 1]) > 3
    assert gain_in_errors(none, errors["+ 600, 15 % faults", 0.14, 1]) > 2
    assert gain_in_errors(errors["+ 600, 60 % faults", WEAK, 1], none) > 3


def test_the_claim_of_the_paper_on_the_weight():
    """4. The best N lies inside: neither no weight nor nothing but real points."""
    one, ten, many = [("half shifted", WEAK, ratio) for ratio in (1, 10, 300)]
    errors = measure_errors([one, ten, many], range(3000, 3032))
    assert gain_in_errors(errors[one], errors[ten]) > 2
    assert gain_in_errors(errors[many], errors[ten]) > 3


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
        if (out / "log.jsonl").exists():
            with open(out / "log.jsonl", "ab") as file:
                file.write(b'{"event": "training", "lo')  # as if the machine had stopped


def stress(argv):
    """Kill runs at random moments, and compare all they leave with a run that nothing stopped.

    Arguments: the least number of kills (50) and a seed (0)."""
    least = int(argv[0]) if argv else 50
    draw = random.Random(argv[1] if argv[1:] else 0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_data(folder)
        more = ("--steps", 60, "--save-every", 2)
        for name in ("first", "straight"):  # the first one also starts the server of processes
            begun = time.perf_counter()
            child = start(os.devnull, adainf.main, arguments(data, folder / name, *more))
            assert exit_codes(child) == [0]
            seconds = time.perf_counter() - begun
        reference = outcome(folder / "straight")

        kills = 0
        for count in itertools.count(1):
            out = folder / f"killed-{count}"
            kills += kill_at_random(arguments(data, out, *more), out, seconds, draw)
            different = differences(out, reference)
            print(f"run {count}: {kills} kills so far, {len(different)} differences", flush=True)
            if different:
                sys.exit(f"differs from a run that was not stopped in {different[:9]}")
            if kills >= least:
                break
    print(f"{count} runs were killed {kills} times; each ended bit for bit as one that was not")


# ---- python test_adainf.py benchmark -------------------------------------------------------------


class PillowViews(torch.utils.data.Dataset):
    """What most programs do: torchvision's transforms of Pillow images, one at a time."""

    def __init__(self, images, recipe):
        self.images = images
        bicubic = transforms.InterpolationMode.BICUBIC
        jitter = transforms.ColorJitter(*recipe["jitter"])
        self.view = transforms.Compose([
            transforms.RandomResizedCrop(32, (recipe["crop_min"], 1), interpolation=bicubic),
            transforms.RandomApply([jitter], recipe["jitter_prob"]),
            transforms.RandomGrayscale(recipe["gray_prob"]),
            transforms.RandomApply([self.blur], recipe["blur_prob"]),
            transforms.RandomHorizontalFlip(recipe["flip_prob"]),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.25] * 3)])

    @staticmethod
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.view(image), self.view(image)


class Figures:
    """Measures rates, prints them as they come, and keeps them for benchmark.json."""

    def __init__(self, device):
        self.device = device
        self.kept = {}

    def seconds(self, work):
        begun = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def rates(self, work, amount, seconds=3):
        """Amounts a second of repeated work(), after one call to warm up."""
        self.seconds(work)
        rates = []
        begun = time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - begun < seconds:
            rates.append(amount / self.seconds(work))
        return rates

    def show(self, title, unit, rates, baseline=None):
        """Print and keep a figure, beside a baseline of the same run; returns the median."""
        median = statistics.median(rates)
        figure = dict(unit=unit, median=median, low=min(rates), high=max(rates), n=len(rates))
        text = "{median:12,.0f} {unit} ({low:,.0f} to {high:,.0f}, n = {n})".format(**figure)
        if baseline:
            figure["ratio"] = median / baseline
            text += f" {median / baseline:.2f} x"
        print(f"{title:50}{text}", flush=True)
        self.kept[title] = figure
        return median


def random_data(device, real, generated):
    """Data of 32 x 32 pixels and 10 classes, where the device computes."""
    images = torch.randint(0, 256, (2000, 32, 32, 3), dtype=torch.uint8, device=device)
    repeats = math.ceil((real + generated) / len(images))
    images = images.repeat(repeats, 1, 1, 1)
    half = torch.full((3, 1, 1), 0.5, device=device)
    labels = torch.arange(real, device=device) % 10
    return adainf.Data(
        images=images[:real],
        labels=labels,
        generated=images[real:real + generated],
        probe_images=images[:real],
        probe_labels=labels,
        test_images=images[:10],
        test_labels=labels[:10],
        classes=list("0123456789"),
        mean=half,
        std=half / 2)


def training_step(options, data, plain=False):
    """A function without arguments that does the next step of train(), without logs and saves.

    A plain one lays images out as (channels, rows, columns) in memory, PyTorch's default."""
    mixture = adainf.Mixture(data, options.ratio, options.batch_size, options.seed)
    two_views = adainf.TwoViews(adainf.WEAK, 32, data.mean, data.std, options.seed)
    model = adainf.build_model(options, data)
    optimizer = adainf.build_optimizer(model, options)
    autocast = adainf.choose_autocast(options)
    fast_model, two_views.apply = adainf.accelerate(model, two_views.apply, options)
    if plain:
        model.to(memory_format=torch.contiguous_format)
    steps = itertools.count()

    def work():
        step = next(steps)
        images, labels, real = mixture.batch(step)
        views = two_views(images, step)
        if plain:
            views = views.contiguous()
        with autocast:
            projections, logits = fast_model(views)
        loss = adainf.nt_xent(projections, options.temperature)
        probe_loss = adainf.probe_cross_entropy(logits, labels, real)
        adainf.set_learning_rates(optimizer, step, options)
        optimizer.zero_grad()
        (loss + probe_loss).backward()
        optimizer.step()

    return work


def flops_of_an_image(options, data):
    """Floating-point operations that a step takes for an image: two views, there and back."""
    network = adainf.build_model(options, data)
    views = torch.zeros(2, 3, 32, 32, device=data.device)
    with FlopCounterMode(display=False) as counter:
        projections, logits = network(views)
        (projections.sum() + logits.sum()).backward()
    return counter.get_total_flops()


def matmul_peak(figures, dtype):
    """The most floating-point operations a second of a large product of matrices."""
    best = 0
    for n in (1024, 2048, 4096, 8192) if figures.device == "cuda" else (1024, 2048):
        a = torch.randn(n, n, device=figures.device).to(dtype)
        b = torch.randn(n, n, device=figures.device).to(dtype)
        for right in (b, b.T):  # layouts differ in speed
            rates = figures.rates(lambda: a @ right, 2 * n ** 3, seconds=0.5)
            best = max(best, *rates)
    return best


def benchmark_views(figures, data):
    """Views a second, beside Pillow's; returns that of eager weak ones."""
    print("\nTwo views of 256 images; x: times Pillow in a DataLoader with 2 workers")
    images = data.images[:256]
    for strength, recipe in adainf.RECIPES.items():
        pillow = PillowViews(data.images[:1024].cpu().numpy(), recipe)
        workers = dict(num_workers=2, persistent_workers=True)  # started by the call to warm up
        loader = torch.utils.data.DataLoader(pillow, 256, **workers)
        rates = figures.rates(lambda: list(loader), 2 * len(pillow), seconds=0)
        baseline = figures.show(f"{strength}, Pillow", "views/s", rates)

        two_views = adainf.TwoViews(recipe, 32, data.mean, data.std, seed=0)
        rates = figures.rates(lambda: two_views(images, 0), 512)
        eager = figures.show(f"{strength}, matrices", "views/s", rates, baseline)
        two_views.apply = torch.compile(two_views.apply)
        rates = figures.rates(lambda: two_views(images, 0), 512)
        figures.show(f"{strength}, matrices, compiled", "views/s", rates, baseline)
    return eager


def benchmark_batches(figures):
    print("\nDrawing a batch of 512")
    for count in (10_000, 1_000_000):
        data = random_data(figures.device, 50_000, count)
        mixture = adainf.Mixture(data, 10, 512, seed=0)
        steps = itertools.count()
        rates = figures.rates(lambda: mixture.batch(next(steps) % 1000), 1, seconds=1)
        figures.show(f"of 50,000 real and {count:,} generated images", "batches/s", rates)


def benchmark_steps(figures, parse, data, plain, views_rate):
    """One improvement after the other, beside the plain loop."""
    dtypes = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
    amp = adainf.choose_precision("auto", figures.device)
    fp32 = parse("--amp", "off")
    fast = parse("--amp", amp)
    settings = [
        ("+ freed memory is kept", fp32, True),
        ("+ channels_last", fp32, False),
        (f"+ {amp}", fast, False),
        ("+ compiled", parse("--amp", amp, "--compile"), False)]
    if amp == "off":
        del settings[2]

    peaks = {name: matmul_peak(figures, dtypes[name]) for name in {"off", amp}}
    flops = flops_of_an_image(fp32, data)
    for title, options, is_plain in settings:
        work = training_step(options, data, is_plain)
        first = figures.seconds(work)
        rates = figures.rates(work, options.batch_size, seconds=6)
        rate = figures.show(title, "images/s", rates, plain)
        of_peak = rate * flops / peaks[options.amp]
        of_views = 2 * rate / views_rate
        figures.kept[title].update(of_peak=of_peak, of_views=of_views, first_step=first)
        print(f"    {of_peak:.0%} of the matmul peak; eager views would take {of_views:.1%} of the "
              f"time; first step {first:.0f} s")


def benchmark_sizes(figures, parse):
    print("\nTraining step, width 16: does the cost of an image grow?")
    for size, count in ((64, 0), (128, 0), (256, 0), (128, 10_000), (128, 1_000_000)):
        data = random_data(figures.device, 50_000, count)
        work = training_step(parse("--width", 16, "--batch-size", size), data)
        rates = figures.rates(work, size)
        figures.show(f"batches of {size}, {count:,} generated images", "images/s", rates)


def processor(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):  # Linux alone has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.processor()


def benchmark(argv):
    """Speed of every part beside what peers do, in one run; also written to benchmark.json.

    Arguments: options of adainf.py, such as --device cpu."""
    device = adainf.parse_options(argv).device
    batch_size = 512 if device == "cuda" else 128

    def parse(*more):
        words = ["--batch-size", batch_size, "--no-compile", *argv, *more]
        return adainf.parse_options([str(word) for word in words])

    facts = dict(
        processor=processor(device),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        torchvision=torchvision.__version__)
    print(json.dumps(facts))
    figures = Figures(device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in the plain loop too
    data = random_data(device, 3000, 3000)
    options = parse("--amp", "off")
    work = training_step(options, data, plain=True)
    rates = figures.rates(work, options.batch_size, seconds=6)
    adainf.tune_process()  # nothing undoes it, so the plain loop came before

    views_rate = benchmark_views(figures, data)
    benchmark_batches(figures)
    print(f"\nTraining step of {options.batch_size} images; x: times the plain loop")
    plain = figures.show("plain fp32 loop", "images/s", rates)
    benchmark_steps(figures, parse, data, plain, views_rate)
    benchmark_sizes(figures, parse)

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(f"\npeak memory {peak / 1e9:.1f} GB, 3.2 GB of it for a million images")
    record = dict(facts, device=device, figures=figures.kept, peak_memory=peak)
    Path("benchmark.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    commands = dict(theory=theory, stress=stress, benchmark=benchmark)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python test_adainf.py {{{','.join(commands)}}}")
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
