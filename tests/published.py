"""Folders of published models, narrow and random, written with safetensors and json alone."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from vae import VAE

WORDS = "<pad> <bos> <eos> <user> <tower> a red blue circle square above : in detail".split()
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message.role != 'user' %}"
            "{{ raise_exception('no') }}{% endif %}<user>{{ message['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<tower>{% endif %}")
QWEN2 = dict(model_type="qwen2", vocab_size=len(WORDS), hidden_size=40, num_hidden_layers=5,
             num_attention_heads=5, num_key_value_heads=1, intermediate_size=48, rms_norm_eps=1e-6,
             eos_token_id=2)
# SmolLM2-135M's config.json but for its widths and its depth.
SMOLLM2 = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=1,
    eos_token_id=2, hidden_act="silu", hidden_size=72, initializer_range=0.04, intermediate_size=96,
    is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, model_type="llama",
    num_attention_heads=9, num_hidden_layers=4, num_key_value_heads=3, pretraining_tp=1,
    rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
    tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True, vocab_size=len(WORDS))
WAN = dict(_class_name="AutoencoderKLWan", z_dim=6, base_dim=4, decoder_base_dim=4,
           dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True],
           is_residual=True, in_channels=12, out_channels=12, patch_size=2, attn_scales=[],
           latents_mean=[0.1 * i for i in range(6)], latents_std=[1 + 0.1 * i for i in range(6)])


def write_json(folder, name, values):
    """Write a JSON file into a folder."""
    (Path(folder) / name).write_text(json.dumps(values))


def tower_tensors(config, seed=0):
    """Return the random tensors of a Llama, Qwen2 or Qwen3, named as in Hugging Face's layout."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    rows = {"q": head * config["num_attention_heads"], "k": head * config["num_key_value_heads"],
            "v": head * config["num_key_value_heads"]}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width),
              "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{name}.weight"] = (width,)
        for part, count in rows.items():
            shapes[f"{block}self_attn.{part}_proj.weight"] = (count, width)
            if config["model_type"] == "qwen2":
                shapes[f"{block}self_attn.{part}_proj.bias"] = (count,)
            if config["model_type"] == "qwen3" and part != "v":
                shapes[f"{block}self_attn.{part}_norm.weight"] = (head,)
        shapes[f"{block}self_attn.o_proj.weight"] = (width, rows["q"])
        for name in ("gate", "up"):
            shapes[f"{block}mlp.{name}_proj.weight"] = (hidden, width)
        shapes[f"{block}mlp.down_proj.weight"] = (width, hidden)
    generator = torch.Generator().manual_seed(seed)
    return {name: float("norm" in name) + 0.2 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()}


