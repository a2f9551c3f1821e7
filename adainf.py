#!/usr/bin/env python3
"""AdaInf: adaptive inflation for contrastive learning, in one file.

Paper: "Do Generated Data Always Help Contrastive Learning?", Wang, Zhang and Wang, ICLR 2024
(arXiv 2403.12448); its symbols, sections and theorems are cited as they come up.

Contrastive learning (SimCLR) needs no labels: a network learns to recognise two random views of
one image among the views of all others. *Inflation* adds generated images to the real ones. That
can hurt, for two reasons. Generated images are not quite real. And inflation does a part of what
augmentation is there for, to connect similar images, so that strong augmentation then costs more
(it can change what an image shows) than it brings. AdaInf is the rule that follows: count every
real image N = 10 times, and with inflation augment more weakly.

    python adainf.py --demo                                        # the idea, offline, on a laptop
    python adainf.py                                               # SimCLR on CIFAR-10
    python adainf.py --gen-data data/cifar10-ddpm.npz --ratio 10               # AdaInf
    python adainf.py --gen-data data/cifar10-ddpm.npz --compare --seeds 0 1 2  # and its controls
    torchrun --nproc-per-node 8 adainf.py --gen-data data/cifar10-ddpm.npz     # on 8 GPUs

It reads from top to bottom: 1 mixing, 2 views, 3 model and loss, 4 optimiser, 5 evaluation,
6 training, 7 experiments. What follows is needed to operate a run, not to understand it: helpers
such as check(), which raises an error if a condition fails, to_device(), which moves a tensor, and
gather() and share_of_process(), which do something only if there are several processes.

Notation: B images in a batch, so 2B views; each of several processes works on its share of them.
n pixels along a side; D features; M rows of whatever is treated at once. D_d, D_g: the real and the
generated images; P_d, P_g: what they are drawn from."""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

if __name__ == "__main__":
    # A thread that waits shall sleep. One that spins keeps its core busy, and if another program
    # runs as well, threads that have work are short of cores. OpenMP reads this when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

# torchrun starts WORLD processes and tells each its RANK; without it, this is process 0 of 1.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ---- 1. Mix real and generated images (Section 3) ------------------------------------------------
# Inflation draws images from P_t = beta P_d + (1 - beta) P_g, a mixture of real and generated ones.
# As P_t - P_d = (1 - beta) (P_g - P_d), P_t has 1 - beta times the generator's error, in total
# variation: D_TV(P_t, P_d) = (1 - beta) D_TV(P_g, P_d) (Theorem 3.1). Counting each real image N
# times raises beta: with 50,000 real images and 1,000,000 generated ones, beta is 0.05 for N = 1,
# and 0.33 for N = 10. The generated ones still bring their diversity.


@dataclasses.dataclass
class Data:
    """What a run learns from and is tested on. Images: uint8, M x n x n x 3, RGB."""

    images: torch.Tensor  # the real training images D_d
    labels: torch.Tensor  # their labels, int64: backbone and projector never see them
    generated: torch.Tensor  # D_g: without labels, whatever its file says
    probe_images: torch.Tensor  # what the offline probes of section 5 learn from, by default D_d
    probe_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor  # on the compute device
    classes: list  # their names
    mean: torch.Tensor  # of all the training set's colours, 0..1: 3 x 1 x 1, on the compute device
    std: torch.Tensor

    @property
    def device(self):
        return self.mean.device


EPOCH, VIEWS, PROBE = 1, 2, 3  # what random numbers are for


def random_stream(*key):
    """A NumPy Generator for a key of integers, such as (seed, VIEWS, step).

    Its numbers depend on the key alone: a resumed run has no random state to restore, and every
    process can draw the numbers of the whole batch and use those of its share."""
    return np.random.default_rng(key)


