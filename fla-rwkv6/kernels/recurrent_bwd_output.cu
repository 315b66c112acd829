// recurrent_bwd_output: the gradient of the bonus, which all sequences share.
//
//   du = sum_n du_n      (1)  in the order of the sequences
//
// Reference  fla_reference::rwkv6::recurrent_bwd
// Launch     grid ceil(H K / 256), block 256: a thread is one number of du
// FLA        fused_recurrent_rwkv6
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv6/parts.cuh>

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
    if (i_hk < p.hk) p.du[i_hk] = sum_parts(p.du_parts + i_hk, p.n, p.hk);  // (1)
}

}  // namespace fla::rwkv6
