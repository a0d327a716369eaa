"""The keys of ds_config.json: which have an effect here, and why each of the others is refused. Tables only.

DeepSpeed 0.19 ignores a top-level key it does not know, raises at one it has removed, and reads one section without
acting on it; a key that is not in KNOWN never reaches it. A test compares these tables with DeepSpeed's own.
"""

# The only keys where "auto" has a meaning: they repeat what the recipe says.
AUTO_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)

# What a value must be. JSON has one kind of number, and people write 2e8 for a size: a whole number may be written so.
FLAG = "true or false"
SIZE = "a whole number of at least 0"
COUNT = "a whole number of at least 1"
COUNT_OR_NULL = "a whole number of at least 1, or null"
AMOUNT = "a number of at least 0"
POSITIVE = "a number above 0"
DEPTH = "a whole number of at least -1"
TEXT_OR_NULL = "a text or null"
NAMES = "a list of texts"
TYPE_OR_NULL = "fp32, bf16, fp16 or null"
LEVEL_OR_NULL = "debug, info, warning, error, critical or null"
DEVICE = "none or cpu"
CHECKED_LATER = "what ds_config.py says, in a sentence of its own"

Table = dict[str, "str | Table"]
"""A section: each key with what its value must be, or with the section it is."""

OFFLOAD: Table = {"device": DEVICE, "pin_memory": FLAG}

ZERO: Table = {
    "stage": CHECKED_LATER,
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": COUNT,
    "overlap_comm": FLAG,
    "round_robin_gradients": FLAG,
    "sub_group_size": COUNT,
    "offload_optimizer": OFFLOAD,
    "offload_param": OFFLOAD,
    "stage3_max_live_parameters": SIZE,
    "stage3_max_reuse_distance": SIZE,
    "stage3_prefetch_bucket_size": SIZE,
    "stage3_param_persistence_threshold": SIZE,
    "stage3_model_persistence_threshold": SIZE,
    "stage3_module_granularity_threshold": SIZE,
    "zero_hpz_partition_size": COUNT,
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
}

# DeepSpeed reads this section but acts on none of it outside its own pipeline engine: a true value of these would be a lie.
ACTIVATION_REASONS = {
    "partition_activations": "it shards over tensor-parallel ranks and there are none here",
    "contiguous_memory_optimization": "it needs tensor-parallel ranks and there are none here",
    "number_checkpoints": "the blocks to recompute are set by vitscale.recompute",
}

# These three make DeepSpeed's own checkpoint function run the recomputed blocks, with what they ask for.
ACTIVATION_KEYS = ("cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")

KNOWN: Table = {
    "train_batch_size": CHECKED_LATER,
    "train_micro_batch_size_per_gpu": CHECKED_LATER,
    "gradient_accumulation_steps": CHECKED_LATER,
    "gradient_clipping": CHECKED_LATER,
    "communication_data_type": TYPE_OR_NULL,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": POSITIVE,
    "steps_per_print": COUNT_OR_NULL,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "log_level": LEVEL_OR_NULL,
    "disable_python_gc": FLAG,
    "bf16": {"enabled": CHECKED_LATER},
    "fp16": {
        "enabled": CHECKED_LATER,
        "loss_scale": AMOUNT,
        "initial_scale_power": SIZE,
        "loss_scale_window": COUNT,
        "hysteresis": COUNT,
        "consecutive_hysteresis": FLAG,
        "min_loss_scale": COUNT,
    },
    "zero_optimization": ZERO,
    "data_types": {"grad_accum_dtype": CHECKED_LATER},
    "activation_checkpointing": dict.fromkeys((*ACTIVATION_REASONS, *ACTIVATION_KEYS), CHECKED_LATER),
    "flops_profiler": {
        "enabled": FLAG,
        "profile_step": COUNT,
        "module_depth": DEPTH,
        "top_modules": COUNT,
        "detailed": FLAG,
        "output_file": TEXT_OR_NULL,
        "recompute_fwd_factor": AMOUNT,
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "prof_ops": NAMES, "debug": FLAG},
    "vitscale": {"recompute": CHECKED_LATER, "attention": CHECKED_LATER, "compile": CHECKED_LATER},
}

REFUSED = {
    "optimizer": "the optimizer belongs to the recipe; set optim.* instead",
    "scheduler": "the schedule belongs to the recipe; set optim.peak_lr, optim.warmup and train.length instead",
    "tensorboard": "metrics have one writer here; TensorBoard files are always written to RUN/tensorboard",
    "csv_monitor": "metrics have one writer here; read RUN/metrics.jsonl",
    "wandb": "metrics have one writer here; read RUN/metrics.jsonl or RUN/tensorboard",
    "comet": "metrics have one writer here; read RUN/metrics.jsonl or RUN/tensorboard",
    "torch_autocast": "it is derived: train.precision=bf16 at ZeRO stages 0 and 1 turns it on",
    "checkpoint": "checkpoints are committed and verified by vitscale; set run.save_every and run.keep_last instead",
    "timers": "steps are timed by vitscale without synchronising the device",
    "gradient_allreduce_op": "gradients are always averaged",
    "managed_gradient_accumulation": "accumulation is always managed by the engine",
    "seed": "DeepSpeed has no such key; set train.seed instead",
    **{
        key: "DeepSpeed 0.19 has removed it and would raise; delete the key"
        for key in (
            "nebula",
            "amp",
            "compression_training",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
            "zero_optimization.mics_shard_size",
            "zero_optimization.mics_hierarchical_params_gather",
            "zero_optimization.zeropp_loco_param",
        )
    },
    "zero_force_ds_cpu_optimizer": "the optimizer belongs to the recipe, also where it runs on the host; delete the key",
    "zero_allow_untested_optimizer": "the optimizer belongs to the recipe; delete the key",
    "fp16.auto_cast": "images are cast by vitscale; delete the key",
    "fp16.fp16_master_weights_and_grads": "master weights are always kept in fp32; delete the key",
    "bf16.bf16_master_weights_and_grads": "master weights are always kept in fp32; delete the key",
    "bf16.bf16_optimizer_states": "the optimizer belongs to the recipe; set optim.moment_dtype=bf16 instead",
    "bf16.check_grad_overflow": "a step with a non-finite gradient is always skipped; delete the key",
    "bf16.immediate_grad_update": "DeepSpeed reads it only in an optimizer that is not used here; delete the key",
    "zero_optimization.zenflow": "it needs DeepSpeed's own Adam, but the optimizer belongs to the recipe; delete it",
    "zero_optimization.cpu_offload": "renamed: set zero_optimization.offload_optimizer.device to cpu instead",
    "zero_optimization.cpu_offload_param": "renamed: set zero_optimization.offload_param.device to cpu instead",
    **{
        f"zero_optimization.{section}.{key}": "it serves nvme or DeepSpeed's own Adam, which are not offered; delete the key"
        for section in ("offload_optimizer", "offload_param")
        for key in (
            "nvme_path",
            "buffer_count",
            "buffer_size",
            "max_in_cpu",
            "pipeline_read",
            "pipeline_write",
            "fast_init",
            "ratio",
            "super_offload",
            "cpuadam_cores_perc",
        )
    },
    "zero_optimization.elastic_checkpoint": "it raises at stage 3 and does nothing at stages 1 and 2; delete the key",
    "zero_optimization.zero_quantized_weights": "it changes the numbers and is not offered; delete the key",
    "zero_optimization.zero_quantized_gradients": "it changes the numbers and is not offered; delete the key",
}
