//! Checks that every operator with a state has to pass, stated once.
#![allow(dead_code)] // each test file uses its part

use std::collections::BTreeMap;

use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, REGIMES, Rng, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, relieved};
use fla_reference::{SeqLens, Shape, compare};
use num_traits::Float;
use proptest::prelude::{ProptestConfig, Strategy, prop};
use proptest::test_runner::RngSeed;

/// Tensors by name. Gradients carry the name of what they are the gradient of.
pub(crate) type Tensors<F> = BTreeMap<&'static str, Vec<F>>;

/// Which of the two forms computes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Recurrent,
    Chunk(usize),
}

/// What the first axis of a tensor counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Axis {
    Tokens,
    Sequences,
    /// One for all: a parameter, whose gradient sums over all tokens.
    Shared,
}

/// Which inputs to draw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw {
    pub(crate) gates: Gates,
    pub(crate) keys: Keys,
}

/// Which keys, or directions of a low-rank transition.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keys {
    /// Unit vectors, each with its own write strength.
    Random,
    /// The same unit vector everywhere, with write strength 1.
    Repeated,
}

pub(crate) const KEYS: [Keys; 2] = [Keys::Random, Keys::Repeated];

/// Inputs, and gradients of the outputs.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) x: Tensors<f64>,
    pub(crate) dy: Tensors<f64>,
}

impl Problem {
    pub(crate) fn new<O: Op>(op: &O, draw: Draw, seed: u64) -> Problem {
        let mut rng = Rng::new(seed);
        let x = op.random(&mut rng, draw);
        let y = op.fwd(Form::Recurrent, &x);
        Problem { dy: normal_like(&mut rng, &y), x }
    }
}

/// An operator of random shape, and what to draw for it.
#[derive(Clone, Debug)]
pub(crate) struct Random<O> {
    pub(crate) op: O,
    pub(crate) draw: Draw,
    pub(crate) seed: u64,
}

impl<O: Op> Random<O> {
    pub(crate) fn problem(&self) -> Problem {
        Problem::new(&self.op, self.draw, self.seed)
    }
}

/// A run of consecutive inputs and outputs with a state carried along.
pub(crate) trait Op {
    /// Input and output that hand the state over.
    const STATE_IN: &'static str;
    const STATE_OUT: &'static str;
    /// Inputs that are decays.
    const GATES: &'static [&'static str] = &[];
    /// Inputs x whose products x * dx a chunk form subtracts from each other to form the gradient of a decay.
    const GATE_TERMS: &'static [&'static str] = &[];

    /// How far two forms of the same mathematics may be apart in double precision.
    fn same(&self) -> f64 {
        SAME_IN_F64
    }

    fn seqs(&self) -> &SeqLens;
    fn with_seqs(&self, seqs: SeqLens) -> Self;
    fn axis(&self, name: &str) -> Axis;
    fn random(&self, rng: &mut Rng, draw: Draw) -> Tensors<f64>;
    fn fwd<F: Float>(&self, form: Form, x: &Tensors<F>) -> Tensors<F>;
    fn bwd<F: Float>(&self, form: Form, x: &Tensors<F>, dy: &Tensors<F>) -> Tensors<F>;
}

/// Two forms of the same mathematics in double precision, up to about a hundred tokens: rounding of 1.1e-16 per
/// operation leaves room for five digits of growth.
pub(crate) const SAME_IN_F64: f64 = 1e-11;

/// Central differences with step 1e-5: truncation about 1e-10, rounding of the loss about 1e-15 / 1e-5 = 1e-10, both
/// times derivatives and losses of up to a few hundred.
pub(crate) const DIFFERENCES: f64 = 1e-7;
const STEP: f64 = 1e-5;

/// Runs every case and reports all that failed at once.
#[track_caller]
pub(crate) fn report(failures: Vec<String>, cases: usize) {
    assert!(cases > 0, "no case ran");
    assert!(failures.is_empty(), "{} failures in {cases} cases:\n{}", failures.len(), failures.join("\n"));
}

