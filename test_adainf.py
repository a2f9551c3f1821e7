"""Tests of adainf.py and download_generated.py: no network but loopback, no files but their own.

    python -m pytest -q                  # all tests
    python test_adainf.py benchmark      # speed of every part beside what peers do, minutes
    python test_adainf.py stress         # kill and resume runs at random moments, minutes
"""
import contextlib
import functools
import hashlib
import http.client
import http.server
import importlib.util
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
import types
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms

import adainf
import download_generated as dg

# ---- Mix the data -------------------------------------------------------------------------------

def core_data(n_real=6, n_generated=30):
    """Images of one pixel: i in image i, which is real and has label i, or is generated."""
    images = torch.arange(n_real + n_generated).byte().view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
    return SimpleNamespace(images=images[:n_real], labels=torch.arange(n_real),
                           generated=images[n_real:])

def core_indices(mixture, step):
    """Which images of core_data make the batch of a step."""
    sample, n_real = mixture.samples(step), len(mixture.data.images)
    return torch.where(sample < mixture.n_repeated, sample % n_real,
                       sample - mixture.n_repeated + n_real)

def core_epoch(mixture, epoch):
    steps = mixture.size // mixture.batch_size
    return torch.cat([core_indices(mixture, epoch * steps + batch) for batch in range(steps)])

@pytest.mark.parametrize("ratio", [0, 1, 3, 10])
def test_an_epoch_has_every_real_image_n_times_and_every_generated_image_once(ratio):
    mixture = adainf.Mixture(core_data(), ratio, batch_size=6, seed=1)
    assert mixture.beta == ratio * 6 / (ratio * 6 + 30)
    epochs = [core_epoch(mixture, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert epoch.bincount(minlength=36).tolist() == [ratio] * 6 + [1] * 30
    for one, other in itertools.combinations(epochs, 2):
        assert not torch.equal(one, other)
    assert not torch.equal(epochs[0], core_epoch(adainf.Mixture(core_data(), ratio, 6, seed=2), 0))

@pytest.mark.parametrize("ratio, beta, steps", [(1, 0.048, 2050), (10, 0.333, 2929)])
def test_mixture_of_the_paper(ratio, beta, steps):
    mixture = adainf.Mixture(core_data(50_000, 1_000_000), ratio, batch_size=512, seed=0)
    assert round(mixture.beta, 3) == beta and mixture.size // 512 == steps

def test_an_incomplete_last_batch_is_dropped_and_not_repeated_or_padded():
    mixture = adainf.Mixture(core_data(), 3, batch_size=7, seed=0)  # of 48 samples 6 are dropped
    epochs = [core_epoch(mixture, epoch) for epoch in range(30)]
    allowed = torch.tensor([3] * 6 + [1] * 30)
    for epoch in epochs:
        assert len(epoch) == 42 and (epoch.bincount(minlength=36) <= allowed).all()
    assert (torch.cat(epochs).bincount(minlength=36) > 0).all()  # not the same ones every time

def test_a_batch_depends_on_seed_and_step_alone():
    """Catches an order drawn only as the epoch grows: a run that goes on asks mid-epoch."""
    steps, mixture = list(range(20)), adainf.Mixture(core_data(), 10, 13, seed=5)
    expected = [mixture.samples(step) for step in steps]
    again = adainf.Mixture(core_data(), 10, 13, seed=5)
    for step in steps[::-1] + steps[::7] + [19, 0, 19]:
        assert torch.equal(again.samples(step), expected[step])

def test_a_batch_has_the_images_and_labels_of_its_indices_and_counts_all_real_ones():
    """Catches a count of one process's real images only, which would weigh its share more."""
    mixture = adainf.Mixture(core_data(), 10, batch_size=8, seed=0)
    for step, share in itertools.product(range(11), [slice(0, 8), slice(0, 3), slice(3, 8)]):
        index = core_indices(mixture, step)
        images, labels, n_labelled = mixture.batch(step, share, torch.device("cpu"))
        assert torch.equal(images, index[share].byte().view(-1, 1, 1, 1).expand(-1, 1, 1, 3))
        assert labels.tolist() == [i if i < 6 else -1 for i in index[share].tolist()]
        assert n_labelled == sum(i < 6 for i in index.tolist())

@pytest.mark.parametrize("ratio", [0, 1, 10])
def test_without_generated_images_the_ratio_changes_nothing(ratio):
    mixture = adainf.Mixture(core_data(12, 0), ratio, batch_size=4, seed=0)
    assert mixture.beta == 1 and mixture.size == 12
    assert core_epoch(mixture, 1).sort().values.tolist() == list(range(12))

def test_a_batch_larger_than_an_epoch_is_refused():
    adainf.Mixture(core_data(), 1, batch_size=36, seed=0)
    with pytest.raises(adainf.InputError, match="batch-size 37"):
        adainf.Mixture(core_data(), 1, batch_size=37, seed=0)

def test_random_streams_of_neighbouring_keys_are_unrelated():
    """Catches seeds such as seed + step, which give (0, 1) and (1, 0) one stream."""
    keys = list(itertools.product(range(5), repeat=3))
    draws = torch.stack([torch.rand(2000, generator=adainf.random_stream("cpu", *k)) for k in keys])
    again = torch.rand(2000, generator=adainf.random_stream("cpu", *keys[7]))
    assert torch.equal(draws[7], again)
    assert draws.corrcoef().triu(1).abs().max() < 6 / 2000 ** 0.5

# ---- Two views: each operation ------------------------------------------------------------------

CORE_IMAGES = torch.cat([  # uint8 24 x 32 x 32 x 3: flat colours (ties of hue), noise, smooth ones
    torch.tensor([[0, 0, 0], [255, 255, 255], [99, 99, 99], [255, 0, 0], [0, 255, 0], [0, 0, 255],
                  [255, 255, 0], [0, 130, 130]]).byte().view(8, 1, 1, 3).expand(8, 32, 32, 3),
    torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)),
    torch.from_numpy(np.stack([
        Image.fromarray(small).resize((32, 32), Image.BICUBIC)
        for small in np.random.default_rng(1).integers(0, 256, (8, 7, 7, 3), np.uint8)]))])
CORE_IMAGES[CORE_IMAGES == 128] = 129  # 128 is solarize's tie, which rounding decides
CORE_OWN = adainf.STRONG | dict(jitter_prob=0.6, jitter=(0.8, 0.4, 1.5, 0.2),
                                solarize_prob=(0.1, 0.3), flip_prob=0.4)

def core_two_views(augmentation=CORE_OWN, n=32):
    return adainf.TwoViews(augmentation, n, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))

CORE_MEAN, CORE_STD = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)

def core_normalised(x):
    return TF.normalize(x, CORE_MEAN.flatten(), CORE_STD.flatten())

def core_float(images):
    return images.permute(0, 3, 1, 2).float() / 255

CORE_PIL = [Image.fromarray(image.numpy()) for image in CORE_IMAGES]

def core_tensor(pil_images):
    return torch.stack([TF.to_tensor(image) for image in pil_images])

def core_parameters(rows, **changes):
    """Parameters of `rows` views that change nothing but what `changes` (1 or `rows` rows) say."""
    parameters = dict(
        start=[[0, 0]], length=[[32, 32]], flip=[[False]], kind=[[0, 1, 2]], before=[[True] * 3],
        factor=[[1., 1., 1.]], hue=[[0.]], gray=[[False]], solarize=[[False]], blur=[[0]]) | changes
    return {name: torch.as_tensor(value).expand(rows, -1) for name, value in parameters.items()}

def core_jitter(order, factors, turns):
    """Parameters that order 0, 1, 2 (brightness, contrast, saturation) and 3 (hue) so."""
    kind = [each for each in order if each < 3]
    return dict(kind=[kind], before=[[order.index(each) < order.index(3) for each in kind]],
                factor=[[factors[each] for each in kind]], hue=[[turns]])

def core_view(images, **changes):
    return core_two_views().apply(images, core_parameters(len(images), **changes))

CORE_COLOUR = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)

def core_colour(x, order, factors, turns):
    for each in order:
        x = CORE_COLOUR[each](x, [*factors, turns][each])
    return x

CORE_BICUBIC = TF.InterpolationMode.BICUBIC

@pytest.mark.parametrize("box", [(3, 7, 20, 9), (0, 0, 31, 32), (11, 0, 1, 1), (31, 31, 1, 1),
                                 (0, 30, 32, 2), (5, 4, 26, 27)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_equal_torchvisions(box, flip):
    """Catches pixels from outside the box, swapped axes, half a pixel off, a flip before it."""
    view = core_view(CORE_IMAGES, start=[box[:2]], length=[box[2:]], flip=[[flip]])
    view = TF.hflip(view) if flip else view
    exact = TF.resized_crop(core_float(CORE_IMAGES), *box, [32, 32], CORE_BICUBIC, antialias=True)
    assert (view - exact.clamp(0, 1)).abs().max() < 1e-4
    pil = [TF.resized_crop(image, *box, [32, 32], CORE_BICUBIC) for image in CORE_PIL]
    assert (view - core_tensor(pil)).abs().mean() < 0.5 / 255

@pytest.mark.parametrize("operation, changes, expected", [
    ("nothing", {}, lambda x: x),
    *[(CORE_COLOUR[kind].__name__, core_jitter(range(4), factors, turns),
       functools.partial(core_colour, order=[kind], factors=factors, turns=turns))
      for kind, factors, turns in [
          *[(kind, [factor if each == kind else 1. for each in range(3)], 0.)
            for kind in range(3) for factor in (0., 0.2, 1.8)],
          *[(3, [1.] * 3, turns) for turns in (-0.5, -0.2, 0.1, 0.5)]]],
    ("grayscale", dict(gray=[[True]]), lambda x: TF.rgb_to_grayscale(x, 3)),
    ("solarize", dict(solarize=[[True]]), lambda x: TF.solarize(x, 128 / 255)),
])
def test_colour_operation_equals_torchvisions(operation, changes, expected):
    view = core_view(CORE_IMAGES, **changes)
    assert (view - expected(core_float(CORE_IMAGES))).abs().max() < 2e-5

def test_every_view_has_its_own_order_of_the_four_colour_operations():
    """All 24 in one batch, after a crop. Catches one order for a batch, contrast's mean of an image
    before other operations, values that leave 0..1 between two operations."""
    stream = np.random.default_rng(0)
    jitters = [(order, stream.uniform(0.2, 1.8, 3).tolist(), stream.uniform(-0.5, 0.5))
               for order in itertools.permutations(range(4))]
    crop = dict(start=[[3, 7]], length=[[20, 9]])
    rows = [core_parameters(24, **crop, **core_jitter(*jitter)) for jitter in jitters]
    parameters = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    views = core_two_views().apply(CORE_IMAGES.repeat(24, 1, 1, 1), parameters).split(24)
    cropped = TF.resized_crop(core_float(CORE_IMAGES), 3, 7, 20, 9, [32, 32], CORE_BICUBIC,
                              antialias=True).clamp(0, 1)
    for view, jitter in zip(views, jitters):
        assert (view - core_colour(cropped, *jitter)).abs().max() < 3e-5

@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.8, 1.0, 1.4142135, 1.7, 2.0])
def test_blur_equals_pils(sigma):
    """Catches a true Gaussian, sigma taken for a box radius, zeros instead of repeated edges."""
    matrix = adainf.blur_matrices(torch.tensor([0.7, sigma, 1.9]), 32)[1]  # all have one reach
    torch.testing.assert_close(matrix.sum(1), torch.ones(32))
    blurred = matrix @ core_float(CORE_IMAGES) @ matrix.T
    pil = [image.filter(ImageFilter.GaussianBlur(sigma)) for image in CORE_PIL]
    error = (blurred - core_tensor(pil)).abs() * 255
    assert error.mean() < 0.6 and error.max() < 3.01  # Pillow rounds six times, by up to half

@pytest.mark.parametrize("level", [1, 2, 100, 256])
def test_blur_of_a_view_is_that_of_its_sigma(level):
    """Catches a table that is off by a level, or blurs along one axis."""
    [matrix] = adainf.blur_matrices(torch.tensor([0.1 + 1.9 * (level - 0.5) / 256]), 32)
    expected = matrix @ core_float(CORE_IMAGES) @ matrix.T
    assert (core_view(CORE_IMAGES, blur=[[level]]) - expected).abs().max() < 2e-5

