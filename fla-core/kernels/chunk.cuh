// chunk: sequences in chunks of 16 tokens, which are the rows of one product on tensor cores.
#pragma once
#include <fla/core/blocks.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/mma.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla {

inline constexpr int CHUNK = 16;  // tokens of a chunk

// Chunks of a sequence.
struct Chunks {
    int count;
    int last_rows;  // tokens of the last

    __device__ explicit Chunks(i64 len) : count((len + CHUNK - 1) / CHUNK), last_rows(len - i64(count - 1) * CHUNK) {}
    __device__ int rows(int i_chunk) const { return i_chunk + 1 == count ? last_rows : CHUNK; }
};

// Copies a tile of `rows` tokens by THREADS threads; the rows after them become zeros. `src` is the first token's first
// column, of `cols`; whole heads have COLS.
template <int COLS, int THREADS, class T, int TILE_COLS>
__device__ void load_tokens(
    TokenTile<T, TILE_COLS>& s, const T* src, i32 stride, int rows, int cols, int i_thread
) {
    constexpr int PIECE = 16 / sizeof(T);
    if constexpr (COLS % PIECE == 0) {
        constexpr int PIECES = TILE_COLS / PIECE;
        #pragma unroll
        for (int first = 0; first < CHUNK * PIECES; first += THREADS) {
            const int i = first + i_thread;
            if (CHUNK * PIECES % THREADS != 0 && i >= CHUNK * PIECES) break;
            const int row = i / PIECES, col = i % PIECES * PIECE;
            const bool inside = row < rows && (TILE_COLS == COLS || col < cols);
            cp_async_cg_16(&s.at(row, col), src + (inside ? row * stride + col : 0), inside ? 16 : 0);
        }
    } else {
        // Rows begin anywhere.
        for (int i = i_thread; i < CHUNK * TILE_COLS; i += THREADS) {
            const int row = i / TILE_COLS, col = i % TILE_COLS;
            s.at(row, col) = row < rows && col < cols ? src[row * stride + col] : from_f32<T>(0.0f);
        }
    }
}

// Rows of tokens, CHANNELS long and `stride` apart, from 16 channels of their transpose, which begin inside of a row. `dst` is
// the first token's first channel.
template <int CHANNELS, class Element>
__device__ void store_transposed(Element* dst, i32 stride, Acc16& d, int col0, int rows) {
    if constexpr (sizeof(Element) == 2 && CHANNELS % 2 == 0) {
        const int row = lane_id() / 4, col = col0 + lane_id() % 4 * 2;
        Element* lane_dst = dst + row * stride + col;
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Block i % 2 of channels and i / 2 of tokens; a lane gets two channels of one token.
            const u32 pair = movmatrix_trans(pack2<Element>(d.at[i / 2][i % 2 * 2], d.at[i / 2][i % 2 * 2 + 1]));
            if (row + i / 2 * 8 < rows && (CHANNELS % 16 == 0 || col + i % 2 * 8 < CHANNELS)) {
                *reinterpret_cast<u32*>(lane_dst + i / 2 * 8 * stride + i % 2 * 8) = pair;
            }
        }
    } else {
        for_each(d, [&](int channel, int row, float& x) {
            if (row < rows && (CHANNELS % 16 == 0 || col0 + channel < CHANNELS)) {
                dst[row * stride + col0 + channel] = from_f32<Element>(x);
            }
        });
    }
}

}  // namespace fla
