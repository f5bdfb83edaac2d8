"""Attacks: equal to an independent implementation, inside their ball, kind to the model."""

from __future__ import annotations

import inspect
import linecache
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attack_tools import CLASSES, batch, network, next_class
from unfool import inputs
from unfool.attacks import (
    ATTACKS,
    SIGN_FAMILY,
    VERSIONS,
    AttackSettings,
    bpda,
    fgsm,
    paper_attacks,
    random_targets,
)

NEEDS_TARGET = {"jsma"}
REFUSES_TARGET = {"r_llc", "deepfool", "hop_skip_jump"}
QUICK: dict[str, dict[str, Any]] = {
    "bim": {"steps": 2}, "pgd": {"steps": 2}, "deepfool": {"steps": 3},
    "carlini_wagner_l2": {"searches": 1, "steps": 3}, "carlini_wagner_l0": {"steps": 3},
    "carlini_wagner_linf": {"steps": 3}, "lbfgs": {"searches": 1, "steps": 2},
    "ead": {"searches": 1, "steps": 3}, "ddn": {"steps": 3}, "fmn": {"steps": 3},
    "apgd": {"steps": 3, "targets": 1}, "square": {"queries": 5},
    "spsa": {"queries": 10, "samples": 2}, "hop_skip_jump": {"queries": 20, "evaluations": 5},
}  # fmt: skip
"""Settings that keep a test of the frame, not of the strength, short."""


def call(name: str, **arguments: Any) -> Tensor:
    """Call an attack; give it a target where it needs one and none is given."""
    if name in NEEDS_TARGET and "target" not in arguments:
        arguments["target"] = next_class(batch(len(arguments["x"]))[1])
    return ATTACKS[name](**QUICK.get(name, {}) | arguments)


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("eps", [0.01, 0.15, 1.0])
def test_fgsm_equals_cleverhans(channels: int, targeted: bool, eps: float) -> None:
    net, (x, y) = network(channels).eval(), batch(40, channels)
    target = next_class(y) if targeted else None
    theirs = fast_gradient_method(
        net, x, eps, np.inf, clip_min=0.0, clip_max=1.0,
        y=y if target is None else target, targeted=targeted,
    ).detach()  # fmt: skip
    ours = fgsm(net, x, y, eps=eps, target=target)
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)
    assert not torch.allclose(fgsm(net, x, next_class(y), eps=eps, target=None), theirs) or targeted


