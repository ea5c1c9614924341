"""Verdicts on made-up measurements."""

import pytest

from mask_rcnn_plugin.claims import CLAIMS, Claim, Effect, standard_error
from mask_rcnn_plugin.paper import row_of


def measured(**configs: list[float]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {config: {"segm": {"AP": values}} for config, values in configs.items()}


A_OVER_B, C_OVER_B = Effect("a", "b", "segm"), Effect("c", "b", "segm")


@pytest.mark.parametrize(
    ("kind", "a", "verdict"),
    [  # b is 10, 10, 10
        ("gain", [12, 13, 14], "agrees"),
        ("gain", [8, 7, 6], "disagrees"),
        ("gain", [9, 13, 10], "undecided"),
        ("loss", [8, 7, 6], "agrees"),
        ("loss", [12, 13, 14], "disagrees"),
        ("equal", [10.1, 9.9, 10.2], "agrees"),
        ("equal", [9.9, 10.1, 9.8], "agrees"),
        ("equal", [12.9, 13, 13.1], "disagrees"),
        ("equal", [6.9, 7, 7.1], "disagrees"),
        ("equal", [8, 12, 13], "undecided"),
    ],
)
def test_verdict(kind: str, a: list[float], verdict: str) -> None:
    claim = Claim("", kind, A_OVER_B)
    assert claim.verdict(measured(a=a, b=[10, 10, 10])) == verdict


@pytest.mark.parametrize(
    ("kind", "a", "c", "verdict"),
    [  # b is 10, 10, 10
        ("more", [15, 16, 17], [12, 13, 14], "agrees"),
        ("more", [12, 13, 14], [15, 16, 17.1], "disagrees"),
        ("more", [12, 13, 14], [12.5, 13, 13.4], "undecided"),
        ("fraction", [11, 11, 11.1], [14, 14, 14], "agrees"),
        ("fraction", [13, 13, 13.1], [14, 14, 14], "disagrees"),
        ("fraction", [12, 11, 13.1], [14, 14, 14], "undecided"),
    ],
)
def test_verdict_against_another_effect(
    kind: str, a: list[float], c: list[float], verdict: str
) -> None:
    claim = Claim("", kind, A_OVER_B, than=C_OVER_B)
    assert claim.verdict(measured(a=a, b=[10, 10, 10], c=c)) == verdict


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


def test_standard_error() -> None:
    assert standard_error([1, 2, 3]) == pytest.approx(1 / 3**0.5)
    assert standard_error([4.2]) == 0


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.text)
def test_the_paper_agrees_with_itself(claim: Claim) -> None:
    effect = claim.effect.in_paper()
    than = claim.than.in_paper() if claim.than else 0.0
    if claim.kind == "equal":
        assert abs(effect) < 1
    elif claim.kind == "fraction":
        assert effect < than / 2
    elif claim.kind == "loss":
        assert effect < 0
    else:
        assert effect > than
    for config in (claim.effect.config, claim.effect.against):
        assert row_of(config) is not None
