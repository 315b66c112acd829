//! The conformance cases of `tests/vectors`, through every operator in both forms.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use fla_reference::compare::relative_rms;
use fla_reference::gated_delta::{self, Beta, BetaMap, Gate, QkNorm};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, limit_against_f32, relieved};
use fla_reference::{SeqLens, Shape, dplr, rwkv4, rwkv6, rwkv7, token_shift};
use support::{Form, report};

/// What a file holds.
#[derive(Clone, Debug)]
struct Case {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Vec<f64>>,
}

impl Case {
    fn read(path: &Path) -> Case {
        let bytes = std::fs::read(path).unwrap();
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let mut metadata = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, value) in (Json { rest: std::str::from_utf8(header).unwrap() }).map() {
            let fields = value.map();
            if name == "__metadata__" {
                metadata = fields.into_iter().map(|(key, value)| (key, value.text())).collect();
                continue;
            }
            let offsets = fields["data_offsets"].numbers();
            let data = &data[offsets[0]..offsets[1]];
            let values = match fields["dtype"].text().as_str() {
                "F32" => data.as_chunks().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect(),
                "F64" => data.as_chunks().0.iter().map(|x| f64::from_le_bytes(*x)).collect(),
                "I64" => data.as_chunks().0.iter().map(|x| i64::from_le_bytes(*x) as f64).collect(),
                other => panic!("`{name}` is {other}"),
            };
            tensors.insert(name, values);
        }
        Case { metadata, tensors }
    }

    fn dim(&self, name: &str) -> usize {
        self.metadata[name].parse().unwrap()
    }

    fn scale(&self) -> f64 {
        self.metadata["scale"].parse().unwrap()
    }

    fn flag(&self, name: &str) -> bool {
        self.metadata[name] == "true"
    }

    fn tensor(&self, name: &str) -> &[f64] {
        &self.tensors[name]
    }

    fn optional(&self, name: &str) -> Option<&[f64]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    fn seqs(&self) -> SeqLens {
        match self.optional("cu_seqlens") {
            Some(offsets) => SeqLens::Packed { cu_seqlens: offsets.iter().map(|&x| x as usize).collect() },
            None => SeqLens::Dense { b: self.dim("B"), t: self.dim("T") },
        }
    }

    fn shape(&self) -> Shape {
        Shape { seqs: self.seqs(), h: self.dim("H"), k: self.dim("K"), v: self.dim("V") }
    }

    /// Everything that the case expects, by name.
    fn run(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        match self.metadata["op"].as_str() {
            "dplr" => self.dplr(form),
            "gated_delta" => self.gated_delta(form),
            "rwkv4" => self.rwkv4(form),
            "rwkv6" => self.rwkv6(form),
            "rwkv7" => self.rwkv7(form),
            "rwkv7_fused_mul" => self.fused_mul(form),
            "rwkv7_addcmul" => self.addcmul(),
            "rwkv7_channel_mixing" => self.channel_mixing(),
            "rwkv7_gate_output_correction" => self.gate_output_correction(),
            "rwkv7_k_update" => self.k_update(),
            "token_shift" => self.token_shift(),
            other => panic!("no operator is called {other}"),
        }
    }

    fn model(&self) -> Model {
        match self.metadata["op"].as_str() {
            "dplr" => Model::Dplr,
            "gated_delta" => Model::GatedDelta,
            "rwkv4" => Model::Rwkv4,
            "rwkv6" => Model::Rwkv6,
            "token_shift" => Model::TokenShift,
            _ => Model::Rwkv7,
        }
    }

    fn output_grads(&self) -> dplr::OutputGrads<'_, f64> {
        dplr::OutputGrads { d_o: self.tensor("do"), d_final_state: self.optional("d_final_state") }
    }

    fn dplr(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        let (shape, dy) = (self.shape(), self.output_grads());
        let [q, k, v, a, b, g] = ["q", "k", "v", "a", "b", "gk"].map(|name| self.tensor(name));
        let x = dplr::Inputs { q, k, v, a, b, g, initial_state: self.optional("initial_state") };
        let options = dplr::Options::new(self.scale());
        let (y, dx) = match form {
            Form::Recurrent => {
                (dplr::recurrent_fwd(&shape, &x, &options), dplr::recurrent_bwd(&shape, &x, &dy, &options))
            }
            Form::Chunk(chunk) => {
                let options = options.with_chunk(chunk);
                (dplr::chunk_fwd(&shape, &x, &options), dplr::chunk_bwd(&shape, &x, &dy, &options))
            }
        };
        vec![
            ("o", y.o),
            ("final_state", y.final_state),
            ("dq", dx.dq),
            ("dk", dx.dk),
            ("dv", dx.dv),
            ("da", dx.da),
            ("db", dx.db),
            ("dgk", dx.dg),
            ("d_initial_state", dx.d_initial_state),
        ]
    }

    fn rwkv7(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        let (shape, dy) = (self.shape(), self.output_grads());
        let [r, w, k, v, a, b] = ["r", "w", "k", "v", "a", "b"].map(|name| self.tensor(name));
        let x = rwkv7::Inputs { r, w, k, v, a, b, initial_state: self.optional("initial_state") };
        let options = rwkv7::Options::new(self.scale());
        let (y, dx) = match form {
            Form::Recurrent => {
                (rwkv7::recurrent_fwd(&shape, &x, &options), rwkv7::recurrent_bwd(&shape, &x, &dy, &options))
            }
            Form::Chunk(chunk) => {
                let options = options.with_chunk(chunk);
                (rwkv7::chunk_fwd(&shape, &x, &options), rwkv7::chunk_bwd(&shape, &x, &dy, &options))
            }
        };
        vec![
            ("o", y.o),
            ("final_state", y.final_state),
            ("dr", dx.dr),
            ("dw", dx.dw),
            ("dk", dx.dk),
            ("dv", dx.dv),
            ("da", dx.da),
            ("db", dx.db),
            ("d_initial_state", dx.d_initial_state),
        ]
    }

    fn fused_mul(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        let (shape, dy) = (self.shape(), self.output_grads());
        let [r, w, k, v, kk, a] = ["r", "w", "k", "v", "kk", "a"].map(|name| self.tensor(name));
        let initial_state = self.optional("initial_state");
        let x = rwkv7::FusedMulInputs { r, w, k, v, kk, a, initial_state };
        let options = rwkv7::Options::new(self.scale());
        let (y, dx) = match form {
            Form::Recurrent => (
                rwkv7::fused_mul_recurrent_fwd(&shape, &x, &options),
                rwkv7::fused_mul_recurrent_bwd(&shape, &x, &dy, &options),
            ),
            Form::Chunk(chunk) => {
                let options = options.with_chunk(chunk);
                (
                    rwkv7::fused_mul_chunk_fwd(&shape, &x, &options),
                    rwkv7::fused_mul_chunk_bwd(&shape, &x, &dy, &options),
                )
            }
        };
        vec![
            ("o", y.o),
            ("final_state", y.final_state),
            ("dr", dx.dr),
            ("dw", dx.dw),
            ("dk", dx.dk),
            ("dv", dx.dv),
            ("dkk", dx.dkk),
            ("da", dx.da),
            ("d_initial_state", dx.d_initial_state),
        ]
    }

    fn rwkv6(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        let (shape, dy) = (self.shape(), self.output_grads());
        let [r, k, v, w, u] = ["r", "k", "v", "w", "u"].map(|name| self.tensor(name));
        let x = rwkv6::Inputs { r, k, v, w, u, initial_state: self.optional("initial_state") };
        let options = rwkv6::Options::new(self.scale());
        let (y, dx) = match form {
            Form::Recurrent => {
                (rwkv6::recurrent_fwd(&shape, &x, &options), rwkv6::recurrent_bwd(&shape, &x, &dy, &options))
            }
            Form::Chunk(chunk) => {
                let options = options.with_chunk(chunk);
                (rwkv6::chunk_fwd(&shape, &x, &options), rwkv6::chunk_bwd(&shape, &x, &dy, &options))
            }
        };
        vec![
            ("o", y.o),
            ("final_state", y.final_state),
            ("dr", dx.dr),
            ("dk", dx.dk),
            ("dv", dx.dv),
            ("dw", dx.dw),
            ("du", dx.du),
            ("d_initial_state", dx.d_initial_state),
        ]
    }

    fn rwkv4(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        let shape = rwkv4::Shape { seqs: self.seqs(), c: self.dim("C") };
        let [w, u, k, v] = ["w", "u", "k", "v"].map(|name| self.tensor(name));
        let x = rwkv4::Inputs { w, u, k, v, initial_state: self.optional("state") };
        let dy = rwkv4::OutputGrads { d_o: self.tensor("do"), d_final_state: self.optional("d_final_state") };
        let options = rwkv4::Options::new();
        let (y, dx) = match form {
            Form::Recurrent => {
                (rwkv4::recurrent_fwd(&shape, &x, &options), rwkv4::recurrent_bwd(&shape, &x, &dy, &options))
            }
            Form::Chunk(chunk) => {
                let options = options.with_chunk(chunk);
                (rwkv4::chunk_fwd(&shape, &x, &options), rwkv4::chunk_bwd(&shape, &x, &dy, &options))
            }
        };
        vec![
            ("o", y.o),
            ("final_state", y.final_state),
            ("dw", dx.dw),
            ("du", dx.du),
            ("dk", dx.dk),
            ("dv", dx.dv),
            ("dstate", dx.d_initial_state),
        ]
    }

    fn gated_delta(&self, form: Form) -> Vec<(&'static str, Vec<f64>)> {
        let (shape, dy) = (self.shape(), self.output_grads());
        let [q, k, v, g, beta] = ["q", "k", "v", "g", "beta"].map(|name| self.tensor(name));
        let x = gated_delta::Inputs {
            q,
            k,
            v,
            g: match self.optional("A_log") {
                None => Gate::Log(g),
                Some(a_log) => Gate::Raw { g, a_log, dt_bias: self.optional("dt_bias") },
            },
            gk: None,
            gv: None,
            beta: Beta::PerHead(beta),
            initial_state: self.optional("initial_state"),
        };
        let options = gated_delta::Options::new(self.dim("HV"), self.scale())
            .with_qk_norm(if self.flag("qk_l2norm") { QkNorm::L2 } else { QkNorm::AsGiven })
            .with_beta_map(match (self.flag("beta_sigmoid"), self.flag("allow_neg_eigval")) {
                (false, _) => BetaMap::AsGiven,
                (true, false) => BetaMap::Sigmoid,
                (true, true) => BetaMap::TwiceSigmoid,
            });
        let (y, dx) = match form {
            Form::Recurrent => (
                gated_delta::recurrent_fwd(&shape, &x, &options),
                gated_delta::recurrent_bwd(&shape, &x, &dy, &options),
            ),
            Form::Chunk(chunk) => {
                let options = options.with_chunk(chunk);
                (
                    gated_delta::chunk_fwd(&shape, &x, &options),
                    gated_delta::chunk_bwd(&shape, &x, &dy, &options),
                )
            }
        };
        let mut results = vec![
            ("o", y.o),
            ("final_state", y.final_state),
            ("dq", dx.dq),
            ("dk", dx.dk),
            ("dv", dx.dv),
            ("d_initial_state", dx.d_initial_state),
        ];
        let optional =
            [("dg", dx.dg), ("dbeta", dx.dbeta), ("dA_log", dx.d_a_log), ("ddt_bias", dx.d_dt_bias)];
        results.extend(optional.into_iter().filter_map(|(name, x)| Some((name, x?))));
        results
    }

    fn addcmul(&self) -> Vec<(&'static str, Vec<f64>)> {
        let shape = rwkv7::AddcmulShape { tokens: self.dim("B") * self.dim("T"), d: self.dim("D") };
        let [hidden, delta, xr, xw, xk, xv, xa] =
            ["hidden", "delta", "xr", "xw", "xk", "xv", "xa"].map(|name| self.tensor(name));
        let x = rwkv7::AddcmulInputs { hidden, delta, xr, xw, xk, xv, xa, xg: self.optional("xg") };
        let [d_out_r, d_out_w, d_out_k, d_out_v, d_out_a] =
            ["dout_r", "dout_w", "dout_k", "dout_v", "dout_a"].map(|name| self.tensor(name));
        let d_out_g = self.optional("dout_g");
        let dy = rwkv7::AddcmulOutputGrads { d_out_r, d_out_w, d_out_k, d_out_v, d_out_a, d_out_g };
        let (y, dx) = (rwkv7::addcmul_fwd(&shape, &x), rwkv7::addcmul_bwd(&shape, &x, &dy));
        let mut results = vec![
            ("out_r", y.out_r),
            ("out_w", y.out_w),
            ("out_k", y.out_k),
            ("out_v", y.out_v),
            ("out_a", y.out_a),
            ("dhidden", dx.d_hidden),
            ("ddelta", dx.d_delta),
            ("dxr", dx.dxr),
            ("dxw", dx.dxw),
            ("dxk", dx.dxk),
            ("dxv", dx.dxv),
            ("dxa", dx.dxa),
        ];
        results.extend(y.out_g.map(|x| ("out_g", x)));
        results.extend(dx.dxg.map(|x| ("dxg", x)));
        results
    }

    fn channel_mixing(&self) -> Vec<(&'static str, Vec<f64>)> {
        let shape = rwkv7::ChannelMixingShape { seqs: self.seqs(), c: self.dim("C"), f: self.dim("F") };
        let x = rwkv7::ChannelMixingInputs {
            x: self.tensor("x"),
            x_prev: self.optional("x_prev"),
            x_k: self.tensor("x_k"),
            key_weight: self.tensor("key_weight"),
            value_weight: self.tensor("value_weight"),
        };
        let dy = rwkv7::ChannelMixingOutputGrads { d_out: self.tensor("dout"), d_x_last: None };
        let y = rwkv7::channel_mixing_fwd(&shape, &x);
        let dx = rwkv7::channel_mixing_bwd(&shape, &x, &dy);
        vec![
            ("out", y.out),
            ("dx", dx.dx),
            ("dx_prev", dx.dx_prev),
            ("dx_k", dx.dx_k),
            ("dkey_weight", dx.d_key_weight),
            ("dvalue_weight", dx.d_value_weight),
        ]
    }

    fn gate_output_correction(&self) -> Vec<(&'static str, Vec<f64>)> {
        let tokens = self.dim("B") * self.dim("T");
        let shape = rwkv7::GateOutputCorrectionShape { tokens, h: self.dim("H"), k: self.dim("D") };
        let [o, r, k, r_k, v, g] = ["o", "r", "k", "r_k", "v", "g"].map(|name| self.tensor(name));
        let x = rwkv7::GateOutputCorrectionInputs { o, r, k, r_k, v, g };
        let y = rwkv7::gate_output_correction_fwd(&shape, &x);
        let dx = rwkv7::gate_output_correction_bwd(&shape, &x, self.tensor("dout"));
        vec![
            ("out", y),
            ("do", dx.d_o),
            ("dr", dx.dr),
            ("dk", dx.dk),
            ("dr_k", dx.dr_k),
            ("dv", dx.dv),
            ("dg", dx.dg),
        ]
    }

    fn k_update(&self) -> Vec<(&'static str, Vec<f64>)> {
        let shape = rwkv7::KUpdateShape { tokens: self.dim("B") * self.dim("T"), d: self.dim("D") };
        let [k, a, ka] = ["k", "a", "ka"].map(|name| self.tensor(name));
        let x = rwkv7::KUpdateInputs { k, a, ka };
        let y = rwkv7::k_update_fwd(&shape, &x);
        let dx = rwkv7::k_update_bwd(&shape, &x, self.tensor("dout"));
        vec![("out", y), ("dk", dx.dk), ("da", dx.da), ("dka", dx.dka)]
    }

    fn token_shift(&self) -> Vec<(&'static str, Vec<f64>)> {
        let shape = token_shift::Shape { seqs: self.seqs(), d: self.dim("D") };
        let x = token_shift::Inputs { x: self.tensor("x"), cache: self.optional("cache") };
        let dy = token_shift::OutputGrads { dy: self.tensor("dy"), d_cache_out: self.optional("dcache_out") };
        let (y, dx) = (token_shift::fwd(&shape, &x), token_shift::bwd(&shape, &x, &dy));
        vec![("y", y.y), ("cache_out", y.cache_out), ("dx", dx.dx), ("dcache", dx.d_cache)]
    }
}

