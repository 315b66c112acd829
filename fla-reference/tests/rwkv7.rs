//! RWKV-7: both forms of the fused operator, what it has in common with the diagonal plus low rank one, and gradients.

mod support;

use fla_reference::inputs::Rng;
use fla_reference::rwkv7::{
    AddcmulInputs, AddcmulOutputGrads, AddcmulShape, ChannelMixingInputs, ChannelMixingOutputGrads,
    ChannelMixingShape, FusedMulInputs, GateOutputCorrectionInputs, GateOutputCorrectionShape, KUpdateInputs,
    KUpdateShape, KkNormInputs, KkNormKUpdateInputs, KkNormKUpdateOutputGrads, KkNormShape,
    TokenShiftAddcmulInputs,
};
use fla_reference::tolerance::Model;
use fla_reference::{SeqLens, Shape, dplr, rwkv7, token_shift};
use num_traits::Float;
use proptest::prelude::{Strategy, any, proptest};
use support::{Axis, Draw, Form, Keys, Op, Problem, Random, Tensors, dense, packed, report, tensors};

#[derive(Clone, Debug)]
struct FusedMul {
    shape: Shape,
}

impl Op for FusedMul {
    const STATE_IN: &'static str = "initial_state";
    const STATE_OUT: &'static str = "final_state";
    const GATES: &'static [&'static str] = &["w"];
    const GATE_TERMS: &'static [&'static str] = &["r", "k", "kk", "a"];

    fn seqs(&self) -> &SeqLens {
        &self.shape.seqs
    }

    fn with_seqs(&self, seqs: SeqLens) -> FusedMul {
        FusedMul { shape: Shape { seqs, ..self.shape.clone() } }
    }

    fn axis(&self, name: &str) -> Axis {
        if name.ends_with("_state") { Axis::Sequences } else { Axis::Tokens }
    }

    fn random(&self, rng: &mut Rng, draw: Draw) -> Tensors<f64> {
        let Shape { seqs, h, k, v } = &self.shape;
        let rows = seqs.tokens() * h;
        let (kk, rates): (Vec<f64>, Vec<f64>) = match draw.keys {
            Keys::Random => (rng.unit_rows(rows, *k), rng.uniform(rows * k, 0.2, 1.0)),
            Keys::Repeated => (rng.repeated_unit_rows(rows, *k), vec![1.0; rows * k]),
        };
        tensors([
            ("r", rng.normal(rows * k, 1.0)),
            ("w", rng.gates(rows * k, draw.gates)),
            ("k", rng.normal(rows * k, 1.0)),
            ("v", rng.normal(rows * v, 1.0)),
            ("kk", kk),
            ("a", rates),
            ("initial_state", rng.normal(seqs.n() * h * k * v, 1.0)),
        ])
    }

    fn fwd<F: Float>(&self, form: Form, x: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let y = match form {
            Form::Recurrent => rwkv7::fused_mul_recurrent_fwd(shape, &inputs, &options(1)),
            Form::Chunk(chunk) => rwkv7::fused_mul_chunk_fwd(shape, &inputs, &options(chunk)),
        };
        tensors([("o", y.o), ("final_state", y.final_state)])
    }

    fn bwd<F: Float>(&self, form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F> {
        let (shape, inputs) = (&self.shape, inputs(x));
        let dy =
            rwkv7::OutputGrads { d_o: &dy["o"], d_final_state: dy.get("final_state").map(Vec::as_slice) };
        let dx = match form {
            Form::Recurrent => rwkv7::fused_mul_recurrent_bwd(shape, &inputs, &dy, &options(1)),
            Form::Chunk(chunk) => rwkv7::fused_mul_chunk_bwd(shape, &inputs, &dy, &options(chunk)),
        };
        let mut grads = tensors([
            ("r", dx.dr),
            ("w", dx.dw),
            ("k", dx.dk),
            ("v", dx.dv),
            ("kk", dx.dkk),
            ("a", dx.da),
            ("initial_state", dx.d_initial_state),
        ]);
        grads.retain(|name, _| x.contains_key(name));
        grads
    }
}

