"""What to do with the model of a training that has ended."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mask_rcnn_plugin.inference.predictor import find_weights


def next_steps(
    cfg: DictConfig, results: dict[str, Any], given: str = "", overrides: Sequence[str] = ()
) -> str:
    """Say where the model is, how good it is, and the commands that evaluate it and predict.

    Args:
        cfg: of the training, its output folder with a final checkpoint.
        results: of its last evaluation; {} without one.
        given: name of the config. A file of the user's own is repeated, with the overrides, as it
            may be what registers the dataset.
    """
    folder = Path(cfg.train.output_dir)
    weights = find_weights(folder)
    content = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    scores = {f"{task}/AP": values["AP"] for task, values in results.items() if "AP" in values}
    if "score" in content:  # the best model
        scores = {content["metric"]: content["score"]}
    quality = "".join(f"{metric} {score:.2f}, " for metric, score in scores.items())
    commands = [("predict", ["python", "tools/predict.py", "--weights", str(folder), "--input"])]
    if cfg.dataset.test.names:
        own = any(Path(name).is_file() for name in (given, given.split("+")[0]))
        config, changes = (given, overrides) if own else (str(folder / "config.yaml"), ())
        evaluate = ["python", "eval.py", "--config-file", config, "--weights", weights, *changes]
        commands.insert(0, ("evaluate", evaluate))
    lines = [f"The model is {weights}: {quality}after iteration {content['iteration']}"]
    lines += [f"  {what}: {shlex.join(command)}" for what, command in commands]
    return "\n".join(lines) + " PHOTO"
