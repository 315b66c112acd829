//! The gated delta rule: decay the state, then correct what it returns for the key.

use std::ops::Range;

use num_traits::Float;

use crate::chunk::{Decays, Pair, chunks, inverse, suffix_sums};
use crate::heads::{Head, Step, or_zeros, replay_backwards, state, state_mut};
use crate::maps::{l2_norm_bwd, l2_norm_fwd, sigmoid, softplus};
use crate::matrix::{Matrix, axpy, axpy2, dot};
use crate::{Shape, check};

pub use crate::outputs::{OutputGrads, Outputs};

/// Where the scalar log decay of a value head comes from.
#[derive(Clone, Copy, Debug)]
pub enum Gate<'a, F> {
    /// No scalar decay.
    None,
    /// `[B, T, HV]`  log decay, natural base, at most 0.
    Log(&'a [F]),
    /// Log decay `-exp(a_log) * softplus(g + dt_bias)`, formed inside.
    Raw {
        /// `[B, T, HV]`  logits.
        g: &'a [F],
        /// `[HV]`  logarithm of the rate.
        a_log: &'a [F],
        /// `[HV]`  added to the logits; zero when absent.
        dt_bias: Option<&'a [F]>,
    },
}

/// How strongly each token is written.
#[derive(Clone, Copy, Debug)]
pub enum Beta<'a, F> {
    /// 1 everywhere.
    One,
    /// `[B, T, HV]`  one strength per value head.
    PerHead(&'a [F]),
    /// `[B, T, HV, V]`  one strength per value channel; recurrent passes only.
    PerChannel(&'a [F]),
}

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  queries
    pub q: &'a [F],
    /// `[B, T, H, K]`  keys; of unit length unless normalised inside
    pub k: &'a [F],
    /// `[B, T, HV, V]`  values
    pub v: &'a [F],
    /// `[B, T, HV]`  scalar decay
    pub g: Gate<'a, F>,
    /// `[B, T, HV, K]`  log decay of each key row, if any; recurrent passes only
    pub gk: Option<&'a [F]>,
    /// `[B, T, HV, V]`  log decay of each value column, if any; recurrent passes only
    pub gv: Option<&'a [F]>,
    /// Write strength
    pub beta: Beta<'a, F>,
    /// `[N, HV, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// What is done to queries and keys first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Nothing.
    AsGiven,
    /// Each is divided by `sqrt(sum x^2 + 1e-6)` over its head.
    L2,
}

/// What is done to the write strength first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaMap {
    /// Nothing.
    AsGiven,
    /// `sigmoid(beta)`: strengths in (0, 1).
    Sigmoid,
    /// `2 sigmoid(beta)`: strengths in (0, 2), so the transition may have negative eigenvalues.
    TwiceSigmoid,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options<F> {
    /// Value heads (HV), a multiple of the query heads; value head j reads query head `j * H / HV`.
    pub hv: usize,
    /// Factor of the readout.
    pub scale: F,
    /// Rows of a chunk (C), at least 1; read by the chunk passes only.
    pub chunk: usize,
    /// Normalisation of queries and keys.
    pub qk_norm: QkNorm,
    /// Map of the write strength.
    pub beta_map: BetaMap,
}

