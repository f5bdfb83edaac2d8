"""The purifier: architecture, losses, one training step, training on toy pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from unfool.artifacts import load_tensors
from unfool.defenses import ape_gan, denoiser, magnet, wgan_gp
from unfool.defenses.pix2pix import (
    GUIDES,
    PatchGAN,
    Settings,
    UNet,
    discriminator_loss,
    generator_loss,
    guided_by,
    shapes,
    train,
    train_step,
)

Make = Callable[[int], nn.Module]
SMALL = Settings(width=4, discriminator_width=4, epochs=2, batch_size=8)


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def unet(channels: int = 1, width: int = 4, skips: bool = True, seed: int = 0) -> UNet:
    net = seeded(seed, lambda: UNet(channels, width, skips))
    assert isinstance(net, UNet)
    return net


def images(n: int = 6, channels: int = 1, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def pairs(n: int = 16, size: int = 28) -> tuple[Tensor, Tensor]:
    """Black and white squares at random places (clean), and the same with noise (adversarial)."""
    generator = torch.Generator().manual_seed(2)
    clean = torch.zeros(n, 1, size, size)
    for i in range(n):
        top, left = torch.randint(2, size - 12, (2,), generator=generator).tolist()
        clean[i, :, top : top + 10, left : left + 10] = 1
    noise = torch.randn(clean.shape, generator=generator)
    return (clean + 0.15 * noise.sign()).clamp(0, 1), clean


def state(net: nn.Module) -> list[Tensor]:
    return [v.clone() for v in net.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def millions(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


# --- generator ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "size"), [(64, 16.65), (32, 4.16), (16, 1.04)])
def test_the_generator_has_pix2pixs_size(width: int, size: float) -> None:
    assert millions(UNet(1, width)) == pytest.approx(size, abs=0.006)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 30, 32, 33, 64])
def test_images_of_any_size_keep_it(size: int, channels: int, skips: bool) -> None:
    net = unet(channels, skips=skips)
    with torch.no_grad():
        net.last[1].weight.mul_(1e5)  # far beyond what training reaches
        x = images(2, channels, size)
        y = net(x)
    assert y.shape == x.shape
    assert 0 <= float(y.min()) < 0.01
    assert 0.99 < float(y.max()) <= 1


def test_padding_is_black_around_the_image() -> None:
    net, x = unet().eval(), images(2, size=28)
    with torch.no_grad():
        assert torch.equal(net(x), net(nn.functional.pad(x, [2] * 4))[..., 2:-2, 2:-2])


def test_odd_padding_crops_back_to_the_same_place() -> None:
    net = unet()
    net.downs, net.ups = nn.ModuleList([nn.Identity()] * 2), nn.ModuleList([nn.Identity()])
    net.skips, net.last = False, nn.Identity()
    x = images(1, size=33)[..., :31]
    assert torch.allclose(net(x), x, atol=1e-6)


def test_in_eval_mode_an_output_does_not_depend_on_its_batch() -> None:
    net, x = unet(), images(6)
    for _ in range(3):
        net(images(8, seed=5))  # running statistics that are not the initial ones
    with torch.no_grad():
        alone = net.eval()(x[:1])
        assert torch.allclose(net(x)[:1], alone, atol=1e-6)
        in_batch = net.train()(x)[:1]
        assert not torch.allclose(net(x[:2])[:1], in_batch, atol=1e-3)  # the trap of notebook 07


@pytest.mark.parametrize("skips", [True, False])
def test_skips_carry_the_image_past_the_middle(skips: bool) -> None:
    net, (x, y) = unet(skips=skips).eval(), images(2)
    net.downs[-1].register_forward_hook(lambda module, inputs, output: output * 0)
    with torch.no_grad():
        a, b = net(torch.stack([x, y]))
    assert torch.equal(a, b) == (not skips)  # without skips all that G knows passes the middle


def test_weights_start_as_pix2pixs() -> None:
    for net in (unet(1, 32), seeded(0, lambda: PatchGAN(1, 32, 3))):
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                error = 4 * 0.02 / layer.weight.numel() ** 0.5
                assert abs(float(layer.weight.detach().mean())) < error
                assert float(layer.weight.detach().std()) == pytest.approx(0.02, abs=error)
                assert layer.bias is None or not layer.bias.any()
            elif isinstance(layer, nn.BatchNorm2d):
                assert float(layer.weight.detach().mean()) == pytest.approx(1, abs=0.02)
                assert 0.005 < float(layer.weight.detach().std()) < 0.04
                assert not layer.bias.any()


def test_no_dropout_and_no_norm_at_the_ends() -> None:
    net = unet()
    assert not any(isinstance(m, nn.Dropout) for m in net.modules())
    norms = [any(isinstance(m, nn.BatchNorm2d) for m in down) for down in net.downs]
    assert norms == [False, True, True, True, False]
    assert [type(m) for m in net.last] == [nn.ReLU, nn.ConvTranspose2d, nn.Tanh]


# --- discriminator --------------------------------------------------------------------------------

PATCHES = {1: (0.135, 16), 2: (0.66, 34), 3: (2.76, 70)}


@pytest.mark.parametrize("layers", PATCHES)
def test_the_discriminator_has_pix2pixs_size(layers: int) -> None:
    assert millions(PatchGAN(1, 64, layers)) == pytest.approx(PATCHES[layers][0], rel=0.01)


def receptive_field(net: nn.Module) -> int:
    field = 1
    for layer in reversed([m for m in net.modules() if isinstance(m, nn.Conv2d)]):
        field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
    return field


def footprint(net: PatchGAN, size: int) -> tuple[int, int]:
    """Height and width of the pixels that one logit in the middle really depends on."""
    x, y = images(1, size=size).requires_grad_(True), images(1, size=size, seed=1)
    logits = net.eval()(x, y)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert x.grad is not None
    rows, columns = torch.nonzero(x.grad[0, 0], as_tuple=True)
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("layers", PATCHES)
def test_a_patch_has_its_size(layers: int) -> None:
    net = PatchGAN(1, 4, layers)
    field = PATCHES[layers][1]
    assert receptive_field(net) == field
    assert footprint(net, 128) == (field, field)


@pytest.mark.parametrize(("layers", "side"), [(1, 14), (2, 6), (3, 2)])
def test_one_logit_per_patch(layers: int, side: int) -> None:
    assert PatchGAN(3, 4, layers)(images(2, 3), images(2, 3)).shape == (2, 1, side, side)


def test_the_discriminator_sees_both_images() -> None:
    net, x, y = PatchGAN(1, 4).eval(), images(1), images(1, seed=1)
    assert not torch.equal(net(x, y), net(y, x))
    assert not torch.equal(net(x, y), net(x, x))
    assert not torch.equal(net(x, y), net(y, y))


# --- losses ---------------------------------------------------------------------------------------


def test_losses_are_the_equations() -> None:
    net, x, y = PatchGAN(1, 4).eval(), images(4), images(4, seed=1)
    made = images(4, seed=2)
    real, fake = net(x, y), net(x, made)
    d = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()) / 2
    assert torch.allclose(discriminator_loss(net, x, y, made), d, atol=1e-6)
    terms = generator_loss(net, x, y, made, lam=10.0, mu=0.5, guide=lambda a, b: torch.tensor(3.0))
    assert torch.allclose(terms["gan"], -torch.sigmoid(fake).log().mean(), atol=1e-6)
    scaled = ((2 * y - 1) - (2 * made - 1)).abs().mean()  # on pix2pix's [-1, 1] scale
    assert float(terms["l1"]) == pytest.approx(10 * float(scaled), rel=1e-6)
    assert float(terms["guide"]) == pytest.approx(1.5)
    assert generator_loss(None, x, y, made).keys() == {"l1"}


def test_the_discriminators_loss_gives_the_generator_no_gradient() -> None:
    net, critic, (x, y) = unet(), PatchGAN(1, 4), pairs(4, 32)
    discriminator_loss(critic, x, y, net(x)).backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in critic.parameters())
    generator_loss(critic, x, y, net(x))["gan"].backward()
    assert all(p.grad is not None for p in net.parameters())  # the control


def adams(generator: nn.Module, critic: nn.Module | None) -> dict[str, Optimizer]:
    nets = {"generator": generator} | ({"discriminator": critic} if critic else {})
    return {k: Adam(v.parameters(), 1e-3, betas=(0.5, 0.999)) for k, v in nets.items()}


def test_the_generators_step_leaves_the_discriminator_alone() -> None:
    """After a step, D is where its own update left it: the same as with a G that does not learn."""
    x, y = pairs(8, 32)

    def after(rate: float) -> tuple[list[Tensor], list[Tensor | None], nn.Module]:
        net, critic = unet(seed=1), seeded(2, lambda: PatchGAN(1, 4))
        optimizers = adams(net, critic)
        optimizers["generator"].param_groups[0]["lr"] = rate
        train_step(net, critic, optimizers, x, y)  # type: ignore[arg-type]
        assert all(p.requires_grad for p in critic.parameters())
        return list(critic.parameters()), [p.grad for p in critic.parameters()], net

    weights, grads, learned = after(1e-3)
    still, still_grads, unmoved = after(0.0)
    assert equal([w.detach() for w in weights], [w.detach() for w in still])
    assert all(g is not None and torch.equal(g, h) for g, h in zip(grads, still_grads, strict=True))
    assert equal(list(unmoved.parameters()), list(unet(seed=1).parameters()))
    assert not equal(list(learned.parameters()), list(unmoved.parameters()))
    start = seeded(2, lambda: PatchGAN(1, 4))
    assert not equal(list(still), list(start.parameters()))  # D itself did learn
    discriminator_loss(start, x, y, unet(seed=1)(x)).backward()  # type: ignore[arg-type]
    for parameter, grad in zip(start.parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert grad is not None
        assert torch.equal(parameter.grad, grad)  # nothing of G's loss was added


def test_a_step_tells_its_losses() -> None:
    net, critic, (x, y) = unet(), PatchGAN(1, 4), pairs(4, 32)
    losses = train_step(net, critic, adams(net, critic), x, y)
    assert losses.keys() == {"d", "gan", "l1"}
    assert not any(loss.requires_grad for loss in losses.values())
    assert train_step(net, None, adams(net, None), x, y).keys() == {"l1"}


# --- the guide ------------------------------------------------------------------------------------


def test_guides_are_what_they_are_called(tiny: Make) -> None:
    net, clean, made = tiny(0).eval(), images(8), images(8, seed=1)
    truth = torch.arange(8) % 3
    with torch.no_grad():
        wanted, got = net(clean), net(made)
    ours = {kind: guided_by(net, kind)(made, clean, truth).item() for kind in GUIDES}
    log = got.log_softmax(1)
    divergence = (wanted.softmax(1) * (wanted.log_softmax(1) - log)).sum(1).mean()
    assert ours == {
        "clean": pytest.approx(-log[range(8), wanted.argmax(1)].mean().item(), rel=1e-5),
        "label": pytest.approx(-log[range(8), truth].mean().item(), rel=1e-5),
        "kl": pytest.approx(divergence.item(), rel=1e-4),
        "logits": pytest.approx((got - wanted).abs().mean().item(), rel=1e-5),
    }
    assert len(set(ours.values())) == len(GUIDES)


@pytest.mark.parametrize("kind", GUIDES)
def test_every_guide_pulls_the_output_towards_the_clean_images_class(tiny: Make, kind: str) -> None:
    net, clean = tiny(0).eval(), images(8)
    with torch.no_grad():
        truth = net(clean).argmax(1)
    made = images(8, seed=1).requires_grad_(True)
    guide = guided_by(net, kind)
    before = guide(made, clean, truth)
    (slope,) = torch.autograd.grad(before, made)
    assert guide(made - 1e-2 * slope / slope.norm(), clean, truth) < before


def test_the_true_class_is_asked_for_where_it_is_needed(tiny: Make) -> None:
    x, y = pairs(8)
    settings = Settings(**{**vars(SMALL), "mu": 1.0, "guide": "label"})
    guide, truth = guided_by(tiny(0).eval(), "label"), torch.arange(8) % 3
    with pytest.raises(ValueError, match="needs the true classes"):
        train(x, y, settings, guide=guide)
    one, _ = train(x, y, settings, guide=guide, labels=truth)
    other, _ = train(x, y, settings, guide=guide, labels=(truth + 1) % 3)
    assert not equal(state(one), state(other))


def test_clean_pairs_keep_their_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def fit(
        step: object, modules: object, optimizers: object, data: list[Tensor], **_: object
    ) -> list[object]:
        seen.extend(data)
        return []

    monkeypatch.setattr("unfool.defenses.pix2pix.fit", fit)
    clean = images(4)[[0, 1, 2, 3, 0, 1]]  # two images come twice
    truth = torch.tensor([5, 6, 7, 8, 5, 6])
    train(images(6, seed=1), clean, Settings(**{**vars(SMALL), "identity": True}), labels=truth)
    _, targets, labels = seen
    assert len(labels) == len(targets) == 10
    of = {image.sum().item(): int(label) for image, label in zip(clean, truth, strict=True)}
    assert [of[image.sum().item()] for image in targets] == labels.tolist()


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="mu must be >= 0, not -1"):
        Settings(mu=-1.0)
    with pytest.raises(ValueError, match="lam must be >= 0"):
        Settings(lam=-100.0)
    with pytest.raises(ValueError, match="guide must be one of clean, label, kl, logits"):
        Settings(mu=1.0, guide="truth")


def test_a_guide_without_weight_has_no_name() -> None:
    assert Settings().named() == Settings(guide="kl").named()
    assert Settings(mu=1.0, guide="kl").named()["guide"] == "kl"


@pytest.mark.parametrize(("built", "given"), [(1, 3), (3, 1)])
def test_images_of_other_channels_are_refused(built: int, given: int) -> None:
    with pytest.raises(ValueError, match=rf"\(N, {built}, H, W\), not \(6, {given}, 32, 32\)"):
        unet(built)(images(channels=given))


@pytest.mark.parametrize("training", [True, False])
def test_the_guides_classifier_is_frozen(tiny: Make, training: bool) -> None:
    classifier, (x, y) = tiny(0).train(training), pairs(8)
    before = state(classifier)
    train(x, y, Settings(**{**vars(SMALL), "mu": 1.0}), guide=guided_by(classifier))
    assert equal(state(classifier), before)
    assert classifier.training == training
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


def test_the_guide_changes_what_is_learned(tiny: Make) -> None:
    x, y = pairs(8)
    settings = Settings(**{**vars(SMALL), "mu": 10.0})
    net, history = train(x, y, settings, guide=guided_by(tiny(0).eval()))
    plain, _ = train(x, y, SMALL)
    assert "guide" in history[0]
    assert not equal(state(net), state(plain))


def test_mu_without_a_guide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mu=0\.5 needs a guide"):
        train(*pairs(8), Settings(**{**vars(SMALL), "mu": 0.5}))


# --- training -------------------------------------------------------------------------------------


def l1(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - y).abs().mean())


def test_thirty_steps_reduce_the_distance_to_the_clean_images() -> None:
    x, y = pairs(24)
    settings = Settings(width=8, discriminator_width=8, epochs=10, batch_size=8, rate=2e-3)
    net, history = train(x, y, settings)
    assert len(history) == 10
    assert history[-1]["l1"] < 0.5 * history[0]["l1"]
    assert l1(net, x, y) < 0.5 * l1(unet(width=8).eval(), x, y)
    assert not net.training


@pytest.mark.parametrize(
    ("change", "losses"),
    [
        ({"skips": False}, {"d", "gan", "l1"}),
        ({"adversarial": False}, {"l1"}),
        ({"patch_layers": 3}, {"d", "gan", "l1"}),
    ],
)
def test_the_variants_train(change: dict[str, float], losses: set[str]) -> None:
    net, history = train(*pairs(8), Settings(**{**vars(SMALL), **change}))
    assert [row.keys() for row in history] == [losses] * 2
    assert float(net(pairs(8)[0]).detach().min()) >= 0


def test_seed_and_global_random_state() -> None:
    x, y = pairs(8)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one = state(train(x, y, SMALL, seed=1)[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert equal(state(train(x, y, SMALL, seed=1)[0]), one)
    assert not equal(state(train(x, y, SMALL, seed=2)[0]), one)


def test_after_epoch_sees_the_generator_in_eval_mode() -> None:
    seen: list[tuple[int, bool]] = []
    train(*pairs(8), SMALL, after_epoch=lambda done, net: seen.append((done, net.training)))
    assert seen == [(1, False), (2, False)]


def test_a_checkpoint_holds_both_networks(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(*pairs(8), SMALL, checkpoint=path)
    heads = {"/".join(key.split("/")[:2]) for key in load_tensors(path)[0]}
    parts = {"module", "optimizer"}
    assert heads == {f"{part}/{net}" for part in parts for net in ("generator", "discriminator")}


def test_pairs_that_are_none_are_refused() -> None:
    x, y = pairs(4)
    with pytest.raises(ValueError, match=r"\(0, 1, 28, 28\).*no attack succeeded: raise"):
        train(x[:0], y[:0], SMALL)
    with pytest.raises(ValueError, match=r"equal shape: got \(4, 1, 28, 28\).*\(3, 1, 28, 28\)"):
        train(x, y[:3], SMALL)
    with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\].*divide by 255"):
        train(x, 255 * y, SMALL)
    train(x, y, SMALL)  # the control


def test_what_lies_on_another_device_is_refused_with_the_remedy(tiny: Make) -> None:
    (x, y), there = pairs(4), torch.device("meta")
    move = r"move one with \.to\(device\)"
    with pytest.raises(ValueError, match=f"clean is on meta and adversarial on cpu: {move}"):
        train(x, y.to(there), SMALL)
    with pytest.raises(ValueError, match=f"labels is on meta and adversarial on cpu: {move}"):
        train(x, y, SMALL, labels=torch.zeros(4, dtype=torch.int64, device=there))
    guide = guided_by(tiny(0).to(there))
    with pytest.raises(ValueError, match=f"guide's classifier is on meta and x on cpu: {move}"):
        train(x, y, replace(SMALL, mu=1.0), guide=guide)
    with pytest.raises(ValueError, match=f"guide's classifier is on cpu and x on meta: {move}"):
        guided_by(tiny(0))(x, y.to(there))
    with pytest.raises(ValueError, match=f"this generator is on cpu and x on meta: {move}"):
        unet()(x.to(there))
    guided_by(tiny(0))(x, y)  # the controls; the last test trains
    unet()(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_wherever_something_is_trained() -> None:
    x, y = pairs(4)
    for ask in (
        lambda: train(x, y, SMALL, device="cuda"),
        lambda: ape_gan.train(x, y, ape_gan.Settings(), device="cuda"),
        lambda: denoiser.train(x, denoiser.Settings(), device="cuda"),
        lambda: magnet.train(x, magnet.Settings(), device="cuda"),
        lambda: wgan_gp.train(x, wgan_gp.Settings(), device=torch.device("cuda")),
    ):
        with pytest.raises(ValueError, match=r"device='cuda' .* sees no GPU: use device='cpu'"):
            ask()


def test_the_shapes_are_those_that_pass_through() -> None:
    net = UNet(3, 4)
    found = shapes(net, (3, 30, 33))
    assert found[0] == found[-1] == (3, 32, 64)
    assert found[5] == (32, 1, 2)
    assert len(found) == 11
    assert not any(module._forward_hooks for module in net.modules())


def test_the_rate_falls_in_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def step(*parts: Any, **_: Any) -> dict[str, Tensor]:
        rates.append(parts[2]["generator"].param_groups[0]["lr"])
        return {"l1": torch.zeros(())}

    monkeypatch.setattr("unfool.defenses.pix2pix.train_step", step)
    train(*pairs(8), replace(SMALL, epochs=4, batch_size=2, rate=1.0))
    assert rates[:8] == [1.0] * 8
    assert rates[8:] == pytest.approx([1 - k / 8 for k in range(8)])


def test_identity_adds_each_clean_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def fit(*parts: Any, **_: Any) -> list[dict[str, float]]:
        seen.append(tuple(parts[3]))
        return []

    monkeypatch.setattr("unfool.defenses.pix2pix.fit", fit)
    adversarial, clean = pairs(8)
    twice = torch.cat([adversarial, 1 - adversarial]), torch.cat([clean, clean])  # two attacks
    train(*twice, replace(SMALL, identity=True))
    train(*twice, SMALL)
    (x, y), plain = seen
    assert len(x) == len(y) == 16 + len(clean.unique(dim=0))
    assert torch.equal(x[16:], y[16:])
    assert torch.equal(x[:16], twice[0])
    assert len(plain[0]) == 16


def test_a_guide_of_fewer_classes_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 3)).eval()
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    guide = guided_by(net, "label")
    assert guide(x, x, labels=torch.tensor([0, 1, 2, 2])) > 0  # the control
    with pytest.raises(ValueError, match=r"labels spans \[0, 9\], but the model has 3 classes"):
        guide(x, x, labels=torch.tensor([0, 1, 2, 9]))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
