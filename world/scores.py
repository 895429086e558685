import torch

from kernels import autocast
from tools.evaluate import *
from tools.evaluate import overall, score_edits, score_judge, score_tasks, score_understanding


@torch.no_grad()
def losses_by_time(model, z0, tokens, images=None, reference=None):
    z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0)
    times = (torch.full_like(z0[:, 0, 0, 0], (i + 0.5) / 8) for i in range(8))
    with autocast(z0.device):
        return torch.stack([model.loss(z0, tokens, t, z1, images=images, reference=reference) for t in times])
