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

    python adainf.py --demo                                      # the idea, offline, on a laptop
    python adainf.py                                             # SimCLR on CIFAR-10
    python adainf.py --gen-data data/cifar10-ddpm.npz --ratio 10             # AdaInf
    python adainf.py --gen-data data/cifar10-ddpm.npz --compare --seeds 3    # and its controls
    torchrun --nproc-per-node 8 adainf.py --gen-data data/cifar10-ddpm.npz   # on 8 GPUs

It reads from top to bottom: 1 mixing, 2 views, 3 model and loss, 4 optimiser, 5 evaluation,
6 training, 7 experiments. What follows is needed to operate a run, not to understand it: helpers
such as check(), which raises an error unless a condition holds, send(), which moves a tensor to the
device, autocast(), which sets the precision, say(), which prints, and write(), which saves.
(download_generated.py, beside this file, reads images from files of all kinds.)

Notation: B images in a batch, so 2B views; n pixels along a side; M is any number of images.
D_d, D_g: the real and the generated images; P_d, P_g: what they are drawn from."""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

# ---- 1. Mix real and generated images (Section 3) ------------------------------------------------
# Inflation draws images from P_t = beta P_d + (1 - beta) P_g, a mixture of real and generated ones.
# As P_t - P_d = (1 - beta) (P_g - P_d), P_t has 1 - beta times the generator's error, in total
# variation: D_TV(P_t, P_d) = (1 - beta) D_TV(P_g, P_d) (Theorem 3.1). Counting each real image N
# times raises beta: with 50,000 real images and 1,000,000 generated ones, beta is 0.05 for N = 1,
# and 0.33 for N = 10. The generated ones still bring their diversity.


@dataclasses.dataclass
class Data:
    """What a run learns from and is tested on. Images: uint8, M x n x n x 3, RGB."""

    images: torch.Tensor  # the real images D_d
    labels: torch.Tensor  # their labels, int64: backbone and projector never see them
    generated: torch.Tensor  # D_g: without labels, whatever its file says
    train_images: torch.Tensor  # all labelled ones: D_d, and what --real-size left out of it
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list  # their names


def random_stream(*key):
    """A NumPy Generator for a key of integers, such as (seed, VIEWS, step).

    Its numbers depend on the key alone, so a run that goes on has no random state to restore."""
    return np.random.default_rng(key)


EPOCH, VIEWS, PROBE, REAL_SUBSET, GENERATED_SUBSET = range(1, 6)  # purposes, as a part of keys


class Mixture:
    """P_t: batches from N copies of D_d and one of D_g, so beta = N |D_d| / (N |D_d| + |D_g|).

    An epoch is a random order of these samples, without replacement; its incomplete last batch is
    dropped. A copy costs no memory: samples 0 to N |D_d| - 1 are real, and i shows real image
    i mod |D_d|; the samples after them are the generated images."""

    def __init__(self, data, ratio, batch_size, seed, device="cpu"):
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        # Without generated images, copies would only lengthen an epoch.
        copies = ratio if len(data.generated) else 1
        self.n_copied = copies * len(data.images)  # N |D_d|
        self.size = self.n_copied + len(data.generated)
        self.beta = self.n_copied / self.size
        self.steps_per_epoch = self.size // batch_size
        self.epoch = None  # the one that self.order belongs to
        check(batch_size <= self.size,
              f"--batch-size {batch_size}: too large, as an epoch has {self.size} samples")

    def samples(self, step):
        """The B sample numbers (0..size - 1) of a step's batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            stream = random_stream(self.seed, EPOCH, epoch)
            self.order = torch.from_numpy(stream.permutation(self.size))
            self.epoch = epoch
        start = batch * self.batch_size
        return self.order[start:start + self.batch_size]

    def batch(self, step):
        """(images, labels) of a step, on the compute device, real ones first.

        images: uint8, B x n x n x 3; labels: B, -1 for a generated image."""
        data = self.data
        samples = self.samples(step)
        is_real = samples < self.n_copied
        real = samples[is_real] % len(data.images)
        generated = samples[~is_real] - self.n_copied

        images = torch.cat([
            data.images.index_select(0, real),
            data.generated.index_select(0, generated)])
        labels = torch.cat([
            data.labels[real],
            torch.full_like(generated, -1)])
        return send(images, self.device), send(labels, self.device)


# ---- 2. Two views (Section 4) --------------------------------------------------------------------
# Think of images as the nodes of a graph, with an edge between two if a view of one looks like a
# view of the other: the loss pulls the two together. Two numbers bound the error with which a
# linear probe then tells classes apart (Theorem 4.1):
#   - alpha: the share of views that change what an image shows. It raises the bound.
#   - lambda: how well the images of the graph are connected. It lowers the bound. (For k features
#     it is the (k+1)-th smallest eigenvalue of the graph's Laplacian.)
# Stronger views raise both numbers: they help and harm. Inflation raises lambda as well, by images
# in between. Then strong views are no longer needed for that, and weaker ones, with a smaller
# alpha, are better.

