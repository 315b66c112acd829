//! RWKV-4: its scan over chunks against its recurrence, both against the plain weighted average, and gradients.

mod support;

use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::Model;
use fla_reference::{SeqLens, rwkv4};
use num_traits::Float;
use proptest::prelude::{Strategy, any, proptest};
use support::{Axis, Draw, Form, Keys, Op, Problem, Random, Tensors, dense, packed, report, tensors};

#[derive(Clone, Debug)]
struct Rwkv4 {
    shape: rwkv4::Shape,
    /// Standard deviation of the keys.
    keys: f64,
}

impl Op for Rwkv4 {
    const STATE_IN: &'static str = "state";
    const STATE_OUT: &'static str = "final_state";

    /// With large keys one token has almost all weight, and what the sums P and R leave for the decay is as little as
    /// exp(-10) of their terms, whose exponents are up to 16 * 70 + 60 and carry 1e-13.
    fn same(&self) -> f64 {
        if self.keys > 1.0 { 1e-9 } else { support::SAME_IN_F64 }
    }

    fn seqs(&self) -> &SeqLens {
        &self.shape.seqs
    }

    fn with_seqs(&self, seqs: SeqLens) -> Rwkv4 {
        Rwkv4 { shape: rwkv4::Shape { seqs, ..self.shape.clone() }, ..self.clone() }
    }

    fn axis(&self, name: &str) -> Axis {
        match name {
            "w" | "u" => Axis::Shared,
            "state" | "final_state" => Axis::Sequences,
            _ => Axis::Tokens,
        }
    }

    /// There is one decay per channel: the gates of a draw set its scale.
    fn random(&self, rng: &mut Rng, draw: Draw) -> Tensors<f64> {
        let rwkv4::Shape { seqs, c } = &self.shape;
        let len = seqs.tokens() * c;
        let w: Vec<f64> = match draw.gates {
            Gates::Mixed => rng.normal(*c, 2.0),
            // A decay of 1 has no raw parameter; -30 comes close.
            gates => rng.gates(*c, gates).iter().map(|g: &f64| (-g).ln().max(-30.0)).collect(),
        };
        let state = (0..seqs.n()).flat_map(|_| {
            let numerator: Vec<f64> = rng.normal(*c, 1.0);
            let denominator: Vec<f64> = rng.uniform(*c, 0.5, 2.0);
            let exponent: Vec<f64> = rng.normal(*c, self.keys);
            [numerator, denominator, exponent].concat()
        });
        tensors([
            ("state", state.collect()),
            ("w", w),
            ("u", rng.normal(*c, 1.0)),
            ("k", rng.normal(len, self.keys)),
            ("v", rng.normal(len, 1.0)),
        ])
    }

    fn fwd<F: Float>(&self, form: Form, x: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let y = match form {
            Form::Recurrent => rwkv4::recurrent_fwd(shape, &inputs, &rwkv4::Options::new()),
            Form::Chunk(chunk) => rwkv4::chunk_fwd(shape, &inputs, &rwkv4::Options::new().with_chunk(chunk)),
        };
        tensors([("o", y.o), ("final_state", y.final_state)])
    }

    fn bwd<F: Float>(&self, form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let dy =
            rwkv4::OutputGrads { d_o: &dy["o"], d_final_state: dy.get("final_state").map(Vec::as_slice) };
        let dx = match form {
            Form::Recurrent => rwkv4::recurrent_bwd(shape, &inputs, &dy, &rwkv4::Options::new()),
            Form::Chunk(chunk) => {
                rwkv4::chunk_bwd(shape, &inputs, &dy, &rwkv4::Options::new().with_chunk(chunk))
            }
        };
        let mut grads =
            tensors([("w", dx.dw), ("u", dx.du), ("k", dx.dk), ("v", dx.dv), ("state", dx.d_initial_state)]);
        grads.retain(|name, _| x.contains_key(name));
        grads
    }
}

fn inputs<F>(x: &Tensors<F>) -> rwkv4::Inputs<'_, F> {
    rwkv4::Inputs {
        w: &x["w"],
        u: &x["u"],
        k: &x["k"],
        v: &x["v"],
        initial_state: x.get("state").map(Vec::as_slice),
    }
}

fn op(seqs: SeqLens) -> Rwkv4 {
    Rwkv4 { shape: rwkv4::Shape { seqs, c: 5 }, keys: 1.0 }
}

const FORMS: [Form; 4] = [Form::Recurrent, Form::Chunk(1), Form::Chunk(3), Form::Chunk(16)];

#[test]
fn chunk_form_is_the_recurrence() {
    support::forms_agree_everywhere(&op(dense(1, 1)), &[1, 5, 16, 64]);
}

#[test]
fn chunk_form_is_the_recurrence_for_large_keys() {
    support::forms_agree_everywhere(&Rwkv4 { keys: 20.0, ..op(dense(1, 1)) }, &[1, 5, 16, 64]);
}

#[test]
fn gradients_are_those_of_the_loss() {
    support::gradients_hold_everywhere(&op(dense(1, 1)), &FORMS);
}

