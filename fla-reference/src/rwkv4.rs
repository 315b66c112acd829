//! RWKV-4: an exponential average per channel, kept as numerator, denominator and running exponent.

use num_traits::Float;

use crate::chunk::chunks;
use crate::maps::number;
use crate::{SeqLens, check};

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences and their tokens.
    pub seqs: SeqLens,
    /// Channels (C of the model, not of a chunk).
    pub c: usize,
}

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[C]`  raw decay: a step multiplies the average by `exp(-exp(w))`
    pub w: &'a [F],
    /// `[C]`  bonus of the current token, in log space
    pub u: &'a [F],
    /// `[B, T, C]`  keys: log weights
    pub k: &'a [F],
    /// `[B, T, C]`  values
    pub v: &'a [F],
    /// `[N, 3, 1, C]`  numerator, denominator, running exponent; the fresh state (0, 0, -1e38) when absent
    pub initial_state: Option<&'a [F]>,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Rows of a chunk, at least 1; read by the chunk passes only.
    pub chunk: usize,
}

impl Options {
    /// Options with chunks of 64 rows.
    #[allow(clippy::new_without_default)] // Options have no default: what has no safe value is asked for.
    pub fn new() -> Options {
        Options { chunk: 64 }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options {
        Options { chunk, ..self }
    }
}

/// Outputs of a forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs<F> {
    /// `[B, T, C]`  weighted averages of the values
    pub o: Vec<F>,
    /// `[N, 3, 1, C]`  numerator, denominator, running exponent
    pub final_state: Vec<F>,
}

/// Gradients of the loss with respect to the outputs.
#[derive(Clone, Copy, Debug)]
pub struct OutputGrads<'a, F> {
    /// `[B, T, C]`  gradient of `o`
    pub d_o: &'a [F],
    /// `[N, 3, 1, C]`  gradient of the final triple; zero when absent
    pub d_final_state: Option<&'a [F]>,
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[C]`  with respect to the raw decay
    pub dw: Vec<F>,
    /// `[C]`
    pub du: Vec<F>,
    /// `[B, T, C]`
    pub dk: Vec<F>,
    /// `[B, T, C]`
    pub dv: Vec<F>,
    /// `[N, 3, 1, C]`  also when there was no initial state: the gradient at the fresh one
    pub d_initial_state: Vec<F>,
}

/// The exponent of a state that has seen nothing: finite, and below every key.
const FRESH_EXPONENT: f64 = -1e38;

/// The recurrence, token by token.
///
/// With the log decay l = -exp(w), and the state as numerator a, denominator b and exponent e:
///
/// ```text
/// m = max(u + k_t, e)        o_t = (exp(e - m) a + exp(u + k_t - m) v_t) / (exp(e - m) b + exp(u + k_t - m))
/// e' = max(l + e, k_t)       a <- exp(l + e - e') a + exp(k_t - e') v_t        b <- the same with v_t = 1
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, _options: &Options) -> Outputs<F> {
    x.check(shape);
    let mut y = x.zero_outputs(shape);
    for i_n in 0..shape.seqs.n() {
        for i_c in 0..shape.c {
            let channel = x.channel(shape, i_n, i_c);
            let mut state = channel.initial_state;
            let o: Vec<F> = (0..channel.k.len())
                .map(|i| {
                    let o = channel.read(&state, i).o;
                    state = channel.advance(&state, i);
                    o
                })
                .collect();
            y.put(shape, Column { i_n, i_c }, &o, &state);
        }
    }
    y
}

/// Reverse-mode differentiation of the recurrence, token by token.
///
/// The maximum m cancels in the quotient and has no gradient; that of e' goes to the side that won, to the key in a
/// tie.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    _options: &Options,
) -> Grads<F> {
    x.check(shape);
    dy.check(shape);
    let mut dx = x.zero_grads(shape);
    for i_n in 0..shape.seqs.n() {
        for i_c in 0..shape.c {
            let column = Column { i_n, i_c };
            let grads = recurrent_channel_bwd(&x.channel(shape, i_n, i_c), &dy.channel(shape, column));
            dx.put(shape, column, &grads);
        }
    }
    dx
}

