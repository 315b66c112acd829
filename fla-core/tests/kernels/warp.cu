// warp: the group sums and maxima of warp.cuh, in every lane of one warp.
//
//   y[0, l] = sum of x[m, 0],  y[1, l] = max of x[m, 0],  y[2, l] = sum of x[m, l % LANES],  over m in the group of l
//
// Reference  none: building block test
// Launch     grid 1, block 32
// FLA        -
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::test {

struct WarpParams {
    const float* x;  // [32, LANES]
    float* y;        // [3, 32]
};

template <class Cfg>
__device__ void warp(const WarpParams& p) {
    constexpr int LANES = Cfg::LANES;
    const int lane = lane_id();
    float x[LANES];
    #pragma unroll
    for (int i = 0; i < LANES; ++i) x[i] = p.x[lane * LANES + i];

    p.y[lane] = group_sum<LANES>(x[0]);
    p.y[32 + lane] = group_max<LANES>(x[0]);
    p.y[64 + lane] = group_sum_scatter<LANES>(x);
}

}  // namespace fla::test