impl<F> Options<F> {
    /// Options for `hv` value heads with the given scale, chunks of 64 rows, and tensors taken as given.
    pub fn new(hv: usize, scale: F) -> Options<F> {
        Options { hv, scale, chunk: 64, qk_norm: QkNorm::AsGiven, beta_map: BetaMap::AsGiven }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options<F> {
        Options { chunk, ..self }
    }

    /// The same with the given normalisation of queries and keys.
    pub fn with_qk_norm(self, qk_norm: QkNorm) -> Options<F> {
        Options { qk_norm, ..self }
    }

    /// The same with the given map of the write strength.
    pub fn with_beta_map(self, beta_map: BetaMap) -> Options<F> {
        Options { beta_map, ..self }
    }
}

/// Gradients of the loss with respect to the inputs as they were given, before any map or norm.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`  summed over the value heads of the group
    pub dq: Vec<F>,
    /// `[B, T, H, K]`  summed over the value heads of the group
    pub dk: Vec<F>,
    /// `[B, T, HV, V]`
    pub dv: Vec<F>,
    /// `[B, T, HV]`  with respect to the log decay or the logits; present when there was a gate
    pub dg: Option<Vec<F>>,
    /// `[HV]`  present when the gate was formed inside
    pub d_a_log: Option<Vec<F>>,
    /// `[HV]`  present when there was a bias
    pub d_dt_bias: Option<Vec<F>>,
    /// `[B, T, HV, K]`  present when `gk` was
    pub dgk: Option<Vec<F>>,
    /// `[B, T, HV, V]`  present when `gv` was
    pub dgv: Option<Vec<F>>,
    /// `[B, T, HV]` or `[B, T, HV, V]`, like the strength; present unless it was 1 everywhere
    pub dbeta: Option<Vec<F>>,
    /// `[N, HV, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token.
///
/// ```text
/// S <- diag(exp(g_t + gk_t)) S diag(exp(gv_t))       decay first
/// d = beta_t (v_t - S^T k_t)                         read from the decayed state
/// S <- S + k_t d^T
/// o_t = scale S^T q_t
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or HV is no multiple of H.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    let mapped = Mapped::new(shape, x, options);
    let state_len = shape.k * shape.v;
    let mut y = Outputs {
        o: vec![F::zero(); x.v.len()],
        final_state: or_zeros(x.initial_state, shape.seqs.n() * options.hv * state_len),
    };
    for place in places(shape, options.hv) {
        let state = state_mut(&mut y.final_state, place.slot, state_len);
        for i_t in place.tokens.clone() {
            let token = mapped.token(x, &place, i_t);
            decay(state, &token);
            write(state, &token);
            let o = place.v.row_mut(&mut y.o, i_t);
            for (row, &q) in state.chunks_exact(shape.v).zip(token.q) {
                axpy(o, options.scale * q, row);
            }
        }
    }
    y
}

/// Reverse-mode differentiation of the recurrence, token by token.
///
/// Going backwards with dS, the gradient of the state after the token, D the decayed state and r = D^T k:
///
/// ```text
/// dS += scale q do^T                 dq = scale S_t do
/// dd = dS^T k                        dv = beta dd            dbeta = sum (v - r) dd
/// dk = dS d - D (beta dd)            dD = dS - k (beta dd)^T
/// dgk = rowsum(D * dD)               dgv = colsum(D * dD)    dg = sum (D * dD)
/// dS <- diag(exp(g + gk)) dD diag(exp(gv))
/// ```
///
/// Gradients then pass through the norm, the map of the write strength and the gate.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or HV is no multiple of H.
pub fn recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    let mapped = Mapped::new(shape, x, options);
    check_output_grads(shape, dy, options);
    let state_len = shape.k * shape.v;
    let scale = options.scale;
    let mut dx = MappedGrads::zeros(shape, x, dy, options);
    for place in places(shape, options.hv) {
        let initial_state = or_zeros(x.initial_state.map(|s| state(s, place.slot, state_len)), state_len);
        let first = place.tokens.start;
        let d_state = state_mut(&mut dx.d_initial_state, place.slot, state_len);
        replay_backwards(
            &initial_state,
            place.tokens.len(),
            |state, i| {
                let token = mapped.token(x, &place, first + i);
                decay(state, &token);
                write(state, &token);
            },
            |Step { i, before, after }| {
                let i_t = first + i;
                let token = mapped.token(x, &place, i_t);
                let d_o = place.v.row(dy.d_o, i_t);
                let mut decayed = before.to_vec();
                decay(&mut decayed, &token);
                let delta = delta(&decayed, &token);

                let mut d_delta = vec![F::zero(); shape.v];
                let dq = place.qk.row_mut(&mut dx.dq, i_t);
                for (i_k, (ds, after)) in
                    d_state.chunks_exact_mut(shape.v).zip(after.chunks_exact(shape.v)).enumerate()
                {
                    axpy(ds, scale * token.q[i_k], d_o);
                    axpy(&mut d_delta, token.k[i_k], ds);
                    dq[i_k] = dq[i_k] + scale * dot(after, d_o);
                }
                let dv = place.v.row_mut(&mut dx.dv, i_t);
                axpy2(dv, F::one(), &token.beta, &d_delta);
                match x.beta {
                    Beta::One => {}
                    Beta::PerHead(_) => {
                        place.scalar.row_mut(&mut dx.dbeta, i_t)[0] = dot(&delta.miss, &d_delta)
                    }
                    Beta::PerChannel(_) => {
                        axpy2(place.v.row_mut(&mut dx.dbeta, i_t), F::one(), &delta.miss, &d_delta);
                    }
                }

                let dk = place.qk.row_mut(&mut dx.dk, i_t);
                let (mut dgk, mut dgv) = (vec![F::zero(); shape.k], vec![F::zero(); shape.v]);
                for (i_k, (ds, decayed)) in
                    d_state.chunks_exact_mut(shape.v).zip(decayed.chunks_exact(shape.v)).enumerate()
                {
                    dk[i_k] = dk[i_k] + dot(ds, &delta.written) - dot(decayed, dv);
                    axpy(ds, -token.k[i_k], dv);
                    dgk[i_k] = dot(decayed, ds);
                    axpy2(&mut dgv, F::one(), decayed, ds);
                }
                place.scalar.row_mut(&mut dx.dg, i_t)[0] = dgv.iter().fold(F::zero(), |sum, &x| sum + x);
                if let Some(all) = &mut dx.dgk {
                    place.k.row_mut(all, i_t).copy_from_slice(&dgk);
                }
                if let Some(all) = &mut dx.dgv {
                    place.v.row_mut(all, i_t).copy_from_slice(&dgv);
                }
                decay(d_state, &token);
            },
        );
    }
    dx.into_grads(shape, x, &mapped, options)
}

