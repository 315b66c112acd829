// fused_sum: adds partial sums over the groups, in order, and so finishes the gradients of parameters.
//
//   out_i = sum over groups of partials_i
//
// Reference  fla_reference::rwkv7::addcmul_bwd
// Launch     grid ceil(count * D / 32), block 32 * WARPS: the warps share the groups of 32 channels
// FLA        -
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::rwkv7 {

struct FusedSumParams {
    const float* partials;  // [groups, count, D]
    float* outs[6];         // [D] each, of which `count` are there; null: not wanted
    i64 groups;
    i64 d;
    i64 count;
};

template <class Cfg>
concept FusedSumConfig = requires {
    Cfg::WARPS;  // of a block
};

template <FusedSumConfig Cfg>
__device__ void fused_sum(const FusedSumParams& p) {
    constexpr int WARPS = Cfg::WARPS;
    const int i_warp = threadIdx.x / 32;
    const i64 width = p.count * p.d;
    const i64 i = i64(blockIdx.x) * 32 + lane_id();
    float sum = 0.0f;
    if (i < width) {
        #pragma unroll 4
        for (i64 i_group = i_warp; i_group < p.groups; i_group += WARPS) {
            sum += load_nc<1>(p.partials + i_group * width + i).at[0];
        }
    }
    __shared__ float s_sums[WARPS][32];
    s_sums[i_warp][lane_id()] = sum;
    __syncthreads();  // the sums of all warps are there
    if (i_warp != 0 || i >= width) return;
    float total = 0.0f;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) total += s_sums[w][lane_id()];
    const i64 i_out = i / p.d;
    #pragma unroll
    for (int o = 0; o < 6; ++o) {
        if (o == i_out && p.outs[o] != nullptr) p.outs[o][i % p.d] = total;
    }
}

}  // namespace fla::rwkv7
