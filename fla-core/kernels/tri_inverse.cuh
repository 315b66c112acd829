// tri_inverse: (I + L)^-1 for strictly lower L of 16, 32 or 64 rows.
//
//   16x16   by substitution in f32, a column per lane
//   merge   [A 0; B D]^-1 = [A^-1 0; -D^-1 B A^-1, D^-1], by products in tf32
//
// The inverse of what repeated keys give has no entry above 1, but the powers of L, which a series would sum, grow until
// they cancel; substitution never forms them.
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/mma.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// How the products of a merge round their operands.
enum class Merge {
    TF32,    // once, to 11 significant bits
    TF32X3,  // to the sum of two such numbers, three products instead of one: nearly f32
};

// Warps that invert a tile of C rows together.
template <int C>
inline constexpr int TRI_INVERSE_WARPS = C == 64 ? 2 : 1;

// An f32 as a sum of tf32 numbers; `low` is what `high` misses.
struct Split {
    u32 high;
    u32 low;
};

template <Merge MERGE>
__device__ Split split(float x) {
    // Half of the last bit that counts: products leave out those below, and this is one instruction where the conversion is
    // several.
    if constexpr (MERGE == Merge::TF32) return {__float_as_uint(x) + 0x1000u, 0};
    const u32 high = cvt_rna_tf32(x);
    return {high, cvt_rna_tf32(x - __uint_as_float(high))};
}

// d += a b, with the small terms first. Position t of the inner dim holds index 2 t of its 8, and position t + 4 holds
// 2 t + 1, in both operands: so a result is the next left operand as it lies, and a right operand is read in pairs.
template <Merge MERGE>
__device__ void mma_split(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    u32 a_high[4], a_low[4], b_high[2], b_low[2];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Split x = split<MERGE>(a[i]);
        a_high[i] = x.high;
        a_low[i] = x.low;
    }
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const Split x = split<MERGE>(b[i]);
        b_high[i] = x.high;
        b_low[i] = x.low;
    }
    if constexpr (MERGE == Merge::TF32X3) {
        mma_m16n8k8_tf32(d, a_low, b_high, d);
        mma_m16n8k8_tf32(d, a_high, b_low, d);
    }
    mma_m16n8k8_tf32(d, a_high, b_high, d);
}

// Replaces the block of 16 rows at (row0, row0), one plus a strictly lower part, by its inverse, and writes the zeros
// above its diagonal. The 16 lanes of a half warp call it; `lane` is 0 to 15, and `__syncwarp` is the caller's.
template <int C>
__device__ void substitute(float (&x)[16], const SharedTile<float, C, C>& s, int row0, int lane) {
    // Column `lane` of the inverse: x_i = (i = lane) - sum of L_ik x_k over k < i.
    #pragma unroll
    for (int i = 0; i < 16; ++i) {
        x[i] = i == lane ? 1.0f : 0.0f;
        #pragma unroll
        for (int k = 0; k < i; k += 4) {
            const float4 l = reinterpret_cast<const float4&>(s.at(row0 + i, row0 + k));
            x[i] -= l.x * x[k];
            if (k + 1 < i) x[i] -= l.y * x[k + 1];
            if (k + 2 < i) x[i] -= l.z * x[k + 2];
            if (k + 3 < i) x[i] -= l.w * x[k + 3];
        }
    }
}

