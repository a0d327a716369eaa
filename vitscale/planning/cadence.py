"""How often to save: the interval between checkpoints that loses the least time.

A save costs C seconds of standing still; a failure, one every M seconds on average, costs what was trained since the last
save. With an interval t the share of lost time is about C / t + t / 2M, least at t = sqrt(2 C M) (Young 1974); Daly 2006
(equation 37) adds the terms that matter when C is no longer small against M.
"""

import math

SECONDS_PER_DAY = 86_400.0


def best_interval_s(cost_s: float, between_failures_s: float) -> float:
    """Seconds of training between two saves; `cost_s`: what one save holds up, `between_failures_s`: mean of the whole job."""
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    share = math.sqrt(cost_s / (2 * between_failures_s))
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + share / 3 + share**2 / 9) - cost_s


def between_failures_s(hosts: int, failures_per_host_day: float) -> float:
    """Mean time between failures of a job that any failing host ends."""
    return SECONDS_PER_DAY / (hosts * failures_per_host_day)


def lost_share(interval_s: float, cost_s: float, between_failures_s: float, restart_s: float = 0.0) -> float:
    """Share of the time that is lost at an interval, to first order: standing still, training again, starting again."""
    return cost_s / interval_s + (interval_s / 2 + restart_s) / between_failures_s


def steps_between_saves(step_s: float, *, cost_s: float, flush_s: float, between_failures_s: float) -> int:
    """The same in steps, at least one; never so often that files are written more than half of the time."""
    interval_s = max(best_interval_s(cost_s, between_failures_s), 2 * flush_s)
    return max(1, round(interval_s / step_s))
