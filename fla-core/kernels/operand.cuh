// operand: matrices as operands of products, each element as one 16-bit number or as the sum of two.
//
// PARTS = 1 is the usual product of 16-bit numbers. With PARTS = 2 the second part holds what the first one's rounding
// lost, and a product is three: high high + high low + low high. Two bf16 hold 16 significant bits, so the product of
// f32 matrices is then off by about 2^-16 of its terms.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/mma.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// A matrix [ROWS, COLS] in shared memory.
template <class Half, int PARTS, int ROWS, int COLS>
struct OperandTile {
    static_assert(PARTS == 1 || PARTS == 2, "one number for each element, or two");
    SharedTile<Half, ROWS, COLS> part[PARTS];
};

// A left operand [ROWS, COLS] in the registers of a warp.
template <class Half, int PARTS, int ROWS, int COLS>
struct OperandA {
    RegTileA<Half, ROWS, COLS> part[PARTS];
};

// A right operand [ROWS, COLS] in the registers of a warp.
template <class Half, int PARTS, int ROWS, int COLS>
struct OperandB {
    RegTileB<Half, ROWS, COLS> part[PARTS];
};

// A pair of f32 numbers as parts.
template <class Half, int PARTS>
__device__ void split2(u32 (&parts)[PARTS], float low, float high) {
    parts[0] = pack2<Half>(low, high);
    if constexpr (PARTS == 2) {
        const float2 rounded = unpack2<Half>(parts[0]);
        parts[1] = pack2<Half>(low - rounded.x, high - rounded.y);
    }
}

template <class Half, int PARTS, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_a(
    OperandA<Half, PARTS, ROWS, COLS>& r, const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, int row0, int col0
) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) load_a(r.part[p], s.part[p], row0, col0);
}

template <class Half, int PARTS, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_a_transposed(
    OperandA<Half, PARTS, ROWS, COLS>& r, const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, int row0, int col0
) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) load_a_transposed(r.part[p], s.part[p], row0, col0);
}

template <class Half, int PARTS, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_b(
    OperandB<Half, PARTS, ROWS, COLS>& r, const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, int row0, int col0
) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) load_b(r.part[p], s.part[p], row0, col0);
}

template <class Half, int PARTS, int ROWS, int COLS, int S_ROWS, int S_COLS>
__device__ void load_b_transposed(
    OperandB<Half, PARTS, ROWS, COLS>& r, const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, int row0, int col0
) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) load_b_transposed(r.part[p], s.part[p], row0, col0);
}

// Columns 16 j .. of d += columns 16 k .. of a times b, with the small terms first.
template <class Half, int PARTS, int M, int N, int K>
__device__ void mma_block(
    RegTile<M, N>& d, int j, const OperandA<Half, PARTS, M, K>& a, int k, const OperandB<Half, PARTS, 16, 16>& b
) {
    #pragma unroll
    for (int i = 0; i < M / 16; ++i) {
        #pragma unroll
        for (int p = PARTS == 1 ? 2 : 0; p < 3; ++p) {
            constexpr int LOW = PARTS - 1;
            const int of_a = p == 0 ? LOW : 0, of_b = p == 1 ? LOW : 0;
            #pragma unroll
            for (int n = 0; n < 2; ++n) {
                float(&x)[4] = d.at[i][2 * j + n];
                if constexpr (same<Half, bf16>) {
                    mma_m16n8k16_bf16(x, a.part[of_a].at[i][k], b.part[of_b].at[0][n], x);
                } else {
                    mma_m16n8k16_f16(x, a.part[of_a].at[i][k], b.part[of_b].at[0][n], x);
                }
            }
        }
    }
}

// r = x in parts: a result lies in the lanes as the left operand of the next product does.
template <class Half, int PARTS, int ROWS, int COLS>
__device__ void narrow(OperandA<Half, PARTS, ROWS, COLS>& r, const RegTile<ROWS, COLS>& x) {
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int k = 0; k < COLS / 16; ++k) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float* pair = &x.at[i][2 * k + e / 2][e % 2 * 2];
                u32 parts[PARTS];
                split2<Half>(parts, pair[0], pair[1]);
                #pragma unroll
                for (int p = 0; p < PARTS; ++p) r.part[p].at[i][k][e] = parts[p];
            }
        }
    }
}

