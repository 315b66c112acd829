//! What NVRTC has to refuse: a parameter struct that differs between Rust and CUDA, a bad constant, a spill.
//!
//! Needs NVRTC but no GPU.

use std::mem::offset_of;

use fla_core::testing::{nvrtc, run_cases};
use fla_core::{Arch, DType, Error, Field, Params, Ptr, PtrMut, Source, TensorMap, Unit, compile};

#[repr(C)]
#[derive(Clone, Copy)]
struct CopyParams {
    x: Ptr<f32>,
    y: PtrMut<f32>,
    n: i32,
    scale: f32,
}

const FIELDS: &[Field] = &[
    Field::new("x", "const float*", offset_of!(CopyParams, x)),
    Field::new("y", "float*", offset_of!(CopyParams, y)),
    Field::new("n", "fla::i32", offset_of!(CopyParams, n)),
    Field::new("scale", "float", offset_of!(CopyParams, scale)),
];

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for CopyParams {
    const CUDA_TYPE: &'static str = "fla::layout::CopyParams";
    const FIELDS: &'static [Field] = FIELDS;
}

/// A struct with a tensor map between smaller fields, whose alignment decides every offset.
#[repr(C)]
#[derive(Clone, Copy)]
struct MapParams {
    n: i32,
    map: TensorMap,
    y: PtrMut<f32>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for MapParams {
    const CUDA_TYPE: &'static str = "fla::layout::MapParams";
    const FIELDS: &'static [Field] = &[
        Field::new("n", "fla::i32", offset_of!(Self, n)),
        Field::new("map", "fla::TensorMap", offset_of!(Self, map)),
        Field::new("y", "float*", offset_of!(Self, y)),
    ];
}

/// The kernel, around the fields that a case gives its struct.
fn source(fields: &str, body: &str) -> Source {
    let text = format!(
        "#include <fla/core/prelude.cuh>\nnamespace fla::layout {{\nstruct CopyParams {{ {fields} }};\n\
         template <class Cfg> concept CopyConfig = requires {{ Cfg::THREADS; }};\n\
         template <CopyConfig Cfg> __device__ void copy(const CopyParams& p) {{ {body} }}\n}}\n"
    );
    // A unit's text is a constant of the binary everywhere but here.
    Source { name: "fla/layout/copy.cu", text: text.leak() }
}

const GOOD: &str = "const float* x; float* y; i32 n; float scale;";
const BODY: &str = "static_assert(Cfg::THREADS % 32 == 0, \"whole warps\"); \
                    const int i = threadIdx.x; if (i < p.n) p.y[i] = p.scale * p.x[i];";

struct Case {
    name: &'static str,
    fields: &'static str,
    body: &'static str,
    threads: i32,
    /// What the error has to say; nothing when it compiles.
    error: &'static [&'static str],
}

const BASE: Case = Case { name: "the twin agrees", fields: GOOD, body: BODY, threads: 64, error: &[] };
const CASES: &[Case] = &[
    BASE,
    Case {
        name: "two fields are swapped",
        fields: "const float* x; float* y; float scale; i32 n;",
        error: &["`layout_copy` (THREADS=64)", "CopyParams::n: offset differs between Rust and CUDA"],
        ..BASE
    },
    Case {
        name: "a field has another type",
        fields: "const float* x; float* y; u32 n; float scale;",
        error: &["CopyParams::n: type differs between Rust and CUDA"],
        ..BASE
    },
    Case {
        name: "a field is missing in Rust",
        fields: "const float* x; float* y; i32 n; float scale; i64 more;",
        error: &["CopyParams: size differs between Rust and CUDA"],
        ..BASE
    },
    Case {
        name: "a constant breaks the kernel's contract",
        threads: 33,
        error: &["(THREADS=33)", "fla/layout/copy.cu", "whole warps"],
        ..BASE
    },
    Case {
        name: "the log is verbatim",
        body: "int unknown = nowhere;",
        error: &["identifier \"nowhere\" is undefined", "1 error detected"],
        ..BASE
    },
    Case {
        name: "spilled registers",
        body: "float x[400]; for (int i = 0; i < 400; ++i) x[i] = p.x[i]; __syncthreads(); \
               for (int j = 0; j < p.n; ++j) { \
               _Pragma(\"unroll\") for (int i = 0; i < 400; ++i) x[i] = x[i] * x[(i + 7) % 400] + p.x[j]; } \
               _Pragma(\"unroll\") for (int i = 0; i < 400; ++i) p.y[i] = x[i];",
        error: &["it spills", "bytes of registers", "spill stores"],
        ..BASE
    },
];