def test_fgsm_by_hand() -> None:
    """On a linear model the gradient is known: the other class's weights minus the true one's."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    weight = torch.tensor([[1.0, -1.0, 0.0, 3.0], [0.0, 1.0, 0.0, 3.5]])
    net[1].weight.data, net[1].bias.data = weight, torch.zeros(2)
    x = torch.tensor([0.5, 0.5, 0.5, 0.5]).view(1, 1, 2, 2)
    got = fgsm(net, x, torch.tensor([0]), eps=0.2)
    assert torch.allclose(got.flatten(), torch.tensor([0.3, 0.7, 0.5, 0.7]), atol=1e-7)
    aimed = fgsm(net, x, torch.tensor([1]), eps=0.2, target=torch.tensor([0]))
    assert torch.allclose(aimed.flatten(), torch.tensor([0.7, 0.3, 0.5, 0.3]), atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.sampled_from([1, 3]), size=st.integers(1, 9),
    eps=st.floats(0, 1), seed=st.integers(0, 99), black_and_white=st.booleans(),
)  # fmt: skip
def test_results_lie_in_the_ball_and_in_the_unit_range(
    n: int, channels: int, size: int, eps: float, seed: int, black_and_white: bool
) -> None:
    net, (x, y) = network(channels, size, seed), batch(n, channels, size, seed)
    x = x.round() if black_and_white else x
    before = x.clone()
    got = fgsm(net, x, y, eps=eps)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    assert 0 <= float(got.min()) <= float(got.max()) <= 1
    assert float((got - x).abs().max()) <= eps + 1e-6
    assert torch.equal(x, before)


def test_most_pixels_use_the_whole_budget() -> None:
    """Negative control of the ball: an attack that does nothing would lie in it, too."""
    x, y = batch(8)
    moved = (fgsm(network(), x, y, eps=0.05) - x).abs()
    inside = (x > 0.05) & (x < 0.95)
    assert float((moved[inside] > 0.049).float().mean()) > 0.99


def test_the_loss_goes_up_or_towards_the_target_down() -> None:
    net, (x, y) = network().eval(), batch(64)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(images), labels, reduction="none").detach()

    assert (loss(fgsm(net, x, y, eps=0.02), y) > loss(x, y)).float().mean() > 0.95
    aim = next_class(y)
    aimed = fgsm(net, x, y, eps=0.02, target=aim)
    assert (loss(aimed, aim) < loss(x, aim)).float().mean() > 0.95


def test_eps_0_returns_the_images_in_new_memory() -> None:
    x, y = batch()
    got = fgsm(network(), x, y, eps=0.0)
    assert torch.equal(got, x)
    assert got.data_ptr() != x.data_ptr()


def test_a_batch_of_one_equals_its_row_among_96() -> None:
    net, (x, y) = network(), batch(96)
    whole = fgsm(net, x, y)
    for i in (0, 63, 64, 95):  # on both sides of a chunk's edge
        assert torch.allclose(fgsm(net, x[i : i + 1], y[i : i + 1]), whole[i : i + 1], atol=1e-6)


def test_permuting_the_batch_permutes_the_result() -> None:
    net, (x, y) = network(), batch(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fgsm(net, x[order], y[order]), fgsm(net, x, y)[order], atol=1e-6)


def test_the_result_is_detached_wherever_it_is_called() -> None:
    net, (x, y) = network(), batch()
    usual = fgsm(net, x, y)
    assert not usual.requires_grad
    assert not fgsm(net, x.clone().requires_grad_(True), y).requires_grad
    with torch.no_grad():
        assert torch.equal(fgsm(net, x, y), usual)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_empty_batch_comes_back_empty(name: str) -> None:
    x, y = batch(0)
    told: list[tuple[int, int, str]] = []
    got = call(name, model=network(), x=x, y=y, progress=lambda *step: told.append(step))
    assert got.shape == (0, 1, 8, 8)
    assert got.dtype == torch.float32
    assert told == []


def test_the_random_state_stays_and_bits_repeat() -> None:
    net, (x, y) = network(), batch()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = fgsm(net, x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert torch.equal(fgsm(net, x, y), first)


def test_progress_counts_images() -> None:
    told: list[tuple[int, int, str]] = []
    x, y = batch(80)
    fgsm(network(), x, y, progress=lambda *step: told.append(step))
    assert told == [(64, 80, "fgsm"), (80, 80, "fgsm")]


# --- the caller's model comes back as it was ------------------------------------------------------


def state(net: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in net.modules()],
        "flags": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "values": {k: v.clone() for k, v in net.state_dict().items()},
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    grads = all(
        (g is None) == (h is None) and (g is None or torch.equal(g, h))
        for g, h in zip(a["grads"], b["grads"], strict=True)
    )
    values = all(torch.equal(v, b["values"][k]) for k, v in a["values"].items())
    return grads and values and a["modes"] == b["modes"] and a["flags"] == b["flags"]


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_model_comes_back_as_it_was(name: str) -> None:
    net, (x, y) = network(), batch()
    net[5].weight.grad = torch.ones_like(net[5].weight)  # the caller's own
    before = state(net)
    assert len(set(before["modes"])) == 2  # mixed: a plain net.train() would not do
    assert len(set(before["flags"])) == 2
    call(name, model=net, x=x, y=y)
    assert same(state(net), before)


class Fails(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert not self.inner.training  # it was in eval mode by then
        raise RuntimeError("out of something")


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_model_comes_back_after_an_error_inside_it(name: str) -> None:
    net, (x, y) = Fails(network()), batch()
    before = state(net)
    with pytest.raises(RuntimeError, match="out of something"):
        call(name, model=net, x=x, y=y)
    assert same(state(net), before)


def test_the_comparison_of_states_sees_each_difference() -> None:
    before = state(network())
    for change in (
        lambda net: net.eval(),
        lambda net: net.requires_grad_(True),
        lambda net: net[7].bias.data.add_(1),
        lambda net: net[1].running_mean.add_(1),
        lambda net: setattr(net[7].bias, "grad", torch.zeros(CLASSES)),
    ):
        net = network()
        change(net)
        assert not same(state(net), before)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_model_in_train_mode_is_attacked_in_eval_mode(name: str) -> None:
    net, (x, y) = network(), batch()
    in_train = call(name, model=net.train(), x=x, y=y)
    assert torch.equal(in_train, call(name, model=net.eval(), x=x, y=y))
    assert net(x).equal(net(x))
    assert not net.train()(x).equal(net(x))  # the control: its dropout shows


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_images_are_new_and_the_callers_are_as_they_were(name: str) -> None:
    net, (x, y) = network(), batch()
    before = x.clone()
    got = call(name, model=net, x=x.requires_grad_(True), y=y)
    assert (got.shape, got.dtype, got.device, got.requires_grad) == (
        x.shape, x.dtype, x.device, False,
    )  # fmt: skip
    assert torch.equal(x, before)
    assert x.grad is None
    assert got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_global_random_state_stays_and_bits_repeat(name: str) -> None:
    net, (x, y) = network(), batch()
    before = torch.get_rng_state()
    first = call(name, model=net, x=x, y=y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert torch.equal(call(name, model=net, x=x, y=y), first)


class Narrow(nn.Module):
    """Runs out of memory, as a GPU does, with more than ten images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.refused = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 10:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("out of memory")
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_out_of_memory_means_fewer_images_at_once_and_the_same_result(name: str) -> None:
    net, (x, y) = Narrow(network()), batch(40)
    got = call(name, model=net, x=x, y=y)
    assert net.refused > 0
    assert torch.allclose(got, call(name, model=net.inner, x=x, y=y), atol=1e-5)


