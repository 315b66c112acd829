//! A conformance case: one safetensors file, read and checked against what its operator needs.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use fla_reference::SeqLens;
use fla_reference::inputs::Storage;
use fla_reference::tolerance::Dtype;
use half::{bf16, f16};
use num_traits::Float;
use safetensors::SafeTensors;

use super::schema::{Operator, OptionKey, Presence, Role, TensorSpec, find};
use crate::Result;

/// One tensor, widened to f64.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    /// The number format in the file.
    pub(super) stored: Dtype,
    /// The values, row-major.
    pub(super) values: Vec<f64>,
}

/// One case.
#[derive(Clone, Debug)]
pub(super) struct Case {
    /// The file name without its ending.
    pub(super) name: String,
    /// The operator.
    pub(super) operator: &'static Operator,
    /// Which rows belong to which sequence.
    pub(super) seqs: SeqLens,
    metadata: HashMap<String, String>,
    dims: BTreeMap<&'static str, usize>,
    tensors: BTreeMap<String, Tensor>,
}

/// What became of the inputs of a case in a narrower number format.
pub(super) enum Rounding {
    /// Every input is exact in it.
    Exact,
    /// These are the rounded inputs: what the file expects no longer belongs to them.
    Changed(Case),
    /// This input does not fit.
    Overflow(&'static str),
}

impl Case {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or holds anything but what its operator needs. The text names the file.
    pub(super) fn read(path: &Path) -> Result<Case> {
        let place = |error: String| format!("{}: {error}", path.display());
        let bytes = std::fs::read(path).map_err(|error| place(error.to_string()))?;
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Case::parse(name, &bytes).map_err(place)?)
    }

    fn parse(name: String, bytes: &[u8]) -> std::result::Result<Case, String> {
        let unreadable = |error| format!("not a readable safetensors file: {error}");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(unreadable)?;
        let file = SafeTensors::deserialize(bytes).map_err(unreadable)?;
        let metadata = header.metadata().clone().ok_or("the file has no metadata")?;
        let op = metadata.get("op").ok_or("the metadata has no `op`")?;
        let operator = find(op).ok_or_else(|| format!("unknown operator `{op}`"))?;

        let mut dims = BTreeMap::new();
        for &dim in operator.dims {
            let text = metadata.get(dim).ok_or_else(|| format!("the metadata has no `{dim}`"))?;
            let value = text.parse().map_err(|_| format!("`{dim}` is `{text}`, not a number"))?;
            dims.insert(dim, value);
        }
        for option in operator.options {
            check_option(*option, &metadata)?;
        }

        let mut tensors = BTreeMap::new();
        let mut shapes = BTreeMap::new();
        let mut cu_seqlens = None;
        for (tensor, view) in file.iter() {
            if tensor == "cu_seqlens" {
                cu_seqlens = Some(offsets(view.dtype(), view.data())?);
                continue;
            }
            if !operator.tensors.iter().any(|spec| spec.name == tensor) {
                return Err(format!("`{tensor}` is not a tensor of {op}"));
            }
            shapes.insert(tensor.to_owned(), view.shape().to_vec());
            tensors.insert(tensor.to_owned(), widen(tensor, view.dtype(), view.data())?);
        }
        let (b, t) = (dims["B"], dims["T"]);
        let seqs = match cu_seqlens {
            None => SeqLens::Dense { b, t },
            Some(cu_seqlens) => packed(cu_seqlens, b, t)?,
        };
        dims.insert("N", seqs.n());
        if let Some(n) = metadata.get("N").filter(|n| **n != seqs.n().to_string()) {
            return Err(format!("`N` is {n}, but there are {} sequences", seqs.n()));
        }
        if let Some(hv) = dims.get("HV").filter(|hv| dims["H"] == 0 || !hv.is_multiple_of(dims["H"])) {
            return Err(format!("`HV` is {hv}, not a multiple of `H`, which is {}", dims["H"]));
        }

        let case = Case { name, operator, seqs, metadata, dims, tensors };
        for spec in operator.tensors {
            case.check(spec, shapes.get(spec.name))?;
        }
        Ok(case)
    }

