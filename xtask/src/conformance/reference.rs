//! Runs a case on `fla_reference`: one function per operator.

use fla_reference::{Shape, dplr, gated_delta, rwkv4, rwkv6, rwkv7, token_shift};
use num_traits::Float;

use super::case::Case;
use super::schema::{Form, Op};

/// Chunk lengths that a chunk pass is run with: one that cuts the cases into many chunks, and the ordinary one.
pub(super) const CHUNKS: &[usize] = &[16, 64];

/// One computed tensor, under the name that it has in the file.
pub(super) struct Computed {
    /// The name.
    pub(super) name: &'static str,
    /// The values, widened.
    pub(super) values: Vec<f64>,
}

/// What a case is to be run with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// The form.
    pub(super) form: Form,
    /// Rows of a chunk; read by the chunk form only.
    pub(super) chunk: usize,
}

/// Every output and gradient of the case, computed in `F`.
pub(super) fn compute<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    match case.operator.op {
        Op::GatedDelta => gated_delta::<F>(case, run),
        Op::Dplr => dplr::<F>(case, run),
        Op::Rwkv7 => rwkv7::<F>(case, run),
        Op::FusedMul => fused_mul::<F>(case, run),
        Op::Rwkv6 => rwkv6::<F>(case, run),
        Op::Rwkv4 => rwkv4::<F>(case, run),
        Op::Addcmul => addcmul::<F>(case),
        Op::KUpdate => k_update::<F>(case),
        Op::GateOutputCorrection => gate_output_correction::<F>(case),
        Op::ChannelMixing => channel_mixing::<F>(case),
        Op::TokenShift => token_shift::<F>(case),
    }
}

fn computed<F: Float>(name: &'static str, values: Vec<F>) -> Computed {
    let wide = |x: F| x.to_f64().unwrap_or(f64::NAN);
    Computed { name, values: values.into_iter().map(wide).collect() }
}

fn computed_if<F: Float>(name: &'static str, values: Option<Vec<F>>) -> Option<Computed> {
    values.map(|values| computed(name, values))
}

/// The scale in the format of the computation.
fn scale<F: Float>(case: &Case) -> F {
    F::from(case.scale()).unwrap_or_else(F::nan)
}

fn shape(case: &Case) -> Shape {
    Shape { seqs: case.seqs.clone(), h: case.dim("H"), k: case.dim("K"), v: case.dim("V") }
}

fn gated_delta<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (q, k, v, g, beta) = (values("q"), values("k"), values("v"), values("g"), values("beta"));
    let (a_log, dt_bias) = (case.optional("A_log"), case.optional("dt_bias"));
    let (initial_state, d_final_state) = (case.optional("initial_state"), case.optional("d_final_state"));
    let d_o = values("do");
    let gate = match &a_log {
        Some(a_log) => gated_delta::Gate::Raw { g: &g, a_log, dt_bias: dt_bias.as_deref() },
        None => gated_delta::Gate::Log(&g),
    };
    let x = gated_delta::Inputs {
        q: &q,
        k: &k,
        v: &v,
        g: gate,
        gk: None,
        gv: None,
        beta: gated_delta::Beta::PerHead(&beta),
        initial_state: initial_state.as_deref(),
    };
    let qk_norm = if case.flag("qk_l2norm") { gated_delta::QkNorm::L2 } else { gated_delta::QkNorm::AsGiven };
    let beta_map = match (case.flag("beta_sigmoid"), case.flag("allow_neg_eigval")) {
        (false, _) => gated_delta::BetaMap::AsGiven,
        (true, false) => gated_delta::BetaMap::Sigmoid,
        (true, true) => gated_delta::BetaMap::TwiceSigmoid,
    };
    let options = gated_delta::Options::new(case.dim("HV"), scale(case))
        .with_chunk(run.chunk)
        .with_qk_norm(qk_norm)
        .with_beta_map(beta_map);
    let dy = gated_delta::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
    let shape = shape(case);
    let (y, dx) = match run.form {
        Form::Chunk => {
            (gated_delta::chunk_fwd(&shape, &x, &options), gated_delta::chunk_bwd(&shape, &x, &dy, &options))
        }
        Form::Recurrent | Form::Single => (
            gated_delta::recurrent_fwd(&shape, &x, &options),
            gated_delta::recurrent_bwd(&shape, &x, &dy, &options),
        ),
    };
    let always = [
        computed("o", y.o),
        computed("final_state", y.final_state),
        computed("dq", dx.dq),
        computed("dk", dx.dk),
        computed("dv", dx.dv),
        computed("d_initial_state", dx.d_initial_state),
    ];
    let sometimes = [
        computed_if("dg", dx.dg),
        computed_if("dbeta", dx.dbeta),
        computed_if("dA_log", dx.d_a_log),
        computed_if("ddt_bias", dx.d_dt_bias),
    ];
    always.into_iter().chain(sometimes.into_iter().flatten()).collect()
}

