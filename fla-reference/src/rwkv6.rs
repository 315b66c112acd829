//! RWKV-6: per-channel decay, and a bonus for the current token that the state never sees.

use num_traits::Float;

use crate::chunk::{Decays, Pair, chunks, suffix_sums};
use crate::heads::{Head, Step, or_zeros, replay_backwards, state, state_mut};
use crate::matrix::{Matrix, axpy, axpy2, dot, dot3};
use crate::{Shape, check};

pub use crate::outputs::{OutputGrads, Outputs};

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  receptance: the query
    pub r: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base, at most 0
    pub w: &'a [F],
    /// `[H, K]`  bonus of the current token
    pub u: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// Which end of each sequence is visited first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the first token to the last.
    Forward,
    /// From the last token to the first: the initial state precedes the last token.
    Reverse,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options<F> {
    /// Factor of the readout.
    pub scale: F,
    /// Rows of a chunk (C), at least 1; read by the chunk passes only.
    pub chunk: usize,
    /// Order in which the tokens of a sequence are visited.
    pub direction: Direction,
}

impl<F> Options<F> {
    /// Options with the given scale, chunks of 64 rows, and tokens visited from first to last.
    pub fn new(scale: F) -> Options<F> {
        Options { scale, chunk: 64, direction: Direction::Forward }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options<F> {
        Options { chunk, ..self }
    }

    /// The same with the given order of tokens.
    pub fn with_direction(self, direction: Direction) -> Options<F> {
        Options { direction, ..self }
    }
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`
    pub dr: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dw: Vec<F>,
    /// `[H, K]`
    pub du: Vec<F>,
    /// `[N, H, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token.
///
/// ```text
/// o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    x.check(shape);
    let state_len = shape.k * shape.v;
    let mut y = Outputs {
        o: vec![F::zero(); x.v.len()],
        final_state: or_zeros(x.initial_state, shape.seqs.n() * shape.h * state_len),
    };
    for place in places(shape, options.direction) {
        let state = state_mut(&mut y.final_state, place.slot, state_len);
        for &i_t in &place.tokens {
            let token = x.token(&place, i_t);
            let o = place.v.row_mut(&mut y.o, i_t);
            for (row, &r) in state.chunks_exact(shape.v).zip(token.r) {
                axpy(o, options.scale * r, row);
            }
            axpy(o, options.scale * dot3(token.r, token.u, token.k), token.v);
            step(state, &token);
        }
    }
    y
}

/// Reverse-mode differentiation of the recurrence, token by token.
///
/// Going backwards with dS, the gradient of the state after the token, and e = exp(w):
///
/// ```text
/// d = scale do . v
/// dr = scale S_{t-1} do + d u * k        dk = dS v + d u * r        du += d r * k
/// dv = dS^T k + scale (sum_k r u k) do
/// dw = e * rowsum(S_{t-1} * dS)
/// dS <- diag(e) dS + scale r do^T
/// ```
///
/// This holds for either order of tokens, with t - 1 for the token that was visited before.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    x.check(shape);
    x.check_output_grads(shape, dy);
    let state_len = shape.k * shape.v;
    let scale = options.scale;
    let mut dx = x.zero_grads(shape, dy);
    for place in places(shape, options.direction) {
        let initial_state = or_zeros(x.initial_state.map(|s| state(s, place.slot, state_len)), state_len);
        let d_state = state_mut(&mut dx.d_initial_state, place.slot, state_len);
        let du = place.u_mut(&mut dx.du);
        replay_backwards(
            &initial_state,
            place.tokens.len(),
            |state, i| step(state, &x.token(&place, place.tokens[i])),
            |Step { i, before, .. }| {
                let i_t = place.tokens[i];
                let token = x.token(&place, i_t);
                let d_o = place.v.row(dy.d_o, i_t);
                let d_bonus = scale * dot(d_o, token.v);
                let dr = place.k.row_mut(&mut dx.dr, i_t);
                let dk = place.k.row_mut(&mut dx.dk, i_t);
                let dw = place.k.row_mut(&mut dx.dw, i_t);
                let dv = place.v.row_mut(&mut dx.dv, i_t);
                axpy2(dr, d_bonus, token.u, token.k);
                axpy2(dk, d_bonus, token.u, token.r);
                axpy2(du, d_bonus, token.r, token.k);
                axpy(dv, scale * dot3(token.r, token.u, token.k), d_o);
                let rows = before.chunks_exact(shape.v).zip(d_state.chunks_exact_mut(shape.v));
                for (i_k, (before, ds)) in rows.enumerate() {
                    let decay = token.w[i_k].exp();
                    dr[i_k] = dr[i_k] + scale * dot(before, d_o);
                    dk[i_k] = dk[i_k] + dot(ds, token.v);
                    dw[i_k] = decay * dot(before, ds);
                    axpy(dv, token.k[i_k], ds);
                    for (ds, &d_o) in ds.iter_mut().zip(d_o) {
                        *ds = decay * *ds + scale * token.r[i_k] * d_o;
                    }
                }
            },
        );
    }
    dx
}

/// The chunk form.
///
/// Rows i and j of a chunk; E(i, j) is the decay after j through i, E'(i, j) that until just before i; both run from
/// the start of the chunk when j is left out, and to its end when i is.
///
/// ```text
/// A_ij = scale sum_k r_i k_j E'(i, j)      j < i            A_ii = scale sum_k r_i u k_i
/// o = scale (r E') S + A v                                  S <- diag(E) S + (k E)^T v
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    x.check(shape);
    let state_len = shape.k * shape.v;
    let mut y = Outputs {
        o: vec![F::zero(); x.v.len()],
        final_state: or_zeros(x.initial_state, shape.seqs.n() * shape.h * state_len),
    };
    for place in places(shape, options.direction) {
        let final_state = state_mut(&mut y.final_state, place.slot, state_len);
        let mut state = Matrix::new(shape.k, shape.v, final_state);
        for tokens in chunks(place.tokens.clone(), options.chunk) {
            let chunk = Chunk::new(x, &place, &tokens, options.scale);
            place.v.scatter(&mut y.o, &tokens, &chunk.output(&state));
            state = chunk.state_after(&state);
        }
        final_state.copy_from_slice(&state.data);
    }
    y
}

