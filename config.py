"""The configuration of a model: its settings, what they may be, and the presets."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from common import setting
from router import INPUTS

SCHEDULES = ("uniform", "linear-quadratic")
TOWERS = ("understanding", "generation")


@dataclass
class MoSConfig:
    """Everything that decides the model; the defaults are the `tiny` preset.

    Raises ValueError for a value of the wrong type or out of range.
    """
    vae_folder: str = setting("", "folder of Wan 2.2's VAE, which then decides its widths")
    vae_channels: int = setting(32, "C, latent channels")
    vae_width: int = setting(20, "channels of the encoder's first stage")
    vae_decoder_width: int = setting(24, "channels of the decoder's last stage")
    und_folder: str = setting("", "folder of a language model in Hugging Face's layout, which is "
                                  "then the understanding tower")
    und_chat: bool = setting(False, "prompts are a user's message in that folder's chat template")
    und_images: bool = setting(True, "the tower reads pictures, too")
    und_vocabulary: int = setting(0, "tokens it knows; 0: those of its tokenizer")
    und_width: int = setting(160, "Du, width of the understanding tower")
    und_depth: int = setting(8, "M, its blocks")
    und_heads: int = setting(5, "its heads")
    und_kv_heads: int = setting(1, "its key-value heads")
    und_hidden: int = setting(384, "width of its feed-forward networks")
    und_tied: bool = setting(False, "its output layer is the embedding")
    gen_width: int = setting(256, "Dg, width of the generation tower")
    gen_depth: int = setting(10, "N, its blocks")
    gen_heads: int = setting(8, "its heads")
    gen_kv_heads: int = setting(4, "its key-value heads")
    gen_hidden: int = setting(608, "width of its feed-forward networks")
    gen_patch: int = setting(1, "side of a visual token in latent pixels")
    registers: int = setting(4, "R, learned tokens in front of the visual ones")
    router_width: int = setting(128, "Dr, width of the router")
    router_heads: int = setting(4, "its heads")
    router_depth: int = setting(2, "its blocks")
    router_inputs: tuple = setting(INPUTS, "what it sees: prompt, and latent and time if wanted")
    tokenwise: bool = setting(True, "each token has its own routing, instead of the prompt one")
    k: int = setting(2, "K, states chosen for each token and block")
    epsilon: float = setting(0.05, "share of random choices in training")
    renormalize: bool = setting(False, "let the chosen weights sum to 1")
    state_norm: str = setting("post", "pre: normalise each state before mixing; post: do not")
    edit_inputs: tuple = setting(TOWERS, "the towers that see the picture that is edited")
    max_tokens: int = setting(80, "longest text in tokens, <bos> and <eos> included")
    size: int = setting(128, "side of the training pictures in pixels")
    t_sampling: str = setting("mode", "training times: logit-normal or mode")
    shift: float = setting(3.0, "moves training times and the uniform schedule towards noise")
    sampling_steps: int = setting(50, "denoising steps")
    guidance: float = setting(3.0, "guidance scale of pictures from text")
    edit_guidance: float = setting(1.5, "guidance scale of edits, towards the instruction")
    rescale: float = setting(0.7, "guidance rescale")
    image_guidance: float = setting(1.0, "guidance scale of an edit's picture; 1: none")
    schedule: str = setting("uniform", "sampling schedule: uniform or linear-quadratic")

    def __post_init__(self):
        for name in ("router_inputs", "edit_inputs"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        for f in fields(self):
            value, kinds = getattr(self, f.name), (int, float) if f.type is float else f.type
            if not isinstance(value, kinds) or isinstance(value, bool) != (f.type is bool):
                raise ValueError(f"{f.name} must be of type {f.type.__name__}, got {value!r}")
            if f.type is int and f.name not in ("k", "registers", "und_vocabulary") and value < 1:
                raise ValueError(f"{f.name} must be at least 1, got {value}")
        check_size(self.size)
        check_sampling(self.sampling_steps, self.rescale, self.schedule, guidance=self.guidance,
                       edit_guidance=self.edit_guidance, image_guidance=self.image_guidance)
        if not self.edit_inputs or set(self.edit_inputs) - set(TOWERS):
            raise ValueError(f"edit_inputs must be one or both of {', '.join(TOWERS)}, got "
                             f"{' '.join(map(str, self.edit_inputs)) or 'none'}")
        if self.registers < 0:
            raise ValueError(f"registers must not be negative, got {self.registers}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive, got {self.shift}")
        for name, allowed in (("state_norm", ("pre", "post")),
                              ("t_sampling", ("logit-normal", "mode"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, "
                                 f"got {getattr(self, name)!r}")
        if not 1 <= self.k <= self.und_depth:
            raise ValueError(f"k={self.k} states cannot be chosen from und_depth={self.und_depth} "
                             f"layers; expected 1 <= k <= {self.und_depth}")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon must lie in [0, 1], got {self.epsilon}")


# The paper's sizes share Wan 2.2's VAE, the first training phase, and more. Folders are where we
# look for published weights: give others by flag. NOTE (ours): the states of large models grow by
# layer, so they are normalised before they are mixed: better for small ones that were made to grow.
SHARED = dict(vae_folder="parts/Wan2.2-TI2V-5B-Diffusers/vae", vae_channels=48, vae_width=160,
              vae_decoder_width=256, und_images=False, und_kv_heads=8, gen_hidden=8192,
              gen_kv_heads=8, gen_patch=2, state_norm="pre", max_tokens=128, size=512,
              t_sampling="logit-normal", shift=1.0, guidance=5.0, edit_guidance=5.0)
PRESETS = {
    "tiny": {},
    "laptop": dict(gen_width=192, gen_depth=6, gen_heads=6, gen_kv_heads=3, gen_hidden=512,
                   gen_patch=2, router_width=64, router_heads=2),
    # NOTE (ours): inferred. Understanding towers: Llama-3.2-3B, PLM-8B, InternVL3-14B.
    "ablation_1b": dict(SHARED, und_folder="parts/Llama-3.2-3B", und_vocabulary=128_256,
                        und_width=3072, und_depth=28, und_heads=24, und_hidden=8192, und_tied=True,
                        gen_width=2048, gen_depth=16, gen_heads=32, router_width=1024,
                        router_heads=8),
    "mos_s": dict(SHARED, und_folder="parts/Perception-LM-8B", und_vocabulary=128_256,
                  und_width=4096, und_depth=32, und_heads=32, und_hidden=14336,
                  gen_width=3072, gen_depth=28, gen_heads=24, router_width=2048, router_heads=16),
    "mos_l": dict(SHARED, und_folder="parts/InternVL3-14B", und_vocabulary=151_674,
                  und_width=5120, und_depth=48, und_heads=40, und_hidden=13824,
                  gen_width=3584, gen_depth=36, gen_heads=28, gen_kv_heads=7, gen_hidden=9728,
                  router_width=2048, router_heads=16),
}


def check_size(size):
    """(height, width) of a size given as side or pair; both must be positive multiples of 32."""
    height, width = (size, size) if isinstance(size, int) else size
    if height % 32 or width % 32 or not 0 < height * width <= 2 ** 24 or height <= 0:
        raise ValueError("size must be a multiple of 32 on each side and at most 4096x4096 in all, "
                         f"got {height}x{width}")
    return height, width


def check_sampling(steps, rescale, schedule, **scales):
    """Raise ValueError for settings that cannot give a picture. scales: of any guidance."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1, got {steps}")
    for name, scale in scales.items():
        if not math.isfinite(scale):
            raise ValueError(f"{name} must be a finite number, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}")


def require(path):
    """The path, or FileNotFoundError that says how to get a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: expected a folder that "
                                "train.py or save_pretrained wrote")
    return path


def read_config(folder):
    """The MoSConfig of a folder. Raises ValueError for broken JSON or unknown fields."""
    path = require(Path(folder) / "config.json")
    try:
        values = json.loads(path.read_text())
        unknown = values.keys() - {f.name for f in fields(MoSConfig)}
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path} is not a configuration: {e}") from None
    if unknown:
        raise ValueError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
    return MoSConfig(**values)
