#!/usr/bin/env python3
"""AdaInf: adaptive inflation for contrastive learning, in one file.

Paper: "Do Generated Data Always Help Contrastive Learning?", Wang, Zhang and Wang, ICLR 2024
(arXiv 2403.12448). Symbols and theorem numbers in this file are the paper's.

SimCLR learns without labels: a network must recognise two random views of one image among the
views of all others. *Inflation* adds generated images. That can hurt: they are not quite real, and
inflation and augmentation both tie similar images together, while only augmentation can change what
an image shows. AdaInf is one rule: with inflation, count every real image N = 10 times and augment
more weakly.

    python adainf.py --demo                                  # the whole idea, offline, on a laptop
    python adainf.py                                                          # SimCLR on CIFAR-10
    python adainf.py --gen-data data/cifar10-ddpm.npz --ratio 10              # AdaInf
    python adainf.py --gen-data data/cifar10-ddpm.npz --compare --seeds 0 1 2 # and its controls
    torchrun --nproc-per-node 8 adainf.py --gen-data data/cifar10-ddpm.npz    # the same on 8 GPUs

The story reads from top to bottom: options, mixing, views, model and loss, optimiser, evaluation,
training. Below it stands what only operations need. B: images in a batch, n: pixels along a side,
D: features, C: classes. Images wait as uint8, N x n x n x 3, RGB.
"""
import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import statistics
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

# ---- Options ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How strongly a view is distorted; every probability is per view."""
    crop_min: float  # smallest area of a random crop, as a share of the image
    jitter_prob: float
    jitter: tuple  # brightness, contrast, saturation (factor 1 +- strength) and hue (turns)
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    solarize_prob: tuple = (0.0, 0.0)  # of the first and of the second view
    flip_prob: float = 0.5


RECIPES = {"strong": Augmentation(0.08, 0.8, (0.8, 0.8, 0.8, 0.2)),  # SimCLR's own
           "weak": Augmentation(0.2, 0.4, (0.4, 0.4, 0.4, 0.1))}  # AdaInf's


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float in low..high."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number in {low}..{high}")
        return value
    convert.__name__ = kind.__name__
    return convert


def build_parser():
    """Every knob in the order of the story; the defaults are the paper's recipe for CIFAR-10."""
    parser = argparse.ArgumentParser(prog="adainf.py", description="SimCLR with AdaInf, " +
                                     "on real and generated images. README.md explains the rest.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"adainf.py: {message}\n")  # without the usage
    count, share = number(int, 1), number(float, 0, 1)
    positive, not_negative = number(float, 1e-9), number(float, 0)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar10", help="cifar10, cifar100, shapes (made on the spot), or a "
        "folder with train/<class>/* and test/<class>/* of images")
    add("--data-dir", default="data", help="folder for downloads")
    add("--image-size", type=number(int, 8, 128), default=32, help="pixels along a side n; images "
        "of a folder are cropped to squares and resized")
    add("--real-size", type=count, help="real training images |D_d|: a seeded, class-balanced "
        "subset; default all")
    add = parser.add_argument_group("inflation").add_argument
    add("--gen-data", nargs="+", metavar="FILE", help="npz files of generated images: key `image`, "
        "uint8, N x n x n x 3, RGB; labels are ignored")
    add("--gen-size", type=count, help="generated images |D_g|: a seeded random subset; default all")
    add("--ratio", type=number(int, 0), default=10, metavar="N", help="weight of a real image "
        "against a generated one; 1: vanilla inflation, 0: generated images only")
    add = parser.add_argument_group("augmentation").add_argument
    add("--aug", choices=["auto", *RECIPES], default="auto", help="auto: weak with generated data, "
        "strong without; the knobs below override single values of it")
    add("--crop-min", type=number(float, 1e-3, 1), help="smallest crop, as a share of the area")
    add("--jitter-prob", type=share, help="probability of colour jitter")
    add("--jitter", type=not_negative, nargs=4, metavar=tuple("BCSH"), help="strength of brightness, "
        "contrast, saturation (factors 1 +- strength) and hue (turns, at most 0.5)")
    add("--gray-prob", type=share, help="probability of grayscale")
    add("--blur-prob", type=share, help="probability of Gaussian blur, sigma 0.1 to 2 pixels")
    add("--solarize-prob", type=share, nargs="+", metavar="P", help="probability of inverting "
        "bright pixels: one for both views, or one for each")
    add("--flip-prob", type=share, help="probability of a horizontal flip")
    add = parser.add_argument_group("model").add_argument
    add("--width", type=count, default=64, help="channels of the ResNet-18's first stage")
    add("--stem-padding", type=number(int, 0, 2), default=1, help="pixels of zeros around the "
        "image; the official code has 2")
    add("--proj-hidden", type=count, default=2048, help="hidden units of the projector")
    add("--proj-dim", type=count, default=256, help="outputs of the projector")
    add("--temperature", type=number(float, 1e-3), default=0.2, help="of NT-Xent")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=count, default=100_000, help="training steps, however much data there is")
    add("--batch-size", type=number(int, 2), default=512, help="images a step, B, in all processes")
    add("--lr", type=positive, default=0.4, help="peak learning rate of LARS; the recipe's at B = "
        "512, never scaled behind your back")
    add("--warmup-steps", type=number(int, 0), help="steps of linear warm-up; default 1%% of steps")
    add("--weight-decay", type=not_negative, default=1e-4, help="of weights; biases and norms: none")
    add("--momentum", type=share, default=0.9, help="of LARS")
    add("--probe-lr", type=positive, default=0.1, help="peak learning rate of the online probe")
    add("--seed", type=number(int, 0), default=0, help="decides every random draw")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=number(int, 0), help="steps between evaluations by online probe and "
        "kNN, from step 0 on; 0: only at the end; default 20%% of steps")
    add("--knn-k", type=count, default=200, help="neighbours that vote")
    add("--knn-temperature", type=number(float, 1e-3), default=0.1, help="votes: exp(cosine / this)")
    add("--linear-epochs", type=count, default=100, help="epochs of the offline linear probe")
    add("--linear-lr", type=positive, default=0.1, help="peak learning rate of that probe")
    add("--eval-only", metavar="RUN", help="evaluate the newest checkpoint in a run's folder")
    add = parser.add_argument_group("experiments").add_argument
    add("--compare", action="store_true", help="no inflation (strong, weak), vanilla and AdaInf, "
        "everything else equal")
    add("--seeds", type=number(int, 0), nargs="+", help="seeds of --compare; default --seed")
    add("--demo", action="store_true", help="--compare on the shapes data set, in minutes on a CPU")
    add = parser.add_argument_group("system").add_argument
    add("--out", metavar="DIR", help="folder of the run, which the same command continues; default "
        "runs/<dataset>-<inflation>-<aug>-<seed>")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="where to compute")
    add("--data-device", choices=["auto", "cuda", "cpu"], default="auto", help="where images wait; "
        "auto: on the device if they take less than half of its free memory")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="network's precision; "
        "auto: bf16 where the hardware has it, else fp16 on CUDA, else off (fp32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile views and network; "
        "default: on CUDA")
    add("--log-every", type=count, default=50, help="steps between log lines")
    add("--save-every", type=count, help="steps between checkpoints; default 1%% of steps")
    add("--dry-run", action="store_true", help="everything once: data, a step, an evaluation, files")
    return parser


def choose_augmentation(options):
    """The Augmentation that runs, and why: AdaInf's rule (section 4.3), then the user's own values."""
    strength = options.aug
    if strength == "auto":
        strength = "weak" if options.gen_data else "strong"
    why = f"--aug {options.aug}, {'with' if options.gen_data else 'without'} generated data"
    own = {field.name: getattr(options, field.name) for field in dataclasses.fields(Augmentation)}
    own = {name: value for name, value in own.items() if value is not None}
    for name in own:
        own[name] = tuple(own[name]) if isinstance(own[name], list) else own[name]
        why += f", --{name.replace('_', '-')}"
    if "solarize_prob" in own:
        own["solarize_prob"] = (own["solarize_prob"] * 2)[:2]
    return dataclasses.replace(RECIPES[strength], **own), f"{strength} ({why})"


