"""Image encoders of understanding towers: pictures (B, 3, H, W) in [-1, 1] to tokens (B, P, Du).

    P image tokens    h, w rows and columns of patches    Dv width of a vision transformer
    L its tokens: a class token, if it has one, and h*w patches, row by row
    n rows and columns of patches in the pictures that it was trained with

The vision transformers of PLM and InternVL with their projectors.
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_parameter, initialise
from kernels import apply_rope, at_least_fp32, attention


class EncoderBlock(nn.Module):
    """Pre-norm attention of all tokens to all, then a GELU network, both behind a LayerScale."""

    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def forward(self, x, rope=None):
        """x: (B, L, Dv), rope: cos and sin (L, Dh/2) for the channel pairs (2i, 2i + 1), or none.

        Returns x's successor.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, H, Dh)
        q, k, v = qkv.unbind(2)                                           # (B, L, H, Dh) each
        if rope:
            # Even channels first, so that pairs are those of `apply_rope`: q k' stays as it is.
            q, k = (apply_rope(a.unflatten(-1, (-1, 2)).mT.flatten(-2), rope)
                    for a in (q, k))                                      # (B, L, H, Dh) each
        x = x + self.scale1 * self.out(attention(q, k, v))                # (B, L, Dv)
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """What PLM's and InternVL's encoders share; each adds its norm, its projector and its names.

    width: Dv, image: side in pixels of the pictures that it learnt from, patch: side of a patch,
    cls: it has a class token, bias: its first layer has one, eps: of the blocks' norms.
    """

    def __init__(self, width, depth, heads, hidden, image, patch, cls, bias, eps):
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"the vision transformer's width {width} must be a multiple of four "
                             f"times its {heads} heads")
        self.patch, self.side = patch, image // patch
        self.patches = nn.Conv2d(3, width, patch, patch, bias=bias)
        self.cls = nn.Parameter(torch.empty(1, 1, width)) if cls else None
        self.positions = nn.Parameter(torch.empty(1, cls + self.side ** 2, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden, eps) for _ in range(depth))

    def init_parameter(self, name, p):
        """Give the parameter of this name its first values; LayerScale's are those of both."""
        if "scale" in name:
            p.fill_(0.1)
        elif name.endswith("bias"):
            p.zero_()
        else:
            init_parameter(name, p, len(self.blocks))

    def fit(self, images):
        """Pictures (B, 3, H, W) as tiles of the size that the encoder knows, and tokens of each.

        NOTE (ours): squashed where they are oblong; the published models cut them into tiles.
        """
        side = self.side * self.patch
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return images, (self.side // 2) ** 2

    def embed(self, images, mode):
        """Patches with their absolute positions behind the class token (B, L, Dv), and h and w.

        mode: how positions are interpolated for another grid. Raises ValueError where a side is no
        multiple of two patches, for 2x2 of them make an image token.
        """
        height, width = images.shape[2:]
        if height % (2 * self.patch) or width % (2 * self.patch):
            raise ValueError(f"pictures for this encoder must be a multiple of {2 * self.patch} "
                             f"pixels on each side, got {height}x{width}")
        x = self.patches(images.type_as(self.patches.weight))             # (B, Dv, h, w)
        h, w = x.shape[2:]
        x = x.flatten(2).mT                                               # (B, h*w, Dv)
        if self.cls is not None:
            x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1)        # (B, 1+h*w, Dv)
        n = self.side
        grid = self.positions[:, -n * n:].mT.unflatten(2, (n, n))         # (1, Dv, n, n)
        grid = F.interpolate(grid, (h, w), mode=mode).flatten(2).mT       # (1, h*w, Dv)
        return x + torch.cat((self.positions[:, :-n * n], grid), 1), h, w  # (B, L, Dv)

    def own_name(self, name):
        """Our name for a tensor of a Hugging Face folder, or None if it is not this encoder's.

        A pair (name, i) stands for rows of ours: the i-th of three equal parts. Raises KeyError for
        a tensor that should be this encoder's and is not.
        """
        path, kind = re.fullmatch(r"(?:model\.)?(.+?)(\.weight|\.bias|)", name).groups()
        if not path.startswith(PREFIXES):
            return None
        part = None
        if block := re.fullmatch(self.BLOCK, path):
            own, part = IN_BLOCK[block[2]]
            own = f"blocks.{block[1]}.{own}{kind}"
        else:
            own = self.NAMES[path] + kind
        if own not in dict(self.named_parameters()):
            raise KeyError(name)
        return own if part is None else (own, part)


