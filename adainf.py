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
import argparse, contextlib, ctypes, dataclasses, datetime, hashlib  # noqa: E401
import io, json, math, os, signal, statistics, sys, time, zipfile, zlib  # noqa: E401
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
    jitter: tuple  # brightness, contrast, saturation (factors 1 +- strength) and hue (turns)
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    solarize_prob: tuple = (0.0, 0.0)  # of the first and the second view
    flip_prob: float = 0.5

RECIPES = {"strong": Augmentation(0.08, 0.8, (0.8, 0.8, 0.8, 0.2)),  # SimCLR's own
           "weak": Augmentation(0.2, 0.4, (0.4, 0.4, 0.4, 0.1))}  # AdaInf's

def number(kind, low, high=10 ** 9):
    """An argparse type: an int or float in low..high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    convert.__name__ = kind.__name__
    return convert

def build_parser():
    """Every knob, in the order of the story; the defaults are the paper's recipe for CIFAR-10."""
    parser = argparse.ArgumentParser(prog="adainf.py", description="SimCLR with AdaInf")
    parser.error = lambda message: parser.exit(2, f"adainf.py: {message}\n")  # one line, no usage
    def add(flag, default, kind, text, **more):
        more |= {"type": kind} if kind else {"action": "store_true"} if default is False else {}
        text += "" if default is None or default is False else " (default: %(default)s)"
        group.add_argument(flag, default=default, help=text, **more)
    count, index, share = number(int, 1), number(int, 0), number(float, 0, 1)
    positive, scale = number(float, 1e-9, 1e30), number(float, 0, 1e30)
    heat = number(float, 1e-3)

    group = parser.add_argument_group("data")
    add("--dataset", "cifar10", str, "cifar10, cifar100, shapes or a folder {train,test}/<class>/*")
    add("--data-dir", "data", str, "folder for downloads")
    add("--image-size", 32, number(int, 8, 64), "pixels n to which a folder's images are resized")
    add("--real-size", None, count, "real images |D_d|, a class-balanced subset; default all")
    group = parser.add_argument_group("inflation")
    add("--gen-data", None, str, "npz files with `image`: uint8, N x n x n x 3, RGB, generated",
        nargs="+", metavar="FILE")
    add("--gen-size", None, count, "generated images |D_g|, a random subset; default all")
    add("--ratio", 10, index, "weight N of a real image against a generated one; 0: no real images")
    group = parser.add_argument_group("augmentation (single values override those of --aug)")
    add("--aug", "auto", str, "auto: weak with generated data, strong without",
        choices=["auto", *RECIPES])
    add("--crop-min", None, number(float, 1e-3, 1), "smallest crop, as a share of the area; "
        "strong 0.08, weak 0.2")
    add("--jitter-prob", None, share, "probability of colour jitter; strong 0.8, weak 0.4")
    add("--jitter", None, scale, "brightness, contrast, saturation (factors 1 +- these) and hue "
        "(turns); strong .8 .8 .8 .2, weak .4 .4 .4 .1", nargs=4, metavar=tuple("BCSH"))
    add("--gray-prob", None, share, "probability of grayscale; default 0.2")
    add("--blur-prob", None, share, "probability of Gaussian blur, sigma 0.1 to 2 pixels; default "
        "0.5")
    add("--solarize-prob", None, share, "probability of solarize, for both views or one for each; "
        "default 0", nargs="+", metavar="P")
    add("--flip-prob", None, share, "probability of a horizontal flip; default 0.5")
    group = parser.add_argument_group("model")
    add("--width", 64, number(int, 1, 1024), "channels of the ResNet-18's first stage")
    add("--stem-padding", 1, number(int, 0, 2), "zeros around the image, pixels; official code: 2")
    add("--proj-hidden", 2048, number(int, 1, 65536), "hidden units of the projector")
    add("--proj-dim", 256, number(int, 1, 65536), "outputs of the projector")
    add("--temperature", 0.2, heat, "temperature of NT-Xent")
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
    add("--knn-temperature", 0.07, heat, "a vote weighs exp(cosine / temperature)")
    add("--linear-epochs", 100, count, "epochs of the offline linear probe")
    add("--linear-lr", 0.1, positive, "peak learning rate of the offline linear probe")
    add("--eval-only", None, str, "evaluate the newest checkpoint of this run", metavar="RUN")
    group = parser.add_argument_group("experiments")
    add("--compare", False, None, "no inflation (strong, weak), vanilla and AdaInf side by side")
    add("--seeds", None, index, "seeds of --compare; default --seed", nargs="+", metavar="SEED")
    add("--demo", False, None, "--compare on shapes, in minutes on a CPU")
    group = parser.add_argument_group("system")
    add("--out", None, str, "folder of the run, continued by the same command; default in runs/")
    add("--device", "auto", str, "where to compute", choices=["auto", "cuda", "mps", "cpu"])
    add("--data-device", "auto", str, "where images wait; auto: the device, if half of it suffices",
        choices=["auto", "cuda", "cpu"])
    add("--amp", "auto", str, "auto: bf16 if the hardware has it, else fp16 on CUDA, else off",
        choices=["auto", "bf16", "fp16", "off"])
    add("--compile", None, None, "compile views and network; default: on CUDA only, as on a CPU "
        "it takes half a minute and saves 0 to 5 %% of a step: 10 minutes or more to break even",
        action=argparse.BooleanOptionalAction)
    add("--log-every", 50, count, "steps between log lines")
    add("--save-every", None, count, "steps between checkpoints; default 1%% of --steps")
    add("--dry-run", False, None, "everything once: data, one step, one evaluation, all files")
    return parser

