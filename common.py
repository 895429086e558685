"""What all parts share: device and processes, parameters, pictures, files, command lines."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).parent  # the repository


def pick_device():
    """Return cuda where there is a GPU, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --- Processes ------------------------------------------------------------------------------------

@dataclass
class World:
    """This process among all that train together; rank 0 writes and prints."""
    rank: int
    size: int
    device: torch.device
    watchers: object = None  # a process group for finding out who does not answer any more
    writers: object = None  # a process group for writing checkpoints in the background
    group: object = None  # the one that `wait` and `gather` use; None: that of training

    @classmethod
    def join(cls, patience):
        """Join the process group that torchrun announces, or stay alone. patience: in seconds."""
        device = pick_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_torchelastic_launched():
            return cls(0, 1, device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
        watchers = dist.new_group(backend="gloo", timeout=timedelta(seconds=15))
        writers = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
        return cls(dist.get_rank(), dist.get_world_size(), device, watchers, writers)

    def for_background(self):
        """Return the same processes for a background thread, with a process group of its own."""
        return replace(self, group=self.writers)

    @property
    def first(self):
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def print0(self, text):
        """Print in the first process only."""
        if self.first:
            try:
                print(text, flush=True)
            except OSError:  # the terminal or the reader of the pipe is gone: training goes on
                sys.stdout = open(os.devnull, "w")

    def share(self, batch):
        """Return this process's slice of a global batch."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def sum(self, tensor):
        """Return the sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, interrupted, step):
        """Return whether any process was interrupted; several ask each other every ten steps."""
        if self.size == 1:
            return bool(interrupted)
        count = torch.tensor(float(len(interrupted)), device=self.device)
        return step % 10 == 0 and bool(self.sum(count))

    def wait(self):
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier(self.group)

    def explain_hang(self, error):
        """Return the error of a step, or one that names the process that does not answer."""
        reason = f"{error} ".splitlines()[0]
        if self.size == 1 or not (isinstance(error, dist.DistError)
                                  or re.search("gloo|NCCL", str(error))):
            return error
        try:
            dist.monitored_barrier(self.watchers, timedelta(seconds=10), wait_all_ranks=True)
        except RuntimeError as e:
            silent = re.findall(r"Ranks? ([\d, ]+) failed", str(e))
            who = "process 0 does not answer any more, or its error names the one that does not"
            if silent:
                who = f"process {silent[0]} of {self.size} does not answer any more"
            return OSError(f"{who}; start again with --resume ({reason})")
        return error

    def gather(self, values):
        """Return the union of the dicts of all processes."""
        parts = [values]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, values, self.group)
        return {key: value for part in parts for key, value in part.items()}

    def choose_parallel(self, c):
        """Fill in c.parallel where it is empty. Raises ValueError where it cannot work here."""
        several = dist.is_initialized()
        c.parallel = c.parallel or ("ddp" if several else "none")
        if several != (c.parallel != "none"):
            raise ValueError(f"parallel is {c.parallel}, but " + (
                "torchrun started this: ddp, fsdp or hsdp" if several else
                "there is one process: start several with torchrun --nproc-per-node N train.py"))
        if c.shards and c.parallel != "hsdp":
            raise ValueError(f"shards is for --parallel hsdp, but parallel is {c.parallel}; leave "
                             "it out")

    def mesh(self, c):
        """Return the processes as FSDP wants them: one row, or with hsdp a row for each copy."""
        if c.parallel == "fsdp":
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shards = c.shards or int(os.environ["LOCAL_WORLD_SIZE"])
        if self.size % shards:
            raise ValueError(f"shards must divide the {self.size} processes, got {shards}")
        return init_device_mesh(self.device.type, (self.size // shards, shards),
                                mesh_dim_names=("copy", "shard"))


@contextlib.contextmanager
def interruption():
    """Yield a list that is no longer empty once this process is asked to stop.

    That is by Ctrl-C, by SIGTERM (a scheduler's) or by SIGHUP (the terminal is closed; `nohup`
    ignores it). A step is never cut in two.
    """
    requests = []
    before = {number: signal.getsignal(number)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, lambda *_: requests.append(True))
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_stopping_to_parent(*_):
    """Ignore Ctrl-C and the first SIGTERM in a child process; a second SIGTERM ends it.

    A terminal or a scheduler sends them to every process at once, but only the training process may
    answer; it ends its children by a SIGTERM of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def peak_memory(device):
    """Return the most bytes that this process has held: tensors on a GPU, everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def product_rate(device):
    """Return the FLOP/s of a large matrix product, the best of a few: MFU is a share of it."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(side, side, device=device, dtype=kind)
    best = math.inf
    for _ in range(8):
        a.sum().item()  # waits until all work is done
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def revision():
    """Return the git revision of this folder, or "unknown"."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- Tensors and parameters -----------------------------------------------------------------------

def replayed(function, *inputs):
    """Return a function of tensors; on a GPU as a CUDA graph, for inputs of these shapes.

    A graph launches all kernels of a call at once, so that the host no longer limits small models.
    Its output is overwritten by the next call.
    """
    if not inputs[0].is_cuda:
        return function
    static_inputs = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and allocate before anything is recorded
        function(*static_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*static_inputs)

    def replay(*inputs):
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        graph.replay()
        return output
    return replay


def move(tensor, device):
    """Copy a tensor to a device without waiting for the GPU's earlier work, as `to` alone would."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def full_tensor(tensor):
    """Return a tensor as a whole; where it is sharded every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_bytes(tensor):
    """Return the bytes that this process holds of a tensor, which may be sharded."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def assign(tensor, values):
    """Copy all values of a tensor into it; this process may hold no more than a shard of it."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # half a second
        values = distribute_tensor(values.to(tensor.device, tensor.dtype), tensor.device_mesh,
                                   tensor.placements, src_data_rank=None)
    tensor.copy_(values)


@torch.no_grad()
def initialise(tower, seed=None):
    """Give a tower's parameters their first values, by its method `init_parameter`.

    Each parameter is drawn in full and then assigned, one after the other: the shards of a model
    are those of the model that one process would hold, and no process ever holds that. With a seed
    a parameter's values follow from seed and name; otherwise from the global random state.
    """
    for name, p in tower.named_parameters():
        if p.is_meta:  # it has no memory yet
            continue
        if seed is not None:
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.empty(p.shape, device="cpu")
        tower.init_parameter(name, values)
        assign(p, values)


def init_parameter(name, p, depth):
    """Fill a parameter of a tower of `depth` blocks: norms 1, biases 0, the rest random.

    NOTE (ours): normal(0, 0.02); the last matrix of a residual branch divided by sqrt(2 depth).
    """
    if p.ndim == 1:
        p.fill_(1.0 if "norm" in name else 0.0)
    else:
        last = name.endswith(("out.weight", "down.weight"))
        p.normal_(0, 0.02 / (2 * depth) ** 0.5 if last else 0.02)


@torch.no_grad()
def randomise(device, *modules):
    """Give modules memory and random values, to measure what they cost."""
    for module in modules:
        for p in module.to_empty(device=device).parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.02)


