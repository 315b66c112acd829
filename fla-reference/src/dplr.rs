//! Diagonal plus low rank: the state is decayed per key channel and moved along one direction per token.

use std::ops::Range;

use num_traits::Float;

use crate::chunk::{Decays, Pair, chunks, inverse, suffix_sums};
use crate::heads::{Head, Step, or_zeros, replay_backwards, state, state_mut};
use crate::matrix::{Matrix, axpy, axpy2, dot, dot3};
use crate::{Shape, check};

pub use crate::outputs::{OutputGrads, Outputs};

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  queries
    pub q: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  direction that is read from the state before it decays
    pub a: &'a [F],
    /// `[B, T, H, K]`  direction that what was read is written to
    pub b: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base, at most 0
    pub g: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options<F> {
    /// Factor of the readout.
    pub scale: F,
    /// Rows of a chunk (C), at least 1; read by the chunk passes only.
    pub chunk: usize,
}

impl<F> Options<F> {
    /// Options with the given scale and chunks of 64 rows.
    pub fn new(scale: F) -> Options<F> {
        Options { scale, chunk: 64 }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options<F> {
        Options { chunk, ..self }
    }
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`
    pub dq: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`
    pub da: Vec<F>,
    /// `[B, T, H, K]`
    pub db: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dg: Vec<F>,
    /// `[N, H, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token.
///
/// ```text
/// S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale S_t^T q_t
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    x.check(shape);
    let mut y = Outputs {
        o: vec![F::zero(); x.v.len()],
        final_state: or_zeros(x.initial_state, shape.seqs.n() * shape.h * shape.k * shape.v),
    };
    for place in places(shape) {
        let state = state_mut(&mut y.final_state, place.slot, shape.k * shape.v);
        let mut decay = vec![F::zero(); shape.k];
        for i_t in place.tokens {
            let o = place.v.row_mut(&mut y.o, i_t);
            step(state, &x.token(&place.k, &place.v, i_t), &mut decay, o);
            for o in o {
                *o = *o * options.scale;
            }
        }
    }
    y
}

/// Reverse-mode differentiation of the recurrence, token by token.
///
/// Going backwards with dS, the gradient of the state after the token, r = S_{t-1}^T a_t and e = exp(g_t):
///
/// ```text
/// dS += scale q do^T          dq = scale S_t do
/// dv = dS^T k                 dk = dS v
/// db = dS r                   da = S_{t-1} (dS^T b)
/// dg = e * rowsum(S_{t-1} * dS)
/// dS <- diag(e) dS + a (dS^T b)^T
/// ```
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
    let mut dx = x.zero_grads(shape, dy);
    for place in places(shape) {
        let Place { k: kh, v: vh, .. } = place;
        let initial_state = or_zeros(x.initial_state.map(|s| state(s, place.slot, state_len)), state_len);
        let d_state = state_mut(&mut dx.d_initial_state, place.slot, state_len);
        let tokens: Vec<usize> = place.tokens.collect();
        let (mut decay, mut o) = (vec![F::zero(); shape.k], vec![F::zero(); shape.v]);
        let (mut r, mut dr) = (vec![F::zero(); shape.v], vec![F::zero(); shape.v]);
        replay_backwards(
            &initial_state,
            tokens.len(),
            |state, i| step(state, &x.token(&kh, &vh, tokens[i]), &mut decay, &mut o),
            |Step { i, before, after }| {
                let i_t = tokens[i];
                let token = x.token(&kh, &vh, i_t);
                let d_o = vh.row(dy.d_o, i_t);
                r.fill(F::zero());
                dr.fill(F::zero());
                let dv = vh.row_mut(&mut dx.dv, i_t);
                for (i_k, ds) in d_state.chunks_exact_mut(shape.v).enumerate() {
                    axpy(ds, options.scale * token.q[i_k], d_o);
                    axpy(dv, token.k[i_k], ds);
                    axpy(&mut dr, token.b[i_k], ds);
                    axpy(&mut r, token.a[i_k], &before[i_k * shape.v..][..shape.v]);
                }
                let dq = kh.row_mut(&mut dx.dq, i_t);
                let dk = kh.row_mut(&mut dx.dk, i_t);
                let da = kh.row_mut(&mut dx.da, i_t);
                let db = kh.row_mut(&mut dx.db, i_t);
                let dg = kh.row_mut(&mut dx.dg, i_t);
                for (i_k, ds) in d_state.chunks_exact_mut(shape.v).enumerate() {
                    let before = &before[i_k * shape.v..][..shape.v];
                    let after = &after[i_k * shape.v..][..shape.v];
                    let decay = token.g[i_k].exp();
                    dq[i_k] = options.scale * dot(after, d_o);
                    dk[i_k] = dot(ds, token.v);
                    db[i_k] = dot(ds, &r);
                    da[i_k] = dot(before, &dr);
                    dg[i_k] = decay * dot(before, ds);
                    for (ds, &dr) in ds.iter_mut().zip(&dr) {
                        *ds = decay * *ds + token.a[i_k] * dr;
                    }
                }
            },
        );
    }
    dx
}

