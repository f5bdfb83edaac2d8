"""Checks of exercise 07: padding, a U-Net's skip, the purifier's loss, and three accuracies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from unfool.checks._tools import Answer, Draw, Wrong, pair, same, task

UNIT = 32


@task("ex07_run_padded")
def run_padded(answer: Answer, draw: Draw) -> None:
    """Black around the image up to multiples of 32, and the result cropped back."""
    sizes = [(28, 28), (32, 32), (draw.whole(33, 63), draw.whole(5, 31)), (64, 32)]
    for height, width in sizes:
        x = draw.uniform(2, 1, height, width)
        net = _Ramp()
        got = answer(net, x)
        if not net.seen:
            raise Wrong("the network was never called: give it the padded images")
        tall, wide = net.seen[-1].shape[-2:]
        if tall % UNIT or wide % UNIT:
            raise Wrong(
                f"the network was given {tall}x{wide} pixels for {height}x{width}: both sides must "
                "be multiples of 32"
            )
        if tall - height >= UNIT or wide - width >= UNIT:
            raise Wrong(
                f"{height}x{width} was padded to {tall}x{wide}, more than needed: a side that is a "
                "multiple of 32 stays as it is"
            )
        padded, top, left = _padded(x)
        same(
            net.seen[-1],
            padded,
            "put the same number of black rows (0) above and below, columns left and right; an odd "
            "one goes below or right",
            {
                "all the black is below and to the right: centre the image": _corner(x),
                "pad with black, which is 0": _padded(x, 1.0)[0],
            },
        )
        made = _Ramp()(padded)
        same(
            got,
            made[..., top : top + height, left : left + width],
            "crop the rows and columns back out that the image was put into",
            {
                "you crop at the corner, and the image is in the middle": made[
                    ..., :height, :width
                ],
                "crop the result back to the image's size": made,
                "you return the image: return what the network made of it": x,
            },
        )


class _Ramp(nn.Module):
    """Adds to each pixel something that tells where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        height, width = images.shape[-2:]
        return images / 2 + torch.arange(height)[:, None] / 97 + torch.arange(width) / 89


