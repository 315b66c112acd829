//! The elementwise functions on the GPU, both directions, against their float64 references.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, SeqLens};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_reference::{rwkv7 as reference, token_shift};
use fla_rwkv7::{
    ChannelMixingShape, ChannelShape, FusedAddcmul, FusedAddcmulBwd, FusedAddcmulBwdInputs,
    FusedAddcmulBwdOutputs, FusedAddcmulInputs, FusedAddcmulOutputs, FusedChannelMixing,
    FusedChannelMixingBwd, FusedChannelMixingBwdInputs, FusedChannelMixingBwdOutputs,
    FusedChannelMixingInputs, FusedChannelMixingOutputs, FusedGateOutputCorrection,
    FusedGateOutputCorrectionBwd, FusedGateOutputCorrectionBwdInputs, FusedGateOutputCorrectionBwdOutputs,
    FusedGateOutputCorrectionInputs, FusedGateOutputCorrectionOutputs, FusedKUpdate, FusedKUpdateBwd,
    FusedKUpdateBwdInputs, FusedKUpdateBwdOutputs, FusedKUpdateInputs, FusedKUpdateOutputs, FusedKkNorm,
    FusedKkNormBwd, FusedKkNormBwdInputs, FusedKkNormBwdOutputs, FusedKkNormInputs, FusedKkNormKUpdate,
    FusedKkNormKUpdateBwd, FusedKkNormKUpdateBwdInputs, FusedKkNormKUpdateBwdOutputs,
    FusedKkNormKUpdateInputs, FusedKkNormKUpdateOutputs, FusedKkNormOutputs, FusedTokenShift,
    FusedTokenShiftAddcmul, FusedTokenShiftAddcmulBwd, FusedTokenShiftAddcmulBwdInputs,
    FusedTokenShiftAddcmulBwdOutputs, FusedTokenShiftAddcmulInputs, FusedTokenShiftAddcmulOutputs,
    FusedTokenShiftBwd, FusedTokenShiftBwdInputs, FusedTokenShiftBwdOutputs, FusedTokenShiftInputs,
    FusedTokenShiftOutputs, HeadShape, Mixes,
};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, Strategy, prop_oneof, proptest};
use proptest::strategy::Just;

/// What is asked of every function, apart from the numbers. Functions of channels take D = H K.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    packed: Vec<usize>,
    b: usize,
    t: usize,
    h: usize,
    k: usize,
    /// Whether what is optional is there: caches and their gradients, and the sixth mix.
    optional: bool,
}

fn base() -> Case {
    Case { name: "", packed: Vec::new(), b: 2, t: 17, h: 3, k: 64, optional: true }
}

fn cases() -> Vec<Case> {
    let packed = |name, lens: &[usize]| Case { name, packed: lens.to_vec(), ..base() };
    vec![
        Case { name: "one token", t: 1, ..base() },
        Case { name: "one token, nothing optional", t: 1, optional: false, ..base() },
        Case { name: "two tokens", t: 2, ..base() },
        Case { name: "no token", t: 0, ..base() },
        Case { name: "no token, nothing optional", t: 0, optional: false, ..base() },
        Case { name: "no sequence", b: 0, ..base() },
        Case { name: "15 tokens", t: 15, ..base() },
        Case { name: "31 tokens", t: 31, ..base() },
        Case { name: "32 tokens", t: 32, ..base() },
        Case { name: "33 tokens, nothing optional", t: 33, optional: false, ..base() },
        Case { name: "65 tokens, 5 sequences", b: 5, t: 65, ..base() },
        Case { name: "1000 tokens", t: 1000, ..base() },
        Case { name: "3000 tokens of one sequence", b: 1, t: 3000, h: 4, ..base() },
        Case { name: "2 sequences of more than 65536 tokens", t: 66_000, h: 1, k: 8, ..base() },
        Case { name: "70000 sequences of one token", b: 70_000, t: 1, h: 1, k: 8, ..base() },
        Case { name: "decode, 33 sequences", b: 33, t: 1, h: 5, ..base() },
        packed("packed", &[3, 17, 1, 30]),
        packed("packed with empty members", &[0, 5, 0, 0, 1, 20, 0]),
        Case {
            optional: false,
            ..packed("packed with empty members, nothing optional", &[0, 5, 0, 0, 1, 20, 0])
        },
        packed("packed, all of one token", &[1, 1, 1, 1, 1]),
        packed("packed, one without tokens", &[0]),
        // As many sequences as the longest has tokens: taken for a decode step elsewhere.
        Case { packed: (1..=32).rev().collect(), ..packed("packed, 32 sequences of up to 32 tokens", &[]) },
        Case { packed: vec![2; 500], ..packed("packed, many of two tokens", &[]) },
        packed("packed, long ones", &[1000, 0, 1, 700, 3]),
        Case { name: "K = 128", k: 128, ..base() },
        Case { name: "K = 256", k: 256, h: 2, ..base() },
        Case { name: "K = 60: the last thread of a head has nothing", k: 60, ..base() },
        Case { name: "K = 100", k: 100, ..base() },
        Case { name: "K = 33: rows that no vector access fits", k: 33, h: 1, ..base() },
        Case { name: "K = 255: several pieces for a thread", k: 255, h: 1, ..base() },
        Case { name: "K = 4", k: 4, h: 7, ..base() },
        Case { name: "K = 6, D = 30", k: 6, h: 5, ..base() },
        Case { name: "K = 64, H = 40: many strips", h: 40, t: 70, ..base() },
        Case { name: "K = 36, H = 19, packed", h: 19, k: 36, ..packed("", &[2, 0, 90]) },
    ]
}

impl Case {
    fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    fn seqs(&self) -> SeqLens {
        if self.packed.is_empty() {
            SeqLens::dense(self.b, self.t)
        } else {
            SeqLens::packed(&self.cu_seqlens(), self.packed.iter().sum()).expect("valid lengths")
        }
    }

    fn channels(&self) -> ChannelShape {
        ChannelShape { seqs: self.seqs(), d: self.h * self.k }
    }

    fn heads(&self) -> HeadShape {
        HeadShape { seqs: self.seqs(), h: self.h, k: self.k }
    }

    fn tokens(&self) -> usize {
        self.seqs().b() * self.seqs().t()
    }

    fn shift_shape(&self) -> token_shift::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        token_shift::Shape { seqs, d: self.h * self.k }
    }

    fn norm_shape(&self) -> reference::KkNormShape {
        reference::KkNormShape { tokens: self.tokens(), h: self.h, k: self.k }
    }
}

/// A type that the kernels read and write, and that the reference's inputs are rounded to.
trait Sample: Poison + Storage {}
impl Sample for f32 {}
impl Sample for bf16 {}
impl Sample for f16 {}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

/// One function in one direction: runs on fresh buffers and says what it should have computed.
struct Test<'a> {
    device: &'a Device,
    stream: &'a Arc<CudaStream>,
    case: &'a Case,
    rng: Rng,
}

/// An input: the numbers that the kernel reads, and where it reads them.
struct Input<T: Poison> {
    values: Vec<f64>,
    memory: Guarded<T>,
}

/// An output after a run.
struct Got {
    name: &'static str,
    dtype: DType,
    values: Vec<f64>,
    want: Vec<f64>,
    class: Class,
}

