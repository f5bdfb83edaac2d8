"""What an attacker puts around a defence that gives no gradient, or another one at every look.

`bpda`, `eot` and `with_refusal` are no attacks. They turn a defence into a model that any attack of
this package climbs, and they change nothing about the defence itself: an image that is found has
still to fool the real thing. So does what `misread_by_generator` finds. Explained in notebook 12.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._descent import ROUNDING, lead
from unfool.inputs import attacked, check_inputs, check_number, frozen


def bpda(module: nn.Module, backward: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Return `module` with another gradient: backward pass differentiable approximation.

    Forwards it is `module`, to the bit. Backwards it is as if `backward` had stood there: Athalye
    et al. 2018. It composes, `nn.Sequential(bpda(Threshold()), net)`. Explained in notebook 12.

    Args:
        module: images (N, C, H, W) -> images, with no gradient, or with one that misleads.
        backward: a smooth function or module that is roughly `module`, such as
            `lambda x: torch.sigmoid(10 * (x - 0.5))` for a threshold. By default the identity:
            right for defences that return about the image that they were given.

    Raises:
        ValueError: when called, where `backward` and `module` return different shapes.
    """
    return _Bpda(module, backward)


class _Bpda(nn.Module):
    def __init__(self, module: nn.Module, backward: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.module, self.backward_as = module, backward

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen: Tensor = self.module(x)
        smooth = x if self.backward_as is None else self.backward_as(x)
        if smooth.shape != seen.shape:
            what = "the identity" if self.backward_as is None else "backward"
            raise ValueError(
                f"bpda: {what} returns {tuple(smooth.shape)} and {type(self.module).__name__} "
                f"{tuple(seen.shape)}: give backward=, a function to the latter"
            )
        return seen + (smooth - smooth.detach())  # the bracket is 0, but for its gradient


def eot(model: nn.Module, samples: int = 20, *, seed: int | None = None) -> nn.Module:
    """Return a model whose logits are the mean of `samples` draws of a randomised model's.

    Expectation over transformation: Athalye et al. 2018b. The gradient of a loss that is linear in
    the logits, such as a margin, is then the mean of the draws' gradients. We average logits
    rather than probabilities, as attacks ask for logits, and a draw that is sure of itself passes
    nearly no gradient through its softmax. Explained in notebook 12.

    The draws run one after the other: a defence may draw once for a whole batch.

    Args:
        model: images (N, C, H, W) -> logits (N, classes), random also in eval mode.
        samples: draws per call, at least 1; the standard error falls with their root. Each costs a
            pass forwards and backwards.
        seed: of a stream of random numbers of its own: every call draws anew, a new `eot` with the
            same seed draws the same again, and torch's global random state stays as it was. By
            default the global state is drawn from and moves.

    Raises:
        TypeError, ValueError: samples is no whole number from 1 on.
    """
    check_number("samples", samples, 1, whole=True)
    if seed is not None:
        check_number("seed", seed, 0, whole=True)
    return Eot(model, samples, seed)


class Eot(nn.Module):
    """See `eot`."""

    def __init__(self, model: nn.Module, samples: int, seed: int | None) -> None:
        super().__init__()
        self.model, self.samples = model, samples
        self.seed = seed
        self.restart()

    def restart(self) -> None:
        """Draw from now on as a new `eot` of the same seed does."""
        self.seeds = None if self.seed is None else Generator().manual_seed(self.seed)

    def forward(self, x: Tensor) -> Tensor:
        if self.seeds is None:
            return self._mean(x)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.seeds)))
            return self._mean(x)

    def _mean(self, x: Tensor) -> Tensor:
        total: Tensor = self.model(x)
        for _ in range(self.samples - 1):
            total = total + self.model(x)
        return total / self.samples