def choose_augmentation(options):
    """(Augmentation, the reason for it): AdaInf's rule (section 4), then the user's own values."""
    strength = options.aug if options.aug != "auto" else "weak" if options.gen_data else "strong"
    why = f"--aug {options.aug}, {'with' if options.gen_data else 'without'} generated data"
    names = (field.name for field in dataclasses.fields(Augmentation))
    own = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    why += "".join(f", --{name.replace('_', '-')}" for name in own)
    return dataclasses.replace(RECIPES[strength], **own), f"{strength} ({why})"

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
        n_generated = len(data.images) - data.n_real
        self.n_repeated = (ratio if n_generated else 1) * data.n_real
        self.size = self.n_repeated + n_generated
        self.beta = self.n_repeated / self.size
        if batch_size > self.size:
            raise InputError(f"--batch-size {batch_size}: an epoch has only {self.size} samples")

    def indices(self, step):
        """The B indices into data.images that are the batch of a step, on the images' device."""
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
        """(images, labels, number of real images in the whole batch), on the device. `share` is the
        slice of the batch that this process works on; label -1 marks a generated image."""
        index = self.indices(step)
        labels = self.data.labels.index_select(0, index)
        images = self.data.images.index_select(0, index[share])
        tensors = images, labels[share], (labels >= 0).sum()
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
    reach = int(whole.max()) + 1
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    weight = torch.where(offset.abs() <= whole, 1, torch.where(offset.abs() == whole + 1, part, 0))
    weight = weight / weight.sum(-1, keepdim=True)
    source = (torch.arange(n, device=sigma.device)[:, None] + offset).clamp(0, n - 1)
    box = torch.einsum("sk,okp->sop", weight, F.one_hot(source, n).double())
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
    """Two random views of every image. draw() makes parameters of uniform random numbers, apply()
    distorts images by parameters; both are pure functions, to be tested, compiled and repeated."""
    DRAWS = 36  # uniform random numbers for a view
    BLURS = 256  # levels of sigma

    def __init__(self, augmentation, n, mean, std):
        self.aug, self.n, self.mean, self.std, device = augmentation, n, mean, std, mean.device
        self.strength = torch.tensor(augmentation.jitter, device=device)
        self.solarize_prob = torch.tensor(augmentation.solarize_prob, device=device).view(-1, 1, 1)
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
            before=when < order[..., 3:],
            factor=torch.where(jittered, factor, 1.0).gather(-1, kind),
            hue=torch.where(jittered, self.strength[3] * (2 * hue - 1), 0.0),
            gray=gray < aug.gray_prob, solarize=solarize < self.solarize_prob,
            blur=torch.where(blur < aug.blur_prob, 1 + (sigma * self.BLURS).long(), 0))
        return {name: value.flatten(0, 1) for name, value in parameters.items()}

    def apply(self, images, p):
        """uint8 M x n x n x 3 and parameters of M rows -> float M x 3 x n x n, normalised."""
        m, n = len(images), self.n
        x = images.permute(0, 1, 3, 2).float() / 255
        start = p["start"]
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
        if max(self.aug.solarize_prob) > 0:
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

def nt_xent(projections, temperature):
    """NT-Xent (Chen et al. 2020, eq. 1): which of all other views shows the same image as this one?

    projections: 2B x d, first views first. Mean over 2B anchors of the cross-entropy of cosines /
    temperature, in fp32; ln(2B - 1) if all are equal. Of several processes: this one's part of it,
    its own anchors against the views of all."""
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
    """Momentum SGD with a trust ratio t for every weight tensor (You et al. 2017), clipped at 1.

    Two or more axes: t = min(eta |p| / (|g| + wd |p| + eps) / lr, 1), d = (g + wd p) t. Biases and
    norms: d = g. Then buffer = momentum buffer + d and p = p - lr buffer."""
    def __init__(self, groups, momentum=0.9, eta=0.02, eps=1e-8):
        super().__init__(groups, dict(momentum=momentum, eta=eta, eps=eps, weight_decay=0.0))
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            weights = [p for p in group["params"] if p.ndim > 1]
            flat = [p for p in group["params"] if p.ndim <= 1]
            gradients = [p.grad for p in weights]
            norm = torch.stack(torch._foreach_norm(weights))
            trust = torch.stack(torch._foreach_norm(gradients)) + decay * norm + group["eps"]
            trust = (group["eta"] * norm / trust / lr).clamp(max=1)
            d = torch._foreach_add(gradients, weights, alpha=decay)
            torch._foreach_mul_(d, list(trust.unbind()))
            buffers = [self.state[p]["buffer"] for p in weights + flat]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, [*d, *(p.grad for p in flat)])
            torch._foreach_add_(weights + flat, buffers, alpha=-lr)

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

