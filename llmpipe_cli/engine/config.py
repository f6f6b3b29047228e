"""The DeepSpeed config of a plan; plain data, so that a dry run can print it without importing DeepSpeed."""

from __future__ import annotations

from typing import Any

from llmpipe_cli.plan.plan import Plan


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """What `deepspeed` is told.

    The recipe's optimizer and learning rates are applied by `engine`, so neither appears here.
    """
    recipe_train, dtype = plan.recipe["train"], plan.recipe["model"]["dtype"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_micro_batches,
        "train_batch_size": plan.micro_batch_size * plan.num_global_micro_batches,
        "gradient_clipping": recipe_train["max_grad_norm"],
        # Gradients are summed in fp32 except under fp16, where they are summed as they are, scaled.
        "communication_data_type": "fp16" if dtype == "fp16" else "fp32",
        "zero_optimization": {
            "stage": plan.zero_stage,
            # The pipeline reduces once, after the last micro-batch: hooks that reduce during the backward pass
            # would do it once a micro-batch.
            "overlap_comm": False,
            "contiguous_gradients": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return config
