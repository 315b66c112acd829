//! What every GPU test and benchmark gets for free: a device or a reason, poisoned and guarded buffers, case
//! tables that run to the end, the same bits twice, and timing by events.
//!
//! Behind the feature `testing`, which only dev-dependencies turn on.

mod bench;
mod buffer;
mod cases;
mod gpu;

pub use bench::{Bench, Case, Replay, Samples};
pub use buffer::{Bits, Guarded, Poison, same_bits};
pub use cases::{compile_ahead, run_cases};
pub use gpu::{gpu, gpu_is_required, nvrtc};