class Mixture:
    """P_t: batches from N copies of D_d and one of D_g, so beta = N |D_d| / (N |D_d| + |D_g|).

    An epoch is a random order of these samples, without replacement; its incomplete last batch is
    dropped. A copy costs no memory: sample i is real image i mod |D_d| as long as i < N |D_d|."""

    def __init__(self, data, ratio, batch_size, seed):
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        copies = ratio if len(data.generated) else 1  # without D_g, beta is 1 for any N
        self.n_copied = copies * len(data.images)  # N |D_d|
        self.size = self.n_copied + len(data.generated)
        self.beta = self.n_copied / self.size
        self.steps_per_epoch = self.size // batch_size
        self.batches = None  # of self.epoch
        self.epoch = None
        check(batch_size <= self.size,
              f"--batch-size {batch_size}: too large, as an epoch has {self.size} samples")

    def samples(self, step):
        """The B sample numbers (0..size - 1) of a step's batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            stream = random_stream(self.seed, EPOCH, epoch)
            order = torch.from_numpy(stream.permutation(self.size))
            self.batches = order.split(self.batch_size)
            self.epoch = epoch
        return self.batches[batch]

    def batch(self, step):
        """(images, labels, n_real) of a step, on the compute device.

        images: uint8, B x n x n x 3; labels: B, -1 for a generated image; with several processes,
        each gets its share of these. n_real: the number of real images in the whole batch. (In
        section 3, the loss of the online linear probe is a mean over their views.)"""
        samples = self.samples(step)
        n_real = int((samples < self.n_copied).sum())
        samples = samples[share_of_process(len(samples))]

        # Without a loop: each sample takes an image from each pool; `where` keeps the right one.
        data = self.data
        is_real = to_device(samples < self.n_copied, data.images.device)
        index = samples % len(data.images)
        images = take(data.images, index)
        labels = torch.where(is_real, take(data.labels, index), -1)
        if len(data.generated):
            index = (samples - self.n_copied).clamp(min=0)
            generated = take(data.generated, index)
            images = torch.where(is_real.view(-1, 1, 1, 1), images, generated)
        return to_device(images, data.device), to_device(labels, data.device), n_real


def take(pool, index):
    """pool[index] on the device of the pool; index_select is the fastest way."""
    return pool.index_select(0, to_device(index, pool.device))


# ---- 2. Two views (Section 4) --------------------------------------------------------------------
# Think of images as the nodes of a graph, with an edge between two if a view of one looks like a
# view of the other: the loss pulls the two together. Two numbers decide whether this finds classes
# (Theorem 4.1). alpha, the share of views that change what an image shows, should be small. And
# lambda_{D+1}, the (D+1)-th smallest eigenvalue of the graph's Laplacian if the network has D
# features, should be large: it tells how well the images are connected. (It is 0 if the graph falls
# into more than D separate parts.) Stronger views raise both numbers: they help and harm. Inflation
# raises lambda_{D+1} as well, by images in between. Then strong views are no longer needed for
# that, and weaker ones, with a smaller alpha, are better.

STRONG = dict(
    crop_min=0.08,  # smallest area of a crop, as a share of the image
    jitter_prob=0.8,
    jitter=(0.8, 0.8, 0.8, 0.2),  # brightness, contrast, saturation: 1 +- this; hue: +- turns
    gray_prob=0.2,
    blur_prob=0.5,
    solarize_prob=(0.0, 0.0),  # in the first and in the second view; for recipes of other methods
    flip_prob=0.5)
WEAK = STRONG | dict(crop_min=0.2, jitter_prob=0.4, jitter=(0.4, 0.4, 0.4, 0.1))  # AdaInf's
RECIPES = {"strong": STRONG, "weak": WEAK}  # the paper's, for SimCLR


def choose_augmentation(options):
    """AdaInf's rule: weak with generated images, else strong; then the user's own values.

    Returns ("weak" or "strong", a dict like STRONG)."""
    strength = options.aug
    if strength == "auto":
        strength = "weak" if options.gen_data else "strong"

    augmentation = dict(RECIPES[strength])
    for name in augmentation:
        value = getattr(options, name)
        if value is not None:
            augmentation[name] = value
    return strength, augmentation


# This is a view of one image in torchvision and Pillow. Tests compare ours with it, operation by
# operation; they agree but for what Pillow's 8 bits round and clip (and sigma has 256 levels):
#
#     RandomResizedCrop(n, scale=(crop_min, 1), interpolation=BICUBIC)
#     RandomApply([ColorJitter(brightness, contrast, saturation, hue)], jitter_prob)
#     RandomGrayscale(gray_prob)
#     RandomApply([Pillow's GaussianBlur of a sigma in 0.1..2], blur_prob)
#     RandomSolarize(128, solarize_prob)
#     RandomHorizontalFlip(flip_prob)
#     ToTensor()
#     Normalize(mean, std)
#
# One by one on a CPU, that is slower than the network. But crop, resize, flip and blur act on rows
# and on columns, each by an n x n matrix: rows @ image @ columns^T. So a whole batch takes a few
# batched products, and still every view has its own random numbers. (All that follows a crop treats
# left and right alike, so the flip may come right after it, as a part of its matrix.)


def crop_matrices(n):
    """Matrices that crop n pixels of an axis and resize the crop to n, as Pillow's bicubic does.

    Returns n^2 x n x n: [start * n + length - 1] is the matrix of that crop. Those of crops that
    would pass the edge stay 0, and are never used."""
    table = torch.zeros(n, n, n, n)
    for length in range(1, n + 1):
        # The columns of a matrix are what it makes of unit vectors. So take the identity for an
        # image, and resize its height from length to n pixels (its width stays): the result,
        # n x length, is the matrix. (`antialias` selects Pillow's cubic kernel.)
        identity = torch.eye(length)[None, None]
        resize = F.interpolate(identity, (n, length), mode="bicubic", antialias=True)[0, 0]
        for start in range(n - length + 1):
            table[start, length - 1, :, start:start + length] = resize
    return table.flatten(0, 1)


def blur_matrices(sigma, n):
    """Gaussian blur of n pixels as Pillow does it, by three box filters: M sigmas -> M x n x n.

    The weights of a box are edge, 1 ... 1, edge, with `radius` ones on either side of the middle:
    for example 0.3 1 1 1 0.3 (Gwosdek et al. 2011, "extended box filter"). Variances add, so each
    box has a third of sigma^2."""
    wanted = sigma.double()[:, None] ** 2 / 3  # variance; double, as a matrix is cubed below
    # A box with an edge of 0 has a variance of radius (radius + 1) / 3. So take the largest radius
    # for which that is at most `wanted`, and then the edge, from 0 to 1, that adds the rest.
    radius = (((12 * wanted + 1).sqrt() - 1) / 2).floor()
    n_ones = 2 * radius + 1
    sum_of_squares = radius * (radius + 1) * n_ones / 3  # of the positions that weigh 1
    # wanted = (sum_of_squares + 2 edge (radius + 1)^2) / (n_ones + 2 edge), solved for edge:
    edge = (wanted * n_ones - sum_of_squares) / (2 * ((radius + 1) ** 2 - wanted))

    reach = int(radius.max()) + 1
    offset = torch.arange(-reach, reach + 1)
    weight = (radius + edge + 1 - offset.abs()).clamp(0, 1)  # 1 up to radius, then edge, then 0
    # Beyond an edge, the last pixel repeats. So output i of box m is the sum over k of weight[m, k]
    # times the image at pixel[i, k]. Several k may fall on one pixel j, and their weights add up.
    pixel = (torch.arange(n)[:, None] + offset).clamp(0, n - 1)  # n x offsets
    falls_on = F.one_hot(pixel, n).double()  # [i, k, j]: 1 if that pixel is j
    box = torch.einsum("mk,ikj->mij", weight, falls_on)
    box = box / box.sum(-1, keepdim=True)
    return torch.linalg.matrix_power(box, 3).float()


# In what follows images are M x n x 3 x n: rows, channels, columns. In this order, products with a
# matrix for rows and with one for columns need no permuted copy.


def transform(rows, x, columns):
    """rows @ image @ columns^T for every image and channel; matrices are M x n x n."""
    return torch.einsum("mih,mhcw,mjw->micj", rows, x, columns)


def grayscale(x):
    """Luma (ITU-R 601): M x n x 3 x n -> M x n x 1 x n."""
    red, green, blue = x.split(1, dim=2)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def blend(x, kind, factor):
    """target + factor (x - target): a factor of 1 gives x, 0 the target, and 2 exaggerates.

    factor: M numbers; kind: M integers. 0 is brightness, whose target is black; 1 contrast: the
    mean grey of the image; 2 saturation: the grey image."""
    kind = kind.view(-1, 1, 1, 1)
    factor = factor.view(-1, 1, 1, 1)
    gray = grayscale(x)
    mean = gray.mean((1, 2, 3), keepdim=True)
    target = gray * (kind == 2) + mean * (kind == 1)  # else 0, black
    return torch.lerp(target, x, factor).clamp(0, 1)


def blends(x, kind, factor):
    """Three blends of each image in an order of its own: kind and factor, M x 3."""
    for place in range(3):
        x = blend(x, kind[:, place], factor[:, place])
    return x


def shift_hue(x, turns):
    """Rotate hues by `turns` (M x 1 x 1, -0.5..0.5) by way of HSV (Smith 1978).

    A hue runs 0..6 around a hexagon: red at 0, green at 2, blue at 4."""
    red, green, blue = x.unbind(dim=2)
    value = x.amax(dim=2)
    chroma = value - x.amin(dim=2)
    scale = 1 / torch.where(chroma == 0, 1.0, chroma)
    hue = 4 + (red - green) * scale  # where blue is the largest
    hue = torch.where(value == green, 2 + (blue - red) * scale, hue)
    hue = torch.where(value == red, (green - blue) * scale, hue)
    hue = hue + 6 * turns

    channels = []
    for corner in (0, 2, 4):
        distance = ((hue - corner + 3) % 6 - 3).abs()  # the shorter way around a circle of 6
        # At a distance of up to 1 a channel is highest, then it falls, and from 2 on it is lowest.
        channels.append(value - chroma * (distance - 1).clamp(0, 1))
    return torch.stack(channels, dim=2)


def random_boxes(u_area, u_aspect, u_corner, crop_min, n):
    """RandomResizedCrop's boxes: the first of ten random ones that fits, else the whole image.

    Random numbers u_area, u_aspect (... x 10), u_corner (... x 2) -> start, length (... x 2)."""
    area = n * n * (crop_min + (1 - crop_min) * u_area)
    aspect = torch.exp((2 * u_aspect - 1) * math.log(4 / 3))  # width / height: 3/4 to 4/3
    size = torch.stack([area / aspect, area * aspect], dim=-1)  # height^2, width^2: ... x 10 x 2
    size = size.sqrt().round()

    fits = ((size > 0) & (size <= n)).all(-1, keepdim=True)  # ... x 10 x 1
    first = fits.int().argmax(-2, keepdim=True)  # the first maximum, so the first that fits
    length = size.take_along_dim(first, dim=-2).squeeze(-2)  # ... x 2
    length = torch.where(fits.any(-2), length, n)
    start = (u_corner * (n - length + 1)).floor()
    return start.long(), length.long()


BLURS = 256  # levels of sigma


class TwoViews:
    """Two random views of every image: two_views(images, step).

    draw() makes random parameters, apply() distorts images by parameters."""

    def __init__(self, augmentation, n, mean, std, seed):
        self.augmentation = augmentation
        self.n = n
        self.mean = mean
        self.std = std
        self.seed = seed

        # Along one axis, crops are few, and so are blurs. So their matrices are made once, and
        # apply() looks them up.
        self.crops = crop_matrices(n).to(mean.device)
        sigma = 0.1 + 1.9 * (torch.arange(BLURS) + 0.5) / BLURS  # pixels
        no_blur = torch.eye(n)[None]
        self.blurs = torch.cat([no_blur, blur_matrices(sigma, n)]).to(mean.device)

    @torch.no_grad()
    def __call__(self, images, step):
        """uint8 B x n x n x 3 -> float 2B x 3 x n x n, normalised, all first views first."""
        batch_size = len(images) * WORLD  # draw for all processes, and use the own share
        parameters = self.draw(random_stream(self.seed, VIEWS, step), batch_size)
        for name, value in parameters.items():  # value: 2 x batch_size x (numbers of a view)
            own = value[:, share_of_process(batch_size)]
            parameters[name] = to_device(own.flatten(0, 1), images.device)
        return self.apply(images.repeat(2, 1, 1, 1), parameters)

    def draw(self, stream, count):
        """Parameters of two views of `count` images: tensors 2 x count x (numbers of a view)."""
        recipe = self.augmentation

        def uniform(numbers=1):  # in [0, 1)
            return torch.from_numpy(stream.random((2, count, numbers), np.float32))

        start, length = random_boxes(
            uniform(10), uniform(10), uniform(2), recipe["crop_min"], self.n)

        # Colour jitter: brightness, contrast and saturation (blends of kind 0, 1, 2), and hue.
        jittered = uniform() < recipe["jitter_prob"]
        *strengths, max_turns = recipe["jitter"]
        strength = torch.tensor(strengths)
        low = (1 - strength).clamp(min=0)
        factor = torch.where(jittered, low + (1 + strength - low) * uniform(3), 1.0)
        turns = torch.where(jittered, max_turns * (2 * uniform() - 1), 0.0)

        # These four come in random order, each at a random time: first the blends that are earlier
        # than the hue, then the hue, then the other blends. Sorting the times of the three blends
        # gives their kinds in order of time: for 0.7, 0.2, 0.5 they are 1, 2, 0.
        moment, kind = uniform(3).sort(-1)
        factor = factor.gather(-1, kind)  # from the order 0, 1, 2 to that of `kind`
        hue_moment = uniform()

        blur = 1 + (uniform() * BLURS).long()  # its place in the table; at 0 is none
        solarize_prob = torch.tensor(recipe["solarize_prob"]).view(-1, 1, 1)
        return dict(
            start=start,
            length=length,
            flip=uniform() < recipe["flip_prob"],
            kind=kind,
            factor=factor,
            before_hue=moment < hue_moment,
            hue=turns,
            gray=uniform() < recipe["gray_prob"],
            blur=torch.where(uniform() < recipe["blur_prob"], blur, 0),
            solarize=uniform() < solarize_prob)

    def apply(self, images, p):
        """uint8 M x n x n x 3 and parameters of M rows -> float M x 3 x n x n, normalised."""
        x = images.permute(0, 1, 3, 2).float() / 255

        crop = p["start"] * self.n + p["length"] - 1  # its place in the table
        rows = take(self.crops, crop[:, 0])  # crop: M x 2, vertical and horizontal
        columns = take(self.crops, crop[:, 1])
        # columns: M x outputs x inputs; a flip reverses the outputs.
        columns = torch.where(p["flip"][:, :, None], columns.flip(1), columns)
        x = transform(rows, x, columns).clamp(0, 1)

        # All blends are done twice, before the hue and after it, so that hue has any place in their
        # order: once with their factor, and once with 1, which changes nothing.
        x = blends(x, p["kind"], torch.where(p["before_hue"], p["factor"], 1.0))
        x = shift_hue(x, p["hue"][:, :, None])
        x = blends(x, p["kind"], torch.where(p["before_hue"], 1.0, p["factor"]))
        x = torch.where(p["gray"][:, :, None, None], grayscale(x), x)

        blur = take(self.blurs, p["blur"].flatten())
        x = transform(blur, x, blur)
        solarize = p["solarize"][:, :, None, None] & (x >= 128 / 255)
        x = torch.where(solarize, 1 - x, x)
        return normalise(x.transpose(1, 2), self.mean, self.std)


def normalise(x, mean, std):
    """float M x 3 x n x n in 0..1 -> (x - mean) / std, channels_last in memory."""
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# ---- 3. Model and loss (Section 2) ---------------------------------------------------------------
# SimCLR: a backbone makes features, and a projector maps them to what the loss compares. It is
# dropped after training, as it discards what the loss does not need.


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut past them (He et al. 2016), named as in torchvision."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class ResNet(nn.Sequential):
    """torchvision's resnet18 for small images: its stem is a 3 x 3 convolution without pooling.

    Normalised M x 3 x n x n -> features M x D. blocks: how many in each stage; every stage but the
    first doubles the channels and halves the image. stem_padding: zeros around the image; 1 keeps
    its size, and the official code has 2. nn.Sequential runs layers in the order in which they are
    set here; the names of those with weights are torchvision's."""

    def __init__(self, width=64, blocks=(2, 2, 2, 2), stem_padding=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, stem_padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        channels = width
        for stage, count in enumerate(blocks, start=1):
            layer = nn.Sequential()
            for block in range(count):
                halve = stage > 1 and block == 0
                inputs = channels
                channels = 2 * channels if halve else channels
                layer.append(BasicBlock(inputs, channels, stride=2 if halve else 1))
            self.add_module(f"layer{stage}", layer)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.features = channels  # D

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SimCLR(nn.Module):
    """Backbone, projector, and a linear probe that only watches: no gradient flows back from it.

    Views M x 3 x n x n -> (projections M x proj_dim, logits M x classes)."""

    def __init__(self, options, classes):
        super().__init__()
        self.backbone = ResNet(options.width, options.blocks, options.stem_padding)
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.features, options.proj_hidden),
            nn.ReLU(),
            nn.Linear(options.proj_hidden, options.proj_dim))
        self.probe = nn.Linear(self.backbone.features, classes)

    def forward(self, views):
        features = self.backbone(views)
        return self.projector(features), self.probe(features.detach())