impl Test<'_> {
    fn input<T: Sample>(&mut self, name: &str, len: usize) -> Input<T> {
        let values = self.rng.normal::<f64>(len, 1.0);
        self.with(name, &values)
    }

    fn with<T: Sample>(&mut self, name: &str, values: &[f64]) -> Input<T> {
        let values = round_to::<T, f64>(values);
        let typed: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
        Input { values, memory: Guarded::input(self.stream, name, &typed) }
    }

    fn optional<T: Sample>(&mut self, name: &str, len: usize) -> Option<Input<T>> {
        self.case.optional.then(|| self.input(name, len))
    }

    fn output<T: Poison>(&self, name: &str, len: usize) -> Guarded<T> {
        Guarded::output(self.stream, name, len)
    }

    fn workspace(&self, bytes: usize) -> fla_core::cudarc::driver::CudaSlice<u8> {
        // All ones: as f32, as bf16 and as f16 that is NaN.
        self.stream.clone_htod(&vec![0xff_u8; bytes]).expect("fits")
    }
}

impl<T: Poison> Input<T> {
    fn unchanged(&mut self) -> Result<(), String> {
        let now = self.memory.read_f64();
        if now == self.values { Ok(()) } else { Err("an input has been overwritten".into()) }
    }
}

fn got<T: Poison>(name: &'static str, output: &mut Guarded<T>, want: Vec<f64>, class: Class) -> Got {
    Got { name, dtype: T::DTYPE, values: output.read_f64(), want, class }
}

type Outcome = Result<Vec<Got>, String>;
type Function = fn(&mut Test<'_>) -> Outcome;

/// Runs a function twice on equal inputs and judges the results.
fn check(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    model: Model,
    function: Function,
) -> Result<(), String> {
    let run = || function(&mut Test { device, stream, case, rng: Rng::new(11) });
    let (first, second) = (run()?, run()?);
    let mut worst = Vec::new();
    for (a, b) in first.iter().zip(&second) {
        let bits = |got: &Got| got.values.iter().map(|x| *x as f32).collect::<Vec<_>>();
        same_bits(a.name, &bits(a), &bits(b))?;
        let key =
            Key { backend: Backend::Gpu, model, pass: Pass::Fused, dtype: dtype(a.dtype), class: a.class };
        let limit = limit(key).map_err(|error| error.to_string())?;
        let error = relative_rms(&a.values, &a.want);
        worst.push(format!("{} {error:.1e}", a.name));
        if error > limit {
            return Err(format!("`{}` is off by {error:.2e} > {limit:.0e}", a.name));
        }
    }
    println!(
        "{:?} {} {}: {}",
        model,
        case.name,
        first.first().map_or("", |got| got.dtype.name()),
        worst.join(", ")
    );
    Ok(())
}

fn check_all(test: &str, model: Model, functions: [Function; 3]) {
    let Some((device, stream)) = gpu(test) else { return };
    let cases = cases();
    run_cases(
        &cases,
        |case| case.name.to_owned(),
        |case| functions.iter().try_for_each(|function| check(&device, &stream, case, model, *function)),
    );
}

fn text(error: Error) -> String {
    error.to_string()
}

/// The optional views of a tensor, as inputs and outputs want them.
fn read<T: Poison>(view: &Option<impl DevicePtr<T>>) -> Option<&dyn DevicePtr<T>> {
    view.as_ref().map(|view| view as &dyn DevicePtr<T>)
}

fn write<T: Poison>(view: &mut Option<impl DevicePtrMut<T>>) -> Option<&mut dyn DevicePtrMut<T>> {
    view.as_mut().map(|view| view as &mut dyn DevicePtrMut<T>)
}

fn mixes(gate: bool) -> Mixes {
    if gate { Mixes::Six } else { Mixes::Five }
}

const MIXES: [&str; 6] = ["xr", "xw", "xk", "xv", "xa", "xg"];
const OUTS: [&str; 6] = ["out_r", "out_w", "out_k", "out_v", "out_a", "out_g"];
const D_OUTS: [&str; 6] = ["d_out_r", "d_out_w", "d_out_k", "d_out_v", "d_out_a", "d_out_g"];
const D_MIXES: [&str; 6] = ["dxr", "dxw", "dxk", "dxv", "dxa", "dxg"];

fn reference_mixes<'a, T: Poison>(
    hidden: &'a [f64],
    delta: &'a [f64],
    factors: &'a [Input<T>; 6],
    gate: bool,
) -> reference::AddcmulInputs<'a, f64> {
    let [xr, xw, xk, xv, xa, xg] = factors.each_ref().map(|factor| &factor.values[..]);
    reference::AddcmulInputs { hidden, delta, xr, xw, xk, xv, xa, xg: gate.then_some(xg) }
}

fn reference_d_outs<T: Poison>(d_outs: &[Input<T>; 6], gate: bool) -> reference::AddcmulOutputGrads<'_, f64> {
    let [d_out_r, d_out_w, d_out_k, d_out_v, d_out_a, d_out_g] = d_outs.each_ref().map(|d| &d.values[..]);
    reference::AddcmulOutputGrads {
        d_out_r,
        d_out_w,
        d_out_k,
        d_out_v,
        d_out_a,
        d_out_g: gate.then_some(d_out_g),
    }
}

fn mixes_got<T: Poison>(outs: &mut [Guarded<T>; 6], want: reference::AddcmulOutputs<f64>) -> Vec<Got> {
    let reference::AddcmulOutputs { out_r, out_w, out_k, out_v, out_a, out_g } = want;
    let want = [Some(out_r), Some(out_w), Some(out_k), Some(out_v), Some(out_a), out_g];
    let all = outs.iter_mut().zip(OUTS).zip(want);
    all.filter_map(|((out, name), want)| want.map(|want| got(name, out, want, Class::Output))).collect()
}

fn factors_got(outs: &mut [Guarded<f32>; 6], want: reference::AddcmulGrads<f64>) -> Vec<Got> {
    let reference::AddcmulGrads { dxr, dxw, dxk, dxv, dxa, dxg, .. } = want;
    let want = [Some(dxr), Some(dxw), Some(dxk), Some(dxv), Some(dxa), dxg];
    let all = outs.iter_mut().zip(D_MIXES).zip(want);
    all.filter_map(|((out, name), want)| want.map(|want| got(name, out, want, Class::Grad))).collect()
}

fn addcmul<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, gate) = (test.case.channels(), test.case.optional);
    let (mut hidden, mut delta) =
        (test.input::<T>("hidden", shape.len()), test.input::<T>("delta", shape.len()));
    let factors = MIXES.map(|name| test.input::<T>(name, shape.d));
    let mut outs = OUTS.map(|name| test.output::<T>(name, shape.len()));
    {
        let (hidden, delta) = (hidden.memory.view(), delta.memory.view());
        let [xr, xw, xk, xv, xa, xg] = factors.each_ref().map(|factor| factor.memory.view());
        let [out_r, out_w, out_k, out_v, out_a, out_g] = &mut outs.each_mut().map(|out| out.view_mut());
        let x = FusedAddcmulInputs {
            hidden: &hidden,
            delta: &delta,
            xr: &xr,
            xw: &xw,
            xk: &xk,
            xv: &xv,
            xa: &xa,
            xg: gate.then_some(&xg),
        };
        let out_g: Option<&mut dyn DevicePtrMut<T>> = if gate { Some(out_g) } else { None };
        let mut y = FusedAddcmulOutputs { out_r, out_w, out_k, out_v, out_a, out_g };
        let plan = FusedAddcmul::<T>::new(test.device, &shape, mixes(gate)).map_err(text)?;
        plan.run(test.stream, &x, &mut y).map_err(text)?;
    }
    hidden.unchanged()?;
    delta.unchanged()?;
    let rows = reference::AddcmulShape { tokens: test.case.tokens(), d: shape.d };
    let want = reference::addcmul_fwd(&rows, &reference_mixes(&hidden.values, &delta.values, &factors, gate));
    Ok(mixes_got(&mut outs, want))
}

