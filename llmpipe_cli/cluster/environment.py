"""Which variables of the controller's environment travel to other nodes.

A rank on another node must behave as one here would. What decides that travels byte for byte; what belongs to a machine
or a login (HOME, TMPDIR, DISPLAY, device numbers) stays. ``--env KEY[=VALUE]`` adds any other variable.
"""

from __future__ import annotations

from collections.abc import Mapping

_PREFIXES = (
    "ACCELERATE_", "AWS_", "CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "HIP_", "HSA_", "KMP_", "LLMPIPE_",
    "MKL_", "MLFLOW_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_", "RCCL_", "ROCM_", "TORCH_", "TORCHINDUCTOR_",
    "TRANSFORMERS_", "TRITON_", "UCX_", "WANDB_",
)  # fmt: skip
_NAMES = {
    "HUGGING_FACE_HUB_TOKEN", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONHASHSEED", "PYTHONPATH",
    "PYTHONWARNINGS", "TOKENIZERS_PARALLELISM", "TZ", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY",
    "HTTPS_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE",
}  # fmt: skip
# Device numbers are chosen on each node; the others are this process's own.
_STAY = {
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LLMPIPE_JOB_MARK",
    "LLMPIPE_RUN_DIR", "LLMPIPE_WORKER", "LLMPIPE_DEVICE", "LLMPIPE_GUARD_PARENT",
}  # fmt: skip


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that other nodes get."""
    return {
        key: value
        for key, value in environment.items()
        if key not in _STAY and (key in _NAMES or key.startswith(_PREFIXES))
    }
