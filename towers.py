"""The understanding tower: a decoder-only language model that also reads pictures.

It reads the context once and hands out the states after every one of its blocks; MoS routes them.
Image tokens stand in front of the text. The tiny tower here is trained by next-token prediction
and then frozen.
"""

import difflib
import json

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    """Pre-norm, causal grouped-query attention with RoPE, SwiGLU: the Llama block."""

    def __init__(self, width, heads, kv_heads, hidden):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, x, rope):
        """x: (B, S, Du). Returns x's successor."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))  # (B, S, H+2Hk, Dh)
        q, k, v = queries_keys(qkv, rope, self.heads)                       # k: (B, S, Hk, Dh)
        # Causality makes a mask needless: padding stands to the right of every real token.
        a = attention(q, k, v, causal=True)                                 # (B, S, Du)
        x, y = self.norm2(self.out(a), x)                                   # (B, S, Du) each
        return x + self.ffn(y)


class Understanding(nn.Module):
    """The tower U of MoS sec. 3.1, at the size of the small world.

    vocabulary: number of words, width: Du, depth: M, tied: the output layer is the embedding,
    patch: side of an image token in pixels.
    """

    def __init__(self, vocabulary, width, depth, heads, kv_heads, hidden, tied=False, patch=16):
        super().__init__()
        if width % heads or heads % kv_heads:
            raise ValueError(f"the understanding tower's width {width} must be a multiple of its "
                             f"{heads} heads, and those of its {kv_heads} key-value heads")
        self.patch, self.axes = patch, (width // heads,)
        self.embedding = nn.Embedding(vocabulary, width)
        self.vision = nn.Sequential(nn.Linear(3 * patch * patch, width), nn.GELU(),
                                    nn.Linear(width, width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, kv_heads, hidden)
                                    for _ in range(depth))
        self.norm = RMSNorm(width)
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
        rope = rope_table(torch.arange(x.shape[1], device=x.device)[:, None], self.axes)
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