def test_memory_for_not_even_one_image_is_an_error() -> None:
    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("out of memory")
            return torch.ones(len(x), CLASSES)

    x, y = batch()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fgsm(Full(), x, y)


# --- bad input ------------------------------------------------------------------------------------

Change = Callable[[Tensor, Tensor], dict[str, Any]]


def first_pixel(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


def partly_elsewhere() -> nn.Module:
    net = network()
    net[-1].to("meta")
    return net


BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "pixels to 255": (lambda x, y: {"x": x * 255}, ValueError, r"spans \[.*25\d\].*divide by 255"),
    "negative pixel": (
        lambda x, y: {"x": first_pixel(x, -0.5)}, ValueError, r"spans \[-0\.5,.*normalisation",
    ),
    "uint8": (
        lambda x, y: {"x": (x * 255).byte()}, TypeError, r"torch\.uint8: use x\.float\(\) / 255",
    ),
    "float64": (lambda x, y: {"x": x.double()}, TypeError, r"float64: use x\.float\(\)$"),
    "float16": (lambda x, y: {"x": x.half()}, TypeError, r"float16: use x\.float\(\)$"),
    "NaN": (lambda x, y: {"x": first_pixel(x, float("nan"))}, ValueError, r"1 pixels .* NaN"),
    "inf": (lambda x, y: {"x": first_pixel(x, float("inf"))}, ValueError, r"1 pixels .* infinite"),
    "numpy x": (lambda x, y: {"x": x.numpy()}, TypeError, r"ndarray: use torch\.as_tensor\(x\)"),
    "no batch dimension": (
        lambda x, y: {"x": x[0]}, ValueError, r"not \(1, 8, 8\).*x\.unsqueeze\(0\)",
    ),
    "flat": (lambda x, y: {"x": x.flatten(1)}, ValueError, r"\(N, C, H, W\), not \(6, 64\)"),
    "labels (N, 1)": (lambda x, y: {"y": y[:, None]}, ValueError, r"not \(6, 1\): use y\.squeeze"),
    "one-hot int": (
        lambda x, y: {"y": nn.functional.one_hot(y, CLASSES)}, (TypeError, ValueError),
        r"\(6, 3\).*y\.argmax\(1\)",
    ),
    "one-hot float": (
        lambda x, y: {"y": nn.functional.one_hot(y, CLASSES).float()}, (TypeError, ValueError),
        r"\(6, 3\).*y\.argmax\(1\)",
    ),
    "too few labels": (lambda x, y: {"y": y[:-1]}, ValueError, r"shape \(6,\), not \(5,\)"),
    "int32": (lambda x, y: {"y": y.int()}, TypeError, r"not torch\.int32: use y\.long\(\)"),
    "numpy y": (lambda x, y: {"y": y.numpy()}, TypeError, r"ndarray.*torch\.as_tensor\(y\)"),
    "label too large": (
        lambda x, y: {"y": y + CLASSES}, ValueError, r"y spans.*has 3 classes.*0 to 2",
    ),
    "label below 0": (lambda x, y: {"y": y - CLASSES}, ValueError, r"y spans \[-3.*0 to 2"),
    "labels elsewhere": (
        lambda x, y: {"y": y.to("meta")}, ValueError, r"y is on meta and x on cpu.*\.to\(",
    ),
    "a part of the model elsewhere": (
        lambda x, y: {"model": partly_elsewhere()}, ValueError,
        r"model is on meta and x on cpu.*\.to\(",
    ),
    "model elsewhere": (
        lambda x, y: {"model": network().to("meta")}, ValueError,
        r"model is on meta and x on cpu.*\.to\(",
    ),
}  # fmt: skip
BAD_TARGET: dict[str, tuple[Change, type[Exception], str]] = {
    "target is label": (lambda x, y: {"target": y}, ValueError, r"equals y for 6 images.*another"),
    "target too large": (
        lambda x, y: {"target": y + CLASSES}, ValueError, r"target spans.*has 3 classes.*0 to 2",
    ),
    "target too short": (
        lambda x, y: {"target": next_class(y)[:2]}, ValueError, r"target must have shape \(6,\)",
    ),
    "target int32": (
        lambda x, y: {"target": next_class(y).int()}, TypeError, r"use target\.long\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize("name", [*BAD, *BAD_TARGET])
def test_bad_input_is_refused_with_value_and_remedy(attack: str, name: str) -> None:
    change, kind, message = (BAD | BAD_TARGET)[name]
    if name in BAD_TARGET and attack in REFUSES_TARGET:
        kind, message = ValueError, f"{attack} takes no target, because .*: leave target out"
    x, y = batch()
    arguments: dict[str, Any] = {"model": network(), "x": x, "y": y} | change(x, y)
    if attack in NEEDS_TARGET and "target" not in arguments:
        arguments["target"] = next_class(y)
    model = arguments["model"]
    modes = [m.training for m in model.modules()]
    with pytest.raises(kind) as caught:
        ATTACKS[attack](**arguments)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert [m.training for m in model.modules()] == modes


class Black(nn.Module):
    """To 0 or 1; as a comparison there is no gradient, rounded there is one, and it is zero."""

    def __init__(self, *, rounds: bool) -> None:
        super().__init__()
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        return x.round() if self.rounds else (x > 0.5).to(x.dtype)


BLIND = {"square", "spsa", "hop_skip_jump"}  # ask for scores or labels
MOVES_AT_RANDOM = {"r_fgsm", "r_llc", "pgd", "apgd"}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_defence_without_a_gradient_is_named_and_no_attack_gives_up_in_silence(name: str) -> None:
    x, y = batch()
    hard, net = Black(rounds=False), network().eval()
    with torch.no_grad():  # something must be there to attack
        y = nn.Sequential(hard, net)(x).argmax(dim=1)
    aim = {"target": next_class(y)} if name in NEEDS_TARGET else {}
    if name in BLIND:
        assert call(name, model=nn.Sequential(hard, net), x=x, y=y, **aim).shape == x.shape
        return
    with pytest.raises(ValueError, match=r"Black \(0\) stops it.*bpda\(defense\)"):
        call(name, model=nn.Sequential(hard, net), x=x, y=y, **aim)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call(name, model=nn.Sequential(bpda(hard), net), x=x, y=y, **aim)
    assert not said  # the control
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call(name, model=nn.Sequential(Black(rounds=True), net), x=x, y=y, **aim)
    told = ["moved none of 6 images" in str(warning.message) for warning in said]
    assert told == [True] * (name not in MOVES_AT_RANDOM)


@pytest.mark.parametrize("name", ["fgsm", "carlini_wagner_l2", "ead"])
def test_a_gradient_that_is_zero_at_some_images_is_no_fault(name: str) -> None:
    class Black1(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:1].round(), x[1:]])

    x, y = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(name, model=nn.Sequential(Black1(), network()), x=x, y=y)