def build_model(options, data):
    """A SimCLR on the compute device; its initial weights depend on the seed alone."""
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes))
    return model.to(data.device, memory_format=torch.channels_last)


def nt_xent(projections, temperature):
    """NT-Xent (Chen et al. 2020, eq. 1): find the other view of the same image among all views.

    projections: 2B x proj_dim, first views first. Returns the mean over views of the cross-entropy
    of cosines / temperature, in fp32; it is ln(2B - 1) if all cosines are equal. Copies of one real
    image in a batch count as different images, as in the official code."""
    z = F.normalize(gather(projections.float()), dim=1)  # of all processes, first views first
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)  # a view is no candidate for itself
    view = torch.arange(len(z), device=z.device)
    partner = view.roll(len(z) // 2)  # views i and i + B (modulo 2B) show the same image
    return F.cross_entropy(similarity, partner)


def probe_cross_entropy(logits, labels, n_real):
    """Mean cross-entropy of the views of a batch's real images, 0 without any.

    logits: 2B x classes; labels: B, -1 is left out; n_real: how many of the whole batch are real.
    With several processes, each returns WORLD times its part of that mean: later, gradients and
    values are averaged over processes."""
    labels = labels.repeat(2)
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    return WORLD * total / (2 * max(n_real, 1))


# ---- 4. Optimiser (Section 5) --------------------------------------------------------------------
# Large batches need a large learning rate, with which some layers would move too far. LARS shortens
# a gradient that, without momentum, would move a weight tensor by more than eta times its norm.

ETA = 0.02
EPS = 1e-8


class LARS(torch.optim.SGD):
    """Momentum SGD with a trust ratio for each weight tensor (You et al. 2017), clipped at 1.

    step() replaces the gradient g of a weight tensor p by a direction d. Then SGD does its usual
    b = momentum * b + d and p = p - lr * b. Biases and batch norm keep g. d contains the weight
    decay. (The parameter groups call it `decay`, as SGD would add a `weight_decay` once more.)"""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    p.grad = lars_direction(p, p.grad, group["lr"], group["decay"])
        super().step()


def lars_direction(p, g, lr, decay):
    """d of a weight tensor p with gradient g: d = r (g + decay * p).

    The trust ratio is r = min(1, eta |p| / (|g| + decay |p| + eps) / lr). If it is 1, that is SGD
    with weight decay. If it is less, lr cancels in lr * d, SGD's step without momentum, and
    |lr * d| <= eta |p|. If p or g is 0, d = g, as in the official code. (With p = 0, r would be 0,
    and p could never change.)"""
    p_norm = p.norm()
    g_norm = g.norm()
    ratio = ETA * p_norm / (g_norm + decay * p_norm + EPS) / lr
    d = ratio.clamp(max=1) * (g + decay * p)
    return torch.where((p_norm > 0) & (g_norm > 0), d, g)


def build_optimizer(model, options):
    """One LARS for two groups: what learns without labels, and the probe with its own rate."""
    learned = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [
        dict(params=learned, peak=options.lr, decay=options.weight_decay),
        dict(params=model.probe.parameters(), peak=options.probe_lr, decay=0.0)]
    return LARS(groups, momentum=options.momentum)  # lr is set before every step


def learning_rate(step, steps, warmup, peak, start=3e-5):
    """The rate at `step` (the first is 0): linear from `start` (the paper's) to `peak`, which it
    reaches at `warmup`, then a cosine that reaches 0 at `steps`."""
    if step < warmup:
        start = min(start, peak)
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rates(optimizer, step, options):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options.steps, options.warmup_steps, group["peak"])


# ---- 5. Evaluation (Section 5) -------------------------------------------------------------------
# What is a representation worth? The backbone, frozen and in eval mode, sees plain images; probes,
# simple classifiers, learn from its features. (The online probe has learned along in training.) The
# final weights count, not the best on the way.

