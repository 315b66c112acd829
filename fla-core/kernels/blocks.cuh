// blocks: operands of mma.sync as 8x8 blocks of 128 bytes, in one bf16 part or as the sum of two.
//
// A number that is the sum of two bf16, `high` the nearest and `low` what it misses, has 16 significant bits and the range
// of f32. A product of two such operands is three products of parts: high high + high low + low high. So f32 and f16 data
// take the same loads and instructions as bf16, only more of them.
//
// Four blocks of 16x16 numbers lie one after the other, in the order in which a left operand has them. Neither 8x8 loads nor
// stores of fragments can collide then, global memory takes a tile as it is, and an address is a constant and one of two
// offsets of the lane, the same for all tiles: arithmetic of addresses would be a third of a kernel's instructions.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/mma.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// Parts that hold an element of T: bf16 is one, f16 and f32 are two.
template <class T>
inline constexpr int OPERAND_PARTS = same<T, bf16> ? 1 : 2;

using Block = u32[32];

// A matrix [ROWS, COLS] in shared or global memory.
template <int PARTS, int ROWS, int COLS>
struct BlockTile {
    static_assert(ROWS % 16 == 0 && COLS % 16 == 0, "16x16 numbers");
    alignas(128) Block blocks[PARTS][ROWS / 16][COLS / 16][4];  // upper left, lower left, upper right, lower right

    __device__ static int index(int row, int col) { return row / 8 % 2 + col / 8 % 2 * 2; }

    __device__ void set(int row, int col, float x) {
        #pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            const bf16 part = to_bf16(x);
            reinterpret_cast<bf16*>(blocks[p][row / 16][col / 16][index(row, col)])[row % 8 * 8 + col % 8] = part;
            x -= to_f32(part);
        }
    }

    // Of one part.
    __device__ void set_bits(int row, int col, u16 bits) {
        reinterpret_cast<u16*>(blocks[0][row / 16][col / 16][index(row, col)])[row % 8 * 8 + col % 8] = bits;
    }
};

// Results of a warp, [16, 16]: two [16, 8] side by side. Lane 4 g + t has rows g (e = 0, 1) and g + 8 (e = 2, 3) at
// columns 8 n + 2 t and the next.
struct Acc16 {
    float at[2][4];
};

template <int PARTS>
struct FragA {
    u32 at[PARTS][4];
};

template <int PARTS>
struct FragB {
    u32 at[PARTS][2][2];
};

// Calls f(row, col, element) for what this lane holds.
template <class F>
__device__ void for_each(Acc16& d, F f) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) f(g + e / 2 * 8, 8 * n + 2 * t + e % 2, d.at[n][e]);
    }
}

__device__ inline void zero(Acc16& d) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) d.at[n][e] = 0.0f;
    }
}

__device__ inline Acc16 operator*(const Acc16& a, const Acc16& b) {
    Acc16 d;
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) d.at[n][e] = a.at[n][e] * b.at[n][e];
    }
    return d;
}

__device__ inline Acc16 operator+(const Acc16& a, const Acc16& b) {
    Acc16 d;
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) d.at[n][e] = a.at[n][e] + b.at[n][e];
    }
    return d;
}

__device__ inline Acc16 operator*(float a, const Acc16& b) {
    Acc16 d;
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) d.at[n][e] = a * b.at[n][e];
    }
    return d;
}

__device__ inline Acc16 exp_approx(Acc16 x) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) x.at[n][e] = exp_approx(x.at[n][e]);
    }
    return x;
}

// Two numbers in one register for each part.
template <int PARTS>
__device__ void split_pair(u32 (&parts)[PARTS], float x, float y) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        parts[p] = pack2<bf16>(x, y);
        if (p + 1 < PARTS) {
            x -= __uint_as_float(parts[p] << 16);
            y -= __uint_as_float(parts[p] & 0xffff0000u);
        }
    }
}

// A result as the left operand of the next product.
template <int PARTS>
__device__ FragA<PARTS> to_a(const Acc16& d) {
    FragA<PARTS> a;
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 parts[PARTS];
        split_pair<PARTS>(parts, d.at[i / 2][i % 2 * 2], d.at[i / 2][i % 2 * 2 + 1]);
        #pragma unroll
        for (int p = 0; p < PARTS; ++p) a.at[p][i] = parts[p];
    }
    return a;
}

