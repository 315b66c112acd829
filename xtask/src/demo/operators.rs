//! The operators of the demo, and how each of them is made to remember a text.

use fla_reference::tolerance::Model;
use fla_reference::{SeqLens, Shape, dplr, gated_delta, rwkv4, rwkv6, rwkv7};

use super::gpu::{Gpu, GpuMemory};
use super::memory::{HEADS, K, Segment, V, hash};
use crate::Result;

/// The forms of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Token by token.
    Recurrent,
    /// Chunk by chunk.
    Chunk,
}

/// When an operator answers, and what has to be picked from the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Before the byte is written: `o[t]`, `[H, V]`, predicts byte t.
    Before,
    /// After the byte is written, for the key of the next: `o[t]`, `[H, V]`, predicts byte t + 1.
    After,
    /// The same of [`VALUE_HEADS`] value heads: `o[t]`, `[HV, V]`.
    AfterGrouped,
    /// After the byte is written, all buckets at once, `[buckets, V]`: in each group, that of the next key predicts.
    AllBuckets,
}

/// What a pass over a segment returns.
pub(super) struct Step {
    /// `[T, ...]`  what the memory returned, as [`Answer`] says.
    pub(super) o: Vec<f32>,
    /// The state after the last token.
    pub(super) state: Vec<f32>,
}

/// A pass over a segment, on the CPU.
pub(super) type CpuPass = fn(&Segment<'_>, Form, Option<&[f32]>) -> Step;

/// The start of a pass on the GPU.
pub(super) type GpuStart = fn(&Gpu) -> Result<Box<dyn GpuMemory>>;

/// One operator.
pub(super) struct Operator {
    /// Its name.
    pub(super) name: &'static str,
    /// What it does with a key and a value, in a line.
    pub(super) does: &'static str,
    /// Whose row of the tolerance table holds.
    pub(super) model: Model,
    /// When it answers.
    pub(super) answer: Answer,
    /// The reference.
    pub(super) cpu: CpuPass,
    /// The kernel, once there is one.
    pub(super) gpu: Option<GpuStart>,
}

/// Every operator; one joins the GPU when its row names how to start it there.
pub(super) const OPERATORS: &[Operator] = &[
    Operator {
        name: "RWKV-7",
        does: "erases what its key held, then writes; every channel has a decay of its own",
        model: Model::Rwkv7,
        answer: Answer::After,
        cpu: rwkv7,
        gpu: Some(super::gpu::rwkv7),
    },
    Operator {
        name: "DPLR",
        does: "erases what its key held, then writes; nothing else is forgotten",
        model: Model::Dplr,
        answer: Answer::After,
        cpu: dplr,
        gpu: Some(super::gpu::dplr),
    },
    Operator {
        name: "gated delta",
        does: "erases what its key held, then writes; one decay per head",
        model: Model::GatedDelta,
        answer: Answer::After,
        cpu: gated_delta,
        gpu: Some(super::gpu::gated_delta),
    },
    Operator {
        name: "delta layer",
        does: "the same as a layer asks for it: q and k normalised, decay from a_log and dt_bias, strength 2 sigmoid(x), \
               two value heads to a key, all made inside",
        model: Model::GatedDelta,
        answer: Answer::AfterGrouped,
        cpu: delta_layer,
        gpu: Some(super::gpu::delta_layer),
    },
    Operator {
        name: "RWKV-6",
        does: "adds to what its key held, and erases nothing but by a decay over time",
        model: Model::Rwkv6,
        answer: Answer::Before,
        cpu: rwkv6,
        gpu: Some(super::gpu::rwkv6),
    },
    Operator {
        name: "RWKV-4",
        does: "has no keys: averages over time; here the last byte chooses the channels to write and to read",
        model: Model::Rwkv4,
        answer: Answer::AllBuckets,
        cpu: rwkv4,
        gpu: Some(super::gpu::rwkv4),
    },
];

impl Operator {
    /// How many heads take part in a prediction.
    pub(super) fn heads(&self) -> usize {
        match self.answer {
            Answer::AllBuckets => GROUPS.len(),
            Answer::Before | Answer::After => HEADS.len(),
            Answer::AfterGrouped => VALUE_HEADS,
        }
    }

    /// Floats of `o` for one token.
    pub(super) fn row(&self) -> usize {
        match self.answer {
            Answer::AllBuckets => rwkv4_channels(),
            Answer::Before | Answer::After => HEADS.len() * V,
            Answer::AfterGrouped => VALUE_HEADS * V,
        }
    }

    /// Puts what the memory said about byte `i_t` of the segment into `said`, `[heads, V]`.
    ///
    /// `rows` is `o` of the segment with the row of the token before the segment in front.
    pub(super) fn prediction(&self, segment: &Segment<'_>, rows: &[f32], i_t: usize, said: &mut Vec<f32>) {
        let row = |i: usize| &rows[i * self.row()..][..self.row()];
        said.clear();
        match self.answer {
            Answer::Before => said.extend(row(i_t + 1)),
            Answer::After | Answer::AfterGrouped => said.extend(row(i_t)),
            Answer::AllBuckets => {
                for place in rwkv4_places(segment, i_t) {
                    said.extend(&row(i_t)[place..place + V]);
                }
            }
        }
    }
}

/// What a token leaves of an old value in the operators that forget slowly: half is left after 1419 tokens.
///
/// Not slower: the decay of a token rounds the same way every time, by up to 2.4e-7 in f32 on the GPU, so two forms of
/// an operator drift apart by as much for each token that a value survives.
const SLOW: f32 = 1.0 - 1.0 / 2048.0;

/// The same for RWKV-6, whose only way to forget is the decay: half is left after 177 tokens.
const RWKV6: f32 = 1.0 - 1.0 / 256.0;

/// A group of RWKV-4's channels: V for each bucket.
struct Group {
    /// How many of the last bytes choose the bucket.
    context: usize,
    /// Buckets that the contexts are hashed into.
    buckets: usize,
    /// Tokens after which the weight of a value has fallen to 1/e. A bucket that is written all the time adds up that
    /// many weights, and f32 rounds a sum of n equal weights by the same amount at every token, n times in all: the
    /// bucket that every token writes to forgets sooner.
    tokens: f32,
}

/// RWKV-4's groups.
const GROUPS: &[Group] =
    &[Group { context: 0, buckets: 1, tokens: 128.0 }, Group { context: 1, buckets: 15, tokens: 512.0 }];

/// RWKV-4's log weight of the buckets that a token does not write to: 1/2981 of one that it does.
const UNTOUCHED: f32 = -8.0;

/// Channels of RWKV-4.
pub(super) fn rwkv4_channels() -> usize {
    GROUPS.iter().map(|group| group.buckets * V).sum()
}

/// The first channel of the bucket of byte `i_t`, in each group.
fn rwkv4_places(segment: &Segment<'_>, i_t: usize) -> impl Iterator<Item = usize> {
    GROUPS.iter().scan(0, move |first, group| {
        let bucket = hash(segment.context(i_t, group.context)) % group.buckets as u64;
        let place = (*first + bucket as usize) * V;
        *first += group.buckets;
        Some(place)
    })
}

fn shape(segment: &Segment<'_>) -> Shape {
    Shape { seqs: SeqLens::Dense { b: 1, t: segment.t() }, h: HEADS.len(), k: K, v: V }
}

/// What the three delta rules read: `a = -k` and `b = strength k` erase that share of what the key held, and
/// `strength v` takes its place.
pub(super) struct DeltaInputs<'a> {
    /// `[T, H, K]`  the key of the next byte
    pub(super) q: &'a [f32],
    /// `[T, H, K]`  the key of this byte
    pub(super) k: &'a [f32],
    /// `[T, H, V]`  the code of this byte times the strength
    pub(super) v: &'a [f32],
    /// `[T, H, K]`
    pub(super) a: Vec<f32>,
    /// `[T, H, K]`
    pub(super) b: Vec<f32>,
    /// `[T, H, K]`  log decay
    pub(super) g: Vec<f32>,
}

