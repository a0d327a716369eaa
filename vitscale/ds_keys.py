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

ZERO_KEYS = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "zero_hpz_partition_size",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
)

# DeepSpeed reads this section but acts on none of it outside its own pipeline engine: a true value of these would be a lie.
ACTIVATION_REASONS = {
    "partition_activations": "it shards over tensor-parallel ranks and there are none here",
    "contiguous_memory_optimization": "it needs tensor-parallel ranks and there are none here",
    "number_checkpoints": "the blocks to recompute are set by vitscale.recompute",
}

# These three make DeepSpeed's own checkpoint function run the recomputed blocks, with what they ask for.
ACTIVATION_KEYS = ("cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")

# Sections whose keys are listed are checked key by key; None means a plain value.
KNOWN: dict[str, tuple[str, ...] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "gradient_clipping": None,
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "log_level": None,
    "disable_python_gc": None,
    "bf16": ("enabled",),
    "fp16": ("enabled",),
    "zero_optimization": ZERO_KEYS,
    "data_types": ("grad_accum_dtype",),
    "activation_checkpointing": (*ACTIVATION_REASONS, *ACTIVATION_KEYS),
    "flops_profiler": (
        "enabled",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
        "recompute_fwd_factor",
    ),
    "comms_logger": ("enabled", "verbose", "prof_all", "prof_ops", "debug"),
    "vitscale": ("recompute", "attention", "compile"),
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
    "zero_optimization.offload_optimizer": "offloading is not offered yet; delete the section",
    "zero_optimization.offload_param": "offloading is not offered yet; delete the section",
    "zero_optimization.elastic_checkpoint": "it raises at stage 3 and does nothing at stages 1 and 2; delete the key",
    "zero_optimization.zero_quantized_weights": "it changes the numbers and is not offered; delete the key",
    "zero_optimization.zero_quantized_gradients": "it changes the numbers and is not offered; delete the key",
}