class PerceptionEncoder(VisionTransformer):
    """PE-Lang with PLM's projector (Bolya et al. 2025, Cho et al. 2025), a token for 28x28 pixels.

    width, depth, heads, hidden, cls, image, patch: see VisionTransformer, out_width: Du.
    """

    BLOCK = r"vision_tower\.timm_model\.blocks\.(\d+)\.(.+)"
    NAMES = {"vision_tower.timm_model.cls_token": "cls",
             "vision_tower.timm_model.pos_embed": "positions",
             "vision_tower.timm_model.patch_embed.proj": "patches",
             "vision_tower.timm_model.norm_pre": "norm",
             "multi_modal_projector.linear_1": "projector.0",
             "multi_modal_projector.linear_2": "projector.2"}

    def __init__(self, width, depth, heads, hidden, out_width, cls, image=448, patch=14):
        super().__init__(width, depth, heads, hidden, image, patch, cls, bias=False, eps=1e-5)
        self.norm = nn.LayerNorm(width, 1e-5)
        self.projector = nn.Sequential(nn.Linear(width, out_width), nn.GELU(),
                                       nn.Linear(out_width, out_width))
        initialise(self)

    def rope(self, h, w, like):
        """cos and sin (L, Dh/2): half of a head's pairs turn by the column, the others by the row.

        A class token stands at (0, 0), and the patches behind it begin at (1, 1). NOTE (ours): in
        other grids positions count patches as Meta's code does; timm's stretches them to the
        grid of training. PLM itself only ever shows it tiles of that.
        """
        first = self.cls is not None
        dtype = torch.promote_types(like.dtype, torch.float32)
        rows, columns = (torch.arange(n, device=like.device) + first for n in (h, w))
        places = torch.cartesian_prod(rows, columns).flip(1)              # (h*w, 2)
        places = F.pad(places, (0, 0, int(first), 0))                     # (L, 2)
        half = like.shape[-1] // self.blocks[0].heads // 2
        index = torch.arange(0, half, 2, device=like.device, dtype=dtype)
        angles = places[:, :, None] * 1e4 ** (-index / half)              # (L, 2, Dh/4)
        return angles.flatten(1).cos(), angles.flatten(1).sin()           # (L, Dh/2) each

    def forward(self, images):
        """Tokens (B, P, Du) of pictures (B, 3, H, W).

        PLM's mean and deviation of pictures in [0, 1] are 0.5: [-1, 1], which they are in already.
        """
        x, h, w = self.embed(images, "bilinear")                          # (B, L, Dv)
        x, rope = self.norm(x), self.rope(h, w, x)
        for block in self.blocks:
            x = block(x, rope)
        x = self.projector(x[:, -h * w:])                                 # (B, h*w, Du)
        x = F.avg_pool2d(x.mT.unflatten(2, (h, w)), 2)                    # (B, Du, h/2, w/2)
        return x.flatten(2).mT                                            # (B, P, Du)