/// Gradients of the chunk form, last chunk first.
///
/// With dS the gradient of the state after the chunk and the names of [`chunk_fwd`]; dr0 and dk0 are the gradients
/// without the bonus:
///
/// ```text
/// dA = scale tril(do v^T)
/// dv = A^T do + (k E) dS
/// dr0_i = scale (do_i S^T) E'_i + sum_{j < i} dA_ij k_j E'(i, j)
/// dk0_j = (v_j dS^T) E_j + sum_{i > j} dA_ij r_i E'(i, j)
/// dw_t = sum_{s > t} (r dr0 - k dk0)_s - (k dk0)_t + E rowsum(S * dS) + sum_s (k E) (v dS^T)
/// dr_t = dr0_t + dA_tt u k_t        dk_t = dk0_t + dA_tt u r_t        du += dA_tt r_t k_t
/// dS <- diag(E) dS + scale (r E')^T do
/// ```
///
/// `dw` is a difference of larger terms when the decay is strong; [`recurrent_bwd`] forms it without.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn chunk_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    x.check(shape);
    x.check_output_grads(shape, dy);
    let state_len = shape.k * shape.v;
    let mut dx = x.zero_grads(shape, dy);
    for place in places(shape, options.direction) {
        let initial_state = or_zeros(x.initial_state.map(|s| state(s, place.slot, state_len)), state_len);
        let mut states = vec![Matrix::new(shape.k, shape.v, &initial_state)];
        let chunks = chunks(place.tokens.clone(), options.chunk);
        for tokens in &chunks {
            let chunk = Chunk::new(x, &place, tokens, options.scale);
            states.push(chunk.state_after(&states[states.len() - 1]));
        }
        let d_initial_state = state_mut(&mut dx.d_initial_state, place.slot, state_len);
        let mut d_state = Matrix::new(shape.k, shape.v, d_initial_state);
        for (tokens, state) in chunks.iter().zip(&states).rev() {
            let chunk = Chunk::new(x, &place, tokens, options.scale);
            let d_o = place.v.gather(dy.d_o, tokens);
            let grads = chunk.bwd(state, &d_o, &d_state);
            place.k.scatter(&mut dx.dr, tokens, &grads.dr);
            place.k.scatter(&mut dx.dk, tokens, &grads.dk);
            place.v.scatter(&mut dx.dv, tokens, &grads.dv);
            place.k.scatter(&mut dx.dw, tokens, &grads.dw);
            axpy(place.u_mut(&mut dx.du), F::one(), &grads.du);
            d_state = grads.d_state;
        }
        d_initial_state.copy_from_slice(&d_state.data);
    }
    dx
}