fn options<F: Float>(chunk: usize) -> rwkv7::Options<F> {
    rwkv7::Options::new(F::one()).with_chunk(chunk)
}

fn inputs<F>(x: &Tensors<F>) -> FusedMulInputs<'_, F> {
    FusedMulInputs {
        r: &x["r"],
        w: &x["w"],
        k: &x["k"],
        v: &x["v"],
        kk: &x["kk"],
        a: &x["a"],
        initial_state: x.get("initial_state").map(Vec::as_slice),
    }
}

fn op(seqs: SeqLens) -> FusedMul {
    FusedMul { shape: Shape { seqs, h: 2, k: 4, v: 3 } }
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
    let limit = support::f32_limit(Model::Rwkv7);
    support::f32_holds_everywhere(&op(dense(1, 65)), &[Form::Recurrent, Form::Chunk(16)], limit);
}

#[test]
fn rwkv7_is_dplr_under_other_names() {
    let (op, mut rng) = (op(packed(&[5, 0, 12])), Rng::new(1));
    let Shape { seqs, h, k, v } = &op.shape;
    let (keys, values) = (seqs.tokens() * h * k, seqs.tokens() * h * v);
    let [r, log_decay, key, a, b] = std::array::from_fn(|_| rng.uniform::<f64>(keys, -0.6, 0.0));
    let (value, d_o): (Vec<f64>, Vec<f64>) = (rng.normal(values, 1.0), rng.normal(values, 1.0));
    let x = rwkv7::Inputs { r: &r, w: &log_decay, k: &key, v: &value, a: &a, b: &b, initial_state: None };
    let same = dplr::Inputs { q: &r, k: &key, v: &value, a: &a, b: &b, g: &log_decay, initial_state: None };
    let dy = rwkv7::OutputGrads { d_o: &d_o, d_final_state: None };
    let options = options(4);
    assert_eq!(
        rwkv7::recurrent_fwd(&op.shape, &x, &options),
        dplr::recurrent_fwd(&op.shape, &same, &options)
    );
    assert_eq!(rwkv7::chunk_fwd(&op.shape, &x, &options), dplr::chunk_fwd(&op.shape, &same, &options));
    for (got, want) in [
        (
            rwkv7::recurrent_bwd(&op.shape, &x, &dy, &options),
            dplr::recurrent_bwd(&op.shape, &same, &dy, &options),
        ),
        (rwkv7::chunk_bwd(&op.shape, &x, &dy, &options), dplr::chunk_bwd(&op.shape, &same, &dy, &options)),
    ] {
        assert_eq!((got.dr, got.dw, got.dk), (want.dq, want.dg, want.dk));
        assert_eq!((got.dv, got.da, got.db), (want.dv, want.da, want.db));
        assert_eq!(got.d_initial_state, want.d_initial_state);
    }
}

/// Checks gradients of a function without state.
#[track_caller]
fn gradients_hold(
    x: Tensors<f64>,
    fwd: impl Fn(&Tensors<f64>) -> Tensors<f64>,
    bwd: impl Fn(&Tensors<f64>, &Tensors<f64>) -> Tensors<f64>,
) {
    let dy = support::normal_like(&mut Rng::new(2), &fwd(&x));
    let problem = Problem { x, dy };
    let want = support::central_differences(&problem, fwd);
    let got = bwd(&problem.x, &problem.dy);
    report(support::differences(&got, &want, |_, error| (error, support::DIFFERENCES)), 1);
}

