//! Long sequences with few heads: segments that are walked side by side, and what each of them does to a state.

use std::mem::offset_of;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, RawSlice, SeqLens, Shape, Source, Unit,
    Workspace,
};

use crate::chunk_fwd::{ChunkFwdInputs, ChunkFwdOptions, Walk, Wanted};
use crate::config::{CHUNK, ChunkFwdWrites};

const SOURCE: Source =
    Source { name: "fla/dplr/chunk_fwd_state.cu", text: include_str!("../kernels/chunk_fwd_state.cu") };

/// Threads of the fold, and columns of a block.
const FOLD_THREADS: u32 = 256;
const FOLD_COLS: usize = 32;

/// Sequences that are cut into segments of whole chunks, each of which is walked like a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segments {
    /// The segments of all sequences.
    pub(crate) seqs: SeqLens,
    /// Segments before each sequence, `[N + 1]`; a sequence has at least one.
    offsets: Vec<usize>,
}

impl Segments {
    /// A segment is walked three times: for what it adds to a state, for its map, and for what is wanted. Fewer segments
    /// gain nothing.
    const MIN_COUNT: usize = 4;

    /// A segment has at least so many chunks: less is done before its state has been folded.
    const MIN_CHUNKS: usize = 16;

    /// The choice that fills `slots` blocks about once, where a sequence takes `blocks`; none when sequences stay whole.
    pub(crate) fn new(seqs: &SeqLens, blocks: usize, slots: usize) -> Option<Self> {
        let lens = (0..seqs.n()).map(|i| seqs.len(i)).collect::<Option<Vec<_>>>()?;
        let chunks = |len: &usize| len.div_ceil(CHUNK);
        let longest = lens.iter().map(chunks).max()?;
        let all: usize = lens.iter().map(chunks).sum();
        // A share of all chunks is what a slot has to do in any case.
        let wanted = longest.saturating_mul(slots) / all.saturating_mul(blocks).max(1);
        let count = wanted.min(longest / Self::MIN_CHUNKS);
        if count < Self::MIN_COUNT {
            return None;
        }
        Self::of_chunks(seqs.b() * seqs.t(), &lens, longest.div_ceil(count))
    }

    /// Sequences of these lengths, of `tokens` in all, in segments of so many chunks.
    fn of_chunks(tokens: usize, lens: &[usize], chunks: usize) -> Option<Self> {
        let (mut ends, mut offsets) = (vec![0], vec![0]);
        let mut start = 0;
        for len in lens {
            let count = len.div_ceil(chunks * CHUNK).max(1);
            ends.extend((1..=count).map(|i| start + (i * chunks * CHUNK).min(*len)));
            offsets.push(ends.len() - 1);
            start += len;
        }
        Some(Self { seqs: SeqLens::packed(&ends, tokens).ok()?, offsets })
    }
}

/// Which way states are folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fold {
    /// From the first segment to the last.
    Forward,
    /// From the last to the first, by transposed maps: gradients.
    Back,
}

/// Makes the states at the starts of segments of what each segment adds to a state of zero.
#[derive(Debug)]
pub(crate) struct Maps<T> {
    /// Walks every segment from the unit matrix.
    walk: Walk<T>,
    kernel: Kernel<ChunkFwdStateParams>,
    fold: Fold,
    /// None when there is nothing to launch.
    fold_grid: Option<Grid>,
    offsets: CudaSlice<i64>,
    h: usize,
    /// Elements of the maps, and of the states.
    len: usize,
    states_len: usize,
}

impl<T: Element> Maps<T> {
    pub(crate) fn new(
        device: &Device,
        shape: &Shape,
        segments: &Segments,
        options: &ChunkFwdOptions,
        fold: Fold,
    ) -> Result<Self, Error> {
        let of_maps = Shape { seqs: segments.seqs.clone(), v: shape.k, ..*shape };
        let of_states = Shape { v: shape.v, ..of_maps.clone() };
        Ok(Self {
            walk: Walk::new(device, &of_maps, options, ChunkFwdWrites::Map)?,
            kernel: device.kernel(&unit(shape.k, shape.v, fold))?,
            fold,
            fold_grid: Grid::of_heads(shape, shape.v.div_ceil(FOLD_COLS))?,
            offsets: device.upload_offsets(&segments.offsets)?,
            h: shape.h,
            len: of_maps.state_len(),
            states_len: of_states.state_len(),
        })
    }

    /// Bytes of the parts that a workspace has for this.
    pub(crate) fn bytes(&self) -> [usize; 2] {
        [self.len, self.states_len].map(|len| len.saturating_mul(size_of::<f32>()))
    }

    /// Takes them.
    pub(crate) fn parts<'a>(&self, workspace: &'a Workspace<'_>) -> Result<MapParts<'a>, Error> {
        Ok(MapParts { maps: workspace.take(self.len)?, states: workspace.take(self.states_len)? })
    }