# ---- Mix the data (section 3) -------------------------------------------------------------------

def random_stream(device, *key):
    """A torch.Generator of its own for each key of integers, such as (seed, VIEWS, step).

    What is drawn depends on the key alone, so nothing has to be restored when a run goes on.
    """
    seed = np.random.SeedSequence(key).generate_state(1)[0]  # unrelated for neighbouring keys
    return torch.Generator(device).manual_seed(int(seed))


EPOCH, VIEWS, PROBE = range(3)  # what a stream is for


class Mixture:
    """P_t = beta P_d + (1 - beta) P_g: batches of N copies of the real images and the generated ones.

    An epoch is a random order of all N |D_d| + |D_g| samples, without replacement; its incomplete
    last batch is dropped. The copies are index arithmetic: they cost no memory.
    """

    def __init__(self, data, ratio, batch_size, seed):
        self.data, self.batch_size, self.seed, self.epoch = data, batch_size, seed, None
        n_generated = len(data.images) - data.n_real
        self.n_repeated = (ratio if n_generated else 1) * data.n_real
        self.size = self.n_repeated + n_generated
        self.beta = self.n_repeated / self.size
        if batch_size > self.size:
            raise InputError(f"--batch-size {batch_size}: an epoch has only {self.size} samples")

    def indices(self, step):
        """The B indices into data.images that make the batch of a step."""
        epoch, batch = divmod(step, self.size // self.batch_size)
        if epoch != self.epoch:
            device = self.data.images.device
            stream = random_stream(device, self.seed, EPOCH, epoch)
            self.order = torch.randperm(self.size, generator=stream, device=device)
            self.epoch = epoch
        sample = self.order[batch * self.batch_size:(batch + 1) * self.batch_size]
        return torch.where(sample < self.n_repeated, sample % self.data.n_real,
                           sample - self.n_repeated + self.data.n_real)

    def batch(self, step, share, device):
        """(images, labels, number of real images in the whole batch) on the device; `share` is the
        slice of the batch that this process works on. Generated images have label -1."""
        index = self.indices(step)
        labels = self.data.labels.index_select(0, index)
        images = self.data.images.index_select(0, index[share])
        tensors = images, labels[share], (labels >= 0).sum()
        if device.type == "cuda" and not images.is_cuda:
            tensors = [tensor.pin_memory() for tensor in tensors]  # so that copies can overlap
        return [tensor.to(device, non_blocking=True) for tensor in tensors]


# ---- Two views (section 4) ----------------------------------------------------------------------
# On a small image, crop-and-resize, flip and blur are n x n matrices: rows @ image @ columns^T. A
# whole batch is then four batched matrix products and some arithmetic, with draws for every image.

def crop_matrices(start, length, n):
    """Bicubic resize of the pixels start..start + length - 1 to n pixels: integers (M) -> M x n x n.

    Keys' kernel with a = -0.5, like Pillow's; crops are never longer than n, so none is averaged.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(n, device=start.device)
    distance = (pixel + 0.5 - (start + (pixel[:, None] + 0.5) * length / n)).abs()
    near = (1.5 * distance - 2.5) * distance ** 2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((pixel >= start) & (pixel < start + length))  # nothing from outside the crop
    return weight / weight.sum(-1, keepdim=True)


def blur_matrices(sigma, n):
    """Gaussian blur of n pixels like Pillow's, three box filters with repeated edges: S -> S x n x n."""
    sigma = sigma.double()[:, None]
    whole = (((4 * sigma ** 2 + 1).sqrt() - 1) / 2).floor()  # a box is 2 whole + 1 pixels wide, and
    part = (2 * whole + 1) * (whole * (whole + 1) - sigma ** 2)  # one more on either side in part
    part = part / (6 * (sigma ** 2 / 3 - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    weight = torch.where(offset.abs() <= whole, 1.0, torch.where(offset.abs() == whole + 1, part, 0))
    source = (torch.arange(n, device=sigma.device)[:, None] + offset).clamp(0, n - 1)
    box = torch.einsum("sk,okp->sop", weight / weight.sum(-1, keepdim=True), F.one_hot(source).double())
    return torch.linalg.matrix_power(box, 3).float()


def grayscale(x):
    """Luma (ITU-R 601) of M x n x 3 x n, the layout of all that follows: -> M x n x 1 x n."""
    red, green, blue = x.split(1, dim=2)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def shift_hue(x, turns):
    """Rotate the hue of x (M x n x 3 x n, 0..1) through HSV by `turns` (M x 1 x 1, -0.5..0.5)."""
    red, green, blue = x.unbind(dim=2)
    value = x.amax(dim=2)
    chroma = value - x.amin(dim=2)
    scale = 1 / torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == red, (green - blue) * scale, torch.where(
        value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)) + 6 * turns
    place = [(hue + corner) % 6 for corner in (5, 3, 1)]  # on the hexagon, for red, green and blue
    return torch.stack([value - chroma * torch.minimum(p, 4 - p).clamp(0, 1) for p in place], dim=2)


def normalise(x, mean, std):
    """float N x 3 x n x n in 0..1 -> zero mean and unit variance; channels_last in memory."""
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


class TwoViews:
    """Two random views of every image, each with draws of its own.

    draw() makes parameters of uniform random numbers, apply() distorts images by parameters; both
    are pure functions of tensors, so they can be tested, compiled and repeated.
    """
    DRAWS = 36  # uniform random numbers a view needs
    BLURS = 256  # steps of sigma

    def __init__(self, augmentation, n, mean, std, device):
        self.aug, self.n, self.mean, self.std = augmentation, n, mean, std
        self.strength = torch.tensor(augmentation.jitter, device=device)
        self.solarize_prob = torch.tensor(augmentation.solarize_prob, device=device).view(2, 1, 1)
        first, last = torch.triu_indices(n, n, device=device)  # every crop there is
        self.crops = crop_matrices(first, last - first + 1, n)
        sigma = 0.1 + 1.9 * (torch.arange(self.BLURS, device=device) + 0.5) / self.BLURS
        self.blurs = torch.cat([torch.eye(n, device=device)[None], blur_matrices(sigma, n)])
        self.pipeline = lambda images, uniform: self.apply(images, self.draw(uniform))

    def __call__(self, images, uniform):
        """uint8 B x n x n x 3 and uniform (2, B, DRAWS) in [0, 1) -> float 2B x 3 x n x n,
        normalised; all first views come first."""
        return self.pipeline(images.repeat(2, 1, 1, 1), uniform)

    def draw(self, uniform):
        """Parameters of 2B views: tensors of 2B rows, distributed as in torchvision's transforms."""
        aug, n = self.aug, self.n
        area, aspect, corner, flip, factor, hue, jitter, order, gray, blur, sigma, solarize = (
            uniform.split([10, 10, 2, 1, 3, 1, 1, 4, 1, 1, 1, 1], dim=-1))
        # RandomResizedCrop: the first of ten boxes that fits, else the whole image.
        area = n * n * (aug.crop_min + (1 - aug.crop_min) * area)
        aspect = torch.exp((2 * aspect - 1) * math.log(4 / 3))
        boxes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1).round()
        boxes = F.pad(boxes, (0, 0, 0, 1), value=n)
        fits = ((boxes > 0) & (boxes <= n)).all(-1)
        chosen = fits.int().argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
        length = boxes.gather(-2, chosen).squeeze(-2)
        start = (corner * (n - length + 1)).floor().minimum(n - length)
        # ColorJitter: three blends and a hue shift, in a random order.
        low = (1 - self.strength[:3]).clamp(min=0)
        factor = low + (1 + self.strength[:3] - low) * factor
        jittered = jitter < aug.jitter_prob
        when, kind = order[..., :3].sort(-1)
        parameters = dict(
            start=start.long(), length=length.long(), flip=flip < aug.flip_prob, kind=kind,
            factor=torch.where(jittered, factor, 1.0).gather(-1, kind), before=when < order[..., 3:],
            hue=torch.where(jittered, self.strength[3] * (2 * hue - 1), 0.0),
            gray=gray < aug.gray_prob, solarize=solarize < self.solarize_prob,
            blur=torch.where(blur < aug.blur_prob, 1 + (sigma * self.BLURS).long(), 0))
        return {name: value.flatten(0, 1) for name, value in parameters.items()}

    def apply(self, images, p):
        """uint8 M x n x n x 3 and parameters of M rows -> float M x 3 x n x n, normalised."""
        m, n = len(images), self.n
        x = images.permute(0, 1, 3, 2).float() / 255
        crop = p["start"] * n - p["start"] * (p["start"] - 1) // 2 + p["length"] - 1  # in triu order
        rows, columns = (self.crops.index_select(0, index) for index in crop.unbind(1))
        columns = torch.where(p["flip"][..., None], columns.flip(1), columns)
        x = self.transform(rows, x, columns).clamp(0, 1)
        for before in (True, False):  # the hue shift comes between the blends before and after it
            for slot in range(3):
                active = p["before"][:, slot] == before
                factor = torch.where(active, p["factor"][:, slot], 1.0).view(m, 1, 1, 1)
                kind = p["kind"][:, slot].view(m, 1, 1, 1)  # 0 brightness, 1 contrast, 2 saturation
                gray = grayscale(x)
                target = gray * (kind == 2) + gray.mean((1, 2, 3), keepdim=True) * (kind == 1)
                x = torch.lerp(target, x, factor).clamp(0, 1)
            if before:
                x = shift_hue(x, p["hue"][..., None])
        x = torch.where(p["gray"].view(m, 1, 1, 1), grayscale(x), x)
        blur = self.blurs.index_select(0, p["blur"].flatten())
        x = self.transform(blur, x, blur)
        if max(self.aug.solarize_prob) > 0:
            x = torch.where(p["solarize"].view(m, 1, 1, 1) & (x >= 128 / 255), 1 - x, x)
        return normalise(x.transpose(1, 2), self.mean, self.std)

    def transform(self, rows, x, columns):
        """rows @ image @ columns^T for every image and channel; plain batched products, no copy."""
        m, n = len(x), self.n
        x = rows @ x.reshape(m, n, 3 * n)
        return (x.view(m, 3 * n, n) @ columns.mT).view(m, n, 3, n)


# ---- Model and loss (section 2) -----------------------------------------------------------------

class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016), named as in torchvision."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(channels)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False),
                                        BatchNorm(channels)) if stride > 1 else nn.Identity()

    def forward(self, x):
        shortcut = self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """torchvision's resnet18 with a stem for small images: a 3 x 3 convolution of stride 1, no pooling.

    Normalised N x 3 x n x n -> features N x D, D = 8 width. There is no fc.
    """

    def __init__(self, width=64, stem_padding=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, stem_padding, bias=False)
        self.bn1 = BatchNorm(width)
        for stage, (inputs, channels) in enumerate([(1, 1), (1, 2), (2, 4), (4, 8)], start=1):
            setattr(self, f"layer{stage}", nn.Sequential(
                BasicBlock(inputs * width, channels * width, stride=1 if stage == 1 else 2),
                BasicBlock(channels * width, channels * width, stride=1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class SimCLR(nn.Module):
    """Backbone, projector, and a linear probe that watches without teaching: it reads detached features.

    Views M x 3 x n x n -> (projections M x d, class logits M x C).
    """

    def __init__(self, options, classes):
        super().__init__()
        features = 8 * options.width
        self.backbone = ResNet18(options.width, options.stem_padding)
        self.projector = nn.Sequential(nn.Linear(features, options.proj_hidden), nn.ReLU(),
                                       nn.Linear(options.proj_hidden, options.proj_dim))
        self.probe = nn.Linear(features, classes)

    def forward(self, views):
        features = self.backbone(views)
        return self.projector(features), self.probe(features.detach())


def nt_xent(projections, temperature):
    """NT-Xent (Chen et al. 2020, eq. 1): which of all other views shows the same image as this one?

    projections: 2B x d, first views first. Mean over 2B anchors of the cross-entropy of cosines /
    temperature, in fp32; ln(2B - 1) if all are equal. With several processes: their parts of a sum.
    """
    views = F.normalize(projections.float(), dim=1).view(2, -1, projections.shape[1])
    mine = views.shape[1]
    everyone = F.pad(views, (0, 0, rank() * mine, (world_size() - rank() - 1) * mine))
    everyone = sum_over_processes(everyone).flatten(0, 1)
    size = len(everyone) // 2
    first = torch.arange(mine, device=views.device) + rank() * mine
    anchor, positive = torch.cat([first, first + size]), torch.cat([first + size, first])
    logits = views.flatten(0, 1) @ everyone.T / temperature
    logits = logits.scatter(1, anchor[:, None], -math.inf)  # a view is no candidate for itself
    return F.cross_entropy(logits, positive, reduction="sum") / (2 * size)


def probe_loss(logits, labels, n_labelled):
    """Mean cross-entropy of the views of real images, 0 without any: logits 2B x C, labels B."""
    loss = F.cross_entropy(logits.float(), labels.repeat(2), ignore_index=-1, reduction="sum")
    return loss / (2 * n_labelled).clamp(min=1)


# ---- Optimiser ----------------------------------------------------------------------------------

class LARS(torch.optim.Optimizer):
    """Momentum SGD with a trust ratio for every weight tensor (You et al. 2017), clipped at 1.

    Weights (two or more axes): t = min(eta |p| / (|g| + wd |p| + eps) / lr, 1), d = (g + wd p) t.
    Biases and norms: d = g. Then buffer = momentum buffer + d and p = p - lr buffer.
    """

    def __init__(self, groups, momentum=0.9, eta=0.02, eps=1e-8):
        super().__init__(groups, dict(momentum=momentum, eta=eta, eps=eps, weight_decay=0.0))
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            flat = [p for p in group["params"] if p.ndim <= 1]
            weights = [p for p in group["params"] if p.ndim > 1]
            gradients = [p.grad for p in weights]
            weight_norm = torch.stack(torch._foreach_norm(weights))
            gradient_norm = torch.stack(torch._foreach_norm(gradients))
            trust = group["eta"] * weight_norm / (gradient_norm + decay * weight_norm + group["eps"])
            d = torch._foreach_add(gradients, weights, alpha=decay)
            torch._foreach_mul_(d, list((trust / lr).clamp(max=1).unbind()))
            d = [*d, *(p.grad for p in flat)]
            buffers = [self.state[p]["buffer"] for p in weights + flat]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, d)
            torch._foreach_add_(weights + flat, buffers, alpha=-lr)


def learning_rate(step, steps, warmup, peak, start=3e-5):
    """At a step from 0: linear from `start` to `peak` at `warmup`, then a cosine to 0 at `steps`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


# ---- Evaluation: a frozen backbone in eval mode, plain images, the last weights --------------------

@torch.no_grad()
def encode(backbone, images, data, amp):
    """Features (float N x D) of uint8 images; each process encodes its share and gets all."""
    device, training = data.mean.device, backbone.training
    backbone.eval()
    features = torch.zeros(len(images), 8 * len(backbone.conv1.weight), device=device)
    for rows in torch.arange(rank(), len(images), world_size()).split(1000):
        pixels = images[rows.to(images.device)].to(device).permute(0, 3, 1, 2).float() / 255
        with amp:
            features[rows.to(device)] = backbone(normalise(pixels, data.mean, data.std)).float()
    backbone.train(training)
    return sum_over_processes(features)


def top1(scores, labels):
    """Percentage of the rows of N x C scores that are highest at the label."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def knn_top1(train, train_labels, test, test_labels, k, temperature):
    """Weighted kNN (Wu et al. 2018): k training images vote, each with exp(cosine / temperature)."""
    train, scores = F.normalize(train, dim=1), []
    for chunk in F.normalize(test, dim=1).split(500):
        cosine, nearest = (chunk @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(chunk), int(train_labels.max()) + 1, device=train.device)
        weight = ((cosine - 1) / temperature).exp()  # - 1 cancels out, and avoids overflow
        scores.append(votes.scatter_add_(1, train_labels[nearest], weight))
    return top1(torch.cat(scores), test_labels)


def linear_top1(train, train_labels, test, test_labels, epochs, lr, seed, batch_size=1000):
    """Offline linear probe: softmax regression on cached, standardised features by SGD with momentum
    0.9, a cosine schedule and no weight decay."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    probe = nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.SGD(probe.parameters(), lr, momentum=0.9)
    for epoch in range(epochs):
        stream = random_stream(train.device, seed, PROBE, epoch)
        order = torch.randperm(len(train), generator=stream, device=train.device).split(batch_size)
        for number, rows in enumerate(order):
            optimizer.param_groups[0]["lr"] = learning_rate(epoch + number / len(order), epochs, 0, lr)
            optimizer.zero_grad()
            F.cross_entropy(probe(train[rows]), train_labels[rows]).backward()
            optimizer.step()
    return top1(probe(test), test_labels)


def evaluate(model, data, options, amp, linear):
    """Percent of the test images: {online_top1, knn_top1} and, if `linear`, linear_top1."""
    device = data.mean.device
    labels, test_labels = data.labels[:data.n_real].to(device), data.test_labels.to(device)
    test = encode(model.backbone, data.test_images, data, amp)
    sets = encode(model.backbone, data.images[:data.n_real], data, amp), labels, test, test_labels
    scores = {"online_top1": top1(model.probe(test), test_labels),
              "knn_top1": knn_top1(*sets, options.knn_k, options.knn_temperature)}
    if linear:
        scores["linear_top1"] = linear_top1(*sets, options.linear_epochs, options.linear_lr, options.seed)
    return scores


# ---- Training -----------------------------------------------------------------------------------

def train(options, data):
    """SimCLR on the mixture: trains, evaluates, fills the folder --out; returns what result.json holds.

    A step draws a batch, makes two views, compares them and moves the weights. Log, checkpoints and
    signals are the business of `run` (class Run).
    """
    device, precision = choose_device(options.device), choose_precision(options)
    amp = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    augmentation, why = choose_augmentation(options)
    mixture = Mixture(data, options.ratio, options.batch_size, options.seed)
    two_views = TwoViews(augmentation, options.image_size, data.mean, data.std, device)
    share = share_of(options.batch_size)
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes)).to(device, memory_format=torch.channels_last)
    learned = [*model.backbone.parameters(), *model.projector.parameters()]
    optimizer = LARS([dict(params=learned, peak=options.lr, weight_decay=options.weight_decay),
                      dict(params=[*model.probe.parameters()], peak=options.probe_lr)], options.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    meter = torch.zeros(5, device=device)  # sums since the last log line
    say(f"data      {data.n_real:,} real images of {len(data.classes)} classes and "
        f"{len(data.images) - data.n_real:,} generated ones wait in {data.images.device} memory\n"
        f"mixture   beta = {mixture.beta:.3f}: by Theorem 3.1, TV(P_t, P_d) = {1 - mixture.beta:.3f} "
        f"TV(P_g, P_d); {mixture.size // options.batch_size:,} steps an epoch\n"
        f"views     {why}\n          {augmentation}\n"
        f"network   width {options.width}, {sum(p.numel() for p in learned) / 1e6:.2f} M parameters, "
        f"{str(precision)[6:]} on {world_size()} x {device}\n"
        f"training  {options.steps:,} steps of {options.batch_size}, learning rate {options.lr:g}")

    def draw(step):
        stream = random_stream(device, options.seed, VIEWS, step)
        uniform = torch.rand(2, options.batch_size, two_views.DRAWS, generator=stream, device=device)
        return *mixture.batch(step, share, device), uniform[:, share]

    def losses(images, labels, n_labelled, uniform):
        with torch.no_grad():
            views = two_views(images, uniform)
        with amp:
            projections, logits = model(views)
        hits = (logits.argmax(1) == labels.repeat(2)).sum()
        return nt_xent(projections, options.temperature), probe_loss(logits, labels, n_labelled), hits

    state = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    with Run(options, data, mixture.beta, why) as run:
        step = run.restore(state)
        if compiles(options) and step < options.steps:
            compile_or_warn(model, two_views, lambda: sum(losses(*draw(step))[:2]).backward())
        run.draw_views(two_views)
        batches = prefetch(draw, step, options.steps, data.images.device.type != device.type)
        clock, since = time.perf_counter(), step
        while True:
            finished = step == options.steps
            if finished or options.eval_every and step % options.eval_every == 0:
                with run.abandonable(step, state):
                    if not run.records("evaluation", step):
                        scores = evaluate(model, data, options, amp, linear=finished)
                        run.log("evaluation", step, scores)
                clock, since = time.perf_counter(), step
            if finished:
                return run.finish(model)
            run.stop_if_asked(step, state)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.warmup_steps, group["peak"])
            batch = next(batches)
            contrastive, probing, hits = losses(*batch)
            optimizer.zero_grad()
            scaler.scale(contrastive + probing).backward()
            sum_gradients(model)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            labelled_views = 2 * (batch[1] >= 0).sum()
            meter += torch.stack([contrastive.detach(), probing.detach(), hits, labelled_views,
                                  torch.ones_like(hits) / world_size()])

            if step % options.log_every == 0 or step == options.steps:
                loss, probing, hits, views, count = run.read(meter, step)  # the one sync with the host
                seconds = (time.perf_counter() - clock) / (step - since)
                run.log("training", step, dict(
                    loss=loss / count, lr=optimizer.param_groups[0]["lr"], probe_loss=probing / count,
                    probe_top1=100 * hits / max(views, 1), seconds_left=seconds * (options.steps - step),
                    images_per_second=options.batch_size / seconds))
                meter.zero_()
                clock, since = time.perf_counter(), step
            if step % options.save_every == 0:
                run.save(step, state)

# ==== What only operations need ==================================================================

class InputError(Exception):
    """What the user gave cannot be used: one line on what is wrong, where, and what to do."""
    status = 2

class RunError(Exception):
    """A run cannot go on although it was asked for rightly."""
    status = 1

def parse_options(argv=None):
    """The command line with every default filled in."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.demo or options.eval_only:  # the command line still overrides these
        parser.set_defaults(**(DEMO if options.demo else read_config(options.eval_only)["options"]))
        options = parser.parse_args(argv)
    if options.demo and not options.gen_data:
        options.gen_data = [os.path.join(options.data_dir, f"shapes{options.image_size}-generated.npz")]
    if options.dry_run:
        options.steps = options.linear_epochs = 1
    inflation = f"ratio{options.ratio}" if options.gen_data else "none"
    name = f"{Path(options.dataset).name}-{inflation}-{options.aug}-seed{options.seed}"
    late = dict(warmup_steps=round(0.01 * options.steps), eval_every=math.ceil(0.2 * options.steps),
                save_every=math.ceil(0.01 * options.steps), seeds=[options.seed], out=f"runs/{name}")
    for key, value in late.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.warmup_steps > options.steps:
        parser.error(f"--warmup-steps {options.warmup_steps}: more than --steps {options.steps}")
    if options.ratio == 0 and not options.gen_data:
        parser.error("--ratio 0: without real images it needs --gen-data")
    if options.compare and not options.gen_data:
        parser.error("--compare: needs generated images to compare; give --gen-data")
    if options.jitter and options.jitter[3] > 0.5:
        parser.error(f"--jitter: a hue of {options.jitter[3]:g} turns is more than 0.5")
    if len(options.solarize_prob or []) > 2:
        parser.error("--solarize-prob: takes one probability, or one for each of two views")
    return options

# ---- Reading images -----------------------------------------------------------------------------

STATISTICS = {"cifar10": ([.4914, .4822, .4465], [.2470, .2435, .2616]),
              "cifar100": ([.5071, .4865, .4409], [.2673, .2564, .2762])}

@dataclasses.dataclass
class Data:
    """What a run learns from; the real images come first in `images`, then the generated ones."""
    images: torch.Tensor  # uint8, (n_real + n_generated) x n x n x 3
    labels: torch.Tensor  # int64, -1 for generated images, whatever their file says
    n_real: int
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    mean: torch.Tensor  # 3 x 1 x 1, of the real training images in 0..1
    std: torch.Tensor
    crc: dict  # checksums, so that no run goes on with other data

def load_data(options):
    """The Data of --dataset and --gen-data, in host memory. Raises InputError."""
    (images, labels), (test_images, test_labels), classes = load_real(options)
    if options.real_size:
        size, order = options.real_size, np.random.default_rng(options.seed).permutation(len(labels))
        keep = [order[labels[order] == label][:size // len(classes) + (label < size % len(classes))]
                for label in range(len(classes))]
        if sum(map(len, keep)) < size:
            raise InputError(f"--real-size {size}: the {len(classes)} classes have "
                             f"{np.bincount(labels).tolist()} images, too few for equal shares")
        keep = np.sort(np.concatenate(keep))
        images, labels = images[keep], labels[keep]
    if options.dataset in STATISTICS:
        mean, std = STATISTICS[options.dataset]
    else:
        counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
        levels = np.arange(256) / 255
        mean = [np.average(levels, weights=count) for count in counts]
        std = [max(np.average((levels - m) ** 2, weights=c) ** 0.5, 1e-3) for m, c in zip(mean, counts)]
    crc, pool = {"real": zlib.crc32(images)}, torch.from_numpy(images)
    if options.gen_data:
        pool, crc["generated"] = append_generated(images, options)
    labels = F.pad(torch.as_tensor(labels), (0, len(pool) - len(labels)), value=-1)
    mean, std = (torch.tensor(each, dtype=torch.float32).view(3, 1, 1) for each in (mean, std))
    return Data(pool, labels, len(images), torch.from_numpy(test_images),
                torch.as_tensor(test_labels), classes, mean, std, crc)

def load_real(options):
    """(train images, labels), (test images, labels), class names; numpy, uint8 and int64."""
    name, size = options.dataset, options.image_size
    if name == "shapes":
        from download_generated import shapes  # the demo's data set is not part of the method
        return shapes(size)
    if name not in STATISTICS:
        train, test = (load_folder(Path(name) / split, size) for split in ("train", "test"))
        if train[2] != test[2]:
            odd = ", ".join(sorted({*train[2]} ^ {*test[2]})[:5])
            raise InputError(f"--dataset {name}: train and test differ in their classes: {odd}")
        return train[:2], test[:2], train[2]
    if size != 32:
        raise InputError(f"--image-size {size}: {name} has 32 x 32 pixels; leave the option out")
    dataset = getattr(torchvision.datasets, name.upper())
    try:
        if rank() == 0:
            dataset(options.data_dir, download=True)  # it unpickles, but only what has the known md5
        barrier()
        train, test = (dataset(options.data_dir, train=split) for split in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--dataset {name}: {one_line(error)}; `python download_generated.py {name}` "
                         "resumes a download and knows a second source") from error
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets)), train.classes

def load_folder(folder, size):
    """(images, labels, class names) of folder/<class>/*, cropped to squares and resized (bicubic)."""
    from PIL import Image, ImageOps
    def read(path):
        try:
            with Image.open(path) as image:
                return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except Exception as error:  # a broken image can fail in any way
            raise InputError(f"--dataset: {path} is no readable image; repair or remove it") from error
    try:
        found = torchvision.datasets.ImageFolder(
            folder, is_valid_file=lambda path: not os.path.basename(path).startswith("."))
    except OSError as error:
        raise InputError(f"--dataset: {folder} is not a folder of classes with images ("
                         f"{one_line(error)}); expected cifar10, cifar100, shapes or a folder with "
                         "train/<class>/* and test/<class>/*") from error
    if len(found.classes) < 2:
        raise InputError(f"--dataset: {folder} has one class only, {found.classes[0]}")
    images = np.empty((len(found), size, size, 3), np.uint8)
    with ThreadPoolExecutor() as threads:
        for index, image in enumerate(threads.map(read, (path for path, _ in found.samples))):
            images[index] = image
    return images, np.array(found.targets), found.classes

def npz_member(path, key="image", rows=4096):
    """(shape, dtype, chunks) of array `key` in the npz file `path`; chunks yields its rows in order.

    It streams, up to `rows` at a time, stored or compressed: a 3 GB file needs no memory of its own,
    and zip's checksum reveals damage. Never unpickles. Raises InputError."""
    damage = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, NotImplementedError,
              zipfile.BadZipFile, zlib.error)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}
    try:
        archive = zipfile.ZipFile(path)
        size = archive.getinfo(f"{key}.npy").file_size
        member = archive.open(f"{key}.npy")
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(member)](member)
        size -= member.tell()
    except KeyError:
        raise InputError(f"{path}: has no readable array `{key}`") from None
    except damage as error:
        raise InputError(f"{path}: is not a whole npz file ({one_line(error)})") from error
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    if dtype.hasobject or fortran_order or not shape or size != shape[0] * row_bytes:
        raise InputError(f"{path}: `{key}` is not a plain array of {dtype} {shape} in C order")
    def chunks():
        try:
            with archive, member:
                for start in range(0, shape[0], rows):
                    count = min(rows, shape[0] - start)
                    data = member.read(count * row_bytes)
                    yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
                member.read(1)  # at a member's end zipfile compares the checksum
        except damage as error:
            raise InputError(f"{path}: is damaged ({one_line(error)})") from error
    return shape, dtype, chunks()

