//! The table of limits answers for what it holds and says so for what it does not.

use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, limit_against_f32, relieved};

const GPU: Key = Key {
    backend: Backend::Gpu,
    model: Model::Rwkv7,
    pass: Pass::RecurrentFwd,
    dtype: Dtype::F32,
    class: Class::Output,
};

#[test]
fn limits_follow_the_format_of_the_vectors() {
    for model in [Model::Rwkv7, Model::Dplr] {
        for (dtype, want) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 3e-3), (Dtype::F16, 5e-4)] {
            assert_eq!(limit(Key { model, dtype, ..GPU }), Ok(want));
            let state = Key { model, dtype, class: Class::FinalState, ..GPU };
            assert_eq!(limit(state), Ok(1e-5), "the state stays in f32");
        }
    }
}

#[test]
fn a_missing_row_is_named() {
    // Keys that repeat do no harm where no rule takes back what a key has written.
    let key = Key { model: Model::Rwkv6, pass: Pass::ChunkBwd, class: Class::OfRepeats, ..GPU };
    let error = limit(key).unwrap_err();
    assert_eq!(error.key, key);
    assert_eq!(error.to_string(), "the tolerance table has no row for Gpu, Rwkv6, ChunkBwd, F32, OfRepeats");
}

#[test]
fn the_reference_has_limits_everywhere_in_f64_and_f32() {
    for model in [
        Model::GatedDelta,
        Model::Dplr,
        Model::Rwkv7,
        Model::Rwkv6,
        Model::Rwkv4,
        Model::TokenShift,
        Model::ChannelMixing,
    ] {
        for pass in [Pass::RecurrentFwd, Pass::RecurrentBwd, Pass::ChunkFwd, Pass::ChunkBwd, Pass::Fused] {
            for class in [Class::Output, Class::FinalState, Class::Grad, Class::GateGrad] {
                let key = Key { backend: Backend::Reference, model, pass, dtype: Dtype::F64, class };
                assert_eq!(limit(key), Ok(1e-9));
                let in_f32 = limit(Key { dtype: Dtype::F32, ..key }).unwrap();
                assert!((1e-5..=1e-4).contains(&in_f32), "{key:?}: {in_f32:e}");
                assert!(
                    limit(Key { dtype: Dtype::Bf16, ..key }).is_err(),
                    "references do not compute in bf16"
                );
            }
        }
    }
}

#[test]
fn rounded_expectations_have_a_floor() {
    assert_eq!(limit_against_f32(1e-9), 2e-7);
    assert_eq!(limit_against_f32(3e-3), 3e-3);
}

#[test]
fn relief_only_relieves() {
    assert_eq!(relieved(1e-3, 100.0), 1e-5);
    assert_eq!(relieved(1e-3, 0.01), 1e-3, "a ratio below 1 is no reason to be stricter");
}
