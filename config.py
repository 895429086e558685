"""Settings of a model and of a training run, and the recipes that hold their values.

A value stands in one place, `recipes/NAME.toml`, and a flag of the command line goes above it. The
fields below say what a setting means and which values it may have. A recipe has these tables:

    [model]                             a value for every field of MoSConfig
    [train]                             fields of TrainConfig that all stages share
    [vae] [understand] [image] [edit]   the other fields, for each stage that the recipe trains
    [phases.NAME]                       what changes in [model] and [image] with --phase NAME

`train.py` writes the settings that it uses into its --out folder, one file for each stage, in the
same form: such a file is a recipe, too.
"""

import json
import math
import os
import tomllib
from dataclasses import asdict, dataclass, field, fields
from operator import index
from pathlib import Path

import torch

from common import ROOT, replacing
from router import INPUTS

STAGES = ("vae", "understand", "image", "edit")
GENERATING = ("image", "edit")  # stages of router and generation tower
DEFAULT_OUT = "runs/mos"
TOWERS = ("understanding", "generation")
SCHEDULES = ("uniform", "linear-quadratic")


def setting(text, low=-math.inf, high=math.inf, choices=None, change=False):
    """Return a field with its help text and the values that it may have.

    low, high: range of a number. choices: allowed texts. change: a resumed run may change it.
    """
    return field(metadata=dict(help=text, low=low, high=high, choices=choices, change=change))


