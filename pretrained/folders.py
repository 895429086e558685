"""Load published models: towers and tokenizers in Hugging Face's layout, Wan's VAE in diffusers'.

A folder's config.json says what to build, and its safetensors files hold the weights (no other
format is read). They are mapped into memory and copied into the model one tensor at a time.
"""

import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import lru_cache, partial, wraps
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import copy_tensors, describe_damage, open_tensors
from common import checksum
from pretrained.encoders import build_encoder, is_vision_tensor, text_config
from towers import Tokenizer, Understanding
from vae import VAE


def read_json(folder, name="config.json"):
    """Return what a JSON file of a folder holds. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}: --und-folder and --vae-folder name models "
                                f"in Hugging Face's and diffusers' layout{hint(Path(folder))}")
    try:
        return json.loads(path.read_text("utf-8-sig"))  # some editors put a mark in front
    except ValueError as e:
        raise ValueError(describe_damage(path, e, "copy it again")) from None


def hint(folder):
    """Return the end of a sentence that says where the model of a folder may be, or ""."""
    if (folder / "adapter_config.json").is_file():
        return "; this is a LoRA adapter: merge it into its model first"
    inner = [path.parent.name for path in sorted(folder.glob("*/config.json"))][:5]
    return f"; it may be in one of its folders {', '.join(inner)}" if inner else ""


def one_line_errors(function):
    """Make a missing value of a folder's files, or one of a wrong type, an error of one line."""
    @wraps(function)
    def call(folder, *arguments):
        try:
            return function(folder, *arguments)
        except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as e:
            raise ValueError(f"{folder} holds no model as it is published (missing or wrong in its "
                             f"JSON files: {e!r}); download it again") from None
    return call


def weight_files(folder):
    """Return the paths of the safetensors files that hold a folder's model.

    These are the files of its index.json. Where it has none: the one file of the usual name, or the
    numbered shards, or else all files. Raises FileNotFoundError for a folder without weights and
    for a shard that is missing, ValueError for a damaged index.json.
    """
    paths = sorted(path for path in Path(folder).glob("*.safetensors") if path.name[0] != ".")
    for name in ("model", "diffusion_pytorch_model"):
        index = Path(folder) / f"{name}.safetensors.index.json"
        if index.is_file():
            return indexed_files(folder, index.name)
        plain = index.with_name(f"{name}.safetensors")
        if plain in paths:
            return [plain, *find_copies(plain, paths)]  # copies are refused by `copy_tensors`
        if shards := [path for path in paths if path.match(f"{name}-*-of-*")]:
            count = int(shards[0].stem.rpartition("-")[2])
            if len(shards) != count:
                raise FileNotFoundError(f"{folder} holds {len(shards)} of the {count} files {name}-"
                                        f"...-of-{count:05d}.safetensors; download it again")
            return shards
    if not paths:
        raise FileNotFoundError(f"no safetensors files in {folder}; convert its weights to them")
    return paths


@one_line_errors
def indexed_files(folder, name):
    """Return the paths of the files that an index.json names."""
    holds = {}
    for tensor, file in read_json(folder, name)["weight_map"].items():
        holds.setdefault(file, []).append(tensor)
    for file, tensors in holds.items():
        if not (Path(folder) / file).is_file():
            raise FileNotFoundError(f"no {file} in {folder}: by {name} it holds {min(tensors)} and "
                                    f"{len(tensors) - 1} other tensors; download it again")
    return [Path(folder) / file for file in sorted(holds)]


def find_copies(plain, paths):
    """Return the other files that also hold a tensor of the plain one: which is right is unknown.

    Variants, such as model.fp16.safetensors, are left out, and so are files with other tensors
    only, such as adapters.
    """
    copies = []
    for path in paths:
        if path != plain and path.name.count(".") == 1:
            try:
                with safe_open(path, "pt") as other, safe_open(plain, "pt") as ours:
                    if set(other.keys()) & set(ours.keys()):
                        copies.append(path)
            except SafetensorError:
                pass  # `copy_tensors` says so if it is the plain one
    return copies