    /// Queues the walk and the fold; `x.initial_state` is not read.
    pub(crate) fn run(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        parts: &mut MapParts<'_>,
        ends: Ends<'_, '_>,
    ) -> Result<(), Error> {
        let x = ChunkFwdInputs { initial_state: None, ..*x };
        let wanted = Wanted { final_state: Some(&mut parts.maps), ..Wanted::NOTHING };
        self.walk.launch(stream, &x, wanted)?;
        let Some(grid) = self.fold_grid else { return Ok(()) };
        let [first, last] = match self.fold {
            Fold::Forward => ["initial_state", "final_state"],
            Fold::Back => ["d_final_state", "d_initial_state"],
        };
        self.kernel.launch(stream, grid, |bind| ChunkFwdStateParams {
            maps: bind.read("workspace", &parts.maps),
            states: bind.write("workspace", &mut parts.states),
            offsets: bind.read("segments", &self.offsets),
            first: bind.read_opt(first, ends.first),
            last: bind.write_opt(last, ends.last),
            // `new` has checked that H fits.
            h: self.h as i32,
        })
    }
}

/// What is known of segments.
#[derive(Debug)]
pub(crate) struct MapParts<'a> {
    maps: RawSlice<'a, f32>,
    /// What each segment adds to a state of zero, and then the state that it starts from.
    pub(crate) states: RawSlice<'a, f32>,
}

/// States before and after whole sequences, in the order of the walk.
pub(crate) struct Ends<'a, 'b> {
    pub(crate) first: Option<&'a dyn DevicePtr<f32>>,
    pub(crate) last: Option<&'a mut (dyn DevicePtrMut<f32> + 'b)>,
}

/// The kernels of common heads.
pub(crate) fn units() -> impl Iterator<Item = Unit> {
    [(64, 64), (128, 128), (60, 100)]
        .into_iter()
        .flat_map(|(k, v)| [Fold::Forward, Fold::Back].map(|fold| unit(k, v, fold)))
}

fn unit(k: usize, v: usize, fold: Fold) -> Unit {
    // Both are below 2^31: plans have checked them.
    Unit::new::<ChunkFwdStateParams>("dplr", "chunk_fwd_state", SOURCE, FOLD_THREADS)
        .with("K", k as i32)
        .with("V", v as i32)
        .with("BACK", fold == Fold::Back)
}

/// Twin of `fla::dplr::ChunkFwdStateParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkFwdStateParams {
    maps: Ptr<f32>,
    states: PtrMut<f32>,
    offsets: Ptr<i64>,
    first: Ptr<f32>,
    last: PtrMut<f32>,
    h: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for ChunkFwdStateParams {
    const CUDA_TYPE: &'static str = "fla::dplr::ChunkFwdStateParams";
    const FIELDS: &'static [Field] = &[
        Field::new("maps", "const float*", offset_of!(Self, maps)),
        Field::new("states", "float*", offset_of!(Self, states)),
        Field::new("offsets", "const fla::i64*", offset_of!(Self, offsets)),
        Field::new("first", "const float*", offset_of!(Self, first)),
        Field::new("last", "float*", offset_of!(Self, last)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, Segments, SeqLens};

    fn count(seqs: &SeqLens, blocks: usize) -> Option<usize> {
        Segments::new(seqs, blocks, 132).map(|segments| segments.seqs.n())
    }

    #[test]
    fn few_heads_are_cut_into_segments() {
        assert_eq!(count(&SeqLens::dense(1, 32768), 64), None);
        assert_eq!(count(&SeqLens::dense(1, 32768), 8), Some(16));
        assert_eq!(count(&SeqLens::dense(2, 32768), 8), Some(16));
        assert_eq!(count(&SeqLens::dense(8, 1024), 8), None);
        assert_eq!(count(&SeqLens::dense(1, 700), 1), None);
        assert_eq!(count(&SeqLens::dense(1, 1 << 20), 1), Some(132));
        assert_eq!(count(&SeqLens::dense(0, 1 << 20), 1), None);
        assert_eq!(count(&SeqLens::packed_on_device(1, 1 << 20), 1), None);
    }

    #[test]
    fn segments_are_whole_chunks_and_every_sequence_has_one() {
        let lens = [0, 5, 40 * CHUNK, 33 * CHUNK + 1, 0];
        let segments = Segments::of_chunks(lens.iter().sum(), &lens, 16).expect("valid");
        assert_eq!(segments.offsets, [0, 1, 2, 5, 8, 9]);
        let cu_seqlens = segments.seqs.cu_seqlens().expect("is packed");
        for pair in segments.offsets.windows(2) {
            for i in pair[0]..pair[1] - 1 {
                assert_eq!(cu_seqlens[i + 1] - cu_seqlens[i], 16 * CHUNK);
            }
        }
        let ends: Vec<usize> = segments.offsets.iter().map(|&i| cu_seqlens[i]).collect();
        assert_eq!(ends, [0, 0, 5, 5 + 40 * CHUNK, 6 + 73 * CHUNK, 6 + 73 * CHUNK]);
    }
}