// The way back: x = the sum of the parts.
template <class Half, int PARTS, int ROWS, int COLS>
__device__ void widen(RegTile<ROWS, COLS>& x, const OperandA<Half, PARTS, ROWS, COLS>& r) {
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int k = 0; k < COLS / 16; ++k) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                float* pair = &x.at[i][2 * k + e / 2][e % 2 * 2];
                float2 sum = unpack2<Half>(r.part[0].at[i][k][e]);
                if constexpr (PARTS == 2) {
                    const float2 low = unpack2<Half>(r.part[1].at[i][k][e]);
                    sum.x += low.x;
                    sum.y += low.y;
                }
                pair[0] = sum.x;
                pair[1] = sum.y;
            }
        }
    }
}

// Which blocks of 16 of the right operand are not zero.
enum class Blocks {
    ALL,
    UPPER,  // those whose column is at least their row
    LOWER,  // those whose row is at least their column
};

template <Blocks BLOCKS>
__device__ constexpr bool has_block(int row, int col) {
    return BLOCKS == Blocks::ALL || (BLOCKS == Blocks::UPPER ? col >= row : row >= col);
}

// The products of the two functions below, a block of 16x16 of the right operand at a time.
template <Blocks BLOCKS, bool TRANSPOSED, class Half, int PARTS, int M, int N, int K, int S_ROWS, int S_COLS>
__device__ void mma_blocks(
    RegTile<M, N>& d,
    const OperandA<Half, PARTS, M, K>& a,
    const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s,
    int row0,
    int col0
) {
    #pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        #pragma unroll
        for (int j = 0; j < N / 16; ++j) {
            if (!has_block<BLOCKS>(k, j)) continue;
            OperandB<Half, PARTS, 16, 16> b;
            if constexpr (TRANSPOSED) {
                load_b_transposed(b, s, row0 + 16 * j, col0 + 16 * k);
            } else {
                load_b(b, s, row0 + 16 * k, col0 + 16 * j);
            }
            mma_block(d, j, a, k, b);
        }
    }
}

// d += a s[row0 .. row0 + K, col0 .. col0 + N]
template <Blocks BLOCKS = Blocks::ALL, class Half, int PARTS, int M, int N, int K, int S_ROWS, int S_COLS>
__device__ void mma_shared(
    RegTile<M, N>& d,
    const OperandA<Half, PARTS, M, K>& a,
    const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s,
    int row0,
    int col0
) {
    mma_blocks<BLOCKS, false>(d, a, s, row0, col0);
}

// d += a b with b = the transpose of s[row0 .. row0 + N, col0 .. col0 + K]
template <Blocks BLOCKS = Blocks::ALL, class Half, int PARTS, int M, int N, int K, int S_ROWS, int S_COLS>
__device__ void mma_shared_transposed(
    RegTile<M, N>& d,
    const OperandA<Half, PARTS, M, K>& a,
    const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s,
    int row0,
    int col0
) {
    mma_blocks<BLOCKS, true>(d, a, s, row0, col0);
}

// Columns 16 k .. of x as a left operand: x has other uses, and registers do not hold it twice.
template <class Half, int PARTS, int K>
__device__ OperandA<Half, PARTS, 16, 16> rounded(const RegTile<16, K>& x, int k) {
    RegTile<16, 16> block;
    #pragma unroll
    for (int n = 0; n < 8; ++n) block.at[0][n / 4][n % 4] = x.at[0][2 * k + n / 4][n % 4];
    OperandA<Half, PARTS, 16, 16> a;
    narrow(a, block);
    return a;
}

// d += x b with b = the transpose of s[row0 .. row0 + N, col0 .. col0 + K], where x is rounded on the way.
template <class Half, int PARTS, int N, int K, int S_ROWS, int S_COLS>
__device__ void mma_rounded_transposed(
    RegTile<16, N>& d,
    const RegTile<16, K>& x,
    const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s,
    int row0,
    int col0
) {
    #pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        const OperandA<Half, PARTS, 16, 16> a = rounded<Half, PARTS>(x, k);
        #pragma unroll
        for (int j = 0; j < N / 16; ++j) {
            OperandB<Half, PARTS, 16, 16> b;
            load_b_transposed(b, s, row0 + 16 * j, col0 + 16 * k);
            mma_block(d, j, a, 0, b);
        }
    }
}

