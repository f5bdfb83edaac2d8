"""The classifiers: the layers of their papers, logits, seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from unfool.classifiers import CLASSIFIERS, build, densenet, model_a, model_b, resnet

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
SHAPES = {"28x28 grey": GREY, "32x32 colour": COLOUR}

# Table 1 of the paper, line by line, but for the soft-max, which the loss applies.
TABLE_1 = {
    "anet": [
        "Conv(64, 5x5, 1) + ReLU", "Conv(64, 3x3, 2) + ReLU", "Dropout(0.5)",
        "FC(128) + ReLU", "Dropout(0.5)", "FC(10) + ReLU",
    ],
    "bnet": [
        "Conv(64, 3x3, 1) + ReLU", "Conv(64, 3x3, 1) + ReLU", "Maxpooling",
        "Conv(64, 3x3, 1) + ReLU", "Conv(64, 3x3, 1) + ReLU", "Maxpooling",
        "FC(200) + ReLU", "Dropout(0.5)", "FC(200) + ReLU", "Dropout(0.5)", "FC(10) + ReLU",
    ],
}  # fmt: skip

# Defense-GAN's utils/network_builder.py; SAME pads so that the size is divided by the stride.
_B = [
    "Conv(64, 8x8, 2) SAME + ReLU", "Conv(128, 6x6, 2) + ReLU", "Conv(128, 5x5, 1) + ReLU",
]  # fmt: skip
DEFENSE_GAN = {
    "a": [
        "Conv(64, 5x5, 1) SAME + ReLU", "Conv(64, 5x5, 2) + ReLU", "Dropout(0.25)",
        "FC(128) + ReLU", "Dropout(0.5)", "FC(10)",
    ],
    "b": ["Dropout(0.2)", *_B, "Dropout(0.5)", "FC(10)"],
    "c": [
        "Conv(128, 3x3, 1) SAME + ReLU", "Conv(64, 5x5, 2) + ReLU", "Dropout(0.25)",
        "FC(128) + ReLU", "Dropout(0.5)", "FC(10)",
    ],
    "d": ["FC(200) + ReLU", "Dropout(0.5)", "FC(200) + ReLU", "FC(10)"],
    "e": ["FC(200) + ReLU", "FC(200) + ReLU", "FC(10)"],
    "f": [*_B, "FC(10)"],
}  # fmt: skip


def leaves(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if not list(m.children())]


def described(net: nn.Module, shape: tuple[int, int, int]) -> list[str]:
    """The layers that an image passes, in the notation of the paper's Table 1."""
    lines: list[str] = []

    def see(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.ReLU):
            lines[-1] += " + ReLU"
        elif not isinstance(layer, nn.Flatten):
            lines.append(_line(layer, inputs[0], output))

    hooks = [leaf.register_forward_hook(see) for leaf in leaves(net)]
    net.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return lines


