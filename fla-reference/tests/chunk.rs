//! Sums inside chunks, and the inverse of a unit lower triangular matrix.

mod support;

use fla_reference::chunk::{CumsumShape, Sum, cumsum, unit_lower_inverse};
use fla_reference::compare::max_abs;
use fla_reference::inputs::Rng;
use proptest::prelude::{any, prop, proptest};
use support::packed;

#[test]
fn sums_start_anew_with_every_chunk_and_sequence() {
    let shape = CumsumShape { seqs: packed(&[3, 0, 1, 2]), d: 1, chunk: 2 };
    let x = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
    assert_eq!(cumsum(&shape, &x, Sum::Prefix), [1.0, 3.0, 4.0, 8.0, 16.0, 48.0]);
    assert_eq!(cumsum(&shape, &x, Sum::Suffix), [3.0, 2.0, 4.0, 8.0, 48.0, 32.0]);
}

#[test]
fn suffix_sums_keep_small_tails() {
    // A suffix sum formed as the total minus a prefix sum would lose the second row in f32.
    let shape = CumsumShape { seqs: packed(&[2]), d: 1, chunk: 2 };
    assert_eq!(cumsum(&shape, &[1e8f32, 1e-8], Sum::Suffix), [1e8, 1e-8]);
}

#[test]
fn inverse_of_equal_keys_with_strength_1() {
    // L is 1 everywhere below the diagonal: its powers reach 1e18 at 64 rows, its inverse has only 1 and -1.
    const N: usize = 64;
    let inverse = unit_lower_inverse(&vec![1.0f32; N * N], N);
    for (i, row) in inverse.chunks(N).enumerate() {
        for (j, &x) in row.iter().enumerate() {
            let want = if i == j { 1.0 } else { -f32::from(u8::from(i == j + 1)) };
            assert_eq!(x, want, "row {i}, column {j}");
        }
    }
}

proptest! {
    #![proptest_config(support::shapes_nobody_thought_of())]

    #[test]
    fn sums_are_those_of_the_definition(
        lens in prop::collection::vec(0usize..20, 1..4),
        d in 1usize..4,
        chunk in 1usize..9,
        seed in any::<u64>(),
    ) {
        let shape = CumsumShape { seqs: packed(&lens), d, chunk };
        let x: Vec<f64> = Rng::new(seed).normal(shape.seqs.tokens() * d, 1.0);
        let (prefix, suffix) = (cumsum(&shape, &x, Sum::Prefix), cumsum(&shape, &x, Sum::Suffix));
        for i_n in 0..shape.seqs.n() {
            let tokens = shape.seqs.range(i_n);
            for i_t in tokens.clone() {
                let first = tokens.start + (i_t - tokens.start) / chunk * chunk;
                let end = (first + chunk).min(tokens.end);
                for i_d in 0..d {
                    let sum = |range: std::ops::Range<usize>| range.map(|i| x[i * d + i_d]).sum::<f64>();
                    assert!((prefix[i_t * d + i_d] - sum(first..i_t + 1)).abs() < 1e-13);
                    assert!((suffix[i_t * d + i_d] - sum(i_t..end)).abs() < 1e-13);
                }
            }
        }
    }

    #[test]
    fn inverse_times_matrix_is_the_identity(n in 0usize..40, seed in any::<u64>()) {
        let l: Vec<f64> = Rng::new(seed).uniform(n * n, -0.5, 0.5);
        let inverse = unit_lower_inverse(&l, n);
        let mut product = vec![0.0; n * n];
        let mut identity = vec![0.0; n * n];
        for i in 0..n {
            identity[i * n + i] = 1.0;
            for j in 0..n {
                let below = (0..i).map(|m| l[i * n + m] * inverse[m * n + j]).sum::<f64>();
                product[i * n + j] = inverse[i * n + j] + below;
            }
        }
        let error = max_abs(&product, &identity);
        assert!(error <= 1e-10, "(I + L) times the inverse is off by {error:.1e}");
    }
}