// The same product with two matrices at once, d0 with s0 and d1 with s1.
template <class Half, int PARTS, int N, int K, int S_ROWS, int S_COLS>
__device__ void mma_rounded_transposed(
    RegTile<16, N>& d0,
    RegTile<16, N>& d1,
    const RegTile<16, K>& x,
    const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s0,
    const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s1,
    int col0
) {
    #pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        const OperandA<Half, PARTS, 16, 16> a = rounded<Half, PARTS>(x, k);
        #pragma unroll
        for (int j = 0; j < N / 16; ++j) {
            OperandB<Half, PARTS, 16, 16> b0, b1;
            load_b_transposed(b0, s0, 16 * j, col0 + 16 * k);
            load_b_transposed(b1, s1, 16 * j, col0 + 16 * k);
            mma_block(d0, j, a, 0, b0);
            mma_block(d1, j, a, 0, b1);
        }
    }
}

// s[row0 .. row0 + ROWS, col0 .. col0 + COLS] = r in parts.
template <class Half, int PARTS, int S_ROWS, int S_COLS, int ROWS, int COLS>
__device__ void store(
    OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, const RegTile<ROWS, COLS>& r, int row0, int col0
) {
    const int row = row0 + lane_id() / 4, col = col0 + lane_id() % 4 * 2;
    #pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const float* x = &r.at[i / 2][j][i % 2 * 2];
            u32 parts[PARTS];
            split2<Half>(parts, x[0], x[1]);
            #pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                reinterpret_cast<u32&>(s.part[p].at(row + 8 * i, col + 8 * j)) = parts[p];
            }
        }
    }
}

// Two neighbours of a row of `s`, of which the first is even.
template <class Half, int PARTS, int S_ROWS, int S_COLS>
__device__ float2 read_pair(const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, int row, int col) {
    float2 sum = {};
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const float2 x = unpack2<Half>(reinterpret_cast<const u32&>(s.part[p].at(row, col)));
        sum.x += x.x;
        sum.y += x.y;
    }
    return sum;
}

// Eight neighbours of a row of `s`, the first at a multiple of 8.
template <class Half, int PARTS, int S_ROWS, int S_COLS>
__device__ void read_eight(float (&x)[8], const OperandTile<Half, PARTS, S_ROWS, S_COLS>& s, int row, int col) {
    #pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const Words<4> words = reinterpret_cast<const Words<4>&>(s.part[p].at(row, col));
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 pair = unpack2<Half>(words.at[j]);
            x[2 * j] = p == 0 ? pair.x : x[2 * j] + pair.x;
            x[2 * j + 1] = p == 0 ? pair.y : x[2 * j + 1] + pair.y;
        }
    }
}

// Brings rows of global memory to `s` as parts: element (i, j) from src[i stride + j], zeros from row `rows` and column
// `cols` on. Numbers that need no rounding go by asynchronous copies: the caller commits, waits and meets at a barrier,
// which also makes the others visible. VECTORS says that rows start at multiples of 16 bytes and `cols` is a multiple of
// 16 bytes.
template <int THREADS, bool VECTORS, class Half, int PARTS, int ROWS, int COLS, class Element>
__device__ void load_rows(
    OperandTile<Half, PARTS, ROWS, COLS>& s, const Element* src, i64 stride, int rows, int cols, int i_thread
) {
    constexpr int PIECES = COLS / 8;  // of 8 elements, in a row
    constexpr bool ASYNC = VECTORS && PARTS == 1 && same<Half, Element>;
    // Few at once: addresses and numbers take registers that the caller needs for matrices.
    constexpr int AT_ONCE = ASYNC ? 4 : 1;
    #pragma unroll AT_ONCE
    for (int first = 0; first < ROWS * PIECES; first += THREADS) {
        const u32 i = first + i_thread;
        if (ROWS * PIECES % THREADS != 0 && i >= ROWS * PIECES) break;
        const int row = i / u32(PIECES), col = i % u32(PIECES) * 8;
        const bool inside = row < rows && col < cols;
        // The address of what is not read stays inside the matrix.
        const Element* piece = src + (inside ? row * stride + col : 0);
        if constexpr (ASYNC) {
            cp_async_cg_16(&s.part[0].at(row, col), piece, inside ? 16 : 0);
        } else {
            float x[8] = {};
            if (VECTORS && inside) {
                constexpr int N = 16 / sizeof(Element);
                #pragma unroll
                for (int j = 0; j < 8; j += N) {
                    if (col + j >= cols) break;
                    const Vec<Element, N> v = load_nc<N>(piece + j);
                    #pragma unroll
                    for (int n = 0; n < N; ++n) x[j + n] = to_f32(v.at[n]);
                }
            } else if (inside) {
                #pragma unroll
                for (int j = 0; j < 8; ++j) {
                    if (col + j < cols) x[j] = to_f32(piece[j]);
                }
            }
            Words<4> words[PARTS];
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 parts[PARTS];
                split2<Half>(parts, x[2 * j], x[2 * j + 1]);
                #pragma unroll
                for (int p = 0; p < PARTS; ++p) words[p].at[j] = parts[p];
            }
            #pragma unroll
            for (int p = 0; p < PARTS; ++p) reinterpret_cast<Words<4>&>(s.part[p].at(row, col)) = words[p];
        }
    }
}

