// wgmma: one product of a warpgroup, for every way in which the operands can lie.
//
//   y = a b, with the inner dim K in steps of 16
//
// Reference  none: building block test
// Launch     grid 1, block 128, or 384 with one warpgroup that gives its registers to two that multiply
// FLA        -
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/wgmma.cuh>

namespace fla::test {

template <class T>
struct WgmmaParams {
    const T* a;  // [64, K], or [K, 64] with Cfg::A_MN
    const T* b;  // [N, K], or [K, COLS] with Cfg::B_MN, where columns B_COL .. B_COL + N count
    float* y;    // [2, 64, N] with Cfg::SETMAXNREG, else [64, N]
};

template <class Cfg>
struct WgmmaTiles {
    using T = typename Cfg::T;
    static constexpr int N = Cfg::N;
    static constexpr int K = 128;
    static constexpr Major A = Cfg::A_MN ? Major::MN : Major::K;
    static constexpr Major B = Cfg::B_MN ? Major::MN : Major::K;
    using TileA = SharedTile<T, Cfg::A_MN ? K : 64, Cfg::A_MN ? 64 : K>;
    using TileB = SharedTile<T, Cfg::B_MN ? K : N, Cfg::B_MN ? max(N, 64) : K>;
};

template <class Tiles>
__device__ void step_ss(float (&d)[Tiles::N / 2], u64 a, u64 b, int scale_d) {
    constexpr int N = Tiles::N;
    constexpr Major A = Tiles::A, B = Tiles::B;
    if constexpr (same<typename Tiles::T, bf16>) {
        if constexpr (N == 16) wgmma_m64n16k16_bf16_ss<A, B>(d, a, b, scale_d);
        if constexpr (N == 32) wgmma_m64n32k16_bf16_ss<A, B>(d, a, b, scale_d);
        if constexpr (N == 64) wgmma_m64n64k16_bf16_ss<A, B>(d, a, b, scale_d);
        if constexpr (N == 128) wgmma_m64n128k16_bf16_ss<A, B>(d, a, b, scale_d);
    } else {
        if constexpr (N == 16) wgmma_m64n16k16_f16_ss<A, B>(d, a, b, scale_d);
        if constexpr (N == 32) wgmma_m64n32k16_f16_ss<A, B>(d, a, b, scale_d);
        if constexpr (N == 64) wgmma_m64n64k16_f16_ss<A, B>(d, a, b, scale_d);
        if constexpr (N == 128) wgmma_m64n128k16_f16_ss<A, B>(d, a, b, scale_d);
    }
}

template <class Tiles>
__device__ void step_rs(float (&d)[Tiles::N / 2], const u32 (&a)[4], u64 b, int scale_d) {
    constexpr int N = Tiles::N;
    constexpr Major B = Tiles::B;
    if constexpr (same<typename Tiles::T, bf16>) {
        if constexpr (N == 16) wgmma_m64n16k16_bf16_rs<B>(d, a, b, scale_d);
        if constexpr (N == 32) wgmma_m64n32k16_bf16_rs<B>(d, a, b, scale_d);
        if constexpr (N == 64) wgmma_m64n64k16_bf16_rs<B>(d, a, b, scale_d);
        if constexpr (N == 128) wgmma_m64n128k16_bf16_rs<B>(d, a, b, scale_d);
    } else {
        if constexpr (N == 16) wgmma_m64n16k16_f16_rs<B>(d, a, b, scale_d);
        if constexpr (N == 32) wgmma_m64n32k16_f16_rs<B>(d, a, b, scale_d);
        if constexpr (N == 64) wgmma_m64n64k16_f16_rs<B>(d, a, b, scale_d);
        if constexpr (N == 128) wgmma_m64n128k16_f16_rs<B>(d, a, b, scale_d);
    }
}

// Where step `k` of an operand starts: the inner dim is the columns of its tile, or with Major::MN the rows.
template <Major MAJOR, class T, int ROWS, int COLS>
__device__ u64 descriptor(const SharedTile<T, ROWS, COLS>& s, int k, int col) {
    return MAJOR == Major::MN ? wgmma_descriptor<ROWS>(&s, 16 * k, col) : wgmma_descriptor<ROWS>(&s, 0, 16 * k);
}

template <class Cfg>
__device__ void multiply(
    float* y, const typename WgmmaTiles<Cfg>::TileA& s_a, const typename WgmmaTiles<Cfg>::TileB& s_b
) {
    using Tiles = WgmmaTiles<Cfg>;
    constexpr int N = Tiles::N;
    constexpr int STEPS = Tiles::K / 16;
    const int warp = threadIdx.x / 32 % 4, g = lane_id() / 4, t = lane_id() % 4;

    float d[N / 2];
    if constexpr (Cfg::A_REGISTERS) {
        RegTileA<typename Cfg::T, 16, Tiles::K> r_a;  // [16, K] of this warp
        load_a(r_a, s_a, 16 * warp, 0);
        hold(d);
        wgmma_fence();  // r_a and d are in place
        #pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            step_rs<Tiles>(d, r_a.at[0][k], descriptor<Tiles::B>(s_b, k, Cfg::B_COL), k > 0);
        }
    } else {
        hold(d);
        wgmma_fence();  // d is in place
        #pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const u64 a = descriptor<Tiles::A>(s_a, k, 0);
            step_ss<Tiles>(d, a, descriptor<Tiles::B>(s_b, k, Cfg::B_COL), k > 0);
        }
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();  // d is complete
    hold(d);
    #pragma unroll
    for (int e = 0; e < N / 2; ++e) {
        y[(16 * warp + g + e / 2 % 2 * 8) * N + e / 4 * 8 + 2 * t + e % 2] = d[e];
    }
}

template <class Cfg>
__device__ void wgmma(const WgmmaParams<typename Cfg::T>& p) {
    using Tiles = WgmmaTiles<Cfg>;
    using TileA = typename Tiles::TileA;
    using TileB = typename Tiles::TileB;
    constexpr int THREADS = Cfg::SETMAXNREG ? 384 : 128;
    constexpr int A_ROWS = Cfg::A_MN ? Tiles::K : 64, B_ROWS = Cfg::B_MN ? Tiles::K : Tiles::N;
    constexpr int A_COLS = Cfg::A_MN ? 64 : Tiles::K, B_COLS = Cfg::B_MN ? max(Tiles::N, 64) : Tiles::K;
    __shared__ TileA s_a;  // [64, K] or [K, 64]
    __shared__ TileB s_b;  // [N, K] or [K, max(N, 64)]
    load_async<THREADS>(s_a, p.a, A_COLS, A_ROWS, threadIdx.x);
    load_async<THREADS>(s_b, p.b, B_COLS, B_ROWS, threadIdx.x);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    fence_proxy_async();  // the products see this thread's part of s_a and s_b
    __syncthreads();      // s_a and s_b are complete

    if constexpr (Cfg::SETMAXNREG) {
        const int warpgroup = threadIdx.x / 128;
        if (warpgroup == 0) {
            setmaxnreg_dec<24>();
        } else {
            setmaxnreg_inc<240>();
            multiply<Cfg>(p.y + (warpgroup - 1) * 64 * Tiles::N, s_a, s_b);
        }
    } else {
        multiply<Cfg>(p.y, s_a, s_b);
    }
}

}  // namespace fla::test