@dataclass(kw_only=True)
class Settings:
    """Base of both configurations. Raises ValueError for a value of the wrong type or range."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is tuple and isinstance(value, list):
                value = tuple(value)
            if f.type is float and type(value) is int:
                value = float(value)
            setattr(self, f.name, value)
            check_value(f.name, f, value)


def check_value(name, f, value):
    """Raise ValueError unless a value fits a field in type, range and choices."""
    rule = f.metadata
    if type(value) is not f.type:
        raise ValueError(f"{name} must be of type {f.type.__name__}, got {value!r}")
    if f.type is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if f.type in (int, float) and not rule["low"] <= value <= rule["high"]:
        raise ValueError(f"{name} must lie in [{rule['low']}, {rule['high']}], got {value}")
    values = value if f.type is tuple else [value]
    if rule["choices"] and set(values) - set(rule["choices"]):
        raise ValueError(f"{name} must be one of {', '.join(filter(None, rule['choices']))}, "
                         f"got {' '.join(map(repr, values))}")


@dataclass(kw_only=True)
class MoSConfig(Settings):
    """Everything that decides a model."""
    vae_folder: str = setting("folder of Wan 2.2's VAE, which then decides all other settings of "
                              "the VAE", change=True)
    vae_channels: int = setting("C, latent channels", 1)
    vae_width: int = setting("channels of the encoder's first stage", 1)
    vae_decoder_width: int = setting("channels of the decoder's last stage", 1)
    und_folder: str = setting("folder of a language model in Hugging Face's layout, which is then "
                              "the understanding tower and decides its sizes", change=True)
    und_chat: bool = setting("put prompts into that folder's chat template, as a user's message")
    und_images: bool = setting("the understanding tower also reads pictures")
    und_vocabulary: int = setting("tokens that the tower knows; 0: those of its tokenizer", 0)
    und_width: int = setting("Du, width of the understanding tower", 1)
    und_depth: int = setting("M, blocks of the understanding tower", 1)
    und_heads: int = setting("attention heads of the understanding tower", 1)
    und_kv_heads: int = setting("key-value heads of the understanding tower", 1)
    und_hidden: int = setting("width of the understanding tower's feed-forward networks", 1)
    und_tied: bool = setting("the understanding tower's output layer is its embedding")
    gen_width: int = setting("Dg, width of the generation tower", 1)
    gen_depth: int = setting("N, blocks of the generation tower", 1)
    gen_heads: int = setting("attention heads of the generation tower", 1)
    gen_kv_heads: int = setting("key-value heads of the generation tower", 1)
    gen_hidden: int = setting("width of the generation tower's feed-forward networks", 1)
    gen_patch: int = setting("side of a visual token in latent pixels", 1)
    registers: int = setting("R, learned tokens in front of the visual ones", 0)
    router_width: int = setting("Dr, width of the router", 1)
    router_heads: int = setting("attention heads of the router", 1)
    router_depth: int = setting("blocks of the router", 1)
    router_inputs: tuple = setting("what the router sees: prompt, and latent and time if wanted",
                                   choices=INPUTS)
    tokenwise: bool = setting("each token has its own routing; otherwise the prompt has one")
    k: int = setting("K, states chosen for each token and block", 1)
    epsilon: float = setting("share of random choices in training", 0, 1)
    renormalize: bool = setting("let the chosen weights sum to 1")
    state_norm: str = setting("pre: normalise each state before mixing; post: do not",
                              choices=("pre", "post"))
    edit_inputs: tuple = setting("the towers that see the picture that is edited", choices=TOWERS)
    max_tokens: int = setting("longest text in tokens, <bos> and <eos> included", 1)
    size: int = setting("side of the training pictures in pixels", 1)
    t_sampling: str = setting("distribution of training times",
                              choices=("logit-normal", "mode"))
    shift: float = setting("moves training times and the uniform schedule towards noise", 1e-9)
    sampling_steps: int = setting("denoising steps", 1)
    guidance: float = setting("guidance scale of pictures from text")
    edit_guidance: float = setting("guidance scale of edits, towards the instruction")
    rescale: float = setting("guidance rescale", 0, 1)
    image_guidance: float = setting("guidance scale of an edit's picture; 1: none")
    schedule: str = setting("sampling schedule", choices=SCHEDULES)

    def __post_init__(self):
        super().__post_init__()
        check_size(self.size)
        if not self.edit_inputs:
            raise ValueError(f"edit_inputs must be one or both of {', '.join(TOWERS)}, got none")
        if "prompt" not in self.router_inputs:
            raise ValueError("router_inputs must hold prompt, got "
                             f"{' '.join(self.router_inputs) or 'none'}")
        if self.k > self.und_depth:
            raise ValueError(f"k={self.k} states cannot be chosen from und_depth={self.und_depth} "
                             f"layers; expected 1 <= k <= {self.und_depth}")


@dataclass(kw_only=True)
class TrainConfig(Settings):
    """How one stage is trained."""
    stage: str = setting("what to train; empty: every stage of the recipe, one after the other",
                         choices=("", *STAGES))
    recipe: str = setting("a name in recipes/, or the path of a .toml file, whose values are shown "
                          "here")
    phase: str = setting("the paper's phase of stage image, where the recipe has phases")
    out: str = setting("folder for the model, checkpoints, settings, log and pictures")
    init: str = setting("folder whose weights the first stage starts from: what earlier stages, or "
                        "the phase before, have trained; empty: --out", change=True)
    data: str = setting("shapes, a folder of pictures with captions, or tar shards as a folder or "
                        "a pattern; several by weight: a=0.7,b=0.3; stage edit: shapes or one "
                        "folder with edits")
    where: str = setting("use only own pictures whose fields fulfil this: 'aesthetic >= 6'")
    max_broken: float = setting("largest share of own pictures that cannot be used", 0, 1)
    holdout: float = setting("share of own pictures that is held back from training, for "
                             "validation", 0, 0.5)
    sizes: tuple = setting("own pictures are drawn at about these sizes, each at the largest that "
                           "its area has; empty: the model's size")
    length_step: int = setting("pad prompts to multiples of this, and batch those of one length; "
                               "0: to the longest, one shape for the compiler", 0)
    latents: str = setting("stage image: encode all pictures at the start and keep the latents in "
                           "memory (memory), encode in each step (step), or once, into this folder")
    states: str = setting("stage image: the prompts' states come from the tower in each step "
                          "(step), from a second process that works ahead (producer), or are made "
                          "once, into this folder")
    tower_device: str = setting("where a producer's tower works; empty: beside training",
                                change=True)
    tasks: tuple = setting("train on these tasks of the small world only; empty: all")
    grid: int = setting("objects of the small world stand on multiples of 1/grid", 4)
    scenes: int = setting("scenes of the small world in stages image and edit", 0)
    seed: int = setting("seed of first weights, data order and noise")
    steps: int = setting("optimizer steps", 1, change=True)
    batch: int = setting("global batch size", 1, change=True)
    micro_batch: int = setting("largest batch for one process; the rest is accumulated", 1,
                               change=True)
    lr: float = setting("peak learning rate", 0, change=True)
    final_lr: float = setting("last learning rate, as a share of the peak", 0, 1, change=True)
    warmup: int = setting("steps of linear warm-up", 0, change=True)
    weight_decay: float = setting("AdamW's; not on norms, biases, registers, embeddings", 0,
                                  change=True)
    clip: float = setting("largest gradient norm", 1e-9, change=True)
    ema: float = setting("decay of the averaged weights, which are what is saved; 0: no average",
                         0, 1, change=True)
    prompt_dropout: float = setting("share of empty prompts, for guidance", 0, 1, change=True)
    kl_weight: float = setting("weight of the VAE's KL term", 0, change=True)
    parallel: str = setting("how processes share the work; empty: ddp if there are several",
                            choices=("", "none", "ddp", "fsdp", "hsdp"), change=True)
    shards: int = setting("processes that share one copy of the model under hsdp; 0: a node's", 0,
                          change=True)
    recompute: bool = setting("activation checkpointing of the generation tower's blocks",
                              change=True)
    compile: bool = setting("use torch.compile", change=True)
    workers: int = setting("data processes", 0, change=True)
    log_every: int = setting("steps between rows of the log", 1, change=True)
    eval_every: int = setting("steps between validations with pictures and scores", 1, change=True)
    eval_prompts: int = setting("prompts of each task in a validation", 1, change=True)
    save_every: int = setting("steps between checkpoints, from which --resume goes on", 1,
                              change=True)
    keep: int = setting("checkpoints kept", 1, change=True)
    patience: int = setting("seconds after which a process that does not answer is given up", 1,
                            change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.stage in GENERATING and self.scenes < 1:
            raise ValueError(f"scenes must be at least 1 in stage {self.stage}, got {self.scenes}")
        try:
            if torch.device(self.tower_device or "cpu").type == "meta":
                raise RuntimeError
        except RuntimeError:  # unknown, or without memory
            raise ValueError("tower_device must be a device such as cuda:1, got "
                             f"{self.tower_device!r}") from None


def check_size(size):
    """Return (height, width) of a size given as side or pair. Raises ValueError for a bad one."""
    try:
        height, width = map(index, size if hasattr(size, "__len__") else (size, size))
    except (TypeError, ValueError):
        raise ValueError("size must be a whole number or a pair of them, (height, width), got "
                         f"{size!r}") from None
    if height % 32 or width % 32 or not 0 < height * width <= 2 ** 24 or height <= 0:
        raise ValueError("size must be a multiple of 32 on each side and at most 4096x4096 in all, "
                         f"got {height}x{width}")
    return height, width


def check_seeds(seed, count):
    """Return `count` seeds: those from a first one on, or those of a list.

    Raises ValueError for anything else, and for a list of another length.
    """
    try:
        seeds = list(map(index, seed if hasattr(seed, "__len__") else range(seed, seed + count)))
    except TypeError:
        raise ValueError("seed must be a whole number, or a list of one for each picture, got "
                         f"{seed!r}") from None
    if len(seeds) != count:
        raise ValueError(f"seed must be a list of {count}, one for each picture, got {len(seeds)}")
    return seeds


def check_sampling(**values):
    """Raise ValueError for settings of `MoS.generate` that its configuration would not allow."""
    rules = {f.name: f for f in fields(MoSConfig)}
    rules["steps"] = rules["sampling_steps"]
    for name, value in values.items():
        value = float(value) if type(value) is int and rules[name].type is float else value
        check_value(name, rules[name], value)


# --- Recipes --------------------------------------------------------------------------------------

def read_recipe(name, phase=""):
    """Return the settings of a recipe, {"model": {...}, "vae": {...}, ...}, complete for a stage.

    name: of a file in recipes/, or the path of a .toml file. phase: changes stage image and the
    model. Raises ValueError that names what is missing, unknown or malformed.
    """
    path = Path(name) if name.endswith(".toml") else ROOT / "recipes" / f"{name}.toml"
    if not path.is_file():
        names = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
        raise ValueError(f"no recipe {name!r}: expected one of {', '.join(names)}, or the path of "
                         "a .toml file")
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not a TOML file: {e}") from None
    phases, shared = tables.pop("phases", {}), tables.pop("train", {})
    if phase and phase not in phases:
        raise ValueError(f"phase must be one of {', '.join(phases) or 'none'} in recipe {name}, "
                         f"got {phase!r}")
    known = {"model": field_names(MoSConfig), **dict.fromkeys(STAGES, field_names(TrainConfig))}
    recipe = {}
    for table, values in tables.items():
        if table not in known:
            raise ValueError(f"{path} has an unknown table [{table}]; expected model, train, "
                             f"phases, {', '.join(STAGES)}")
        if table != "model":
            values = {"stage": table, "recipe": name, "phase": phase, **shared, **values}
        if table in ("model", "image"):
            values |= {key: value for key, value in phases.get(phase, {}).items()
                       if key in known[table]}
        wrong = (values.keys() ^ known[table]) - {"out"}
        if wrong:
            raise ValueError(f"{path}: [{table}] lacks or does not know: "
                             f"{', '.join(sorted(wrong))}")
        recipe[table] = values
    if "model" not in recipe:
        raise ValueError(f"{path} has no table [model]")
    return recipe


def field_names(kind):
    """Return the names of a configuration's settings."""
    return {f.name for f in fields(kind)}


