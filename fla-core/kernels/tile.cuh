// tile: matrices in shared memory and in the registers of a warp, and the products of them by mma.sync.
//
// A function's first argument is its result. The functions on register tiles are called by whole warps.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/mma.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// A matrix [ROWS, COLS] in shared memory, laid out so that neither 8x8 matrix loads nor accesses by fragment collide.
//
// Rows of 64 16-bit elements have the 128-byte swizzle: 16-byte piece i of row r lies at piece i ^ (r % 8). Wider tiles
// are panels of 64 columns one after the other. That is what a tensor copy writes and what wgmma reads, so the tile
// starts at a multiple of 1024 bytes. All other tiles have padded rows.
template <class T, int ROWS, int COLS>
struct SharedTile {
    static constexpr bool SWIZZLED = sizeof(T) == 2 && COLS % 64 == 0;
    static_assert(ROWS % 8 == 0 && COLS % 8 == 0, "8x8 matrices");
    static_assert(sizeof(T) == 4 || COLS % 16 == 0, "an odd number of 16-byte pieces, padding included");

    // Two 16-bit rows 16 bytes further apart than their length start in different banks. Rows of f32 are read in pairs
    // of elements, 4 rows at a time, which take all 32 banks when rows are 8 banks apart.
    static constexpr int PAD = SWIZZLED ? 0 : sizeof(T) == 2 ? 8 : (40 - COLS % 32) % 32;
    static constexpr int STRIDE = SWIZZLED ? 64 : COLS + PAD;
    static constexpr int PANELS = SWIZZLED ? COLS / 64 : 1;

    alignas(SWIZZLED ? 1024 : 16) T elems[PANELS * ROWS * STRIDE];

    __device__ static constexpr int offset(int row, int col) {
        if constexpr (SWIZZLED) {
            return col / 64 * (ROWS * 64) + row * 64 + ((col % 64 / 8) ^ (row % 8)) * 8 + col % 8;
        } else {
            return row * STRIDE + col;
        }
    }

    __device__ T& at(int row, int col) { return elems[offset(row, col)]; }
    __device__ const T& at(int row, int col) const { return elems[offset(row, col)]; }
};

// The f32 result of products, [ROWS, COLS] over one warp.
template <int ROWS, int COLS>
struct RegTile {
    static_assert(ROWS % 16 == 0 && COLS % 8 == 0, "results come in [16, 8]");
    float at[ROWS / 16][COLS / 8][4];
};

// A left operand [ROWS, COLS] of a product.
template <class T, int ROWS, int COLS>
struct RegTileA {
    static_assert(sizeof(T) == 2 && ROWS % 16 == 0 && COLS % 16 == 0, "left operands come in [16, 16]");
    u32 at[ROWS / 16][COLS / 16][4];
};

// A right operand [ROWS, COLS] of a product.
template <class T, int ROWS, int COLS>
struct RegTileB {
    static_assert(sizeof(T) == 2 && ROWS % 16 == 0 && COLS % 16 == 0, "right operands are loaded as [16, 16]");
    u32 at[ROWS / 16][COLS / 8][2];
};

// Calls f(row, col, element) for what this lane holds of `r`.
template <int ROWS, int COLS, class F>
__device__ void for_each(RegTile<ROWS, COLS>& r, F f) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) f(16 * i + g + e / 2 * 8, 8 * j + 2 * t + e % 2, r.at[i][j][e]);
        }
    }
}

template <int ROWS, int COLS>
__device__ void zero(RegTile<ROWS, COLS>& r) {
    for_each(r, [](int, int, float& x) { x = 0.0f; });
}

// Keeps what is on or below the diagonal. A select, so that nothing above it survives, not even a NaN.
// (row0, col0) is where the tile begins in the matrix that the diagonal belongs to.
template <int ROWS, int COLS>
__device__ void tril(RegTile<ROWS, COLS>& r, int row0, int col0) {
    for_each(r, [=](int row, int col, float& x) { x = row0 + row >= col0 + col ? x : 0.0f; });
}

