#!/usr/bin/env python3
"""AdaInf: adaptive inflation for contrastive learning, in one file.

Paper: "Do Generated Data Always Help Contrastive Learning?", Wang, Zhang and Wang, ICLR 2024
(arXiv 2403.12448); symbols and theorem numbers here are the paper's. SimCLR learns without labels:
a network must recognise two random views of one image among the views of all others. *Inflation*
adds generated images, which can hurt: they are not quite real, and inflation and augmentation both
tie similar images together, though only augmentation can change what an image shows. AdaInf is one
rule: with inflation, count every real image N = 10 times and augment more weakly.

    python adainf.py --demo                                   # the whole idea, offline, on a laptop
    python adainf.py                                          # SimCLR on CIFAR-10
    python adainf.py --gen-data data/cifar10-ddpm.npz --ratio 10               # AdaInf
    python adainf.py --gen-data data/cifar10-ddpm.npz --compare --seeds 0 1 2  # and its controls
    torchrun --nproc-per-node 8 adainf.py --gen-data data/cifar10-ddpm.npz     # the same on 8 GPUs

The story reads from top to bottom: options, mixing, views, model and loss, optimiser, evaluation,
training; below it stands what only operations need. B: images in a batch, n: pixels along a side,
D: features, C: classes. Images wait as uint8, N x n x n x 3, RGB."""
import argparse, collections, contextlib, copy, ctypes, datetime, hashlib, io, json  # noqa: E401
import math, os, signal, statistics, sys, time, zipfile, zlib  # noqa: E401
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun

# ---- Options ------------------------------------------------------------------------------------
# How a view is distorted (section 4). crop_min: smallest area of a crop, as a share of the image;
# jitter: brightness, contrast, saturation (factors 1 +- these), hue (turns); each _prob: per view.

STRONG = dict(crop_min=0.08, jitter_prob=0.8, jitter=(0.8, 0.8, 0.8, 0.2), gray_prob=0.2,
              blur_prob=0.5, solarize_prob=(0.0, 0.0), flip_prob=0.5)  # SimCLR's own
WEAK = STRONG | dict(crop_min=0.2, jitter_prob=0.4, jitter=(0.4, 0.4, 0.4, 0.1))  # AdaInf's
RECIPES = {"strong": STRONG, "weak": WEAK}

def choose_augmentation(options):
    """(values as in STRONG, the reason for them): AdaInf's rule, then the user's own values."""
    strength = options.aug if options.aug != "auto" else "weak" if options.gen_data else "strong"
    own = {name: value for name in STRONG if (value := getattr(options, name)) is not None}
    why = [f"--aug {options.aug}, {'with' if options.gen_data else 'without'} generated data",
           *(f"--{name.replace('_', '-')}" for name in own)]
    return RECIPES[strength] | own, f"{strength} ({', '.join(why)})"

def number(kind, low, high=10 ** 9):
    """An argparse type: an int or float in low..high."""
    def convert(text):
        if not low <= (value := kind(text)) <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    convert.__name__ = kind.__name__
    return convert

def build_parser():
    """Every knob, in the order of the story; the defaults are the paper's recipe for CIFAR-10."""
    parser = argparse.ArgumentParser(prog="adainf.py", description="SimCLR with AdaInf")
    parser.error = lambda message: parser.exit(2, f"adainf.py: {message}\n")  # one line, no usage
    def add(flag, default, kind, text, **more):
        more |= kind if isinstance(kind, dict) else dict(type=kind, metavar=kind.__name__.upper())
        if (name := flag[2:].replace("-", "_")) in STRONG:
            text += f" (default: strong {STRONG[name]}, weak {WEAK[name]})"
        elif default is not None and kind is not switch:
            text += " (default: %(default)s)"
        group.add_argument(flag, default=default, help=text, **more)
    def one_of(*choices):
        return {"choices": choices}
    switch, yes_or_no = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
    count, index, units = number(int, 1), number(int, 0), number(int, 1, 65536)
    share, positive, scale = number(float, 0, 1), number(float, 1e-9, 1e30), number(float, 0, 1e30)

    group = parser.add_argument_group("data")
    add("--dataset", "cifar10", str, "cifar10, cifar100, shapes or a folder {train,test}/<class>/*")
    add("--data-dir", "data", str, "folder for downloads")
    add("--image-size", 32, number(int, 8, 64), "pixels n to which a folder's images are resized")
    add("--real-size", None, count, "real images |D_d|, a class-balanced subset; default all")
    group = parser.add_argument_group("inflation")
    add("--gen-data", None, str, "generated images; npz: `image` uint8 N x n x n x 3 RGB",
        nargs="+")
    add("--gen-size", None, count, "generated images |D_g|, a random subset; default all")
    add("--ratio", 10, index, "weight N of a real image against a generated one; 0: no real images")
    group = parser.add_argument_group("augmentation (single values override those of --aug)")
    add("--aug", "auto", one_of("auto", *RECIPES), "auto: weak with generated data, else strong")
    add("--crop-min", None, number(float, 1e-3, 1), "smallest crop, as a share of the area")
    add("--jitter-prob", None, share, "probability of colour jitter")
    add("--jitter", None, scale, "brightness, contrast, saturation (1 +- it), hue (turns)", nargs=4)
    add("--gray-prob", None, share, "probability of grayscale")
    add("--blur-prob", None, share, "probability of Gaussian blur, sigma 0.1 to 2 pixels")
    add("--solarize-prob", None, share, "probability of solarize: one, or one a view", nargs="+")
    add("--flip-prob", None, share, "probability of a horizontal flip")
    group = parser.add_argument_group("model")
    add("--width", 64, number(int, 1, 1024), "channels of the ResNet-18's first stage")
    add("--stem-padding", 1, number(int, 0, 2), "zeros around the image, pixels; official code: 2")
    add("--proj-hidden", 2048, units, "hidden units of the projector")
    add("--proj-dim", 256, units, "outputs of the projector")
    add("--temperature", 0.2, number(float, 1e-3), "temperature of NT-Xent")
    group = parser.add_argument_group("optimisation")
    add("--steps", 100_000, count, "training steps, however much data there is")
    add("--batch-size", 512, number(int, 2), "images B a step, over all processes")
    add("--lr", 0.4, positive, "peak learning rate of LARS; meant for B = 512, nothing rescales it")
    add("--warmup-steps", None, index, "steps of linear warm-up; default 1%% of steps, --demo 10%%")
    add("--weight-decay", 1e-4, scale, "of weights; biases, norms and the probe have none")
    add("--momentum", 0.9, number(float, 0, 0.9999), "momentum of LARS")
    add("--probe-lr", 0.1, positive, "peak learning rate of the online linear probe")
    add("--seed", 0, index, "decides every random draw")
    group = parser.add_argument_group("evaluation")
    add("--eval-every", None, index, "steps between evaluations; 0: only the last; default a fifth")
    add("--knn-k", 20, count, "neighbours that vote")
    add("--knn-temperature", 0.07, number(float, 1e-3), "a vote weighs exp(cosine / temperature)")
    add("--linear-epochs", 100, count, "epochs of the offline linear probe")
    add("--linear-lr", 0.1, positive, "peak learning rate of the offline linear probe")
    add("--eval-only", None, str, "evaluate the newest checkpoint of the run in this folder")
    group = parser.add_argument_group("experiments")
    add("--compare", False, switch, "no inflation (strong, weak), vanilla and AdaInf side by side")
    add("--seeds", None, index, "seeds of --compare; default --seed", nargs="+")
    add("--demo", False, switch, "--compare on shapes, in minutes on a CPU")
    group = parser.add_argument_group("system")
    add("--out", None, str, "folder of the run, continued by the same command; default in runs/")
    add("--device", "auto", one_of("auto", "cuda", "mps", "cpu"), "where to compute")
    add("--data-device", "auto", one_of("auto", "cuda", "cpu"), "where images wait; auto: on the "
        "device, if half of its free memory holds them")
    add("--amp", "auto", one_of("auto", "bf16", "fp16", "off"), "precision of products; auto: bf16 "
        "if the hardware has it, else fp16 on CUDA, else off")
    add("--compile", None, yes_or_no, "compile views and network; default: on CUDA only; on a CPU "
        "it takes half a minute, saves 0 to 5 %% of a step and pays after 10 minutes at least")
    add("--log-every", 50, count, "steps between log lines")
    add("--save-every", None, count, "steps between checkpoints; default 1%% of --steps")
    add("--dry-run", False, switch, "everything once: data, one step, one evaluation, all files")
    return parser

