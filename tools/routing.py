"""Draw which layer of the understanding tower each generation block reads for each prompt word.

    python -m tools.routing                                    # writes assets/routing.png
    python -m tools.routing --prompt "two stars" --out a.png   # another prompt

The router decides anew for every word, block and time t. The picture shows its decisions at three
times: while there is nearly only noise, half-way, and when the picture is almost finished.
"""

from pathlib import Path

import torch

from common import ROOT, CommandLine, pick_device, replacing, run, to_image, to_tensor
from kernels import autocast
from mos import MoS
from router import select
from sample import check_writable

TIMES = {0.9: "mostly noise", 0.5: "half noise", 0.1: "almost finished"}


@torch.no_grad()
def routes(model, prompt, times, seed=0):
    """Return the layers chosen for a prompt at several times t, their weights, and the latents.

    The latents z_t = (1 - t) z0 + t z1 are those of a picture that the model draws of the prompt,
    mixed with noise; the seed decides both. Index and weight: (times, S, K, N) each, the layer with
    the largest weight first; latents: (times, C, h, w). Raises ValueError for a bad prompt.
    """
    device = model.generation.registers.device
    (image,) = model.generate([prompt], seed=seed)
    z0 = model.vae.encode(to_tensor(image)[None].to(device))                   # (1, C, h, w)
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    t = torch.tensor(times, device=device)
    z = torch.lerp(z0, noise, t[:, None, None, None])                          # (times, C, h, w)
    context = model.read([prompt] * len(times))
    with autocast(device):
        x, positions = model.generation.patchify(z)
        weights = model.route(x, positions, t, context)                        # (times, S, M, N)
    index, weight = select(weights, model.config.k, renormalize=model.config.renormalize)
    return index.cpu(), weight.cpu(), z


def draw(words, index, layers, pictures):
    """Return a matplotlib figure: for each time the noisy picture, below it a table of layers.

    words: one label for each of S tokens, index: (times, S, K, N) from `routes`, layers: M,
    pictures: PIL images. Layers and blocks are counted from 1. Raises ValueError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs the package matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 2.2 + 0.34 * len(words)), layout="constrained")
    axes = figure.subplots(2, len(pictures), height_ratios=(1.4, 0.4 * len(words)), squeeze=False)
    for (time, noise), picture, axis in zip(TIMES.items(), pictures, axes[0]):
        axis.imshow(picture)
        axis.set_title(f"t = {time}: {noise}", fontsize=11)
        axis.set(xticks=(), yticks=())
    for chosen, axis in zip(index, axes[1]):
        draw_table(axis, chosen, layers)
    axes[1, 0].set(ylabel="prompt word", yticks=range(len(words)), yticklabels=words)
    figure.suptitle("Which layer of the text encoder each block reads, for each word")
    figure.supxlabel(f"number and colour: the layer with the largest weight, 1 is the first and "
                     f"{layers} the last; small: what is mixed with it", fontsize=9, color="0.35")
    return figure


def draw_table(axis, chosen, layers):
    """Draw one table: a row for each word, a column for each block; chosen: (S, K, N)."""
    S, _, N = chosen.shape
    shade = 0.9 * chosen[:, 0] / max(1, layers - 1)                            # (S, N)
    axis.imshow(shade.numpy(), "YlGnBu", vmin=0, vmax=1, aspect="auto",
                extent=(0.5, N + 0.5, S - 0.5, -0.5))
    for s in range(S):
        for j in range(N):
            first, *others = (1 + chosen[s, :, j]).tolist()
            ink = dict(color="white" if shade[s, j] > 0.5 else "black", va="center")
            axis.text(j + 0.93, s, first, ha="center", fontsize=10, **ink)
            axis.text(j + 1.15, s + 0.2, ",".join(map(str, others)), fontsize=6, **ink)
    axis.vlines([j + 0.5 for j in range(1, N)], -0.5, S - 0.5, "white", lw=2)
    axis.hlines([s + 0.5 for s in range(S - 1)], 0.5, N + 0.5, "white", lw=2)
    axis.set(xlabel="generation block", xticks=range(1, N + 1), yticks=())
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def shares(index, weight, layers):
    """Return how the weight of the chosen states is shared among the layers: (times, M)."""
    total = weight.new_zeros(len(index), layers)                               # (times, M)
    total.scatter_add_(1, index.flatten(1), weight.flatten(1))
    return total / total.sum(1, keepdim=True)


def main():
    """Run the command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", default="a red circle above a blue square", help="one text")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights",
                        help="folder of a trained model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the picture and of the noise")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "routing.png",
                        help="file to write")
    args = parser.parse_args()
    if abs(args.seed) >= 2 ** 62:
        raise ValueError(f"--seed is too large: {args.seed}")
    check_writable(args.out)
    model = MoS.from_pretrained(args.checkpoint, pick_device())
    index, weight, z = routes(model, args.prompt, list(TIMES), args.seed)
    print("share of the weight by layer, from the first to the last")
    for time, row in zip(TIMES, shares(index, weight, model.config.und_depth)):
        print(f"t = {time}:" + "".join(f"{share:7.2f}" for share in row))
    words = [model.tokenizer.decode([token]) for token in model.tokenizer.encode(args.prompt)]
    with torch.no_grad():
        pictures = [to_image(picture) for picture in model.vae.decode(z).clamp(-1, 1)]
    figure = draw(words, index, model.config.und_depth, pictures)
    with replacing(args.out) as path:
        figure.savefig(path, format="png", dpi=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
