//! The gated delta rule with every option: its two forms against each other, and its gradients against differences.

mod support;

use fla_reference::gated_delta::{self, Beta, BetaMap, Gate, QkNorm};
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::Model;
use fla_reference::{SeqLens, Shape};
use num_traits::Float;
use proptest::prelude::{Strategy, any, prop, proptest};
use support::{Axis, Draw, Form, Keys, Op, Problem, Random, Tensors, dense, packed, report, tensors};

#[derive(Clone, Debug)]
struct GatedDelta {
    shape: Shape,
    hv: usize,
    gate: GateFrom,
    channel_gates: ChannelGates,
    strength: Strength,
    norm: QkNorm,
    map: BetaMap,
}

#[derive(Clone, Copy, Debug)]
enum GateFrom {
    Nothing,
    Log,
    Logits,
    BiasedLogits,
}

#[derive(Clone, Copy, Debug)]
enum ChannelGates {
    Neither,
    Keys,
    Values,
    Both,
}

#[derive(Clone, Copy, Debug)]
enum Strength {
    One,
    PerHead,
    PerChannel,
}

impl Op for GatedDelta {
    const STATE_IN: &'static str = "initial_state";
    const STATE_OUT: &'static str = "final_state";
    const GATES: &'static [&'static str] = &["g", "a_log", "dt_bias"];
    const GATE_TERMS: &'static [&'static str] = &["q", "k"];

    fn seqs(&self) -> &SeqLens {
        &self.shape.seqs
    }

    fn with_seqs(&self, seqs: SeqLens) -> GatedDelta {
        GatedDelta { shape: Shape { seqs, ..self.shape.clone() }, ..self.clone() }
    }

    fn axis(&self, name: &str) -> Axis {
        match name {
            "a_log" | "dt_bias" => Axis::Shared,
            "initial_state" | "final_state" => Axis::Sequences,
            _ => Axis::Tokens,
        }
    }

    fn random(&self, rng: &mut Rng, draw: Draw) -> Tensors<f64> {
        let Shape { seqs, h, k, v } = &self.shape;
        let (tokens, hv) = (seqs.tokens(), self.hv);
        let strengths = match self.strength {
            Strength::One => 0,
            Strength::PerHead => tokens * hv,
            Strength::PerChannel => tokens * hv * v,
        };
        let mut x = tensors([
            ("q", rng.normal(tokens * h * k, 1.0)),
            (
                "k",
                match draw.keys {
                    Keys::Random => rng.unit_rows(tokens * h, *k),
                    Keys::Repeated => rng.repeated_unit_rows(tokens * h, *k),
                },
            ),
            ("v", rng.normal(tokens * hv * v, 1.0)),
            ("initial_state", rng.normal(seqs.n() * hv * k * v, 1.0)),
            (
                "beta",
                match (self.map, draw.keys) {
                    (BetaMap::AsGiven, Keys::Random) => rng.uniform(strengths, 0.0, 1.0),
                    (BetaMap::AsGiven, Keys::Repeated) => vec![1.0; strengths],
                    (BetaMap::Sigmoid | BetaMap::TwiceSigmoid, _) => rng.normal(strengths, 2.0),
                },
            ),
            ("gk", rng.gates(tokens * hv * k, draw.gates)),
            ("gv", rng.gates(tokens * hv * v, draw.gates)),
            (
                "g",
                match self.gate {
                    GateFrom::Nothing | GateFrom::Log => rng.gates(tokens * hv, draw.gates),
                    GateFrom::Logits | GateFrom::BiasedLogits => rng.normal(tokens * hv, 2.0),
                },
            ),
            ("a_log", rng.normal(hv, 1.0)),
            ("dt_bias", rng.normal(hv, 1.0)),
        ]);
        x.retain(|&name, _| self.reads(name));
        x
    }

    fn fwd<F: Float>(&self, form: Form, x: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, self.inputs(x));
        let y = match form {
            Form::Recurrent => gated_delta::recurrent_fwd(shape, &inputs, &self.options(1)),
            Form::Chunk(chunk) => gated_delta::chunk_fwd(shape, &inputs, &self.options(chunk)),
        };
        tensors([("o", y.o), ("final_state", y.final_state)])
    }

    fn bwd<F: Float>(&self, form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, self.inputs(x));
        let dy = gated_delta::OutputGrads {
            d_o: &dy["o"],
            d_final_state: dy.get("final_state").map(Vec::as_slice),
        };
        let dx = match form {
            Form::Recurrent => gated_delta::recurrent_bwd(shape, &inputs, &dy, &self.options(1)),
            Form::Chunk(chunk) => gated_delta::chunk_bwd(shape, &inputs, &dy, &self.options(chunk)),
        };
        let mut grads = tensors([("q", dx.dq), ("k", dx.dk), ("v", dx.dv)]);
        let optional = [
            ("g", dx.dg),
            ("a_log", dx.d_a_log),
            ("dt_bias", dx.d_dt_bias),
            ("gk", dx.dgk),
            ("gv", dx.dgv),
            ("beta", dx.dbeta),
            ("initial_state", x.contains_key("initial_state").then_some(dx.d_initial_state)),
        ];
        grads.extend(optional.into_iter().filter_map(|(name, dx)| Some((name, dx?))));
        grads
    }
}