STRONG = dict(
    crop_min=0.08,  # smallest area of a crop, as a share of the image
    jitter_prob=0.8,
    jitter=(0.8, 0.8, 0.8, 0.2),  # brightness, contrast, saturation: 1 +- this; hue: +- turns
    gray_prob=0.2,
    blur_prob=0.5,
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
# operation; they agree but for what Pillow's 8 bits round and clip (and our sigma is one of 256):
#
#     RandomResizedCrop(n, scale=(crop_min, 1), interpolation=BICUBIC)
#     RandomApply([ColorJitter(brightness, contrast, saturation, hue)], jitter_prob)
#     RandomGrayscale(gray_prob)
#     RandomApply([Pillow's GaussianBlur of a sigma in 0.1..2], blur_prob)
#     RandomHorizontalFlip(flip_prob)
#     ToTensor()
#
# One by one on a CPU, that is slower than the network. But crop, resize, flip and blur act on rows
# and on columns, each by an n x n matrix: rows @ image @ columns^T. So a whole batch takes a few
# batched products, and still every view has its own random numbers. (All that follows a crop treats
# left and right alike, so the flip may come right after it, as a part of its matrix.)


def crop_matrices(n):
    """Matrices that crop n pixels of an axis and resize the crop to n, as Pillow's bicubic does.

    Returns n x n x n x n: [start, length - 1] is the matrix of that crop. Those of crops that would
    pass the edge stay 0, and are never used."""
    table = torch.zeros(n, n, n, n)
    for length in range(1, n + 1):
        # The columns of a matrix are what it makes of unit vectors. So take the identity for an
        # image, and resize its height from length to n pixels (its width stays): the result,
        # n x length, is the matrix. (With `antialias` PyTorch takes Pillow's cubic kernel, with
        # a = -0.5; without, another one, with a = -0.75.)
        identity = torch.eye(length)[None, None]
        resize = F.interpolate(identity, (n, length), mode="bicubic", antialias=True)[0, 0]
        for start in range(n - length + 1):
            table[start, length - 1, :, start:start + length] = resize
    return table


def blur_matrices(sigma, n):
    """Gaussian blur of n pixels as Pillow does it, by three box filters: M sigmas -> M x n x n.

    A box averages 2 radius + 1 pixels, and counts one more at either end by a part, its edge: with
    a radius of 1 and an edge of 0.3, its weights are 0.3 1 1 1 0.3, divided by their sum (Gwosdek
    et al. 2011, "extended box filter"). Variances add, so each box has a third of sigma^2."""
    variance = sigma.double()[:, None] ** 2 / 3  # double, against rounding
    # With an edge of 0, the variance is radius (radius + 1) / 3: 2/3 for 1 1 1, 2 for five ones. So
    # take the largest radius for which that is at most the variance; the edge will add the rest.
    radius = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    # The variance is a weighted mean of squared positions. In their sum, `inner` comes from the
    # pixels of weight 1, and 2 edge (radius + 1)^2 from the two ends; the weights sum to n_ones +
    # 2 edge. Solve variance = (inner + 2 edge (radius + 1)^2) / (n_ones + 2 edge) for edge:
    n_ones = 2 * radius + 1
    inner = radius * (radius + 1) * n_ones / 3
    edge = (variance * n_ones - inner) / (2 * ((radius + 1) ** 2 - variance))

    reach = int(radius.max()) + 1
    offset = torch.arange(-reach, reach + 1)
    weight = (radius + edge + 1 - offset.abs()).clamp(0, 1)  # 1 up to radius, then edge, then 0
    # Beyond the border, the last pixel repeats. So output i of box m is the sum over k of
    # weight[m, k] times the image at pixel[i, k]. Several k may fall on one pixel j, and their
    # weights add up.
    pixel = (torch.arange(n)[:, None] + offset).clamp(0, n - 1)  # n x offsets
    falls_on = F.one_hot(pixel, n).double()  # [i, k, j]: 1 if that pixel is j
    box = torch.einsum("mk,ikj->mij", weight, falls_on)
    box = box / box.sum(-1, keepdim=True)
    return torch.linalg.matrix_power(box, 3).float()


def by_rows_and_columns(rows, x, columns):
    """rows @ image @ columns^T for each of M x 3 x n x n images; matrices are M x n x n."""
    return rows[:, None] @ x @ columns[:, None].mT


def grayscale(x):
    """Luma (ITU-R 601): M x 3 x n x n -> M x 1 x n x n."""
    red, green, blue = x.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def shift_hue(x, turns):
    """Rotate hues by `turns` (M x 1 x 1) by way of HSV (Smith 1978).

    A hue runs 0..6 around a hexagon: red at 0, green at 2, blue at 4."""
    red, green, blue = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
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
    return torch.stack(channels, dim=1)


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the kinds of colour jitter


def jitter(x, kind, amount):
    """One operation of colour jitter on every image, each of its own kind: kind, amount: M.

    HUE turns hues by the amount. The others blend an image with a target:
        target + amount * (x - target), so that 1 gives x, 0 the target, and 2 exaggerates.
    The target is black for BRIGHTNESS, the mean grey of the image for CONTRAST, the grey image for
    SATURATION."""
    kind = kind.view(-1, 1, 1, 1)
    amount = amount.view(-1, 1, 1, 1)
    gray = grayscale(x)
    mean = gray.mean((1, 2, 3), keepdim=True)
    target = gray * (kind == SATURATION) + mean * (kind == CONTRAST)  # else 0, black
    blend = torch.lerp(target, x, amount).clamp(0, 1)
    return torch.where(kind == HUE, shift_hue(x, amount[:, 0]), blend)


def random_boxes(u_area, u_aspect, u_corner, crop_min, n):
    """RandomResizedCrop's boxes: the first of ten random ones that fits, else the whole image.

    Random numbers u_area, u_aspect (M x 10), u_corner (M x 2) -> start, length (M x 2)."""
    area = n * n * (crop_min + (1 - crop_min) * u_area)
    aspect = torch.exp((2 * u_aspect - 1) * math.log(4 / 3))  # width / height: 3/4 to 4/3
    size = torch.stack([area / aspect, area * aspect], dim=-1)  # height^2, width^2: M x 10 x 2
    size = size.sqrt().round()

    fits = ((size > 0) & (size <= n)).all(-1, keepdim=True)  # M x 10 x 1
    first = fits.int().argmax(-2, keepdim=True)  # the first maximum, so the first that fits
    length = size.take_along_dim(first, dim=-2).squeeze(-2)  # M x 2
    length = torch.where(fits.any(-2), length, n)
    start = (u_corner * (n - length + 1)).floor()
    return start.long(), length.long()


BLURS = 256  # levels of sigma


class TwoViews:
    """Two random views of every image: two_views(images, step).

    draw() makes random parameters, apply() distorts images by parameters."""

    def __init__(self, augmentation, n, seed, device="cpu"):
        self.augmentation = augmentation
        self.n = n
        self.seed = seed
        self.device = device

        # Along one axis, crops are few, and so are blurs. So their matrices are made once, and
        # apply() looks them up.
        self.crops = crop_matrices(n).to(device)
        sigma = 0.1 + 1.9 * (torch.arange(BLURS) + 0.5) / BLURS  # pixels
        no_blur = torch.eye(n)[None]
        self.blurs = torch.cat([no_blur, blur_matrices(sigma, n)]).to(device)

    @torch.no_grad()
    def __call__(self, images, step):
        """uint8 B x n x n x 3 -> float 2B x 3 x n x n, colours in 0..1, all first views first."""
        stream = random_stream(self.seed, VIEWS, step)
        drawn = self.draw(stream, 2 * len(images))
        parameters = {name: send(value, self.device) for name, value in drawn.items()}
        return self.apply(images.repeat(2, 1, 1, 1), parameters)

    def draw(self, stream, count):
        """Parameters of `count` views: a dict of tensors with a row for each view."""
        recipe = self.augmentation

        def uniform(numbers=1):  # in [0, 1)
            return torch.from_numpy(stream.random((count, numbers), np.float32))

        start, length = random_boxes(
            uniform(10), uniform(10), uniform(2), recipe["crop_min"], self.n)

        # Colour jitter: all four kinds, each by a random amount ...
        strength = torch.tensor(recipe["jitter"])
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])  # these amounts change nothing
        low = neutral - strength
        low[:HUE].clamp_(min=0)  # no factor is negative
        amount = low + (neutral + strength - low) * uniform(4)
        amount = torch.where(uniform() < recipe["jitter_prob"], amount, neutral)
        # ... and in random order: kind[:, 0] comes first, by amount[:, 0].
        kind = uniform(4).argsort(-1)
        amount = amount.gather(-1, kind)

        blur = 1 + (uniform() * BLURS).long()  # its place in the table; 0 is no blur
        return dict(
            start=start,
            length=length,
            flip=uniform() < recipe["flip_prob"],
            kind=kind,
            amount=amount,
            gray=uniform() < recipe["gray_prob"],
            blur=torch.where(uniform() < recipe["blur_prob"], blur, 0))

    def apply(self, images, p):
        """uint8 M x n x n x 3 and parameters of M rows -> float M x 3 x n x n in 0..1."""
        x = images.permute(0, 3, 1, 2) / 255

        start, length = p["start"], p["length"] - 1  # M x 2: vertical and horizontal
        rows = self.crops[start[:, 0], length[:, 0]]
        columns = self.crops[start[:, 1], length[:, 1]]  # M x outputs x inputs: a flip reverses 1
        columns = torch.where(p["flip"][:, :, None], columns.flip(1), columns)
        x = by_rows_and_columns(rows, x, columns).clamp(0, 1)

        for place in range(4):
            x = jitter(x, p["kind"][:, place], p["amount"][:, place])
        x = torch.where(p["gray"][:, :, None, None], grayscale(x), x)

        blur = self.blurs[p["blur"][:, 0]]
        x = by_rows_and_columns(blur, x, blur)
        return x.contiguous(memory_format=torch.channels_last)