impl<'a> DeltaInputs<'a> {
    /// The inputs of a segment, with the decay of each channel of a key.
    fn new(segment: &'a Segment<'_>, decay: impl Fn(usize) -> f32) -> DeltaInputs<'a> {
        let k = segment.keys();
        let a = k.iter().map(|k| -k).collect();
        let strengths = HEADS.iter().flat_map(|head| [head.strength; K]).cycle();
        let b = k.iter().zip(strengths).map(|(k, strength)| k * strength).collect();
        let channels: Vec<f32> = (0..K).map(|i_k| decay(i_k).ln()).collect();
        let g = channels.repeat(k.len() / K);
        DeltaInputs { q: segment.next_keys(), k, v: &segment.weighted_values, a, b, g }
    }

    /// As RWKV-7 reads it.
    pub(super) fn rwkv7(segment: &'a Segment<'_>) -> DeltaInputs<'a> {
        DeltaInputs::new(segment, |i_k| SLOW - i_k as f32 / K as f32 / 2048.0)
    }

    /// As DPLR reads it.
    pub(super) fn dplr(segment: &'a Segment<'_>) -> DeltaInputs<'a> {
        DeltaInputs::new(segment, |_| 1.0)
    }
}

fn rwkv7(segment: &Segment<'_>, form: Form, initial_state: Option<&[f32]>) -> Step {
    let x = DeltaInputs::rwkv7(segment);
    let x = rwkv7::Inputs { r: x.q, w: &x.g, k: x.k, v: x.v, a: &x.a, b: &x.b, initial_state };
    let options = rwkv7::Options::new(1.0);
    let y = match form {
        Form::Recurrent => rwkv7::recurrent_fwd(&shape(segment), &x, &options),
        Form::Chunk => rwkv7::chunk_fwd(&shape(segment), &x, &options),
    };
    Step { o: y.o, state: y.final_state }
}

