"""The only file that knows DeepSpeed: start the ranks, make the engine, step it, write and read its files.

    with the model, our optimizer and a resolved dictionary -> deepspeed.initialize -> Engine

DeepSpeed shards parameters (stage 3), gradients (2) and optimizer state (1), accumulates and clips. What it does not
do is done here: the thread count, a timeout that also reaches its own process groups, the check for non-finite
gradients at stage 0, and one meaning of "gradient norm" at every stage.
"""

import inspect
import logging
import os
import platform
import resource
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from vitscale.base.cluster import Cluster
from vitscale.base.errors import DivergedError, EnvironmentFault, HostFault, complain
from vitscale.base.files import xxh3_64
from vitscale.base.network import GLOO, interface_for_gloo
from vitscale.ds_config import DsConfig
from vitscale.training.arrival import wait_for_all_ranks
from vitscale.training.clock import StepClock
from vitscale.training.collectives import PROCESS_GROUP_TIMEOUT, control_group
from vitscale.training.ema import Averages
from vitscale.training.optim import PartitionOptimizer
from vitscale.training.pieces import Partition, partitions_of, publish_masters

# DeepSpeed chooses its accelerator at import; on a machine without a GPU it would say so on every rank.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.comm
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler, torch_autocast
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.tensor_fragment import fragment_address

# Every engine of DeepSpeed imports its Muon, which is decorated with torch.compile: that loads the whole compiler, 2 s of each
# start, for functions that nothing here calls (training/muon.py is ours).
_compile, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

compiler.compile = _compile

deepspeed_logger.setLevel(logging.ERROR)
# DeepSpeed 0.19.8 calls collectives by the names torch 2.13 is about to drop; it works, and users cannot change it.
warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)

LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
STORED_TYPES: list[Any] = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
"""What DeepSpeed pickles into its files besides tensors and plain values."""
RECOVERY_SCRIPT = Path(inspect.getfile(zero_to_fp32))
"""DeepSpeed's own tool to put a checkpoint of stages 1 to 3 together; it lies beside them."""


