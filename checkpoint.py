"""The files of a model and of its training: safetensors, written beside their place and renamed.

A model's folder is what `MoS.from_pretrained` reads: config.json, vocab.json and a bf16 file for
each of PARTS. Parts that the configuration names a published folder for stay there.

A training checkpoint is what `train.py --resume` goes on from: a folder for each step with all
tensors in full precision, one file from every process that holds some, and manifest.json with a
checksum of each file and with what the run learns from. It is written under a temporary name, in
the background, and renamed when it is complete. torch.distributed.checkpoint cuts and joins the
tensors, so that a checkpoint loads on any number of processes, however they share the model.

The log of a training is a CSV. The last section copies the tensors of safetensors files into a
model; published folders use it too.
"""

import csv
import errno
import fcntl
import json
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import assign, checksum, full_tensor, going_on, initialise, replacing
from config import GENERATING, loads_own_weights, read_config, refuse_changes, require
from towers import Patches, Tokenizer, Understanding
from vae import VAE

# The files of a model, and the modules that each of them holds.
PARTS = {"vae": ("vae",), "understanding": ("understanding",), "mos": ("router", "generation")}
# The part that a stage trains.
TRAINED = {"vae": "vae", "understand": "understanding", "image": "mos", "edit": "mos"}
# The settings of MoSConfig that belong to a part begin so; all others are of "mos".
SETTINGS_OF = {"vae": "vae_", "understanding": "und_"}


# --- Models ---------------------------------------------------------------------------------------

def frozen_parts(c, tokenizer):
    """Return the understanding tower and the VAE of a MoSConfig, without trained weights.

    Each is the small world's, or that of a published folder. Raises ValueError where a folder's
    sizes are not the configuration's, and where the tokenizer has more tokens than the tower.
    """
    if c.und_folder:
        from pretrained.folders import build_tower
        tower = build_tower(c.und_folder, c.und_images)
        check_folder(c, c.und_folder, und_width=len(tower.norm.weight), und_depth=len(tower.blocks))
    else:
        tower = Understanding(
            vocabulary=c.und_vocabulary or len(tokenizer), width=c.und_width, depth=c.und_depth,
            heads=c.und_heads, kv_heads=c.und_kv_heads, hidden=c.und_hidden, tied=c.und_tied,
            vision=Patches(16, c.und_width) if c.und_images else None)
    if len(tokenizer) > tower.embedding.num_embeddings:
        raise ValueError(f"the tokenizer has ids for {len(tokenizer)} tokens, the understanding "
                         f"tower only for {tower.embedding.num_embeddings}: they are not of one "
                         f"model; check {c.und_folder or '--und-vocabulary'}")
    if c.vae_folder:
        from pretrained.folders import build_vae
        vae = build_vae(c.vae_folder)
        check_folder(c, c.vae_folder, vae_channels=len(vae.latents_mean))
    else:
        vae = VAE(c.vae_channels, c.vae_width, c.vae_decoder_width)
    return tower, vae


def check_folder(c, folder, **found):
    """Raise ValueError unless the configuration says what was found in a published folder."""
    expected = {name: getattr(c, name) for name in found}
    if found != expected:
        raise ValueError(f"{folder} has {found}, but the configuration says {expected}: give "
                         "another folder, or other settings")


def published_folder(c, part):
    """Return the published folder that a MoSConfig names for one of PARTS, or ""."""
    return {"understanding": c.und_folder, "vae": c.vae_folder}.get(part, "")


def fingerprint(c, folder, part):
    """Return a SHA-256 in hex that tells the weights of a frozen part from all others.

    c: the MoSConfig. part: "vae" or "understanding". It lies in the model's folder unless the
    configuration names a published one. Raises FileNotFoundError or ValueError.
    """
    published = published_folder(c, part)
    if not published:
        return checksum(require(Path(folder) / f"{part}.safetensors"))
    from pretrained.folders import describe_tower, describe_vae, digest
    describe = describe_vae if part == "vae" else describe_tower
    return digest(published, describe(published))


def read_tokenizer(c, folder):
    """Return the tokenizer of a MoSConfig's published tower, or else that of the model's folder."""
    if not c.und_folder:
        return read_vocabulary(folder)
    from pretrained.folders import FolderTokenizer
    return FolderTokenizer(c.und_folder, c.und_chat)