pub(crate) fn tensors<F>(items: impl IntoIterator<Item = (&'static str, Vec<F>)>) -> Tensors<F> {
    items.into_iter().collect()
}

pub(crate) fn convert<F: Float>(x: &Tensors<f64>) -> Tensors<F> {
    x.iter().map(|(&name, x)| (name, x.iter().map(|&x| F::from(x).unwrap()).collect())).collect()
}

/// Normal numbers in the shape of every tensor.
pub(crate) fn normal_like(rng: &mut Rng, y: &Tensors<f64>) -> Tensors<f64> {
    y.iter().map(|(&name, y)| (name, rng.normal(y.len(), 1.0))).collect()
}

/// Names what differs by more than the limit.
pub(crate) fn differences<F: Float>(
    got: &Tensors<F>,
    want: &Tensors<f64>,
    mut judge: impl FnMut(&str, f64) -> (f64, f64),
) -> Vec<String> {
    let mut failures = Vec::new();
    if !got.keys().eq(want.keys()) {
        failures.push(format!("tensors {:?} instead of {:?}", got.keys(), want.keys()));
        return failures;
    }
    for (name, want) in want {
        let got = &got[name];
        if got.len() != want.len() {
            failures.push(format!("`{name}` holds {} elements instead of {}", got.len(), want.len()));
            continue;
        }
        let (error, limit) = judge(name, relative_rms(got, want));
        if error.is_nan() || error > limit {
            let at = compare::first_non_finite(got).map_or(String::new(), |i| format!(", not finite at {i}"));
            failures.push(format!("`{name}`: relative error {error:.1e} > {limit:.0e}{at}"));
        }
    }
    failures
}

/// How much larger the terms of a gate gradient are than the gradient.
pub(crate) fn cancellation<O: Op>(gate: &str, x: &Tensors<f64>, dx: &Tensors<f64>) -> f64 {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let terms: f64 = O::GATE_TERMS
        .iter()
        .map(|name| norm(&x[name].iter().zip(&dx[name]).map(|(x, dx)| x * dx).collect::<Vec<_>>()).powi(2))
        .sum();
    let size = norm(&dx[gate]);
    if size == 0.0 { 1.0 } else { terms.sqrt() / size }
}

/// The chunk form gives what the recurrent form gives, outputs and gradients.
pub(crate) fn forms_agree<O: Op>(op: &O, problem: &Problem, chunk: usize) -> Vec<String> {
    let Problem { x, dy } = problem;
    let same = |_: &str, error| (error, op.same());
    let (recurrent, chunked) = (Form::Recurrent, Form::Chunk(chunk));
    let mut failures = differences(&op.fwd(chunked, x), &op.fwd(recurrent, x), same);
    let dx = op.bwd(recurrent, x, dy);
    failures.extend(differences(&op.bwd(chunked, x, dy), &dx, |name, error| {
        let relief = if O::GATES.contains(&name) { cancellation::<O>(name, x, &dx) } else { 1.0 };
        (relieved(error, relief), op.same())
    }));
    failures
}

/// Gradients are those of the loss `sum y * dy`, by central differences of the recurrent forward pass.
pub(crate) fn gradients_hold<O: Op>(op: &O, form: Form, problem: &Problem) -> Vec<String> {
    let Problem { x, dy } = problem;
    let want = central_differences(problem, |x| op.fwd(Form::Recurrent, x));
    differences(&op.bwd(form, x, dy), &want, |_, error| (error, DIFFERENCES))
}

/// Gradients of the loss `sum y * dy` with respect to every element of every input.
pub(crate) fn central_differences(
    problem: &Problem,
    fwd: impl Fn(&Tensors<f64>) -> Tensors<f64>,
) -> Tensors<f64> {
    let Problem { x, dy } = problem;
    let loss = |x: &Tensors<f64>| -> f64 {
        let y = fwd(x);
        dy.iter().map(|(name, dy)| dy.iter().zip(&y[name]).map(|(dy, y)| dy * y).sum::<f64>()).sum()
    };
    let mut dx = Tensors::new();
    let mut moved = x.clone();
    for (&name, x) in x {
        let mut slopes = Vec::with_capacity(x.len());
        for (i, &middle) in x.iter().enumerate() {
            let mut loss_at = |at: f64| {
                moved.get_mut(name).unwrap()[i] = at;
                loss(&moved)
            };
            slopes.push((loss_at(middle + STEP) - loss_at(middle - STEP)) / (2.0 * STEP));
            loss_at(middle);
        }
        dx.insert(name, slopes);
    }
    dx
}

/// Computing in f32 stays within the limits of the table of the same in f64, on inputs that are exact in f32.
pub(crate) fn f32_holds<O: Op>(op: &O, form: Form, problem: &Problem, limit: f64) -> Vec<String> {
    let Problem { x, dy } = problem;
    let exact = |x: &Tensors<f64>| -> Tensors<f64> {
        x.iter().map(|(&name, x)| (name, round_to::<f32, f64>(x))).collect()
    };
    let (x, dy) = (exact(x), exact(dy));
    let (x_32, dy_32) = (convert::<f32>(&x), convert::<f32>(&dy));
    let mut failures = differences(&op.fwd(form, &x_32), &op.fwd(form, &x), |_, error| (error, limit));
    let dx = op.bwd(Form::Recurrent, &x, &dy);
    failures.extend(differences(&op.bwd(form, &x_32, &dy_32), &dx, |name, error| {
        let subtracts = matches!(form, Form::Chunk(_)) && O::GATES.contains(&name);
        let relief = if subtracts { cancellation::<O>(name, &x, &dx) } else { 1.0 };
        (relieved(error, relief), limit)
    }));
    failures
}

/// The part of the tensors that belongs to some tokens of one sequence.
fn part<O: Op>(op: &O, x: &Tensors<f64>, i_n: usize, tokens: &std::ops::Range<usize>) -> Tensors<f64> {
    let cut = |name: &str, x: &[f64]| {
        let of = |count: usize, range: std::ops::Range<usize>| {
            let width = x.len().checked_div(count).unwrap_or(0);
            x[range.start * width..range.end * width].to_vec()
        };
        match op.axis(name) {
            Axis::Tokens => of(op.seqs().tokens(), tokens.clone()),
            Axis::Sequences => of(op.seqs().n(), i_n..i_n + 1),
            Axis::Shared => x.to_vec(),
        }
    };
    x.iter().map(|(&name, x)| (name, cut(name, x))).collect()
}

/// Puts the results of parts after each other; what is shared adds up.
fn join<O: Op>(op: &O, parts: &[Tensors<f64>]) -> Tensors<f64> {
    let mut whole = Tensors::new();
    for part in parts {
        for (&name, x) in part {
            let joined: &mut Vec<f64> = whole.entry(name).or_default();
            if op.axis(name) == Axis::Shared && !joined.is_empty() {
                for (sum, x) in joined.iter_mut().zip(x) {
                    *sum += x;
                }
            } else {
                joined.extend(x);
            }
        }
    }
    whole
}

/// Sequences that are packed together give what each gives alone.
pub(crate) fn packing_changes_nothing<O: Op>(op: &O, form: Form, problem: &Problem) -> Vec<String> {
    let Problem { x, dy } = problem;
    let (mut ys, mut dxs) = (Vec::new(), Vec::new());
    for i_n in 0..op.seqs().n() {
        let tokens = op.seqs().range(i_n);
        let alone = op.with_seqs(SeqLens::Dense { b: 1, t: tokens.len() });
        let (x, dy) = (part(op, x, i_n, &tokens), part(op, dy, i_n, &tokens));
        ys.push(alone.fwd(form, &x));
        dxs.push(alone.bwd(form, &x, &dy));
    }
    let same = |_: &str, error| (error, op.same());
    let mut failures = differences(&op.fwd(form, x), &join(op, &ys), same);
    failures.extend(differences(&op.bwd(form, x, dy), &join(op, &dxs), same));
    failures
}

/// A sequence in two parts, with the state handed over, gives what it gives in one. `op` has one sequence.
pub(crate) fn splitting_changes_nothing<O: Op>(
    op: &O,
    form: Form,
    problem: &Problem,
    at: usize,
) -> Vec<String> {
    let Problem { x, dy } = problem;
    let t = op.seqs().tokens();
    let (first, second) =
        (op.with_seqs(SeqLens::Dense { b: 1, t: at }), op.with_seqs(SeqLens::Dense { b: 1, t: t - at }));
    let (x_1, mut x_2) = (part(op, x, 0, &(0..at)), part(op, x, 0, &(at..t)));
    let (mut dy_1, dy_2) = (part(op, dy, 0, &(0..at)), part(op, dy, 0, &(at..t)));

    let mut y_1 = first.fwd(form, &x_1);
    let handed = y_1.remove(O::STATE_OUT).unwrap();
    x_2.insert(O::STATE_IN, handed);
    let y_2 = second.fwd(form, &x_2);

    let mut dx_2 = second.bwd(form, &x_2, &dy_2);
    let handed = dx_2.remove(O::STATE_IN).unwrap();
    dy_1.insert(O::STATE_OUT, handed);
    let dx_1 = first.bwd(form, &x_1, &dy_1);

    let whole_dx = op.bwd(form, x, dy);
    let mut failures = differences(&join(op, &[y_1, y_2]), &op.fwd(form, x), |_, error| (error, op.same()));
    failures.extend(differences(&join(op, &[dx_1, dx_2]), &whole_dx, |name, error| {
        let subtracts = matches!(form, Form::Chunk(_)) && O::GATES.contains(&name);
        let relief = if subtracts { cancellation::<O>(name, x, &whole_dx) } else { 1.0 };
        (relieved(error, relief), op.same())
    }));
    failures
}

pub(crate) fn dense(b: usize, t: usize) -> SeqLens {
    SeqLens::Dense { b, t }
}

pub(crate) fn packed(lens: &[usize]) -> SeqLens {
    let mut cu_seqlens = vec![0];
    for len in lens {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + len);
    }
    SeqLens::Packed { cu_seqlens }
}

