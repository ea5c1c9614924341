"""What a config may hold: keys and types of the nodes that call nothing, and bounds of numbers.

What the keys are for is said in configs/common. What detectron2's own training script reads of
`train` has detectron2's keys and types.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Checkpointing:
    """Arguments of detectron2's `PeriodicCheckpointer`."""

    period: int
    max_to_keep: int | None


@dataclass
class Amp:
    enabled: bool
    dtype: Literal["bf16", "fp16", "auto"]


@dataclass
class Ddp:
    """Arguments of detectron2's `create_ddp_model`."""

    broadcast_buffers: bool
    find_unused_parameters: bool
    fp16_compression: bool
    gradient_as_bucket_view: bool = False


@dataclass
class Averaging:
    enabled: bool
    decay: float


@dataclass
class Stopping:
    metric: str | None
    patience: int
    min_delta: float


@dataclass
class Train:
    """Keys with a default here may be missing from the config.yaml of an older training."""

    output_dir: str | None
    init_checkpoint: str | None
    max_iter: int
    accumulate_steps: int
    reference_batch_size: int | None
    eval_period: int
    validation_period: int
    log_period: int
    checkpointer: Checkpointing
    best_metric: str | None
    device: str
    seed: int
    max_skipped_steps: int
    amp: Amp
    channels_last: Literal[True, False, "auto"]
    ddp: Ddp
    cudnn_benchmark: bool
    process_group_timeout: float
    epochs: float | None = None
    early_stopping: Stopping | None = None
    compile_backbone: bool = False
    ema: Averaging | None = None
    loggers: list[Literal["json", "tensorboard", "wandb", "mlflow"]] = field(default_factory=list)


@dataclass
class Split:
    names: list[str]
    json: str | None
    images: str | None


@dataclass
class TestSplit(Split):
    max_detections: int


@dataclass
class Synthetic:
    """Arguments of `write_dataset`."""

    root: str
    train: int
    val: int
    size: int
    seed: int


@dataclass
class Dataset:
    train: Split
    test: TestSplit
    synthetic: Synthetic | None = None
    folder: str | None = None
    split: float | None = None
    metadata: dict[str, Any] | None = None


@dataclass
class FineTune:
    """Settings of the overlay `finetune`."""

    epochs: float
    batch: int
    lr: float


@dataclass
class LargeScaleJitter:
    """Settings of the overlay `lsj`."""

    size: int


@dataclass
class Dataloader:
    train: Any
    test: Any
    evaluator: Any


SCHEMAS: dict[str, type] = {
    "finetune": FineTune,
    "lsj": LargeScaleJitter,
    "train": Train,
    "dataset": Dataset,
    "dataloader": Dataloader,
}

_FINITE = sys.float_info.max
COUNT = (1, 2**63 - 1)  # integers
_NOT_NEGATIVE, _FRACTION = (0, _FINITE), (0, 1)

_COUNTS = """
    max_iter accumulate_steps reference_batch_size log_period period max_to_keep max_detections size
    batch total_batch_size batch_size_per_image num_classes num_keypoints output_size max_size
    short_edge_length pre_nms_topk post_nms_topk test_topk_per_image patience
"""
_NOT_NEGATIVES = """
    eval_period validation_period max_skipped_steps max_unreadable num_workers iterations
    sampling_ratio lr base_lr loss_weight weight_decay weight_decay_norm weight_decay_bias
    smooth_l1_beta min_delta
"""
_FRACTIONS = """
    warmup_length warmup_factor positive_fraction thresholds nms_thresh test_nms_thresh
    test_score_thresh repeat_threshold
"""
# Least and most of the numbers under a key of this name, wherever it stands. What is wrong here
# would be found after hours, or never.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS.split(), COUNT),
    **dict.fromkeys(_NOT_NEGATIVES.split(), _NOT_NEGATIVE),
    **dict.fromkeys(_FRACTIONS.split(), _FRACTION),
    "momentum": (0, 0.9999),
    "decay": (0, 0.999999),
    "epochs": (1e-3, _FINITE),
    "split": (1e-6, 0.999999),
    "process_group_timeout": (1e-3, _FINITE),  # minutes
    "seed": (-_FINITE, 2**31 - 1),  # the rank is added, and NumPy takes 32 bits
}
