"""The `deepspeed` block of a base file: what of DeepSpeed's `zero_optimization` bears on a frozen base.

Keys, meanings and defaults are DeepSpeed's; a test compares them with its own model. Keys about gradients and
optimizer states have no place: adapters and their optimizers live outside ZeRO. Opens no file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from orchestrator.recipe.parts import Count, Model, Whole, Word


class OffloadParam(Model):
    """Where the weights lie between passes."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Word | None = None
    """A folder on the drive; with device nvme only."""
    pin_memory: bool | None = None
    """Page-locked host memory, for copies at full speed; DeepSpeed pins unless told otherwise."""
    buffer_count: Whole | None = None
    buffer_size: Whole | None = None
    max_in_cpu: Whole | None = None
    """With device nvme: elements kept in main memory."""

    @model_validator(mode="after")
    def _a_drive_has_a_path(self) -> OffloadParam:
        if (self.device == "nvme") != (self.nvme_path is not None):
            raise ValueError("device nvme needs an nvme_path, and nothing else does")
        return self


class ZeroBlock(Model):
    """Passed through to DeepSpeed; what is left out is its to choose."""

    offload_param: OffloadParam | None = None
    stage3_prefetch_bucket_size: Whole | None = None
    """Elements that may be fetched ahead of use."""
    stage3_param_persistence_threshold: Whole | None = None
    """Weights with fewer elements stay on every rank."""
    stage3_model_persistence_threshold: Whole | None = None
    stage3_max_live_parameters: Whole | None = None
    stage3_max_reuse_distance: Whole | None = None
    stage3_module_granularity_threshold: Whole | None = None
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    stage3_allgather_sequential: bool | None = None
    overlap_comm: bool | None = None
    zero_hpz_partition_size: Count | None = None
    """Ranks that keep a second copy among them, so that backward gathers stay inside a node."""
    zero_quantized_weights: bool | None = None
    """Gather in int8; DeepSpeed's kernels need a GPU."""
    zero_quantized_nontrainable_weights: bool | None = None
    """Keep the weights in int8, each rank its share."""
    log_trace_cache_warnings: bool | None = None

    def given(self) -> dict[str, Any]:
        """The keys that were written, as DeepSpeed reads them."""
        return self.model_dump(exclude_none=True)
