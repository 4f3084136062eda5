"""vir.benchmarks.paired against scipy."""

import pytest
from scipy import stats

from vir.benchmarks import paired


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (5, 5), (10, 25), (312, 405), (900, 1300)])
def test_mcnemars_exact_test_is_a_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert paired.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert paired.mcnemar(first, second) == paired.mcnemar(second, first)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 9, 30])
def test_students_distribution_and_its_quantiles(freedom):
    for t in (0.0, 0.3, 1.0, 4.3, 40.0):
        assert paired.within(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)
    for confidence in (0.5, 0.95, 0.99):
        assert paired.quantile(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom))


def test_the_interval_is_that_of_a_paired_t_test():
    first, second = [85.1, 84.7, 86.0], [84.2, 84.9, 85.1]
    differences = [one - other for one, other in zip(first, second)]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert paired.interval(differences) == pytest.approx(tuple(expected))
    assert paired.interval([1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no spread"):
        paired.interval([1.0])