def append_generated(real, options):
    """(tensor of the real and then the generated images, the files' checksums). Raises InputError.

    Rows go straight to their final place, so memory peaks at the size of the result."""
    members, checksums = [npz_member(path) for path in options.gen_data], []
    for path, (shape, dtype, _) in zip(options.gen_data, members):
        if dtype != np.uint8 or shape[1:] != real.shape[1:] or not shape[0]:
            raise InputError(f"--gen-data {path}: holds {dtype} {shape} instead of uint8 (N, n, n, 3) "
                             f"with n = {real.shape[1]}; download_generated.py --from-npz converts")
        checksums.append(zipfile.ZipFile(path).getinfo("image.npy").CRC)
    total = sum(shape[0] for shape, _, _ in members)
    size = options.gen_size or total
    if size > total:
        raise InputError(f"--gen-size {size}: --gen-data has {total} images")
    wanted = np.zeros(total, bool)
    wanted[np.random.default_rng(options.seed).permutation(total)[:size]] = True
    pool = torch.empty((len(real) + size, *real.shape[1:]), dtype=torch.uint8)
    rows, filled, seen = pool.numpy(), len(real), 0
    rows[:filled] = real
    for chunk in (chunk for _, _, chunks in members for chunk in chunks):
        chosen = chunk[wanted[seen:seen + len(chunk)]]
        rows[filled:filled + len(chosen)] = chosen
        filled, seen = filled + len(chosen), seen + len(chunk)
    sample = rows[len(real)::max(1, size // 10_000)]
    if looks_bgr(sample.mean((0, 1, 2)), real.mean((0, 1, 2))):
        say("warning: --gen-data looks like BGR: its mean colour fits the real images' in reverse")
    return pool, checksums

def looks_bgr(generated_means, real_means):
    """Do the channel means of generated images (3, 0..255) fit the real ones' better in reverse?"""
    generated, real = np.asarray(generated_means), np.asarray(real_means)
    return bool(np.abs(generated[::-1] - real).sum() + 1 < np.abs(generated - real).sum())

def place(data, options):
    """The Data with its images where --data-device says, and its statistics on the device."""
    device, choice = choose_device(options.device), options.data_device
    if choice == "auto":
        choice = device.type
        if choice == "cuda" and data.images.numel() > torch.cuda.mem_get_info(device)[0] / 2:
            choice = "cpu"
            say(f"images of {data.images.numel() / 1e9:.1f} GB stay in host memory, prefetched")
    target = device if choice == device.type else choose_device(choice)
    return dataclasses.replace(data, images=data.images.to(target), labels=data.labels.to(target),
                               mean=data.mean.to(device), std=data.std.to(device))

def prefetch(draw, step, stop, ahead):
    """draw(step), draw(step + 1), ...; with `ahead`, a thread draws one while another is in use."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(draw, step) if ahead and step < stop else None
        for step in range(step + 1, stop + 1):
            current = upcoming.result() if ahead else draw(step - 1)
            upcoming = thread.submit(draw, step) if ahead and step < stop else None
            yield current

# ---- Device, precision, compilation -------------------------------------------------------------

def choose_device(name):
    """The torch.device of --device, a GPU for each process. Raises InputError."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in found if found[device]) if name == "auto" else name
    if not found[name]:
        raise InputError(f"--device {name}: there is none here; --device auto takes what there is")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)

def device_name(name):
    device = choose_device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

def compiles(options):
    """--compile, by default on CUDA: on a CPU it costs more than it brings."""
    return choose_device(options.device).type == "cuda" if options.compile is None else options.compile

def choose_precision(options):
    """The dtype of --amp; auto asks whether the hardware multiplies bf16, as recent CPUs do."""
    device = choose_device(options.device)
    if options.amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[options.amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32

def tune_process():
    """Process-wide settings for speed: by main, never by import."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --amp off means fp32 all through
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        import ctypes
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: keep freed memory, or every
            ctypes.CDLL("libc.so.6").mallopt(parameter, 2 ** 31 - 1)  # step faults it in again

def compile_or_warn(model, two_views, trial):
    """Compile in place, and try it on one step without a trace; whatever fails, training goes on."""
    started, buffers = time.perf_counter(), [buffer.clone() for buffer in model.buffers()]
    eager = two_views.pipeline
    try:
        model.compile()  # in place, so that names in the state dict stay clean
        two_views.pipeline = torch.compile(eager)
        trial()
        say(f"compiled  in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # a compiler can fail in any way
        say(f"warning: goes on without compilation, which failed: {one_line(error)}")
        model._compiled_call_impl, two_views.pipeline = None, eager
    for buffer, before in zip(model.buffers(), buffers):
        buffer.copy_(before)

# ---- A run's folder -----------------------------------------------------------------------------

class Run:
    """The folder --out: configuration, log, checkpoints, results. The same command continues it, the
    lock on its log keeps a second process out, and only the first process of many writes."""
    FREE = {"out", "data_dir", "gen_data", "device", "data_device", "compile", "log_every", "steps",
            "save_every", "eval_every", "eval_only", "compare", "seeds", "demo"}  # may change
    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

    def __init__(self, options, data, beta, why):
        self.options, self.data, self.folder = options, data, Path(options.out)
        self.lines, self.asked, self.safe, self.last_finite = [], 0, True, "none"
        self.facts = dict(beta=beta, augmentation=why, n_real=data.n_real,
                          n_generated=len(data.images) - data.n_real)
        self.config = json.loads(json.dumps({
            "options": vars(options), **self.facts, "crc": data.crc, "classes": data.classes,
            "mean": data.mean.flatten().tolist(), "std": data.std.flatten().tolist()}))

    def __enter__(self):
        if rank() == 0:
            self.open_folder()
        self.handlers = {number: signal.signal(number, self.hear) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if rank() == 0:
            self.log_file.close()

    def open_folder(self):
        where = f"--out {self.folder}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log_file = open(self.folder / "log.jsonl", "a+b")
        except OSError as error:
            raise InputError(f"{where}: cannot be written ({error.strerror})") from error
        with contextlib.suppress(ImportError):
            import fcntl  # where there is none, there is no lock
            try:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{where}: another process is training there") from None
        if (self.folder / "config.json").exists():
            old = read_config(self.folder)
            if old["options"]["dry_run"] and not self.options.dry_run:
                for name in ("checkpoint.pt", "checkpoint.prev.pt"):  # a rehearsal is not continued
                    (self.folder / name).unlink(missing_ok=True)
            else:
                self.refuse_changes(old, where)
        write_whole(self.folder / "config.json", json.dumps(self.config, indent=1).encode())

    def refuse_changes(self, old, where):
        before, now = ({**{"--" + name.replace("_", "-"): value for name, value in c["options"].items()
                           if name not in self.FREE}, "data with checksum": c["crc"]}
                       for c in (old, self.config))
        for name in now:
            if before.get(name) != now[name]:
                raise InputError(f"{where}: was begun with {name} {before.get(name)}, not {now[name]}; "
                                 "choose a new --out, or the old value to continue")
        before, now = old["options"]["steps"], self.options.steps
        if now < before:
            raise InputError(f"{where}: was begun with --steps {before}, not {now}; choose a new --out")
        if now > before:
            say(f"--steps grows from {before} to {now}: the learning rate jumps to the longer cosine, "
                f"so the result is not that of {now} steps from the start")

    def log(self, event, step, values):
        """A JSON object a line in log.jsonl; the essence of it on the screen."""
        self.lines.append({"event": event, "step": step, **values})
        if rank() == 0:
            self.log_file.write(json.dumps(self.lines[-1]).encode() + b"\n")
            self.log_file.flush()
        if event == "training":
            left = time.strftime("%H:%M:%S", time.gmtime(values["seconds_left"] % 86400))
            left = f"{values['seconds_left'] // 86400:.0f} days {left}".removeprefix("0 days ")
            say(f"step {step:7,}  loss {values['loss']:.4f}  lr {values['lr']:.4f}  "
                f"{values['images_per_second']:,.0f} images/s  {left} left")
        if event == "evaluation":
            say(f"step {step:7,}  " + "  ".join(f"{name} {value:.2f} %" for name, value in values.items()))

    def records(self, event, step=None):
        return [line for line in self.lines if line["event"] == event and step in (None, line["step"])]

    def read(self, meter, step):
        """The meter's sums over all processes as numbers. Raises RunError if they are not finite."""
        values = sum_over_processes(meter).tolist()
        if not all(map(math.isfinite, values)):
            raise RunError(f"the loss is not finite at step {step} (last finite: {self.last_finite}); "
                           "the last checkpoint is good: try a lower --lr, or --amp off")
        if values[-1]:
            self.last_finite = f"{values[0] / values[-1]:.4f} at step {step}"
        return values

    def save(self, step, state):
        """Checkpoint all that the next step depends on, if it is finite; keep the checkpoint before."""
        meter = self.read(state["meter"], step)
        if not all(value.isfinite().all() for value in state["model"].state_dict().values()):
            raise RunError(f"weights are not finite at step {step} (last loss: {self.last_finite}); "
                           "the last checkpoint is good: try a lower --lr, or --amp off")
        if rank() == 0:
            parts = {name: state[name].state_dict() for name in ("model", "optimizer", "scaler")}
            os.fsync(self.log_file.fileno())
            write_whole(self.folder / "checkpoint.pt", torch_bytes({"step": step, "meter": meter, **parts}),
                        keep=self.folder / "checkpoint.prev.pt")

    def restore(self, state):
        """Load the newest whole checkpoint, cut the log back to it, return its step: 0 without one."""
        step, checkpoint = 0, load_checkpoint(self.folder) if rank() == 0 else None
        if checkpoint:
            try:
                step = checkpoint["step"]
                state["meter"].copy_(torch.tensor(checkpoint["meter"]))
                for name in ("model", "optimizer", "scaler"):
                    state[name].load_state_dict(checkpoint[name])
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise InputError(f"{self.folder}: its checkpoint is not of this model ("
                                 f"{one_line(error)})") from error
        if rank() == 0:
            self.cut_log(step)
        step = share_state(step, state)
        self.log("start", step, dict(
            argv=sys.argv, time=time.strftime("%Y-%m-%d %H:%M:%S"), processes=world_size(),
            python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__,
            torchvision=torchvision.__version__, device=device_name(self.options.device),
            script_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest()))
        if step:
            say(f"continues  {self.folder} after step {step:,}")
        self.safe = False
        return step

    def cut_log(self, step):
        """Drop torn lines and those of steps that will be done again."""
        self.log_file.seek(0)
        end = 0
        for line in self.log_file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["step"] <= step and line.endswith(b"\n"):
                    self.lines.append(record)
                    end += len(line)
                    continue
            break
        self.log_file.truncate(end)

    def hear(self, number, _):
        """A signal: stop after this step. The second one, or one with nothing at stake: at once."""
        if self.asked or self.safe:
            self.leave(number, "at once")
        self.asked = number

    def stop_if_asked(self, step, state):
        asked = self.asked
        if world_size() > 1:  # all must agree; asking them every tenth step keeps the GPUs busy
            asked = 0 if step % 10 else highest_of_processes(self.asked, state["meter"])
        if asked:
            self.save(step, state)
            self.leave(asked, f"after step {step:,}, which is saved")

    def leave(self, number, when):
        say(f"stopped by {signal.Signals(number).name} {when}; the same command continues")
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def abandonable(self, step, state):
        """Around work that a signal may break off, as everything before it is saved."""
        self.save(step, state)
        self.safe = True
        if self.asked:
            self.leave(self.asked, f"after step {step:,}, which is saved")
        yield
        self.safe = False

    def draw_views(self, two_views):
        if rank() == 0 and not (self.folder / "views.png").exists():
            write_picture(self.folder / "views.png", views_picture, self.data, two_views)

    def finish(self, model):
        """Write encoder.pt, curves.png and result.json; return the result."""
        scores = self.records("evaluation", self.options.steps)[-1]
        speeds = [line["images_per_second"] for line in self.records("training")]
        result = {**{name: scores[name] for name in METRICS}, **self.facts, "steps": self.options.steps,
                  "seed": self.options.seed, "loss": self.records("training")[-1]["loss"],
                  "images_per_second": statistics.median(speeds)}
        if rank() == 0:
            write_whole(self.folder / "encoder.pt", torch_bytes(model.backbone.state_dict()))
            write_picture(self.folder / "curves.png", curves_picture, self)
            write_whole(self.folder / "result.json", json.dumps(result, indent=1).encode())
            say(f"results in {self.folder}")
        return result

def write_whole(path, content, keep=None):
    """Write bytes to a file whole or not at all; with `keep`, what was there stays under that name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}); what was there is intact") from error

def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

def read_config(folder):
    """The contents of config.json in a run's folder. Raises InputError."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        config["options"]["steps"], config["options"]["dry_run"], config["crc"], config["mean"]
        return config
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: has no config.json of a run ({one_line(error)})") from error

def load_checkpoint(folder):
    """The newest whole checkpoint in a run's folder, None without any. Raises InputError."""
    paths = [path for path in (folder / "checkpoint.pt", folder / "checkpoint.prev.pt") if path.exists()]
    for path in paths:
        try:
            if member := zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
                raise ValueError(f"checksum of {member}")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            say(f"warning: {path} is damaged ({one_line(error)}); the one before it must do")
    if paths:
        raise InputError(f"{folder}: has no whole checkpoint left; choose a new --out")

def load_encoder(path):
    """The backbone of an encoder.pt in eval mode: normalised N x 3 x n x n -> N x D. Raises InputError.

    With the run's config.json beside it, .mean and .std (3 x 1 x 1) normalise images in 0..1."""
    try:
        weights, config = torch.load(path, map_location="cpu", weights_only=True), None
        if (Path(path).parent / "config.json").exists():
            config = read_config(Path(path).parent)
        padding = config["options"]["stem_padding"] if config else 1
        backbone = ResNet18(len(weights["conv1.weight"]), padding)
        backbone.load_state_dict(weights)
        for name in ("mean", "std") if config else ():
            setattr(backbone, name, torch.tensor(config[name]).view(3, 1, 1))
        return backbone.eval()
    except Exception as error:  # a file from elsewhere can fail in any way
        raise InputError(f"{path}: is not an encoder.pt of this program ({one_line(error)})") from error

# ---- Many processes, as torchrun starts them ----------------------------------------------------

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def rank():
    return dist.get_rank() if world_size() > 1 else 0

def barrier():
    if world_size() > 1:
        dist.barrier()

def say(text):
    if rank() == 0:
        print(text, flush=True)

def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]

def share_of(batch_size):
    """The slice of a batch that this process works on. Raises InputError."""
    if batch_size % world_size():
        raise InputError(f"--batch-size {batch_size}: {world_size()} processes cannot share it equally")
    mine = batch_size // world_size()
    return slice(rank() * mine, (rank() + 1) * mine)

class SumOverProcesses(torch.autograd.Function):
    """y = x_1 + ... + x_W in every process; so the gradient of x_r is the sum of all gradients of y."""
    @staticmethod
    def forward(ctx, x):
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)

