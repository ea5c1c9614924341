"""What the paper concludes from its ablations, claims.yaml, and whether measurements agree.

A measurement is {config: {task: {metric: [AP in points, one a seed]}}}, seeds 0, 1, ... everywhere.
Of rows with different numbers of seeds, those that all have are compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan, nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from omegaconf import OmegaConf

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

    def measured(self, measured: Measured, relative: bool = False) -> list[float]:
        """The effect for each seed, in points of AP or as a share of what `against` has.

        [] if one of the two rows was not run; a share of 0 is nan.
        """
        if not {self.config, self.against} <= measured.keys():
            return []
        ours, theirs = (measured[c][self.task][self.metric] for c in (self.config, self.against))
        if relative:
            return [a / b - 1 if b else nan for a, b in zip(ours, theirs)]
        return [a - b for a, b in zip(ours, theirs)]

    def relative_in_paper(self) -> float | None:
        """The paper's value as a share of what `against` has; None if it does not give that."""
        ours = row_of(self.config).scores.get(self.task, {}).get(self.metric)
        effect = self.in_paper()
        return None if ours is None else effect / (ours - effect)

    def relative(self, measured: Measured) -> float | None:
        """The mean of the shares of what `against` has; None if there is nothing to divide."""
        shares = self.measured(measured, relative=True)
        return None if not shares or isnan(mean(shares)) else mean(shares)


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

    def support(self, measured: Measured, relative: bool = False) -> list[float]:
        """For each seed, what is positive where the paper is right, in points of AP.

        [] if a row was not run. `relative` is for "more": shares are compared, not points.
        """
        effect = self.effect.measured(measured, relative)
        than = self.than.measured(measured, relative) if self.than else [0.0] * len(effect)
        if not effect or not than:
            return []
        if self.kind == "as good":
            against = measured[self.effect.against][self.effect.task][self.effect.metric]
            return [e + AS_GOOD_WITHIN * a for e, a in zip(effect, against)]
        if self.kind == "no better":
            return [max(t, 0) / 2 - e for e, t in zip(effect, than)]
        sign = -1 if self.kind == "loss" else 1
        return [sign * (e - t) for e, t in zip(effect, than)]

    def verdict(self, measured: Measured, relative: bool = False) -> str:
        """Whether a measurement agrees with the paper; `relative` as in `support`.

        Returns:
            "agrees" or "disagrees", if the seeds are sure of it to 95%, else "undecided"; "one
            seed", "not run", or "no AP" where one could not be computed (nan).
        """
        support = self.support(measured, relative)
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


def _read_claims() -> Iterator[Claim]:
    content: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("claims.yaml")))
    for text, effects in content.items():
        than = effects.pop("than", None)
        ((kind, effect),) = effects.items()
        yield Claim(text, kind, Effect(*effect), Effect(*than) if than else None)


CLAIMS = tuple(_read_claims())
# The paper gives these in words alone (Sec. 4.2).
_ALIGN_FPN = Effect("table2a_backbone/r50_fpn", "fpn_roi_layer/roipool", "segm")
_EFFECTS_IN_TEXT = {_ALIGN_FPN: 1.5, _ALIGN_FPN._replace(task="bbox"): 0.5}