    fn check(&self, spec: &TensorSpec, shape: Option<&Vec<usize>>) -> std::result::Result<(), String> {
        let wanted = match spec.presence {
            Presence::Always => Some(true),
            Presence::Optional => None,
            Presence::With(other) => Some(self.tensors.contains_key(other)),
            Presence::Flag(key) => Some(self.flag(key)),
        };
        match (wanted, shape) {
            (Some(true), None) => Err(format!("the tensor `{}` is missing", spec.name)),
            (Some(false), Some(_)) => Err(format!("the tensor `{}` has no place in this case", spec.name)),
            (_, Some(shape)) if *shape != self.shape(spec) => {
                Err(format!("`{}` is {shape:?}, not [{}] = {:?}", spec.name, spec.shape, self.shape(spec)))
            }
            _ => Ok(()),
        }
    }

    fn shape(&self, spec: &TensorSpec) -> Vec<usize> {
        let factor = |text: &str| text.parse().unwrap_or_else(|_| self.dim(text));
        spec.shape.split(' ').map(|dim| dim.split('*').map(factor).product()).collect()
    }

    /// A dimension by its letter; `N` is the number of sequences.
    pub(super) fn dim(&self, name: &str) -> usize {
        self.dims.get(name).copied().unwrap_or(0)
    }

    /// A metadata key that is `true`.
    pub(super) fn flag(&self, key: &str) -> bool {
        self.metadata.get(key).is_some_and(|value| value == "true")
    }

    /// The factor of the readout.
    pub(super) fn scale(&self) -> f64 {
        self.number("scale").unwrap_or(1.0)
    }

    /// How much larger than a gradient the terms are whose difference it is, at least 1.
    pub(super) fn cancellation(&self, gradient: &str) -> f64 {
        self.number(&format!("cancellation_{gradient}")).unwrap_or(1.0).max(1.0)
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.metadata.get(key).and_then(|text| text.parse().ok())
    }

    /// The expected tensors of this case, in the order of the operator's table.
    pub(super) fn expected(&self) -> impl Iterator<Item = (&'static TensorSpec, &Tensor)> {
        let tensors = self.operator.tensors.iter().filter(|spec| !spec.role.is_input());
        tensors.filter_map(|spec| Some((spec, self.tensors.get(spec.name)?)))
    }

    /// The values of a tensor that reading has found; none when the case does not have it.
    pub(super) fn values<F: Float>(&self, name: &str) -> Vec<F> {
        self.optional(name).unwrap_or_default()
    }

    /// The values of a tensor that the case may have.
    pub(super) fn optional<F: Float>(&self, name: &str) -> Option<Vec<F>> {
        let tensor = self.tensors.get(name)?;
        Some(tensor.values.iter().map(|&x| F::from(x).unwrap_or_else(F::nan)).collect())
    }

    /// The case with its vectors rounded to a number format. States keep f32 precision.
    pub(super) fn rounded(&self, dtype: Dtype) -> Rounding {
        let mut case = self.clone();
        let mut changed = false;
        for spec in self.operator.tensors.iter().filter(|spec| spec.role.is_input()) {
            let Some(tensor) = case.tensors.get_mut(spec.name) else { continue };
            let dtype = match (spec.role, dtype) {
                (Role::State, Dtype::Bf16 | Dtype::F16) => Dtype::F32,
                _ => dtype,
            };
            for x in &mut tensor.values {
                let y = nearest(dtype, *x);
                if x.is_finite() && !y.is_finite() {
                    return Rounding::Overflow(spec.name);
                }
                changed |= *x != y;
                *x = y;
            }
        }
        if changed { Rounding::Changed(case) } else { Rounding::Exact }
    }
}