METRICS = ("online_top1", "linear_top1", "knn_top1")


@torch.no_grad()
def encode(backbone, images, data, autocast):
    """uint8 images M x n x n x 3 -> features, float M x D, on the compute device."""
    was_training = backbone.training
    backbone.eval()
    features = []
    for chunk in images.split(1000):
        pixels = chunk.to(data.device).permute(0, 3, 1, 2).float() / 255
        with autocast:
            output = backbone(normalise(pixels, data.mean, data.std))
        features.append(output.float())
    backbone.train(was_training)
    return torch.cat(features)


def top1(scores, labels):
    """Percentage of the rows of M x C scores that are highest at the label."""
    right = scores.argmax(1) == labels
    return 100 * int(right.sum()) / len(labels)


def knn_top1(train, train_labels, test, test_labels, k, temperature):
    """Weighted kNN (Wu et al. 2018): the k nearest training images vote exp(cosine / T)."""
    train = F.normalize(train, dim=1)
    test = F.normalize(test, dim=1)
    classes = int(train_labels.max()) + 1
    scores = []
    for chunk in test.split(500):
        cosine, nearest = (chunk @ train.T).topk(min(k, len(train)))
        # To take out the maximum changes all votes by one factor, and none can overflow.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        one_hot = F.one_hot(train_labels[nearest], classes).float()
        scores.append(torch.einsum("mk,mkc->mc", weight, one_hot))
    return top1(torch.cat(scores), test_labels)


def linear_top1(train, train_labels, test, test_labels, epochs, lr, seed, batch_size=1000):
    """Offline linear probe: softmax regression on standardised features.

    SGD with momentum 0.9, a cosine schedule and no weight decay, from zero weights."""
    mean = train.mean(0)
    std = train.std(0) + 1e-6
    train = (train - mean) / std
    test = (test - mean) / std
    classes = int(train_labels.max()) + 1
    probe = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.SGD(probe.parameters(), lr, momentum=0.9)

    for epoch in range(epochs):
        stream = random_stream(seed, PROBE, epoch)
        order = torch.from_numpy(stream.permutation(len(train)))
        batches = order.to(train.device).split(batch_size)
        for batch, rows in enumerate(batches):
            progress = epoch + batch / len(batches)  # in epochs
            rate = learning_rate(progress, epochs, warmup=0, peak=lr)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(probe(train[rows]), train_labels[rows]).backward()
            optimizer.step()
    return top1(probe(test), test_labels)


def probe_features(train, test, data, options):
    """Scores of features M x D: the offline probes learn from `train`."""
    labels = data.probe_labels.to(train.device)
    sets = (train, labels, test, data.test_labels)
    return {
        "linear_top1": linear_top1(*sets, options.linear_epochs, options.linear_lr, options.seed),
        "knn_top1": knn_top1(*sets, options.knn_k, options.knn_temperature)}


def evaluate(model, data, options, autocast):
    """All METRICS of a model, in percent of the test images."""
    train = encode(model.backbone, data.probe_images, data, autocast)
    test = encode(model.backbone, data.test_images, data, autocast)
    online = top1(model.probe(test), data.test_labels)
    return {"online_top1": online} | probe_features(train, test, data, options)


# ---- 6. Training ---------------------------------------------------------------------------------
# The algorithm: mix, make two views, compare them, move the weights. Logs, checkpoints, evaluations
# and signals are the business of `run`.


