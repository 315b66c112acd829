//! The diagonal plus low rank operator: its two forms against each other, and its gradients against differences.

mod support;

use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::Model;
use fla_reference::{SeqLens, Shape, dplr};
use num_traits::Float;
use proptest::prelude::{Strategy, any, proptest};
use support::{Axis, Draw, Form, Keys, Op, Random, Tensors, dense, packed, report, tensors};

#[derive(Clone, Debug)]
struct Dplr {
    shape: Shape,
    scale: f64,
}

impl Op for Dplr {
    const STATE_IN: &'static str = "initial_state";
    const STATE_OUT: &'static str = "final_state";
    const GATES: &'static [&'static str] = &["g"];
    const GATE_TERMS: &'static [&'static str] = &["q", "a", "k", "b"];

    fn seqs(&self) -> &SeqLens {
        &self.shape.seqs
    }

    fn with_seqs(&self, seqs: SeqLens) -> Dplr {
        Dplr { shape: Shape { seqs, ..self.shape.clone() }, ..self.clone() }
    }

    fn axis(&self, name: &str) -> Axis {
        if name.ends_with("_state") { Axis::Sequences } else { Axis::Tokens }
    }

    /// `b = -rate a`, as RWKV-7 has it, so that no state explodes.
    fn random(&self, rng: &mut Rng, draw: Draw) -> Tensors<f64> {
        let Shape { seqs, h, k, v } = &self.shape;
        let rows = seqs.tokens() * h;
        let (a, rates): (Vec<f64>, Vec<f64>) = match draw.keys {
            Keys::Random => (rng.unit_rows(rows, *k), rng.uniform(rows * k, 0.2, 1.0)),
            Keys::Repeated => (rng.repeated_unit_rows(rows, *k), vec![1.0; rows * k]),
        };
        tensors([
            ("q", rng.normal(rows * k, 1.0)),
            ("k", rng.normal(rows * k, 1.0)),
            ("v", rng.normal(rows * v, 1.0)),
            ("b", a.iter().zip(rates).map(|(a, rate)| -a * rate).collect()),
            ("a", a),
            ("g", rng.gates(rows * k, draw.gates)),
            ("initial_state", rng.normal(seqs.n() * h * k * v, 1.0)),
        ])
    }

    fn fwd<F: Float>(&self, form: Form, x: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let y = match form {
            Form::Recurrent => dplr::recurrent_fwd(shape, &inputs, &self.options(1)),
            Form::Chunk(chunk) => dplr::chunk_fwd(shape, &inputs, &self.options(chunk)),
        };
        tensors([("o", y.o), ("final_state", y.final_state)])
    }

    fn bwd<F: Float>(&self, form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let dy = dplr::OutputGrads { d_o: &dy["o"], d_final_state: dy.get("final_state").map(Vec::as_slice) };
        let dx = match form {
            Form::Recurrent => dplr::recurrent_bwd(shape, &inputs, &dy, &self.options(1)),
            Form::Chunk(chunk) => dplr::chunk_bwd(shape, &inputs, &dy, &self.options(chunk)),
        };
        let mut grads = tensors([
            ("q", dx.dq),
            ("k", dx.dk),
            ("v", dx.dv),
            ("a", dx.da),
            ("b", dx.db),
            ("g", dx.dg),
            ("initial_state", dx.d_initial_state),
        ]);
        grads.retain(|name, _| x.contains_key(name));
        grads
    }
}

impl Dplr {
    fn options<F: Float>(&self, chunk: usize) -> dplr::Options<F> {
        dplr::Options::new(F::from(self.scale).unwrap()).with_chunk(chunk)
    }
}

fn inputs<F>(x: &Tensors<F>) -> dplr::Inputs<'_, F> {
    dplr::Inputs {
        q: &x["q"],
        k: &x["k"],
        v: &x["v"],
        a: &x["a"],
        b: &x["b"],
        g: &x["g"],
        initial_state: x.get("initial_state").map(Vec::as_slice),
    }
}

fn op(seqs: SeqLens) -> Dplr {
    Dplr { shape: Shape { seqs, h: 2, k: 4, v: 3 }, scale: 0.5 }
}

const FORMS: [Form; 4] = [Form::Recurrent, Form::Chunk(1), Form::Chunk(3), Form::Chunk(16)];

#[test]
fn chunk_form_is_the_recurrence() {
    support::forms_agree_everywhere(&op(dense(1, 1)), &[1, 5, 16, 64]);
}

#[test]
fn gradients_are_those_of_the_loss() {
    support::gradients_hold_everywhere(&op(dense(1, 1)), &FORMS);
}

#[test]
fn absent_states_are_zero() {
    support::absent_states_are_zero(&op(packed(&[3, 0, 9])), &FORMS);
}

#[test]
fn f32_stays_near_f64() {
    let limit = support::f32_limit(Model::Dplr);
    support::f32_holds_everywhere(&op(dense(1, 65)), &[Form::Recurrent, Form::Chunk(16)], limit);
}

#[test]
fn wrong_lengths_are_named() {
    let op = op(dense(1, 3));
    let mut x = op.random(&mut Rng::new(1), Draw { gates: Gates::LogSigmoid, keys: Keys::Random });
    x.get_mut("a").unwrap().pop();
    let panic = std::panic::catch_unwind(|| op.fwd(Form::Recurrent, &x)).unwrap_err();
    let message = panic.downcast_ref::<String>().unwrap();
    assert!(message.contains("`a` is [3, 2, 4], which is 24 elements, but holds 23"), "{message}");
}

fn problems() -> impl Strategy<Value = Random<Dplr>> {
    (support::shapes(), support::draws(), any::<u64>()).prop_map(|(shape, draw, seed)| Random {
        op: Dplr { shape, scale: 0.7 },
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