def evaluate(model, data, options, amp, linear):
    """Percent of the test images: {online_top1, knn_top1} and, if `linear`, linear_top1."""
    test, test_labels = encode(model.backbone, data.test_images, data, amp), data.test_labels
    train, train_labels = (each[:data.n_real] for each in (data.images, data.labels))
    sets = encode(model.backbone, train, data, amp), train_labels.to(test.device), test, test_labels
    scores = {"online_top1": top1(model.probe(test), test_labels),
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
    device, (precision, amp) = choose_device(options), choose_precision(options)
    augmentation, why = choose_augmentation(options)
    mixture = Mixture(data, options.ratio, options.batch_size, options.seed)
    two_views = TwoViews(augmentation, options.image_size, data.mean, data.std)
    share = share_of(options.batch_size)
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes)).to(device, memory_format=torch.channels_last)
    learned = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [dict(params=learned, peak=options.lr, weight_decay=options.weight_decay),
              dict(params=model.probe.parameters(), peak=options.probe_lr)]
    optimizer = LARS(groups, options.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    meter = torch.zeros(5, device=device)  # sums since the last log line
    say(f"data      {data.n_real:,} real images of {len(data.classes)} classes and "
        f"{len(data.images) - data.n_real:,} generated ones, in {data.images.device.type} memory\n"
        f"mixture   beta = {mixture.beta:.3f}: TV(P_t, P_d) = {1 - mixture.beta:.3f} TV(P_g, P_d) "
        f"by Theorem 3.1; {mixture.size // options.batch_size:,} steps an epoch\n"
        f"views     {why}: {augmentation}\n"
        f"network   width {options.width}, {sum(p.numel() for p in learned) / 1e6:.2f} M parameters"
        f", {str(precision)[6:]} on {world_size()} x {device.type}\n"
        f"training  {options.steps:,} steps of {options.batch_size}, learning rate {options.lr:g}")

    def draw(step):
        stream = random_stream(device, options.seed, VIEWS, step)
        shape = 2, options.batch_size, two_views.DRAWS
        uniform = torch.rand(shape, generator=stream, device=device)
        return *mixture.batch(step, share, device), uniform[:, share]

    def losses(images, labels, n_labelled, uniform):
        with torch.no_grad():
            views = two_views(images, uniform)
        with amp:
            projections, logits = model(views)
        hits = (logits.argmax(1) == labels.repeat(2)).sum()
        contrastive = nt_xent(projections, options.temperature)
        return contrastive, probe_loss(logits, labels, n_labelled), hits

    with Run(options, data, mixture.beta, why) as run:
        state = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
        step = run.restore(state)
        if options.compile and step < options.steps:
            compile_or_warn(model, two_views, lambda: sum(losses(*draw(step))[:2]).backward())
        if rank() == 0:
            write_views(run.folder / "views.png", data, two_views)
        clock, since = time.perf_counter(), step
        while True:
            last = step == options.steps
            if last or options.eval_every and step % options.eval_every == 0:
                run.evaluate(step, state, lambda: evaluate(model, data, options, amp, linear=last))
                clock, since = time.perf_counter(), step
            if last:
                return run.finish(model)
            run.stop_if_asked(step, state)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.warmup_steps,
                                            group["peak"])
            images, labels, n_labelled, uniform = draw(step)
            contrastive, probing, hits = losses(images, labels, n_labelled, uniform)
            optimizer.zero_grad()
            scaler.scale(contrastive + probing).backward()
            sum_gradients(model)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            meter += torch.stack([contrastive.detach(), probing.detach(), hits,
                                  2 * (labels >= 0).sum(), torch.ones_like(hits) / world_size()])

            if step % options.log_every == 0 or step == options.steps:
                loss, probing, hits, views, count = run.read(meter, step)  # the only host sync
                seconds = (time.perf_counter() - clock) / (step - since)
                run.log("training", step, dict(
                    loss=loss / count, lr=optimizer.param_groups[0]["lr"],
                    probe_loss=probing / count, probe_top1=100 * hits / max(views, 1),
                    images_per_second=options.batch_size / seconds,
                    seconds_left=seconds * (options.steps - step)))
                meter.zero_()
                clock, since = time.perf_counter(), step
            if step % options.save_every == 0:
                run.save(step, state)

# ==== What only operations need ===================================================================

class InputError(Exception):
    """One line for the user: what is wrong, where, and what to do."""
    status = 2  # of the process