/// The chunk form: one triangular inverse and a few matrix products per chunk.
///
/// Rows i and j of a chunk; E(i, j) is the decay after j through i, E'(i, j) that until just before i; both run from
/// the start of the chunk when j is left out, and to its end when i is.
///
/// ```text
/// A_qk, A_qb = scale sum_k q_i {k, b}_j E(i, j)      j <= i
/// A_ak, A_ab = sum_k a_i {k, b}_j E'(i, j)           j < i
/// P = (I - A_ab)^-1        u = P (A_ak v + (a E') S)            the values a_t^T S_{t-1}
/// o = scale (q E) S + A_qk v + A_qb u
/// S <- diag(E) S + (k E)^T v + (b E)^T u
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
    for place in places(shape) {
        let final_state = state_mut(&mut y.final_state, place.slot, state_len);
        let mut state = Matrix::new(shape.k, shape.v, final_state);
        for tokens in chunks(place.tokens.clone().collect(), options.chunk) {
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
/// With dS the gradient of the state after the chunk and the names of [`chunk_fwd`]:
///
/// ```text
/// du = A_qb^T do + (b E) dS            z = P^T du
/// dv = A_qk^T do + (k E) dS + A_ak^T z
/// dA_qk = scale tril(do v^T)           dA_qb = scale tril(do u^T)
/// dA_ak = stril(z v^T)                 dA_ab = stril(z u^T)
/// dq_i = scale (do_i S^T) E_i + sum_j (dA_qk k_j + dA_qb b_j) E(i, j)
/// da_i = (z_i S^T) E'_i + sum_j (dA_ak k_j + dA_ab b_j) E'(i, j)
/// dk_j = (v_j dS^T) E_j + sum_i dA_qk q_i E(i, j) + dA_ak a_i E'(i, j)        db_j alike, from u, dA_qb and dA_ab
/// dg_t = sum_{s >= t} (q dq + a da - k dk - b db)_s - (a da)_t + last
/// last = E rowsum(S * dS) + sum_t (k E) (v dS^T) + (b E) (u dS^T)
/// dS <- diag(E) dS + scale (q E)^T do + (a E')^T z
/// ```
///
/// `dg` is a difference of larger terms when the decay is strong; [`recurrent_bwd`] forms it without.
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
    for place in places(shape) {
        let initial_state = or_zeros(x.initial_state.map(|s| state(s, place.slot, state_len)), state_len);
        let mut states = vec![Matrix::new(shape.k, shape.v, &initial_state)];
        let chunks = chunks(place.tokens.clone().collect(), options.chunk);
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
            place.k.scatter(&mut dx.dq, tokens, &grads.dq);
            place.k.scatter(&mut dx.dk, tokens, &grads.dk);
            place.v.scatter(&mut dx.dv, tokens, &grads.dv);
            place.k.scatter(&mut dx.da, tokens, &grads.da);
            place.k.scatter(&mut dx.db, tokens, &grads.db);
            place.k.scatter(&mut dx.dg, tokens, &grads.dg);
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
        check::len("q", self.q, &keys);
        check::len("k", self.k, &keys);
        check::len("v", self.v, &[seqs.tokens(), *h, *v]);
        check::len("a", self.a, &keys);
        check::len("b", self.b, &keys);
        check::len("g", self.g, &keys);
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
            dq: keys(),
            dk: keys(),
            dv: vec![F::zero(); self.v.len()],
            da: keys(),
            db: keys(),
            dg: keys(),
            d_initial_state: or_zeros(dy.d_final_state, shape.seqs.n() * shape.h * shape.k * shape.v),
        }
    }

    fn token(&self, kh: &Head, vh: &Head, i_t: usize) -> Token<'a, F> {
        Token {
            q: kh.row(self.q, i_t),
            k: kh.row(self.k, i_t),
            v: vh.row(self.v, i_t),
            a: kh.row(self.a, i_t),
            b: kh.row(self.b, i_t),
            g: kh.row(self.g, i_t),
        }
    }
}

/// One head of one sequence.
#[derive(Clone, Debug)]
struct Place {
    /// Rows of the token axis.
    tokens: Range<usize>,
    /// Which of the N * H states.
    slot: usize,
    /// Rows of K elements.
    k: Head,
    /// Rows of V elements.
    v: Head,
}

