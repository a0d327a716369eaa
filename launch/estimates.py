"""What a run will need and take, as rows of the table that a start prints: closed forms with their formulas, not measured."""

from launch.job import Job
from vitscale.planning.memory import Term, memory_terms, peak_bytes, total
from vitscale.planning.peaks import GPUS
from vitscale.planning.time import MFU_ASSUMED, run_seconds
from vitscale.recipes.catalog import Source
from vitscale.recipes.linter import Facts, findings
from vitscale.training.trainer import Plan

Row = tuple[str, str]
DEFAULT_GPU = "H100"


def suspicious_rows(job: Job, *, source: Source | None) -> list[Row]:
    """The linter's findings, one row each."""
    facts = Facts(
        config=job.config,
        total_steps=job.plan.total_steps,
        warmup_steps=job.schedule.warmup_steps,
        cooldown_steps=job.schedule.cooldown_steps,
        source_classes=source.classes if source else None,
    )
    return [("suspicious", sentence) for sentence in findings(facts)]


def estimate_rows(job: Job, *, gpu: str | None, mfu: float = MFU_ASSUMED) -> list[Row]:
    """Operations, memory, and, where a GPU is named, whether they fit and how long the run takes."""
    rows = [*cost_rows(job.plan), *memory_rows(job, gpu=gpu)]
    return rows if gpu is None else [*rows, time_row(job, gpu=gpu, mfu=mfu)]


def cost_rows(plan: Plan) -> list[Row]:
    """Operations of training for one image and for the run."""
    each = ", then ".join(f"{_flop(phase.flops_per_image)} per image at {phase.image_size} px" for phase in plan.phases)
    whole = run_seconds(
        plan.phases, total_steps=plan.total_steps, global_batch=plan.global_batch, world=1, peak_flops=1.0, mfu=1.0
    )
    return [
        ("training", f"{each} (3 x forward of what stochastic depth keeps, no recomputation); {whole:.3g} FLOP in all"),
    ]


def memory_rows(job: Job, *, gpu: str | None) -> list[Row]:
    """Predicted bytes of one rank, each term with its formula; whether they fit `gpu` where one is named."""
    config, ds = job.config, job.ds
    terms = memory_terms(config, ds, image_size=max(phase.image_size for phase in job.plan.phases))
    peak = peak_bytes(terms)
    held, backward, update = (total(terms, when) for when in ("held", "backward", "update"))
    fits = ""
    if gpu is not None:
        size = GPUS[gpu].memory_bytes
        verdict = "fits" if peak <= size else "does not fit"
        fits = f"; {verdict} {gpu} ({_bytes(size)})"
    rows = [
        (
            "memory",
            f"{_bytes(peak)} per rank, predicted = {_bytes(held)} held + max(backward {_bytes(backward)}, "
            f"update {_bytes(update)}), without allocator and kernels{fits}",
        )
    ]
    rows += [("", _line(term)) for term in terms if not term.on_host]
    if on_host := [term for term in terms if term.on_host]:
        rows.append(("host memory", f"{_bytes(peak_bytes(terms, on_host=True))} per rank, predicted"))
        rows += [("", _line(term)) for term in on_host]
    return rows


def time_row(job: Job, *, gpu: str, mfu: float) -> Row:
    """How long the whole run takes on as many of these GPUs as there are ranks."""
    plan, world = job.plan, job.ds.world
    if job.config.train.precision == "fp32":
        return ("time", "not estimated: the peak of float32 depends on how matrices are multiplied; set train.precision=bf16")
    peak = GPUS[gpu].peak_bf16
    seconds = run_seconds(
        plan.phases, total_steps=plan.total_steps, global_batch=plan.global_batch, world=world, peak_flops=peak, mfu=mfu
    )
    per_s = plan.total_steps * plan.global_batch / seconds
    return (
        "time",
        f"{_span(seconds)} at an assumed MFU of {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s on {world} x {gpu} = FLOP / (ranks x "
        f"peak x MFU), {per_s:,.0f} images/s, {world * seconds / 3600:,.0f} GPU hours; evaluations and checkpoints come on top",
    )


def _line(term: Term) -> str:
    return f"{_bytes(term.bytes):>9}  {term.when:<8}  {term.what} = {term.formula}"


def _bytes(size: float) -> str:
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit or unit == 1e3)
    return f"{size / unit:.3g} {name}"


def _flop(count: float) -> str:
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"


def _span(seconds: float) -> str:
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"