/// The chunk form: every chunk is summed up by a triple of its own, the triples are combined in order, and every chunk
/// is read from the state at its start.
///
/// The triple of n tokens and the state before them combine into the state after them:
///
/// ```text
/// e' = max(n l + e, e_n)        a' = exp(n l + e - e') a + exp(e_n - e') a_n        b' alike
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options) -> Outputs<F> {
    x.check(shape);
    let mut y = x.zero_outputs(shape);
    for i_n in 0..shape.seqs.n() {
        for i_c in 0..shape.c {
            let channel = x.channel(shape, i_n, i_c);
            let mut seed = channel.initial_state;
            let mut o = Vec::with_capacity(channel.k.len());
            for rows in chunks((0..channel.k.len()).collect(), options.chunk) {
                let mut state = seed;
                for &i in &rows {
                    o.push(channel.read(&state, i).o);
                    state = channel.advance(&state, i);
                }
                seed = channel.combine(&seed, &channel.summary(&rows));
            }
            y.put(shape, Column { i_n, i_c }, &o, &seed);
        }
    }
    y
}

/// Gradients of the chunk form, last chunk first.
///
/// In the sums themselves, A = a exp(e) and B = b exp(e), everything but the last exponent is linear. Their gradients
/// after token t are (P_t, R_t), and with D the denominator of the quotient:
///
/// ```text
/// h_t = do_t / D_t        P_{t-1} = exp(l) P_t + h_t        R_{t-1} = exp(l) R_t - h_t o_t
/// dv_t = exp(k_t) P_t + exp(u + k_t) h_t
/// dk_t = exp(k_t) (v_t P_t + R_t) + exp(u + k_t) h_t (v_t - o_t)
/// du = sum_t exp(u + k_t) h_t (v_t - o_t)        dl = sum_t exp(l) (A_{t-1} P_t + B_{t-1} R_t)
/// ```
///
/// P and R share an exponent of their own, as A and B do, and are combined over chunks alike. The gradient of the last
/// exponent goes to the token, or the initial state, whose decayed exponent it is.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn chunk_bwd<F: Float>(shape: &Shape, x: &Inputs<F>, dy: &OutputGrads<F>, options: &Options) -> Grads<F> {
    x.check(shape);
    dy.check(shape);
    let mut dx = x.zero_grads(shape);
    for i_n in 0..shape.seqs.n() {
        for i_c in 0..shape.c {
            let column = Column { i_n, i_c };
            let channel = x.channel(shape, i_n, i_c);
            let rows = chunks((0..channel.k.len()).collect(), options.chunk);
            let grads = chunk_channel_bwd(&channel, &dy.channel(shape, column), &rows);
            dx.put(shape, column, &grads);
        }
    }
    dx
}

/// Numerator, denominator and exponent of one channel; also their gradients.
#[derive(Clone, Copy, Debug)]
struct Triple<F> {
    a: F,
    b: F,
    e: F,
}

/// One channel of one sequence.
#[derive(Clone, Copy, Debug)]
struct Column {
    i_n: usize,
    i_c: usize,
}

impl Column {
    /// Where the channel lies in a row of the token axis.
    fn token(&self, shape: &Shape, i_t: usize) -> usize {
        i_t * shape.c + self.i_c
    }

    /// Where the channel lies in row `i` of the state.
    fn state(&self, shape: &Shape, i: usize) -> usize {
        (self.i_n * 3 + i) * shape.c + self.i_c
    }
}

/// What the operator knows of one channel of one sequence.
#[derive(Clone, Debug)]
struct Channel<F> {
    /// -exp(w)
    log_decay: F,
    u: F,
    k: Vec<F>,
    v: Vec<F>,
    initial_state: Triple<F>,
}

/// What a token reads.
#[derive(Clone, Copy, Debug)]
struct Read<F> {
    o: F,
    /// Denominator, without its exponent.
    denominator: F,
    /// Exponent of numerator and denominator.
    m: F,
    /// Weight of the state.
    old: F,
    /// Weight of the token.
    new: F,
    /// v - o, which is formed without a difference of what is nearly equal when the token has almost all weight
    miss: F,
}