def values_by_stage(recipe):
    """Return {name: text} of a recipe's training settings: one value, or one for each stage."""
    stages = [stage for stage in STAGES if stage in recipe]
    texts = {}
    for name in recipe[stages[0]].keys() - {"stage"}:
        values = [recipe[stage][name] for stage in stages]
        texts[name] = values[0]
        if any(value != values[0] for value in values):
            texts[name] = ", ".join(f"{stage} {value}" for stage, value in zip(stages, values))
    return texts


def write_settings(c, config):
    """Write the settings of a stage into its --out folder, as a recipe of that stage alone."""
    folder = Path(c.out)
    folder.mkdir(parents=True, exist_ok=True)
    training = {name: value for name, value in asdict(c).items() if name not in ("stage", "out")}
    if training["init"] == c.out:
        training["init"] = ""  # the folder may move
    if c.parallel in ("none", "ddp"):
        training["parallel"] = ""  # a resumed run may have another number of processes
    lines = ["# The settings of this run; --resume and --export read them."]
    for table, values in (("model", asdict(config)), (c.stage, training)):
        lines += ["", f"[{table}]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]  # as in TOML
    with replacing(folder / f"{c.stage}.toml") as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")


def write_all_settings(runs, flags):
    """Write the settings of all stages of a `plan`, with the model's as far as they are known."""
    for c, values in runs:
        write_settings(c, MoSConfig(**model_values(values, flags)))


def require(path):
    """Return the path of a file. Raises FileNotFoundError that says how to get a model's folder."""
    folder = path.parent
    if not path.is_file() and (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"no {path.name} in {folder}, whose training was stopped: python "
                                f"train.py --resume --out {folder} goes on, with --export in place "
                                "of --resume it writes the model of the last checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {folder}: expected a folder that "
                                "train.py or save_pretrained wrote; name it by --init in "
                                "training, by --checkpoint in sampling")
    return path


def read_config(folder):
    """Return the MoSConfig of a model's folder. Raises ValueError for anything else in the file."""
    path = require(Path(folder) / "config.json")
    try:
        values = json.loads(path.read_text())
        wrong = values.keys() ^ field_names(MoSConfig)
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path} is not a configuration: {e}") from None
    if wrong:
        raise ValueError(f"{path} has unknown fields, or lacks some: {', '.join(sorted(wrong))}")
    return MoSConfig(**values)