fn addcmul_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, gate) = (test.case.channels(), test.case.optional);
    let mut delta = test.input::<T>("delta", shape.len());
    let factors = MIXES.map(|name| test.input::<T>(name, shape.d));
    let mut d_outs = D_OUTS.map(|name| test.input::<T>(name, shape.len()));
    let mut d_hidden = test.output::<T>("d_hidden", shape.len());
    let mut d_delta = test.output::<T>("d_delta", shape.len());
    let mut d_factors = D_MIXES.map(|name| test.output::<f32>(name, shape.d));
    {
        let delta = delta.memory.view();
        let [xr, xw, xk, xv, xa, xg] = factors.each_ref().map(|factor| factor.memory.view());
        let [d_out_r, d_out_w, d_out_k, d_out_v, d_out_a, d_out_g] =
            d_outs.each_ref().map(|d_out| d_out.memory.view());
        let [dxr, dxw, dxk, dxv, dxa, dxg] = &mut d_factors.each_mut().map(|out| out.view_mut());
        let x = FusedAddcmulBwdInputs {
            delta: &delta,
            xr: &xr,
            xw: &xw,
            xk: &xk,
            xv: &xv,
            xa: &xa,
            xg: gate.then_some(&xg),
            d_out_r: &d_out_r,
            d_out_w: &d_out_w,
            d_out_k: &d_out_k,
            d_out_v: &d_out_v,
            d_out_a: &d_out_a,
            d_out_g: gate.then_some(&d_out_g),
        };
        let dxg: Option<&mut dyn DevicePtrMut<f32>> = if gate { Some(dxg) } else { None };
        let (mut d_hidden, mut d_delta) = (d_hidden.view_mut(), d_delta.view_mut());
        let mut y = FusedAddcmulBwdOutputs {
            d_hidden: &mut d_hidden,
            d_delta: &mut d_delta,
            dxr,
            dxw,
            dxk,
            dxv,
            dxa,
            dxg,
        };
        let plan = FusedAddcmulBwd::<T>::new(test.device, &shape, mixes(gate)).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    delta.unchanged()?;
    d_outs.iter_mut().try_for_each(Input::unchanged)?;
    let rows = reference::AddcmulShape { tokens: test.case.tokens(), d: shape.d };
    let x = reference_mixes(&delta.values, &delta.values, &factors, gate);
    let mut want = reference::addcmul_bwd(&rows, &x, &reference_d_outs(&d_outs, gate));
    let mut out = vec![
        got("d_hidden", &mut d_hidden, std::mem::take(&mut want.d_hidden), Class::Grad),
        got("d_delta", &mut d_delta, std::mem::take(&mut want.d_delta), Class::Grad),
    ];
    out.extend(factors_got(&mut d_factors, want));
    Ok(out)
}

fn reference_shift_mixes<'a, T: Poison>(
    x: &'a [f64],
    cache: Option<&'a Input<T>>,
    factors: &'a [Input<T>; 6],
    gate: bool,
) -> reference::TokenShiftAddcmulInputs<'a, f64> {
    let [xr, xw, xk, xv, xa, xg] = factors.each_ref().map(|factor| &factor.values[..]);
    let cache = cache.map(|cache| &cache.values[..]);
    reference::TokenShiftAddcmulInputs { x, cache, xr, xw, xk, xv, xa, xg: gate.then_some(xg) }
}

fn token_shift_addcmul<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, gate) = (test.case.channels(), test.case.optional);
    let mut x = test.input::<T>("x", shape.len());
    let cache = test.optional::<T>("cache", shape.cache_len());
    let factors = MIXES.map(|name| test.input::<T>(name, shape.d));
    let mut outs = OUTS.map(|name| test.output::<T>(name, shape.len()));
    let mut cache_out = test.case.optional.then(|| test.output::<T>("cache_out", shape.cache_len()));
    {
        let (tokens, cache) = (x.memory.view(), cache.as_ref().map(|cache| cache.memory.view()));
        let [xr, xw, xk, xv, xa, xg] = factors.each_ref().map(|factor| factor.memory.view());
        let [out_r, out_w, out_k, out_v, out_a, out_g] = &mut outs.each_mut().map(|out| out.view_mut());
        let x = FusedTokenShiftAddcmulInputs {
            x: &tokens,
            cache: read(&cache),
            xr: &xr,
            xw: &xw,
            xk: &xk,
            xv: &xv,
            xa: &xa,
            xg: gate.then_some(&xg),
        };
        let out_g: Option<&mut dyn DevicePtrMut<T>> = if gate { Some(out_g) } else { None };
        let mut cache_out = cache_out.as_mut().map(|out| out.view_mut());
        let cache_out = write(&mut cache_out);
        let mut y = FusedTokenShiftAddcmulOutputs { out_r, out_w, out_k, out_v, out_a, out_g, cache_out };
        let plan = FusedTokenShiftAddcmul::<T>::new(test.device, &shape, mixes(gate)).map_err(text)?;
        plan.run(test.stream, &x, &mut y).map_err(text)?;
    }
    x.unchanged()?;
    let inputs = reference_shift_mixes(&x.values, cache.as_ref(), &factors, gate);
    let want = reference::token_shift_addcmul_fwd(&test.case.shift_shape(), &inputs);
    let mut out = mixes_got(&mut outs, want.mixes);
    out.extend(cache_out.as_mut().map(|last| got("cache_out", last, want.cache_out, Class::Output)));
    Ok(out)
}

