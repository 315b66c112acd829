//! How well the next byte is predicted: accuracy, and bits per byte.

use super::memory::{Codes, V};

/// Weight of every head at the start.
const START: f32 = 0.75;

/// Step of the gradient descent on the weights.
const RATE: f32 = 0.01;

/// Running totals over the bytes seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Score {
    /// Bytes predicted.
    pub(super) bytes: u64,
    /// Bytes whose prediction was right.
    pub(super) hits: u64,
    /// Sum of `-log2` of the probability that the true byte was given.
    pub(super) bits: f64,
}

impl Score {
    fn add(&mut self, hit: bool, probability: f64) {
        self.bytes += 1;
        self.hits += u64::from(hit);
        self.bits -= probability.log2();
    }

    /// Share of right predictions, in percent.
    pub(super) fn accuracy_percent(&self) -> f64 {
        100.0 * self.hits as f64 / self.bytes as f64
    }

    /// Mean bits per byte.
    pub(super) fn bits_per_byte(&self) -> f64 {
        self.bits / self.bytes as f64
    }
}

/// Turns what the heads of a memory return into a distribution over bytes, and keeps score.
///
/// The distribution is the softmax of `sum_h weight_h evidence_h(c)` over the bytes c, with the evidence of
/// [`Codes::evidence`]. That is a logarithm, so a head that is certain of a byte, as one with a long context is when it
/// has met that context before, outweighs several that are not. The weights, which together are the inverse
/// temperature, start equal and follow the gradient of the loss of bytes already seen: nothing depends on a byte before
/// it has been predicted.
pub(super) struct Scorer {
    codes: Codes,
    /// `[H]`
    weights: Vec<f32>,
    /// `[H, 256]`
    evidence: Vec<f32>,
    /// The totals.
    pub(super) score: Score,
}

impl Scorer {
    /// A scorer for so many heads.
    pub(super) fn new(heads: usize) -> Scorer {
        Scorer {
            codes: Codes::new(),
            evidence: vec![0.0; heads * 256],
            weights: vec![START; heads],
            score: Score::default(),
        }
    }

    /// Predicts a byte from `o`, `[H, V]`, then looks at it.
    pub(super) fn observe(&mut self, o: &[f32], byte: u8) {
        let byte = usize::from(byte);
        let mut logits = [0.0f32; 256];
        let heads = o.chunks_exact(V).zip(self.evidence.chunks_exact_mut(256)).zip(&self.weights);
        for ((o, evidence), weight) in heads {
            evidence.copy_from_slice(&self.codes.evidence(o));
            for (evidence, logit) in evidence.iter().zip(&mut logits) {
                *logit += weight * evidence;
            }
        }
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Several bytes with the largest logit are no prediction: a memory that knows nothing predicts nothing.
        let hit = logits[byte] == largest && logits.iter().filter(|logit| **logit == largest).count() == 1;
        let mut probabilities = logits.map(|logit| (logit - largest).exp());
        let sum: f32 = probabilities.iter().sum();
        for probability in &mut probabilities {
            *probability /= sum;
        }
        self.score.add(hit, f64::from(probabilities[byte]).max(f64::MIN_POSITIVE));

        for (evidence, weight) in self.evidence.chunks_exact(256).zip(&mut self.weights) {
            let expected: f32 = evidence.iter().zip(&probabilities).map(|(e, p)| e * p).sum();
            *weight = (*weight - RATE * (expected - evidence[byte])).max(0.0);
        }
    }
}

/// The baseline without any context: bytes as often as they came so far.
pub(super) struct OrderZero {
    counts: [u64; 256],
    /// The totals.
    pub(super) score: Score,
}

impl OrderZero {
    /// Nothing counted; every byte has come once, so that none is impossible.
    pub(super) fn new() -> OrderZero {
        OrderZero { counts: [1; 256], score: Score::default() }
    }

    /// Predicts a byte, then looks at it.
    pub(super) fn observe(&mut self, byte: u8) {
        let byte = usize::from(byte);
        let best = (0..256).fold(0, |best, c| if self.counts[c] > self.counts[best] { c } else { best });
        let sum = self.score.bytes + 256;
        self.score.add(best == byte, self.counts[byte] as f64 / sum as f64);
        self.counts[byte] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_that_knows_nothing_costs_eight_bits() {
        let mut scorer = Scorer::new(2);
        for byte in 0..100 {
            scorer.observe(&[0.0; 2 * V], byte);
        }
        assert!((scorer.score.bits_per_byte() - 8.0).abs() < 1e-6);
        assert_eq!(scorer.score.hits, 0);
    }

    #[test]
    fn a_memory_that_is_right_is_believed_more_and_more() {
        let mut scorer = Scorer::new(1);
        let code = Codes::new().code(b'x');
        scorer.observe(&code, b'x');
        let first = scorer.score.bits;
        for _ in 0..1000 {
            scorer.observe(&code, b'x');
        }
        let before = scorer.score.bits;
        scorer.observe(&code, b'x');
        assert_eq!(scorer.score.hits, scorer.score.bytes);
        assert!(scorer.score.bits - before < 0.5 * first, "{first}");
    }

    #[test]
    fn a_memory_that_is_wrong_loses_its_weight() {
        let mut scorer = Scorer::new(1);
        // The code of 0 has no digit in common with that of x.
        let code = Codes::new().code(b'x');
        for _ in 0..1000 {
            scorer.observe(&code, 0);
        }
        assert_eq!(scorer.score.hits, 0);
        assert!(scorer.weights[0] < 0.1, "{:?}", scorer.weights);
    }

    #[test]
    fn the_baseline_predicts_the_most_frequent_byte() {
        let mut baseline = OrderZero::new();
        for &byte in b"aaabaaab" {
            baseline.observe(byte);
        }
        // The first byte is a guess at 1/256, and both `b` are missed.
        assert_eq!(baseline.score.hits, 5);
        let bits = [1.0 / 256.0, 2.0 / 257.0, 3.0 / 258.0, 1.0 / 259.0]
            .iter()
            .chain(&[4.0 / 260.0, 5.0 / 261.0, 6.0 / 262.0, 2.0 / 263.0f64])
            .map(|p: &f64| -p.log2())
            .sum::<f64>();
        assert!((baseline.score.bits - bits).abs() < 1e-9);
    }
}