fn nearest(dtype: Dtype, x: f64) -> f64 {
    match dtype {
        Dtype::F64 => f64::nearest(x),
        Dtype::F32 => f32::nearest(x),
        Dtype::Bf16 => bf16::nearest(x),
        Dtype::F16 => f16::nearest(x),
    }
}

fn check_option(option: OptionKey, metadata: &HashMap<String, String>) -> std::result::Result<(), String> {
    let (key, wanted) = match option {
        OptionKey::Number(key) => (key, "a number"),
        OptionKey::Flag(key) => (key, "`true` or `false`"),
    };
    let text = metadata.get(key).ok_or_else(|| format!("the metadata has no `{key}`"))?;
    let reads = match option {
        OptionKey::Number(_) => text.parse::<f64>().is_ok_and(f64::is_finite),
        OptionKey::Flag(_) => ["true", "false"].contains(&text.as_str()),
    };
    if reads { Ok(()) } else { Err(format!("`{key}` is `{text}`, not {wanted}")) }
}

fn widen(name: &str, dtype: safetensors::Dtype, data: &[u8]) -> std::result::Result<Tensor, String> {
    match dtype {
        safetensors::Dtype::F32 => {
            let (chunks, _) = data.as_chunks::<4>();
            let values = chunks.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect();
            Ok(Tensor { stored: Dtype::F32, values })
        }
        safetensors::Dtype::F64 => {
            let (chunks, _) = data.as_chunks::<8>();
            let values = chunks.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
            Ok(Tensor { stored: Dtype::F64, values })
        }
        other => Err(format!("`{name}` is stored as {other:?}, not as F32 or F64")),
    }
}

fn offsets(dtype: safetensors::Dtype, data: &[u8]) -> std::result::Result<Vec<usize>, String> {
    if dtype != safetensors::Dtype::I64 {
        return Err(format!("`cu_seqlens` is stored as {dtype:?}, not as I64"));
    }
    let (chunks, _) = data.as_chunks::<8>();
    let offset = |bytes: &[u8; 8]| {
        let offset = i64::from_le_bytes(*bytes);
        usize::try_from(offset).map_err(|_| format!("`cu_seqlens` holds {offset}"))
    };
    chunks.iter().map(offset).collect()
}