def read_vocabulary(folder):
    """Return the Tokenizer of a model's folder. Raises FileNotFoundError or ValueError."""
    path = require(Path(folder) / "vocab.json")
    try:
        words = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}; copy it again") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path} is not a vocabulary: expected a list of words; copy it again")
    return Tokenizer(words)


def save_model(model, folder, parts=tuple(PARTS), write=True, trained=None):
    """Write the folder of a model: config.json, vocab.json and a safetensors file for each part.

    parts: what to write; of the others neither weights nor settings nor words change. trained: the
    stage and step that the files shall name, "vae 6000". Where parameters are sharded every process
    must call it, and all but one without `write`.
    """
    c, folder = model.config, Path(folder)
    files = {part: {} for part in parts if not published_folder(c, part)}
    for part, tensors in files.items():
        for module in PARTS[part]:
            for name, p in getattr(model, module).named_parameters():
                p = full_tensor(p.detach())
                if write:
                    tensors[f"{module}.{name}"] = p.bfloat16().contiguous().cpu()
            for name, buffer in getattr(model, module).named_buffers():
                tensors[f"{module}.{name}"] = buffer.contiguous().cpu()  # statistics stay fp32
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in files.items():
        with replacing(folder / f"{part}.safetensors") as path:
            save_file(tensors, path, trained and {"trained": trained})
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(settings_to_write(c, folder, parts), indent=1))
    if "understanding" in files:
        with replacing(folder / "vocab.json") as path:
            path.write_text(json.dumps(words_of(model.tokenizer)))


def settings_to_write(c, folder, parts):
    """Return the settings of a folder after `parts` of a MoSConfig are written into it."""
    if "mos" in parts or not (folder / "config.json").is_file():
        return asdict(c)
    beginnings = tuple(SETTINGS_OF[part] for part in parts)
    changed = {name: value for name, value in asdict(c).items() if name.startswith(beginnings)}
    return asdict(read_config(folder)) | changed


def words_of(tokenizer):
    """Return the words of the small world's Tokenizer, as vocab.json holds them."""
    return tokenizer.words[len(Tokenizer.SPECIAL):]


def unloaded(kind, config, tokenizer):
    """Return a model (`kind` is MoS) on the meta device, where parameters have no memory yet."""
    with torch.device("meta"):
        return kind(config, tokenizer)


def load_model(kind, folder, device="cpu", tower_device=None, parts=tuple(PARTS),
               vae_dtype=torch.float32, **changes):
    """Return the model (`kind` is MoS) of a folder that `save_model` wrote, ready to sample.

    Weights are stored in bf16. On a GPU towers and router stay in bf16, and so does a published
    tower anywhere; the VAE gets vae_dtype, all else fp32. tower_device: of the understanding tower;
    None: the others'. parts: what to load; the rest has no memory until `load_parts` is called.
    changes: of the configuration. Raises FileNotFoundError or ValueError that names what is
    missing, broken or misshaped.
    """
    config = replace(read_config(folder), **changes)
    for name in ("und_folder", "vae_folder"):
        path = getattr(config, name)
        if path and name not in changes and not Path(path).is_dir():
            raise FileNotFoundError(f"{folder}/config.json names {path} as its {name}, which is no "
                                    f"folder; give its place with --{name.replace('_', '-')}, or "
                                    "correct it in that file")
    model = unloaded(kind, config, read_tokenizer(config, folder))
    load_parts(model, folder, parts, device, tower_device, vae_dtype)
    return model


def load_parts(model, folder, parts, device, tower_device=None, vae_dtype=torch.float32):
    """Give parts of a model on the meta device memory and the values of a folder."""
    for part in parts:
        tower = part == "understanding"
        place = torch.device(tower_device or device if tower else device)
        half = place.type == "cuda" or tower and model.config.und_folder
        dtype = vae_dtype if part == "vae" else torch.bfloat16 if half else torch.float32
        for module in PARTS[part]:
            getattr(model, module).to(dtype).to_empty(device=place)
        load_part(model, folder, part)
    model.vae.to(memory_format=torch.channels_last)  # or convolutions would reorder at each call
    model.eval()