# ---- Mix the data (section 3) -------------------------------------------------------------------

def random_stream(device, *key):
    """A torch.Generator of its own for each key of integers, such as (seed, VIEWS, step): draws
    depend on nothing else, so there is nothing to restore when a run goes on."""
    seed = np.random.SeedSequence(key).generate_state(1)[0]  # unrelated for neighbouring keys
    return torch.Generator(device).manual_seed(int(seed))

EPOCH, VIEWS, PROBE = range(1, 4)  # what a stream is for

class Mixture:
    """P_t = beta P_d + (1 - beta) P_g: batches from N copies of D_d and one of D_g (Theorem 3.1).

    An epoch is a random order of all N |D_d| + |D_g| samples, without replacement; its incomplete
    last batch is dropped. The copies are index arithmetic and cost no memory."""
    def __init__(self, data, ratio, batch_size, seed):
        self.data, self.batch_size, self.seed, self.epoch = data, batch_size, seed, None
        self.n_repeated = (ratio if len(data.generated) else 1) * len(data.images)
        self.size = self.n_repeated + len(data.generated)
        self.beta = self.n_repeated / self.size
        if batch_size > self.size:
            raise InputError(f"--batch-size {batch_size}: an epoch has only {self.size} samples")

    def samples(self, step):
        """B of 0..size - 1, the batch of a step; below n_repeated are the copies of real images."""
        epoch, batch = divmod(step, self.size // self.batch_size)
        if epoch != self.epoch:
            device = self.data.images.device
            stream = random_stream(device, self.seed, EPOCH, epoch)
            self.order = torch.randperm(self.size, generator=stream, device=device)
            self.epoch = epoch
        return self.order[batch * self.batch_size:(batch + 1) * self.batch_size]

    def batch(self, step, share, device):
        """(images, labels, number of real images in the whole batch), on the device. `share` is the
        slice of the batch that this process works on; label -1 marks a generated image."""
        sample = self.samples(step)
        n_labelled, sample = (sample < self.n_repeated).sum(), sample[share]
        real, index = sample < self.n_repeated, sample % len(self.data.images)
        labels = torch.where(real, self.data.labels.index_select(0, index), -1)
        images = self.data.images.index_select(0, index)
        if len(self.data.generated):
            index = (sample - self.n_repeated).clamp(min=0)
            generated = self.data.generated.index_select(0, index)
            images = torch.where(real.view(-1, 1, 1, 1), images, generated)
        tensors = images, labels, n_labelled
        if device.type == "cuda" and not images.is_cuda:
            tensors = [tensor.pin_memory() for tensor in tensors]  # copied while the GPU computes
        return [tensor.to(device, non_blocking=True) for tensor in tensors]

# ---- Two views (section 4) ----------------------------------------------------------------------
# On a small image, crop-and-resize, flip and blur are n x n matrices: rows @ image @ columns^T. A
# whole batch is four batched matrix products and some arithmetic, with draws of its own per view.

def crop_matrices(start, length, n):
    """Bicubic resize of pixels start..start + length - 1 to n pixels: integers (M) -> M x n x n.

    Keys' kernel with a = -0.5, as in Pillow; a crop is never longer than n, so none is averaged."""
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(n, device=start.device)
    distance = (pixel + 0.5 - (start + (pixel[:, None] + 0.5) * length / n)).abs()
    near = (1.5 * distance - 2.5) * distance ** 2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((pixel >= start) & (pixel < start + length))  # nothing from outside the crop
    return weight / weight.sum(-1, keepdim=True)

def blur_matrices(sigma, n):
    """Gaussian blur of n pixels as in Pillow: three box filters, edges repeated. S -> S x n x n."""
    sigma = sigma.double()[:, None]  # in double, as the cube of a matrix follows
    whole = (((4 * sigma ** 2 + 1).sqrt() - 1) / 2).floor()  # a box has 2 whole + 1 full pixels
    part = (2 * whole + 1) * (whole * (whole + 1) - sigma ** 2)  # and one in part on each side
    part = part / (6 * (sigma ** 2 / 3 - (whole + 1) ** 2))
    offset = torch.arange(-int(whole.max()) - 1, int(whole.max()) + 2)
    weight = (whole + part + 1 - offset.abs()).clamp(0, 1)
    source = (torch.arange(n)[:, None] + offset).clamp(0, n - 1)
    box = torch.einsum("sk,okp->sop", weight, F.one_hot(source, n).double())
    return torch.linalg.matrix_power(box / box.sum(-1, keepdim=True), 3).float()

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
    """Two random views of every image. draw() makes parameters of uniform random numbers, apply()
    distorts images by parameters; both are pure functions, to be tested, compiled and repeated."""
    DRAWS, BLURS = 36, 256  # uniform random numbers for a view; levels of sigma

    def __init__(self, augmentation, n, mean, std):
        self.aug, self.n, self.mean, self.std, device = augmentation, n, mean, std, mean.device
        self.strength = torch.tensor(augmentation["jitter"], device=device)
        self.solarize = torch.tensor(augmentation["solarize_prob"], device=device).view(-1, 1, 1)
        first, last = torch.triu_indices(n, n, device=device)  # every crop there is
        self.crops = crop_matrices(first, last - first + 1, n)
        sigma = 0.1 + 1.9 * (torch.arange(self.BLURS) + 0.5) / self.BLURS
        self.blurs = torch.cat([torch.eye(n)[None], blur_matrices(sigma, n)]).to(device)
        self.pipeline = lambda images, uniform: self.apply(images, self.draw(uniform))

    def __call__(self, images, uniform):
        """uint8 B x n x n x 3 and uniform (2, B, DRAWS) in [0, 1) -> float 2B x 3 x n x n,
        normalised, all first views first."""
        return self.pipeline(images.repeat(2, 1, 1, 1), uniform)

    def draw(self, uniform):
        """Parameters of 2B views, tensors of 2B rows; distributed as in torchvision."""
        aug, n = self.aug, self.n
        area, aspect, corner, flip, factor, hue, jitter, order, gray, blur, sigma, solarize = (
            uniform.split([10, 10, 2, 1, 3, 1, 1, 4, 1, 1, 1, 1], dim=-1))
        # RandomResizedCrop: the first of ten boxes that fits, else the whole image.
        area = n * n * (aug["crop_min"] + (1 - aug["crop_min"]) * area)
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
        jittered = jitter < aug["jitter_prob"]
        when, kind = order[..., :3].sort(-1)
        parameters = dict(
            start=start.long(), length=length.long(), flip=flip < aug["flip_prob"], kind=kind,
            before=when < order[..., 3:],
            factor=torch.where(jittered, factor, 1.0).gather(-1, kind),
            hue=torch.where(jittered, self.strength[3] * (2 * hue - 1), 0.0),
            gray=gray < aug["gray_prob"], solarize=solarize < self.solarize,
            blur=torch.where(blur < aug["blur_prob"], 1 + (sigma * self.BLURS).long(), 0))
        return {name: value.flatten(0, 1) for name, value in parameters.items()}

    def apply(self, images, p):
        """uint8 M x n x n x 3 and parameters of M rows -> float M x 3 x n x n, normalised."""
        m, n = len(images), self.n
        x, start = images.permute(0, 1, 3, 2).float() / 255, p["start"]
        crop = start * n - start * (start - 1) // 2 + p["length"] - 1  # in triu's order
        rows, columns = (self.crops.index_select(0, index) for index in crop.unbind(1))
        columns = torch.where(p["flip"][..., None], columns.flip(1), columns)
        x = self.transform(rows, x, columns).clamp(0, 1)
        for before in (True, False):  # blends before the hue shift, the shift, blends after it
            for slot in range(3):
                active = p["before"][:, slot] == before
                factor = torch.where(active, p["factor"][:, slot], 1.0).view(m, 1, 1, 1)
                kind = p["kind"][:, slot].view(m, 1, 1, 1)  # 0 brightness, 1 contrast, 2 saturation
                gray = grayscale(x)
                target = gray * (kind == 2) + gray.mean((1, 2, 3), keepdim=True) * (kind == 1)
                x = torch.lerp(target, x, factor).clamp(0, 1)
            x = shift_hue(x, p["hue"][..., None]) if before else x
        x = torch.where(p["gray"].view(m, 1, 1, 1), grayscale(x), x)
        blur = self.blurs.index_select(0, p["blur"].flatten())
        x = self.transform(blur, x, blur)
        if max(self.aug["solarize_prob"]) > 0:
            x = torch.where(p["solarize"].view(m, 1, 1, 1) & (x >= 128 / 255), 1 - x, x)
        return normalise(x.transpose(1, 2), self.mean, self.std)

    def transform(self, rows, x, columns):
        """rows @ image @ columns^T for every image and channel: plain batched products, no copy."""
        x = rows @ x.reshape(len(x), self.n, 3 * self.n)
        return (x.view(len(x), 3 * self.n, self.n) @ columns.mT).view(len(x), self.n, 3, self.n)

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
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))