# --- Pictures -------------------------------------------------------------------------------------

def on_white(image):
    """Return a PIL image in RGB; what is transparent in it is composited on white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_tensor(image):
    """Return a PIL image in RGB as a tensor (3, H, W) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def to_image(picture):
    """Return a tensor (3, H, W) in [-1, 1] as a PIL image in RGB."""
    pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().contiguous().numpy())


def contact_sheet(rows, labels=(), gutter=4):
    """Paste rows of PIL images of one size into one, with white between them.

    rows: a list of lists. labels: a text above each row, cut after its second line. gutter: width
    of the white in pixels.
    """
    width, height = rows[0][0].size
    font = ImageFont.load_default(12)
    above = 32 if labels else 0  # pixels for a label
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
    """Cut a text into lines of at most `width` pixels; a longer word stays in one piece."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# --- Files ----------------------------------------------------------------------------------------

def checksum(path):
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class replacing:
    """`with replacing(path) as temporary:` writes beside the path, then renames it to the path.

    The file gets the mode that the umask asks for: safetensors would make it the owner's alone.
    Raises OSError where safetensors cannot write.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")

    def __enter__(self):
        self.temporary.touch()
        self.mode = self.temporary.stat().st_mode
        return self.temporary

    def __exit__(self, kind, error, _):
        if kind is None:
            self.temporary.chmod(self.mode)
            os.replace(self.temporary, self.path)
            return
        self.temporary.unlink(missing_ok=True)
        if kind is SafetensorError:
            raise OSError(f"cannot write {self.path}: {error}") from None


