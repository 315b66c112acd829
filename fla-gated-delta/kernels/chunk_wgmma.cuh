// chunk_wgmma: products of a warpgroup on tiles of a chunk, and the barriers between the warpgroups of a block (sm_90a).
//
// Tiles in shared memory are those of mma.sync: panels of 64 columns with the 128-byte swizzle are what wgmma reads. Each warp
// has 16 rows of a result, in the lanes as a `RegTile` has them, so that a result is the left operand of the next product as
// it lies.
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>
#include <fla/core/wgmma.cuh>

namespace fla::gated_delta {

// `x`, but so that the compiler cannot tell. Addresses that are made of it are made where they are used, and do not take
// registers from one use to the next.
__device__ inline int fresh(int x) {
    u32 y[1] = {u32(x)};
    fla::hold(y);
    return int(y[0]);
}

template <int ROWS, int COLS>
__device__ void hold(RegTile<ROWS, COLS>& r) {
    fla::hold(reinterpret_cast<float(&)[ROWS * COLS / 32]>(r.at));
}
template <class Half, int COLS>
__device__ void hold(OperandA<Half, 1, 16, COLS>& a) {
    fla::hold(reinterpret_cast<u32(&)[COLS / 4]>(a.part[0].at));
}

// Where an operand lies, and how far a step of 16 of the inner dim is from its start: along the columns of its tile, or with
// Major::MN down its rows. Only the lower half of a descriptor changes from step to step, by a constant.
template <Major MAJOR, class Half, int ROWS, int COLS>
struct Operand {
    u32 low, high;

    __device__ Operand(const OperandTile<Half, 1, ROWS, COLS>& s, int col) {
        static_assert(SharedTile<Half, ROWS, COLS>::SWIZZLED, "whole panels of 64 columns");
        const u64 start = wgmma_descriptor<ROWS>(&s, 0, col);
        low = u32(start);
        high = u32(start >> 32);
    }

    __device__ u64 at(int inner) const {
        const int bytes = MAJOR == Major::K ? inner / 64 * (ROWS * 128) + inner % 64 * 2 : inner * 128;
        return u64(low + bytes / 16) | u64(high) << 32;
    }
};
template <Major MAJOR, class Half, int ROWS, int COLS>
__device__ Operand<MAJOR, Half, ROWS, COLS> operand(const OperandTile<Half, 1, ROWS, COLS>& s, int col = 0) {
    return {s, col};
}

// One step: 16 of the inner dim.
template <class Half, Major B, int N>
__device__ void step(RegTile<16, N>& r, const u32 (&a)[4], u64 b, bool add) {
    auto& d = reinterpret_cast<float(&)[N / 2]>(r.at);
    static_assert(N == 64 || N == 128, "one panel of columns, or two");
    if constexpr (same<Half, bf16>) {
        if constexpr (N == 64) wgmma_m64n64k16_bf16_rs<B>(d, a, b, add);
        if constexpr (N == 128) wgmma_m64n128k16_bf16_rs<B>(d, a, b, add);
    } else {
        if constexpr (N == 64) wgmma_m64n64k16_f16_rs<B>(d, a, b, add);
        if constexpr (N == 128) wgmma_m64n128k16_f16_rs<B>(d, a, b, add);
    }
}
template <class Half, Major A, Major B, int N>
__device__ void step(RegTile<16, N>& r, u64 a, u64 b, bool add) {
    auto& d = reinterpret_cast<float(&)[N / 2]>(r.at);
    static_assert(N == 64 || N == 128, "one panel of columns, or two");
    if constexpr (same<Half, bf16>) {
        if constexpr (N == 64) wgmma_m64n64k16_bf16_ss<A, B>(d, a, b, add);
        if constexpr (N == 128) wgmma_m64n128k16_bf16_ss<A, B>(d, a, b, add);
    } else {
        if constexpr (N == 64) wgmma_m64n64k16_f16_ss<A, B>(d, a, b, add);
        if constexpr (N == 128) wgmma_m64n128k16_f16_ss<A, B>(d, a, b, add);
    }
}

// Products run on their own from here to `finish`, group by group: what they read is not written, and what they write not
// touched.

// r = a s, or r += a s, the sum over the rows of `s`.
template <class Half, int N, int K, int COLS>
__device__ void start_times(
    RegTile<16, N>& r, const OperandA<Half, 1, 16, K>& a, const OperandTile<Half, 1, K, COLS>& s, bool add
) {
    const auto b = operand<Major::MN>(s);
    #pragma unroll
    for (int k = 0; k < K / 16; ++k) step<Half, Major::MN>(r, a.part[0].at[0][k], b.at(16 * k), add || k > 0);
}

// The same with the transpose of `s`: the sum is over its columns.
template <class Half, int N, int K>
__device__ void start_times_transposed(
    RegTile<16, N>& r, const OperandA<Half, 1, 16, K>& a, const OperandTile<Half, 1, N, K>& s, bool add
) {
    const auto b = operand<Major::K>(s);
    #pragma unroll
    for (int k = 0; k < K / 16; ++k) step<Half, Major::K>(r, a.part[0].at[0][k], b.at(16 * k), add || k > 0);
}

// r = a b, or r += a b, for 64 rows of a product from shared memory. A left operand with Major::MN is the transpose of its
// tile, and so is a right operand with Major::K; one with Major::MN is of its columns from `col_b` on.
template <Major A, Major B, int INNER, class Half, int N, int A_ROWS, int A_COLS, int B_ROWS, int B_COLS>
__device__ void start_product(
    RegTile<16, N>& r,
    const OperandTile<Half, 1, A_ROWS, A_COLS>& s_a,
    const OperandTile<Half, 1, B_ROWS, B_COLS>& s_b,
    bool add,
    int col_b = 0
) {
    const auto a = operand<A>(s_a);
    const auto b = operand<B>(s_b, col_b);
    #pragma unroll
    for (int k = 0; k < INNER; k += 16) step<Half, A, B>(r, a.at(k), b.at(k), add || k > 0);
}

// Where this lane has its pairs of the 16 rows from `row0` on, a multiple of 8, of a tile with the 128-byte swizzle: in bytes
// from the start. Of all the addresses of a fragment only eight differ by more than a constant, and these by one instruction.
__device__ inline u32 lane_place(int row0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    return u32(fresh((row0 + g) * 128 + g * 16 + t * 4));
}

// The pair in row row0 + g + 8 i and columns 8 j + 2 t and the next.
template <class Half, int ROWS, int COLS>
__device__ u32& pair_at(OperandTile<Half, 1, ROWS, COLS>& s, u32 place, int i, int j) {
    static_assert(SharedTile<Half, ROWS, COLS>::SWIZZLED, "whole panels of 64 columns");
    char* bytes = reinterpret_cast<char*>(&s);
    return *reinterpret_cast<u32*>(bytes + (place ^ u32(j % 8 * 16)) + (j / 8 * (ROWS * 128) + i * 1024));
}
template <class Half, int ROWS, int COLS>
__device__ u32 pair_at(const OperandTile<Half, 1, ROWS, COLS>& s, u32 place, int i, int j) {
    return pair_at(const_cast<OperandTile<Half, 1, ROWS, COLS>&>(s), place, i, j);
}

// The warp's 16 rows of `s` from row0 on = r, or a.
template <class Half, int ROWS, int COLS>
__device__ void store_result_at(OperandTile<Half, 1, ROWS, COLS>& s, const RegTile<16, COLS>& r, int row0) {
    const u32 place = lane_place(row0);
    #pragma unroll
    for (int j = 0; j < COLS / 8; ++j) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) pair_at(s, place, i, j) = pack2<Half>(r.at[0][j][2 * i], r.at[0][j][2 * i + 1]);
    }
}
template <class Half, int ROWS, int COLS>
__device__ void store_operand_at(OperandTile<Half, 1, ROWS, COLS>& s, const OperandA<Half, 1, 16, COLS>& a, int row0) {
    const u32 place = lane_place(row0);
    #pragma unroll
    for (int j = 0; j < COLS / 8; ++j) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) pair_at(s, place, i, j) = a.part[0].at[0][j / 2][j % 2 * 2 + i];
    }
}

