// blocks: operands loaded in every way, from tokens as they come and from blocks, and products of them by one warp.
//
//   y_0, y_1 = a b^T       from tokens, from blocks
//   y_2, y_3 = a_0^T b_1   from tokens and blocks, from blocks; the first 16 columns of a and the last of b
//   y_4      = a_0 tril(b_0)^T
//   y_5      = a_0^T       as a result
//   y_6      = a_0         as what an operand stands for
//   y_7      = a_0 b_0^T   in tf32
//   y_8      = a_0         as what a product in tf32 sees
//
// Reference  none: building block test
// Launch     grid 1, block 32
// FLA        -
#pragma once
#include <fla/core/blocks.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::test {

template <class T>
struct BlocksParams {
    const T* a;  // [16, COLS]
    const T* b;  // [16, COLS]
    float* y;    // [9, 16, 16]
};

template <class Cfg>
__device__ void blocks(const BlocksParams<typename Cfg::T>& p) {
    constexpr int PARTS = Cfg::PARTS, COLS = Cfg::COLS, LAST = COLS - 16;
    constexpr bool WHOLE = Cfg::WHOLE;
    __shared__ TokenTile<typename Cfg::T, COLS> s_a, s_b;
    __shared__ BlockTile<PARTS, 16, COLS> s_a_blocks, s_b_blocks;
    __shared__ BlockTile<1, 16, 16> s_tril;
    for (int i = lane_id(); i < 16 * COLS; i += 32) {
        const int row = i / COLS, col = i % COLS;
        s_a.at(row, col) = p.a[i];
        s_b.at(row, col) = p.b[i];
        s_b_blocks.set(row, col, to_f32(p.b[i]));
    }
    for (int i = lane_id(); i < 256; i += 32) s_tril.set_bits(i / 16, i % 16, i / 16 >= i % 16 ? 0xffff : 0);
    __syncwarp();  // tokens are complete
    #pragma unroll
    for (int col = 0; col < COLS; col += 16) store_a(s_a_blocks, 0, col, to_a<PARTS>(load_acc(s_a, col)));
    __syncwarp();  // blocks are complete

    const auto put = [&](int i, Acc16 y) {
        for_each(y, [&](int row, int col, float& x) { p.y[(i * 16 + row) * 16 + col] = x; });
    };
    Acc16 y[6];
    #pragma unroll
    for (int i = 0; i < 6; ++i) zero(y[i]);
    #pragma unroll
    for (int col = 0; col < COLS; col += 16) {
        fla::mma<WHOLE>(y[0], load_a<PARTS>(s_a, col), load_b_transposed<PARTS>(s_b, col));
        fla::mma<WHOLE>(y[1], load_a(s_a_blocks, 0, col), load_b_transposed(s_b_blocks, 0, col));
    }
    fla::mma<WHOLE>(y[2], load_a_transposed<PARTS>(s_a, 0), load_b(s_b_blocks, 0, LAST));
    fla::mma<WHOLE>(y[3], load_a_transposed(s_a_blocks, 0, 0), load_b(s_b_blocks, 0, LAST));
    const FragB<PARTS> tril = load_b_transposed(s_b_blocks, 0, 0) & load_b_transposed(s_tril, 0, 0);
    fla::mma<WHOLE>(y[4], load_a<PARTS>(s_a, 0), tril);
    #pragma unroll
    for (int i = 0; i < 5; ++i) put(i, y[i]);
    put(5, load_acc_transposed(s_a, 0));
    put(6, to_acc(load_a(s_a_blocks, 0, 0)));
    const Acc16 a = round_tf32(load_acc(s_a, 0));
    mma_tf32(y[5], a, round_tf32(load_acc(s_b, 0)));
    put(7, y[5]);
    put(8, cut_tf32(a));
}

}  // namespace fla::test
