// SPDX-License-Identifier: Apache-2.0
//! Medians, and what is far above them.

/// A percentile needs as many values as it is fine.
const ENOUGH_FOR_P99: usize = 100;

/// Values of one figure.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn push(&mut self, value: f64) {
        let at = self.0.partition_point(|known| *known <= value);
        self.0.insert(at, value);
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The value in the middle, or the mean of the two there; none of nothing.
    pub(crate) fn median(&self) -> Option<f64> {
        let upper = *self.0.get(self.0.len() / 2)?;
        if self.0.len() % 2 == 1 {
            return Some(upper);
        }
        Some(f64::midpoint(self.0[self.0.len() / 2 - 1], upper))
    }

    /// The 99th percentile (nearest rank) of at least a hundred values, else
    /// the largest.
    pub(crate) fn high(&self) -> Option<f64> {
        let rank = (self.0.len() * 99).div_ceil(100);
        self.0.get(rank.checked_sub(1)?).copied()
    }
}

/// What [`Series::high`] is called for `n` values.
pub(crate) fn high_name(n: usize) -> &'static str {
    if n < ENOUGH_FOR_P99 { "max" } else { "p99" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: impl IntoIterator<Item = u32>) -> Series {
        let mut series = Series::default();
        for value in values {
            series.push(f64::from(value));
        }
        series
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(series([]).median(), None);
        assert_eq!(series([3, 1, 2]).median(), Some(2.0));
        assert_eq!(series([4, 1, 3, 2]).median(), Some(2.5));
    }

    #[test]
    fn few_values_have_a_largest_and_many_a_percentile() {
        assert_eq!(series([]).high(), None);
        assert_eq!(series([5, 9, 1]).high(), Some(9.0));
        assert_eq!(series(1..=99).high(), Some(99.0));
        assert_eq!(series(1..=100).high(), Some(99.0));
        assert_eq!(series(1..=1000).high(), Some(990.0));
        assert_eq!(high_name(99), "max");
        assert_eq!(high_name(100), "p99");
    }
}