/// The chunk form: one triangular inverse and a few matrix products per chunk.
///
/// Rows i and j of a chunk; E(i, j) is the decay after j through i; it runs from the start of the chunk when j is left
/// out, and to its end when i is.
///
/// ```text
/// L_ij = beta_i (k_i . k_j) E(i, j)      j < i
/// A = (I + L)^-1       u = A (beta v)       w = A (beta E k)       n = u - w S        the corrections that are written
/// o = scale ((q E) S + tril((q_i . k_j) E(i, j)) n)
/// S <- E S + (k E)^T n
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, HV is no multiple of H, the chunk has no rows, or there is a
/// decay per channel (`gk`, `gv`) or a strength per channel: they have no chunk form here.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    let mapped = Mapped::new(shape, x, options);
    check_chunk_form(x);
    let state_len = shape.k * shape.v;
    let mut y = Outputs {
        o: vec![F::zero(); x.v.len()],
        final_state: or_zeros(x.initial_state, shape.seqs.n() * options.hv * state_len),
    };
    for place in places(shape, options.hv) {
        let final_state = state_mut(&mut y.final_state, place.slot, state_len);
        let mut state = Matrix::new(shape.k, shape.v, final_state);
        for tokens in chunks(place.tokens.clone().collect(), options.chunk) {
            let chunk = Chunk::new(&mapped, x, &place, &tokens);
            place.v.scatter(&mut y.o, &tokens, &chunk.output(&state, options.scale));
            state = chunk.state_after(&state);
        }
        final_state.copy_from_slice(&state.data);
    }
    y
}