/// Lengths at the borders of chunks, and packed sequences with members that are easy to forget.
pub(crate) fn lengths() -> Vec<SeqLens> {
    vec![
        dense(2, 0),
        dense(2, 1),
        dense(1, 15),
        dense(1, 16),
        dense(2, 17),
        dense(1, 53),
        packed(&[0, 15, 1, 0, 33]),
    ]
}

/// Both forms, in every regime, for every length.
#[track_caller]
pub(crate) fn forms_agree_everywhere<O: Op>(op: &O, chunks: &[usize]) {
    let (mut failures, mut cases) = (Vec::new(), 0);
    for seqs in lengths() {
        let op = op.with_seqs(seqs);
        for keys in KEYS {
            for &gates in REGIMES {
                for &chunk in chunks {
                    let draw = Draw { gates, keys };
                    let problem = Problem::new(&op, draw, cases);
                    let found = forms_agree(&op, &problem, chunk);
                    failures.extend(
                        found.iter().map(|f| format!("{:?}, {draw:?}, chunk {chunk}: {f}", op.seqs())),
                    );
                    cases += 1;
                }
            }
        }
    }
    report(failures, cases as usize);
}

/// Gradients of the given forms, for a few short lengths and decays that differences can follow.
#[track_caller]
pub(crate) fn gradients_hold_everywhere<O: Op>(op: &O, forms: &[Form]) {
    let (mut failures, mut cases) = (Vec::new(), 0);
    for seqs in [dense(2, 7), dense(1, 1), packed(&[0, 4, 1, 0, 5])] {
        let op = op.with_seqs(seqs);
        for gates in [Gates::Constant(0.0), Gates::Constant(-0.6065), Gates::LogSigmoid, Gates::Mixed] {
            for &form in forms {
                let draw = Draw { gates, keys: Keys::Random };
                let problem = Problem::new(&op, draw, cases);
                let found = gradients_hold(&op, form, &problem);
                failures.extend(found.iter().map(|f| format!("{:?}, {draw:?}, {form:?}: {f}", op.seqs())));
                cases += 1;
            }
        }
    }
    report(failures, cases as usize);
}