def test_views_are_normalised_channels_last_and_all_first_views_come_first():
    """Catches interleaved views (a1 a2 b1 b2), which NT-Xent would take for other pairs."""
    only_solarize = dict.fromkeys(adainf.STRONG, 0.0) | dict(
        crop_min=1.0, jitter=(0.0,) * 4, solarize_prob=(0.0, 1.0))
    views = adainf.TwoViews(only_solarize, 32, CORE_MEAN, CORE_STD)(CORE_IMAGES, core_uniform(24))
    assert views.dtype == torch.float32 and views.shape == (48, 3, 32, 32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    x = core_float(CORE_IMAGES)
    assert (views - core_normalised(torch.cat([x, TF.solarize(x, 128 / 255)]))).abs().max() < 1e-5

# ---- Two views: their distributions -------------------------------------------------------------

def core_uniform(images, seed=0):
    shape = 2, images, adainf.TwoViews.DRAWS
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

def core_draws(views=100_000, **changes):
    return core_two_views(CORE_OWN | changes).draw(core_uniform(views // 2))

def core_factors(parameters):
    """M x 3 factors of brightness, contrast, saturation, and M x 4 places of these and hue."""
    kind, before = parameters["kind"], parameters["before"]
    factor = torch.zeros(kind.shape).scatter_(1, kind, parameters["factor"])
    place = torch.zeros_like(kind).scatter_(1, kind, torch.arange(3) + ~before)
    return factor, torch.cat([place, before.sum(1, keepdim=True)], dim=1)

def core_same_distribution(one, other):
    """Two-sample Kolmogorov-Smirnov test: equal samples fail with a probability below 1e-6."""
    values = np.concatenate([one, other])
    below = [np.searchsorted(np.sort(x), values, "right") / len(x) for x in (one, other)]
    return np.abs(below[0] - below[1]).max() < 2.7 * math.sqrt(1 / len(one) + 1 / len(other))

@pytest.mark.parametrize("crop_min", [0.08, 0.2])
def test_boxes_are_distributed_as_torchvisions(crop_min):
    """Catches a uniform aspect (not its log), one try instead of ten, corners that go together."""
    torch.manual_seed(0)
    sampler, image = torchvision.transforms.RandomResizedCrop.get_params, torch.zeros(3, 32, 32)
    expected = np.array([sampler(image, (crop_min, 1.0), (3 / 4, 4 / 3)) for _ in range(20_000)]).T
    p = core_draws(crop_min=crop_min)
    boxes = torch.cat([p["start"], p["length"]], dim=1).numpy().T
    statistics = {"area": lambda t, l, h, w: h * w, "aspect": lambda t, l, h, w: h / w,
                  "diagonal": lambda t, l, h, w: t - l, "bottom": lambda t, l, h, w: t + h,
                  "centre": lambda t, l, h, w: t + l, "right": lambda t, l, h, w: l + w,
                  "top": lambda t, l, h, w: t, "left": lambda t, l, h, w: l,
                  "height": lambda t, l, h, w: h, "width": lambda t, l, h, w: w}
    for name, statistic in statistics.items():
        assert core_same_distribution(statistic(*boxes), statistic(*expected)), name

def test_factors_are_distributed_as_torchvisions_when_there_is_jitter_and_else_do_nothing():
    """Catches a factor of another operation or below 0, a hue tied to the coin of jitter."""
    torch.manual_seed(0)
    jitter = torchvision.transforms.ColorJitter(*CORE_OWN["jitter"])
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    expected = np.array([jitter.get_params(*ranges)[1:] for _ in range(20_000)]).T
    p = core_draws()
    draws = torch.cat([core_factors(p)[0], p["hue"]], dim=1)
    jittered = (draws != torch.tensor([1, 1, 1, 0])).any(1)
    assert abs(jittered.double().mean() - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 100_000)
    for name, one, other in zip("bcsh", draws[jittered].numpy().T, expected):
        assert core_same_distribution(one, other), name

def test_the_order_of_the_colour_operations_is_uniform():
    _, place = core_factors(core_draws())
    assert (place.sort(1).values == torch.arange(4)).all()
    count = (place @ torch.tensor([64, 16, 4, 1])).bincount()
    count = count[count > 0].double()
    assert len(count) == 24
    assert ((count - 100_000 / 24) ** 2 / (100_000 / 24)).sum() < 70  # chi^2, 23 degrees: p < 2e-6

def test_probabilities_are_those_of_the_recipe_in_each_view():
    p = core_draws()
    for name, happened, probabilities in [
            ("flip", p["flip"], (0.4, 0.4)), ("gray", p["gray"], (0.2, 0.2)),
            ("blur", p["blur"] > 0, (0.5, 0.5)), ("solarize", p["solarize"], (0.1, 0.3))]:
        for view, share in zip(happened.double().view(2, -1), probabilities):
            assert abs(view.mean() - share) < 4 * math.sqrt(share * (1 - share) / len(view)), name

def test_sigma_is_uniform_over_all_levels():
    """Catches a sigma that hangs on the coin of blur, and levels that are never drawn."""
    level = core_draws()["blur"]
    count = level[level > 0].bincount(minlength=257)[1:].double()
    assert len(count) == 256
    assert ((count - count.mean()) ** 2 / count.mean()).sum() < 255 + 5 * math.sqrt(2 * 255)

def test_parameters_of_a_view_and_of_other_views_are_independent():
    """Catches one random number for two parameters, for both views, or for neighbouring images."""
    p = core_draws(views=200_000)
    corner = (p["start"] + 0.5) / (33 - p["length"])  # its mean is 0.5 for boxes of any size
    sigma = torch.where(p["blur"] > 0, p["blur"] - 128.5, 0)
    factor, place = core_factors(p)
    area = p["length"].prod(1, keepdim=True)
    first, second = torch.cat([area, corner, p["flip"], factor, p["hue"], place[:, 3:], p["gray"],
                               p["solarize"], p["blur"] > 0, sigma], 1).double().split(100_000)
    related = torch.cat([first, second, first.roll(1, 0)], dim=1).T.corrcoef()
    assert related.triu(1).abs().max() < 5.5 / math.sqrt(100_000)

def test_when_no_box_fits_the_view_is_the_whole_image():
    p = core_draws(views=1000, crop_min=1.0)
    assert (p["start"] == 0).all() and (p["length"] == 32).all()

@pytest.mark.parametrize("n, crop_min", [(32, 0.08), (8, 1e-3)])
def test_the_ends_of_the_uniform_distribution_give_valid_parameters(n, crop_min):
    """Catches a box past the edge, a box of no pixels, a level of blur past the table."""
    uniform = core_uniform(500).round() * (1 - 2 ** -24)
    uniform[:, 0], uniform[:, 1] = 0, 1 - 2 ** -24
    views = core_two_views(CORE_OWN | dict(crop_min=crop_min), n)
    p = views.draw(uniform)
    assert p["start"].min() >= 0 and p["length"].min() >= 1
    assert (p["start"] + p["length"]).max() <= n
    assert p["blur"].min() == 0 and p["blur"].max() == 256 and p["hue"].abs().max() <= 0.2 + 1e-6
    factor = core_factors(p)[0] - torch.tensor([1.0, 1.0, 1.25])
    assert (factor.abs() <= torch.tensor([0.8, 0.4, 1.25]) + 1e-6).all()
    out = views.apply(CORE_IMAGES[8:9, :n, :n].expand(1000, -1, -1, -1), p)
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6

def test_every_view_of_every_image_has_draws_of_its_own():
    """Catches one draw for a whole batch, or for both views of an image."""
    same = CORE_IMAGES[10:11].expand(64, -1, -1, -1)
    views = core_two_views(adainf.STRONG)(same, core_uniform(64)).flatten(1)
    distance = torch.cdist(views, views) + torch.eye(128) * 99
    assert distance.min() > 1e-2

def test_whole_views_equal_a_chain_of_pil_operations():
    """Catches a wrong order: crop, jitter, grayscale, blur, solarize, flip."""
    two_views, uniform = core_two_views(), core_uniform(24)
    p, views = two_views.draw(uniform), two_views(CORE_IMAGES, uniform)
    factors, places = core_factors(p)
    expected = []
    for i, image in enumerate(CORE_PIL * 2):
        box, order = torch.cat([p["start"][i], p["length"][i]]).tolist(), places[i].argsort()
        image = TF.resized_crop(image, *box, [32, 32], CORE_BICUBIC)
        image = core_colour(image, order, factors[i].tolist(), p["hue"][i].item())
        image = TF.to_grayscale(image, 3) if p["gray"][i] else image
        if level := p["blur"][i].item():
            image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * (level - 0.5) / 256))
        image = TF.solarize(image, 128) if p["solarize"][i] else image
        expected.append(TF.hflip(image) if p["flip"][i] else image)
    errors = (views - core_tensor(expected)).abs().mean((1, 2, 3)) * 255
    assert errors.mean() < 1.5 and errors.max() < 8  # Pillow's hue has 256 levels

@pytest.mark.parametrize("strength, crop_min, jitter_prob, jitter", [
    ("strong", 0.08, 0.8, (0.8, 0.8, 0.8, 0.2)), ("weak", 0.2, 0.4, (0.4, 0.4, 0.4, 0.1))])
def test_recipes_are_the_papers(strength, crop_min, jitter_prob, jitter):
    recipe = adainf.RECIPES[strength]
    assert recipe == dict(crop_min=crop_min, jitter_prob=jitter_prob, jitter=jitter, gray_prob=0.2,
                          blur_prob=0.5, solarize_prob=(0, 0), flip_prob=0.5)

@pytest.mark.parametrize("line, strength, own", [
    ("", "strong", {}), ("--gen-data x --ratio 1", "weak", {}), ("--aug weak", "weak", {}),
    ("--aug strong --gen-data x", "strong", {}), ("--crop-min .5", "strong", dict(crop_min=0.5)),
    ("--jitter .4 .4 .2 .1", "strong", dict(jitter=[0.4, 0.4, 0.2, 0.1])),
    ("--jitter-prob 0 --blur-prob 0", "strong", dict(jitter_prob=0.0, blur_prob=0.0)),
    ("--gray-prob 1 --flip-prob 0 --aug weak", "weak", dict(gray_prob=1.0, flip_prob=0.0)),
    ("--solarize-prob 0.2", "strong", dict(solarize_prob=[0.2])),
    ("--solarize-prob 0 0.2 --gen-data x", "weak", dict(solarize_prob=[0.0, 0.2]))])
def test_augmentation_is_weak_with_generated_data_and_the_users_values_win(line, strength, own):
    """Catches an override of 0 that counts as none, and a choice that is not explained."""
    options = adainf.build_parser().parse_args(line.split())
    augmentation, why = adainf.choose_augmentation(options)
    assert augmentation == adainf.RECIPES[strength] | own
    assert strength in why and all(f"--{name.replace('_', '-')}" in why for name in own)

# ---- Model and loss -----------------------------------------------------------------------------

def core_nt_xent(projections, temperature):
    """The definition as a double loop over views i and candidates k, in float64."""
    z = [row / row.norm() for row in projections.double()]
    total = 0
    for i in range(len(z)):
        scores = {k: (z[i] @ z[k] / temperature).exp() for k in range(len(z)) if k != i}
        total -= (scores[(i + len(z) // 2) % len(z)] / sum(scores.values())).log()
    return total / len(z)

@pytest.mark.parametrize("images", [2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_nt_xent_and_its_gradient_equal_a_double_loop(images, temperature):
    """Catches a view as its own candidate, candidates of the other view only, wrong pairs."""
    projections = 3 * torch.randn(2 * images, 5, generator=torch.Generator().manual_seed(0))
    one, other = projections.clone().requires_grad_(), projections.double().requires_grad_()
    loss, expected = adainf.nt_xent(one, temperature), core_nt_xent(other, temperature)
    loss.backward(), expected.backward()
    assert abs(loss - expected) < 1e-5 and (one.grad - other.grad).abs().max() < 1e-5

@pytest.mark.parametrize("images", [1, 2, 32])
def test_nt_xent_of_equal_views_is_ln_of_the_candidates(images):
    loss = adainf.nt_xent(torch.ones(2 * images, 4), 0.2)
    assert math.isclose(loss, math.log(2 * images - 1), abs_tol=1e-5)

def test_nt_xent_ignores_the_order_of_images_and_the_length_of_projections_and_is_fp32():
    z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = adainf.nt_xent(z.flatten(0, 1), 0.2)
    assert loss.dtype == torch.float32 and loss == adainf.nt_xent(z.float().flatten(0, 1), 0.2)
    other = z[:, torch.randperm(6, generator=torch.Generator().manual_seed(1))] * 8
    torch.testing.assert_close(adainf.nt_xent(other.flatten(0, 1), 0.2), loss)

def test_probe_loss_without_a_real_image_is_zero_with_a_zero_gradient():
    logits = torch.randn(8, 3, requires_grad=True)
    loss = adainf.probe_loss(logits, torch.full((4,), -1), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()  # nan would be unequal

def test_probe_loss_is_the_mean_cross_entropy_of_the_real_images_two_views():
    """Catches a mean over all images, which would shrink with the share of real ones."""
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits[[0, 3, 4, 7]], torch.tensor([2, 1, 2, 1]))
    loss = adainf.probe_loss(logits, torch.tensor([2, -1, -1, 1]), torch.tensor(2))
    torch.testing.assert_close(loss, expected)

def core_simclr(**more):
    torch.manual_seed(0)
    return adainf.SimCLR(SimpleNamespace(**dict(
        width=8, stem_padding=1, proj_hidden=16, proj_dim=4) | more), classes=3)

def test_the_probe_only_watches():
    """Catches labels that reach the backbone."""
    model, labels = core_simclr(), torch.tensor([0, 1, 2, -1])
    projections, logits = model(torch.randn(8, 3, 8, 8))
    adainf.probe_loss(logits, labels, torch.tensor(3)).backward(retain_graph=True)
    def touched():
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched() == {"probe"}
    model.zero_grad()
    adainf.nt_xent(projections, 0.2).backward()
    assert touched() == {"backbone", "projector"}

def test_the_projector_is_simclrs_with_two_layers_and_no_batch_norm():
    options = adainf.build_parser().parse_args([])
    with torch.device("meta"):
        projector = adainf.SimCLR(options, 10).projector
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    assert sorted(shapes.values()) == [(256,), (256, 2048), (2048,), (2048, 512)]
    assert [type(layer).__name__ for layer in projector] == ["Linear", "ReLU", "Linear"]

def core_torchvision(randomise):
    """torchvision's resnet18 with the small stem, no pooling after it, no classifier; float64."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = model.fc = torch.nn.Identity()
    for name, value in model.state_dict().items() if randomise else ():
        if "bn" in name or "downsample.1" in name:
            value.copy_(value + torch.rand(value.shape))
    return model.double()

def test_the_resnet_has_torchvisions_names_and_shapes():
    ours, theirs = adainf.ResNet18().state_dict(), torchvision.models.resnet18().state_dict()
    assert list(ours) == [name for name in theirs if not name.startswith("fc.")]
    assert all(ours[name].shape == theirs[name].shape for name in ours if name != "conv1.weight")
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)

def test_the_resnet_starts_from_torchvisions_distribution():
    ours, theirs = adainf.ResNet18().state_dict(), core_torchvision(randomise=False).state_dict()
    for name, value in ours.items():
        if "conv" not in name and "downsample.0" not in name:
            assert torch.equal(value.double(), theirs[name].double()), name
        elif name != "conv1.weight":
            assert abs(value.std() / theirs[name].std() - 1) < 0.03, name

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("from_torchvision", [True, False])
def test_the_resnet_computes_what_torchvisions_does(training, from_torchvision):
    """Catches a ReLU or batch norm out of place; weights go either way, running statistics too."""
    theirs, ours = core_torchvision(randomise=True), adainf.ResNet18().double()
    source, target = (theirs, ours) if from_torchvision else (ours, theirs)
    target.load_state_dict(source.state_dict())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        features, expected = ours.train(training)(images), theirs.train(training)(images)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10, msg=name)

@pytest.mark.parametrize("padding, sizes", [(1, [32, 16, 8, 4]), (2, [34, 17, 9, 5])])
def test_stem_padding_decides_the_size_of_the_feature_maps(padding, sizes):
    backbone, seen = adainf.ResNet18(width=8, stem_padding=padding), []
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 64) and seen == sizes

def test_load_encoder_gives_back_the_backbone_whatever_its_width(tmp_path):
    backbone, images = core_simclr(width=4).backbone, torch.randn(5, 3, 16, 16)
    backbone(images)  # moves the running statistics
    torch.save(backbone.state_dict(), tmp_path / "encoder.pt")
    loaded = adainf.load_encoder(tmp_path / "encoder.pt")
    assert not loaded.training and torch.equal(loaded(images), backbone.eval()(images))
    (tmp_path / "encoder.pt").write_bytes(b"no weights")
    with pytest.raises(adainf.InputError, match="encoder.pt"):
        adainf.load_encoder(tmp_path / "encoder.pt")

# ---- Optimiser ----------------------------------------------------------------------------------

def test_lars_equals_its_formulas_written_out():
    """Catches lr inside the buffer, no clipping, decay or trust for biases, groups mixed up."""
    stream = np.random.default_rng(0)
    shapes, decays = [(4, 3, 3, 3), (5,), (6, 4), (2, 6), (2,)], [1e-2, 1e-2, 1e-2, 0.0, 0.0]
    expected, buffers = [stream.normal(size=shape) for shape in shapes], [0.0] * 5
    tensors = [torch.nn.Parameter(torch.tensor(value)) for value in expected]
    optimizer = adainf.LARS([dict(params=tensors[:3], lr=0.4, decay=1e-2),
                             dict(params=tensors[3:], lr=0.1, decay=0.0)], momentum=0.8)
    clipped = set()
    for step, scale in enumerate([1, 1e-3, 30, 0, 1e-2, 1, 0.1]):
        rates = [0.4 / (1 + step)] * 3 + [0.1 * (1 + step)] * 2
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rates[0], rates[-1]
        for i, (lr, decay) in enumerate(zip(rates, decays)):
            p, g = expected[i], scale * stream.normal(size=shapes[i])
            tensors[i].grad, d = torch.tensor(g), g
            if p.ndim > 1:
                size, slope = math.sqrt((p ** 2).sum()), math.sqrt((g ** 2).sum())
                ratio = 0.02 * size / (slope + decay * size + 1e-8) / lr
                clipped.add(ratio > 1)
                d = (g + decay * p) * min(ratio, 1)
            buffers[i] = 0.8 * buffers[i] + d
            expected[i] = p - lr * buffers[i]
        optimizer.step()
        for tensor, value in zip(tensors, expected):
            np.testing.assert_allclose(tensor.detach().numpy(), value, rtol=1e-11, atol=1e-13)
    assert clipped == {True, False}

@pytest.mark.parametrize("steps, warmup", [(100, 10), (100, 0), (1000, 999), (7, 1)])
def test_the_learning_rate_is_torchs_linear_warmup_and_cosine(steps, warmup):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    parts = [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps - warmup)]
    if warmup:
        parts.insert(0, torch.optim.lr_scheduler.LinearLR(sgd, 3e-5 / 0.4, total_iters=warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(sgd, parts, [warmup][:len(parts) - 1])
    for step in range(steps):
        rate = adainf.learning_rate(step, steps, warmup, 0.4)
        assert rate == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-6, abs=1e-9), step
        sgd.step(), schedule.step()

def test_the_learning_rate_at_its_corners():
    """Catches a schedule that counts epochs, jumps after warm-up or does not end at 0."""
    rate = functools.partial(adainf.learning_rate, steps=100_000, warmup=1000, peak=0.4)
    corners = {0: 3e-5, 500: (0.4 + 3e-5) / 2, 1000: 0.4, 50_500: 0.2, 100_000: 0}
    assert {step: rate(step) for step in corners} == pytest.approx(corners, abs=1e-12)
    rates = [rate(step) for step in range(0, 100_001, 10)]
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.0041
    assert adainf.learning_rate(0, 10, 0, 0.4) == 0.4
    assert adainf.learning_rate(9, 10, 10, 0.4) == pytest.approx(0.36, abs=1e-4)  # all warm-up
    assert adainf.learning_rate(10, 10, 10, 0.4) == 0.4

# ---- Evaluation ---------------------------------------------------------------------------------

def core_clusters(count, classes=4, features=8, spread=0.05, seed=0):
    """Features around the axes, and labels: one axis a class."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, features, generator=stream)
    return F.one_hot(labels, features) + spread * noise, labels

@pytest.mark.parametrize("mode", [True, False])
def test_encode_uses_eval_mode_and_leaves_the_backbone_as_it_was(mode):
    """Catches batch-norm statistics that drift while a frozen backbone is evaluated."""
    backbone, stream = core_simclr().backbone.train(mode), torch.Generator().manual_seed(0)
    backbone.bn1.running_mean += 0.3
    images = torch.randint(256, (1003, 8, 8, 3), generator=stream).byte()  # more than one chunk
    data = SimpleNamespace(mean=CORE_MEAN, std=CORE_STD)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = adainf.encode(backbone, images, data, contextlib.nullcontext())
    assert all(module.training == mode for module in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with torch.no_grad():
        expected = backbone.eval()(core_normalised(core_float(images)))
    assert features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)

def test_top1_is_a_percentage():
    scores = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [-1.0, -2.0]])
    assert adainf.top1(scores, torch.tensor([1, 0, 0, 0])) == 75.0

def core_knn(train, train_labels, test, k, temperature):
    """Predictions of a naive loop over test images and all their neighbours, in float64."""
    predictions = []
    for row in test.double():
        cosines = [(row @ t / row.norm() / t.norm()).item() for t in train.double()]
        votes = [0.0] * (int(train_labels.max()) + 1)
        for cosine, label in sorted(zip(cosines, train_labels.tolist()), reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        predictions.append(votes.index(max(votes)))
    return torch.tensor(predictions)

@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.07), (20, 0.1), (20, 1.0), (1000, 0.1)])
def test_knn_predicts_what_a_naive_loop_predicts(k, temperature):
    """Catches distances instead of cosines, unweighted votes, k beyond the training set."""
    stream = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 6, generator=stream), torch.randn(520, 6, generator=stream)
    train, labels = train * torch.rand(60, 1, generator=stream) * 9, torch.arange(60) % 3
    predicted = core_knn(train, labels, test, k, temperature)
    assert adainf.knn_top1(train, labels, test, predicted, k, temperature) == 100.0
    assert adainf.knn_top1(train, labels, test, (predicted + 1) % 3, k, temperature) == 0.0

def test_knn_knows_clusters():
    """Catches a number of classes that is counted in the test images."""
    train, (test, labels) = core_clusters(100), core_clusters(60, seed=1)
    for rows in (labels >= 0, labels == 1):
        assert adainf.knn_top1(*train, test[rows], labels[rows], k=200, temperature=0.1) == 100.0

def test_knn_at_a_low_temperature_is_the_nearest_neighbour():
    """Catches votes that all underflow to 0, which elects the first class."""
    train, test = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8]])
    assert adainf.knn_top1(train, torch.tensor([0, 1]), test, torch.tensor([1]), 2, 1e-3) == 100.0