impl GatedDelta {
    fn options<F: Float>(&self, chunk: usize) -> gated_delta::Options<F> {
        gated_delta::Options::new(self.hv, F::from(0.5).unwrap())
            .with_chunk(chunk)
            .with_qk_norm(self.norm)
            .with_beta_map(self.map)
    }

    fn reads(&self, name: &str) -> bool {
        match name {
            "g" => !matches!(self.gate, GateFrom::Nothing),
            "a_log" => matches!(self.gate, GateFrom::Logits | GateFrom::BiasedLogits),
            "dt_bias" => matches!(self.gate, GateFrom::BiasedLogits),
            "gk" => matches!(self.channel_gates, ChannelGates::Keys | ChannelGates::Both),
            "gv" => matches!(self.channel_gates, ChannelGates::Values | ChannelGates::Both),
            "beta" => !matches!(self.strength, Strength::One),
            _ => true,
        }
    }

    fn inputs<'a, F>(&self, x: &'a Tensors<F>) -> gated_delta::Inputs<'a, F> {
        let optional = |name: &str| x.get(name).map(Vec::as_slice);
        gated_delta::Inputs {
            q: &x["q"],
            k: &x["k"],
            v: &x["v"],
            g: match self.gate {
                GateFrom::Nothing => Gate::None,
                GateFrom::Log => Gate::Log(&x["g"]),
                GateFrom::Logits | GateFrom::BiasedLogits => {
                    Gate::Raw { g: &x["g"], a_log: &x["a_log"], dt_bias: optional("dt_bias") }
                }
            },
            gk: optional("gk"),
            gv: optional("gv"),
            beta: match self.strength {
                Strength::One => Beta::One,
                Strength::PerHead => Beta::PerHead(&x["beta"]),
                Strength::PerChannel => Beta::PerChannel(&x["beta"]),
            },
            initial_state: optional("initial_state"),
        }
    }
}

/// Two value heads for each of two query heads, and no option.
fn plain() -> GatedDelta {
    GatedDelta {
        shape: Shape { seqs: dense(1, 1), h: 2, k: 4, v: 3 },
        hv: 4,
        gate: GateFrom::Log,
        channel_gates: ChannelGates::Neither,
        strength: Strength::PerHead,
        norm: QkNorm::AsGiven,
        map: BetaMap::AsGiven,
    }
}

/// What both forms know.
fn chunked() -> Vec<GatedDelta> {
    let plain = plain();
    vec![
        plain.clone(),
        GatedDelta { hv: 2, ..plain.clone() },
        GatedDelta { gate: GateFrom::Nothing, ..plain.clone() },
        GatedDelta { strength: Strength::One, ..plain.clone() },
        GatedDelta { norm: QkNorm::L2, ..plain.clone() },
        GatedDelta { map: BetaMap::Sigmoid, ..plain.clone() },
        GatedDelta { norm: QkNorm::L2, map: BetaMap::TwiceSigmoid, ..plain.clone() },
        GatedDelta { gate: GateFrom::Logits, ..plain.clone() },
        GatedDelta { gate: GateFrom::BiasedLogits, norm: QkNorm::L2, map: BetaMap::Sigmoid, ..plain },
    ]
}