/// f32 against f64, in every regime.
#[track_caller]
pub(crate) fn f32_holds_everywhere<O: Op>(op: &O, forms: &[Form], limit: f64) {
    let (mut failures, mut cases) = (Vec::new(), 0);
    for keys in KEYS {
        for &gates in REGIMES {
            for &form in forms {
                let draw = Draw { gates, keys };
                let problem = Problem::new(op, draw, cases);
                let found = f32_holds(op, form, &problem, limit);
                failures.extend(found.iter().map(|f| format!("{draw:?}, {form:?}: {f}")));
                cases += 1;
            }
        }
    }
    report(failures, cases as usize);
}

/// Without initial state and without gradient of the final state, as with zeros for both.
#[track_caller]
pub(crate) fn absent_states_are_zero<O: Op>(op: &O, forms: &[Form]) {
    let mut failures = Vec::new();
    let mut zero = Problem::new(op, Draw { gates: Gates::LogSigmoid, keys: Keys::Random }, 1);
    zero.x.get_mut(O::STATE_IN).unwrap().fill(0.0);
    zero.dy.get_mut(O::STATE_OUT).unwrap().fill(0.0);
    let mut absent = zero.clone();
    absent.x.remove(O::STATE_IN);
    absent.dy.remove(O::STATE_OUT);
    for &form in forms {
        let same = |_: &str, error| (error, 0.0);
        failures.extend(differences(&op.fwd(form, &absent.x), &op.fwd(form, &zero.x), same));
        let mut want = op.bwd(form, &zero.x, &zero.dy);
        want.remove(O::STATE_IN);
        failures.extend(differences(&op.bwd(form, &absent.x, &absent.dy), &want, same));
    }
    report(failures, forms.len());
}

/// The limit of a reference that computes in f32.
pub(crate) fn f32_limit(model: Model) -> f64 {
    let (backend, pass) = (Backend::Reference, Pass::RecurrentFwd);
    limit(Key { backend, model, pass, dtype: Dtype::F32, class: Class::Output }).unwrap()
}

/// Shapes nobody thought of, the same ones on every run, so that a failure can be looked at again.
pub(crate) fn shapes_nobody_thought_of() -> ProptestConfig {
    ProptestConfig {
        cases: 96,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    }
}

/// A few packed sequences, and heads of any size.
///
/// With one key channel, decay and removal can cancel to a state of which only rounding is left; so there are two at
/// least. Values go past two blocks of columns.
pub(crate) fn shapes() -> impl Strategy<Value = Shape> {
    let lens = prop::collection::vec(0usize..24, 1..4);
    (lens, 1usize..3, 2usize..10, 1usize..40).prop_map(|(lens, h, k, v)| Shape {
        seqs: packed(&lens),
        h,
        k,
        v,
    })
}

/// Any regime, with keys of their own for every token.
pub(crate) fn draws() -> impl Strategy<Value = Draw> {
    prop::sample::select(REGIMES).prop_map(|gates| Draw { gates, keys: Keys::Random })
}
