"""Verdicts on made-up measurements."""

from math import sqrt
from statistics import mean, stdev

import pytest

from mask_rcnn_plugin.config.paper import row_of
from reproduce.claims import CLAIMS, Claim, Effect


def measured(**configs: list[float]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {config: {"segm": {"AP": values}} for config, values in configs.items()}


A_OVER_B, C_OVER_B = Effect("a", "b", "segm"), Effect("c", "b", "segm")


@pytest.mark.parametrize(
    ("kind", "a", "verdict"),
    [  # b is 10, 10, 10; t of 3 seeds is 2.92: 1 point of deviation must be 1.69 away
        ("gain", [11, 12, 13], "agrees"),
        ("gain", [10.6, 11.6, 12.6], "undecided"),
        ("gain", [9, 8, 7], "disagrees"),
        ("loss", [9, 8, 7], "agrees"),
        ("loss", [11, 12, 13], "disagrees"),
        ("as good", [9.7, 9.8, 9.9], "agrees"),
        ("as good", [13, 14, 15], "agrees"),
        ("as good", [8.1, 8.2, 8.3], "disagrees"),
        ("as good", [8, 9.3, 9.9], "undecided"),
    ],
)
def test_verdict(kind: str, a: list[float], verdict: str) -> None:
    claim = Claim("", kind, A_OVER_B)
    assert claim.verdict(measured(a=a, b=[10, 10, 10])) == verdict


@pytest.mark.parametrize(
    ("kind", "a", "c", "verdict"),
    [  # b is 10, 10, 10
        ("more", [15, 16, 17], [12, 13, 14.1], "agrees"),
        ("more", [12, 13, 14], [15, 16, 17.1], "disagrees"),
        ("more", [12, 13, 14], [12.5, 13, 13.4], "undecided"),
        ("no better", [11, 11, 11.1], [14, 14, 14], "agrees"),
        ("no better", [13, 13, 13.1], [14, 14, 14], "disagrees"),
        ("no better", [12, 11, 13.1], [14, 14, 14], "undecided"),
        # where the other row gains nothing, "no better" is no gain at all
        ("no better", [9.5, 9.5, 9.4], [8, 8, 8], "agrees"),
        ("no better", [10.5, 10.5, 10.6], [8, 8, 8], "disagrees"),
    ],
)
def test_verdict_against_another_effect(
    kind: str, a: list[float], c: list[float], verdict: str
) -> None:
    claim = Claim("", kind, A_OVER_B, than=C_OVER_B)
    assert claim.verdict(measured(a=a, b=[10, 10, 10], c=c)) == verdict


@pytest.mark.parametrize("kind", ["more", "as good", "no better"])
def test_the_seeds_that_all_rows_have_are_compared(kind: str) -> None:
    claim = Claim("", kind, A_OVER_B, than=None if kind == "as good" else C_OVER_B)
    some = measured(a=[15, 16, 17], b=[10, 10, 10], c=[12, 13, 14.1])
    more = measured(a=[15, 16, 17, 0], b=[10, 10, 10], c=[12, 13, 14.1, 0, 0])
    assert claim.support(more) == claim.support(some) != []
    assert A_OVER_B.measured(more, relative=True) == A_OVER_B.measured(some, relative=True)


@pytest.mark.parametrize(
    ("c", "verdict"),
    [  # a gains 100%
        ([52, 53, 54], "agrees"),
        ([84, 85, 86.1], "disagrees"),
        ([80, 81, 79], "undecided"),
    ],
)
def test_more_in_proportion(c: list[float], verdict: str) -> None:
    claim = Claim("", "more", A_OVER_B, than=Effect("c", "d", "segm"))
    rows = measured(a=[20, 20, 20], b=[10, 10, 10], c=c, d=[40, 40, 40])
    assert claim.verdict(rows) == "disagrees"
    assert claim.verdict(rows, relative=True) == verdict


def test_a_share_of_nothing_decides_nothing() -> None:
    rows = measured(a=[20, 20], b=[0, 10], c=[30, 30])
    assert Claim("", "more", A_OVER_B, than=C_OVER_B).verdict(rows, relative=True) == "no AP"


@pytest.mark.parametrize(("seeds", "t"), [(2, 6.31), (3, 2.92), (4, 2.35), (10, 1.83), (30, 1.83)])
def test_the_more_seeds_the_less_it_takes(seeds: int, t: float) -> None:
    spread = [(-1.0) ** i for i in range(seeds)]
    noise = [x - mean(spread) for x in spread]
    error = stdev(noise) / sqrt(seeds)
    claim = Claim("", "gain", A_OVER_B)
    for factor, verdict in ((1.01, "agrees"), (0.99, "undecided")):
        a = [factor * t * error + x for x in noise]
        assert claim.verdict(measured(a=a, b=[0.0] * seeds)) == verdict


def test_one_seed_decides_nothing() -> None:
    assert Claim("", "gain", A_OVER_B).verdict(measured(a=[20], b=[10])) == "one seed"


def test_what_was_not_run_decides_nothing() -> None:
    claim = Claim("", "more", A_OVER_B, than=C_OVER_B)
    assert claim.verdict(measured(a=[1, 2], b=[3, 4])) == "not run"
    assert claim.verdict({}) == "not run"


def test_an_ap_that_could_not_be_computed_decides_nothing() -> None:
    claim = Claim("", "gain", A_OVER_B)
    assert claim.verdict(measured(a=[1, float("nan")], b=[3, 4])) == "no AP"


def test_effects_are_paired_by_seed() -> None:
    assert A_OVER_B.measured(measured(a=[3, 5], b=[1, 6])) == [2, -1]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.text)
def test_the_paper_agrees_with_itself(claim: Claim) -> None:
    if claim.kind == "more":
        assert claim.than
        shares = [e.relative_in_paper() for e in (claim.effect, claim.than)]
        assert shares[0] > shares[1]
    # Effects as the paper has them, upon an AP of 30.
    measured = {
        config: {t: {m: [30.0] * 2 for m in ("AP", "AP75")} for t in ("segm", "bbox", "keypoints")}
        for config in claim.configs()
    }
    for effect in (claim.effect, claim.than):
        if effect:
            measured[effect.config][effect.task][effect.metric] = [30 + effect.in_paper()] * 2
    assert claim.verdict(measured) == "agrees"
    for config in claim.configs():
        assert row_of(config) is not None


def test_effects_that_stand_in_the_text_alone() -> None:
    align, pool = "table2a_backbone/r50_fpn", "fpn_roi_layer/roipool"
    assert Effect(align, pool, "segm").in_paper() == 1.5
    assert Effect(pool, align, "bbox").in_paper() == -0.5
    with pytest.raises(KeyError):
        Effect(align, pool, "segm", "AP75").in_paper()
