//! Seeded generators of inputs: the same numbers on every machine.

/// A small, fast generator of pseudo-random numbers.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// A generator whose numbers depend on `seed` alone.
    pub fn new(seed: u64) -> Rng {
        Rng { state: seed }
    }
}
