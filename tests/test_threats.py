"""Attackers by what they know; guards that speak of masked defences and not of honest ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masks
import victims
from unfool import guards, threats
from unfool.attacks import AttackSettings, apgd, bpda, eot, pgd
from unfool.defenses import Blur, Jpeg, Threshold
from unfool.evaluation import defended
from unfool.inputs import check_device, check_gradient
from unfool.threats import Attackers, check_defense, threat_levels

QUICK = masks.QUICK
GRID = (0.05, 0.12)


@pytest.fixture(autouse=True)
def _short(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, as small networks wait for each other otherwise; few images one by one."""
    monkeypatch.setattr(threats, "WATCHED", 4)
    monkeypatch.setattr(threats, "PLANTED", 8)


def digits(n: int = 24) -> tuple[Tensor, Tensor]:
    return victims.digits(n, small=True)[:2]


def measured(pair: masks.Pair, n: int = 24, **settings: Any) -> threats.Threats:
    return threat_levels(*pair, *digits(n), eps=GRID, attackers=QUICK, **settings)


# --- levels ---------------------------------------------------------------------------------------


def test_levels_of_a_linear_model_against_its_closed_form() -> None:
    """With two classes, an image falls to a gradient at eps exactly if eps |w|_1 beats its lead."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(60, 1, 4, 4, generator=generator)  # never clipped at these eps
    weight = torch.randn(16, generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    net[1].weight.data, net[1].bias.data = torch.stack([0 * weight, weight]), torch.zeros(2)
    net[1].bias.data[0] = (x.flatten(1) @ weight).median() + 1e-3
    lead = (x.flatten(1) @ weight - net[1].bias.data[0]).detach()
    grid = (0.01, 0.02, 0.04)
    found = threat_levels(net, None, x, (lead > 0).long(), eps=grid, attackers=QUICK, guarded=False)
    for eps, white, transfer in zip(
        grid, found.right["white-box"], found.right["transfer"], strict=True
    ):
        holds = lead.abs() > eps * weight.abs().sum()
        assert torch.equal(white, holds)
        assert torch.equal(transfer, holds)
    assert 0 < int(found.right["white-box"][-1].sum()) < int(found.right["white-box"][0].sum()) < 60
    assert bool((found.right["noise"] >= found.right["white-box"]).all())
    assert found.clean.all()


def test_the_worst_case_and_the_table() -> None:
    found = measured((victims.small_net(), Blur(0.7)), surrogate=Blur(0.6), guarded=False)
    assert list(found.right) == ["noise", "transfer", "surrogate", "black-box", "white-box"]
    every = [right for right in found.right.values()]
    assert torch.equal(found.worst, every[0] & every[1] & every[2] & every[3] & every[4])
    assert all(bool((right <= found.clean).all()) for right in every)
    assert found.warnings == ()
    rows = found.table()
    assert len(rows) == 6 * len(GRID)
    cell = next(row for row in rows if row["level"] == "black-box" and row["eps"] == 0.12)
    share = float(found.right["black-box"][1].float().mean())
    assert cell == {
        "level": "black-box", "knowledge": "nothing", "access": "scores", "eps": 0.12, "n": 24,
        "accuracy": share,
    }  # fmt: skip
    at = {(row["level"], row["eps"]): row["accuracy"] for row in rows}
    assert at["worst of all", 0.12] <= at["white-box", 0.12] < at["noise", 0.12]


def test_the_attacker_who_trained_a_surrogate_is_between() -> None:
    """Behind a strong blur, attacks on the bare network carry over less than on a near copy."""
    found = measured((victims.small_net(), Blur(1.0)), n=48, surrogate=Blur(0.9), guarded=False)
    left = {name: float(right[0].float().mean()) for name, right in found.right.items()}
    assert left["white-box"] <= left["surrogate"] < left["transfer"] < left["noise"]


def test_of_several_stand_ins_an_image_must_withstand_all() -> None:
    net = victims.small_net()
    hard = Threshold().eval()
    backwards = bpda(hard, lambda images: 1 - images)
    stand_ins = [nn.Sequential(module, net) for module in (bpda(hard), backwards)]
    both, one, other = (
        measured((net, hard), attacked=a, guarded=False).right["white-box"]
        for a in (stand_ins, stand_ins[0], stand_ins[1:])
    )
    assert torch.equal(both, one & other)
    assert not torch.equal(one, other)


def test_it_repeats_leaves_chance_alone_and_tells_how_far_it_is() -> None:
    told: list[tuple[int, int, str]] = []
    before = torch.get_rng_state()
    pair = (victims.small_net(), masks.Noise())
    first = measured(pair, guarded=False, progress=lambda *step: told.append(step))
    torch.rand(3)
    state = torch.get_rng_state()
    again = measured(pair, guarded=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)
    assert all(torch.equal(right, again.right[name]) for name, right in first.right.items())
    other = measured(pair, guarded=False, seed=1)
    assert any(not torch.equal(right, other.right[name]) for name, right in first.right.items())
    assert told[0] == (1, 8, "noise")
    assert told[-1] == (8, 8, "white-box")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((), "eps is empty"), ((0.1, 0.05), r"must grow, not \[0.1, 0.05\]"),
        ((0.1, 0.1), "must grow"), ((0.0, 0.1), "starts with 0"), ((-0.1, 0.1), "must be >= 0"),
        ((0.1, 8), "8/255"), ((float("nan"),), "must be >= 0"),
    ],
)  # fmt: skip
def test_sizes_must_grow_from_above_0_to_1(grid: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        threat_levels(victims.small_net(), None, *digits(2), eps=grid)


def test_attackers_say_how_many_steps_and_draws() -> None:
    with pytest.raises(ValueError, match="white_box apgd has no steps"):
        Attackers(white_box=AttackSettings("apgd"))
    with pytest.raises(ValueError, match="draws must be >= 1, not 0"):
        Attackers(draws=0)


# --- guards, on planted defences ------------------------------------------------------------------

EXPECTED = {
    "one bit": ["knows less fools more", "no gradient at 24 of 24", "planted"],
    "two bits": ["knows less fools more", "no gradient at 24 of 24", "planted"],
    "saturated logits": ["no gradient at 2", "knows less fools more"],
    "temperature": ["no gradient at"],
    "batch statistics": ["depend on their batch"],
    "noise": [r"differ from one look to the next: attack eot"],
    "wrong gradient": ["knows less fools more", "planted"],
    "shattered gradient": ["knows less fools more", "planted"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_guards_speak_of_what_hides(name: str) -> None:
    said = measured(masks.masked()[name]).warnings
    for words in EXPECTED[name]:
        assert any(words in sentence for sentence in said), said
    assert all(any(letter.isdigit() for letter in sentence) for sentence in said)


def test_every_planted_defence_is_tried() -> None:
    assert EXPECTED.keys() == masks.masked().keys()


@pytest.mark.parametrize("name", ["a network", "a linear model", "adversarial training",
                                  "a smooth purifier", "blur"])  # fmt: skip
def test_guards_are_silent_about_what_is_honest(name: str) -> None:
    found = measured(masks.honest()[name])
    assert found.warnings == ()
    assert float(found.clean.float().mean()) > 0.8


def test_stand_ins_silence_the_guards() -> None:
    net = victims.small_net()
    shattered = nn.Sequential(bpda(masks.Shattered()), net)
    assert measured((net, masks.Shattered()), attacked=shattered).warnings == ()
    noisy = eot(nn.Sequential(masks.Noise(), net), 3, seed=0)
    assert measured((net, masks.Noise()), n=16, attacked=noisy).warnings == ()


# --- guards, one by one ---------------------------------------------------------------------------


def rights(*shares: float, n: int = 200) -> Tensor:
    """Rows of n images of which a share is right, the first ones."""
    return torch.stack([torch.arange(n) < round(share * n) for share in shares])


def test_a_weaker_attacker_must_not_win() -> None:
    right = {"white-box": rights(0.5, 0.3), "transfer": rights(0.5, 0.2), "noise": rights(1, 0.9)}
    said = guards.weaker_attacker_wins(right, (0.1, 0.2))
    assert said is not None
    assert "transfer leaves 20.0 % right at eps 0.2, white-box 30.0 %" in said
    assert "noise" not in said
    close = {"white-box": rights(0.5), "transfer": rights(0.495)}
    assert guards.weaker_attacker_wins(close, (0.1,)) is None
    assert guards.weaker_attacker_wins(right, (0.1, 0.2), slack=0.11) is None


def test_more_must_not_succeed_less_nor_twice_the_steps_more() -> None:
    assert guards.more_succeeds_less(list(rights(0.9, 0.5, 0.5)), (0.1, 0.2, 0.3)) is None
    said = guards.more_succeeds_less(list(rights(0.9, 0.4, 0.6)), (0.1, 0.2, 0.3))
    assert said is not None
    assert "eps 0.2 leaves 40.0 % right and eps 0.3 60.0 %" in said
    assert guards.steps_still_gain(*rights(0.5, 0.495), 40) is None
    assert guards.steps_still_gain(*rights(0.5, 0.55), 40) is None
    assert guards.steps_still_gain(*rights(0.5, 0.48, n=50), 40) is None  # a single image
    said = guards.steps_still_gain(*rights(0.5, 0.48), 40)
    assert said is not None
    assert "40 steps are too few: twice as many leave 48.0 % right, not 50.0 %" in said


def test_anything_at_all_must_fool() -> None:
    assert guards.unbounded_fails(rights(0.0)[0]) is None
    assert "1 of 200" in str(guards.unbounded_fails(rights(0.005)[0]))


def test_what_fools_the_stand_in_must_fool_the_defence() -> None:
    fools = rights(0.5, 0.47, 0.4)
    assert guards.does_not_carry_over(fools[0], fools[1]) is None
    assert "20 of 100" in str(guards.does_not_carry_over(fools[0], fools[2]))
    assert guards.does_not_carry_over(fools[2], fools[0]) is None
    assert guards.does_not_carry_over(rights(0.0)[0], fools[0]) is None


def test_zero_gradients_are_counted() -> None:
    net, (x, y) = victims.small_net(), digits(16)
    assert guards.zero_gradients(net, x, y) is None
    half = nn.Sequential(nn.Flatten(), nn.Linear(196, 10)).eval()
    half[1].weight.data, half[1].bias.data = 200 * torch.eye(10, 196).abs(), torch.zeros(10)
    x = torch.zeros(4, 1, 14, 14)
    x[:2, 0, 0, 0] = 1  # class 0 leads by 200: its softmax is 1 and all others' are 0
    said = guards.zero_gradients(half, x, torch.zeros(4, dtype=torch.int64))
    assert "no gradient at 2 of 4 images" in str(said)


def test_chance_and_the_batch_are_told_apart() -> None:
    net, (x, _) = victims.small_net(), digits(16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy = defended(net, masks.Noise())
        assert guards.batch_matters(net, x) is None
        assert guards.random_without_eot(net, x) is None
        assert "8 of 8" in str(guards.random_without_eot(noisy, x))
        assert guards.random_without_eot(eot(noisy, 2), x) is None
        leaks = defended(net, masks.BatchBrightness())
        assert "8 of 8" in str(guards.batch_matters(leaks, x))
        assert guards.random_without_eot(leaks, x) is None
    norm = nn.Sequential(nn.BatchNorm2d(1), net).train()  # in eval mode it is honest
    assert guards.batch_matters(norm, x) is None
    assert norm.training


def returns_the_last(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Fools the model on the way and comes back to where it started."""
    found = apgd(model, x, y, eps=0.3, steps=10, losses=["ce"])
    with torch.no_grad():
        model(found)
    return x