fn dplr<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (q, k, v, a, b, g) = (values("q"), values("k"), values("v"), values("a"), values("b"), values("gk"));
    let (initial_state, d_final_state) = (case.optional("initial_state"), case.optional("d_final_state"));
    let d_o = values("do");
    let x =
        dplr::Inputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: initial_state.as_deref() };
    let options = dplr::Options::new(scale(case)).with_chunk(run.chunk);
    let dy = dplr::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
    let shape = shape(case);
    let (y, dx) = match run.form {
        Form::Chunk => (dplr::chunk_fwd(&shape, &x, &options), dplr::chunk_bwd(&shape, &x, &dy, &options)),
        Form::Recurrent | Form::Single => {
            (dplr::recurrent_fwd(&shape, &x, &options), dplr::recurrent_bwd(&shape, &x, &dy, &options))
        }
    };
    vec![
        computed("o", y.o),
        computed("final_state", y.final_state),
        computed("dq", dx.dq),
        computed("dk", dx.dk),
        computed("dv", dx.dv),
        computed("da", dx.da),
        computed("db", dx.db),
        computed("dgk", dx.dg),
        computed("d_initial_state", dx.d_initial_state),
    ]
}

fn rwkv7<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (r, w, k, v, a, b) = (values("r"), values("w"), values("k"), values("v"), values("a"), values("b"));
    let (initial_state, d_final_state) = (case.optional("initial_state"), case.optional("d_final_state"));
    let d_o = values("do");
    let x =
        rwkv7::Inputs { r: &r, w: &w, k: &k, v: &v, a: &a, b: &b, initial_state: initial_state.as_deref() };
    let options = rwkv7::Options::new(scale(case)).with_chunk(run.chunk);
    let dy = rwkv7::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
    let shape = shape(case);
    let (y, dx) = match run.form {
        Form::Chunk => (rwkv7::chunk_fwd(&shape, &x, &options), rwkv7::chunk_bwd(&shape, &x, &dy, &options)),
        Form::Recurrent | Form::Single => {
            (rwkv7::recurrent_fwd(&shape, &x, &options), rwkv7::recurrent_bwd(&shape, &x, &dy, &options))
        }
    };
    vec![
        computed("o", y.o),
        computed("final_state", y.final_state),
        computed("dr", dx.dr),
        computed("dw", dx.dw),
        computed("dk", dx.dk),
        computed("dv", dx.dv),
        computed("da", dx.da),
        computed("db", dx.db),
        computed("d_initial_state", dx.d_initial_state),
    ]
}

fn fused_mul<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (r, w, k, v, kk, a) = (values("r"), values("w"), values("k"), values("v"), values("kk"), values("a"));
    let (initial_state, d_final_state) = (case.optional("initial_state"), case.optional("d_final_state"));
    let d_o = values("do");
    let x = rwkv7::FusedMulInputs {
        r: &r,
        w: &w,
        k: &k,
        v: &v,
        kk: &kk,
        a: &a,
        initial_state: initial_state.as_deref(),
    };
    let options = rwkv7::Options::new(scale(case)).with_chunk(run.chunk);
    let dy = rwkv7::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
    let shape = shape(case);
    let (y, dx) = match run.form {
        Form::Chunk => (
            rwkv7::fused_mul_chunk_fwd(&shape, &x, &options),
            rwkv7::fused_mul_chunk_bwd(&shape, &x, &dy, &options),
        ),
        Form::Recurrent | Form::Single => (
            rwkv7::fused_mul_recurrent_fwd(&shape, &x, &options),
            rwkv7::fused_mul_recurrent_bwd(&shape, &x, &dy, &options),
        ),
    };
    vec![
        computed("o", y.o),
        computed("final_state", y.final_state),
        computed("dr", dx.dr),
        computed("dw", dx.dw),
        computed("dk", dx.dk),
        computed("dv", dx.dv),
        computed("dkk", dx.dkk),
        computed("da", dx.da),
        computed("d_initial_state", dx.d_initial_state),
    ]
}

