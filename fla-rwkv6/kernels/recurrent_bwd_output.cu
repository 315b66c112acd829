// recurrent_bwd_output: the gradient of the bonus, which all sequences share.
//
//   du = sum_n du_n      (1)  in the order of the sequences
//
// Reference  fla_reference::rwkv6::recurrent_bwd
// Launch     grid ceil(H K / 256), block 256: a thread is one number of du
// FLA        fused_recurrent_rwkv6
#pragma once
#include <fla/core/prelude.cuh>

namespace fla::rwkv6 {

struct RecurrentBwdOutputParams {
    const float* du_parts;  // [N, H, K]
    float* du;              // [H, K]
    i64 n;
    i64 hk;                 // H K
};

template <class Cfg>
concept RecurrentBwdOutputConfig = requires {
    Cfg::THREADS;  // of a block
};

template <RecurrentBwdOutputConfig Cfg>
__device__ void recurrent_bwd_output(const RecurrentBwdOutputParams& p) {
    const i64 i_hk = i64(blockIdx.x) * Cfg::THREADS + threadIdx.x;
    if (i_hk >= p.hk) return;
    float sum = 0.0f;
    #pragma unroll 8
    for (i64 i_n = 0; i_n < p.n; ++i_n) sum += p.du_parts[i_n * p.hk + i_hk];
    p.du[i_hk] = sum;
}

}  // namespace fla::rwkv6