@lru_cache
def checksum_as_of(path, changed):
    """Return the checksum of a file, which is read again only if its time of change is another."""
    return checksum(path)


def digest(folder, settings):
    """Return a SHA-256 in hex of all that a published model computes with.

    settings: what its config.json says, as `describe_tower` or `describe_vae` returns it. The
    weight files are read in full, several at a time.
    """
    paths = weight_files(folder)
    with ThreadPoolExecutor() as threads:
        sums = list(threads.map(checksum_as_of, paths, [path.stat().st_mtime_ns for path in paths]))
    return hashlib.sha256(json.dumps([settings, sums], sort_keys=True).encode()).hexdigest()


# --- Understanding towers -------------------------------------------------------------------------

FAMILIES = {"llama": {}, "qwen2": dict(bias=True), "qwen3": dict(qk_norm=True)}
# What transformers takes for a value that a config.json leaves out.
SIZES = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-6)
QWEN_SIZES = SIZES | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
                          max_position_embeddings=32768)
DEFAULTS = {"llama": SIZES | dict(vocab_size=32000, intermediate_size=11008,
                                  max_position_embeddings=2048),
            "qwen2": QWEN_SIZES, "qwen3": QWEN_SIZES | dict(head_dim=128)}

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
    if name.endswith("rotary_emb.inv_freq"):  # follow from the configuration
        return None
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
        # NOTE (ours): "dynamic" changes nothing up to the length of training; no text is longer.
        f"rope_type {rope_type!r}": rope_type not in ("default", "dynamic", "llama3"),
        "a quantization_config": c.get("quantization_config"),
        "another activation than silu": c.get("hidden_act", "silu") != "silu",
        "a sliding window": c.get("use_sliding_window"),
        "biases in its feed-forward networks": c.get("mlp_bias"),
        "a bias in its output": c.get("attention_bias") and family != "qwen2"}
    for difference, exists in differences.items():
        if exists:
            raise ValueError(f"{Path(folder) / 'config.json'} has {difference}; expected one of "
                             f"{', '.join(FAMILIES)} as they are published, in BF16, F16 or F32")


