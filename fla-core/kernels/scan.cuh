// scan: inclusive cumulative sums in f32, forward over the rows of a chunk (prefix) and backward (suffix).
//
// A suffix sum adds what follows. The difference of the total and a prefix would be the same number with the rounding
// of the total in it, which destroys small sums at the end of a chunk.
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// The sum of `x` over this lane and the lanes before it in its group of LANES.
template <int LANES>
__device__ float group_prefix_sum(float x) {
    const int i = lane_id() % LANES;
    #pragma unroll
    for (int d = 1; d < LANES; d *= 2) {
        const float before = __shfl_up_sync(FULL_WARP, x, d, LANES);
        if (i >= d) x += before;
    }
    return x;
}

// The sum of `x` over this lane and the lanes after it in its group of LANES.
template <int LANES>
__device__ float group_suffix_sum(float x) {
    const int i = lane_id() % LANES;
    #pragma unroll
    for (int d = 1; d < LANES; d *= 2) {
        const float after = __shfl_down_sync(FULL_WARP, x, d, LANES);
        if (i + d < LANES) x += after;
    }
    return x;
}

// One scalar per row of a chunk of 32 N rows, in one warp: lane l holds rows l, 32 + l, ...
// A shorter last chunk holds 0 in the rows past its end.
template <int N>
__device__ void row_prefix_sum(float (&x)[N]) {
    float before = 0.0f;
    #pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = before + group_prefix_sum<32>(x[i]);
        before = __shfl_sync(FULL_WARP, x[i], 31);
    }
}

template <int N>
__device__ void row_suffix_sum(float (&x)[N]) {
    float after = 0.0f;
    #pragma unroll
    for (int i = N - 1; i >= 0; --i) {
        x[i] = after + group_suffix_sum<32>(x[i]);
        after = __shfl_sync(FULL_WARP, x[i], 0);
    }
}

// Sums of the segments of SEGMENT rows that the column sums work on side by side.
inline constexpr int SEGMENT = 16;
template <int ROWS, int COLS>
struct ColumnSums {
    static_assert(ROWS % SEGMENT == 0, "whole segments");
    float segment[ROWS / SEGMENT][COLS];
};

// s[i, j] = the sum of s[0 .. i, j]. All THREADS threads of the block call it, after a barrier that completes `s`; the
// result is visible to all of them when it returns.
template <int THREADS, int ROWS, int COLS>
__device__ void column_prefix_sum(
    SharedTile<float, ROWS, COLS>& s, ColumnSums<ROWS, COLS>& s_sums, int i_thread
) {
    constexpr int SEGMENTS = ROWS / SEGMENT;
    for (int i = i_thread; i < SEGMENTS * COLS; i += THREADS) {
        const int col = i % COLS, i_segment = i / COLS;
        float sum = 0.0f;
        #pragma unroll
        for (int i_r = 0; i_r < SEGMENT; ++i_r) {
            float& x = s.at(i_segment * SEGMENT + i_r, col);
            sum += x;
            x = sum;
        }
        s_sums.segment[i_segment][col] = sum;
    }
    __syncthreads();  // s_sums is complete

    for (int i = i_thread; i < SEGMENTS * COLS; i += THREADS) {
        const int col = i % COLS, i_segment = i / COLS;
        float before = 0.0f;
        #pragma unroll
        for (int j = 0; j < SEGMENTS; ++j) {
            if (j < i_segment) before += s_sums.segment[j][col];
        }
        #pragma unroll
        for (int i_r = 0; i_r < SEGMENT; ++i_r) s.at(i_segment * SEGMENT + i_r, col) += before;
    }
    __syncthreads();  // s is complete, and s_sums free
}

// s[i, j] = the sum of s[i .., j]; called as `column_prefix_sum` is.
template <int THREADS, int ROWS, int COLS>
__device__ void column_suffix_sum(
    SharedTile<float, ROWS, COLS>& s, ColumnSums<ROWS, COLS>& s_sums, int i_thread
) {
    constexpr int SEGMENTS = ROWS / SEGMENT;
    for (int i = i_thread; i < SEGMENTS * COLS; i += THREADS) {
        const int col = i % COLS, i_segment = i / COLS;
        float sum = 0.0f;
        #pragma unroll
        for (int i_r = SEGMENT - 1; i_r >= 0; --i_r) {
            float& x = s.at(i_segment * SEGMENT + i_r, col);
            sum += x;
            x = sum;
        }
        s_sums.segment[i_segment][col] = sum;
    }
    __syncthreads();  // s_sums is complete

    for (int i = i_thread; i < SEGMENTS * COLS; i += THREADS) {
        const int col = i % COLS, i_segment = i / COLS;
        float after = 0.0f;
        #pragma unroll
        for (int j = SEGMENTS - 1; j >= 0; --j) {
            if (j > i_segment) after += s_sums.segment[j][col];
        }
        #pragma unroll
        for (int i_r = 0; i_r < SEGMENT; ++i_r) s.at(i_segment * SEGMENT + i_r, col) += after;
    }
    __syncthreads();  // s is complete, and s_sums free
}

}  // namespace fla
