"""What the commands share: the device, safe file writing, and errors of one line."""

import argparse
import hashlib
import os
import sys
import zlib
from dataclasses import field, fields
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent  # the repository


def pick_device():
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def replayed(function, *inputs):
    """The function of tensors, on a GPU as a CUDA graph for inputs of these shapes.

    A graph launches all kernels of a call at once: the host no longer limits small models. Its
    output is overwritten by the next call.
    """
    if not inputs[0].is_cuda:
        return function
    static, stream = [x.clone() for x in inputs], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and allocate before anything is recorded
        function(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*static)

    def replay(*inputs):
        for place, x in zip(static, inputs):
            place.copy_(x)
        graph.replay()
        return output
    return replay


def move(tensor, device):
    """A tensor on a device. A GPU's work goes on meanwhile; `to` alone would wait for all of it."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def full_tensor(tensor):
    """A tensor that is sharded over processes put together (all must ask), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def place(tensor, values):
    """Copy whole values into a tensor, of which this process may hold no more than a shard."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # half a second
        values = distribute_tensor(values.to(tensor.device, tensor.dtype), tensor.device_mesh,
                                   tensor.placements, src_data_rank=None)
    tensor.copy_(values)


@torch.no_grad()
def initialise(tower, seed=None):
    """Give a tower's parameters their first values, by its method `start`.

    Each is drawn whole, one after the other, and placed: shards of a model are those of the model
    that one process would hold, and no process ever holds that. With a seed a parameter's values
    follow from seed and name; otherwise from the global random state.
    """
    for name, p in tower.named_parameters():
        if seed is not None:
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.empty(p.shape, device="meta" if p.is_meta else "cpu")
        tower.init_parameter(name, values)
        place(p, values)


@torch.no_grad()
def randomise(device, *modules):
    """Give modules memory and random values, of no use but to see what they cost."""
    for module in modules:
        for p in module.to_empty(device=device).parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.02)


def init_parameter(name, p, depth):
    """First values of a parameter in a tower of so many blocks: norms 1, biases 0, the rest random.

    NOTE (ours): normal(0, 0.02), what a residual branch ends in scaled by 1/sqrt(2 depth).
    """
    if p.ndim == 1:
        p.fill_(1.0 if "norm" in name else 0.0)
    else:
        ends = name.endswith(("out.weight", "down.weight"))
        p.normal_(0, 0.02 / (2 * depth) ** 0.5 if ends else 0.02)


def checksum(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_bytes(tensor):
    """Bytes that this process holds of a tensor, which may be sharded."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def to_tensor(image):
    """A PIL image in RGB as a tensor (3, H, W) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def to_image(picture):
    """A tensor (3, H, W) in [-1, 1] as a PIL image in RGB."""
    pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().contiguous().numpy())


def contact_sheet(rows, labels=(), gutter=4):
    """One PIL image of rows of PIL images of one size, white between them, labels above the rows.

    rows: a list of lists. labels: a text for each row, cut after its second line. gutter: pixels.
    """
    width, height = rows[0][0].size
    font, above = ImageFont.load_default(12), 32 if labels else 0
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + gutter) - gutter,
                              len(rows) * (height + gutter + above) - gutter), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = r * (height + gutter + above)
        if labels:
            text = "\n".join(wrap(labels[r], sheet.width - 8, draw, font)[:2])
            draw.multiline_text((4, top + 1), text, "black", font, spacing=2)
        for i, image in enumerate(row):
            sheet.paste(image, (i * (width + gutter), top + above))
    return sheet


def wrap(text, width, draw, font):
    """The lines of a text that are at most `width` pixels wide; a longer word stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def tqdm_or_none(**options):
    """A tqdm bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(dynamic_ncols=True, **options)


def setting(default, text):
    """A dataclass field with the help text of its flag."""
    return field(default=default, metadata={"help": text})


class replacing:
    """`with replacing(path) as temporary:` writes beside the path, then renames onto it."""

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")

    def __enter__(self):
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, exit code 2, and that reads dataclasses."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)

    def add_dataclass(self, kind, title):
        """One flag for each field; a field that is not given stays out of the namespace."""
        group = self.add_argument_group(title)
        for f in fields(kind):
            default = "by stage and machine" if f.default is None else f.default
            options = dict(default=argparse.SUPPRESS,
                           help=f"{f.metadata.get('help', '')} (default: {default})".strip())
            if f.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif f.type is tuple:
                options.update(type=str, nargs="+")
            else:
                options["type"] = f.type
            group.add_argument("--" + f.name.replace("_", "-"), **options)


def run(main):
    """Call main; what a user can mend ends in one line and exit code 2 instead of a traceback."""
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
