//! The last step of every parameter's gradient: partial sums of groups of rows, added in order.

use std::mem::offset_of;

use fla_core::cudarc::driver::{CudaStream, DevicePtrMut};
use fla_core::{
    Device, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, RawSlice, Source, Unit, Workspace, check_align,
};

const SOURCE: Source =
    Source { name: "fla/rwkv7/fused_sum.cu", text: include_str!("../../kernels/fused_sum.cu") };

/// Warps of a block, which share the groups.
const WARPS: u32 = 8;

/// Parameters whose gradients one pass leaves, at most.
const MAX_COUNT: usize = 6;

/// The gradient of a parameter, `[D]` or `[H, K]`, named for errors; not wanted when absent.
pub(super) type SumOutput<'a> = (&'static str, Option<&'a mut dyn DevicePtrMut<f32>>);

/// Adds the partial sums that a kernel has left in a workspace.
#[derive(Debug)]
pub(super) struct Sums {
    kernel: Kernel<FusedSumParams>,
    groups: usize,
    count: usize,
    d: usize,
    grid: Grid,
}

impl Sums {
    pub(super) fn new(device: &Device, groups: usize, count: usize, d: usize) -> Result<Self, Error> {
        let blocks = count.saturating_mul(d).div_ceil(32);
        let Some(blocks) = u32::try_from(blocks).ok().filter(|blocks| i32::try_from(*blocks).is_ok()) else {
            return Err(Error::Dim { dim: "D", wanted: format!("at most {}", i32::MAX), got: d });
        };
        Ok(Self { kernel: device.kernel(&unit())?, groups, count, d, grid: Grid::x(blocks) })
    }

    /// f32 elements of the partial sums: `[groups, count, D]`.
    pub(super) fn partials_len(&self) -> usize {
        self.groups.saturating_mul(self.count).saturating_mul(self.d)
    }

    pub(super) fn workspace_bytes(&self) -> usize {
        Workspace::bytes(&[self.partials_len().saturating_mul(size_of::<f32>())])
    }

    /// Checks what [`Sums::run`] would refuse, before anything is launched.
    pub(super) fn check(&self, stream: &CudaStream, outs: &mut [SumOutput<'_>]) -> Result<(), Error> {
        for (name, out) in outs {
            if let Some(out) = out {
                let (ptr, _guard) = out.device_ptr_mut(stream);
                check_align(name, ptr)?;
            }
        }
        Ok(())
    }

    /// Queues the sums.
    pub(super) fn run<'a, const COUNT: usize>(
        &self,
        stream: &'a CudaStream,
        partials: &'a RawSlice<'_, f32>,
        outs: [SumOutput<'a>; COUNT],
    ) -> Result<(), Error> {
        self.kernel.launch(stream, self.grid, |bind| {
            let mut ptrs = [PtrMut::NULL; MAX_COUNT];
            for (ptr, (name, out)) in ptrs.iter_mut().zip(outs) {
                *ptr = bind.write_opt(name, out);
            }
            FusedSumParams {
                partials: bind.read("workspace", partials),
                outs: ptrs,
                groups: self.groups as i64,
                d: self.d as i64,
                count: self.count as i64,
            }
        })
    }
}

pub(super) fn unit() -> Unit {
    Unit::new::<FusedSumParams>("rwkv7", "fused_sum", SOURCE, WARPS * 32).with("WARPS", WARPS as i32)
}

/// Twin of `fla::rwkv7::FusedSumParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FusedSumParams {
    partials: Ptr<f32>,
    outs: [PtrMut<f32>; MAX_COUNT],
    groups: i64,
    d: i64,
    count: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for FusedSumParams {
    const CUDA_TYPE: &'static str = "fla::rwkv7::FusedSumParams";
    const FIELDS: &'static [Field] = &[
        Field::new("partials", "const float*", offset_of!(Self, partials)),
        Field::new("outs", "float*[6]", offset_of!(Self, outs)),
        Field::new("groups", "fla::i64", offset_of!(Self, groups)),
        Field::new("d", "fla::i64", offset_of!(Self, d)),
        Field::new("count", "fla::i64", offset_of!(Self, count)),
    ];
}
