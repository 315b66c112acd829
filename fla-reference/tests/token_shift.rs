//! Token shift: gradients against differences, packed against separate, and a sequence in two parts.

mod support;

use fla_reference::inputs::{Gates, Rng};
use fla_reference::{SeqLens, token_shift};
use num_traits::Float;
use proptest::prelude::{any, prop, proptest};
use support::{Axis, Draw, Form, Keys, Op, Problem, Tensors, dense, packed, report, tensors};

#[derive(Clone, Debug)]
struct TokenShift {
    shape: token_shift::Shape,
}

impl Op for TokenShift {
    const STATE_IN: &'static str = "cache";
    const STATE_OUT: &'static str = "cache_out";

    fn seqs(&self) -> &SeqLens {
        &self.shape.seqs
    }

    fn with_seqs(&self, seqs: SeqLens) -> TokenShift {
        TokenShift { shape: token_shift::Shape { seqs, ..self.shape.clone() } }
    }

    fn axis(&self, name: &str) -> Axis {
        if name.starts_with("cache") { Axis::Sequences } else { Axis::Tokens }
    }

    fn random(&self, rng: &mut Rng, _draw: Draw) -> Tensors<f64> {
        let token_shift::Shape { seqs, d } = &self.shape;
        tensors([("x", rng.normal(seqs.tokens() * d, 1.0)), ("cache", rng.normal(seqs.n() * d, 1.0))])
    }

    fn fwd<F: Float>(&self, _form: Form, x: &Tensors<F>) -> Tensors<F> {
        let y = token_shift::fwd(&self.shape, &inputs(x));
        tensors([("y", y.y), ("cache_out", y.cache_out)])
    }

    fn bwd<F: Float>(&self, _form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F> {
        let dy =
            token_shift::OutputGrads { dy: &dy["y"], d_cache_out: dy.get("cache_out").map(Vec::as_slice) };
        let dx = token_shift::bwd(&self.shape, &inputs(x), &dy);
        let mut grads = tensors([("x", dx.dx), ("cache", dx.d_cache)]);
        grads.retain(|name, _| x.contains_key(name));
        grads
    }
}

fn inputs<F>(x: &Tensors<F>) -> token_shift::Inputs<'_, F> {
    token_shift::Inputs { x: &x["x"], cache: x.get("cache").map(Vec::as_slice) }
}

fn op(seqs: SeqLens) -> TokenShift {
    TokenShift { shape: token_shift::Shape { seqs, d: 3 } }
}

const DRAW: Draw = Draw { gates: Gates::LogSigmoid, keys: Keys::Random };

#[test]
fn differences_are_to_the_token_before() {
    let shape = token_shift::Shape { seqs: packed(&[2, 0, 1]), d: 1 };
    let x = token_shift::Inputs { x: &[1.0, 3.0, 10.0], cache: Some(&[0.5, 7.0, 20.0]) };
    let y = token_shift::fwd(&shape, &x);
    assert_eq!(y.y, [-0.5, -2.0, 10.0]);
    assert_eq!(y.cache_out, [3.0, 7.0, 10.0], "an empty sequence hands its row through");
}

#[test]
fn gradients_are_those_of_the_loss() {
    support::gradients_hold_everywhere(&op(dense(1, 1)), &[Form::Recurrent]);
}

#[test]
fn absent_cache_is_zero() {
    support::absent_states_are_zero(&op(packed(&[3, 0, 9])), &[Form::Recurrent]);
}

proptest! {
    #![proptest_config(support::shapes_nobody_thought_of())]

    #[test]
    fn packed_is_separate(lens in prop::collection::vec(0usize..9, 1..6), seed in any::<u64>()) {
        let op = op(packed(&lens));
        report(support::packing_changes_nothing(&op, Form::Recurrent, &Problem::new(&op, DRAW, seed)), 1);
    }

    #[test]
    fn a_sequence_can_be_split(t in 0usize..12, part in 0.0..1.0, seed in any::<u64>()) {
        let op = op(dense(1, t));
        let at = (part * (t + 1) as f64) as usize;
        report(support::splitting_changes_nothing(&op, Form::Recurrent, &Problem::new(&op, DRAW, seed), at), 1);
    }
}