#[test]
fn gradients_of_addcmul() {
    let shape = AddcmulShape { tokens: 6, d: 5 };
    for mixes in [&["xr", "xw", "xk", "xv", "xa"][..], &["xr", "xw", "xk", "xv", "xa", "xg"]] {
        let mut rng = Rng::new(1);
        let mut x = tensors([("hidden", rng.normal(30, 1.0)), ("delta", rng.normal(30, 1.0))]);
        x.extend(mixes.iter().map(|&name| (name, rng.normal(5, 1.0))));
        fn inputs(x: &Tensors<f64>) -> AddcmulInputs<'_, f64> {
            AddcmulInputs {
                hidden: &x["hidden"],
                delta: &x["delta"],
                xr: &x["xr"],
                xw: &x["xw"],
                xk: &x["xk"],
                xv: &x["xv"],
                xa: &x["xa"],
                xg: x.get("xg").map(Vec::as_slice),
            }
        }
        gradients_hold(
            x,
            |x| {
                let y = rwkv7::addcmul_fwd(&shape, &inputs(x));
                let mut out =
                    tensors([("r", y.out_r), ("w", y.out_w), ("k", y.out_k), ("v", y.out_v), ("a", y.out_a)]);
                out.extend(y.out_g.map(|g| ("g", g)));
                out
            },
            |x, dy| {
                let dy = AddcmulOutputGrads {
                    d_out_r: &dy["r"],
                    d_out_w: &dy["w"],
                    d_out_k: &dy["k"],
                    d_out_v: &dy["v"],
                    d_out_a: &dy["a"],
                    d_out_g: dy.get("g").map(Vec::as_slice),
                };
                let dx = rwkv7::addcmul_bwd(&shape, &inputs(x), &dy);
                let mut grads = tensors([
                    ("hidden", dx.d_hidden),
                    ("delta", dx.d_delta),
                    ("xr", dx.dxr),
                    ("xw", dx.dxw),
                    ("xk", dx.dxk),
                    ("xv", dx.dxv),
                    ("xa", dx.dxa),
                ]);
                grads.extend(dx.dxg.map(|dxg| ("xg", dxg)));
                grads
            },
        );
    }
}

#[test]
fn gradients_of_k_update() {
    let (shape, mut rng) = (KUpdateShape { tokens: 6, d: 5 }, Rng::new(1));
    fn inputs(x: &Tensors<f64>) -> KUpdateInputs<'_, f64> {
        KUpdateInputs { k: &x["k"], a: &x["a"], ka: &x["ka"] }
    }
    gradients_hold(
        tensors([("k", rng.normal(30, 1.0)), ("a", rng.normal(30, 1.0)), ("ka", rng.normal(5, 1.0))]),
        |x| tensors([("out", rwkv7::k_update_fwd(&shape, &inputs(x)))]),
        |x, dy| {
            let dx = rwkv7::k_update_bwd(&shape, &inputs(x), &dy["out"]);
            tensors([("k", dx.dk), ("a", dx.da), ("ka", dx.dka)])
        },
    );
}

#[test]
fn gradients_of_kk_norm() {
    let (shape, mut rng) = (KkNormShape { tokens: 6, h: 2, k: 5 }, Rng::new(1));
    fn inputs(x: &Tensors<f64>) -> KkNormInputs<'_, f64> {
        KkNormInputs { k: &x["k"], k_k: &x["k_k"] }
    }
    gradients_hold(
        tensors([("k", rng.normal(60, 1.0)), ("k_k", rng.normal(10, 1.0))]),
        |x| tensors([("kk", rwkv7::kk_norm_fwd(&shape, &inputs(x)))]),
        |x, dy| {
            let dx = rwkv7::kk_norm_bwd(&shape, &inputs(x), &dy["kk"]);
            tensors([("k", dx.dk), ("k_k", dx.dk_k)])
        },
    );
}

#[test]
fn unit_keys_have_unit_length() {
    let (shape, mut rng) = (KkNormShape { tokens: 3, h: 2, k: 8 }, Rng::new(1));
    let (k, k_k): (Vec<f64>, Vec<f64>) = (rng.normal(48, 10.0), rng.uniform(16, 0.5, 2.0));
    for row in rwkv7::kk_norm_fwd(&shape, &KkNormInputs { k: &k, k_k: &k_k }).chunks(8) {
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!((length - 1.0).abs() < 1e-8, "length {length}");
    }
    let zeros = rwkv7::kk_norm_fwd(&shape, &KkNormInputs { k: &[0.0; 48], k_k: &k_k });
    assert_eq!(zeros, [0.0; 48], "a zero key stays zero");
    let one = KkNormShape { tokens: 1, h: 1, k: 1 };
    let small = rwkv7::kk_norm_fwd(&one, &KkNormInputs { k: &[1e-3], k_k: &[1.0] })[0];
    assert!((small - 0.5f64.sqrt()).abs() < 1e-15, "sqrt(1e-6 + 1e-6) divides 1e-3: {small}");
}