fn dplr(segment: &Segment<'_>, form: Form, initial_state: Option<&[f32]>) -> Step {
    let x = DeltaInputs::dplr(segment);
    let x = dplr::Inputs { q: x.q, k: x.k, v: x.v, a: &x.a, b: &x.b, g: &x.g, initial_state };
    let options = dplr::Options::new(1.0);
    let y = match form {
        Form::Recurrent => dplr::recurrent_fwd(&shape(segment), &x, &options),
        Form::Chunk => dplr::chunk_fwd(&shape(segment), &x, &options),
    };
    Step { o: y.o, state: y.final_state }
}

/// The gates of the gated delta rule.
pub(super) struct GatedDeltaGates {
    /// `[T, H]`  log decay
    pub(super) g: Vec<f32>,
    /// `[T, H]`  strength
    pub(super) beta: Vec<f32>,
}

impl GatedDeltaGates {
    /// Those of a segment.
    pub(super) fn new(segment: &Segment<'_>) -> GatedDeltaGates {
        let beta: Vec<f32> = HEADS.iter().map(|head| head.strength).collect::<Vec<_>>().repeat(segment.t());
        GatedDeltaGates { g: vec![SLOW.ln(); beta.len()], beta }
    }
}

fn gated_delta(segment: &Segment<'_>, form: Form, initial_state: Option<&[f32]>) -> Step {
    let GatedDeltaGates { g, beta } = GatedDeltaGates::new(segment);
    let x = gated_delta::Inputs {
        q: segment.next_keys(),
        k: segment.keys(),
        v: &segment.values,
        g: gated_delta::Gate::Log(&g),
        gk: None,
        gv: None,
        beta: gated_delta::Beta::PerHead(&beta),
        initial_state,
    };
    let options = gated_delta::Options::new(HEADS.len(), 1.0);
    let y = match form {
        Form::Recurrent => gated_delta::recurrent_fwd(&shape(segment), &x, &options),
        Form::Chunk => gated_delta::chunk_fwd(&shape(segment), &x, &options),
    };
    Step { o: y.o, state: y.final_state }
}

/// Value heads that read one query head in a layer of the gated delta rule.
const GROUP: usize = 2;

/// Value heads of such a layer.
pub(super) const VALUE_HEADS: usize = GROUP * HEADS.len();

/// What a layer of the gated delta rule reads: everything that the operator can be asked to make of it itself.
pub(super) struct DeltaLayer {
    /// `[T, H, K]`  the key of the next byte, of some length
    pub(super) q: Vec<f32>,
    /// `[T, H, K]`  the key of this byte, of some length
    pub(super) k: Vec<f32>,
    /// `[T, HV, V]`  the code of this byte
    pub(super) v: Vec<f32>,
    /// `[T, HV]`  logit of the decay
    pub(super) g: Vec<f32>,
    /// `[HV]`  logarithm of the rate
    pub(super) a_log: Vec<f32>,
    /// `[HV]`  added to the logits
    pub(super) dt_bias: Vec<f32>,
    /// `[T, HV]`  logit of half the strength
    pub(super) beta: Vec<f32>,
}

impl DeltaLayer {
    /// The inputs of a segment. The decays are 0.9995 to 0.9985, and one value head of a key writes as in the other
    /// operators, the other more firmly: three times as much, which for the last is 1.5 and turns what its key held round.
    pub(super) fn new(segment: &Segment<'_>) -> DeltaLayer {
        let lengths = segment.bytes.iter().map(|byte| f32::from(1 + byte % 7));
        let long = |x: &[f32]| -> Vec<f32> {
            let rows = x.chunks_exact(HEADS.len() * K).zip(lengths.clone());
            rows.flat_map(|(row, length)| row.iter().map(move |x| x * length)).collect()
        };
        let v = segment.values.chunks_exact(V).flat_map(|code| [code; GROUP].concat()).collect();
        let dt_bias: Vec<f32> = (0..VALUE_HEADS).map(|i_h| i_h as f32 / 8.0 - 1.0).collect();
        let g = dt_bias.iter().map(|bias| -6.0 - bias).collect::<Vec<_>>().repeat(segment.t());
        let a_log = (0..VALUE_HEADS).map(|i_h| i_h as f32 / 10.0 - 1.6).collect();
        let strengths = HEADS.iter().flat_map(|head| [head.strength, 3.0 * head.strength]);
        let logits: Vec<f32> = strengths.map(|strength| (strength / (2.0 - strength)).ln()).collect();
        DeltaLayer {
            q: long(segment.next_keys()),
            k: long(segment.keys()),
            v,
            g,
            a_log,
            dt_bias,
            beta: logits.repeat(segment.t()),
        }
    }
}

