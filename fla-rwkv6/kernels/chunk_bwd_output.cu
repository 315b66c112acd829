// chunk_bwd_output: the gradient of the bonus, which all sequences share; gradients over K, added up over the slices of V that
// blocks of chunk_bwd have worked on; and the gradient over V, added up over those of K.
//
//   du = sum_p du_parts[p]      for slices of V, sequences and segments p      (1)
//   dx = sum_s partial[s, x]    for x = r, k, w and slices s of V              (2)
//   dv = sum_s dv_parts[s]      for slices s of K                              (3)
//
// Reference  fla_reference::rwkv6::chunk_bwd
// Launch     grid ceil(n / THREADS), block THREADS: a thread is one number of each gradient; n is the largest of H K,
//            B T H K where V has slices and B T H V where K has
// FLA        chunk_rwkv6
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv6/parts.cuh>

namespace fla::rwkv6 {

template <class Element>
struct ChunkBwdOutputParams {
    const float* du_parts;  // [parts, H, K]
    const float* partial;   // [SLICES_V, 3, len]  unused with one slice
    const float* dv_parts;  // [SLICES_K, dv_len]  unused with one slice
    float* du;              // [H, K]
    Element* dr;            // [len]
    Element* dk;            // [len]
    Element* dv;            // [dv_len]
    Element* dw;            // [len]
    i64 parts;              // slices of V, times N, times segments
    i64 hk;                 // H K
    i64 len;                // B T H K
    i64 dv_len;             // B T H V
};

template <class Cfg>
concept ChunkBwdOutputConfig = requires {
    typename Cfg::Element;
    Cfg::SLICES_V;  // of V
    Cfg::SLICES_K;  // of K
    Cfg::THREADS;   // of a block
};

template <ChunkBwdOutputConfig Cfg>
__device__ void chunk_bwd_output(const ChunkBwdOutputParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    const i64 i = i64(blockIdx.x) * Cfg::THREADS + threadIdx.x;
    if (i < p.hk) p.du[i] = sum_parts(p.du_parts + i, p.parts, p.hk);  // (1)
    if (Cfg::SLICES_V > 1 && i < p.len) {
        Element* const grads[3] = {p.dr, p.dk, p.dw};
        #pragma unroll
        for (int i_x = 0; i_x < 3; ++i_x) {
            grads[i_x][i] = from_f32<Element>(sum_slices<Cfg::SLICES_V>(p.partial + i_x * p.len + i, 3 * p.len));  // (2)
        }
    }
    if (Cfg::SLICES_K > 1 && i < p.dv_len) {
        p.dv[i] = from_f32<Element>(sum_slices<Cfg::SLICES_K>(p.dv_parts + i, p.dv_len));  // (3)
    }
}

}  // namespace fla::rwkv6