def train(options, data):
    """Train, evaluate, and fill the folder --out. Returns the result, as in result.json."""
    strength, augmentation = choose_augmentation(options)
    mixture = Mixture(data, options.ratio, options.batch_size, options.seed)
    two_views = TwoViews(augmentation, options.image_size, data.mean, data.std, options.seed)
    model = build_model(options, data)
    optimizer = build_optimizer(model, options)
    autocast = choose_autocast(options)
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")
    state = dict(model=model, optimizer=optimizer, scaler=scaler)

    with Run(options, data, mixture, two_views, strength, state) as run:  # loads state, if saved
        # fast_model shares the weights of model. Both it and apply(), which two_views() calls, may
        # be compiled. With several processes, fast_model also averages gradients over them.
        fast_model, two_views.apply = accelerate(model, two_views.apply, options)
        for step in range(run.first_step, options.steps):
            images, labels, n_real = mixture.batch(step)
            views = two_views(images, step)
            with autocast:
                projections, logits = fast_model(views)
            loss = nt_xent(projections, options.temperature)
            probe_loss = probe_cross_entropy(logits, labels, n_real)

            set_learning_rates(optimizer, step, options)
            optimizer.zero_grad()
            scaler.scale(loss + probe_loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.after_step(step + 1, loss, probe_loss)
        return run.finish()


# ---- 7. Experiments ------------------------------------------------------------------------------
# The claim in four cells with equal steps: strong and weak views without inflation, vanilla
# inflation, and AdaInf. (To separate N from weaker views, do single runs with --ratio and --aug.)


def cells_of(options, seed):
    """{name: options} of the four cells: the user's options, overridden by the cell's own.

    A user's --crop-min and so on hold in all cells."""
    plain = dict(gen_data=None, gen_size=None, ratio=1)
    overrides = {
        "none-strong": dict(plain, aug="strong"),
        "none-weak": dict(plain, aug="weak"),
        "vanilla-1to1-strong": dict(ratio=1, aug="strong"),  # N = 1
        f"adainf-{options.ratio}to1-weak": dict(ratio=options.ratio, aug="weak")}
    cells = {}
    for name, own in overrides.items():
        folder = str(Path(options.out) / f"{name}-{seed}")
        # Without compare and demo, a cell is a single run, also when --eval-only reads its options.
        own.update(out=folder, seed=seed, seeds=[seed], compare=False, demo=False)
        cells[name] = argparse.Namespace(**(vars(options) | own))
    return cells


def compare(options, all_data):
    """Train all cells for each of --seeds; a seed also chooses the subsets of images.

    Prints a table, writes comparison.json and .png, returns {row: {metric: spread}}."""
    # Let bad sizes be refused before any run. They are the same for every seed.
    for cell in cells_of(options, options.seeds[0]).values():
        Mixture(choose_subsets(all_data, cell), cell.ratio, cell.batch_size, cell.seed)

    results = collections.defaultdict(list)  # {row: scores for each seed}
    for seed in options.seeds:
        cells = cells_of(options, seed)
        baselines = without_training(cells["none-strong"], all_data)  # the same for every cell
        for name, scores in baselines.items():
            results[name].append(scores)
        for name, cell in cells.items():
            say(f"\n{name}, seed {seed}")
            results[name].append(train(cell, choose_subsets(all_data, cell)))

    table = {}
    for name, scores in results.items():
        metrics = [metric for metric in METRICS if metric in scores[0]]
        table[name] = {metric: spread([each[metric] for each in scores]) for metric in metrics}
    print_table(table)
    say(f"top-1 on {len(all_data.test_images):,} test images, %: mean and standard deviation over "
        f"seeds {options.seeds}; {options.steps:,} steps of {options.batch_size} images")
    if RANK == 0:
        folder = Path(options.out)
        write_json(folder / "comparison.json", dict(options=vars(options), table=table))
        write_figure(folder / "comparison.png", draw_comparison, table)
    return table


def without_training(options, all_data):
    """{row: scores} of raw pixels and of an untrained network (whose online probe guesses)."""
    data = choose_subsets(all_data, options)
    model = build_model(options, data)
    return {
        "raw pixels": probe_pixels(data, options),
        "untrained network": evaluate(model, data, options, choose_autocast(options))}


def probe_pixels(data, options):
    """Scores of the offline probes on raw pixels, less the mean colour."""
    features = []
    for images in (data.probe_images, data.test_images):
        pixels = images.to(data.device).permute(0, 3, 1, 2) / 255
        features.append((pixels - data.mean).flatten(1))
    train, test = features
    return probe_features(train, test, data, options)


def spread(values):
    """Mean and standard deviation of a list of numbers, and the numbers themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return dict(mean=statistics.mean(values), std=std, values=values)


def print_table(table):
    say("\n" + " " * 24 + "".join(f"{metric:>18}" for metric in METRICS))
    for name, row in table.items():
        line = f"{name:24}"
        for metric in METRICS:
            text = ""
            if metric in row:
                text = f"{row[metric]['mean']:.2f}"
                if row[metric]["std"] is not None:
                    text += f" +- {row[metric]['std']:5.2f}"
            line += f"{text:>18}"
        say(line)


# ==== What only operations need ===================================================================
# ---- Errors --------------------------------------------------------------------------------------
# Every error of a user's ends in one line: what is wrong, where, and what to do.


class InputError(Exception):
    """Such a line, and the exit status: 2 for bad input, 1 for a run that cannot go on."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def check(ok, message, status=2):
    if not ok:
        raise InputError(message, status)


def one_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def errors_as(message, *kinds, status=2):
    """Errors of these kinds (of all, if none is named) become an InputError: message (reason)."""
    try:
        yield
    except InputError:
        raise
    except kinds or Exception as error:
        raise InputError(f"{message} ({one_line(error)})", status) from error


# ---- Options -------------------------------------------------------------------------------------

# --demo: a small network, and a procedural data set of which 20 images play the real ones.
DEMO = dict(dataset="fabrics", gen_data=["fabrics"], real_size=20, probe_size=5000, image_size=16,
            width=8, blocks=[1, 1, 1], proj_hidden=256, proj_dim=64, steps=800, warmup_steps=80,
            batch_size=20, lr=0.1, eval_every=0, log_every=200, compare=True, out="runs/demo")


def flag(name):
    return "--" + name.replace("_", "-")


def number(kind, low, high=10 ** 9):
    """An argparse type: an int or a float in low..high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value

    convert.__name__ = kind.__name__  # which argparse shows to users
    return convert


def build_parser():
    """Every knob, in the order of the method.

    The defaults are the paper's recipe for CIFAR-10, but for the padding of the stem."""
    parser = argparse.ArgumentParser(prog="adainf.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: check(False, message)  # one line, no usage
    switch = argparse.BooleanOptionalAction
    count = number(int, 1)
    whole = number(int, 0)
    two_or_more = number(int, 2)
    units = number(int, 1, 65536)
    share = number(float, 0, 1)
    positive = number(float, 1e-9, 1e30)
    scale = number(float, 0, 1e30)

    def begin_group(title):
        """Begin a part of the help text. Returns add(), which adds an option to it."""
        group = parser.add_argument_group(title)

        def add(name, default, kind, text, **more):
            key = name[2:].replace("-", "_")
            if key in STRONG:  # it has two defaults, one of each recipe
                text += f" (default: strong {STRONG[key]}, weak {WEAK[key]})"
            elif default is not None and default is not False:
                text += " (default: %(default)s)"
            if kind is switch:
                more["action"] = switch
            elif "choices" not in more:
                more.update(type=kind, metavar=kind.__name__.upper())
            group.add_argument(name, default=default, help=text, **more)

        return add

    add = begin_group("data")
    add("--dataset", "cifar10", str, "cifar10, cifar100, fabrics or a folder {train,test}/<class>/")
    add("--data-dir", "data", str, "folder for downloads")
    add("--image-size", 32, number(int, 8, 64), "pixels n along a side; a folder's images are "
        "resized")
    add("--real-size", None, two_or_more, "real images |D_d|, a class-balanced subset; default all")

    add = begin_group("inflation")
    add("--gen-data", None, str, "generated images: npz files, `image` uint8 M x n x n x 3 RGB",
        nargs="+")
    add("--gen-size", None, count, "generated images |D_g|, a random subset; default all")
    add("--ratio", 10, whole, "weight N of a real image against a generated one; 0: no real images")

    add = begin_group("augmentation (single values override those of --aug)")
    add("--aug", "auto", str, "auto: weak with generated data, else strong",
        choices=["auto", *RECIPES])
    add("--crop-min", None, number(float, 1e-3, 1), "smallest crop, as a share of the area")
    add("--jitter-prob", None, share, "probability of colour jitter")
    add("--jitter", None, scale, "brightness, contrast, saturation (1 +- it), hue (turns)", nargs=4)
    add("--gray-prob", None, share, "probability of grayscale")
    add("--blur-prob", None, share, "probability of Gaussian blur, sigma 0.1 to 2 pixels")
    add("--solarize-prob", None, share, "probability of solarize: one, or one a view", nargs="+")
    add("--flip-prob", None, share, "probability of a horizontal flip")

    add = begin_group("model")
    # Below 8 channels PyTorch's gradients are wrong on CPUs without AVX-512 (oneDNN issue 6035).
    add("--width", 64, number(int, 8, 1024), "channels of the ResNet's first stage")
    add("--blocks", [2, 2, 2, 2], number(int, 1, 64), "blocks of each stage", nargs="+")
    add("--stem-padding", 1, number(int, 0, 2), "zeros around the image, pixels; official code: 2")
    add("--proj-hidden", 2048, units, "hidden units of the projector")
    add("--proj-dim", 256, units, "outputs of the projector")
    add("--temperature", 0.2, number(float, 1e-3), "temperature of NT-Xent")

    add = begin_group("optimisation")
    add("--steps", 100_000, count, "training steps, however much data there is")
    add("--batch-size", 512, two_or_more, "images B a step, over all processes")
    add("--lr", 0.4, positive, "peak learning rate of LARS; meant for B = 512, nothing rescales it")
    add("--warmup-steps", None, whole, "steps of linear warm-up; default 1%% of --steps")
    add("--weight-decay", 1e-4, scale, "of weights; biases, norms and the probe have none")
    add("--momentum", 0.9, number(float, 0, 0.9999), "momentum of LARS")
    add("--probe-lr", 0.1, positive, "peak learning rate of the online linear probe")
    add("--seed", 0, whole, "decides every random draw")

    add = begin_group("evaluation")
    add("--eval-every", None, whole, "steps between evaluations, the first before training; "
        "0: only after it; default a fifth of --steps")
    add("--probe-size", None, two_or_more, "labelled images that the linear and kNN probes learn "
        "from, a class-balanced subset of all; default those of --real-size")
    add("--knn-k", 20, count, "neighbours that vote")
    add("--knn-temperature", 0.07, number(float, 1e-3), "a vote weighs exp(cosine / temperature)")
    add("--linear-epochs", 100, count, "epochs of the offline linear probe")
    add("--linear-lr", 0.1, positive, "peak learning rate of the offline linear probe")
    add("--eval-only", None, str, "evaluate the checkpoint of the run in this folder")

    add = begin_group("experiments")
    add("--compare", False, switch, "no inflation (strong, weak), vanilla and AdaInf side by side; "
        "--crop-min and so on would hold in all of them")
    add("--seeds", None, whole, "seeds of --compare; default --seed", nargs="+")
    add("--demo", False, switch, "--compare on fabrics, in minutes on a CPU")

    add = begin_group("system")
    add("--out", None, str, "folder of the run, continued by the same command; default in runs/")
    add("--device", "auto", str, "where to compute", choices=["auto", "cuda", "mps", "cpu"])
    add("--data-device", "auto", str, "where images wait; auto: on CUDA, if half of its free "
        "memory holds them", choices=["auto", "cuda", "cpu"])
    add("--amp", "auto", str, "precision of products; auto: bf16 if CUDA or CPU have it, fp16 on "
        "other CUDA, else off", choices=["auto", "bf16", "fp16", "off"])
    add("--compile", None, switch, "compile views and network; default on CUDA only, as on a CPU "
        "it takes long and saves little")
    add("--log-every", 50, count, "steps between log lines")
    add("--save-every", None, count, "steps between checkpoints; default 2%% of --steps")
    add("--dry-run", False, switch, "everything once, in a temporary folder: data, a step, an "
        "evaluation, all files")
    return parser


def parse_options(argv=None):
    """The command line, and the defaults that depend on other options. Raises InputError."""
    parser = build_parser()
    options = parser.parse_args(argv)
    # --demo and --eval-only bring other defaults, with which the command line is parsed once more.
    if options.demo:
        parser.set_defaults(**DEMO)
    if options.eval_only:
        parser.set_defaults(**read_config(options.eval_only)["options"])
        parser.set_defaults(device="auto", data_device="auto")  # this may be another machine
        parser.set_defaults(seeds=None)  # those stored would contradict another --seed
    options = parser.parse_args(argv)

    # Resolved here, and stored resolved: "auto" would be another precision on other hardware.
    options.device = choose_device(options.device)
    options.amp = choose_precision(options.amp, options.device)
    inflation = f"ratio{options.ratio}" if options.gen_data else "none"
    run = f"{Path(options.dataset).name}-{inflation}-{options.aug}-seed{options.seed}"
    defaults = dict(
        warmup_steps=round(options.steps / 100),
        eval_every=math.ceil(options.steps / 5),
        save_every=math.ceil(options.steps / 50),
        seeds=[options.seed],
        probe_size=options.real_size,
        compile=options.device == "cuda",
        out=f"runs/{run}")
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)

    check_options(options)
    if options.eval_only:
        options.gen_data = None  # perhaps no longer there (but the check needs it, for --ratio 0)
        options.gen_size = None
    if options.dry_run:
        options.dry_run = False  # from here on it is a run like any other
        options.steps = 1
        options.warmup_steps = 0
        options.linear_epochs = 1
        options.out = tempfile.mkdtemp(prefix="adainf-dry-run-")
    return options


def check_options(options):
    """Refuse values that do not go together. Raises InputError."""
    check(options.warmup_steps <= options.steps, "--warmup-steps: more than --steps")
    check(not options.jitter or options.jitter[3] <= 0.5, "--jitter: hue is more than 0.5 turns")
    check(len(options.solarize_prob or []) <= 2, "--solarize-prob: more than one value a view")
    check(options.data_device != "cuda" or options.device == "cuda",
          "--data-device cuda: needs --device cuda")
    check(options.batch_size % WORLD == 0,
          f"--batch-size {options.batch_size}: {WORLD} processes cannot share it equally")
    needs_generated = options.ratio == 0 or options.compare or options.gen_size
    check(options.gen_data or not needs_generated,
          "--ratio 0, --compare and --gen-size: need --gen-data")
    check(not options.compare or options.aug == "auto", "--aug: --compare sets it for every cell")
    check(options.compare or options.seeds == [options.seed], "--seeds: is for --compare; a single "
          "run takes --seed")
    check(len(set(options.seeds)) == len(options.seeds), "--seeds: one comes twice")
    check(not (options.eval_only and (options.compare or options.dry_run)),
          "--eval-only: evaluates one run; leave out --compare and --dry-run")


# ---- Reading images ------------------------------------------------------------------------------


def load_data(options):
    """Data with all images of --dataset and --gen-data, on the CPU. Raises InputError."""
    name = options.dataset
    size = options.image_size
    if name == "fabrics":
        train, test, classes = demo_data().fabrics(size)
    elif name in ("cifar10", "cifar100"):
        train, test, classes = read_cifar(name, options)
    else:
        *train, classes = read_folder(Path(name) / "train", size)
        *test, test_classes = read_folder(Path(name) / "test", size)
        odd = sorted(set(classes) ^ set(test_classes))
        check(not odd, f"--dataset {name}: train and test differ in the classes {odd}")

    images, labels = map(torch.from_numpy, train)
    test_images, test_labels = map(torch.from_numpy, test)
    generated = images[:0]
    for path in options.gen_data or []:
        more = torch.from_numpy(read_generated(path, size))
        # One file alone is not copied, as it may hold millions of images.
        generated = torch.cat([generated, more]) if len(generated) else more

    std, mean = torch.std_mean(images.float() / 255, dim=(0, 1, 2), correction=0, keepdim=True)
    mean = mean.round(decimals=4).view(3, 1, 1)  # the digits that papers give
    std = std.round(decimals=4).clamp(min=0.004).view(3, 1, 1)  # at least one of 255 levels
    return Data(
        images=images,
        labels=labels,
        generated=generated,
        probe_images=images,
        probe_labels=labels,
        test_images=test_images,
        test_labels=test_labels.to(options.device),
        classes=classes,
        mean=mean.to(options.device),
        std=std.to(options.device))


def demo_data():
    """The module with the demo's images, which are not a part of the method."""
    with errors_as("fabrics: needs download_generated.py beside adainf.py", ImportError):
        import download_generated
    return download_generated


def read_cifar(name, options):
    """(train images, labels), (test images, labels), class names."""
    check(options.image_size == 32,
          f"--image-size {options.image_size}: {name} has 32 x 32 pixels; leave the option out")
    dataset = getattr(torchvision.datasets, name.upper())
    with errors_as(f"--dataset {name}: get it with `python download_generated.py {name}`, which "
                   "resumes a download and knows a second source", OSError, RuntimeError):
        # torchvision checks the md5 before it unpickles. Several processes would all download into
        # one file, so they do not: the user is told to do it before.
        sets = [dataset(options.data_dir, train, download=WORLD == 1) for train in (True, False)]
    train, test = [(np.ascontiguousarray(each.data), np.array(each.targets)) for each in sets]
    return train, test, sets[0].classes


def read_folder(folder, size):
    """(images, labels, class names) of folder/<class>/*, cropped to squares, resized (bicubic)."""
    from PIL import Image, ImageOps

    def resize(image):
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))

    with errors_as(f"--dataset: {folder} has no classes of images; give cifar10, cifar100, fabrics "
                   "or a folder {train,test}/<class>/*", OSError):
        found = torchvision.datasets.ImageFolder(folder, transform=resize)
    check(len(found.classes) > 1, f"--dataset: {folder} has one class only, {found.classes[0]}")
    images = []
    for index, (path, _) in enumerate(found.samples):
        with errors_as(f"--dataset: {path} is no readable image: repair or remove it"):
            images.append(found[index][0])
    return np.stack(images), np.array(found.targets), found.classes