def _line(layer: nn.Module, x: Tensor, y: Tensor) -> str:
    if isinstance(layer, nn.Conv2d):
        (kernel, _), (stride, _) = layer.kernel_size, layer.stride
        valid = (x.shape[-1] - kernel) // stride + 1
        padding = "" if y.shape[-1] == valid else " SAME"
        assert y.shape[-1] in (valid, -(-x.shape[-1] // stride)), "neither VALID nor SAME"
        return f"Conv({layer.out_channels}, {kernel}x{kernel}, {stride}){padding}"
    if isinstance(layer, nn.Linear):
        return f"FC({layer.out_features})"
    if isinstance(layer, nn.Dropout):
        return f"Dropout({layer.p:g})"
    if isinstance(layer, nn.MaxPool2d):
        assert y.shape[-1] == x.shape[-1] // 2
        return "Maxpooling"
    raise AssertionError(f"not in any of the tables: {layer}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", TABLE_1)
def test_anet_and_bnet_are_the_papers(name: str, shape: tuple[int, int, int]) -> None:
    assert described(build(name, shape, relu_logits=True), shape) == TABLE_1[name]
    logits = [*TABLE_1[name][:-1], "FC(10)"]
    assert described(build(name, shape), shape) == logits  # ours: without the last ReLU


def test_the_description_sees_a_difference() -> None:
    changed = build("anet", GREY, relu_logits=True)
    first = next(m for m in changed.modules() if isinstance(m, nn.Conv2d))
    first.padding = (2, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        assert described(changed, GREY) == TABLE_1["anet"]
    assert described(build("bnet", GREY, relu_logits=True), GREY) != TABLE_1["anet"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", DEFENSE_GAN)
def test_a_to_f_are_defense_gans(name: str, shape: tuple[int, int, int]) -> None:
    net = build(name, shape)
    assert described(net, shape) == DEFENSE_GAN[name]
    for layer in leaves(net):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            lengths = layer.weight.flatten(1).norm(dim=1)
            assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
            assert layer.bias is not None
            assert not layer.bias.any()


def rates(net: nn.Module) -> list[float]:
    return [round(m.p, 6) for m in net.modules() if isinstance(m, nn.Dropout)]


def test_literal_dropout_keeps_what_the_printed_rate_drops() -> None:
    assert rates(model_b(GREY)) == [0.2, 0.5]
    assert rates(model_b(GREY, literal_dropout=True)) == [0.8, 0.5]
    assert rates(model_a(GREY)) == [0.25, 0.5]
    assert rates(model_a(GREY, literal_dropout=True)) == [0.75, 0.5]
    assert rates(build("b", GREY, literal_dropout=True)) == [0.8, 0.5]
    with pytest.raises(ValueError, match="a reading of a, b, c, d, e, f, not of anet"):
        build("anet", GREY, literal_dropout=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_returns_logits(name: str, shape: tuple[int, int, int]) -> None:
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = build(name, shape, 7).eval()(images)
        clipped = build(name, shape, 7, relu_logits=True).eval()(images)
    assert logits.shape == (2, 7)
    assert (logits < 0).any()
    assert torch.equal(clipped, logits.clamp_min(0))  # the same weights, then the paper's ReLU


@pytest.mark.parametrize("name", ["anet", "b", "resnet8", "densenet40"])
def test_weights_come_from_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    one = build(name, GREY, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = build(name, GREY, seed=1).state_dict()
    other = build(name, GREY, seed=2).state_dict()
    assert all(torch.equal(one[k], again[k]) for k in one)
    weights = [k for k, v in one.items() if k.endswith("weight") and v.ndim > 1]
    assert weights
    assert not any(torch.equal(one[k], other[k]) for k in weights)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"'resnet2'.*choose from anet, bnet.*did you mean 'resnet"
    ):
        build("resnet2", GREY)
    with pytest.raises(ValueError, match="unknown classifier 'xyz'"):
        build("xyz", GREY)


# --- depth and size -------------------------------------------------------------------------------


def layers_of(net: nn.Module, kernels: tuple[int, ...]) -> int:
    """Weighted layers: the convolutions of these kernel sizes, and the fully connected one."""
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    return sum(c.kernel_size[0] in kernels for c in convolutions) + 1


def millions(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize("depth", [8, 14, 20, 18])
def test_resnets_have_their_depth(depth: int) -> None:
    assert layers_of(resnet(COLOUR, depth=depth), (3,)) == depth  # 1x1 shortcuts do not count


@pytest.mark.parametrize("depth", [40, 100])
def test_densenets_have_their_depth(depth: int) -> None:
    assert layers_of(densenet(COLOUR, depth=depth), (1, 3)) == depth


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: resnet(COLOUR, depth=18), 11.17),
        (lambda: resnet(COLOUR, depth=20), 0.27),
        (lambda: densenet(COLOUR, depth=100), 0.77),
    ],
)
def test_sizes_are_those_of_the_literature(make: Callable[[], nn.Module], size: float) -> None:
    assert millions(make()) == pytest.approx(size, abs=0.006)


@pytest.mark.parametrize("depth", [0, 2, 9, 19, 21])
def test_resnet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"18 or 6n\+2.*not {depth}"):
        resnet(COLOUR, depth=depth)


@pytest.mark.parametrize("depth", [4, 41, 101])
def test_densenet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n\+4.*not {depth}"):
        densenet(COLOUR, depth=depth)