/// What only the recurrent form knows.
fn recurrent_only() -> Vec<GatedDelta> {
    let plain = plain();
    vec![
        GatedDelta { channel_gates: ChannelGates::Keys, ..plain.clone() },
        GatedDelta { channel_gates: ChannelGates::Values, gate: GateFrom::Nothing, ..plain.clone() },
        GatedDelta { channel_gates: ChannelGates::Both, strength: Strength::One, ..plain.clone() },
        GatedDelta { strength: Strength::PerChannel, ..plain.clone() },
        GatedDelta {
            channel_gates: ChannelGates::Both,
            strength: Strength::PerChannel,
            gate: GateFrom::BiasedLogits,
            norm: QkNorm::L2,
            map: BetaMap::TwiceSigmoid,
            ..plain
        },
    ]
}

#[test]
fn chunk_form_is_the_recurrence() {
    for op in chunked() {
        support::forms_agree_everywhere(&op, &[1, 5, 16, 64]);
    }
}

#[test]
fn gradients_are_those_of_the_loss() {
    for op in chunked() {
        support::gradients_hold_everywhere(&op, &[Form::Recurrent, Form::Chunk(1), Form::Chunk(3)]);
    }
}

#[test]
fn gradients_of_what_only_the_recurrence_knows() {
    for op in recurrent_only() {
        support::gradients_hold_everywhere(&op, &[Form::Recurrent]);
    }
}

#[test]
fn absent_states_are_zero() {
    for op in chunked() {
        support::absent_states_are_zero(
            &op.with_seqs(packed(&[3, 0, 9])),
            &[Form::Recurrent, Form::Chunk(4)],
        );
    }
}

#[test]
fn f32_stays_near_f64() {
    let limit = support::f32_limit(Model::GatedDelta);
    for op in chunked() {
        let op = op.with_seqs(dense(1, 65));
        support::f32_holds_everywhere(&op, &[Form::Recurrent, Form::Chunk(16)], limit);
    }
}

#[test]
fn grouped_heads_are_repeated_queries_and_keys() {
    let (grouped, t) = (plain().with_seqs(dense(1, 9)), 9);
    let problem = Problem::new(&grouped, Draw { gates: Gates::LogSigmoid, keys: Keys::Random }, 1);
    let all = GatedDelta { shape: Shape { h: 4, ..grouped.shape.clone() }, ..grouped.clone() };
    let repeated = |x: &[f64]| -> Vec<f64> { x.chunks(4).flat_map(|row| [row, row].concat()).collect() };
    let mut x = problem.x.clone();
    for name in ["q", "k"] {
        x.insert(name, repeated(&problem.x[name]));
    }
    let mut failures = Vec::new();
    for form in [Form::Recurrent, Form::Chunk(4)] {
        let same = |_: &str, error| (error, 1e-14);
        failures.extend(support::differences(&all.fwd(form, &x), &grouped.fwd(form, &problem.x), same));
        let mut dx = all.bwd(form, &x, &problem.dy);
        for name in ["q", "k"] {
            let rows = dx[name].chunks(8).map(|pair| (&pair[..4], &pair[4..]));
            let sums: Vec<f64> =
                rows.flat_map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>()).collect();
            assert_eq!(sums.len(), t * 2 * 4);
            dx.insert(name, sums);
        }
        let want = grouped.bwd(form, &problem.x, &problem.dy);
        failures.extend(support::differences(&dx, &want, |_, error| (error, 1e-12)));
    }
    report(failures, 2);
}

