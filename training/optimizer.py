"""Muon for matrices, Adam for embeddings, norms and routers, and the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[n, rows, columns] -> matrices with about the same singular vectors and singular values near 1.

    Newton-Schulz iteration with the coefficients of Keller Jordan's Muon.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdam:
    """One step over all trainable weights of a model. Stacks of matrices (experts) are orthogonalised one by one."""

    def __init__(self, model: nn.Module, muon: float, adam: float, router: float = 1e-2, decay: float = 0.01):
        weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]

        def by_adam(name: str, weight: torch.Tensor) -> bool:
            return weight.ndim < 2 or any(part in name for part in ("embed_tokens", "router.proj", "centroids"))

        self.matrices = [weight for name, weight in weights if not by_adam(name, weight)]
        self.momentum = [torch.zeros_like(weight) for weight in self.matrices]
        self.rate, self.decay, self.steps = muon, decay, 0
        routers = [weight for name, weight in weights if "router.proj" in name]
        others = [weight for name, weight in weights if by_adam(name, weight) and "router.proj" not in name]
        groups = [{"params": rows, "lr": rate} for rows, rate in ((others, adam), (routers, router)) if rows]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.95), foreach=True)
        self.rates = [group["lr"] for group in self.adam.param_groups]
        self.shapes: dict[tuple[int, int], list[int]] = {}
        for index, weight in enumerate(self.matrices):
            self.shapes.setdefault(tuple(weight.shape[-2:]), []).append(index)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Apply the gradients with every learning rate times `scale`, and clear them."""
        self.steps += 1
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        self.adam.step()
        self.adam.zero_grad()
        keep = 0.85 + 0.10 * min(1, self.steps / 100)
        for shape, indices in self.shapes.items():
            updates = [self._direction(index, keep).reshape(-1, *shape) for index in indices]
            stacked = orthogonalise(torch.cat(updates)) * max(1, shape[0] / shape[1]) ** 0.5
            for index, update in zip(indices, stacked.split([len(u) for u in updates]), strict=True):
                weight = self.matrices[index]
                weight.mul_(1 - self.rate * scale * self.decay).add_(update.view_as(weight), alpha=-self.rate * scale)
                weight.grad = None

    def _direction(self, index: int, keep: float) -> torch.Tensor:
        gradient, momentum = self.matrices[index].grad, self.momentum[index]
        momentum.lerp_(gradient, 1 - keep)
        return gradient.lerp(momentum, keep)  # Nesterov

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]
        for mine, saved in zip(self.momentum, state["momentum"], strict=True):
            mine.copy_(saved)


def rate_scale(step: int, steps: int, warm: float = 0.02, cool: float = 0.5) -> float:
    """The learning rate at `step` of `steps` as a share: up, flat, then linear to 0.02 over the last `cool` of them."""
    done = step / steps
    if done < warm:
        return max(0.05, done / warm)
    return 1.0 if done < 1 - cool else max(0.02, (1 - done) / cool)
