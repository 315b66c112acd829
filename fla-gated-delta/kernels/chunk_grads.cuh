// chunk_grads: what both kernels that make the gradients of a chunk do with rows of results.
#pragma once
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla::gated_delta {

// Multiplies rows by their factors.
template <int ROWS, int COLS, int C>
__device__ void scale_rows(RegTile<ROWS, COLS>& r, const float (&s_factor)[C], int row0) {
    #pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        const float factor = s_factor[row0 + 8 * i + lane_id() / 4];
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            r.at[i / 2][j][i % 2 * 2] *= factor;
            r.at[i / 2][j][i % 2 * 2 + 1] *= factor;
        }
    }
}

// The sums over a row of what four neighbouring lanes hold of `a` times `b`'s numbers there.
template <int ROWS, int COLS, class Half, int PARTS, int S_ROWS, int S_COLS>
__device__ void row_dots(
    float (&r)[ROWS / 8], const RegTile<ROWS, COLS>& a, const OperandTile<Half, PARTS, S_ROWS, S_COLS>& b, int row0, int col0
) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        float sum = 0.0f;
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const float2 x = read_pair(b, row0 + 8 * i + g, col0 + 8 * j + 2 * t);
            const float* y = &a.at[i / 2][j][i % 2 * 2];
            sum = fmaf(x.x, y[0], fmaf(x.y, y[1], sum));
        }
        r[i] = group_sum<4>(sum);
    }
}

// A strength above which V' has lost nothing to underflow.
inline constexpr float LEAST_BETA = 0x1p-40f;

}  // namespace fla::gated_delta