fn delta_layer(segment: &Segment<'_>, form: Form, initial_state: Option<&[f32]>) -> Step {
    let DeltaLayer { q, k, v, g, a_log, dt_bias, beta } = DeltaLayer::new(segment);
    let x = gated_delta::Inputs {
        q: &q,
        k: &k,
        v: &v,
        g: gated_delta::Gate::Raw { g: &g, a_log: &a_log, dt_bias: Some(&dt_bias) },
        gk: None,
        gv: None,
        beta: gated_delta::Beta::PerHead(&beta),
        initial_state,
    };
    let options = gated_delta::Options::new(VALUE_HEADS, 1.0)
        .with_qk_norm(gated_delta::QkNorm::L2)
        .with_beta_map(gated_delta::BetaMap::TwiceSigmoid);
    let y = match form {
        Form::Recurrent => gated_delta::recurrent_fwd(&shape(segment), &x, &options),
        Form::Chunk => gated_delta::chunk_fwd(&shape(segment), &x, &options),
    };
    Step { o: y.o, state: y.final_state }
}

/// The decay and the bonus of RWKV-6.
pub(super) struct Rwkv6Gates {
    /// `[T, H, K]`  log decay
    pub(super) w: Vec<f32>,
    /// `[H, K]`  bonus: none, since the answer must not contain the byte that is being written
    pub(super) u: Vec<f32>,
}

impl Rwkv6Gates {
    /// Those of a segment.
    pub(super) fn new(segment: &Segment<'_>) -> Rwkv6Gates {
        Rwkv6Gates { w: vec![RWKV6.ln(); segment.keys().len()], u: vec![0.0; HEADS.len() * K] }
    }
}

fn rwkv6(segment: &Segment<'_>, form: Form, initial_state: Option<&[f32]>) -> Step {
    let k = segment.keys();
    let Rwkv6Gates { w, u } = Rwkv6Gates::new(segment);
    let x = rwkv6::Inputs { r: k, k, v: &segment.weighted_values, w: &w, u: &u, initial_state };
    let options = rwkv6::Options::new(1.0);
    let y = match form {
        Form::Recurrent => rwkv6::recurrent_fwd(&shape(segment), &x, &options),
        Form::Chunk => rwkv6::chunk_fwd(&shape(segment), &x, &options),
    };
    Step { o: y.o, state: y.final_state }
}

/// What RWKV-4 reads.
pub(super) struct Rwkv4Inputs {
    /// `[C]`  logarithm of the negative log decay
    pub(super) w: Vec<f32>,
    /// `[C]`  bonus
    pub(super) u: Vec<f32>,
    /// `[T, C]`
    pub(super) k: Vec<f32>,
    /// `[T, C]`
    pub(super) v: Vec<f32>,
}

impl Rwkv4Inputs {
    /// The inputs of a segment.
    pub(super) fn new(segment: &Segment<'_>) -> Rwkv4Inputs {
        let c = rwkv4_channels();
        let mut k = vec![UNTOUCHED; segment.t() * c];
        let mut v = vec![0.0; segment.t() * c];
        let codes = segment.values.chunks_exact(HEADS.len() * V);
        for (i_t, code) in codes.enumerate() {
            for place in rwkv4_places(segment, i_t) {
                let place = i_t * c + place;
                k[place..place + V].fill(0.0);
                v[place..place + V].copy_from_slice(&code[..V]);
            }
        }
        let w = GROUPS.iter().flat_map(|group| vec![-group.tokens.ln(); group.buckets * V]).collect();
        Rwkv4Inputs { w, u: vec![0.0; c], k, v }
    }
}

fn rwkv4(segment: &Segment<'_>, form: Form, initial_state: Option<&[f32]>) -> Step {
    let Rwkv4Inputs { w, u, k, v } = Rwkv4Inputs::new(segment);
    let c = rwkv4_channels();
    let x = rwkv4::Inputs { w: &w, u: &u, k: &k, v: &v, initial_state };
    let shape = rwkv4::Shape { seqs: SeqLens::Dense { b: 1, t: segment.t() }, c };
    let options = rwkv4::Options::new();
    let y = match form {
        Form::Recurrent => rwkv4::recurrent_fwd(&shape, &x, &options),
        Form::Chunk => rwkv4::chunk_fwd(&shape, &x, &options),
    };
    Step { o: y.o, state: y.final_state }
}