fn token_shift_addcmul_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, gate) = (test.case.channels(), test.case.optional);
    let mut x = test.input::<T>("x", shape.len());
    let cache = test.optional::<T>("cache", shape.cache_len());
    let d_cache_out = test.optional::<T>("d_cache_out", shape.cache_len());
    let factors = MIXES.map(|name| test.input::<T>(name, shape.d));
    let mut d_outs = D_OUTS.map(|name| test.input::<T>(name, shape.len()));
    let mut dx = test.output::<T>("dx", shape.len());
    let mut d_cache = test.case.optional.then(|| test.output::<T>("d_cache", shape.cache_len()));
    let mut d_factors = D_MIXES.map(|name| test.output::<f32>(name, shape.d));
    {
        let (tokens, cache) = (x.memory.view(), cache.as_ref().map(|cache| cache.memory.view()));
        let d_cache_out = d_cache_out.as_ref().map(|cache| cache.memory.view());
        let [xr, xw, xk, xv, xa, xg] = factors.each_ref().map(|factor| factor.memory.view());
        let [d_out_r, d_out_w, d_out_k, d_out_v, d_out_a, d_out_g] =
            d_outs.each_ref().map(|d_out| d_out.memory.view());
        let [dxr, dxw, dxk, dxv, dxa, dxg] = &mut d_factors.each_mut().map(|out| out.view_mut());
        let x = FusedTokenShiftAddcmulBwdInputs {
            x: &tokens,
            cache: read(&cache),
            xr: &xr,
            xw: &xw,
            xk: &xk,
            xv: &xv,
            xa: &xa,
            xg: gate.then_some(&xg),
            d_out_r: &d_out_r,
            d_out_w: &d_out_w,
            d_out_k: &d_out_k,
            d_out_v: &d_out_v,
            d_out_a: &d_out_a,
            d_out_g: gate.then_some(&d_out_g),
            d_cache_out: read(&d_cache_out),
        };
        let dxg: Option<&mut dyn DevicePtrMut<f32>> = if gate { Some(dxg) } else { None };
        let mut d_cache = d_cache.as_mut().map(|out| out.view_mut());
        let (mut dx, d_cache) = (dx.view_mut(), write(&mut d_cache));
        let mut y = FusedTokenShiftAddcmulBwdOutputs { dx: &mut dx, d_cache, dxr, dxw, dxk, dxv, dxa, dxg };
        let plan = FusedTokenShiftAddcmulBwd::<T>::new(test.device, &shape, mixes(gate)).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    x.unchanged()?;
    d_outs.iter_mut().try_for_each(Input::unchanged)?;
    let inputs = reference_shift_mixes(&x.values, cache.as_ref(), &factors, gate);
    let last = d_cache_out.as_ref().map(|last| &last.values[..]);
    let want = reference::token_shift_addcmul_bwd(
        &test.case.shift_shape(),
        &inputs,
        &reference_d_outs(&d_outs, gate),
        last,
    );
    let mut out = vec![got("dx", &mut dx, want.dx, Class::Grad)];
    out.extend(d_cache.as_mut().map(|d_cache| got("d_cache", d_cache, want.d_cache, Class::Grad)));
    out.extend(factors_got(&mut d_factors, want.mixes));
    Ok(out)
}

fn token_shift_fwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.channels();
    let mut x = test.input::<T>("x", shape.len());
    let cache = test.optional::<T>("cache", shape.cache_len());
    let mut y = test.output::<T>("y", shape.len());
    let mut cache_out = test.case.optional.then(|| test.output::<T>("cache_out", shape.cache_len()));
    {
        let (tokens, cache) = (x.memory.view(), cache.as_ref().map(|cache| cache.memory.view()));
        let x = FusedTokenShiftInputs { x: &tokens, cache: read(&cache) };
        let mut cache_out = cache_out.as_mut().map(|out| out.view_mut());
        let (mut y, cache_out) = (y.view_mut(), write(&mut cache_out));
        let plan = FusedTokenShift::<T>::new(test.device, &shape).map_err(text)?;
        plan.run(test.stream, &x, &mut FusedTokenShiftOutputs { y: &mut y, cache_out }).map_err(text)?;
    }
    x.unchanged()?;
    let cache = cache.as_ref().map(|cache| &cache.values[..]);
    let want = token_shift::fwd(&test.case.shift_shape(), &token_shift::Inputs { x: &x.values, cache });
    let mut out = vec![got("y", &mut y, want.y, Class::Output)];
    out.extend(cache_out.as_mut().map(|last| got("cache_out", last, want.cache_out, Class::Output)));
    Ok(out)
}

fn token_shift_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.channels();
    let mut dy = test.input::<T>("dy", shape.len());
    let d_cache_out = test.optional::<T>("d_cache_out", shape.cache_len());
    let mut dx = test.output::<T>("dx", shape.len());
    let mut d_cache = test.case.optional.then(|| test.output::<T>("d_cache", shape.cache_len()));
    {
        let d_tokens = dy.memory.view();
        let d_cache_out = d_cache_out.as_ref().map(|cache| cache.memory.view());
        let x = FusedTokenShiftBwdInputs { dy: &d_tokens, d_cache_out: read(&d_cache_out) };
        let mut d_cache = d_cache.as_mut().map(|out| out.view_mut());
        let (mut dx, d_cache) = (dx.view_mut(), write(&mut d_cache));
        let plan = FusedTokenShiftBwd::<T>::new(test.device, &shape).map_err(text)?;
        plan.run(test.stream, &x, &mut FusedTokenShiftBwdOutputs { dx: &mut dx, d_cache }).map_err(text)?;
    }
    dy.unchanged()?;
    let d_cache_out = d_cache_out.as_ref().map(|cache| &cache.values[..]);
    let want = token_shift::bwd(
        &test.case.shift_shape(),
        &token_shift::Inputs { x: &dy.values, cache: None },
        &token_shift::OutputGrads { dy: &dy.values, d_cache_out },
    );
    let mut out = vec![got("dx", &mut dx, want.dx, Class::Grad)];
    out.extend(d_cache.as_mut().map(|d_cache| got("d_cache", d_cache, want.d_cache, Class::Grad)));
    Ok(out)
}

/// The factors of the unit key; around 1, so that no short key has a gradient that outweighs all others.
fn key_factors<T: Sample>(test: &mut Test<'_>, len: usize) -> Input<T> {
    let values = test.rng.uniform::<f64>(len, 0.5, 1.5);
    test.with("k_k", &values)
}

/// Rates lie between 0 and 1.
fn rates(test: &mut Test<'_>, len: usize) -> Vec<f64> {
    test.rng.uniform(len, 0.0, 1.0)
}

fn k_update<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.channels();
    let rates = rates(test, shape.len());
    let (mut k, mut a) = (test.input::<T>("k", shape.len()), test.with::<T>("a", &rates));
    let ka = test.input::<T>("ka", shape.d);
    let mut out = test.output::<T>("out", shape.len());
    {
        let (k, a, ka, mut out) = (k.memory.view(), a.memory.view(), ka.memory.view(), out.view_mut());
        let x = FusedKUpdateInputs { k: &k, a: &a, ka: &ka };
        let plan = FusedKUpdate::<T>::new(test.device, &shape).map_err(text)?;
        plan.run(test.stream, &x, &mut FusedKUpdateOutputs { out: &mut out }).map_err(text)?;
    }
    k.unchanged()?;
    a.unchanged()?;
    let rows = reference::KUpdateShape { tokens: test.case.tokens(), d: shape.d };
    let x = reference::KUpdateInputs { k: &k.values, a: &a.values, ka: &ka.values };
    Ok(vec![got("out", &mut out, reference::k_update_fwd(&rows, &x), Class::Output)])
}

fn k_update_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.channels();
    let rates = rates(test, shape.len());
    let (mut k, mut a) = (test.input::<T>("k", shape.len()), test.with::<T>("a", &rates));
    let (ka, mut d_out) = (test.input::<T>("ka", shape.d), test.input::<T>("d_out", shape.len()));
    let (mut dk, mut da) = (test.output::<T>("dk", shape.len()), test.output::<T>("da", shape.len()));
    let mut dka = test.output::<f32>("dka", shape.d);
    {
        let (k, a, ka, d_out) = (k.memory.view(), a.memory.view(), ka.memory.view(), d_out.memory.view());
        let (mut dk, mut da, mut dka) = (dk.view_mut(), da.view_mut(), dka.view_mut());
        let x = FusedKUpdateBwdInputs { k: &k, a: &a, ka: &ka, d_out: &d_out };
        let mut y = FusedKUpdateBwdOutputs { dk: &mut dk, da: &mut da, dka: &mut dka };
        let plan = FusedKUpdateBwd::<T>::new(test.device, &shape).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    [&mut k, &mut a, &mut d_out].into_iter().try_for_each(Input::unchanged)?;
    let rows = reference::KUpdateShape { tokens: test.case.tokens(), d: shape.d };
    let x = reference::KUpdateInputs { k: &k.values, a: &a.values, ka: &ka.values };
    let want = reference::k_update_bwd(&rows, &x, &d_out.values);
    Ok(vec![
        got("dk", &mut dk, want.dk, Class::Grad),
        got("da", &mut da, want.da, Class::Grad),
        got("dka", &mut dka, want.dka, Class::Grad),
    ])
}