@pytest.mark.parametrize("eps", [-0.1, float("nan")])
def test_eps_must_be_a_distance(eps: float) -> None:
    x, y = batch()
    for name in SIGN_FAMILY:
        with pytest.raises(ValueError, match=f"eps must be >= 0, not {eps}"):
            ATTACKS[name](network(), x, y, eps=eps)


def test_eps_on_the_scale_of_255_is_recognised() -> None:
    x, y = batch()
    for name in SIGN_FAMILY:
        with pytest.raises(ValueError, match=r"for 8 of 255 levels give 8/255 = 0\.0314"):
            ATTACKS[name](network(), x, y, eps=8)
    assert ATTACKS["pgd"](network(), x, y, eps=8, norm="l2").shape == x.shape  # a length in pixels


@pytest.mark.parametrize("name", ["fgsm", "apgd", "square"])
def test_settings_with_an_eps_that_is_none_are_refused(name: str) -> None:
    wrong = {-0.1: r">= 0, not -0\.1", float("nan"): "not nan", 8: r"8/255 = 0\.03"}
    for eps, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            AttackSettings(name, {"eps": eps})
    with pytest.raises(TypeError, match="eps must be a number"):
        AttackSettings(name, {"eps": "0.1"})
    assert AttackSettings(name, {"eps": 1}).settings == {"eps": 1}  # the control
    assert AttackSettings("pgd", {"eps": 8, "norm": "l2"}).settings["eps"] == 8


