// parts: sums that blocks leave in parts, because no block has all of what is added up.
#pragma once
#include <fla/core/prelude.cuh>

namespace fla::rwkv6 {

// The sum of `count` numbers that are `stride` apart. In their order, so the same inputs give the same bits.
__device__ inline float sum_parts(const float* parts, i64 count, i64 stride) {
    float sum = 0.0f;
    #pragma unroll 8
    for (i64 i = 0; i < count; ++i) sum += parts[i * stride];
    return sum;
}

// The same of so few that all are asked for at once.
template <int COUNT>
__device__ float sum_slices(const float* parts, i64 stride) {
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += parts[i * stride];
    return sum;
}

}  // namespace fla::rwkv6