impl<F: Float> Channel<F> {
    fn read(&self, state: &Triple<F>, i: usize) -> Read<F> {
        let m = (self.u + self.k[i]).max(state.e);
        let old = (state.e - m).exp();
        let new = (self.u + self.k[i] - m).exp();
        let denominator = old * state.b + new;
        Read {
            o: (old * state.a + new * self.v[i]) / denominator,
            denominator,
            m,
            old,
            new,
            miss: old * (state.b * self.v[i] - state.a) / denominator,
        }
    }

    fn advance(&self, state: &Triple<F>, i: usize) -> Triple<F> {
        let token = Summary { n: 1, triple: Triple { a: self.v[i], b: F::one(), e: self.k[i] } };
        self.combine(state, &token)
    }

    fn combine(&self, state: &Triple<F>, summary: &Summary<F>) -> Triple<F> {
        let decayed = state.e + self.decay_of(summary.n);
        let e = decayed.max(summary.triple.e);
        let old = (decayed - e).exp();
        let new = (summary.triple.e - e).exp();
        Triple { a: old * state.a + new * summary.triple.a, b: old * state.b + new * summary.triple.b, e }
    }

    /// The triple of a run of tokens by themselves. A run has at least one.
    fn summary(&self, rows: &[usize]) -> Summary<F> {
        let first = rows[0];
        let mut triple = Triple { a: self.v[first], b: F::one(), e: self.k[first] };
        for &i in &rows[1..] {
            triple = self.advance(&triple, i);
        }
        Summary { n: rows.len(), triple }
    }

    /// Log decay of `n` tokens.
    fn decay_of(&self, n: usize) -> F {
        self.log_decay * number(n as f64)
    }
}

/// A run of tokens, without what was before.
#[derive(Clone, Copy, Debug)]
struct Summary<F> {
    n: usize,
    triple: Triple<F>,
}

/// Gradients of the outputs of one channel.
#[derive(Clone, Debug)]
struct ChannelOutputGrads<F> {
    d_o: Vec<F>,
    d_final_state: Triple<F>,
}

/// Gradients of the inputs of one channel.
#[derive(Clone, Debug)]
struct ChannelGrads<F> {
    dw: F,
    du: F,
    dk: Vec<F>,
    dv: Vec<F>,
    d_initial_state: Triple<F>,
}

fn recurrent_channel_bwd<F: Float>(x: &Channel<F>, dy: &ChannelOutputGrads<F>) -> ChannelGrads<F> {
    let mut states = vec![x.initial_state];
    for i in 0..x.k.len() {
        states.push(x.advance(&states[i], i));
    }
    let zeros = vec![F::zero(); x.k.len()];
    let mut d_log_decay = F::zero();
    let mut dx = ChannelGrads {
        dw: F::zero(),
        du: F::zero(),
        dk: zeros.clone(),
        dv: zeros,
        d_initial_state: dy.d_final_state,
    };
    let d_state = &mut dx.d_initial_state;
    for i in (0..x.k.len()).rev() {
        let (before, after) = (states[i], states[i + 1]);

        // The update.
        let decayed = before.e + x.log_decay;
        let old = (decayed - after.e).exp();
        let new = (x.k[i] - after.e).exp();
        let d_old = old * (before.a * d_state.a + before.b * d_state.b);
        let d_new = new * (x.v[i] * d_state.a + d_state.b);
        let d_max = d_state.e - d_old - d_new;
        let (d_decayed, d_key) =
            if decayed > x.k[i] { (d_old + d_max, d_new) } else { (d_old, d_new + d_max) };
        d_log_decay = d_log_decay + d_decayed;
        dx.dv[i] = new * d_state.a;
        dx.dk[i] = d_key;
        *d_state = Triple { a: old * d_state.a, b: old * d_state.b, e: d_decayed };

        // The readout of the state before.
        let read = x.read(&before, i);
        let d_numerator = dy.d_o[i] / read.denominator;
        let d_denominator = -d_numerator * read.o;
        let d_bonus = read.new * d_numerator * read.miss;
        dx.du = dx.du + d_bonus;
        dx.dk[i] = dx.dk[i] + d_bonus;
        dx.dv[i] = dx.dv[i] + read.new * d_numerator;
        // Raising both exponents alike changes nothing.
        d_state.e = d_state.e - d_bonus;
        d_state.a = d_state.a + read.old * d_numerator;
        d_state.b = d_state.b + read.old * d_denominator;
    }
    // The log decay is -exp(w), which is its own derivative.
    dx.dw = d_log_decay * x.log_decay;
    dx
}