def start_ranks(cluster: Cluster) -> torch.device:
    """Join the process group (also in a world of one) and return the device of this rank. Collective.

    Raises EnvironmentFault where the ranks do not come together. Sets the thread count itself: torchrun sets 1, deepspeed
    sets nothing.
    """
    os.environ.update(cluster.environment())
    torch.set_num_threads(cluster.threads())
    if torch.cuda.is_available():
        device = torch.device("cuda", cluster.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # The shared-memory operator serves inference only, and would be compiled at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cluster.world > cluster.local_world:
        interface, fault = interface_for_gloo(cluster.host, cluster.master_addr, os.environ)
        if fault is not None:
            raise HostFault(fault)
        if interface is not None:
            os.environ[GLOO] = interface
    is_agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = wait_for_all_ranks(cluster, say=complain, is_agents_store=is_agents_store)
        deepspeed.init_distributed(timeout=PROCESS_GROUP_TIMEOUT, verbose=False)
        del store
    except (RuntimeError, torch.distributed.DistError) as error:
        raise EnvironmentFault(
            f"rank {cluster.rank} on {cluster.host} could not reach the other ranks through "
            f"{cluster.master_addr}:{cluster.master_port} ({str(error).splitlines()[0]}); check address, port and interface"
        ) from None
    return device


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    control_group.cache_clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, as checkpoints and attempts record it."""
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def checkpoint_function(ds: DsConfig, device: torch.device) -> Callable[..., Tensor] | None:
    """DeepSpeed's activation checkpointing where ds_config.json asks for what torch's has not, else None.

    cpu_checkpointing keeps the input of every recomputed block in host memory, synchronize_checkpoint_boundary and profile
    wait for the device around it and time it. Its function is reentrant: something before the first block must be trained.
    """
    if not ds.checkpoint_keys:
        return None
    if "cpu_checkpointing" in ds.checkpoint_keys and device.type == "cpu":
        raise EnvironmentFault(
            "activation_checkpointing.cpu_checkpointing needs an accelerator whose memory it relieves, and there is none here; "
            "delete the key"
        )
    checkpointing.configure(
        None,
        partition_activations=False,
        contiguous_checkpointing=False,
        checkpoint_in_cpu="cpu_checkpointing" in ds.checkpoint_keys,
        synchronize="synchronize_checkpoint_boundary" in ds.checkpoint_keys,
        profile="profile" in ds.checkpoint_keys,
    )
    return checkpointing.checkpoint


def _speak(level: int) -> None:
    """Let DeepSpeed's logger say everything from this level on; its handler has a level of its own."""
    for place in (deepspeed_logger, *deepspeed_logger.handlers):
        place.setLevel(level)


def _forget_stage_3() -> None:
    """Empty what DeepSpeed keeps in modules and caches, and with it every stage-3 engine of this process for ever."""
    parameter_offload.FWD_MODULE_STACK.clear()
    wrapped = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(wrapped).nonlocals["func"].cache_clear()


class _Collected(TorchCheckpointEngine):
    """Keeps what DeepSpeed saves instead of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[tuple[str, Any]] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """No directory either."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((Path(path).name, state_dict))


class Engine:
    """One training engine over all ranks. Every method but `set_lr` and `seed_micro_batch` is collective."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ds: DsConfig,
        device: torch.device,
        ema: Sequence[float] = (),
    ) -> None:
        """`ema`: decays of the moving averages to keep (training/ema.py)."""
        self.ds = ds
        self.device = device
        self._optimizer: Any = optimizer
        self.world = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.accumulation_steps = ds.accumulation
        self.last_step_skipped = False
        self._grad_norm: Any = None
        self._stop_timing: Callable[[], None] = lambda: None
        self.clip = ds.record["gradient_clipping"]
        if ds.engine["fp16"]["enabled"] and not get_accelerator().is_fp16_supported():
            raise EnvironmentFault(
                f"train.precision=fp16 needs a device that computes in it, which {device.type} here does not by DeepSpeed's "
                "test; set train.precision to bf16 or fp32"
            )
        # Of an earlier engine in this process: DeepSpeed keeps it in a module and would give this one its gradient scaler.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
        if ds.engine.get("dump_state"):
            _speak(logging.INFO)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=None, config=ds.engine, dist_init_required=False
        )
        if ds.engine.get("log_level") is None:
            _speak(logging.INFO if ds.is_talkative else logging.ERROR)
        # DeepSpeed makes groups of its own without a timeout; a slow save must not be taken for a dead rank.
        for group in {self._engine.seq_data_parallel_group, self._engine.data_parallel_group}:
            torch.distributed.distributed_c10d._set_pg_timeout(PROCESS_GROUP_TIMEOUT, group)
        # Activations take the type of the first weights; under autocast torch casts by itself.
        self.input_dtype = torch.float32
        if self._engine.bfloat16_enabled():
            self.input_dtype = torch.bfloat16
        elif self._engine.fp16_enabled():
            self.input_dtype = torch.float16
        self.partitions = partitions_of(self.module, self.zero_optimizer, stage=ds.stage, rank=self.rank, world=self.world)
        if isinstance(optimizer, PartitionOptimizer):
            optimizer.attach(self.partitions)
        self.averages = Averages(self.partitions, ema)

    @property
    def module(self) -> nn.Module:
        """The model, for reading its settings. Call the engine, never this: gradients of stage 3 come out wrong."""
        return self._engine.module

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer wrapper; only training/pieces.py reads its internals."""
        return self._engine.optimizer

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Forward pass: logits_BC."""
        return self._engine(images_BCHW)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming step on every parameter group."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def seed_micro_batch(self, seed: int, step: int, micro_batch: int) -> None:
        """Seed torch's generators for one forward pass from where it stands in the run, so that none is ever stored."""
        torch.manual_seed(xxh3_64(f"{seed} {step} {self.rank} {micro_batch}".encode()))

    def backward_and_maybe_step(self, loss: Tensor, passed: Callable[[str], None] = lambda part: None) -> None:
        """Backward of one micro-batch; at the accumulation boundary reduce, clip and update. `passed` is told of each part.

        A step with a non-finite gradient on any rank is skipped on all ranks: parameters and optimizer counters keep
        their values, `last_step_skipped` becomes true. Under fp16 an overflow is such a step, and lowers the loss scale;
        raises DivergedError when it cannot be lowered any more.
        """
        self._engine.backward(loss)
        passed("backward")
        is_boundary = self._engine.is_gradient_accumulation_boundary()
        if is_boundary and self.ds.stage == 0:
            self._clip_or_skip_at_stage_0()
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # DeepSpeed has no type for it
                raise
            raise DivergedError(
                "gradients overflow fp16 at the smallest loss scale (fp16.min_loss_scale); lower optim.peak_lr or set "
                "train.precision to bf16"
            ) from None
        if is_boundary and self.ds.stage > 0:
            self.last_step_skipped = not self._engine.was_step_applied()
            self._grad_norm = self._engine.get_global_grad_norm()
        if is_boundary and not self.last_step_skipped:
            self.averages.update()
        passed("optimizer")

    def _clip_or_skip_at_stage_0(self) -> None:
        """DeepSpeed does not look at gradients at stage 0. They are reduced already, so all ranks see the same norm."""
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._grad_norm = norm
        self.last_step_skipped = not bool(torch.isfinite(norm))
        if self.last_step_skipped:
            # Without gradients AdamW touches neither parameters nor counters.
            for parameter in parameters:
                parameter.grad = None
        elif self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)

    def time_collectives(self, clock: StepClock) -> None:
        """Let the clock time what DeepSpeed sends from now on, until `close`."""
        self._stop_timing()
        self._stop_timing = clock.watch_collectives(deepspeed.comm.comm.cdb)

    def memory_bytes(self) -> int:
        """Most memory of the device that tensors have taken so far; on a CPU, that this process has taken."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def grad_norm(self) -> float:
        """Global norm of the last step's gradient before clipping. Waits for the device."""
        return float(self._grad_norm)

    @property
    def averages_of(self) -> int:
        """The rank that writes the averages this rank keeps: at stage 0, where all keep the same, rank 0."""
        return self.rank if self.ds.stage > 0 else 0

    @contextmanager
    def averaged(self, decay: float) -> Iterator[None]:
        """The model with the averages of this decay as its weights, for evaluating; exactly restored. Collective.

        Masters and averages change places in the partitions, so nothing is gathered but what the forward pass gathers.
        """
        self._swap(decay)
        try:
            yield
        finally:
            self._swap(decay)

    def _swap(self, decay: float) -> None:
        self.averages.swap(decay)
        self.publish_masters()

    def publish_masters(self) -> None:
        """Make the weights the model computes with anew from the masters. Collective."""
        publish_masters(self.zero_optimizer, stage=self.ds.stage)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank holds a whole copy of, by name and in one order: see training/integrity.py."""
        for name, parameter in self.module.named_parameters():
            if getattr(parameter, "ds_persist", True):  # stage 3 says of each whether it stays gathered
                yield name, parameter
        yield from self.module.named_buffers()
        if self.ds.stage == 0:
            for partition in self.partitions:
                for key, value in self.zero_optimizer.state.get(partition.master, {}).items():
                    yield f"{key} of {partition.key}", value
            for name, average in self.averages.tensors().items():
                yield f"moving average {name}", average

    def loss_scale(self) -> float:
        """What the loss is multiplied with before its backward pass: fp16 only, else 1."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sum of each number over the ranks, in float64."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Mean of a number over the ranks, on the device: the host does not wait for it."""
        torch.distributed.all_reduce(value)
        return value / self.world

    def sum_modulo_2_64(self, value: int) -> int:
        """Sum of unsigned 64-bit integers over the ranks, modulo 2^64."""
        # Two's complement: the signed sum that wraps has the bits of the unsigned sum modulo 2^64.
        signed = value - (1 << 64) if value >= 1 << 63 else value
        total = torch.tensor([signed], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(total)
        return int(total.item()) % (1 << 64)

    def stage_files(self, directory: Path, tag: str) -> list[tuple[str, Any]]:
        """What DeepSpeed would write into directory/tag now, as (name, content), without writing: the tensors in it are the
        live ones, to be copied before the next step. Collective."""
        asked_for = _Collected()
        own, self._engine.checkpoint_engine = self._engine.checkpoint_engine, asked_for
        self._engine._copy_recovery_script = lambda directory: None  # written with the rest (saving.py)
        try:
            self._engine.save_checkpoint(str(directory), tag=tag, client_state={}, save_latest=False)
        finally:
            self._engine.checkpoint_engine = own
        return asked_for.files

    def state_number(self, partition: Partition) -> int:
        """The number of a partition in the optimizer's own state dictionary."""
        if self.ds.stage > 0:
            return int(partition.key)
        tensors = [tensor for group in self._optimizer.param_groups for tensor in group["params"]]
        return next(number for number, tensor in enumerate(tensors) if tensor is partition.master)

    def optimizer_state(self, partition: Partition) -> dict[str, Any]:
        """What the optimizer keeps of a partition; fresh where it has not met it yet. To be written into."""
        return self._optimizer.state[partition.master] or self._optimizer.fresh_state(partition.master)

    def forget_optimizer_state(self) -> None:
        """As before the first step."""
        self._optimizer.state.clear()

    def take_up(self, *, step: int, loss_scaler: dict[str, Any]) -> None:
        """Go on from masters, optimizer state and averages that were written into: publish the weights, set the counters of
        DeepSpeed and its loss scaler. Collective."""
        if self.ds.stage > 0:
            publish_masters(self.zero_optimizer, stage=self.ds.stage)
        self._engine.global_steps = step
        self._engine.global_samples = step * self._engine.train_batch_size()
        if self._engine.fp16_enabled():
            vars(self.zero_optimizer.loss_scaler).update(loss_scaler)
        self._engine.zero_grad()

    def loss_scaler(self) -> dict[str, Any]:
        """Where the loss scaling of fp16 stands; empty otherwise."""
        if not self._engine.fp16_enabled():
            return {}
        kept = vars(self.zero_optimizer.loss_scaler)
        return {name: kept[name] for name in LOSS_SCALER_STATE if name in kept}

    def close(self) -> None:
        """Print what the communication logger has counted, and let go of all that DeepSpeed holds. Collective.

        Another engine can be made in this process afterwards; this one has no model any more.
        """
        if self.ds.engine.get("comms_logger", {}).get("enabled"):
            deepspeed.comm.log_summary()
            deepspeed.comm.configure(enabled=False)
        _speak(logging.ERROR)
        self._stop_timing()
        self._engine.destroy()
        del self._engine
        _forget_stage_3()
