import math

from torch.testing import assert_close

from umm_zoo.comparison.statistics import holm, interval, paired_difference


def test_interval_is_student_t_of_the_mean():
    # 3 values: mean 4, s = 2, t(.975, 2) = 4.30265273 (table), so the half-width is 4.30265273 * 2 / sqrt(3)
    result = interval([2.0, 4.0, 6.0])
    assert_close(result.mean, 4.0)
    assert_close(result.half, 4.302652729911275 * 2 / math.sqrt(3))


def test_one_seed_has_no_interval():
    result = interval([0.5])
    assert result.mean == 0.5 and math.isnan(result.half) and "n=1" in str(result)


def test_pairing_uses_common_seeds_only():
    difference = paired_difference({0: 1.0, 1: 3.0, 5: 100.0}, {0: 0.5, 1: 1.5, 7: -100.0})
    assert difference is not None and difference.num == 2
    assert_close(difference.mean, 1.0)


def test_paired_differences_cancel_what_a_seed_shares():
    shared = {0: 10.0, 1: -30.0, 2: 55.0}
    difference = paired_difference({s: v + 0.25 for s, v in shared.items()}, shared)
    assert difference is not None
    assert_close(difference.half, 0.0)


def test_p_value_against_a_worked_example():
    # differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641, two-sided p with 2 degrees of freedom = 0.0741799
    assert_close(interval([1.0, 2.0, 3.0]).p_value, 0.07417990022744853)


def test_holm_against_a_worked_example():
    assert_close(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