def in_small_steps(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return pgd(model, x, y, eps=0.02, step=0.0005, steps=10, random_start=False)


def finished(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return apgd(model, x, y, eps=0.02, steps=30, losses=["ce"])


@pytest.mark.parametrize(
    ("attack", "silent", "late"),
    [(returns_the_last, True, False), (in_small_steps, False, True), (finished, False, False)],
)
def test_watching_an_attack_shows_what_it_dropped(
    attack: Callable[..., Tensor], silent: bool, late: bool
) -> None:
    net, (x, y) = victims.small_net(), digits(6)
    watched = guards.watch(net, attack, x, y)
    assert watched.n == 6
    assert (guards.silent_success(watched) is not None) == silent
    if silent:
        assert "6 of 6 attacks" in str(guards.silent_success(watched))
    if attack is not returns_the_last:
        assert (guards.still_climbing(watched) is not None) == late


def test_of_no_image_nothing_is_said() -> None:
    net, (x, y) = victims.small_net(), digits(2)
    watched = guards.watch(net, finished, x[:0], y[:0])
    assert watched == guards.Watched(0, 0, 0.0)
    assert guards.silent_success(watched) is guards.still_climbing(watched) is None
    planted = guards.binarise(net, finished, x[:0], eps=0.02)
    assert guards.planted_is_missed(planted) is None


def test_planted_images_are_found_by_a_gradient_and_by_nothing_else() -> None:
    net, (x, _) = victims.small_net(), digits(10)
    settings: dict[str, Any] = {"eps": 0.05, "inner": 100}

    def good(model: nn.Module, images: Tensor, y: Tensor) -> Tensor:
        return pgd(model, images, y, eps=0.05, steps=20)

    def lazy(model: nn.Module, images: Tensor, y: Tensor) -> Tensor:
        return pgd(model, images, y, eps=0.05, step=0.0, steps=1)

    found = guards.binarise(net, good, x, **settings)
    assert found == guards.Binarisation(n=10, found=10, at_random=0, skipped=0)
    assert guards.planted_is_missed(found) is None
    missed = guards.binarise(net, lazy, x, **settings)
    assert missed.found <= 1
    assert f"found {missed.found} of 10 planted" in str(guards.planted_is_missed(missed))
    masked = guards.binarise(defended(net, masks.Shattered()), good, x, **settings)
    assert guards.planted_is_missed(masked) is not None
    flat = guards.binarise(defended(net, Threshold()), lazy, x.round(), **settings)
    assert (flat.n, flat.skipped) == (0, 10)  # all of the ball is one image there
    headless = nn.Sequential(net, nn.Identity(), masks.Scale(1.0))
    headless[0] = nn.Sequential(nn.Conv2d(1, 10, 14), nn.Flatten())
    assert guards.binarise(headless.eval(), good, x, **settings).found == 10


def test_the_planted_corner_is_there_to_be_found() -> None:
    """The discriminator accepts its own corner and none of the points inside."""
    net, (x, _) = victims.small_net(), digits(3)
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        around, corners = guards._points(x[i : i + 1], 0.05, 50, generator)
        assert float((around - x[i : i + 1]).abs().max()) <= 0.95 * 0.05 + 1e-6
        assert float((corners - x[i : i + 1]).abs().max()) <= 0.05 + 1e-6
        reader = guards._Reader(net)
        assert reader.learn(torch.cat([x[i : i + 1], around]), corners[:1])
        with torch.no_grad():
            assert reader(corners[:1]).argmax(1).tolist() == [1]
            assert int(reader(torch.cat([x[i : i + 1], around])).argmax(1).sum()) == 0
    assert net(x).shape == (3, 10)  # the model itself reads digits as before


# --- bad defences ---------------------------------------------------------------------------------


class Crops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., 1:-1, 1:-1]


class Bright(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x


class Counts(nn.Module):
    """Remembers in an attribute how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x * (1 - 0.01 * self.calls)).clamp(0, 1)


class Adapts(nn.Module):
    """Remembers in a buffer what it saw; for the next call but one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        return x


class OwnNoise(masks.Noise):
    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.1 * torch.rand(x.shape, generator=self.own)).clamp(0, 1)


BAD = {
    "shape": (Crops(), r"Crops returns \(4, 1, 12, 12\) torch.float32 for images \(4, 1, 14, 14\)"),
    "logits": (nn.Flatten(), r"returns \(4, 196\).*replaces_classifier"),
    "range": (Bright(), r"Bright leaves \[0, 1\], to \[0, 1\.\d+\]: end it with clamp"),
    "count": (Counts(), r"Counts holds a state between calls \(the second answer was another"),
    "buffer": (Adapts(), r"Adapts holds a state between calls \(its 'seen' changed"),
    "generator": (OwnNoise(), r"OwnNoise holds a state.*global random state alone"),
    "train mode": (nn.Sequential(nn.Dropout(0.5)).train(), "Sequential is in train mode: call"),
}
GOOD = {
    "washer": Threshold(),  # in train mode as made, but that makes no difference to it
    "noise": masks.Noise(),
    "dropout": nn.Sequential(nn.Dropout(0.5)).eval(),
    "batch norm": nn.Sequential(nn.BatchNorm2d(1), nn.Hardtanh(0, 1)).eval(),
}


@pytest.mark.parametrize("name", BAD)
def test_a_defence_that_cannot_be_measured_is_refused(name: str) -> None:
    defense, message = BAD[name]
    modes = [module.training for module in defense.modules()]
    x, y = digits(8)
    with pytest.raises(ValueError, match=message):
        check_defense(defense, x)
    assert [module.training for module in defense.modules()] == modes
    with pytest.raises(ValueError, match=message):
        threat_levels(victims.small_net(), defense, x, y)


@pytest.mark.parametrize("name", GOOD)
def test_a_defence_that_can_be_measured_is_not(name: str) -> None:
    defense, (x, _) = GOOD[name], digits(8)
    before = {key: value.clone() for key, value in defense.state_dict().items()}
    state, training = torch.get_rng_state(), defense.training
    check_defense(defense, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert defense.training == training
    assert all(torch.equal(value, before[key]) for key, value in defense.state_dict().items())


def test_a_batch_norm_in_train_mode_is_refused_and_stays_as_it_was() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(1), nn.Hardtanh(0, 1)).train()
    with pytest.raises(ValueError, match="train mode"):
        check_defense(norm, digits(8)[0])
    assert norm.training
    assert norm[0].num_batches_tracked == 0
    assert norm[0].running_mean == 0


def test_half_precision_and_nan_are_refused() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half()

    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0 * 0

    x = digits(4)[0]
    with pytest.raises(ValueError, match=r"torch\.float16 for images"):
        check_defense(Half(), x)
    with pytest.raises(ValueError, match=r"Nan returns NaN at \d+ pixels"):
        check_defense(Nan(), x)


@pytest.mark.parametrize("defense", [Threshold(), Jpeg(75)])
def test_a_defence_without_gradient_is_named_with_the_remedy(defense: nn.Module) -> None:
    net, (x, y) = victims.small_net(), digits(8)
    message = rf"{type(defense).__name__} \(0\) stops it.*attacked=nn.Sequential\(bpda\(defense\)"
    with pytest.raises(ValueError, match=message):
        threat_levels(net, defense.eval(), x, y)
    inside = nn.Sequential(nn.Sequential(nn.Identity(), defense), net)
    with pytest.raises(ValueError, match=rf"{type(defense).__name__} \(0\.1\) stops it"):
        check_gradient(inside, x)
    check_gradient(nn.Sequential(bpda(defense), net), x)


def test_what_lies_on_another_device_is_named() -> None:
    net, (x, y) = victims.small_net(), digits(4)
    there = nn.Conv2d(1, 1, 1).to("meta")
    for name, more in {"defence": {}, "surrogate": {"surrogate": there}}.items():
        defense = there if name == "defence" else None
        with pytest.raises(ValueError, match=rf"the {name} is on meta and x on cpu: .*\.to\("):
            threat_levels(net, defense, x, y, **more)
    check_device(net, x)  # the control


def test_a_state_of_two_moods_is_not_taken_for_a_train_mode() -> None:
    class Moody(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1 if self.calls % 2 else 0.5)

    x, _ = digits(4)
    with pytest.raises(ValueError, match="Moody holds a state between calls"):
        check_defense(Moody().eval(), x)
    check_defense(Blur(0.5).train(), x)  # the control: train mode, and it makes no difference


def test_nothing_to_attack_is_told() -> None:
    net, (x, y) = victims.small_net(), digits(4)
    for labels, told in (((net(x).argmax(dim=1) + 1) % 10, True), (y, False)):
        found = threat_levels(net, None, x, labels, eps=(0.05,), attackers=QUICK)
        assert any("nothing to attack" in warning for warning in found.warnings) is told


def test_a_detach_inside_a_module_is_named_by_that_module() -> None:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blur = Blur(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.blur(x.detach())

    net, (x, _) = victims.small_net(), digits(4)
    with pytest.raises(ValueError, match=r"Cuts \(0\) stops it"):
        check_gradient(nn.Sequential(Cuts(), net), x)
    check_gradient(nn.Sequential(Cuts().blur, net), x)
    check_gradient(net, x)


def test_probabilities_are_warned_of() -> None:
    x, y = digits(8)
    net = nn.Sequential(victims.small_net(), nn.Softmax(dim=1)).eval()
    with pytest.warns(UserWarning, match="sum to 1"):
        threat_levels(net, None, x, y, eps=(0.05,), attackers=QUICK, guarded=False)


# --- on the classroom's networks ------------------------------------------------------------------


@pytest.mark.long
def test_anet_behind_the_purifier_is_honest_and_behind_a_mask_is_not() -> None:
    from unfool.lab import Lab

    lab = Lab("classroom", "mnist5k")
    net, x, y = lab.classifier("anet"), lab.data.test.images[:64], lab.data.test.labels[:64]
    attackers = Attackers(
        black_box=AttackSettings("square", {"queries": 300}),
        white_box=AttackSettings("apgd", {"steps": 40, "targets": 3}),
    )
    grid = (0.1, 0.15, 0.3)
    pure = lab.defense("pix2pix", classifier="anet")
    found = threat_levels(net, pure, x, y, eps=grid, attackers=attackers)
    assert found.warnings == ()
    left = {name: float(right[1].float().mean()) for name, right in found.right.items()}
    assert left["white-box"] < 0.5 < left["transfer"] < left["noise"]
    hidden = nn.Sequential(masks.Shattered(), pure)
    assert threat_levels(net, hidden, x, y, eps=grid, attackers=attackers).warnings != ()


def test_an_eot_of_its_own_seed_draws_the_same_in_a_resumed_run() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            draws.append(float(torch.rand(())))
            logits: Tensor = net(x) * (1 + draws[-1])
            return logits

    draws: list[float] = []
    net, memory = victims.small_net(), dict[str, Tensor]()
    x, y = digits(4)
    found = []
    for _ in range(2):  # the second run knows the first size already
        draws.clear()
        threat_levels(
            net, None, x, y, eps=(0.05, 0.1), attackers=QUICK, attacked=eot(Drawing(), 2, seed=0),
            levels=["white-box"], guarded=False, memory=memory,
        )  # fmt: skip
        found.append(draws[-6:])
        del memory["white-box-0.1"]
    assert found[0] == found[1]
    assert len(set(found[0])) == 6
