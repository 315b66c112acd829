//! Sizes of the operator's tensors, where several value heads share a query head.

use fla_core::{Error, SeqLens, StateDims, StateShape};

/// Dims of the gated delta rule: sequences, query heads, value heads, key and value channels.
///
/// Value head j reads the query and the key of head `j * H / HV`, so HV is a multiple of H.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `B`, `T` and `N`.
    pub seqs: SeqLens,
    /// Query and key heads.
    pub h: usize,
    /// Value heads: each has a state, a gate and a strength of its own.
    pub hv: usize,
    /// Key channels of a head.
    pub k: usize,
    /// Value channels of a head.
    pub v: usize,
}

impl Shape {
    /// Elements of a `[B, T, H, K]` tensor. Saturates, so that a product that no memory holds fits no tensor.
    #[must_use]
    pub fn qk_len(&self) -> usize {
        product([self.rows(), self.h, self.k])
    }

    /// Elements of a `[B, T, HV]` tensor.
    #[must_use]
    pub fn head_len(&self) -> usize {
        product([self.rows(), self.hv, 1])
    }

    /// Elements of a `[B, T, HV, K]` tensor.
    #[must_use]
    pub fn k_len(&self) -> usize {
        product([self.rows(), self.hv, self.k])
    }

    /// Elements of a `[B, T, HV, V]` tensor.
    #[must_use]
    pub fn v_len(&self) -> usize {
        product([self.rows(), self.hv, self.v])
    }

    /// Elements of a `[N, HV, K, V]` state.
    #[must_use]
    pub fn state_len(&self) -> usize {
        self.seqs.n().saturating_mul(self.state_shape().elems)
    }

    /// What the states of these sequences are.
    #[must_use]
    pub fn state_shape(&self) -> StateShape {
        StateShape {
            n: self.seqs.n(),
            rows: self.rows(),
            elems: product([self.hv, self.k, self.v]),
            dims: StateDims::ValueHeads,
        }
    }

    /// Checks the dims of a head against the limits of a pass.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, HV, K or V is 0, K or V is above its limit, or HV is no multiple of H.
    pub(crate) fn check(&self, max_k: usize, max_v: usize) -> Result<(), Error> {
        let limits = [
            ("H", self.h, i32::MAX as usize),
            ("HV", self.hv, i32::MAX as usize),
            ("K", self.k, max_k),
            ("V", self.v, max_v),
        ];
        for (dim, got, max) in limits {
            if !(1..=max).contains(&got) {
                return Err(Error::Dim { dim, wanted: format!("from 1 to {max}"), got });
            }
        }
        if !self.hv.is_multiple_of(self.h) {
            let wanted = format!("a multiple of H, which is {}", self.h);
            return Err(Error::Dim { dim: "HV", wanted, got: self.hv });
        }
        Ok(())
    }

    fn rows(&self) -> usize {
        self.seqs.b().saturating_mul(self.seqs.t())
    }
}

fn product(dims: [usize; 3]) -> usize {
    dims.into_iter().fold(1, usize::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::{SeqLens, Shape};

    #[test]
    fn dims_are_checked_by_name() {
        let shape = Shape { seqs: SeqLens::dense(usize::MAX, 2), h: 2, hv: 6, k: 64, v: 64 };
        assert_eq!((shape.qk_len(), shape.state_len()), (usize::MAX, usize::MAX));
        assert!(shape.check(256, 512).is_ok());
        for (shape, text) in [
            (Shape { h: 0, ..shape.clone() }, "H must be from 1 to"),
            (Shape { hv: 0, ..shape.clone() }, "HV must be from 1 to"),
            (Shape { hv: 5, ..shape.clone() }, "HV must be a multiple of H, which is 2, but is 5"),
            (Shape { k: 257, ..shape.clone() }, "K must be from 1 to 256, but is 257"),
            (Shape { v: 0, ..shape.clone() }, "V must be from 1 to 512, but is 0"),
        ] {
            let error = shape.check(256, 512).expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
