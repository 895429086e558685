"""Training states on disk: safetensors in shards, whole or not there at all.

The state of a step is a folder of its own: what every process holds of the tensors, in files of its
own, and `manifest.json` with a checksum of each. It is written under a temporary name and renamed
when complete, in the background. torch.distributed.checkpoint cuts and joins the tensors, so that
a state loads on any number of processes, however they share the model.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from common import checksum

MANIFEST = "manifest.json"


def run_alone(tensors):
    """Whether each process holds all of the tensors: then one can write or read without others."""
    return not any(isinstance(tensor, DTensor) for tensor in tensors.values())


class Writer:
    """Writes states into a folder while training goes on, one at a time; the last `keep` stay."""

    def __init__(self, folder, world, keep):
        self.folder, self.world, self.keep = folder, world.for_background(), keep
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def save(self, step, tensors):
        """Copy {name: tensor} to the host's memory and begin to write it. Raises as `wait`."""
        self.wait()
        copies = BlockingAsyncStager().stage(tensors)
        self.pending = self.thread.submit(save, self.folder, step, copies, self.world, self.keep)

    def wait(self):
        """Until the last state is written. Raises OSError where it could not be."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def check(self):
        """Raise OSError where the last state could not be written, as far as that is known."""
        if self.pending and self.pending.done():
            self.wait()


def save(folder, step, tensors, world, keep):
    """Write {name: tensor} as the state of a step, then delete all but the newest `keep`.

    Later states, which were passed over as damaged, go, too. Every process calls it. Raises OSError
    where it fails; older states stay as they are.
    """
    final, temporary = folder / f"{step:08d}", folder / f".{step:08d}"
    alone = run_alone(tensors)
    try:
        if world.first:
            for torn in folder.glob(".[0-9]*"):  # by a save that was killed
                shutil.rmtree(torn)
            temporary.mkdir(parents=True)
        world.wait()
        if world.first or not alone:
            with warnings.catch_warnings(action="ignore"):  # "distributed is unavailable": yes
                dcp.save({name: tensor.contiguous() for name, tensor in tensors.items()},
                         storage_writer=HuggingFaceStorageWriter(temporary, save_distributed=True),
                         process_group=world.group, no_dist=alone)
            # Each process that wrote reads its share of the files.
            mine = slice(None) if alone else slice(world.rank, None, world.size)
            sums = {path.name: checksum(path) for path in sorted(temporary.iterdir())[mine]}
            sums = sums if alone else world.gather(sums)
        if world.first:
            (temporary / MANIFEST).write_text(json.dumps(sums, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            found = states(folder)
            for old in found[:found.index(final)] + found[found.index(final) + keep:]:
                shutil.rmtree(old)
    except (OSError, CheckpointException) as e:
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the state of step {step} could not be written to {folder}, older ones are "
                      f"kept: {(str(e) or 'no reason').splitlines()[-1]}") from None
    world.wait()


def states(folder):
    """Folders of the states in a folder, the newest first."""
    return sorted(folder.glob("[0-9]*"), reverse=True)


def fault(state):
    """What is wrong with a state on disk, or None."""
    try:
        for name, expected in json.loads((state / MANIFEST).read_text()).items():
            if checksum(state / name) != expected:
                return f"{name} is not what was written"
    except OSError as e:
        return str(e)
    except (ValueError, AttributeError, TypeError) as e:
        return f"{MANIFEST}: {e}"


def newest(folder, world):
    """The newest state that is as it was written, or None where there is none at all.

    The first process looks, and says which ones are passed over. Raises ValueError where all are
    damaged.
    """
    found, faults = states(folder) if world.first else [], []
    for state in found:
        problem = fault(state)
        if problem is None:
            break
        faults.append(problem)
        world.print0(f"{state} is damaged ({problem}): passed over")
    good = found[len(faults):]
    verdict = world.gather({"name": good[0].name if good else None, "fault": faults[:1]}
                           if world.first else {})
    if verdict["name"]:
        return folder / verdict["name"]
    if verdict["fault"]:
        raise ValueError(f"no state in {folder} can be read ({verdict['fault'][0]}); "
                         "train into another --out")


def load(state, tensors):
    """Read a state into {name: tensor}, in place; returns its step. Every process calls it.

    Raises ValueError where names or shapes are others.
    """
    reader = HuggingFaceStorageReader(state)
    try:
        surplus = reader.read_metadata().state_dict_metadata.keys() - tensors.keys()
        if surplus:
            raise ValueError(f"it also holds {min(surplus)}")
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=reader, no_dist=run_alone(tensors))
    except (ValueError, CheckpointException) as e:
        raise ValueError(f"{state} does not fit this run ({str(e).splitlines()[-1]}); "
                         "train into another --out") from None
    return int(state.name)
