//! Sizes of an operator's tensors: how the token axis is cut into sequences, heads and channels.

use crate::{Error, StateDims, StateShape, check_len};

/// How the `[B, T]` rows of a batch are cut into `N` sequences.
///
/// Either dense, `B` sequences of `T` tokens each, or packed, where `B` is 1 and `cu_seqlens` cuts the one row; packed
/// offsets are known when a plan is made, or only on the device. Checked once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqLens {
    b: usize,
    t: usize,
    n: usize,
    offsets: Offsets,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Offsets {
    Dense,
    Host(Vec<usize>),
    Device,
}

impl SeqLens {
    /// `b` sequences of `t` tokens each. Either may be 0.
    #[must_use]
    pub const fn dense(b: usize, t: usize) -> Self {
        Self { b, t, n: b, offsets: Offsets::Dense }
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
        Ok(Self { b: 1, t, n: cu_seqlens.len() - 1, offsets: Offsets::Host(cu_seqlens.to_vec()) })
    }

    /// `n` packed sequences in one row of `t` tokens, whose offsets are read on the device whenever a pass runs: a
    /// captured graph follows them. Only passes with an input `cu_seqlens` take them.
    ///
    /// Offsets outside of the row are taken for its ends and a sequence that would end before it starts for an empty one,
    /// so nothing is read or written out of bounds whatever they are; tokens of no sequence are left alone.
    #[must_use]
    pub const fn packed_on_device(n: usize, t: usize) -> Self {
        Self { b: 1, t, n, offsets: Offsets::Device }
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
    pub const fn n(&self) -> usize {
        self.n
    }

    /// Offsets of packed sequences; none when dense, and none when only the device knows them.
    #[must_use]
    pub fn cu_seqlens(&self) -> Option<&[usize]> {
        match &self.offsets {
            Offsets::Host(offsets) => Some(offsets),
            Offsets::Dense | Offsets::Device => None,
        }
    }

    /// Whether every sequence has [`SeqLens::t`] tokens.
    #[must_use]
    pub const fn is_dense(&self) -> bool {
        matches!(self.offsets, Offsets::Dense)
    }

    /// Whether only the device knows the offsets.
    #[must_use]
    pub const fn is_on_device(&self) -> bool {
        matches!(self.offsets, Offsets::Device)
    }

    /// Tokens of sequence `i_n`, which is below [`SeqLens::n`]; none where only the device knows.
    #[must_use]
    pub fn len(&self, i_n: usize) -> Option<usize> {
        match &self.offsets {
            Offsets::Dense => Some(self.t),
            Offsets::Host(offsets) => Some(offsets[i_n + 1] - offsets[i_n]),
            Offsets::Device => None,
        }
    }

    /// Checks that the input `cu_seqlens` of a call is there when, and only when, it is to be read.
    ///
    /// # Errors
    ///
    /// [`Error::Presence`], or [`Error::Len`] when it has not `N + 1` elements.
    pub fn check_cu_seqlens(&self, cu_seqlens: Option<usize>) -> Result<(), Error> {
        let presence = |wanted| Err(Error::Presence { tensor: "cu_seqlens", wanted });
        match (self.is_on_device(), cu_seqlens) {
            (true, Some(len)) => check_len("cu_seqlens", "[N + 1]", self.n + 1, len),
            (true, None) => presence("must be given, since the plan is for offsets on the device"),
            (false, Some(_)) => presence("must be absent, since the plan knows the lengths"),
            (false, None) => Ok(()),
        }
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

    /// What the states of these sequences are.
    #[must_use]
    pub fn state_shape(&self) -> StateShape {
        StateShape {
            n: self.seqs.n(),
            rows: product([self.seqs.b(), self.seqs.t(), 1, 1]),
            elems: product([self.h, self.k, self.v, 1]),
            dims: StateDims::Matrix,
        }
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
        assert_eq!((0..4).filter_map(|n| seqs.len(n)).collect::<Vec<_>>(), [0, 3, 0, 1]);
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