fn rwkv6<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (r, k, v, w, u) = (values("r"), values("k"), values("v"), values("w"), values("u"));
    let (initial_state, d_final_state) = (case.optional("initial_state"), case.optional("d_final_state"));
    let d_o = values("do");
    let x = rwkv6::Inputs { r: &r, k: &k, v: &v, w: &w, u: &u, initial_state: initial_state.as_deref() };
    let options = rwkv6::Options::new(scale(case)).with_chunk(run.chunk);
    let dy = rwkv6::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
    let shape = shape(case);
    let (y, dx) = match run.form {
        Form::Chunk => (rwkv6::chunk_fwd(&shape, &x, &options), rwkv6::chunk_bwd(&shape, &x, &dy, &options)),
        Form::Recurrent | Form::Single => {
            (rwkv6::recurrent_fwd(&shape, &x, &options), rwkv6::recurrent_bwd(&shape, &x, &dy, &options))
        }
    };
    vec![
        computed("o", y.o),
        computed("final_state", y.final_state),
        computed("dr", dx.dr),
        computed("dk", dx.dk),
        computed("dv", dx.dv),
        computed("dw", dx.dw),
        computed("du", dx.du),
        computed("d_initial_state", dx.d_initial_state),
    ]
}

fn rwkv4<F: Float>(case: &Case, run: Run) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (w, u, k, v) = (values("w"), values("u"), values("k"), values("v"));
    let (initial_state, d_final_state) = (case.optional("state"), case.optional("d_final_state"));
    let d_o = values("do");
    let x = rwkv4::Inputs { w: &w, u: &u, k: &k, v: &v, initial_state: initial_state.as_deref() };
    let options = rwkv4::Options::new().with_chunk(run.chunk);
    let dy = rwkv4::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
    let shape = rwkv4::Shape { seqs: case.seqs.clone(), c: case.dim("C") };
    let (y, dx) = match run.form {
        Form::Chunk => (rwkv4::chunk_fwd(&shape, &x, &options), rwkv4::chunk_bwd(&shape, &x, &dy, &options)),
        Form::Recurrent | Form::Single => {
            (rwkv4::recurrent_fwd(&shape, &x, &options), rwkv4::recurrent_bwd(&shape, &x, &dy, &options))
        }
    };
    vec![
        computed("o", y.o),
        computed("final_state", y.final_state),
        computed("dw", dx.dw),
        computed("du", dx.du),
        computed("dk", dx.dk),
        computed("dv", dx.dv),
        computed("dstate", dx.d_initial_state),
    ]
}

fn addcmul<F: Float>(case: &Case) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (hidden, delta) = (values("hidden"), values("delta"));
    let (xr, xw, xk, xv, xa) = (values("xr"), values("xw"), values("xk"), values("xv"), values("xa"));
    let (xg, d_out_g) = (case.optional("xg"), case.optional("dout_g"));
    let (d_out_r, d_out_w, d_out_k) = (values("dout_r"), values("dout_w"), values("dout_k"));
    let (d_out_v, d_out_a) = (values("dout_v"), values("dout_a"));
    let x = rwkv7::AddcmulInputs {
        hidden: &hidden,
        delta: &delta,
        xr: &xr,
        xw: &xw,
        xk: &xk,
        xv: &xv,
        xa: &xa,
        xg: xg.as_deref(),
    };
    let dy = rwkv7::AddcmulOutputGrads {
        d_out_r: &d_out_r,
        d_out_w: &d_out_w,
        d_out_k: &d_out_k,
        d_out_v: &d_out_v,
        d_out_a: &d_out_a,
        d_out_g: d_out_g.as_deref(),
    };
    let shape = rwkv7::AddcmulShape { tokens: case.seqs.tokens(), d: case.dim("D") };
    let y = rwkv7::addcmul_fwd(&shape, &x);
    let dx = rwkv7::addcmul_bwd(&shape, &x, &dy);
    let always = [
        computed("out_r", y.out_r),
        computed("out_w", y.out_w),
        computed("out_k", y.out_k),
        computed("out_v", y.out_v),
        computed("out_a", y.out_a),
        computed("dhidden", dx.d_hidden),
        computed("ddelta", dx.d_delta),
        computed("dxr", dx.dxr),
        computed("dxw", dx.dxw),
        computed("dxk", dx.dxk),
        computed("dxv", dx.dxv),
        computed("dxa", dx.dxa),
    ];
    let sometimes = [computed_if("out_g", y.out_g), computed_if("dxg", dx.dxg)];
    always.into_iter().chain(sometimes.into_iter().flatten()).collect()
}

