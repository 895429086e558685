"""Load published models: towers in Hugging Face's layout, Wan's VAE in diffusers'.

A folder's config.json says what to build, and its safetensors files hold the weights (no other
format is read). They are mapped into memory and copied into the model one tensor at a time.
"""

import json
import math
import re
from functools import partial, wraps
from pathlib import Path

import torch

from checkpoint import copy_tensors
from pretrained.encoders import build_encoder, is_vision_tensor, text_config
from towers import Tokenizer, Understanding
from vae import VAE


def read_json(folder, name="config.json"):
    """Return what a JSON file of a folder holds. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}: give a model in Hugging Face's or "
                                "diffusers' layout")
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); copy it again") from None


def one_line_errors(function):
    """Make a missing value of a folder's files, or one of a wrong type, an error of one line."""
    @wraps(function)
    def call(folder, *arguments):
        try:
            return function(folder, *arguments)
        except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as e:
            raise ValueError(f"{folder} holds no model as it is published ({e!r})") from None
    return call


def weight_files(folder):
    """Return the paths of a folder's safetensors files. Raises FileNotFoundError without any."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no safetensors files in {folder}; convert its weights")
    return paths


# --- Understanding towers -------------------------------------------------------------------------

FAMILIES = {"llama": {}, "qwen2": dict(bias=True), "qwen3": dict(qk_norm=True)}

# A tensor's name: a prefix, the block (if it is in one), the module, and weight or bias.
TOWER_TENSOR = re.compile(r"(?:language_model\.model\.|model\.language_model\.|model\.)?"
                          r"(?:layers\.(\d+)\.)?(.+)\.(\w+)")
# Their modules, and ours. Where several are one of ours, a number gives their order in it.
TOWER_MODULES = {
    "embed_tokens": ("embedding", 0), "norm": ("norm", 0),
    "input_layernorm": ("norm1", 0), "post_attention_layernorm": ("norm2", 0),
    "self_attn.q_proj": ("qkv", 0), "self_attn.k_proj": ("qkv", 1), "self_attn.v_proj": ("qkv", 2),
    "self_attn.q_norm": ("q_norm", 0), "self_attn.k_norm": ("k_norm", 0),
    "self_attn.o_proj": ("out", 0), "mlp.gate_proj": ("ffn.gate_up", 0),
    "mlp.up_proj": ("ffn.gate_up", 1), "mlp.down_proj": ("ffn.down", 0)}


def our_tower_name(tower, name):
    """Return our name of a tensor of a tower's folder and its part, or None: see `copy_tensors`."""
    if is_vision_tensor(name):
        if not tower.vision:
            return None
        ours, part = tower.vision.our_name(name)
        return f"vision.{ours}", part
    if name.endswith("lm_head.weight"):
        return ("head.weight", 0) if tower.head else None
    match = TOWER_TENSOR.fullmatch(name)
    if not match:
        raise KeyError(name)
    block, module, kind = match.groups()
    ours, part = TOWER_MODULES[module]
    return f"blocks.{block}.{ours}.{kind}" if block else f"{ours}.{kind}", part


def llama3_scaling(factor, low_freq_factor, high_freq_factor, original_max_position_embeddings,
                   **_):
    """Return Llama 3's change of rotary frequencies: low ones are divided by the factor.

    Frequencies with more than high_freq_factor turns within the original length stay, those with
    fewer than low_freq_factor are divided, and those between them are interpolated.
    """
    def scale(rate):
        turns = original_max_position_embeddings * rate / (2 * math.pi)
        kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        return rate * (kept + (1 - kept) / factor)
    return scale


def check_supported(folder, c, rope_type):
    """Raise ValueError where a tower's configuration asks for more than `Understanding` offers."""
    family = c.get("model_type")
    differences = {
        f"model_type {family!r}": family not in FAMILIES,
        # NOTE (ours): "dynamic" is accepted, as it changes nothing up to the length of training.
        f"rope_type {rope_type!r}": rope_type not in ("default", "dynamic", "llama3"),
        "another activation than silu": c.get("hidden_act", "silu") != "silu",
        "a sliding window": c.get("use_sliding_window"),
        "biases in its feed-forward networks": c.get("mlp_bias"),
        "a bias in its output": c.get("attention_bias") and family != "qwen2"}
    for difference, exists in differences.items():
        if exists:
            raise ValueError(f"{Path(folder) / 'config.json'} has {difference}; expected one of "
                             f"{', '.join(FAMILIES)} as they are published")


