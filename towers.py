"""The understanding tower: a decoder-only language model that can also read pictures.

It reads the context once and returns the states after each of its blocks, which MoS routes. The
small world's tower is trained by next-token prediction and then frozen. Llama, Qwen2 and Qwen3 are
the same decoder in other sizes; `pretrained/folders.py` loads them. Letters as in `mos.py`.
"""

import difflib

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_parameter, initialise
from kernels import RMSNorm, SwiGLU, at_least_fp32, attention, autocast, queries_keys, rope_table


class Tokenizer:
    """A word-level tokenizer. Words are lower-case; , ? ! : ; are words, full stops are dropped."""

    PAD = -1  # marks padding; not 0, which is a word in published vocabularies
    BOS, EOS = 1, 2
    SPECIAL = ("<pad>", "<bos>", "<eos>")  # ids 0 to 2; id 0 is never used
    stops = (EOS,)  # the tokens at which the tower stops to write

    def __init__(self, words):
        self.words = list(self.SPECIAL) + sorted(set(words) - set(self.SPECIAL))
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    @staticmethod
    def split(text):
        """Return the words of a text, with its punctuation marks as words of their own.

        Special tokens are no words: a text cannot ask for them.
        """
        for mark in ",?!:;":
            text = text.replace(mark, f" {mark} ")
        return [word for word in text.lower().replace(".", " ").split()
                if word not in Tokenizer.SPECIAL]

    def check_prompts(self, prompts):
        """Raise ValueError unless prompts are a list of texts, each of which has words."""
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        empty = self.encode("")
        for prompt in prompts:
            if not isinstance(prompt, str) or self.encode(prompt.strip()) == empty:
                raise ValueError(f"prompts must be texts with words, got {prompt!r}")

    def encode(self, text, image_tokens=0):
        """Return the token ids of a text, <bos> first. Raises ValueError for an unknown word.

        image_tokens: placeholders for a picture, which only published towers need in the text.
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
        """Return token ids (B, S), padded on the right. Raises ValueError above `length`."""
        rows = [self.encode(text, image_tokens) for text in texts]
        length = length or max(map(len, rows))
        return torch.tensor([self.pad(row, text, length) for row, text in zip(rows, texts)])

    def pad(self, ids, text, length):
        """Return the token ids of a text, padded to `length`. Raises ValueError for more ids."""
        if len(ids) > length:
            raise ValueError(f"{text!r} has {len(ids)} tokens, more than the {length} allowed")
        return ids + [self.PAD] * (length - len(ids))

    def ids_and_targets(self, text, answer=None, *, length):
        """Return token ids and next-token targets, two lists of `length`.

        With an answer, which follows the text, only the answer is a target. Raises ValueError for
        more than `length` tokens.
        """
        ids = self.encode(text)
        start = len(ids) - 1 if answer else 0
        ids += self.encode(answer)[1:] if answer else []
        ids.append(self.EOS)
        targets = [-100] * start + ids[start + 1:]
        targets += [-100] * (length - len(targets))
        return self.pad(ids, text, length), targets

    def request(self, prompt):
        """Return token ids that ask for a detailed caption, and the text with which it begins.

        A tower that was not trained to write captions continues the prompt instead.
        """
        if "detail" not in self.index:
            return self.encode(prompt), prompt
        return self.encode(f"in detail : {prompt}"), ""

    def decode(self, ids):
        """Return the text of token ids."""
        return " ".join(self.words[i] for i in ids)


class DecoderBlock(nn.Module):
    """The Llama block: pre-norm causal attention with grouped queries and RoPE, then SwiGLU.

    head_width: Dh. bias: of queries, keys and values, as in Qwen2. qk_norm: normalise queries and
    keys, as in Qwen3. eps: of the norms.
    """

    def __init__(self, width, heads, kv_heads, hidden, head_width, bias, qk_norm, eps):
        super().__init__()
        self.heads = heads
        self.head_width = head_width
        self.eps = eps
        self.norm1 = RMSNorm(width, eps)
        self.norm2 = RMSNorm(width, eps)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_width, bias=bias)
        self.q_norm = RMSNorm(head_width, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_width, eps) if qk_norm else None
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, x, rope, cache=None):
        """Apply the block to x (B, S, Du).

        cache: a list to store keys and values in. Where it already holds those of earlier tokens,
        x must be a single token, which attends to them, too.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))  # (B, S, H+2Hk, Dh)
        norms = (self.q_norm.weight, self.k_norm.weight, None) if self.q_norm else (None,) * 3
        q, k, v = queries_keys(qkv, rope, self.heads, norms,
                               eps=self.eps)                            # (B, S, H or Hk, Dh) each
        causal = not cache  # a single token after the cached ones attends to all of them
        if cache:
            k = torch.cat((cache[0], k), 1)                                 # (B, L, Hk, Dh)
            v = torch.cat((cache[1], v), 1)                                 # (B, L, Hk, Dh)
        if cache is not None:
            cache[:] = k, v
        # Padding needs no mask: it stands to the right of all real tokens, which do not see it.
        a = attention(q, k, v, causal=causal)                               # (B, S, H*Dh)
        x, y = self.norm2.add(x, self.out(a))                               # (B, S, Du) each
        return x + self.ffn(y)