class InternVision(VisionTransformer):
    """InternViT with the projector `mlp1` of InternVL (Chen et al. 2024): a token for 28x28 pixels.

    width, depth, heads, hidden, image, patch: see VisionTransformer, out_width: Du.
    """

    MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in [0, 1]
    BLOCK = r"(?:vision_tower\.encoder\.layer|vision_model\.encoder\.layers)\.(\d+)\.(.+)"
    NAMES = {"vision_tower.embeddings.cls_token": "cls",
             "vision_model.embeddings.class_embedding": "cls",
             "vision_tower.embeddings.position_embeddings": "positions",
             "vision_model.embeddings.position_embedding": "positions",
             "vision_tower.embeddings.patch_embeddings.projection": "patches",
             "vision_model.embeddings.patch_embedding": "patches",
             "multi_modal_projector.layer_norm": "norm", "mlp1.0": "norm",
             "multi_modal_projector.linear_1": "projector.0", "mlp1.1": "projector.0",
             "multi_modal_projector.linear_2": "projector.2", "mlp1.3": "projector.2"}

    def __init__(self, width, depth, heads, hidden, out_width, image=448, patch=14):
        super().__init__(width, depth, heads, hidden, image, patch, cls=True, bias=True, eps=1e-6)
        self.norm = nn.LayerNorm(4 * width, 1e-5)
        self.projector = nn.Sequential(nn.Linear(4 * width, out_width), nn.GELU(),
                                       nn.Linear(out_width, out_width))
        initialise(self)

    def forward(self, images):
        """Tokens (B, P, Du) of pictures (B, 3, H, W) in [-1, 1]."""
        images = torch.stack([(c / 2 + 0.5 - mean) / deviation for c, mean, deviation in zip(
            at_least_fp32(images).unbind(1), self.MEAN, self.DEVIATION)], 1)       # (B, 3, H, W)
        x, h, w = self.embed(images, "bicubic")                           # (B, L, Dv)
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:].unflatten(1, (h // 2, 2, w // 2, 2))                 # (B, h/2, 2, w/2, 2, Dv)
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)                    # (B, P, 4*Dv)
        return self.projector(self.norm(x))                               # (B, P, Du)


# ------------------------------------------------------------------------------------------------
# Encoders of folders in Hugging Face's layout, as transformers (with timm) or OpenGVLab spell them

PREFIXES = ("vision_tower.", "vision_model.", "multi_modal_projector.", "mlp1.")
IN_BLOCK = {"norm1": ("norm1", None), "norm2": ("norm2", None),
            "layernorm_before": ("norm1", None), "layernorm_after": ("norm2", None),
            "attn.qkv": ("qkv", None), "attention.q_proj": ("qkv", 0),
            "attention.k_proj": ("qkv", 1), "attention.v_proj": ("qkv", 2),
            "attn.proj": ("out", None), "attention.projection_layer": ("out", None),
            "mlp.fc1": ("up", None), "mlp.fc2": ("down", None),
            "ls1": ("scale1", None), "lambda_1": ("scale1", None), "gamma_1": ("scale1", None),
            "ls2": ("scale2", None), "lambda_2": ("scale2", None), "gamma_2": ("scale2", None)}
PERCEPTION = {  # timm's sizes of its Perception Encoders, in timm's words
    "large": dict(embed_dim=1024, depth=23, num_heads=16, mlp_ratio=4, class_token=True),
    "gigantic": dict(embed_dim=1536, depth=47, num_heads=16, mlp_ratio=8960 / 1536,
                     class_token=False)}


def expect(values, **wanted):
    """Raise ValueError where a value of a config.json is given and is not what is wanted."""
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise ValueError(f"config.json has {key} {values[key]!r}; expected {value!r}, as "
                             "PLM's and InternVL's encoders are published")


def side(size):
    """The side of a square that a config.json gives as a number or as a pair."""
    return size if isinstance(size, int) else size[0]


def read_vision(config):
    """The encoder for a folder's parsed config.json, untrained; None where there is none.

    It is made on the default device. Raises ValueError for what neither PLM nor InternVL has.
    """
    vision = config.get("vision_config")
    if vision is None:
        return None
    out_width = (config.get("text_config") or config.get("llm_config") or config)["hidden_size"]
    name = vision.get("architecture") or vision.get("model_type")
    if name in ("internvl_vision", "intern_vit_6b"):
        return read_intern(config, vision, out_width)
    # PLM's published folders name a core encoder, and change it into a language encoder.
    if match := re.match(r"vit_pe_(core|lang)_(large|gigantic)_patch14_", str(name)):
        return read_perception(config, vision, out_width, *match.groups())
    raise ValueError(f"config.json has the vision model {name!r}; expected PLM's (vit_pe_lang_...) "
                     "or InternVL's (internvl_vision, intern_vit_6b)")


def read_perception(config, vision, out_width, kind, size):
    """PLM's encoder, from its size and the changes in `model_args`."""
    c = dict(img_size=448, patch_size=14, use_post_transformer_norm=kind == "core",
             **PERCEPTION[size]) | (vision.get("model_args") or {})
    expect(c, use_post_transformer_norm=False)
    expect(config, projector_pooling_ratio=2, vision_use_cls_token=c["class_token"])
    return PerceptionEncoder(c["embed_dim"], c["depth"], c["num_heads"],
                             int(c["embed_dim"] * c["mlp_ratio"]), out_width, c["class_token"],
                             side(c["img_size"]), side(c["patch_size"]))


def read_intern(config, vision, out_width):
    """InternVL's encoder; that of the largest models, InternViT-6B, is another one."""
    expect(vision, norm_type="layer_norm", layer_norm_eps=1e-6, hidden_act="gelu", qkv_bias=True,
           attention_bias=True, qk_normalization=False, use_qk_norm=False, use_mean_pooling=True)
    expect(config, downsample_ratio=0.5, ps_version="v2", select_layer=-1, vision_feature_layer=-1)
    return InternVision(vision["hidden_size"], vision["num_hidden_layers"],
                        vision["num_attention_heads"], vision["intermediate_size"], out_width,
                        side(vision["image_size"]), side(vision["patch_size"]))