@one_line_errors
def build_tower(folder, images=True):
    """Return the tower that a folder describes, on the default device, without its weights.

    images: whether to include its image encoder, if it has one. Raises FileNotFoundError, or
    ValueError for a model that is not supported.
    """
    config = read_json(folder)
    c = text_config(config)
    rope = c.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    check_supported(folder, c, rope_type)
    vision = build_encoder(config) if images else None
    return Understanding(
        vocabulary=c["vocab_size"], width=c["hidden_size"], depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"],
        hidden=c["intermediate_size"], head_width=c.get("head_dim"), vision=vision,
        image_token=find_image_token(folder, config) if vision else None,
        tied=bool(config.get("tie_word_embeddings", c.get("tie_word_embeddings"))),
        theta=rope["rope_theta"],
        rope_scaling=llama3_scaling(**rope) if rope_type == "llama3" else None,
        eps=c["rms_norm_eps"], **FAMILIES[c["model_type"]])


# InternVL's and PLM's placeholders for image tokens, and the texts before and after a picture's.
IMAGE_TOKENS = {"<IMG_CONTEXT>": ("<img>", "</img>\n"), "<|image|>": ("", "")}


def find_image_token(folder, config):
    """Return the id of the placeholder for image tokens, or None where the folder has none."""
    if "image_token_id" in config:
        return config["image_token_id"]
    tokens = read_json(folder, "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    return next((ids[text] for text in IMAGE_TOKENS if text in ids), None)


def load_tower_weights(folder, tower):
    """Copy a folder's weights into the tower that `build_tower` made for it."""
    copy_tensors(dict(tower.named_parameters()), weight_files(folder),
                 partial(our_tower_name, tower))


def load_tower(folder, device="cpu", dtype=torch.bfloat16):
    """Return the understanding tower of a folder in Hugging Face's layout, frozen."""
    with torch.device("meta"):
        tower = build_tower(folder)
    load_tower_weights(folder, tower.to(dtype).to_empty(device=device))
    return tower.requires_grad_(False).eval()


# --- Tokenizers -----------------------------------------------------------------------------------

REQUEST = ("Write a caption of the picture that the following text asks for. Think about what it "
           "must show, then name every object with its number, colour, material and place, the "
           "background, light and style, in one paragraph and nothing else.\n\nText: ")


class FolderTokenizer(Tokenizer):
    """The tokenizer of a folder, from its tokenizer.json. Raises FileNotFoundError or ValueError.

    chat: put every text into the folder's chat template, as a message of the user.
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
        except Exception as e:  # the library has no exception of its own
            raise ValueError(f"{folder}/tokenizer.json is no tokenizer ({e})") from None
        self.library.no_padding()
        self.library.no_truncation()
        self.template = read_template(folder) if chat else None
        self.stops = read_stops(folder)

    def __len__(self):
        return self.library.get_vocab_size()

    def encode(self, text, image_tokens=0):
        """Return the token ids of a text, at least one, after placeholders for image tokens."""
        if image_tokens:
            placeholder = next(token for token in IMAGE_TOKENS
                               if self.library.token_to_id(token) is not None)
            before, after = IMAGE_TOKENS[placeholder]
            text = before + placeholder * image_tokens + after + text
        if self.template:  # it adds the tokenizer's special tokens itself
            return self.library.encode(self.template(text), add_special_tokens=False).ids
        # NOTE (ours): Qwen has no <bos>, so its empty prompt is the token that ends texts.
        return self.library.encode(text).ids or [self.stops[0]]

    def request(self, prompt):
        return self.encode(REQUEST + prompt), ""

    def decode(self, ids):
        return self.library.decode(list(ids)).strip()


@one_line_errors
def read_stops(folder):
    """Return the ids of the tokens that end a text. Raises ValueError where none is named."""
    config = read_json(folder)
    sources = [text_config(config), config]
    if (Path(folder) / "generation_config.json").is_file():
        sources.insert(0, read_json(folder, "generation_config.json"))
    for source in sources:
        stops = source.get("eos_token_id")
        if stops not in (None, []):
            return tuple(stops if isinstance(stops, list) else [stops])
    raise ValueError(f"{folder} names no eos_token_id in its config.json or generation_config.json")


@one_line_errors
def read_template(folder):
    """Return the function that puts a user's message into the chat template of a folder."""
    from jinja2 import TemplateError  # jinja2 comes with torch
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    config = read_json(folder, "tokenizer_config.json")
    path = Path(folder) / "chat_template.jinja"
    source = path.read_text() if path.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template; leave out --und-chat")
    special_tokens = {}
    for name, value in config.items():
        if name.endswith("_token"):
            special_tokens[name] = value["content"] if isinstance(value, dict) else value

    def raise_exception(message):
        """Templates call this for messages that they do not allow."""
        raise TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[loopcontrols])
    try:
        template = sandbox.from_string(source, dict(raise_exception=raise_exception))
    except TemplateError as e:
        raise ValueError(f"the chat template of {folder} is damaged: {e}") from None

    def render(text):
        try:
            return template.render(messages=[dict(role="user", content=text)],
                                   add_generation_prompt=True, **special_tokens)
        except TemplateError as e:
            raise ValueError(f"the chat template of {folder} cannot be filled ({e}); leave out "
                             "--und-chat") from None
    return render