def _padded(x: Tensor, fill: float = 0.0) -> tuple[Tensor, int, int]:
    n, c, height, width = x.shape
    tall, wide = (UNIT * ((side + UNIT - 1) // UNIT) for side in (height, width))
    top, left = (tall - height) // 2, (wide - width) // 2
    canvas = torch.full((n, c, tall, wide), fill)
    canvas[:, :, top : top + height, left : left + width] = x
    return canvas, top, left


def _corner(x: Tensor) -> Tensor:
    canvas = torch.zeros_like(_padded(x)[0])
    canvas[:, :, : x.shape[2], : x.shape[3]] = x
    return canvas


@task("ex07_tiny_unet")
def tiny_unet(answer: Answer, draw: Draw) -> None:
    """Down twice, up twice, with one skip beside the bottleneck."""
    kernels = [draw.normal(*shape) for shape in ((4, 1, 2, 2), (6, 4, 2, 2), (6, 4, 2, 2))]
    seen: list[Tensor] = []

    def down1(x: Tensor) -> Tensor:
        return torch.tanh(torch.conv2d(x, kernels[0], stride=2))

    def down2(x: Tensor) -> Tensor:
        return torch.tanh(torch.conv2d(x, kernels[1], stride=2))

    def up2(x: Tensor) -> Tensor:
        return torch.tanh(torch.conv_transpose2d(x, kernels[2], stride=2))

    def up1(x: Tensor) -> Tensor:
        seen.append(x.detach())
        weight = torch.arange(1, x.shape[1] + 1) / x.shape[1]
        return (x * weight.view(-1, 1, 1)).mean(1, keepdim=True).repeat_interleave(2, 2)

    x = draw.uniform(2, 1, 8, 8)
    got = answer(down1, down2, up2, up1, x)
    if not seen:
        raise Wrong("up1 was never called: the last step goes up to the image's size")
    a = down1(x)
    c = up2(down2(a))
    joined = torch.cat([c, a], 1)
    same(
        seen[-1],
        joined,
        "up1 must see the output of up2 first, then that of down1, side by side as channels "
        "(dim=1)",
        {
            "the skip is missing: up1 must also see what down1 made": c,
            "you add the skip: lay it beside, as further channels": c + a,
            "the order is wrong: first what comes from below, then the skip": torch.cat([a, c], 1),
            "you join along the batch: channels are dim=1": torch.cat([c, a], 0),
            "the bottleneck is missing: go down twice and up twice": torch.cat([a, a], 1),
        },
    )
    same(got, up1(joined), "return what up1 makes")


@task("ex07_purifier_loss")
def purifier_loss(answer: Answer, draw: Draw) -> None:
    """G's loss: be called real, and stay near the clean image in L1."""
    logits, lam = 2 * draw.normal(3, 1, 4, 4), float(draw.whole(5, 20))
    purified, clean = draw.uniform(3, 1, 6, 6), draw.uniform(3, 1, 6, 6)
    real, made = float(softplus(-logits).mean()), float(softplus(logits).mean())
    l1 = 2 * float((purified - clean).abs().mean())
    l2 = 4 * float((purified - clean).square().mean())
    same(
        answer(logits, purified, clean, lam),
        real + lam * l1,
        "cross-entropy of the patch logits against 1, plus lam times the mean of |purified - "
        "clean| "
        "on the scale of [-1, 1]",
        {
            "the images are in [0, 1]: on the scale of [-1, 1] differences are twice as large": (
                real + lam * l1 / 2
            ),
            "label 1: G wants its patches called real": made + lam * l1,
            "L1 takes absolute values, not squares": real + lam * l2,
            "lam weighs L1, not the GAN term": lam * real + l1,
            "the GAN term is missing": lam * l1,
            "L1 is missing": real,
            "take the mean over pixels, not the sum": real + lam * l1 * purified.numel(),
        },
    )


@task("ex07_recovered")
def recovered(answer: Answer, draw: Draw) -> None:
    """The attack's success, and what of it the purifier undoes."""
    n = 60
    clean, attacked, purified = (draw.mask(n, share=p) for p in (0.8, 0.4, 0.6))
    rows = list(zip(clean.tolist(), attacked.tolist(), purified.tolist(), strict=True))
    fooled = [p for c, a, p in rows if c and not a]
    if not fooled:
        return
    tried = sum(c for c, _, _ in rows)
    success, share = pair(answer(clean, attacked, purified), "(success, recovered)")
    same(
        success,
        len(fooled) / tried,
        "of the images that were read rightly when clean, the share that is misread after the "
        "attack",
        {
            "divide by the images that were there to be fooled, those read rightly when clean": (
                len(fooled) / n
            ),
            "images that were misread before count as success: leave them out": sum(
                not a for _, a, _ in rows
            )
            / n,
            "that is the share that withstands: success is the attacker's": 1 - len(fooled) / tried,
        },
    )
    same(
        share,
        sum(fooled) / len(fooled),
        "of the images that the attack turned from right to wrong, the share that is right again",
        {
            "you divide by all images: only those that the attack fooled count": sum(fooled) / n,
            "you average over all images: only those that the attack fooled count": sum(
                p for _, _, p in rows
            )
            / n,
            "you divide by all that were attacked: only those that were fooled count": sum(fooled)
            / tried,
        },
    )


@task("ex07_end_to_end")
def end_to_end(answer: Answer, draw: Draw) -> None:
    """Right answers over all images, attacked where there was something to attack."""
    n = 80
    clean = draw.mask(n, share=0.7)
    attacked, unattacked = draw.mask(n, share=0.4), draw.mask(n, share=0.8)
    rows = list(zip(clean.tolist(), attacked.tolist(), unattacked.tolist(), strict=True))
    right = sum(a if c else u for c, a, u in rows)
    where = (
        "where the classifier was right on the clean image take the attacked result, else the other"
    )
    same(
        answer(clean, attacked, unattacked),
        right / n,
        where,
        {
            "images that the classifier misread when clean are not attacked: they come as they "
            "are": sum(a for _, a, _ in rows) / n,
            "that is the accuracy without an attack": sum(u for _, _, u in rows) / n,
            "count over all images, also those that were not attacked": sum(
                a for c, a, _ in rows if c
            )
            / sum(c for c, _, _ in rows),
            "those not attacked count as wrong here: the purifier may have them right": sum(
                a for c, a, _ in rows if c
            )
            / n,
            "the two are swapped: attacked where the classifier was right": sum(
                u if c else a for c, a, u in rows
            )
            / n,
        },
        tolerance=1e-6,
    )