// Keeps what is below the diagonal.
template <int ROWS, int COLS>
__device__ void strict_tril(RegTile<ROWS, COLS>& r, int row0, int col0) {
    for_each(r, [=](int row, int col, float& x) { x = row0 + row > col0 + col ? x : 0.0f; });
}

// r = s[row0 .. row0 + ROWS, col0 .. col0 + COLS]
template <class T, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_a(RegTileA<T, ROWS, COLS>& r, const SharedTile<T, S_ROWS, S_COLS>& s, int row0, int col0) {
    const int row = row0 + lane_id() % 16, col = col0 + lane_id() / 16 * 8;
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int k = 0; k < COLS / 16; ++k) ldmatrix_x4(r.at[i][k], &s.at(row + 16 * i, col + 16 * k));
    }
}

// r = the transpose of s[row0 .. row0 + COLS, col0 .. col0 + ROWS]
template <class T, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_a_transposed(
    RegTileA<T, ROWS, COLS>& r, const SharedTile<T, S_ROWS, S_COLS>& s, int row0, int col0
) {
    const int row = row0 + lane_id() % 8 + lane_id() / 16 * 8, col = col0 + lane_id() / 8 % 2 * 8;
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int k = 0; k < COLS / 16; ++k) ldmatrix_x4_trans(r.at[i][k], &s.at(row + 16 * k, col + 16 * i));
    }
}

// r = s[row0 .. row0 + ROWS, col0 .. col0 + COLS]
template <class T, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_b(RegTileB<T, ROWS, COLS>& r, const SharedTile<T, S_ROWS, S_COLS>& s, int row0, int col0) {
    const int row = row0 + lane_id() % 16, col = col0 + lane_id() / 16 * 8;
    #pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        #pragma unroll
        for (int j = 0; j < COLS / 16; ++j) {
            u32 b[4];
            ldmatrix_x4_trans(b, &s.at(row + 16 * k, col + 16 * j));
            r.at[k][2 * j][0] = b[0];
            r.at[k][2 * j][1] = b[1];
            r.at[k][2 * j + 1][0] = b[2];
            r.at[k][2 * j + 1][1] = b[3];
        }
    }
}

// r = the transpose of s[row0 .. row0 + COLS, col0 .. col0 + ROWS]
template <class T, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_b_transposed(
    RegTileB<T, ROWS, COLS>& r, const SharedTile<T, S_ROWS, S_COLS>& s, int row0, int col0
) {
    const int row = row0 + lane_id() % 8 + lane_id() / 16 * 8, col = col0 + lane_id() / 8 % 2 * 8;
    #pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        #pragma unroll
        for (int j = 0; j < COLS / 16; ++j) {
            u32 b[4];
            ldmatrix_x4(b, &s.at(row + 16 * j, col + 16 * k));
            r.at[k][2 * j][0] = b[0];
            r.at[k][2 * j][1] = b[1];
            r.at[k][2 * j + 1][0] = b[2];
            r.at[k][2 * j + 1][1] = b[3];
        }
    }
}

// r = s[row0 .. row0 + ROWS, col0 .. col0 + COLS]
template <int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load(RegTile<ROWS, COLS>& r, const SharedTile<float, S_ROWS, S_COLS>& s, int row0, int col0) {
    const int row = row0 + lane_id() / 4, col = col0 + lane_id() % 4 * 2;
    #pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const float2 x = reinterpret_cast<const float2&>(s.at(row + 8 * i, col + 8 * j));
            r.at[i / 2][j][i % 2 * 2] = x.x;
            r.at[i / 2][j][i % 2 * 2 + 1] = x.y;
        }
    }
}

// s[row0 .. row0 + ROWS, col0 .. col0 + COLS] = r, rounded to the tile's type.
template <class T, int S_ROWS, int S_COLS, int ROWS, int COLS>
__device__ void store(SharedTile<T, S_ROWS, S_COLS>& s, const RegTile<ROWS, COLS>& r, int row0, int col0) {
    const int row = row0 + lane_id() / 4, col = col0 + lane_id() % 4 * 2;
    #pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const float* x = &r.at[i / 2][j][i % 2 * 2];
            T& pair = s.at(row + 8 * i, col + 8 * j);
            if constexpr (same<T, float>) {
                reinterpret_cast<float2&>(pair) = {x[0], x[1]};
            } else {
                reinterpret_cast<u32&>(pair) = pack2<T>(x[0], x[1]);
            }
        }
    }
}