def sum_over_processes(x):
    return SumOverProcesses.apply(x) if world_size() > 1 else x

def highest_of_processes(value, like):
    value = torch.tensor(value, device=like.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)

def sum_gradients(model):
    """Every process has the gradient of its part of the loss; their sum, not mean, is the whole."""
    if world_size() > 1:
        gradients = [parameter.grad for parameter in model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))

def share_state(step, state):
    """Give every process the first one's state and step; what the meter has summed stays there."""
    if world_size() == 1:
        return step
    scaler = state["scaler"].state_dict()
    step = torch.tensor([step, scaler.get("scale", 1), scaler.get("_growth_tracker", 0)],
                        dtype=torch.float64, device=state["meter"].device)
    buffers = [values["buffer"] for values in state["optimizer"].state.values()]
    for tensor in [step, *state["model"].state_dict().values(), *buffers]:
        dist.broadcast(tensor, 0)
    step, scale, tracker = step.tolist()
    state["scaler"].load_state_dict({**scaler, "scale": scale, "_growth_tracker": int(tracker)})
    state["meter"].mul_(rank() == 0)
    return int(step)

class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, on any device (torch's own needs CUDA)."""
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide, count = x.float(), world_size() * x.numel() / x.shape[1]
        mine = torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0))[None]
        every = sum_over_processes(F.pad(mine, (0, 0, 0, 0, rank(), world_size() - rank() - 1)))
        mean = every[:, 1].mean(0)
        variance = every[:, 0].mean(0) + (every[:, 1] - mean).square().mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (wide * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)

