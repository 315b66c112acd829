// chunk_bwd_output: gradients of decay and bonus from the sums of groups of sequences.
//
//   dw = -e^w sum dl                                     (9)
//   du = sum du                                          (10)
//
// Reference  fla_reference::rwkv4::chunk_bwd
// Launch     grid ceil(C / 32), block 32 * ROWS: a thread sums every ROWS-th group of one channel
// FLA        fused_recurrent_rwkv4
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv4/average.cuh>

namespace fla::rwkv4 {

struct ChunkBwdOutputParams {
    const float* w;         // [C]  raw decay
    const float* partials;  // [groups, 2, C]
    float* dw;              // [C]
    float* du;              // [C]
    i64 groups;
    i64 c;
};

template <class Cfg>
concept ChunkBwdOutputConfig = requires {
    Cfg::ROWS;  // groups that are summed side by side
};

template <ChunkBwdOutputConfig Cfg>
__device__ void chunk_bwd_output(const ChunkBwdOutputParams& p) {
    constexpr int ROWS = Cfg::ROWS;
    __shared__ float s_dl[ROWS][32], s_du[ROWS][32];
    const int i_lane = threadIdx.x % 32, i_row = threadIdx.x / 32;
    const i64 i_c = i64(blockIdx.x) * 32 + i_lane;
    float dl = 0.0f, du = 0.0f;
    if (i_c < p.c) {
        const float* partials = p.partials + i_c;
        for (i64 i_group = i_row; i_group < p.groups; i_group += ROWS) {
            dl += partials[i_group * 2 * p.c];
            du += partials[(i_group * 2 + 1) * p.c];
        }
    }
    s_dl[i_row][i_lane] = dl;
    s_du[i_row][i_lane] = du;
    __syncthreads();  // every row's sums are there
    if (i_row > 0 || i_c >= p.c) return;
    #pragma unroll
    for (int i = 1; i < ROWS; ++i) {
        dl += s_dl[i][i_lane];
        du += s_du[i][i_lane];
    }
    p.dw[i_c] = dl * log_decay(p.w[i_c]);
    p.du[i_c] = du;
}

}  // namespace fla::rwkv4
