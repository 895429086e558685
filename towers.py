"""The understanding tower: a decoder-only language model that also reads pictures.

It reads the context once and hands out the states after every one of its blocks; MoS routes them.
Image tokens stand in front of the text. The tiny tower here is trained by next-token prediction
and then frozen.
"""

import difflib
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from common import initialise, start, wide
from kernels import RMSNorm, SwiGLU, attention, queries_keys, rope_table


class Tokenizer:
    """Word-level: lower-case words between blanks; , ? ! : ; are words, full stops are dropped."""

    PAD, BOS, EOS = 0, 1, 2
    SPECIAL = ("<pad>", "<bos>", "<eos>")

    def __init__(self, words):
        self.words = list(self.SPECIAL) + sorted(set(words) - set(self.SPECIAL))
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    @staticmethod
    def split(text):
        """The words of a text: lower case, without full stops, punctuation apart."""
        for mark in ",?!:;":
            text = text.replace(mark, f" {mark} ")
        return text.lower().replace(".", " ").split()

    def encode(self, text):
        """Token ids of a text, <bos> in front. Raises ValueError that names an unknown word."""
        ids = [self.BOS]
        for word in self.split(text):
            if word not in self.index:
                near = difflib.get_close_matches(word, self.words[3:], 3, 0.5) or self.words[3:9]
                raise ValueError(f"unknown word {word!r} in {text!r}; the closest words this "
                                 f"tower knows: {', '.join(near)}")
            ids.append(self.index[word])
        return ids

    def batch(self, texts, length=None):
        """Right-padded token ids (B, S) of several texts; S is `length` or the longest text."""
        rows = [self.encode(text) for text in texts]
        length = length or max(map(len, rows))
        for row, text in zip(rows, texts):
            if len(row) > length:
                raise ValueError(f"{text!r} has {len(row)} tokens, more than the {length} allowed")
        return torch.tensor([row + [self.PAD] * (length - len(row)) for row in rows])

    def save(self, path):
        """Write the words, without the special ones, as a JSON list."""
        path.write_text(json.dumps(self.words[3:]))

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. Raises ValueError if that is no list of words."""
        words = json.loads(path.read_text())
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("expected a list of words")
        return cls(words)


class DecoderBlock(nn.Module):
    """Pre-norm, causal grouped-query attention with RoPE, SwiGLU: the Llama block.

    Qwen2 adds a bias to queries, keys and values, Qwen3 norms of queries and keys.
    """

    def __init__(self, width, heads, kv_heads, hidden, head_width, bias, qk_norm, eps):
        super().__init__()
        self.heads, self.head_width, self.eps = heads, head_width, eps
        self.norm1, self.norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_width, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(head_width, eps) if qk_norm else None for _ in range(2))
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, x, rope):
        """x: (B, S, Du). Returns x's successor."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))  # (B, S, H+2Hk, Dh)
        norms = (self.q_norm.weight, self.k_norm.weight, None) if self.q_norm else (None,) * 3
        q, k, v = queries_keys(qkv, rope, self.heads, norms, eps=self.eps)  # k: (B, S, Hk, Dh)
        # Causality makes a mask needless: padding stands to the right of every real token.
        a = attention(q, k, v, causal=True)                                 # (B, S, Du)
        x, y = self.norm2(self.out(a), x)                                   # (B, S, Du) each
        return x + self.ffn(y)