def load_part(model, folder, part):
    """Load one of PARTS from a model's folder, or from the published one that it names instead.

    Raises FileNotFoundError, or ValueError for a damaged file and for names or shapes that differ
    from the configuration's.
    """
    c = model.config
    if part == "understanding" and c.und_folder:
        from pretrained.folders import load_tower_weights
        load_tower_weights(c.und_folder, model.understanding)
    elif part == "vae" and c.vae_folder:
        from pretrained.folders import load_vae_weights
        load_vae_weights(c.vae_folder, model.vae)
    else:
        targets = {}
        for module in PARTS[part]:
            targets |= getattr(model, module).state_dict(prefix=module + ".")
        copy_tensors(targets, [require(Path(folder) / f"{part}.safetensors")])


def load_or_initialise(stage, c):
    """Allocate the parts that a stage needs, then load their weights or initialise them."""
    model = stage.model
    stage.to_empty(device=stage.world.device)
    if c.stage in GENERATING:
        model.vae.to_empty(device=stage.world.device)
        load_part(model, c.init, "vae")
        load_part(model, c.init, "understanding")
    if loads_own_weights(c):
        load_part(model, c.init, TRAINED[c.stage])
    else:
        for module in PARTS[TRAINED[c.stage]]:
            initialise(getattr(model, module), c.seed)


# --- Training checkpoints -------------------------------------------------------------------------

EIGHT_DIGITS = 8 * "[0-9]"  # the name of a checkpoint is its step
MANIFEST = "manifest.json"  # {"step": ..., "files": {name: checksum}, "run": `describe_run`}


def folder_of(c, stage=None):
    """Return the folder of the training checkpoints of a stage; None: c's own stage."""
    return Path(c.out) / "checkpoints" / (stage or c.stage)


def parts_to_write(c):
    """Return the parts that a stage writes: what it trains, and what --out does not yet hold."""
    if c.stage in GENERATING and Path(c.init).resolve() != Path(c.out).resolve():
        return tuple(PARTS)
    return (TRAINED[c.stage],)


def overwritten(c):
    """Return the files in --out that a run of a stage from step 0 would overwrite, sorted."""
    files = {Path(c.out) / f"{part}.safetensors" for part in parts_to_write(c)}
    if c.stage == "edit" and folder_of(c, "image").is_dir():
        files.remove(Path(c.out) / "mos.safetensors")  # `--export --stage image` writes it again
    return sorted(filter(Path.exists, files))


def check_free(c):
    """Raise ValueError where --out already holds a run of this stage, or what it would write."""
    for path in overwritten(c):
        raise ValueError(f"stage {c.stage} would overwrite {path}; choose another --out, or add "
                         "--resume to go on with a run that was stopped")
    if folder_of(c).exists():
        raise ValueError(f"{c.out} already holds a run of stage {c.stage}; add --resume to go on, "
                         "or choose another --out")
    check_unused(c)


def check_unused(c):
    """Raise ValueError where a later stage in --out has learned from what this one trains."""
    uses = []
    if c.stage != "edit":
        uses.append(folder_of(c, "edit"))
    if TRAINED[c.stage] != "mos":
        uses += [folder_of(c, "image"), Path(c.out) / "mos.safetensors"]
    for path in filter(Path.exists, uses):
        raise ValueError(f"{path} has learned from {TRAINED[c.stage]}.safetensors in {c.out} as it "
                         f"is; choose another --out to train stage {c.stage} further, or name the "
                         "stage to go on with by --stage")


def claim(c):
    """Keep other processes from training this stage in --out as long as this one lives.

    Two would delete each other's checkpoints. Raises ValueError where another one trains it.
    """
    path = Path(c.out) / f".{c.stage}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # it stays open to the end of the process
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):  # others: this file system has no locks
            raise ValueError(f"another process trains stage {c.stage} in {c.out}; wait for its "
                             "end, or choose another --out") from None


def exported_step(c):
    """Return the step of a stage whose weights stand in --out; 0 where that is not known.

    Infinity means that a later stage has trained them further.
    """
    path = Path(c.out) / f"{TRAINED[c.stage]}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            stage, _, step = (file.metadata() or {}).get("trained", "").partition(" ")
    except (FileNotFoundError, SafetensorError):
        return 0
    if c.stage == "image" and stage == "edit":
        return math.inf
    return int(step) if stage == c.stage else 0