fn chunk_channel_bwd<F: Float>(
    x: &Channel<F>,
    dy: &ChannelOutputGrads<F>,
    chunks: &[Vec<usize>],
) -> ChannelGrads<F> {
    let mut seeds = vec![x.initial_state];
    for rows in chunks {
        seeds.push(x.combine(&seeds[seeds.len() - 1], &x.summary(rows)));
    }
    let last = seeds[chunks.len()];

    let zeros = vec![F::zero(); x.k.len()];
    let mut d_log_decay = F::zero();
    let mut dx = ChannelGrads {
        dw: F::zero(),
        du: F::zero(),
        dk: zeros.clone(),
        dv: zeros,
        d_initial_state: Triple { a: F::zero(), b: F::zero(), e: F::zero() },
    };
    // P and R after the last token: the final a and b are A and B without the last exponent.
    let d_last = dy.d_final_state;
    let mut d_seed = Triple { a: d_last.a, b: d_last.b, e: -last.e };
    for (rows, seed) in chunks.iter().zip(&seeds).rev() {
        let mut states = vec![*seed];
        for &i in rows {
            states.push(x.advance(&states[states.len() - 1], i));
        }
        let reads: Vec<Read<F>> = rows.iter().zip(&states).map(|(&i, state)| x.read(state, i)).collect();
        // The gradient that token i has for the sums it reads: h and -h o, with exponent -m.
        let reading = |row: usize| {
            let Read { o, denominator, m, .. } = reads[row];
            let h = dy.d_o[rows[row]] / denominator;
            Triple { a: h, b: -h * o, e: -m }
        };

        let mut d_state = d_seed;
        for (row, &i) in rows.iter().enumerate().rev() {
            let before = states[row];
            // Each exponent is at most 0: a later state has at least the exponent of what went into it.
            let from_key = (x.k[i] + d_state.e).exp();
            let from_state = (before.e + x.log_decay + d_state.e).exp();
            let h = reading(row).a;
            let d_bonus = reads[row].new * h * reads[row].miss;
            dx.dv[i] = from_key * d_state.a + reads[row].new * h;
            dx.dk[i] = from_key * (x.v[i] * d_state.a + d_state.b) + d_bonus;
            dx.du = dx.du + d_bonus;
            d_log_decay = d_log_decay + from_state * (before.a * d_state.a + before.b * d_state.b);
            d_state = x.combine(&d_state, &Summary { n: 1, triple: reading(row) });
        }

        let mut local = reading(rows.len() - 1);
        for row in (0..rows.len() - 1).rev() {
            local = x.combine(&local, &Summary { n: 1, triple: reading(row) });
        }
        d_seed = x.combine(&d_seed, &Summary { n: rows.len(), triple: local });
    }

    let weight = (x.initial_state.e + d_seed.e).exp();
    let Triple { a, b, .. } = x.initial_state;
    dx.d_initial_state =
        Triple { a: weight * d_seed.a, b: weight * d_seed.b, e: weight * (a * d_seed.a + b * d_seed.b) };

    // What the last exponent adds, after a and b, which were divided by its exponential.
    let d_exponent = d_last.e - last.a * d_last.a - last.b * d_last.b;
    let mut winner = None;
    let mut exponent = x.initial_state.e;
    for (i, &k) in x.k.iter().enumerate() {
        exponent = exponent + x.log_decay;
        if exponent <= k {
            exponent = k;
            winner = Some(i);
        }
    }
    let steps = match winner {
        Some(i) => {
            dx.dk[i] = dx.dk[i] + d_exponent;
            x.k.len() - 1 - i
        }
        None => {
            dx.d_initial_state.e = dx.d_initial_state.e + d_exponent;
            x.k.len()
        }
    };
    d_log_decay = d_log_decay + d_exponent * number(steps as f64);
    dx.dw = d_log_decay * x.log_decay;
    dx
}