def read_generated(path, size):
    """`image` of an npz file, uint8 M x size x size x 3; "fabrics" stands for the demo's images."""
    if path == "fabrics":
        return demo_data().generate_fabrics(size)
    with errors_as(f"--gen-data {path}: has no whole array `image`"):
        with zipfile.ZipFile(path) as archive, archive.open("image.npy") as member:
            images = np.lib.format.read_array(member, allow_pickle=False)
            rest = member.read()  # to the end, where zipfile compares the checksum
            check(not rest, f"--gen-data {path}: has bytes after `image`")
    valid = images.dtype == np.uint8 and images.shape[1:] == (size, size, 3) and len(images)
    check(valid, f"--gen-data {path}: has {images.dtype} {images.shape}, not uint8 M x {size} x "
          f"{size} x 3; `download_generated.py --from-npz` converts")
    return np.ascontiguousarray(images)


def choose_subsets(data, options):
    """The Data of one run: --real-size, --gen-size, --probe-size; images wait where they fit."""
    images, labels = balanced_subset(data, options.real_size, options.seed)
    probe_images, probe_labels = images, labels  # not a second copy of the same images
    if options.probe_size != options.real_size:
        probe_images, probe_labels = balanced_subset(data, options.probe_size, options.seed)
    generated = data.generated if options.gen_data else data.generated[:0]
    if options.gen_size:
        check(options.gen_size <= len(generated),
              f"--gen-size {options.gen_size}: --gen-data has only {len(generated)} images")
        order = np.random.default_rng(options.seed).permutation(len(generated))
        generated = generated[order[:options.gen_size]]

    # A batch is gathered fastest on the GPU; the network needs room there as well.
    place = options.data_device
    if place == "auto":
        free = torch.cuda.mem_get_info()[0] if options.device == "cuda" else 0
        place = "cuda" if images.nbytes + generated.nbytes < free / 2 else "cpu"
    return dataclasses.replace(
        data,
        images=images.to(place),
        labels=labels.to(place),
        generated=generated.to(place),
        probe_images=probe_images,
        probe_labels=probe_labels)


def balanced_subset(data, size, seed):
    """(images, labels) of a random subset, with classes as equal as they can be; None takes all."""
    total = len(data.labels)
    if size is None:
        return data.images, data.labels
    check(size <= total,
          f"--real-size, --probe-size: {size} is more than the {total} labelled images")
    labels = data.labels.numpy()
    order = np.random.default_rng(seed).permutation(total)
    # Take a random image of every class, then another one of every class, and so on.
    by_class = [order[labels[order] == label] for label in range(len(data.classes))]
    rounds = itertools.zip_longest(*by_class)  # None for a class that has no more
    in_turn = [index for one_of_each in rounds for index in one_of_each if index is not None]
    chosen = sorted(in_turn[:size])
    return data.images[chosen], data.labels[chosen]


# ---- Device, precision, processes ----------------------------------------------------------------


def choose_device(name):
    """cuda, mps or cpu; auto takes the first that there is. Raises InputError."""
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.insert(0, "mps")
    if torch.cuda.is_available():
        found.insert(0, "cuda")
    check(name in ["auto", *found], f"--device {name}: there is none here; there is {found}")
    return found[0] if name == "auto" else name


def choose_precision(name, device):
    """bf16, fp16 or off; auto takes bf16 where the hardware supports it."""
    if name != "auto":
        return name
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"