def test_the_linear_probe_separates_clusters_whatever_the_scale_of_a_feature():
    """Catches a probe that does not standardise, or does it by the test images' statistics."""
    scale, shift = torch.logspace(-3, 3, 8), torch.linspace(-50, 50, 8)
    train, test = ((features * scale + shift * scale, labels)
                   for features, labels in (core_clusters(400), core_clusters(100, seed=1)))
    for rows in (test[1] >= 0, test[1] == 1):
        some = test[0][rows], test[1][rows]
        assert adainf.linear_top1(*train, *some, epochs=30, lr=0.1, seed=0) == 100.0

def test_the_linear_probe_is_at_chance_on_noise():
    """Catches a probe that has seen the test images: it learns noise by heart."""
    stream = torch.Generator().manual_seed(0)
    features, labels = torch.randn(1200, 300, generator=stream), torch.arange(1200) % 4
    train, test = ((features[rows], labels[rows]) for rows in (slice(1000), slice(1000, None)))
    sigma = 100 * math.sqrt(0.25 * 0.75 / 200)
    assert abs(adainf.linear_top1(*train, *test, epochs=20, lr=0.1, seed=0) - 25) < 4 * sigma
    assert adainf.linear_top1(*train, *train, epochs=20, lr=0.1, seed=0) > 60

# ---- A tiny data set and runs on it --------------------------------------------------------------

RUNS_CLOCK = {"seconds_left", "images_per_second"}  # what may differ between equal runs

def runs_write_data(folder):
    """Three classes of 12 + 6 images of 16 x 16 pixels, told apart by colour, and 24 generated."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in enumerate("abc"):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                blocks = draw.integers(0, 150, 3) + draw.integers(0, 50, (4, 4, 3))
                blocks += 55 * (np.arange(3) == label)
                image = Image.fromarray(blocks.repeat(4, 0).repeat(4, 1).astype(np.uint8))
                image.save(folder / "images" / split / name / f"{index}.png")
    for name in ("gen", "other"):
        image = draw.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", image=image, label=np.zeros(24, np.int64))
    return folder

def runs_argv(data, out, *more):
    """24 steps of 8 images, 7 to an epoch; checkpoints, log lines and evaluations out of step."""
    return [*f"""--dataset {data}/images --gen-data {data}/gen.npz --ratio 1 --image-size 16
            --width 2 --proj-hidden 8 --proj-dim 4 --batch-size 8 --steps 24 --warmup-steps 3
            --log-every 4 --save-every 5 --eval-every 8 --linear-epochs 2 --device cpu --amp off
            --lr 0.001 --probe-lr 0.001""".split(), "--out", str(out), *map(str, more)]

def runs_flat(value, path=""):
    """{path: bytes or number} of everything in nested dicts and lists of tensors and numbers."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in items for k, v in runs_flat(part, f"{path}/{name}").items()}
    return {path: value.contiguous().numpy().tobytes() if torch.is_tensor(value) else value}

def runs_log(folder):
    """The records of a log that must not depend on how often the run was stopped."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in RUNS_CLOCK}
            for record in records if record["event"] != "start"]

def runs_outcome(folder):
    """All that a run leaves, clocks aside: weights, optimizer, log, encoder, result."""
    def load(name):
        content = torch.load(folder / name, weights_only=True)
        content.pop("lines", None)  # those of the log, with clocks
        return content
    result = json.loads((folder / "result.json").read_text())
    result = {name: value for name, value in result.items() if name not in RUNS_CLOCK}
    return runs_flat(dict(checkpoint=load("checkpoint.pt"), encoder=load("encoder.pt"),
                          result=result, log=runs_log(folder)))

def runs_assert_same(folder, reference):
    outcome = runs_outcome(folder)
    assert not [path for path in outcome | reference if outcome.get(path) != reference.get(path)]

def runs_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

class runs_Keeper(dict):
    """Stands for a model, an optimizer or a scaler: takes any state."""
    load_state_dict = dict.update

def runs_checkpoint(folder):
    """The newest whole checkpoint, as adainf.load_checkpoint hands it out."""
    parts = {name: runs_Keeper() for name in ("model", "optimizer", "scaler")}
    step, lines, _ = adainf.load_checkpoint(folder, parts)
    return {"step": step, "lines": lines, **{name: dict(part) for name, part in parts.items()}}

def runs_call(monkeypatch, place, count, action):
    """Run action() at the count-th call (from 1) of a function of adainf or another module."""
    module, name = place
    real, calls = getattr(module, name), itertools.count(1)
    def counting(*arguments, **more):
        if next(calls) == count:
            action()
        return real(*arguments, **more)
    monkeypatch.setattr(module, name, counting)

def runs_signal_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of the step that follows `step` others."""
    runs_call(monkeypatch, (adainf, "sum_gradients"), step, lambda: signal.raise_signal(number))

@pytest.fixture(scope="session")
def runs_data(tmp_path_factory):
    return runs_write_data(tmp_path_factory.mktemp("data"))

@pytest.fixture
def runs_main(runs_data, capsys, monkeypatch):
    """main() on the tiny data, in this process: run(out, *options, status=0)."""
    def run(out, *more, status=0):
        capsys.readouterr()
        try:
            result, code = adainf.main(runs_argv(runs_data, out, *more)), 0
        except SystemExit as stop:
            result, code = None, stop.code
        said = capsys.readouterr()
        assert code == status, said
        assert len(said.err.splitlines()) == (status in (1, 2)) and "Traceback" not in said.err
        return SimpleNamespace(result=result, out=said.out, err=said.err)
    monkeypatch.setattr(adainf, "write_figure", lambda *_: None)  # slow, and tested once
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # fastest for tiny tensors
    yield run
    torch.set_num_threads(threads)

@pytest.fixture(scope="session")
def runs_reference(runs_data, tmp_path_factory):
    """The outcome of a run that nothing stopped, for each --amp."""
    def outcome(amp="off", known={}):
        if amp not in known:
            out, threads = tmp_path_factory.mktemp("straight"), torch.get_num_threads()
            torch.set_num_threads(1)
            adainf.main(runs_argv(runs_data, out, "--amp", amp))
            torch.set_num_threads(threads)
            known[amp] = runs_outcome(out)
        return known[amp]
    return outcome

# ---- Processes of their own ----------------------------------------------------------------------
# They are forked from a server that has imported everything and computed nothing: 0.1 s each.

RUNS_FORK = multiprocessing.get_context("forkserver")
RUNS_FORK.set_forkserver_preload(["adainf", "matplotlib.figure", __name__])

def runs_child(output, environment, work, *arguments):
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    adainf.RANK, adainf.WORLD = (int(environment.get(*each)) for each in (
        ("RANK", 0), ("WORLD_SIZE", 1)))  # read at import, which was in the server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    torch.set_num_threads(1)
    adainf.write_figure = lambda *_: None
    work(*arguments)

def runs_start(output, work, *arguments, **environment):
    process = RUNS_FORK.Process(target=runs_child, daemon=True,
                                args=(str(output), environment, work, *arguments))
    process.start()
    return process

def runs_end(*processes, seconds=60):
    """The exit statuses of processes, -9 for a killed one; none may hang."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "hangs"
    return codes

def runs_start_world(output, world, work, *arguments):
    """The same work in `world` processes, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [runs_start(f"{output}{rank}", work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank),
                       WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            for rank in range(world)]

def runs_faulty_main(argv, module, name, count, number, only_rank=None):
    """main(argv) in a process that gets a signal at the count-th call of module.name."""
    if only_rank in (None, os.environ.get("RANK")):
        place = {"os": os, "adainf": adainf}[module], name
        runs_call(pytest.MonkeyPatch(), place, count, lambda: signal.raise_signal(number))
    adainf.main(argv)

# ---- Files and results ---------------------------------------------------------------------------

def test_runs_import_has_no_side_effect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    def state():
        handlers = [signal.getsignal(getattr(signal, n)) for n in ("SIGINT", "SIGTERM", "SIGUSR1")]
        return (torch.get_rng_state().tolist(), torch.get_num_threads(),
                torch.cuda.is_initialized(),
                torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, handlers,
                dict(os.environ), sys.argv, os.listdir())
    before = state()
    spec = importlib.util.spec_from_file_location("adainf_again", adainf.__file__)
    module = sys.modules["adainf_again"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["adainf_again"]
    assert state() == before and "DataLoader" not in Path(adainf.__file__).read_text()

def test_runs_dry_run_writes_all_files_and_the_encoder_is_torchvisions(runs_data, tmp_path, capsys):
    out = tmp_path / "run"
    result = adainf.main(runs_argv(runs_data, out, "--dry-run", "--width", 64))
    assert {path.name for path in out.iterdir()} - {"checkpoint.prev.pt"} == {
        "config.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "views.png", "curves.png",
        "result.json"}
    assert result == json.loads((out / "result.json").read_text()) and {
        "online_top1", "linear_top1", "knn_top1", "beta", "steps", "images_per_second", "seed"
        } <= {*result}
    assert (result["steps"], result["seed"], result["beta"]) == (1, 0, 36 / 60)
    start, *lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"argv", "versions", "device", "script"} <= {*start} and start["event"] == "start"
    assert [line["event"] for line in lines] == ["evaluation", "training", "evaluation"]
    for name in ("views.png", "curves.png"):
        assert Image.open(out / name).size > (200, 100)

    theirs = torchvision.models.resnet18()
    weights = torch.load(out / "encoder.pt", weights_only=True)
    stem = weights.pop("conv1.weight")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and {*missing} == {"conv1.weight", "fc.weight", "fc.bias"}
    theirs.maxpool = theirs.fc = nn.Identity()
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1)
    theirs.conv1.weight.data, theirs.conv1.bias = stem, None
    encoder, images = adainf.load_encoder(out / "encoder.pt"), torch.rand(2, 3, 16, 16)
    assert encoder.mean.shape == encoder.std.shape == (3, 1, 1)
    torch.testing.assert_close(encoder(images), theirs.eval()(images))

def test_runs_loss_falls_and_eval_only_repeats_the_result(runs_main, tmp_path):
    options = """--steps 120 --width 8 --lr 0.1 --temperature 0.5 --log-every 1
        --eval-every 60""".split()
    result = runs_main(tmp_path / "run", *options).result
    losses = [each["loss"] for each in runs_log(tmp_path / "run") if each["event"] == "training"]
    assert statistics.mean(losses[-20:]) < statistics.mean(losses[:20]) - 0.02
    before = runs_bytes(tmp_path / "run")
    again = adainf.main(["--eval-only", str(tmp_path / "run")])
    assert {name: again[name] for name in adainf.METRICS} == {n: result[n] for n in adainf.METRICS}
    assert runs_bytes(tmp_path / "run") == before and os.listdir(tmp_path) == ["run"]