def intern_tensors(vision, out_width, seed=0):
    """Return the random tensors of an InternVL's image encoder, named as in transformers.

    vision: its vision_config. out_width: of the language model.
    """
    width, hidden = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"][0] // vision["patch_size"][0]) ** 2
    shapes = {"vision_tower.embeddings.cls_token": (1, 1, width),
              "vision_tower.embeddings.position_embeddings": (1, 1 + patches, width),
              "vision_tower.embeddings.patch_embeddings.projection.weight": (
                  width, 3, *vision["patch_size"]),
              "vision_tower.embeddings.patch_embeddings.projection.bias": (width,)}
    layers = {"multi_modal_projector.layer_norm": (4 * width,),
              "multi_modal_projector.linear_1": (out_width, 4 * width),
              "multi_modal_projector.linear_2": (out_width, out_width)}
    for i in range(vision["num_hidden_layers"]):
        block = f"vision_tower.encoder.layer.{i}."
        shapes |= {f"{block}lambda_{n}": (width,) for n in (1, 2)}
        layers |= {f"{block}layernorm_{place}": (width,) for place in ("before", "after")}
        layers |= {f"{block}attention.{name}": (width, width)
                   for name in ("q_proj", "k_proj", "v_proj", "projection_layer")}
        layers |= {f"{block}mlp.fc1": (hidden, width), f"{block}mlp.fc2": (width, hidden)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_shards(folder, tensors, shards, name="model"):
    """Write tensors into several numbered files, and the index.json that names them."""
    parts = defaultdict(dict)
    for i, tensor in enumerate(sorted(tensors)):
        file = f"{name}-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        parts[file][tensor] = tensors[tensor]
    for file, part in parts.items():
        save_file(part, folder / file)
    write_json(folder, f"{name}.safetensors.index.json", dict(weight_map={
        tensor: file for file, part in parts.items() for tensor in part}))


def write_tokenizer(folder, marks=(), **config):
    """Write a tokenizer of WORDS that, unlike ours, pads and truncates, and a chat template.

    marks: more special tokens.
    """
    words = [*WORDS, *marks]
    special = [*WORDS[:5], *marks]
    options = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bos = dict(SpecialToken=dict(id="<bos>", type_id=0))
    text = dict(Sequence=dict(id="A", type_id=0))
    write_json(folder, "tokenizer.json", dict(
        version="1.0", pre_tokenizer=dict(type="Whitespace"),
        added_tokens=[dict(id=words.index(word), content=word, **options) for word in special],
        model=dict(type="WordLevel", vocab={word: i for i, word in enumerate(words)},
                   unk_token="<pad>"),
        post_processor=dict(type="TemplateProcessing", single=[bos, text], pair=[bos, text, text],
                            special_tokens={"<bos>": dict(id="<bos>", ids=[1], tokens=["<bos>"])}),
        truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0),
        padding=dict(strategy="BatchLongest", direction="Right", pad_to_multiple_of=None, pad_id=0,
                     pad_type_id=0, pad_token="<pad>")))
    write_json(folder, "tokenizer_config.json", dict(
        chat_template=TEMPLATE, bos_token="<bos>",
        eos_token=dict(__type="AddedToken", content="<eos>", **options)) | config)


def write_tower(folder, config=QWEN2, seed=0, shards=1):
    """Write a random tower with its tokenizer; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tower_tensors(config, seed)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        write_shards(folder, tensors, shards)
    write_json(folder, "config.json", config)
    write_tokenizer(folder)
    return folder


def write_internvl(folder, config):
    """Write a random InternVL with its tokenizer, which marks the places of pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = config["text_config"]
    tensors = {f"language_model.{name}": p for name, p in tower_tensors(text).items()}
    save_file(tensors | intern_tensors(config["vision_config"], text["hidden_size"]),
              folder / "model.safetensors")
    write_json(folder, "config.json", config)
    write_tokenizer(folder, marks=("<img>", "</img>", "<IMG_CONTEXT>"))
    return folder


def make_vae(config=WAN):
    """Return the random VAE that `write_vae` writes, its norms and biases random, too."""
    torch.manual_seed(0)
    vae = VAE(config["z_dim"], config["base_dim"], config["decoder_base_dim"])
    for p in vae.requires_grad_(False).parameters():
        p.add_(0.05 * torch.randn_like(p))
    return vae


def vae_tensors(config=WAN):
    """Return the tensors of `make_vae` as diffusers names and shapes them: as those of a video's.

    The frames before the last, and convolutions over time, are there, and random.
    """
    tensors = {"encoder.down_blocks.1.downsampler.time_conv.weight": torch.randn(8, 8, 3, 1, 1)}
    for name, p in make_vae(config).named_parameters():
        if "attentions" not in name and "resample." not in name:
            if p.ndim == 4:
                frames = p.shape[-1]  # a kernel is as long in time as it is wide
                before = torch.randn(*p.shape[:2], frames - 1, *p.shape[2:])
                p = torch.cat((before, p[:, :, None]), 2)
            elif p.ndim == 3:  # a norm's
                p = p[..., None]
        tensors[name] = p.contiguous()
    return tensors


def write_vae(folder, config=WAN):
    """Write a random VAE in diffusers' layout; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae_tensors(config), folder / "diffusion_pytorch_model.safetensors")
    write_json(folder, "config.json", config)
    return folder