#[test]
fn f32_stays_near_f64() {
    let limit = support::f32_limit(Model::Rwkv4);
    support::f32_holds_everywhere(&op(dense(1, 65)), &[Form::Recurrent, Form::Chunk(16)], limit);
}

#[test]
fn absent_state_is_fresh() {
    let op = op(packed(&[3, 0, 9]));
    let mut fresh = Problem::new(&op, Draw { gates: Gates::LogSigmoid, keys: Keys::Random }, 1);
    let state = fresh.x.get_mut("state").unwrap();
    for rows in state.chunks_mut(3 * op.shape.c) {
        rows[..2 * op.shape.c].fill(0.0);
        rows[2 * op.shape.c..].fill(-1e38);
    }
    fresh.dy.get_mut("final_state").unwrap().fill(0.0);
    let mut absent = fresh.clone();
    absent.x.remove("state");
    absent.dy.remove("final_state");
    let mut failures = Vec::new();
    for form in FORMS {
        let same = |_: &str, error| (error, 0.0);
        failures.extend(support::differences(&op.fwd(form, &absent.x), &op.fwd(form, &fresh.x), same));
        let mut want = op.bwd(form, &fresh.x, &fresh.dy);
        want.remove("state");
        failures.extend(support::differences(&op.bwd(form, &absent.x, &absent.dy), &want, same));
    }
    report(failures, FORMS.len());
}

#[test]
fn outputs_are_the_plain_weighted_average() {
    let (op, t, c) = (op(dense(1, 13)), 13, 5);
    let mut x = op.random(&mut Rng::new(1), Draw { gates: Gates::LogSigmoid, keys: Keys::Random });
    x.remove("state");
    let mut want = vec![0.0; t * c];
    for i_c in 0..c {
        let log_decay = -x["w"][i_c].exp();
        for i_t in 0..t {
            let (mut numerator, mut denominator) = (0.0, 0.0);
            for i in 0..=i_t {
                let bonus = if i == i_t { x["u"][i_c] } else { (i_t - 1 - i) as f64 * log_decay };
                let weight = (bonus + x["k"][i * c + i_c]).exp();
                numerator += weight * x["v"][i * c + i_c];
                denominator += weight;
            }
            want[i_t * c + i_c] = numerator / denominator;
        }
    }
    for form in FORMS {
        let error = relative_rms(&op.fwd(form, &x)["o"], &want);
        assert!(error <= 1e-14, "{form:?}: relative error {error:.1e}");
    }
}

#[test]
fn a_tie_of_the_maximum_goes_to_the_key() {
    // The state decays to exactly 0, where the key is: exp(0) - 1 = -1 of decay, from an exponent of 1.
    let shape = rwkv4::Shape { seqs: dense(1, 1), c: 1 };
    let x =
        rwkv4::Inputs { w: &[0.0], u: &[0.5], k: &[0.0], v: &[2.0], initial_state: Some(&[3.0, 4.0, 1.0]) };
    let dy = rwkv4::OutputGrads { d_o: &[0.0], d_final_state: Some(&[0.0, 0.0, 1.0]) };
    let options = rwkv4::Options::new();
    for dx in [rwkv4::recurrent_bwd(&shape, &x, &dy, &options), rwkv4::chunk_bwd(&shape, &x, &dy, &options)] {
        assert_eq!(dx.dk, [1.0], "the key receives the gradient of the exponent");
        assert_eq!(dx.dw, [0.0], "the decay receives nothing");
        assert_eq!(dx.d_initial_state, [0.0, 0.0, 0.0], "nor does the state");
    }
}

fn problems() -> impl Strategy<Value = Random<Rwkv4>> {
    (support::shapes(), support::draws(), any::<u64>()).prop_map(|(shape, draw, seed)| Random {
        op: Rwkv4 { shape: rwkv4::Shape { seqs: shape.seqs, c: shape.k }, keys: 1.0 },
        draw,
        seed,
    })
}

proptest! {
    #![proptest_config(support::shapes_nobody_thought_of())]

    #[test]
    fn forms_agree_on_any_shape(random in problems(), chunk in 1usize..20) {
        report(support::forms_agree(&random.op, &random.problem(), chunk), 1);
    }

    #[test]
    fn packed_is_separate(random in problems(), chunk in 1usize..20) {
        let problem = random.problem();
        report(support::packing_changes_nothing(&random.op, Form::Recurrent, &problem), 1);
        report(support::packing_changes_nothing(&random.op, Form::Chunk(chunk), &problem), 1);
    }

    #[test]
    fn a_sequence_can_be_split(
        random in problems(),
        t in 0usize..40,
        part in 0.0..1.0,
        chunk in 1usize..20,
    ) {
        let random = Random { op: random.op.with_seqs(dense(1, t)), ..random };
        let problem = random.problem();
        let at = (part * (t + 1) as f64) as usize;
        report(support::splitting_changes_nothing(&random.op, Form::Recurrent, &problem, at), 1);
        report(support::splitting_changes_nothing(&random.op, Form::Chunk(chunk), &problem, at), 1);
    }
}