class ResNet18(nn.Module):
    """torchvision's resnet18 without fc, its stem a 3 x 3 convolution of stride 1 and no pooling.

    Normalised N x 3 x n x n -> features N x D, D = 8 width."""
    def __init__(self, width=64, stem_padding=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, stem_padding, bias=False)
        self.bn1 = BatchNorm(width)
        for stage, inputs in enumerate([width, width, 2 * width, 4 * width], start=1):
            channels, stride = (inputs, 1) if stage == 1 else (2 * inputs, 2)
            setattr(self, f"layer{stage}", nn.Sequential(BasicBlock(inputs, channels, stride),
                                                         BasicBlock(channels, channels, 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

class SimCLR(nn.Module):
    """Backbone, projector, and a linear probe that only watches: it reads detached features.

    Views M x 3 x n x n -> (projections M x d, class logits M x C)."""
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

def build_model(options, data):
    """A SimCLR whose first weights depend on the seed alone, where the data's mean is."""
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes))
    return model.to(data.mean.device, memory_format=torch.channels_last)

def nt_xent(projections, temperature):
    """NT-Xent (Chen et al. 2020, eq. 1): which of all other views shows the same image as this one?

    projections: 2B x d, first views first. Mean over 2B anchors of the cross-entropy of cosines /
    temperature, in fp32; ln(2B - 1) if all are equal. Of several processes: this one's part of it,
    its own anchors against the views of all."""
    views = F.normalize(projections.float(), dim=1)
    everyone = gather(views.view(2, -1, views.shape[1])).transpose(0, 1).flatten(0, 2)
    size = len(everyone) // 2
    first = torch.arange(len(views) // 2, device=views.device) + RANK * (len(views) // 2)
    anchor, positive = torch.cat([first, first + size]), torch.cat([first + size, first])
    logits = (views @ everyone.T / temperature).scatter(1, anchor[:, None], -math.inf)  # not itself
    return F.cross_entropy(logits, positive, reduction="sum") / (2 * size)

def probe_loss(logits, labels, n_labelled):
    """Mean cross-entropy of the views of real images, 0 without any: logits 2B x C, labels B."""
    loss = F.cross_entropy(logits.float(), labels.repeat(2), ignore_index=-1, reduction="sum")
    return loss / (2 * n_labelled).clamp(min=1)

# ---- Optimiser ----------------------------------------------------------------------------------

class LARS(torch.optim.SGD):
    """Momentum SGD whose weight tensors have a trust ratio (You et al. 2017), clipped at 1.

    Two or more axes: d = t (g + wd p), t = min(eta |p| / (|g| + wd |p| + eps) / lr, 1). Biases and
    norms: d = g. Then, by SGD, buffer = momentum buffer + d and p = p - lr buffer."""
    ETA, EPS = 0.02, 1e-8

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.ndim > 1]
            gradients, decay = [p.grad for p in weights], group["decay"]
            norm = torch.stack(torch._foreach_norm(weights))
            trust = torch.stack(torch._foreach_norm(gradients)) + decay * norm + self.EPS
            trust = (self.ETA * norm / trust / group["lr"]).clamp(max=1)
            torch._foreach_add_(gradients, weights, alpha=decay)
            torch._foreach_mul_(gradients, list(trust.unbind()))
        super().step()

def learning_rate(step, steps, warmup, peak, start=3e-5):
    """Step from 0: linear from `start` to `peak` at `warmup`, then a cosine to 0 at `steps`."""
    if step < warmup:
        start = min(start, peak)
        return start + (peak - start) * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

# ---- Evaluation: a frozen backbone in eval mode, plain images, the last weights ------------------

@torch.no_grad()
def encode(backbone, images, data, amp):
    """Features (float N x D) of uint8 images; each process encodes its share and gets all."""
    device, training = data.mean.device, backbone.training
    backbone.eval()
    features = torch.zeros(len(images), 8 * len(backbone.conv1.weight), device=device)
    for rows in torch.arange(RANK, len(images), WORLD).split(1000):
        pixels = images[rows.to(images.device)].to(device).permute(0, 3, 1, 2).float() / 255
        with amp:
            features[rows.to(device)] = backbone(normalise(pixels, data.mean, data.std)).float()
    backbone.train(training)
    return sum_over_processes(features)

def top1(scores, labels):
    """Percentage of the rows of N x C scores that are highest at the label."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()

def knn_top1(train, train_labels, test, test_labels, k, temperature):
    """Weighted kNN (Wu et al. 2018): the k nearest training images vote exp(cosine / T)."""
    train, scores = F.normalize(train, dim=1), []
    for chunk in F.normalize(test, dim=1).split(500):
        cosine, nearest = (chunk @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(chunk), int(train_labels.max()) + 1, device=train.device)
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # the nearest weighs 1: no overflow
        scores.append(votes.scatter_add_(1, train_labels[nearest], weight))
    return top1(torch.cat(scores), test_labels)

def linear_top1(train, train_labels, test, test_labels, epochs, lr, seed, batch_size=1000):
    """Offline linear probe: softmax regression on cached, standardised features, by SGD with
    momentum 0.9, a cosine schedule and no weight decay."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    probe = nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    optimizer = torch.optim.SGD(probe.parameters(), lr, momentum=0.9)
    for epoch in range(epochs):
        stream = random_stream(train.device, seed, PROBE, epoch)
        order = torch.randperm(len(train), generator=stream, device=train.device).split(batch_size)
        for done, rows in enumerate(order):
            now = epoch + done / len(order)
            optimizer.param_groups[0]["lr"] = learning_rate(now, epochs, 0, lr)
            optimizer.zero_grad()
            F.cross_entropy(probe(train[rows]), train_labels[rows]).backward()
            optimizer.step()
    return top1(probe(test), test_labels)

def evaluate(model, data, options, amp, linear=True):
    """Percent of the test images: {online_top1, knn_top1} and, if `linear`, linear_top1."""
    train, test = (encode(model.backbone, x, data, amp) for x in (data.images, data.test_images))
    sets = train, data.labels.to(test.device), test, data.test_labels
    scores = {"online_top1": top1(model.probe(test), data.test_labels),
              "knn_top1": knn_top1(*sets, options.knn_k, options.knn_temperature)}
    if linear:
        scores["linear_top1"] = linear_top1(*sets, options.linear_epochs, options.linear_lr,
                                            options.seed)
    return scores

# ---- Training -----------------------------------------------------------------------------------

def train(options, data):
    """SimCLR on the mixture: trains, evaluates, fills the folder --out; returns the result (dict).

    A step draws a batch, makes two views, compares them and moves the weights. Log, checkpoints and
    signals are the business of `run` (class Run)."""
    device, (precision, amp) = data.mean.device, choose_precision(options)
    augmentation, why = choose_augmentation(options)
    mixture = Mixture(data, options.ratio, options.batch_size, options.seed)
    two_views = TwoViews(augmentation, options.image_size, data.mean, data.std)
    mine = options.batch_size // WORLD
    share = slice(RANK * mine, (RANK + 1) * mine)  # of the batch, for this process
    model = build_model(options, data)
    learned = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [dict(params=learned, peak=options.lr, decay=options.weight_decay),
              dict(params=model.probe.parameters(), peak=options.probe_lr, decay=0.0)]
    optimizer = LARS(groups, momentum=options.momentum, foreach=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    beta, parameters = mixture.beta, sum(parameter.numel() for parameter in learned)
    say(f"data      {len(data.images):,} real images of {len(data.classes)} classes, "
        f"{len(data.generated):,} generated, in {data.images.device.type} memory\n"
        f"mixture   beta = {beta:.3f}: TV(P_t, P_d) = {1 - beta:.3f} TV(P_g, P_d) (Theorem 3.1)\n"
        f"views     {why}: {augmentation}\n"
        f"network   {parameters:,} parameters, {str(precision)[6:]}, on {WORLD} x {device.type}\n"
        f"training  {options.steps:,} steps of {options.batch_size}, learning rate {options.lr:g}; "
        f"an epoch has {mixture.size // options.batch_size:,}")

    def losses(step):
        """NT-Xent of this process's share of the batch, and the loss of the probe that watches."""
        images, labels, n_labelled = mixture.batch(step, share, device)
        stream = random_stream(device, options.seed, VIEWS, step)
        shape = 2, options.batch_size, two_views.DRAWS
        uniform = torch.rand(shape, generator=stream, device=device)[:, share]
        with torch.no_grad():
            views = two_views(images, uniform)
        with amp:
            projections, logits = model(views)
        return nt_xent(projections, options.temperature), probe_loss(logits, labels, n_labelled)

    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    with Run(options, data, mixture.beta, why, state) as run:
        step = run.restore()
        if options.compile and step < options.steps:
            compile_or_warn(model, two_views, lambda: sum(losses(step)).backward())
        if RANK == 0:
            write_views(run.folder / "views.png", data, two_views)
        while True:
            last = step == options.steps
            if last or options.eval_every and step % options.eval_every == 0:
                run.evaluate(step, lambda: evaluate(model, data, options, amp, linear=last))
            if last:
                return run.finish()
            run.begin(step)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.warmup_steps,
                                            group["peak"])
            contrastive, probing = losses(step)
            optimizer.zero_grad()
            scaler.scale(contrastive + probing).backward()
            sum_gradients(model)
            scaler.step(optimizer)
            scaler.update()
            step += 1

            if step % options.log_every == 0 or step == options.steps:
                run.log_training(step, contrastive, probing)  # the only time that the host waits
            if step % options.save_every == 0:
                run.save(step)

# ==== What only operations need ===================================================================

class InputError(Exception):
    """One line for the user: what is wrong, where, and what to do; and the exit status."""
    status = 2

class RunError(InputError):
    status = 1  # the input is right, but the run cannot go on

def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]