@one_line_errors
def describe_tower(folder):
    """Return what decides a folder's tower: values of its config.json, by their names there.

    Raises FileNotFoundError, or ValueError for a model that is not supported.
    """
    config = read_json(folder)
    c = text_config(config)
    rope = {"rope_theta": c.get("rope_theta", 1e4),
            **(c.get("rope_parameters") or c.get("rope_scaling") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    check_supported(folder, config | c, rope["rope_type"])
    c = DEFAULTS[c["model_type"]] | c
    if c.get("num_key_value_heads") is None:
        c["num_key_value_heads"] = c["num_attention_heads"]
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings")
    return {**{name: c[name] for name in names}, "rope": rope, "head_dim": c.get("head_dim"),
            "tied": bool(config.get("tie_word_embeddings", c.get("tie_word_embeddings"))),
            "vision_config": config.get("vision_config")}


def tower_settings(folder):
    """Return the settings of a MoSConfig that a folder's tower decides."""
    c = describe_tower(folder)
    settings = dict(und_vocabulary=c["vocab_size"], und_width=c["hidden_size"],
                    und_depth=c["num_hidden_layers"], und_heads=c["num_attention_heads"],
                    und_kv_heads=c["num_key_value_heads"], und_hidden=c["intermediate_size"],
                    und_tied=c["tied"])
    return settings if c["vision_config"] else settings | dict(und_images=False)


@one_line_errors
def build_tower(folder, images=True):
    """Return the tower that a folder describes, on the default device, without its weights.

    images: whether to include its image encoder, if it has one. Raises FileNotFoundError, or
    ValueError for a model that is not supported.
    """
    c = describe_tower(folder)
    config = read_json(folder)
    try:
        vision = build_encoder({**config, "text_config": c}) if images else None
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    rope = c["rope"]
    names = [name for file in open_tensors(weight_files(folder)).values() for name in file.keys()]
    if not c["tied"] and not any(name.endswith("lm_head.weight") for name in names):
        c["tied"] = None  # it can read, which is all that MoS needs
    return Understanding(
        vocabulary=c["vocab_size"], width=c["hidden_size"], depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"],
        hidden=c["intermediate_size"], head_width=c["head_dim"], vision=vision,
        image_token=find_image_token(folder, config) if vision else None, tied=c["tied"],
        theta=rope["rope_theta"],
        rope_scaling=llama3_scaling(**rope) if rope["rope_type"] == "llama3" else None,
        longest=c["max_position_embeddings"] if rope["rope_type"] == "dynamic" else None,
        eps=c["rms_norm_eps"], **FAMILIES[c["model_type"]])


# InternVL's and PLM's placeholders for image tokens, and the texts before and after a picture's.
IMAGE_TOKENS = {"<IMG_CONTEXT>": ("<img>", "</img>\n"), "<|image|>": ("", "")}


def find_image_token(folder, config):
    """Return the id of the placeholder for image tokens. Raises ValueError where there is none."""
    if "image_token_id" in config:
        return config["image_token_id"]
    tokens = read_json(folder, "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    for text in IMAGE_TOKENS:
        if text in ids:
            return ids[text]
    raise ValueError(f"{folder} names no placeholder for image tokens: expected image_token_id in "
                     f"its config.json, or {' or '.join(IMAGE_TOKENS)} in its tokenizer.json")


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
FIXED_DATE = date(2024, 7, 26)  # see `make_sandbox`


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
        content = read_json(folder, "tokenizer.json")
        try:
            self.library = Library.from_str(json.dumps(content))
        except Exception as e:  # the library has no exception of its own
            raise ValueError(f"{folder}/tokenizer.json is no tokenizer ({e})") from None
        self.library.no_padding()
        self.library.no_truncation()
        self.folder = folder
        self.chat = chat
        self.template = read_template(folder) if chat else None
        self.stops = read_stops(folder)

    def __reduce__(self):
        """Read the folder anew in another process: a template cannot be sent there."""
        return FolderTokenizer, (self.folder, self.chat)

    def __len__(self):
        """Return how many rows an embedding must have: ids may have gaps."""
        return max(self.library.get_vocab().values()) + 1

    def encode(self, text, image_tokens=0, **options):
        """Return the token ids of a text, at least one, after placeholders for image tokens.

        options: variables of the chat template. Raises ValueError where there are no placeholders.
        """
        if image_tokens:
            text = self.image_text(image_tokens) + text
        if self.template:  # it adds the tokenizer's special tokens itself
            text = self.template(text, **options)
            return self.library.encode(text, add_special_tokens=False).ids
        # NOTE (ours): Qwen has no <bos>, so its empty prompt is the token that ends texts.
        return self.library.encode(text).ids or [self.stops[0]]

    def image_text(self, count):
        """Return the text that stands for a picture of `count` image tokens."""
        for placeholder, (before, after) in IMAGE_TOKENS.items():
            if self.library.token_to_id(placeholder) is not None:
                return before + placeholder * count + after
        raise ValueError(f"the tokenizer of {self.folder} has no placeholder for image tokens: "
                         f"expected {' or '.join(IMAGE_TOKENS)}")

    def request(self, prompt):
        return self.encode(REQUEST + prompt, enable_thinking=False), ""

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
    source = find_template(folder)
    special_tokens = read_special_tokens(folder)
    try:
        template = make_sandbox().from_string(source)
    except Exception as e:  # a template is a program of its own
        raise ValueError(f"the chat template of {folder} is damaged: {e}") from None

    def render(text, **options):
        try:
            return template.render(messages=[dict(role="user", content=text)], tools=None,
                                   documents=None, add_generation_prompt=True, **special_tokens,
                                   **options)
        except Exception as e:
            raise ValueError(f"the chat template of {folder} cannot be filled ({e}); leave out "
                             "--und-chat") from None
    return render


def make_sandbox():
    """Return the environment in which chat templates run, as in transformers.

    NOTE (ours): a template that asks for today's date gets a fixed one, that of Llama 3.2's own
    template, so that a prompt has the same states every day.
    """
    import jinja2.ext  # it comes with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        """Templates call this for messages that they do not allow."""
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):
        """Jinja's own filter would sort keys, and change characters of HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the model's answers for training; here it changes nothing."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": FIXED_DATE.strftime}
    return sandbox


def find_template(folder):
    """Return the text of a folder's chat template, that named "default" where it has several.

    Raises ValueError where there is none.
    """
    path = Path(folder) / "chat_template.jinja"
    if path.is_file():
        source = path.read_text("utf-8-sig")
    else:
        source = read_json(folder, "tokenizer_config.json").get("chat_template")
        if source is None and path.with_suffix(".json").is_file():
            source = read_json(folder, "chat_template.json").get("chat_template")
    if isinstance(source, list):
        source = {named["name"]: named["template"] for named in source}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template; leave out --und-chat")
    return source


def read_special_tokens(folder):
    """Return the texts of a folder's special tokens by name, as transformers finds them."""
    tokens = read_json(folder, "tokenizer_config.json")
    older = Path(folder) / "special_tokens_map.json"
    if "added_tokens_decoder" not in tokens and older.is_file():
        tokens |= read_json(folder, older.name)
    texts = {}
    for name, value in tokens.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            texts[name] = value
    return texts


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

# What diffusers takes for a value that a config.json leaves out.
VAE_DEFAULTS = dict(z_dim=16, base_dim=96, decoder_base_dim=None, dim_mult=[1, 2, 4, 4],
                    num_res_blocks=2, temperal_downsample=[False, True, True])
WAN_22 = dict(is_residual=True, patch_size=2, attn_scales=[], in_channels=12, out_channels=12,
              _class_name="AutoencoderKLWan", quantization_config=None)


@one_line_errors
def describe_vae(folder):
    """Return what decides a folder's VAE: values of its config.json, by their names there.

    Raises FileNotFoundError, or ValueError for anything but Wan 2.2's.
    """
    c = VAE_DEFAULTS | dict(is_residual=False, patch_size=None) | read_json(folder)
    for name, value in WAN_22.items():
        if c.get(name, value) != value:
            raise ValueError(f"{folder} is not Wan 2.2's VAE: its config.json has {name} "
                             f"{c[name]!r}; expected {value!r}")
    c["decoder_base_dim"] = c["decoder_base_dim"] or c["base_dim"]
    statistics = {name: c.get(name, []) for name in ("latents_mean", "latents_std")}
    if any(len(values) != c["z_dim"] for values in statistics.values()) \
            or min(statistics["latents_std"]) <= 0:
        raise ValueError(f"{folder}/config.json must have {c['z_dim']} numbers each in "
                         "latents_mean and latents_std, the latter above 0")
    return {**{name: c[name] for name in VAE_DEFAULTS}, **statistics}


def vae_settings(folder):
    """Return the settings of a MoSConfig that a folder's VAE decides."""
    c = describe_vae(folder)
    return dict(vae_channels=c["z_dim"], vae_width=c["base_dim"],
                vae_decoder_width=c["decoder_base_dim"])


@one_line_errors
def build_vae(folder):
    """Return Wan 2.2's VAE as a folder describes it, without weights. Raises ValueError."""
    c = describe_vae(folder)
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
    c = describe_vae(folder)
    vae.set_statistics(torch.tensor(c["latents_mean"], dtype=torch.float64),
                       torch.tensor(c["latents_std"], dtype=torch.float64))


def load_vae(folder, device="cpu", dtype=torch.float32):
    """Return the VAE of an `AutoencoderKLWan` folder, frozen."""
    with torch.device("meta"):
        vae = build_vae(folder)
    vae = vae.to_empty(device=device).to(dtype, memory_format=torch.channels_last)
    load_vae_weights(folder, vae)
    return vae.requires_grad_(False).eval()
