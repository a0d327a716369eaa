"""The learning rate of a step as a pure function of the step: nothing to save, nothing to restore.

warm-up   linear from 0; the first update already has peak / warm-up steps: a step at rate 0 would be a wasted batch
body      cosine    end + (peak - end) (1 + cos(pi p)) / 2, p from 0 to 1 over the rest of the run  (Loshchilov & Hutter 2017)
          linear    peak + (end - peak) p
          rsqrt     peak / sqrt(1 + t / timescale), t steps behind the warm-up                      (Zhai et al. 2022)
          wsd       peak, "warm-up, stable, decay"                                                  (Hu et al. 2024, MiniCPM)
          constant  peak
cooldown  rsqrt, wsd: over the last steps linear from what the body had there down to end

Before its cooldown neither rsqrt nor wsd knows how long the run is: a branch of another length shares the prefix bit for bit.
"""

import math
from dataclasses import dataclass

from vitscale.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """optim.schedule with all its lengths in steps."""

    optim: OptimConfig
    warmup_steps: int
    cooldown_steps: int
    timescale_steps: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        """Learning rate of update number `step` (0-based); behind the last step what the schedule ends at."""
        start = self.total_steps - self.cooldown_steps
        if self.cooldown_steps and step >= start:
            top = self._before_cooldown(start)
            return top + (self.optim.end_lr - top) * min(1.0, (step - start) / self.cooldown_steps)
        return self._before_cooldown(step)

    def _before_cooldown(self, step: int) -> float:
        peak, end, kind = self.optim.peak_lr, self.optim.end_lr, self.optim.schedule
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        behind = step - self.warmup_steps
        if kind == "rsqrt":
            return peak / math.sqrt(1 + behind / self.timescale_steps)
        if kind in ("wsd", "constant"):
            return peak
        progress = min(1.0, behind / max(1, self.total_steps - self.warmup_steps))
        if kind == "linear":
            return peak + (end - peak) * progress
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))
