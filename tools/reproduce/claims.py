"""What the paper concludes from its ablations, and whether measurements agree.

A measurement is {config: {task: {metric: [AP in points, one a seed]}}}, seeds in the same order
everywhere.
"""

from collections.abc import Mapping, Sequence
from math import isnan, sqrt
from statistics import mean, stdev
from typing import NamedTuple

from mask_rcnn_plugin.config.paper import row_of

Measured = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]

# "As good": not worse by more than this share of the other's AP, 3 points at the paper's 30.
AS_GOOD_WITHIN = 0.1
# A verdict is given where Student's t is sure of it to 95% (one-sided). By number of seeds, from 2;
# the last one for more.
_STUDENT_T = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)


class Effect(NamedTuple):
    """What changing one row into another does to a metric: `config` minus `against`."""

    config: str
    against: str
    task: str
    metric: str = "AP"

    def in_paper(self) -> float:
        """The paper's value, in points of AP.

        Raises:
            KeyError: if the paper does not give it.
        """
        if self in _EFFECTS_IN_TEXT:
            return _EFFECTS_IN_TEXT[self]
        reverse = self._replace(config=self.against, against=self.config)
        if reverse in _EFFECTS_IN_TEXT:
            return -_EFFECTS_IN_TEXT[reverse]
        ours, theirs = (row_of(c).scores[self.task] for c in (self.config, self.against))
        return ours[self.metric] - theirs[self.metric]

    def measured(self, measured: Measured) -> list[float]:
        """The effect for each seed, in points of AP; [] if one of the two rows was not run."""
        if not {self.config, self.against} <= measured.keys():
            return []
        ours, theirs = (measured[c][self.task][self.metric] for c in (self.config, self.against))
        return [a - b for a, b in zip(ours, theirs)]


class Claim(NamedTuple):
    """What the paper says of an effect.

    kind: "gain" (it is positive), "loss" (negative), "as good" (no loss of more than
        `AS_GOOD_WITHIN`), "more" (more than `than`) or "no better" (less than half of what `than`,
        another row's effect, gains).
    """

    text: str
    kind: str
    effect: Effect
    than: Effect | None = None

    def configs(self) -> set[str]:
        """The rows that it is about."""
        effects = [e for e in (self.effect, self.than) if e]
        return {config for e in effects for config in (e.config, e.against)}

    def support(self, measured: Measured) -> list[float]:
        """For each seed, what is positive where the paper is right, in points of AP.

        [] if a row was not run.
        """
        effect = self.effect.measured(measured)
        than = self.than.measured(measured) if self.than else [0.0] * len(effect)
        if not effect or not than:
            return []
        if self.kind == "as good":
            against = measured[self.effect.against][self.effect.task][self.effect.metric]
            return [e + AS_GOOD_WITHIN * a for e, a in zip(effect, against)]
        if self.kind == "no better":
            return [max(t, 0) / 2 - e for e, t in zip(effect, than)]
        sign = -1 if self.kind == "loss" else 1
        return [sign * (e - t) for e, t in zip(effect, than)]

    def verdict(self, measured: Measured) -> str:
        """Whether a measurement agrees with the paper.

        Returns:
            "agrees" or "disagrees", if the seeds are sure of it to 95%, else "undecided"; "one
            seed", "not run", or "no AP" where one could not be computed (nan).
        """
        support = self.support(measured)
        if not support:
            return "not run"
        if any(isnan(x) for x in support):
            return "no AP"
        if len(support) == 1:
            return "one seed"
        t = _STUDENT_T[min(len(support) - 2, len(_STUDENT_T) - 1)]
        centre, error = mean(support), stdev(support) / sqrt(len(support))
        if abs(centre) <= t * error:
            return "undecided"
        return "agrees" if centre > 0 else "disagrees"


def _within(table: str, config: str, against: str, task: str = "segm") -> Effect:
    return Effect(f"{table}/{config}", f"{table}/{against}", task)


_2C, _2D, _2E = "table2c_roi_layer", "table2d_stride32", "table2e_mask_branch"
_5 = "table5_multitask"
_ALIGN_C4 = _within(_2C, "roialign_ave", "roipool_max")
_ALIGN_C5 = _within(_2D, "roialign", "roipool")
_ALIGN_FPN = Effect("table2a_backbone/r50_fpn", "fpn_roi_layer/roipool", "segm")
_ALIGN_KEYPOINTS = _within("table6_keypoint_roi", "roialign", "roipool", "keypoints")
_EFFECTS_IN_TEXT = {_ALIGN_FPN: 1.5, _ALIGN_FPN._replace(task="bbox"): 0.5}

CLAIMS = (
    Claim(
        "Sigmoid masks beat softmax masks (Table 2b)",
        "gain",
        _within("table2b_mask_loss", "sigmoid", "softmax"),
    ),
    Claim(
        "Class-agnostic masks are nearly as good (Sec. 4.2)",
        "as good",
        Effect("class_agnostic/r50_c4", "table2a_backbone/r50_c4", "segm"),
    ),
    Claim("RoIAlign beats RoIPool (Table 2c)", "gain", _ALIGN_C4),
    Claim(
        "... more so at AP75 (Table 2c)", "more", _ALIGN_C4._replace(metric="AP75"), than=_ALIGN_C4
    ),
    Claim(
        "RoIWarp is no better than RoIPool (Table 2c, ave)",
        "no better",
        _within(_2C, "roiwarp_ave", "roipool_max"),
        than=_ALIGN_C4,
    ),
    Claim(
        "RoIWarp is no better than RoIPool (Table 2c, max)",
        "no better",
        _within(_2C, "roiwarp_max", "roipool_max"),
        than=_ALIGN_C4,
    ),
    Claim(
        "Max is as good as average (Table 2c)",
        "as good",
        _within(_2C, "roialign_max", "roialign_ave"),
    ),
    Claim("RoIAlign beats RoIPool at stride 32 (Table 2d)", "gain", _ALIGN_C5),
    Claim("... boxes too (Table 2d)", "gain", _ALIGN_C5._replace(task="bbox")),
    Claim("... more than at stride 16 (Tables 2d, 2c)", "more", _ALIGN_C5, than=_ALIGN_C4),
    Claim("RoIAlign beats RoIPool on an FPN (Sec. 4.2)", "gain", _ALIGN_FPN),
    Claim("... boxes too (Sec. 4.2)", "gain", _ALIGN_FPN._replace(task="bbox")),
    Claim("The FCN beats the MLP of two layers (Table 2e)", "gain", _within(_2E, "fcn", "mlp_2fc")),
    Claim(
        "The FCN beats the MLP of three layers (Table 2e)", "gain", _within(_2E, "fcn", "mlp_3fc")
    ),
    Claim("Masks help boxes (Table 5)", "gain", _within(_5, "mask_only", "box_only", "bbox")),
    Claim(
        "Masks help keypoints (Table 5)",
        "gain",
        _within(_5, "keypoint_and_mask", "keypoint_only", "keypoints"),
    ),
    Claim(
        "Keypoints cost boxes a little (Table 5)",
        "loss",
        _within(_5, "keypoint_and_mask", "mask_only", "bbox"),
    ),
    Claim(
        "Keypoints cost masks a little (Table 5)",
        "loss",
        _within(_5, "keypoint_and_mask", "mask_only"),
    ),
    Claim("RoIAlign beats RoIPool for keypoints (Table 6)", "gain", _ALIGN_KEYPOINTS),
    Claim(
        "... by more than for masks on an FPN (Table 6, Sec. 4.2)",
        "more",
        _ALIGN_KEYPOINTS,
        than=_ALIGN_FPN,
    ),
)
