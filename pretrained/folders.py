"""Models from other people's folders: towers in Hugging Face's layout, Wan's VAE in diffusers'.

A folder's config.json says what to build; its safetensors files (nothing else is read) are mapped
into memory and copied a tensor at a time, straight to where the model lies: no process ever holds a
model twice. A tensor that is missing or unknown is named before anything is copied.
"""

import json
import math
import re
from contextlib import ExitStack
from functools import wraps
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import assign
from pretrained.encoders import read_vision
from towers import Tokenizer, Understanding
from vae import VAE


def as_tuple(own):
    """What `own_name` says, as (name,) or (name, part)."""
    return own if isinstance(own, tuple) else (own,)


@torch.no_grad()
def copy_tensors(targets, paths, own_name=lambda name: name, adapt=lambda own, values: values):
    """Fill `targets`, {name: tensor}, from safetensors files.

    own_name: a file's name of a tensor to ours; to (ours, i), where it is the i-th of several that
    lie under each other in ours; or to None: not wanted. KeyError: unknown. adapt: what to make of
    the values. Raises ValueError for damaged files, and for what is missing, unknown or misshaped.
    """
    found = {}
    with ExitStack() as opened:
        for path in paths:
            try:
                file = opened.enter_context(safe_open(path, "pt"))
            except SafetensorError as e:
                raise ValueError(f"{path} is damaged ({e}); copy or train it again") from None
            for name in file.keys():
                try:
                    own = own_name(name)
                except KeyError:
                    own = name
                own, *part = as_tuple(own)
                if own is None:
                    continue
                if own not in targets:
                    raise ValueError(f"{path}: tensor {name} is not part of this model")
                if tuple(part) in found.setdefault(own, {}):
                    raise ValueError(f"{path}: tensor {name} is in "
                                     f"{found[own][tuple(part)][0].name}, too; keep one of them")
                found[own][tuple(part)] = path, file, name
        for own in sorted(targets.keys() - found.keys()):
            raise ValueError(f"{paths[0] if len(paths) == 1 else paths[0].parent}: tensor {own} is "
                             "missing")
        for own, target in targets.items():
            parts = [found[own][i] for i in sorted(found[own])]
            values = [adapt(own, file.get_tensor(name)) for _, file, name in parts]
            shape = (sum(len(v) for v in values), *values[0].shape[1:]) if len(values) > 1 else \
                values[0].shape
            if shape != target.shape or len({v.shape[1:] for v in values}) > 1:
                several = ", ".join(name for *_, name in parts) + (
                    " has" if len(parts) == 1 else " have together")
                raise ValueError(f"{parts[0][0]}: tensor {several} shape {tuple(shape)}, "
                                 f"config.json asks for {tuple(target.shape)}")
            assign(target, torch.cat(values) if len(values) > 1 else values[0])


def read_json(folder, name="config.json"):
    """What a JSON file of a folder holds. Raises FileNotFoundError, or ValueError if it is none."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}: expected a model's folder in Hugging "
                                "Face's or diffusers' layout; give it by --und-folder or "
                                "--vae-folder")
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; copy it again")
    return found


def reads(function):
    """What a folder's files lack, or have of the wrong kind, becomes an error of one line."""
    @wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as e:
            folder = next(a for a in arguments if isinstance(a, (str, Path)))
            raise ValueError(f"{folder} holds no model as it is published ({type(e).__name__}: {e})"
                             ) from None
    return call