fn kk_norm<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.heads();
    let mut k = test.input::<T>("k", shape.len());
    let k_k = key_factors::<T>(test, shape.parameter_len());
    let mut kk = test.output::<T>("kk", shape.len());
    {
        let (k, k_k, mut kk) = (k.memory.view(), k_k.memory.view(), kk.view_mut());
        let plan = FusedKkNorm::<T>::new(test.device, &shape).map_err(text)?;
        let x = FusedKkNormInputs { k: &k, k_k: &k_k };
        plan.run(test.stream, &x, &mut FusedKkNormOutputs { kk: &mut kk }).map_err(text)?;
    }
    k.unchanged()?;
    let x = reference::KkNormInputs { k: &k.values, k_k: &k_k.values };
    let want = reference::kk_norm_fwd(&test.case.norm_shape(), &x);
    Ok(vec![got("kk", &mut kk, want, Class::Output)])
}

fn kk_norm_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.heads();
    let (mut k, mut d_kk) = (test.input::<T>("k", shape.len()), test.input::<T>("d_kk", shape.len()));
    let k_k = key_factors::<T>(test, shape.parameter_len());
    let mut dk = test.output::<T>("dk", shape.len());
    let mut dk_k = test.output::<f32>("dk_k", shape.parameter_len());
    {
        let (k, k_k, d_kk) = (k.memory.view(), k_k.memory.view(), d_kk.memory.view());
        let (mut dk, mut dk_k) = (dk.view_mut(), dk_k.view_mut());
        let x = FusedKkNormBwdInputs { k: &k, k_k: &k_k, d_kk: &d_kk };
        let mut y = FusedKkNormBwdOutputs { dk: &mut dk, dk_k: &mut dk_k };
        let plan = FusedKkNormBwd::<T>::new(test.device, &shape).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    [&mut k, &mut d_kk].into_iter().try_for_each(Input::unchanged)?;
    let x = reference::KkNormInputs { k: &k.values, k_k: &k_k.values };
    let want = reference::kk_norm_bwd(&test.case.norm_shape(), &x, &d_kk.values);
    Ok(vec![got("dk", &mut dk, want.dk, Class::Grad), got("dk_k", &mut dk_k, want.dk_k, Class::Grad)])
}

fn kk_norm_k_update<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, all) = (test.case.heads(), test.case.optional);
    let rates = rates(test, shape.len());
    let (mut k, mut a) = (test.input::<T>("k", shape.len()), test.with::<T>("a", &rates));
    let (k_k, ka) =
        (key_factors::<T>(test, shape.parameter_len()), test.input::<T>("ka", shape.parameter_len()));
    let mut outs = ["k_updated", "kk", "neg_kk", "b"].map(|name| test.output::<T>(name, shape.len()));
    {
        let (k, a, k_k, ka) = (k.memory.view(), a.memory.view(), k_k.memory.view(), ka.memory.view());
        let [k_updated, kk, neg_kk, b] = &mut outs.each_mut().map(|out| out.view_mut());
        let x = FusedKkNormKUpdateInputs { k: &k, a: &a, k_k: &k_k, ka: &ka };
        // Without the optional ones, what the recurrence needs from keys and rates.
        let kk: Option<&mut dyn DevicePtrMut<T>> = if all { Some(kk) } else { None };
        let mut y = FusedKkNormKUpdateOutputs { k_updated, kk, neg_kk: Some(neg_kk), b: Some(b) };
        let plan = FusedKkNormKUpdate::<T>::new(test.device, &shape).map_err(text)?;
        plan.run(test.stream, &x, &mut y).map_err(text)?;
    }
    [&mut k, &mut a].into_iter().try_for_each(Input::unchanged)?;
    let x = reference::KkNormKUpdateInputs { k: &k.values, a: &a.values, k_k: &k_k.values, ka: &ka.values };
    let want = reference::kk_norm_k_update_fwd(&test.case.norm_shape(), &x);
    let [k_updated, kk, neg_kk, b] = &mut outs;
    let negative = want.kk.iter().map(|x| -x).collect();
    let mut out = vec![
        got("k_updated", k_updated, want.k_updated, Class::Output),
        got("neg_kk", neg_kk, negative, Class::Output),
        got("b", b, want.b, Class::Output),
    ];
    if all {
        out.push(got("kk", kk, want.kk, Class::Output));
    }
    Ok(out)
}

fn kk_norm_k_update_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, all) = (test.case.heads(), test.case.optional);
    let rates = rates(test, shape.len());
    let (mut k, mut a) = (test.input::<T>("k", shape.len()), test.with::<T>("a", &rates));
    let (k_k, ka) =
        (key_factors::<T>(test, shape.parameter_len()), test.input::<T>("ka", shape.parameter_len()));
    let mut grads = ["d_k_updated", "d_kk", "d_neg_kk", "d_b"].map(|name| test.input::<T>(name, shape.len()));
    let (mut dk, mut da) = (test.output::<T>("dk", shape.len()), test.output::<T>("da", shape.len()));
    let mut dk_k = test.output::<f32>("dk_k", shape.parameter_len());
    let mut dka = test.output::<f32>("dka", shape.parameter_len());
    {
        let (k, a, k_k, ka) = (k.memory.view(), a.memory.view(), k_k.memory.view(), ka.memory.view());
        let [d_k_updated, d_kk, d_neg_kk, d_b] = grads.each_ref().map(|grad| grad.memory.view());
        let (mut dk, mut da) = (dk.view_mut(), da.view_mut());
        let (mut dk_k, mut dka) = (dk_k.view_mut(), dka.view_mut());
        let x = FusedKkNormKUpdateBwdInputs {
            k: &k,
            a: &a,
            k_k: &k_k,
            ka: &ka,
            d_k_updated: &d_k_updated,
            d_kk: all.then_some(&d_kk),
            d_neg_kk: Some(&d_neg_kk),
            d_b: all.then_some(&d_b),
        };
        let mut y = FusedKkNormKUpdateBwdOutputs { dk: &mut dk, da: &mut da, dk_k: &mut dk_k, dka: &mut dka };
        let plan = FusedKkNormKUpdateBwd::<T>::new(test.device, &shape).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    [&mut k, &mut a].into_iter().try_for_each(Input::unchanged)?;
    grads.iter_mut().try_for_each(Input::unchanged)?;
    let x = reference::KkNormKUpdateInputs { k: &k.values, a: &a.values, k_k: &k_k.values, ka: &ka.values };
    let [d_k_updated, d_kk, d_neg_kk, d_b] = grads.each_ref().map(|grad| &grad.values[..]);
    let present = if all { 1.0 } else { 0.0 };
    let d_kk: Vec<f64> = d_kk.iter().zip(d_neg_kk).map(|(kk, neg)| present * kk - neg).collect();
    let d_b: Vec<f64> = d_b.iter().map(|d_b| present * d_b).collect();
    let dy = reference::KkNormKUpdateOutputGrads { d_k_updated, d_kk: &d_kk, d_b: &d_b };
    let want = reference::kk_norm_k_update_bwd(&test.case.norm_shape(), &x, &dy);
    Ok(vec![
        got("dk", &mut dk, want.dk, Class::Grad),
        got("da", &mut da, want.da, Class::Grad),
        got("dk_k", &mut dk_k, want.dk_k, Class::Grad),
        got("dka", &mut dka, want.dka, Class::Grad),
    ])
}