/// Gradients of the chunk form, last chunk first.
///
/// With dS the gradient of the state after the chunk, the names of [`chunk_fwd`], M = tril((q_i . k_j) E(i, j)) and G
/// the sum of the log decays from the start of the chunk:
///
/// ```text
/// dn = scale M^T do + (k E) dS                 dw = -dn S^T
/// Z = tril(do n^T) * E(i, j)                   dq = scale (do S^T) E + scale Z k
/// dk = scale Z^T q + dk_S                      dk_S = E (n dS^T)
/// dG = q . dq - k . dk;  the last row also E <S, dS> + sum k . dk_S
/// dA = stril(dw (beta E k)^T + dn (beta v)^T)  dL = -stril(A^T dA A^T) * E(i, j)
/// y = A^T dw       x = A^T dn       X_ij = beta_i dL_ij       KK = k k^T
/// dv = beta x      dbeta = x . v + E y . k + rowsum(dL * KK)
/// dk += beta E y + X k + X^T k
/// dG += beta E (y . k) + rowsum(X * KK) - colsum(X * KK)
/// dg_t = sum_{s >= t} dG_s
/// dS <- E dS + scale (q E)^T do - w^T dn
/// ```
///
/// `dg` is a difference of larger terms when the decay is strong; [`recurrent_bwd`] forms it without.
///
/// # Panics
///
/// As [`chunk_fwd`].
pub fn chunk_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    let mapped = Mapped::new(shape, x, options);
    check_output_grads(shape, dy, options);
    check_chunk_form(x);
    let state_len = shape.k * shape.v;
    let mut dx = MappedGrads::zeros(shape, x, dy, options);
    for place in places(shape, options.hv) {
        let initial_state = or_zeros(x.initial_state.map(|s| state(s, place.slot, state_len)), state_len);
        let mut states = vec![Matrix::new(shape.k, shape.v, &initial_state)];
        let chunks = chunks(place.tokens.clone().collect(), options.chunk);
        for tokens in &chunks {
            let chunk = Chunk::new(&mapped, x, &place, tokens);
            states.push(chunk.state_after(&states[states.len() - 1]));
        }
        let d_initial_state = state_mut(&mut dx.d_initial_state, place.slot, state_len);
        let mut d_state = Matrix::new(shape.k, shape.v, d_initial_state);
        for (tokens, state) in chunks.iter().zip(&states).rev() {
            let chunk = Chunk::new(&mapped, x, &place, tokens);
            let d_o = place.v.gather(dy.d_o, tokens).scaled(options.scale);
            let grads = chunk.bwd(state, &d_o, &d_state);
            place.qk.scatter_add(&mut dx.dq, tokens, &grads.dq);
            place.qk.scatter_add(&mut dx.dk, tokens, &grads.dk);
            place.v.scatter(&mut dx.dv, tokens, &grads.dv);
            place.scalar.scatter(&mut dx.dg, tokens, &grads.dg);
            if let Beta::PerHead(_) = x.beta {
                place.scalar.scatter(&mut dx.dbeta, tokens, &grads.dbeta);
            }
            d_state = grads.d_state;
        }
        d_initial_state.copy_from_slice(&d_state.data);
    }
    dx.into_grads(shape, x, &mapped, options)
}

#[track_caller]
fn check_output_grads<F: Float>(shape: &Shape, dy: &OutputGrads<F>, options: &Options<F>) {
    let Shape { seqs, k, v, .. } = shape;
    check::len("d_o", dy.d_o, &[seqs.tokens(), options.hv, *v]);
    check::len_opt("d_final_state", dy.d_final_state, &[seqs.n(), options.hv, *k, *v]);
}

#[track_caller]
fn check_chunk_form<F: Float>(x: &Inputs<F>) {
    assert!(x.gk.is_none() && x.gv.is_none(), "a decay per channel has no chunk form");
    assert!(!matches!(x.beta, Beta::PerChannel(_)), "a strength per channel has no chunk form");
}

impl<F: Float> Inputs<'_, F> {
    #[track_caller]
    fn check(&self, shape: &Shape, options: &Options<F>) {
        shape.check();
        let Shape { seqs, h, k, v } = shape;
        let (tokens, hv) = (seqs.tokens(), options.hv);
        assert!(hv > 0 && hv.is_multiple_of(*h), "{hv} value heads are no multiple of {h} query heads");
        check::len("q", self.q, &[tokens, *h, *k]);
        check::len("k", self.k, &[tokens, *h, *k]);
        check::len("v", self.v, &[tokens, hv, *v]);
        match self.g {
            Gate::None => {}
            Gate::Log(g) => check::len("g", g, &[tokens, hv]),
            Gate::Raw { g, a_log, dt_bias } => {
                check::len("g", g, &[tokens, hv]);
                check::len("a_log", a_log, &[hv]);
                check::len_opt("dt_bias", dt_bias, &[hv]);
            }
        }
        check::len_opt("gk", self.gk, &[tokens, hv, *k]);
        check::len_opt("gv", self.gv, &[tokens, hv, *v]);
        match self.beta {
            Beta::One => {}
            Beta::PerHead(beta) => check::len("beta", beta, &[tokens, hv]),
            Beta::PerChannel(beta) => check::len("beta", beta, &[tokens, hv, *v]),
        }
        check::len_opt("initial_state", self.initial_state, &[seqs.n(), hv, *k, *v]);
    }

    /// The write strength as given; empty when it is 1 everywhere.
    fn raw_beta(&self) -> &[F] {
        match self.beta {
            Beta::One => &[],
            Beta::PerHead(beta) | Beta::PerChannel(beta) => beta,
        }
    }
}

