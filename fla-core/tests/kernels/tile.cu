// tile: products of tiles by one warp, chained through registers both ways.
//
//   x = mask(d + a b),  y = x,  z = round(x) c,  w = c round(x)^T
//
// Reference  none: building block test
// Launch     grid 1, block 32
// FLA        -
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla::test {

template <class T>
struct TileParams {
    const T* a;      // [M, K], or [K, M] with Cfg::A_TRANS
    const T* b;      // [K, N], or [N, K] with Cfg::B_TRANS
    const T* c;      // [N, N]
    const float* d;  // [M, N]
    float* y;        // [M, N]
    T* z;            // [M, N]
    float* w;        // [N, M]
    i32 rows;        // rows of a as it is stored, and of d, that are read, the others counting as 0; and of y, z written
};

// In the order of the enum in the test.
enum class Mask { NONE, TRIL, STRICT_TRIL };

template <class Cfg>
__device__ void tile(const TileParams<typename Cfg::T>& p) {
    using T = typename Cfg::T;
    constexpr int M = Cfg::M, N = Cfg::N, K = Cfg::K;
    constexpr bool A_TRANS = Cfg::A_TRANS, B_TRANS = Cfg::B_TRANS;
    constexpr int A_ROWS = A_TRANS ? K : M, A_COLS = A_TRANS ? M : K;
    constexpr int B_ROWS = B_TRANS ? N : K, B_COLS = B_TRANS ? K : N;
    __shared__ SharedTile<T, A_ROWS, A_COLS> s_a;  // [M, K] or [K, M]
    __shared__ SharedTile<T, B_ROWS, B_COLS> s_b;  // [K, N] or [N, K]
    __shared__ SharedTile<T, N, N> s_c;            // [N, N]
    __shared__ SharedTile<float, M, N> s_d;        // [M, N]; d, then y
    __shared__ SharedTile<T, M, N> s_z;            // [M, N]
    const int lane = lane_id();
    load_async<32>(s_a, p.a, A_COLS, p.rows, lane);
    load_async<32>(s_b, p.b, B_COLS, B_ROWS, lane);
    load_async<32>(s_c, p.c, N, N, lane);
    load_async<32>(s_d, p.d, N, p.rows, lane);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncwarp();  // all tiles are complete

    RegTile<M, N> r_x;  // [M, N]
    load(r_x, s_d, 0, 0);
    #pragma unroll
    for (int k = 0; k < K; k += 16) {
        RegTileA<T, M, 16> r_a;  // [M, 16]
        RegTileB<T, 16, N> r_b;  // [16, N]
        if constexpr (A_TRANS) {
            load_a_transposed(r_a, s_a, k, 0);
        } else {
            load_a(r_a, s_a, 0, k);
        }
        if constexpr (B_TRANS) {
            load_b_transposed(r_b, s_b, 0, k);
        } else {
            load_b(r_b, s_b, k, 0);
        }
        fla::mma(r_x, r_a, r_b);
    }
    // As if the tile were one of many down a matrix whose diagonal it meets at its own row 0, column 8.
    if constexpr (Mask(Cfg::MASK) == Mask::TRIL) tril(r_x, 16, 8);
    if constexpr (Mask(Cfg::MASK) == Mask::STRICT_TRIL) strict_tril(r_x, 16, 8);
    store(s_d, r_x, 0, 0);

    RegTileA<T, M, N> r_x_left;  // [M, N]
    narrow(r_x_left, r_x);
    RegTile<M, 16> r_z;  // [M, 16]
    #pragma unroll
    for (int j = 0; j < N; j += 16) {
        RegTileB<T, N, 16> r_c;  // [N, 16]
        load_b(r_c, s_c, 0, j);
        zero(r_z);
        fla::mma(r_z, r_x_left, r_c);
        store(s_z, r_z, 0, j);
    }

    RegTileB<T, N, M> r_x_right;  // [N, M], the transpose of x
    narrow_transposed(r_x_right, r_x);
    RegTile<16, M> r_w;  // [16, M]
    #pragma unroll
    for (int i = 0; i < N; i += 16) {
        RegTileA<T, 16, N> r_c;  // [16, N]
        load_a(r_c, s_c, i, 0);
        zero(r_w);
        fla::mma(r_w, r_c, r_x_right);
        for_each(r_w, [&](int row, int col, float& w) { p.w[(i + row) * M + col] = w; });
    }

    __syncwarp();  // s_d and s_z are complete
    store_rows<32>(p.y, N, s_d, p.rows, lane);
    store_rows<32>(p.z, N, s_z, p.rows, lane);
}

}  // namespace fla::test