// r_a = x, rounded to T: a result lies in the lanes as the left operand of the next product does.
template <class T, int ROWS, int COLS>
__device__ void narrow(RegTileA<T, ROWS, COLS>& r_a, const RegTile<ROWS, COLS>& x) {
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int k = 0; k < COLS / 16; ++k) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float* pair = &x.at[i][2 * k + e / 2][e % 2 * 2];
                r_a.at[i][k][e] = pack2<T>(pair[0], pair[1]);
            }
        }
    }
}

// r_b = the transpose of x, rounded to T: a result lies in the lanes as its transpose does as a right operand.
template <class T, int ROWS, int COLS>
__device__ void narrow_transposed(RegTileB<T, ROWS, COLS>& r_b, const RegTile<COLS, ROWS>& x) {
    #pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float* pair = &x.at[j / 2][2 * k + e][j % 2 * 2];
                r_b.at[k][j][e] = pack2<T>(pair[0], pair[1]);
            }
        }
    }
}

// d += a b
template <class T, int M, int N, int K>
__device__ void mma(RegTile<M, N>& d, const RegTileA<T, M, K>& a, const RegTileB<T, K, N>& b) {
    #pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        #pragma unroll
        for (int i = 0; i < M / 16; ++i) {
            #pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                if constexpr (same<T, bf16>) {
                    mma_m16n8k16_bf16(d.at[i][j], a.at[i][k], b.at[k][j], d.at[i][j]);
                } else {
                    mma_m16n8k16_f16(d.at[i][j], a.at[i][k], b.at[k][j], d.at[i][j]);
                }
            }
        }
    }
}

// Starts to copy the first `rows` rows of a matrix in global memory to `s`; the other rows become zeros. `src` and the
// stride are multiples of 16 bytes. THREADS threads take part, of which this one is `i_thread`; `cp_async_commit_group`,
// the wait and a barrier are the caller's.
template <int THREADS, class T, int ROWS, int COLS>
__device__ void load_async(SharedTile<T, ROWS, COLS>& s, const T* src, i64 stride_elems, int rows, int i_thread) {
    constexpr int PIECE = 16 / sizeof(T);
    constexpr int PIECES = COLS / PIECE;  // in a row
    #pragma unroll
    for (int first = 0; first < ROWS * PIECES; first += THREADS) {
        const u32 i = first + i_thread;
        if (ROWS * PIECES % THREADS != 0 && i >= ROWS * PIECES) break;
        const int row = i / u32(PIECES), col = i % u32(PIECES) * PIECE;
        const bool inside = row < rows;
        // The address of a row that is not read stays inside the matrix.
        cp_async_cg_16(&s.at(row, col), src + (inside ? row * stride_elems + col : 0), inside ? 16 : 0);
    }
}

// The way back: the first `rows` rows of `s` go to global memory.
template <int THREADS, class T, int ROWS, int COLS>
__device__ void store_rows(T* dst, i64 stride_elems, const SharedTile<T, ROWS, COLS>& s, int rows, int i_thread) {
    constexpr int PIECE = 16 / sizeof(T);
    constexpr int PIECES = COLS / PIECE;  // in a row
    #pragma unroll
    for (int first = 0; first < ROWS * PIECES; first += THREADS) {
        const u32 i = first + i_thread;
        if (ROWS * PIECES % THREADS != 0 && i >= ROWS * PIECES) break;
        const int row = i / u32(PIECES), col = i % u32(PIECES) * PIECE;
        if (row < rows) st_global(dst + row * stride_elems + col, reinterpret_cast<const Words<4>&>(s.at(row, col)));
    }
}

}  // namespace fla