// What an operand stands for.
template <int PARTS>
__device__ Acc16 to_acc(const FragA<PARTS>& a) {
    Acc16 d;
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack2<bf16>(a.at[PARTS - 1][i]);
        #pragma unroll
        for (int p = PARTS - 2; p >= 0; --p) {
            const float2 part = unpack2<bf16>(a.at[p][i]);
            x.x += part.x;
            x.y += part.y;
        }
        d.at[i / 2][i % 2 * 2] = x.x;
        d.at[i / 2][i % 2 * 2 + 1] = x.y;
    }
    return d;
}

// The transpose of a left operand as a right one: the lanes hold the same numbers.
template <int PARTS>
__device__ FragB<PARTS> to_b_transposed(const FragA<PARTS>& a) {
    FragB<PARTS> b;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) b.at[p][i % 2][i / 2] = a.at[p][i];
    }
    return b;
}

// And the way back.
template <int PARTS>
__device__ FragA<PARTS> to_a_transposed(const FragB<PARTS>& b) {
    FragA<PARTS> a;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) a.at[p][i] = b.at[p][i % 2][i / 2];
    }
    return a;
}

// The transpose of a left operand as another.
template <int PARTS>
__device__ FragA<PARTS> transposed(const FragA<PARTS>& a) {
    FragA<PARTS> t;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) t.at[p][i] = movmatrix_trans(a.at[p][i % 2 * 2 + i / 2]);
    }
    return t;
}

// A result in shared memory, as the lanes hold it: from one warp to another.
struct AccTile {
    float4 halves[2][32];

    __device__ void put(const Acc16& x) {
        #pragma unroll
        for (int n = 0; n < 2; ++n) halves[n][lane_id()] = {x.at[n][0], x.at[n][1], x.at[n][2], x.at[n][3]};
    }
    __device__ Acc16 get() const {
        Acc16 x;
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float4 half = halves[n][lane_id()];
            x.at[n][0] = half.x;
            x.at[n][1] = half.y;
            x.at[n][2] = half.z;
            x.at[n][3] = half.w;
        }
        return x;
    }
};

// s[row0 .. row0 + 16, col0 .. col0 + 16] = a, by the lanes as they hold it.
template <int PARTS, int ROWS, int COLS>
__device__ void store_a(BlockTile<PARTS, ROWS, COLS>& s, int row0, int col0, const FragA<PARTS>& a) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) s.blocks[p][row0 / 16][col0 / 16][i][lane_id()] = a.at[p][i];
    }
}

// The 16 bytes that this lane names of four blocks for an 8x8 load, in their order or with the middle two exchanged.
template <bool EXCHANGED>
__device__ const u32* block_row(const Block (&blocks)[4]) {
    const int lane = lane_id();
    return &blocks[0][0] + (EXCHANGED ? (lane / 8 % 2 * 2 + lane / 16) * 8 + lane % 8 : lane) * 4;
}

// s[row0 .. row0 + 16, col0 .. col0 + 16] as a left operand.
template <int PARTS, int ROWS, int COLS>
__device__ FragA<PARTS> load_a(const BlockTile<PARTS, ROWS, COLS>& s, int row0, int col0) {
    FragA<PARTS> a;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) ldmatrix_x4(a.at[p], block_row<false>(s.blocks[p][row0 / 16][col0 / 16]));
    return a;
}

// The transpose of s[row0 .. row0 + 16, col0 .. col0 + 16] as a left operand: its row is s's column.
template <int PARTS, int ROWS, int COLS>
__device__ FragA<PARTS> load_a_transposed(const BlockTile<PARTS, ROWS, COLS>& s, int row0, int col0) {
    FragA<PARTS> a;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        ldmatrix_x4_trans(a.at[p], block_row<true>(s.blocks[p][row0 / 16][col0 / 16]));
    }
    return a;
}

// s[row0 .. row0 + 16, col0 .. col0 + 16] as a right operand: the sum runs over rows of s.
template <int PARTS, int ROWS, int COLS>
__device__ FragB<PARTS> load_b(const BlockTile<PARTS, ROWS, COLS>& s, int row0, int col0) {
    FragB<PARTS> b;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        u32 r[4];
        ldmatrix_x4_trans(r, block_row<false>(s.blocks[p][row0 / 16][col0 / 16]));
        #pragma unroll
        for (int e = 0; e < 4; ++e) b.at[p][e / 2][e % 2] = r[e];
    }
    return b;
}