#[test]
fn what_differs_is_refused() {
    if !nvrtc("what_differs_is_refused") {
        return;
    }
    run_cases(
        CASES,
        |case| case.name.into(),
        |case| {
            let unit = Unit::new::<CopyParams>("layout", "copy", source(case.fields, case.body), 64)
                .with("THREADS", case.threads);
            match (compile::compile(&unit, Arch::SM_90), case.error) {
                (Ok(compiled), []) if compiled.report.registers > 0 && !compiled.cubin.is_empty() => Ok(()),
                (Ok(_), _) => Err("it compiled".into()),
                (Err(error), wanted) => {
                    let text = error.to_string();
                    let missing = wanted.iter().find(|part| !text.contains(**part));
                    match missing {
                        _ if wanted.is_empty() => Err(text),
                        None => Ok(()),
                        Some(part) => Err(format!("`{part}` is not in: {text}")),
                    }
                }
            }
        },
    );
}

#[test]
fn a_missing_constant_is_refused() {
    if !nvrtc("a_missing_constant_is_refused") {
        return;
    }
    let unit = Unit::new::<CopyParams>("layout", "copy", source(GOOD, BODY), 64).with("OTHER", 1);
    assert!(matches!(compile::compile(&unit, Arch::SM_90), Err(Error::Compile { .. })));
}

#[test]
fn a_tensor_map_lies_alike_on_both_sides() {
    if !nvrtc("a_tensor_map_lies_alike_on_both_sides") {
        return;
    }
    let text = "#include <fla/core/prelude.cuh>\nnamespace fla::layout {\n\
                struct MapParams { i32 n; TensorMap map; float* y; };\n\
                template <class Cfg> __device__ void map(const MapParams& p) { p.y[0] = p.n; }\n}\n";
    let source = Source { name: "fla/layout/map.cu", text };
    let unit = Unit::new::<MapParams>("layout", "map", source, 32);
    compile::compile(&unit, Arch::SM_90).expect("agrees");
}

#[test]
fn constants_arrive_as_they_were_given() {
    if !nvrtc("constants_arrive_as_they_were_given") {
        return;
    }
    let body = "static_assert(Cfg::THREADS == 64 && Cfg::NEGATIVE == -3 && Cfg::ON && !Cfg::OFF); \
                static_assert(Cfg::TENTH == 0.1f && sizeof(typename Cfg::Element) == 2); p.y[0] = p.x[0];";
    let unit = Unit::new::<CopyParams>("layout", "copy", source(GOOD, body), 64)
        .with("THREADS", 64)
        .with("NEGATIVE", -3)
        .with("ON", true)
        .with("OFF", false)
        .with("TENTH", 0.1f32)
        .with("Element", DType::Bf16);
    assert_eq!(unit.constants(), "THREADS=64, NEGATIVE=-3, ON=true, OFF=false, TENTH=0.1, Element=bf16");
    compile::compile(&unit, Arch::SM_90).expect("every constant is as given");
}

#[test]
fn the_kernel_is_compiled_for_every_supported_architecture() {
    if !nvrtc("the_kernel_is_compiled_for_every_supported_architecture") {
        return;
    }
    let unit = Unit::new::<CopyParams>("layout", "copy", source(GOOD, BODY), 64).with("THREADS", 64);
    run_cases(
        &["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"],
        |name| (*name).into(),
        |name| {
            let arch = Arch::parse(name).ok_or("not an architecture")?;
            compile::compile(&unit, arch).map(drop).map_err(|error| error.to_string())
        },
    );
}