#[test]
fn gradients_of_kk_norm_k_update() {
    let (shape, mut rng) = (KkNormShape { tokens: 6, h: 2, k: 5 }, Rng::new(1));
    fn inputs(x: &Tensors<f64>) -> KkNormKUpdateInputs<'_, f64> {
        KkNormKUpdateInputs { k: &x["k"], a: &x["a"], k_k: &x["k_k"], ka: &x["ka"] }
    }
    let (k, a) = (rng.normal(60, 1.0), rng.normal(60, 1.0));
    gradients_hold(
        tensors([("k", k), ("a", a), ("k_k", rng.normal(10, 1.0)), ("ka", rng.normal(10, 1.0))]),
        |x| {
            let y = rwkv7::kk_norm_k_update_fwd(&shape, &inputs(x));
            tensors([("k_updated", y.k_updated), ("kk", y.kk), ("b", y.b)])
        },
        |x, dy| {
            let (d_k_updated, d_kk, d_b) = (&dy["k_updated"], &dy["kk"], &dy["b"]);
            let dy = KkNormKUpdateOutputGrads { d_k_updated, d_kk, d_b };
            let dx = rwkv7::kk_norm_k_update_bwd(&shape, &inputs(x), &dy);
            tensors([("k", dx.dk), ("a", dx.da), ("k_k", dx.dk_k), ("ka", dx.dka)])
        },
    );
}

#[test]
fn gradients_of_token_shift_addcmul() {
    let seqs = SeqLens::Packed { cu_seqlens: vec![0, 3, 3, 4, 6] };
    let (shape, mut rng) = (token_shift::Shape { seqs, d: 5 }, Rng::new(1));
    fn inputs(x: &Tensors<f64>) -> TokenShiftAddcmulInputs<'_, f64> {
        TokenShiftAddcmulInputs {
            x: &x["x"],
            cache: Some(&x["cache"]),
            xr: &x["xr"],
            xw: &x["xw"],
            xk: &x["xk"],
            xv: &x["xv"],
            xa: &x["xa"],
            xg: Some(&x["xg"]),
        }
    }
    let (x, cache) = (rng.normal(30, 1.0), rng.normal(20, 1.0));
    let mut all = tensors([("x", x), ("cache", cache)]);
    for name in ["xr", "xw", "xk", "xv", "xa", "xg"] {
        all.insert(name, rng.normal(5, 1.0));
    }
    gradients_hold(
        all,
        |x| {
            let y = rwkv7::token_shift_addcmul_fwd(&shape, &inputs(x));
            let m = y.mixes;
            tensors([
                ("r", m.out_r),
                ("w", m.out_w),
                ("k", m.out_k),
                ("v", m.out_v),
                ("a", m.out_a),
                ("g", m.out_g.expect("xg is given")),
                ("cache_out", y.cache_out),
            ])
        },
        |x, dy| {
            let d_mixes = AddcmulOutputGrads {
                d_out_r: &dy["r"],
                d_out_w: &dy["w"],
                d_out_k: &dy["k"],
                d_out_v: &dy["v"],
                d_out_a: &dy["a"],
                d_out_g: Some(&dy["g"]),
            };
            let dx = rwkv7::token_shift_addcmul_bwd(&shape, &inputs(x), &d_mixes, Some(&dy["cache_out"]));
            let m = dx.mixes;
            tensors([
                ("x", dx.dx),
                ("cache", dx.d_cache),
                ("xr", m.dxr),
                ("xw", m.dxw),
                ("xk", m.dxk),
                ("xv", m.dxv),
                ("xa", m.dxa),
                ("xg", m.dxg.expect("xg is given")),
            ])
        },
    );
}