def BatchNorm(channels):
    return (SyncBatchNorm if world_size() > 1 else nn.BatchNorm2d)(channels)

# ---- Pictures -----------------------------------------------------------------------------------

def write_picture(path, draw, *arguments):
    """draw(figure, *arguments) as a PNG file, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say(f"note: no {path.name}, as matplotlib is not installed")
    figure, buffer = Figure(layout="constrained"), io.BytesIO()
    draw(figure, *arguments)
    figure.savefig(buffer, format="png", dpi=130)
    write_whole(path, buffer.getvalue())

def views_picture(figure, data, two_views, count=8):
    """Real and generated images in columns, each above its two views: what the network sees."""
    pools = {"real": (0, data.n_real), "generated": (data.n_real, len(data.images))}
    pools = {name: (start, stop) for name, (start, stop) in pools.items() if start < stop}
    figure.set_size_inches(5 * len(pools), 2.3)
    for (name, bounds), axis in zip(pools.items(), np.atleast_1d(figure.subplots(1, len(pools)))):
        index = torch.randint(*bounds, (count,), generator=random_stream("cpu", bounds[0]))
        uniform = torch.rand(2, count, TwoViews.DRAWS, generator=random_stream("cpu", bounds[1]))
        device = data.mean.device
        images = data.images[index.to(data.images.device)].to(device)
        views = two_views.apply(images.repeat(2, 1, 1, 1), two_views.draw(uniform.to(device)))
        rows = torch.cat([images.permute(0, 3, 1, 2) / 255, views * data.std + data.mean])
        grid = torchvision.utils.make_grid(rows, nrow=count, padding=1, pad_value=1.0)
        axis.imshow(grid.clamp(0, 1).permute(1, 2, 0).cpu(), interpolation="nearest")
        axis.set(title=f"{name} images and their two views", xticks=[], yticks=[])

def curves_picture(figure, run):
    """The loss, and the accuracies on the test images, against steps."""
    figure.set_size_inches(9, 3)
    left, right = figure.subplots(1, 2)
    training, evaluations = run.records("training"), run.records("evaluation")
    left.plot([line["step"] for line in training], [line["loss"] for line in training])
    left.set(xlabel="step", ylabel="NT-Xent")
    for name in ("knn_top1", "online_top1"):
        right.plot([line["step"] for line in evaluations], [line[name] for line in evaluations],
                   "o-", label=name)
    right.set(xlabel="step", ylabel="test accuracy (%)")
    right.legend()

def comparison_picture(figure, table):
    """A group of bars for every cell: mean, standard deviation, and every seed as a dot."""
    figure.set_size_inches(9, 3.4)
    axis, cells = figure.subplots(), [name for name in table if table[name]["linear_top1"]]
    for shift, metric in enumerate(METRICS):
        for x, name in enumerate(cells):
            value, place = table[name][metric], x + 0.27 * (shift - 1)
            axis.bar(place, value["mean"], 0.25, yerr=value["std"], color=f"C{shift}", alpha=0.6,
                     label=metric if x == 0 else None)
            axis.plot([place] * len(value["values"]), value["values"], "k.", markersize=4)
    values = [v for name in cells for metric in METRICS for v in table[name][metric]["values"]]
    axis.set(xticks=range(len(cells)), xticklabels=cells, ylabel="test accuracy (%)",
             ylim=(max(0, min(values) - 5), min(100, max(values) + 3)))
    axis.legend(ncols=3)

# ---- Experiments and main -----------------------------------------------------------------------

METRICS = ("online_top1", "linear_top1", "knn_top1")
DEMO = dict(dataset="shapes", compare=True, image_size=16, real_size=500, width=16, steps=600,
            batch_size=128, proj_hidden=256, proj_dim=64, out="runs/demo", log_every=100, eval_every=0)

def compare(options, data):
    """The four cells over --seeds with everything else equal: a table, comparison.json and .png."""
    real = dataclasses.replace(data, images=data.images[:data.n_real], labels=data.labels[:data.n_real],
                               crc={"real": data.crc["real"]})
    cells = {"no inflation, strong": (real, None, 1, "strong"),
             "no inflation, weak": (real, None, 1, "weak"),
             "vanilla, 1:1, strong": (data, options.gen_data, 1, "strong"),
             f"AdaInf, {options.ratio}:1, weak": (data, options.gen_data, options.ratio, "weak")}
    results, folder = {name: [] for name in cells}, Path(options.out)
    for seed in options.seeds:
        for name, (subset, files, ratio, aug) in cells.items():
            cell, short = copy.copy(options), "".join(c if c.isalnum() else "-" for c in name)
            cell.seed, cell.gen_data, cell.ratio, cell.aug = seed, files, ratio, aug
            cell.out = str(folder / f"{short}-seed{seed}")
            say(f"\n{name}, seed {seed}")
            results[name].append(train(cell, subset))
    def spread(values):
        return {"mean": statistics.mean(values), "values": values,
                "std": statistics.stdev(values) if len(values) > 1 else 0.0}
    table = {**baselines(options, real), **{name: {metric: spread([run[metric] for run in runs])
                                                  for metric in METRICS} for name, runs in results.items()}}
    say("\n" + " " * 24 + "".join(f"{metric:>18}" for metric in METRICS))
    for name, row in table.items():
        say(f"{name:24}" + "".join(f"{row[metric]['mean']:9.2f} +- {row[metric]['std']:5.2f}"
                                   if metric in row else " " * 18 for metric in METRICS))
    say(f"top-1 on {len(data.test_images):,} test images, %, mean and standard deviation over seeds "
        f"{options.seeds}; {options.steps:,} steps of {options.batch_size}")
    if rank() == 0:
        record = {"options": vars(options), "table": table}
        write_whole(folder / "comparison.json", json.dumps(record, indent=1).encode())
        write_picture(folder / "comparison.png", comparison_picture, table)
    return table

def spread(values):
    return {"mean": statistics.mean(values), "values": values,
            "std": statistics.stdev(values) if len(values) > 1 else 0.0}

def baselines(options, data):
    """What needs no training: kNN on pixels, kNN and linear probe on features of an untrained network."""
    device = choose_device(options.device)
    pixels = [(images.to(device).permute(0, 3, 1, 2) / 255 - data.mean).flatten(1)
              for images in (data.images, data.test_images)]
    labels, test_labels = data.labels.to(device), data.test_labels.to(device)
    knn = knn_top1(pixels[0], labels, pixels[1], test_labels, options.knn_k, options.knn_temperature)
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes)).to(device, memory_format=torch.channels_last)
    scores = evaluate(model, data, options, contextlib.nullcontext(), linear=True)
    return {"raw pixels": {"knn_top1": spread([knn])}, "untrained network": {
        name: spread([scores[name]]) for name in ("linear_top1", "knn_top1")}}

def evaluate_only(options, data):
    """All scores of the newest checkpoint of a run; writes nothing."""
    model = SimCLR(options, len(data.classes))
    checkpoint = load_checkpoint(Path(options.eval_only))
    if checkpoint is None:
        raise InputError(f"--eval-only {options.eval_only}: has no checkpoint yet")
    model.load_state_dict(checkpoint["model"])
    model.to(choose_device(options.device), memory_format=torch.channels_last)
    precision = choose_precision(options)
    amp = torch.autocast(choose_device(options.device).type, precision, enabled=precision != torch.float32)
    scores = {"steps": checkpoint["step"], **evaluate(model, data, options, amp, linear=True)}
    say(json.dumps(scores))
    return scores

def main(argv=None):
    """Run the command line; returns the result (dict). Exits with 2 on bad input, 1 if a run fails."""
    try:
        options = parse_options(argv)
        tune_process()
        if "RANK" in os.environ and not dist.is_initialized():  # torchrun started this process
            device = choose_device(options.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            if device.type == "cuda":
                torch.cuda.set_device(device)
        if options.demo and not Path(options.gen_data[0]).exists():
            from download_generated import generate_shapes
            if rank() == 0:
                generate_shapes(options.gen_data[0], options.image_size, options.real_size)
            barrier()
        data = place(load_data(options), options)
        work = evaluate_only if options.eval_only else compare if options.compare else train
        return work(options, data)
    except (InputError, RunError) as error:
        print(f"adainf.py: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except torch.OutOfMemoryError as error:
        print(f"adainf.py: out of device memory ({one_line(error)}): smaller --batch-size or --width, "
              "or --data-device cpu", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:
        if world_size() == 1 or not any(word in str(error) for word in ("onnection", "NCCL", "timed out")):
            raise
        print(f"adainf.py: lost another process ({one_line(error)}); the same command continues",
              file=sys.stderr)
        raise SystemExit(1) from None

if __name__ == "__main__":
    main()
