// chunk_fwd_output: outputs, added up over the slices of K that blocks of chunk_fwd have worked on.
//
//   o = sum_s o_parts[s]      for slices of K      (1)
//
// Reference  fla_reference::rwkv6::chunk_fwd
// Launch     grid ceil(B T H V / THREADS), block THREADS: a thread is one number of o
// FLA        chunk_rwkv6
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv6/parts.cuh>

namespace fla::rwkv6 {

template <class Element>
struct ChunkFwdOutputParams {
    const float* o_parts;  // [SLICES, len]
    Element* o;            // [len]
    i64 len;               // B T H V
};

template <class Cfg>
concept ChunkFwdOutputConfig = requires {
    typename Cfg::Element;
    Cfg::SLICES;   // of K
    Cfg::THREADS;  // of a block
};

template <ChunkFwdOutputConfig Cfg>
__device__ void chunk_fwd_output(const ChunkFwdOutputParams<typename Cfg::Element>& p) {
    const i64 i = i64(blockIdx.x) * Cfg::THREADS + threadIdx.x;
    if (i < p.len) p.o[i] = from_f32<typename Cfg::Element>(sum_slices<Cfg::SLICES>(p.o_parts + i, p.len));  // (1)
}

}  // namespace fla::rwkv6