class Patches(nn.Sequential):
    """The small world's image encoder: strided convolutions, then position embeddings. NOTE (ours).

    patch: the side in pixels of the square that an image token stands for, a power of two.
    width: Du. Raises ValueError where it is not divisible by 4, or is smaller than patch.
    """

    def __init__(self, patch, width):
        if width % 4 or width < patch:
            raise ValueError(f"und_width must be a multiple of 4 and at least {patch} for a tower "
                             f"that reads pictures, got {width}")
        halvings = patch.bit_length() - 1
        widths = [3] + [width >> i for i in reversed(range(halvings))]
        layers = []
        for cin, cout in zip(widths, widths[1:]):
            layers += [nn.Conv2d(cin, cout, 3, stride=2, padding=1), nn.GELU()]
        super().__init__(*layers[:-1])  # no GELU after the last convolution
        self.patch = patch

    def init_parameter(self, name, p):
        """Initialise one parameter so that the scale of activations is kept; biases are 0."""
        if p.ndim == 1:
            p.zero_()
        else:
            p.normal_(0, (2 / p[0].numel()) ** 0.5)

    def forward(self, images):
        """Encode pictures (B, 3, H, W) in [-1, 1] as image tokens (B, P, Du)."""
        x = super().forward(images.type_as(self[0].weight))               # (B, Du, h, w)
        x = x.permute(0, 2, 3, 1)                                         # (B, h, w, Du)
        x = x + self.position_embedding(*x.shape[1:])
        return x.flatten(1, 2)                                            # (B, h*w, Du)

    def position_embedding(self, height, width, channels):
        """Return sinusoids of the row, then of the column, in half of the channels each."""
        positions = torch.arange(max(height, width), device=self[0].weight.device)[:, None]
        waves = torch.cat(rope_table(positions, (channels // 2,), theta=100.0), -1)
        rows = waves[:height, None].expand(-1, width, -1)                 # (h, w, Du/2)
        columns = waves[None, :width].expand(height, -1, -1)              # (h, w, Du/2)
        return torch.cat((rows, columns), -1).type_as(self[0].weight)     # (h, w, Du)


class Understanding(nn.Module):
    """The tower U of MoS sec. 3.1: the small world's, or a Llama, Qwen2 or Qwen3 from a folder.

    vocabulary: number of token ids. width: Du. depth: M. tied: the output layer is the embedding;
    None: there is none, and the tower cannot write. head_width: Dh; None: width / heads. theta,
    rope_scaling: base of the rotary frequencies, and a function that changes them, for texts of at
    most `longest` tokens; None: of any. bias, qk_norm, eps: see DecoderBlock.
    vision: an image encoder, `Patches` or one of `pretrained/encoders.py`. image_token: the id of
    the placeholders in the text that image tokens replace; None: image tokens precede the text.
    """

    def __init__(self, vocabulary, width, depth, heads, kv_heads, hidden, tied=False, vision=None,
                 image_token=None, head_width=None, theta=1e4, rope_scaling=None, longest=None,
                 bias=False, qk_norm=False, eps=1e-6):
        super().__init__()
        if heads % kv_heads or not head_width and width % heads:
            raise ValueError(f"the understanding tower's width {width} must be a multiple of its "
                             f"{heads} heads, and those of its {kv_heads} key-value heads")
        self.head_width = head_width or width // heads
        self.theta = theta
        self.rope_scaling = rope_scaling
        self.longest = longest
        # Not nn.Embedding(...): its own first values import the compiler on the meta device, 2 s.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocabulary, width), freeze=False)
        self.vision = vision
        self.image_token = image_token
        self.blocks = nn.ModuleList(
            DecoderBlock(width=width, heads=heads, kv_heads=kv_heads, hidden=hidden,
                         head_width=self.head_width, bias=bias, qk_norm=qk_norm, eps=eps)
            for _ in range(depth))
        self.norm = RMSNorm(width, eps)
        # NOTE (ours): the small world's output layer is not tied. Words with the same context, such
        # as "left" and "right", would get nearly equal embeddings and so nearly equal states.
        self.can_write = tied is not None
        self.head = nn.Linear(width, vocabulary, bias=False) if tied is False else None
        initialise(self)

    def init_parameter(self, name, p):
        """Initialise one parameter."""
        if name.startswith("vision."):
            self.vision.init_parameter(name.removeprefix("vision."), p)
        elif name == "embedding.weight":
            p.normal_(0, 0.1)  # large: training hardly changes how far apart words are
        else:
            init_parameter(name, p, len(self.blocks))

    def embed(self, tokens, images=None):
        """Return input embeddings (B, S, Du) of texts and of pictures (B, 3, H, W) in [-1, 1].

        Raises ValueError unless every text has as many placeholders as its picture has tokens.
        """
        text = self.embedding(tokens.clamp_min(0))                          # (B, S, Du)
        if images is None:
            return text
        vision = self.vision(images)                                        # (B, P, Du)
        if self.image_token is None:
            return torch.cat((vision, text), 1)                             # (B, P+S, Du)
        is_image = tokens == self.image_token                                # (B, S)
        if (is_image.sum(1) != vision.shape[1]).any():
            raise ValueError(f"each picture has {vision.shape[1]} image tokens, but the texts have "
                             f"{is_image.sum(1).tolist()} placeholders for them")
        return text.masked_scatter(is_image[..., None], vision.type_as(text))  # (B, S, Du)

    def forward(self, x, cache=None):
        """Return the states after each block, before any norm: (B, S, M, Du). MoS eq. (2).

        x: input embeddings (B, S, Du), which are not among the states. cache: a list for each
        block, see DecoderBlock. Raises ValueError for a text of more than `longest` tokens.
        """
        first = cache[0][0].shape[1] if cache and cache[0] else 0
        length = first + x.shape[1]
        if self.longest and length > self.longest:
            raise ValueError(f"a text of {length} tokens is too long for this understanding tower: "
                             f"its rotary frequencies are for at most {self.longest}")
        positions = torch.arange(first, length, device=x.device)[:, None]  # (S, 1)
        rope = rope_table(positions, (self.head_width,), self.theta, self.rope_scaling)
        states = []
        for m, block in enumerate(self.blocks):
            x = block(x, rope, cache[m] if cache else None)
            states.append(x)
        return torch.stack(states, 2)                                       # (B, S, M, Du)

    def logits(self, states):
        """Return next-token logits (B, S, V) in fp32 from the last block's states.

        Raises ValueError for a tower that has no output layer.
        """
        if not self.can_write:
            raise ValueError("this understanding tower cannot write: its folder holds no output "
                             "layer (lm_head.weight)")
        head = self.head or self.embedding
        x = self.norm(states[:, :, -1])                                     # (B, S, Du)
        return at_least_fp32(F.linear(x, head.weight))                      # (B, S, V)

    def loss(self, tokens, target, images=None):
        """Return the next-token cross entropy and two accuracies.

        tokens, target: (B, S); targets of -100 do not count. images: (B, 3, H, W). The loss is a
        mean over each sample's targets, then over samples: the same however a batch is split.
        "token_accuracy": share of targets predicted right. "text_accuracy": share of samples with
        all targets right, which greedy decoding would write without a mistake.
        """
        states = self(self.embed(tokens, images))                           # (B, P+S, M, Du)
        logits = self.logits(states[:, -tokens.shape[1]:])                  # (B, S, V)
        correct = logits.argmax(-1) == target                               # (B, S)
        losses = F.cross_entropy(logits.mT, target, ignore_index=-100, reduction="none")  # (B, S)
        lengths = (target != -100).sum(1)
        loss = (losses.sum(1) / lengths).mean()
        return loss, {"token_accuracy": correct.sum() / lengths.sum(),
                      "text_accuracy": (correct | (target == -100)).all(1).float().mean()}

    @torch.no_grad()
    def write(self, tokens, limit, stops, temperature=0.0, seed=0, images=None):
        """Continue one text (1, S): yield token ids, at most `limit`, until one of `stops` is next.

        temperature: 0 always takes the likeliest token; 1 samples the tower's own distribution.
        """
        generator = torch.Generator().manual_seed(seed)
        cache = [[] for _ in self.blocks]
        x = self.embed(tokens, images)                                      # (1, S, Du)
        for _ in range(limit):
            logits = self.logits(self(x, cache)[:, -1:])[0, 0].cpu()        # (V,)
            if temperature == 0:
                token = logits.argmax()
            else:
                probabilities = ((logits - logits.max()) / temperature).softmax(0)
                token = torch.multinomial(probabilities, 1, generator=generator)
            if token.item() in stops:
                return
            yield token.item()
            x = self.embed(token.view(1, 1).to(tokens.device))              # (1, 1, Du)

    @torch.no_grad()
    def rewrite(self, tokenizer, prompt, limit, temperature=0.0, seed=0):
        """Write a detailed caption of the picture that a prompt asks for. MoS sec. 4.4.

        limit: the most tokens of the caption, so that the tower can read it as a prompt. Where the
        tower writes nothing the prompt stays. Raises ValueError for a prompt without words.
        """
        tokenizer.check_prompts([prompt])
        request, beginning = tokenizer.request(prompt)
        tokens = torch.tensor([request], device=self.embedding.weight.device)
        with autocast(tokens.device):
            ids = list(self.write(tokens, limit, tokenizer.stops, temperature, seed))
        for length in range(len(ids), -1, -1):
            caption = f"{beginning} {tokenizer.decode(ids[:length])}".strip()
            if len(tokenizer.encode(caption)) <= limit:
                break
        return caption or prompt