/// The inputs after norm, map and gate: what the recurrence is about.
#[derive(Clone, Debug)]
struct Mapped<F> {
    /// `[B, T, H, K]`
    q: Vec<F>,
    /// `[B, T, H, K]`
    k: Vec<F>,
    /// `[B, T, HV]`  log decay, 0 without a gate
    g: Vec<F>,
    /// Like the write strength; empty when it is 1 everywhere.
    beta: Vec<F>,
}

impl<F: Float> Mapped<F> {
    #[track_caller]
    fn new(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Mapped<F> {
        x.check(shape, options);
        let norm = |x: &[F]| match options.qk_norm {
            QkNorm::AsGiven => x.to_vec(),
            QkNorm::L2 => l2_norm_fwd(x, shape.k),
        };
        let g = match x.g {
            Gate::None => vec![F::zero(); shape.seqs.tokens() * options.hv],
            Gate::Log(g) => g.to_vec(),
            Gate::Raw { g, a_log, dt_bias } => {
                let logit = |i: usize| g[i] + dt_bias.map_or(F::zero(), |bias| bias[i % options.hv]);
                (0..g.len()).map(|i| -a_log[i % options.hv].exp() * softplus(logit(i))).collect()
            }
        };
        let beta = x.raw_beta().iter().map(|&beta| options.beta_map.fwd(beta)).collect();
        Mapped { q: norm(x.q), k: norm(x.k), g, beta }
    }

    fn token<'a>(&'a self, x: &Inputs<'a, F>, place: &Place, i_t: usize) -> Token<'a, F> {
        let g = place.scalar.row(&self.g, i_t)[0];
        Token {
            q: place.qk.row(&self.q, i_t),
            k: place.qk.row(&self.k, i_t),
            v: place.v.row(x.v, i_t),
            row_decay: match x.gk {
                None => vec![g.exp(); place.k.width],
                Some(gk) => place.k.row(gk, i_t).iter().map(|&gk| (g + gk).exp()).collect(),
            },
            column_decay: x.gv.map(|gv| place.v.row(gv, i_t).iter().map(|gv| gv.exp()).collect()),
            beta: match x.beta {
                Beta::One => vec![F::one(); place.v.width],
                Beta::PerHead(_) => vec![place.scalar.row(&self.beta, i_t)[0]; place.v.width],
                Beta::PerChannel(_) => place.v.row(&self.beta, i_t).to_vec(),
            },
        }
    }
}

impl BetaMap {
    fn fwd<F: Float>(self, beta: F) -> F {
        match self {
            BetaMap::AsGiven => beta,
            BetaMap::Sigmoid => sigmoid(beta),
            BetaMap::TwiceSigmoid => sigmoid(beta) + sigmoid(beta),
        }
    }