fn packed(cu_seqlens: Vec<usize>, b: usize, t: usize) -> std::result::Result<SeqLens, String> {
    let ends = (cu_seqlens.first(), cu_seqlens.last());
    if b != 1 || ends != (Some(&0), Some(&t)) || !cu_seqlens.is_sorted() {
        return Err(format!(
            "`cu_seqlens` {cu_seqlens:?} does not divide {t} tokens of one packed row, B = {b}"
        ));
    }
    Ok(SeqLens::Packed { cu_seqlens })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    /// The bytes of a file with the given metadata and f32 tensors: name, shape, values.
    pub(in crate::conformance) fn file(
        metadata: &[(&str, &str)],
        tensors: &[(&str, &[usize], &[f32])],
    ) -> Vec<u8> {
        let data: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let views: Vec<(&str, TensorView<'_>)> = tensors
            .iter()
            .zip(&data)
            .map(|((name, shape, _), data)| {
                (*name, TensorView::new(safetensors::Dtype::F32, shape.to_vec(), data).expect("sizes agree"))
            })
            .collect();
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        safetensors::serialize(views, Some(metadata)).expect("a small file")
    }

    const METADATA: &[(&str, &str)] = &[("op", "token_shift"), ("B", "1"), ("T", "2"), ("D", "3")];
    const X: &[f32] = &[-0.5, -0.25, 0.0, 0.25, 0.5, 0.75];
    const TENSORS: &[(&str, &[usize], &[f32])] = &[
        ("x", &[1, 2, 3], X),
        ("dy", &[1, 2, 3], X),
        ("y", &[1, 2, 3], X),
        ("cache_out", &[1, 3], &[0.0; 3]),
        ("dx", &[1, 2, 3], X),
    ];

    impl Case {
        /// The case with another first value of an input.
        pub(in crate::conformance) fn with_first(mut self, name: &str, value: f64) -> Case {
            if let Some(first) = self.tensors.get_mut(name).and_then(|tensor| tensor.values.first_mut()) {
                *first = value;
            }
            self
        }
    }

    fn error(metadata: &[(&str, &str)], tensors: &[(&str, &[usize], &[f32])]) -> String {
        Case::parse("case".into(), &file(metadata, tensors)).expect_err("an invalid case")
    }

    #[test]
    fn a_whole_case_is_read() {
        let case = Case::parse("case".into(), &file(METADATA, TENSORS)).expect("a valid case");
        assert_eq!(case.values::<f32>("x"), X);
        let expected: Vec<_> = case.expected().map(|(spec, _)| spec.name).collect();
        assert_eq!(expected, ["y", "cache_out", "dx"]);
        assert_eq!(case.seqs, SeqLens::Dense { b: 1, t: 2 });
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        assert_eq!(error(&METADATA[1..], TENSORS), "the metadata has no `op`");
        assert_eq!(error(&METADATA[..3], TENSORS), "the metadata has no `D`");
        assert_eq!(error(METADATA, &TENSORS[..4]), "the tensor `dx` is missing");
        let other = [&[("op", "softmax")], &METADATA[1..]].concat();
        assert_eq!(error(&other, TENSORS), "unknown operator `softmax`");
        let wide = [&METADATA[..3], &[("D", "4")]].concat();
        assert_eq!(error(&wide, TENSORS), "`x` is [1, 2, 3], not [B T D] = [1, 2, 4]");
        let more = [TENSORS, &[("z", &[1][..], &[1.0][..])]].concat();
        assert_eq!(error(METADATA, &more), "`z` is not a tensor of token_shift");
        let lone = [TENSORS, &[("dcache", &[1, 3][..], &[0.0; 3][..])]].concat();
        assert_eq!(error(METADATA, &lone), "the tensor `dcache` has no place in this case");
    }

    #[test]
    fn a_truncated_file_is_refused_and_named() {
        let bytes = file(METADATA, TENSORS);
        for length in [0, 5, bytes.len() / 2, bytes.len() - 1] {
            let folder = std::env::temp_dir().join(format!("fla-case-{}-{length}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("a folder");
            let path = folder.join("cut.safetensors");
            std::fs::write(&path, &bytes[..length]).expect("a file");
            let error = Case::read(&path).expect_err("a truncated file").to_string();
            std::fs::remove_dir_all(&folder).expect("the folder is ours");
            assert!(error.contains("cut.safetensors"), "{error}");
        }
    }

    #[test]
    fn offsets_that_do_not_divide_the_tokens_are_refused() {
        assert!(packed(vec![0, 2, 2, 5], 1, 5).is_ok());
        for (cu_seqlens, b) in
            [(vec![0, 3], 1), (vec![1, 5], 1), (vec![0, 4, 3, 5], 1), (vec![], 1), (vec![0, 5], 2)]
        {
            assert!(packed(cu_seqlens.clone(), b, 5).is_err(), "{cu_seqlens:?}");
        }
    }

    #[test]
    fn rounding_says_whether_it_changed_anything() {
        let case = Case::parse("case".into(), &file(METADATA, TENSORS)).expect("a valid case");
        assert!(matches!(case.rounded(Dtype::Bf16), Rounding::Exact));
        let case = case.with_first("x", 1.0 + 2f64.powi(-10));
        assert!(matches!(case.rounded(Dtype::F16), Rounding::Exact));
        assert!(matches!(case.rounded(Dtype::Bf16), Rounding::Changed(_)));
        let case = case.with_first("x", -1e38);
        assert!(matches!(case.rounded(Dtype::F16), Rounding::Overflow("x")));
    }
}