def weights_of(folder):
    """The safetensors files of a folder. Raises FileNotFoundError where there are none."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no safetensors files in {folder}; convert its weights, other "
                                "formats are not read")
    return paths


# ------------------------------------------------------------------------------------------------
# Understanding towers

FAMILIES = {"llama": {}, "qwen2": dict(bias=True), "qwen3": dict(qk_norm=True)}
PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # of the tower's tensors
VISION = ("vision_model.", "vision_tower.", "model.vision_tower.", "mlp1.",
          "multi_modal_projector.", "model.multi_modal_projector.")
NAMES = {"embed_tokens": "embedding", "norm": "norm", "input_layernorm": "norm1",
         "post_attention_layernorm": "norm2", "self_attn.o_proj": "out",
         "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm", "mlp.down_proj": "ffn.down"}
PACKED = {"self_attn.q_proj": ("qkv", 0), "self_attn.k_proj": ("qkv", 1),
          "self_attn.v_proj": ("qkv", 2), "mlp.gate_proj": ("ffn.gate_up", 0),
          "mlp.up_proj": ("ffn.gate_up", 1)}  # parts of one matrix of ours, in this order


def slow_down(factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, **_):
    """Llama 3's change of rotary frequencies: the slow ones are divided by the factor.

    Those that turn more than high_freq_factor times in the original length stay, those that turn
    less than low_freq_factor times are divided, those between partly so.
    """
    def slow(rate):
        turns = original_max_position_embeddings * rate / (2 * math.pi)
        stay = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        return rate * (stay + (1 - stay) / factor)
    return slow


@reads
def read_tower(folder, images=True):
    """The tower of a folder on the current default device, its values still undefined.

    images: whether its vision encoder, if it has one, is a part of it. Raises FileNotFoundError, or
    ValueError for what this decoder is not.
    """
    whole = read_json(folder)
    c = whole.get("text_config") or whole.get("llm_config") or whole
    family, rope = c.get("model_type"), c.get("rope_parameters") or {
        "rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    for wrong, what in ((family not in FAMILIES, f"model_type {family!r}"),
                        # NOTE (ours): dynamic changes nothing up to the length of training.
                        (kind not in ("default", "dynamic", "llama3"), f"rope_type {kind!r}"),
                        (c.get("hidden_act", "silu") != "silu", "another activation than silu"),
                        (c.get("use_sliding_window"), "a sliding window"),
                        (c.get("mlp_bias"), "biases in its feed-forward networks"),
                        (family != "qwen2" and c.get("attention_bias"), "a bias in its output")):
        if wrong:
            raise ValueError(f"{Path(folder) / 'config.json'} has {what}; expected one of "
                             f"{', '.join(FAMILIES)} as they are published")
    vision = read_vision(whole) if images else None
    return Understanding(
        vocabulary=c["vocab_size"], width=c["hidden_size"], depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"],
        hidden=c["intermediate_size"], head_width=c.get("head_dim"), vision=vision,
        image_token=image_token(folder, whole) if vision else None,
        tied=bool(whole.get("tie_word_embeddings", c.get("tie_word_embeddings"))),
        theta=rope["rope_theta"], slow=slow_down(**rope) if kind == "llama3" else None,
        eps=c["rms_norm_eps"], **FAMILIES[family])


IMAGE_TOKENS = {"<IMG_CONTEXT>": ("<img>", "</img>\n"), "<|image|>": ("", "")}  # and around them


def image_token(folder, config):
    """The id of the token whose places a picture's tokens take; None: the folder has none."""
    if "image_token_id" in config:
        return config["image_token_id"]
    known = {t["content"]: t["id"] for t in read_json(folder, "tokenizer.json")["added_tokens"]}
    return next((known[text] for text in IMAGE_TOKENS if text in known), None)


def fill_tower(tower, folder):
    """Give a tower that `read_tower` built the values of its folder."""
    def own_name(name):
        if name.startswith(VISION):
            own, *part = as_tuple(tower.vision and tower.vision.own_name(name))
            own = own and f"vision.{own}"
        elif name.endswith("lm_head.weight"):
            own, part = tower.head and "head.weight", ()
        else:
            prefix = next((p for p in PREFIXES if name.startswith(p)), "")
            path, _, kind = name.removeprefix(prefix).rpartition(".")
            block = re.match(r"layers\.(\d+)\.", path)
            path, before = (path[block.end():], f"blocks.{block[1]}.") if block else (path, "")
            own, *part = as_tuple(PACKED.get(path) or NAMES[path])
            own = f"{before}{own}.{kind}"
        return (own, *part) if part else own
    copy_tensors(dict(tower.named_parameters()), weights_of(folder), own_name)


def load_tower(folder, device="cpu", dtype=torch.bfloat16, images=True):
    """The understanding tower of a folder in Hugging Face's layout, frozen."""
    with torch.device("meta"):
        tower = read_tower(folder, images)
    fill_tower(tower.to(dtype).to_empty(device=device), folder)
    return tower.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------
# Their words

REQUEST = ("Write a caption of the picture that the following text asks for. Think about what it "
           "must show, then name every object with its number, colour, material and place, the "
           "background, light and style, in one paragraph and nothing else.\n\nText: ")


class FolderTokenizer(Tokenizer):
    """The tokenizer.json of a folder. chat: texts are a user's message in the folder's template.

    Raises FileNotFoundError for a file, and ValueError for a package that is missing.
    """

    def __init__(self, folder, chat=False):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(f"to read the words of {folder}, the package tokenizers is needed: "
                             "pip install tokenizers") from None
        read_json(folder, "tokenizer.json")
        try:
            self.library = Library.from_file(str(Path(folder) / "tokenizer.json"))
        except Exception as e:  # the library has no kind of its own
            raise ValueError(f"{folder}/tokenizer.json is no tokenizer ({e}); copy it again"
                             ) from None
        self.library.no_padding()
        self.library.no_truncation()
        self.template = Template(folder) if chat else None
        self.stops = self.read_stops(Path(folder))

    @staticmethod
    @reads
    def read_stops(folder):
        """The ids of the tokens that end a text."""
        c = read_json(folder)
        places = [c.get("text_config") or c.get("llm_config") or c, c]
        if (folder / "generation_config.json").is_file():
            places.insert(0, read_json(folder, "generation_config.json"))
        ends = next((place["eos_token_id"] for place in places
                     if place.get("eos_token_id") not in (None, [])), None)
        if ends is None:
            raise ValueError(f"{folder} names no eos_token_id in its config.json or "
                             "generation_config.json")
        return tuple(ends if isinstance(ends, list) else [ends])

    def __len__(self):
        return self.library.get_vocab_size()

    def encode(self, text, image_tokens=0):
        """Token ids of a text, behind the places of a picture's tokens. Never none at all."""
        if image_tokens:
            mark = next(mark for mark in IMAGE_TOKENS if self.library.token_to_id(mark) is not None)
            before, behind = IMAGE_TOKENS[mark]
            text = before + mark * image_tokens + behind + text
        if self.template:  # which has <bos> where there is one
            return self.library.encode(self.template(text), add_special_tokens=False).ids
        # NOTE (ours): Qwen's has no <bos>: its empty prompt is the token that ends texts.
        return self.library.encode(text).ids or [self.stops[0]]

    def request(self, prompt):
        return self.encode(REQUEST + prompt), ""

    def decode(self, ids):
        return self.library.decode(list(ids)).strip()


