//! RWKV-6: its two forms against each other in both directions, and its gradients against differences.

mod support;

use fla_reference::inputs::{Gates, Rng};
use fla_reference::rwkv6::Direction;
use fla_reference::tolerance::Model;
use fla_reference::{SeqLens, Shape, rwkv6};
use num_traits::Float;
use proptest::prelude::{Strategy, any, proptest};
use support::{Axis, Draw, Form, Keys, Op, Problem, Random, Tensors, dense, packed, report, tensors};

#[derive(Clone, Debug)]
struct Rwkv6 {
    shape: Shape,
    scale: f64,
    direction: Direction,
}

impl Op for Rwkv6 {
    const STATE_IN: &'static str = "initial_state";
    const STATE_OUT: &'static str = "final_state";
    const GATES: &'static [&'static str] = &["w"];
    const GATE_TERMS: &'static [&'static str] = &["r", "k"];

    fn seqs(&self) -> &SeqLens {
        &self.shape.seqs
    }

    fn with_seqs(&self, seqs: SeqLens) -> Rwkv6 {
        Rwkv6 { shape: Shape { seqs, ..self.shape.clone() }, ..self.clone() }
    }

    fn axis(&self, name: &str) -> Axis {
        match name {
            "u" => Axis::Shared,
            "initial_state" | "final_state" => Axis::Sequences,
            _ => Axis::Tokens,
        }
    }

    fn random(&self, rng: &mut Rng, draw: Draw) -> Tensors<f64> {
        let Shape { seqs, h, k, v } = &self.shape;
        let rows = seqs.tokens() * h;
        tensors([
            ("r", rng.normal(rows * k, 1.0)),
            (
                "k",
                match draw.keys {
                    Keys::Random => rng.normal(rows * k, 1.0),
                    Keys::Repeated => rng.repeated_unit_rows(rows, *k),
                },
            ),
            ("v", rng.normal(rows * v, 1.0)),
            ("w", rng.gates(rows * k, draw.gates)),
            ("u", rng.normal(h * k, 1.0)),
            ("initial_state", rng.normal(seqs.n() * h * k * v, 1.0)),
        ])
    }

    fn fwd<F: Float>(&self, form: Form, x: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let y = match form {
            Form::Recurrent => rwkv6::recurrent_fwd(shape, &inputs, &self.options(1)),
            Form::Chunk(chunk) => rwkv6::chunk_fwd(shape, &inputs, &self.options(chunk)),
        };
        tensors([("o", y.o), ("final_state", y.final_state)])
    }

    fn bwd<F: Float>(&self, form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let dy =
            rwkv6::OutputGrads { d_o: &dy["o"], d_final_state: dy.get("final_state").map(Vec::as_slice) };
        let dx = match form {
            Form::Recurrent => rwkv6::recurrent_bwd(shape, &inputs, &dy, &self.options(1)),
            Form::Chunk(chunk) => rwkv6::chunk_bwd(shape, &inputs, &dy, &self.options(chunk)),
        };
        let mut grads = tensors([
            ("r", dx.dr),
            ("k", dx.dk),
            ("v", dx.dv),
            ("w", dx.dw),
            ("u", dx.du),
            ("initial_state", dx.d_initial_state),
        ]);
        grads.retain(|name, _| x.contains_key(name));
        grads
    }
}

impl Rwkv6 {
    fn options<F: Float>(&self, chunk: usize) -> rwkv6::Options<F> {
        rwkv6::Options::new(F::from(self.scale).unwrap()).with_chunk(chunk).with_direction(self.direction)
    }
}

fn inputs<F>(x: &Tensors<F>) -> rwkv6::Inputs<'_, F> {
    rwkv6::Inputs {
        r: &x["r"],
        k: &x["k"],
        v: &x["v"],
        w: &x["w"],
        u: &x["u"],
        initial_state: x.get("initial_state").map(Vec::as_slice),
    }
}

fn op(seqs: SeqLens) -> Rwkv6 {
    Rwkv6 { shape: Shape { seqs, h: 2, k: 4, v: 3 }, scale: 0.5, direction: Direction::Forward }
}

fn reverse(seqs: SeqLens) -> Rwkv6 {
    Rwkv6 { direction: Direction::Reverse, ..op(seqs) }
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
    let limit = support::f32_limit(Model::Rwkv6);
    support::f32_holds_everywhere(&op(dense(1, 65)), &[Form::Recurrent, Form::Chunk(16)], limit);
}

#[test]
fn reversed_chunk_form_is_the_reversed_recurrence() {
    support::forms_agree_everywhere(&reverse(dense(1, 1)), &[1, 5, 16, 64]);
}

#[test]
fn reversed_gradients_are_those_of_the_loss() {
    support::gradients_hold_everywhere(&reverse(dense(1, 1)), &FORMS);
}

#[test]
fn reverse_is_forward_on_reversed_tokens() {
    let (forward, reverse) = (op(dense(1, 21)), reverse(dense(1, 21)));
    let problem = Problem::new(&forward, Draw { gates: Gates::LogSigmoid, keys: Keys::Random }, 1);
    let turned = |x: &Tensors<f64>| -> Tensors<f64> {
        let turn = |name: &str, x: &Vec<f64>| match forward.axis(name) {
            Axis::Tokens => x.chunks(x.len() / 21).rev().flatten().copied().collect(),
            Axis::Sequences | Axis::Shared => x.clone(),
        };
        x.iter().map(|(&name, x)| (name, turn(name, x))).collect()
    };
    let (x, dy) = (turned(&problem.x), turned(&problem.dy));
    let mut failures = Vec::new();
    for form in FORMS {
        let same = |_: &str, error| (error, 1e-14);
        let (y, dx) = (forward.fwd(form, &problem.x), forward.bwd(form, &problem.x, &problem.dy));
        failures.extend(support::differences(&reverse.fwd(form, &x), &turned(&y), same));
        failures.extend(support::differences(&reverse.bwd(form, &x, &dy), &turned(&dx), same));
    }
    report(failures, FORMS.len());
}

fn problems() -> impl Strategy<Value = Random<Rwkv6>> {
    (support::shapes(), support::draws(), any::<u64>()).prop_map(|(shape, draw, seed)| Random {
        op: Rwkv6 {
            shape,
            scale: 0.7,
            direction: if seed % 2 == 0 { Direction::Forward } else { Direction::Reverse },
        },
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
        let random = Random { op: Rwkv6 { direction: Direction::Forward, ..random.op.with_seqs(dense(1, t)) }, ..random };
        let problem = random.problem();
        let at = (part * (t + 1) as f64) as usize;
        report(support::splitting_changes_nothing(&random.op, Form::Recurrent, &problem, at), 1);
        report(support::splitting_changes_nothing(&random.op, Form::Chunk(chunk), &problem, at), 1);
    }
}