    fn derivative<F: Float>(self, beta: F) -> F {
        // 1 - sigmoid(x) loses every digit when x is large; sigmoid(-x) is the same and does not.
        let slope = sigmoid(beta) * sigmoid(-beta);
        match self {
            BetaMap::AsGiven => F::one(),
            BetaMap::Sigmoid => slope,
            BetaMap::TwiceSigmoid => slope + slope,
        }
    }
}

/// Gradients of what [`Mapped`] holds, and of the rest.
#[derive(Clone, Debug)]
struct MappedGrads<F> {
    dq: Vec<F>,
    dk: Vec<F>,
    dv: Vec<F>,
    /// `[B, T, HV]`  of the log decay
    dg: Vec<F>,
    dgk: Option<Vec<F>>,
    dgv: Option<Vec<F>>,
    /// Like the write strength; empty when it is 1 everywhere.
    dbeta: Vec<F>,
    d_initial_state: Vec<F>,
}

impl<F: Float> MappedGrads<F> {
    /// Zeros, and the gradient of the final state where that of the initial state will be.
    fn zeros(shape: &Shape, x: &Inputs<F>, dy: &OutputGrads<F>, options: &Options<F>) -> MappedGrads<F> {
        let zeros = |x: &[F]| vec![F::zero(); x.len()];
        MappedGrads {
            dq: zeros(x.q),
            dk: zeros(x.k),
            dv: zeros(x.v),
            dg: vec![F::zero(); shape.seqs.tokens() * options.hv],
            dgk: x.gk.map(zeros),
            dgv: x.gv.map(zeros),
            dbeta: zeros(x.raw_beta()),
            d_initial_state: or_zeros(dy.d_final_state, shape.seqs.n() * options.hv * shape.k * shape.v),
        }
    }

    /// Passes the gradients through norm, map and gate.
    fn into_grads(self, shape: &Shape, x: &Inputs<F>, mapped: &Mapped<F>, options: &Options<F>) -> Grads<F> {
        let norm = |x: &[F], dy: Vec<F>| match options.qk_norm {
            QkNorm::AsGiven => dy,
            QkNorm::L2 => l2_norm_bwd(x, &dy, shape.k),
        };
        let raw_beta = x.raw_beta();
        let dbeta = raw_beta
            .iter()
            .zip(self.dbeta)
            .map(|(&beta, dbeta)| dbeta * options.beta_map.derivative(beta))
            .collect();
        let hv = options.hv;
        let (mut dg, mut d_a_log, mut d_dt_bias) = (None, None, None);
        match x.g {
            Gate::None => {}
            Gate::Log(_) => dg = Some(self.dg),
            Gate::Raw { g, a_log, dt_bias } => {
                let mut d_logits = self.dg.clone();
                let (mut sum_a_log, mut sum_bias) = (vec![F::zero(); hv], vec![F::zero(); hv]);
                for (i, d_logit) in d_logits.iter_mut().enumerate() {
                    let i_h = i % hv;
                    let logit = g[i] + dt_bias.map_or(F::zero(), |bias| bias[i_h]);
                    *d_logit = -self.dg[i] * a_log[i_h].exp() * sigmoid(logit);
                    sum_bias[i_h] = sum_bias[i_h] + *d_logit;
                    sum_a_log[i_h] = sum_a_log[i_h] + self.dg[i] * mapped.g[i];
                }
                dg = Some(d_logits);
                d_a_log = Some(sum_a_log);
                d_dt_bias = dt_bias.map(|_| sum_bias);
            }
        }
        Grads {
            dq: norm(x.q, self.dq),
            dk: norm(x.k, self.dk),
            dv: self.dv,
            dg,
            d_a_log,
            d_dt_bias,
            dgk: self.dgk,
            dgv: self.dgv,
            dbeta: match x.beta {
                Beta::One => None,
                Beta::PerHead(_) | Beta::PerChannel(_) => Some(dbeta),
            },
            d_initial_state: self.d_initial_state,
        }
    }
}

/// One value head of one sequence.
#[derive(Clone, Debug)]
struct Place {
    /// Rows of the token axis.
    tokens: Range<usize>,
    /// Which of the N * HV states.
    slot: usize,
    /// Rows of K elements, of the query head that this value head reads.
    qk: Head,
    /// Rows of K elements, of this value head.
    k: Head,
    /// Rows of V elements.
    v: Head,
    /// Rows of one element.
    scalar: Head,
}

fn places(shape: &Shape, hv: usize) -> Vec<Place> {
    let mut places = Vec::with_capacity(shape.seqs.n() * hv);
    for i_n in 0..shape.seqs.n() {
        for i_h in 0..hv {
            let own = |width| Head { heads: hv, i_h, width };
            places.push(Place {
                tokens: shape.seqs.range(i_n),
                slot: i_n * hv + i_h,
                qk: Head { heads: shape.h, i_h: i_h * shape.h / hv, width: shape.k },
                k: own(shape.k),
                v: own(shape.v),
                scalar: own(1),
            });
        }
    }
    places
}

/// The vectors of one token.
#[derive(Clone, Debug)]
struct Token<'a, F> {
    q: &'a [F],
    k: &'a [F],
    v: &'a [F],
    /// `[K]`
    row_decay: Vec<F>,
    /// `[V]`  1 when absent
    column_decay: Option<Vec<F>>,
    /// `[V]`
    beta: Vec<F>,
}