def test_runs_real_run_is_not_changed_by_a_dry_run_before(runs_main, runs_reference, tmp_path):
    runs_main(tmp_path / "fresh", "--steps", 1, "--warmup-steps", 0)
    runs_main(tmp_path / "run", "--dry-run", "--seed", 9, "--aug", "strong", "--width", 3)
    runs_main(tmp_path / "run")
    runs_assert_same(tmp_path / "run", runs_reference())
    views = [(tmp_path / name / "views.png").read_bytes() for name in ("fresh", "run")]
    assert views[0] == views[1]

@pytest.mark.parametrize("late", [["--warmup-steps", "20"], ["--save-every", "500"],
                                  ["--eval-every", "500"]])
def test_runs_dry_run_takes_the_options_of_the_real_run(runs_main, tmp_path, late):
    runs_main(tmp_path / "run", *late, "--dry-run")

# ---- Exact resume --------------------------------------------------------------------------------

@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("stops", [[12], [1, 4, 5, 7, 8, 13, 14, 16, 21, 23]])
def test_runs_resume_exactly(runs_main, runs_reference, tmp_path, monkeypatch, amp, stops):
    """7, 14, 21 end an epoch; after 4 and 16 there is a log line, after 5 a checkpoint, and at 8
    and 16 an evaluation."""
    done = 0
    for stop in stops:
        with monkeypatch.context() as patch:
            runs_signal_at(patch, stop - done)
            runs_main(tmp_path, "--amp", amp, status=128 + signal.SIGTERM)
        done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
        assert done == stop and not (tmp_path / "result.json").exists()
    assert f"after step {done}" in runs_main(tmp_path, "--amp", amp).out
    runs_assert_same(tmp_path, runs_reference(amp))

def test_runs_finished_run_again_changes_nothing(runs_main, runs_reference, tmp_path):
    runs_main(tmp_path)
    before = runs_bytes(tmp_path)
    runs_main(tmp_path)
    runs_assert_same(tmp_path, runs_reference())
    assert runs_bytes(tmp_path)["result.json"] == before["result.json"]

def test_runs_log_without_its_beginning_is_no_traceback(runs_main, tmp_path):
    runs_main(tmp_path, "--steps", 4)
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(b"\0" * 100 + log[100:])
    runs_main(tmp_path, "--steps", 4)

# ---- Signals, kills, damage ----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_runs_signal_saves_and_says_how_to_go_on(runs_main, tmp_path, monkeypatch, name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    runs_signal_at(monkeypatch, 6, number)
    said = runs_main(tmp_path, status=128 + number).out
    last = said.splitlines()[-1]
    assert name in last and "same command" in last and "step 6" in last and said.count(name) == 1
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6
    assert signal.getsignal(number) is handler

def test_runs_second_interrupt_stops_at_once(runs_main, runs_reference, tmp_path, monkeypatch):
    twice = lambda: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT))
    with monkeypatch.context() as patch:
        runs_call(patch, (adainf, "sum_gradients"), 7, twice)
        assert "at once" in runs_main(tmp_path, status=130).out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5
    runs_main(tmp_path)
    runs_assert_same(tmp_path, runs_reference())

def test_runs_signal_waits_for_an_evaluation(runs_main, runs_reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs_call(patch, (adainf, "knn_top1"), 2, lambda: signal.raise_signal(signal.SIGTERM))
        runs_main(tmp_path, status=128 + signal.SIGTERM)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 8
    runs_main(tmp_path)
    runs_assert_same(tmp_path, runs_reference())

def test_runs_interrupt_before_the_first_step_is_no_traceback(runs_data, tmp_path):
    child = runs_start(tmp_path / "said", runs_faulty_main, runs_argv(runs_data, tmp_path / "run"),
                       "adainf", "load_data", 1, signal.SIGINT)
    assert runs_end(child) == [130] and "Traceback" not in (tmp_path / "said").read_text()

@pytest.fixture(scope="session")
def runs_child_reference(runs_data, tmp_path_factory):
    """As runs_reference, by a process of its own."""
    out = tmp_path_factory.mktemp("child")
    assert runs_end(runs_start(os.devnull, adainf.main, runs_argv(runs_data, out))) == [0]
    return runs_outcome(out)

def test_runs_survive_sigkill_during_saves(runs_data, runs_child_reference, tmp_path):
    """Killed before every single system call of a save in turn; each time the log gets torn too."""
    argv, log = runs_argv(runs_data, tmp_path), tmp_path / "log.jsonl"
    faults = [("replace", 4), ("fsync", 4), ("replace", 3), ("replace", 5), ("fsync", 7)]
    for name, count in faults:  # the first of each are those of config.json
        child = runs_start(os.devnull, runs_faulty_main, argv, "os", name, count, signal.SIGKILL)
        assert runs_end(child) == [-signal.SIGKILL]
        log.write_bytes(log.read_bytes() + b'{"event": "training", "step": 1, "lo')
    child = runs_start(tmp_path / "said", adainf.main, argv)
    assert runs_end(child) == [0], (tmp_path / "said").read_text()
    (tmp_path / "said").unlink()
    runs_assert_same(tmp_path, runs_child_reference)

def runs_kill_at_random(argv, out, longest, choose):
    """Kill the run after random times until it is done; returns the number of kills."""
    for kills in itertools.count():
        child = runs_start(out.parent / "said", adainf.main, argv)
        child.join(choose.uniform(0, longest))
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            assert child.exitcode == 0, (out.parent / "said").read_text()
            return kills
        if choose.random() < 0.5 and (out / "log.jsonl").exists():
            with open(out / "log.jsonl", "ab") as log:
                log.write(choose.randbytes(choose.randrange(1, 50)))

def test_runs_survive_sigkill_at_random_moments(runs_data, runs_child_reference, tmp_path):
    out = tmp_path / "run"
    assert runs_kill_at_random(runs_argv(runs_data, out), out, 1.2, random.Random(1)) < 50
    runs_assert_same(out, runs_child_reference)

def runs_truncate(content):
    return content[:len(content) // 2]

def runs_flip(content, at=None, bit=5):
    at = len(content) // 2 if at is None else at
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]

@pytest.mark.parametrize("damage", [runs_truncate, runs_flip, lambda content: b""])
def test_runs_damaged_checkpoint_falls_back(
        runs_main, runs_reference, tmp_path, monkeypatch, damage):
    newest, before = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.prev.pt"
    with monkeypatch.context() as patch:
        runs_signal_at(patch, 12)
        runs_main(tmp_path, status=128 + signal.SIGTERM)
    newest.write_bytes(damage(newest.read_bytes()))
    with monkeypatch.context() as patch:
        runs_signal_at(patch, 1)
        said = runs_main(tmp_path, status=128 + signal.SIGTERM).out
    assert f"{newest} is damaged" in said and "after step 10" in said
    assert [torch.load(path, weights_only=True)["step"] for path in (before, newest)] == [10, 11]
    runs_main(tmp_path)
    runs_assert_same(tmp_path, runs_reference())
    for path in (newest, before):
        path.write_bytes(damage(path.read_bytes()))
    assert str(tmp_path) in runs_main(tmp_path, status=2).err

def test_runs_no_flipped_bit_of_a_checkpoint_goes_unnoticed(runs_main, tmp_path):
    runs_main(tmp_path)
    newest = tmp_path / "checkpoint.pt"
    good, choose = newest.read_bytes(), random.Random(0)
    expected = [runs_flat(torch.load(path, weights_only=True))
                for path in (newest, tmp_path / "checkpoint.prev.pt")]
    for _ in range(30):
        newest.write_bytes(runs_flip(good, choose.randrange(len(good)), choose.randrange(8)))
        assert runs_flat(runs_checkpoint(tmp_path)) in expected

@pytest.mark.parametrize("full", ["log.jsonl", "checkpoint.pt"])
def test_runs_disk_full(runs_main, runs_reference, tmp_path, monkeypatch, full):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                      ((tmp_path / full).stat().st_size - 20, hard))
    with monkeypatch.context() as patch:
        runs_call(patch, (adainf, "sum_gradients"), 7, fill)
        try:
            said = runs_main(tmp_path, status=1).err
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full in said
    runs_main(tmp_path)
    runs_assert_same(tmp_path, runs_reference())

def test_runs_second_process_is_refused(
        runs_main, runs_reference, runs_data, tmp_path, monkeypatch):
    def again():
        with pytest.raises(SystemExit) as stop:
            adainf.main(runs_argv(runs_data, tmp_path))
        seen.append(stop.value.code)
    seen = []
    runs_call(monkeypatch, (adainf, "sum_gradients"), 3, again)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        runs_main(tmp_path)
    [line] = said.getvalue().splitlines()
    assert seen == [2] and str(tmp_path) in line
    runs_assert_same(tmp_path, runs_reference())

# ---- Divergence ----------------------------------------------------------------------------------

@pytest.mark.parametrize("save_every", [100, 1])
def test_runs_divergence_stops(runs_main, runs_reference, tmp_path, monkeypatch, save_every):
    """The loss of step 11 is not a number; the log line after 8 was the last finite one."""
    real, calls = adainf.nt_xent, []
    def poisoned(*arguments):
        calls.append(0)
        return real(*arguments) * (math.nan if len(calls) == 11 else 1)
    with monkeypatch.context() as patch:
        patch.setattr(adainf, "nt_xent", poisoned)
        said = runs_main(tmp_path, "--save-every", save_every, status=1).err
    assert len(calls) <= 12 and "not finite" in said and "at step 8" in said
    checkpoint = runs_checkpoint(tmp_path)
    assert checkpoint["step"] == (8 if save_every > 1 else 10)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert not (tmp_path / "result.json").exists()
    runs_main(tmp_path)
    runs_assert_same(tmp_path, runs_reference())

def test_runs_learning_rate_too_high(runs_main, tmp_path):
    runs_main(tmp_path, "--lr", 1e12, status=1)

def test_runs_skipped_step_of_the_scaler_is_no_divergence(runs_main, tmp_path, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *args, **more: real(*args, init_scale=2.0 ** 60, **more))
    runs_main(tmp_path, "--amp", "fp16")
    assert runs_checkpoint(tmp_path)["scaler"]["scale"] < 2.0 ** 60

# ---- Changed options -----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def runs_finished(runs_data, tmp_path_factory):
    """The folder of a finished run of 3 steps, not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    adainf.main(runs_argv(runs_data, out, "--steps", 3))
    return out

@pytest.mark.parametrize("option, new, old", [
    ("--ratio", "2", "1"), ("--lr", "0.1", "0.001"), ("--aug", "strong", "auto"),
    ("--seed", "1", "0"), ("--batch-size", "6", "8"), ("--width", "4", "2"),
    ("--temperature", "0.5", "0.2"),
    ("--gray-prob", "0.3", "None"), ("--linear-epochs", "3", "2"),
    ("--gen-size", "20", "None"), ("--gen-data", "other.npz", "checksums"),
    ("--dataset", "images2", "images")])
def test_runs_changed_option_is_refused(runs_main, runs_data, runs_finished, option, new, old):
    if option == "--dataset" and not (runs_data / new).exists():
        shutil.copytree(runs_data / "images", runs_data / new)
    before = runs_bytes(runs_finished)
    value = runs_data / new if option in ("--gen-data", "--dataset") else new
    said = runs_main(runs_finished, "--steps", 3, option, value, status=2).err
    assert old in said and (option in said and new in said or option == "--gen-data")
    assert runs_bytes(runs_finished) == before

def test_runs_fewer_steps_are_refused(runs_main, runs_finished):
    """Catches a finished run that passes for a shorter one, which has another cosine."""
    before = runs_bytes(runs_finished)
    said = runs_main(runs_finished, "--steps", 2, "--warmup-steps", 2, status=2).err
    assert "--steps 3, not 2" in said and runs_bytes(runs_finished) == before

def test_runs_changed_images_are_refused(runs_main, runs_data, runs_finished, tmp_path):
    for split in ("test", "train"):
        path = runs_data / "images" / split / "b" / "3.png"
        good = path.read_bytes()
        Image.new("RGB", (16, 16)).save(path)
        try:
            assert "checksum" in runs_main(runs_finished, "--steps", 3, status=2).err, split
        finally:
            path.write_bytes(good)

def test_runs_harmless_options_may_change(
        runs_main, runs_reference, tmp_path, monkeypatch, runs_data):
    with monkeypatch.context() as patch:
        runs_signal_at(patch, 6)
        runs_main(tmp_path, status=128 + signal.SIGTERM)
    moved = shutil.copy(runs_data / "gen.npz", tmp_path / "moved.npz")
    runs_main(tmp_path, "--log-every", 3, "--save-every", 7, "--eval-every", 5, "--gen-data", moved)
    outcome, expected = runs_outcome(tmp_path), runs_reference()
    assert not [path for path in expected if path.startswith(("/checkpoint", "/encoder", "/result"))
                and path != "/result/loss" and outcome[path] != expected[path]]

def test_runs_steps_grow_with_a_statement(runs_main, tmp_path, monkeypatch, runs_data):
    """Options that default to a share of --steps must not get in the way."""
    full = runs_argv
    def argv(steps):
        argv = full(runs_data, tmp_path, "--steps", steps)
        at = argv.index("--warmup-steps")
        del argv[at:at + 2]
        return argv
    monkeypatch.setattr(sys.modules[__name__], "runs_argv",
                        lambda data, out, steps, *_: argv(steps))
    runs_main(tmp_path, 2)
    runs_signal_at(monkeypatch, 1)
    said = runs_main(tmp_path, 160, status=128 + signal.SIGTERM).out
    assert "--steps grows from 2" in said and "learning rate" in said

# ---- Bad input -----------------------------------------------------------------------------------

def runs_npz(folder, compressed=False, **arrays):
    path = folder / "bad.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path

def runs_bad_file(content):
    def make(folder, data):
        content_ = content((data / "gen.npz").read_bytes()) if callable(content) else content
        (folder / "bad.npz").write_bytes(content_)
        return ["--gen-data", folder / "bad.npz"]
    return make

def runs_bad_array(array, **more):
    return lambda folder, data: ["--gen-data", runs_npz(folder, image=array, **more)]

def runs_bad_folder(change):
    def make(folder, data):
        shutil.copytree(data / "images", folder / "images")
        change(folder / "images")
        return ["--dataset", folder / "images"]
    return make

def runs_bad_out(name):
    def make(folder, data):
        (folder / "file").write_text("mine")
        return ["--out", folder / name]
    return make

def runs_bad_option(words):
    return lambda folder, data: words.split()

class RunsBomb:
    """Makes a folder when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, (str(Path(tempfile.gettempdir()) / f"runs-bomb-{os.getpid()}"),)