fn k_update<F: Float>(case: &Case) -> Vec<Computed> {
    let (k, a, ka) = (case.values::<F>("k"), case.values("a"), case.values("ka"));
    let x = rwkv7::KUpdateInputs { k: &k, a: &a, ka: &ka };
    let shape = rwkv7::KUpdateShape { tokens: case.seqs.tokens(), d: case.dim("D") };
    let dx = rwkv7::k_update_bwd(&shape, &x, &case.values("dout"));
    vec![
        computed("out", rwkv7::k_update_fwd(&shape, &x)),
        computed("dk", dx.dk),
        computed("da", dx.da),
        computed("dka", dx.dka),
    ]
}

fn gate_output_correction<F: Float>(case: &Case) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (o, r, k, r_k, v, g) =
        (values("o"), values("r"), values("k"), values("r_k"), values("v"), values("g"));
    let x = rwkv7::GateOutputCorrectionInputs { o: &o, r: &r, k: &k, r_k: &r_k, v: &v, g: &g };
    let shape =
        rwkv7::GateOutputCorrectionShape { tokens: case.seqs.tokens(), h: case.dim("H"), k: case.dim("D") };
    let dx = rwkv7::gate_output_correction_bwd(&shape, &x, &values("dout"));
    vec![
        computed("out", rwkv7::gate_output_correction_fwd(&shape, &x)),
        computed("do", dx.d_o),
        computed("dr", dx.dr),
        computed("dk", dx.dk),
        computed("dr_k", dx.dr_k),
        computed("dv", dx.dv),
        computed("dg", dx.dg),
    ]
}

fn channel_mixing<F: Float>(case: &Case) -> Vec<Computed> {
    let values = |name| case.values::<F>(name);
    let (x, x_prev, x_k) = (values("x"), values("x_prev"), values("x_k"));
    let (key_weight, value_weight, d_out) = (values("key_weight"), values("value_weight"), values("dout"));
    let x = rwkv7::ChannelMixingInputs {
        x: &x,
        x_prev: Some(&x_prev),
        x_k: &x_k,
        key_weight: &key_weight,
        value_weight: &value_weight,
    };
    let dy = rwkv7::ChannelMixingOutputGrads { d_out: &d_out, d_x_last: None };
    let shape = rwkv7::ChannelMixingShape { seqs: case.seqs.clone(), c: case.dim("C"), f: case.dim("F") };
    let y = rwkv7::channel_mixing_fwd(&shape, &x);
    let dx = rwkv7::channel_mixing_bwd(&shape, &x, &dy);
    vec![
        computed("out", y.out),
        computed("dx", dx.dx),
        computed("dx_prev", dx.dx_prev),
        computed("dx_k", dx.dx_k),
        computed("dkey_weight", dx.d_key_weight),
        computed("dvalue_weight", dx.d_value_weight),
    ]
}

fn token_shift<F: Float>(case: &Case) -> Vec<Computed> {
    let (x, cache) = (case.values::<F>("x"), case.optional("cache"));
    let (dy, d_cache_out) = (case.values("dy"), case.optional("dcache_out"));
    let shape = token_shift::Shape { seqs: case.seqs.clone(), d: case.dim("D") };
    let x = token_shift::Inputs { x: &x, cache: cache.as_deref() };
    let dy = token_shift::OutputGrads { dy: &dy, d_cache_out: d_cache_out.as_deref() };
    let y = token_shift::fwd(&shape, &x);
    let dx = token_shift::bwd(&shape, &x, &dy);
    vec![
        computed("y", y.y),
        computed("cache_out", y.cache_out),
        computed("dx", dx.dx),
        computed("dcache", dx.d_cache),
    ]
}