class Template:
    """The chat template of a folder: from a user's message to the text that the tower reads."""

    def __init__(self, folder):
        from jinja2 import TemplateError  # jinja2 comes with torch
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        path = Path(folder) / "chat_template.jinja"
        config = read_json(folder, "tokenizer_config.json")
        source = path.read_text() if path.is_file() else config.get("chat_template")
        if not isinstance(source, str):
            raise ValueError(f"{folder} has no chat template; leave out --und-chat")
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[loopcontrols])
        try:
            self.template = sandbox.from_string(source, dict(raise_exception=self.refuse))
        except TemplateError as e:
            raise ValueError(f"the chat template of {folder} is damaged: {e}") from None
        self.marks = {name: value["content"] if isinstance(value, dict) else value
                      for name, value in config.items() if name.endswith("_token")}

    @staticmethod
    def refuse(message):
        """What a template calls for messages that it does not allow."""
        raise ValueError(f"the chat template refuses the prompt: {message}")

    def __call__(self, text):
        from jinja2 import TemplateError
        try:
            return self.template.render(messages=[dict(role="user", content=text)],
                                        add_generation_prompt=True, **self.marks)
        except TemplateError as e:
            raise ValueError(f"the chat template cannot be filled ({e}); leave out --und-chat"
                             ) from None


# ------------------------------------------------------------------------------------------------
# Wan 2.2's VAE

ORIGINAL = (  # the names of Wan's own files, as patterns, and diffusers' names, which are ours
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.(\d)\.downsamples\.\d\.(resample|time_conv)\b",
     r".down_blocks.\1.downsampler.\2"),
    (r"\.upsamples\.(\d)\.upsamples\.\d\.(resample|time_conv)\b", r".up_blocks.\1.upsampler.\2"),
    (r"\.downsamples\.(\d)\.downsamples\.(\d)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.upsamples\.(\d)\.upsamples\.(\d)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.residual\.0\.", ".norm1."), (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."), (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."))


@reads
def read_vae(folder):
    """The VAE of a folder on the current default device, its values still undefined.

    Raises FileNotFoundError, or ValueError for another VAE.
    """
    c = read_json(folder)
    if not c.get("is_residual") or c.get("patch_size") != 2 or c.get("attn_scales"):
        raise ValueError(f"{folder} is not Wan 2.2's VAE: expected is_residual, patch_size 2 and "
                         "no attn_scales in its config.json")
    return VAE(c["z_dim"], c["base_dim"], c["decoder_base_dim"], tuple(c["dim_mult"]),
               tuple(c["temperal_downsample"]), c["num_res_blocks"])


@reads
def fill_vae(vae, folder):
    """Give a VAE that `read_vae` built the values of its folder, as the network one image sees.

    Its causal 3-D convolutions see two frames of zeros before the image, so their last temporal
    tap is all of them that counts; convolutions over time are left out. Names may be diffusers' or
    Wan's own.
    """
    def own_name(name):
        for pattern, ours in ORIGINAL:
            name = re.sub(pattern, ours, name)
        return None if "time_conv" in name else name

    def last_tap(own, values):  # time is the third axis, and in norms the last
        if "gamma" in own:
            return values[..., 0] if values.ndim > 3 else values
        return values[:, :, -1] if values.ndim > 4 else values
    copy_tensors(dict(vae.named_parameters()), weights_of(folder), own_name, last_tap)
    c = read_json(folder)
    statistics = [torch.tensor(c[f"latents_{name}"], dtype=torch.float64)
                  for name in ("mean", "std")]
    if any(values.shape != vae.latents_mean.shape[:1] for values in statistics):
        raise ValueError(f"{folder}/config.json must have {len(vae.latents_mean)} numbers each in "
                         "latents_mean and latents_std")
    vae.set_statistics(*statistics)


def load_wan(folder, device="cpu", dtype=torch.float32):
    """The VAE of an `AutoencoderKLWan` folder, frozen."""
    with torch.device("meta"):
        vae = read_vae(folder)
    fill_vae(vae.to_empty(device=device).to(dtype, memory_format=torch.channels_last), folder)
    return vae.requires_grad_(False).eval()