RUNS_GENERATED = np.zeros((5, 16, 16, 3), np.uint8)
RUNS_BAD = {
    "no file": lambda folder, data: ["--gen-data", folder / "none.npz"],
    "file is a folder": lambda folder, data: ["--gen-data", data],
    "second file missing": lambda folder, data: [
        "--gen-data", data / "gen.npz", folder / "none.npz"],
    "empty file": runs_bad_file(b""),
    "garbage": runs_bad_file(bytes(range(256)) * 9),
    "truncated": runs_bad_file(runs_truncate),
    "truncated by a byte": runs_bad_file(lambda content: content[:-1]),
    "flipped bit": runs_bad_file(runs_flip),
    "npy": lambda folder, data: np.save(folder / "bad.npy", RUNS_GENERATED)
    or ["--gen-data", folder / "bad.npy"],
    "no image key": lambda folder, data: ["--gen-data", runs_npz(folder, images=RUNS_GENERATED)],
    "no array": lambda folder, data: zipfile.ZipFile(folder / "bad.npz", "w").writestr(
        "image.npy", b"garbage" * 99) or ["--gen-data", folder / "bad.npz"],
    "float": runs_bad_array(RUNS_GENERATED / 255),
    "int64": runs_bad_array(RUNS_GENERATED.astype(int)),
    "int8": runs_bad_array(RUNS_GENERATED.astype(np.int8)),
    "bool": runs_bad_array(RUNS_GENERATED > 1),
    "rank 3": runs_bad_array(RUNS_GENERATED[0]),
    "rank 0": runs_bad_array(np.uint8(1)),
    "gray": runs_bad_array(RUNS_GENERATED[..., :1]),
    "RGBA": runs_bad_array(np.zeros((5, 16, 16, 4), np.uint8)),
    "NCHW": runs_bad_array(RUNS_GENERATED.transpose(0, 3, 1, 2)),
    "structured": runs_bad_array(np.zeros(5, [("a", np.uint8)])),
    "objects": runs_bad_array(np.array([RunsBomb()], object)),
    "no images": runs_bad_array(RUNS_GENERATED[:0]),
    "other size": runs_bad_array(np.zeros((5, 8, 8, 3), np.uint8)),
    "no folder": runs_bad_option("--dataset nowhere"),
    "no classes": runs_bad_folder(lambda images: [*map(shutil.rmtree, images.glob("t*/*"))]),
    "one class": runs_bad_folder(lambda images: [*map(shutil.rmtree, images.glob("*/[ab]"))]),
    "empty class": runs_bad_folder(lambda images: [path.unlink() for path in images.glob("*/b/*")]),
    "no test": runs_bad_folder(lambda images: shutil.rmtree(images / "test")),
    "classes differ": runs_bad_folder(lambda images: (images / "test/a").rename(images / "test/d")),
    "class missing": runs_bad_folder(lambda images: shutil.rmtree(images / "test/c")),
    "no image": runs_bad_folder(lambda images: (images / "train/b/3.png").write_text("text")),
    "truncated image": runs_bad_folder(lambda images: (images / "train/b/3.png").write_bytes(
        runs_truncate((images / "train/a/3.png").read_bytes()))),
    "out is a file": runs_bad_out("file"),
    "out is below a file": runs_bad_out("file/run"),
    **{words: runs_bad_option(words) for words in (
        "--ratio -1", "--ratio 1.5", "--batch-size 999", "--batch-size 1", "--steps 0", "--lr 0",
        "--lr nan", "--lr inf", "--lr x", "--warmup-steps 25", "--temperature 0",
        "--temperature -1",
        "--device abacus", "--device cuda:99", "--amp maybe", "--aug huge", "--gen-size 25",
        "--gen-size 0", "--real-size 37", "--image-size 7", "--seed -1", "--width 0", "--nonsense",
        "--momentum 1", "--gray-prob 1.01", "--jitter 1 1 1", "--jitter 1 1 1 0.6",
        "--save-every 0",
        "--solarize-prob 0 0 0", "--crop-min 0", "--gen-data", "--eval-only nowhere", "--data-dir",
        "--dataset cifar10", "extra", "--width 9" + 400 * "0", "--seed 9" + 30 * "0",
        "--width 999999999", "--lr 1e300", "--weight-decay 1e200", "--proj-dim 99999999999999")},
    **{words: runs_bad_option(words) for words in ("--device cuda", "--data-device cuda")
       if not torch.cuda.is_available()}}

@pytest.mark.parametrize("name", RUNS_BAD)
def test_runs_bad_input_is_one_line(runs_main, runs_data, tmp_path, name, monkeypatch):
    (tmp_path / "input").mkdir()
    monkeypatch.chdir(tmp_path / "input")
    words = RUNS_BAD[name](tmp_path / "input", runs_data)
    before = [*tmp_path.rglob("*")]
    runs_main(tmp_path / "run", *words, status=2)
    assert [*tmp_path.rglob("*")] == before  # no --out, no anything
    assert not Path(RunsBomb().__reduce__()[1][0]).exists()  # objects are refused unread

@pytest.mark.parametrize("change", [lambda content: b"", lambda content: content[:40],
                                    lambda content: b"[1, 2]"])
def test_runs_strange_config_is_one_line(runs_main, runs_finished, tmp_path, change):
    out = shutil.copytree(runs_finished, tmp_path / "run")
    (out / "config.json").write_bytes(change((out / "config.json").read_bytes()))
    before = runs_bytes(out)
    assert "config.json" in runs_main(out, "--steps", 3, status=2).err
    assert runs_bytes(out) == before

RUNS_FOREIGN = {"dict": {"state_dict": {}}, "empty": {}, "tensor": torch.zeros(3), "list": [1, 2],
                "parts": dict(step=1, lines=[], model={}, optimizer={}, scaler={}),
                "strings": dict(step="1", lines="0", model="m", optimizer="o", scaler="s"),
                "objects": dict(step=RunsBomb())}

@pytest.mark.parametrize("name", RUNS_FOREIGN)
def test_runs_foreign_checkpoint_is_one_line(runs_main, runs_finished, tmp_path, name):
    out = shutil.copytree(runs_finished, tmp_path / "run")
    (out / "checkpoint.prev.pt").unlink()
    for path in (out / "checkpoint.pt", out / "encoder.pt"):
        torch.save(RUNS_FOREIGN[name], path)
    before = {key: value for key, value in runs_bytes(out).items() if key.endswith(".pt")}
    runs_main(out, "--steps", 3, status=2)
    runs_main(tmp_path / "new", "--eval-only", out, status=2)
    with pytest.raises(adainf.InputError):
        adainf.load_encoder(out / "encoder.pt")
    assert before.items() <= runs_bytes(out).items()
    assert not Path(RunsBomb().__reduce__()[1][0]).exists() and not (tmp_path / "new").exists()

def runs_mutate(content, choose):
    """Flip, cut, repeat or overwrite some bytes, mostly of the zip's own structures."""
    content = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        at = choose.choice((choose.randrange(200), -1 - choose.randrange(300),
                            choose.randrange(len(content) or 1)))
        at = at % max(1, len(content))
        match choose.randrange(4):
            case 0: content[at:at + 1] = bytes([choose.randrange(256)])
            case 1: del content[at:at + choose.choice((1, 4, 999))]
            case 2: content[at:at] = content[at:at + choose.choice((1, 4, 999))]
            case 3: content[at:at + 4] = choose.choice((b"\0" * 4, b"\xff" * 4, b"PK\5\6"))
    return bytes(content)

@pytest.mark.parametrize("compressed", [False, True])
def test_runs_fuzzed_npz_is_refused_or_intact(tmp_path, compressed):
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    path = runs_npz(tmp_path, compressed, label=np.arange(9), image=image)
    options = SimpleNamespace(gen_data=[path], gen_size=None, seed=0)
    good, choose, refused = path.read_bytes(), random.Random(0), 0
    kind = good.index(b"PK\1\2", good.index(b"PK\1\2") + 1) + 10  # image.npy's compression method
    methods = [good[:kind] + bytes([method]) + good[kind + 1:] for method in range(256)]
    for content in methods + [runs_mutate(good, choose) for _ in range(1500)]:
        path.write_bytes(content)
        try:
            whole = adainf.load_generated(image, options)
        except adainf.InputError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert whole.dtype == np.uint8 and np.array_equal(whole, image)
        try:
            (shape, dtype), *chunks = dg.read_npz(path, rows=4)
        except dg.Problem as error:
            assert len(str(error).splitlines()) == 1 and error.status == 2
        else:
            assert (shape, dtype) == (image.shape, image.dtype)
            assert np.array_equal(np.concatenate(chunks), image)
    assert 500 < refused < 1756  # both happen

def test_runs_fuzzed_options_never_end_in_a_traceback(runs_data, tmp_path, monkeypatch, capsys):
    """Odd values for every option: all must get to train() or be refused in one line."""
    monkeypatch.chdir(tmp_path)
    actions = [action for action in adainf.build_parser()._actions if action.dest not in (
        "help", "out", "demo", "compare", "eval_only")]
    odd = ["", " ", "-1", "0", "1", "2", "nan", "-inf", "1e39", "1e-320", "9" * 18, "9" * 400, "x",
           "é", "--", "0x10", "1_0", "٣", "/", ".", "0.5", "-0.0", "1e400", "%s", "{}"]
    choose, trained = random.Random(0), []
    monkeypatch.setattr(adainf, "train", lambda options, data: trained.append(options) or {})
    for action in actions:
        for value in odd:
            many = action.nargs if isinstance(action.nargs, int) else choose.randrange(1, 3)
            values = [] if action.nargs == 0 else [value] * (many if action.nargs else 1)
            argv = runs_argv(runs_data, tmp_path / "run", action.option_strings[0], *values)
            try:
                adainf.main(argv)
            except SystemExit as stop:
                assert stop.code == 2, argv
                said = capsys.readouterr().err
                assert said.count("\n") == 1, (argv, said)
    assert len(trained) > 100 and not (tmp_path / "run").exists()

@pytest.mark.parametrize("words", [
    f"--lr {2.0 ** 50}", "--jitter 1e9 1e9 1e9 0.5", "--weight-decay 1e9",
    "--seed 9007199254740992",
    "--temperature 1000000", "--knn-temperature 0.001 --knn-k 1", "--crop-min 1",
    "--linear-lr 1e9", "--log-every 1000000000000", "--real-size 4 --ratio 0"])
def test_runs_extreme_options_work_or_diverge(runs_data, tmp_path, words, capsys):
    try:
        adainf.main(runs_argv(runs_data, tmp_path, "--steps", 3, *words.split()))
    except SystemExit as stop:
        assert stop.code in (1, 2) and capsys.readouterr().err.count("\n") == 1

def test_runs_hidden_folders_and_dots_in_the_path_are_fine(runs_data, tmp_path, monkeypatch):
    images = shutil.copytree(runs_data / "images", tmp_path / ".hidden" / "images")
    (images / "train" / "a" / ".notes").write_text("no image")
    monkeypatch.chdir(images)
    for path in (images, "../../.hidden/images", "."):
        found, labels, classes = adainf.load_folder(Path(path) / "train", 16)
        assert found.shape == (36, 16, 16, 3) and classes == ["a", "b", "c"]

# ---- Many processes ------------------------------------------------------------------------------

def runs_numbers():
    """Random projections (two views of 8 images), activations, and a weight for each activation."""
    stream = torch.Generator().manual_seed(0)
    return (torch.randn(2, 8, 5, generator=stream), 3 + torch.randn(8, 3, 4, 4, generator=stream),
            torch.randn(8, 3, 4, 4, generator=stream))

def runs_norm(kind, x, weight):
    """(output, gradients of input, scale and shift, running statistics) of a batch norm."""
    norm, x = kind(3).to(x.dtype), x.clone().requires_grad_()
    norm.weight.data, norm.bias.data = torch.arange(1, 4).to(x), torch.arange(3).to(x)
    y = norm(x)
    (y * weight).sum().backward()
    adainf.sum_gradients(norm)
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean,
            norm.running_var, norm.num_batches_tracked]

def runs_part(folder):
    """One process's part of loss and batch norm, to a file."""
    torch.distributed.init_process_group("gloo")
    projections, x, weight = runs_numbers()
    count = 8 // adainf.WORLD
    share = slice(adainf.RANK * count, (adainf.RANK + 1) * count)
    mine = projections[:, share].flatten(0, 1).requires_grad_()
    loss = adainf.nt_xent(mine, 0.2)
    loss.backward()
    torch.save(dict(loss=loss.detach(), gradient=mine.grad.view(2, -1, 5),
                    norm=runs_norm(adainf.BatchNorm, x[share], weight[share])),
               f"{folder}/{adainf.RANK}.pt")
    adainf.barrier()

def runs_assert_close(ours, exact, tolerance=2e-6):
    """Ratio of lengths and cosine are 1, and no element is off by more than the tolerance."""
    ours, exact = ours.double().flatten(), exact.double().flatten()
    assert abs(ours.norm() / exact.norm() - 1) < tolerance
    assert 1 - ours @ exact / ours.norm() / exact.norm() < tolerance
    torch.testing.assert_close(ours, exact, rtol=10 * tolerance, atol=10 * tolerance)

@pytest.mark.parametrize("world", [2, 4])
def test_runs_processes_share_loss_and_norm_exactly(tmp_path, world):
    processes = runs_start_world(tmp_path / "said", world, runs_part, str(tmp_path))
    assert runs_end(*processes) == [0] * world
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    projections, x, weight = (each.double() for each in runs_numbers())
    projections.requires_grad_()
    views = nn.functional.normalize(projections.flatten(0, 1), dim=1)
    logits = (views @ views.T / 0.2).masked_fill(torch.eye(16, dtype=torch.bool), -math.inf)
    loss = nn.functional.cross_entropy(logits, torch.arange(16).roll(8))
    loss.backward()
    runs_assert_close(sum(part["loss"] for part in parts), loss.detach())
    runs_assert_close(torch.cat([part["gradient"] for part in parts], 1), projections.grad)
    exact = runs_norm(nn.BatchNorm2d, x, weight)
    for place, whole in enumerate(exact):
        each = [part["norm"][place] for part in parts]
        for ours in [torch.cat(each)] if place < 2 else each:
            runs_assert_close(ours, whole)

def runs_assert_near(folder, reference, tolerance=3e-3):
    """As runs_assert_same, to float tolerance in weights and losses."""
    outcome = runs_outcome(folder)
    assert outcome.keys() == reference.keys()
    for path, exact in reference.items():
        if path.startswith(("/checkpoint/model/backbone", "/checkpoint/model/proj")):
            kind = np.int64 if path.endswith("tracked") else np.float32
            ours, exact = (np.frombuffer(each, kind) for each in (outcome[path], exact))
            np.testing.assert_allclose(ours, exact, tolerance, tolerance, err_msg=path)
        elif path.endswith("/loss"):
            assert abs(outcome[path] - exact) < 3 * tolerance, path

@pytest.mark.parametrize("world", [2, 4])
def test_runs_processes_do_the_work_of_one(runs_data, runs_reference, tmp_path, world):
    argv = runs_argv(runs_data, tmp_path / "run")
    for _ in range(2):  # again when it is finished
        processes = runs_start_world(tmp_path / "said", world, adainf.main, argv)
        assert runs_end(*processes) == [0] * world, (tmp_path / "said0").read_text()
        runs_assert_near(tmp_path / "run", runs_reference())
    assert not (tmp_path / "said1").read_text()  # only the first one speaks
    assert runs_log(tmp_path / "run")[0]["event"] == "evaluation"