class RunError(InputError):
    """The same, when the input is right but the run cannot go on."""
    status = 1

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
    made = [f"{options.data_dir}/shapes{options.image_size}-generated.npz"]
    options.gen_data = options.gen_data or (made if options.demo else None)
    inflation = f"ratio{options.ratio}" if options.gen_data else "none"
    name = f"{Path(options.dataset).name}-{inflation}-{options.aug}-seed{options.seed}"
    defaults = dict(warmup_steps=round((0.1 if options.demo else 0.01) * options.steps),
                    eval_every=math.ceil(options.steps / 5), out=f"runs/{name}",
                    save_every=math.ceil(0.01 * options.steps), seeds=[options.seed],
                    compile=choose_device(options).type == "cuda")
    vars(options).update({key: defaults[key] for key in defaults if getattr(options, key) is None})
    for wrong, why in [
            (options.warmup_steps > options.steps, "--warmup-steps: more than --steps"),
            (options.jitter and options.jitter[3] > 0.5, "--jitter: hue is more than 0.5 turns"),
            (len(options.solarize_prob or []) > 2, "--solarize-prob: more than one value a view"),
            (options.data_device == "cuda" and choose_device(options).type != "cuda",
             "--data-device cuda: --device is another one"),
            *((not options.gen_data and given, f"{flag}: needs --gen-data") for flag, given in (
                ("--ratio 0", options.ratio == 0), ("--compare", options.compare),
                ("--gen-size", options.gen_size)))]:
        if wrong:
            raise InputError(why)
    return options

# ---- Reading images ------------------------------------------------------------------------------

@dataclasses.dataclass
class Data:
    """What a run learns from; in `images` the real ones come first, then the generated ones."""
    images: torch.Tensor  # uint8, (n_real + n_generated) x n x n x 3
    labels: torch.Tensor  # int64; -1 for generated images, whatever their file says
    n_real: int
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    mean: torch.Tensor  # 3 x 1 x 1, of the real training images in 0..1
    std: torch.Tensor
    crc: list  # checksums of real and generated images: a run never goes on with others

