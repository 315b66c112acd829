// tma: a tile and a line through shared memory and back, by bulk copies alone.
//
//   seen = the tile of 64 x 64 at (ROW, COL) of x, zeros outside;  y = 2 x on that tile, where it starts inside;  line_y = line
//
// Reference  none: building block test
// Launch     grid 1, block 128
// FLA        -
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/tma.cuh>

namespace fla::test {

struct TmaParams {
    TensorMap x;        // [ROWS, COLS] bf16 in boxes of [64, 64], 128-byte swizzle
    TensorMap y;        // the same shape
    const float* line;  // [256]
    float* line_y;      // [256]
    float* seen;        // [64, 64]
    i32 row;
    i32 col;
};

template <class Cfg>
__device__ void tma(const TmaParams& p) {
    __shared__ SharedTile<bf16, 64, 64> s_x;  // [64, 64]
    __shared__ alignas(16) float s_line[256];  // [256]
    __shared__ Barrier x_full;

    if (threadIdx.x == 0) {
        prefetch_tensormap(p.x);
        mbarrier_init(x_full, 1);
        fence_mbarrier_init();  // the copy engine sees x_full
        mbarrier_arrive_expect_tx(x_full, sizeof(s_x) + sizeof(s_line));
        cp_async_bulk_tensor_2d_shared_global(&s_x, p.x, p.col, p.row, x_full);
        cp_async_bulk_shared_global(s_line, p.line, sizeof(s_line), x_full);
    }
    __syncthreads();  // x_full is initialised
    mbarrier_wait_parity(x_full, 0);  // s_x and s_line are complete

    for (int i = threadIdx.x; i < 64 * 64; i += 128) {
        bf16& x = s_x.at(i / 64, i % 64);
        p.seen[i] = to_f32(x);
        x = to_bf16(2.0f * to_f32(x));
    }
    fence_proxy_async();  // the copy engine sees this thread's part of s_x
    __syncthreads();      // s_x is complete

    if (threadIdx.x == 0) {
        // A tile can be loaded from before the first element but not stored there.
        if (p.row >= 0 && p.col >= 0) cp_async_bulk_tensor_2d_global_shared(p.y, p.col, p.row, &s_x);
        cp_async_bulk_global_shared(p.line_y, s_line, sizeof(s_line));
        cp_async_bulk_commit_group();
        cp_async_bulk_wait_group_read<0>();  // s_x and s_line are free
        cp_async_bulk_wait_group<0>();       // y and line_y are written
    }
}

}  // namespace fla::test
