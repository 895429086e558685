"""The image encoders of PLM and InternVL: vision transformers with their projectors.

They turn pictures (B, 3, H, W) in [-1, 1] into image tokens (B, P, Du) for an understanding tower.

    P image tokens    h, w rows and columns of patches    Dv width of a vision transformer
    L its tokens: a class token, if it has one, then h*w patches, row by row
    n rows and columns of patches in training
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_parameter, initialise
from kernels import apply_rope, at_least_fp32, attention, rope_table


class EncoderBlock(nn.Module):
    """Pre-norm bidirectional attention, then a GELU network, each scaled by a LayerScale."""

    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.scale1 = nn.Parameter(torch.empty(width))
        self.scale2 = nn.Parameter(torch.empty(width))

    def forward(self, x, rope=None):
        """Apply the block to x (B, L, Dv).

        rope: cos and sin (L, Dh/2) that rotate the channel pairs (2i, 2i + 1); None: no rotation.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, H, Dh)
        q, k, v = qkv.unbind(2)                                           # (B, L, H, Dh) each
        if rope:
            # `apply_rope` pairs channel i with i + Dh/2: move even channels before odd ones. Both
            # queries and keys are reordered, so that their products stay the same.
            q = apply_rope(q.unflatten(-1, (-1, 2)).mT.flatten(-2), rope)  # (B, L, H, Dh)
            k = apply_rope(k.unflatten(-1, (-1, 2)).mT.flatten(-2), rope)  # (B, L, H, Dh)
        x = x + self.scale1 * self.out(attention(q, k, v))                # (B, L, Dv)
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """The base class of both encoders. An image token stands for 2x2 patches.

    width: Dv. out_width: Du. cls: whether there is a class token. image, patch: sides in pixels of
    the pictures in training and of a patch. JOINED: patches in one input of the projector.
    PATCH_BIAS: whether the patch embedding has a bias. EPS: of the blocks' norms.
    """

    def __init__(self, width, depth, heads, hidden, out_width, cls=True, image=448, patch=14):
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"the vision transformer's width {width} must be a multiple of four "
                             f"times its {heads} heads")
        self.patch = patch
        self.side = image // patch
        self.patches = nn.Conv2d(3, width, patch, patch, bias=self.PATCH_BIAS)
        self.cls = nn.Parameter(torch.empty(1, 1, width)) if cls else None
        self.position_embedding = nn.Parameter(torch.empty(1, cls + self.side ** 2, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden, self.EPS)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(self.JOINED * width, 1e-5)
        self.projector = nn.Sequential(nn.Linear(self.JOINED * width, out_width), nn.GELU(),
                                       nn.Linear(out_width, out_width))
        initialise(self)

    def init_parameter(self, name, p):
        """Initialise one parameter; a LayerScale is 0.1, as in both encoders."""
        if "scale" in name:
            p.fill_(0.1)
        elif name.endswith("bias"):
            p.zero_()
        else:
            init_parameter(name, p, len(self.blocks))

    @property
    def tokens(self):
        """The number of image tokens of a resized picture."""
        return (self.side // 2) ** 2

    def resize(self, images):
        """Resize pictures (B, 3, H, W) to the size in training; also return the tokens of each.

        NOTE (ours): the aspect ratio is lost. The published models cut a picture into tiles.
        """
        side = self.side * self.patch
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return images, self.tokens

    def embed(self, images, mode):
        """Return the transformer's tokens (B, L, Dv), with position embeddings, and h and w.

        mode: how position embeddings are interpolated to another grid than that of training.
        Raises ValueError where a side is not a multiple of two patches: an image token is 2x2.
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
        grid = self.position_embedding[:, -n * n:].mT.unflatten(2, (n, n))         # (1, Dv, n, n)
        grid = F.interpolate(grid, (h, w), mode=mode).flatten(2).mT       # (1, h*w, Dv)
        x = x + torch.cat((self.position_embedding[:, :-n * n], grid), 1)          # (B, L, Dv)
        return x, h, w

    def our_name(self, name):
        """Return our name of a tensor of a folder and its part, or None: see `copy_tensors`."""
        if not is_vision_tensor(name):
            return None
        name = name.removeprefix("model.")
        module, kind = re.fullmatch(r"(.+?)(\.weight|\.bias|)", name).groups()
        if block := re.fullmatch(self.BLOCK, module):
            ours, part = BLOCK_MODULES[block[2]]
            return f"blocks.{block[1]}.{ours}{kind}", part
        return self.MODULES[module] + kind, 0


class PerceptionEncoder(VisionTransformer):
    """PLM's encoder: PE-Lang (Bolya et al. 2025) and the projector of PLM (Cho et al. 2025)."""

    PATCH_BIAS = False
    EPS = 1e-5
    JOINED = 1
    BLOCK = r"vision_tower\.timm_model\.blocks\.(\d+)\.(.+)"
    MODULES = {"vision_tower.timm_model.cls_token": "cls",
               "vision_tower.timm_model.pos_embed": "position_embedding",
               "vision_tower.timm_model.patch_embed.proj": "patches",
               "vision_tower.timm_model.norm_pre": "norm",
               "multi_modal_projector.linear_1": "projector.0",
               "multi_modal_projector.linear_2": "projector.2"}

    def rope(self, h, w, x):
        """Return cos and sin (L, Dh/2) for the tokens x (B, L, Dv) of h rows and w columns.

        Half of a head's pairs rotate by the column, the others by the row. A class token is at
        (0, 0), and the patches then begin at (1, 1). NOTE (ours): in grids of another size than in
        training, which PLM never sees, positions count patches as in Meta's code; timm scales them.
        """
        first = int(self.cls is not None)
        rows = torch.arange(first, first + h, device=x.device)
        columns = torch.arange(first, first + w, device=x.device)
        positions = torch.cartesian_prod(rows, columns).flip(1)           # (h*w, 2)
        positions = F.pad(positions, (0, 0, first, 0))                    # (L, 2)
        half = x.shape[-1] // self.blocks[0].heads // 2
        return rope_table(positions, (half, half))                        # (L, Dh/2) each

    def forward(self, images):
        """Encode pictures (B, 3, H, W) in [-1, 1], to which PLM normalises its pictures, too."""
        x, h, w = self.embed(images, "bilinear")                          # (B, L, Dv)
        x = self.norm(x)
        rope = self.rope(h, w, x)
        for block in self.blocks:
            x = block(x, rope)
        x = self.projector(x[:, -h * w:])                                 # (B, h*w, Du)
        x = F.avg_pool2d(x.mT.unflatten(2, (h, w)), 2)                    # (B, Du, h/2, w/2)
        return x.flatten(2).mT                                            # (B, P, Du)


class InternVision(VisionTransformer):
    """InternVL's encoder: InternViT and the projector `mlp1` (Chen et al. 2024)."""

    PATCH_BIAS = True
    EPS = 1e-6
    JOINED = 4
    MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1]
    STD = (0.229, 0.224, 0.225)
    BLOCK = r"(?:vision_tower\.encoder\.layer|vision_model\.encoder\.layers)\.(\d+)\.(.+)"
    MODULES = {"vision_tower.embeddings.cls_token": "cls",
               "vision_model.embeddings.class_embedding": "cls",
               "vision_tower.embeddings.position_embeddings": "position_embedding",
               "vision_model.embeddings.position_embedding": "position_embedding",
               "vision_tower.embeddings.patch_embeddings.projection": "patches",
               "vision_model.embeddings.patch_embedding": "patches",
               "multi_modal_projector.layer_norm": "norm", "mlp1.0": "norm",
               "multi_modal_projector.linear_1": "projector.0", "mlp1.1": "projector.0",
               "multi_modal_projector.linear_2": "projector.2", "mlp1.3": "projector.2"}

    def forward(self, images):
        """Encode pictures (B, 3, H, W) in [-1, 1]."""
        images = at_least_fp32(images) / 2 + 0.5
        mean, std = images.new_tensor((self.MEAN, self.STD)).view(2, 3, 1, 1)  # (3, 1, 1) each
        images = (images - mean) / std
        x, h, w = self.embed(images, "bicubic")                           # (B, L, Dv)
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:].unflatten(1, (h // 2, 2, w // 2, 2))                 # (B, h/2, 2, w/2, 2, Dv)
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)                    # (B, P, 4*Dv)
        return self.projector(self.norm(x))                               # (B, P, Du)


# --- Encoders of folders, named as in transformers (with timm) or by OpenGVLab --------------------

PREFIXES = ("vision_tower.", "vision_model.", "multi_modal_projector.", "mlp1.")
# Modules of a block, and ours. Where several are one of ours, a number gives their order in it.
BLOCK_MODULES = {
    "norm1": ("norm1", 0), "layernorm_before": ("norm1", 0),
    "norm2": ("norm2", 0), "layernorm_after": ("norm2", 0),
    "attn.qkv": ("qkv", 0), "attention.q_proj": ("qkv", 0),
    "attention.k_proj": ("qkv", 1), "attention.v_proj": ("qkv", 2),
    "attn.proj": ("out", 0), "attention.projection_layer": ("out", 0),
    "mlp.fc1": ("up", 0), "mlp.fc2": ("down", 0),
    "ls1": ("scale1", 0), "lambda_1": ("scale1", 0), "gamma_1": ("scale1", 0),
    "ls2": ("scale2", 0), "lambda_2": ("scale2", 0), "gamma_2": ("scale2", 0)}
PERCEPTION = {  # the sizes of PLM's encoders in timm
    "large": dict(embed_dim=1024, depth=23, num_heads=16, mlp_ratio=4, class_token=True),
    "gigantic": dict(embed_dim=1536, depth=47, num_heads=16, mlp_ratio=8960 / 1536,
                     class_token=False)}


def is_vision_tensor(name):
    """Return whether a tensor of a tower's folder is part of its image encoder."""
    return name.removeprefix("model.").startswith(PREFIXES)


def text_config(config):
    """Return the part of a parsed config.json that describes the language model."""
    return config.get("text_config") or config.get("llm_config") or config


def expect(values, **expected):
    """Raise ValueError where a config.json has another value than the expected one."""
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise ValueError(f"its config.json has {key} {values[key]!r}; expected {value!r}, as "
                             "PLM's and InternVL's encoders are published")


def square_side(size):
    """Return the side of a square, which a config.json gives as a number or as a pair."""
    return size if isinstance(size, int) else size[0]


def build_encoder(config):
    """Return PLM's or InternVL's encoder without weights, or None. Raises ValueError for others."""
    vision = config.get("vision_config")
    if vision is None:
        return None
    name = vision.get("architecture") or vision.get("model_type")
    if name in ("internvl_vision", "intern_vit_6b"):
        return build_intern(config, vision)
    # PLM's folders name a "core" encoder; the changes in model_args make it the "lang" one.
    if match := re.match(r"vit_pe_(core|lang)_(large|gigantic)_patch14_", str(name)):
        return build_perception(config, vision, *match.groups())
    raise ValueError(f"its config.json has the vision model {name!r}; expected PLM's "
                     "(vit_pe_lang_...) or InternVL's (internvl_vision, intern_vit_6b)")


def build_perception(config, vision, kind, size):
    """Return PLM's encoder of a kind and size, changed as `model_args` says."""
    c = dict(img_size=448, patch_size=14, ref_feat_shape=32, rope_grid_offset=size == "large",
             use_post_transformer_norm=kind == "core",
             **PERCEPTION[size]) | (vision.get("model_args") or {})
    image, patch = square_side(c["img_size"]), square_side(c["patch_size"])
    c["ref_feat_shape"] = square_side(c["ref_feat_shape"])
    expect(c, use_post_transformer_norm=False, use_pre_transformer_norm=True, attn_type="rope",
           use_rot_pos_emb=True, ref_feat_shape=image // patch, rope_temperature=10000,
           rope_grid_offset=float(c["class_token"]), rope_grid_indexing="xy")
    expect(config, projector_pooling_ratio=2, vision_use_cls_token=c["class_token"])
    return PerceptionEncoder(
        width=c["embed_dim"], depth=c["depth"], heads=c["num_heads"],
        hidden=int(c["embed_dim"] * c["mlp_ratio"]), out_width=text_config(config)["hidden_size"],
        cls=c["class_token"], image=image, patch=patch)


def build_intern(config, vision):
    """Return InternVL's encoder; InternViT-6B, that of the largest models, is refused."""
    expect(vision, norm_type="layer_norm", layer_norm_eps=1e-6, hidden_act="gelu", qkv_bias=True,
           attention_bias=True, qk_normalization=False, use_qk_norm=False, use_mean_pooling=True)
    expect(config, downsample_ratio=0.5, ps_version="v2", select_layer=-1, vision_feature_layer=-1,
           projector_hidden_act="gelu")
    return InternVision(
        width=vision["hidden_size"], depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"], hidden=vision["intermediate_size"],
        out_width=text_config(config)["hidden_size"], image=square_side(vision["image_size"]),
        patch=square_side(vision["patch_size"]))