# --- From a command line to the settings of each stage --------------------------------------------

def plan(flags, recipe, resume=False):
    """Return [(TrainConfig, model settings)], one for each stage that a command line asks for.

    flags: {name: value} of the settings that are given. resume: a stage whose settings are kept in
    the --out folder gets those. A part that a published folder holds needs no stage. Raises
    ValueError for a stage that the recipe does not train or that a published folder replaces, and
    for a flag that would change what a resumed run has learned from.
    """
    out = Path(flags.get("out", DEFAULT_OUT))
    model = recipe["model"] | flags
    published = {"vae": model["vae_folder"], "understand": model["und_folder"]}
    kept = [stage for stage in STAGES if resume and (out / f"{stage}.toml").is_file()]
    if flags.get("stage"):
        stages = [flags["stage"]]
        if published.get(flags["stage"]):
            raise ValueError(f"stage {flags['stage']} has nothing to train: that part is the "
                             f"published one in {published[flags['stage']]}")
    elif kept:
        stages = kept
    else:
        stages = [stage for stage in STAGES if stage in recipe and not published.get(stage)]
        if flags.get("data", "shapes") != "shapes" and "edit" in stages:
            stages.remove("edit")  # few data sets hold edits: it must be asked for
    runs = []
    for number, stage in enumerate(stages):
        if number > 0:  # it starts from what the stages before it have trained
            flags = {name: value for name, value in flags.items() if name != "init"}
        if stage not in kept and stage not in recipe:
            raise ValueError(f"unknown stage {stage!r}, expected one of this recipe's: "
                             + ", ".join(name for name in STAGES if name in recipe))
        settings = recipe
        if stage in kept:
            settings = read_recipe(str(out / f"{stage}.toml"))
            settings[stage]["init"] = settings[stage]["init"] or str(out)
            if not torch.distributed.is_torchelastic_launched():  # now one process
                settings[stage] |= {"parallel": "", "shards": 0}
            refuse_changes(flags, settings["model"] | settings[stage], out / f"{stage}.toml")
        training = settings[stage] | {name: value for name, value in flags.items()
                                      if name in settings[stage]}
        if Path(training["init"]).resolve() == out.resolve():
            training["init"] = ""
        training |= {"stage": stage, "out": str(out), "init": training["init"] or str(out)}
        if training["data"] == "shapes" and "where" not in flags:
            training["where"] = ""  # a phase's condition is about own pictures
        runs.append((TrainConfig(**training), settings["model"]))
    return runs