class Understanding(nn.Module):
    """The tower U of MoS sec. 3.1: the small world's, or a Llama, Qwen2 or Qwen3 from a folder.

    vocabulary: number of words, width: Du, depth: M, tied: the output layer is the embedding,
    patch: side of an image token in pixels, 0: no pictures. head_width: None: width / heads.
    theta, slow: of the rotary embedding, see `rope_table`. bias, qk_norm: see DecoderBlock.
    """

    def __init__(self, vocabulary, width, depth, heads, kv_heads, hidden, tied=False, patch=16,
                 head_width=None, theta=1e4, slow=None, bias=False, qk_norm=False, eps=1e-6):
        super().__init__()
        if heads % kv_heads or not head_width and width % heads:
            raise ValueError(f"the understanding tower's width {width} must be a multiple of its "
                             f"{heads} heads, and those of its {kv_heads} key-value heads")
        head_width = head_width or width // heads
        self.patch, self.axes, self.theta, self.slow = patch, (head_width,), theta, slow
        self.embedding = nn.Embedding(vocabulary, width)
        self.vision = nn.Sequential(nn.Linear(3 * patch * patch, width), nn.GELU(),
                                    nn.Linear(width, width)) if patch else None
        self.blocks = nn.ModuleList(
            DecoderBlock(width, heads, kv_heads, hidden, head_width, bias, qk_norm, eps)
            for _ in range(depth))
        self.norm = RMSNorm(width, eps)
        # NOTE (ours): not tied. Words that may follow the same words ("left", "right") would get
        # nearly the same embedding, and the states that MoS routes would hardly tell them apart.
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        initialise(self)

    def start(self, name, p):
        """Give the parameter of this name its first values."""
        start(name, p, len(self.blocks))
        if name == "embedding.weight":
            p.normal_(0, 0.1)  # far apart, and so they stay

    def embed(self, tokens, images=None):
        """Input embeddings (B, S, Du): pictures (B, 3, H, W) in [-1, 1] first, then the text."""
        text = self.embedding(tokens)                                       # (B, S, Du)
        if images is None:
            return text
        patches = F.pixel_unshuffle(images, self.patch)                     # (B, 3*p*p, h, w)
        vision = self.vision(patches.permute(0, 2, 3, 1))                   # (B, h, w, Du)
        vision = vision + self._places(*patches.shape[2:], text)
        return torch.cat((vision.flatten(1, 2), text), 1)                   # (B, h*w + S, Du)

    def _places(self, height, width, like):
        """Sinusoids of row and column, half of the channels each: (h, w, Du). NOTE (ours)."""
        quarter = like.shape[-1] // 4
        rate = 100.0 ** (-torch.arange(quarter, device=like.device) / quarter)
        waves = [torch.cat((a.cos(), a.sin()), -1) for a in
                 (torch.arange(n, device=like.device)[:, None] * rate for n in (height, width))]
        rows = waves[0][:, None].expand(-1, width, -1)                      # (h, w, Du/2)
        columns = waves[1][None].expand(height, -1, -1)                     # (h, w, Du/2)
        return torch.cat((rows, columns), -1).type_as(like)                 # (h, w, Du)

    def forward(self, x):
        """States after each block, on the raw residual stream: (B, S, M, Du). MoS eq. (2).

        x: input embeddings (B, S, Du). The embedding itself is not among them, and the last state
        is not normalised.
        """
        places = torch.arange(x.shape[1], device=x.device)[:, None]         # (S, 1)
        rope = rope_table(places, self.axes, self.theta, self.slow)
        states = []
        for block in self.blocks:
            x = block(x, rope)
            states.append(x)
        return torch.stack(states, 2)                                       # (B, S, M, Du)

    def logits(self, states):
        """Next-token scores (B, S, V) in fp32 from the last state."""
        head = self.head or self.embedding
        return wide(F.linear(self.norm(states[:, :, -1]), head.weight))     # (B, S, V)

    def loss(self, tokens, target, images=None):
        """Next-token cross entropy: the mean of a sample's targets (not -100), then of samples.

        tokens, target: (B, S), images: (B, 3, H, W). Returns the loss and {"token_accuracy": share
        of targets right after the true words before them, "text_accuracy": share of samples that
        greedy decoding would get right as a whole}.
        """
        states = self(self.embed(tokens, images))
        scores = self.logits(states[:, -tokens.shape[1]:])                  # (B, S, V)
        right = scores.argmax(-1) == target                                 # (B, S)
        each = F.cross_entropy(scores.mT, target, ignore_index=-100, reduction="none")  # (B, S)
        lengths = (target != -100).sum(1)
        loss = (each.sum(1) / lengths).mean()  # a mean of samples: the same however a batch is cut
        return loss, {"token_accuracy": right.sum() / lengths.sum(),
                      "text_accuracy": (right | (target == -100)).all(1).float().mean()}