@contextlib.contextmanager
def going_on(what):
    """Print an OSError of this block as a warning, and let training go on.

    what: an infinitive such as "write log.csv", which the warning says could not be done.
    """
    try:
        yield
    except OSError as e:
        print(f"\nwarning: could not {what}, training goes on: {e}", flush=True)


# A folder of things that are made once, such as latents, says in made.json what from.

def check_made(folder, made, what):
    """Raise ValueError unless a folder is empty, or holds what was made from the same things.

    made: {name: value} of these, as JSON keeps them; names that only one side has are not compared.
    what: "latents", for example.
    """
    path = Path(folder) / "made.json"
    if not path.is_file():
        others = [p for p in path.parent.glob("*") if not p.name.startswith(".")]
        if others or path.parent.is_file():
            raise ValueError(f"{what}: {folder} holds something else; choose a new folder")
        return
    before, = read_lines(path)
    for name in made:
        if name in before and before[name] != made[name]:
            raise ValueError(f"{what}: {folder} was made with another {name} ({before[name]}, now "
                             f"{made[name]}); choose another folder")


def write_made(folder, made):
    """Write made.json into a folder, which need not exist yet."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(Path(folder) / "made.json") as path:
        path.write_text(json.dumps(made))


def read_lines(path):
    """Return the JSON value of each line of a file. Raises ValueError where it is damaged."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); delete its folder and start again") from None


def read_json_lines(path, expected, take):
    """Return what `take` makes of the JSON value of each line of a file; empty lines are skipped.

    Raises ValueError for another encoding than UTF-8; and where a line is no JSON or `take` raises
    an error, ValueError that names the line and what was expected.
    """
    taken = []
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not in UTF-8 (byte {e.start} is 0x{e.object[e.start]:02x}); "
                         "save it in that encoding") from None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                taken.append(take(json.loads(line)))
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected {expected}, got "
                             f"{line.strip()[:60]!r}") from None
    return taken


# --- Command lines --------------------------------------------------------------------------------

def tqdm_or_none(**options):
    """Return a tqdm bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(dynamic_ncols=True, **options)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line with exit code 2, and that has flags of configurations."""

    def __init__(self, description, **options):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message):
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)

    def add_settings(self, kind, title, values):
        """Add a flag for each field of a configuration; values: {field: what --help shows}.

        A flag that is not given stays out of the parsed namespace.
        """
        group = self.add_argument_group(title)
        for f in fields(kind):
            choices = [choice for choice in f.metadata["choices"] or () if choice]
            value = values.get(f.name, "")
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
            options = dict(default=argparse.SUPPRESS,
                           help=text if value == "" else f"{text} [{value}]")
            if f.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif f.type is tuple:
                options.update(type=str, nargs="+", metavar="VALUE")
            else:
                options.update(type=f.type, metavar="VALUE")
            group.add_argument("--" + f.name.replace("_", "-"), **options)


def run(main, save_memory="ask for less at once"):
    """Call main; what a user can mend ends in one line and exit code 2 instead of a traceback.

    save_memory: what that line advises where memory is short.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, and no other file may get its number
            setattr(sys, name, open(os.devnull, "w"))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # or Python would complain again at its end
        stop("nobody reads the output any more (broken pipe)")
    except (ValueError, OSError) as e:
        stop(e)
    except (RuntimeError, MemoryError, subprocess.CalledProcessError) as e:
        reason = explain(e, save_memory)
        if not reason:
            raise
        stop(reason)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def stop(reason):
    """End the program with one line and exit code 2."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def explain(error, save_memory):
    """Return one line on an error of the machine rather than of the code, or None."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return f"out of memory; {save_memory}"
    if re.search(r"No working C\+\+ compiler|find C compiler|Command .*(gcc|clang)", text):
        return ("there is no working C compiler, which torch.compile and Triton need: install gcc, "
                "or use neither (--no-compile in training, and MOS_PLAIN=1 in the environment)")