// The transpose of s[row0 .. row0 + 16, col0 .. col0 + 16] as a right operand: the sum runs over columns of s.
template <int PARTS, int ROWS, int COLS>
__device__ FragB<PARTS> load_b_transposed(const BlockTile<PARTS, ROWS, COLS>& s, int row0, int col0) {
    FragB<PARTS> b;
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        u32 r[4];
        ldmatrix_x4(r, block_row<true>(s.blocks[p][row0 / 16][col0 / 16]));
        #pragma unroll
        for (int e = 0; e < 4; ++e) b.at[p][e / 2][e % 2] = r[e];
    }
    return b;
}

// Leaves of `b` the bits that `mask` has.
template <int PARTS>
__device__ FragB<PARTS> operator&(FragB<PARTS> b, const FragB<1>& mask) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) b.at[p][i / 2][i % 2] &= mask.at[0][i / 2][i % 2];
    }
    return b;
}

// d += a b. Of two operands in two parts each, the product of both low parts is below what is rounded and left out; not with
// WHOLE, for products of three numbers that must be the same whichever two are multiplied first.
template <bool WHOLE = false, int PARTS_A, int PARTS_B>
__device__ void mma(Acc16& d, const FragA<PARTS_A>& a, const FragB<PARTS_B>& b) {
    #pragma unroll
    for (int p = PARTS_A - 1; p >= 0; --p) {
        #pragma unroll
        for (int q = PARTS_B - 1; q >= 0; --q) {
            if (!WHOLE && PARTS_A > 1 && PARTS_B > 1 && p + q >= max(PARTS_A, PARTS_B)) continue;
            #pragma unroll
            for (int n = 0; n < 2; ++n) mma_m16n8k16_bf16(d.at[n], a.at[p], b.at[q][n], d.at[n]);
        }
    }
}

// Each number such that its upper 19 bits, which are all that a product in tf32 sees, are what is nearest to it: the rest of the
// bits do not count. One addition, where the conversion of the instruction set is three instructions.
__device__ inline Acc16 round_tf32(Acc16 x) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) x.at[n][e] = __uint_as_float(__float_as_uint(x.at[n][e]) + 0x1000u);
    }
    return x;
}

// What a product in tf32 sees.
__device__ inline Acc16 cut_tf32(Acc16 x) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) x.at[n][e] = __uint_as_float(__float_as_uint(x.at[n][e]) & 0xffffe000u);
    }
    return x;
}

// d += a b^T in tf32. The lanes hold results as operands do but for the order of columns, over
// which the sum runs, and which is the same in both.
__device__ inline void mma_tf32(Acc16& d, const Acc16& a, const Acc16& b) {
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 left[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(a.at[h][i % 2 * 2 + i / 2]);
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const u32 right[2] = {__float_as_uint(b.at[h][2 * n]), __float_as_uint(b.at[h][2 * n + 1])};
            mma_m16n8k8_tf32(d.at[n], left, right, d.at[n]);
        }
    }
}

// 16 rows as they come from memory. They are padded, so that 8x8 loads and loads of pairs of f32 do not collide, and an
// address is a constant and an offset of the lane here too.
template <class T, int COLS>
struct TokenTile {
    static_assert(COLS % 16 == 0, "16x16 numbers");
    static constexpr int STRIDE = COLS + (sizeof(T) == 2 ? 8 : (40 - COLS % 32) % 32);
    alignas(16) T elems[16 * STRIDE];

    __device__ T& at(int row, int col) { return elems[row * STRIDE + col]; }
    __device__ const T& at(int row, int col) const { return elems[row * STRIDE + col]; }

    // The 16 bytes that this lane names for an 8x8 load of 16 columns: in the order of a left operand, or exchanged.
    template <bool EXCHANGED>
    __device__ const T* row16(int col0) const {
        const int lane = lane_id(), upper = EXCHANGED ? lane / 16 : lane / 8 % 2, right = EXCHANGED ? lane / 8 % 2 : lane / 16;
        return &at(lane % 8 + upper * 8, right * 8) + col0;
    }
};

template <class T, int COLS>
__device__ float2 load_pair(const TokenTile<T, COLS>& s, int row, int col) {
    const Vec<T, 2> x = reinterpret_cast<const Vec<T, 2>&>(s.at(row, col));
    return {to_f32(x.at[0]), to_f32(x.at[1])};
}

// s[0 .. 16, col0 .. col0 + 16], each number where a result would have it.
template <class T, int COLS>
__device__ Acc16 load_acc(const TokenTile<T, COLS>& s, int col0) {
    Acc16 d;
    u32 r[4];
    if constexpr (sizeof(T) == 2) ldmatrix_x4(r, s.template row16<false>(col0));
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x;
        if constexpr (sizeof(T) == 2) x = unpack2<T>(r[i]);
        else x = load_pair(s, lane_id() / 4 + i % 2 * 8, col0 + i / 2 * 8 + lane_id() % 4 * 2);
        d.at[i / 2][i % 2 * 2] = x.x;
        d.at[i / 2][i % 2 * 2 + 1] = x.y;
    }
    return d;
}

