// chunk_bwd_output: the gradient of the bonus, which all sequences share; and gradients over K, added up over the slices of V
// that blocks of chunk_bwd have worked on.
//
//   du = sum_p du_parts[p]      for slices of V, sequences and segments p      (1)
//   dx = sum_s partial[s, x]    for x = r, k, w                                (2)
//
// Both in their order, so the same inputs give the same bits.
//
// Reference  fla_reference::rwkv6::chunk_bwd
// Launch     grid ceil(max(H K, B T H K with SLICED) / THREADS), block THREADS: a thread is one number of each gradient
// FLA        chunk_rwkv6
#pragma once
#include <fla/core/prelude.cuh>

namespace fla::rwkv6 {

template <class Element>
struct ChunkBwdOutputParams {
    const float* du_parts;  // [parts, H, K]
    const float* partial;   // [slices, 3, len]  unused without SLICED
    float* du;              // [H, K]
    Element* dr;            // [len]
    Element* dk;            // [len]
    Element* dw;            // [len]
    i64 parts;              // slices of V, times N, times segments
    i64 hk;                 // H K
    i64 len;                // B T H K
    i32 slices;             // of V
};

template <class Cfg>
concept ChunkBwdOutputConfig = requires {
    typename Cfg::Element;
    Cfg::SLICED;   // V has several slices
    Cfg::THREADS;  // of a block
};

template <ChunkBwdOutputConfig Cfg>
__device__ void chunk_bwd_output(const ChunkBwdOutputParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    const i64 i = i64(blockIdx.x) * Cfg::THREADS + threadIdx.x;
    if (i < p.hk) {
        float sum = 0.0f;
        #pragma unroll 8
        for (i64 i_p = 0; i_p < p.parts; ++i_p) sum += p.du_parts[i_p * p.hk + i];  // (1)
        p.du[i] = sum;
    }
    if (!Cfg::SLICED || i >= p.len) return;
    Element* const grads[3] = {p.dr, p.dk, p.dw};
    #pragma unroll
    for (int i_x = 0; i_x < 3; ++i_x) {
        float sum = 0.0f;
        for (int i_s = 0; i_s < p.slices; ++i_s) sum += p.partial[(i64(i_s) * 3 + i_x) * p.len + i];  // (2)
        grads[i_x][i] = from_f32<Element>(sum);
    }
}

}  // namespace fla::rwkv6
