"""x"""
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor
from unfool.attacks._guard import check_inputs, check_number
from unfool.attacks._rounds import Rounds, Schedule, run, schedule_of

@dataclass(frozen=True)
class LinfSchedule(Schedule):
    shrink: float
    finest: float

PRESETS = {
    "original": LinfSchedule(1000, 5e-3, 1e-5, 2, 20, 0.999999, 0.9, 0.9),
    "fast": LinfSchedule(30, 2e-2, 1e-2, 10, 10, 0.999, 0.9, 0.98),
}

class Shrinking(Rounds):
    name = "carlini_wagner_linf"
    def __init__(self, *args):
        super().__init__(*args)
        n = len(self.x)
        self.tau = torch.ones(n); self.start = torch.ones(n); self.best_linf = torch.full((n,), torch.inf)
        self.shrink = torch.full((n,), self.schedule.shrink)
    def pull(self, rows, images):
        change = images - self.x[rows]
        return change.sign() * (change.abs() > self.tau[rows].view(-1, 1, 1, 1))
    def keep(self, rows, images, fools):
        linf = (images - self.x[rows]).flatten(1).abs().amax(dim=1)
        nearer = fools & (linf < self.best_linf[rows])
        self.best[rows[nearer]], self.best_linf[rows[nearer]] = images[nearer], linf[nearer]
        return fools & (linf <= (self.start[rows] + self.tau[rows]) / 2)
    def tighten(self, rows, images, slope):
        self.start[rows] = torch.minimum(self.best_linf[rows],self.start[rows])
        self.tau[rows] = self.shrink[rows] * self.start[rows]
        if self.schedule.__dict__.get('x',0)==0: self.rest(rows)
        self.finish(rows[self.tau[rows] <= 1 / 256])
    def loosen(self, rows):
        lost = ~self.hit[rows] | (self.shrink[rows] >= self.schedule.finest)
        again = rows[~lost]
        self.shrink[again] = (1 + self.shrink[again]) / 2
        self.start[again] = torch.minimum(self.best_linf[again],self.start[again])
        self.tau[again] = self.shrink[again] * self.start[again]
        self.w[again] = self.to_w(self.best[again])
        self.finish(rows[lost])

def carlini_wagner_linf(model, x, y, *, kappa=0.0, preset="fast", steps=None, lr=None, c=None, target=None, generator=None, progress=None, schedule=None):
    check_inputs(x, y, target)
    check_number("kappa", kappa, 0)
    schedule = schedule or schedule_of(PRESETS, preset, steps, lr, c)
    return run(Shrinking, model, x, y, target, kappa, schedule, progress)