const GATED: [&str; 5] = ["o", "r", "k", "v", "g"];

fn reference_gated<'a, T: Poison>(
    inputs: &'a [Input<T>; 5],
    r_k: &'a Input<T>,
) -> reference::GateOutputCorrectionInputs<'a, f64> {
    let [o, r, k, v, g] = inputs.each_ref().map(|input| &input.values[..]);
    reference::GateOutputCorrectionInputs { o, r, k, r_k: &r_k.values, v, g }
}

fn gate_output_correction<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.heads();
    let mut inputs = GATED.map(|name| test.input::<T>(name, shape.len()));
    let r_k = test.input::<T>("r_k", shape.parameter_len());
    let mut out = test.output::<T>("out", shape.len());
    {
        let [o, r, k, v, g] = inputs.each_ref().map(|input| input.memory.view());
        let (r_k, mut out) = (r_k.memory.view(), out.view_mut());
        let x = FusedGateOutputCorrectionInputs { o: &o, r: &r, k: &k, r_k: &r_k, v: &v, g: &g };
        let plan = FusedGateOutputCorrection::<T>::new(test.device, &shape).map_err(text)?;
        let mut y = FusedGateOutputCorrectionOutputs { out: &mut out };
        plan.run(test.stream, &x, &mut y).map_err(text)?;
    }
    inputs.iter_mut().try_for_each(Input::unchanged)?;
    let rows = reference::GateOutputCorrectionShape { tokens: test.case.tokens(), h: shape.h, k: shape.k };
    let want = reference::gate_output_correction_fwd(&rows, &reference_gated(&inputs, &r_k));
    Ok(vec![got("out", &mut out, want, Class::Output)])
}

fn gate_output_correction_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let shape = test.case.heads();
    let mut inputs = GATED.map(|name| test.input::<T>(name, shape.len()));
    let mut d_out = test.input::<T>("d_out", shape.len());
    let r_k = test.input::<T>("r_k", shape.parameter_len());
    let mut outs = ["d_o", "dr", "dk", "dv", "dg"].map(|name| test.output::<T>(name, shape.len()));
    let mut dr_k = test.output::<f32>("dr_k", shape.parameter_len());
    {
        let [o, r, k, v, g] = inputs.each_ref().map(|input| input.memory.view());
        let (r_k, d_out, mut dr_k) = (r_k.memory.view(), d_out.memory.view(), dr_k.view_mut());
        let [d_o, dr, dk, dv, dg] = &mut outs.each_mut().map(|out| out.view_mut());
        let x = FusedGateOutputCorrectionBwdInputs {
            o: &o,
            r: &r,
            k: &k,
            r_k: &r_k,
            v: &v,
            g: &g,
            d_out: &d_out,
        };
        let mut y = FusedGateOutputCorrectionBwdOutputs { d_o, dr, dk, dv, dg, dr_k: &mut dr_k };
        let plan = FusedGateOutputCorrectionBwd::<T>::new(test.device, &shape).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    inputs.iter_mut().try_for_each(Input::unchanged)?;
    d_out.unchanged()?;
    let rows = reference::GateOutputCorrectionShape { tokens: test.case.tokens(), h: shape.h, k: shape.k };
    let want = reference::gate_output_correction_bwd(&rows, &reference_gated(&inputs, &r_k), &d_out.values);
    let [d_o, dr, dk, dv, dg] = &mut outs;
    Ok(vec![
        got("d_o", d_o, want.d_o, Class::Grad),
        got("dr", dr, want.dr, Class::Grad),
        got("dk", dk, want.dk, Class::Grad),
        got("dv", dv, want.dv, Class::Grad),
        got("dg", dg, want.dg, Class::Grad),
        got("dr_k", &mut dr_k, want.dr_k, Class::Grad),
    ])
}

/// Weights of channel mixing: rows of length 1, about, so that z is of order 1.
fn weight<T: Sample>(test: &mut Test<'_>, name: &str, rows: usize, cols: usize) -> Input<T> {
    let values = test.rng.normal::<f64>(rows * cols, (rows as f64).sqrt().recip());
    test.with(name, &values)
}

/// A hidden layer that is no multiple of anything when D is not.
fn channel_mixing_shape(case: &Case) -> ChannelMixingShape {
    let d = case.h * case.k;
    ChannelMixingShape { seqs: case.seqs(), d, f: d + d / 4 + 3 * (d % 2) }
}

fn reference_channel_mixing_shape(shape: &ChannelMixingShape, case: &Case) -> reference::ChannelMixingShape {
    reference::ChannelMixingShape { seqs: case.shift_shape().seqs, c: shape.d, f: shape.f }
}

fn channel_mixing<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, saved) = (channel_mixing_shape(test.case), test.case.optional);
    let mut x = test.input::<T>("x", shape.len());
    let x_prev = test.optional::<T>("x_prev", shape.cache_len());
    let x_k = test.input::<T>("x_k", shape.d);
    let key_weight = weight::<T>(test, "key_weight", shape.d, shape.f);
    let value_weight = weight::<T>(test, "value_weight", shape.f, shape.d);
    let mut out = test.output::<T>("out", shape.len());
    let mut x_last = saved.then(|| test.output::<T>("x_last", shape.cache_len()));
    let mut mixed = saved.then(|| test.output::<T>("mixed", shape.len()));
    let mut hidden = saved.then(|| test.output::<T>("hidden", shape.hidden_len()));
    {
        let (tokens, x_prev) = (x.memory.view(), x_prev.as_ref().map(|x| x.memory.view()));
        let (x_k, key_weight) = (x_k.memory.view(), key_weight.memory.view());
        let value_weight = value_weight.memory.view();
        let x = FusedChannelMixingInputs {
            x: &tokens,
            x_prev: read(&x_prev),
            x_k: &x_k,
            key_weight: &key_weight,
            value_weight: &value_weight,
        };
        let [mut x_last, mut mixed, mut hidden] =
            [&mut x_last, &mut mixed, &mut hidden].map(|out| out.as_mut().map(|out| out.view_mut()));
        let mut out = out.view_mut();
        let (x_last, mixed, hidden) = (write(&mut x_last), write(&mut mixed), write(&mut hidden));
        let mut y = FusedChannelMixingOutputs { out: &mut out, x_last, mixed, hidden };
        let plan = FusedChannelMixing::<T>::new(test.device, &shape).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    x.unchanged()?;
    let inputs = reference::ChannelMixingInputs {
        x: &x.values,
        x_prev: x_prev.as_ref().map(|x| &x.values[..]),
        x_k: &x_k.values,
        key_weight: &key_weight.values,
        value_weight: &value_weight.values,
    };
    let want = reference::channel_mixing_fwd(&reference_channel_mixing_shape(&shape, test.case), &inputs);
    let mut all = vec![got("out", &mut out, want.out, Class::Output)];
    all.extend(x_last.as_mut().map(|last| got("x_last", last, want.x_last, Class::Output)));
    Ok(all)
}