def refuse_changes(flags, kept, path):
    """Raise ValueError for a setting in flags that a resumed run cannot change; kept: its own."""
    for f in (*fields(MoSConfig), *fields(TrainConfig)):
        value = flags.get(f.name, kept.get(f.name))
        value = list(value) if isinstance(value, tuple) else value
        if f.name in kept and value != kept[f.name] and not f.metadata["change"]:
            raise ValueError(f"{f.name} is {kept[f.name]} in {path} and cannot become {value} when "
                             "the run goes on; choose another --out")


def loads_own_weights(c):
    """Return whether a stage goes on from weights of its own part in --init."""
    later_phase = c.phase not in ("", "512")
    return c.stage == "edit" or later_phase or c.stage == "vae" and c.init != c.out


def model_values(values, flags):
    """Return the model's settings: a recipe's, then flags, then what published folders decide.

    The folders get absolute paths, so that the model can be used from any other folder. Raises
    ValueError for a flag that contradicts a folder.
    """
    from pretrained.folders import tower_settings, vae_settings  # which need this module
    values = values | {name: value for name, value in flags.items() if name in values}
    for name, settings in (("und_folder", tower_settings), ("vae_folder", vae_settings)):
        folder = values[name]
        found = settings(folder) if folder else {}
        for key, value in found.items():
            if flags.get(key, value) != value:
                raise ValueError(f"{key} is {value} in {folder} and cannot become {flags[key]}; "
                                 "leave the flag out")
        values |= found
        values[name] = folder and os.path.abspath(folder)
    return values


def model_config(c, values, flags):
    """Return the MoSConfig of a stage: settings of parts that are trained already stay as they are.

    values: the recipe's settings. flags: those that were given. Raises ValueError for a flag that
    contradicts the weights in --init, or a published folder.
    """
    if c.stage == "edit":
        values = asdict(read_config(c.init))
    values = model_values(values, flags)
    trained = []  # beginnings of the names that belong to trained parts
    if c.stage in GENERATING:
        trained = [name for name in ("vae_", "und_") if not values[f"{name}folder"]]
        if loads_own_weights(c):
            trained += ["gen_", "router_", "registers", "tokenwise", "state_norm", "k",
                        "renormalize"]
    elif loads_own_weights(c):
        trained = ["vae_"]
    before = asdict(read_config(c.init)) if trained else {}
    for name in before:
        if name.startswith(tuple(trained)):
            if name in flags and flags[name] != before[name]:
                raise ValueError(f"{name} is {before[name]} in {c.init} and cannot become "
                                 f"{flags[name]} in stage {c.stage}")
            values[name] = before[name]
    return MoSConfig(**values)