@pytest.mark.parametrize("worlds", [(2, 1, 2), (1, 2, 1), (2, 2, 2)])
def test_runs_resume_with_another_number_of_processes(runs_data, runs_reference, tmp_path, worlds):
    """Stopped at steps 10 and 20 (of many processes by a signal to the last), then finished."""
    argv, stops = runs_argv(runs_data, tmp_path / "run"), [9, 8, 10 ** 9]
    for world, stop in zip(worlds, stops):
        steps = stop if world > 1 else {9: 10, 8: 10}.get(stop, stop)
        fault = argv, "adainf", "sum_gradients", steps, signal.SIGTERM, str(world - 1)
        if world == 1:
            processes = [runs_start(tmp_path / "said", runs_faulty_main, *fault[:-1])]
        else:
            processes = runs_start_world(tmp_path / "said", world, runs_faulty_main, *fault)
        expected = 0 if stop > 99 else 128 + signal.SIGTERM
        assert runs_end(*processes) == [expected] * world
    runs_assert_near(tmp_path / "run", runs_reference())

@pytest.mark.parametrize("count", [3, 8])
def test_runs_resume_of_processes_at_an_evaluation(runs_data, runs_reference, tmp_path, count):
    """Rank 0 knows from the log that the evaluation at step 8 is done; all others must know too."""
    argv = runs_argv(runs_data, tmp_path / "run", "--save-every", 100)
    fault = argv, "adainf", "sum_gradients", 6 + count, signal.SIGKILL
    runs_end(*runs_start_world(tmp_path / "said", 2, runs_faulty_main, *fault))
    processes = runs_start_world(tmp_path / "said", 2, adainf.main, argv)
    assert runs_end(*processes) == [0, 0], (tmp_path / "said0").read_text()
    runs_assert_near(tmp_path / "run", runs_reference())

def test_runs_lost_process_ends_the_others(runs_data, tmp_path):
    fault = "adainf", "sum_gradients", 6, signal.SIGKILL, "1"
    argv = runs_argv(runs_data, tmp_path / "run")
    processes = runs_start_world(tmp_path / "said", 2, runs_faulty_main, argv, *fault)
    assert runs_end(*processes) == [1, -signal.SIGKILL]
    said = (tmp_path / "said0").read_text()
    assert "lost another process" in said.splitlines()[-1] and "Traceback" not in said

def test_runs_processes_after_a_dry_run(runs_data, runs_reference, tmp_path):
    """The checkpoints of the dry run must be gone for all processes, not only for the first."""
    argv = runs_argv(runs_data, tmp_path / "run")
    dry = runs_start(tmp_path / "dry", adainf.main, [*argv, "--dry-run", "--width", "3"])
    assert runs_end(dry) == [0]
    assert runs_end(*runs_start_world(tmp_path / "said", 2, adainf.main, argv)) == [0, 0]
    runs_assert_near(tmp_path / "run", runs_reference())

def test_runs_processes_cannot_share_an_odd_batch(runs_data, tmp_path):
    argv = runs_argv(runs_data, tmp_path / "run", "--batch-size", 7)
    assert runs_end(*runs_start_world(tmp_path / "said", 2, adainf.main, argv)) == [2, 2]
    assert "--batch-size 7" in (tmp_path / "said0").read_text() and not (tmp_path / "run").exists()

# ---- Data and experiments ------------------------------------------------------------------------

@pytest.mark.parametrize("order", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("compressed", [False, True])
def test_runs_generated_images_are_those_of_the_file(tmp_path, runs_data, compressed, order):
    image = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    path = runs_npz(tmp_path, compressed, image=order(image), label=np.arange(9.0))
    assert np.array_equal(runs_load(runs_data, "--gen-data", path).generated, image)

def test_runs_a_file_of_generated_images_is_in_memory_once(tmp_path):
    """Catches a second copy, which for a million images is 3 GB."""
    path = runs_npz(tmp_path, image=np.zeros((20_000, 16, 16, 3), np.uint8))
    real = np.zeros((1, 16, 16, 3))
    tracemalloc.start()
    images = adainf.load_generated(real, SimpleNamespace(gen_data=[path], gen_size=None, seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.nbytes <= peak < 1.2 * images.nbytes

@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 9, 4096])
def test_download_reads_npz_in_chunks_as_it_was_written(tmp_path, compressed, rows):
    image = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
    path = runs_npz(tmp_path, compressed, image=image, label=np.arange(9.0))
    (shape, dtype), *chunks = dg.read_npz(path, rows=rows)
    assert (shape, dtype) == (image.shape, image.dtype) and max(map(len, chunks)) <= rows
    assert np.array_equal(np.concatenate(chunks), image)
    _, *labels = dg.read_npz(path, "label")
    assert np.array_equal(np.concatenate(labels), np.arange(9.0))

def runs_load(data, *more):
    return adainf.load_data(adainf.parse_options(runs_argv(data, "unused", *more)))

def test_runs_generated_images_of_several_files_are_kept_apart_from_the_real_ones(runs_data):
    data = runs_load(runs_data, "--gen-data", runs_data / "gen.npz", runs_data / "other.npz")
    files = [np.load(runs_data / f"{name}.npz")["image"] for name in ("gen", "other")]
    assert len(data.images) == 36 and np.array_equal(data.generated, np.concatenate(files))
    assert data.labels.bincount().tolist() == [12] * 3

def test_runs_gen_size_is_a_seeded_random_subset(runs_data):
    """No prefix, no image twice, from both files, another for another seed."""
    files = "--gen-data", runs_data / "gen.npz", runs_data / "other.npz"
    pool = [image.tobytes() for image in runs_load(runs_data, *files).generated.numpy()]
    def chosen(seed):
        images = runs_load(runs_data, *files, "--gen-size", 12, "--seed", seed).generated.numpy()
        return sorted(pool.index(image.tobytes()) for image in images)
    first, second = chosen(0), chosen(1)
    assert len(set(first)) == 12 and first == chosen(0) != second
    assert min(first) < 24 <= max(first) and first != [*range(12)]

def test_runs_real_size_is_class_balanced(runs_data):
    labels = runs_load(runs_data, "--real-size", 10).labels
    assert sorted(labels.bincount().tolist()) == [3, 3, 4]
    first, second = (runs_load(runs_data, "--real-size", 9, "--seed", seed).images
                     for seed in (0, 1))
    assert not torch.equal(first, second)

@pytest.mark.parametrize("flip", [False, True])
def test_runs_warns_of_bgr(tmp_path, runs_data, capsys, flip):
    for path in shutil.copytree(runs_data / "images", tmp_path / "images").glob("*/*/*"):
        image = (np.asarray(Image.open(path)) // [1, 2, 4]).astype(np.uint8)
        Image.fromarray(image).save(path)
    generated = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3)) // [1, 2, 4]
    generated = generated[..., ::-1] if flip else generated
    path = runs_npz(tmp_path, image=np.ascontiguousarray(generated, np.uint8))
    runs_load(runs_data, "--dataset", tmp_path / "images", "--gen-data", path)
    assert ("BGR" in capsys.readouterr().out) == flip

def test_runs_compare_makes_four_cells_that_differ_only_in_data_and_augmentation(
        runs_data, tmp_path, capsys):
    out = tmp_path / "compare"
    options = *"--compare --seeds 0 1 --steps 4 --eval-every 0 --ratio 3".split(),
    adainf.main(runs_argv(runs_data, out, *options))
    table = json.loads((out / "comparison.json").read_text())["table"]
    assert (out / "comparison.png").stat().st_size > 5000 and len(table) == 6
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(folders) == 8
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    cells = {(c["options"]["aug"], c["n_generated"] and c["options"]["ratio"]) for c in configs}
    assert cells == {("strong", 0), ("weak", 0), ("strong", 1), ("weak", 3)}
    names = [name for name in configs[0]["options"] if name not in (
        "aug", "ratio", "gen_data", "seed", "out")]
    assert all(c["options"][name] == configs[0]["options"][name] for c in configs for name in names)
    for metric in adainf.METRICS:
        measured = sorted(json.loads((folder / "result.json").read_text())[metric]
                          for folder in folders)
        rows = [row[metric] for name, row in table.items() if name not in (
            "raw pixels", "untrained network")]
        assert measured == sorted(value for row in rows for value in row["values"])
        assert all(row["mean"] == pytest.approx(np.mean(row["values"])) and
                   row["std"] == pytest.approx(np.std(row["values"], ddof=1)) for row in rows)
    said = capsys.readouterr().out
    assert all(name in said for name in table)
    for folder in folders[:1] + folders[-1:]:  # every cell is a run like any other
        again = adainf.main(["--eval-only", str(folder)])
        result = json.loads((folder / "result.json").read_text())
        assert all(again[name] == result[name] for name in adainf.METRICS)

# ---- download_generated.py ----------------------------------------------------------------------

class DownloadServer(http.server.ThreadingHTTPServer):
    """Serves `body` at any path. `script` says what goes wrong, one word or pair for each request:
    a status, "plain" (ignores Range), "wrong" (another range than asked for), "html", "quota",
    ("cut", k): k bytes and no more, ("stall", k): k bytes, then nothing until the test is over,
    ("redirect", address). After its end all goes well."""
    daemon_threads = True

    def __init__(self, body, *script):
        super().__init__(("127.0.0.1", 0), DownloadHandler)
        self.body, self.script, self.version = body, list(script), '"1"'
        self.requests, self.over = [], threading.Event()  # the headers of every request
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, scheme="http"):
        return f"{scheme}://127.0.0.1:{self.server_port}/file.tar.gz"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of these tests

    def __exit__(self, *error):
        self.over.set()
        self.shutdown()
        super().__exit__(*error)

class DownloadHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *message):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(dict(self.headers))
        act, count = server.script.pop(0) if server.script else "well", None
        if isinstance(act, tuple):
            act, count = act
        if isinstance(act, int):
            return self.send_error(act)
        if act == "redirect":
            self.send_response(302)
            self.send_header("Location", count)
            return self.end_headers()
        body, status, total = server.body, 200, len(server.body)
        if act in ("html", "quota"):
            title = "Google Drive - Quota exceeded" if act == "quota" else "Please log in"
            body = f"\n<!DOCTYPE html><html><head><title>{title}</title></head></html>".encode()
            total = len(body)
        elif wanted and act != "plain" and self.headers.get("If-Range") == server.version:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            start = start // 2 if act == "wrong" else start
            body, status = body[start:], 206
        self.send_response(status)
        self.send_header("Content-Length", len(body))
        self.send_header("ETag", server.version)
        if status == 206:
            self.send_header("Content-Range", f"bytes {total - len(body)}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(body if count is None else body[:count])
        if act == "stall":
            server.over.wait(30)
        self.close_connection = True

@pytest.fixture
def download_quickly(monkeypatch):
    """No pauses; the list of those that there would have been."""
    pauses = []
    monkeypatch.setattr(dg.time, "sleep", pauses.append)
    return pauses

def download_images(n=400, seed=0):
    """Random uint8 images, brighter in red than in blue as CIFAR-10 is: n x 32 x 32 x 3."""
    noise = np.random.default_rng(seed).integers(0, 200, (n, 32, 32, 3))
    return (noise + [30, 25, 10]).astype(np.uint8)

def download_npz(images, **more):
    buffer = io.BytesIO()
    np.savez(buffer, image=images, **more)
    return buffer.getvalue()

def download_offer(monkeypatch, *urls, size=1e6, md5=None):
    monkeypatch.setitem(dg.SOURCES, "tiny", (size, list(urls), md5))

def download_fails(capsys, *argv):
    """(exit status, what it printed to stderr) of a command that fails, with one line."""
    with pytest.raises(SystemExit) as stopped:
        dg.main([str(argument) for argument in argv])
    said = capsys.readouterr().err
    assert said.startswith("download_generated.py: ") and said.count("\n") == 1, said
    return stopped.value.code, said

def download_run(*argv):
    dg.main([str(argument) for argument in argv])

def test_download_list_names_every_source_and_says_what_is_unknown(capsys):
    download_run("--list")
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    names = ("cifar10 cifar100 cifar10-ddpm cifar100-ddpm svhn-ddpm cifar10-edm cifar10-edm-5m "
             "cifar100-edm cifar10-stf cifar100-stf cifar10-edm-drive cifar10-5k "
             "cifar10-5k-stf").split()
    assert set(names) == set(dg.SOURCES) and set(names) <= set(rows)
    assert rows["cifar10-stf"][3] == "1.94" and rows["cifar10-ddpm"][3] == "unknown"
    assert all(url.startswith("https://") for _, urls, _ in dg.SOURCES.values() for url in urls)
    assert [md5 for *_, md5 in dg.SOURCES.values() if md5] == [
        "c58f30108f718f92721af3b95e74349a", "eb9058c3a382ffc7106e4002c42a8d85"]
    assert "zenodo.org" in dg.SOURCES["cifar10"][1][1] and len(dg.SOURCES["cifar10-ddpm"][1]) == 1

def test_download_imports_neither_torch_nor_adainf_before_it_needs_them():
    code = ("import sys, download_generated as d; d.main(['--list']); "
            "assert not {'torch', 'adainf', 'PIL'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(dg.__file__).parent,
                   stdout=subprocess.DEVNULL)

def test_download_connection_cut_anywhere_resumes_to_an_identical_file(
        tmp_path, monkeypatch, download_quickly):
    body = download_npz(download_images())
    cuts = [0, 1, 70_000, 1, dg.BLOCK, 0, 500_000]
    with DownloadServer(body, *(("cut", cut) for cut in cuts)) as server:
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
    assert (tmp_path / "tiny.npz").read_bytes() == body
    kept = [int(request.get("Range", "bytes=0-")[6:-1]) for request in server.requests]
    assert kept == np.cumsum([0] + cuts).tolist()  # nothing is fetched twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.npz", "tiny.npz.json"]
    assert download_quickly == [2, 2, 2, 2, 2, 4, 2]  # longer only without any progress

def test_download_record_describes_the_file(tmp_path, monkeypatch):
    images = download_images()
    images[7] = images[8] = images[9]
    body = download_npz(images)
    with DownloadServer(body) as server:
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
    record = json.loads((tmp_path / "tiny.npz.json").read_text())
    assert record["sha256"] == hashlib.sha256(body).hexdigest() and record["size"] == len(body)
    assert record["source"] == server.url() and record["date"] == time.strftime("%Y-%m-%d")
    assert record["shape"] == [400, 32, 32, 3] and record["dtype"] == "uint8"
    assert np.allclose(record["channel_means"], images.mean((0, 1, 2)), atol=0.01)
    assert record["duplicates"] == 2

def test_download_server_that_ignores_ranges_sends_all_again(
        tmp_path, monkeypatch, download_quickly):
    body = download_npz(download_images())
    with DownloadServer(body, ("cut", 300_000), "plain") as server:
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
    assert "Range" in server.requests[1] and (tmp_path / "tiny.npz").read_bytes() == body

def test_download_wrong_range_starts_over(tmp_path, monkeypatch, download_quickly):
    body = download_npz(download_images())
    with DownloadServer(body, ("cut", 300_000), "wrong") as server:
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
    assert (tmp_path / "tiny.npz").read_bytes() == body
    assert ["Range" in request for request in server.requests] == [False, True, False]

def test_download_does_not_splice_two_versions(tmp_path, monkeypatch, download_quickly, capsys):
    old, new = (download_npz(download_images(seed=seed)) for seed in (0, 1))
    with DownloadServer(old, *[("cut", 300_000), 503, 503, 503, 503, 503, 503]) as server:
        download_offer(monkeypatch, server.url())
        download_fails(capsys, "tiny", "--data-dir", tmp_path)
        server.body, server.version = new, '"2"'  # the next day
        server.script.clear()
        download_run("tiny", "--data-dir", tmp_path)
    assert server.requests[-1]["If-Range"] == '"1"' and (tmp_path / "tiny.npz").read_bytes() == new

def test_download_of_a_missing_file_is_not_repeated(
        tmp_path, monkeypatch, download_quickly, capsys):
    with DownloadServer(b"", 404) as server:
        download_offer(monkeypatch, server.url())
        status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
    assert status == 1 and "404" in said and server.url() in said
    assert len(server.requests) == 1 and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        download_run("no-such-name")
    assert stopped.value.code == 2

def test_download_survives_a_server_with_trouble(tmp_path, monkeypatch, download_quickly):
    body = download_npz(download_images())
    with DownloadServer(body, 500, 503, 429) as server:
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
    assert (tmp_path / "tiny.npz").read_bytes() == body and download_quickly == [2, 4, 8]

def test_download_of_the_wrong_size_never_gets_its_name(
        tmp_path, monkeypatch, download_quickly, capsys):
    body = download_npz(download_images())
    with DownloadServer(body, *[("cut", len(body) - 10)] + [("cut", 0)] * 9) as server:
        download_offer(monkeypatch, server.url())
        status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
    assert status == 1 and "connection lost" in said and not (tmp_path / "tiny.npz").exists()
    assert (tmp_path / "tiny.npz.part").stat().st_size == len(body) - 10
    assert len(server.requests) == 1 + dg.ATTEMPTS - 1

@pytest.mark.parametrize("page", ["html", "quota"])
def test_download_of_a_web_page_is_refused_and_what_came_before_stays(
        page, tmp_path, monkeypatch, download_quickly, capsys):
    body = download_npz(download_images())
    with DownloadServer(body, page, ("cut", 300_000), page) as server:
        download_offer(monkeypatch, server.url())
        status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
        assert status == 1 and ("quota" in said) == (page == "quota")
        assert not list(tmp_path.iterdir())
        assert download_fails(capsys, "tiny", "--data-dir", tmp_path)[0] == 1
        assert (tmp_path / "tiny.npz.part").read_bytes() == body[:300_000]
        download_run("tiny", "--data-dir", tmp_path)
    assert "Range" in server.requests[-1] and (tmp_path / "tiny.npz").read_bytes() == body

def test_download_of_damaged_data_is_refused(tmp_path, monkeypatch, capsys):
    body = bytearray(download_npz(download_images()))
    body[len(body) // 2] ^= 1  # only zip's checksum can tell
    with DownloadServer(bytes(body)) as server:
        download_offer(monkeypatch, server.url())
        status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
    assert status == 1 and "damaged" in said and not (tmp_path / "tiny.npz").exists()
    assert not (tmp_path / "tiny.npz.part").exists()  # or the next run would stop at it again

def test_download_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    body, part = download_npz(download_images()), tmp_path / "tiny.npz.part"
    code = ("import sys, download_generated as d; d.SOURCES['tiny'] = 1e6, [sys.argv[1]], None; "
            "d.main(['tiny', '--data-dir', sys.argv[2]])")
    with DownloadServer(body, ("stall", 400_000)) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url(), str(tmp_path)],
                                   cwd=Path(dg.__file__).parent, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = part.stat().st_size
        assert 0 < kept <= 400_000 and not (tmp_path / "tiny.npz").exists()
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
    assert server.requests[-1]["Range"] == f"bytes={kept}-"
    assert (tmp_path / "tiny.npz").read_bytes() == body

def test_download_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    body = download_npz(download_images())

    def interrupt(before, done, total, speed):
        if done > 200_000:
            raise KeyboardInterrupt

    with DownloadServer(body) as server:
        download_offer(monkeypatch, server.url())
        with monkeypatch.context() as patch:
            patch.setattr(dg, "show_progress", interrupt)
            status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
        assert status == 130 and "the same command" in said
        assert (tmp_path / "tiny.npz.part").stat().st_size > 200_000
        download_run("tiny", "--data-dir", tmp_path)
    assert "Range" in server.requests[1] and (tmp_path / "tiny.npz").read_bytes() == body

def test_download_stopped_before_the_renaming_needs_no_network(tmp_path, monkeypatch):
    body = download_npz(download_images())
    with DownloadServer(body) as server:
        download_offer(monkeypatch, server.url())
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(dg, "keep", lambda *_: 1 / 0)
            download_run("tiny", "--data-dir", tmp_path)
    download_run("tiny", "--data-dir", tmp_path)  # the server is gone
    assert (tmp_path / "tiny.npz").read_bytes() == body

def test_download_disk_full_keeps_what_came(tmp_path, monkeypatch, download_quickly, capsys):
    body = download_npz(download_images())
    with DownloadServer(body) as server:
        download_offer(monkeypatch, server.url())
        with monkeypatch.context() as patch:
            patch.setattr(dg.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
            status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
            assert status == 1 and "free" in said and not list(tmp_path.iterdir())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
            status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        kept = (tmp_path / "tiny.npz.part").stat().st_size
        assert status == 1 and "large" in said and 200_000 < kept <= 300_000
        assert not download_quickly  # no other attempt helps against a full disk
        download_run("tiny", "--data-dir", tmp_path)
    assert server.requests[-1]["Range"] == f"bytes={kept}-"
    assert (tmp_path / "tiny.npz").read_bytes() == body

def test_download_never_falls_from_https_to_http(tmp_path, monkeypatch, capsys):
    body = download_npz(download_images())
    # speaks http behind an https address: what happens to an address is all that matters here
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open",
                        lambda self, request: self.do_open(http.client.HTTPConnection, request))
    with DownloadServer(body) as server:
        server.script = [("redirect", server.url("http"))]
        download_offer(monkeypatch, server.url("https"))
        status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
        assert status == 1 and "not https" in said and len(server.requests) == 1
        server.script = [("redirect", server.url("https"))]
        download_run("tiny", "--data-dir", tmp_path)
    assert (tmp_path / "tiny.npz").read_bytes() == body

def test_download_keeps_a_good_file_and_replaces_it_only_by_a_whole_one(
        tmp_path, monkeypatch, download_quickly, capsys):
    old, new = (download_npz(download_images(seed=seed)) for seed in (0, 1))
    target = tmp_path / "sub" / "mine.npz"
    target.parent.mkdir()
    target.write_bytes(old)  # saved by hand: without a record
    with DownloadServer(new, "html") as server:
        download_offer(monkeypatch, server.url())
        for _ in range(2):  # now with one
            download_run("tiny", "--out", target)
            assert "already there" in capsys.readouterr().out
        assert not server.requests
        download_fails(capsys, "tiny", "--out", target, "--force")
        assert target.read_bytes() == old
        download_run("--verify", target)
        download_run("tiny", "--out", target, "--force")
        assert target.read_bytes() == new
        download_run("--verify", target)

def test_download_verify_finds_a_changed_byte(tmp_path, monkeypatch, capsys):
    with DownloadServer(download_npz(download_images())) as server:
        download_offer(monkeypatch, server.url())
        download_run("tiny", "--data-dir", tmp_path)
        target = tmp_path / "tiny.npz"
        download_run("--verify", target)
        with open(target, "r+b") as file:
            file.seek(1000)
            file.write(bytes([target.read_bytes()[1000] ^ 1]))
        assert download_fails(capsys, "--verify", target)[0] == 1
        status, said = download_fails(capsys, "tiny", "--data-dir", tmp_path)
        assert status == 1 and "--force" in said and len(server.requests) == 1
    assert download_fails(capsys, "--verify", tmp_path / "none.npz")[0] == 2

def download_archive(name="cifar-10-batches-py/data_batch_1"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in (name, "cifar-10-batches-py/batches.meta"):
            content = os.urandom(200_000)
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue(), hashlib.md5(buffer.getvalue()).hexdigest()

@pytest.mark.parametrize("trouble", ["down", "slow", "other content"])
def test_download_archive_comes_from_the_second_source(
        trouble, tmp_path, monkeypatch, download_quickly):
    body, md5 = download_archive()
    if trouble == "slow":
        monkeypatch.setattr(dg, "SLOW", 1e12)
        monkeypatch.setattr(dg, "SLOW_AFTER", 0)
    with DownloadServer(b"x" * 100_000 if trouble == "other content" else body) as first, \
            DownloadServer(body) as second:
        first.script = [404] if trouble == "down" else []
        download_offer(monkeypatch, first.url(), second.url(), md5=md5)
        download_run("tiny", "--data-dir", tmp_path)
        assert len(first.requests) == len(second.requests) == 1
        download_run("tiny", "--data-dir", tmp_path)
        assert len(first.requests) == len(second.requests) == 1  # it is there
    folder = tmp_path / "cifar-10-batches-py"  # torchvision's CIFAR10.base_folder
    assert sorted(path.name for path in folder.iterdir()) == ["batches.meta", "data_batch_1"]
    assert (tmp_path / "file.tar.gz").read_bytes() == body  # the address's own name
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cifar-10-batches-py", "file.tar.gz", "file.tar.gz.json"]

def test_download_archive_goes_on_with_the_source_that_was_interrupted(
        tmp_path, monkeypatch, download_quickly, capsys):
    body, md5 = download_archive()
    with DownloadServer(body, 404, 404) as first, \
            DownloadServer(body, ("cut", 200_000), *[500] * 5) as second:
        download_offer(monkeypatch, first.url(), second.url(), md5=md5)
        download_fails(capsys, "tiny", "--data-dir", tmp_path)
        second.script.clear()
        download_run("tiny", "--data-dir", tmp_path)
    assert len(first.requests) == 2 and second.requests[-1]["Range"] == "bytes=200000-"

def test_download_archive_comes_from_a_slow_source_rather_than_not(
        tmp_path, monkeypatch, download_quickly):
    body, md5 = download_archive()
    monkeypatch.setattr(dg, "SLOW", 1e12)
    monkeypatch.setattr(dg, "SLOW_AFTER", 0)
    with DownloadServer(body) as first, DownloadServer(b"", 404) as second:
        download_offer(monkeypatch, first.url(), second.url(), md5=md5)
        download_run("tiny", "--data-dir", tmp_path)
    assert [("Range" in request) for request in first.requests] == [False, True]
    assert (tmp_path / "cifar-10-batches-py" / "batches.meta").exists()

def test_download_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    body, md5 = download_archive("../../outside")
    with DownloadServer(body) as server, pytest.raises(tarfile.TarError):
        download_offer(monkeypatch, server.url(), md5=md5)
        download_run("tiny", "--data-dir", tmp_path / "data")  # the md5 makes this impossible
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()

def test_download_from_drive_without_gdown_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gdown", None)  # as if it were not installed
    status, said = download_fails(capsys, "cifar10-5k", "--data-dir", tmp_path)
    assert status == 1 and "pip install" in said and "gdown" in said and "browser" in said
    assert dg.HOSTS["drive"].format("1ZRdqr8PyFOTZfEkBpJH6A28DJPFqlJGm") in said

def test_download_from_drive_recognises_the_quota_page(tmp_path, monkeypatch, capsys):
    body = download_npz(download_images())
    page = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
    gdown = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "gdown", gdown)

    def refusing(url, output, resume):
        raise RuntimeError("Cannot retrieve:\n\n\tToo many users have viewed this file recently.\n")

    gdown.download = lambda url, output, resume: Path(output).write_bytes(page)
    for gdown.download, word in ((gdown.download, "quota"), (refusing, "quota"),
                                 (lambda *_, **__: None, "nothing")):  # older ones return None
        status, said = download_fails(capsys, "cifar10-5k", "--data-dir", tmp_path)
        assert status == 1 and word in said and not list(tmp_path.iterdir())
    gdown.download = lambda url, output, resume: Path(output).write_bytes(body)
    download_run("cifar10-5k", "--data-dir", tmp_path)
    assert (tmp_path / "cifar10-5k.npz").read_bytes() == body

def test_download_progress_says_speed_and_time_left(capsys, monkeypatch):
    for done in range(0, 1000, 10):
        dg.show_progress(done * 10**6, (done + 10) * 10**6, 10**9, 10e6)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and "500.0 of 1,000.0 MB" in lines[9]  # a log is not flooded
    assert "10.0 MB/s" in lines[9] and "00:00:50" in lines[9]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dg.show_progress(0, 5 * 10**8, 10**9, 10e6)
    assert capsys.readouterr().out.endswith("\r")

def download_folder(folder):
    """Images of many kinds in `folder`, among them a broken one and a hidden one."""
    (folder / "b" / "deep").mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 100, 50)).save(folder / "b" / "deep" / "red.png")
    Image.new("L", (64, 64), 77).save(folder / "a-grey.jpg")
    Image.new("RGBA", (16, 48), (1, 2, 3, 255)).save(folder / "c-small.webp", lossless=True)
    whole = folder / "b" / "deep" / "red.png"
    (folder / "b" / "broken.png").write_bytes(whole.read_bytes()[:60])
    (folder / ".hidden.png").write_bytes(b"")

def test_download_from_folder_skips_a_broken_image_and_counts_it(tmp_path, capsys):
    download_folder(tmp_path / "pictures")
    out = tmp_path / "mine.npz"
    download_run("--from-folder", tmp_path / "pictures", "--out", out)
    said = capsys.readouterr().out
    assert "broken.png" in said and "3 images, 1 skipped" in said and "bicubic" in said
    images = np.load(out, allow_pickle=False)["image"]
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images[0].astype(int) - 77).max() <= 1  # sorted: a, b, c
    assert (images[1] == [200, 100, 50]).all() and (images[2] == [1, 2, 3]).all()
    download_run("--verify", out)
    assert json.loads((tmp_path / "mine.npz.json").read_text())["source"].endswith("pictures")
    assert download_fails(capsys, "--from-folder", tmp_path / "pictures", "--out", out)[0] == 2
    download_run("--from-folder", tmp_path / "pictures", "--out", out, "--force", "--size", 8)
    assert np.load(out)["image"].shape == (3, 8, 8, 3)

def test_download_from_folder_strict_leaves_nothing(tmp_path, capsys):
    download_folder(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    for folder, message in ("pictures", "broken.png"), ("empty", "no images"), ("none", "no im"):
        status, said = download_fails(capsys, "--from-folder", tmp_path / folder, "--strict",
                                      "--out", tmp_path / "mine.npz")
        assert status == 2 and message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "pictures"]

@pytest.mark.parametrize("key", [None, "samples"])
@pytest.mark.parametrize("black, white, dtype", [
    (0, 1, "float32"), (-1, 1, ">f8"), (-1, 1, "float16"), (0, 255, "float32"), (0, 255, "int64")])
def test_download_from_array_recognises_layout_and_range(
        key, black, white, dtype, tmp_path, capsys):
    images = download_images(4100 if dtype == "float16" else 50)[:, :8, :8]  # also two chunks
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    array = (images.transpose(0, 3, 1, 2) / 255 * (white - black) + black).astype(dtype)
    if key:
        np.savez(tmp_path / "array", **{key: array})
        argv = ["--from-npz", tmp_path / "array.npz", key]
    else:
        np.save(tmp_path / "array", array)
        argv = ["--from-npy", tmp_path / "array.npy"]
    download_run(*argv, "--out", tmp_path / "mine.npz")
    said = capsys.readouterr().out
    assert "N x 3 x n x n" in said and f"{black} is black and {white} is white" in said
    assert (np.load(tmp_path / "mine.npz")["image"] == images).all()