def test_an_attack_that_needs_a_target_says_how_to_get_one() -> None:
    x, y = batch()
    for name in ATTACKS:
        if name in NEEDS_TARGET:
            with pytest.raises(ValueError, match=r"needs target.*random_targets\(y, classes\)"):
                ATTACKS[name](network(), x, y)
        else:  # the control
            ATTACKS[name](network(), x, y, **QUICK.get(name, {}))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_probabilities_in_place_of_logits_are_warned_of(name: str) -> None:
    x, y = batch()
    with pytest.warns(UserWarning, match=r"sum to 1.*logits.*[Ss]oftmax"):
        call(name, model=nn.Sequential(network(), nn.Softmax(dim=1)), x=x, y=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(name, model=network(), x=x, y=y)


def blamed(name: str) -> list[tuple[str, str]]:
    """File and text of the lines that an attack's warnings point at; the call stands on its own."""
    x, y = batch()
    probable = nn.Sequential(network(), nn.Softmax(dim=1))
    more = {"target": next_class(y)} if name in NEEDS_TARGET else {}
    with pytest.warns(UserWarning, match="sum to 1") as caught:
        ATTACKS[name](probable, x, y, **QUICK.get(name, {}), **more)  # this line
    lines = [(warning.filename, warning.lineno) for warning in caught]
    return [(file, linecache.getline(file, line).split("  # ")[-1].strip()) for file, line in lines]


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_warning_names_the_line_that_called_the_attack(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blamed(name) == [(__file__, "this line")]
    warn = warnings.warn
    for off in (-1, 1):  # the control: a level off is seen; one more for the lambda itself
        monkeypatch.setattr(
            inputs.warnings, "warn",
            lambda text, stacklevel, off=off: warn(text, stacklevel=stacklevel + 1 + off),
        )  # fmt: skip
        assert blamed(name) != [(__file__, "this line")]


# --- names ----------------------------------------------------------------------------------------


def test_the_table_of_attacks_is_whole() -> None:
    assert VERSIONS.keys() == ATTACKS.keys()
    assert ATTACKS.keys() >= SIGN_FAMILY
    with pytest.raises(ValueError, match=r"unknown attack 'fsgm': choose from .*fgsm"):
        AttackSettings("fsgm")


@pytest.mark.parametrize(
    ("dataset", "eps"), [("mnist", 0.15), ("mnist5k", 0.15), ("mnist-m", 0.1), ("cifar10", 0.1)]
)
def test_the_papers_settings(dataset: str, eps: float) -> None:
    found = {attack.name: attack.settings for attack in paper_attacks(dataset)}
    assert found["fgsm"] == {"eps": eps}
    assert found["deepfool"] == {"overshoot": 0.02, "steps": 50}
    assert found["jsma"] == {"theta": 1.0, "gamma": 0.145, "target": "random"}
    assert found["carlini_wagner_l2"] == {"kappa": 0.0, "preset": "fast", "target": "random"}
    assert len(found) == 4


@pytest.mark.parametrize("attack", paper_attacks("mnist5k"), ids=lambda attack: attack.name)
def test_the_papers_settings_are_settings_of_the_attack(attack: AttackSettings) -> None:
    """And but for the target its defaults, so that a call without settings is the paper's."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ATTACKS[attack.name]).parameters.items()
    }
    given = {name: value for name, value in attack.settings.items() if name != "target"}
    assert given == {name: defaults[name] for name in given}


def test_random_targets_are_uniform_over_the_other_classes() -> None:
    y = torch.arange(10).repeat(900)
    got = random_targets(y, 10, torch.Generator().manual_seed(1))
    assert got.dtype == torch.int64
    counts = torch.bincount(10 * y + got, minlength=100).view(10, 10)
    assert counts.diag().tolist() == [0] * 10
    others = counts[~torch.eye(10, dtype=torch.bool)]
    assert 60 < int(others.min()) < int(others.max()) < 145  # 100 expected, 9.4 its deviation
    assert torch.equal(got, random_targets(y, 10, torch.Generator().manual_seed(1)))
    assert not torch.equal(got, random_targets(y, 10))
    assert random_targets(y[:0], 10).shape == (0,)


def test_random_targets_need_another_class_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    random_targets(torch.tensor([0, 1]), 2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="classes must be >= 2, not 1"):
        random_targets(torch.tensor([0]), 1)
    with pytest.raises(ValueError, match=r"y spans \[0, 3\], but the model has 3 classes"):
        random_targets(torch.tensor([0, 3]), 3)