#[test]
fn equal_gates_and_strengths_per_channel_are_one_per_head() {
    let (op, t) = (plain().with_seqs(dense(1, 9)), 9);
    let x = op.random(&mut Rng::new(1), Draw { gates: Gates::LogSigmoid, keys: Keys::Random });
    let y = op.fwd(Form::Recurrent, &x);
    let spread = |name: &str, width: usize| -> Vec<f64> {
        x[name].iter().flat_map(|&x| std::iter::repeat_n(x, width)).collect()
    };
    let mut per_channel = x.clone();
    per_channel.insert("beta", spread("beta", 3));
    let strength = GatedDelta { strength: Strength::PerChannel, ..op.clone() };
    let mut per_key = x.clone();
    per_key.insert("gk", spread("g", 4));
    per_key.insert("g", vec![0.0; t * 4]);
    let keys = GatedDelta { channel_gates: ChannelGates::Keys, ..op.clone() };
    let mut per_value = x.clone();
    per_value.insert("gv", spread("g", 3));
    per_value.insert("g", vec![0.0; t * 4]);
    let values = GatedDelta { channel_gates: ChannelGates::Values, ..op };
    let mut failures = Vec::new();
    for (op, x) in [(strength, per_channel), (keys, per_key), (values, per_value)] {
        failures.extend(support::differences(&op.fwd(Form::Recurrent, &x), &y, |_, error| (error, 1e-14)));
    }
    report(failures, 3);
}

#[test]
fn options_are_maps_of_the_inputs() {
    let plain = plain().with_seqs(dense(1, 9));
    let all = GatedDelta {
        gate: GateFrom::BiasedLogits,
        norm: QkNorm::L2,
        map: BetaMap::TwiceSigmoid,
        ..plain.clone()
    };
    let mut x = all.random(&mut Rng::new(1), Draw { gates: Gates::LogSigmoid, keys: Keys::Random });
    // A key as small as the epsilon of the norm.
    for k in &mut x.get_mut("k").unwrap()[..4] {
        *k *= 1e-3;
    }
    let mut mapped = x.clone();
    for name in ["q", "k"] {
        let unit = |row: &[f64]| {
            let norm = (row.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            row.iter().map(|x| x / norm).collect::<Vec<_>>()
        };
        mapped.insert(name, x[name].chunks(4).flat_map(unit).collect());
    }
    mapped.insert("beta", x["beta"].iter().map(|x| 2.0 / (1.0 + (-x).exp())).collect());
    let log_decay = |(i, g): (usize, &f64)| {
        let rate = x["a_log"][i % 4].exp();
        -rate * (1.0 + (g + x["dt_bias"][i % 4]).exp()).ln()
    };
    mapped.insert("g", x["g"].iter().enumerate().map(log_decay).collect());
    let want = plain.fwd(Form::Recurrent, &mapped);
    for form in [Form::Recurrent, Form::Chunk(4)] {
        report(support::differences(&all.fwd(form, &x), &want, |_, error| (error, 1e-13)), 1);
    }
}

#[test]
fn extreme_logits_stay_finite() {
    let op = GatedDelta {
        gate: GateFrom::BiasedLogits,
        map: BetaMap::TwiceSigmoid,
        norm: QkNorm::L2,
        ..plain().with_seqs(dense(1, 33))
    };
    let mut problem = Problem::new(&op, Draw { gates: Gates::LogSigmoid, keys: Keys::Random }, 1);
    for name in ["g", "beta"] {
        for (i, x) in problem.x.get_mut(name).unwrap().iter_mut().enumerate() {
            *x = [-800.0, -90.0, -20.0, 0.0, 20.0, 90.0, 800.0][i % 7];
        }
    }
    problem.x.get_mut("k").unwrap()[..8].fill(0.0);
    report(support::forms_agree(&op, &problem, 16), 1);
}

fn problems() -> impl Strategy<Value = Random<GatedDelta>> {
    let ops = (prop::sample::select(chunked()), 1usize..4)
        .prop_map(|(op, groups)| GatedDelta { hv: op.shape.h * groups, ..op });
    (ops, support::shapes(), support::draws(), any::<u64>()).prop_map(|(op, shape, draw, seed)| Random {
        op: GatedDelta { hv: shape.h * op.hv / op.shape.h, shape, ..op },
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