def choose_autocast(options):
    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    return torch.autocast(options.device, dtype, enabled=options.amp != "off")


def tune_process():
    """Process-wide settings for speed: set by main(), not on import."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --amp off means fp32 all through
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        # Keep freed memory, or every step must get its pages from the system again.
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold = -1  # the numbers of these parameters in malloc.h
        m_mmap_threshold = -3
        no_limit = 2 ** 31 - 1
        # The first call keeps large blocks, the second the end of the heap. Where an old glibc
        # refuses the first, the second alone would make it slower.
        if libc.mallopt(m_mmap_threshold, no_limit):
            libc.mallopt(m_trim_threshold, no_limit)


def accelerate(model, apply, options):
    """Returns a model with the same weights, and TwoViews.apply, compiled if asked to.

    With several processes, the gradients of this model are means over them."""
    if WORLD > 1 and options.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # statistics of whole batches
    if options.compile:
        torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it is
        model.compile()  # in place, so that names in the state dict stay clean
        apply = torch.compile(apply)
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model)
    return model, apply


@contextlib.contextmanager
def processes(device):
    """Join the processes that torchrun started, for as long as this lasts."""
    if WORLD == 1:
        yield
        return
    gpu = None
    with errors_as(f"process {RANK} of {WORLD} cannot start; use torchrun, with one process a GPU"):
        if device == "cuda":
            gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(gpu)
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the other processes


def share_of_process(count):
    """The slice of a batch of `count` images that this process works on."""
    part = count // WORLD
    return slice(RANK * part, (RANK + 1) * part)


def gather(views):
    """Rows for this process's views -> rows for those of all: all first views, then all second.

    Each process computes the whole loss, but has the gradient through its own views only; the sum
    over processes is the whole gradient. DistributedDataParallel divides it by WORLD, so the hook
    multiplies by WORLD."""
    if WORLD == 1:
        return views
    views.register_hook(lambda gradient: WORLD * gradient)
    parts = [torch.empty_like(views) for _ in range(WORLD)]
    dist.all_gather(parts, views.detach())
    parts[RANK] = views
    halves = [part.chunk(2) for part in parts]
    first_views, second_views = zip(*halves)
    return torch.cat(first_views + second_views)


def over_processes(operation, x):
    """x, reduced over all processes by a dist.ReduceOp."""
    if WORLD > 1:
        dist.all_reduce(x, operation)
    return x


def to_device(x, device):
    """Move a tensor; to a GPU without waiting, so that it computes meanwhile."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def say(text):
    if RANK == 0:
        print(text, flush=True)


# ---- A run's folder ------------------------------------------------------------------------------


class Run:
    """The folder --out: configuration, log, checkpoint, results. The same command continues it,
    the lock on its log keeps a second process out, and of many processes only the first writes."""

    # These options may differ when a run goes on: results depend on them by rounding at most. (The
    # contents of gen_data are compared.) So may the number of processes, with an exception: on
    # CPUs, batch norm sees one share only, so that results depend on it.
    MAY_CHANGE = ("out", "data_dir", "gen_data", "device", "data_device", "compile", "log_every",
                  "save_every", "eval_every")

    def __init__(self, options, data, mixture, two_views, strength, state):
        self.options = options
        self.data = data
        self.state = state  # all that the next step depends on: model, optimizer, scaler
        self.folder = Path(options.out)
        self.signal = 0
        self.facts = dict(
            beta=mixture.beta,
            augmentation=strength,
            n_real=len(data.images),
            n_generated=len(data.generated),
            seed=options.seed)
        gap = 1 - mixture.beta
        say(f"data      {len(data.images):,} real images of {len(data.classes)} classes, "
            f"{len(data.generated):,} generated\n"
            f"mixture   beta = {mixture.beta:.3f}: D_TV(P_t, P_d) = {gap:.3f} D_TV(P_g, P_d)\n"
            f"views     {strength}: {two_views.augmentation}\n"
            f"training  {options.steps:,} steps of {options.batch_size} images, an epoch has "
            f"{mixture.steps_per_epoch:,}; {WORLD} x {options.device}, AMP {options.amp}")
        self.two_views = two_views
        if RANK == 0:
            self.open_folder()

    def open_folder(self):
        """Lock the folder; refuse it if it was begun with other options or images."""
        with errors_as(f"--out {self.folder}: cannot be written", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what was logged is there, whatever happens next.
            self.log_file = open(self.folder / "log.jsonl", "ab", buffering=0)
        try:
            import fcntl
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {self.folder}: another process trains there") from None
        except (ImportError, OSError):
            pass  # on Windows, and on some disks, there are no locks

        data = self.data
        pools = (data.images, data.labels, data.generated, data.probe_images, data.probe_labels,
                 data.test_images, data.test_labels)
        self.config = dict(
            options=vars(self.options),
            **self.facts,
            classes=data.classes,
            checksums=[zlib.crc32(pool.cpu().numpy()) for pool in pools],
            mean=data.mean.flatten().tolist(),
            std=data.std.flatten().tolist())
        if not (self.folder / "config.json").exists():
            return
        old = read_config(self.folder)  # refuses the file of another program
        # Without a checkpoint, a run may begin anew with any options.
        if (self.folder / "checkpoint.pt").exists():
            advice = "go on as it began, or choose a new --out"
            for name, value in vars(self.options).items():
                before = old["options"].get(name)
                check(before == value or name in self.MAY_CHANGE, f"--out {self.folder}: was begun "
                      f"with {flag(name)} {before}, not {value}; {advice}")
            check(old["checksums"] == self.config["checksums"],
                  f"--out {self.folder}: was begun with other images; {advice}")

    def __enter__(self):
        """Load the checkpoint, begin the log, listen to signals."""
        if WORLD > 1:
            dist.barrier()  # until the first process has opened the folder
        self.first_step, self.lines = load_checkpoint(self.folder, self.state)
        if RANK == 0:
            write_json(self.folder / "config.json", self.config)
            draw_views(self.folder / "views.png", self.data, self.two_views)
            self.log_file.truncate(0)  # what came after the checkpoint will be done again
            self.write_log(self.lines)
        if self.first_step:
            say(f"continues {self.folder} after step {self.first_step:,}")
        self.log("start", self.first_step,  # enough to know later what ran where
                 argv=sys.argv,
                 time=time.strftime("%Y-%m-%d %H:%M:%S"),
                 machine=platform.platform(),
                 gpu=torch.cuda.get_device_name() if self.options.device == "cuda" else None,
                 processes=WORLD,
                 torch=str(torch.__version__),
                 script=hashlib.sha256(Path(__file__).read_bytes()).hexdigest())

        if self.first_step == 0 and self.options.eval_every:
            self.log_evaluation(0)
        # torchrun and Slurm stop a run by SIGTERM, Slurm warns by SIGUSR1, which Windows lacks.
        stopping = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}
        self.old_handlers = {}
        for number in stopping:
            self.old_handlers[number] = signal.signal(number, self.note_signal)
        self.clock = (time.perf_counter(), self.first_step)
        return self

    def __exit__(self, error_type, *_):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if RANK == 0:
            self.log_file.close()
        if self.signal and not error_type:  # it came in finish(), after the last step
            raise SystemExit(128 + self.signal)

    def note_signal(self, number, _):
        """Stop after the step, or after finish(); a second one of its kind stops at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def after_step(self, step, loss, probe_loss):
        """What is due after so many steps: to log, evaluate, save, or stop."""
        options = self.options
        last = step == options.steps
        log = last or step % options.log_every == 0
        evaluation = last or options.eval_every and step % options.eval_every == 0
        if log:
            self.log_training(step, loss, probe_loss)
        if evaluation:
            self.log_evaluation(step)
        stop = self.stop_asked(step)
        save = stop or evaluation or step % options.save_every == 0
        if save:
            self.save(step)
        if stop:
            name = signal.Signals(stop).name
            say(f"stopped by {name} after step {step:,}, which is saved; the same command goes on")
            raise SystemExit(128 + stop)
        # Speed is measured from one log line to the next. The clock also starts anew after what is
        # not training: compiling (in the first step), evaluating, saving.
        first = step == self.first_step + 1
        if first or log or save:
            self.clock = (time.perf_counter(), step)

    def stop_asked(self, step):
        """The signal that any process has received, or 0. They stop together; to agree they wait
        for each other, so they do it only at every tenth step, and at the last."""
        if WORLD == 1:
            return self.signal
        if step % 10 and step < self.options.steps:
            return 0
        number = torch.tensor(self.signal, device=self.data.device)
        return int(over_processes(dist.ReduceOp.MAX, number))

    def check_finite(self, step, tensors):
        """A run that diverged stops, and is never saved. Raises InputError."""
        finite = all(tensor.isfinite().all() for tensor in tensors)  # here the host waits
        check(finite, f"a loss or a weight is not finite at step {step}, and was not saved; "
              "resuming would fail again: try a lower --lr, or --amp off, in a new --out",
              status=1)

    def log_training(self, step, loss, probe_loss):
        """Log the losses of this step, and the speed."""
        self.check_finite(step, [loss, probe_loss])
        loss = loss.item()  # of the whole batch, in every process
        probe_loss = over_processes(dist.ReduceOp.SUM, probe_loss.detach()).item() / WORLD  # mean
        begun, first = self.clock
        seconds = (time.perf_counter() - begun) / max(1, step - first)
        speed = self.options.batch_size / seconds
        left = datetime.timedelta(seconds=round(seconds * (self.options.steps - step)))
        lr = self.state["optimizer"].param_groups[0]["lr"]
        self.log("training", step,
                 loss=loss,
                 probe_loss=probe_loss,
                 lr=lr,
                 images_per_second=speed,
                 seconds_left=left.total_seconds())
        say(f"step {step:7,}  loss {loss:.4f}  lr {lr:.4f}  {speed:,.0f} images/s  {left} left")

    def log_evaluation(self, step):
        autocast = choose_autocast(self.options)
        scores = evaluate(self.state["model"], self.data, self.options, autocast)
        self.log("evaluation", step, **scores)
        text = "  ".join(f"{name} {value:.2f} %" for name, value in scores.items())
        say(f"step {step:7,}  {text}")

    def log(self, event, step, **values):
        self.lines.append(dict(event=event, step=step, **values))
        if RANK == 0:
            self.write_log(self.lines[-1:])

    def write_log(self, lines):
        """One JSON object a line."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with errors_as(f"cannot write {self.log_file.name}; the last checkpoint is good, and the "
                       "same command continues", OSError, status=1):
            self.log_file.write(text.encode())

    def save(self, step):
        """Write the checkpoint: all that the next step depends on, and the log so far."""
        self.check_finite(step, self.state["model"].state_dict().values())
        if RANK == 0:
            parts = {name: part.state_dict() for name, part in self.state.items()}
            with whole_file(self.folder / "checkpoint.pt") as file:
                torch.save(dict(step=step, lines=self.lines, **parts), file)

    def finish(self):
        """Write encoder.pt, curves.png and result.json. Returns the result."""
        training = [line for line in self.lines if line["event"] == "training"]
        evaluations = [line for line in self.lines if line["event"] == "evaluation"]
        speeds = [line["images_per_second"] for line in training]
        result = dict(
            self.facts,
            steps=self.options.steps,
            loss=training[-1]["loss"],
            images_per_second=statistics.median(speeds),
            **{metric: evaluations[-1][metric] for metric in METRICS})
        if RANK == 0:
            with whole_file(self.folder / "encoder.pt") as file:
                torch.save(self.state["model"].backbone.state_dict(), file)
            write_figure(self.folder / "curves.png", draw_curves, training, evaluations)
            write_json(self.folder / "result.json", result)
        say(f"results   in {self.folder}")
        return result


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to, which gets its name only once it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with errors_as(f"cannot write {path}; what was there is intact, and the same command continues",
                   OSError, RuntimeError, status=1):
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_config(folder):
    """The contents of config.json in a run's folder. Raises InputError."""
    with errors_as(f"{folder}: has no config.json of a run"):
        config = json.loads((Path(folder) / "config.json").read_text())
        # As this may be any file: dict() and list() fail for what is no configuration.
        return dict(config, options=dict(config["options"]), checksums=list(config["checksums"]))


