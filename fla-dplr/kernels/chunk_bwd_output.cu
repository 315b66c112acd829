// chunk_bwd_output: the gradients over K, added up over the slices of V that blocks of chunk_bwd have worked on.
//
//   dx = sum_s partial[s, x]      for x = q, k, a, b, g      (1)
//
// Slices are added in their order, so the same inputs give the same bits.
//
// Reference  fla_reference::dplr::chunk_bwd
// Launch     grid ceil(B * T * H * K / THREADS), block THREADS: a thread is one element of all five
// FLA        chunk_dplr_delta_rule
#pragma once
#include <fla/core/prelude.cuh>

namespace fla::dplr {

template <class Element>
struct ChunkBwdOutputParams {
    const float* partial;  // [slices, 5, len]
    Element* dq;           // [len]
    Element* dk;           // [len]
    Element* da;           // [len]
    Element* db;           // [len]
    Element* dg;           // [len]
    i64 len;               // B * T * H * K
    i32 slices;            // slices of V
};

template <class Cfg>
concept ChunkBwdOutputConfig = requires {
    typename Cfg::Element;
    Cfg::THREADS;  // threads of a block
};

template <ChunkBwdOutputConfig Cfg>
__device__ void chunk_bwd_output(const ChunkBwdOutputParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    const i64 i = i64(blockIdx.x) * Cfg::THREADS + threadIdx.x;
    if (i >= p.len) return;
    Element* const grads[5] = {p.dq, p.dk, p.da, p.db, p.dg};
#pragma unroll
    for (int i_x = 0; i_x < 5; i_x++) {
        float sum = 0.0f;
        for (int i_s = 0; i_s < p.slices; i_s++) sum += p.partial[(i64(i_s) * 5 + i_x) * p.len + i];  // (1)
        grads[i_x][i] = from_f32<Element>(sum);
    }
}

}  // namespace fla::dplr