@contextlib.contextmanager
def one_line_for(message, *kinds, error_type=InputError):
    """What goes wrong inside (of these kinds, or at all) becomes one line: message (reason)."""
    try:
        yield
    except InputError:
        raise
    except kinds or Exception as error:
        raise error_type(f"{message} ({one_line(error)})") from error

METRICS = ("online_top1", "linear_top1", "knn_top1")
DEMO = dict(dataset="shapes", compare=True, image_size=16, real_size=500, width=16, steps=500,
            batch_size=128, proj_hidden=256, proj_dim=64, out="runs/demo", eval_every=0)

def parse_options(argv=None):
    """The command line with every default filled in. Raises InputError."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.demo or options.eval_only:  # what these bring, the command line overrides
        parser.set_defaults(**(DEMO if options.demo else read_config(options.eval_only)["options"]))
        options = parser.parse_args(argv)
    if options.dry_run:
        options.steps, options.warmup_steps, options.linear_epochs = 1, 0, 1
    if options.demo and not options.gen_data:
        options.gen_data = [f"{options.data_dir}/shapes{options.image_size}-generated.npz"]
    inflation = f"ratio{options.ratio}" if options.gen_data else "none"
    run, cuda = Path(options.dataset).name, choose_device(options).type == "cuda"
    defaults = dict(
        warmup_steps=round((0.1 if options.demo else 0.01) * options.steps), compile=cuda,
        eval_every=math.ceil(options.steps / 5), save_every=math.ceil(options.steps / 100),
        seeds=[options.seed], out=f"runs/{run}-{inflation}-{options.aug}-seed{options.seed}")
    vars(options).update({name: defaults[name] for name in defaults
                          if getattr(options, name) is None})
    for problem, found in {
            "--warmup-steps: more than --steps": options.warmup_steps > options.steps,
            "--jitter: hue is more than 0.5 turns": options.jitter and options.jitter[3] > 0.5,
            "--solarize-prob: more than one value a view": len(options.solarize_prob or ()) > 2,
            "--data-device cuda: needs --device cuda": options.data_device == "cuda" and not cuda,
            f"--batch-size {options.batch_size}: {WORLD} processes cannot share it equally":
                options.batch_size % WORLD,
            "--ratio 0, --compare and --gen-size: need --gen-data": not options.gen_data and (
                options.ratio == 0 or options.compare or options.gen_size)}.items():
        if found:
            raise InputError(problem)
    return options

# ---- Reading images ------------------------------------------------------------------------------

# What a run learns from. Images: uint8, N x n x n x 3; labels: int64, none for generated images,
# whatever their file says; classes: names; mean and std: 3 x 1 x 1, of the real training images in
# 0..1; crc: checksums of all images, as a run never goes on with others.
Data = collections.namedtuple(
    "Data", "images labels generated test_images test_labels classes mean std crc")

def load_data(options):
    """The Data of --dataset and --gen-data, where --data-device says. Raises InputError."""
    (images, labels), (test_images, test_labels), classes = load_real(options)
    pixels = images.reshape(-1, 3)
    mean, square = pixels.mean(0), np.einsum("pc,pc->c", pixels, pixels, dtype=float) / len(pixels)
    if size := options.real_size:
        order, share = np.random.default_rng(options.seed).permutation(len(labels)), len(classes)
        keep = [order[labels[order] == label][:size // share + (label < size % share)]
                for label in range(share)]
        if sum(map(len, keep)) < size:
            raise InputError(f"--real-size {size}: too few images in a class for equal shares")
        keep = np.sort(np.concatenate(keep))
        images, labels = images[keep], labels[keep]
    generated, device = load_generated(images, options), choose_device(options)
    fits = device.type != "cuda" or (
        images.nbytes + generated.nbytes < torch.cuda.mem_get_info()[0] / 2)
    wait = {"cuda": device, "cpu": "cpu", "auto": device if fits else "cpu"}[options.data_device]
    crc = [zlib.crc32(each) for each in (images, test_images, generated)]
    images, labels, generated, test_images, test_labels = map(
        torch.from_numpy, (images, labels, generated, test_images, test_labels))
    mean, std = (torch.tensor(each.round(4)).float().view(3, 1, 1).to(device)  # the papers' digits
                 for each in (mean / 255, (square - mean ** 2).clip(1) ** 0.5 / 255))
    return Data(images.to(wait), labels.to(wait), generated.to(wait), test_images,
                test_labels.to(device), classes, mean, std, crc)

def load_real(options):
    """(train images, labels), (test images, labels), class names; numpy, uint8 and int64."""
    name, size = options.dataset, options.image_size
    if name == "shapes":
        from download_generated import shapes  # the demo's data set is not part of the method
        return shapes(size)
    if name not in ("cifar10", "cifar100"):
        train, test = (load_folder(Path(name) / split, size) for split in ("train", "test"))
        if odd := {*train[2]} ^ {*test[2]}:
            raise InputError(f"--dataset {name}: train and test differ in class {min(odd)}")
        return train[:2], test[:2], train[2]
    if size != 32:
        raise InputError(f"--image-size {size}: {name} has 32 x 32 pixels; leave the option out")
    dataset = getattr(torchvision.datasets, name.upper())
    with one_line_for(f"--dataset {name}: `python download_generated.py {name}` resumes a download "
                      "and knows a second source", OSError, RuntimeError):
        if RANK == 0:
            dataset(options.data_dir, download=True)  # unpickles, if it has the known md5
        barrier()
        train, test = (dataset(options.data_dir, train=split) for split in (True, False))
    sets = [(np.ascontiguousarray(each.data), np.array(each.targets)) for each in (train, test)]
    return *sets, train.classes

def load_folder(folder, size):
    """(images, labels, class names) of folder/<class>/*, cropped to squares, resized (bicubic)."""
    from PIL import Image, ImageOps
    bicubic = Image.Resampling.BICUBIC
    def read(path):
        with (one_line_for(f"--dataset: {path} is no readable image: repair or remove it"),
              Image.open(path) as image):
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), bicubic))
    with one_line_for(f"--dataset: {folder} has no classes of images; give cifar10, cifar100, "
                      "shapes or a folder {train,test}/<class>/*", OSError):
        found = torchvision.datasets.ImageFolder(
            folder, is_valid_file=lambda path: "/." not in path[len(str(folder)):])
    if len(found.classes) < 2:
        raise InputError(f"--dataset: {folder} has one class only, {found.classes[0]}")
    images = np.stack([read(path) for path, _ in found.samples])
    return images, np.array(found.targets), found.classes

def load_generated(real, options):
    """The images of --gen-data, as numpy. A single file is in memory once. Raises InputError."""
    files = [real[:0]]
    for path in options.gen_data or []:
        with one_line_for(f"--gen-data {path}: has no whole array `image`"):
            with zipfile.ZipFile(path) as archive, archive.open("image.npy") as member:
                image = np.lib.format.read_array(member, allow_pickle=False)
                if member.read():  # to the end, where zip compares the checksum
                    raise ValueError("bytes follow the array")
                files.append(np.ascontiguousarray(image))
        dtype, shape, size = files[-1].dtype, files[-1].shape, len(real[0])
        if dtype != np.uint8 or shape[1:] != (size, size, 3) or not shape[0]:
            raise InputError(f"--gen-data {path}: has {dtype} {shape}, not uint8 N x {size} x "
                             f"{size} x 3; `download_generated.py --from-npz` converts")
    images = np.concatenate(files) if len(files) > 2 else files[-1]
    if (size := options.gen_size or len(images)) > len(images):
        raise InputError(f"--gen-size {size}: --gen-data has only {len(images)} images")
    if size < len(images):
        images = images[np.random.default_rng(options.seed).permutation(len(images))[:size]]
    if size and looks_bgr(images[::max(1, size // 10_000)].mean((0, 1, 2)), real.mean((0, 1, 2))):
        say("warning: --gen-data looks like BGR: its mean colour fits the real images' in reverse")
    return images

def looks_bgr(generated_means, real_means):
    """Do the channel means of generated images (3, 0..255) fit the real ones' better in reverse?"""
    generated, real = np.asarray(generated_means), np.asarray(real_means)
    return bool(np.abs(generated[::-1] - real).sum() + 1 < np.abs(generated - real).sum())

# ---- Device, precision, compilation --------------------------------------------------------------

def choose_device(options):
    """The torch.device of --device; every process has a GPU of its own. Raises InputError."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    name = options.device if options.device != "auto" else max(found, key=found.get)
    if not found[name]:
        raise InputError(f"--device {name}: there is none here; --device auto takes what there is")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)

def choose_precision(options):
    """(dtype, autocast context) of --amp; auto takes bf16 where the hardware multiplies it."""
    name, device = options.amp, choose_device(options).type
    if name == "auto" and device == "cuda":
        name = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    elif name == "auto" and device == "cpu":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        name = "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    return dtype, torch.autocast(device, dtype, enabled=dtype != torch.float32)

def tune_process():
    """Process-wide settings for speed: by main, never by import."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --amp off means fp32 all through
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: keep freed memory, or
            ctypes.CDLL("libc.so.6").mallopt(parameter, 2 ** 31 - 1)  # every step faults it in

def compile_or_warn(model, two_views, trial):
    """Compile in place and try a step, without a trace; if it fails, training goes on eagerly."""
    started, eager = time.perf_counter(), two_views.pipeline
    before = copy.deepcopy(model.state_dict())
    try:
        model.compile()  # in place, so that names in the state dict stay clean
        two_views.pipeline = torch.compile(eager)
        trial()
        say(f"compiled  in {time.perf_counter() - started:.0f} s, not counted below")
    except Exception as error:  # a compiler can fail in any way
        say(f"warning: goes on without compilation, which failed: {one_line(error)}")
        model._compiled_call_impl, two_views.pipeline = None, eager
    model.load_state_dict(before)

# ---- A run's folder ------------------------------------------------------------------------------

class Run:
    """The folder --out: configuration, log, checkpoints, results. The same command continues it,
    the lock on its log keeps a second process out, and of many processes only the first writes."""
    FREE = {*"""--out --data-dir --gen-data --device --data-device --compile --log-every --dry-run
            --save-every --eval-every --eval-only --compare --seeds --demo""".split()}  # may change

    def __init__(self, options, data, beta, why, state):
        self.options, self.folder, self.state = options, Path(options.out), state
        self.device, self.lines, self.asked, self.clock = data.mean.device, [], 0, None
        self.facts = dict(beta=beta, augmentation=why, n_real=len(data.images),
                          n_generated=len(data.generated), seed=options.seed)
        self.config = json.loads(json.dumps(dict(
            options=vars(options), **self.facts, crc=data.crc, classes=data.classes,
            mean=data.mean.flatten().tolist(), std=data.std.flatten().tolist())))

    def __enter__(self):
        if RANK == 0:
            with (one_line_for(f"--out {self.folder}: cannot be written", OSError),
                  one_line_for(f"--out {self.folder}: another process trains there",
                               BlockingIOError)):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log_file = open(self.folder / "log.jsonl", "ab", buffering=0)
                with contextlib.suppress(ImportError):  # without fcntl there is no lock
                    import fcntl
                    fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.folder / "config.json").exists():
                self.refuse_changes(read_config(self.folder))
            write_whole(self.folder / "config.json", json_bytes(self.config))
        barrier()  # nobody looks for checkpoints before the folder is ready
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.handlers = {name: signal.signal(getattr(signal, name), self.hear) for name in names}
        return self

    def __exit__(self, *_):
        for name, handler in self.handlers.items():
            signal.signal(getattr(signal, name), handler)
        if RANK == 0:
            self.log_file.close()

    def refuse_changes(self, old):
        """A run goes on only as it was begun; a dry run is no beginning. Raises InputError."""
        if old["options"]["dry_run"] and not self.options.dry_run:
            for name in ("checkpoint.pt", "checkpoint.prev.pt"):
                (self.folder / name).unlink(missing_ok=True)
            return
        before, now = ({f"--{name.replace('_', '-')}": value for name, value in (
            *config["options"].items(), ("images' checksums", config["crc"]))}
            for config in (old, self.config))
        if grows := now["--steps"] > before["--steps"]:
            say(f"--steps grows from {before['--steps']}: the learning rate jumps to the longer "
                "cosine, so the result is not that of as many steps from the start")
        free = self.FREE | ({"--steps", "--warmup-steps"} if grows else set())
        for name in now:
            if name not in free and before.get(name) != now[name]:
                raise InputError(f"--out {self.folder}: was begun with {name} {before.get(name)}, "
                                 f"not {now[name]}; go on with the old value or in a new --out")

    def restore(self):
        """Load the newest whole checkpoint and the log up to it; its step, 0 without one."""
        step, self.lines, path = load_checkpoint(self.folder, self.state)
        if self.total(step) != step * WORLD:
            raise RunError(f"--out {self.folder}: is not one folder for all processes")
        if RANK == 0:
            if path:
                os.replace(path, self.folder / "checkpoint.pt")  # a damaged newer one gives way
            self.log_file.truncate(0)  # what came after the checkpoint will be done again
        self.write_log(self.lines)
        if step:
            say(f"continues  {self.folder} after step {step:,}")
        self.log("start", step, dict(
            argv=sys.argv, time=time.strftime("%Y-%m-%d %H:%M:%S"), processes=WORLD,
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            versions={each.__name__: str(each.__version__) for each in (torch, torchvision, np)},
            python=sys.version, script=hashlib.sha256(Path(__file__).read_bytes()).hexdigest()))
        return step

    def require(self, finite, what, step):
        """Raise RunError unless `what` is finite: a run that diverged is never saved."""
        if not finite:
            last = "".join(f"; the loss was {line['loss']:.4f} at step {line['step']}"
                           for line in self.records("training")[-1:])
            raise RunError(f"{what} not finite at step {step}{last}; the last checkpoint is good: "
                           "try a lower --lr, or --amp off")

    def save(self, step):
        """Checkpoint all that the next step depends on, if finite; keep the checkpoint before."""
        for value in self.state["model"].state_dict().values():
            self.require(value.isfinite().all(), "the weights are", step)
        if RANK == 0:
            parts = {name: part.state_dict() for name, part in self.state.items()}
            write_whole(self.folder / "checkpoint.pt", torch_bytes(
                dict(step=step, lines=self.lines, **parts)), self.folder / "checkpoint.prev.pt")

    def log(self, event, step, values):
        """A JSON object a line in log.jsonl."""
        self.lines.append({"event": event, "step": step, **values})
        self.write_log(self.lines[-1:])

    def write_log(self, lines):
        if RANK == 0:
            with one_line_for(f"cannot write {self.log_file.name}; the last checkpoint is good, "
                              "and the same command continues", OSError, error_type=RunError):
                self.log_file.write(b"".join(json_bytes(line, None) for line in lines))

    def records(self, event):
        return [line for line in self.lines if line["event"] == event]

    def log_training(self, step, *losses):
        """Log the losses of this step, and the speed. Raises RunError if one is not finite."""
        loss, probe_loss = sum_over_processes(torch.stack(losses).detach()).tolist()
        self.require(math.isfinite(loss + probe_loss), "the loss is", step)
        (begun, since), self.clock = self.clock, None
        seconds = (time.perf_counter() - begun) / (step - since)
        lr, speed = self.state["optimizer"].param_groups[0]["lr"], self.options.batch_size / seconds
        left = datetime.timedelta(seconds=round(seconds * (self.options.steps - step)))
        self.log("training", step, dict(loss=loss, lr=lr, probe_loss=probe_loss,
                                        images_per_second=speed, seconds_left=left.total_seconds()))
        say(f"step {step:7,}  loss {loss:.4f}  lr {lr:.4f}  {speed:,.0f} images/s  {left} left")

    def evaluate(self, step, evaluate):
        """Log the scores, unless the log has them; before and after it, save."""
        if all(line["step"] != step for line in self.records("evaluation")):
            self.save(step)
            scores = evaluate()
            self.log("evaluation", step, scores)
            say(f"step {step:7,}  " + "  ".join(f"{k} {v:.2f} %" for k, v in scores.items()))
            self.save(step)
        self.clock = None

    def hear(self, number, _):
        """A signal asks to stop after this step or evaluation; a second one stops at once."""
        if self.asked:
            self.leave(number, "at once")
        self.asked = number

    def begin(self, step):
        """Stop before this step if a signal asked for it, otherwise let the clock run."""
        asked = self.asked
        if WORLD > 1:  # all stop together; asking costs a sync, so only at every tenth step
            asked = step % 10 == 0 and self.total(asked) and (asked or signal.SIGTERM)
        if asked:
            self.save(step)
            self.leave(asked, f"after step {step:,}, which is saved")
        self.clock = self.clock or (time.perf_counter(), step)  # not of compiling and evaluating

    def total(self, value):
        """The sum of a number over all processes; the host waits for it."""
        return sum_over_processes(torch.tensor(float(value), device=self.device)).item()

    def leave(self, number, when):
        say(f"stopped by {signal.Signals(number).name} {when}; the same command continues")
        raise SystemExit(128 + number)

    def finish(self):
        """Write encoder.pt, curves.png and result.json; return the result."""
        training, evaluations = self.records("training"), self.records("evaluation")
        scores = evaluations[-1]
        result = {**{name: scores[name] for name in METRICS}, **self.facts, "steps": scores["step"],
                  "loss": training[-1]["loss"], "images_per_second": statistics.median(
                      line["images_per_second"] for line in training)}
        if RANK == 0:
            encoder = torch_bytes(self.state["model"].backbone.state_dict())
            write_whole(self.folder / "encoder.pt", encoder)
            def curves(lines, *names):
                steps = [line["step"] for line in lines]
                return {name: (steps, [line[name] for line in lines]) for name in names}
            write_figure(
                self.folder / "curves.png", ("step", "NT-Xent", curves(training, "loss")),
                ("step", "test accuracy, %", curves(evaluations, "knn_top1", "online_top1")))
            write_whole(self.folder / "result.json", json_bytes(result))
        say(f"results   in {self.folder}")
        if self.asked:
            self.leave(self.asked, "with all results written")
        return result

def json_bytes(value, indent=1):
    return (json.dumps(value, indent=indent) + "\n").encode()

def write_whole(path, content, keep=None):
    """Write bytes to a file whole or not at all; with `keep`, the old one stays under that name."""
    temporary = path.with_name(path.name + ".tmp")
    with one_line_for(f"cannot write {path}, what was there is intact", OSError,
                      error_type=RunError):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)

def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

def read_config(folder):
    """The contents of config.json in a run's folder. Raises InputError."""
    with one_line_for(f"{folder}: has no config.json of a run"):
        config = json.loads((Path(folder) / "config.json").read_text())
        config["options"]["steps"], config["options"]["dry_run"], config["crc"], config["mean"]
        return config

def load_checkpoint(folder, state):
    """Load the newest whole checkpoint of a run's folder into `state`, a dict of what has a
    state_dict. Returns (step, log lines, path), (0, [], None) without any. Raises InputError."""
    paths = [path for name in ("checkpoint.pt", "checkpoint.prev.pt")
             if (path := folder / name).exists()]
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"wrong checksum of {damaged}")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in state.items():
                part.load_state_dict(checkpoint[name])
            return int(checkpoint["step"]), [*checkpoint["lines"]], path
        except Exception as error:  # a damaged file, or one from elsewhere, can fail in any way
            say(f"warning: {path} is damaged or foreign ({one_line(error)}); trying the one before")
    if paths:
        raise InputError(f"{folder}: has no whole checkpoint of this model; choose a new --out")
    return 0, [], None

def load_encoder(path):
    """The backbone in an encoder.pt, in eval mode: normalised N x 3 x n x n -> N x D.

    With the run's config.json beside it, .mean and .std (3 x 1 x 1) normalise images in 0..1;
    without it, the stem padding is taken to be 1. Raises InputError."""
    folder = Path(path).parent
    config = read_config(folder) if (folder / "config.json").exists() else None
    with one_line_for(f"{path}: is no encoder.pt of this program"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        padding = config["options"]["stem_padding"] if config else 1
        backbone = ResNet18(len(weights["conv1.weight"]), padding)
        backbone.load_state_dict(weights)
        for name in ("mean", "std") if config else ():
            setattr(backbone, name, torch.tensor(config[name]).view(3, 1, 1))
        return backbone.eval()

# ---- Many processes, as torchrun starts them -----------------------------------------------------

def say(text):
    if RANK == 0:
        print(text, flush=True)

def barrier():
    if WORLD > 1:
        dist.barrier()

class SumOverProcesses(torch.autograd.Function):
    """y = x_1 + ... + x_W in every process; the gradient of x_r is the sum of all of y."""
    @staticmethod
    def forward(ctx, x):
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)

def sum_over_processes(x):
    return SumOverProcesses.apply(x) if WORLD > 1 else x

def gather(x):
    """The x of every process, W x the shape of x, with the same gradient."""
    return sum_over_processes(F.pad(x[None], (0, 0) * x.ndim + (RANK, WORLD - RANK - 1)))

def sum_gradients(model):
    """Every process has the gradient of its part of the loss; their sum, not mean, is the whole."""
    if WORLD > 1:
        gradients = [parameter.grad for parameter in model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients])):
            gradient.copy_(part.view_as(gradient))

class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, on any device (torch's own needs CUDA)."""
    def forward(self, x):
        if WORLD == 1 or not self.training:
            return super().forward(x)
        wide, count = x.float(), WORLD * x.numel() / x.shape[1]
        mine = torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0))
        variances, means = gather(mine).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (wide * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)

# ---- Pictures ------------------------------------------------------------------------------------

def write_views(path, data, two_views):
    """What the network sees: eight real and eight generated images, their two views below them."""
    rows = [pool[torch.linspace(0, len(pool) - 1, 8).long().to(pool.device)]
            for pool in (data.images, data.generated) if len(pool)]
    images = torch.cat(rows).to(data.mean.device)
    uniform = torch.rand(2, len(images), two_views.DRAWS, generator=random_stream("cpu", VIEWS))
    views = two_views.apply(images.repeat(2, 1, 1, 1), two_views.draw(uniform.to(data.mean.device)))
    rows = torch.cat([images.permute(0, 3, 1, 2) / 255, views * data.std + data.mean])
    rows, buffer = F.interpolate(rows, scale_factor=max(1, 64 // two_views.n)), io.BytesIO()
    torchvision.utils.save_image(rows, buffer, format="png", nrow=len(images), padding=3,
                                 pad_value=1)
    write_whole(path, buffer.getvalue())

def write_figure(path, *panels):
    """A PNG of panels (x label, y label, {name: (values of x, of y)}), if there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say(f"note: no {path.name}, as matplotlib is not installed")
    figure, buffer = Figure((10, 3.4), layout="constrained"), io.BytesIO()
    for axis, (x_label, y_label, lines) in zip(figure.subplots(1, len(panels)), panels):
        for name, (x, y) in lines.items():
            axis.plot(x, y, "o-", markersize=4, label=name)
        axis.set(xlabel=x_label, ylabel=y_label)
        if y_label:  # else the names stand along the y axis
            axis.legend()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())

# ---- Experiments and main ------------------------------------------------------------------------

def compare(options, data):
    """The four cells over --seeds, everything else equal: a table, comparison.json and .png."""
    real = data._replace(generated=data.generated[:0], crc=[*data.crc[:2], 0])  # 0: of no bytes
    cells = {"none-strong": (real, None, 1, "strong"), "none-weak": (real, None, 1, "weak"),
             "vanilla-1to1-strong": (data, options.gen_data, 1, "strong"),
             f"adainf-{options.ratio}to1-weak": (data, options.gen_data, options.ratio, "weak")}
    table, folder = baselines(options, real), Path(options.out)
    for name, (subset, files, ratio, aug) in cells.items():
        runs = []
        for seed in options.seeds:
            say(f"\n{name}, seed {seed}")
            cell = dict(seed=seed, gen_data=files, ratio=ratio, aug=aug)
            cell["out"] = f"{folder}/{name}-{seed}"
            runs.append(train(argparse.Namespace(**vars(options) | cell), subset))
        table[name] = {metric: spread([run[metric] for run in runs]) for metric in METRICS}
    say("\n" + " " * 24 + "".join(f"{metric:>18}" for metric in METRICS))
    for name, row in table.items():
        say(f"{name:24}" + "".join(f"{row[metric]['mean']:9.2f} +- {row[metric]['std']:5.2f}"
                                   if metric in row else " " * 18 for metric in METRICS))
    say(f"top-1 on {len(data.test_images):,} test images, %: mean and standard deviation over "
        f"seeds {options.seeds}; {options.steps:,} steps of {options.batch_size} images")
    if RANK == 0:
        record = dict(options=vars(options), table=table)
        write_whole(folder / "comparison.json", json_bytes(record))
        write_figure(folder / "comparison.png", *(
            (f"{metric}, %", "", {name: (row[metric]["values"], [name] * len(row[metric]["values"]))
                                  for name, row in reversed(table.items()) if metric in row})
            for metric in ("linear_top1", "knn_top1")))
    return table

def spread(values):
    return {"mean": statistics.mean(values), "values": values,
            "std": statistics.stdev(values) if len(values) > 1 else 0.0}

def baselines(options, data):
    """What needs no training: kNN of pixels, and the features of an untrained network."""
    train, test = ((images.to(data.mean.device).permute(0, 3, 1, 2) / 255 - data.mean).flatten(1)
                   for images in (data.images, data.test_images))
    pixels = knn_top1(train, data.labels.to(train.device), test, data.test_labels, options.knn_k,
                      options.knn_temperature)
    scores = evaluate(build_model(options, data), data, options, contextlib.nullcontext())
    return {"raw pixels": {"knn_top1": spread([pixels])}, "untrained network": {
        metric: spread([scores[metric]]) for metric in ("linear_top1", "knn_top1")}}

def evaluate_only(options, data):
    """Print the scores of the newest checkpoint of the run --eval-only; writes nothing."""
    model = build_model(options, data)
    step, *_ = load_checkpoint(Path(options.eval_only), {"model": model})
    if not step:
        raise InputError(f"--eval-only {options.eval_only}: has no checkpoint yet")
    scores = {"steps": step, **evaluate(model, data, options, choose_precision(options)[1])}
    say(json.dumps(scores))
    return scores

def main(argv=None):
    """Run a command line; returns the result (dict). Exits with 2 on bad input, 1 on failure."""
    try:
        options = parse_options(argv)
        tune_process()
        device = choose_device(options)
        if WORLD > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if options.demo and RANK == 0 and not Path(options.gen_data[0]).exists():
            from download_generated import generate_shapes
            generate_shapes(options.gen_data[0], options.image_size)
        barrier()
        work = evaluate_only if options.eval_only else compare if options.compare else train
        return work(options, load_data(options))
    except InputError as error:
        message, status = str(error), error.status
    except KeyboardInterrupt:
        message, status = "stopped by SIGINT before the first step", 128 + signal.SIGINT
    except OSError as error:
        message, status = one_line(error), 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        message, status = f"{one_line(error)} Try a smaller --batch-size, or --data-device cpu", 1
    except RuntimeError as error:
        if WORLD == 1 or not any(w in str(error) for w in ("onnection", "NCCL", "imed out")):
            raise
        message, status = f"lost another process ({one_line(error)}); the same command continues", 1
    print(f"adainf.py: {message}", file=sys.stderr)
    raise SystemExit(status)

if __name__ == "__main__":
    main()