def load_checkpoint(folder, state):
    """Load the checkpoint of a run's folder into `state`, a dict of what has a state_dict.

    Returns (step, log lines); (0, []) without one. Raises InputError."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return 0, []
    with errors_as(f"{path}: is damaged, or not of this model; remove it, or choose a new --out"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step = int(dict(checkpoint)["step"])  # a foreign file may hold anything
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        return step, list(checkpoint["lines"])


def load_encoder(path):
    """The backbone in an encoder.pt, in eval mode: normalised M x 3 x n x n -> M x D.

    The config.json beside it tells its shape; .mean and .std (3 x 1 x 1) normalise images in 0..1.
    Raises InputError."""
    config = read_config(Path(path).parent)
    options = config["options"]
    with errors_as(f"{path}: is no encoder.pt of this program"):
        backbone = ResNet(options["width"], options["blocks"], options["stem_padding"])
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        backbone.mean = torch.tensor(config["mean"]).view(3, 1, 1)
        backbone.std = torch.tensor(config["std"]).view(3, 1, 1)
    return backbone.eval()


# ---- Pictures ------------------------------------------------------------------------------------


def draw_views(path, data, two_views):
    """Up to eight real and eight generated images, with two views below each."""
    chosen = []
    for pool in (data.images, data.generated):
        stride = max(1, len(pool) // 8)
        chosen.append(pool[::stride][:8])
    images = torch.cat(chosen).to(data.device)
    views = two_views(images, step=0) * data.std + data.mean  # back to colours
    plain = images.permute(0, 3, 1, 2) / 255
    tiles = torch.cat([plain, views])
    tiles = F.interpolate(tiles, scale_factor=max(1, 64 // two_views.n))
    with whole_file(path) as file:
        torchvision.utils.save_image(tiles, file, "png", nrow=len(images), padding=3, pad_value=1)


def write_figure(path, draw, *content):
    """A PNG of two panels, filled by draw(left, right, *content), if there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"note: no {path.name}, as matplotlib is not installed")
        return
    figure = Figure((10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, right, *content)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_curves(left, right, training, evaluations):
    """Loss and accuracies over the steps of a run."""
    left.plot([line["step"] for line in training], [line["loss"] for line in training])
    left.set(xlabel="step", ylabel="NT-Xent")
    steps = [line["step"] for line in evaluations]
    for metric in METRICS:
        right.plot(steps, [line[metric] for line in evaluations], "o-", label=metric)
    right.set(xlabel="step", ylabel="test accuracy, %")
    right.legend()


def draw_comparison(left, right, table):
    """A bar for the mean of every row of a comparison, and a point for every run."""
    for panel, metric in ((left, "linear_top1"), (right, "knn_top1")):
        for name, row in reversed(table.items()):
            values = row[metric]["values"]
            panel.barh(name, row[metric]["mean"], color="lightgray")
            panel.plot(values, [name] * len(values), "o", color="tab:blue")
        panel.set(xlabel=f"{metric}, %")


# ---- Main ----------------------------------------------------------------------------------------


def evaluate_only(options, data):
    """Print the scores of the checkpoint in the folder --eval-only; writes nothing."""
    model = build_model(options, data)
    step, _ = load_checkpoint(options.eval_only, {"model": model})
    check(step, f"--eval-only {options.eval_only}: has no checkpoint yet")
    scores = dict(steps=step, **evaluate(model, data, options, choose_autocast(options)))
    say(json.dumps(scores))
    return scores


def run_command(options):
    data = load_data(options)
    if options.compare:
        return compare(options, data)
    data = choose_subsets(data, options)
    return evaluate_only(options, data) if options.eval_only else train(options, data)


def main(argv=None):
    """Run a command line; returns the result (dict).

    Exits with 2 on bad input, 1 on failure, and 128 + its number on a signal."""
    try:
        options = parse_options(argv)
        tune_process()
        with processes(options.device):
            return run_command(options)
    except InputError as error:
        message = " ".join(str(error).split())  # one line, whatever an option holds
        status = error.status
    except KeyboardInterrupt:
        message = "stopped by SIGINT outside of training; the same command continues"
        status = 128 + signal.SIGINT
    except OSError as error:
        message = one_line(error)
        status = 1
    except (MemoryError, RuntimeError) as error:
        message = one_line(error)
        status = 1
        # torch has no class of its own for a full CPU memory, nor for a connection that breaks.
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or "allocate memory" in message:
            message = f"out of memory ({message}); try --data-device cpu, or less in a new --out"
        elif WORLD > 1 and any(word in message.lower() for word in ("connection", "nccl", "timed")):
            message = f"lost another process, see its message ({message})"
        else:
            raise
    print(f"adainf.py: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