// Stores a result's rows: element (i, j) to dst[i stride + j], as far as rows and columns go. VECTORS says that `dst` and
// the stride are multiples of 4 elements. Neighbouring lanes swap halves first, so that each writes 4 elements, and four
// lanes 8 columns of 16-bit numbers that lie side by side with those of the next tile.
template <bool VECTORS, class Element, int ROWS, int COLS>
__device__ void store_result(Element* dst, i64 stride, const RegTile<ROWS, COLS>& x, int rows, int cols) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    if constexpr (VECTORS && COLS % 16 == 0) {
        const bool odd = t & 1;
        const int col0 = odd ? 8 + 2 * (t - 1) : 2 * t;
        #pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS / 8; j += 2) {
                const float* a = &x.at[i / 2][j][i % 2 * 2];
                const float* b = &x.at[i / 2][j + 1][i % 2 * 2];
                const int row = 8 * i + g, col = 8 * j + col0;
                const bool inside = row < rows && col < cols;
                if constexpr (same<Element, float>) {
                    const float sent0 = odd ? a[0] : b[0], sent1 = odd ? a[1] : b[1];
                    const float got0 = __shfl_xor_sync(FULL_WARP, sent0, 1), got1 = __shfl_xor_sync(FULL_WARP, sent1, 1);
                    const Vec<float, 4> four =
                        odd ? Vec<float, 4>{got0, got1, b[0], b[1]} : Vec<float, 4>{a[0], a[1], got0, got1};
                    if (inside) store(dst + row * stride + col, four);
                } else {
                    const u32 low = pack2<Element>(a[0], a[1]), high = pack2<Element>(b[0], b[1]);
                    const u32 got = __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
                    const Words<2> four = {odd ? got : low, odd ? high : got};
                    if (inside) st_global(dst + row * stride + col, four);
                }
            }
        }
    } else {
        #pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS / 8; ++j) {
                #pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = 8 * i + g, col = 8 * j + 2 * t + e;
                    if (row < rows && col < cols) {
                        dst[row * stride + col] = from_f32<Element>(x.at[i / 2][j][i % 2 * 2 + e]);
                    }
                }
            }
        }
    }
}

// The transpose of a result: element (i, j) to dst[j stride + i], the first `rows` of the tile's rows and `cols` of its
// columns.
template <bool VECTORS, class Element, int COLS>
__device__ void store_result_transposed(Element* dst, i64 stride, const RegTile<16, COLS>& x, int rows, int cols) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    if constexpr (VECTORS && sizeof(Element) == 2) {
        const bool odd = t & 1;
        const int row0 = odd ? 8 + 2 * (t - 1) : 2 * t;
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const float(&r)[4] = x.at[0][j];
            const u32 low = movmatrix_trans(pack2<Element>(r[0], r[1]));
            const u32 high = movmatrix_trans(pack2<Element>(r[2], r[3]));
            const u32 got = __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
            const Words<2> four = {odd ? got : low, odd ? high : got};
            if (8 * j + g < cols && row0 < rows) st_global(dst + (8 * j + g) * stride + row0, four);
        }
    } else {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = g + e / 2 * 8, col = 8 * j + 2 * t + e % 2;
                if (row < rows && col < cols) dst[col * stride + row] = from_f32<Element>(x.at[0][j][e]);
            }
        }
    }
}

}  // namespace fla