def load_data(options):
    """The Data of --dataset and --gen-data, where --data-device says. Raises InputError."""
    (images, labels), (test_images, test_labels), classes = load_real(options)
    share = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    share, level = share / share[0].sum(), np.arange(256) / 255
    mean, std = share @ level, (share @ level ** 2 - (share @ level) ** 2).clip(1e-6) ** 0.5
    mean, std = (each.round(4) for each in (mean, std))  # to the digits that papers give for CIFAR
    if size := options.real_size:
        order = np.random.default_rng(options.seed).permutation(len(labels))
        keep = [order[labels[order] == label][:size // len(classes) + (label < size % len(classes))]
                for label in range(len(classes))]
        if sum(map(len, keep)) < size:
            raise InputError(f"--real-size {size}: too few images in a class for equal shares")
        keep = np.sort(np.concatenate(keep))
        images, labels = images[keep], labels[keep]
    pool, crc = append_generated(images, options)
    labels = F.pad(torch.as_tensor(labels), (0, len(pool) - len(labels)), value=-1)
    device = wait = choose_device(options)
    fits = device.type != "cuda" or pool.numel() < torch.cuda.mem_get_info()[0] / 2
    if options.data_device == "cpu" or options.data_device == "auto" and not fits:
        wait = torch.device("cpu")
    mean, std = (torch.tensor(each).float().view(3, 1, 1).to(device) for each in (mean, std))
    return Data(pool.to(wait), labels.to(wait), len(images), torch.from_numpy(test_images),
                torch.as_tensor(test_labels).to(device), classes, mean, std,
                [*map(zlib.crc32, (images, test_images)), *crc])

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
        if rank() == 0:
            dataset(options.data_dir, download=True)  # unpickles, if it has the known md5
        barrier()
        train, test = (dataset(options.data_dir, train=split) for split in (True, False))
    sets = [(np.ascontiguousarray(each.data), np.array(each.targets)) for each in (train, test)]
    return *sets, train.classes

def load_folder(folder, size):
    """(images, labels, class names) of folder/<class>/*, cropped to squares, resized (bicubic)."""
    from PIL import Image, ImageOps
    def read(path):
        with one_line_for(f"--dataset: {path} is no readable image: repair or remove it"):
            with Image.open(path) as image:
                image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
                return np.asarray(image)
    with one_line_for(f"--dataset: {folder} has no classes of images; give cifar10, cifar100, "
                      "shapes or a folder {train,test}/<class>/*", OSError):
        found = torchvision.datasets.ImageFolder(
            folder, is_valid_file=lambda path: "/." not in path[len(str(folder)):])
    if len(found.classes) < 2:
        raise InputError(f"--dataset: {folder} has one class only, {found.classes[0]}")
    with ThreadPoolExecutor() as threads:
        images = np.stack([*threads.map(read, (path for path, _ in found.samples))])
    return images, np.array(found.targets), found.classes

def npz_member(path, key="image", rows=4096):
    """(shape, dtype, chunks) of array `key` in the npz file `path`; chunks yields rows in order.

    It streams up to `rows` at a time, stored or compressed: a 3 GB file needs no memory of its own,
    and zip's checksum reveals damage. Never unpickles. Raises InputError."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}
    whole = f"{path}: has no whole array `{key}`"
    with one_line_for(whole):  # a damaged file can fail in any way
        archive = zipfile.ZipFile(path)
        member = archive.open(f"{key}.npy")
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(member)](member)
        size = archive.getinfo(f"{key}.npy").file_size - member.tell()
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        if dtype.hasobject or fortran_order or not shape or size != shape[0] * row_bytes:
            raise ValueError(f"{dtype} {shape} is not a plain array in C order")
    def chunks():
        with one_line_for(whole), archive, member:
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = member.read(count * row_bytes)
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
            member.read(1)  # at a member's end zipfile compares the checksum
    return shape, dtype, chunks()

def append_generated(real, options):
    """(tensor of the real and then the --gen-data images, the files' checksums). Raises InputError.

    Rows go straight to their final place, so memory peaks at the size of the result."""
    files = {path: npz_member(path) for path in options.gen_data or []}
    for path, (shape, dtype, _) in files.items():
        if dtype != np.uint8 or shape[1:] != real.shape[1:] or not shape[0]:
            raise InputError(f"--gen-data {path}: has {dtype} {shape}, not uint8 N x "
                             f"{real.shape[1]} x {real.shape[1]} x 3; "
                             "`download_generated.py --from-npz` converts")
    total = sum(shape[0] for shape, _, _ in files.values())
    size = (options.gen_size or total) if files else 0
    if size > total:
        raise InputError(f"--gen-size {size}: --gen-data has only {total} images")
    wanted = np.zeros(total, bool)
    wanted[np.random.default_rng(options.seed).permutation(total)[:size]] = True
    pool = torch.empty((len(real) + size, *real.shape[1:]), dtype=torch.uint8)
    rows, filled, seen = pool.numpy(), len(real), 0
    rows[:filled] = real
    for chunk in (chunk for _, _, chunks in files.values() for chunk in chunks):
        chosen = chunk[wanted[seen:seen + len(chunk)]]
        rows[filled:filled + len(chosen)] = chosen
        filled, seen = filled + len(chosen), seen + len(chunk)
    sample = rows[len(real)::max(1, size // 10_000)]
    if size and looks_bgr(sample.mean((0, 1, 2)), real.mean((0, 1, 2))):
        say("warning: --gen-data looks like BGR: its mean colour fits the real images' in reverse")
    return pool, [zipfile.ZipFile(path).getinfo("image.npy").CRC for path in files]

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
    device, cpu = choose_device(options), getattr(torch.cpu, "get_capabilities", dict)()
    name = options.amp
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    elif name == "auto" and device.type == "cpu":
        name = "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    return dtype, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def tune_process():
    """Process-wide settings for speed: by main, never by import."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --amp off means fp32 all through
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: keep freed memory, or
            ctypes.CDLL("libc.so.6").mallopt(parameter, 2 ** 31 - 1)  # every step faults it in

def compile_or_warn(model, two_views, trial):
    """Compile in place and try a step, without a trace; if it fails, training goes on eagerly."""
    started, buffers = time.perf_counter(), [buffer.clone() for buffer in model.buffers()]
    eager = two_views.pipeline
    try:
        model.compile()  # in place, so that names in the state dict stay clean
        two_views.pipeline = torch.compile(eager)
        trial()
        say(f"compiled  in {time.perf_counter() - started:.0f} s, not counted below")
    except Exception as error:  # a compiler can fail in any way
        say(f"warning: goes on without compilation, which failed: {one_line(error)}")
        model._compiled_call_impl, two_views.pipeline = None, eager
    for buffer, before in zip(model.buffers(), buffers):
        buffer.copy_(before)

# ---- A run's folder ------------------------------------------------------------------------------

class Run:
    """The folder --out: configuration, log, checkpoints, results. The same command continues it,
    the lock on its log keeps a second process out, and of many processes only the first writes."""
    FREE = {"out", "data_dir", "gen_data", "device", "data_device", "compile", "log_every", "steps",
            "save_every", "eval_every", "eval_only", "compare", "seeds", "demo"}  # may change

    def __init__(self, options, data, beta, why):
        self.options, self.data, self.folder = options, data, Path(options.out)
        self.lines, self.asked = [], 0
        self.facts = dict(beta=beta, augmentation=why, n_real=data.n_real,
                          n_generated=len(data.images) - data.n_real)
        self.config = json.loads(json.dumps(dict(
            options=vars(options), **self.facts, crc=data.crc, classes=data.classes,
            mean=data.mean.flatten().tolist(), std=data.std.flatten().tolist())))

    def __enter__(self):
        if rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log_file = open(self.folder / "log.jsonl", "ab", buffering=0)
                with contextlib.suppress(ImportError):  # without fcntl there is no lock
                    import fcntl
                    fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--out {self.folder}: another process trains there") from None
            except OSError as error:
                raise InputError(f"--out {self.folder}: cannot be written: {error.strerror}"
                                 ) from error
            if (self.folder / "config.json").exists():
                self.refuse_changes(read_config(self.folder))
            write_whole(self.folder / "config.json", json.dumps(self.config, indent=1).encode())
        barrier()  # nobody looks for checkpoints before the folder is ready
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.handlers = {name: signal.signal(getattr(signal, name), self.hear) for name in names}
        return self

    def __exit__(self, *_):
        for name, handler in self.handlers.items():
            signal.signal(getattr(signal, name), handler)
        if rank() == 0:
            self.log_file.close()

    def refuse_changes(self, old):
        """A run goes on only as it was begun; a dry run is no beginning. Raises InputError."""
        before, now = old["options"], self.config["options"]
        if before["dry_run"] and not now["dry_run"]:
            for name in ("checkpoint.pt", "checkpoint.prev.pt"):
                (self.folder / name).unlink(missing_ok=True)
            self.log_file.truncate(0)
            return
        changes = [(f"--{name.replace('_', '-')}", before.get(name), value)
                   for name, value in now.items() if name not in self.FREE]
        for name, value, new in [*changes, ("data with checksums", old["crc"], self.config["crc"]),
                                 ("--steps", before["steps"], max(before["steps"], now["steps"]))]:
            longer = name in ("--steps", "--warmup-steps") and now["steps"] > before["steps"]
            if value != new and not longer:
                raise InputError(f"--out {self.folder}: was begun with {name} {value}, not {new}; "
                                 "choose a new --out, or go on with the old value")
        if now["steps"] > before["steps"]:
            say(f"--steps grows from {before['steps']}: the learning rate jumps to the longer "
                "cosine, so the result is not that of as many steps from the start")

    def log(self, event, step, values):
        """A JSON object a line in log.jsonl, and its essence on the screen."""
        self.lines.append({"event": event, "step": step, **values})
        if rank() == 0:
            with one_line_for(f"cannot write {self.log_file.name}; the last checkpoint is good, "
                              "and the same command continues", OSError, error_type=RunError):
                self.log_file.write(json.dumps(self.lines[-1]).encode() + b"\n")
        if event == "training":
            left = datetime.timedelta(seconds=round(values["seconds_left"]))
            say(f"step {step:7,}  loss {values['loss']:.4f}  lr {values['lr']:.4f}  "
                f"{values['images_per_second']:,.0f} images/s  {left} left")
        if event == "evaluation":
            say(f"step {step:7,}  " + "  ".join(f"{k} {v:.2f} %" for k, v in values.items()))

    def records(self, event, step=None):
        return [line for line in self.lines
                if line["event"] == event and step in (None, line["step"])]

    def read(self, meter, step):
        """The meter's sums over all processes. Raises RunError if they are not finite."""
        values = sum_over_processes(meter).tolist()
        if not all(map(math.isfinite, values)):
            finite = [f", was {line['loss']:.4f} at step {line['step']}"
                      for line in self.records("training")[-1:]]
            raise RunError(f"the loss is not finite at step {step}{''.join(finite)}; the last "
                           "checkpoint is good: try a lower --lr, or --amp off")
        return values

    def save(self, step, state):
        """Checkpoint all that the next step depends on, if finite; keep the checkpoint before."""
        meter = self.read(state["meter"], step)
        if not all(value.isfinite().all() for value in state["model"].state_dict().values()):
            raise RunError(f"the weights are not finite at step {step}; the last checkpoint is "
                           "good: try a lower --lr, or --amp off")
        if rank() == 0:
            parts = {name: state[name].state_dict() for name in ("model", "optimizer", "scaler")}
            os.fsync(self.log_file.fileno())
            content = torch_bytes(dict(step=step, meter=meter, **parts))
            write_whole(self.folder / "checkpoint.pt", content,
                        keep=self.folder / "checkpoint.prev.pt")

    def restore(self, state):
        """Load the newest whole checkpoint, cut the log back to it; its step, 0 without one."""
        step = load_checkpoint(self.folder, state, discard_damaged=rank() == 0)
        if step:
            say(f"continues  {self.folder} after step {step:,}")
        if sum_over_processes(state["meter"].new_tensor(float(step))) != step * world_size():
            raise RunError(f"--out {self.folder}: is not one folder for all processes")
        self.cut_log(step)
        self.log("start", step, dict(
            argv=sys.argv, time=time.strftime("%Y-%m-%d %H:%M:%S"), processes=world_size(),
            device=torch.cuda.get_device_name() if state["meter"].is_cuda
            else state["meter"].device.type,
            versions={module.__name__: module.__version__ for module in (torch, torchvision, np)},
            python=sys.version, script=hashlib.sha256(Path(__file__).read_bytes()).hexdigest()))
        return step

    def cut_log(self, step):
        """Read the log; drop torn lines and those of steps that will be done again."""
        end = 0
        for line in (self.folder / "log.jsonl").read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or record["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            self.lines.append(record)
            end += len(line)
        if rank() == 0:
            self.log_file.truncate(end)

    def hear(self, number, _):
        """A signal asks to stop after this step or evaluation; a second one stops at once."""
        if self.asked:
            self.leave(number, "at once")
        self.asked = number

    def stop_if_asked(self, step, state):
        asked = self.asked
        if world_size() > 1:  # all stop together; asking costs a sync, so only at every tenth step
            votes = state["meter"].new_tensor(float(asked))
            total = step % 10 == 0 and int(sum_over_processes(votes))
            asked = total and (asked or signal.SIGTERM)
        if asked:
            self.save(step, state)
            self.leave(asked, f"after step {step:,}, which is saved")

    def leave(self, number, when):
        say(f"stopped by {signal.Signals(number).name} {when}; the same command continues")
        raise SystemExit(128 + number)

    def evaluate(self, step, state, scores):
        """Save, then log scores(), unless the log has them."""
        self.save(step, state)
        if not self.records("evaluation", step):
            self.log("evaluation", step, scores())

    def finish(self, model):
        """Write encoder.pt, curves.png and result.json; return the result."""
        scores, training = self.records("evaluation")[-1], self.records("training")
        speeds = [line["images_per_second"] for line in training]
        result = {**{name: scores[name] for name in METRICS}, **self.facts,
                  "seed": self.options.seed, "steps": scores["step"],
                  "loss": training[-1]["loss"] if training else None,
                  "images_per_second": statistics.median(speeds) if speeds else None}
        if rank() == 0:
            write_whole(self.folder / "encoder.pt", torch_bytes(model.backbone.state_dict()))
            write_figure(self.folder / "curves.png", draw_curves, training,
                         self.records("evaluation"))
            write_whole(self.folder / "result.json", json.dumps(result, indent=1).encode())
        say(f"results   in {self.folder}")
        if self.asked:
            self.leave(self.asked, "with all results written")
        return result

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

def load_checkpoint(folder, state, discard_damaged=False):
    """Load the newest whole checkpoint of a run's folder into `state`, a dict of what has a
    state_dict and of the tensor "meter". Returns its step, 0 without any. Raises InputError."""
    paths = [path for name in ("checkpoint.pt", "checkpoint.prev.pt")
             if (path := folder / name).exists()]
    for path in paths:
        try:
            if member := zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
                raise ValueError(f"checksum of {member}")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in state.items():
                if name == "meter":  # its sums belong to one of many processes
                    part.copy_(torch.tensor(checkpoint[name])).mul_(rank() == 0)
                else:
                    part.load_state_dict(checkpoint[name])
            step = int(checkpoint["step"])
        except Exception as error:  # a damaged file, or one from elsewhere, can fail in any way
            say(f"warning: {path} is damaged or foreign ({one_line(error)}); trying the one before")
            continue
        if discard_damaged and path != paths[0]:
            paths[0].unlink()  # or the next save would put it in the place of the good one
        return step
    if paths:
        raise InputError(f"{folder}: has no whole checkpoint of this model; choose a new --out")
    return 0

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
    mine, rest = divmod(batch_size, world_size())
    if rest:
        raise InputError(f"--batch-size {batch_size}: {world_size()} processes cannot share it "
                         "equally")
    return slice(rank() * mine, (rank() + 1) * mine)

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
    return SumOverProcesses.apply(x) if world_size() > 1 else x

def sum_gradients(model):
    """Every process has the gradient of its part of the loss; their sum, not mean, is the whole."""
    if world_size() > 1:
        gradients = [parameter.grad for parameter in model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients])):
            gradient.copy_(part.view_as(gradient))

class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, on any device (torch's own needs CUDA)."""
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide, count = x.float(), world_size() * x.numel() / x.shape[1]
        mine = torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0))[None]
        every = sum_over_processes(F.pad(mine, (0, 0, 0, 0, rank(), world_size() - rank() - 1)))
        mean = every[:, 1].mean(0)
        variance = (every[:, 0] + (every[:, 1] - mean).square()).mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (wide * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)