fn places(shape: &Shape) -> Vec<Place> {
    let heads = shape.h;
    let mut places = Vec::with_capacity(shape.seqs.n() * heads);
    for i_n in 0..shape.seqs.n() {
        for i_h in 0..heads {
            places.push(Place {
                tokens: shape.seqs.range(i_n),
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
    q: &'a [F],
    k: &'a [F],
    v: &'a [F],
    a: &'a [F],
    b: &'a [F],
    g: &'a [F],
}

/// Moves the state past one token and reads it, without the scale.
fn step<F: Float>(state: &mut [F], token: &Token<F>, decay: &mut [F], o: &mut [F]) {
    const BLOCK: usize = 16;
    for (decay, g) in decay.iter_mut().zip(token.g) {
        *decay = g.exp();
    }
    // Columns do not meet. In blocks, what is summed over the rows stays in registers.
    let (v_blocks, v_rest) = token.v.as_chunks::<BLOCK>();
    let (o_blocks, o_rest) = o.as_chunks_mut::<BLOCK>();
    for (i, (v, o)) in v_blocks.iter().zip(o_blocks).enumerate() {
        *o = step_columns(state, token, decay, Columns { first: i * BLOCK, v: *v });
    }
    let done = token.v.len() - v_rest.len();
    for (i, (&v, o)) in v_rest.iter().zip(o_rest).enumerate() {
        [*o] = step_columns(state, token, decay, Columns { first: done + i, v: [v] });
    }
}

/// Some columns of a state, and what is written to them.
#[derive(Clone, Copy, Debug)]
struct Columns<F, const N: usize> {
    first: usize,
    v: [F; N],
}

fn step_columns<F: Float, const N: usize>(
    state: &mut [F],
    token: &Token<F>,
    decay: &[F],
    columns: Columns<F, N>,
) -> [F; N] {
    let Columns { first, v } = columns;
    let width = token.v.len();
    let mut r = [F::zero(); N];
    for (row, &a) in state.chunks_exact(width).zip(token.a) {
        let row = &row[first..][..N];
        for i in 0..N {
            r[i] = r[i] + a * row[i];
        }
    }
    let mut o = [F::zero(); N];
    let rows = state.chunks_exact_mut(width).zip(decay).zip(token.b).zip(token.k).zip(token.q);
    for ((((row, &decay), &b), &k), &q) in rows {
        let row = &mut row[first..][..N];
        for i in 0..N {
            row[i] = decay * row[i] + b * r[i] + k * v[i];
            o[i] = o[i] + q * row[i];
        }
    }
    o
}

/// What a chunk computes before it meets the state.
#[derive(Clone, Debug)]
struct Chunk<F> {
    scale: F,
    q: Matrix<F>,
    k: Matrix<F>,
    v: Matrix<F>,
    a: Matrix<F>,
    b: Matrix<F>,
    decays: Decays<F>,
    /// `[C, C]`
    a_qk: Matrix<F>,
    /// `[C, C]`
    a_qb: Matrix<F>,
    /// `[C, C]`
    a_ak: Matrix<F>,
    /// `[C, C]`  (I - A_ab)^-1
    p: Matrix<F>,
    /// `[C, K]`  q E, from the start
    q_decayed: Matrix<F>,
    /// `[C, K]`  a E', from the start
    a_decayed: Matrix<F>,
    /// `[C, K]`  k E, to the end
    k_decayed: Matrix<F>,
    /// `[C, K]`  b E, to the end
    b_decayed: Matrix<F>,
}

#[derive(Clone, Debug)]
struct ChunkGrads<F> {
    dq: Matrix<F>,
    dk: Matrix<F>,
    dv: Matrix<F>,
    da: Matrix<F>,
    db: Matrix<F>,
    dg: Matrix<F>,
    /// Of the state before the chunk.
    d_state: Matrix<F>,
}

impl<F: Float> Chunk<F> {
    fn new(x: &Inputs<F>, place: &Place, tokens: &[usize], scale: F) -> Chunk<F> {
        let n = tokens.len();
        let (q, k, v) =
            (place.k.gather(x.q, tokens), place.k.gather(x.k, tokens), place.v.gather(x.v, tokens));
        let (a, b) = (place.k.gather(x.a, tokens), place.k.gather(x.b, tokens));
        let decays = Decays::new(&place.k.gather(x.g, tokens));
        let (mut a_qk, mut a_qb) = (Matrix::zeros(n, n), Matrix::zeros(n, n));
        let (mut a_ak, mut minus_a_ab) = (Matrix::zeros(n, n), Matrix::zeros(n, n));
        decays.pairs(|Pair { i, j, through, until }| {
            a_qk.set(i, j, scale * dot3(q.row(i), k.row(j), through));
            a_qb.set(i, j, scale * dot3(q.row(i), b.row(j), through));
            if j < i {
                a_ak.set(i, j, dot3(a.row(i), k.row(j), until));
                minus_a_ab.set(i, j, -dot3(a.row(i), b.row(j), until));
            }
        });
        Chunk {
            scale,
            p: inverse(&minus_a_ab),
            q_decayed: q.clone().hadamard(&decays.start_through),
            a_decayed: a.clone().hadamard(&decays.start_until),
            k_decayed: k.clone().hadamard(&decays.to_end),
            b_decayed: b.clone().hadamard(&decays.to_end),
            q,
            k,
            v,
            a,
            b,
            decays,
            a_qk,
            a_qb,
            a_ak,
        }
    }

    /// `[C, V]`  a_t^T S_{t-1} of every row.
    fn u(&self, state: &Matrix<F>) -> Matrix<F> {
        self.p.times(&self.a_ak.times(&self.v).plus(&self.a_decayed.times(state)))
    }

    fn output(&self, state: &Matrix<F>) -> Matrix<F> {
        let inter = self.q_decayed.times(state).scaled(self.scale);
        inter.plus(&self.a_qk.times(&self.v)).plus(&self.a_qb.times(&self.u(state)))
    }

    fn state_after(&self, state: &Matrix<F>) -> Matrix<F> {
        let kept = state.clone().rows_scaled(&self.decays.whole);
        kept.plus(&self.k_decayed.t_times(&self.v)).plus(&self.b_decayed.t_times(&self.u(state)))
    }

    fn bwd(&self, state: &Matrix<F>, d_o: &Matrix<F>, d_state: &Matrix<F>) -> ChunkGrads<F> {
        let u = self.u(state);
        let du = self.a_qb.t_times(d_o).plus(&self.b_decayed.times(d_state));
        let z = self.p.t_times(&du);
        let dv = self.a_qk.t_times(d_o).plus(&self.k_decayed.times(d_state)).plus(&self.a_ak.t_times(&z));

        let da_qk = d_o.times_t(&self.v).scaled(self.scale);
        let da_qb = d_o.times_t(&u).scaled(self.scale);
        let da_ak = z.times_t(&self.v);
        let da_ab = z.times_t(&u);

        let mut dq = d_o.times_t(state).scaled(self.scale).hadamard(&self.decays.start_through);
        let mut da = z.times_t(state).hadamard(&self.decays.start_until);
        let dk_inter = self.v.times_t(d_state).hadamard(&self.decays.to_end);
        let db_inter = u.times_t(d_state).hadamard(&self.decays.to_end);
        let (mut dk, mut db) = (dk_inter.clone(), db_inter.clone());
        self.decays.pairs(|Pair { i, j, through, until }| {
            axpy2(dq.row_mut(i), da_qk.at(i, j), self.k.row(j), through);
            axpy2(dq.row_mut(i), da_qb.at(i, j), self.b.row(j), through);
            axpy2(dk.row_mut(j), da_qk.at(i, j), self.q.row(i), through);
            axpy2(db.row_mut(j), da_qb.at(i, j), self.q.row(i), through);
            if j < i {
                axpy2(da.row_mut(i), da_ak.at(i, j), self.k.row(j), until);
                axpy2(da.row_mut(i), da_ab.at(i, j), self.b.row(j), until);
                axpy2(dk.row_mut(j), da_ak.at(i, j), self.a.row(i), until);
                axpy2(db.row_mut(j), da_ab.at(i, j), self.a.row(i), until);
            }
        });

        let a_da = self.a.clone().hadamard(&da);
        let terms = self
            .q
            .clone()
            .hadamard(&dq)
            .plus(&a_da)
            .minus(&self.k.clone().hadamard(&dk))
            .minus(&self.b.clone().hadamard(&db));
        let mut dg = suffix_sums(terms).minus(&a_da);
        let written = self.k.clone().hadamard(&dk_inter).plus(&self.b.clone().hadamard(&db_inter)).col_sums();
        let kept = state.clone().rows_scaled(&self.decays.whole).row_dots(d_state);
        for i in 0..dg.rows {
            axpy(dg.row_mut(i), F::one(), &written);
            axpy(dg.row_mut(i), F::one(), &kept);
        }

        let d_state = d_state
            .clone()
            .rows_scaled(&self.decays.whole)
            .plus(&self.q_decayed.t_times(d_o).scaled(self.scale))
            .plus(&self.a_decayed.t_times(&z));
        ChunkGrads { dq, dk, dv, da, db, dg, d_state }
    }
}
