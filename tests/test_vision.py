"""Image encoders equal transformers' (InternVL) and a reference written here (PLM)."""

import math

import pytest
import torch
import torch.nn.functional as F
from published import intern_tensors
from safetensors.torch import load_file

from conftest import ROOT
from pretrained.encoders import InternVision, PerceptionEncoder, build_encoder
from towers import Patches, Understanding

WIDTH, HEADS, HIDDEN, OUT, SIDE = 32, 2, 48, 40, 4  # small encoders: two blocks, a 4x4 grid
INTERN = dict(model_type="internvl_vision", hidden_size=WIDTH, num_hidden_layers=2,
              num_attention_heads=HEADS, intermediate_size=HIDDEN, attention_bias=True,
              image_size=[14 * SIDE] * 2, patch_size=[14, 14])
QWEN2 = dict(model_type="qwen2", vocab_size=61, hidden_size=OUT, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
SMALL = dict(img_size=[14 * SIDE] * 2, ref_feat_shape=[SIDE] * 2, embed_dim=WIDTH, depth=2,
             num_heads=HEADS, mlp_ratio=1.5, global_pool="", use_post_transformer_norm=False,
             init_values=0.1)
LARGE = SMALL | dict(depth=1, ref_feat_shape=[32, 32])  # for pictures of 448x448


def plm(size, model_args=(), kind="lang", **changes):
    """Return the config.json of a PLM."""
    vision = dict(model_type="timm_wrapper", architecture=f"vit_pe_{kind}_{size}_patch14_448",
                  model_args=dict(model_args))
    return dict(model_type="perception_lm", vision_config=vision, text_config=dict(hidden_size=OUT),
                projector_pooling_ratio=2, vision_use_cls_token=size == "large") | changes


def internvl(top=(), **changes):
    """Return the config.json of an InternVL."""
    return dict(model_type="internvl", vision_config=INTERN | changes, text_config=QWEN2,
                downsample_ratio=0.5, vision_feature_layer=-1) | dict(top)


@torch.no_grad()
def load(encoder, tensors):
    """Copy a folder's tensors into an encoder, and check that every value is set exactly once."""
    unset = {name: p.numel() for name, p in encoder.named_parameters()}
    for name, values in tensors.items():
        if ours := encoder.our_name(name):
            ours, part = ours
            target = encoder.get_parameter(ours)
            if values.shape != target.shape:  # queries, keys or values of qkv
                target = target.chunk(3)[part]
            assert values.shape == target.shape, name
            target.copy_(values)
            unset[ours] -= values.numel()
    assert not any(unset.values()), unset
    return encoder


@torch.no_grad()
def watch_blocks(blocks, run, *arguments):
    """Return the outputs of all blocks during a call, and the result of the call."""
    states = []
    hooks = [block.register_forward_hook(lambda *a: states.append(a[2])) for block in blocks]
    result = run(*arguments)
    for hook in hooks:
        hook.remove()
    return states, result


# ------------------------------------------------------------------------------------------------
# The small world

@pytest.mark.parametrize("dtype, autocast", ((torch.float32, False), (torch.bfloat16, False),
                                             (torch.float32, True)))
def test_patches(dtype, autocast):
    """`Patches` computes bit by bit what the tower in weights/ was trained with."""
    tensors = load_file(ROOT / "weights" / "understanding.safetensors")
    tensors = {name.removeprefix("understanding.vision."): p.to(dtype)
               for name, p in tensors.items() if ".vision." in name}
    width, patch = len(tensors["6.bias"]), 16
    encoder = Patches(patch, width).to(dtype)
    encoder.load_state_dict(tensors)
    images = (2 * torch.rand(2, 3, 64, 96) - 1).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = encoder(images)
        x = images
        for i in (0, 2, 4, 6):
            x = F.conv2d(F.gelu(x) if i else x, tensors[f"{i}.weight"], tensors[f"{i}.bias"],
                         stride=2, padding=1)
        rate = 100.0 ** (-torch.arange(width // 4) / (width // 4))
        for i in range(4):
            for j in range(6):
                waves = [(i * rate).cos(), (i * rate).sin(), (j * rate).cos(), (j * rate).sin()]
                expected = x[:, :, i, j] + torch.cat(waves).to(dtype)
                assert torch.equal(result[:, 6 * i + j], expected)
    assert result.shape == (2, 24, width)
    assert result.dtype == expected.dtype


def test_patches_start():
    """Initially pictures change their tokens, but by less than the position embeddings."""
    torch.manual_seed(0)
    tower = Understanding(vocabulary=10, width=160, depth=1, heads=5, kv_heads=1, hidden=64,
                          vision=Patches(16, 160))
    tokens = tower.vision(2 * torch.rand(64, 3, 32, 32) - 1)
    assert 0.1 < tokens.std(0).mean() < 1
    assert not tower.vision[0].bias.any()
    for width in (8, 18, 170):
        with pytest.raises(ValueError, match=f"und_width .* got {width}"):
            Patches(16, width)


# ------------------------------------------------------------------------------------------------
# PLM: transformers needs timm for it, so that a reference for one picture is written here

def timm_tensors(cls, seed=0):
    """Return random tensors named as in the folder of a small PLM, in fp64."""
    shapes = {"vision_tower.timm_model.pos_embed": (1, cls + SIDE ** 2, WIDTH),
              "vision_tower.timm_model.patch_embed.proj.weight": (WIDTH, 3, 14, 14),
              "vision_tower.timm_model.norm_pre": WIDTH,
              "multi_modal_projector.linear_1": (OUT, WIDTH),
              "multi_modal_projector.linear_2": (OUT, OUT), "language_model.norm.weight": (OUT,)}
    if cls:
        shapes["vision_tower.timm_model.cls_token"] = (1, 1, WIDTH)
    for i in range(2):
        shapes |= {f"vision_tower.timm_model.blocks.{i}.{name}": shape for name, shape in (
            ("norm1", WIDTH), ("norm2", WIDTH), ("gamma_1", (WIDTH,)), ("gamma_2", (WIDTH,)),
            ("attn.qkv", (3 * WIDTH, WIDTH)), ("attn.proj", (WIDTH, WIDTH)),
            ("mlp.fc1", (HIDDEN, WIDTH)), ("mlp.fc2", (WIDTH, HIDDEN)))}
    torch.manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if isinstance(shape, int):  # a norm
            tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(shape)
            tensors[f"{name}.bias"] = 0.2 * torch.randn(shape)
        elif len(shape) == 2:
            tensors[f"{name}.weight"] = torch.randn(shape) * 2 / shape[1] ** 0.5
            tensors[f"{name}.bias"] = 0.2 * torch.randn(shape[0])
        else:
            tensors[name] = torch.randn(shape) * (0.05 if len(shape) == 4 else 0.5)
    return {f"model.{name}": p.double() for name, p in tensors.items()}


def normalised(x, t, name):
    """Apply a LayerNorm with eps 1e-5."""
    x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / (variance + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(x, t, name):
    """Apply a linear layer."""
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def bilinear(grid, y, x):
    """Interpolate a grid (n, n, width) at fractional indices, which are clamped to its borders."""
    n = len(grid)
    y = min(max(y, 0), n - 1)
    x = min(max(x, 0), n - 1)
    top = min(int(y), n - 2)
    left = min(int(x), n - 2)
    a = y - top
    b = x - left
    return ((1 - a) * ((1 - b) * grid[top, left] + b * grid[top, left + 1])
            + a * ((1 - b) * grid[top + 1, left] + b * grid[top + 1, left + 1]))


def embed_reference(t, image, cls):
    """Return the tokens of one picture (3, H, W), and the rotation of each: (L, Dh/2) complex."""
    vit = "vision_tower.timm_model."
    rows = image.shape[1] // 14
    columns = image.shape[2] // 14
    embeddings = t[vit + "pos_embed"][0]
    tokens = []
    angles = []
    if cls:
        tokens.append(t[vit + "cls_token"][0, 0] + embeddings[0])
        angles.append(torch.zeros(WIDTH // HEADS // 2))
    grid = embeddings[cls:].reshape(SIDE, SIDE, WIDTH)
    quarter = WIDTH // HEADS // 4
    rates = 10000.0 ** (-torch.arange(quarter) / quarter)  # in fp32, as the encoder's
    for row in range(rows):
        for column in range(columns):
            patch = image[:, 14 * row:14 * row + 14, 14 * column:14 * column + 14]
            token = (t[vit + "patch_embed.proj.weight"] * patch).sum((1, 2, 3))
            tokens.append(token + bilinear(grid, (row + 0.5) * SIDE / rows - 0.5,
                                           (column + 0.5) * SIDE / columns - 0.5))
            angles.append(torch.cat(((column + cls) * rates, (row + cls) * rates)))
    angles = torch.stack(angles)
    return torch.stack(tokens), torch.complex(angles.cos(), angles.sin()).to(torch.complex128)


def attention_reference(q, k, v, rotations):
    """Return the attention of all heads; q, k, v: (L, WIDTH)."""
    results = []
    for start in range(0, WIDTH, WIDTH // HEADS):
        head = slice(start, start + WIDTH // HEADS)
        q_head = torch.complex(q[:, head][:, 0::2], q[:, head][:, 1::2]) * rotations
        k_head = torch.complex(k[:, head][:, 0::2], k[:, head][:, 1::2]) * rotations
        scores = torch.stack([(query * k_head.conj()).real.sum(1) for query in q_head])
        results.append((scores / math.sqrt(WIDTH // HEADS)).softmax(1) @ v[:, head])
    return torch.cat(results, 1)


def perception_reference(t, image, cls):
    """Return the states after every block, and the image tokens, of one picture (3, H, W)."""
    t = {name.removeprefix("model."): p for name, p in t.items()}
    x, rotations = embed_reference(t, image, cls)
    x = normalised(x, t, "vision_tower.timm_model.norm_pre")
    states = []
    for i in range(2):
        block = f"vision_tower.timm_model.blocks.{i}."
        qkv = linear(normalised(x, t, block + "norm1"), t, block + "attn.qkv")
        a = attention_reference(*qkv.split(WIDTH, 1), rotations)
        x = x + t[block + "gamma_1"] * linear(a, t, block + "attn.proj")
        hidden = gelu(linear(normalised(x, t, block + "norm2"), t, block + "mlp.fc1"))
        x = x + t[block + "gamma_2"] * linear(hidden, t, block + "mlp.fc2")
        states.append(x)
    x = gelu(linear(x[cls:], t, "multi_modal_projector.linear_1"))
    x = linear(x, t, "multi_modal_projector.linear_2")
    x = x.reshape(image.shape[1] // 14, image.shape[2] // 14, OUT)
    tokens = []
    for i in range(0, x.shape[0], 2):
        for j in range(0, x.shape[1], 2):
            tokens.append((x[i, j] + x[i, j + 1] + x[i + 1, j] + x[i + 1, j + 1]) / 4)
    return states, torch.stack(tokens)


@pytest.mark.parametrize("size", ((56, 56), (56, 84), (84, 28)))
@pytest.mark.parametrize("kind", ("large", "gigantic"))
def test_perception(kind, size):
    """Every block and the tokens equal the reference, in the grid of training and in others."""
    cls = kind == "large"
    tensors = timm_tensors(cls)
    encoder = load(build_encoder(plm(kind, SMALL)).double(), tensors)
    images = 2 * torch.rand(2, 3, *size, dtype=torch.float64) - 1
    states, tokens = watch_blocks(encoder.blocks, encoder, images)
    for b, image in enumerate(images):
        expected_states, expected_tokens = perception_reference(tensors, image, cls)
        for state, expected in zip(states, expected_states, strict=True):
            torch.testing.assert_close(state[b], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tokens[b], expected_tokens, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------
# InternVL

@pytest.fixture(scope="module")
def theirs():
    """The InternVL of transformers, with all its weights random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.InternVLModel(transformers.InternVLConfig(
        vision_config={k: v for k, v in INTERN.items() if k != "model_type"},
        text_config=QWEN2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("size", ((56, 56), (84, 84), (28, 84)))
def test_intern(theirs, size):
    """Every block and, for squares, the tokens equal transformers', from its own config.json."""
    encoder = load(build_encoder(theirs.config.to_dict()), theirs.state_dict())
    images = 2 * torch.rand(2, 3, *size) - 1
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    pixels = ((images + 1) / 2 - mean) / std
    square = size[0] == size[1]  # transformers' projector takes no others
    run = theirs.get_image_features if square else theirs.vision_tower
    expected_states, output = watch_blocks(theirs.vision_tower.encoder.layer, run, pixels)
    states, tokens = watch_blocks(encoder.blocks, encoder, images)
    for state, expected in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    assert tokens.shape == (2, size[0] * size[1] // 784, OUT)
    assert encoder.norm.eps == theirs.multi_modal_projector.layer_norm.eps
    if square:
        torch.testing.assert_close(tokens, output.pooler_output, rtol=1e-5, atol=1e-5)


def test_pixel_shuffle():
    """A token is made of 2x2 patches: the upper half of a picture gives the first tokens."""
    encoder = InternVision(width=WIDTH, depth=0, heads=HEADS, hidden=HIDDEN, out_width=OUT,
                           image=56)
    with torch.no_grad():
        encoder.position_embedding.zero_()
    images = torch.rand(1, 3, 56, 56)
    tokens = encoder(images)
    torch.testing.assert_close(encoder(images[:, :, :28]), tokens[:, :2])  # the upper half
    torch.testing.assert_close(encoder(images[..., :28]), tokens[:, ::2])  # the left half


# ------------------------------------------------------------------------------------------------
# Names, configurations, sizes

OPENGVLAB_NAMES = (  # pieces of transformers' names, and of OpenGVLab's in their place
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("position_embeddings", "position_embedding"),
    ("patch_embeddings.projection", "patch_embedding"),
    ("vision_tower", "vision_model"), ("encoder.layer.", "encoder.layers."),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("lambda_", "ls"),
    ("attention.projection_layer", "attn.proj"),
    ("multi_modal_projector.layer_norm", "mlp1.0"),
    ("multi_modal_projector.linear_1", "mlp1.1"), ("multi_modal_projector.linear_2", "mlp1.3"))


def as_opengvlab(tensors):
    """Return transformers' tensors of an InternVL as OpenGVLab's folders hold them."""
    renamed = {}
    for name, p in tensors.items():
        for theirs, opengvlab in OPENGVLAB_NAMES:
            name = name.replace(theirs, opengvlab)
        renamed[name] = p
    stacked = {}
    for name, p in renamed.items():
        if "attention.q_proj" in name:
            parts = [renamed[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            stacked[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "_proj" not in name:
            stacked[name] = p
    return stacked


def test_random_tensors_are_named_as_theirs(theirs):
    """What other tests use in place of transformers' tensors has their names and shapes."""
    expected = {name: p.shape for name, p in theirs.state_dict().items()
                if not name.startswith("language_model.")}
    assert {name: p.shape for name, p in intern_tensors(INTERN, OUT).items()} == expected


def test_spellings():
    """Both spellings of InternVL's names, with `model.` in front or not, fill the same encoder."""
    tensors = intern_tensors(INTERN, OUT)
    expected = load(build_encoder(internvl()), tensors).state_dict()
    opengvlab = as_opengvlab(tensors)
    assert "vision_model.encoder.layers.1.attn.qkv.bias" in opengvlab
    for renamed in (opengvlab, {f"model.{name}": p for name, p in tensors.items()}):
        state = load(build_encoder(internvl()), renamed).state_dict()
        assert all(torch.equal(expected[name], p) for name, p in state.items())


INTERN_LACKS = ("vision_tower.layernorm.weight", "mlp1.2.weight", "mlp1.0",
                "vision_tower.encoder.layer.2.mlp.fc1.weight", "vision_model.norm.weight",
                "vision_tower.encoder.layer.0.attention.q_norm.weight",
                "vision_tower.timm_model.blocks.0.norm1.weight")
PERCEPTION_LACKS = ("model.vision_tower.timm_model.cls_token", "mlp1.0.weight",
                    "model.vision_tower.timm_model.norm.weight",
                    "model.vision_tower.timm_model.patch_embed.proj.bias",
                    "vision_tower.timm_model.blocks.0.gamma_1.weight")


@pytest.mark.parametrize("config, name", (
    *((internvl(), name) for name in INTERN_LACKS),
    *((plm("gigantic", SMALL), name) for name in PERCEPTION_LACKS)))
def test_unknown_names(config, name):
    """A vision tensor that an encoder lacks is an error; a tensor of the language model is none."""
    encoder = build_encoder(config)
    with pytest.raises((KeyError, AttributeError)):  # no such name, or no such parameter
        ours, _ = encoder.our_name(name)
        encoder.get_parameter(ours)
    for other in ("lm_head.weight", "model.language_model.norm.weight", "model.norm.weight",
                  "language_model.model.layers.0.mlp.up_proj.weight"):
        assert encoder.our_name(other) is None


@pytest.mark.parametrize("config, message", (
    (plm("base"), "'vit_pe_lang_base_patch14_448'; expected PLM's"),
    (dict(vision_config=dict(model_type="siglip_vision_model"), text_config=QWEN2), "'siglip_vis"),
    (plm("large", kind="core"), "use_post_transformer_norm True; expected False"),
    (plm("large", projector_pooling_ratio=1), "projector_pooling_ratio 1; expected 2"),
    (plm("large", vision_use_cls_token=False), "vision_use_cls_token False; expected True"),
    (plm("large", dict(ref_feat_shape=[16, 16])), "ref_feat_shape 16; expected 32"),
    (plm("large", dict(img_size=[56, 56])), "ref_feat_shape 32; expected 4"),
    (plm("large", dict(rope_temperature=100.0)), "rope_temperature 100.0; expected 10000"),
    (plm("large", dict(rope_grid_offset=0)), "rope_grid_offset 0; expected 1.0"),
    (plm("gigantic", dict(rope_grid_offset=1.0)), "rope_grid_offset 1.0; expected 0.0"),
    (plm("gigantic", dict(rope_grid_indexing="ij")), "rope_grid_indexing 'ij'; expected 'xy'"),
    (plm("gigantic", SMALL | dict(num_heads=3)), "32 must be a multiple of four times its 3"),
    (internvl(norm_type="rms_norm"), "norm_type 'rms_norm'; expected 'layer_norm'"),
    (internvl(use_qk_norm=True), "use_qk_norm True"),
    (internvl(attention_bias=False), "attention_bias False; expected True"),
    (internvl(use_mean_pooling=False), "use_mean_pooling False"),
    (internvl(dict(ps_version="v1")), "ps_version 'v1'; expected 'v2'"),
    (internvl(dict(projector_hidden_act="relu")), "projector_hidden_act 'relu'; expected 'gelu'"),
    (internvl(dict(downsample_ratio=0.25)), "downsample_ratio 0.25")))
def test_other_encoders(config, message):
    """Another encoder than PLM's or InternVL's is refused, with the reason."""
    with pytest.raises(ValueError, match=message):
        build_encoder(config)


def test_no_encoder():
    """The folder of a language model has no image encoder."""
    assert build_encoder(dict(model_type="llama", hidden_size=OUT)) is None


OPENGVLAB = dict(model_type="intern_vit_6b", hidden_size=1024, num_hidden_layers=24,
                 num_attention_heads=16, intermediate_size=4096, qkv_bias=True, image_size=448,
                 qk_normalization=False, patch_size=14, norm_type="layer_norm", layer_norm_eps=1e-6)
CORE = dict(depth=23, embed_dim=1024, img_size=[448, 448], ref_feat_shape=[32, 32],
            global_pool="", init_values=0.1, use_post_transformer_norm=False)


@pytest.mark.parametrize("config, kind, encoder, projector", (
    (plm("gigantic"), PerceptionEncoder, 1_740_922_624, 63_120),
    (plm("large"), PerceptionEncoder, 291_415_040, 42_640),
    (plm("large", CORE, kind="core"), PerceptionEncoder, 291_415_040, 42_640),
    (dict(vision_config=OPENGVLAB, llm_config=QWEN2, ps_version="v2", select_layer=-1),
     InternVision, 304_012_288, 173_712)))
def test_published_sizes(config, kind, encoder, projector):
    """Full-size encoders have as many parameters as their dimensions say, in 14 tensors a block."""
    with torch.device("meta"):
        model = build_encoder(config)
    assert type(model) is kind
    assert all(p.is_meta for p in model.parameters())
    intern = kind is InternVision
    cls = encoder < 1e9  # the gigantic one has no class token
    W, N, F = (1024, 23 + intern, 4096) if cls else (1536, 47, 8960)  # width, blocks, hidden
    block = 4 * W * W + 2 * W * F + F + 11 * W
    embeddings = 3 * 14 * 14 * W + (32 * 32 + 2 * cls) * W + (W if intern else 2 * W)
    assert sum(p.numel() for p in model.blocks.parameters()) == N * block
    assert N * block + embeddings == encoder
    V = 4 * W if intern else W  # the projector's input width
    assert V * OUT + OUT + OUT * OUT + OUT + 2 * V * intern == projector
    assert sum(p.numel() for p in model.parameters()) == encoder + projector
    assert len(list(model.blocks.parameters())) == 14 * N


@pytest.mark.parametrize("config", (plm("large", LARGE | dict(img_size=[448, 448])),
                                    plm("gigantic", LARGE | dict(img_size=448)),
                                    internvl(image_size=448, num_hidden_layers=1)))
def test_tile(config):
    """A picture of 448x448 is 256 tokens, and an encoder in bf16 takes pictures in fp32."""
    encoder = build_encoder(config).bfloat16()
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, 448, 448)).shape == (1, 256, OUT)
        assert encoder(torch.rand(1, 3, 56, 84)).dtype == torch.bfloat16
    for size in ((42, 56), (56, 60)):
        with pytest.raises(ValueError, match=f"multiple of 28 pixels on each side, got {size[0]}x"):
            encoder(torch.rand(1, 3, *size))


@pytest.mark.parametrize("config", (plm("large", SMALL), internvl()))
def test_first_values(config):
    """Initially norms are 1, biases 0, LayerScales 0.1, and all else is small and random."""
    for name, p in build_encoder(config).named_parameters():
        if name.endswith("bias"):
            assert (p == 0.0).all(), name
        elif "scale" in name:
            assert (p == 0.1).all(), name
        elif p.ndim == 1:
            assert (p == 1.0).all(), name
        elif name.endswith(("out.weight", "down.weight")):  # the ends of residual branches
            assert 0.5 < p.std() / 0.01 < 1.5, name
        else:
            assert 0.5 < p.std() / 0.02 < 1.5, name
