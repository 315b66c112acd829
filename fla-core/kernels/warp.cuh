// warp: sums and maxima over groups of neighbouring lanes. Every lane of the warp takes part in every call.
#pragma once
#include <fla/core/prelude.cuh>

namespace fla {

__device__ inline int lane_id() { return threadIdx.x % 32; }

// The sum of `x` over the lane's group of LANES neighbours, in every lane of the group.
// Lanes add in the same tree, so they hold the same bits.
template <int LANES>
__device__ float group_sum(float x) {
    static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "a group is 1, 2, 4, 8, 16 or 32 lanes");
    #pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

// The sum of `x` over the lanes whose numbers are equal modulo STRIDE, in each of them, with the same bits.
template <int STRIDE>
__device__ float strided_sum(float x) {
    static_assert(STRIDE >= 1 && STRIDE <= 32 && (STRIDE & (STRIDE - 1)) == 0, "lanes repeat every 1, 2, ... 32");
    #pragma unroll
    for (int d = 16; d >= STRIDE; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

// The largest `x` of the lane's group of LANES neighbours, in every lane of the group.
template <int LANES>
__device__ float group_max(float x) {
    static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "a group is 1, 2, 4, 8, 16 or 32 lanes");
    #pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, d));
    return x;
}

// One round of `group_sum_scatter`, and the rounds after it: a lane keeps the half of its first 2 D values that it will
// own and gets its partner's part of them.
template <int D, int LANES>
__device__ void scatter_round(float (&x)[LANES]) {
    const bool upper = lane_id() & D;
    #pragma unroll
    for (int i = 0; i < D; ++i) {
        const float sent = upper ? x[i] : x[i + D];
        const float kept = upper ? x[i + D] : x[i];
        x[i] = kept + __shfl_xor_sync(FULL_WARP, sent, D);
    }
    if constexpr (D > 1) scatter_round<D / 2>(x);
}

// LANES sums at once: lane i of the group gets the group's sum of x[i]. `x` is used up.
// That takes LANES - 1 shuffles, where one `group_sum` each would take LANES log2(LANES).
template <int LANES>
__device__ float group_sum_scatter(float (&x)[LANES]) {
    static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "a group is 1, 2, 4, 8, 16 or 32 lanes");
    if constexpr (LANES > 1) scatter_round<LANES / 2>(x);
    return x[0];
}

}  // namespace fla