impl<'a, F: Float> Inputs<'a, F> {
    #[track_caller]
    fn check(&self, shape: &Shape) {
        shape.check();
        let Shape { seqs, h, k, v } = shape;
        let keys = [seqs.tokens(), *h, *k];
        check::len("r", self.r, &keys);
        check::len("k", self.k, &keys);
        check::len("v", self.v, &[seqs.tokens(), *h, *v]);
        check::len("w", self.w, &keys);
        check::len("u", self.u, &[*h, *k]);
        check::len_opt("initial_state", self.initial_state, &[seqs.n(), *h, *k, *v]);
    }

    #[track_caller]
    fn check_output_grads(&self, shape: &Shape, dy: &OutputGrads<F>) {
        let Shape { seqs, h, k, v } = shape;
        check::len("d_o", dy.d_o, &[seqs.tokens(), *h, *v]);
        check::len_opt("d_final_state", dy.d_final_state, &[seqs.n(), *h, *k, *v]);
    }

    /// Zeros, and the gradient of the final state where that of the initial state will be.
    fn zero_grads(&self, shape: &Shape, dy: &OutputGrads<F>) -> Grads<F> {
        let keys = || vec![F::zero(); self.k.len()];
        Grads {
            dr: keys(),
            dk: keys(),
            dv: vec![F::zero(); self.v.len()],
            dw: keys(),
            du: vec![F::zero(); self.u.len()],
            d_initial_state: or_zeros(dy.d_final_state, shape.seqs.n() * shape.h * shape.k * shape.v),
        }
    }

    fn token(&self, place: &Place, i_t: usize) -> Token<'a, F> {
        Token {
            r: place.k.row(self.r, i_t),
            k: place.k.row(self.k, i_t),
            v: place.v.row(self.v, i_t),
            w: place.k.row(self.w, i_t),
            u: place.u(self.u),
        }
    }
}

/// One head of one sequence.
#[derive(Clone, Debug)]
struct Place {
    /// Rows of the token axis, in the order of their visit.
    tokens: Vec<usize>,
    /// Which of the N * H states.
    slot: usize,
    /// Rows of K elements.
    k: Head,
    /// Rows of V elements.
    v: Head,
}

impl Place {
    /// The bonus has no token axis: it is one row for all.
    fn u<'a, F>(&self, u: &'a [F]) -> &'a [F] {
        self.k.row(u, 0)
    }

    fn u_mut<'a, F>(&self, u: &'a mut [F]) -> &'a mut [F] {
        self.k.row_mut(u, 0)
    }
}

fn places(shape: &Shape, direction: Direction) -> Vec<Place> {
    let heads = shape.h;
    let mut places = Vec::with_capacity(shape.seqs.n() * heads);
    for i_n in 0..shape.seqs.n() {
        for i_h in 0..heads {
            places.push(Place {
                tokens: match direction {
                    Direction::Forward => shape.seqs.range(i_n).collect(),
                    Direction::Reverse => shape.seqs.range(i_n).rev().collect(),
                },
                slot: i_n * heads + i_h,
                k: Head { heads, i_h, width: shape.k },
                v: Head { heads, i_h, width: shape.v },
            });
        }
    }
    places
}

/// The vectors of one token.
#[derive(Clone, Copy, Debug)]
struct Token<'a, F> {
    r: &'a [F],
    k: &'a [F],
    v: &'a [F],
    w: &'a [F],
    u: &'a [F],
}

/// Moves the state past one token.
fn step<F: Float>(state: &mut [F], token: &Token<F>) {
    for (i_k, row) in state.chunks_exact_mut(token.v.len()).enumerate() {
        let decay = token.w[i_k].exp();
        for (s, &v) in row.iter_mut().zip(token.v) {
            *s = decay * *s + token.k[i_k] * v;
        }
    }
}

