//! Percentiles of measured times.

use std::time::{Duration, Instant};

/// Measured times in milliseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn push(&mut self, milliseconds: f64) {
        self.0.push(milliseconds);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The value below which this share of the times lies; 0 when there is none.
    pub(crate) fn percentile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        // The nearest rank: a value that was measured, not one between two.
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted
            .get(rank.saturating_sub(1))
            .copied()
            .unwrap_or_default()
    }

    pub(crate) fn median(&self) -> f64 {
        self.percentile(0.5)
    }

    pub(crate) fn worst(&self) -> f64 {
        self.percentile(1.0)
    }

    pub(crate) fn values(&self) -> &[f64] {
        &self.0
    }
}

/// Milliseconds from one point in time to another, negative when it came before.
pub(crate) fn milliseconds(from: Instant, to: Instant) -> f64 {
    let signed = |duration: Duration| duration.as_secs_f64() * 1000.0;
    match to.checked_duration_since(from) {
        Some(after) => signed(after),
        None => -signed(from.duration_since(to)),
    }
}
