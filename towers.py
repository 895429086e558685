"""The understanding tower: a decoder-only language model that also reads pictures.

It reads the context once and hands out the states after every one of its blocks; MoS routes them.
The small world's tower is trained by next-token prediction and then frozen; a Llama, Qwen2 or
Qwen3 is the same decoder with other widths (`folders.py` reads them).
"""

import difflib
import json

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_parameter, initialise
from kernels import RMSNorm, SwiGLU, at_least_fp32, attention, autocast, queries_keys, rope_table


class Tokenizer:
    """Word-level: lower-case words between blanks; , ? ! : ; are words, full stops are dropped."""

    PAD = -1  # no token at all: in other towers' vocabularies 0 is a word
    BOS, EOS = 1, 2
    SPECIAL = ("<pad>", "<bos>", "<eos>")  # the first one is never used
    stops = (EOS,)  # what ends a text that the tower writes

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

    def encode(self, text, image_tokens=0):
        """Token ids of a text, <bos> in front. Raises ValueError that names an unknown word.

        image_tokens: for how many the text must have places; this tower's stand before the text.
        """
        ids = [self.BOS]
        for word in self.split(text):
            if word not in self.index:
                near = difflib.get_close_matches(word, self.words[3:], 3, 0.5) or self.words[3:9]
                raise ValueError(f"unknown word {word!r} in {text!r}; the closest words this "
                                 f"tower knows: {', '.join(near)}")
            ids.append(self.index[word])
        return ids

    def batch(self, texts, length=None, image_tokens=0):
        """Right-padded token ids (B, S) of several texts; S is `length` or the longest text."""
        rows = [self.encode(text, image_tokens) for text in texts]
        length = length or max(map(len, rows))
        for row, text in zip(rows, texts):
            if len(row) > length:
                raise ValueError(f"{text!r} has {len(row)} tokens, more than the {length} allowed")
        return torch.tensor([row + [self.PAD] * (length - len(row)) for row in rows])

    def ids_and_targets(self, text, answer=None, *, length):
        """Return token ids and next-token targets, two lists of `length`.

        With an answer, which follows the text, only the answer is a target. Raises ValueError for
        more than `length` tokens.
        """
        ids = self.encode(text)
        start = len(ids) - 1 if answer else 0
        ids += self.encode(answer)[1:] if answer else []
        ids.append(self.EOS)
        padding = length - len(ids)
        if padding < 0:
            raise ValueError(f"{text!r} has {len(ids)} tokens, more than the {length} allowed")
        targets = [-100] * start + ids[start + 1:] + [-100] * (padding + 1)
        return ids + [self.PAD] * padding, targets

    def request(self, prompt):
        """What makes the tower write a detailed caption, and how that begins: token ids and a text.

        A tower that has not learned the request goes on with the prompt.
        """
        if "detail" not in self.index:
            return self.encode(prompt), prompt
        return self.encode(f"in detail : {prompt}"), ""

    def decode(self, ids):
        """The text of token ids."""
        return " ".join(self.words[i] for i in ids)

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


class Bytes(Tokenizer):
    """The bytes of a text as tokens: for towers with random weights, which know no words."""

    def __init__(self):
        super().__init__(map(str, range(256)))

    def encode(self, text, image_tokens=0):
        return [self.BOS, *(len(self.SPECIAL) + byte for byte in text.encode())]

    def request(self, prompt):
        return self.encode(prompt), ""

    def decode(self, ids):
        known = bytes(i - len(self.SPECIAL) for i in ids if 0 <= i - len(self.SPECIAL) < 256)
        return known.decode(errors="replace")


