"""Speed of the parts of adainf.py, beside what most programs do. It takes some minutes.

    python assets/benchmark.py [options of adainf.py, such as --device cpu]

A line shows a median (lowest to highest, number of samples), and how many times the first line of
its kind that is. Compare figures of one run only, as other machines and their load change them.
All are also in benchmark.json."""

import json
import os
import resource
import statistics
import sys
from itertools import count
from pathlib import Path
from random import uniform
from time import perf_counter

import torch
import torchvision
from PIL import Image, ImageFilter
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.append(str(Path(__file__).parents[1]))  # the project's root, where adainf.py is
import adainf

SECONDS = 3  # how long to measure a figure; it has three samples at least
DEVICE = adainf.parse_options().device
CUDA = DEVICE == "cuda"
CALLS = 10 if CUDA else 1  # in a sample: a GPU still works on one call when the next one begins
synchronize = torch.get_device_module(DEVICE).synchronize
CPU = torch.cpu.get_capabilities()
FIGURES = dict(
    processor=torch.cuda.get_device_name() if CUDA else CPU.get("cpu_name"),
    cores=os.cpu_count(),
    threads=torch.get_num_threads(),
    torch=torch.__version__,
    torchvision=torchvision.__version__)


def measure(kind, title, amount, work):
    """Print and keep how much work() does in a second, if a call does `amount`; returns that."""
    work()  # to warm up: it may compile, choose kernels, or start processes
    synchronize()
    speeds = []
    end = perf_counter() + SECONDS
    while len(speeds) < 3 or perf_counter() < end:
        begun = perf_counter()
        for _ in range(CALLS):
            work()
        synchronize()
        speeds.append(CALLS * amount / (perf_counter() - begun))
    median = statistics.median(speeds)
    figures = FIGURES.setdefault(kind, dict(baseline=median))
    figures[title] = figure = dict(
        median=median, low=min(speeds), high=max(speeds), n=len(speeds),
        times=median / figures["baseline"])
    text = "{median:18,.1f} ({low:,.1f} to {high:,.1f}, n = {n})  {times:.2f} x"
    print(f"{kind:26}{title:24}" + text.format(**figure), flush=True)
    return median


print(FIGURES)
images = torch.randint(256, (1000, 32, 32, 3)).byte()
few = images[:256].to(DEVICE)
for strength, recipe in adainf.RECIPES.items():  # two views of 256 images
    blur = lambda image: image.filter(ImageFilter.GaussianBlur(uniform(0.1, 2)))
    view = transforms.Compose([
        Image.fromarray,
        transforms.RandomResizedCrop(32, (recipe["crop_min"], 1), interpolation=Image.BICUBIC),
        transforms.RandomApply([transforms.ColorJitter(*recipe["jitter"])], recipe["jitter_prob"]),
        transforms.RandomGrayscale(recipe["gray_prob"]),
        transforms.RandomApply([blur], recipe["blur_prob"]),
        transforms.RandomHorizontalFlip(recipe["flip_prob"]),
        transforms.ToTensor()])
    loader = torch.utils.data.DataLoader(
        images.numpy(),
        batch_size=256,
        collate_fn=lambda batch: torch.stack([view(image) for image in batch + batch]),
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork")  # others take no lambda
    kind = f"views/s, {strength}"
    measure(kind, "Pillow, 2 workers", 2000, lambda: list(loader))
    two_views = adainf.TwoViews(recipe, 32, 0, DEVICE)
    work = lambda: two_views(few, 0)
    eager = measure(kind, "eager", 512, work)
    two_views.apply = torch.compile(two_views.apply)
    measure(kind, "compiled", 512, work)

data = {}
real = images.repeat(50, 1, 1, 1)
labels = torch.arange(50_000) % 10
for size in (0, 10_000, 1_000_000):  # draw batches
    generated = images.repeat(size // 1000, 1, 1, 1)
    data[size] = adainf.Data(real, labels, generated, real, labels, real, labels, "0123456789")
    mixture = adainf.Mixture(data[size], 10, 512, 0, DEVICE)
    batches = map(mixture.batch, count())
    measure("batches/s of 512 images", f"{size:,} generated", 1, lambda: next(batches))


def measure_steps(kind, title, words, size=10_000, layout=torch.channels_last):
    """Training steps with these options, so many generated images, and a memory layout."""
    batch_size = "--batch-size=512" if CUDA else "--batch-size=128"
    options = adainf.parse_options([batch_size, *sys.argv[1:], *words.split()])
    mixture = adainf.Mixture(data[size], 10, options.batch_size, 0, DEVICE)
    two_views = adainf.TwoViews(adainf.WEAK, 32, 0, DEVICE)
    model = adainf.build_model(options, data[size]).to(memory_format=layout)
    optimizer = adainf.build_optimizer(model, options)
    scaler = torch.amp.GradScaler(enabled=False)
    with FlopCounterMode(display=False) as counter:  # for one image: two views, there and back
        model(two_views(few[:1], 0))[0].sum().backward()
    torch.compiler.reset()  # forgets what is compiled for other sizes
    network = adainf.accelerate(model, two_views, options)
    views = lambda *batch: two_views(*batch).contiguous(memory_format=layout)
    steps = count()
    work = lambda: adainf.training_step(
        next(steps), mixture, views, network, optimizer, scaler, options)
    with adainf.processes(DEVICE):  # sets cuDNN as a run does
        speed = measure(kind, title, options.batch_size, work)

    n = 8192 if CUDA else 2048
    matrix = torch.randn(n, n, device=DEVICE)
    if options.amp == "bf16":
        matrix = matrix.bfloat16()
    peak = measure("GFLOP/s, large matrices", title, 2e-9 * n ** 3, lambda: matrix @ matrix)
    of_peak = speed * counter.get_total_flops() / 1e9 / peak
    of_views = 2 * speed / eager
    print(f"    {of_peak:.1%} of that in a step; eager views would take {of_views:.1%} of its time")
    FIGURES[kind][title] |= dict(of_peak=of_peak, of_views=of_views)


bf16 = CPU.get("avx512_bf16") or CPU.get("amx_bf16")
if CUDA:
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
amp = "bf16" if bf16 else "off"
measure_steps("images/s", "plain fp32", "--amp off --no-compile", layout=torch.contiguous_format)
measure_steps("images/s", "+ channels_last", "--amp off --no-compile")
if bf16:
    measure_steps("images/s", "+ bf16", "--amp bf16 --no-compile")
measure_steps("images/s", "+ compiled", f"--amp {amp} --compile")
for size in (0, 1_000_000):
    measure_steps("images/s, width 16", f"{size:,} generated",
                  f"--amp {amp} --no-compile --width 16", size)

FIGURES["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
FIGURES["gpu_memory"] = torch.cuda.max_memory_allocated()
print("peak memory: {memory:,} bytes, GPU {gpu_memory:,}".format(**FIGURES))
Path("benchmark.json").write_text(json.dumps(FIGURES, indent=1))