# ---- 3. Model and loss (Section 2) ---------------------------------------------------------------
# SimCLR: a backbone makes features, and a projector maps them to what the loss compares. The
# projector is dropped after training, as it discards what the loss does not need.


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

    Colours in 0..1, M x 3 x n x n -> M x features. blocks: how many in each stage; every stage but
    the first doubles the channels and halves the image. stem_padding: zeros around the image; 1
    keeps its size, and the official code has 2. nn.Sequential runs layers in the order in which
    they are set here; the names of those with weights are torchvision's."""

    def __init__(self, width=64, blocks=(2, 2, 2, 2), stem_padding=1):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))  # of the training images' colours
        self.register_buffer("std", torch.ones(3, 1, 1))
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
        self.features = channels

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, colours):
        return super().forward((colours - self.mean) / self.std)


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


def colour_statistics(images):
    """Mean and standard deviation of each channel of uint8 images, in 0..1: 3 x 1 x 1 each.

    They follow from how often each of the 256 values occurs, as a float copy of the images would
    take four times their memory. Rounded as in papers."""
    value = torch.arange(256, dtype=torch.float64) / 255
    counts = [channel.flatten().bincount(minlength=256) for channel in images.unbind(-1)]
    share = torch.stack(counts) / counts[0].sum().double()  # 3 x 256
    mean = share @ value
    variance = share @ value ** 2 - mean ** 2
    std = variance.sqrt().clamp(min=1 / 255)  # at least one level
    return [each.float().round(decimals=4).view(3, 1, 1) for each in (mean, std)]


def build_model(options, data):
    """A SimCLR on the compute device; its initial weights depend on the seed alone."""
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes))
    model.backbone.mean, model.backbone.std = colour_statistics(data.train_images)
    return model.to(options.device, memory_format=torch.channels_last)