/// Multiplies the state, or its gradient, by the decay of one token.
fn decay<F: Float>(state: &mut [F], token: &Token<F>) {
    for (row, &row_decay) in state.chunks_exact_mut(token.v.len()).zip(&token.row_decay) {
        for s in row.iter_mut() {
            *s = *s * row_decay;
        }
        for (s, &column_decay) in row.iter_mut().zip(token.column_decay.iter().flatten()) {
            *s = *s * column_decay;
        }
    }
}

/// What a token corrects.
#[derive(Clone, Debug)]
struct Delta<F> {
    /// `[V]`  v - S^T k
    miss: Vec<F>,
    /// `[V]`  beta (v - S^T k)
    written: Vec<F>,
}

fn delta<F: Float>(decayed: &[F], token: &Token<F>) -> Delta<F> {
    let mut miss = token.v.to_vec();
    for (row, &k) in decayed.chunks_exact(token.v.len()).zip(token.k) {
        axpy(&mut miss, -k, row);
    }
    let written = miss.iter().zip(&token.beta).map(|(&miss, &beta)| beta * miss).collect();
    Delta { miss, written }
}

/// Writes one token to the decayed state.
fn write<F: Float>(decayed: &mut [F], token: &Token<F>) {
    let Delta { written, .. } = delta(decayed, token);
    for (row, &k) in decayed.chunks_exact_mut(token.v.len()).zip(token.k) {
        axpy(row, k, &written);
    }
}

/// What a chunk computes before it meets the state.
#[derive(Clone, Debug)]
struct Chunk<F> {
    q: Matrix<F>,
    k: Matrix<F>,
    v: Matrix<F>,
    /// `[C]`
    beta: Vec<F>,
    /// `[C]`  E, from the start
    from_start: Vec<F>,
    /// `[C]`  E, to the end
    to_end: Vec<F>,
    /// E of the whole chunk
    whole: F,
    /// `[C, C]`  E(i, j) for j <= i, else 0
    between: Matrix<F>,
    /// `[C, C]`  k k^T
    kk: Matrix<F>,
    /// `[C, C]`  M
    scores: Matrix<F>,
    /// `[C, C]`  A
    a: Matrix<F>,
    /// `[C, K]`  beta E k
    k_decayed: Matrix<F>,
    /// `[C, K]`  w
    w: Matrix<F>,
    /// `[C, V]`  u
    u: Matrix<F>,
}

#[derive(Clone, Debug)]
struct ChunkGrads<F> {
    dq: Matrix<F>,
    dk: Matrix<F>,
    dv: Matrix<F>,
    /// `[C, 1]`
    dg: Matrix<F>,
    /// `[C, 1]`
    dbeta: Matrix<F>,
    /// Of the state before the chunk.
    d_state: Matrix<F>,
}

impl<F: Float> Chunk<F> {
    fn new(mapped: &Mapped<F>, x: &Inputs<F>, place: &Place, tokens: &[usize]) -> Chunk<F> {
        let n = tokens.len();
        let (q, k) = (place.qk.gather(&mapped.q, tokens), place.qk.gather(&mapped.k, tokens));
        let v = place.v.gather(x.v, tokens);
        let beta = match x.beta {
            Beta::One => vec![F::one(); n],
            Beta::PerHead(_) | Beta::PerChannel(_) => place.scalar.gather(&mapped.beta, tokens).data,
        };
        let decays = Decays::new(&place.scalar.gather(&mapped.g, tokens));
        let mut between = Matrix::zeros(n, n);
        decays.pairs(|Pair { i, j, through, .. }| between.set(i, j, through[0]));
        let from_start = decays.start_through.data;

        let kk = k.times_t(&k);
        let scores = q.times_t(&k).hadamard(&between);
        let a = inverse(&kk.clone().hadamard(&between).rows_scaled(&beta).strictly_lower());
        let k_decayed = k.clone().rows_scaled(&beta).rows_scaled(&from_start);
        Chunk {
            w: a.times(&k_decayed),
            u: a.times(&v.clone().rows_scaled(&beta)),
            q,
            k,
            v,
            beta,
            from_start,
            to_end: decays.to_end.data,
            whole: decays.whole[0],
            between,
            kk,
            scores,
            a,
            k_decayed,
        }
    }