def describe_run(c, model, dataset):
    """Return what a run learns from, {name: value as in JSON}, which its checkpoints keep.

    dataset: its Mixture; None leaves the captions out.
    """
    config = model.config
    settings = asdict(config) | asdict(c)
    run = {"settings": {name: settings[name] for name in settings.keys() - {"out", "init"}}}
    if c.stage != "vae":
        run["tokenizer"] = describe_tokenizer(config, model.tokenizer)
        if dataset and not dataset.made:  # the folder of stored latents keeps its own record
            run["captions"] = dataset.captions_digest()
    if c.stage in GENERATING:
        run |= {part: fingerprint(config, c.init, part) for part in ("vae", "understanding")}
    return json.loads(json.dumps(run))


def describe_tokenizer(c, tokenizer):
    """Return what decides a text's token ids: the words, or a published tower's tokenizer."""
    if not c.und_folder:
        return words_of(tokenizer)
    return {"tokenizer.json": checksum(Path(c.und_folder) / "tokenizer.json"),
            "example": tokenizer.encode("a picture")}  # as special tokens and chat template make it


def check_same_run(checkpoint, run):
    """Raise ValueError where a run would go on with other things than its checkpoint names.

    run: what `describe_run` returns now.
    """
    kept = read_run(checkpoint)
    refuse_changes(run["settings"], kept["settings"], checkpoint / MANIFEST)
    names = {"tokenizer": "another tokenizer", "understanding": "another understanding tower",
             "vae": "another VAE", "captions": "other captions"}
    for key, name in names.items():
        if key in run and run[key] != kept.get(key):
            difference = first_difference(kept.get(key), run[key])
            raise ValueError(f"{checkpoint} was trained with {name}{difference}; put that back, or "
                             "choose another --out")


def names_its_step(checkpoint):
    """Return whether a folder has the manifest of the step that its name says."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text())["step"] == int(checkpoint.name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_run(checkpoint):
    """Return what `describe_run` has returned for a checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text())["run"]


def first_difference(before, after):
    """Return a word that only one of two vocabularies has, as " (...)"; "" for other values."""
    if not isinstance(before, list) or not isinstance(after, list):
        return ""
    gone = [word for word in before if word not in after]
    new = [word for word in after if word not in before]
    return f" ({gone[0]!r} is gone)" if gone else f" ({new[0]!r} is new)" if new else ""


def is_replicated(tensors):
    """Return whether every process holds all tensors in full, so that one can write them alone."""
    return not any(hasattr(tensor, "full_tensor") for tensor in tensors.values())