// Rows col0 .. col0 + 15 of the transpose of -D^-1 B A^-1, for the blocks of M rows whose A^-1 is at (row0, row0).
template <Merge MERGE, int M, int C>
__device__ void merge(RegTile<16, M>& r_t, const SharedTile<float, C, C>& s, int row0, int col0) {
    const int g = lane_id() / 4, t = lane_id() % 4;

    // (B A^-1)^T = (A^-1)^T B^T. A^-1 is lower triangular, so that its transpose begins at column col0.
    RegTile<16, M> r_ba_t;  // [16, M]
    zero(r_ba_t);
    #pragma unroll
    for (int k = 0; k < M; k += 8) {
        if (k < col0) continue;
        const float* a_inv = &s.at(row0 + k + 2 * t, row0 + col0 + g);
        constexpr int STRIDE = SharedTile<float, C, C>::STRIDE;
        const float a[4] = {a_inv[0], a_inv[8], a_inv[STRIDE], a_inv[STRIDE + 8]};
        #pragma unroll
        for (int j = 0; j < M / 8; ++j) {
            const float2 x = reinterpret_cast<const float2&>(s.at(row0 + M + 8 * j + g, row0 + k + 2 * t));
            const float b[2] = {x.x, x.y};
            mma_split<MERGE>(r_ba_t.at[0][j], a, b);
        }
    }

    // -(B A^-1)^T (D^-1)^T, where row i of D^-1 ends at column i.
    zero(r_t);
    #pragma unroll
    for (int k = 0; k < M / 8; ++k) {
        const float(&x)[4] = r_ba_t.at[0][k];
        const float a[4] = {-x[0], -x[2], -x[1], -x[3]};
        #pragma unroll
        for (int j = k; j < M / 8; ++j) {
            const float2 y = reinterpret_cast<const float2&>(s.at(row0 + M + 8 * j + g, row0 + M + 8 * k + 2 * t));
            const float b[2] = {y.x, y.y};
            mma_split<MERGE>(r_t.at[0][j], a, b);
        }
    }
}

// s = (I + L)^-1 in place, with zeros above the diagonal. Only the strictly lower part of `s` is read.
//
// TRI_INVERSE_WARPS<C> whole warps call it, `i_warp` from 0; with 64 rows they meet at the named barrier `id`. What they
// wrote to `s` before is visible to them all when they come, and the result is when they leave.
template <Merge MERGE, int C>
__device__ void tri_inverse(SharedTile<float, C, C>& s, int i_warp, int id) {
    static_assert(C == 16 || C == 32 || C == 64, "16, 32 or 64 rows");
    constexpr int THREADS = 32 * TRI_INVERSE_WARPS<C>;
    const int lane = lane_id();

    // Each half warp has a block of 16 on the diagonal; with 16 rows in all, the second half repeats the first.
    const int block0 = C == 16 ? 0 : 32 * i_warp + lane / 16 * 16;
    float x[16];
    substitute(x, s, block0, lane % 16);
    __syncwarp();  // both blocks have been read
    if (C > 16 || lane < 16) {
        #pragma unroll
        for (int i = 0; i < 16; ++i) s.at(block0 + i, block0 + lane % 16) = x[i];
    }
    // Nobody reads above the blocks on the diagonal.
    for (int i = 32 * i_warp + lane; i < C * C / 16; i += THREADS) {
        const int row = i / (C / 16), col = i % (C / 16) * 16;
        if (col <= row) continue;
        #pragma unroll
        for (int j = 0; j < 16; j += 4) reinterpret_cast<float4&>(s.at(row, col + j)) = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    __syncwarp();  // A^-1 and D^-1 of this warp's pair of blocks are in s

    if constexpr (C >= 32) {
        const int row0 = 32 * i_warp;
        RegTile<16, 16> r_t;  // [16, 16]
        merge<MERGE, 16>(r_t, s, row0, 0);
        __syncwarp();  // B has been read
        for_each(r_t, [&](int row, int col, float& y) { s.at(row0 + 16 + col, row0 + row) = y; });
        __syncwarp();  // this warp's block of 32 rows is inverted
    }
    if constexpr (C == 64) {
        bar_sync(id, THREADS);  // both blocks of 32 rows are inverted
        const int col0 = 16 * i_warp;
        RegTile<16, 32> r_t;  // [16, 32]
        merge<MERGE, 32>(r_t, s, 0, col0);
        bar_sync(id, THREADS);  // both warps have read B
        for_each(r_t, [&](int row, int col, float& y) { s.at(32 + col, col0 + row) = y; });
        bar_sync(id, THREADS);  // s is complete
    }
}

}  // namespace fla