class Patches(nn.Sequential):
    """The small world's encoder: convolutions that halve, then each token's place. NOTE (ours).

    patch: side of an image token in pixels, a power of two; width: Du. Raises ValueError for a
    width that cannot be halved so often, or not be shared by sines and cosines of two places.
    """

    def __init__(self, patch, width):
        if width % 4 or width < patch:
            raise ValueError(f"und_width must be a multiple of 4 and at least {patch} for a tower "
                             f"that reads pictures, got {width}")
        halvings = patch.bit_length() - 1
        widths = [3, *(width >> i for i in reversed(range(halvings)))]
        convs = [nn.Conv2d(*pair, 3, 2, 1) for pair in zip(widths, widths[1:])]
        super().__init__(*[layer for conv in convs for layer in (conv, nn.GELU())][:-1])
        self.patch = patch

    def init_parameter(self, name, p):
        """Give the parameter of this name its first values, by which signals keep their size."""
        if p.ndim == 1:
            p.zero_()
        else:
            p.normal_(0, (2 / p[0].numel()) ** 0.5)

    def forward(self, images):
        """Tokens (B, P, Du) of pictures (B, 3, H, W) in [-1, 1]."""
        x = super().forward(images.type_as(self[0].weight))               # (B, Du, h, w)
        x = x.permute(0, 2, 3, 1)                                         # (B, h, w, Du)
        x = x + self._places(*x.shape[1:])
        return x.flatten(1, 2)                                            # (B, h*w, Du)

    def _places(self, height, width, channels):
        """Sinusoids of row and column, half of the channels each: (h, w, Du). NOTE (ours)."""
        like, quarter = self[0].weight, channels // 4
        rate = 100.0 ** (-torch.arange(quarter, device=like.device) / quarter)
        waves = [torch.cat((a.cos(), a.sin()), -1) for a in
                 (torch.arange(n, device=like.device)[:, None] * rate for n in (height, width))]
        rows = waves[0][:, None].expand(-1, width, -1)                    # (h, w, Du/2)
        columns = waves[1][None].expand(height, -1, -1)                   # (h, w, Du/2)
        return torch.cat((rows, columns), -1).type_as(like)               # (h, w, Du)


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

    def forward(self, x, rope, past=None):
        """x: (B, S, Du). Returns x's successor.

        past: a list that takes the keys and values of x. Where it holds some already, they stand
        before x, which then must be one token.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))  # (B, S, H+2Hk, Dh)
        norms = (self.q_norm.weight, self.k_norm.weight, None) if self.q_norm else (None,) * 3
        q, k, v = queries_keys(qkv, rope, self.heads, norms, eps=self.eps)  # k: (B, S, Hk, Dh)
        first = not past
        if not first:
            k, v = (torch.cat(pair, 1) for pair in zip(past, (k, v)))
        if past is not None:
            past[:] = k, v
        # Causality makes a mask needless: padding stands to the right of every real token.
        a = attention(q, k, v, causal=first)                                # (B, S, Du)
        x, y = self.norm2.add(x, self.out(a))                                   # (B, S, Du) each
        return x + self.ffn(y)


class Understanding(nn.Module):
    """The tower U of MoS sec. 3.1: the small world's, or a Llama, Qwen2 or Qwen3 from a folder.

    vocabulary: number of words, width: Du, depth: M, tied: the output layer is the embedding.
    vision: a module from pictures to image tokens (`vision.py`), image_token: the id whose places
    they take; None: they stand before the text. head_width: None: width / heads. theta, slow: of
    the rotary embedding, see `rope_table`. bias, qk_norm: see DecoderBlock.
    """

    def __init__(self, vocabulary, width, depth, heads, kv_heads, hidden, tied=False, vision=None,
                 image_token=None, head_width=None, theta=1e4, slow=None, bias=False,
                 qk_norm=False, eps=1e-6):
        super().__init__()
        if heads % kv_heads or not head_width and width % heads:
            raise ValueError(f"the understanding tower's width {width} must be a multiple of its "
                             f"{heads} heads, and those of its {kv_heads} key-value heads")
        head_width = head_width or width // heads
        self.axes, self.theta, self.slow = (head_width,), theta, slow
        self.embedding = nn.Embedding(vocabulary, width)
        self.vision, self.image_token = vision, image_token
        self.blocks = nn.ModuleList(
            DecoderBlock(width, heads, kv_heads, hidden, head_width, bias, qk_norm, eps)
            for _ in range(depth))
        self.norm = RMSNorm(width, eps)
        # NOTE (ours): not tied. Words that may follow the same words ("left", "right") would get
        # nearly the same embedding, and the states that MoS routes would hardly tell them apart.
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        initialise(self)

    def init_parameter(self, name, p):
        """Give the parameter of this name its first values."""
        if name.startswith("vision.") and hasattr(self.vision, "init_parameter"):
            self.vision.init_parameter(name.removeprefix("vision."), p)
        elif name == "embedding.weight":
            p.normal_(0, 0.1)  # far apart, and so they stay
        else:
            init_parameter(name, p, len(self.blocks))

    def embed(self, tokens, images=None):
        """Input embeddings (B, S, Du), pictures (B, 3, H, W) in [-1, 1] among them.

        Raises ValueError where the text has not one place for each image token.
        """
        text = self.embedding(tokens.clamp_min(0))                          # (B, S, Du)
        if images is None:
            return text
        vision = self.vision(images)                                        # (B, P, Du)
        if self.image_token is None:
            return torch.cat((vision, text), 1)                             # (B, P+S, Du)
        places = tokens == self.image_token                                 # (B, S)
        if (places.sum(1) != vision.shape[1]).any():
            raise ValueError(f"the pictures have {vision.shape[1]} image tokens each, the texts "
                             f"places for {places.sum(1).tolist()}")
        return text.masked_scatter(places[..., None], vision.type_as(text))  # (B, S, Du)

    def forward(self, x, cache=None):
        """States after each block, on the raw residual stream: (B, S, M, Du). MoS eq. (2).

        x: input embeddings (B, S, Du). The embedding itself is not among them, and the last state
        is not normalised. cache: a list for each block, see DecoderBlock.
        """
        before = cache[0][0].shape[1] if cache and cache[0] else 0
        places = torch.arange(before, before + x.shape[1], device=x.device)[:, None]  # (S, 1)
        rope = rope_table(places, self.axes, self.theta, self.slow)
        states = []
        for m, block in enumerate(self.blocks):
            x = block(x, rope, cache[m] if cache else None)
            states.append(x)
        return torch.stack(states, 2)                                       # (B, S, M, Du)

    def logits(self, states):
        """Next-token scores (B, S, V) in fp32 from the last state."""
        head = self.head or self.embedding
        return at_least_fp32(F.linear(self.norm(states[:, :, -1]), head.weight))     # (B, S, V)

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

    @torch.no_grad()
    def write(self, tokens, limit, stops, temperature=0.0, seed=0, images=None):
        """Go on with one text (1, S): yield token ids until one of `stops`, or `limit` of them.

        temperature: 0 takes the likeliest token, 1 draws from the tower's own distribution.
        """
        generator = torch.Generator().manual_seed(seed)
        x, cache = self.embed(tokens, images), [[] for _ in self.blocks]
        for _ in range(limit):
            scores = self.logits(self(x, cache)[:, -1:])[0, 0].cpu()        # (V,)
            token = scores.argmax() if temperature == 0 else torch.multinomial(
                ((scores - scores.max()) / temperature).softmax(0), 1, generator=generator)
            if token.item() in stops:
                return
            yield token.item()
            x = self.embed(token.view(1, 1).to(tokens.device))              # (1, 1, Du)

    @torch.no_grad()
    def rewrite(self, tokenizer, prompt, limit, temperature=0.0, seed=0):
        """Write a detailed caption of what a prompt asks for. MoS sec. 4.4.

        limit: most tokens, so that the tower can read its caption again.
        """
        request, beginning = tokenizer.request(prompt)
        tokens = torch.tensor([request], device=self.embedding.weight.device)
        with autocast(tokens.device):
            ids = list(self.write(tokens, limit, tokenizer.stops, temperature, seed))
        caption = f"{beginning} {tokenizer.decode(ids)}".strip()
        while ids and len(tokenizer.encode(caption)) > limit:
            ids.pop()
            caption = f"{beginning} {tokenizer.decode(ids)}".strip()
        return caption