fn channel_mixing_bwd<T: Sample>(test: &mut Test<'_>) -> Outcome {
    let (shape, saved) = (channel_mixing_shape(test.case), test.case.optional);
    let mut x = test.input::<T>("x", shape.len());
    let x_prev = test.optional::<T>("x_prev", shape.cache_len());
    let d_x_last = test.optional::<T>("d_x_last", shape.cache_len());
    let x_k = test.input::<T>("x_k", shape.d);
    let key_weight = weight::<T>(test, "key_weight", shape.d, shape.f);
    let value_weight = weight::<T>(test, "value_weight", shape.f, shape.d);
    let mut d_out = test.input::<T>("d_out", shape.len());
    let inputs = reference::ChannelMixingInputs {
        x: &x.values,
        x_prev: x_prev.as_ref().map(|x| &x.values[..]),
        x_k: &x_k.values,
        key_weight: &key_weight.values,
        value_weight: &value_weight.values,
    };
    let dy = reference::ChannelMixingOutputGrads {
        d_out: &d_out.values,
        d_x_last: d_x_last.as_ref().map(|x| &x.values[..]),
    };
    let want =
        reference::channel_mixing_bwd(&reference_channel_mixing_shape(&shape, test.case), &inputs, &dy);
    let mut mixed = test.output::<T>("mixed", shape.len());
    let mut hidden = test.output::<T>("hidden", shape.hidden_len());
    let mut dx = test.output::<T>("dx", shape.len());
    let mut dx_prev = saved.then(|| test.output::<T>("dx_prev", shape.cache_len()));
    let mut dx_k = test.output::<f32>("dx_k", shape.d);
    let mut d_key_weight = test.output::<f32>("d_key_weight", shape.weight_len());
    let mut d_value_weight = test.output::<f32>("d_value_weight", shape.weight_len());
    {
        let (tokens, x_prev) = (x.memory.view(), x_prev.as_ref().map(|x| x.memory.view()));
        let (x_k, key_weight) = (x_k.memory.view(), key_weight.memory.view());
        let (value_weight, d_out) = (value_weight.memory.view(), d_out.memory.view());
        let d_x_last = d_x_last.as_ref().map(|x| x.memory.view());
        if saved {
            let mut out = test.output::<T>("out", shape.len());
            let x = FusedChannelMixingInputs {
                x: &tokens,
                x_prev: read(&x_prev),
                x_k: &x_k,
                key_weight: &key_weight,
                value_weight: &value_weight,
            };
            let (mut out, mut mixed, mut hidden) = (out.view_mut(), mixed.view_mut(), hidden.view_mut());
            let mut y = FusedChannelMixingOutputs {
                out: &mut out,
                x_last: None,
                mixed: Some(&mut mixed),
                hidden: Some(&mut hidden),
            };
            let plan = FusedChannelMixing::<T>::new(test.device, &shape).map_err(text)?;
            let mut workspace = test.workspace(plan.workspace_bytes());
            plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
        }
        let (mixed, hidden) = (mixed.view(), hidden.view());
        let x = FusedChannelMixingBwdInputs {
            x: &tokens,
            x_prev: read(&x_prev),
            x_k: &x_k,
            key_weight: &key_weight,
            value_weight: &value_weight,
            mixed: saved.then_some(&mixed),
            hidden: saved.then_some(&hidden),
            d_out: &d_out,
            d_x_last: read(&d_x_last),
        };
        let mut dx_prev = dx_prev.as_mut().map(|out| out.view_mut());
        let (mut dx, mut dx_k) = (dx.view_mut(), dx_k.view_mut());
        let (mut d_key_weight, mut d_value_weight) = (d_key_weight.view_mut(), d_value_weight.view_mut());
        let mut y = FusedChannelMixingBwdOutputs {
            dx: &mut dx,
            dx_prev: write(&mut dx_prev),
            dx_k: &mut dx_k,
            d_key_weight: &mut d_key_weight,
            d_value_weight: &mut d_value_weight,
        };
        let plan = FusedChannelMixingBwd::<T>::new(test.device, &shape).map_err(text)?;
        let mut workspace = test.workspace(plan.workspace_bytes());
        plan.run(test.stream, &x, &mut y, &mut workspace).map_err(text)?;
    }
    x.unchanged()?;
    d_out.unchanged()?;
    let mut all = vec![
        got("dx", &mut dx, want.dx, Class::Grad),
        // f32, but from m, z and dm, which have been rounded.
        Got { dtype: T::DTYPE, ..got("dx_k", &mut dx_k, want.dx_k, Class::Grad) },
        Got { dtype: T::DTYPE, ..got("d_key_weight", &mut d_key_weight, want.d_key_weight, Class::Grad) },
        Got {
            dtype: T::DTYPE,
            ..got("d_value_weight", &mut d_value_weight, want.d_value_weight, Class::Grad)
        },
    ];
    all.extend(dx_prev.as_mut().map(|d| got("dx_prev", d, want.dx_prev, Class::Grad)));
    Ok(all)
}

#[test]
fn fused_channel_mixing_matches_reference() {
    let Some((device, stream)) = gpu("fused_channel_mixing_matches_reference") else { return };
    // The reference multiplies on one core, so only cases that it gets through.
    let cases: Vec<Case> =
        cases().into_iter().filter(|case| case.tokens() * case.h * case.k <= 70_000).collect();
    let functions: [Function; 6] = [
        channel_mixing::<f32>,
        channel_mixing::<bf16>,
        channel_mixing::<f16>,
        channel_mixing_bwd::<f32>,
        channel_mixing_bwd::<bf16>,
        channel_mixing_bwd::<f16>,
    ];
    run_cases(
        &cases,
        |case| case.name.to_owned(),
        |case| {
            functions
                .iter()
                .try_for_each(|function| check(&device, &stream, case, Model::ChannelMixing, *function))
        },
    );
}

#[test]
fn fused_addcmul_matches_reference() {
    check_all(
        "fused_addcmul_matches_reference",
        Model::Rwkv7,
        [addcmul::<f32>, addcmul::<bf16>, addcmul::<f16>],
    );
    let bwd: [Function; 3] = [addcmul_bwd::<f32>, addcmul_bwd::<bf16>, addcmul_bwd::<f16>];
    check_all("fused_addcmul_matches_reference", Model::Rwkv7, bwd);
}

#[test]
fn fused_token_shift_matches_reference() {
    let fwd: [Function; 3] = [token_shift_fwd::<f32>, token_shift_fwd::<bf16>, token_shift_fwd::<f16>];
    check_all("fused_token_shift_matches_reference", Model::TokenShift, fwd);
    let bwd: [Function; 3] = [token_shift_bwd::<f32>, token_shift_bwd::<bf16>, token_shift_bwd::<f16>];
    check_all("fused_token_shift_matches_reference", Model::TokenShift, bwd);
}

#[test]
fn fused_token_shift_addcmul_matches_reference() {
    let fwd: [Function; 3] =
        [token_shift_addcmul::<f32>, token_shift_addcmul::<bf16>, token_shift_addcmul::<f16>];
    check_all("fused_token_shift_addcmul_matches_reference", Model::Rwkv7, fwd);
    let bwd: [Function; 3] =
        [token_shift_addcmul_bwd::<f32>, token_shift_addcmul_bwd::<bf16>, token_shift_addcmul_bwd::<f16>];
    check_all("fused_token_shift_addcmul_matches_reference", Model::Rwkv7, bwd);
}