# --- Wan 2.2's VAE --------------------------------------------------------------------------------

# Patterns of names in Wan's own files, and diffusers' names in their place, which are also ours.
WAN_NAMES = (
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)samples\.(\d)\.\1samples\.\d\.(resample|time_conv)\b",
     r".\1_blocks.\2.\1sampler.\3"),
    (r"\.(down|up)samples\.(\d)\.\1samples\.(\d)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.residual\.0\.", ".norm1."), (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."), (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."))


@one_line_errors
def build_vae(folder):
    """Return Wan 2.2's VAE as a folder describes it, without weights. Raises ValueError."""
    c = read_json(folder)
    if not c.get("is_residual") or c.get("patch_size") != 2 or c.get("attn_scales"):
        raise ValueError(f"{folder} is not Wan 2.2's VAE: expected is_residual, patch_size 2 and "
                         "no attn_scales in its config.json")
    return VAE(latent_channels=c["z_dim"], width=c["base_dim"], decoder_width=c["decoder_base_dim"],
               multipliers=tuple(c["dim_mult"]), temporal=tuple(c["temperal_downsample"]),
               blocks=c["num_res_blocks"])


def our_vae_name(name):
    """Return our name of a tensor of a VAE's folder and part 0, or None: see `copy_tensors`."""
    for pattern, ours in WAN_NAMES:
        name = re.sub(pattern, ours, name)
    return None if "time_conv" in name else (name, 0)  # one image needs no convolution over time


def last_frame(name, values):
    """Return the weights for one image: the last temporal slice of a kernel, see `vae.py`."""
    if "gamma" in name:  # a norm's weight, in which time is the last axis
        return values[..., 0] if values.ndim > 3 else values
    return values[:, :, -1] if values.ndim > 4 else values


@one_line_errors
def load_vae_weights(folder, vae):
    """Copy a folder's weights and latent statistics into the VAE that `build_vae` made for it."""
    copy_tensors(dict(vae.named_parameters()), weight_files(folder), our_vae_name, last_frame)
    c = read_json(folder)
    channels = len(vae.latents_mean)
    if not len(c["latents_mean"]) == len(c["latents_std"]) == channels:
        raise ValueError(f"{folder}/config.json must have {channels} numbers each in latents_mean "
                         "and latents_std")
    vae.set_statistics(torch.tensor(c["latents_mean"], dtype=torch.float64),
                       torch.tensor(c["latents_std"], dtype=torch.float64))


def load_vae(folder, device="cpu", dtype=torch.float32):
    """Return the VAE of an `AutoencoderKLWan` folder, frozen."""
    with torch.device("meta"):
        vae = build_vae(folder)
    vae = vae.to_empty(device=device).to(dtype, memory_format=torch.channels_last)
    load_vae_weights(folder, vae)
    return vae.requires_grad_(False).eval()