// The sums over a row of what four neighbouring lanes hold of `x`, columns col0 and on, times the numbers of `s` there.
template <int N, class Half, int ROWS, int COLS>
__device__ void row_dots_at(
    float (&sums)[2], const RegTile<16, N>& x, const OperandTile<Half, 1, ROWS, COLS>& s, int row0, int col0
) {
    const u32 place = lane_place(row0);
    sums[0] = sums[1] = 0.0f;
    #pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 y = unpack2<Half>(pair_at(s, place, i, col0 / 8 + j));
            sums[i] = fmaf(y.x, x.at[0][j][2 * i], fmaf(y.y, x.at[0][j][2 * i + 1], sums[i]));
        }
    }
    #pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] = group_sum<4>(sums[i]);
}

// The transpose of a result: element (i, j) to dst[j stride + i], the first `rows` of its columns. Everything is exchanged
// first and then stored: one after the other, each would wait for the last.
template <class Element, int N>
__device__ void store_columns(Element* dst, i64 stride, const RegTile<16, N>& x, int rows) {
    const int lane = fresh(lane_id()), g = lane / 4, t = lane % 4;
    const bool odd = t & 1;
    Words<2> four[N / 8];
    #pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const float(&r)[4] = x.at[0][j];
        four[j].at[0] = movmatrix_trans(pack2<Element>(r[0], r[1]));
        four[j].at[1] = movmatrix_trans(pack2<Element>(r[2], r[3]));
    }
    #pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const u32 low = four[j].at[0], high = four[j].at[1];
        const u32 got = __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
        four[j] = {odd ? got : low, odd ? high : got};
    }
    Element* to = dst + g * stride + (odd ? 8 + 2 * (t - 1) : 2 * t);
    if (rows == N) {
        #pragma unroll
        for (int j = 0; j < N / 8; ++j) st_global(to + 8 * j * stride, four[j]);
    } else {
        #pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            if (8 * j + g < rows) st_global(to + 8 * j * stride, four[j]);
        }
    }
}

// What two kinds of warpgroups tell each other of a ring of stages in shared memory: copies have come, the writers have done
// the rest, the readers have read it all.
template <int STAGES>
struct Ring {
    Barrier loaded[STAGES], ready[STAGES], free[STAGES];
};

// One thread calls it before the others use the ring, and a barrier follows.
template <int STAGES>
__device__ void init(Ring<STAGES>& s, u32 writers, u32 readers) {
    #pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(s.loaded[i], 1);
        mbarrier_init(s.ready[i], writers);
        mbarrier_init(s.free[i], readers);
    }
    fence_mbarrier_init();
}

// Where a walk over stages is.
template <int STAGES>
struct RingPlace {
    int stage = 0;
    u32 round = 0;

    __device__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            ++round;
        }
    }
};

}  // namespace fla::gated_delta