#[test]
fn fused_k_update_matches_reference() {
    let fwd: [Function; 3] = [k_update::<f32>, k_update::<bf16>, k_update::<f16>];
    check_all("fused_k_update_matches_reference", Model::Rwkv7, fwd);
    let bwd: [Function; 3] = [k_update_bwd::<f32>, k_update_bwd::<bf16>, k_update_bwd::<f16>];
    check_all("fused_k_update_matches_reference", Model::Rwkv7, bwd);
}

#[test]
fn fused_kk_norm_matches_reference() {
    let fwd: [Function; 3] = [kk_norm::<f32>, kk_norm::<bf16>, kk_norm::<f16>];
    check_all("fused_kk_norm_matches_reference", Model::Rwkv7, fwd);
    let bwd: [Function; 3] = [kk_norm_bwd::<f32>, kk_norm_bwd::<bf16>, kk_norm_bwd::<f16>];
    check_all("fused_kk_norm_matches_reference", Model::Rwkv7, bwd);
}

#[test]
fn fused_kk_norm_k_update_matches_reference() {
    let fwd: [Function; 3] = [kk_norm_k_update::<f32>, kk_norm_k_update::<bf16>, kk_norm_k_update::<f16>];
    check_all("fused_kk_norm_k_update_matches_reference", Model::Rwkv7, fwd);
    let bwd: [Function; 3] =
        [kk_norm_k_update_bwd::<f32>, kk_norm_k_update_bwd::<bf16>, kk_norm_k_update_bwd::<f16>];
    check_all("fused_kk_norm_k_update_matches_reference", Model::Rwkv7, bwd);
}

#[test]
fn fused_gate_output_correction_matches_reference() {
    let fwd: [Function; 3] =
        [gate_output_correction::<f32>, gate_output_correction::<bf16>, gate_output_correction::<f16>];
    check_all("fused_gate_output_correction_matches_reference", Model::Rwkv7, fwd);
    let bwd: [Function; 3] = [
        gate_output_correction_bwd::<f32>,
        gate_output_correction_bwd::<bf16>,
        gate_output_correction_bwd::<f16>,
    ];
    check_all("fused_gate_output_correction_matches_reference", Model::Rwkv7, bwd);
}

fn any_case() -> impl Strategy<Value = Case> {
    let lens = prop_oneof![
        Just(Vec::new()),
        proptest::collection::vec(prop_oneof![Just(0), Just(1), 0..60_usize], 1..12),
    ];
    let k = prop_oneof![Just(64_usize), Just(32), Just(20), Just(9)];
    (lens, 0..4_usize, 0..90_usize, 1..6_usize, k, proptest::bool::ANY)
        .prop_map(|(packed, b, t, h, k, optional)| Case { name: "random", packed, b, t, h, k, optional })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn fused_functions_match_references_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("fused_functions_match_references_for_any_shape") {
            let functions: [(Model, Function); 8] = [
                (Model::TokenShift, token_shift_fwd::<bf16>),
                (Model::TokenShift, token_shift_bwd::<f32>),
                (Model::Rwkv7, token_shift_addcmul::<f16>),
                (Model::Rwkv7, token_shift_addcmul_bwd::<bf16>),
                (Model::Rwkv7, addcmul_bwd::<f32>),
                (Model::Rwkv7, k_update_bwd::<bf16>),
                (Model::Rwkv7, kk_norm_k_update_bwd::<bf16>),
                (Model::Rwkv7, gate_output_correction_bwd::<f16>),
            ];
            for (model, function) in functions {
                check(&device, &stream, &case, model, function).expect("matches");
            }
        }
    }
}

#[test]
fn bad_dims_are_refused_by_name() {
    let Some((device, _)) = gpu("bad_dims_are_refused_by_name") else { return };
    let seqs = SeqLens::dense(2, 3);
    let channels =
        |d| FusedAddcmul::<bf16>::new(&device, &ChannelShape { seqs: seqs.clone(), d }, Mixes::Six);
    let heads = |h, k| FusedKkNorm::<bf16>::new(&device, &HeadShape { seqs: seqs.clone(), h, k });
    for (error, dim) in [
        (channels(0).err(), "D"),
        (heads(0, 64).err(), "H"),
        (heads(1, 0).err(), "K"),
        (heads(1, 257).err(), "K"),
    ] {
        let error = error.expect("must be refused");
        assert!(matches!(error, Error::Dim { dim: got, .. } if got == dim), "{dim}: {error}");
    }
}

#[test]
fn wrong_tensors_are_refused_by_name() {
    let Some((device, stream)) = gpu("wrong_tensors_are_refused_by_name") else { return };
    let shape = ChannelShape { seqs: SeqLens::dense(2, 3), d: 16 };
    let plan = FusedKUpdateBwd::<f32>::new(&device, &shape).expect("compiles");
    let zeros = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let run = |len: usize, ka_len: usize, dka_start: usize, workspace_len: usize| {
        let (k, a, d_out, ka) = (zeros(96), zeros(96), zeros(len), zeros(ka_len));
        let (mut dk, mut da, mut dka) = (zeros(96), zeros(96), zeros(16 + dka_start));
        let mut dka = dka.slice_mut(dka_start..);
        let x = FusedKUpdateBwdInputs { k: &k, a: &a, ka: &ka, d_out: &d_out };
        let mut y = FusedKUpdateBwdOutputs { dk: &mut dk, da: &mut da, dka: &mut dka };
        let mut workspace = stream.alloc_zeros::<u8>(workspace_len).expect("fits");
        plan.run(&stream, &x, &mut y, &mut workspace)
    };
    let bytes = plan.workspace_bytes();
    assert!(run(96, 16, 0, bytes).is_ok());
    for (result, tensor) in [
        (run(95, 16, 0, bytes), "d_out"),
        (run(96, 17, 0, bytes), "ka"),
        (run(96, 16, 0, bytes + 256), "workspace"),
        (run(96, 16, 1, bytes), "dka"),
    ] {
        let error = result.expect_err("must be refused");
        let named = matches!(&error, Error::Len { tensor: got, .. } | Error::Align { tensor: got, .. } if *got == tensor);
        assert!(named, "{tensor}: {error}");
    }
}

#[test]
fn a_gate_without_its_output_is_refused() {
    let Some((device, stream)) = gpu("a_gate_without_its_output_is_refused") else { return };
    let shape = ChannelShape { seqs: SeqLens::dense(1, 1), d: 16 };
    let plan = FusedAddcmul::<f32>::new(&device, &shape, Mixes::Six).expect("compiles");
    let zeros = || stream.alloc_zeros::<f32>(16).expect("fits");
    let x = zeros();
    let [mut r, mut w, mut k, mut v, mut a] = [(); 5].map(|()| zeros());
    let inputs =
        FusedAddcmulInputs { hidden: &x, delta: &x, xr: &x, xw: &x, xk: &x, xv: &x, xa: &x, xg: Some(&x) };
    let mut outputs = FusedAddcmulOutputs {
        out_r: &mut r,
        out_w: &mut w,
        out_k: &mut k,
        out_v: &mut v,
        out_a: &mut a,
        out_g: None,
    };
    let error = plan.run(&stream, &inputs, &mut outputs).expect_err("must be refused");
    assert!(matches!(error, Error::Presence { tensor: "out_g", .. }), "{error}");
}