def test_download_from_array_refuses_what_it_does_not_understand(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {"wide": rng.normal(0, 5, (4, 3, 8, 8)), "nan": np.full((4, 3, 8, 8), np.nan),
              "flat": rng.random((4, 3072)), "objects": np.array([{}] * 4),
              "odd": rng.random((4, 8, 8, 4)), "none": np.zeros((0, 3, 8, 8))}
    for name, array in arrays.items():
        np.save(tmp_path / name, array, allow_pickle=True)
        np.savez(tmp_path / name, key=array)
    (tmp_path / "short.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:-100])
    for path in sorted(tmp_path.glob("*.np?")):
        how = ["--from-npy", path] if path.suffix == ".npy" else ["--from-npz", path, "key"]
        assert download_fails(capsys, *how, "--out", tmp_path / "out")[0] == 2, path
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()

def test_download_inspect_warns_of_bgr_and_of_sorted_classes(tmp_path, capsys):
    images = download_images(300)
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    good.write_bytes(download_npz(images, label=np.arange(300) % 10))
    bad.write_bytes(download_npz(images[..., ::-1], label=np.arange(300) // 30))
    download_run("--inspect", good)
    said = capsys.readouterr().out
    assert "300" in said and "123.0" in said and "warning" not in said
    download_run("--inspect", bad, "--out", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "BGR" in said and "sorted by class" in said
    sheet = np.asarray(Image.open(tmp_path / "good.npz.png"))
    assert (sheet[2:34, 2:34] == images[0]).all()  # in RGB, 16 in a row, with a border of 2
    assert (sheet[-34:-2, -34:-2] == images[299]).all() and sheet.shape[1] == 16 * 34 + 2
    assert (tmp_path / "sheet.png").exists()

def test_download_inspect_needs_no_labels(tmp_path, capsys):
    (tmp_path / "few.npz").write_bytes(download_npz(download_images(5)))
    download_run("--inspect", tmp_path / "few.npz")
    assert "warning" not in capsys.readouterr().out

def test_download_inspect_refuses_a_header_without_its_data(tmp_path, capsys):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        "descr": "|u1", "fortran_order": False, "shape": (1_000_000, 32, 32, 3)})
    for name, more in (("empty", b""), ("short", bytes(32 * 32 * 3 * 5))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("image.npy", header.getvalue() + more)
        assert download_fails(capsys, "--inspect", tmp_path / name)[0] == 2
    (tmp_path / "cut").write_bytes(download_npz(download_images())[:-5000])
    (tmp_path / "objects").write_bytes(download_npz(np.array([{}] * 4)))
    for name in ("cut", "objects", "missing"):
        assert download_fails(capsys, "--inspect", tmp_path / name)[0] == 2
    assert not list(tmp_path.glob("*.png"))

def download_cifar10(monkeypatch, url):
    """A tar archive as CIFAR-10's, of 6 x 20 images; torchvision expects it at `url`."""
    draw, lists, buffer = np.random.default_rng(0), [], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
            images = dict(data=draw.integers(0, 256, (20, 3072), np.uint8), labels=[*range(10)] * 2)
            names = {"label_names": list("abcdefghij")}
            content = pickle.dumps(names if name == "batches.meta" else images)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            lists.append([name, hashlib.md5(content).hexdigest()])
    body, meta = buffer.getvalue(), {"filename": "batches.meta", "key": "label_names",
                                     "md5": lists[-1][1]}
    for name, value in dict(url=url, tgz_md5=hashlib.md5(body).hexdigest(), train_list=lists[:5],
                            test_list=lists[5:6], meta=meta).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return body

def download_train(data_dir, out):
    return adainf.main(f"--data-dir {data_dir} --out {out} --width 2 --batch-size 8 --dry-run "
                       "--proj-hidden 8 --proj-dim 4 --device cpu".split())

def test_download_of_cifar10_by_adainf_itself(tmp_path, monkeypatch, capsys):
    """From a server to a result; a host that is down is one line that names the other way."""
    with DownloadServer(b"") as server:
        server.body = download_cifar10(monkeypatch, server.url())
        server.script = [404] * 9
        with pytest.raises(SystemExit) as stopped:
            download_train(tmp_path / "data", tmp_path / "run")
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert "download_generated.py cifar10" in said and not (tmp_path / "run").exists()
        server.script = []
        assert download_train(tmp_path / "data", tmp_path / "run")["n_real"] == 100
        count = len(server.requests)
        download_train(tmp_path / "data", tmp_path / "again")
        assert len(server.requests) == count

def test_download_of_cifar10_is_where_adainf_looks_for_it(tmp_path, monkeypatch, download_quickly):
    with DownloadServer(b"") as server:
        server.body = download_cifar10(monkeypatch, "http://127.0.0.1:9/unreachable")
        url = server.url().replace("file", "cifar-10-python")
        md5 = hashlib.md5(server.body).hexdigest()
        monkeypatch.setitem(dg.SOURCES, "cifar10", (1e4, [url], md5))
        download_run("cifar10", "--data-dir", tmp_path / "data")
    assert download_train(tmp_path / "data", tmp_path / "run")["n_real"] == 100

# ---- python test_adainf.py stress ----------------------------------------------------------------

def stress(argv):
    """Kill runs at random moments, and in the middle of saves, and compare all they leave with a
    run that nothing stopped. Arguments: the least number of kills (60) and a seed (0)."""
    least, seed = (*map(int, argv), *(60, 0)[len(argv):])
    choose, kills, differences, done = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data = runs_write_data(Path(folder))
        more = "--steps", 60, "--save-every", 2
        for name in ("straight", "again"):  # the first one also starts the server of processes
            began = time.perf_counter()
            argv = runs_argv(data, data / name, *more)
            assert runs_end(runs_start(os.devnull, adainf.main, argv)) == [0]
            seconds = time.perf_counter() - began
        reference = runs_outcome(data / "straight")
        while kills < least or differences:
            out = data / f"killed-{done}" / "run"
            out.parent.mkdir()
            run = runs_argv(data, out, *more)
            kills += runs_kill_at_random(run, out, seconds, choose)
            outcome, done = runs_outcome(out), done + 1
            different = [path for path in outcome | reference
                         if outcome.get(path) != reference.get(path)]
            print(f"run {done}: {kills} kills so far, {len(different)} differences {different[:3]}",
                  flush=True)
            if different:
                return 1
    print(f"{done} runs were killed {kills} times; each ended bit for bit as one that was not")
    return 0

# ---- python test_adainf.py benchmark -------------------------------------------------------------

class BenchmarkPeer(torch.utils.data.Dataset):
    """What most code bases do: Pillow images through torchvision transforms, one at a time."""
    def __init__(self, images, augmentation):
        brightness, contrast, saturation, hue = augmentation["jitter"]
        jitter = transforms.ColorJitter(brightness, contrast, saturation, hue)
        self.images, self.view = images, transforms.Compose([
            transforms.RandomResizedCrop(32, (augmentation["crop_min"], 1), interpolation=3),
            transforms.RandomApply([jitter], augmentation["jitter_prob"]),
            transforms.RandomGrayscale(augmentation["gray_prob"]),
            transforms.RandomApply([self.blur], augmentation["blur_prob"]),
            transforms.RandomHorizontalFlip(augmentation["flip_prob"]), transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.25] * 3)])

    @staticmethod
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.view(image), self.view(image)

def benchmark_rate(work, amount, device, seconds=3.0, least=3):
    """{median, low, high} of amount per second over repeated work(), after one to warm up."""
    def timed():
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started
    timed()
    times, begun = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < seconds:
        times.append(timed())
    return {"median": amount / statistics.median(times), "low": amount / max(times),
            "high": amount / min(times), "runs": len(times)}

def benchmark_peer(images, augmentation, batch):
    """Views a second of the peers' pipeline: DataLoader with two workers, after two batches."""
    loader = torch.utils.data.DataLoader(BenchmarkPeer(images, augmentation), batch, num_workers=2)
    rates = []
    for _ in range(3):
        batches = iter(loader)
        next(batches), next(batches)
        started = time.perf_counter()
        views = sum(2 * len(first) for first, _ in batches)
        rates.append(views / (time.perf_counter() - started))
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates), "runs": 3}

def benchmark_step(device, width, batch, amp=None, channels_last=False, compiled=False, pool=None):
    """A whole training step as a function without arguments, and its model."""
    options = adainf.parse_options(["--width", str(width), "--device", device.type])
    model = adainf.SimCLR(options, 10).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = adainf.LARS([dict(params=list(model.parameters()), lr=0.1, decay=1e-4)],
                            momentum=0.9, foreach=True)
    zeros = torch.zeros(3, 1, 1, device=device)
    two_views = adainf.TwoViews(adainf.WEAK, 32, zeros + 0.5, zeros + 0.25)
    pool = pool or benchmark_pool(device, 2000, 2000)
    mixture = adainf.Mixture(pool, 10, batch, seed=0)
    step = itertools.count()
    if compiled:
        model.compile()
        two_views.pipeline = torch.compile(two_views.pipeline)

    def work():
        number = next(step)
        images, labels, labelled = mixture.batch(number, slice(None), device)
        with torch.no_grad():
            views = two_views(images, torch.rand(2, batch, two_views.DRAWS, device=device))
        if not channels_last:
            views = views.contiguous()
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            projections, logits = model(views)
        loss = adainf.nt_xent(projections, 0.2) + adainf.probe_loss(logits, labels, labelled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return work

def benchmark_pool(device, n_real, n_generated):
    images = torch.randint(0, 256, (2000, 32, 32, 3), dtype=torch.uint8, device=device)
    images = images.repeat((n_real + n_generated + 1999) // 2000, 1, 1, 1)[:n_real + n_generated]
    labels = torch.arange(n_real, device=device) % 10
    statistic = torch.full((3, 1, 1), 0.5, device=device)
    return adainf.Data(images[:n_real], labels, images[n_real:], images[:10], labels[:10],
                       list("0123456789"), statistic, statistic, [])

def benchmark(argv):
    """Speed of every part beside what peers do, in one run; also written to benchmark.json."""
    options = adainf.parse_options(argv)
    device, (precision, _) = adainf.choose_device(options), adainf.choose_precision(options)
    fast = None if precision == torch.float32 else precision
    batch = 512 if device.type == "cuda" else 128
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    record = {"machine": f"{name}, {os.cpu_count()} cores", "torch": torch.__version__,
              "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
              "device": device.type, "precision": str(precision), "batch": batch, "figures": {}}
    print(json.dumps({key: value for key, value in record.items() if key != "figures"}))

    plain = benchmark_rate(benchmark_step(device, 64, batch), batch, device, 6)
    adainf.tune_process()  # for good, so the plain loop comes before

    def show(title, rate, unit, note=""):
        record["figures"][title] = rate
        print(f"{title:54} {rate['median']:12,.0f} {unit}  ({rate['low']:,.0f} to "
              f"{rate['high']:,.0f}, n = {rate['runs']}) {note}", flush=True)
        return rate["median"]

    print("\nAugmentation alone, 512 views a batch; x: times the peers' pipeline with 2 workers")
    data = benchmark_pool(device, 2000, 6000)
    small = data.images[:256]
    augmented = {}
    for strength, recipe in adainf.RECIPES.items():
        two_views = adainf.TwoViews(recipe, 32, data.mean, data.std)
        compiled = adainf.TwoViews(recipe, 32, data.mean, data.std)
        compiled.pipeline = torch.compile(compiled.pipeline)
        peer = show(f"{strength}: Pillow in a DataLoader, 2 workers", benchmark_peer(
            data.generated[:256 * 12].cpu().numpy(), recipe, 256), "views/s")
        for kind, views in (("eager", two_views), ("compiled", compiled)):
            def work():
                with torch.no_grad():
                    views(small, torch.rand(2, 256, views.DRAWS, device=device))
            rate = benchmark_rate(work, 512, device)
            augmented[strength, kind] = show(f"{strength}: matrices, {kind}", rate, "views/s",
                                             f"{rate['median'] / peer:.1f} x")

    print("\nDrawing and gathering a batch of 512")
    for count in (10_000, 1_000_000):
        mixture = adainf.Mixture(benchmark_pool(device, 50_000, count), 10, 512, seed=0)
        steps = itertools.count()
        show(f"from 50,000 real and {count:,} generated images", benchmark_rate(
            lambda: mixture.batch(next(steps) % 1000, slice(None), device), 1, device, 1),
            "batches/s")

    print(f"\nTraining step, width 64, {batch} images; the share is of the measured matmul peak")
    flop = 6 * benchmark_multiplications(64) * 2  # two views; backward costs twice the forward
    show("plain fp32 loop, as from a textbook", plain, "images/s")
    settings = [("+ freed memory is kept (tune_process)", {}),
                ("+ channels_last", dict(channels_last=True))]
    if fast:
        settings.append((f"+ {str(fast)[6:]}", dict(channels_last=True, amp=fast)))
    settings.append(("+ compiled", dict(channels_last=True, amp=fast, compiled=True)))
    for title, setting in settings:
        peak = benchmark_peak(device, setting.get("amp") or torch.float32)
        started = time.perf_counter()
        work = benchmark_step(device, 64, batch, **setting)
        work()
        first = time.perf_counter() - started
        rate = benchmark_rate(work, batch, device, 6)
        flops = rate["median"] * flop
        speed = show(title, rate, "images/s", f"{rate['median'] / plain['median']:.2f} x, "
                     f"{flops / 1e12:.2f} TFLOP/s, {flops / peak:.0%} of peak, "
                     f"first step {first:.0f} s")
        if title == settings[-2][0]:
            share = 2 * speed / augmented["weak", "eager"]
            print(f"    of which eager augmentation takes {share:.1%}")

    print("\nTraining step, width 16: does its cost grow?")
    for size in (64, 128, 256):
        show(f"batch size {size}", benchmark_rate(benchmark_step(
            device, 16, size, fast, True), size, device, 2), "images/s")
    for count in (0, 10_000, 1_000_000):
        pool = benchmark_pool(device, 50_000, count)
        show(f"batch size 128, {count:,} generated images", benchmark_rate(benchmark_step(
            device, 16, 128, fast, True, pool=pool), 128, device, 2), "images/s")
    record["peak_memory_gb"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
                                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9
    print(f"\npeak memory {record['peak_memory_gb']:.1f} GB, 3.2 GB of it for the million images")
    Path("benchmark.json").write_text(json.dumps(record, indent=1))

def benchmark_multiplications(width):
    """Multiply-adds of the network for one image of 32 x 32, forward, counted layer by layer."""
    counted = []
    model = adainf.SimCLR(adainf.parse_options(["--width", str(width), "--device", "cpu"]), 10)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda module, _, output: counted.append(
                output[0].numel() * module.weight[0].numel()))
    model.eval()(torch.zeros(1, 3, 32, 32))
    return sum(counted)

def benchmark_peak(device, dtype):
    """The most floating-point operations a second that a large matrix product reaches here."""
    best = 0.0
    for n in (1024, 2048, 4096, 8192) if device.type == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for right in (b, b.T):  # layouts differ in speed
            best = max(best, benchmark_rate(lambda: a @ right, 2 * n ** 3, device, 0.5)["high"])
    return best

if __name__ == "__main__":
    commands = {"benchmark": benchmark, "stress": stress}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(f"usage: python test_adainf.py {{{','.join(commands)}}}")
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
