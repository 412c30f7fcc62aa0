"""What DeepSpeed's ZeRO optimizer holds on this rank, told from its live structures."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

_FP32 = 4


def zero_memory(module: nn.Module, zero: Any, *, stage: int, device: torch.device) -> dict[str, int]:
    """Bytes at the end of the backward passes, by part and place (``optimizer_host``).

    Args:
        module: Of which ``zero`` (DeepSpeed's optimizer of stage 1 or 2) steps the trainable parameters.
        zero: See ``module``.
        stage: 0, 1 or 2.
        device: Where the model lives.

    Returns:
        ``parameters``; ``gradients`` as they accumulate; ``optimizer``: master weights and moments; ``buffers``: of the
        reduction and of the step, the largest that exist at a time. Places are ``device`` and ``host``.
    """
    near = "device" if device.type == "cuda" else "host"
    trainable = {param for group in zero.bit16_groups for param in group}
    partition = sum(int(size) for size in zero.partition_size)
    # Parameters that overlap the partition, whole: what fp32 gradients of stage 2 are kept as.
    overlapping = sum(param.numel() for group in zero.params_in_partition for param in group)
    elements = sum(param.numel() for param in trainable)
    width = zero.bit16_groups_flat[0].element_size()
    fp32 = width == _FP32
    states = [value for state in zero.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]

    held: Counter[str] = Counter()
    held[f"parameters_{near}"] += sum(flat.nbytes for flat in zero.bit16_groups_flat)
    held[f"parameters_{near}"] += sum(param.nbytes for param in module.parameters() if param not in trainable)
    held[f"parameters_{near}"] += sum(buffer.nbytes for buffer in module.buffers())
    for tensor in (*zero.single_partition_of_fp32_groups, *states):
        held[f"optimizer_{'host' if tensor.device.type == 'cpu' else 'device'}"] += tensor.nbytes
    bucket = int(zero.reduce_bucket_size)
    if stage == 2:
        held[f"gradients_{'host' if fp32 and zero.cpu_offload else near}"] += _FP32 * (
            overlapping if fp32 else partition
        )
        held[f"buffers_{near}"] += width * (bucket + (overlapping if fp32 else 0))
    else:
        held[f"gradients_{near}"] += _FP32 * elements
        held[f"buffers_{near}"] += _FP32 * (bucket + (overlapping if fp32 else partition))
    if zero.cpu_offload:
        # Averaged gradients, rounded parameters on their way back, and one parameter on its way there.
        held["buffers_host"] += (_FP32 + width) * partition + zero.temp_grad_buffer_for_cpu_offload.nbytes
        held[f"buffers_{near}"] += zero.temp_grad_buffer_for_gpu_offload.nbytes
    return dict(held)