impl<F: Float> Inputs<'_, F> {
    #[track_caller]
    fn check(&self, shape: &Shape) {
        let Shape { seqs, c } = shape;
        seqs.check();
        check::len("w", self.w, &[*c]);
        check::len("u", self.u, &[*c]);
        check::len("k", self.k, &[seqs.tokens(), *c]);
        check::len("v", self.v, &[seqs.tokens(), *c]);
        check::len_opt("initial_state", self.initial_state, &[seqs.n(), 3, 1, *c]);
    }

    fn zero_outputs(&self, shape: &Shape) -> Outputs<F> {
        Outputs {
            o: vec![F::zero(); self.v.len()],
            final_state: vec![F::zero(); shape.seqs.n() * 3 * shape.c],
        }
    }

    fn zero_grads(&self, shape: &Shape) -> Grads<F> {
        Grads {
            dw: vec![F::zero(); shape.c],
            du: vec![F::zero(); shape.c],
            dk: vec![F::zero(); self.k.len()],
            dv: vec![F::zero(); self.v.len()],
            d_initial_state: vec![F::zero(); shape.seqs.n() * 3 * shape.c],
        }
    }

    fn channel(&self, shape: &Shape, i_n: usize, i_c: usize) -> Channel<F> {
        let column = Column { i_n, i_c };
        let gather = |x: &[F]| shape.seqs.range(i_n).map(|i_t| x[column.token(shape, i_t)]).collect();
        Channel {
            log_decay: -self.w[i_c].exp(),
            u: self.u[i_c],
            k: gather(self.k),
            v: gather(self.v),
            initial_state: self
                .initial_state
                .map_or(Triple { a: F::zero(), b: F::zero(), e: number(FRESH_EXPONENT) }, |states| {
                    column.triple(shape, states)
                }),
        }
    }
}

impl<F: Float> OutputGrads<'_, F> {
    #[track_caller]
    fn check(&self, shape: &Shape) {
        let Shape { seqs, c } = shape;
        check::len("d_o", self.d_o, &[seqs.tokens(), *c]);
        check::len_opt("d_final_state", self.d_final_state, &[seqs.n(), 3, 1, *c]);
    }

    fn channel(&self, shape: &Shape, column: Column) -> ChannelOutputGrads<F> {
        let tokens = shape.seqs.range(column.i_n);
        ChannelOutputGrads {
            d_o: tokens.map(|i_t| self.d_o[column.token(shape, i_t)]).collect(),
            d_final_state: self
                .d_final_state
                .map_or(Triple { a: F::zero(), b: F::zero(), e: F::zero() }, |states| {
                    column.triple(shape, states)
                }),
        }
    }
}

impl Column {
    fn triple<F: Float>(&self, shape: &Shape, states: &[F]) -> Triple<F> {
        let [a, b, e] = [0, 1, 2].map(|i| states[self.state(shape, i)]);
        Triple { a, b, e }
    }

    fn put_triple<F: Float>(&self, shape: &Shape, states: &mut [F], triple: &Triple<F>) {
        for (i, x) in [triple.a, triple.b, triple.e].into_iter().enumerate() {
            states[self.state(shape, i)] = x;
        }
    }
}

impl<F: Float> Outputs<F> {
    fn put(&mut self, shape: &Shape, column: Column, o: &[F], final_state: &Triple<F>) {
        for (i_t, &o) in shape.seqs.range(column.i_n).zip(o) {
            self.o[column.token(shape, i_t)] = o;
        }
        column.put_triple(shape, &mut self.final_state, final_state);
    }
}

impl<F: Float> Grads<F> {
    fn put(&mut self, shape: &Shape, column: Column, grads: &ChannelGrads<F>) {
        let i_c = column.i_c;
        self.dw[i_c] = self.dw[i_c] + grads.dw;
        self.du[i_c] = self.du[i_c] + grads.du;
        for (i, i_t) in shape.seqs.range(column.i_n).enumerate() {
            self.dk[column.token(shape, i_t)] = grads.dk[i];
            self.dv[column.token(shape, i_t)] = grads.dv[i];
        }
        column.put_triple(shape, &mut self.d_initial_state, &grads.d_initial_state);
    }
}