/// What a chunk computes before it meets the state.
#[derive(Clone, Debug)]
struct Chunk<F> {
    scale: F,
    r: Matrix<F>,
    k: Matrix<F>,
    v: Matrix<F>,
    u: Vec<F>,
    decays: Decays<F>,
    /// `[C, C]`
    scores: Matrix<F>,
    /// `[C, K]`  r E', from the start
    r_decayed: Matrix<F>,
    /// `[C, K]`  k E, to the end
    k_decayed: Matrix<F>,
}

#[derive(Clone, Debug)]
struct ChunkGrads<F> {
    dr: Matrix<F>,
    dk: Matrix<F>,
    dv: Matrix<F>,
    dw: Matrix<F>,
    /// `[K]`
    du: Vec<F>,
    /// Of the state before the chunk.
    d_state: Matrix<F>,
}

impl<F: Float> Chunk<F> {
    fn new(x: &Inputs<F>, place: &Place, tokens: &[usize], scale: F) -> Chunk<F> {
        let (r, k) = (place.k.gather(x.r, tokens), place.k.gather(x.k, tokens));
        let u = place.u(x.u).to_vec();
        let decays = Decays::new(&place.k.gather(x.w, tokens));
        let mut scores = Matrix::zeros(tokens.len(), tokens.len());
        decays.pairs(|Pair { i, j, until, .. }| {
            let weight = if j < i { until } else { &u };
            scores.set(i, j, scale * dot3(r.row(i), k.row(j), weight));
        });
        Chunk {
            scale,
            r_decayed: r.clone().hadamard(&decays.start_until),
            k_decayed: k.clone().hadamard(&decays.to_end),
            r,
            k,
            v: place.v.gather(x.v, tokens),
            u,
            decays,
            scores,
        }
    }

    fn output(&self, state: &Matrix<F>) -> Matrix<F> {
        self.r_decayed.times(state).scaled(self.scale).plus(&self.scores.times(&self.v))
    }

    fn state_after(&self, state: &Matrix<F>) -> Matrix<F> {
        state.clone().rows_scaled(&self.decays.whole).plus(&self.k_decayed.t_times(&self.v))
    }

    fn bwd(&self, state: &Matrix<F>, d_o: &Matrix<F>, d_state: &Matrix<F>) -> ChunkGrads<F> {
        let d_scores = d_o.times_t(&self.v).scaled(self.scale);
        let dv = self.scores.t_times(d_o).plus(&self.k_decayed.times(d_state));

        let mut dr = d_o.times_t(state).scaled(self.scale).hadamard(&self.decays.start_until);
        let dk_inter = self.v.times_t(d_state).hadamard(&self.decays.to_end);
        let mut dk = dk_inter.clone();
        self.decays.pairs(|Pair { i, j, until, .. }| {
            if j < i {
                axpy2(dr.row_mut(i), d_scores.at(i, j), self.k.row(j), until);
                axpy2(dk.row_mut(j), d_scores.at(i, j), self.r.row(i), until);
            }
        });

        let r_dr = self.r.clone().hadamard(&dr);
        let terms = r_dr.clone().minus(&self.k.clone().hadamard(&dk));
        let mut dw = suffix_sums(terms).minus(&r_dr);
        let written = self.k.clone().hadamard(&dk_inter).col_sums();
        let kept = state.clone().rows_scaled(&self.decays.whole).row_dots(d_state);
        for i in 0..dw.rows {
            axpy(dw.row_mut(i), F::one(), &written);
            axpy(dw.row_mut(i), F::one(), &kept);
        }

        let mut du = vec![F::zero(); self.u.len()];
        for i in 0..d_scores.rows {
            let d_bonus = d_scores.at(i, i);
            axpy2(dr.row_mut(i), d_bonus, &self.u, self.k.row(i));
            axpy2(dk.row_mut(i), d_bonus, &self.u, self.r.row(i));
            axpy2(&mut du, d_bonus, self.r.row(i), self.k.row(i));
        }

        let d_state = d_state
            .clone()
            .rows_scaled(&self.decays.whole)
            .plus(&self.r_decayed.t_times(d_o).scaled(self.scale));
        ChunkGrads { dr, dk, dv, dw, du, d_state }
    }
}
