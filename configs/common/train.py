"""Optimisation and the training loop: 160k iterations of 16 images (Sec. 3.1)."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from mask_rcnn_plugin.config.warmup import warmup_length

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=0.0001,
    fused=None,  # one kernel for all parameters: True, False, or null, True on CUDA alone
)

# Sec. 3.1: divided by 10 at 120k of 160k. Milestones count as parts of the last one, so a training
# of another length keeps the shape. The warm-up is detectron2's, not the paper's.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[120_000, 160_000]),
    warmup_factor=0.001,
    warmup_length=L(warmup_length)(iterations=1000, max_iter="${train.max_iter}"),
)

train = OmegaConf.create(
    dict(
        output_dir="output",  # train.py: output/CONFIG
        init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        max_iter=160_000,
        # Of the training set, in place of max_iter; an evaluation and a checkpoint come after each.
        epochs=None,
        accumulate_steps=1,  # batches whose gradients are added up for one step of the optimizer
        # Batch size that the learning rate and all periods are meant for: they are scaled to the
        # one that is used. null: they are taken as they are.
        reference_batch_size=None,
        eval_period=20_000,
        validation_period=0,  # iterations between losses on the test set; 0: none
        log_period=20,
        loggers=["json", "tensorboard"],  # others: wandb, mlflow
        checkpointer=dict(period=5000, max_to_keep=5),
        # Best model by a metric of the evaluation, e.g. segm/AP, in model_best.pth; null: none.
        best_metric=None,
        # Ends the training after `patience` evaluations in a row that have not raised the best
        # value of a metric by more than min_delta points. The best model is kept by this metric
        # where there is no best_metric; null: the training never ends early.
        early_stopping=dict(metric=None, patience=5, min_delta=0.0),
        # Exponential moving average of the weights: it is evaluated, and a checkpoint's "model".
        ema=dict(enabled=False, decay=0.999),
        device="cuda",  # train.py: the CPU where torch finds no GPU
        seed=-1,  # negative: a different one for each run
        max_skipped_steps=0,  # steps with a non-finite loss to leave out before stopping
        # Of half precision. "auto": bf16 where the device computes in it, else float32.
        amp=dict(enabled=False, dtype="bf16"),
        channels_last="auto",  # layout of the weights: True, False, or True on a CPU alone
        # No static_graph: it gains nothing where all parameters are used, and a step whose forward
        # pass fails has another graph.
        ddp=dict(
            broadcast_buffers=False,
            find_unused_parameters=False,
            fp16_compression=False,
            gradient_as_bucket_view=True,  # no second copy of the gradients
        ),
        # torch.compile of the backbone in training: minutes at the start, fewer kernels after it.
        compile_backbone=False,
        cudnn_benchmark=False,
        process_group_timeout=30.0,  # minutes that a process waits for the others
    )
)