# ------------------------------------------------------------------------------------------------
# Towers from folders in Hugging Face's layout

FAMILIES = {"llama": {}, "qwen2": dict(bias=True), "qwen3": dict(qk_norm=True)}
PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # of the tower's tensors
OTHERS = ("vision_model.", "vision_tower.", "model.vision_tower.", "mlp1.",
          "multi_modal_projector.", "model.multi_modal_projector.")  # of what reads pictures
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


def read_family(folder):
    """Arguments of Understanding from a folder's config.json.

    Raises FileNotFoundError, or ValueError for what this decoder is not.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: expected a model's folder in "
                                "Hugging Face's layout")
    c = json.loads(path.read_text())
    c = c.get("text_config") or c.get("llm_config") or c
    family, rope = c.get("model_type"), c.get("rope_parameters") or {
        "rope_theta": c.get("rope_theta", 1e4), **(c.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    for wrong, what in ((family not in FAMILIES, f"model_type {family!r}"),
                        (kind not in ("default", "llama3"), f"rope_type {kind!r}"),
                        (c.get("use_sliding_window"), "a sliding window"),
                        (c.get("mlp_bias"), "biases in its feed-forward networks"),
                        (family != "qwen2" and c.get("attention_bias"), "a bias in its output")):
        if wrong:
            raise ValueError(f"{path} has {what}; expected one of {', '.join(FAMILIES)} as they "
                             "are published")
    return dict(vocabulary=c["vocab_size"], width=c["hidden_size"], depth=c["num_hidden_layers"],
                heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"],
                hidden=c["intermediate_size"], head_width=c.get("head_dim"), patch=0,
                tied=bool(c.get("tie_word_embeddings")), theta=rope["rope_theta"],
                slow=slow_down(**rope) if kind == "llama3" else None, eps=c["rms_norm_eps"],
                **FAMILIES[family])


def locate(name, tower):
    """Our name for a folder's tensor and its place, maybe rows of ours; None if it is not the
    tower's. Raises KeyError or AttributeError where the tower has no such tensor.
    """
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if name.endswith("lm_head.weight"):
        return ("head.weight", tower.head.weight) if tower.head else None
    if not prefix or name.startswith(OTHERS):
        return None
    path, kind = name.removeprefix(prefix).rsplit(".", 1)
    _, number, path = path.split(".", 2) if path.startswith("layers.") else ("", "", path)
    own, part = PACKED.get(path) or (NAMES[path], None)
    own = f"blocks.{number}.{own}.{kind}" if number else f"{own}.{kind}"
    tensor = tower.get_parameter(own)
    if part is None:
        return own, tensor
    if "gate_up" in own:
        return own, tensor.chunk(2)[part]
    block = tower.blocks[int(number)]
    queries = block.heads * block.head_width
    keys = (len(tensor) - queries) // 2
    return own, tensor.split([queries, keys, keys])[part]


@torch.no_grad()
def load_tower(folder, device="cpu", dtype=torch.bfloat16):
    """The understanding tower of a folder in Hugging Face's layout, read a tensor at a time.

    Raises FileNotFoundError, or ValueError that names a tensor that is missing, unexpected or of
    another shape.
    """
    folder = Path(folder)
    with torch.device("meta"):
        tower = Understanding(**read_family(folder))
    tower.to(dtype).to_empty(device=device).requires_grad_(False)
    lacking = {name: p.numel() for name, p in tower.named_parameters()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors files in {folder}")
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                try:
                    found = locate(name, tower)
                except (KeyError, AttributeError):
                    raise ValueError(f"{path}: tensor {name} is not part of this tower") from None
                if found:
                    own, place = found
                    values = file.get_tensor(name)
                    if values.shape != place.shape:
                        raise ValueError(f"{path}: tensor {name} has shape {tuple(values.shape)}, "
                                         f"config.json asks for {tuple(place.shape)}")
                    place.copy_(values)
                    lacking[own] -= values.numel()
    for name, number in lacking.items():
        if number:
            raise ValueError(f"{folder}: {name} is missing, or a part of it")
    return tower.eval()
