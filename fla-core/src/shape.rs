//! Sizes of an operator's tensors: how the token axis is cut into sequences, heads and channels.

use crate::Error;

/// How the `[B, T]` rows of a batch are cut into `N` sequences.
///
/// Either dense, `B` sequences of `T` tokens each, or packed, where `B` is 1 and `cu_seqlens` cuts the one row.
/// Checked once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqLens {
    b: usize,
    t: usize,
    cu_seqlens: Option<Vec<usize>>,
}

impl SeqLens {
    /// `b` sequences of `t` tokens each. Either may be 0.
    #[must_use]
    pub const fn dense(b: usize, t: usize) -> Self {
        Self { b, t, cu_seqlens: None }
    }

    /// Packed sequences: number `n` owns the tokens `cu_seqlens[n]..cu_seqlens[n + 1]` of one row of `t`.
    ///
    /// Sequences may be empty; their state passes through unchanged.
    ///
    /// # Errors
    ///
    /// [`Error::SeqLens`] unless the offsets start at 0, never fall, and end at `t`.
    pub fn packed(cu_seqlens: &[usize], t: usize) -> Result<Self, Error> {
        let error = |reason: String| Err(Error::SeqLens { reason });
        let (Some(first), Some(last)) = (cu_seqlens.first(), cu_seqlens.last()) else {
            return error("it is empty, but holds N + 1 offsets".into());
        };
        if *first != 0 {
            return error(format!("it must start at 0, but starts at {first}"));
        }
        for (i, pair) in cu_seqlens.windows(2).enumerate() {
            if pair[0] > pair[1] {
                return error(format!(
                    "it must not fall, but offset {} is {} and offset {} is {}",
                    i,
                    pair[0],
                    i + 1,
                    pair[1]
                ));
            }
        }
        if *last != t {
            return error(format!("it must end at T, which is {t}, but ends at {last}"));
        }
        Ok(Self { b: 1, t, cu_seqlens: Some(cu_seqlens.to_vec()) })
    }

    /// Batch: rows of the token axis.
    #[must_use]
    pub const fn b(&self) -> usize {
        self.b
    }

    /// Tokens of a row; for packed sequences, of all sequences together.
    #[must_use]
    pub const fn t(&self) -> usize {
        self.t
    }

    /// Number of sequences, `N`.
    #[must_use]
    pub fn n(&self) -> usize {
        self.cu_seqlens.as_ref().map_or(self.b, |offsets| offsets.len() - 1)
    }

    /// Offsets of packed sequences; none when dense.
    #[must_use]
    pub fn cu_seqlens(&self) -> Option<&[usize]> {
        self.cu_seqlens.as_deref()
    }

    /// Tokens of sequence `i_n`, which is below [`SeqLens::n`].
    #[must_use]
    pub fn len(&self, i_n: usize) -> usize {
        self.cu_seqlens.as_ref().map_or(self.t, |offsets| offsets[i_n + 1] - offsets[i_n])
    }

    /// Whether there is no token at all.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.b == 0 || self.t == 0
    }
}

/// Dims of an operator with a matrix state: sequences, heads, key and value channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `B`, `T` and `N`.
    pub seqs: SeqLens,
    /// Heads.
    pub h: usize,
    /// Key channels of a head.
    pub k: usize,
    /// Value channels of a head.
    pub v: usize,
}

impl Shape {
    /// Elements of a `[B, T, H, K]` tensor. Saturates, so that a product that no memory holds fits no tensor.
    #[must_use]
    pub fn k_len(&self) -> usize {
        product([self.seqs.b(), self.seqs.t(), self.h, self.k])
    }

    /// Elements of a `[B, T, H, V]` tensor.
    #[must_use]
    pub fn v_len(&self) -> usize {
        product([self.seqs.b(), self.seqs.t(), self.h, self.v])
    }

    /// Elements of a `[N, H, K, V]` state.
    #[must_use]
    pub fn state_len(&self) -> usize {
        product([self.seqs.n(), self.h, self.k, self.v])
    }

    /// Checks the dims of a head against the limits of a pass.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, K or V is 0, or K or V is above its limit.
    pub fn check(&self, max_k: usize, max_v: usize) -> Result<(), Error> {
        dim("H", self.h, i32::MAX as usize)?;
        dim("K", self.k, max_k)?;
        dim("V", self.v, max_v)
    }
}

fn dim(name: &'static str, got: usize, max: usize) -> Result<(), Error> {
    if (1..=max).contains(&got) {
        return Ok(());
    }
    Err(Error::Dim { dim: name, wanted: format!("from 1 to {max}"), got })
}

fn product(dims: [usize; 4]) -> usize {
    dims.into_iter().fold(1, usize::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::{SeqLens, Shape};

    #[test]
    fn packed_offsets_are_checked() {
        let reason = |offsets: &[usize], t| SeqLens::packed(offsets, t).map_err(|e| e.to_string());
        let bad: &[(&[usize], &str)] = &[
            (&[], "it is empty"),
            (&[1, 4], "must start at 0, but starts at 1"),
            (&[0, 3, 2, 4], "offset 1 is 3 and offset 2 is 2"),
            (&[0, 3], "must end at T, which is 4, but ends at 3"),
            (&[0, 5], "must end at T, which is 4, but ends at 5"),
        ];
        for (offsets, text) in bad {
            let error = reason(offsets, 4).expect_err("must be refused");
            assert!(error.contains(text), "{error}");
        }
        let seqs = SeqLens::packed(&[0, 0, 3, 3, 4], 4).expect("empty members are allowed");
        assert_eq!((seqs.b(), seqs.t(), seqs.n()), (1, 4, 4));
        assert_eq!((0..4).map(|n| seqs.len(n)).collect::<Vec<_>>(), [0, 3, 0, 1]);
        assert_eq!(SeqLens::packed(&[0], 0).map(|s| s.n()).ok(), Some(0));
    }

    #[test]
    fn lengths_never_wrap() {
        let shape = Shape { seqs: SeqLens::dense(usize::MAX, 2), h: 2, k: 64, v: 64 };
        assert_eq!(shape.k_len(), usize::MAX);
        assert!(shape.check(256, 256).is_ok());
        assert!(Shape { k: 0, ..shape.clone() }.check(256, 256).is_err());
        assert!(Shape { v: 257, ..shape }.check(256, 256).is_err());
    }
}