#[test]
fn gradients_of_gate_output_correction() {
    let (shape, mut rng) = (GateOutputCorrectionShape { tokens: 6, h: 2, k: 5 }, Rng::new(1));
    fn inputs(x: &Tensors<f64>) -> GateOutputCorrectionInputs<'_, f64> {
        let [o, r, k, r_k, v, g] = ["o", "r", "k", "r_k", "v", "g"].map(|name| x[name].as_slice());
        GateOutputCorrectionInputs { o, r, k, r_k, v, g }
    }
    let mut x = tensors(["o", "r", "k", "v", "g"].map(|name| (name, rng.normal(60, 1.0))));
    x.insert("r_k", rng.normal(10, 1.0));
    gradients_hold(
        x,
        |x| tensors([("out", rwkv7::gate_output_correction_fwd(&shape, &inputs(x)))]),
        |x, dy| {
            let dx = rwkv7::gate_output_correction_bwd(&shape, &inputs(x), &dy["out"]);
            tensors([("o", dx.d_o), ("r", dx.dr), ("k", dx.dk), ("r_k", dx.dr_k), ("v", dx.dv), ("g", dx.dg)])
        },
    );
}

#[test]
fn gradients_of_channel_mixing() {
    fn inputs(x: &Tensors<f64>) -> ChannelMixingInputs<'_, f64> {
        ChannelMixingInputs {
            x: &x["x"],
            x_prev: x.get("x_prev").map(Vec::as_slice),
            x_k: &x["x_k"],
            key_weight: &x["key_weight"],
            value_weight: &x["value_weight"],
        }
    }
    for seqs in [dense(2, 3), packed(&[2, 0, 1, 3])] {
        let (shape, mut rng) = (ChannelMixingShape { seqs, c: 4, f: 7 }, Rng::new(1));
        let x = tensors([
            ("x", rng.normal(shape.seqs.tokens() * 4, 1.0)),
            ("x_prev", rng.normal(shape.seqs.n() * 4, 1.0)),
            ("x_k", rng.normal(4, 1.0)),
            ("key_weight", rng.normal(28, 1.0)),
            ("value_weight", rng.normal(28, 1.0)),
        ]);
        gradients_hold(
            x,
            |x| {
                let y = rwkv7::channel_mixing_fwd(&shape, &inputs(x));
                tensors([("out", y.out), ("x_last", y.x_last)])
            },
            |x, dy| {
                let dy = ChannelMixingOutputGrads { d_out: &dy["out"], d_x_last: Some(&dy["x_last"]) };
                let dx = rwkv7::channel_mixing_bwd(&shape, &inputs(x), &dy);
                tensors([
                    ("x", dx.dx),
                    ("x_prev", dx.dx_prev),
                    ("x_k", dx.dx_k),
                    ("key_weight", dx.d_key_weight),
                    ("value_weight", dx.d_value_weight),
                ])
            },
        );
    }
}

#[test]
fn gradients_of_log_decay() {
    // Far on both sides of 0 too, where the sigmoid is flat.
    let logits = [-40.0, -8.0, -1.0, -0.1, 0.0, 0.3, 2.0, 9.0, 40.0];
    let want = |x: f64| -(-0.5f64).exp() / (1.0 + (-x).exp());
    for (x, w) in logits.iter().zip(rwkv7::log_decay_fwd(&logits)) {
        assert!((w - want(*x)).abs() <= 1e-15, "{x}: {w}");
        assert!((-0.6066..0.0).contains(&w), "{x}: {w}");
    }
    let step = 1e-5;
    for (x, dx) in logits.iter().zip(rwkv7::log_decay_bwd(&logits, &[2.0; 9])) {
        let difference = (want(x + step) - want(x - step)) / step;
        assert!((dx - difference).abs() <= 1e-9, "{x}: {dx}, {difference}");
    }
}

fn problems() -> impl Strategy<Value = Random<FusedMul>> {
    (support::shapes(), support::draws(), any::<u64>()).prop_map(|(shape, draw, seed)| Random {
        op: FusedMul { shape },
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
