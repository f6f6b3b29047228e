"""Other tools' names of recipe fields, and the nearest field to a mistyped one.

The rule: a name written in the section it belongs to, and with the very meaning of ours, is accepted with a warning
that tells our name (`ACCEPTED`). Anything else is refused with the line to write instead (`ELSEWHERE`, `NOT_HERE`): a
name in the wrong section, a name with two possible meanings, a switch that became a value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ACCEPTED: dict[str, dict[str, str]] = {
    "": {"run_name": "name", "eval": "evaluation", "checkpointing": "checkpoint"},
    "model": {
        "name_or_path": "from",
        "model_name_or_path": "from",
        "pretrained_model_name_or_path": "from",
        "base_model": "from",
        "pretrained": "from",
        "torch_dtype": "dtype",
        "attn_impl": "attn_implementation",
    },
    "data": {
        "cutoff_len": "sequence_len",
        "max_seq_length": "sequence_len",
        "max_seq_len": "sequence_len",
        "max_sequence_length": "sequence_len",
        "seq_length": "sequence_len",
        "seq_len": "sequence_len",
        "sequence_length": "sequence_len",
        "block_size": "sequence_len",
        "context_length": "sequence_len",
        "max_target_length": "target_sequence_len",
        "sample_packing": "packing",
        "valid": "validation",
        "val": "validation",
        "eval": "validation",
        "dev": "validation",
    },
    "data.train": {
        "file": "files",
        "data_files": "files",
        "dataset_name": "dataset",
        "dataset_config_name": "subset",
        "text_column": "text",
        "text_field": "text",
        "label_column": "label",
        "label_field": "label",
        "source_column": "source",
        "target_column": "target",
        "max_samples": "max_documents",
    },
    "train": {
        "lr": "learning_rate",
        "num_epochs": "num_train_epochs",
        "epochs": "num_train_epochs",
        "train_iters": "max_steps",
        "max_iters": "max_steps",
        "num_steps": "max_steps",
        "per_device_train_batch_size": "micro_batch_size",
        "train_micro_batch_size_per_gpu": "micro_batch_size",
        "gradient_accumulation": "gradient_accumulation_steps",
        "grad_accum_steps": "gradient_accumulation_steps",
        "optim": "optimizer",
        "lr_scheduler": "lr_scheduler_type",
        "num_warmup_steps": "warmup_steps",
        "gradient_clipping": "max_grad_norm",
        "grad_clip": "max_grad_norm",
        "clip_grad": "max_grad_norm",
        "clip_grad_norm": "max_grad_norm",
        "label_smoothing_factor": "label_smoothing",
        "adam_eps": "adam_epsilon",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
    },
    "train.early_stopping": {"early_stopping_patience": "patience", "early_stopping_threshold": "min_delta"},
    "parallel": {
        "pp": "pipeline",
        "pipeline_parallel_size": "pipeline",
        "pipeline_parallel_degree": "pipeline",
        "num_stages": "pipeline",
        "tp": "tensor",
        "tensor_parallel_size": "tensor",
        "tensor_parallel_degree": "tensor",
        "dp": "data",
        "data_parallel_size": "data",
        "data_parallel_degree": "data",
        "partition_method": "partition",
        "activation_checkpoint": "activation_checkpointing",
    },
    "checkpoint": {"save_steps": "every_steps", "save_total_limit": "keep", "save_interval": "every_steps"},
    "evaluation": {"eval_steps": "every_steps", "eval_interval": "every_steps", "max_eval_samples": "max_samples"},
}
ACCEPTED["data.validation"] = ACCEPTED["data.train"]

# What other tools call it -> our dotted field, wherever it was written.
ELSEWHERE: dict[str, str] = {
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "save_every": "checkpoint.every_steps",
    "eval_steps": "evaluation.every_steps",
    "eval_every": "evaluation.every_steps",
    "max_eval_samples": "evaluation.max_samples",
    "model_name_or_path": "model.from",
    "base_model": "model.from",
    "model_type": "model.config.model_type",
    "torch_dtype": "model.dtype",
    "hidden_size": "model.config.hidden_size",
    "num_hidden_layers": "model.config.num_hidden_layers",
    "num_attention_heads": "model.config.num_attention_heads",
    "num_labels": "model.config.num_labels",
    "tokenizer_name": "tokenizer",
    "dataset": "data.train.dataset",
    "dataset_name": "data.train.dataset",
    "datasets": "data.train",
    "train_file": "data.train.files",
    "validation_file": "data.validation.files",
    "val_size": "data.validation.fraction",
    "metric_for_best_model": "checkpoint.keep_best",
    "early_stopping_patience": "train.early_stopping.patience",
}

_LORA = "LoRA is not available in this version: every parameter is trained"
_BATCH = "write `global_batch_size` (samples a step, over all devices) or `micro_batch_size` (samples a micro-batch)"
NOT_HERE: dict[str, str] = {
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_eval_batch_size": "evaluation uses `train.micro_batch_size`; leave this out",
    "bf16": "write `dtype: bf16` under model:",
    "fp16": "write `dtype: fp16` under model:",
    "tf32": "leave it out: matrix products on GPUs use the precision that `model.dtype` names",
    "gradient_checkpointing": "write `activation_checkpointing: full` (or selective, none) under parallel:",
    "use_flash_attention_2": "write `attn_implementation: flash_attention_2` under model:",
    "flash_attention": "write `attn_implementation: flash_attention_2` under model:",
    "betas": "write `adam_beta1` and `adam_beta2` under train:",
    "adam_betas": "write `adam_beta1` and `adam_beta2` under train:",
    "warmup": "write `warmup_steps` (steps) or `warmup_ratio` (share of all steps) under train:",
    "min_lr": "write `min_lr_ratio` under train:, the last learning rate as a share of `learning_rate`",
    "logging_steps": "leave it out: every step is written to metrics.jsonl",
    "load_best_model_at_end": "write `keep_best: loss` under checkpoint:",
    "eval_strategy": "write `every_steps` under evaluation:",
    "evaluation_strategy": "write `every_steps` under evaluation:",
    "save_strategy": "write `every_steps` under checkpoint:",
    "resume": "resuming is a flag: llmpipe train RECIPE --resume auto",
    "resume_from_checkpoint": "resuming is a flag: llmpipe train RECIPE --resume PATH",
    "hostfile": "the machines are named by a flag: --hostfile FILE",
    "num_nodes": "the machines are named by a flag: --hostfile FILE",
    "deepspeed": "leave it out: the DeepSpeed configuration follows from the recipe",
    "zero_optimization": "write `zero_stage: 1` under parallel:",
    "fsdp": "leave it out: models are split by pipeline stages, see parallel:",
    "sequence_parallel": "sequence parallelism is not available",
    "context_parallel": "sequence parallelism is not available",
    "expert_parallel": "expert parallelism is not available",
    "lora": _LORA,
    "lora_r": _LORA,
    "lora_rank": _LORA,
    "lora_alpha": _LORA,
    "lora_dropout": _LORA,
    "peft": _LORA,
    "chat_template": "the task chat is not available in this version",
    "name": "the part of a dataset is named by `subset`",
    "path": "write `files: ...` (glob patterns) or `dataset: ...` (hub id or folder)",
    "type": "leave it out",
    "class_name": "write `config: {model_type: ...}` under model:",
    "max_epochs": "write `num_train_epochs` under train:",
}

# Values that other tools use -> ours, a dotted field each.
VALUES: dict[str, dict[str, str]] = {
    "model.dtype": {
        "bfloat16": "bf16",
        "torch.bfloat16": "bf16",
        "float16": "fp16",
        "torch.float16": "fp16",
        "half": "fp16",
        "float32": "fp32",
        "torch.float32": "fp32",
        "float": "fp32",
    },
    "parallel.wire_dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "train.optimizer": {
        "adam": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "fusedadam": "adamw",
        "lion_32bit": "lion",
    },
    "train.lr_scheduler_type": {
        "cosine_with_min_lr": "cosine",
        "constant_with_warmup": "constant",
        "warmup_stable_decay": "wsd",
        "invsqrt": "inverse_sqrt",
    },
    "parallel.schedule": {"1f1b-interleaved": "interleaved", "dualpipev": "zb-v", "zbv": "zb-v", "zerobubble": "zb-h1"},
    "task": {
        "clm": "causal-lm",
        "lm": "causal-lm",
        "pretrain": "causal-lm",
        "text-generation": "causal-lm",
        "mlm": "masked-lm",
        "fill-mask": "masked-lm",
        "text-classification": "classification",
        "sequence-classification": "classification",
        "seq2seq": "translation",
        "summarization": "translation",
        "qa": "question-answering",
        "ner": "token-classification",
        "sft": "chat",
    },
    "data.train.format": {"json": "jsonl", "txt": "text"},
    "data.validation.format": {"json": "jsonl", "txt": "text"},
}


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that a mistyped `name` most likely meant, or None."""
    choices = list(candidates)
    folded = {choice.lower().replace("-", "_"): choice for choice in reversed(choices)}
    matches = difflib.get_close_matches(name[:200].lower().replace("-", "_"), folded, n=1, cutoff=0.7)
    return folded[matches[0]] if matches else None