// Pairs of numbers one below the other: (row, col) and (row + 1, col), as `f` makes two of them parts of an operand.
// Register i has rows 2 t + 8 (i % 2) at column g + 8 (i / 2) of s[0 .. 16, col0 .. col0 + 16].
template <class T, int COLS, class F>
__device__ void for_pairs_down(const TokenTile<T, COLS>& s, int col0, F f) {
    if constexpr (sizeof(T) == 2) {
        u32 r[4];
        ldmatrix_x4_trans(r, s.template row16<false>(col0));
        #pragma unroll
        for (int i = 0; i < 4; ++i) f(i, unpack2<T>(r[i]));
    } else {
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = lane_id() % 4 * 2 + i % 2 * 8, col = col0 + lane_id() / 4 + i / 2 * 8;
            f(i, float2{to_f32(s.at(row, col)), to_f32(s.at(row + 1, col))});
        }
    }
}

// The transpose of s[0 .. 16, col0 .. col0 + 16] in f32.
template <class T, int COLS>
__device__ Acc16 load_acc_transposed(const TokenTile<T, COLS>& s, int col0) {
    Acc16 d;
    for_pairs_down(s, col0, [&](int i, float2 x) {
        d.at[i % 2][i / 2 * 2] = x.x;
        d.at[i % 2][i / 2 * 2 + 1] = x.y;
    });
    return d;
}

// The transpose of s[0 .. 16, col0 .. col0 + 16] as a left operand.
template <int PARTS, class T, int COLS>
__device__ FragA<PARTS> load_a_transposed(const TokenTile<T, COLS>& s, int col0) {
    FragA<PARTS> a;
    if constexpr (same<T, bf16> && PARTS == 1) {
        ldmatrix_x4_trans(a.at[0], s.template row16<true>(col0));
    } else {
        for_pairs_down(s, col0, [&](int i, float2 x) {
            u32 parts[PARTS];
            split_pair<PARTS>(parts, x.x, x.y);
            #pragma unroll
            for (int p = 0; p < PARTS; ++p) a.at[p][i % 2 * 2 + i / 2] = parts[p];
        });
    }
    return a;
}

// s[0 .. 16, col0 .. col0 + 16] as a left operand.
template <int PARTS, class T, int COLS>
__device__ FragA<PARTS> load_a(const TokenTile<T, COLS>& s, int col0) {
    if constexpr (same<T, bf16> && PARTS == 1) {
        FragA<1> a;
        ldmatrix_x4(a.at[0], s.template row16<false>(col0));
        return a;
    } else {
        return to_a<PARTS>(load_acc(s, col0));
    }
}

// s[0 .. 16, col0 .. col0 + 16] as a right operand: the sum runs over tokens.
template <int PARTS, class T, int COLS>
__device__ FragB<PARTS> load_b(const TokenTile<T, COLS>& s, int col0) {
    FragB<PARTS> b;
    if constexpr (same<T, bf16> && PARTS == 1) {
        u32 r[4];
        ldmatrix_x4_trans(r, s.template row16<false>(col0));
        #pragma unroll
        for (int i = 0; i < 4; ++i) b.at[0][i / 2][i % 2] = r[i];
    } else {
        for_pairs_down(s, col0, [&](int i, float2 x) {
            u32 parts[PARTS];
            split_pair<PARTS>(parts, x.x, x.y);
            #pragma unroll
            for (int p = 0; p < PARTS; ++p) b.at[p][i / 2][i % 2] = parts[p];
        });
    }
    return b;
}

// The transpose of s[0 .. 16, col0 .. col0 + 16] as a right operand.
template <int PARTS, class T, int COLS>
__device__ FragB<PARTS> load_b_transposed(const TokenTile<T, COLS>& s, int col0) {
    FragB<PARTS> b;
    if constexpr (same<T, bf16> && PARTS == 1) {
        u32 r[4];
        ldmatrix_x4(r, s.template row16<true>(col0));
        #pragma unroll
        for (int i = 0; i < 4; ++i) b.at[0][i / 2][i % 2] = r[i];
    } else {
        b = to_b_transposed(load_a<PARTS>(s, col0));
    }
    return b;
}

}  // namespace fla