/// Just enough JSON for a header: maps, lists of whole numbers, and text without escapes.
#[derive(Clone, Copy, Debug)]
struct Json<'a> {
    rest: &'a str,
}

impl<'a> Json<'a> {
    fn map(self) -> BTreeMap<String, Json<'a>> {
        let mut map = BTreeMap::new();
        for entry in self.items('{', '}') {
            let end = entry[1..].find('"').unwrap() + 1;
            let value = entry[end + 1..].trim_start().strip_prefix(':').unwrap();
            map.insert(entry[1..end].to_string(), Json { rest: value.trim() });
        }
        map
    }

    fn numbers(self) -> Vec<usize> {
        self.items('[', ']').into_iter().map(|item| item.parse().unwrap()).collect()
    }

    fn text(self) -> String {
        let text = self.rest.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
        assert!(!text.contains('\\'), "escapes are not read: {text}");
        text.to_string()
    }

    /// What lies between commas that are in no inner map, list or text.
    fn items(self, open: char, close: char) -> Vec<&'a str> {
        let inner = self.rest.trim().strip_prefix(open).unwrap().strip_suffix(close).unwrap();
        let (mut items, mut depth, mut quoted, mut start) = (Vec::new(), 0, false, 0);
        for (i, c) in inner.char_indices() {
            match c {
                '"' => quoted = !quoted,
                '{' | '[' if !quoted => depth += 1,
                '}' | ']' if !quoted => depth -= 1,
                ',' if !quoted && depth == 0 => {
                    items.push(inner[start..i].trim());
                    start = i + 1;
                }
                _ => {}
            }
        }
        items.push(inner[start..].trim());
        items.retain(|item| !item.is_empty());
        items
    }
}