def with_refusal(classifier: nn.Module, suspicion: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a model of one class more, "refused", for who must fool a classifier and a detector.

    Carlini and Wagner 2017b (arXiv 1705.07263, section 3): give it to an attack with `target=`, one
    of the classifier's classes. To reach it is to be misread and accepted; without a target an
    attack may end in "refused", which fools nobody.

    The new logit is the largest one plus suspicion times the spread of the logits, so that it wins
    exactly where the suspicion is positive. (The authors multiply by 1 + suspicion instead, which
    takes logits above 0.)

    Args:
        classifier: images (N, C, H, W) -> logits (N, classes), the reader behind the defence.
        suspicion: images -> (N,), with a gradient; above 0 where the detector refuses, and of order
            1 about the threshold, such as MagNet's `scores / thresholds - 1`, the largest of them.

    Raises:
        ValueError: when called, where suspicion is not (N,).
    """
    return _WithRefusal(classifier, suspicion)


class _WithRefusal(nn.Module):
    def __init__(self, classifier: nn.Module, suspicion: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier, self.suspicion = classifier, suspicion

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        doubt = self.suspicion(x)
        if doubt.shape != (len(x),):
            raise ValueError(
                f"suspicion returns {tuple(doubt.shape)} for {len(x)} images: return one number "
                "each, of several detectors the largest"
            )
        largest = logits.amax(dim=1)
        spread = (largest - logits.amin(dim=1)).detach()
        return torch.cat([logits, (largest + doubt * spread)[:, None]], dim=1)


def misread_by_generator(
    generator: nn.Module,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    starts: int = 3,
    steps: int = 150,
    rate: float = 0.02,
    weight: float = 0.01,
    lead_by: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Search z for images G(z) near to x that the classifier misreads: an attack in z-space.

    Athalye et al. 2018, section 5.4.2, on Defense-GAN: what a generator makes, a defence that shows
    the nearest image of this generator should let pass. Adam minimises from each start, with m the
    margin by which the true class leads,

        mean of (G(z) - x)^2 over the pixels  +  weight * max(0, m + lead_by).

    Args:
        generator: noise (N, latent) -> images like x in [0, 1], with an attribute `latent`.
        model: the classifier behind the defence, images -> logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1]; y: true classes (N,), int64.
        starts: z ~ N(0, 1 / latent) for each image, at least 1.
        steps: of Adam from each start, at least 1.
        rate: Adam's, in units of z.
        weight: of the margin, in units of the mean square, above 0.
        lead_by: the margin, in logits, that is asked of the wrong class.
        seed: of the starts; the global random state stays as it was.

    Returns:
        (starts, N, C, H, W), detached: from each start the nearest image that is misread, x itself
        where none was met.

    Raises:
        TypeError, ValueError: an input is not as above.
    """
    check_inputs(x, y)
    for name, value in (("starts", starts), ("steps", steps)):
        check_number(name, value, 1, whole=True)
    for name, size in (("rate", rate), ("weight", weight), ("lead_by", lead_by)):
        check_number(name, size, 0)
    if rate == 0 or weight == 0:
        raise ValueError(f"rate {rate} and weight {weight} must be > 0: nothing would be sought")
    latent: int = generator.latent  # type: ignore[assignment]
    drawn = torch.randn(starts, len(x), latent, generator=Generator().manual_seed(seed))
    with frozen(generator), attacked(model), torch.enable_grad():
        found = [
            _descend_in_z(generator, model, x.detach(), y, z, (steps, rate, weight, lead_by))
            for z in (drawn / latent**0.5).to(x)
        ]
    return torch.stack(found)


def _descend_in_z(
    generator: nn.Module, model: nn.Module, x: Tensor, y: Tensor, z: Tensor,
    how: tuple[int, float, float, float],
) -> Tensor:  # fmt: skip
    """Return the nearest misread image from one start of each image; see above."""
    steps, rate, weight, lead_by = how
    z = z.clone().requires_grad_(True)
    adam = torch.optim.Adam([z], lr=rate)
    nearest, best = torch.full_like(x[:, 0, 0, 0], torch.inf), x.clone()
    for _ in range(steps):
        made = generator(z)
        apart = (made - x).square().flatten(1).mean(dim=1)
        margin = lead(model(made), y)
        better = (margin < -ROUNDING) & (apart < nearest)
        nearest[better], best[better] = apart.detach()[better], made.detach()[better]
        adam.zero_grad()
        (apart + weight * torch.relu(margin + lead_by)).sum().backward()
        adam.step()
    return best