class Writer:
    """Writes checkpoints into a folder while training goes on; the last `keep` stay.

    run: what `describe_run` returns.
    """

    def __init__(self, folder, world, keep, run):
        self.folder, self.world, self.keep, self.run = folder, world.for_background(), keep, run
        self.thread = ThreadPoolExecutor(1)
        self.pending = self.fault = None

    def save(self, step, tensors):
        """Copy {name: tensor} to host memory, and write the copies in the background."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager
        self.wait()
        copies = BlockingAsyncStager().stage(tensors)
        self.pending = self.thread.submit(save, self.folder, step, copies, self.world, self.keep,
                                          self.run)

    def wait(self):
        """Wait until the last checkpoint is written; if that failed, print why."""
        pending, self.pending = self.pending, None
        if pending:
            self.fault = None
            try:
                pending.result()
            except OSError as e:  # a full disk, say: there may be room at the next one
                self.fault = str(e)
                self.world.print0(f"\nwarning: {e}; training goes on")

    def check(self):
        """Print why the last checkpoint could not be written, if that is known by now."""
        if self.pending and self.pending.done():
            self.wait()


def save(folder, step, tensors, world, keep, run):
    """Write {name: tensor} as the checkpoint of a step, then delete all but the newest `keep`.

    Every process calls it. Later checkpoints, which `newest` has passed over, are deleted too.
    run: see `describe_run`. If one process fails every process raises OSError, and older
    checkpoints stay as they are.
    """
    import torch.distributed.checkpoint as dcp  # it takes most of a second
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    final = folder / f"{step:08d}"
    temporary = folder / f".{step:08d}"
    replicated = is_replicated(tensors)
    sums = {}  # of all files, by name; or "fault": why a process failed

    def make_folder():
        if world.first:
            for unfinished in folder.glob(f".{EIGHT_DIGITS}"):  # by a save that was killed
                shutil.rmtree(unfinished)
            temporary.mkdir(parents=True)

    def write_tensors():
        if not world.first and replicated:
            return {}
        writer = HuggingFaceStorageWriter(temporary, save_distributed=True)
        with warnings.catch_warnings(action="ignore"):  # "distributed is unavailable": yes
            dcp.save({name: tensor.contiguous() for name, tensor in tensors.items()},
                     storage_writer=writer, process_group=world.group, no_dist=replicated)
        # Each process that wrote reads its share of the files.
        share = slice(None) if replicated else slice(world.rank, None, world.size)
        return {path.name: checksum(path) for path in sorted(temporary.iterdir())[share]}

    def finish():
        if world.first:
            manifest = {"step": step, "files": sums, "run": run}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            existing = checkpoints(folder)
            position = existing.index(final)
            for old in existing[:position] + existing[position + keep:]:
                if names_its_step(old):  # or somebody else has put it there
                    shutil.rmtree(old)

    for work in (make_folder, write_tensors, finish):
        try:
            result = work() or {}
        except (OSError, CheckpointException) as e:
            result = {"fault": (str(e) or "no reason").splitlines()[-1]}
        sums |= world.gather(result)  # a fault, too: all processes go on, or none
        if "fault" in sums:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"the checkpoint of step {step} could not be written to {folder}, older "
                          f"ones are kept: {sums['fault']}")


def checkpoints(folder):
    """Return the folders of the checkpoints in a folder, the newest first."""
    return sorted(filter(Path.is_dir, folder.glob(EIGHT_DIGITS)), reverse=True)


def find_fault(checkpoint):
    """Return what is wrong with a checkpoint on disk, or None."""
    try:
        for name, expected in json.loads((checkpoint / MANIFEST).read_text())["files"].items():
            if checksum(checkpoint / name) != expected:
                return f"{name} is not what was written"
    except OSError as e:
        return str(e)
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        return f"{MANIFEST}: {e}"
    if not names_its_step(checkpoint):
        return f"{MANIFEST} is of another step: this is a copy"


def newest(folder, world):
    """Return the newest checkpoint that is as it was written, or None where there is none at all.

    The first process looks, and prints which ones are passed over. Raises ValueError where all are
    damaged.
    """
    result = {"name": None, "fault": None}
    for checkpoint in checkpoints(folder) if world.first else []:
        fault = find_fault(checkpoint)
        if fault is None:
            result["name"] = checkpoint.name
            break
        result["fault"] = result["fault"] or fault
        world.print0(f"{checkpoint} is damaged ({fault}): passed over")
    result = world.gather(result if world.first else {})
    if result["name"]:
        return folder / result["name"]
    if result["fault"]:
        raise ValueError(f"no checkpoint in {folder} can be read ({result['fault']}); "
                         "train into another --out")


def find_last(c, world, export):
    """Return the last checkpoint of a stage to go on from, or None where the stage has to begin.

    Raises ValueError where there is none to export, and where there is none to go on from although
    --out holds trained weights.
    """
    last = newest(folder_of(c), world)
    if last:
        if not export and int(last.name) < c.steps:
            check_unused(c)
        return last
    if export:
        raise ValueError(f"no checkpoint in {folder_of(c)} to export; train first, or choose "
                         "another --out")
    for path in overwritten(c):
        raise ValueError(f"{path} is trained, but there is no checkpoint of stage {c.stage} to go "
                         "on from: move that file away to begin anew, or choose another --out")
    check_unused(c)
    world.print0(f"no checkpoint of stage {c.stage} in {c.out}: it begins at step 0")


def load(checkpoint, tensors):
    """Read a checkpoint into {name: tensor}, in place; return its step. Every process calls it.

    Raises ValueError where names or shapes differ.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    reader = HuggingFaceStorageReader(checkpoint)
    try:
        surplus = reader.read_metadata().state_dict_metadata.keys() - tensors.keys()
        if surplus:
            raise ValueError(f"it also holds {min(surplus)}")
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=reader, no_dist=is_replicated(tensors))
    except (ValueError, CheckpointException) as e:
        raise ValueError(f"{checkpoint} does not fit this run ({str(e).splitlines()[-1]}); "
                         "train into another --out") from None
    return int(checkpoint.name)