#[test]
fn every_case_passes_in_both_forms() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    assert_eq!(paths.len(), 13, "{paths:?}");

    let (mut failures, mut cases) = (Vec::new(), 0);
    for path in paths {
        let case = Case::read(&path);
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let key = Key {
            backend: Backend::Reference,
            model: case.model(),
            pass: Pass::RecurrentFwd,
            dtype: Dtype::F64,
            class: Class::Output,
        };
        for form in [Form::Recurrent, Form::Chunk(5), Form::Chunk(16)] {
            let pass = if matches!(form, Form::Recurrent) { Pass::RecurrentFwd } else { Pass::ChunkFwd };
            let mut limit = limit(Key { pass, ..key }).unwrap();
            if case.metadata["outputs_dtype"] == "F32" {
                limit = limit_against_f32(limit);
            }
            let mut compared = 0;
            for (tensor, got) in case.run(form) {
                // Absent states have no gradient in the file.
                let Some(want) = case.optional(tensor) else {
                    assert!(["d_initial_state", "dcache"].contains(&tensor), "{name} lacks `{tensor}`");
                    continue;
                };
                let mut error = relative_rms(&got, want);
                if let (Form::Chunk(_), Some(ratio)) =
                    (form, case.metadata.get(&format!("cancellation_{tensor}")))
                {
                    error = relieved(error, ratio.parse().unwrap());
                }
                if error > limit {
                    failures
                        .push(format!("{name}, {form:?}: `{tensor}` is off by {error:.1e} > {limit:.0e}"));
                }
                compared += 1;
            }
            assert!(compared >= 4, "{name}: only {compared} tensors were compared");
            cases += 1;
        }
    }
    report(failures, cases);
}