def match(features):
    """The task of finding the other view of the same image among all views, by cosine.

    features: 2B x any number, first views first. Returns cosines, 2B x 2B, and the partner of each
    view: views i and i + B (modulo 2B) show the same image."""
    z = F.normalize(features, dim=1)
    cosine = z @ z.T
    cosine.fill_diagonal_(-math.inf)  # a view is no candidate for itself
    view = torch.arange(len(z), device=z.device)
    return cosine, view.roll(len(z) // 2)


def nt_xent(projections, temperature):
    """NT-Xent (Chen et al. 2020, eq. 1): the cross-entropy of match(), mean over views, in fp32.

    It is ln(2B - 1) if all cosines are equal. Copies of one real image in a batch count as
    different images, as in the official code."""
    cosine, partner = match(projections.float())
    return F.cross_entropy(cosine / temperature, partner)


def cross_entropy_of_real(logits, labels):
    """Mean cross-entropy of the views of a batch's real images, 0 without any.

    logits: 2B x classes, first views first; labels: B, -1 is left out."""
    labels = labels.repeat(2)
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    n_real = (labels >= 0).sum()
    return total / n_real.clamp(min=1)


# ---- 4. Optimiser (Section 5) --------------------------------------------------------------------
# Large batches need a large learning rate, with which some layers would move too far. LARS looks at
# each weight tensor: where a step (without momentum) would be longer than eta times the tensor's
# norm, it is shortened to that.

ETA = 0.02
EPS = 1e-8


class LARS(torch.optim.SGD):
    """Momentum SGD with a trust ratio for each weight tensor (You et al. 2017), clipped at 1.

    step() replaces the gradient g of a weight tensor p by a direction d. Then SGD does its usual
    b = momentum * b + d and p = p - lr * b. Biases and batch norm keep g."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.ndim > 1]
            lars_directions(weights, group["lr"], group["decay"])
        super().step()


def lars_directions(weights, lr, decay):
    """Replace the gradient g of each weight tensor p by d = r (g + decay p), in place.

    The trust ratio is r = min(1, eta |p| / (|g| + decay |p| + eps) / lr). If it is 1, that is SGD
    with weight decay. If it is less, the step lr d has a length of at most eta |p|, whatever lr is.
    As in the official code, d = g if p or g is 0: if p is 0, r is 1, as with r = 0 it could never
    change; if g is 0, r is 0, so that there is no decay either.
    (torch._foreach_... does something with every tensor of a list, on a GPU with all at once.)"""
    gradients = [p.grad for p in weights]
    p_norm = torch.stack(torch._foreach_norm(weights))
    g_norm = torch.stack(torch._foreach_norm(gradients))
    ratio = ETA * p_norm / (g_norm + decay * p_norm + EPS) / lr
    ratio = ratio.clamp(max=1)
    ratio = torch.where(p_norm > 0, ratio, 1.0)
    ratio = torch.where(g_norm > 0, ratio, 0.0)

    torch._foreach_add_(gradients, weights, alpha=decay)
    torch._foreach_mul_(gradients, ratio.unbind())


def build_optimizer(model, options):
    """One LARS for two groups: what learns without labels, and the probe with its own rate.

    Each group has a `decay` for LARS. (It is not called `weight_decay`, as SGD would add that
    itself, without the ratio.) Before every step set_learning_rates() makes lr from `peak`."""
    learned = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [
        dict(params=learned, peak=options.lr, decay=options.weight_decay),
        dict(params=model.probe.parameters(), peak=options.probe_lr, decay=0.0)]
    return LARS(groups, momentum=options.momentum)


def learning_rate(step, steps, warmup, peak, start=3e-5):
    """The rate at `step` (the first is 0): linear from `start` (the paper's) to `peak`, which it
    reaches at `warmup`, then a cosine that reaches 0 at `steps`."""
    if step < warmup:
        start = min(start, peak)
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rates(optimizer, step, options):
    warmup = round(options.warmup * options.steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options.steps, warmup, group["peak"])


# ---- 5. Evaluation (Section 5) -------------------------------------------------------------------
# What is a representation worth? The backbone, frozen and in eval mode, sees plain images; probes,
# simple classifiers, learn from its features. (The online probe has learned along in training.) The
# final weights count, not the best on the way.

METRICS = ("online_top1", "linear_top1", "knn_top1", "match_top1")


def to_colours(images, device):
    """uint8 M x n x n x 3 -> float batches of up to 1000 x 3 x n x n in 0..1, on the device."""
    for batch in images.split(1000):
        yield batch.to(device).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def encode(backbone, batches, options):
    """Batches of colours in 0..1, M x 3 x n x n -> features of all their images, in fp32."""
    was_training = backbone.training
    backbone.eval()
    features = []
    for batch in batches:
        with autocast(options):
            features.append(backbone(batch).float())
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

    SGD with momentum 0.9, a cosine schedule and no weight decay, from zero weights. The number of
    epochs stops it early: with few labels, the optimum is usually worse on test images. The batches
    of an epoch are of equal size, as a small last one would still make a full step."""
    mean = train.mean(0)
    std = train.std(0) + 1e-6
    train = (train - mean) / std
    test = (test - mean) / std
    classes = int(train_labels.max()) + 1
    probe = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.SGD(probe.parameters(), lr, momentum=0.9)

    n_batches = math.ceil(len(train) / batch_size)
    for epoch in range(epochs):
        stream = random_stream(seed, PROBE, epoch)
        order = torch.from_numpy(stream.permutation(len(train))).to(train.device)
        for batch, rows in enumerate(order.tensor_split(n_batches)):
            progress = epoch + batch / n_batches  # in epochs
            rate = learning_rate(progress, epochs, warmup=0, peak=lr)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(probe(train[rows]), train_labels[rows]).backward()
            optimizer.step()
    return top1(probe(test), test_labels)


def spaced(images, count):
    """At most `count` images from all over a set, which may be sorted."""
    stride = math.ceil(len(images) / count) or 1
    return images[::stride]


def match_top1(backbone, images, options):
    """How often the nearest view of a view is the other view of its image, by cosine of features.

    Needs no labels. It is what SimCLR learns, measured on a thousand images that training has not
    seen, and by weak views whatever a run has trained with, so that runs can be compared."""
    two_views = TwoViews(WEAK, options.image_size, options.seed, options.device)
    views = two_views(spaced(images, 1000).to(options.device), step=0)
    return top1(*match(encode(backbone, views.split(1000), options)))


def offline_scores(train, test, data, options):
    """Scores of the probes that learn from the features of all labelled images, M x features."""
    train_labels = data.train_labels.to(train.device)
    test_labels = data.test_labels.to(train.device)
    sets = (train, train_labels, test, test_labels)
    return {
        "linear_top1": linear_top1(*sets, options.linear_epochs, options.linear_lr, options.seed),
        "knn_top1": knn_top1(*sets, options.knn_k, options.knn_temperature)}


def evaluate(model, data, options):
    """The METRICS of a model, in percent; if all is one class, only what needs no labels."""
    backbone = model.backbone
    unlabelled = {"match_top1": match_top1(backbone, data.test_images, options)}
    if len(data.classes) == 1:
        return unlabelled
    train = encode(backbone, to_colours(data.train_images, options.device), options)
    test = encode(backbone, to_colours(data.test_images, options.device), options)
    online = top1(model.probe(test), data.test_labels.to(options.device))
    offline = offline_scores(train, test, data, options)
    return {"online_top1": online} | offline | unlabelled


# ---- 6. Training ---------------------------------------------------------------------------------
# The algorithm: mix, make two views, compare them, move the weights. What is left is to log,
# evaluate, save and stop.


def training_step(step, mixture, two_views, network, optimizer, scaler, options):
    """One step of the algorithm. Returns its two losses."""
    images, labels = mixture.batch(step)
    views = two_views(images, step)
    with autocast(options):
        projections, logits = network(views)
    loss = nt_xent(projections, options.temperature)
    probe_loss = cross_entropy_of_real(logits, labels)

    set_learning_rates(optimizer, step, options)
    optimizer.zero_grad()
    scaler.scale(loss + probe_loss).backward()  # the scale is 1 unless in fp16
    scaler.step(optimizer)
    scaler.update()
    return loss, probe_loss


def train(options, data):
    """Train, evaluate, and fill the folder --out. Returns the result, as in result.json."""
    strength, augmentation = choose_augmentation(options)
    mixture = Mixture(data, options.ratio, options.batch_size, options.seed, options.device)
    two_views = TwoViews(augmentation, options.image_size, options.seed, options.device)
    model = build_model(options, data)
    optimizer = build_optimizer(model, options)
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    first_step, lines = load_checkpoint(options, data, state)  # fills state; lines: the log so far
    facts = dict(
        seed=options.seed,
        n_real=len(data.images),
        n_generated=len(data.generated),
        beta=mixture.beta,
        augmentation=strength)
    start_run(options, data, lines, facts, mixture, two_views)
    network = accelerate(model, two_views, options)  # it has the weights of model

    timed_from = time.perf_counter()
    with stop_signals() as stop:
        for step in range(first_step, options.steps):
            if step == first_step + 1:
                timed_from = time.perf_counter()  # anew, as the first step may have compiled
            losses = training_step(step, mixture, two_views, network, optimizer, scaler, options)

            done = step + 1
            last = done == options.steps
            if last or done % options.log_every == 0:
                timed = max(1, step - first_step)  # steps, without the first
                log_training(options, lines, done, losses, optimizer, timed_from, timed)
            if done % options.eval_every == 0 and not last:
                log(options, lines, step=done, **evaluate(model, data, options))
            signal_number = agree_on(stop, done, options)
            if last or signal_number or done % options.save_every == 0:
                save_checkpoint(options, data, state, done, lines)
            if signal_number:
                leave(signal_number, done)
        return finish(model, options, data, lines, facts)


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
        cells[name] = argparse.Namespace(**(vars(options) | own | dict(out=folder, seed=seed)))
    return cells


def compare(options, all_data):
    """Train all cells for each of --seeds; a seed also chooses the subsets of images.

    Prints a table, writes comparison.json and .png, returns {row: {metric: spread}}."""
    seeds = range(options.seed, options.seed + options.seeds)
    # Choosing and mixing refuse bad sizes: let them do so before any run.
    for cell in cells_of(options, options.seed).values():
        Mixture(choose_subsets(all_data, cell), cell.ratio, cell.batch_size, cell.seed)

    results = collections.defaultdict(list)  # {row: scores for each seed}
    for seed in seeds:
        cells = cells_of(options, seed)
        for name, scores in without_training(cells["none-strong"], all_data).items():
            results[name].append(scores)
        for name, cell in cells.items():
            say(f"\n{name}, seed {seed}")
            results[name].append(train(cell, choose_subsets(all_data, cell)))

    table = {}
    for name, scores in results.items():
        metrics = [metric for metric in METRICS if metric in scores[0]]
        table[name] = {metric: spread([each[metric] for each in scores]) for metric in metrics}
    folder = Path(options.out)
    write(folder / "comparison.json", as_json(dict(options=vars(options), table=table)))
    write_picture(folder / "comparison.png", two_panels, fill_comparison, table)
    print_table(table)
    say(f"top-1 on {len(all_data.test_images):,} test images, %: mean and standard deviation over "
        f"seeds {[*seeds]}; {options.steps:,} steps of {options.batch_size} images")
    return table


def without_training(options, data):
    """{row: scores} of raw pixels and of an untrained network (whose online probe guesses)."""
    scores = {}
    if len(data.classes) > 1:
        sets = (data.train_images, data.test_images)
        pixels = [torch.cat([*to_colours(images, options.device)]) for images in sets]
        mean = pixels[0].mean((0, 2, 3), keepdim=True)
        train, test = [(each - mean).flatten(1) for each in pixels]
        scores["raw pixels"] = offline_scores(train, test, data, options)
    scores["untrained network"] = evaluate(build_model(options, data), data, options)
    return scores


def spread(values):
    """Mean and standard deviation of a list of numbers, and the numbers themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return dict(mean=statistics.mean(values), std=std, values=values)


def print_table(table):
    say("\n" + " " * 24 + "".join(f"{metric:>18}" for metric in METRICS))
    for name, row in table.items():
        scores = [as_score(row[metric]) if metric in row else "" for metric in METRICS]
        say(f"{name:24}" + "".join(f"{score:>18}" for score in scores))


def as_score(spread):
    deviation = "" if spread["std"] is None else f" +- {spread['std']:5.2f}"
    return f"{spread['mean']:.2f}{deviation}"


# ==== What only operations need ===================================================================
# ---- Errors --------------------------------------------------------------------------------------
# Bad input ends in one line: what is wrong, where, and what to do.


class InputError(Exception):
    """Such a line, and the exit status: 2 for bad input, 1 for a run that cannot go on."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def check(ok, message, status=2):
    if not ok:
        raise InputError(message, status)


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def errors_as(message, kinds=Exception, status=2):
    """Errors of these kinds become an InputError: message (reason)."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{message} ({one_line(error)})", status) from error


# ---- Options -------------------------------------------------------------------------------------

# A small network, and a procedural data set of which 20 images play the real ones.
DEMO = """--dataset fabrics --gen-data fabrics --real-size 20 --image-size 16
    --width 8 --blocks 1 1 1 --proj-hidden 256 --proj-dim 64 --steps 800 --warmup 0.1
    --batch-size 20 --lr 0.1 --log-every 200 --compare --out runs/demo""".split()


def number(kind, low, high=10 ** 9):
    """A type of options: an int or a float in low..high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it in its messages
    return convert


count = number(int, 1)
whole = number(int, 0)
positive = number(float, 1e-9)
not_negative = number(float, 0)
share = number(float, 0, 1)


def words(text):
    if not text:  # such as a variable of the shell that is not set
        raise argparse.ArgumentTypeError("is empty")
    return text


def add(group, name, kind, default, text, **more):
    """Add an option to a group of the parser; its help text ends with its default."""
    key = name[2:].replace("-", "_")
    if key in STRONG:  # it has two defaults, one of each recipe
        text += f" (strong: {STRONG[key]}, weak: {WEAK[key]})"
    elif default is not None:
        text += " (default: %(default)s)"
    group.add_argument(name, type=kind, default=default, help=text, **more)


def build_parser():
    """Every knob, in the order of the method.

    The defaults are the paper's recipe for CIFAR-10, but for the padding of the stem."""
    parser = argparse.ArgumentParser(prog="adainf.py", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.error = lambda message: check(False, message)  # one line, no usage

    group = parser.add_argument_group("data")
    add(group, "--dataset", words, "cifar10",
        "cifar10, cifar100, fabrics, or a folder of {train,test}/<class>/* or {train,test}.npz")
    add(group, "--data-dir", words, "data", "folder of cifar10 and cifar100")
    add(group, "--image-size", number(int, 8, 64), 32,
        "pixels n along a side; a folder's images are resized")
    add(group, "--real-size", count, None, "real images |D_d|, a balanced subset; default all")

    group = parser.add_argument_group("inflation")
    add(group, "--gen-data", words, None,
        "generated images: an npz file, `image` uint8 M x n x n x 3 RGB; or fabrics")
    add(group, "--gen-size", count, None, "generated images |D_g|, a random subset; default all")
    add(group, "--ratio", whole, 10,
        "weight N of a real image against a generated one; 0: no real images")

    group = parser.add_argument_group("augmentation (single values override those of --aug)")
    add(group, "--aug", str, "auto", "auto: weak with generated images, else strong",
        choices=["auto", *RECIPES])
    add(group, "--crop-min", share, None, "smallest crop, as a share of the area")
    add(group, "--jitter-prob", share, None, "probability of colour jitter")
    add(group, "--jitter", not_negative, None,
        "brightness, contrast, saturation (1 +- it), hue (+- turns)", nargs=4)
    add(group, "--gray-prob", share, None, "probability of grayscale")
    add(group, "--blur-prob", share, None, "probability of Gaussian blur, sigma 0.1 to 2 pixels")
    add(group, "--flip-prob", share, None, "probability of a horizontal flip")

    group = parser.add_argument_group("model")
    # Below 8 channels PyTorch's gradients are wrong on CPUs without AVX-512 (oneDNN issue 6035).
    add(group, "--width", number(int, 8), 64, "channels of the ResNet's first stage")
    add(group, "--blocks", count, [2, 2, 2, 2], "blocks of each stage", nargs="+")
    add(group, "--stem-padding", int, 1, "zeros around the image, pixels; the official code has 2",
        choices=[0, 1, 2])
    add(group, "--proj-hidden", count, 2048, "hidden units of the projector")
    add(group, "--proj-dim", count, 256, "outputs of the projector")
    add(group, "--temperature", positive, 0.2, "temperature of NT-Xent")

    group = parser.add_argument_group("optimisation")
    add(group, "--steps", count, 100_000, "training steps, however much data there is")
    add(group, "--batch-size", count, 512, "images B a step, over all processes")
    add(group, "--lr", positive, 0.4,
        "peak learning rate of LARS; meant for B = 512, nothing rescales it")
    add(group, "--warmup", share, 0.01, "linear warm-up, as a share of the steps")
    add(group, "--weight-decay", not_negative, 1e-4,
        "of weights; biases, norms and the probe have none")
    add(group, "--momentum", share, 0.9, "momentum of LARS")
    add(group, "--probe-lr", positive, 0.1, "peak learning rate of the online linear probe")
    add(group, "--seed", whole, 0, "decides every random draw")

    group = parser.add_argument_group("evaluation")
    add(group, "--eval-every", count, 20_000, "steps between evaluations; one is always at the end")
    add(group, "--knn-k", count, 20, "neighbours that vote")
    add(group, "--knn-temperature", positive, 0.07, "a vote weighs exp(cosine / temperature)")
    add(group, "--linear-epochs", count, 100, "epochs of the offline linear probe")
    add(group, "--linear-lr", positive, 0.1, "its peak learning rate")

    group = parser.add_argument_group("experiments")
    group.add_argument("--compare", action="store_true",
                       help="no inflation (strong, weak), vanilla and AdaInf side by side")
    add(group, "--seeds", count, 1, "number of seeds of --compare, from --seed on")
    group.add_argument("--demo", action="store_true",
                       help="--compare on fabrics, in minutes on a CPU")

    group = parser.add_argument_group("system")
    add(group, "--out", words, None,
        "folder of the run, which the same command continues; default: one in runs/")
    add(group, "--device", str, "auto", "where to compute", choices=["auto", "cuda", "cpu"])
    add(group, "--amp", str, "auto", "precision of products; auto: off on a CPU; on CUDA bf16 if "
        "it has it, else fp16", choices=["auto", "bf16", "fp16", "off"])
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="compile views and network; default on CUDA only")
    add(group, "--log-every", count, 50, "steps between log lines")
    add(group, "--save-every", count, 1000, "steps between checkpoints")
    return parser


def parse_options(argv=None):
    """The command line, with what is automatic decided. Raises InputError."""
    argv = sys.argv[1:] if argv is None else argv
    if "--demo" in argv:
        argv = DEMO + argv  # the user's own come last, and win
    options = build_parser().parse_args(argv)
    check_options(options)

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.amp == "auto" and options.device == "cpu":
        options.amp = "off"  # so that a command gives the same numbers on every CPU
    if options.amp == "auto":
        options.amp = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if options.compile is None:
        options.compile = options.device == "cuda"
    if options.out is None:
        inflation = f"ratio{options.ratio}" if options.gen_data else "none"
        name = f"{Path(options.dataset).name}-{inflation}-{options.aug}-seed{options.seed}"
        options.out = f"runs/{name}"
    return options


def check_options(options):
    """Refuse values that do not go together. Raises InputError."""
    # No stage may halve a 1 x 1 map: PyTorch's gradient for that can be wrong, in bf16.
    check(2 ** (len(options.blocks) - 1) <= options.image_size,
          f"--blocks: {len(options.blocks)} stages halve {options.image_size} pixels below one")
    if not options.gen_data:
        check(options.ratio > 0, "--ratio 0: needs --gen-data")
        check(not options.compare, "--compare: needs --gen-data")
        check(not options.gen_size, "--gen-size: needs --gen-data")
    check(not options.compare or options.aug == "auto", "--aug: --compare sets it for every cell")
    check(options.compare or options.seeds == 1, "--seeds: is for --compare; a run takes --seed")
    check(options.device != "cuda" or torch.cuda.is_available(),
          "--device cuda: PyTorch finds no GPU here")
    check(RANK < WORLD, f"the environment has RANK={RANK}, but not its WORLD_SIZE: unset it")
    check(options.batch_size % WORLD == 0,
          f"--batch-size {options.batch_size}: {WORLD} processes cannot share it equally")


# ---- Images --------------------------------------------------------------------------------------


def load_data(options):
    """Data with all images of --dataset and --gen-data. Raises InputError."""
    say("reading the images")
    if options.dataset in ("cifar10", "cifar100"):
        train, test, classes = read_cifar(options)
    else:
        train, test, classes = from_files("read_dataset", options.dataset, options.image_size)
    images, labels = map(torch.from_numpy, train)
    test_images, test_labels = map(torch.from_numpy, test)
    generated = images[:0]
    if options.gen_data:
        generated = from_files("read_generated", options.gen_data, options.image_size)
        generated = torch.from_numpy(generated)
    return Data(
        images=images,
        labels=labels,
        generated=generated,
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=classes)


def from_files(function, *arguments):
    """What a function of download_generated.py reads. (It also draws the images of the demo.)"""
    with errors_as("download_generated.py has to be beside adainf.py", ImportError):
        import download_generated
    try:
        return getattr(download_generated, function)(*arguments)
    except download_generated.Problem as error:
        raise InputError(str(error)) from error


def read_cifar(options):
    """(train images, labels), (test images, labels), class names."""
    name = options.dataset
    check(options.image_size == 32,
          f"--image-size {options.image_size}: {name} has 32 x 32 pixels; leave the option out")
    dataset = getattr(torchvision.datasets, name.upper())
    folder = Path(options.data_dir)
    place = folder / dataset.base_folder
    files = [file for file, _ in dataset.train_list + dataset.test_list]
    missing = [file for file in files if not (place / file).exists()]
    with errors_as(f"--dataset {name}: {place} lacks {', '.join(missing) or 'a whole file'}; put "
                   f"{dataset.filename} into {folder}, or get it by `python download_generated.py "
                   f"{name} --data-dir '{folder}'`", (OSError, RuntimeError)):
        # torchvision checks the md5 before it unpickles. Several processes would all download into
        # one file, so they do not.
        sets = [dataset(folder, train, download=WORLD == 1) for train in (True, False)]
    train, test = [(np.ascontiguousarray(each.data), np.array(each.targets)) for each in sets]
    return train, test, sets[0].classes


def choose_subsets(data, options):
    """The Data of one run: --real-size of its real images, --gen-size of the generated ones."""
    images, labels = data.images, data.labels
    generated = data.generated if options.gen_data else data.generated[:0]
    for size, pool in ((options.real_size, images), (options.gen_size, generated)):
        check(not size or size <= len(pool), f"--real-size, --gen-size: {size} is more than the "
              f"{len(pool)} images that there are")

    if options.real_size:
        chosen = balanced_subset(labels.numpy(), options.real_size, options.seed)
        images, labels = images[chosen], labels[chosen]
    if options.gen_size:
        stream = random_stream(options.seed, GENERATED_SUBSET)
        generated = generated[stream.permutation(len(generated))[:options.gen_size]]
    return dataclasses.replace(data, images=images, labels=labels, generated=generated)


def balanced_subset(labels, size, seed):
    """Numbers of `size` random images, with classes as equal as they can be."""
    order = random_stream(seed, REAL_SUBSET).permutation(len(labels))
    # Take a random image of every class, then another one of every class, and so on: if the labels
    # in this order are a a b a, the turns are 0 1 0 2.
    turn = np.empty(len(labels), int)
    for label in np.unique(labels):
        of_class = labels[order] == label
        turn[of_class] = np.arange(of_class.sum())
    return order[turn.argsort(kind="stable")[:size]]


# ---- Hardware and processes ----------------------------------------------------------------------
# torchrun starts WORLD processes and tells each its RANK; without it, this is process 0 of 1. All
# of them mix the same batches and make all views; each computes the network for a share of them.

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(device):
    """Join the processes that torchrun started, for as long as this lasts."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --amp off means fp32 all through
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


def autocast(options):
    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    return torch.autocast(options.device, dtype, enabled=options.amp != "off")


def send(x, device):
    """A tensor on the device; CUDA gets it while the CPU goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device == "cuda" else x


def accelerate(model, two_views, options):
    """Returns a faster network with the weights of the model; compiles views as well."""
    if options.compile:
        torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it is
        two_views.apply = torch.compile(two_views.apply)
    if WORLD > 1:
        return SharedNetwork(model, options.device)  # eager: SyncBatchNorm cannot be compiled well
    if options.compile:
        model.compile()  # in place, so that names in the state dict stay clean
    return model


class SharedNetwork(nn.Module):
    """A model of which each process computes a share of the rows, and gets the output of all.

    All processes give it the same rows. On CUDA, batch norm has the statistics of all rows
    (SyncBatchNorm); on a CPU, of its share."""

    def __init__(self, model, device):
        super().__init__()
        if device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.network = nn.parallel.DistributedDataParallel(model)

    def forward(self, rows):
        own = rows[RANK::WORLD]  # so that each share has both views, and real and generated images
        return [gather(output) for output in self.network(own)]


def gather(own):
    """Rows of this process -> rows of all, in their order.

    Each process computes the whole loss, but has the gradient through its own rows only; the sum
    over processes is the whole gradient. DistributedDataParallel divides that sum by WORLD, so it
    is multiplied by WORLD here."""
    own.register_hook(lambda gradient: WORLD * gradient)
    parts = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(parts, own.detach())
    parts[RANK] = own
    return torch.stack(parts, dim=1).flatten(0, 1)


def highest(number, device):
    """The highest of the numbers that the processes have."""
    if WORLD == 1:
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


@contextlib.contextmanager
def stop_signals():
    """A list to which a signal adds its number; a second one of its kind stops at once.

    Signals come from Ctrl-C, torchrun, job schedulers, and a terminal that is closed."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield received  # which stays empty, as only the main thread may listen
        return
    before = {}
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:  # after the last step, when all was done
        raise SystemExit(128 + received[0])


def agree_on(stop, done, options):
    """The number of a signal that any process has received, else 0: they have to stop together.

    To ask each other costs time, so they do it at every tenth step, and at the last."""
    if WORLD > 1 and done % 10 and done < options.steps:
        return 0
    return highest(max(stop, default=0), options.device)


def leave(number, done):
    """Exit as a signal asks for, when all is saved."""
    name = signal.Signals(number).name
    say(f"stopped by {name} after step {done:,}, which is saved; the same command goes on")
    raise SystemExit(128 + number)


# ---- A run's folder ------------------------------------------------------------------------------
# First save, then speak: a line that cannot be printed, or a picture that fails, stops no run.

# These options may differ when a run goes on, as its weights do not depend on them (but for
# rounding). Data sets may have been moved; decisive() knows their images.
MAY_CHANGE = ("dataset", "data_dir", "gen_data", "out", "device", "compile", "log_every",
              "save_every", "eval_every", "knn_k", "knn_temperature", "linear_epochs", "linear_lr",
              "compare", "seeds", "demo")


def decisive(options, data):
    """{what: value} of what a run's weights depend on; of images, their number and a sum."""
    found = {f"--{name.replace('_', '-')}": value
             for name, value in vars(options).items() if name not in MAY_CHANGE}
    for name, images in (("real", data.images), ("generated", data.generated)):
        found[f"number of {name} images"] = len(images)
        found[f"sum of some {name} images"] = int(spaced(images, 1000).sum())
    return found


def write(path, content):
    """Write bytes to a file, which gets its name only once it is complete. Raises InputError.

    Of several processes only the first one writes."""
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def writing(path):
    return errors_as(f"{path}: cannot be written; what was saved is whole, and the same command "
                     "goes on from there", OSError, status=1)


def as_json(value):
    return json.dumps(value, indent=1).encode()


def as_tensors(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def read_tensors(path):
    """What as_tensors() made. Raises an error of any kind if it is damaged."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(options, data, state, step, lines):
    """Write all that the next step depends on, and the log so far."""
    parts = {name: part.state_dict() for name, part in state.items()}
    check_finite(parts["model"].values(), step)
    checkpoint = dict(step=step, lines=lines, decisive=decisive(options, data), **parts)
    write(Path(options.out) / "checkpoint.pt", as_tensors(checkpoint))


def check_finite(tensors, step):
    """A run that diverged stops, and is never saved. Raises InputError."""
    check(all(tensor.isfinite().all() for tensor in tensors),  # here the CPU waits for the GPU
          f"a loss or a weight is not finite at step {step}, and was not saved; to go on would "
          "fail again: try a lower --lr, or --amp off, in a new --out", status=1)


def load_checkpoint(options, data, state):
    """Load the checkpoint of --out, if there is one, into `state`: model, optimizer and scaler.

    Returns (step, log lines); (0, []) without one. Raises InputError."""
    path = Path(options.out) / "checkpoint.pt"
    step, lines = 0, []
    if path.exists():
        with errors_as(f"{path}: is damaged, or of another program; choose a new --out"):
            checkpoint = read_tensors(path)
            for what, value in decisive(options, data).items():
                before = checkpoint["decisive"].get(what)
                check(before == value, f"--out {options.out}: was begun with {what} = "
                      f"{before}, not {value}; go on as it began, or choose a new --out")
            for name, part in state.items():
                part.load_state_dict(checkpoint[name])
            step, lines = checkpoint["step"], checkpoint["lines"]
    check(step == highest(step, options.device), f"--out {options.out}: process {RANK} finds step "
          f"{step}, another one a later step; all processes need the same disk")
    return step, lines


def load_encoder(path):
    """The backbone in an encoder.pt, in eval mode: colours in 0..1, M x 3 x n x n -> M x features.

    Raises InputError."""
    with errors_as(f"{path}: is no encoder.pt of this program"):
        encoder = read_tensors(path)
        backbone = ResNet(**encoder["shape"])
        backbone.load_state_dict(encoder["weights"])
    return backbone.eval()


def start_run(options, data, lines, facts, mixture, two_views):
    """Say what a run is, make its folder, and write its log as the checkpoint has it."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    found = "" if torch.cuda.is_available() else " (no GPU was found)"
    say(as_text(facts))
    say(f"{options.steps:,} steps of {options.batch_size} images, an epoch has "
        f"{mixture.steps_per_epoch:,}; {WORLD} x {device}{found}, AMP {options.amp}; "
        f"in {options.out}")
    folder = Path(options.out)
    with errors_as(f"--out {folder}: cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    write(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_picture(folder / "views.png", draw_views, data, two_views)


def log(options, lines, **record):
    """Add a record to `lines` and to log.jsonl, one JSON object a line, and print it."""
    lines.append(record)
    path = Path(options.out) / "log.jsonl"
    if RANK == 0:
        with writing(path), open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    say(as_text(record))


def as_text(record):
    """{name: value} as "name value  name value"."""
    styles = {float: ",.5g", int: ",", str: ""}
    return "  ".join(f"{name} {value:{styles[type(value)]}}" for name, value in record.items())


def log_training(options, lines, step, losses, optimizer, timed_from, timed):
    """Log the losses of a step, and the mean speed of the `timed` steps since `timed_from` (with
    the time for evaluations)."""
    check_finite(losses, step)
    loss, probe_loss = losses
    seconds = (time.perf_counter() - timed_from) / timed
    log(options, lines,
        step=step,
        loss=loss.item(),
        probe_loss=probe_loss.item(),
        lr=optimizer.param_groups[0]["lr"],
        images_per_second=options.batch_size / seconds,
        minutes_left=seconds * (options.steps - step) / 60)


def finish(model, options, data, lines, facts):
    """Evaluate; write encoder.pt, result.json and curves.png. Returns the result."""
    scores = evaluate(model, data, options)
    log(options, lines, step=options.steps, **scores)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    result = facts | training[-1] | scores

    folder = Path(options.out)
    weights = {name: value.cpu() for name, value in model.backbone.state_dict().items()}
    shape = dict(width=options.width, blocks=options.blocks, stem_padding=options.stem_padding)
    write(folder / "encoder.pt", as_tensors(dict(shape=shape, weights=weights)))
    write(folder / "result.json", as_json(result))
    write_picture(folder / "curves.png", two_panels, fill_curves, training, evaluations)
    return result


def say(text, stream="stdout"):
    """Print a line, of several processes from the first. What cannot be printed is dropped."""
    if RANK > 0 and stream == "stdout":
        return
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except UnicodeEncodeError:  # letters that the console lacks
        say(ascii(text), stream)
    except (OSError, ValueError):  # a closed pipe or terminal, a full disk
        setattr(sys, stream, open(os.devnull, "w"))


# ---- Pictures ------------------------------------------------------------------------------------


def write_picture(path, picture, *content):
    """Write a PNG that picture(file, *content) makes. If it cannot, that is only a note."""
    try:
        file = io.BytesIO()
        picture(file, *content)
        write(path, file.getvalue())
    except Exception as error:  # such as no matplotlib, or its backend for notebooks elsewhere
        say(f"note: no {path.name} ({one_line(error)})")


def draw_views(file, data, two_views):
    """Up to eight real and eight generated images, with two views below each."""
    images = torch.cat([spaced(data.images, 8), spaced(data.generated, 8)])
    views = two_views(images.to(two_views.device), step=0).cpu()
    plain = images.permute(0, 3, 1, 2) / 255
    tiles = torch.cat([plain, views])
    tiles = F.interpolate(tiles, scale_factor=max(1, 64 // two_views.n))
    torchvision.utils.save_image(tiles, file, "png", nrow=len(images), padding=3, pad_value=1)


def two_panels(file, fill, *content):
    """A figure of two panels, filled by fill(left, right, *content)."""
    from matplotlib.figure import Figure
    figure = Figure((10, 3.4), layout="constrained")
    fill(*figure.subplots(1, 2), *content)
    figure.savefig(file, format="png", dpi=120)


def fill_curves(left, right, training, evaluations):
    """Loss and scores over the steps of a run."""
    left.plot([line["step"] for line in training], [line["loss"] for line in training], ".-")
    left.set(xlabel="step", ylabel="loss")
    steps = [line["step"] for line in evaluations]
    for metric in METRICS:
        if metric in evaluations[0]:
            right.plot(steps, [line[metric] for line in evaluations], "o-", label=metric)
    right.set(xlabel="step", ylabel="on test images, %")
    right.legend()


def fill_comparison(left, right, table):
    """A bar for the mean of every row of a comparison, and a point for every run."""
    for panel, metric in ((left, "linear_top1"), (right, "knn_top1")):
        rows = {name: row[metric] for name, row in reversed(table.items()) if metric in row}
        for name, scores in rows.items():
            panel.barh(name, scores["mean"], color="lightgray")
            panel.plot(scores["values"], [name] * len(scores["values"]), "o", color="tab:blue")
        panel.set(xlabel=f"{metric}, %")


# ---- Main ----------------------------------------------------------------------------------------


def main(argv=None):
    """Run a command line; returns the result (dict).

    Exits with 2 on bad input, 1 on failure, and 128 + its number on a signal in training."""
    try:
        options = parse_options(argv)
        with processes(options.device):
            data = load_data(options)
            if options.compare:
                return compare(options, data)
            return train(options, choose_subsets(data, options))
    except (InputError, OSError) as error:
        say(f"adainf.py: {one_line(error)}", "stderr")
        raise SystemExit(getattr(error, "status", 1)) from error


if __name__ == "__main__":
    main()