# --- The log of a training ------------------------------------------------------------------------

class Log:
    """A CSV with a row for each log point and for each validation; rank 0 writes it."""

    def __init__(self, path, first_step):
        self.path = path
        self.rows = []
        if first_step and path.is_file():
            self.rows = [row for row in self.read() if row["step"] <= first_step]

    def read(self):
        """Return the rows of the file, even if a spreadsheet has saved it. Raises ValueError."""
        try:
            text = self.path.read_text("utf-8-sig")
            delimiter = ";" if ";" in text.partition("\n")[0] else ","
            return [row | {"step": int(float(row["step"]))}
                    for row in csv.DictReader(text.splitlines(), delimiter=delimiter)]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} is not the log that this program wrote; move it away, "
                             "and a new one begins") from None

    def add(self, step, **values):
        """Add a row, and write the file anew."""
        self.rows.append({"step": step} | {k: f"{v:.6g}" for k, v in values.items()})
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (going_on(f"write {self.path}"), replacing(self.path) as temporary,
              open(temporary, "w", newline="") as file):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


# --- Tensors of safetensors files -----------------------------------------------------------------

@torch.no_grad()
def copy_tensors(targets, paths, our_name=lambda name: (name, 0), adapt=None):
    """Copy the tensors of safetensors files into targets, {our name: tensor}, one at a time.

    our_name: a function from a tensor's name in a file to our name and a part; the parts of one of
    our tensors are stacked in their order. It returns None for a tensor that is not needed, and
    raises KeyError for an unknown one. adapt: a function from our name and a file's values to ours.
    Raises ValueError for a damaged file, and for a tensor that is unknown, missing, in two files,
    or of another shape than ours.
    """
    files = open_tensors(paths)
    sources = find_tensors(targets, files, our_name)
    for name, target in targets.items():
        parts = [sources[name][part] for part in sorted(sources[name])]
        values = [files[path].get_tensor(theirs) for path, theirs in parts]
        if adapt:
            values = [adapt(name, value) for value in values]
        shape = values[0].shape
        if len(values) > 1:
            shape = (sum(len(value) for value in values), *shape[1:])
        if shape != target.shape or any(value.shape[1:] != shape[1:] for value in values):
            names = " with ".join(theirs for _, theirs in parts)
            raise ValueError(f"{parts[0][0]}: tensor {names} has shape {tuple(shape)}, config.json "
                             f"asks for {tuple(target.shape)}")
        assign(target, torch.cat(values) if len(values) > 1 else values[0])


def open_tensors(paths):
    """Return {path: open file} of safetensors files. Raises ValueError for a damaged one."""
    files = {}
    for path in paths:
        try:
            files[path] = safe_open(path, "pt")
        except SafetensorError as e:
            raise ValueError(describe_damage(path, e, "copy or train it again")) from None
    return files


def describe_damage(path, error, remedy):
    """Return what to say about a file that cannot be read: its error, or that it is a pointer."""
    with open(path, "rb") as file:
        if file.read(12) == b"version http":
            return f"{path} is only a pointer of Git LFS; fetch the file with git lfs pull"
    return f"{path} is damaged ({error}); {remedy}"


def find_tensors(targets, files, our_name):
    """Return {our name: {part: (path, name in the file)}} of open files; see `copy_tensors`."""
    sources = {name: {} for name in targets}
    for path, file in files.items():
        for theirs in file.keys():
            try:
                source = our_name(theirs)
            except KeyError:  # no name of ours: refused below
                source = theirs, 0
            if source is None:
                continue
            kind = file.get_slice(theirs).get_dtype()
            if kind not in ("BF16", "F16", "F32", "F64"):
                raise ValueError(f"{path}: tensor {theirs} has type {kind}; expected BF16, F16 or "
                                 "F32: quantised weights are not read")
            name, part = source
            if name not in targets:
                raise ValueError(f"{path}: tensor {theirs} is not part of this model")
            if part in sources[name]:
                other, _ = sources[name][part]
                raise ValueError(f"{path}: tensor {theirs} is in {other.name}, too; keep one of "
                                 "them")
            sources[name][part] = path, theirs
    for name, parts in sources.items():
        if not parts:
            path = next(iter(files))
            origin = path if len(files) == 1 else path.parent
            raise ValueError(f"{origin}: tensor {name} is missing")
    return sources