    /// `[C, V]`  n, what each row writes.
    fn written(&self, state: &Matrix<F>) -> Matrix<F> {
        self.u.clone().minus(&self.w.times(state))
    }

    fn output(&self, state: &Matrix<F>, scale: F) -> Matrix<F> {
        let inter = self.q.times(state).rows_scaled(&self.from_start);
        inter.plus(&self.scores.times(&self.written(state))).scaled(scale)
    }

    fn state_after(&self, state: &Matrix<F>) -> Matrix<F> {
        let written = self.written(state).rows_scaled(&self.to_end);
        state.clone().scaled(self.whole).plus(&self.k.t_times(&written))
    }

    /// `d_o` is the gradient of the outputs times the scale.
    fn bwd(&self, state: &Matrix<F>, d_o: &Matrix<F>, d_state: &Matrix<F>) -> ChunkGrads<F> {
        let Chunk { q, k, v, beta, from_start, to_end, between, kk, a, .. } = self;
        let written = self.written(state);
        let d_written = self.scores.t_times(d_o).plus(&k.times(d_state).rows_scaled(to_end));
        let dw = d_written.times_t(state).scaled(-F::one());

        let z = d_o.times_t(&written).hadamard(between);
        let dq = d_o.times_t(state).rows_scaled(from_start).plus(&z.times(k));
        let dk_inter = written.times_t(d_state).rows_scaled(to_end);
        let mut dk = z.t_times(q).plus(&dk_inter);
        let mut dg = difference(&q.row_dots(&dq), &k.row_dots(&dk));
        let kept = dot(&state.data, &d_state.data) * self.whole;
        let last = dg.len() - 1;
        dg[last] = dg[last] + kept + dot(&k.data, &dk_inter.data);

        // Through the inverse.
        let da = dw.times_t(&self.k_decayed).plus(&d_written.times_t(&v.clone().rows_scaled(beta)));
        let dl = a.t_times(&da.strictly_lower()).times_t(a).strictly_lower().hadamard(between);
        let dl = dl.scaled(-F::one());
        let y = a.t_times(&dw);
        let dv_unscaled = a.t_times(&d_written);
        let beta_decay: Vec<F> = beta.iter().zip(from_start).map(|(&beta, &e)| beta * e).collect();
        let pairs = dl.clone().rows_scaled(beta);
        dk = dk.plus(&y.clone().rows_scaled(&beta_decay)).plus(&pairs.times(k)).plus(&pairs.t_times(k));

        let y_k = y.row_dots(k);
        let mut dbeta = dv_unscaled.row_dots(v);
        axpy2(&mut dbeta, F::one(), from_start, &y_k);
        axpy(&mut dbeta, F::one(), &dl.row_dots(kk));
        axpy2(&mut dg, F::one(), &beta_decay, &y_k);
        let weighted = pairs.hadamard(kk);
        axpy(&mut dg, F::one(), &weighted.transpose().col_sums());
        axpy(&mut dg, -F::one(), &weighted.col_sums());

        let d_state = d_state
            .clone()
            .scaled(self.whole)
            .plus(&q.clone().rows_scaled(from_start).t_times(d_o))
            .minus(&self.w.t_times(&d_written));
        let column = |x: Vec<F>| Matrix { rows: x.len(), cols: 1, data: x };
        ChunkGrads {
            dq,
            dk,
            dv: dv_unscaled.rows_scaled(beta),
            dg: suffix_sums(column(dg)),
            dbeta: column(dbeta),
            d_state,
        }
    }
}

fn difference<F: Float>(x: &[F], y: &[F]) -> Vec<F> {
    x.iter().zip(y).map(|(&x, &y)| x - y).collect()
}
