// scan: cumulative sums over the rows of a chunk, of one scalar per row and of 48 channels.
//
//   forward   y[i] = sum of x[0 .. i]       reverse   y[i] = sum of x[i ..]
//
// Reference  none: building block test
// Launch     grid 1, block 128
// FLA        -
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/scan.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla::test {

struct ScanParams {
    const float* x;          // [N]
    const float* x_columns;  // [N, 48]
    float* y;                // [C]
    float* y_columns;        // [C, 48]
    i32 n;                   // rows, at most C; the rest of the chunk counts as 0
};

template <class Cfg>
__device__ void scan(const ScanParams& p) {
    constexpr int C = Cfg::C;
    constexpr int K = 48;
    constexpr int THREADS = 128;

    if (threadIdx.x < 32) {
        const int lane = lane_id();
        if constexpr (C < 32) {
            // Both halves of the warp scan the same rows, so that a leak from one into the other shows.
            const int i_r = lane % C;
            const float x = i_r < p.n ? p.x[i_r] : 0.0f;
            const float y = Cfg::REVERSE ? group_suffix_sum<C>(x) : group_prefix_sum<C>(x);
            if (lane >= 32 - C) p.y[i_r] = y;
        } else {
            float x[C / 32];
            #pragma unroll
            for (int i = 0; i < C / 32; ++i) x[i] = 32 * i + lane < p.n ? p.x[32 * i + lane] : 0.0f;
            if constexpr (Cfg::REVERSE) {
                row_suffix_sum(x);
            } else {
                row_prefix_sum(x);
            }
            #pragma unroll
            for (int i = 0; i < C / 32; ++i) p.y[32 * i + lane] = x[i];
        }
    }

    __shared__ SharedTile<float, C, K> s_x;   // [C, 48]
    __shared__ ColumnSums<C, K> s_sums;       // [C / 16, 48]
    for (int i = threadIdx.x; i < C * K; i += THREADS) {
        s_x.at(i / K, i % K) = i / K < p.n ? p.x_columns[i] : 0.0f;
    }
    __syncthreads();  // s_x is complete
    if constexpr (Cfg::REVERSE) {
        column_suffix_sum<THREADS>(s_x, s_sums, threadIdx.x);
    } else {
        column_prefix_sum<THREADS>(s_x, s_sums, threadIdx.x);
    }
    for (int i = threadIdx.x; i < C * K; i += THREADS) p.y_columns[i] = s_x.at(i / K, i % K);
}

}  // namespace fla::test