def BatchNorm(channels):
    return (SyncBatchNorm if world_size() > 1 else nn.BatchNorm2d)(channels)

# ---- Pictures ------------------------------------------------------------------------------------

def write_views(path, data, two_views):
    """What the network sees: eight real and eight generated images, their two views below them."""
    index = torch.linspace(0, data.n_real - 1, 8).long()
    if n_generated := len(data.images) - data.n_real:
        index = torch.cat([index, data.n_real + torch.linspace(0, n_generated - 1, 8).long()])
    images = data.images[index.to(data.images.device)].to(data.mean.device)
    uniform = torch.rand(2, len(index), two_views.DRAWS, generator=random_stream("cpu", VIEWS))
    views = two_views.apply(images.repeat(2, 1, 1, 1), two_views.draw(uniform.to(data.mean.device)))
    rows = torch.cat([images.permute(0, 3, 1, 2) / 255, views * data.std + data.mean])
    rows, buffer = F.interpolate(rows, scale_factor=max(1, 64 // two_views.n)), io.BytesIO()
    torchvision.utils.save_image(rows, buffer, format="png", nrow=len(index), padding=3,
                                 pad_value=1)
    write_whole(path, buffer.getvalue())

def write_figure(path, draw, *arguments):
    """A PNG file of two panels that draw(left, right, *arguments) fills, if there is matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say(f"note: no {path.name}, as matplotlib is not installed")
    figure, buffer = Figure((10, 3.4), layout="constrained"), io.BytesIO()
    draw(*figure.subplots(1, 2), *arguments)
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())

def draw_curves(left, right, training, evaluations):
    left.plot([line["step"] for line in training], [line["loss"] for line in training])
    left.set(xlabel="step", ylabel="NT-Xent")
    for name in ("knn_top1", "online_top1"):
        steps, values = zip(*((line["step"], line[name]) for line in evaluations))
        right.plot(steps, values, "o-", label=name)
    right.set(xlabel="step", ylabel="test accuracy, %")
    right.legend()

def draw_comparison(left, right, table):
    for axis, metric in ((left, "linear_top1"), (right, "knn_top1")):
        for place, row in enumerate(table.values()):
            for cell in [row[metric]] if metric in row else []:
                axis.errorbar(cell["mean"], -place, xerr=cell["std"], fmt="o", capsize=4)
                axis.plot(cell["values"], [-place] * len(cell["values"]), "k|")
        axis.set(xlabel=f"{metric}, %", ylim=(0.5 - len(table), 0.5),
                 yticks=range(0, -len(table), -1), yticklabels=list(table))

# ---- Experiments and main ------------------------------------------------------------------------

def compare(options, data):
    """The four cells over --seeds, everything else equal: a table, comparison.json and .png."""
    real = dataclasses.replace(data, images=data.images[:data.n_real], crc=data.crc[:2],
                               labels=data.labels[:data.n_real])
    cells = {"no inflation, strong": (real, None, 1, "strong"),
             "no inflation, weak": (real, None, 1, "weak"),
             "vanilla, 1:1, strong": (data, options.gen_data, 1, "strong"),
             f"AdaInf, {options.ratio}:1, weak": (data, options.gen_data, options.ratio, "weak")}
    table, folder = baselines(options, real), Path(options.out)
    for name, (subset, files, ratio, aug) in cells.items():
        runs = []
        for seed in options.seeds:
            place = name.replace(", ", "-").replace(" ", "-").replace(":", "to")
            changes = dict(seed=seed, gen_data=files, ratio=ratio, aug=aug,
                           out=str(folder / f"{place}-{seed}"))
            say(f"\n{name}, seed {seed}")
            runs.append(train(argparse.Namespace(**{**vars(options), **changes}), subset))
        table[name] = {metric: spread([run[metric] for run in runs]) for metric in METRICS}
    say("\n" + " " * 24 + "".join(f"{metric:>18}" for metric in METRICS))
    for name, row in table.items():
        cells = [row.get(metric) for metric in METRICS]
        say(f"{name:24}" + "".join(
            f"{cell['mean']:9.2f} +- {cell['std']:5.2f}" if cell else " " * 18 for cell in cells))
    say(f"top-1 on {len(data.test_images):,} test images, %: mean and standard deviation over "
        f"seeds {options.seeds}; {options.steps:,} steps of {options.batch_size} images")
    if rank() == 0:
        record = {"options": vars(options), "table": table}
        write_whole(folder / "comparison.json", json.dumps(record, indent=1).encode())
        write_figure(folder / "comparison.png", draw_comparison, table)
    return table

def spread(values):
    return {"mean": statistics.mean(values), "values": values,
            "std": statistics.stdev(values) if len(values) > 1 else 0.0}

def baselines(options, data):
    """What needs no training: kNN of pixels, and the features of an untrained network."""
    train, test = ((images.to(data.mean.device).permute(0, 3, 1, 2) / 255 - data.mean).flatten(1)
                   for images in (data.images, data.test_images))
    labels, device = data.labels.to(data.mean.device), data.mean.device
    pixels = knn_top1(train, labels, test, data.test_labels, options.knn_k, options.knn_temperature)
    torch.manual_seed(options.seed)
    model = SimCLR(options, len(data.classes)).to(device, memory_format=torch.channels_last)
    scores = evaluate(model, data, options, contextlib.nullcontext(), linear=True)
    return {"raw pixels": {"knn_top1": spread([pixels])}, "untrained network": {
        metric: spread([scores[metric]]) for metric in ("linear_top1", "knn_top1")}}

def evaluate_only(options, data):
    """Print the scores of the newest checkpoint of the run --eval-only; writes nothing."""
    model = SimCLR(options, len(data.classes))
    step = load_checkpoint(Path(options.eval_only), {"model": model})
    if not step:
        raise InputError(f"--eval-only {options.eval_only}: has no checkpoint yet")
    model.to(data.mean.device, memory_format=torch.channels_last)
    _, amp = choose_precision(options)
    scores = {"steps": step, **evaluate(model, data, options, amp, linear=True)}
    say(json.dumps(scores))
    return scores

def main(argv=None):
    """Run a command line; returns the result (dict). Exits with 2 on bad input, 1 on failure."""
    try:
        options = parse_options(argv)
        tune_process()
        device = choose_device(options)
        if "RANK" in os.environ and not dist.is_initialized():  # torchrun started this process
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if options.demo and rank() == 0 and not Path(options.gen_data[0]).exists():
            from download_generated import generate_shapes
            generate_shapes(options.gen_data[0], options.image_size)
        barrier()
        work = evaluate_only if options.eval_only else compare if options.compare else train
        return work(options, load_data(options))
    except InputError as error:
        message, status = str(error), error.status
    except KeyboardInterrupt:
        message, status = "stopped by SIGINT before the first step", 128 + signal.SIGINT
    except (torch.OutOfMemoryError, MemoryError) as error:
        message, status = f"{one_line(error)} Try a smaller --batch-size, or --data-device cpu", 1
    except RuntimeError as error:
        if world_size() == 1 or not any(w in str(error) for w in ("onnection", "NCCL", "imed out")):
            raise
        message, status = f"lost another process ({one_line(error)}); the same command continues", 1
    print(f"adainf.py: {message}", file=sys.stderr)
    raise SystemExit(status)

if __name__ == "__main__":
    main()
